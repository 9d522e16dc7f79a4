"""What every loop does between a batch and the next: seeds, the norm of the gradients, and a step that is made or not."""

import math
import random

import numpy as np
import pytest
import torch

from minirlhf.engine import optim
from minirlhf.engine.cli import UserError
from minirlhf.engine.machine import seed_everything
from minirlhf.engine.optim import gradient_norm, optimizer_step


def draws(seed, step=None):
    """What each generator gives after seeding, the returned one first."""
    rng = seed_everything(seed, step)
    return (
        rng.random(3).tolist(),
        random.random(),
        np.random.random(3).tolist(),
        torch.rand(3).tolist(),
        torch.initial_seed(),
    )


def test_seeds_repeat_and_differ():
    """For a run and for each of its steps, whatever was drawn before."""
    keys = [(0, None), (1, None), *((seed, step) for seed in (0, 1) for step in (0, 1, 2, 1000))]
    found = {key: draws(*key) for key in keys}
    for key in reversed(keys):
        assert draws(*key) == found[key]
    for kind in zip(*found.values(), strict=True):
        assert len({str(value) for value in kind}) == len(keys)


def test_a_steps_seed_is_of_nothing_but_its_number():
    seed_everything(3, 4)
    first = torch.rand(2), np.random.random(2), random.random()
    seed_everything(3)
    torch.rand(100), np.random.random(7), random.random()
    seed_everything(3, 3)
    seed_everything(3, 4)
    assert (
        torch.equal(torch.rand(2), first[0])
        and np.array_equal(np.random.random(2), first[1])
        and random.random() == first[2]
    )


SHAPES = [(7, 5), (5,), (3, 4, 2), (1, 1), (1000, 3)]


def parameters(scale=1.0, seed=0):
    """Parameters with gradients, and one without."""
    generator = torch.Generator().manual_seed(seed)
    found = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    for p in found:
        p.grad = scale * torch.randn(p.shape, generator=generator)
    return [*found, torch.nn.Parameter(torch.randn(2, 2))]


def numpy_norm(found):
    return math.sqrt(
        sum((p.grad.numpy().astype(np.float64) ** 2).sum() for p in found if p.grad is not None)
    )


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_gradient_norm_is_that_of_all_numbers(scale):
    found = parameters(scale)
    norm = gradient_norm(found)
    assert norm.shape == () and norm.item() == pytest.approx(numpy_norm(found), rel=1e-6)


def test_a_large_gradient_does_not_hide_small_ones():
    """As float32 sums would: 4,000 rows of 1e-4 beside one of 1."""
    p = torch.nn.Parameter(torch.zeros(4001, 1))
    p.grad = torch.full((4001, 1), 1e-4)
    p.grad[0] = 1
    assert gradient_norm([p]).item() == pytest.approx(math.sqrt(1 + 4000e-8), abs=6e-8)


@pytest.mark.parametrize("most", [0, 0.5, 1e6])
def test_a_step_by_clipped_gradients(most):
    """Plain gradient descent with rate 1, against NumPy; what is returned is the norm before clipping, and the loss, as numbers."""
    found = parameters()
    before, gradients, norm = (
        [p.detach().clone() for p in found],
        [p.grad for p in found],
        numpy_norm(found),
    )
    factor = min(1.0, most / norm) if most else 1.0
    expected = [
        b.numpy() if g is None else b.numpy() - factor * g.numpy()
        for b, g in zip(before, gradients, strict=True)
    ]
    loss, got = optimizer_step(
        torch.optim.SGD(found, lr=1.0), most, torch.tensor(1.25, requires_grad=True)
    )
    assert (
        loss == 1.25 and got == pytest.approx(norm, rel=1e-6) and type(loss) is type(got) is float
    )
    for p, e in zip(found, expected, strict=True):
        np.testing.assert_allclose(p.detach(), e, rtol=1e-5, atol=1e-6)
        assert p.grad is None


@pytest.mark.parametrize("most", [0, 1.0])
@pytest.mark.parametrize("broken", ["loss", "gradient"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_no_step_is_made_by_numbers_that_are_none(value, broken, most):
    seen = []
    for nonfinite in (None, lambda *figures: seen.append(figures)):
        found = parameters()
        before = [p.detach().clone() for p in found]
        optimizer, loss = (
            optim.make_optimizer(torch.nn.ParameterList(found), 0.1),
            torch.tensor(2.0),
        )
        if broken == "loss":
            loss = loss * value
        else:
            found[2].grad[1, 1, 1] = value
        if nonfinite is None:
            with pytest.raises(UserError, match="loss.*gradient norm"):
                optimizer_step(optimizer, most, loss)
        else:
            optimizer_step(optimizer, most, loss, nonfinite)
            assert (
                len(seen) == 1
                and math.isfinite(seen[0][0]) == (broken != "loss")
                and math.isfinite(seen[0][1]) == (broken == "loss")
            )
            assert all(p.grad is None for p in found)  # nothing of it comes into the next step
        assert (
            all(torch.equal(p, b) for p, b in zip(found, before, strict=True))
            and not optimizer.state
        )
