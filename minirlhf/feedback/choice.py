"""The maths of eleven kinds of feedback: how likely what a person said is under a reward.

One likelihood carries most (Jeon, Milli, Dragan 2020, arXiv 2002.04833): whoever speaks chooses one
of a set of options, each of which stands for a response or a mixture of them, with

    P(c) = exp(beta r(c)) / sum over c' of exp(beta r(c'))

beta is how rational that person is in that kind of feedback: 0 is chance. Tensors in, tensors out;
every loss is one number for each of B labels, minimised. Missing options have the value -inf.

Left out: FRESH's ensemble, EMPATHIC's video, RLIF's model of when people step in, Eureka's search
for reward programs, the choice of what to ask next.
"""

import math

import torch
import torch.nn.functional as F


def choice_nll(values, chosen, beta=1.0):
    """-log P(chosen): (B,) of values (B, K), -inf for missing options, and chosen (B,) int."""
    scaled = beta * values
    taken = scaled.gather(1, chosen[:, None])
    return scaled.logsumexp(1) - taken.squeeze(1)


def expected_values(values, weights):
    """What options stand for: (B, K) means of values (B, N) under weights (B, K, N)."""
    return (weights * values[:, None]).sum(2)


def pair_mean(losses, weights):
    """(B,) means of the losses (B, K, K) under weights of that shape; 0 where all are 0."""
    weights = weights.to(losses.dtype)
    total = (weights * losses).sum((1, 2))
    return total / weights.sum((1, 2)).clamp(min=1)


def ahead(values):
    """(B, K, K): how far the second is ahead of the first; and whether both are there."""
    there = values > -math.inf
    known = values.masked_fill(~there, 0)
    difference = known[:, None] - known[:, :, None]
    both = there[:, None] & there[:, :, None]
    return difference, both


# Critique: Xiao et al. 2020 (FRESH), ordinal


def level_log_probs(scores, cuts, beta=1.0):
    """log P(level) (B, L) of scores (B,) between rising cuts (L-1,): P(at most k) = S(cut_k - r).

    S(a) - S(b) = S(a) S(-b) (1 - exp(b - a)), in logs, so far tails keep their gradient.
    """
    end = cuts.new_full((1,), math.inf)
    upper = torch.cat([cuts, end])
    lower = torch.cat([-end, cuts])
    r = scores[:, None]
    under = F.logsigmoid(beta * (upper - r))
    over = F.logsigmoid(beta * (r - lower))
    overlap = torch.expm1(beta * (lower - upper))
    return under + over + torch.log(-overlap)


def critique_nll(scores, levels, cuts, beta=1.0):
    """Of levels (B,) int, 0 the worst; one cut is good or bad, -log S(beta (r - cut)) of good."""
    every = level_log_probs(scores, cuts, beta)
    return -every.gather(1, levels[:, None]).squeeze(1)


# Comparisons: Akrour, Schoenauer, Sebag 2011; Plackett 1975; Bradley and Terry 1952


def ranking_nll(values, beta=1.0):
    """Plackett-Luce: (B,) of values (B, K) in the order given, best first, -inf for missing."""
    missing = values == -math.inf
    lowest = torch.finfo(values.dtype).min  # weighs exp(min - v) = 0 as -inf does
    scaled = (beta * values).masked_fill(missing, lowest)
    rest = scaled.flip(1).logcumsumexp(1).flip(1)  # of this option and all behind it
    return (rest - scaled).masked_fill(missing, 0).sum(1)


def soft_nll(values, p, beta=1.0):
    """Cross entropy of Bradley and Terry's chance against p, that of the first of two: (B,).

    values (B, 2), p (B,). It is least at beta (v1 - v2) = log(p / (1 - p)) (Lee et al. 2023).
    """
    difference = beta * (values[:, 0] - values[:, 1])
    p = p.to(difference)
    return -p * F.logsigmoid(difference) - (1 - p) * F.logsigmoid(-difference)


def tiers_nll(values, tiers, beta=1.0):
    """Of rankings with ties: the mean over all pairs of Bradley-Terry, a tie being label 1/2.

    values (B, K), tiers (B, K) int: 0 the best, equal ones tied.
    """
    difference, there = ahead(beta * values)
    losses = -F.logsigmoid(difference)  # that the second is better
    second, first = tiers[:, None], tiers[:, :, None]
    label = (second < first) + 0.5 * (second == first)
    itself = torch.eye(values.shape[1], device=values.device)
    return pair_mean(losses, label * there * (1 - itself))


def both_bad_nll(values, both_bad, bar, beta=1.0):
    """Of whether none of the options (B, K) is good enough: P = product of S(bar - v)."""
    missing = values == -math.inf
    known = values.masked_fill(missing, 0)
    under = F.logsigmoid(beta * (bar - known))
    bad = under.masked_fill(missing, 0).sum(1)  # log P
    some = -torch.expm1(bad.clamp(max=-1e-6))
    return -torch.where(both_bad, bad, some.log())


# Inter-temporal: Cabi et al. 2019 (reward sketching)


def sketch_pairs(curve, gap=0.1):
    """(B, K, K): whether the curve (B, K) is at the second place higher than at the first by more
    than `gap`."""
    return curve[:, None] - curve[:, :, None] > gap


def sketch_hinge(values, curve, gap=0.1, margin=0.1):
    """(B,) means of max(0, margin + v_i - v_j) where the curve rises from i to j.

    values (B, K): what the prefixes are worth that the curve (B, K) was drawn at.
    """
    difference, there = ahead(values)
    rises = sketch_pairs(curve, gap) & there
    return pair_mean(F.relu(margin - difference), rises)


