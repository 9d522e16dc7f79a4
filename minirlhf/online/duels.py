"""Duels between actions, backwards from the last step: PPS with a simulator, PEPS without.

Xu et al. 2020. In each state of each step the actions are the arms of a dueling bandit: two
episodes go on from there, one with each action, then both as was decided for the later steps, and a
person says which was better. What wins is written down, and the step before can build on it.

- PPS (algorithm 1) has a simulator that can be set into any state.
- PEPS (algorithm 2) has to walk there, by policies that it learns for that alone; states that it
  hardly ever reaches are left as they are.

The paper leaves the bandit open; here it is elimination, which did not do better than to ask all
pairs equally often (uniform.evenly): what helps is to build on what was decided. For the paper's
optimistic exploration stands posterior sampling, and what the duels' own episodes tell of the
dynamics is not used.
"""

from itertools import combinations
from math import comb
from typing import NamedTuple

import numpy as np

from minirlhf.online import environments as worlds
from minirlhf.online.environments import earned, plan, random_policies, returns_of
from minirlhf.online.oracle import prefers


class Found(NamedTuple):
    policy: np.ndarray  # (H, S)
    best: float  # the expected return of the best policy
    comparisons: np.ndarray  # (K,), asked until each decision, the first entry being before any
    episodes: np.ndarray  # (K,), played until then
    values: np.ndarray  # (K,), the expected return of the policy as it was then
    skipped: list  # (step, state) that PEPS took for unreachable

    @property
    def gap(self):
        return self.best - self.values[-1]

    def regret(self, queries):
        """(queries,): how far from the best policy it was after 1, 2, ... comparisons."""
        asked = np.arange(1, queries + 1)
        made = np.searchsorted(self.comparisons, asked, side="right")  # decisions by then, and one
        return self.best - self.values[made - 1]


# The bandit


def radius(m, arms, delta):
    """How far from its chance a rate of m duels can be: for all pairs and all m, but for delta."""
    misses = 4 * arms**2 * m**2 / delta
    return np.sqrt(np.log(misses) / (2 * m))


def eliminate(duel, arms, epsilon, delta, batch=10):
    """The best of `arms` arms but for epsilon, with probability 1 - delta.

    duel(a, b, n) tells how often a won in n duels. All pairs of arms that are left are asked
    equally often; an arm goes that another one beats for certain. One that loses to no other by
    more than about epsilon (in probability) is left at the end, and the one of most wins taken.
    """
    left = list(range(arms))
    wins = np.zeros((arms, arms))
    m, width = 0, np.inf
    while len(left) > 1 and width >= epsilon:
        for a, b in combinations(left, 2):
            won = duel(a, b, batch)
            wins[a, b] += won
            wins[b, a] += batch - won
        m += batch
        width = radius(m, arms, delta)
        beaten = wins[left] / m > 1 / 2 + width
        kept = [a for a in left if not beaten[:, a].any()]
        if not kept:  # each is beaten by another: preferences can go in a circle
            break
        left = kept
    return max(left, key=lambda a: wins[a, left].sum())


def affordable(env, queries, delta=0.1, batch=10):
    """The smallest epsilon whose search never costs more than so many comparisons; inf: none."""
    m = queries // questions(env) // batch * batch
    if m < batch:
        return np.inf
    width = radius(m, env.actions, delta / env.there.sum())
    return 1.001 * env.horizon * width


def questions(env):
    """How many pairs of actions there are, in all states of all steps."""
    return int(env.there.sum() * comb(env.actions, 2))


# With a simulator


def pps(env, rng, epsilon, delta=0.1, beta=1.0):
    """Algorithm 1: an epsilon-best policy, where what is preferred grows with what is gained.

    epsilon is in preferences: a gap of value g shows as sigmoid(beta g) - 1/2, about beta g / 4.
    """
    each, slip = shares(env, epsilon, delta)

    def decide(duel):
        return eliminate(duel, env.actions, each, slip)

    return backward(env, rng, beta, decide)


def shares(env, epsilon, delta):
    """What a single decision may miss, and how often it may fail."""
    return epsilon / env.horizon, delta / env.there.sum()


