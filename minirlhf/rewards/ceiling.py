"""The toy's Bayes ceiling: what a reward that knows the truth gets on the toy's held-out pairs.

How the toy is made (data/sources.py): a word has 4 to 10 letters, each of eight worths from -1 to
1, all equally likely, and its true reward r is 4 times their mean. Nine people rate it: r and
Gaussian noise of deviation 1, rounded, from -4 to 4. A test pair is two words whose mean ratings
differ, drawn alike; its label is the share of the 81 pairs of raters in which the first word gets
more, ties one half. All of it is finite, so the ceilings are sums, with no sampling.

Two things of data/ are not in it: a word made twice is one word with eighteen ratings (about one in
two hundred), and a test set is finite: its own ceiling differs by chance.
"""

from math import erf, sqrt
from typing import NamedTuple

import numpy as np

RATINGS = np.arange(-4, 5)
RATERS = 9
LETTERS, LENGTHS = 8, range(4, 11)


class Ceiling(NamedTuple):
    accuracy: float  # of pairs ordered as their mean ratings
    log_loss: float  # nats against the soft labels, of chances that know the true rewards


def toy_ceiling():
    """The Ceiling of pairs drawn as the toy's test pairs are.

    A guess that knows the rewards (r, s) can do no better than to name the word of the larger
    reward, and to give P = E[label | r, s, means differ], whose log loss is its entropy.
    """
    rewards, weight = true_rewards()
    one = rating_shares(rewards)  # (W, 9)
    above = beats(mean_shares(one, RATERS))  # P(mean of r > mean of s)
    differ = above + above.T
    pairs = np.outer(weight, weight) * differ
    larger = np.maximum(above, above.T)
    vote = beats(one) + 0.5 * one @ one.T
    chance = (vote - tied_votes(one)) / differ
    accuracy = np.average(larger / differ, weights=pairs)
    return Ceiling(float(accuracy), float(np.average(entropy(chance), weights=pairs)))


def true_rewards():
    """(rewards (W,), their chances (W,)): a word of L letters with the sum k of their places, 0 to
    7, is worth 4 (2 k / (7 L) - 1)."""
    chances = {}
    for length in LENGTHS:
        of_sum = np.ones(1)
        for _ in range(length):
            of_sum = np.convolve(of_sum, np.full(LETTERS, 1 / LETTERS))
        for k, p in enumerate(of_sum):
            reward = round(4 * (2 * k / ((LETTERS - 1) * length) - 1), 12)
            chances[reward] = chances.get(reward, 0) + p / len(LENGTHS)
    rewards = sorted(chances)
    return np.array(rewards), np.array([chances[reward] for reward in rewards])


def rating_shares(rewards):
    """(W, 9) P(a rater gives each of RATINGS): the noise rounds to it, or is cut to its ends."""
    normal = np.vectorize(lambda x: (1 + erf(x / sqrt(2))) / 2)
    ends = RATINGS[:-1] + 0.5
    below = normal(ends - np.asarray(rewards)[:, None])  # (W, 8)
    return np.diff(below, axis=1, prepend=0, append=1)


def mean_shares(shares, n):
    """(W, 8n + 1) chances of the sum of n independent ratings, of each word, from -4n to 4n."""
    found = []
    for share in shares:
        of_sum = np.ones(1)
        for _ in range(n):
            of_sum = np.convolve(of_sum, share)
        found.append(of_sum)
    return np.array(found)


def beats(shares):
    """(W, W) P(X > Y), X of the row's word and Y of the column's, from chances (W, K)."""
    below = np.cumsum(shares, 1) - shares
    return shares @ below.T


def tied_votes(one):
    """(W, W) E[label; the means are equal]: by symmetry among raters, of the first rater of each.

    Sum over their ratings a and b of P(a) P(b) (1 where a > b, 1/2 where a = b) P(the eight others
    of the second word give a - b more, in sum, than those of the first).
    """
    others = mean_shares(one, RATERS - 1)
    width = others.shape[1]
    total = np.zeros((len(one), len(one)))
    for gap in range(len(RATINGS)):  # a - b, at least 0: else the vote is 0
        equal = others[:, : width - gap] @ others[:, gap:].T
        both = one[:, gap:] @ one[:, : len(RATINGS) - gap].T
        total += (1 if gap else 0.5) * both * equal
    return total


def entropy(p):
    """Of a yes or no with chance p, in nats."""
    q = np.clip(p, 1e-300, 1)
    r = np.clip(1 - p, 1e-300, 1)
    return -(p * np.log(q) + (1 - p) * np.log(r))
