"""The DPO family against NumPy formulas, fixed values, finite differences, optima and small games.

c and r are the log-ratios policy - reference of the chosen and the rejected response, lc and lr the
policy's own log-probs, fc and fr the reference's, nc and nr the token counts, b is beta, e label
smoothing. S is log sigmoid.
"""

import math
import traceback

import numpy as np
import pytest
import torch

from minirlhf import dpo
from minirlhf.feedback.method import loss_at_start

B = 6
RNG = np.random.default_rng(0)
LC, LR, FC, FR = LOGPS = [RNG.uniform(-30.0, -5.0, B) for _ in range(4)]  # policy, then reference
NC, NR = RNG.integers(3, 20, B), RNG.integers(3, 20, B)
EXTRA = {  # what some kinds take besides
    "chosen_kl": RNG.uniform(0, 3, B), "rejected_kl": RNG.uniform(0, 3, B),
    "chosen_win": RNG.uniform(0, 1, B), "rejected_win": RNG.uniform(0, 1, B)}  # fmt: skip
TAKES = {"tdpo1": ["chosen_kl", "rejected_kl"], "tdpo2": ["chosen_kl", "rejected_kl"],
         "sppo": ["chosen_win", "rejected_win"]}  # fmt: skip
SMOOTHED = ["sigmoid", "robust", "exo_pair", "aot", "aot_unpaired"]
RATIOS = ["sigmoid", "robust", "hinge", "ipo", "sigmoid_norm", "exo_pair", "nca_pair", "bco_pair",
          "sppo_hard", "sppo", "apo_zero", "apo_down", "aot_unpaired", "discopop", "r_dpo", "tdpo1",
          "tdpo2", "npo", "d2o"]  # of c and r  # fmt: skip
FREE = ["simpo", "orpo", "cpo", "slic", "sft"]  # of lc and lr: no reference
KINDS = [*RATIOS, "aot", *FREE]
ALIASES = {"dpo": "sigmoid", "exo": "exo_pair", "nca": "nca_pair", "bco": "bco_pair"}
DIVERGENCES = [
    ({"divergence": "reverse_kl"}, lambda u: u),
    ({"divergence": "forward_kl"}, lambda u: -np.exp(-u)),
    ({"divergence": "js"}, lambda u: S(u)),
    ({"divergence": "alpha"}, lambda u: -2 * np.exp(-u / 2)),
    ({"divergence": "alpha", "alpha_divergence": 0.3}, lambda u: -np.exp(-0.3 * u) / 0.3),
    ({"divergence": "alpha", "alpha_divergence": -2.0}, lambda u: np.exp(2 * u) / 2),
]


def sg(x):
    return 1 / (1 + np.exp(-x))


def S(x):
    return -np.log1p(np.exp(-x))


def smooth(x, e):
    return -(1 - e) * S(x) - e * S(-x)


def logodds(p):
    return np.log(np.exp(p) / (1 - np.exp(p)))


