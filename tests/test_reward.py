"""Reward-model losses against numbers worked by hand, NumPy loops and finite differences.

Letters: B batch, K options. D = chosen - rejected. All is float64 unless a test says otherwise.
"""

import itertools
import math

import numpy as np
import pytest
import torch

from minirlhf.reward import (
    best_of_k_loss,
    bradley_terry_loss,
    normalization,
    pair_accuracy,
    plackett_luce_loss,
    rating_loss,
    share_positive,
)


def tensor(x):
    return torch.tensor(x, dtype=torch.float64)


def normal(*shape, seed=0, scale=2.0):
    return torch.from_numpy(np.random.default_rng(seed).normal(0.0, scale, shape))


def bt_loop(chosen, rejected, margin, label, center):
    """Mean over pairs, one pair at a time, with plain exponentials."""
    total = 0.0
    for c, r, m, q in zip(chosen, rejected, margin, label, strict=True):
        wins = 1.0 / (1.0 + math.exp(-(c - r - m)))
        loses = 1.0 / (1.0 + math.exp(c - r + m))
        total += -q * math.log(wins) - (1.0 - q) * math.log(loses) + center * (c + r) ** 2
    return total / len(chosen)


def pl_loop(rewards, ranking):
    """-log P(the ranking is drawn, one option at a time, without replacement); mean over rows."""
    total = 0.0
    for row, order in zip(rewards, ranking, strict=True):
        left = list(order)
        while left:
            weights = [math.exp(row[i]) for i in left]
            total -= math.log(weights[0] / sum(weights))
            left.pop(0)
    return total / len(rewards)


def finite_difference(f, x, eps=1e-5):
    """Central differences of the scalar f at x, one coordinate at a time."""
    grad = torch.zeros_like(x)
    for index in np.ndindex(*x.shape):
        step = torch.zeros_like(x)
        step[index] = eps
        grad[index] = (f(x + step) - f(x - step)) / (2 * eps)
    return grad


# Bradley-Terry


@pytest.mark.parametrize(
    "chosen, rejected, options, expected",
    [
        (0.0, 0.0, {}, 0.6931471805599453),  # log 2
        (2.0, 0.0, {}, 0.1269280110429726),  # log(1 + e^-2)
        (0.0, 2.0, {}, 2.1269280110429726),  # the same plus 2
        (2.0, 1.0, {"margin": 1.0}, 0.6931471805599453),  # D - m = 0
        (1.0, 1.0, {"margin": 1.0}, 1.3132616875182228),  # log(1 + e)
        (2.0, 0.0, {"label": 0.0}, 2.1269280110429726),
        (2.0, 0.0, {"label": 0.75}, 0.6269280110429726),  # .75 * .126928 + .25 * 2.126928
        (2.0, 2.0, {"center": 0.01}, 0.6931471805599453 + 0.16),  # 0.01 * 4^2
        (1.0, -1.0, {"center": 0.5}, 0.1269280110429726),  # centred already: nothing to pay
    ],
)
def test_bradley_terry_by_hand(chosen, rejected, options, expected):
    loss = bradley_terry_loss(tensor([chosen]), tensor([rejected]), **options)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("center", [0.0, 0.03])
@pytest.mark.parametrize("soft, with_margin", [*itertools.product([False, True], [False, True])])
def test_bradley_terry_is_the_loop(soft, with_margin, center):
    chosen, rejected = normal(9, seed=1), normal(9, seed=2)
    rng = np.random.default_rng(3)
    label = tensor(rng.uniform(0, 1, 9) if soft else np.ones(9))
    margin = tensor(rng.uniform(-1, 1, 9) if with_margin else np.zeros(9))
    loss = bradley_terry_loss(chosen, rejected, margin=margin, label=label, center=center)
    expected = bt_loop(chosen.tolist(), rejected.tolist(), margin.tolist(), label.tolist(), center)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_bradley_terry_floats_and_tensors_are_the_same_options():
    chosen, rejected = normal(5, seed=4), normal(5, seed=5)
    floats = bradley_terry_loss(chosen, rejected, margin=0.3, label=0.8, center=0.1)
    margin, label = torch.full_like(chosen, 0.3), torch.full_like(chosen, 0.8)
    full = bradley_terry_loss(chosen, rejected, margin=margin, label=label, center=0.1)
    assert floats.item() == pytest.approx(full.item(), rel=1e-14)
    expected = bt_loop(chosen.tolist(), rejected.tolist(), [0.3] * 5, [0.8] * 5, 0.1)
    assert floats.item() == pytest.approx(expected)


