"""What it costs to optimise one reward where another was meant, exact, in small worlds.

J(pi) is the expected discounted return from the start distribution. Regret is measured by R1, as a
share of its range, max J1 - min J1, so it lies in [0, 1]. Shapes and errors as in distances.py;
start (S,), uniform where not given; discount in [0, 1).
"""

import numpy as np

from minirlhf.rewards.distances import (
    checked_discount,
    checked_probabilities,
    checked_reward,
    mean_reward,
    pair_of_rewards,
)

# One policy


def values_of(reward, T, pi, discount):
    """V = (1 - gamma T_pi)^-1 r_pi for a mean reward (S, A); Bellman's equation. -> (S,)"""
    steps = np.einsum("sa,sat->st", pi, T)
    return np.linalg.solve(np.eye(len(T)) - discount * steps, (pi * reward).sum(1))


def policy_return(R, T, pi, *, discount=0.99, start=None):
    """J(pi), the expected discounted return of a policy (S, A) from the start distribution."""
    R = checked_reward(R)
    T = checked_probabilities(T, R.shape, "T")
    pi = checked_probabilities(pi, R.shape[:2], "pi")
    start = checked_probabilities(start, R.shape[:1], "start")
    checked_discount(discount)
    values = values_of(mean_reward(R, T), T, pi, discount)
    return float(start @ values)


def improved(reward, T, discount):
    """Policy iteration (Howard 1960) on a mean reward (S, A): an optimal deterministic policy.

    Exact: it ends where no action is better by more than round-off. -> (S, A), one 1 a row
    """
    states, actions = reward.shape
    choice = reward.argmax(1)
    rows = np.arange(states)
    while True:
        pi = np.eye(actions)[choice]
        values = values_of(reward, T, pi, discount)
        worth = reward + discount * T @ values
        slack = 1e-11 * (1 + np.abs(worth).max())  # without it, ties go round in circles
        better = worth.max(1) > worth[rows, choice] + slack
        if not better.any():
            return pi
        choice = np.where(better, worth.argmax(1), choice)


def optimal_policy(R, T, *, discount=0.99):
    """A deterministic policy of greatest return from every start; -R: a worst one. -> (S, A)"""
    R = checked_reward(R)
    T = checked_probabilities(T, R.shape, "T")
    checked_discount(discount)
    return improved(mean_reward(R, T), T, discount)


def return_range(R, T, *, discount=0.99, start=None):
    """(least J, greatest J) over all policies."""
    R = checked_reward(R)
    worst = optimal_policy(-R, T, discount=discount)
    best = optimal_policy(R, T, discount=discount)
    least = policy_return(R, T, worst, discount=discount, start=start)
    greatest = policy_return(R, T, best, discount=discount, start=start)
    return least, greatest


# Two rewards


def regret(R1, R2, T, *, discount=0.99, start=None):
    """(max J1 - J1(pi2)) / (max J1 - min J1), pi2 optimal for R2; 0 where R1 has no range.

    Where several policies are optimal for R2, it is the one that policy iteration ends with.
    """
    R1, R2 = pair_of_rewards(R1, R2)
    least, greatest = return_range(R1, T, discount=discount, start=start)
    pi2 = optimal_policy(R2, T, discount=discount)
    lost = greatest - policy_return(R1, T, pi2, discount=discount, start=start)
    return share(lost, greatest - least, max(abs(least), abs(greatest)))


def share(lost, width, size):
    """lost / width in [0, 1]; 0 where the width is round-off beside returns of that size."""
    return float(np.clip(lost / width, 0, 1)) if width > 1e-10 * size else 0.0


def mean_regret(R1, R2, T, *, discount=0.99, start=None):
    """The mean of regret(R1, R2) and regret(R2, R1): each optimised, measured by the other."""
    first = regret(R1, R2, T, discount=discount, start=start)
    second = regret(R2, R1, T, discount=discount, start=start)
    return (first + second) / 2


