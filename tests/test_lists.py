"""Thumbs, ranked lists and games against NumPy loops, and small games with known ends.

S is log sigmoid, b is beta, h the log-ratio policy - reference.
"""

import inspect
import math

import numpy as np
import pytest
import torch

from minirlhf import lists

B = 6
RNG = np.random.default_rng(0)
LC, LR, FC, FR = [RNG.uniform(-30.0, -5.0, B) for _ in range(4)]  # policy, then reference
NC, NR = RNG.integers(3, 20, B), RNG.integers(3, 20, B)


def sg(x):
    return 1 / (1 + np.exp(-x))


def S(x):
    return -np.log1p(np.exp(-x))


def close(actual, expected, rtol=1e-10, atol=1e-10):
    if torch.is_tensor(actual):
        actual = actual.detach().numpy()
    np.testing.assert_allclose(actual, np.asarray(expected), rtol=rtol, atol=atol)


def f64(*arrays):
    return [torch.tensor(np.asarray(x, dtype=float), requires_grad=True) for x in arrays]


def test_options_are_the_numbers_of_the_functions():
    losses = lists.THUMBS | lists.LISTS | lists.GAMES
    assert losses.keys() == {"kto", "una", "rrhf", "pro", "rwr", "lipo", "nash_md", "xpo"}
    for kind, loss in losses.items():
        parameters = inspect.signature(loss).parameters.values()
        numbers = [p.name for p in parameters if type(p.default) is float and p.name != "beta"]
        told = list(lists.OPTIONS.get(kind, ()))
        assert told == numbers, f"{kind} takes {numbers}: say so in OPTIONS of minirlhf/lists.py"


# Thumbs


@pytest.mark.parametrize("kl", [[2.0, -1.0, 5.0], [-2.0, -1.0, 1.0], [0.5]])
@pytest.mark.parametrize("b", [0.1, 0.5])
def test_kto(kl, b):
    """One response at a time.

    z, the mean of the mismatched log-ratios but at least 0, is a constant.
    """
    z, desirable = max(0.0, sum(kl) / len(kl)), [True, False, True, True, False, False]
    signs = np.where(desirable, 1, -1)
    expected = [1 - sg(b * (u - z) * sign) for u, sign in zip(LC - FC, signs, strict=True)]
    expected = np.array(expected)
    desirable, ref = torch.tensor(desirable), torch.from_numpy(FC)
    policy, mismatched = f64(LC, kl)
    options = {} if b == 0.1 else {"beta": b}
    loss = lists.kto_loss(policy, ref, desirable, mismatched, **options)
    assert loss.shape == (B,)
    close(loss, expected)
    inputs = [policy, mismatched]
    grad, through_z = torch.autograd.grad(loss.sum(), inputs, allow_unused=True)
    assert through_z is None or (through_z == 0).all()
    close(grad, -signs * b * expected * (1 - expected))
    weights = {"desirable_weight": 1.3, "undesirable_weight": 0.7}
    weighted = lists.kto_loss(policy, ref, desirable, mismatched, beta=b, **weights)
    close(weighted, expected * np.where(desirable, 1.3, 0.7))
    start = lists.kto_loss(policy, policy, desirable, torch.zeros(4, dtype=torch.float64))
    close(start, np.full(B, 0.5))  # policy = reference


def test_una():
    (policy,), ref = f64(LC), torch.from_numpy(FC)
    scores = np.array([2.0, -1.0, 0.0, 0.3, -3.0, 1.0])
    fitted = lists.una_loss(policy, ref, torch.from_numpy(scores), beta=0.2)
    close(fitted, (0.2 * (LC - FC) - scores) ** 2)
    thumbs = scores > 0
    expected = [-S(0.1 * h) if up else -S(-0.1 * h) for h, up in zip(LC - FC, thumbs, strict=True)]
    close(lists.una_loss(policy, ref, torch.from_numpy(thumbs)), expected)
    for labels in (torch.from_numpy(scores), torch.from_numpy(thumbs)):
        assert torch.autograd.gradcheck(lambda x, y=labels: lists.una_loss(x, ref, y), policy)


# Ranked lists of 4, 1, 3, 0 and 4 responses; the last three have ties among the rewards

