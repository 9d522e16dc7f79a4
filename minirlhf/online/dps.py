"""Dueling posterior sampling: two guesses at the world, each asked what it would do.

Novoseller et al. 2020, algorithm 1. A person compares two whole episodes; which state and action
deserved it is a regression of the answer on how often each was visited (credit assignment). All
runs of an experiment go side by side: N runs, T queries so far, D = S A pairs of state and action.

Left out: credit by Gaussian processes, and the release's labels of +-1/2 in the logistic form,
where +-1 is meant (which is a prior of a quarter of the variance).
"""

from typing import NamedTuple

import numpy as np

from minirlhf.online.environments import (
    best_policy,
    earned,
    expected_rewards,
    plan,
    returns_of,
    roll_out,
)
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
    preferred, 0 where not: -+1/2 = x r + noise of deviation sigma, prior N(0, 1 / lam).
    """
    turned = x.swapaxes(-1, -2)
    inverse = np.linalg.inv(turned @ x + sigma**2 * lam * np.eye(x.shape[-1]))
    mean = inverse @ turned @ (y - 0.5)[..., None]
    return mean[..., 0], sigma**2 * inverse


def logistic_posterior(x, y, variance=1.0):
    """The same by logistic regression: the most probable rewards, and Laplace's covariance."""
    mean, hessian = logistic_map(x, y, 1 / variance)
    return mean, np.linalg.inv(hessian)


def true_rewards(env):
    """A posterior that was told: with it, `run` is PSRL (Osband et al. 2013) of a known reward."""
    mean = expected_rewards(env).ravel()

    def posterior(x, y):
        shape = (len(x), mean.size)
        hair = 1e-18 * np.eye(mean.size)  # a covariance of nothing has no Cholesky root
        return np.broadcast_to(mean, shape), np.broadcast_to(hair, (*shape, mean.size))

    return posterior


def thompson(env, rng, counts, mean, covariance):
    """Two policies a run (N, 2, H, S), each the best one for a draw of rewards and of dynamics."""
    noise = rng.standard_normal((len(mean), mean.shape[-1], 2))
    rewards = mean[:, None] + (np.linalg.cholesky(covariance) @ noise).swapaxes(-1, -2)
    return plan_for(env, drawn_dynamics(rng, counts), rewards)


def drawn_dynamics(rng, counts):
    """(N, 2, S, A, S): two draws a run of Dirichlet(1 + counts), counts (N, S, A, S)."""
    gammas = rng.standard_gamma(1 + np.stack([counts, counts], axis=1))
    return gammas / gammas.sum(-1, keepdims=True)


def plan_for(env, dynamics, rewards):
    """Policies (..., H, S) for dynamics (..., S, A, S) and rewards of all pairs (..., D)."""
    rewards = rewards.reshape(dynamics.shape[:-1])
    return plan(dynamics, np.broadcast_to(rewards, (env.horizon, *rewards.shape)))


def visits_of(env, states, actions):
    """How often each pair of state and action comes up (..., D) in episodes."""
    n_actions = env.dynamics.shape[1]
    pairs = states[..., :-1] * n_actions + actions
    return (pairs[..., None] == np.arange(len(env.start) * n_actions)).sum(-2)


def count(counts, states, actions):
    """Adds the transitions of episodes, states (N, ..., H + 1), to counts (N, S, A, S)."""
    for run, (s, a) in enumerate(zip(states, actions, strict=True)):
        np.add.at(counts[run], (s[..., :-1], a, s[..., 1:]), 1)


def run(env, rng, queries, runs=1, *, posterior=linear_posterior, choose=thompson, beta=1.0):
    """Algorithm 1: a Record of `runs` experiments of so many queries."""
    counts = np.zeros((runs, *env.dynamics.shape))
    x = np.zeros((runs, queries, expected_rewards(env).size))
    y = np.zeros((runs, queries))
    shown, greedy = np.zeros_like(y), np.zeros_like(y)
    for t in range(queries):
        # 1 what is believed of the rewards, after t answers
        mean, covariance = posterior(x[:, :t], y[:, :t])
        likely = (1 + counts) / (1 + counts).sum(-1, keepdims=True)
        greedy[:, t] = returns_of(env, plan_for(env, likely, mean))
        # 2 advance: two policies, an episode of each
        policies = choose(env, rng, counts, mean, covariance)
        states, actions = roll_out(env, policies, rng)
        shown[:, t] = returns_of(env, policies).mean(-1)
        # 3 the person's answer
        returns = earned(env, states, actions)  # (N, 2)
        y[:, t] = prefers(returns[:, 0], returns[:, 1], beta, rng)
        # 4 feedback: both episodes tell of the dynamics, the answer of the rewards
        count(counts, states, actions)
        visits = visits_of(env, states, actions)
        told = y[:, t] != 0.5  # of a tie nothing is learnt: a row of zeros
        x[:, t] = told[:, None] * (visits[:, 0] - visits[:, 1])
    return Record(float(returns_of(env, best_policy(env))), shown, greedy)