def formula(kind, lc=LC, lr=LR, fc=FC, fr=FR, b=0.1, e=0.0, nc=NC, nr=NR, f=lambda u: u,
            length_normalise=False, gamma=0.5, lam=0.1, delta=1.0, alpha=None, temperature=0.05,
            nll_weight=0.0, **given):  # fmt: skip
    """The loss of each pair by the equations, in NumPy float64."""
    alpha = {"tdpo2": 0.5, "d2o": 0.1}.get(kind, 0.01) if alpha is None else alpha
    ck, rk, cw, rw = ((EXTRA | given)[key] for key in EXTRA)
    c, r = f(lc - fc), f(lr - fr)
    d, m = c - r, sg(b * (c - r) / temperature)
    formulas = {
        "sigmoid": lambda: smooth(b * d, e),
        "robust": lambda: (-(1 - e) * S(b * d) + e * S(-b * d)) / (1 - 2 * e),
        "hinge": lambda: np.maximum(0, 1 - b * d),
        "ipo": lambda: ((c / nc - r / nr if length_normalise else d) - 1 / (2 * b)) ** 2,
        "sigmoid_norm": lambda: -S(b * (c / nc - r / nr)),
        "exo_pair": lambda: (
            sg(b * d) * np.log(sg(b * d) / (1 - e)) + sg(-b * d) * np.log(sg(-b * d) / e)
        ),
        "nca_pair": lambda: -S(b * c) - S(-b * c) / 2 - S(-b * r) / 2,
        "bco_pair": lambda: -S(b * c) - S(-b * r),
        "sppo_hard": lambda: (c - 0.5 / b) ** 2 + (r + 0.5 / b) ** 2,
        "sppo": lambda: ((c - (cw - 0.5) / b) ** 2 + (r - (rw - 0.5) / b) ** 2) / 2,
        "tdpo1": lambda: -S(b * (d - (rk - ck))),
        "tdpo2": lambda: -S(b * (d - alpha * (rk - ck))),
        "npo": lambda: -2 / b * S(-b * r),
        "d2o": lambda: -S(b * c - alpha * r),
        "apo_zero": lambda: 1 - sg(b * c) + sg(b * r),
        "apo_down": lambda: sg(b * c) + 1 - sg(b * d),
        "aot": lambda: smooth(b * (np.sort(lc - lr) - np.sort(fc - fr)), e),
        "aot_unpaired": lambda: smooth(b * (np.sort(c) - np.sort(r)), e),
        "discopop": lambda: -S(b * d) * (1 - m) + np.exp(-b * d) * m,
        "r_dpo": lambda: smooth(b * d + alpha * (nc - nr), e),
        "simpo": lambda: -S(b * (lc / nc - lr / nr) - gamma),
        "orpo": lambda: -lc / nc - lam * S(logodds(lc / nc) - logodds(lr / nr)),
        "cpo": lambda: -S(b * (lc - lr)) - lc / nc,
        "sft": lambda: -lc / nc,
        "slic": lambda: np.maximum(0, delta - lc + lr) - lam * lc / nc,
    }
    kind = ALIASES.get(kind, kind)
    assert kind in formulas, (
        f"loss {kind!r} has no formula in tests/test_dpo.py: add a NumPy line to formula()"
    )
    return formulas[kind]() - nll_weight * lc / nc


def pair_loss(kind, lc=LC, lr=LR, fc=FC, fr=FR, b=0.1, nc=NC, nr=NR, e=None, rows=slice(None),
              dtype=torch.float64, **options):  # fmt: skip
    """dpo.pair_loss on NumPy arrays or tensors.

    Smoothing is 0.1 where exo_pair needs some; EXTRA goes where a kind takes it.
    """
    e = (0.1 if kind.startswith("exo") else 0.0) if e is None else e
    options = {key: EXTRA[key] for key in TAKES.get(kind, [])} | options
    for key, x in options.items():
        if isinstance(x, np.ndarray):
            options[key] = torch.from_numpy(x[rows]).to(dtype)
    logps = [lc, lr, fc, fr]
    for i, x in enumerate(logps):
        if not torch.is_tensor(x):
            logps[i] = torch.as_tensor(np.asarray(x)[rows]).to(dtype)
    nc, nr = (torch.as_tensor(np.asarray(n)[rows]) for n in (nc, nr))
    return dpo.pair_loss(
        kind, *logps, beta=b, label_smoothing=e, chosen_lengths=nc, rejected_lengths=nr, **options
    )


def one(kind, c, r, nc=5, nr=4, **options):
    """The loss of a single pair with log-ratios c and r."""
    x = (np.array([v], dtype=float) for v in (c - 7.0, r - 9.0, -7.0, -9.0))
    return pair_loss(kind, *x, nc=[nc], nr=[nr], **options).item()


def close(actual, expected, rtol=1e-10, atol=1e-10):
    if torch.is_tensor(actual):
        actual = actual.detach().numpy()
    np.testing.assert_allclose(actual, np.asarray(expected), rtol=rtol, atol=atol)


# A loss that someone adds

NEW = """loss {kind!r} has no formula in tests/test_dpo.py. To test it as the others:
- here, add a NumPy line to formula(), and its name to RATIOS (a loss of log-ratios) or to FREE (one
  without a reference); to SMOOTHED if it takes label_smoothing, to TAKES if it takes tensors;
- in minirlhf/dpo.py, add it to a row of ROWS, which makes AXES, if it is not like DPO on every axis
  (without a reference: the row of simpo); to NEEDS if it uses lengths, or fewer than the four
  log-probs; to AT_START of
  minirlhf/feedback/method.py if it has one value there."""


@pytest.mark.parametrize("kind", dpo.KINDS)
def test_every_loss_is_tested(kind):
    assert kind in KINDS, NEW.format(kind=kind)