def test_bradley_terry_does_not_care_which_side_is_called_chosen():
    chosen, rejected, margin = normal(7, seed=6), normal(7, seed=7), normal(7, seed=8)
    label = torch.from_numpy(np.random.default_rng(9).uniform(0, 1, 7))
    here = bradley_terry_loss(chosen, rejected, margin=margin, label=label, center=0.02)
    there = bradley_terry_loss(rejected, chosen, margin=margin, label=1 - label, center=0.02)
    assert here.item() == pytest.approx(there.item(), rel=1e-12)


def test_bradley_terry_sees_differences_only_until_center_is_on():
    chosen, rejected = normal(7, seed=10), normal(7, seed=11)
    loss, moved = bradley_terry_loss(chosen, rejected), bradley_terry_loss(chosen + 5, rejected + 5)
    assert loss.item() == pytest.approx(moved.item(), rel=1e-12)
    loss, moved = (bradley_terry_loss(chosen + s, rejected + s, center=0.1) for s in (0, 5))
    pulled = 0.1 * (((chosen + rejected + 10) ** 2).mean() - ((chosen + rejected) ** 2).mean())
    assert (moved - loss).item() == pytest.approx(pulled.item(), rel=1e-12)


@pytest.mark.parametrize("label", [1.0, 0.7])
def test_bradley_terry_gradient(label):
    chosen, rejected = normal(6, seed=12).requires_grad_(), normal(6, seed=13).requires_grad_()
    options = {"margin": 0.4, "label": label, "center": 0.05}
    grads = torch.autograd.grad(bradley_terry_loss(chosen, rejected, **options), [chosen, rejected])
    c, r = chosen.detach(), rejected.detach()

    def closed_form():  # d/dD, with sigmoid' = sigmoid (1 - sigmoid)
        wrong = 1 / (1 + np.exp(c.numpy() - r.numpy() - 0.4))  # P(rejected wins), margin counted
        wins = 1 / (1 + np.exp(-(c.numpy() - r.numpy() + 0.4)))
        by_d, by_sum = -label * wrong + (1 - label) * wins, 0.1 * (c + r).numpy()
        return (by_d + by_sum) / 6, (-by_d + by_sum) / 6

    for grad, expected in zip(grads, closed_form(), strict=True):
        np.testing.assert_allclose(grad.numpy(), expected, rtol=1e-10)
    numeric = finite_difference(lambda x: bradley_terry_loss(x, r, **options), c)
    np.testing.assert_allclose(grads[0].numpy(), numeric.numpy(), atol=1e-9)


def test_bradley_terry_best_margin_of_a_soft_label_is_its_logit():
    d = tensor([math.log(0.8 / 0.2)]).requires_grad_()
    loss = bradley_terry_loss(d, torch.zeros_like(d), label=0.8)
    entropy = -0.8 * math.log(0.8) - 0.2 * math.log(0.2)  # the label's
    assert loss.item() == pytest.approx(entropy, rel=1e-12)
    assert torch.autograd.grad(loss, d)[0].item() == pytest.approx(0.0, abs=1e-12)


def test_bradley_terry_stays_finite_for_huge_rewards():
    chosen = torch.tensor([1e4, -1e4, 1e4], requires_grad=True)
    loss = bradley_terry_loss(chosen, -chosen.detach(), label=torch.tensor([1.0, 1.0, 0.5]))
    assert loss.item() == pytest.approx((0 + 2e4 + 1e4) / 3, rel=1e-6)
    (grad,) = torch.autograd.grad(loss, chosen)
    np.testing.assert_allclose(grad.numpy(), np.array([0, -1, 0.5]) / 3, rtol=1e-6)


# Plackett-Luce


@pytest.mark.parametrize("ranking, probability", [
    ([1, 2, 0], 5 / 10 * 3 / 5), ([0, 1, 2], 2 / 10 * 5 / 8), ([2, 0, 1], 3 / 10 * 2 / 7),
])  # fmt: skip
def test_plackett_luce_by_hand(ranking, probability):
    rewards = tensor([[math.log(2), math.log(5), math.log(3)]])  # weights 2, 5, 3
    loss = plackett_luce_loss(rewards, torch.tensor([ranking]))
    assert loss.item() == pytest.approx(-math.log(probability))


