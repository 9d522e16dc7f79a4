"""Who prefers, in all experiments of this room, and what a learner concludes from it."""

import numpy as np


def sigmoid(x):
    return (1 + np.tanh(x / 2)) / 2  # without overflow


def prefers(return_a, return_b, beta, rng):
    """1.0 where a is preferred, 0.0 where b: P(a over b) = sigmoid(beta (return_a - return_b)).

    beta = inf always prefers the higher return, and answers 0.5 where they are equal.
    """
    gap = np.asarray(return_a) - np.asarray(return_b)
    if np.isinf(beta):
        return (1 + np.sign(gap)) / 2
    return (rng.random(gap.shape) < sigmoid(beta * gap)).astype(float)


def logistic_loss(weights, x, y, precision):
    """The negative log posterior (...) of weights (..., D), up to a constant.

    x (..., N, D) differences of features, y (..., N) in 0..1 how far the first was preferred, and
    a prior N(0, 1 / precision) of each weight.
    """
    scores = (x @ weights[..., None])[..., 0]  # (..., N)
    losses = np.logaddexp(0, scores) - y * scores
    return losses.sum(-1) + precision / 2 * (weights**2).sum(-1)


def logistic_map(x, y, precision, start=None, tolerance=1e-8, steps=100):
    """The most probable weights (..., D) and the Hessian (..., D, D) of logistic_loss there.

    Newton's method, each step halved until the loss has fallen (Armijo): where the preferences can
    be separated, whole steps overshoot, and what follows is noise. Its inverse Hessian is Laplace's
    covariance.
    """
    weights = np.zeros((*x.shape[:-2], x.shape[-1])) if start is None else start
    for _ in range(steps):
        chances = sigmoid((x @ weights[..., None])[..., 0])  # (..., N)
        gradient = ((chances - y)[..., None, :] @ x)[..., 0, :] + precision * weights
        curvature = (chances * (1 - chances))[..., None] * x
        hessian = x.swapaxes(-1, -2) @ curvature + precision * np.eye(x.shape[-1])
        step = np.linalg.solve(hessian, gradient[..., None])[..., 0]
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
        short = logistic_loss(moved, x, y, precision) > loss - t * promise / 4 + 1e-12
        if not short.any():
            break
        t = np.where(short, t / 2, t)
    return moved