def test_a_function_in_kinds_is_a_loss(monkeypatch):
    """With its options, smoothing, divergences and weights, and its own mistakes as they are."""

    def mine(pairs, beta, label_smoothing=0.0, *, power=2.0, flip=False):
        if flip:
            return pairs.chossen
        return (pairs.chosen - pairs.rejected).abs() ** power + label_smoothing

    monkeypatch.setitem(dpo.KINDS, "mine", mine)
    options = ["power", "flip", "nll_weight", "divergence", "alpha_divergence"]
    assert dpo.options_of("mine") == options
    close(pair_loss("mine"), (LC - FC - LR + FR) ** 2)
    close(pair_loss("mine", power=1.0, e=0.3, nll_weight=0.5),
          np.abs(LC - FC - LR + FR) + 0.3 - 0.5 * LC / NC)  # fmt: skip
    close(pair_loss("mine", divergence="js"), (S(LC - FC) - S(LR - FR)) ** 2)
    with pytest.raises(ValueError, match="mine.*strength"):
        pair_loss("mine", strength=1.0)
    with pytest.raises(TypeError) as e:
        pair_loss("mine", power="two")
    assert "mine" in [frame.name for frame in traceback.extract_tb(e.tb)]
    with pytest.raises(AttributeError):
        pair_loss("mine", flip=True)


# Values


@pytest.mark.parametrize("kind", [*KINDS, *ALIASES])
def test_every_kind_is_its_formula(kind):
    name = ALIASES.get(kind, kind)
    for b in (0.05, 0.1, 0.7):
        for e in (1e-3, 0.1, 0.3) if name in SMOOTHED else (0.0,):
            loss, expected = pair_loss(kind, b=b, e=e), formula(kind, b=b, e=e)
            assert loss.shape == (B,)
            close(loss, expected)
            close(pair_loss(kind, b=b, e=e, dtype=torch.float32), expected, 1e-5, 1e-5)
    if name in ("sigmoid", "robust", "exo_pair"):  # a soft label for each pair
        e = np.linspace(0.05, 0.45, B)
        close(pair_loss(kind, e=torch.from_numpy(e)), formula(kind, e=e))


LOG2 = math.log(2)
KLS = {"chosen_kl": np.array([0.3]), "rejected_kl": np.array([0.8])}


@pytest.mark.parametrize("kind, options, value, at_zero", [
    ("sigmoid", {}, 0.593650, LOG2),
    ("sigmoid", {"e": 0.1}, 0.614650, LOG2),
    ("sigmoid", {"nll_weight": 0.5}, 1.143650, 1.393147),
    ("robust", {"e": 0.1}, 0.567400, LOG2),
    ("hinge", {}, 0.79, 1.0),
    ("ipo", {}, 8.41, 25.0),
    ("ipo", {"length_normalise": True}, 20.7025, 25.0),
    ("sigmoid_norm", {}, 0.670900, LOG2),
    ("nca_pair", {}, 1.338234, 2 * LOG2),
    ("bco_pair", {}, 1.284554, 2 * LOG2),
    ("sppo_hard", {}, 31.61, 50.0),
    ("apo_zero", {}, 0.947575, 1.0),
    ("apo_down", {}, 0.985122, 1.0),
    ("exo_pair", {"e": 1e-3}, 2.405435, -LOG2 - math.log(1e-3 * 0.999) / 2),
    ("discopop", {}, 0.807379, (LOG2 + 1) / 2),
    ("r_dpo", {}, 0.589185, 0.688160),
    ("r_dpo", {"e": 0.1}, 0.611185, 0.689160),
    ("simpo", {}, 0.895163, 0.922023),
    ("cpo", {}, 1.609014, 1.998139),
    ("orpo", {}, 1.118228, 1.430745),
    ("slic", {}, 0.11, 0.14),
    ("npo", {}, 13.271942, 20 * LOG2),
    ("d2o", {"alpha": 0.3}, 0.541698, LOG2),
    ("tdpo1", KLS, 0.616344, 0.718460),
    ("tdpo2", KLS, 0.604919, 0.705725),
    # ((1.5 - 3)^2 + (-0.6 + 2)^2) / 2, (3^2 + 2^2) / 2
    ("sppo", {"chosen_win": 0.8, "rejected_win": 0.3}, 2.105, 6.5),
    ("sppo", {"chosen_win": None, "rejected_win": None}, 31.61, 50.0),
])  # fmt: skip
def test_fixed_values(kind, options, value, at_zero):
    """b = 0.1, c = 1.5, r = -0.6, 5 and 4 tokens; then c = r = 0.

    `one` puts the reference at -7 and -9.
    """
    assert one(kind, 1.5, -0.6, **options) == pytest.approx(value, abs=1e-6)
    assert one(kind, 0.0, 0.0, **options) == pytest.approx(at_zero, abs=1e-6)