def backward(env, rng, beta, decide, afterwards=None):
    """decide(duel) -> the winner, in each state of each step from the last one to the first.

    A Found; what is not decided yet has a random action. afterwards(n): policies (n, H, S) that n
    episodes of a duel go on with, instead of what was decided.
    """
    policy = random_policies(env, rng)
    asked, trail = 0, [(0, 0, returns_of(env, policy))]
    for step in reversed(range(env.horizon)):
        for state in np.flatnonzero(env.there[step]):

            def duel(a, b, n, step=step, state=state):
                nonlocal asked
                asked += n
                returns = []
                for arm in (a, b):
                    following = afterwards(n) if afterwards else policy
                    returns.append(simulated(env, rng, following, step, state, arm, n))
                return prefers(*returns, beta, rng).sum()

            policy[step, state] = decide(duel)
            trail.append((asked, 2 * asked, returns_of(env, policy)))
    return found(env, policy, trail, [])


def simulated(env, rng, policy, step, state, arm, n):
    """The returns (n,) of n episodes set into `state` at `step`: the action `arm`, then the policy
    (H, S), or one each (n, H, S)."""
    following = policy.copy()
    following[..., step, state] = arm
    following = np.broadcast_to(following, (n, *env.there.shape))
    set_into = np.full(n, state)
    states, actions = worlds.go_on(env, following, set_into, step, rng)
    return earned(env, states, actions)


def found(env, policy, trail, skipped):
    comparisons, episodes, values = np.array(trail).T
    best = worlds.best_return(env)
    return Found(policy, best, comparisons, episodes, values, skipped)


# Without one


def peps(env, rng, epsilon, delta=0.1, beta=1.0, *, tries=50, rare=0.05, directed=True):
    """Algorithm 2: the same by whole episodes, of which only those count that come by a state.

    tries: episodes that learn to reach a state; rare: a state that a smaller share of them came by
    is left alone. directed=False walks at random instead.
    """
    each, slip = shares(env, epsilon, delta)
    policy = random_policies(env, rng)
    counts = np.zeros_like(env.dynamics)
    asked, played, skipped = 0, 0, []
    trail = [(0, 0, returns_of(env, policy))]
    for step in reversed(range(env.horizon)):
        for state in np.flatnonzero(env.there[step]):
            # 1 explore: policies that come by
            walks, share = ways_to(env, rng, counts, step, state, tries, directed)
            played += tries
            if share < rare or not share:
                skipped.append((step, int(state)))
                continue

            # 2 duels between episodes that came by
            def duel(a, b, n, step=step, state=state, walks=walks):
                nonlocal asked, played
                asked += n
                returns = []
                for arm in (a, b):
                    earnings, took = walked(env, rng, policy, walks, step, state, arm, n)
                    returns.append(earnings)
                    played += took
                return prefers(*returns, beta, rng).sum()

            # 3 what won is what is done there
            policy[step, state] = eliminate(duel, env.actions, each, slip)
            trail.append((asked, played, returns_of(env, policy)))
    return found(env, policy, trail, skipped)


def ways_to(env, rng, counts, step, state, tries, directed):
    """Policies (n, H, S) by which to come by `state` at `step`, and the share of tries that did.

    The reward is 1 for being there, the dynamics a draw from what `counts` (S, A, S) tell, which
    learn from every try. Those policies are kept that got there; undirected, all of them.
    """
    goal = np.zeros((env.horizon, env.states, env.actions))
    goal[step, state] = 1
    policies = random_policies(env, rng, tries)
    came = np.zeros(tries, bool)
    for i in range(tries):
        if directed:
            gammas = rng.standard_gamma(1 / env.states + counts) + 1e-12
            dynamics = gammas / gammas.sum(-1, keepdims=True)
            policies[i] = plan(dynamics, goal)
        states, actions = worlds.roll_out(env, policies[i], rng)
        np.add.at(counts, (states[:-1], actions, states[1:]), 1)
        came[i] = states[step] == state
    return policies[came] if directed else policies, came.mean()


def walked(env, rng, policy, walks, step, state, arm, n):
    """As `simulated`, by episodes from the start: the returns (n,) from `state` on, and how many
    episodes it took until n came by."""
    earnings, took = np.zeros(0), 0
    following = policy.copy()
    following[step, state] = arm
    while len(earnings) < n:
        episodes = walks[rng.integers(len(walks), size=4 * n)]
        episodes[:, step:] = following[step:]
        states, actions = worlds.roll_out(env, episodes, rng)
        came = np.flatnonzero(states[:, step] == state)
        came = came[: n - len(earnings)]
        rest = earned(env, states[:, step:], actions[:, step:])
        earnings = np.append(earnings, rest[came])
        took += came[-1] + 1 if len(earnings) == n else len(episodes)
    return earnings, took