@pytest.mark.parametrize("k", [2, 3, 4, 9])
def test_plackett_luce_is_the_loop(k):
    rewards, rng = normal(6, k, seed=k), np.random.default_rng(k)
    ranking = torch.from_numpy(np.stack([rng.permutation(k) for _ in range(6)]))
    loss = plackett_luce_loss(rewards, ranking)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(pl_loop(rewards.tolist(), ranking.tolist()), rel=1e-12)


def test_plackett_luce_of_two_is_bradley_terry():
    rewards = normal(8, 2, seed=20)
    ranking = torch.tensor([[0, 1], [1, 0]] * 4)
    first, second = (rewards.gather(1, ranking)[:, i].tolist() for i in (0, 1))
    expected = bt_loop(first, second, [0.0] * 8, [1.0] * 8, 0.0)
    assert plackett_luce_loss(rewards, ranking).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("k", [2, 3, 5])
def test_plackett_luce_is_a_distribution_over_rankings(k):
    rewards = normal(1, k, seed=30 + k)
    total = sum(
        math.exp(-plackett_luce_loss(rewards, torch.tensor([order])).item())
        for order in itertools.permutations(range(k))
    )
    assert total == pytest.approx(1.0, rel=1e-12)


def test_plackett_luce_equal_rewards_make_every_ranking_equally_likely():
    ranking = torch.tensor([[0, 1, 2, 3], [3, 1, 0, 2], [2, 3, 1, 0]])
    loss = plackett_luce_loss(torch.full((3, 4), 7.0, dtype=torch.float64), ranking)
    assert loss.item() == pytest.approx(math.log(24), rel=1e-12)


def test_plackett_luce_symmetries():
    rewards, rng = normal(5, 4, seed=40), np.random.default_rng(41)
    ranking = torch.from_numpy(np.stack([rng.permutation(4) for _ in range(5)]))
    loss = plackett_luce_loss(rewards, ranking).item()
    shift = normal(5, 1, seed=42)  # one constant a row changes nothing
    assert plackett_luce_loss(rewards + shift, ranking).item() == pytest.approx(loss, rel=1e-12)
    rows = torch.tensor([3, 0, 4, 1, 2])
    assert plackett_luce_loss(rewards[rows], ranking[rows]).item() == pytest.approx(loss, rel=1e-12)
    new_name = torch.tensor([2, 0, 3, 1])  # option i is now called new_name[i]
    renamed = torch.empty_like(rewards)
    renamed[:, new_name] = rewards
    assert plackett_luce_loss(renamed, new_name[ranking]).item() == pytest.approx(loss, rel=1e-12)


def test_plackett_luce_gradient_and_huge_rewards():
    ranking = torch.tensor([[2, 0, 1], [1, 2, 0]])
    rewards = normal(2, 3, seed=50).requires_grad_()
    (grad,) = torch.autograd.grad(plackett_luce_loss(rewards, ranking), rewards)
    numeric = finite_difference(lambda x: plackett_luce_loss(x, ranking), rewards.detach())
    np.testing.assert_allclose(grad.numpy(), numeric.numpy(), atol=1e-9)
    np.testing.assert_allclose(grad.sum(1).numpy(), 0.0, atol=1e-12)
    huge = plackett_luce_loss(torch.tensor([[1e4, 0.0, -1e4]]), torch.tensor([[2, 1, 0]]))
    assert huge.item() == pytest.approx(3e4, rel=1e-6)  # 2e4 for the first place, 1e4 the second


def ragged(k, sizes, seed):
    """Rewards (B, k) of rows of these sizes, -inf for the missing options, at random places.

    And rankings (B, k), with the missing options last.
    """
    rng, rewards, ranking = np.random.default_rng(seed), [], []
    for size in sizes:
        order = rng.permutation(k)
        row = rng.normal(0.0, 2.0, k)
        row[order[size:]] = -math.inf
        rewards.append(row.tolist())
        ranking.append(order.tolist())
    return rewards, ranking


SIZES = [4, 2, 1, 5, 3, 2]