@pytest.mark.parametrize("kind, options", [
    ("ipo", {"length_normalise": True}), ("simpo", {"gamma": 1.3}), ("orpo", {"lam": 0.8}),
    ("r_dpo", {"alpha": 0.2}), ("slic", {"delta": 4.0, "lam": 0.7}),
    ("discopop", {"temperature": 2.0}), ("tdpo2", {"alpha": 0.9}), ("d2o", {"alpha": 0.4}),
    ("sppo", {"chosen_win": 0.9, "rejected_win": 0.4}),
    *((kind, {"nll_weight": 0.3}) for kind in KINDS)])  # fmt: skip
def test_options(kind, options):
    e = 0.1 if kind == "exo_pair" else 0.0
    expected = formula(kind, e=e, **options)
    close(pair_loss(kind, **options), expected)
    assert not np.allclose(expected, formula(kind, e=e))  # the option does something


def test_options_of_a_command_line():
    """Those with a number or a switch: not the tensors, which the script gives."""
    own = {"ipo": ["length_normalise"], "discopop": ["temperature"], "simpo": ["gamma"],
           "orpo": ["lam"], "slic": ["delta", "lam"], "r_dpo": ["alpha"], "tdpo2": ["alpha"],
           "d2o": ["alpha"]}  # fmt: skip
    for kind in KINDS:
        ratios = ["divergence", "alpha_divergence"] if kind in RATIOS else []
        assert dpo.options_of(kind) == [*own.get(kind, []), "nll_weight", *ratios]


@pytest.mark.parametrize("kind", RATIOS)
def test_divergences(kind):
    """Both log-ratios go through f' of the divergence before anything else.

    The ratios are small, so that no exp overflows.
    """
    lc, lr, e = FC + (LC - FC) / 20, FR + (LR - FR) / 20, 0.1 if kind in SMOOTHED else 0.0
    for options, f in DIVERGENCES:
        close(pair_loss(kind, lc, lr, e=e, **options), formula(kind, lc, lr, e=e, f=f))


@pytest.mark.parametrize("alpha", [-2.0, -0.5, 0.3, 0.5, 0.9, 1.0, 2.5])
def test_the_alpha_divergence_is_the_slope_of_its_f(alpha):
    """f(u) = (u^(1-alpha) - (1-alpha) u - alpha) / (alpha (alpha - 1)), for 1 that of the forward
    KL, -log u + u - 1; a constant in f' cancels between chosen and rejected."""

    def f(u):
        if alpha == 1:
            return -np.log(u) + u - 1
        return (u ** (1 - alpha) - (1 - alpha) * u - alpha) / (alpha * (alpha - 1))

    u, eps = np.array([0.2, 0.7, 1.0, 1.9, 6.0]), 1e-6
    slopes = (f(u + eps) - f(u - eps)) / (2 * eps)
    found = dpo.f_divergence(torch.from_numpy(np.log(u)), "alpha", alpha).numpy()
    close(np.diff(found), np.diff(slopes), 1e-7, 1e-8)


def test_the_alpha_divergence_lies_between_the_two_kls():
    u = torch.tensor([-1.0, 0.5, 2.0], dtype=torch.float64)
    near = dpo.f_divergence(u, "alpha", 1e-9).diff()
    close(near, u.diff(), 1e-6)
    close(dpo.f_divergence(u, "alpha", 1.0), dpo.f_divergence(u, "forward_kl"))


# Errors


@pytest.mark.parametrize("kind, e", [
    ("robust", 0.5), ("robust", 0.7), ("exo_pair", 0.0),  # division by 0, a sign flip, log 0
    ("hinge", 0.1), ("ipo", 0.1), ("nca_pair", 0.1), ("sppo_hard", 0.1), ("npo", 0.1),
    ("tdpo2", 0.1)])  # it would be ignored  # fmt: skip
def test_impossible_label_smoothing(kind, e):
    with pytest.raises(ValueError):
        pair_loss(kind, e=e)


