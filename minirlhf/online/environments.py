"""Small worlds whose best policy is known: tables of states, actions and a horizon.

Letters: H steps of an episode, S states, A actions; `...` are axes in front, as of many runs at
once. A policy is a table (..., H, S) of actions, another one at each step. All planning is by
value iteration over the H steps, and is exact.
"""

from typing import NamedTuple

import numpy as np


class Env(NamedTuple):
    dynamics: np.ndarray  # (S, A, S), P(next state | state, action)
    rewards: np.ndarray  # (S, A, S), of a state, an action and where it led
    start: np.ndarray  # (S,), P(first state)
    there: np.ndarray  # (H, S), whether a state is one of those of a step

    @property
    def horizon(self):
        return len(self.there)

    @property
    def states(self):
        return len(self.start)

    @property
    def actions(self):
        return self.dynamics.shape[1]


# Worlds


def river_swim(states=6, horizon=50):
    """Against the current to the far bank; actions 0 left, 1 right (Osband et al. 2013, figure 1).

    The numbers are those of the release of Novoseller et al. 2020: .005 for left at the first
    state, 1 for going right at the last one where that does not throw the swimmer back.
    """
    dynamics = np.zeros((states, 2, states))
    for s in range(states):
        dynamics[s, 0, max(s - 1, 0)] = 1
    for s in range(1, states - 1):
        dynamics[s, 1, s - 1 : s + 2] = 0.05, 0.6, 0.35
    dynamics[0, 1, :2] = 0.4, 0.6
    dynamics[-1, 1, -2:] = 0.4, 0.6
    rewards = np.zeros_like(dynamics)
    rewards[0, 0, 0] = 0.005
    rewards[-1, 1, -1] = 1
    start = np.eye(states)[0]
    there = np.ones((horizon, states), bool)
    return Env(dynamics, rewards, start, there)


def grid(rng, size=4):
    """From the upper left corner to the lower right; actions 0 right, 1 down (Xu et al. 2020, 6).

    Three random blocks pay 1/3 to who enters them, of which the best way takes two; never the two
    corners. A step out of the grid goes the other way, so 2 (size - 1) steps always end there.
    """
    env = without_pay(size)
    while not np.isclose(best_return(env), 2 / 3):
        pays = np.zeros(env.states)
        blocks = 1 + rng.choice(env.states - 2, 3, replace=False)
        pays[blocks] = 1 / 3
        env = env._replace(rewards=np.broadcast_to(pays, env.dynamics.shape))
    return env


def without_pay(size):
    """The ways of `grid`."""
    states, corner = size * size, size * size - 1
    dynamics = np.zeros((states, 2, states))
    dynamics[corner, :, corner] = 1
    for s in range(corner):
        row, column = divmod(s, size)
        right = s + 1 if column < size - 1 else s + size
        down = s + size if row < size - 1 else s + 1
        dynamics[s, 0, right] = dynamics[s, 1, down] = 1
    rewards = np.zeros_like(dynamics)
    start = np.eye(states)[0]
    step = np.arange(2 * (size - 1))
    row, column = np.divmod(np.arange(states), size)
    there = row + column == step[:, None]
    return Env(dynamics, rewards, start, there)


def random_mdp(rng, horizon=5, states=4, actions=5):
    """`states` others at each of `horizon` steps, 20 in all (Xu et al. 2020, section 6).

    Transitions to the next step's states are Dirichlet(0.1), rewards of state and action are
    exponential, then shifted and scaled to least 0 and mean 1. An episode begins at any of the
    first step's states. How many actions the paper took it does not say; 5 are those of the random
    worlds of Novoseller et al. 2020, which it follows.
    """
    total = horizon * states
    dynamics = np.zeros((total, actions, total))
    concentration = np.full(states, 0.1)
    for s in range(total):
        first = states * (s // states + 1) % total  # the last step's lead back, and are never taken
        following = slice(first, first + states)
        dynamics[s, :, following] = rng.dirichlet(concentration, actions)
    pays = rng.exponential(5, (total, actions))
    pays -= pays.min()
    pays /= pays.mean()
    rewards = np.broadcast_to(pays[:, :, None], dynamics.shape)
    step_of = np.arange(total) // states
    there = step_of == np.arange(horizon)[:, None]
    start = there[0] / states
    return Env(dynamics, rewards, start, there)


# Planning


def times(matrix, vector):
    """(..., I, J) by (..., J): (..., I)"""
    return (matrix @ vector[..., None])[..., 0]


def expected_rewards(env):
    """(S, A): the mean over where an action leads."""
    return (env.dynamics * env.rewards).sum(-1)


def plan(dynamics, rewards):
    """The best policy (..., H, S) for dynamics (..., S, A, S) and rewards (H, ..., S, A)."""
    values = np.zeros(dynamics.shape[:-2])  # (..., S), of the steps that are still to come
    policy = []
    for now in rewards[::-1]:
        q = now + times(dynamics, values[..., None, :])  # (..., S, A)
        policy.append(q.argmax(-1))
        values = q.max(-1)
    return np.stack(policy[::-1], axis=-2)


def plan_alike(env, dynamics, rewards):
    """The same for rewards (..., S, A) that are alike at each of the world's steps."""
    shape = (env.horizon, *rewards.shape)
    return plan(dynamics, np.broadcast_to(rewards, shape))


def best_return(env):
    """What the best policy can expect."""
    policy = plan_alike(env, env.dynamics, expected_rewards(env))
    return float(returns_of(env, policy))


def random_policies(env, rng, *shape):
    """(*shape, H, S) of actions at random: to follow one is to act at random at each step."""
    return rng.integers(env.actions, size=(*shape, env.horizon, env.states))


def returns_of(env, policies):
    """The expected return (...) of policies (..., H, S), exact."""
    pays = expected_rewards(env)
    values = np.zeros(env.states)
    states = np.arange(env.states)
    for step in reversed(range(env.horizon)):
        actions = policies[..., step, :]
        follow = env.dynamics[states, actions]  # (..., S, S)
        values = pays[states, actions] + times(follow, values)
    return values @ env.start


# Episodes


def pick(probabilities, rng):
    """An index (...) for each row of probabilities (..., S)."""
    edges = probabilities.cumsum(-1)[..., :-1]
    drawn = rng.random(edges.shape[:-1])
    return (drawn[..., None] > edges).sum(-1)


def roll_out(env, policies, rng):
    """An episode of each policy (..., H, S): states (..., H + 1) and actions (..., H)."""
    shape = (*policies.shape[:-2], env.states)
    state = pick(np.broadcast_to(env.start, shape), rng)
    return go_on(env, policies, state, 0, rng)


def go_on(env, policies, state, step, rng):
    """The rest of episodes that are in `state` (...) at `step`: states and actions from there."""
    states, actions = [state], []
    for now in range(step, env.horizon):
        asked = policies[..., now, :]  # (..., S)
        action = np.take_along_axis(asked, state[..., None], -1)[..., 0]
        state = pick(env.dynamics[state, action], rng)
        states.append(state)
        actions.append(action)
    return np.stack(states, -1), np.stack(actions, -1)


def earned(env, states, actions):
    """The return (...) of episodes: states (..., H + 1), actions (..., H)."""
    before, after = states[..., :-1], states[..., 1:]
    return env.rewards[before, actions, after].sum(-1)
