"""The baseline of this room: the same learners, asking evenly."""

import numpy as np

from minirlhf.online import dps, duels


def random_policies(env, rng, counts, mean, covariance):
    """Two policies a run (N, 2, H, S) of actions at random, whatever was learnt."""
    return rng.integers(env.dynamics.shape[1], size=(len(mean), 2, *env.there.shape))


def run(env, rng, queries, runs=1, **options):
    """A dps.Record of the learner of dps.py, which is shown episodes of random actions."""
    return dps.run(env, rng, queries, runs, choose=random_policies, **options)


def evenly(env, rng, queries, beta=1.0, *, build=True):
    """A duels.Found of the search of duels.py, each pair of actions asked equally often.

    So many queries in all, or what of them can be divided evenly; at least one a pair. build=False:
    after the actions compared everyone acts at random, whatever was decided of later steps.
    """
    arms = env.dynamics.shape[1]
    n = max(1, int(queries // (env.there.sum() * arms * (arms - 1) // 2)))

    def at_random(n):
        return rng.integers(arms, size=(n, *env.there.shape))

    def decide(duel, arms):
        wins = np.zeros(arms)
        for a in range(arms):
            for b in range(a):
                won = duel(a, b, n)
                wins[[a, b]] += won, n - won
        return int(wins.argmax())

    return duels.backward(env, rng, beta, decide, None if build else at_random)