@pytest.mark.parametrize("kind, options", [  # unused, then wrong
    ("sigmoid", {"gamma": 0.5}), ("hinge", {"lam": 0.1}), ("ipo", {"alpha": 0.01}),
    ("orpo", {"delta": 1.0}), ("sigmoid", {"length_normalise": True}), ("r_dpo", {"gamma": 0.5}),
    ("cpo", {"lam": 0.1}), ("simpo", {"divergence": "js"}), ("slic", {"alpha": 0.1}),
    ("sigmoid", {"label_smoothin": 0.1}), ("tdpo1", {"alpha": 0.5}), ("npo", {"chosen_kl": 0.5}),
    ("sppo_hard", {"chosen_win": 0.5}), ("aot", {"divergence": "js"}),
    ("dpoo", {}), ("kto", {}), ("sigmoid", {"divergence": "hellinger"}),
    ("sigmoid", {"alpha_divergence": 0.3}),
    ("sigmoid", {"divergence": "alpha", "alpha_divergence": 0}),
    ("sppo", {"chosen_win": None}), ("sppo", {"rejected_win": None})])  # fmt: skip
def test_options_that_a_kind_has_not(kind, options):
    with pytest.raises(ValueError):
        pair_loss(kind, **options)


def test_lengths():
    four = [torch.from_numpy(x) for x in LOGPS]
    lengths = ("sigmoid_norm", "simpo", "orpo", "cpo", "slic", "sft", "r_dpo", "ipo", "sigmoid")
    for kind in (*lengths, "tdpo1", "tdpo2"):  # the last two lack their KLs
        options = {"ipo": {"length_normalise": True}, "sigmoid": {"nll_weight": 0.1}}.get(kind, {})
        with pytest.raises(ValueError, match="length" if kind in lengths else "chosen_kl"):
            dpo.pair_loss(kind, *four, **options)
    for kind in ("sigmoid", "ipo", "hinge", "nca", "aot", "npo", "d2o"):
        close(dpo.pair_loss(kind, *four), formula(kind))  # no lengths; beta is 0.1 unless said
    close(dpo.pair_loss("cpo", *four, chosen_lengths=torch.from_numpy(NC)), formula("cpo"))


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_kind_does_without(kind):
    """Reference-free kinds do without the reference, npo without the chosen; the others say so."""
    smoothing = 0.1 if kind == "exo_pair" else 0.0
    lengths = {"chosen_lengths": torch.from_numpy(NC), "rejected_lengths": torch.from_numpy(NR)}
    options = {key: torch.from_numpy(EXTRA[key]) for key in TAKES.get(kind, [])}
    lc, lr, fc, fr = (torch.from_numpy(x) for x in LOGPS)
    for given, free in ((lc, lr, None, None), FREE), ((None, lr, None, fr), ["npo"]):

        def loss(given=given):
            return dpo.pair_loss(kind, *given, label_smoothing=smoothing, **lengths, **options)

        if kind in free:
            close(loss(), formula(kind))
        else:
            with pytest.raises(ValueError):
                loss()


def test_sppo_without_chances_is_sppo_hard():
    close(pair_loss("sppo", chosen_win=None, rejected_win=None), formula("sppo_hard"))
    close(pair_loss("sppo", chosen_win=1.0, rejected_win=0.0), formula("sppo_hard") / 2)


# Gradients and symmetries


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_is_the_slope_of_the_formula(kind):
    inputs = [torch.from_numpy(x.copy()).requires_grad_() for x in LOGPS]
    e, eps = 0.1 if kind in SMOOTHED else 0.0, 1e-5
    grads = torch.autograd.grad(pair_loss(kind, *inputs, e=e).sum(), inputs, allow_unused=True)
    for i, grad in enumerate(grads):
        slope = np.zeros(B)
        for k, step in enumerate(eps * np.eye(B)):
            before, after = LOGPS[:i], LOGPS[i + 1 :]
            up = formula(kind, *before, LOGPS[i] + step, *after, e=e).sum()
            down = formula(kind, *before, LOGPS[i] - step, *after, e=e).sum()
            slope[k] = (up - down) / (2 * eps)
        close(torch.zeros(B) if grad is None else grad, slope, rtol=1e-6, atol=1e-7)
    assert torch.autograd.gradcheck(lambda *x: pair_loss(kind, *x, e=e), inputs)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_independent_of_their_order(kind):
    rows, loss = np.array([4, 2, 0, 5, 1, 3]), pair_loss(kind)
    moved = pair_loss(kind, rows=rows)
    if kind == "aot_unpaired":  # chosen and rejected need not even be pairs
        close(pair_loss(kind, LC[rows], LR, FC[rows], FR), loss)
    if kind.startswith("aot"):
        close(moved, loss)
    else:
        close(moved, loss[rows])
        close(pair_loss(kind, rows=slice(1)), loss[:1])  # alone


