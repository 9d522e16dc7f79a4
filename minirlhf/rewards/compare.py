"""Two rewards side by side: what their scores of the same texts say, as figures.

A and B are given by their scores: of P prompts with K sampled responses each, (P, K), and of N
held-out texts, (N,), with pairs (M, 2) of these, the one first that people rate higher. Figures of
one reward alone are those of held_out.py.

Left out: standard errors of calibration; what a difference in accuracy is worth to a policy, for
which there are regret.py and overoptimisation.py.
"""

import numpy as np

from minirlhf.rewards import calibration
from minirlhf.rewards.language import bandit_spread, with_error


def sample_agreement(a, b):
    """Share of the pairs of responses (P, K) to one prompt that both rewards order alike; a tie of
    either is one half."""
    first, second = np.triu_indices(a.shape[1], 1)
    z_a = a[:, first] - a[:, second]
    z_b = b[:, first] - b[:, second]
    return pair_agreement(z_a, z_b)


def pair_agreement(z_a, z_b):
    """The same of the margins of pairs."""
    alike = np.sign(z_a) * np.sign(z_b)  # 1, -1, or 0 for a tie
    return float(np.mean(1 + alike) / 2)


def by_context(values, contexts):
    """(contexts, most texts in one) of values (N,), by lists of texts that are compared with each
    other; nan where a list is shorter."""
    width = max(map(len, contexts))
    found = np.full((len(contexts), width), np.nan)
    for row, context in zip(found, contexts, strict=True):
        row[: len(context)] = values[context]
    return found


def held_out_distance(a, b):
    """(distance, standard error) of scores by context; of a single context, whose prompts would
    give no error, over its texts."""
    distance, error = bandit_spread(a, b)
    if len(a) == 1:
        x, y = within(a), within(b)
        _, error = with_error(np.stack([x * y, x * x, y * y], -1))
    return distance, error


def within(values):
    """Values (P, K) less their prompt's mean, over the standard deviation that is left, flat and
    without nan. Where rounding alone is left they are 0."""
    known = ~np.isnan(values)
    left = values - np.nanmean(values, 1, keepdims=True)
    left = left[known]
    size = np.sqrt(np.mean(left**2))
    largest = np.abs(values[known]).max()
    if size <= 1e-12 * largest:
        return np.zeros_like(left)
    return left / size


def outcomes(right_a, right_b):
    """Shares of held-out pairs by who is right, of 1, 0, and 1/2 for a tie, which is a coin's toss:
    {"both", "a", "b", "neither"}; they add up to 1."""
    a = np.asarray(right_a, dtype=float)
    b = np.asarray(right_b, dtype=float)
    shares = {
        "both": a * b,
        "a": a * (1 - b),
        "b": (1 - a) * b,
        "neither": (1 - a) * (1 - b),
    }
    return {who: float(share.mean()) for who, share in shares.items()}


def accuracy_errors(right, pairs, units, rng, resamples=200):
    """Standard errors of the accuracies and of their difference, (3,), by the bootstrap over units.

    right (2, M) of two rewards. Pairs share texts, so 20,000 pairs of 1,000 texts are far fewer
    independent ones: whole units (N,), what shares a prompt or a text, are drawn again with
    replacement, and a pair counts as often as both of its units were drawn (Efron 1979).
    """
    _, unit = np.unique(units, return_inverse=True)
    first = unit[pairs[:, 0]]
    second = unit[pairs[:, 1]]
    n = unit.max() + 1
    alike = np.full(n, 1 / n)
    found = []
    for _ in range(resamples):
        drawn = rng.multinomial(n, alike)
        both = drawn[first] * drawn[second]
        weight = np.where(first == second, drawn[first], both)
        if weight.any():
            found.append(right @ weight / weight.sum())
    if n < 2 or len(found) < 2:
        return np.full(3, np.nan)
    a, b = np.transpose(found)
    errors = [some.std(ddof=1) for some in (a, b, a - b)]
    return np.array(errors)


def disagreements(z_a, z_b, pairs, n):
    """The n pairs, as indices, that the rewards order most surely in opposite ways: with the
    largest of the smaller margin, each in the root mean square of its own. No text comes twice."""
    sure = np.minimum(in_own_size(z_a), in_own_size(z_b))
    opposite = np.flatnonzero(np.sign(z_a) * np.sign(z_b) < 0)
    surest = np.argsort(-sure[opposite], kind="stable")
    found, seen = [], set()
    for i in opposite[surest]:
        if len(found) == n:
            break
        texts = set(pairs[i].tolist())
        if not texts & seen:
            found.append(int(i))
            seen |= texts
    return found


def in_own_size(z):
    """|z| over the root of the mean square."""
    size = np.sqrt(np.mean(z**2))
    return np.abs(z) / (size or 1)


def figures(scores, samples, contexts, pairs, units, seed):
    """What two rewards have in common: a dict. scores (2, N); samples (2, P, K) or None."""
    first, second = pairs.T
    z = scores[:, first] - scores[:, second]
    as_raters = np.ones(len(pairs))
    right = np.array([calibration.is_right(some, as_raters) for some in z])
    held_out = [by_context(some, contexts) for some in scores]
    rng = np.random.default_rng(seed)
    found = {
        "margins": z,
        "distance": {"held-out": held_out_distance(*held_out)},
        "alike": {"held-out": pair_agreement(*z)},
        "outcomes": outcomes(*right),
        "accuracy": right.mean(1),
        "errors": accuracy_errors(right, pairs, units, rng),
    }
    if samples is not None:
        found["distance"]["samples"] = bandit_spread(*samples)
        found["alike"]["samples"] = sample_agreement(*samples)
    return found
