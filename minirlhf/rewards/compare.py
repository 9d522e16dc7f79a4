"""Two rewards side by side: what their scores of the same texts say, as figures.

A and B are given by their scores: of P prompts with K sampled responses each, (P, K), and of N
held-out texts, (N,), with pairs (M, 2) of these, the one first that people rate higher. Figures of
one reward alone are those of held_out.py.

Left out: standard errors of calibration; what a difference in accuracy is worth to a policy, for
which there are regret.py and overoptimisation.py.
"""

import numpy as np

from minirlhf.rewards import calibration
from minirlhf.rewards.language import bandit_spread


def order(z):
    """1, -1, or 0 for a tie."""
    return np.sign(z)


def sample_agreement(a, b):
    """Share of the pairs of responses (P, K) to one prompt that both rewards order alike; a tie of
    either is one half. nan for a single response."""
    first, second = np.triu_indices(a.shape[1], 1)
    if not len(first):
        return float("nan")
    return pair_agreement(a[:, first] - a[:, second], b[:, first] - b[:, second])


def pair_agreement(z_a, z_b):
    """The same of the margins of pairs."""
    return float(np.mean(1 + order(z_a) * order(z_b)) / 2)


def by_context(values, contexts):
    """(contexts, most texts in one) of values (N,), by lists of texts that are compared with each
    other; nan where a list is shorter."""
    found = np.full((len(contexts), max(map(len, contexts))), np.nan)
    for row, context in zip(found, contexts, strict=True):
        row[: len(context)] = values[context]
    return found


def within(values):
    """Values (P, K) less their prompt's mean, over the standard deviation that is left, flat and
    without nan. Where nothing is left they are 0."""
    left = values - np.nanmean(values, 1, keepdims=True)
    left = left[~np.isnan(left)]
    size = np.sqrt(np.mean(left**2))
    return left / size if size > 1e-12 * (1 + np.abs(values[~np.isnan(values)]).max()) else 0 * left


def outcomes(right_a, right_b):
    """Shares of held-out pairs by who is right, of 1, 0, and 1/2 for a tie, which is a coin's toss:
    {"both", "a", "b", "neither"}; they add up to 1."""
    a, b = np.asarray(right_a, dtype=float), np.asarray(right_b, dtype=float)
    return {
        "both": float(np.mean(a * b)),
        "a": float(np.mean(a * (1 - b))),
        "b": float(np.mean((1 - a) * b)),
        "neither": float(np.mean((1 - a) * (1 - b))),
    }


def accuracy_errors(right, pairs, units, rng, resamples=200):
    """Standard errors of the accuracies and of their difference, (3,), by the bootstrap over units.

    right (2, M) of two rewards. Pairs share texts, so 20,000 pairs of 1,000 texts are far fewer
    independent ones: whole units (N,), what shares a prompt or a text, are drawn again with
    replacement, and a pair counts as often as both of its units were drawn (Efron 1979).
    """
    _, unit = np.unique(units, return_inverse=True)
    first, second = unit[pairs[:, 0]], unit[pairs[:, 1]]
    n, found = unit.max() + 1, []
    for _ in range(resamples):
        drawn = rng.multinomial(n, np.full(n, 1 / n))
        weight = np.where(first == second, drawn[first], drawn[first] * drawn[second])
        if weight.any():
            found.append(right @ weight / weight.sum())
    accuracies = np.array(found).reshape(-1, 2)
    if n < 2 or len(accuracies) < 2:
        return np.full(3, np.nan)
    difference = accuracies[:, 0] - accuracies[:, 1]
    return np.array([*accuracies.std(0, ddof=1), difference.std(ddof=1)])


def disagreements(z_a, z_b, pairs, n):
    """The n pairs, as indices, that the rewards order most surely in opposite ways: with the
    largest of the smaller margin, each in the root mean square of its own. No text comes twice."""
    sure = np.minimum(*(np.abs(z) / (np.sqrt(np.mean(z**2)) or 1) for z in (z_a, z_b)))
    opposite = np.flatnonzero(order(z_a) * order(z_b) < 0)
    found, seen = [], set()
    for i in opposite[np.argsort(-sure[opposite], kind="stable")]:
        if len(found) == n:
            break
        if not seen.intersection(pairs[i].tolist()):
            found.append(int(i))
            seen.update(pairs[i].tolist())
    return found


def figures(scores, samples, contexts, pairs, units, seed):
    """What two rewards have in common: a dict. scores (2, N); samples (2, P, K) or None."""
    z = scores[:, pairs[:, 0]] - scores[:, pairs[:, 1]]
    right = np.array([calibration.is_right(some, np.ones(len(some))) for some in z])
    held_out = [by_context(some, contexts) for some in scores]
    found = {
        "distance": {"held-out": bandit_spread(*held_out)},
        "alike": {"held-out": pair_agreement(*z)},
        "outcomes": outcomes(*right),
        "accuracy": right.mean(1),
        "errors": accuracy_errors(right, pairs, units, np.random.default_rng(seed)),
    }
    if samples is not None:
        found["distance"]["samples"] = bandit_spread(*samples)
        found["alike"]["samples"] = sample_agreement(*samples)
    return found