@pytest.mark.parametrize("kind", [
    "sigmoid", "robust", "hinge", "ipo", "exo_pair", "discopop", "r_dpo", "aot", "cpo", "tdpo1",
    "tdpo2"])  # fmt: skip
def test_only_the_difference_counts(kind):
    fixed = LC / NC if kind == "cpo" else 0.0  # cpo has a likelihood term besides
    moved = (LC + 3) / NC if kind == "cpo" else 0.0
    shifted = pair_loss(kind, LC + 3, LR + 3)
    close(shifted + torch.as_tensor(moved), pair_loss(kind) + torch.as_tensor(fixed))


def test_swapping_sides_flips_the_label():
    close(pair_loss("sigmoid", LR, LC, FR, FC, e=0.8), pair_loss("sigmoid", e=0.2))
    margin, swapped = (  # -b D and b D, as the loss is log(1 + exp(-b D))
        np.log(np.expm1(pair_loss("sigmoid", *sides).numpy()))
        for sides in ((LC, LR, FC, FR), (LR, LC, FR, FC))
    )
    close(swapped, -margin, 1e-8, 1e-8)
    # robust is unbiased: its mean over labels flipped at rate e is the clean loss.
    right, flipped = pair_loss("robust", e=0.2), pair_loss("robust", LR, LC, FR, FC, e=0.2)
    close(0.8 * right + 0.2 * flipped, formula("sigmoid"))


@pytest.mark.parametrize("b", [0.05, 0.1, 0.5])
def test_dpo_gradient_weight(b):
    """The chosen is pushed up and the rejected down by b sigmoid(-b D).

    That is b / 2 where policy = reference.
    """
    for fc, fr in [(FC, FR), (LC, LR)]:
        lc, lr = (torch.from_numpy(x.copy()).requires_grad_() for x in (LC, LR))
        up, down = torch.autograd.grad(pair_loss("dpo", lc, lr, fc, fr, b=b).sum(), [lc, lr])
        close(up, -b * sg(-b * (LC - fc - LR + fr)))
        close(down, -up)
        assert fc is FC or np.allclose(down, b / 2)


@pytest.mark.parametrize("kind, d, options, lowest", [
    ("ipo", 1 / 0.2, {}, 0.0),  # D = 1 / (2 b)
    # b D = log((1-e)/e)
    ("sigmoid", math.log(9) / 0.1, {"e": 0.1}, -0.9 * math.log(0.9) - 0.1 * math.log(0.1)),
    ("exo_pair", math.log(9) / 0.1, {"e": 0.1}, 0.0),  # a KL divergence that vanishes there
])  # fmt: skip
def test_optimum(kind, d, options, lowest):
    lc, *rest = (torch.tensor([v], dtype=torch.float64) for v in (d - 4.0, -6.0, -4.0, -6.0))
    loss = pair_loss(kind, lc.requires_grad_(), *rest, nc=[1], nr=[1], **options)
    close(loss, [lowest])
    close(torch.autograd.grad(loss, lc)[0], [0.0])


@pytest.mark.parametrize(
    "kind", ["sigmoid", "robust", "exo_pair", "nca_pair", "bco_pair", "discopop", "simpo", "cpo"]
)
def test_far_pairs_stay_finite(kind):
    for sign in (1, -1):
        lc, lr = torch.tensor([-500.0 + sign * 400]), torch.tensor([-500.0 - sign * 400])
        ref = torch.tensor([-500.0])
        loss = pair_loss(kind, lc.requires_grad_(), lr, ref, ref, nc=[2], nr=[2], b=0.1)
        assert loss.isfinite().all() and torch.autograd.grad(loss.sum(), lc)[0].isfinite().all()


@pytest.mark.parametrize("certain", ["chosen", "rejected"])
def test_orpo_survives_a_response_of_probability_one(certain):
    x = torch.tensor([0.0], requires_grad=True)  # log 1: its odds are infinite
    sides = (x, torch.tensor([-5.0])) if certain == "chosen" else (torch.tensor([-5.0]), x)
    loss = pair_loss("orpo", *sides, [0.0], [0.0], nc=[2], nr=[2])
    assert loss.isfinite().all() and torch.autograd.grad(loss.sum(), x)[0].isfinite().all()


# The table of axes, and the loss at the start

