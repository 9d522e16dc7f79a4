"""The baseline of this room: the same learners, asking evenly."""

from itertools import combinations

import numpy as np

from minirlhf.online import dps, duels
from minirlhf.online.environments import random_policies


def run(env, rng, queries, runs=1, **options):
    """A dps.Record of the learner of dps.py, which is shown episodes of random actions."""

    def choose(env, rng, *learnt):
        return random_policies(env, rng, runs, 2)

    return dps.run(env, rng, queries, runs, choose=choose, **options)


def evenly(env, rng, queries, beta=1.0, *, build=True):
    """A duels.Found of the search of duels.py, each pair of actions asked equally often.

    So many queries in all, or what of them can be divided evenly; at least one a pair. build=False:
    after the actions compared everyone acts at random, whatever was decided of later steps.
    """
    n = max(1, int(queries) // duels.questions(env))

    def at_random(n):
        return random_policies(env, rng, n)

    def decide(duel):
        wins = np.zeros(env.actions)
        for a, b in combinations(range(env.actions), 2):
            won = duel(a, b, n)
            wins[a] += won
            wins[b] += n - won
        return wins.argmax()

    afterwards = None if build else at_random
    return duels.backward(env, rng, beta, decide, afterwards)