K = 4
SIZES = [4, 1, 3, 0, 4]
LOGPS, REF = RNG.uniform(-30.0, -5.0, (2, len(SIZES), K))
LENGTHS = RNG.integers(3, 20, (len(SIZES), K))
REWARDS = np.array([
    [0.3, 2.0, -1.0, 1.5], [1.0, 9.0, 9.0, 9.0], [0.5, 0.5, 2.0, 9.0], [9.0, 9.0, 9.0, 9.0],
    [1.0, 2.0, 2.0, 1.0]])  # fmt: skip
MASK = np.arange(K) < np.array(SIZES)[:, None]


def rrhf(s, r):
    """One list, s and r (K,)."""
    loss = -s[np.argmax(r)]
    for i, j in np.ndindex(len(s), len(s)):
        if r[i] > r[j]:
            loss += max(0, s[j] - s[i])
    return loss


def pro(s, r, lam=1.0):
    loss = -lam * s[np.argmax(r)]
    for i in range(len(s)):
        rivals = [i] + [j for j in range(len(s)) if r[j] < r[i]]
        loss += math.log(sum(math.exp(s[j]) for j in rivals)) - s[i]
    return loss


def lipo(s, r):
    loss = 0.0
    rank = {i: 1 + place for place, i in enumerate(sorted(range(len(s)), key=lambda i: -s[i]))}
    for i, j in np.ndindex(len(s), len(s)):
        if r[i] > r[j]:
            gain = abs(2.0 ** r[i] - 2.0 ** r[j])
            discount = abs(1 / math.log(1 + rank[i]) - 1 / math.log(1 + rank[j]))
            loss += gain * discount * -S(s[i] - s[j])
    return loss


LISTS = {"rrhf": (rrhf, {}), "pro": (pro, {}), "pro lam": (pro, {"lam": 0.3}), "lipo": (lipo, {}),
         "lipo beta": (lipo, {"beta": 0.7})}  # fmt: skip


def list_loss(name, logps, rewards=REWARDS, mask=MASK, lengths=LENGTHS, ref=REF,
              dtype=torch.float64):  # fmt: skip
    logps, rewards, ref = (torch.as_tensor(x).to(dtype) for x in (logps, rewards, ref))
    second = ref if name.startswith("lipo") else torch.as_tensor(lengths)
    given = [] if mask is None else [torch.as_tensor(mask)]
    return lists.LISTS[name.split()[0]](logps, second, rewards, *given, **LISTS[name][1])


def list_formula(name, logps=LOGPS, rewards=REWARDS, sizes=SIZES):
    formula, options = LISTS[name]
    s = logps / LENGTHS
    if name.startswith("lipo"):
        s = options.get("beta", 0.1) * (logps - REF)
    options = {key: x for key, x in options.items() if key != "beta"}
    return [formula(s[b][:n], rewards[b][:n], **options) if n else 0.0 for b, n in enumerate(sizes)]


@pytest.mark.parametrize("name", LISTS)
def test_lists(name):
    """Every list as if it were alone; what lies in its padding matters not at all."""
    expected = list_formula(name)
    close(list_loss(name, LOGPS), expected)
    close(list_loss(name, LOGPS, dtype=torch.float32), expected, 1e-5, 1e-5)
    close(list_loss(name, LOGPS, mask=None), list_formula(name, sizes=[K] * len(SIZES)))
    (logps,) = f64(np.where(MASK, LOGPS, np.nan))
    rewards, ref = np.where(MASK, REWARDS, np.nan), np.where(MASK, REF, np.inf)
    loss = list_loss(name, logps, rewards, lengths=LENGTHS * MASK, ref=ref)
    close(loss, expected)
    (grad,) = torch.autograd.grad(loss.sum(), logps)
    assert grad.isfinite().all() and (grad[0] != 0).any()
    assert (grad[~torch.from_numpy(MASK)] == 0).all()
    assert torch.autograd.gradcheck(lambda x: list_loss(name, x), f64(LOGPS))


@pytest.mark.parametrize("name", LISTS)
def test_lists_in_any_order(name):
    """Neither the order of the lists nor, without ties, that within a list matters."""
    b, k = np.array([3, 0, 4, 2, 1]), np.array([2, 0, 3, 1])
    inputs = (LOGPS, REWARDS, MASK, LENGTHS, REF)
    close(list_loss(name, *(x[b] for x in inputs)), list_loss(name, LOGPS)[b])
    close(list_loss(name, *(x[:1, k] for x in inputs)), list_loss(name, LOGPS)[:1])
    whole = REWARDS.astype(int)
    close(list_loss(name, LOGPS, whole), list_formula(name, rewards=whole))


