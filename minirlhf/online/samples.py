"""A policy's own responses against one another: sampled, compared by a labeler, and handed on as a batch for train_dpo --online.

Left out: a pool of earlier policies as opponents; a choice of which comparison to ask for; a cache for the mixture, whose responses
are short.
"""


import numpy as np
import torch

from minirlhf.data import all_logps
from minirlhf.engine import parallel
from minirlhf.engine.decoding import row_noise
from minirlhf.engine.rows import Rows, pad_rows
from minirlhf.kernels.decoding import draw
from minirlhf.sampling import before_response, generate, generate_all


def win_rates(preferences):
    """How often each response beats the others to its prompt, on average: (n, K) of P(i preferred to j) (n, K, K)."""
    itself = torch.eye(preferences.shape[1], dtype=torch.bool, device=preferences.device)
    return preferences.masked_fill(itself, 0).sum(2) / (preferences.shape[1] - 1)


@torch.no_grad()
def own_batch(policy, reference, prefer, tokenizer, kind, knobs, prompts):
    """(labels bought, Rows, ref_logps (b,), pairs (n, 2), labels (n,) = P(first preferred), wins (b,)) of n prompts, rows of ids.

    The policy writes --samples responses to each. A response wins as often as it is preferred to the others; the best and the worst make
    the pair. Nash-MD's one response is compared with one of the mixture, which does not take part in the batch. Each process samples
    and compares its share of the prompts.
    """
    n, R, device = len(prompts), knobs.response_length, policy.wte.weight.device
    tokens, lengths = pad_rows(prompts, tokenizer.pad, device)  # (n, Q), (n,)
    mine, _ = parallel.share(n)
    K, options = 2 if kind == "nash_md" else knobs.samples, {"eos": tokenizer.eos, "pad": tokenizer.pad, "first_row": int(mine[0])}
    if kind == "nash_md":
        own = generate(policy, tokens[mine], lengths[mine], R, **options)
        other, other_lengths = sample_mixture(policy, reference, knobs.mixture, tokens[mine], lengths[mine], R, **options)
        sampled = torch.stack([own.tokens, other], 1), torch.stack([own.response_lengths, other_lengths], 1)
    else:
        options["first_row"] *= K
        own = generate(policy, *(x[mine].repeat_interleave(K, 0) for x in (tokens, lengths)), R, **options)
        sampled = (x.view(-1, K, *x.shape[1:]) for x in (own.tokens, own.response_lengths))
    tokens, response_lengths = sampled  # (n, K, Q+R), (n, K), of this process's share of n
    preferences = prefer(tokens.flatten(0, 1), lengths[mine].repeat_interleave(K), response_lengths.flatten(), K)  # (n, K, K)
    tokens, response_lengths, preferences = (parallel.gather(x, n) for x in (tokens, response_lengths, preferences))
    wins = win_rates(preferences)  # (n, K)
    ranking = wins.argsort(dim=1, descending=True, stable=True)
    kept = torch.zeros_like(ranking[:, :1]) if kind == "nash_md" else ranking[:, [0, -1]]  # (n, 1 or 2)
    index = (kept + K * torch.arange(n, device=device)[:, None]).flatten().tolist()
    rows = Rows.sampled(tokens.flatten(0, 1), lengths.repeat_interleave(K), response_lengths.flatten(), tokenizer.pad).take(index)
    pairs = np.arange(len(index)).reshape(n, -1)[:, [0, -1]]
    labels = preferences[torch.arange(n, device=device), kept[:, 0], kept[:, -1]]
    return n * K * (K - 1) // 2, rows, all_logps(reference, rows), pairs, labels.cpu().numpy(), wins.gather(1, kept).flatten()


@torch.no_grad()
def own_answers(policy, rows, K, response_length):
    """K samples of the policy to the prompt of each row, in turn: Rows (N K)."""
    prompts = [row[:p] for row, p in zip(rows.tokens, rows.prompt_lengths, strict=True) for _ in range(K)]
    tokens, lengths = pad_rows(prompts, rows.pad, rows.device)
    sampled = generate_all(policy, tokens, lengths, response_length, eos=int(prompts[0][0]), pad=rows.pad)
    return Rows.sampled(sampled.tokens, lengths, sampled.response_lengths, rows.pad)


@torch.no_grad()
def sample_mixture(policy, reference, mu, prompts, prompt_lengths, max_new_tokens, *, eos, pad, first_row=0):
    """Samples of the geometric mixture pi^(1-mu) pi_ref^mu, normalised at each token (Munos et al. 2023): tokens, response lengths.

    prompts (B, Q) int, right-padded -> tokens (B, Q+R) left-aligned and response lengths (B,), as in a Rollout.
    """
    B, Q = prompts.shape
    real = torch.arange(Q, device=prompts.device) < prompt_lengths[:, None]
    tokens = torch.cat([prompts.where(real, pad), prompts.new_full((B, max_new_tokens), pad)], 1)
    response_lengths, finished = torch.zeros_like(prompt_lengths), torch.zeros(B, dtype=torch.bool, device=prompts.device)
    noise = row_noise(torch.randint(2**62, ()).item(), first_row, B, max_new_tokens).to(prompts.device)
    with parallel.whole(policy), parallel.whole(reference):  # processes may take unequal numbers of steps
        for t in range(max_new_tokens):
            logits = 0  # (B, V); each model's logits are its log-probs up to a constant, which the softmax forgets
            for model, weight in ((policy, 1 - mu), (reference, mu)):
                hidden = before_response(model.hidden(tokens[:, : Q + t]), prompt_lengths + t, 1)[:, 0]
                with torch.autocast(hidden.device.type, enabled=False):
                    logits = logits + weight * (hidden.float() @ model.lm_head_weight.float().t())
            token = draw(logits.softmax(1), noise[:, t]).masked_fill(finished, pad)
            tokens.scatter_(1, (prompt_lengths + t)[:, None], token[:, None])
            response_lengths += ~finished
            finished |= token == eos
            if finished.all():
                break
    return tokens, response_lengths
