"""A policy's own responses against one another: sampled, and compared by a labeler.

A batch of which only some pairs are compared is asked.py's. Left out: a pool of earlier policies as
opponents; a cache for the mixture, whose responses are short.
"""

from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from minirlhf.data import all_logps
from minirlhf.engine import parallel
from minirlhf.engine.decoding import row_noise
from minirlhf.engine.rows import Rows, pad_rows, response_mask, rowwise, window
from minirlhf.feedback.kinds import Batch, Compared, Ranked
from minirlhf.kernels.decoding import draw
from minirlhf.sampling import generate


@torch.no_grad()
def own_batch(policy, reference, prefer, tokenizer, kind, knobs, prompts):
    """The Batch of what the policy answers to n prompts, rows of ids.

    It writes --samples responses to each. One wins as often as it is preferred to the others; the
    best and the worst make the pair, and rwr takes all as a list. Nash-MD's one response is
    compared with one of the mixture, which does not take part in the batch, XPO's with one of the
    reference, which does.
    """
    device = policy.wte.weight.device
    asked, lengths = pad_rows(prompts, tokenizer.pad, device)  # (n, Q), (n,)
    options = {"eos": tokenizer.eos, "pad": tokenizer.pad}
    if kind in ("nash_md", "xpo"):
        sampled = one_each(policy, reference, kind, knobs, asked, lengths, **options)
    else:
        sampled = several(policy, knobs.samples, knobs.response_length, asked, lengths, **options)
    tokens, response_lengths = sampled  # (n, K, Q+R), (n, K)
    compare = partial(preferences_of, prefer)
    preferences = rowwise(compare, 0, tokens, lengths, response_lengths)  # (n, K, K)
    wins = win_rates(preferences)  # (n, K)

    n, K = wins.shape
    ranking = wins.argsort(dim=1, descending=True, stable=True)
    kept = ranking[:, [0, -1]]  # (n, 2): best and worst
    if kind == "nash_md":
        kept = torch.zeros_like(ranking[:, :1])  # (n, 1): the policy's
    elif kind in ("xpo", "rwr"):
        kept = torch.arange(K, device=device).expand(n, K)  # all, in their order
    each = torch.arange(n, device=device)
    best, worst = kept[:, 0], kept[:, -1]
    labels = preferences[each, best, worst].cpu().numpy()
    places = np.arange(kept.numel()).reshape(kept.shape)
    said = Compared(places.flatten(), places[:, [0, -1]], labels)
    if kind == "rwr":
        worth = scores_of(preferences).cpu().numpy()
        said = Ranked(places.flatten(), places, worth, np.ones((n, K), dtype=bool))

    across = each[:, None]
    kept_tokens = tokens[across, kept].flatten(0, 1)
    kept_lengths = response_lengths[across, kept].flatten()
    prompt_lengths = lengths.repeat_interleave(kept.shape[1])
    rows = Rows.sampled(kept_tokens, prompt_lengths, kept_lengths, tokenizer.pad)
    won = wins.gather(1, kept).flatten()
    bought = n * K * (K - 1) // 2
    return Batch(rows, all_logps(reference, rows), said, won, bought)


def several(policy, K, response_length, prompts, prompt_lengths, **options):
    """K samples of the policy to each prompt: tokens (n, K, Q+R), response lengths (n, K)."""
    prompts = prompts.repeat_interleave(K, 0)
    prompt_lengths = prompt_lengths.repeat_interleave(K)
    own = generate(policy, prompts, prompt_lengths, response_length, **options)
    tokens = own.tokens.unflatten(0, (-1, K))
    return tokens, own.response_lengths.view(-1, K)


def one_each(policy, reference, kind, knobs, prompts, prompt_lengths, **options):
    """The policy's response, and Nash-MD's mixture's or else the reference's: tokens (n, 2, Q+R),
    response lengths (n, 2)."""
    R = knobs.response_length
    own = generate(policy, prompts, prompt_lengths, R, **options)
    if kind == "nash_md":
        given = policy, reference, knobs.mixture, prompts, prompt_lengths, R
        other, other_lengths = sample_mixture(*given, **options)
    else:
        rival = generate(reference, prompts, prompt_lengths, R, **options)
        other, other_lengths = rival.tokens, rival.response_lengths
    tokens = torch.stack([own.tokens, other], 1)
    lengths = torch.stack([own.response_lengths, other_lengths], 1)
    return tokens, lengths


