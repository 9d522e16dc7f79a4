"""The pairwise family against NumPy formulas, a table of fixed values, finite differences and known optima.

c and r are the log-ratios policy - reference of the chosen and the rejected response, lc and lr the policy's own
log-probs, nc and nr the token counts, b is beta, e label smoothing. S is log sigmoid.
"""
import math

import numpy as np
import pytest
import torch

from minirlhf import dpo

B = 6
RNG = np.random.default_rng(0)
LC, LR, FC, FR = LOGPS = [RNG.uniform(-30.0, -5.0, B) for _ in range(4)]  # policy, then reference
NC, NR = RNG.integers(3, 20, B), RNG.integers(3, 20, B)
SMOOTHED = ["sigmoid", "robust", "exo_pair", "aot", "aot_unpaired"]
RATIOS = ["sigmoid", "robust", "hinge", "ipo", "sigmoid_norm", "exo_pair", "nca_pair", "bco_pair", "sppo_hard",
          "apo_zero", "apo_down", "aot_unpaired", "discopop", "r_dpo"]          # functions of c and r
FREE = ["simpo", "orpo", "cpo", "slic"]                             # of lc and lr: no reference
KINDS = [*RATIOS, "aot", *FREE]
ALIASES = {"dpo": "sigmoid", "exo": "exo_pair", "nca": "nca_pair", "bco": "bco_pair", "sppo": "sppo_hard"}
DIVERGENCES = [({"divergence": "reverse_kl"}, lambda u: u), ({"divergence": "forward_kl"}, lambda u: -np.exp(-u)),
               ({"divergence": "js"}, lambda u: S(u)), ({"divergence": "alpha"}, lambda u: -2 * np.exp(-u / 2)),
               ({"divergence": "alpha", "alpha_divergence": 3.0}, lambda u: np.exp(2 * u) / 2)]


def sg(x):
    return 1 / (1 + np.exp(-x))


def S(x):
    return -np.log1p(np.exp(-x))


def smooth(x, e):
    return -(1 - e) * S(x) - e * S(-x)


def logodds(p):
    return np.log(np.exp(p) / (1 - np.exp(p)))


def formula(kind, lc=LC, lr=LR, fc=FC, fr=FR, b=0.1, e=0.0, nc=NC, nr=NR, f=lambda u: u, length_normalise=False,
            gamma=0.5, lam=0.1, delta=1.0, alpha=0.01):
    c, r = f(lc - fc), f(lr - fr)
    d, m = c - r, sg(b * (c - r) / 0.05)
    return {
        "sigmoid": lambda: smooth(b * d, e),
        "robust": lambda: (-(1 - e) * S(b * d) + e * S(-b * d)) / (1 - 2 * e),
        "hinge": lambda: np.maximum(0, 1 - b * d),
        "ipo": lambda: ((c / nc - r / nr if length_normalise else d) - 1 / (2 * b)) ** 2,
        "sigmoid_norm": lambda: -S(b * (c / nc - r / nr)),
        "exo_pair": lambda: sg(b * d) * np.log(sg(b * d) / (1 - e)) + sg(-b * d) * np.log(sg(-b * d) / e),
        "nca_pair": lambda: -S(b * c) - S(-b * c) / 2 - S(-b * r) / 2,
        "bco_pair": lambda: -S(b * c) - S(-b * r),
        "sppo_hard": lambda: (c - 0.5 / b) ** 2 + (r + 0.5 / b) ** 2,
        "apo_zero": lambda: 1 - sg(b * c) + sg(b * r),
        "apo_down": lambda: sg(b * c) + 1 - sg(b * d),
        "aot": lambda: smooth(b * (np.sort(lc - lr) - np.sort(fc - fr)), e),
        "aot_unpaired": lambda: smooth(b * (np.sort(c) - np.sort(r)), e),
        "discopop": lambda: -S(b * d) * (1 - m) + np.exp(-b * d) * m,
        "r_dpo": lambda: -S(b * d + alpha * (nc - nr)),
        "simpo": lambda: -S(b * (lc / nc - lr / nr) - gamma),
        "orpo": lambda: -lc / nc - lam * S(logodds(lc / nc) - logodds(lr / nr)),
        "cpo": lambda: -S(b * (lc - lr)) - lc / nc,
        "slic": lambda: np.maximum(0, delta - lc + lr) - lam * lc / nc,
    }[ALIASES.get(kind, kind)]()


