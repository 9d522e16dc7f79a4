"""LPbRL: of the policies that may still be the best, compare the two that differ most surely least.

Saha, Pacchiano, Lee 2023, algorithm 1, for known dynamics. P(a over b) = sigmoid((phi(a) - phi(b))
. w) of features phi, w unknown. Others choose a pair by the same estimate:

- `thompson`: two draws of w, the favourite of each (double Thompson sampling)
- `most_uncertain`: the pair that differs most uncertainly, be it good or bad
- `evenly`: any pair

Left out: the bonus for unknown dynamics (algorithm 2); episodes that differ from their policy's
mean; the projection of w into a ball, whose place the prior takes.
"""

from functools import partial

import numpy as np

from minirlhf.online.oracle import logistic_map, prefers
from minirlhf.online.policies import Record, any_two, of_runs, widest

PRIOR = 1.0  # lambda: precision of a weight, and what V begins with


def widths(features, design):
    """||phi(a) - phi(b)|| in the norm of the inverse of design (N, D, D), of all pairs: (N, P, P).

    By products of single features: |a - b|^2 = aa + bb - 2 ab.
    """
    products = features @ np.linalg.solve(design, features.swapaxes(-1, -2))
    squares = np.diagonal(products, axis1=-2, axis2=-1)
    apart = squares[:, :, None] + squares[:, None] - 2 * products
    return np.sqrt(apart.clip(min=0))


def plausible(values, width, gamma):
    """(N, P): whether a policy beats all others, or might: gap + gamma width >= 0."""
    gaps = values[:, :, None] - values[:, None]
    return (gaps + gamma * width >= 0).all(2)


# Ways to choose a pair (N, 2): of features, the estimate, its Hessian, V and chance


def lpbrl(features, weights, hessian, design, rng, gamma=2.0):
    width = widths(features, design)
    values = (features @ weights[..., None])[..., 0]
    return widest(width, plausible(values, width, gamma))


def thompson(features, weights, hessian, design, rng):
    root = np.linalg.cholesky(np.linalg.inv(hessian))  # of Laplace's covariance
    drawn = weights[..., None] + root @ rng.standard_normal((*weights.shape, 2))
    return (features @ drawn).argmax(1)


def most_uncertain(features, weights, hessian, design, rng):
    return widest(widths(features, design), np.ones(features.shape[:2], bool))


def evenly(features, weights, hessian, design, rng):
    return any_two(rng, *features.shape[:2])


CHOICES = {
    "gamma 2": lpbrl,
    "gamma 1": partial(lpbrl, gamma=1.0),
    "thompson": thompson,
    "uncertainty": most_uncertain,
    "uniform": evenly,
}


def run(menu, rng, queries, choose=lpbrl):
    """A Record of a Menu's N problems, a comparison of each a query."""
    features, values = menu.features, menu.values
    runs, _, d = features.shape
    x, y = np.zeros((runs, queries, d)), np.zeros((runs, queries))
    weights = np.zeros((runs, d))
    regret, greedy = np.zeros_like(y), np.zeros_like(y)
    best = values.max(1)
    for t in range(queries):
        # 1 the likeliest weights, and how well each direction has been asked
        weights, hessian = logistic_map(x[:, :t], y[:, :t], PRIOR, start=weights)
        design = PRIOR * np.eye(d) + x.swapaxes(1, 2) @ x
        favourite = (features @ weights[..., None])[..., 0].argmax(1)
        greedy[:, t] = best - of_runs(values, favourite[:, None])[:, 0]
        # 2 a pair of the plausible set
        pair = choose(features, weights, hessian, design, rng)
        shown = of_runs(values, pair)  # (N, 2)
        regret[:, t] = best - shown.mean(1)
        # 3 the person's answer
        y[:, t] = prefers(shown[:, 0], shown[:, 1], 1.0, rng)
        both = np.take_along_axis(features, pair[..., None], 1)
        x[:, t] = both[:, 0] - both[:, 1]
    return Record(regret, greedy)