STORED = "implicit point response positive human reference off offline"
TABLE = {
    "ppo rloo grpo reinforce": "explicit point response positive human reference on offline",
    "dpo cdpo sigmoid robust hinge sigmoid_norm exo_pair nca_pair bco_pair": STORED,
    "apo_zero apo_down aot aot_unpaired discopop r_dpo kto una lipo": STORED,
    "ipo sppo_hard": "implicit preference response positive human reference off offline",
    "tdpo tdpo1 tdpo2 dpo_as_q": "implicit point token positive human reference off offline",
    "simpo orpo cpo slic sft rrhf pro": "implicit point response positive human free off offline",
    "rwr": "implicit point response positive human free off offline",
    "npo d2o": "implicit point response negative human reference off offline",
    "iterative_dpo oaif xpo hybrid": "implicit point response positive AI reference on online",
    "sppo dno": "implicit preference response positive AI reference on online",
    "nash_md": "explicit preference response positive AI reference on online",
    "best_of_n raft": "explicit point response positive human free on offline",
    "iterated_rlhf": "explicit point response positive human reference on online",
    "rlaif cai": "explicit point response positive AI reference on offline",
    "direct_rlaif": "explicit point response positive AI reference on online",
}


def test_axes():
    expected = {name: row for names, row in TABLE.items() for name in names.split()}
    for name in expected | dpo.AXES:
        assert name in expected, (
            f"{name} is in dpo.AXES, where a loss of KINDS stands with DPO unless a row of ROWS in"
            " minirlhf/dpo.py says otherwise: check that, and add its name to TABLE here"
        )
        assert name in dpo.AXES, f"{name} is in TABLE and in no row of ROWS in minirlhf/dpo.py"
        columns = ("RM1", "RM2", "RM3", "RM4", "F", "RL1", "RL2", "O")
        wanted = dict(zip(columns, expected[name].split(), strict=True))
        assert dpo.AXES[name] == wanted, f"{name}: dpo.AXES and TABLE here differ"
    assert set(dpo.REFERENCE_FREE) == set(FREE)


@pytest.mark.parametrize("kind", dpo.KINDS)
def test_rl1_says_whether_the_reference_enters_the_loss(kind):
    sees = not np.allclose(pair_loss(kind), pair_loss(kind, fc=FC + 1, fr=FR - 1))
    assert dpo.AXES[kind]["RL1"] == ("reference" if sees else "free")


@pytest.mark.parametrize("kind", [*KINDS, *ALIASES])
@pytest.mark.parametrize("b", [0.1, 0.7])
def test_loss_at_start(kind, b):
    """The formula where the policy is its reference: one number, or several and None."""
    name = ALIASES.get(kind, kind)
    losses = []
    for e in (0.1, 0.3) if name in SMOOTHED else (0.0,):
        for win in (0.4, 0.8):
            given = {"chosen_kl": 0, "rejected_kl": 0, "chosen_win": win, "rejected_win": win}
            losses.append(formula(name, FC, FR, b=b, e=e, **given))
    value = loss_at_start(kind, b)
    if np.ptp(losses) > 1e-6:
        assert value is None
    else:
        assert value is not None, f"{kind} starts at {np.mean(losses)}: add it to AT_START"
        close(value, np.mean(losses))


# Some kinds alone


def f64(*arrays):
    return [torch.tensor(np.asarray(x, dtype=float), requires_grad=True) for x in arrays]


def test_npo():
    """Plain gradient ascent on the rejected as b -> 0, up to a constant.

    Else its gradient fades with pi(rejected).
    """
    b = 1e-6
    close(pair_loss("npo", b=b) - 2 / b * LOG2, LR - FR, 1e-4)
    (lr,) = f64([-5.0, -20.0, -80.0, -320.0])
    loss = pair_loss("npo", lr, lr, [-5.0] * 4, [-5.0] * 4, nc=[1] * 4, nr=[1] * 4)
    (weight,) = torch.autograd.grad(loss.sum(), lr)
    close(weight, 2 * sg(0.1 * np.array([0.0, -15.0, -75.0, -315.0])))
    assert weight[0] == 1 and weight[3] < 1e-13  # the ascent's weight is 1 everywhere


def test_tdpo2_stops_the_gradient_of_the_chosen_kl():
    ck, rk = f64(EXTRA["chosen_kl"], EXTRA["rejected_kl"])
    one, two = (
        torch.autograd.grad(
            pair_loss(kind, chosen_kl=ck, rejected_kl=rk).sum(), [ck, rk], allow_unused=True
        )
        for kind in ("tdpo1", "tdpo2")
    )
    weight = 0.1 * (1 - np.exp(-formula("tdpo1")))  # b sigmoid(-logit) = b (1 - exp(-loss))
    close(one[0], -weight)
    close(one[1], weight)
    assert two[0] is None
    close(two[1], 0.5 * 0.1 * (1 - np.exp(-formula("tdpo2"))))