def pair_loss(kind, lc=LC, lr=LR, fc=FC, fr=FR, b=0.1, nc=NC, nr=NR, e=None, **options):
    """dpo.pair_loss on NumPy arrays or tensors; smoothing 0.1 where exo_pair needs some."""
    e = (0.1 if kind.startswith("exo") else 0.0) if e is None else e
    return dpo.pair_loss(kind, *(torch.as_tensor(x) for x in (lc, lr, fc, fr)), beta=b, label_smoothing=e,
                         chosen_lengths=torch.as_tensor(nc), rejected_lengths=torch.as_tensor(nr), **options)


def one(kind, c, r, nc=5, nr=4, **options):
    """The loss of a single pair with log-ratios c and r."""
    x = (np.array([v], dtype=float) for v in (c - 7.0, r - 9.0, -7.0, -9.0))
    return pair_loss(kind, *x, nc=[nc], nr=[nr], **options).item()


def close(actual, expected, rtol=1e-6, atol=1e-7):
    np.testing.assert_allclose(torch.as_tensor(actual).detach().numpy(), np.asarray(expected), rtol=rtol, atol=atol)


@pytest.mark.parametrize("kind", [*KINDS, *ALIASES])
def test_every_kind_is_its_formula(kind):
    name = ALIASES.get(kind, kind)
    for b in (0.05, 0.1, 0.7):
        for e in ((1e-3, 0.1, 0.3) if name in SMOOTHED else (0.0,)):
            loss = pair_loss(kind, b=b, e=e)
            assert loss.shape == (B,)
            close(loss, formula(kind, b=b, e=e))
    if name in ("sigmoid", "robust", "exo_pair"):                   # a soft label for each pair
        e = np.linspace(0.05, 0.45, B)
        close(pair_loss(kind, e=torch.from_numpy(e)), formula(kind, e=e))


@pytest.mark.parametrize("kind, options, value, at_zero", [
    ("sigmoid", {}, 0.593650, math.log(2)), ("sigmoid", {"e": 0.1}, 0.614650, math.log(2)),
    ("robust", {"e": 0.1}, 0.567400, math.log(2)), ("hinge", {}, 0.79, 1.0), ("ipo", {}, 8.41, 25.0),
    ("ipo", {"length_normalise": True}, 20.7025, 25.0), ("sigmoid_norm", {}, 0.670900, math.log(2)),
    ("nca_pair", {}, 1.338234, 2 * math.log(2)), ("bco_pair", {}, 1.284554, 2 * math.log(2)),
    ("sppo_hard", {}, 31.61, 50.0), ("apo_zero", {}, 0.947575, 1.0), ("apo_down", {}, 0.985122, 1.0),
    ("exo_pair", {"e": 1e-3}, 2.405435, -math.log(2) - math.log(1e-3 * 0.999) / 2),
    ("discopop", {}, 0.807379, (math.log(2) + 1) / 2), ("r_dpo", {}, 0.589185, 0.688160),
    ("simpo", {}, 0.895163, 0.922023), ("cpo", {}, 1.609014, 1.998139), ("orpo", {}, 1.118228, 1.430745),
    ("slic", {}, 0.11, 0.14),
])
def test_fixed_values(kind, options, value, at_zero):
    """b = 0.1, c = 1.5, r = -0.6, 5 and 4 tokens; then c = r = 0. `one` puts the reference at -7 and -9."""
    assert one(kind, 1.5, -0.6, **options) == pytest.approx(value, abs=1e-6)
    assert one(kind, 0.0, 0.0, **options) == pytest.approx(at_zero, abs=1e-6)


@pytest.mark.parametrize("kind, options", [
    ("ipo", {"length_normalise": True}), ("simpo", {"gamma": 1.3}), ("orpo", {"lam": 0.8}), ("r_dpo", {"alpha": 0.2}),
    ("slic", {"delta": 4.0, "lam": 0.7})])
def test_options(kind, options):
    close(pair_loss(kind, **options), formula(kind, **options))
    assert not np.allclose(formula(kind, **options), formula(kind))  # the option does something


@pytest.mark.parametrize("kind", RATIOS)
def test_divergences(kind):
    """Both log-ratios go through f' of the divergence before anything else; small ratios, so that no exp overflows."""
    lc, lr, e = FC + (LC - FC) / 20, FR + (LR - FR) / 20, 0.1 if kind in SMOOTHED else 0.0
    for options, f in DIVERGENCES:
        close(pair_loss(kind, lc, lr, e=e, **options), formula(kind, lc, lr, e=e, f=f))


