"""PPO maths against one example worked by hand, NumPy loops and finite differences.

B rows of R response tokens. Padding is filled with large numbers: what lies outside the mask must
change nothing.
"""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train_ppo
from minirlhf import ppo
from minirlhf.look.episodes import explained_variance

LENGTHS = [5, 1, 0, 7, 3]  # one token, none at all, the full width
B, R = len(LENGTHS), max(LENGTHS)


def make_mask(lengths=LENGTHS, width=None):
    return torch.arange(width or max(lengths))[None, :] < torch.tensor(lengths)[:, None]  # (B, R)


def normal(*shape, seed=0, scale=1.0):
    return torch.from_numpy(np.random.default_rng(seed).normal(0.0, scale, shape))


def double(x):
    return torch.tensor(x, dtype=torch.float64)


def dirty(x, mask, value):
    """x with its padding overwritten by value, one sign on even places and the other on odd
    ones."""
    return torch.where(mask, x, value * (-1.0) ** torch.arange(x.numel()).view_as(x).to(x.dtype))


def close(actual, expected, rtol=1e-10, atol=1e-12):
    actual = actual.detach() if isinstance(actual, torch.Tensor) else actual
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), rtol=rtol, atol=atol)


def gae_loop(rewards, values, mask, gamma, lam):
    advantages, returns = np.zeros(rewards.shape), np.zeros(rewards.shape)
    for b in range(len(rewards)):
        next_value = next_advantage = 0.0
        for t in reversed(range(int(mask[b].sum()))):
            delta = rewards[b, t].item() + gamma * next_value - values[b, t].item()
            next_advantage, next_value = delta + gamma * lam * next_advantage, values[b, t].item()
            advantages[b, t], returns[b, t] = next_advantage, next_advantage + next_value
    return advantages, returns


def policy_loop(logprobs, old_logprobs, advantages, mask, clip):
    loss, stats = [], {"ppo/policy/ratio": [], "ppo/policy/approxkl": [], "ppo/policy/clipfrac": []}
    for lp, lp0, a in zip(
        *(x[mask].tolist() for x in (logprobs, old_logprobs, advantages)), strict=True
    ):
        ratio = math.exp(lp - lp0)
        free, cut = -a * ratio, -a * min(max(ratio, 1 - clip), 1 + clip)
        loss.append(max(free, cut))
        for key, x in zip(stats, (ratio, 0.5 * (lp - lp0) ** 2, cut > free), strict=True):
            stats[key].append(x)
    return np.mean(loss), {key: np.mean(x) for key, x in stats.items()}


def value_loop(values, old_values, returns, mask, clip):
    loss, clipped = [], []
    for v, v0, r in zip(*(x[mask].tolist() for x in (values, old_values, returns)), strict=True):
        free, cut = (v - r) ** 2, (min(max(v, v0 - clip), v0 + clip) - r) ** 2
        loss.append(0.5 * max(free, cut))
        clipped.append(cut > free)
    return np.mean(loss), {"ppo/val/clipfrac": np.mean(clipped)}


both_losses = pytest.mark.parametrize(
    "loss, loop", [(ppo.policy_loss, policy_loop), (ppo.value_loss, value_loop)]
)


def test_gae_is_its_recursion_on_long_rows():
    torch.manual_seed(0)
    rewards, values = torch.randn(2, 5, 512, dtype=torch.float64)
    mask = torch.arange(512) < torch.tensor([[1], [512], [100], [511], [256]])
    for gamma, lam in ((1.0, 1.0), (1.0, 0.95), (0.99, 0.0), (0.0, 0.9)):
        slow = ppo.gae(rewards, values, mask, gamma, lam)
        for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 5e-5)):
            for fast, expected in zip(
                ppo.fast_gae(rewards.to(dtype), values.to(dtype), mask, gamma, lam),
                slow,
                strict=True,
            ):
                close(fast, expected, atol=tolerance)