def test_ipo_is_lowest_exactly_at_its_margin():
    (margin,) = f64([4.9, 5.0, 5.1])
    loss = pair_loss("ipo", margin, [0.0] * 3, [0.0] * 3, [0.0] * 3)
    (slope,) = torch.autograd.grad(loss.sum(), margin)
    assert loss[1] == 0 and slope[1] == 0 and slope[0] < 0 < slope[2]


def test_token_rewards_add_up_to_the_implicit_reward():
    logprobs, ref = RNG.uniform(-5, 0, (2, B, 7))
    rewards = dpo.token_rewards(torch.from_numpy(logprobs), torch.from_numpy(ref), beta=0.3)
    close(rewards, 0.3 * (logprobs - ref))
    close(rewards.sum(1), 0.3 * (logprobs.sum(1) - ref.sum(1)))


# What the losses learn, on tables small enough to know the answer

# rock, paper, scissors: P(row beats column)
WINS = np.array([[0.5, 0.9, 0.1], [0.1, 0.5, 0.9], [0.9, 0.1, 0.5]])


def fit(ref, wins, **options):
    """(h, loss) of a tabular policy after pair_loss over all ordered pairs.

    The label of a pair is the chance that the first wins.
    """
    n = len(ref)
    i, j = (torch.tensor(x) for x in np.nonzero(~np.eye(n, dtype=bool)))
    ref = torch.from_numpy(np.log(ref))
    logits = ref.clone().requires_grad_()
    options |= {"label_smoothing": 1 - torch.from_numpy(wins)[i, j]}
    exact = {"tolerance_grad": 1e-12, "tolerance_change": 1e-14, "line_search_fn": "strong_wolfe"}
    optimizer = torch.optim.LBFGS([logits], max_iter=500, **exact)

    def loss():
        logps = logits.log_softmax(0)
        return dpo.pair_loss("sigmoid", logps[i], logps[j], ref[i], ref[j], **options).mean()

    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)
    return (logits.log_softmax(0) - ref).detach().numpy(), loss().item()


def test_implicit_rewards_are_those_of_bradley_and_terry():
    """Fitted to chances that come from rewards, b h gives them back, whatever the reference."""
    rewards = np.array([0.0, 1.0, -0.7, 2.2, 0.4])
    wins = sg(rewards[:, None] - rewards[None, :])
    for ref in (np.full(5, 0.2), np.array([0.5, 0.05, 0.2, 0.05, 0.2])):
        h, _ = fit(ref, wins, beta=0.5)
        close(sg(0.5 * (h[:, None] - h[None, :])), wins, 1e-5, 1e-5)


def test_no_reward_explains_a_cycle():
    """Rock, paper, scissors at 0.9: the best point rewards are equal, at log 2.

    A model of pairs would reach 0.3251.
    """
    h, loss = fit(np.array([0.5, 0.2, 0.3]), WINS)
    close(h, np.zeros(3), atol=1e-5)
    assert loss == pytest.approx(LOG2, abs=1e-9)


def test_sppo_cycles_and_its_average_does_not():
    """Each round goes to the loss's minimum: pi <- pi exp(0.1 (P - 1/2)), renormalised.

    The loss is a square, so a slope finds it.
    """
    logits, policies = torch.tensor([1.0, 0.0, -0.5], dtype=torch.float64), []
    for _ in range(2000):
        logps = logits.log_softmax(0).requires_grad_()
        last = logps.detach()
        win = torch.from_numpy(WINS) @ last.exp()
        chances = {"chosen_win": win, "rejected_win": 0.5}
        loss = dpo.pair_loss("sppo", logps, last, last, last, beta=10.0, **chances)
        logits = last - torch.autograd.grad(loss.sum(), logps)[0]
        policies.append(last.exp().numpy())
    policies = np.array(policies)
    far = np.abs(policies - 1 / 3).max(1)
    assert 0.3 < far[:500].max() < far[-500:].max() - 0.05  # it spirals outwards
    close(policies.mean(0), np.full(3, 1 / 3), 0, 0.02)
    step = policies[0] * np.exp(0.1 * (WINS @ policies[0] - 0.5))
    close(policies[1], step / step.sum())
