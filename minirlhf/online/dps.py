"""Dueling posterior sampling: two guesses at the world, each asked what it would do.

Novoseller et al. 2020, algorithm 1. A person compares two whole episodes; which state and action
deserved it is a regression of the answer on how often each was visited (credit assignment). All
runs of an experiment go side by side: N runs, T queries so far, D = S A pairs of state and action.

Left out: credit by Gaussian processes, and the release's labels of +-1/2 in the logistic form,
where +-1 is meant (which is a prior of a quarter of the variance).
"""

from typing import NamedTuple

import numpy as np

from minirlhf.online import environments as worlds
from minirlhf.online.environments import earned, expected_rewards, plan_alike, times
from minirlhf.online.oracle import logistic_map, prefers


class Record(NamedTuple):
    best: float  # the expected return of the best policy
    shown: np.ndarray  # (N, queries), the mean expected return of the two policies compared
    greedy: np.ndarray  # (N, queries), of the policy that the means would choose at that time

    @property
    def regret(self):
        return self.best - self.shown


def linear_posterior(x, y, sigma=0.5, lam=0.1):
    """Mean (N, D) and covariance (N, D, D) of the rewards, as if answers were rewards plus noise.

    x (N, T, D) visits of the first episode less those of the second, y (N, T) 1 where the first was
    preferred, 0 where not: +-1/2 = x r + noise of deviation sigma, prior N(0, 1 / lam).
    """
    turned = x.swapaxes(-1, -2)
    prior = sigma**2 * lam * np.eye(x.shape[-1])
    inverse = np.linalg.inv(turned @ x + prior)
    mean = times(inverse @ turned, y - 0.5)
    return mean, sigma**2 * inverse


def logistic_posterior(x, y, variance=1.0):
    """The same by logistic regression: the most probable rewards, and Laplace's covariance."""
    mean, hessian = logistic_map(x, y, 1 / variance)
    return mean, np.linalg.inv(hessian)


def true_rewards(env):
    """A posterior that was told: with it, `run` is PSRL (Osband et al. 2013) of a known reward."""
    rewards = expected_rewards(env).ravel()
    hair = 1e-18 * np.eye(rewards.size)  # a covariance of nothing has no Cholesky root

    def posterior(x, y):
        runs = len(x)
        return np.tile(rewards, (runs, 1)), np.tile(hair, (runs, 1, 1))

    return posterior


def thompson(env, rng, counts, mean, covariance):
    """Two policies a run (N, 2, H, S), each the best one for a draw of rewards and of dynamics."""
    runs, pairs = mean.shape
    noise = rng.standard_normal((runs, 2, pairs))
    root = np.linalg.cholesky(covariance)
    rewards = mean[:, None] + times(root[:, None], noise)  # (N, 2, D)
    dynamics = drawn_dynamics(rng, counts)
    return plan_alike(env, dynamics, rewards.reshape(dynamics.shape[:-1]))


def drawn_dynamics(rng, counts):
    """(N, 2, S, A, S): two draws a run of Dirichlet(1 + counts), counts (N, S, A, S)."""
    both = np.stack([counts, counts], axis=1)
    gammas = rng.standard_gamma(1 + both)
    return gammas / gammas.sum(-1, keepdims=True)


def visits_of(env, states, actions):
    """How often each pair of state and action comes up (..., D) in episodes."""
    pairs = states[..., :-1] * env.actions + actions  # (..., H)
    every = np.arange(env.states * env.actions)
    return (pairs[..., None] == every).sum(-2)


def count(counts, states, actions):
    """Adds the transitions of episodes, states (N, ..., H + 1), to counts (N, S, A, S)."""
    before, after = states[..., :-1], states[..., 1:]
    for run, own in enumerate(counts):
        where = (before[run], actions[run], after[run])
        np.add.at(own, where, 1)


def run(env, rng, queries, runs=1, *, posterior=linear_posterior, choose=thompson, beta=1.0):
    """Algorithm 1: a Record of `runs` experiments of so many queries."""
    counts = np.zeros((runs, *env.dynamics.shape))
    x = np.zeros((runs, queries, env.states * env.actions))
    y = np.zeros((runs, queries))
    shown, greedy = np.zeros_like(y), np.zeros_like(y)
    for t in range(queries):
        # 1 what is believed of the rewards, after t answers
        mean, covariance = posterior(x[:, :t], y[:, :t])
        seen = 1 + counts
        likely = seen / seen.sum(-1, keepdims=True)
        policy = plan_alike(env, likely, mean.reshape(likely.shape[:-1]))
        greedy[:, t] = worlds.returns_of(env, policy)
        # 2 advance: two policies, an episode of each
        policies = choose(env, rng, counts, mean, covariance)
        states, actions = worlds.roll_out(env, policies, rng)
        shown[:, t] = worlds.returns_of(env, policies).mean(-1)
        # 3 the person's answer
        first, second = earned(env, states, actions).T
        answers = prefers(first, second, beta, rng)
        y[:, t] = answers
        # 4 feedback: both episodes tell of the dynamics, the answer of the rewards
        count(counts, states, actions)
        visits = visits_of(env, states, actions)
        more = visits[:, 0] - visits[:, 1]
        more[answers == 0.5] = 0  # of a tie nothing is learnt
        x[:, t] = more
    return Record(worlds.best_return(env), shown, greedy)