def test_the_example_by_hand():
    """Two responses of 2 and 3 tokens, gamma 1, lambda 0.5, KL coefficient 0.1; the 7 and the 9s
    are padding."""
    mask = make_mask([2, 3])
    logprobs, ref_logprobs = (
        double([[-1, -2, 7], [-1, -1, -2]]),
        double([[-2, -1, 9], [-1, -3, -3]]),
    )
    values = double([[1, 2, 9], [0, 1, 1]])
    kl = ppo.kl_estimate(logprobs, ref_logprobs)
    close(kl[mask], [1, -1, 0, 2, 1])
    rewards = ppo.shaped_rewards(double([3, -1]), kl, mask, 0.1)
    close(rewards, [[-0.1, 3.1, 0], [0, -0.2, -1.1]])
    close(ppo.gae(rewards, values, mask, gamma=1.0, lam=0.0)[0], [[0.9, 1.1, 0], [1, -0.2, -2.1]])
    advantages, returns = ppo.gae(rewards, values, mask, gamma=1.0, lam=0.5)
    close(advantages, [[1.45, 1.1, 0], [0.375, -1.25, -2.1]])
    close(returns, [[2.45, 3.1, 0], [0.375, -0.25, -1.1]])


def test_masked_mean_is_over_real_tokens():
    x, mask = double([[1, 2, 50], [6, 1e9, -1e8]]), make_mask([2, 1], 3)
    close(ppo.masked_mean(x, mask), 3.0)
    close(ppo.masked_mean(x, mask.double()), 3.0)


def test_kl_estimates():
    logprobs, ref = double([[-1, -3, -2]]), double([[-2, -1, -2]])
    close(ppo.kl_estimate(logprobs, ref), [[1, -2, 0]])
    close(ppo.kl_estimate(logprobs, ref, kind="k2"), [[0.5, 2, 0]])
    close(ppo.kl_estimate(logprobs, ref, kind="k3"), [[math.exp(-1), math.exp(2) - 3, 0]])
    with pytest.raises(ValueError):
        ppo.kl_estimate(logprobs, ref, kind="k4")
    # Under the policy p, k1 and k3 average to KL(p, q) exactly, k2 to second order; k1 alone can
    # be negative.
    p, q = torch.softmax(normal(50, seed=1), 0), torch.softmax(normal(50, seed=2), 0)
    k1, k3 = (ppo.kl_estimate(p.log(), q.log(), kind=kind) for kind in ("k1", "k3"))
    kl = sum(a * math.log(a / b) for a, b in zip(p.tolist(), q.tolist(), strict=True))
    close([(p * k1).sum(), (p * k3).sum()], [kl, kl])
    assert (k1 < 0).any() and (k3 >= 0).all()
    near = torch.softmax(p.log() + 1e-3 * normal(50, seed=3), 0)
    close(
        (p * ppo.kl_estimate(p.log(), near.log(), kind="k2")).sum(),
        (p * (p / near).log()).sum(),
        rtol=1e-2,
    )


def test_score_lands_on_the_last_token_and_nowhere_else():
    mask, scores, kl = make_mask(), normal(B, seed=4), normal(B, R, seed=5)
    expected = np.where(mask, -0.3 * kl, 0.0)
    for b, length in enumerate(LENGTHS):
        expected[b, length - 1] += scores[b].item() if length else 0.0
    for m in (mask, mask.double()):
        close(ppo.shaped_rewards(scores, dirty(kl, mask, 1e6), m, 0.3), expected)
        alone = ppo.on_last_token(scores, m)
        close(alone, expected + np.where(mask, 0.3 * kl, 0.0))
        close(
            ppo.shaped_rewards(dirty(alone, mask, 1e6), kl, m, 0.3), expected
        )  # scores by the token stay where they are


@pytest.mark.parametrize("gamma", [1.0, 0.97, 0.5])
@pytest.mark.parametrize("lam", [0.0, 0.5, 0.95, 1.0])
@pytest.mark.parametrize("gae", [ppo.gae, ppo.fast_gae])
def test_gae_is_the_loop_whatever_the_padding_holds(gamma, lam, gae):
    for lengths in (LENGTHS, [1], [300, 1, 0, 257, 64]):
        mask = make_mask(lengths)
        rewards, values = normal(*mask.shape, seed=6), normal(*mask.shape, seed=7, scale=3)
        expected = gae_loop(rewards, values, mask, gamma, lam)
        rewards, values = dirty(rewards, mask, 1e6), dirty(values, mask, -3e6)
        copies = rewards.clone(), values.clone()
        for m in (mask, mask.double()):
            for actual, want in zip(
                gae(rewards, values, m, gamma=gamma, lam=lam), expected, strict=True
            ):
                close(actual, want, atol=1e-10)
                assert (actual[~mask] == 0).all()
        assert torch.equal(rewards, copies[0]) and torch.equal(
            values, copies[1]
        )  # the inputs are left alone
        for actual, want in zip(
            gae(rewards.float(), values.float(), mask, gamma, lam), expected, strict=True
        ):
            assert actual.dtype == torch.float32
            close(actual, want, rtol=1e-4, atol=1e-3)
        if (gamma, lam) == (1.0, 0.95):  # the defaults
            close(gae(rewards, values, mask)[0], expected[0], atol=1e-10)


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whiten_against_numpy(shift_mean):
    mask, x = make_mask(), normal(B, R, seed=10, scale=3) + 5
    real, expected = x[mask].numpy(), np.zeros((B, R))
    expected[mask.numpy()] = (real - real.mean()) / np.sqrt(real.var() + 1e-8) + (
        0 if shift_mean else real.mean()
    )
    for m in (mask, mask.double()):
        close(ppo.whiten(dirty(x, mask, 1e6), m, shift_mean=shift_mean), expected)
    if shift_mean:  # the default
        close(ppo.whiten(x, mask), expected)