def test_lists_of_two_are_pairs():
    logps, ref, n = np.stack([LC, LR], 1), np.stack([FC, FR], 1), np.stack([NC, NR], 1)
    rewards = np.tile([1.5, -0.5], (B, 1))
    gap = (2**1.5 - 2**-0.5) * (1 / math.log(2) - 1 / math.log(3))
    dpo, simpo = -S(0.1 * (LC - FC - LR + FR)), -S(LC / NC - LR / NR)  # simpo: b = 1, gamma = 0
    close(list_loss("lipo", logps, rewards, None, ref=ref), gap * dpo)
    close(list_loss("pro", logps, rewards, None, n), simpo - LC / NC)
    close(list_loss("rrhf", logps, rewards, None, n), np.maximum(0, LR / NR - LC / NC) - LC / NC)


def test_lipo_learns_from_its_start():
    """Where policy = reference all s are 0, and the better responses are still pushed up."""
    (logps,) = f64(REF[:1])
    loss = list_loss("lipo", logps, REWARDS[:1], None, ref=REF[:1])
    (grad,) = torch.autograd.grad(loss.sum(), logps)
    assert grad[0, 1] < 0 < grad[0, 2]  # the best and the worst


# A game: rock, paper, scissors, P(row beats column)

WINS = torch.tensor([[0.5, 0.9, 0.1], [0.1, 0.5, 0.9], [0.9, 0.1, 0.5]], dtype=torch.float64)


def nash_md(mu, beta, steps=1500):
    """Gradient steps on the exact mean of the sampled loss over a table of three actions.

    The reference is uniform. Returns how far the policy is from it, step by step.
    """
    ref = torch.full((3,), 1 / 3, dtype=torch.float64).log()
    logits, far = torch.tensor([0.5, 0.0, -0.2], dtype=torch.float64, requires_grad=True), []
    for _ in range(steps):
        logps = logits.log_softmax(0)
        mixture = (mu * ref + (1 - mu) * logps.detach()).softmax(0)
        losses = lists.nash_md_loss(logps, ref, WINS @ mixture, beta=beta)
        (grad,) = torch.autograd.grad((logps.detach().exp() * losses).sum(), logits)
        logits = (logits - 0.5 * grad).detach().requires_grad_()
        far.append((logps.exp() - 1 / 3).abs().max().item())
    return far


def test_nash_md_converges():
    """The last policy is the uniform one; without mixture and KL the same steps leave it."""
    assert nash_md(mu=0.25, beta=0.1)[-1] < 1e-6
    far = nash_md(mu=0.0, beta=0.0)
    assert max(far[-300:]) > max(far[:300])


def test_nash_md_gradient_counts_the_kl_of_later_tokens():
    """Two tokens from a table: the mean gradient is the slope of -E[P] + b KL(pi || ref).

    The slope is taken by differences in NumPy.
    """
    b, V = 0.3, 3
    first, second, rf, rs = (RNG.normal(size=shape) for shape in ((V,), (V, V), (V,), (V, V)))
    win = RNG.uniform(size=(V, V))

    def log_softmax(x):
        return x - np.log(np.exp(x).sum(-1, keepdims=True))

    def joint(first, second):
        return log_softmax(first)[:, None] + log_softmax(second)

    def objective(first):
        logps = joint(first, second)
        return (np.exp(logps) * (b * (logps - joint(rf, rs)) - win)).sum()

    (x,) = f64(first)
    logps = x.log_softmax(0)[:, None] + torch.from_numpy(second).log_softmax(1)  # (V, V), all
    ref = torch.from_numpy(joint(rf, rs)).flatten()
    loss = lists.nash_md_loss(logps.flatten(), ref, torch.from_numpy(win).flatten(), beta=b)
    (grad,) = torch.autograd.grad((logps.detach().exp().flatten() * loss).sum(), x)
    slope = [(objective(first + d) - objective(first - d)) / 2e-5 for d in 1e-5 * np.eye(V)]
    close(grad, slope, 1e-7, 1e-9)