def preferences_of(prefer, tokens, prompt_lengths, response_lengths):
    """(n, K, K) P(i preferred to j) of responses (n, K, T) to n prompts, by a labeler of rows."""
    K = tokens.shape[1]
    prompt_lengths = prompt_lengths.repeat_interleave(K)
    return prefer(tokens.flatten(0, 1), prompt_lengths, response_lengths.flatten(), K)


def win_rates(preferences):
    """How often each response beats the others to its prompt, on average: (n, K) of (n, K, K)."""
    K = preferences.shape[1]
    itself = torch.eye(K, dtype=torch.bool, device=preferences.device)
    return preferences.masked_fill(itself, 0).sum(2) / (K - 1)


def scores_of(preferences):
    """Scores (n, K) by which Bradley and Terry have the preferences (n, K, K), up to a constant of
    each prompt: the mean log-odds. A chance is taken for at least 1e-6 and for 1 less that."""
    itself = torch.eye(preferences.shape[1], dtype=torch.bool, device=preferences.device)
    log_odds = preferences.masked_fill(itself, 0.5).clamp(1e-6, 1 - 1e-6).logit()
    return log_odds.mean(2)


@torch.no_grad()
def own_answers(policy, rows, K, response_length):
    """K samples of the policy to the prompt of each row, in turn: Rows (N K)."""
    prompts = []
    for row, p in zip(rows.tokens, rows.prompt_lengths, strict=True):
        prompts += [row[:p]] * K
    tokens, lengths = pad_rows(prompts, rows.pad, rows.device)
    eos = int(prompts[0][0])
    sampled = generate(policy, tokens, lengths, response_length, eos=eos, pad=rows.pad)
    return Rows.sampled(sampled.tokens, lengths, sampled.response_lengths, rows.pad)


@torch.no_grad()
def sample_mixture(policy, reference, mu, prompts, prompt_lengths, max_new_tokens, *, eos, pad):
    """Samples of pi^(1-mu) pi_ref^mu, normalised at each token (Munos et al. 2023).

    prompts (B, Q) int, right-padded -> tokens (B, Q+R) left-aligned and response lengths (B,), as
    in a Rollout.
    """
    seed = torch.randint(2**62, ()).item()
    noise = row_noise(seed, 0, len(prompts), max_new_tokens).to(prompts.device)  # (B, R, 2)

    def next_probs(tokens, lengths):
        """The mixture's distribution (B, V) after the first `lengths` tokens of each row."""
        logits = 0  # a model's are its log-probs up to a constant, which the softmax forgets
        for model, weight in ((policy, 1 - mu), (reference, mu)):
            hidden = model.hidden(tokens)  # (B, T, C)
            last = window(hidden, lengths - 1, 1)[:, 0]
            head = model.lm_head_weight
            with torch.autocast(last.device.type, enabled=False):
                logits = logits + weight * (last.float() @ head.float().t())
        return logits.softmax(1)

    def sample(prompts, prompt_lengths, noise):
        Q = prompts.shape[1]
        prompts = prompts.where(response_mask(prompt_lengths, Q), pad)
        tokens = F.pad(prompts, (0, max_new_tokens), value=pad)
        ended = torch.zeros_like(prompt_lengths, dtype=torch.bool)
        lengths = prompt_lengths.clone()
        for t in range(max_new_tokens):
            place = prompt_lengths + t
            probs = next_probs(tokens[:, : Q + t], place)
            token = draw(probs, noise[:, t])
            token = token.masked_fill(ended, pad)
            tokens.scatter_(1, place[:, None], token[:, None])
            lengths += ~ended
            ended |= token == eos
            if ended.all():
                break
        return tokens, lengths - prompt_lengths

    # Processes may take unequal numbers of steps.
    with parallel.sampling(policy), parallel.sampling(reference):
        return rowwise(sample, 0, prompts, prompt_lengths, noise)