def test_whiten_divides_by_n_and_survives_a_constant():
    x, mask = double([[1, 2, 3, 4]]), torch.ones(1, 4, dtype=torch.bool)
    close(ppo.whiten(x, mask), (x - 2.5) / math.sqrt(1.25), rtol=1e-7)  # not 5/3, the n-1 variance
    close(ppo.whiten(torch.full_like(x, 3), mask), np.zeros((1, 4)))
    close(ppo.whiten(x, make_mask([1], 4)), np.zeros((1, 4)))


@pytest.mark.parametrize("clip", [0.05, 0.2])
@both_losses
def test_clipped_losses_are_the_loops_whatever_the_padding_holds(loss, loop, clip):
    mask = make_mask()
    for seed in range(20, 40, 3):
        clean = [
            normal(B, R, seed=seed + i, scale=scale) - 0.5
            for i, scale in enumerate((0.3, 0.1, 1.0))
        ]
        expected, expected_stats = loop(*clean, mask, clip)
        assert 0 < list(expected_stats.values())[-1] < 1  # clipfrac: both branches are taken
        for pad, m in [(0.0, mask), (30.0, mask.double()), (1e3, mask)]:
            x, y, z = (
                dirty(c, mask, pad * s).requires_grad_()
                for c, s in zip(clean, (1, -1, 2), strict=True)
            )
            actual, stats = loss(x, y, z, m, clip=clip)
            assert actual.shape == ()
            close(actual, expected)
            for key, value in expected_stats.items():
                close(stats[key], value)
                assert not getattr(
                    stats[key], "requires_grad", False
                )  # a statistic does not keep the graph alive
            (grad,) = torch.autograd.grad(actual, x)
            assert grad.isfinite().all() and (grad[~mask] == 0).all()


# loss, moved parameter, old one, advantage or return, gradient; the default clip is 0.2
ONE_TOKEN = [
    (ppo.policy_loss, 1.0, 1.0, 2.0, -2.0),
    (ppo.policy_loss, 1.0, 1.0, -2.0, 2.0),  # on-policy: plain policy gradient
    (ppo.policy_loss, 1.5, 1.0, 2.0, 0.0),
    (ppo.policy_loss, 0.5, 1.0, -2.0, 0.0),  # past the clip as A wants: stop
    (ppo.policy_loss, 1.5, 1.0, -2.0, 3.0),
    (ppo.policy_loss, 0.5, 1.0, 2.0, -1.0),  # past it the wrong way: come back
    (ppo.policy_loss, 1.1, 1.0, 2.0, -2.2),
    (ppo.policy_loss, 0.9, 1.0, -2.0, 1.8),  # inside
    (ppo.value_loss, 0.5, 0.0, 1.0, 0.0),
    (ppo.value_loss, -0.5, 0.0, -1.0, 0.0),  # past V0 +- c towards R: stop
    (ppo.value_loss, 0.5, 0.0, -1.0, 1.5),
    (ppo.value_loss, -0.5, 0.0, 1.0, -1.5),  # away from R: the full error
    (ppo.value_loss, 0.1, 0.0, 1.0, -0.9),
    (ppo.value_loss, 0.5, 0.0, 0.3, 0.2),  # inside; past the clip and past R
]


