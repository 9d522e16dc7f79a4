"""Which two responses to show next, of a pool that a language model wrote.

What is believed of the responses' scores is a normal distribution, and all methods work with it:

- of features: a linear head w under the Bradley-Terry likelihood of the labels so far, and its
  posterior by Laplace: the most probable w, and the inverse of the Hessian there
- of an ensemble: the mean and covariance of its members' scores; whoever trains them does so anew
  between calls

Either way a score is mean + factor . z, where z is standard normal: factor is a feature times a
root of the posterior's covariance, or a member's deviation from the mean.

| method | the pair of a prompt | which prompts |
|---|---|---|
| uniform | any | any |
| uncertainty | whose difference is most uncertain | the most uncertain |
| dps (Novoseller et al. 2020) | two draws' favourites | any whose two are not the same |
| lpbrl (Saha et al. 2023) | the most uncertain of all that may be best | the most uncertain |
| pbop (Chen et al. 2022) | of draws' favourites, where draws differ most | the most uncertain |

Letters: B prompts, K responses each, D features (or members), M draws (or members).
"""

from typing import NamedTuple

import numpy as np

from minirlhf.engine.cli import UserError
from minirlhf.online.oracle import logistic_map, sigmoid
from minirlhf.online.policies import distances

PRECISION = 1.0  # of the prior of a weight: features should be of length about 1
GAMMA = 2.0  # standard deviations by which a response may be better than it seems
DRAWS = 16  # of the posterior, as an ensemble
TRIES = 10  # at two draws that like different responses


class Pool(NamedTuple):
    """One of the two; where both are there, the features are taken.

    earlier: what was said of pairs that are not in it, as their differences of features (L, D) and
    outcomes (L,).
    """

    features: np.ndarray | None = None  # (B, K, D)
    scores: np.ndarray | None = None  # (M, B, K), of an ensemble
    earlier: tuple | None = None

    @property
    def shape(self):
        """(B, K)"""
        return self.scores.shape[1:] if self.features is None else self.features.shape[:2]


class Labelled(NamedTuple):
    pairs: np.ndarray  # (L, 3) of prompt, first, second response
    outcomes: np.ndarray  # (L,), 0..1, how far the first was preferred

    def and_these(self, pairs, outcomes):
        return Labelled(np.append(self.pairs, pairs, 0), np.append(self.outcomes, outcomes))


NOTHING = Labelled(np.zeros((0, 3), int), np.zeros(0))


class Belief(NamedTuple):
    mean: np.ndarray  # (B, K)
    factors: np.ndarray  # (B, K, D)
    z: np.ndarray  # (D, M), what the draws are made of

    @property
    def draws(self):
        return self.mean[..., None] + self.factors @ self.z  # (B, K, M)


# What is believed


def posterior(features, labelled, earlier=None):
    """The most probable head (D,), and its covariance (D, D) by Laplace's approximation."""
    prompt, first, second = labelled.pairs.T
    x, y = features[prompt, first] - features[prompt, second], labelled.outcomes
    if earlier:
        x, y = np.concatenate([earlier[0], x]), np.append(earlier[1], y)
    head, hessian = logistic_map(x, y, PRECISION)
    return head, np.linalg.inv(hessian)


def believe(pool, labelled, rng):
    """The Belief of a pool: of an ensemble the members are the draws."""
    if pool.features is not None:
        head, covariance = posterior(pool.features, labelled, pool.earlier)
        factors = pool.features @ np.linalg.cholesky(covariance)
        z = rng.standard_normal((factors.shape[-1], DRAWS))
        return Belief(pool.features @ head, factors, z)
    mean = pool.scores.mean(0)
    spread = np.sqrt(max(1, len(pool.scores) - 1))
    factors = np.moveaxis(pool.scores - mean, 0, -1) / spread
    return Belief(mean, factors, spread * np.eye(len(pool.scores)))


def deviations(factors):
    """Of the differences of any two scores of a prompt: (B, K, K)."""
    return distances(factors @ factors.swapaxes(-1, -2))


def once_asked(belief, pair):
    """The factors as they will be when a pair is labelled, whatever the label.

    What is known of a score is then less uncertain along f, the difference of the pair's factors,
    by the curvature c = p (1 - p) of the likelihood: of a covariance 1 / (1 + c f'f) is left there.
    So the pairs of a batch tell different things.
    """
    prompt, first, second = pair
    f = belief.factors[prompt, first] - belief.factors[prompt, second]  # (D,)
    p = sigmoid(belief.mean[prompt, first] - belief.mean[prompt, second])
    size = f @ f
    if size == 0:
        return belief
    left = 1 / np.sqrt(1 + p * (1 - p) * size)
    shrunk = belief.factors - (1 - left) / size * (belief.factors @ f)[..., None] * f
    return belief._replace(factors=shrunk)


