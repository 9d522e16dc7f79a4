"""A policy's own responses against one another: sampled, compared by a labeler, and handed on as a batch for train_dpo --online.

Left out: a pool of earlier policies as opponents; a choice of which comparison to ask for; a cache for the mixture, whose responses
are short.
"""

import numpy as np
import torch

from minirlhf import data
from minirlhf.batches import Rows, all_logps
from minirlhf.sampling import before_response, generate


def win_rates(preferences):
    """How often each response beats the others to its prompt, on average: (n, K) of P(i preferred to j) (n, K, K)."""
    itself = torch.eye(preferences.shape[1], dtype=torch.bool, device=preferences.device)
    return preferences.masked_fill(itself, 0).sum(2) / (preferences.shape[1] - 1)


@torch.no_grad()
def own_batches(policy, reference, prefer, prompts, tokenizer, kind, knobs, rng):
    """Yields batches without end: (labels bought so far, Rows, ref_logps (b,), pairs (n, 2), labels (n,) = P(first preferred), wins (b,)).

    For each of batch_size / 2 prompts the policy as it is then writes --samples responses. A response wins as often as it is preferred
    to the others; the best and the worst make the pair. Nash-MD's one response is compared with one of the mixture, which does not
    take part in the batch.
    """
    order = (i for _ in iter(int, 1) for i in rng.permutation(len(prompts)))
    n, device = knobs.batch_size // 2, policy.wte.weight.device
    ends, bought = {"eos": tokenizer.eos, "pad": tokenizer.pad}, 0
    while True:
        tokens, lengths = data.pad_rows([prompts[next(order)] for _ in range(n)], tokenizer.pad, device)  # (n, Q), (n,)
        if kind == "nash_md":
            own = generate(policy, tokens, lengths, knobs.response_length, **ends)
            other, other_lengths = sample_mixture(policy, reference, knobs.mixture, tokens, lengths, knobs.response_length, **ends)
            sampled = torch.stack([own.tokens, other], 1), torch.stack([own.response_lengths, other_lengths], 1)
            tokens, response_lengths = (x.flatten(0, 1) for x in sampled)
        else:
            repeated = (x.repeat_interleave(knobs.samples, 0) for x in (tokens, lengths))
            tokens, _, response_lengths, _ = generate(policy, *repeated, knobs.response_length, **ends)
        K = len(tokens) // n
        prompt_lengths = lengths.repeat_interleave(K)
        preferences = prefer(tokens, prompt_lengths, response_lengths, K)  # (n, K, K)
        wins = win_rates(preferences)  # (n, K)
        ranking = wins.argsort(dim=1, descending=True, stable=True)
        kept = torch.zeros_like(ranking[:, :1]) if kind == "nash_md" else ranking[:, [0, -1]]  # (n, 1 or 2)
        index = (kept + K * torch.arange(n, device=device)[:, None]).flatten().tolist()
        rows = Rows.sampled(tokens, prompt_lengths, response_lengths, tokenizer.pad).take(index)
        pairs = np.arange(len(index)).reshape(n, -1)[:, [0, -1]]
        bought += n * K * (K - 1) // 2
        kept_wins = wins.gather(1, kept)
        labels = preferences[torch.arange(n, device=device), kept[:, 0], kept[:, -1]]
        yield bought, rows, all_logps(reference, rows), pairs, labels.cpu().numpy(), kept_wins.flatten()


@torch.no_grad()
def own_answers(policy, rows, K, response_length):
    """K samples of the policy to the prompt of each row, in turn: Rows (N K)."""
    prompts = [row[:p] for row, p in zip(rows.tokens, rows.prompt_lengths, strict=True) for _ in range(K)]
    tokens, lengths = data.pad_rows(prompts, rows.pad, rows.device)
    sampled = generate(policy, tokens, lengths, response_length, eos=int(prompts[0][0]), pad=rows.pad)
    return Rows.sampled(sampled.tokens, lengths, sampled.response_lengths, rows.pad)


@torch.no_grad()
def sample_mixture(policy, reference, mu, prompts, prompt_lengths, max_new_tokens, *, eos, pad):
    """Samples of the geometric mixture pi^(1-mu) pi_ref^mu, normalised at each token (Munos et al. 2023): tokens, response lengths.

    prompts (B, Q) int, right-padded -> tokens (B, Q+R) left-aligned and response lengths (B,), as in a Rollout.
    """
    B, Q = prompts.shape
    real = torch.arange(Q, device=prompts.device) < prompt_lengths[:, None]
    tokens = torch.cat([prompts.where(real, pad), prompts.new_full((B, max_new_tokens), pad)], 1)
    response_lengths, finished = torch.zeros_like(prompt_lengths), torch.zeros(B, dtype=torch.bool, device=prompts.device)
    for t in range(max_new_tokens):
        logits = 0  # (B, V); each model's logits are its log-probs up to a constant, which the softmax forgets
        for model, weight in ((policy, 1 - mu), (reference, mu)):
            hidden = before_response(model.hidden(tokens[:, : Q + t]), prompt_lengths + t, 1)[:, 0]
            with torch.autocast(hidden.device.type, enabled=False):
                logits = logits + weight * (hidden.float() @ model.lm_head_weight.float().t())
        token = torch.multinomial(logits.softmax(1), 1).masked_fill(finished[:, None], pad)
        tokens.scatter_(1, (prompt_lengths + t)[:, None], token)
        response_lengths += ~finished
        finished |= token[:, 0] == eos
        if finished.all():
            break
    return tokens, response_lengths