@pytest.mark.parametrize("kind, e", [
    ("robust", 0.5), ("robust", 0.7), ("exo_pair", 0.0),            # division by 0, a sign flip, log 0
    ("hinge", 0.1), ("ipo", 0.1), ("nca_pair", 0.1), ("sppo_hard", 0.1)])  # it would be ignored
def test_impossible_label_smoothing(kind, e):
    with pytest.raises(ValueError):
        pair_loss(kind, e=e)


def test_errors():
    unused = [("sigmoid", {"gamma": 0.5}), ("hinge", {"lam": 0.1}), ("ipo", {"alpha": 0.01}), ("orpo", {"delta": 1.0}),
              ("sigmoid", {"length_normalise": True}), ("r_dpo", {"gamma": 0.5}), ("cpo", {"lam": 0.1}),
              ("simpo", {"divergence": "js"}), ("slic", {"alpha": 0.1}), ("sigmoid", {"label_smoothin": 0.1})]
    for kind, options in unused:
        with pytest.raises((ValueError, TypeError)):
            pair_loss(kind, **options)
    for kind, options in [("dpoo", {}), ("kto", {}), ("sigmoid", {"divergence": "hellinger"})]:
        with pytest.raises(ValueError):
            pair_loss(kind, **options)
    four = [torch.from_numpy(x) for x in LOGPS]
    for kind in ("sigmoid_norm", "simpo", "orpo", "cpo", "slic", "r_dpo", "ipo"):
        with pytest.raises(ValueError):
            dpo.pair_loss(kind, *four, **({"length_normalise": True} if kind == "ipo" else {}))
    for kind in ("sigmoid", "ipo", "hinge", "nca", "aot"):          # these ask for no lengths; beta is 0.1 unless said
        close(dpo.pair_loss(kind, *four), formula(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_is_the_slope_of_the_formula(kind):
    inputs = [torch.from_numpy(x.copy()).requires_grad_() for x in LOGPS]
    e, eps = 0.1 if kind in SMOOTHED else 0.0, 1e-5
    grads = torch.autograd.grad(pair_loss(kind, *inputs, e=e).sum(), inputs, allow_unused=True)
    for i, grad in enumerate(grads):
        slope = np.zeros(B)
        for k, step in enumerate(eps * np.eye(B)):
            up, down = (formula(kind, *LOGPS[:i], LOGPS[i] + s, *LOGPS[i + 1:], e=e).sum() for s in (step, -step))
            slope[k] = (up - down) / (2 * eps)
        close(torch.zeros(B) if grad is None else grad, slope, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_independent_of_their_order(kind):
    rows, loss = np.array([4, 2, 0, 5, 1, 3]), pair_loss(kind)
    moved = pair_loss(kind, *(x[rows] for x in LOGPS), nc=NC[rows], nr=NR[rows])
    if kind == "aot_unpaired":                                      # chosen and rejected need not even be pairs
        close(pair_loss(kind, LC[rows], LR, FC[rows], FR), loss)
    if kind.startswith("aot"):
        close(moved, loss)
    else:
        close(moved, loss[rows])
        close(pair_loss(kind, *(x[:1] for x in LOGPS), nc=NC[:1], nr=NR[:1]), loss[:1])  # alone


@pytest.mark.parametrize("kind", ["sigmoid", "robust", "hinge", "ipo", "exo_pair", "discopop", "r_dpo", "aot", "cpo"])
def test_only_the_difference_counts(kind):
    fixed = LC / NC if kind == "cpo" else 0.0                       # cpo has a likelihood term besides
    moved = (LC + 3) / NC if kind == "cpo" else 0.0
    close(pair_loss(kind, LC + 3, LR + 3) + torch.as_tensor(moved), pair_loss(kind) + torch.as_tensor(fixed))


def test_swapping_sides_flips_the_label():
    close(pair_loss("sigmoid", LR, LC, FR, FC, e=0.8), pair_loss("sigmoid", e=0.2))
    # robust is unbiased: its mean over labels flipped at rate e is the clean loss.
    close(0.8 * pair_loss("robust", e=0.2) + 0.2 * pair_loss("robust", LR, LC, FR, FC, e=0.2), formula("sigmoid"))


@pytest.mark.parametrize("b", [0.05, 0.1, 0.5])
def test_dpo_gradient_weight(b):
    """The chosen side is pushed up and the rejected down by b * sigmoid(-b D): b / 2 where policy = reference."""
    for fc, fr in [(FC, FR), (LC, LR)]:
        lc, lr = (torch.from_numpy(x.copy()).requires_grad_() for x in (LC, LR))
        up, down = torch.autograd.grad(pair_loss("dpo", lc, lr, fc, fr, b=b).sum(), [lc, lr])
        close(up, -b * sg(-b * (LC - fc - LR + fr)))
        close(down, -up)
        assert fc is FC or np.allclose(down, b / 2)


@pytest.mark.parametrize("kind, d, options, lowest", [
    ("ipo", 1 / 0.2, {}, 0.0),                                      # D = 1 / (2 b)
    ("sigmoid", math.log(9) / 0.1, {"e": 0.1}, -0.9 * math.log(0.9) - 0.1 * math.log(0.1)),  # b D = log((1-e)/e)
    ("exo_pair", math.log(9) / 0.1, {"e": 0.1}, 0.0),               # a KL divergence that vanishes there
])
def test_optimum(kind, d, options, lowest):
    lc, *rest = (torch.tensor([v], dtype=torch.float64) for v in (d - 4.0, -6.0, -4.0, -6.0))
    loss = pair_loss(kind, lc.requires_grad_(), *rest, nc=[1], nr=[1], **options)
    close(loss, [lowest])
    close(torch.autograd.grad(loss, lc)[0], [0.0])


@pytest.mark.parametrize("kind", ["sigmoid", "robust", "exo_pair", "nca_pair", "bco_pair", "discopop", "simpo", "cpo"])
def test_far_pairs_stay_finite(kind):
    for sign in (1, -1):
        lc = torch.tensor([-500.0 + sign * 400], requires_grad=True)
        loss = pair_loss(kind, lc, torch.tensor([-500.0 - sign * 400]), torch.tensor([-500.0]), torch.tensor([-500.0]),
                         nc=[2], nr=[2], b=0.1)
        assert loss.isfinite().all() and torch.autograd.grad(loss.sum(), lc)[0].isfinite().all()


@pytest.mark.parametrize("certain", ["chosen", "rejected"])
def test_orpo_survives_a_response_of_probability_one(certain):
    x = torch.tensor([0.0], requires_grad=True)                     # log 1: its odds are infinite
    sides = (x, torch.tensor([-5.0])) if certain == "chosen" else (torch.tensor([-5.0]), x)
    loss = pair_loss("orpo", *sides, [0.0], [0.0], nc=[2], nr=[2])
    assert loss.isfinite().all() and torch.autograd.grad(loss.sum(), x)[0].isfinite().all()


def test_axes():
    """Each kind has a row of eight axes; RL1 says whether the reference enters the loss."""
    names = {"RM1", "RM2", "RM3", "RM4", "F", "RL1", "RL2", "O"}
    assert all(set(row) == names and all(row.values()) for row in dpo.AXES.values())
    assert set(dpo.KINDS) == set(KINDS)
    for kind in dpo.KINDS:
        sees_reference = not np.allclose(pair_loss(kind), pair_loss(kind, fc=FC + 1, fr=FR - 1))
        assert sees_reference == (kind not in FREE)
        assert (dpo.AXES[kind]["RL1"] == dpo.AXES["sigmoid"]["RL1"]) == sees_reference


@pytest.mark.parametrize("kl", [[2.0, -1.0, 5.0], [-2.0, -1.0, 1.0], [0.5]])
@pytest.mark.parametrize("b", [0.1, 0.5])
def test_kto(kl, b):
    """One response at a time; z, the mean of the mismatched log-ratios but at least 0, is a constant."""
    z, desirable = max(0.0, sum(kl) / len(kl)), torch.tensor([True, False, True, True, False, False])
    expected = np.array([1 - sg(b * (u - z) * (1 if good else -1)) for u, good in zip(LC - FC, desirable, strict=True)])
    policy = torch.from_numpy(LC.copy()).requires_grad_()
    mismatched = torch.tensor(kl, dtype=torch.float64, requires_grad=True)
    loss = dpo.kto_loss(policy, torch.from_numpy(FC), desirable, mismatched, **({} if b == 0.1 else {"beta": b}))
    assert loss.shape == (B,)
    close(loss, expected)
    grad, through_z = torch.autograd.grad(loss.sum(), [policy, mismatched], allow_unused=True)
    assert through_z is None or (through_z == 0).all()
    close(grad, np.where(desirable, -1, 1) * b * expected * (1 - expected))
    start = dpo.kto_loss(policy, policy, desirable, torch.zeros(4, dtype=torch.float64))
    close(start, np.full(B, 0.5))                                   # policy = reference