def return_polygon(R1, R2, T, *, discount=0.99, start=None, tolerance=1e-9):
    """The corners of the set of all (J1(pi), J2(pi)), a convex polygon. -> (V, 2)

    Returns are linear in a policy's occupancies, which form a polytope (Puterman 1994, 6.9), so its
    image is a polygon whose corners are deterministic policies. The corner farthest in a direction
    c is policy iteration on c1 R1 + c2 R2; between two corners the direction normal to their edge
    either finds a new one or shows that the edge is the border. No border lies farther out than
    tolerance, in units of each return's range.
    """
    R1, R2 = pair_of_rewards(R1, R2)
    T = checked_probabilities(T, R1.shape, "T")
    start = checked_probabilities(start, R1.shape[:1], "start")
    rewards = np.stack([mean_reward(R1, T), mean_reward(R2, T)])
    checked_discount(discount)

    def corner(direction):
        pi = improved(np.tensordot(direction, rewards, 1), T, discount)
        return np.array([start @ values_of(reward, T, pi, discount) for reward in rewards])

    left, right = corner(np.array([-1.0, 0.0])), corner(np.array([1.0, 0.0]))
    top, bottom = corner(np.array([0.0, 1.0])), corner(np.array([0.0, -1.0]))
    # in units of the ranges, so that both returns count alike
    width = np.array([right[0] - left[0], top[1] - bottom[1]])
    size = 1 + np.abs([left[0], bottom[1]])
    width = np.where(width > 1e-12 * size, width, 1.0)
    found = []
    # clockwise; the first to be taken is the last of the list
    edges = [(bottom, left), (right, bottom), (top, right), (left, top)]
    while edges:
        first, last = edges.pop()
        along = (last - first) / width
        length = np.hypot(*along)
        outward = np.array([-along[1], along[0]])
        if length > tolerance:
            between = corner(outward / length / width)
            beyond = outward @ ((between - first) / width)
            if beyond > tolerance * length:
                edges.append((between, last))
                edges.append((first, between))
                continue
        found.append(first)
    return np.array(found)


def worst_of_polygon(corners):
    """Worst-case regret from the corners (V, 2) of the returns, in order round the polygon.

    With u(c) = max {J1 : J2 <= c} and l(c) = min {J1 : J2 >= c}, it is the greatest u(c) - l(c)
    over max J1 - min J1. u is concave and l convex in c, both linear between the J2 of corners: the
    greatest difference is at a corner's J2.
    """
    corners = np.asarray(corners, dtype=np.float64)
    first, second = corners.T
    edges = np.roll(corners, -1, axis=0) - corners
    run, rise = edges.T
    worst = 0.0
    for level in second:
        with np.errstate(divide="ignore", invalid="ignore"):
            part = (level - second) / rise
        crossing = (part >= 0) & (part <= 1)  # False for the NaN of a level edge
        at_level = first[crossing] + part[crossing] * run[crossing]
        below = np.append(at_level, first[second <= level])
        above = np.append(at_level, first[second >= level])
        worst = max(worst, below.max() - above.min())
    return share(worst, np.ptp(first), np.abs(first).max())


def worst_regret(R1, R2, T, *, discount=0.99, start=None, tolerance=1e-9):
    """max (J1(pi1) - J1(pi2)) / (max J1 - min J1) over all policies with J2(pi2) >= J2(pi1).

    Skalse et al. 2024 (STARC). Policies may be stochastic, so it is at least the
    maximum over deterministic ones. 0 for rewards that order policies alike, 1 for opposite ones;
    where R2 orders nothing it is 1, where R1 orders nothing 0. Exact up to the tolerance.
    """
    corners = return_polygon(
        R1,
        R2,
        T,
        discount=discount,
        start=start,
        tolerance=tolerance,
    )
    return worst_of_polygon(corners)


# Processes and rewards drawn at random


def random_mdp(rng, states, actions, *, least=1.0):
    """Dynamics (S, A, S') drawn with a NumPy generator: softmax of the normal draws above `least`.

    Other next states cannot happen (with 1.0, five of six); -inf bars none. Where no draw is above,
    the greatest stays. The way of the experiments of Skalse et al. 2024 with 32 states.
    """
    draws = rng.standard_normal((states, actions, states))
    possible = (draws > least) | (draws == draws.max(-1, keepdims=True))
    weights = np.where(possible, np.exp(draws), 0)
    return weights / weights.sum(-1, keepdims=True)


def random_reward(rng, states, actions, *, discount=0.99, varied=True):
    """Normal rewards (S, A, S'); `varied`, with differences that a distance should look through.

    In the manner of the experiments of Skalse et al. 2024: one in five keeps draws above 3 alone,
    seven in ten are scaled by up to 10, three in ten shifted by up to 10, one in two shaped by a
    normal potential of scale up to 10.
    """
    R = rng.standard_normal((states, actions, states))
    if not varied:
        return R
    if rng.random() < 0.2:
        R = np.where(R > 3, R, 0)
    if rng.random() < 0.7:
        R = R * rng.uniform(0, 10)
    if rng.random() < 0.3:
        R = R + rng.uniform(0, 10)
    if rng.random() < 0.5:
        potential = rng.standard_normal(states) * rng.uniform(0, 10)
        R = R + discount * potential[None, None, :] - potential[:, None, None]
    return R