@pytest.mark.parametrize("loss, new, old, target, expected", ONE_TOKEN)
def test_gradient_of_one_token(loss, new, old, target, expected):
    """The policy's numbers are ratios, so their logarithms go in."""
    new, old = double([[new]]), double([[old]])
    new, old = (new.log(), old.log()) if loss is ppo.policy_loss else (new, old)
    value, stats = loss(
        new.requires_grad_(), old, double([[target]]), torch.ones(1, 1, dtype=torch.bool)
    )
    grad = torch.autograd.grad(value, new)[0].item()
    assert grad == (0.0 if expected == 0 else pytest.approx(expected, rel=1e-12))
    assert float(
        stats["ppo/policy/clipfrac" if loss is ppo.policy_loss else "ppo/val/clipfrac"]
    ) == (expected == 0)


@both_losses
def test_gradient_is_the_slope(loss, loop):
    """Central differences in float64 (torch.autograd.gradcheck), padding and an empty row
    included."""
    mask = make_mask()
    x, old, target = (
        normal(B, R, seed=90 + i, scale=scale) for i, scale in enumerate((0.3, 0.1, 1.0))
    )
    assert torch.autograd.gradcheck(
        lambda x: loss(x, old, target, mask)[0], dirty(x, mask, 9.0).requires_grad_()
    )


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_losses_add_up(kind):
    """Policy loss, the KL where it is in the loss, and the weighed value loss; with the slope,
    whatever the padding holds."""
    mask = make_mask()
    logprobs, old, ref, advantages, values, old_values, returns = (
        normal(B, R, seed=100 + i, scale=0.4) for i in range(7)
    )
    u = (logprobs - ref)[mask].numpy()
    kl = {"k1": u, "k2": u**2 / 2, "k3": np.exp(-u) - 1 + u}[kind].mean()
    pg, vf = (
        policy_loop(logprobs, old, advantages, mask, 0.1)[0],
        value_loop(values, old_values, returns, mask, 0.3)[0],
    )
    for pad in (0.0, 800.0):
        minibatch = SimpleNamespace(
            logprobs=dirty(old, mask, pad),
            ref_logprobs=dirty(ref, mask, -pad),
            advantages=advantages,
            values=dirty(old_values, mask, pad),
            returns=returns,
            weights=1.0,
        )
        inputs = [
            dirty(x, mask, s * pad).requires_grad_() for x, s in ((logprobs, 1), (values, -2))
        ]
        for kl_in, expected in (("loss", pg + 0.7 * kl), ("reward", pg)):
            knobs = SimpleNamespace(
                clip=0.1,
                value_clip=0.3,
                vf_coef=0.5,
                kl_in=kl_in,
                kl_kind=kind,
                clip_high=0.0,
                ratio="token",
            )
            loss, stats = train_ppo.losses(*inputs, minibatch, mask, knobs, 0.7)
            close(loss, expected + 0.5 * vf)
            close(
                [stats["ppo/policy/loss"].detach(), stats["ppo/val/loss"].detach()], [expected, vf]
            )
            alone, stats = train_ppo.losses(inputs[0], None, minibatch, mask, knobs, 0.7)
            close(alone, expected)
            assert not any("val" in key for key in stats)
            assert torch.autograd.gradcheck(
                lambda *x, k=knobs, mb=minibatch: train_ppo.losses(*x, mb, mask, k, 0.7)[0], inputs
            )


def test_k1_in_a_loss_has_a_gradient_of_mean_zero_and_k2_that_of_the_kl():
    """Over all tokens of a small distribution, by its own probabilities; d KL / d logits = p (log
    p/q - KL)."""
    logits, q = normal(9, seed=110), torch.softmax(normal(9, seed=111), 0)
    p = torch.softmax(logits, 0)
    kl = (p * (p / q).log()).sum()
    for kind, expected in (("k1", np.zeros(9)), ("k2", p * ((p / q).log() - kl))):
        x = logits.clone().requires_grad_()
        estimate = ppo.kl_estimate(torch.log_softmax(x, 0), q.log(), kind)
        close(torch.autograd.grad((p * estimate).sum(), x)[0], expected)