# Worth of a pair: (B, K, K), symmetric, 0 where it is not to be asked


def uncertainty(belief):
    return deviations(belief.factors)


def lpbrl(belief):
    """Of responses that beat all others of their prompt, or might."""
    width = deviations(belief.factors)
    gaps = belief.mean[:, :, None] - belief.mean[:, None]
    best = (gaps + GAMMA * width >= 0).all(-1)  # (B, K)
    return width * (best[:, :, None] & best[:, None])


def pbop(belief):
    """How far the draws are apart on P(i over j), of responses that one of them ranks first."""
    draws = belief.draws
    gaps = draws[:, :, None] - draws[:, None]  # (B, K, K, M)
    apart = sigmoid(gaps.max(-1)) - sigmoid(gaps.min(-1))
    best = (draws == draws.max(1, keepdims=True)).any(-1)  # (B, K)
    return apart * (best[:, :, None] & best[:, None])


WORTH = {"uncertainty": uncertainty, "lpbrl": lpbrl, "pbop": pbop}
METHODS = ("uniform", "dps", *WORTH)


# The choice of a batch


def select(pool, labelled, budget, method, rng, free=None):
    """Pairs (n, 3) of prompt, first and second response to be labelled next, n <= budget.

    labelled: a Labelled of what is known, whose pairs are not asked again; at first NOTHING. free:
    (B, K, K), its smaller index first, which other pairs may be asked, where not all may. Fewer
    than the budget are there when the method has no other pair that it would learn from: that is
    when it holds the best responses for found. Which of two is the first is up to chance. Raises
    UserError for a method that is none.
    """
    if method not in METHODS:
        raise UserError(f"--select {method}: expected one of {', '.join(METHODS)}")
    unknown = unasked(pool.shape, labelled)
    free = unknown if free is None else unknown & free
    if method == "uniform":
        chosen = any_pairs(free, budget, rng)
    elif method == "dps":
        chosen = favourites(believe(pool, labelled, rng), free, budget, rng)
    else:
        chosen = most_worth(believe(pool, labelled, rng), free, budget, WORTH[method])
    pairs = np.array(chosen, int).reshape(-1, 3)
    turned = rng.random(len(pairs)) < 0.5
    pairs[turned, 1:] = pairs[turned, :0:-1]
    return pairs


def select_all(pool, labelled, budget, method, rng):
    """As select, and where the method has fewer, any others: budget pairs, if there are as many."""
    pairs = select(pool, labelled, budget, method, rng)
    known = labelled.and_these(pairs, np.full(len(pairs), 0.5))  # of which no one will learn
    others = select(pool, known, budget - len(pairs), "uniform", rng)
    return np.concatenate([pairs, others])


def unasked(shape, labelled):
    """(B, K, K): whether a pair, its smaller index first, has no label yet."""
    prompts, k = shape
    free = np.broadcast_to(np.triu(np.ones((k, k), bool), 1), (prompts, k, k)).copy()
    prompt, first, second = labelled.pairs.T
    free[prompt, np.minimum(first, second), np.maximum(first, second)] = False
    return free


def any_pairs(free, budget, rng):
    return rng.permutation(np.argwhere(free))[:budget]


def most_worth(belief, free, budget, worth):
    """One after the other the pair of most worth, as if those before it had been labelled."""
    chosen = []
    for _ in range(budget):
        worths = worth(belief) * free
        pair = np.unravel_index(worths.argmax(), free.shape)
        if worths[pair] <= 0:
            break
        chosen.append(pair)
        free[pair] = False
        belief = once_asked(belief, pair)
    return chosen


def favourites(belief, free, budget, rng):
    """Rounds through the prompts: of each the favourites of two draws, where they differ."""
    chosen, before = [], -1
    while before < len(chosen) < budget:
        before = len(chosen)
        for prompt in rng.permutation(len(free)):
            first, second = two_favourites(belief.mean[prompt], belief.factors[prompt], rng)
            if free[prompt, first, second] and len(chosen) < budget:
                free[prompt, first, second] = False
                chosen.append((prompt, first, second))
    return chosen


def two_favourites(mean, factors, rng):
    """Smaller index first; the same twice where some tries did not give two different ones.

    Of one prompt: mean (K,), factors (K, D).
    """
    draws = mean[:, None] + factors @ rng.standard_normal((factors.shape[1], 2 * TRIES))
    pairs = draws.argmax(0).reshape(TRIES, 2)
    differ = pairs[:, 0] != pairs[:, 1]
    return np.sort(pairs[differ.argmax()])