def test_plackett_luce_leaves_missing_options_out():
    rewards, ranking = ragged(5, SIZES, seed=60)
    expected = pl_loop(rewards, [order[:size] for order, size in zip(ranking, SIZES, strict=True)])
    double = plackett_luce_loss(tensor(rewards), torch.tensor(ranking))
    assert double.item() == pytest.approx(expected, rel=1e-12)
    single = plackett_luce_loss(torch.tensor(rewards), torch.tensor(ranking))
    assert single.dtype == torch.float32 and single.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("loss", ["plackett_luce", "best_of_k"])
def test_missing_options_have_no_gradient_and_the_others_their_own(loss):
    rewards, ranking = ragged(5, SIZES, seed=61)
    whole, order = tensor(rewards).requires_grad_(), torch.tensor(ranking)

    def f(x, order):
        if loss == "plackett_luce":
            return plackett_luce_loss(x, order)
        return best_of_k_loss(x, order[:, 0])

    (grad,) = torch.autograd.grad(f(whole, order), whole)
    for b, size in enumerate(SIZES):
        alone = whole.detach()[b, order[b, :size]][None].requires_grad_()
        (expected,) = torch.autograd.grad(f(alone, torch.arange(size)[None]), alone)
        np.testing.assert_allclose(grad[b, order[b, :size]], expected[0] / len(SIZES), atol=1e-12)
        assert (grad[b, order[b, size:]] == 0).all()


def test_gradcheck():
    check, ranking = torch.autograd.gradcheck, torch.tensor([[2, 0, 1], [1, 2, 0]])
    a, b = normal(2, 3, seed=62).requires_grad_(), normal(2, 3, seed=63).requires_grad_()
    label = torch.from_numpy(np.random.default_rng(64).uniform(0, 1, (2, 3)))
    options = {"label": label, "margin": 0.3, "center": 0.1}
    assert check(lambda x, y: bradley_terry_loss(x, y, **options), (a, b))
    assert check(lambda x: plackett_luce_loss(x, ranking), a)
    assert check(lambda x: best_of_k_loss(x, ranking[:, 0]), a)
    assert check(lambda x: rating_loss(x, b.detach()), a)
    missing = torch.tensor([[False, True, False], [False, False, False]])  # option 1, last of row 0
    assert check(lambda x: plackett_luce_loss(x.masked_fill(missing, -math.inf), ranking), a)


# Best of K, ratings


@pytest.mark.parametrize("k", [2, 4, 7])
def test_best_of_k_is_the_loop(k):
    rewards, best = normal(6, k, seed=70 + k), np.random.default_rng(k).integers(0, k, 6)
    rows = zip(rewards.tolist(), best, strict=True)
    expected = np.mean([-math.log(math.exp(row[i]) / sum(map(math.exp, row))) for row, i in rows])
    loss = best_of_k_loss(rewards, torch.from_numpy(best))
    assert loss.shape == () and loss.item() == pytest.approx(expected, rel=1e-12)


def test_best_of_k_by_hand():
    rewards = tensor([[2, 5, 3], [2, 0, 6]]).log()  # log 0: a missing option
    loss = best_of_k_loss(rewards, torch.tensor([1, 0]))
    assert loss.item() == pytest.approx((math.log(10 / 5) + math.log(8 / 2)) / 2, rel=1e-12)
    equal = best_of_k_loss(torch.zeros(3, 4), torch.tensor([0, 1, 3]))
    assert equal.item() == pytest.approx(math.log(4))


def test_rating_loss():
    scores, ratings = normal(9, seed=80), normal(9, seed=81)
    expected = sum((s - r) ** 2 for s, r in zip(scores.tolist(), ratings.tolist(), strict=True)) / 9
    assert rating_loss(scores, ratings).item() == pytest.approx(expected, rel=1e-12)
    assert rating_loss(tensor([1.0, -2.0]), tensor([3.0, -2.0])).item() == 2.0


# Figures


def test_pair_accuracy():
    scores = tensor([0.5, 2.0, 0.5, -1.0])
    pairs = torch.tensor([[1, 0], [0, 2], [3, 1], [2, 3]])  # right, equal, wrong, right
    assert pair_accuracy(scores, pairs).item() == 0.625
    assert share_positive(tensor([1.5, 0.0, -2.5, 1.5])).item() == 0.625


def test_normalization():
    scores = normal(11, seed=90)
    mean = sum(scores.tolist()) / 11
    std = math.sqrt(sum((s - mean) ** 2 for s in scores.tolist()) / 11)
    assert normalization(scores) == pytest.approx((mean, std), rel=1e-12)