@pytest.mark.parametrize("parts", [1, 2, 4])
@both_losses
def test_micro_batches_give_the_gradient_of_the_whole(loss, loop, parts):
    """Each part rescaled by its share of the tokens; the slope of the loop over all rows is the
    expected gradient."""
    mask, eps, total = (
        make_mask([5, 1, 2, 7, 3, 6, 1, 4]),
        1e-6,
        torch.zeros(4, dtype=torch.float64),
    )
    features, old, target = (
        normal(8, 7, 4, seed=50, scale=0.2),
        normal(8, 7, seed=51, scale=0.1),
        normal(8, 7, seed=52),
    )
    for rows in torch.arange(8).chunk(parts):
        weights = normal(4, seed=53).requires_grad_()
        part, _ = loss(features[rows] @ weights, old[rows], target[rows], mask[rows])
        total += torch.autograd.grad(part * (mask[rows].sum() / mask.sum()).double(), weights)[0]
    for k, step in enumerate(eps * torch.eye(4, dtype=torch.float64)):
        up, down = (
            loop(features @ (normal(4, seed=53) + s), old, target, mask, 0.2)[0]
            for s in (step, -step)
        )
        close(total[k], (up - down) / (2 * eps), rtol=1e-6, atol=1e-8)


def test_explained_variance():
    mask, values, returns = make_mask(), normal(B, R, seed=60), normal(B, R, seed=61)
    v, r = values[mask].numpy(), returns[mask].numpy()
    for m in (mask, mask.double()):
        actual = explained_variance(dirty(values, mask, 1e6), dirty(returns, mask, -3e6), m)
        close(actual, 1 - (r - v).var() / r.var())
    close(explained_variance(returns + 3, returns, mask), 1.0)  # a constant offset is not seen
    close(explained_variance(torch.zeros_like(returns), returns, mask), 0.0)
    close(explained_variance(-returns, returns, mask), -3.0)


def test_group_advantages_by_hand():
    scores = double([1, 2, 6, 5, 5, 5])
    close(ppo.group_advantages(scores, 3, "reinforce"), [-2, -1, 3, 0, 0, 0])
    close(
        ppo.group_advantages(scores, 3, "rloo"), [-3, -1.5, 4.5, 0, 0, 0]
    )  # 1 - (2+6)/2, 2 - (1+6)/2, 6 - (1+2)/2
    scale = math.sqrt(7) + 1e-4  # unbiased variance (4 + 1 + 9) / 2
    close(ppo.group_advantages(scores, 3, "grpo"), [-2 / scale, -1 / scale, 3 / scale, 0, 0, 0])


@pytest.mark.parametrize("kind", ["rloo", "grpo", "reinforce"])
def test_group_advantages_invariants(kind):
    scores = normal(12, seed=70, scale=2)
    advantages = ppo.group_advantages(scores, 4, kind)
    close(advantages.view(3, 4).sum(1), np.zeros(3))
    close(ppo.group_advantages(scores + 7, 4, kind), advantages, atol=1e-11)
    moved = torch.tensor(
        [9, 8, 11, 10, 2, 0, 1, 3, 4, 5, 7, 6]
    )  # groups keep their company, in another order
    close(ppo.group_advantages(scores[moved], 4, kind), advantages[moved])
    rtol, scale = (
        (1e-3, 1) if kind == "grpo" else (1e-10, 1e3)
    )  # grpo does not see the scale, up to 1e-4 / std
    close(ppo.group_advantages(1e3 * scores, 4, kind), scale * advantages, rtol=rtol)
    assert (ppo.group_advantages(torch.full((4,), 2.5), 4, kind) == 0).all()
    for bad_scores, size, name in [(scores, 1, kind), (scores, 5, kind), (scores, 4, "critic")]:
        with pytest.raises(ValueError):
            ppo.group_advantages(bad_scores, size, name)


@pytest.mark.parametrize("kl", [0.0, 12.0])
def test_without_a_target_the_coefficient_stays(kl):
    controller = ppo.AdaptiveKL(0.2, 0.0, 100)
    controller.update(kl, 10)
    assert controller.coef == 0.2


def test_adaptive_kl_by_hand():
    """Target 6, horizon 100, 10 episodes a step: a tenth of the error, which is clipped to -0.2 ..
    0.2, is applied."""
    controller = ppo.AdaptiveKL(0.2, 6.0, 100)
    assert controller.coef == 0.2
    for kl, n, coef in [
        (12.0, 10, 0.204),
        (6.0, 10, 0.204),
        (5.4, 10, 0.20196),
        (0.0, 10, 0.1979208),
        (-50.0, 10, 0.193962384),
        (6.6, 10, 0.19590200784),
        (1e6, 10, 0.1998200479968),
        (6.6, 50, 0.20981105039664),
    ]:  # last: half the clip, five times the episodes
        controller.update(kl, n)
        assert float(controller.coef) == pytest.approx(coef, rel=1e-12)
