"""Who prefers, in all experiments of this room, and what a learner concludes from it."""

import numpy as np

from minirlhf.online.environments import times


def sigmoid(x):
    return (1 + np.tanh(x / 2)) / 2  # without overflow


def prefers(return_a, return_b, beta, rng):
    """1.0 where a is preferred, 0.0 where b: P(a over b) = sigmoid(beta (return_a - return_b)).

    beta = inf always prefers the higher return, and answers 0.5 where they are equal.
    """
    gap = np.asarray(return_a) - np.asarray(return_b)
    if np.isinf(beta):
        return (1 + np.sign(gap)) / 2
    chance = sigmoid(beta * gap)
    return (rng.random(gap.shape) < chance).astype(float)


def logistic_loss(weights, x, y, precision):
    """The negative log posterior (...) of weights (..., D), up to a constant.

    x (..., N, D) differences of features, y (..., N) in 0..1 how far the first was preferred, and
    a prior N(0, 1 / precision) of each weight.
    """
    scores = times(x, weights)  # (..., N)
    losses = np.logaddexp(0, scores) - y * scores
    prior = precision / 2 * (weights**2).sum(-1)
    return losses.sum(-1) + prior


def logistic_map(x, y, precision, tolerance=1e-8):
    """The most probable weights (..., D) and the Hessian (..., D, D) of logistic_loss there.

    Newton's method, each step halved until the loss has fallen (Armijo): where the preferences can
    be separated, whole steps overshoot, and what follows is noise. Its inverse Hessian is Laplace's
    covariance.
    """
    turned = x.swapaxes(-1, -2)  # (..., D, N)
    weights = np.zeros(turned.shape[:-1])
    prior = precision * np.eye(x.shape[-1])
    for _ in range(100):
        chances = sigmoid(times(x, weights))  # (..., N)
        gradient = times(turned, chances - y) + precision * weights
        curvature = chances * (1 - chances)
        hessian = turned @ (curvature[..., None] * x) + prior
        step = times(np.linalg.inv(hessian), gradient)
        promise = (gradient * step).sum(-1)  # twice what a quadratic would fall by
        if (promise < tolerance).all():
            break
        weights = damped(weights, step, promise, x, y, precision)
    return weights, hessian


def damped(weights, step, promise, x, y, precision):
    """weights - t step, where t is 1, or halved until the loss falls by a quarter of t promise."""
    loss = logistic_loss(weights, x, y, precision)
    t = np.ones_like(loss)
    for _ in range(40):
        moved = weights - t[..., None] * step
        fallen = loss - logistic_loss(moved, x, y, precision)
        short = fallen < t * promise / 4 - 1e-12
        if not short.any():
            break
        t = np.where(short, t / 2, t)
    return moved
