"""PbOP: preferences that no reward explains, by optimism over all that may still be true.

Chen et al. 2022 (arXiv 2205.11140). f(a, b) is how often policy a is preferred to b: any table with
f(b, a) = 1 - f(a, b), circles allowed, of which M are thought of. All that fit the answers about as
well as the best one are believed; policies that some of them might let win are asked about where
they differ most.

The bonus of a pair is as Sim-OPRL's authors describe it (Pace et al. 2024): set, then most
uncertain. Left out: transitions, which the paper learns by value-targeted regression, with a bonus
of their own; its comparisons of more than two.
"""

from typing import NamedTuple

import numpy as np

from minirlhf.online.policies import Record, any_two, widest

DELTA = 0.1  # how often the truth may be missing from what is believed, over all queries


class Tables(NamedTuple):
    chances: np.ndarray  # (M, P, P), each table's P(row is preferred to column)
    truth: np.ndarray  # (N,), which of them each run's person answers by


def tables(rng, runs=20, policies=30, hypotheses=300):
    """Random Tables, each with one policy that loses to none, and all else as it happens to be."""
    drawn = rng.random((hypotheses, policies, policies))
    above = np.triu(drawn, 1)
    below = np.tril(1 - above.swapaxes(1, 2), -1)
    chances = above + below + np.eye(policies) / 2
    for table in chances:
        winner = rng.integers(policies)
        won = np.maximum(table[winner], 1 - table[winner])
        table[winner] = won
        table[:, winner] = 1 - won
    return Tables(chances, rng.integers(hypotheses, size=runs))


def winners(chances):
    """The policy (...) of chances (..., P, P) that loses to none, or whose worst duel is best."""
    return chances.min(-1).argmax(-1)


def slack(hypotheses):
    """beta: by how much the truth's squared loss can exceed the least of all.

    For each f, exp(2 (loss(truth) - loss(f))) is a supermartingale of the answers: by Hoeffding's
    lemma an answer's noise is 1/4-subgaussian. So (Ville 1939) it ever exceeds M / delta with
    chance delta / M at most.
    """
    return np.log(hypotheses / DELTA) / 2


def believed(losses):
    """(N, M): the tables whose sum of squares (N, M) is among the least, but for `slack`."""
    return losses <= losses.min(1, keepdims=True) + slack(losses.shape[1])


def bonus(chances, belief):
    """b(a, b) = max |f - f'| over what is believed (N, M): (N, P, P)."""
    spread = [np.ptp(chances[some], axis=0) for some in belief]
    return np.stack(spread)


# Ways to choose a pair (N, 2): of the likeliest table (N, P, P), its bonus and chance


def pbop(likeliest, bonus, rng):
    """Of the policies that may beat or equal any other, the pair that is most uncertain."""
    return widest(bonus, (likeliest + bonus >= 0.5).all(2))


def most_uncertain(likeliest, bonus, rng):
    return widest(bonus, np.ones(bonus.shape[:2], bool))


def evenly(likeliest, bonus, rng):
    return any_two(rng, *bonus.shape[:2])


CHOICES = {"pbop": pbop, "uncertainty": most_uncertain, "uniform": evenly}


def run(problem, rng, queries, choose=pbop):
    """A Record of a problem's N persons. A policy's regret is P(the best beats it) - 1/2."""
    chances, truth = problem
    true = chances[truth]  # (N, P, P)
    rows = np.arange(len(truth))
    loses = true[rows, winners(true)] - 0.5  # (N, P), to the best one
    losses = np.zeros((len(truth), len(chances)))
    regret = np.zeros((len(truth), queries))
    greedy = np.zeros_like(regret)
    for t in range(queries):
        # 1 the table that fits the answers best, and all that fit them nearly as well
        likeliest = chances[losses.argmin(1)]
        unsure = bonus(chances, believed(losses))
        greedy[:, t] = loses[rows, winners(likeliest)]
        # 2 a pair that may both be the best
        first, second = choose(likeliest, unsure, rng).T
        regret[:, t] = (loses[rows, first] + loses[rows, second]) / 2
        # 3 the person's answer, and how far each table was from it
        answer = rng.random(len(truth)) < true[rows, first, second]
        said = chances[:, first, second].T  # (N, M)
        losses += (said - answer[:, None]) ** 2
    return Record(regret, greedy)