def sketch_nll(values, curve, gap=0.1, beta=1.0):
    """The same as choices: of two prefixes the one with the higher curve."""
    difference, there = ahead(beta * values)
    rises = sketch_pairs(curve, gap) & there
    return pair_mean(-F.logsigmoid(difference), rises)


# Proxy rewards: Hadfield-Menell et al. 2017 (inverse reward design), He and Dragan 2021


def proxy_weights(features, weights, temperature=1.0):
    """What each proxy would have written: (K, N) softmax of weights (K, F) . features (N, F).

    The proxy that was given is then a choice among all, by expected_values and choice_nll.
    """
    worth = weights @ features.T
    return (worth / temperature).softmax(1)


# Social behaviour: Cui et al. 2021 (EMPATHIC)


def confusion(counts):
    """P(reaction | level) (Q, Z) from counts of both, one added to each."""
    smooth = counts + 1
    return smooth / smooth.sum(1, keepdim=True)


def social_nll(scores, reactions, cuts, shown, beta=1.0):
    """Of reactions (B,) int: P(z | r) = sum over levels q of shown[q, z] P(q | r); shown (Q, Z)."""
    at_level = level_log_probs(scores, cuts, beta)
    both = at_level[:, :, None] + shown.log()  # (B, Q, Z)
    reacts = both.logsumexp(1)
    return -reacts.gather(1, reactions[:, None]).squeeze(1)


# Improvements: Luo et al. 2023 (RLIF)


def improvement_nll(before, after, edits, cost=0.0, beta=1.0):
    """Of having edited, not left as it was: (B,), each of `edits` (B,) being a `cost`."""
    edited = after - cost * edits.to(after)
    values = torch.stack([edited, before], 1)
    chosen = torch.zeros_like(edits, dtype=torch.int64)
    return choice_nll(values, chosen, beta)


def intervention_rewards(edited):
    """RLIF's own reward of tokens (B, T): -1 where an intervention begins, 0 elsewhere."""
    before = F.pad(edited, (1, 0))[:, :-1]
    begins = edited & ~before
    return -begins.float()


# Natural language: utterances as choices (Jeon et al. 2020)


def utterance_weights(feature, own, more):
    """What "more X" stands for: (N,), even weights of the pool's texts with more of it than `own`.

    feature (N,); the pool's first text is the one spoken of: it stands for an utterance that no
    text satisfies.
    """
    fits = feature > own if more else feature < own
    if not fits.any():
        fits = fits.clone()
        fits[0] = True
    weights = fits.to(feature.dtype)
    return weights / weights.sum()


# E-stops: Ghosal et al. 2023; with all moments as options a choice among prefixes, by choice_nll


def estop_binary_nll(rest, stopped, beta=1.0):
    """Of stopping at one moment or not: P = S(-beta rest), rest (B,) what the rest is worth."""
    scaled = beta * rest
    return F.softplus(torch.where(stopped, scaled, -scaled))


# Importance labels: Guan et al. 2021 (EXPAND)


def occlusion_penalty(whole, occluded):
    """What it costs, beside the loss of the label itself, that unmarked tokens matter: (B,)."""
    return (whole - occluded) ** 2


# Feature traces: Bobu et al. 2022 (FERL)


def trace_nll(values):
    """(B,) means of -log S(psi_j - psi_i) over i < j of a feature (B, K) along a trace."""
    difference, there = ahead(values)
    later = torch.ones_like(there).triu(1)
    return pair_mean(-F.logsigmoid(difference), there & later)


# Similarity queries: Bobu et al. 2023 (SIRL)


def square_distances(embedded):
    """(B, 3): between the two others, for each of three embeddings (B, 3, D)."""
    one, other = embedded[:, [1, 0, 0]], embedded[:, [2, 2, 1]]
    return (one - other).square().sum(2)


def triplet_hinge(embedded, odd, margin=1.0):
    """(B,): the two alike are nearer to each other, by a margin, than each of them to the odd."""
    squares = square_distances(embedded)
    alike = squares.gather(1, odd[:, None])
    hinges = F.relu(alike - squares + margin)
    return hinges.scatter(1, odd[:, None], 0).sum(1)  # without the two alike and themselves


def odd_nll(embedded, odd, beta=1.0):
    """The same as a choice among the three pairs, each worth minus its squared distance."""
    return choice_nll(-square_distances(embedded), odd, beta)


# How rational people were


@torch.no_grad()
def fit_beta(values, chosen, cap=50.0):
    """The most likely beta of choices under values (B, K) that are fixed: Newton, steps of 1 most.

    Where every choice is the best there is no largest likelihood: the cap. Never below 0.
    """
    missing = values == -math.inf
    known = values.double().masked_fill(missing, 0)
    taken = known.gather(1, chosen[:, None])
    beta = 1.0
    for _ in range(4 * math.ceil(cap)):
        scaled = beta * known
        p = scaled.masked_fill(missing, -math.inf).softmax(1)
        mean = (p * known).sum(1, keepdim=True)
        slope = (taken - mean).sum().item()
        bend = (p * (known - mean) ** 2).sum().item()
        step = slope / max(bend, abs(slope), 1e-300)
        before, beta = beta, min(cap, max(0.0, beta + step))
        if abs(beta - before) < 1e-9:
            break
    return beta
