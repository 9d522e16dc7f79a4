"""Problems whose policies can be counted, and what is written down of a run.

A person compares two policies; how good they are, or how often one beats another, is drawn and so
is known to whoever measures. Letters: N runs side by side, each with a problem of its own; P
policies; D features.
"""

from typing import NamedTuple

import numpy as np


class Record(NamedTuple):
    regret: np.ndarray  # (N, queries), how much worse the two policies shown are than the best one
    greedy: np.ndarray  # (N, queries), the same of the policy that would be chosen at that time

    @property
    def cumulative(self):
        return self.regret.cumsum(1)

    @property
    def second_over_first(self):
        """(N,): regret of the second half of the queries over that of the first."""
        half = self.regret.shape[1] // 2
        return self.regret[:, half:].sum(1) / self.regret[:, :half].sum(1)


class Menu(NamedTuple):
    features: np.ndarray  # (N, P, D), of a policy: the mean of its episodes'
    weights: np.ndarray  # (N, D), of the true reward

    @property
    def values(self):
        return (self.features @ self.weights[..., None])[..., 0]  # (N, P)


def menus(rng, runs=10, policies=100, d=6, size=8.0):
    """A Menu: features of mean square length 1, the reward's weights of any direction and `size`.

    So one standard deviation of the values is size / sqrt(d), and by as much as that a policy is
    preferred with chance sigmoid(size / sqrt(d)).
    """
    features = rng.standard_normal((runs, policies, d)) / np.sqrt(d)
    weights = rng.standard_normal((runs, d))
    weights *= size / np.linalg.norm(weights, axis=1, keepdims=True)
    return Menu(features, weights)


def of_runs(table, index):
    """table[n, index[n, k]] of a table (N, P) and index (N, K): (N, K)."""
    return np.take_along_axis(table, index, 1)


def any_two(rng, runs, policies):
    """Two different policies a run: (N, 2)."""
    first = rng.integers(policies, size=runs)
    second = (first + rng.integers(1, policies, size=runs)) % policies
    return np.stack([first, second], axis=1)


def widest(width, allowed):
    """The pair (N, 2) of the largest width (N, P, P), both of them allowed (N, P).

    A policy that is the only one allowed stands there twice. Of (a, b) and (b, a), which are as
    wide, the first is taken, lest rounding decide.
    """
    both = np.triu(allowed[:, :, None] & allowed[:, None])
    flat = np.where(both, width, -1).reshape(len(width), -1)
    return np.stack(np.unravel_index(flat.argmax(1), width.shape[1:]), axis=1)


def distances(products):
    """|a - b| of all pairs (..., P, P), by their products: |a - b|^2 = aa + bb - 2 ab."""
    squares = np.diagonal(products, axis1=-2, axis2=-1)
    apart = squares[..., :, None] + squares[..., None, :] - 2 * products
    return np.sqrt(apart.clip(min=0))
