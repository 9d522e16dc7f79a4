"""LPbRL: of the policies that may still be the best, compare the two whose gap is least known.

Saha, Pacchiano, Lee 2023 (arXiv 2111.04850), for known dynamics. P(a over b) is the sigmoid of
(phi(a) - phi(b)) . w, of known features phi and unknown w. Other ways to choose a pair by the same
estimate stand beside it:

- `thompson`: two draws of w, the favourite of each (double Thompson sampling)
- `most_uncertain`: the pair whose gap is least known, be it good or bad
- `evenly`: any pair

gamma = 2 is what works here and no bound: a run may lose its best policy for good, and the smaller
gamma is, the more of them do. Left out: the bonus for unknown dynamics; episodes that differ from
their policy's mean; the projection of w into a ball, whose place the prior takes.
"""

from functools import partial
from typing import NamedTuple

import numpy as np

from minirlhf.online.oracle import logistic_map, prefers
from minirlhf.online.policies import Record, any_two, distances, of_runs, widest

PRIOR = 1.0  # lambda: precision of a weight, and what V begins with


class Estimate(NamedTuple):
    weights: np.ndarray  # (N, D), the likeliest
    hessian: np.ndarray  # (N, D, D), of the negative log posterior there
    design: np.ndarray  # (N, D, D), V: how well each direction has been asked


def estimate(x, y):
    """Of differences of features x (N, T, D) and answers y (N, T)."""
    weights, hessian = logistic_map(x, y, PRIOR)
    design = PRIOR * np.eye(x.shape[-1])
    return Estimate(weights, hessian, design + x.swapaxes(1, 2) @ x)


def values_of(features, weights):
    """(N, P)"""
    return (features @ weights[..., None])[..., 0]


def widths(features, design):
    """||phi(a) - phi(b)|| of all pairs (N, P, P), in the norm of the inverse of V (N, D, D)."""
    return distances(features @ np.linalg.inv(design) @ features.swapaxes(-1, -2))


def plausible(values, width, gamma):
    """(N, P): whether a policy beats all others, or might: gap + gamma width >= 0."""
    gaps = values[:, :, None] - values[:, None]
    return (gaps + gamma * width >= 0).all(2)


# Ways to choose a pair (N, 2): of the features (N, P, D), an Estimate and chance


def lpbrl(features, known, rng, gamma=2.0):
    width = widths(features, known.design)
    values = values_of(features, known.weights)
    return widest(width, plausible(values, width, gamma))


def thompson(features, known, rng):
    covariance = np.linalg.inv(known.hessian)  # Laplace's
    noise = rng.standard_normal((*known.weights.shape, 2))
    drawn = known.weights[..., None] + np.linalg.cholesky(covariance) @ noise
    return (features @ drawn).argmax(1)


def most_uncertain(features, known, rng):
    width = widths(features, known.design)
    return widest(width, np.ones(features.shape[:2], bool))


def evenly(features, known, rng):
    return any_two(rng, *features.shape[:2])


CHOICES = {
    "lpbrl, gamma 2": lpbrl,
    "lpbrl, gamma 1": partial(lpbrl, gamma=1.0),
    "thompson": thompson,
    "uncertainty": most_uncertain,
    "uniform": evenly,
}


def run(menu, rng, queries, choose=lpbrl):
    """A Record of a Menu's N problems, a comparison of each a query."""
    features, values = menu.features, menu.values
    runs, _, d = features.shape
    x = np.zeros((runs, queries, d))
    y = np.zeros((runs, queries))
    regret = np.zeros_like(y)
    greedy = np.zeros_like(y)
    best = values.max(1)
    for t in range(queries):
        # 1 what is known after t answers
        known = estimate(x[:, :t], y[:, :t])
        favourite = values_of(features, known.weights).argmax(1, keepdims=True)
        greedy[:, t] = best - of_runs(values, favourite)[:, 0]
        # 2 a pair of policies, an episode of each
        pair = choose(features, known, rng)
        first, second = of_runs(values, pair).T
        regret[:, t] = best - (first + second) / 2
        # 3 the person's answer
        y[:, t] = prefers(first, second, 1.0, rng)
        shown = np.take_along_axis(features, pair[..., None], 1)  # (N, 2, D)
        x[:, t] = shown[:, 0] - shown[:, 1]
    return Record(regret, greedy)
