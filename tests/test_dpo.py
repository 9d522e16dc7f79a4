"""The DPO family against NumPy formulas, a table of fixed values, finite differences, known optima and small games.

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
EXTRA = {
    "chosen_kl": RNG.uniform(0, 3, B),
    "rejected_kl": RNG.uniform(0, 3, B),  # what some kinds take besides
    "chosen_win": RNG.uniform(0, 1, B),
    "rejected_win": RNG.uniform(0, 1, B),
}
TAKES = {
    "tdpo1": ["chosen_kl", "rejected_kl"],
    "tdpo2": ["chosen_kl", "rejected_kl"],
    "sppo": ["chosen_win", "rejected_win"],
}
SMOOTHED = ["sigmoid", "robust", "exo_pair", "aot", "aot_unpaired"]
RATIOS = [
    "sigmoid",
    "robust",
    "hinge",
    "ipo",
    "sigmoid_norm",
    "exo_pair",
    "nca_pair",
    "bco_pair",
    "sppo_hard",
    "sppo",
    "apo_zero",
    "apo_down",
    "aot_unpaired",
    "discopop",
    "r_dpo",
    "tdpo1",
    "tdpo2",
    "npo",
    "d2o",
]  # of c and r
FREE = ["simpo", "orpo", "cpo", "slic"]  # of lc and lr: no reference
KINDS = [*RATIOS, "aot", *FREE]
ALIASES = {"dpo": "sigmoid", "exo": "exo_pair", "nca": "nca_pair", "bco": "bco_pair"}
DIVERGENCES = [
    ({"divergence": "reverse_kl"}, lambda u: u),
    ({"divergence": "forward_kl"}, lambda u: -np.exp(-u)),
    ({"divergence": "js"}, lambda u: S(u)),
    ({"divergence": "alpha"}, lambda u: -2 * np.exp(-u / 2)),
    ({"divergence": "alpha", "alpha_divergence": 3.0}, lambda u: np.exp(2 * u) / 2),
]


def sg(x):
    return 1 / (1 + np.exp(-x))


def S(x):
    return -np.log1p(np.exp(-x))


def smooth(x, e):
    return -(1 - e) * S(x) - e * S(-x)


def logodds(p):
    return np.log(np.exp(p) / (1 - np.exp(p)))


def formula(
    kind,
    lc=LC,
    lr=LR,
    fc=FC,
    fr=FR,
    b=0.1,
    e=0.0,
    nc=NC,
    nr=NR,
    f=lambda u: u,
    length_normalise=False,
    gamma=0.5,
    lam=0.1,
    delta=1.0,
    alpha=None,
    temperature=0.05,
    nll_weight=0.0,
    **given,
):
    """The loss of each pair by the equations, in NumPy float64."""
    alpha = {"tdpo2": 0.5, "d2o": 0.1}.get(kind, 0.01) if alpha is None else alpha
    ck, rk, cw, rw = ((EXTRA | given)[key] for key in EXTRA)
    c, r = f(lc - fc), f(lr - fr)
    d, m = c - r, sg(b * (c - r) / temperature)
    loss = {
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
        "r_dpo": lambda: -S(b * d + alpha * (nc - nr)),
        "simpo": lambda: -S(b * (lc / nc - lr / nr) - gamma),
        "orpo": lambda: -lc / nc - lam * S(logodds(lc / nc) - logodds(lr / nr)),
        "cpo": lambda: -S(b * (lc - lr)) - lc / nc,
        "slic": lambda: np.maximum(0, delta - lc + lr) - lam * lc / nc,
    }[ALIASES.get(kind, kind)]()
    return loss - nll_weight * lc / nc


def pair_loss(
    kind,
    lc=LC,
    lr=LR,
    fc=FC,
    fr=FR,
    b=0.1,
    nc=NC,
    nr=NR,
    e=None,
    rows=slice(None),
    dtype=torch.float64,
    **options,
):
    """dpo.pair_loss on NumPy arrays or tensors; smoothing 0.1 where exo_pair needs some, EXTRA where a kind takes it."""
    e = (0.1 if kind.startswith("exo") else 0.0) if e is None else e
    options = {key: EXTRA[key] for key in TAKES.get(kind, [])} | options
    options = {
        key: torch.from_numpy(x[rows]).to(dtype) if isinstance(x, np.ndarray) else x
        for key, x in options.items()
    }
    logps = (
        x if torch.is_tensor(x) else torch.as_tensor(np.asarray(x)[rows]).to(dtype)
        for x in (lc, lr, fc, fr)
    )
    nc, nr = (torch.as_tensor(np.asarray(n)[rows]) for n in (nc, nr))
    return dpo.pair_loss(
        kind, *logps, beta=b, label_smoothing=e, chosen_lengths=nc, rejected_lengths=nr, **options
    )


def one(kind, c, r, nc=5, nr=4, **options):
    """The loss of a single pair with log-ratios c and r."""
    x = (np.array([v], dtype=float) for v in (c - 7.0, r - 9.0, -7.0, -9.0))
    return pair_loss(kind, *x, nc=[nc], nr=[nr], **options).item()


def close(actual, expected, rtol=1e-10, atol=1e-10):
    np.testing.assert_allclose(
        (actual.detach().numpy() if torch.is_tensor(actual) else actual),
        np.asarray(expected),
        rtol=rtol,
        atol=atol,
    )


@pytest.mark.parametrize("kind", [*KINDS, *ALIASES])
def test_every_kind_is_its_formula(kind):
    name = ALIASES.get(kind, kind)
    for b in (0.05, 0.1, 0.7):
        for e in (1e-3, 0.1, 0.3) if name in SMOOTHED else (0.0,):
            loss = pair_loss(kind, b=b, e=e)
            assert loss.shape == (B,)
            close(loss, formula(kind, b=b, e=e))
            close(
                pair_loss(kind, b=b, e=e, dtype=torch.float32), formula(kind, b=b, e=e), 1e-5, 1e-5
            )
    if name in ("sigmoid", "robust", "exo_pair"):  # a soft label for each pair
        e = np.linspace(0.05, 0.45, B)
        close(pair_loss(kind, e=torch.from_numpy(e)), formula(kind, e=e))


@pytest.mark.parametrize(
    "kind, options, value, at_zero",
    [
        ("sigmoid", {}, 0.593650, math.log(2)),
        ("sigmoid", {"e": 0.1}, 0.614650, math.log(2)),
        ("robust", {"e": 0.1}, 0.567400, math.log(2)),
        ("hinge", {}, 0.79, 1.0),
        ("ipo", {}, 8.41, 25.0),
        ("ipo", {"length_normalise": True}, 20.7025, 25.0),
        ("sigmoid_norm", {}, 0.670900, math.log(2)),
        ("nca_pair", {}, 1.338234, 2 * math.log(2)),
        ("bco_pair", {}, 1.284554, 2 * math.log(2)),
        ("sppo_hard", {}, 31.61, 50.0),
        ("apo_zero", {}, 0.947575, 1.0),
        ("apo_down", {}, 0.985122, 1.0),
        ("exo_pair", {"e": 1e-3}, 2.405435, -math.log(2) - math.log(1e-3 * 0.999) / 2),
        ("discopop", {}, 0.807379, (math.log(2) + 1) / 2),
        ("r_dpo", {}, 0.589185, 0.688160),
        ("simpo", {}, 0.895163, 0.922023),
        ("cpo", {}, 1.609014, 1.998139),
        ("orpo", {}, 1.118228, 1.430745),
        ("slic", {}, 0.11, 0.14),
        ("npo", {}, 13.271942, 20 * math.log(2)),
        ("d2o", {"alpha": 0.3}, 0.541698, math.log(2)),
        (
            "tdpo1",
            {"chosen_kl": np.array([0.3]), "rejected_kl": np.array([0.8])},
            0.616344,
            0.718460,
        ),
        (
            "tdpo2",
            {"chosen_kl": np.array([0.3]), "rejected_kl": np.array([0.8])},
            0.604919,
            0.705725,
        ),
        (
            "sppo",
            {"chosen_win": 0.8, "rejected_win": 0.3},
            2.105,
            6.5,
        ),  # ((1.5 - 3)^2 + (-0.6 + 2)^2) / 2, (3^2 + 2^2) / 2
        ("sppo", {"chosen_win": None, "rejected_win": None}, 31.61, 50.0),
        ("sigmoid", {"nll_weight": 0.5}, 1.143650, 1.393147),
    ],
)
def test_fixed_values(kind, options, value, at_zero):
    """b = 0.1, c = 1.5, r = -0.6, 5 and 4 tokens; then c = r = 0. `one` puts the reference at -7 and -9."""
    assert one(kind, 1.5, -0.6, **options) == pytest.approx(value, abs=1e-6)
    assert one(kind, 0.0, 0.0, **options) == pytest.approx(at_zero, abs=1e-6)


@pytest.mark.parametrize(
    "kind, options",
    [
        ("ipo", {"length_normalise": True}),
        ("simpo", {"gamma": 1.3}),
        ("orpo", {"lam": 0.8}),
        ("r_dpo", {"alpha": 0.2}),
        ("slic", {"delta": 4.0, "lam": 0.7}),
        ("discopop", {"temperature": 2.0}),
        ("tdpo2", {"alpha": 0.9}),
        ("d2o", {"alpha": 0.4}),
        ("sppo", {"chosen_win": 0.9, "rejected_win": 0.4}),
        *((kind, {"nll_weight": 0.3}) for kind in KINDS),
    ],
)
def test_options(kind, options):
    e = 0.1 if kind == "exo_pair" else 0.0
    close(pair_loss(kind, **options), formula(kind, e=e, **options))
    assert not np.allclose(
        formula(kind, e=e, **options), formula(kind, e=e)
    )  # the option does something


@pytest.mark.parametrize("kind", RATIOS)
def test_divergences(kind):
    """Both log-ratios go through f' of the divergence before anything else; small ratios, so that no exp overflows."""
    lc, lr, e = FC + (LC - FC) / 20, FR + (LR - FR) / 20, 0.1 if kind in SMOOTHED else 0.0
    for options, f in DIVERGENCES:
        close(pair_loss(kind, lc, lr, e=e, **options), formula(kind, lc, lr, e=e, f=f))


@pytest.mark.parametrize(
    "kind, e",
    [
        ("robust", 0.5),
        ("robust", 0.7),
        ("exo_pair", 0.0),  # division by 0, a sign flip, log 0
        ("hinge", 0.1),
        ("ipo", 0.1),
        ("nca_pair", 0.1),
        ("sppo_hard", 0.1),
        ("npo", 0.1),
        ("tdpo2", 0.1),
    ],
)  # it would be ignored
def test_impossible_label_smoothing(kind, e):
    with pytest.raises(ValueError):
        pair_loss(kind, e=e)


def test_errors():
    unused = [
        ("sigmoid", {"gamma": 0.5}),
        ("hinge", {"lam": 0.1}),
        ("ipo", {"alpha": 0.01}),
        ("orpo", {"delta": 1.0}),
        ("sigmoid", {"length_normalise": True}),
        ("r_dpo", {"gamma": 0.5}),
        ("cpo", {"lam": 0.1}),
        ("simpo", {"divergence": "js"}),
        ("slic", {"alpha": 0.1}),
        ("sigmoid", {"label_smoothin": 0.1}),
        ("tdpo1", {"alpha": 0.5}),
        ("npo", {"chosen_kl": 0.5}),
        ("sppo_hard", {"chosen_win": 0.5}),
    ]
    wrong = [
        ("dpoo", {}),
        ("kto", {}),
        ("sigmoid", {"divergence": "hellinger"}),
        ("sigmoid", {"alpha_divergence": 0.3}),
        ("sigmoid", {"divergence": "alpha", "alpha_divergence": 1}),
        ("sppo", {"chosen_win": None}),
    ]
    for kind, options in unused + wrong:
        with pytest.raises(ValueError):
            pair_loss(kind, **options)
    four = [torch.from_numpy(x) for x in LOGPS]
    lengths = ("sigmoid_norm", "simpo", "orpo", "cpo", "slic", "r_dpo", "ipo", "sigmoid")
    for kind in (*lengths, "tdpo1", "tdpo2"):  # the last two lack their KLs
        options = {"ipo": {"length_normalise": True}, "sigmoid": {"nll_weight": 0.1}}.get(kind, {})
        with pytest.raises(ValueError):
            dpo.pair_loss(kind, *four, **options)
    for kind in (
        "sigmoid",
        "ipo",
        "hinge",
        "nca",
        "aot",
        "npo",
        "d2o",
    ):  # these ask for no lengths; beta is 0.1 unless said
        close(dpo.pair_loss(kind, *four), formula(kind))
    close(dpo.pair_loss("cpo", *four, chosen_lengths=torch.from_numpy(NC)), formula("cpo"))


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_kind_does_without(kind):
    """Reference-free kinds do without the reference, npo without the chosen; the others say so."""
    for absent, free in ({"fc": None, "fr": None}, FREE), ({"lc": None, "fc": None}, ["npo"]):
        given = {
            key: torch.from_numpy(x) for key, x in zip(("lc", "lr", "fc", "fr"), LOGPS, strict=True)
        } | absent
        options = {key: torch.from_numpy(EXTRA[key]) for key in TAKES.get(kind, [])}

        def loss(given=given, options=options):
            return dpo.pair_loss(
                kind,
                *given.values(),
                label_smoothing=0.1 if kind == "exo_pair" else 0.0,
                chosen_lengths=torch.from_numpy(NC),
                rejected_lengths=torch.from_numpy(NR),
                **options,
            )

        if kind in free:
            close(loss(), formula(kind))
        else:
            with pytest.raises(ValueError):
                loss()


def test_sppo_without_chances_is_sppo_hard():
    close(pair_loss("sppo", chosen_win=None, rejected_win=None), formula("sppo_hard"))
    close(pair_loss("sppo", chosen_win=1.0, rejected_win=0.0), formula("sppo_hard") / 2)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_is_the_slope_of_the_formula(kind):
    inputs = [torch.from_numpy(x.copy()).requires_grad_() for x in LOGPS]
    e, eps = 0.1 if kind in SMOOTHED else 0.0, 1e-5
    grads = torch.autograd.grad(pair_loss(kind, *inputs, e=e).sum(), inputs, allow_unused=True)
    for i, grad in enumerate(grads):
        slope = np.zeros(B)
        for k, step in enumerate(eps * np.eye(B)):
            up, down = (
                formula(kind, *LOGPS[:i], LOGPS[i] + s, *LOGPS[i + 1 :], e=e).sum()
                for s in (step, -step)
            )
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


@pytest.mark.parametrize(
    "kind",
    [
        "sigmoid",
        "robust",
        "hinge",
        "ipo",
        "exo_pair",
        "discopop",
        "r_dpo",
        "aot",
        "cpo",
        "tdpo1",
        "tdpo2",
    ],
)
def test_only_the_difference_counts(kind):
    fixed = LC / NC if kind == "cpo" else 0.0  # cpo has a likelihood term besides
    moved = (LC + 3) / NC if kind == "cpo" else 0.0
    close(
        pair_loss(kind, LC + 3, LR + 3) + torch.as_tensor(moved),
        pair_loss(kind) + torch.as_tensor(fixed),
    )


def test_swapping_sides_flips_the_label():
    close(pair_loss("sigmoid", LR, LC, FR, FC, e=0.8), pair_loss("sigmoid", e=0.2))
    margin = np.log(
        np.expm1(pair_loss("sigmoid").numpy())
    )  # -b D, as the loss is log(1 + exp(-b D))
    close(np.log(np.expm1(pair_loss("sigmoid", LR, LC, FR, FC).numpy())), -margin, 1e-8, 1e-8)
    # robust is unbiased: its mean over labels flipped at rate e is the clean loss.
    close(
        0.8 * pair_loss("robust", e=0.2) + 0.2 * pair_loss("robust", LR, LC, FR, FC, e=0.2),
        formula("sigmoid"),
    )


@pytest.mark.parametrize("b", [0.05, 0.1, 0.5])
def test_dpo_gradient_weight(b):
    """The chosen side is pushed up and the rejected down by b * sigmoid(-b D): b / 2 where policy = reference."""
    for fc, fr in [(FC, FR), (LC, LR)]:
        lc, lr = (torch.from_numpy(x.copy()).requires_grad_() for x in (LC, LR))
        up, down = torch.autograd.grad(pair_loss("dpo", lc, lr, fc, fr, b=b).sum(), [lc, lr])
        close(up, -b * sg(-b * (LC - fc - LR + fr)))
        close(down, -up)
        assert fc is FC or np.allclose(down, b / 2)


@pytest.mark.parametrize(
    "kind, d, options, lowest",
    [
        ("ipo", 1 / 0.2, {}, 0.0),  # D = 1 / (2 b)
        (
            "sigmoid",
            math.log(9) / 0.1,
            {"e": 0.1},
            -0.9 * math.log(0.9) - 0.1 * math.log(0.1),
        ),  # b D = log((1-e)/e)
        ("exo_pair", math.log(9) / 0.1, {"e": 0.1}, 0.0),  # a KL divergence that vanishes there
    ],
)
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
        lc = torch.tensor([-500.0 + sign * 400], requires_grad=True)
        loss = pair_loss(
            kind,
            lc,
            torch.tensor([-500.0 - sign * 400]),
            torch.tensor([-500.0]),
            torch.tensor([-500.0]),
            nc=[2],
            nr=[2],
            b=0.1,
        )
        assert loss.isfinite().all() and torch.autograd.grad(loss.sum(), lc)[0].isfinite().all()


@pytest.mark.parametrize("certain", ["chosen", "rejected"])
def test_orpo_survives_a_response_of_probability_one(certain):
    x = torch.tensor([0.0], requires_grad=True)  # log 1: its odds are infinite
    sides = (x, torch.tensor([-5.0])) if certain == "chosen" else (torch.tensor([-5.0]), x)
    loss = pair_loss("orpo", *sides, [0.0], [0.0], nc=[2], nr=[2])
    assert loss.isfinite().all() and torch.autograd.grad(loss.sum(), x)[0].isfinite().all()


def test_axes():
    """The rows, and that RL1 says whether the reference enters the loss."""
    stored = "implicit point response positive human reference off offline"
    rows = {
        "ppo rloo grpo reinforce": "explicit point response positive human reference on offline",
        "dpo cdpo sigmoid robust hinge sigmoid_norm exo_pair nca_pair bco_pair apo_zero apo_down aot aot_unpaired discopop r_dpo": stored,
        "kto una lipo": stored,
        "ipo sppo_hard": "implicit preference response positive human reference off offline",
        "tdpo tdpo1 tdpo2 dpo_as_q": "implicit point token positive human reference off offline",
        "simpo orpo cpo slic rrhf pro": "implicit point response positive human free off offline",
        "npo d2o": "implicit point response negative human reference off offline",
        "iterative_dpo oaif": "implicit point response positive AI reference on online",
        "sppo dno": "implicit preference response positive AI reference on online",
        "nash_md": "explicit preference response positive AI reference on online",
    }
    names = ("RM1", "RM2", "RM3", "RM4", "F", "RL1", "RL2", "O")
    expected = {
        name: dict(zip(names, row.split(), strict=True))
        for group, row in rows.items()
        for name in group.split()
    }
    assert expected == dpo.AXES
    assert set(dpo.KINDS) == set(KINDS) and set(dpo.REFERENCE_FREE) == set(FREE)
    for kind in dpo.KINDS:
        sees_reference = not np.allclose(pair_loss(kind), pair_loss(kind, fc=FC + 1, fr=FR - 1))
        assert dpo.AXES[kind]["RL1"] == ("reference" if sees_reference else "free")


@pytest.mark.parametrize("kind", [*KINDS, *ALIASES])
@pytest.mark.parametrize("b", [0.1, 0.7])
def test_loss_at_start(kind, b):
    """The formula where the policy is its reference: one number, or several and None."""
    name = ALIASES.get(kind, kind)
    losses = []
    for e in (0.1, 0.3) if name in SMOOTHED else (0.0,):
        for win in (0.4, 0.8):
            losses.append(
                formula(
                    name,
                    FC,
                    FR,
                    b=b,
                    e=e,
                    chosen_kl=0,
                    rejected_kl=0,
                    chosen_win=win,
                    rejected_win=win,
                )
            )
    value = dpo.loss_at_start(kind, b)
    if np.ptp(losses) > 1e-6:
        assert value is None
    else:
        close(value, np.mean(losses))


@pytest.mark.parametrize("kl", [[2.0, -1.0, 5.0], [-2.0, -1.0, 1.0], [0.5]])
@pytest.mark.parametrize("b", [0.1, 0.5])
def test_kto(kl, b):
    """One response at a time; z, the mean of the mismatched log-ratios but at least 0, is a constant."""
    z, desirable = (
        max(0.0, sum(kl) / len(kl)),
        torch.tensor([True, False, True, True, False, False]),
    )
    expected = np.array(
        [
            1 - sg(b * (u - z) * (1 if good else -1))
            for u, good in zip(LC - FC, desirable, strict=True)
        ]
    )
    policy = torch.from_numpy(LC.copy()).requires_grad_()
    mismatched = torch.tensor(kl, dtype=torch.float64, requires_grad=True)
    loss = dpo.kto_loss(
        policy, torch.from_numpy(FC), desirable, mismatched, **({} if b == 0.1 else {"beta": b})
    )
    assert loss.shape == (B,)
    close(loss, expected)
    grad, through_z = torch.autograd.grad(loss.sum(), [policy, mismatched], allow_unused=True)
    assert through_z is None or (through_z == 0).all()
    close(grad, np.where(desirable, -1, 1) * b * expected * (1 - expected))
    weighted = dpo.kto_loss(
        policy,
        torch.from_numpy(FC),
        desirable,
        mismatched,
        beta=b,
        desirable_weight=1.3,
        undesirable_weight=0.7,
    )
    close(weighted, expected * np.where(desirable, 1.3, 0.7))
    start = dpo.kto_loss(policy, policy, desirable, torch.zeros(4, dtype=torch.float64))
    close(start, np.full(B, 0.5))  # policy = reference


def f64(*arrays):
    return [
        torch.tensor(np.asarray(x, dtype=float), dtype=torch.float64, requires_grad=True)
        for x in arrays
    ]


def test_npo():
    """Plain gradient ascent on the rejected as b -> 0, up to a constant; else its gradient fades with pi(rejected)."""
    b = 1e-6
    close(pair_loss("npo", b=b) - 2 / b * math.log(2), LR - FR, 1e-4)
    (lr,) = f64([-5.0, -20.0, -80.0, -320.0])
    (weight,) = torch.autograd.grad(
        pair_loss("npo", lr, lr, [-5.0] * 4, [-5.0] * 4, nc=[1] * 4, nr=[1] * 4).sum(), lr
    )
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


def test_una():
    (policy,) = f64(LC)
    scores = np.array([2.0, -1.0, 0.0, 0.3, -3.0, 1.0])
    close(
        dpo.una_loss(policy, torch.from_numpy(FC), torch.from_numpy(scores), beta=0.2),
        (0.2 * (LC - FC) - scores) ** 2,
    )
    thumbs = scores > 0
    expected = [-S(0.1 * h) if up else -S(-0.1 * h) for h, up in zip(LC - FC, thumbs, strict=True)]
    close(dpo.una_loss(policy, torch.from_numpy(FC), torch.from_numpy(thumbs)), expected)
    for labels in (scores, thumbs):
        assert torch.autograd.gradcheck(
            lambda x, y=labels: dpo.una_loss(x, torch.from_numpy(FC), torch.from_numpy(y)), policy
        )


# Ranked lists of 4, 1, 3, 0 and 4 responses; the fourth and fifth lists and the third have ties among the rewards
K = 4
SIZES = [4, 1, 3, 0, 4]
LIST_LOGPS, LIST_REF = RNG.uniform(-30.0, -5.0, (2, len(SIZES), K))
LIST_LENGTHS = RNG.integers(3, 20, (len(SIZES), K))
REWARDS = np.array(
    [
        [0.3, 2.0, -1.0, 1.5],
        [1.0, 9.0, 9.0, 9.0],
        [0.5, 0.5, 2.0, 9.0],
        [9.0, 9.0, 9.0, 9.0],
        [1.0, 2.0, 2.0, 1.0],
    ]
)
MASK = np.arange(K) < np.array(SIZES)[:, None]


def rrhf(s, r, **_):
    return (
        sum(max(0, s[j] - s[i]) for i in range(len(s)) for j in range(len(s)) if r[i] > r[j])
        - s[np.argmax(r)]
    )


def pro(s, r, lam=1.0):
    worse = [[i] + [j for j in range(len(s)) if r[j] < r[i]] for i in range(len(s))]
    return (
        sum(math.log(sum(math.exp(s[j]) for j in rivals)) - s[rivals[0]] for rivals in worse)
        - lam * s[np.argmax(r)]
    )


def lipo(s, r):
    rank = {i: 1 + place for place, i in enumerate(sorted(range(len(s)), key=lambda i: -s[i]))}
    return sum(
        abs(2.0 ** r[i] - 2.0 ** r[j])
        * abs(1 / math.log(1 + rank[i]) - 1 / math.log(1 + rank[j]))
        * -S(s[i] - s[j])
        for i in range(len(s))
        for j in range(len(s))
        if r[i] > r[j]
    )


LISTS = {
    "rrhf": (rrhf, {}),
    "pro": (pro, {}),
    "pro lam": (pro, {"lam": 0.3}),
    "lipo": (lipo, {}),
    "lipo beta": (lipo, {"beta": 0.7}),
}


def list_loss(
    name, logps, rewards=REWARDS, mask=MASK, lengths=LIST_LENGTHS, ref=LIST_REF, dtype=torch.float64
):
    logps, rewards, ref = (torch.as_tensor(x).to(dtype) for x in (logps, rewards, ref))
    loss = {"rrhf": dpo.rrhf_loss, "pro": dpo.pro_loss, "lipo": dpo.lipo_loss}[name.split()[0]]
    second = ref if name.startswith("lipo") else torch.as_tensor(lengths)
    return loss(
        logps, second, rewards, *([] if mask is None else [torch.as_tensor(mask)]), **LISTS[name][1]
    )


def list_formula(name, logps=LIST_LOGPS, rewards=REWARDS, sizes=SIZES):
    formula, options = LISTS[name]
    s = (
        options.get("beta", 0.1) * (logps - LIST_REF)
        if name.startswith("lipo")
        else logps / LIST_LENGTHS
    )
    options = {key: x for key, x in options.items() if key != "beta"}
    return [formula(s[b][:n], rewards[b][:n], **options) if n else 0.0 for b, n in enumerate(sizes)]


@pytest.mark.parametrize("name", LISTS)
def test_lists(name):
    """Every list as if it were alone; what lies in its padding matters not at all."""
    expected = list_formula(name)
    close(list_loss(name, LIST_LOGPS), expected)
    close(list_loss(name, LIST_LOGPS, dtype=torch.float32), expected, 1e-5, 1e-5)
    close(list_loss(name, LIST_LOGPS, mask=None), list_formula(name, sizes=[K] * len(SIZES)))
    (logps,) = f64(np.where(MASK, LIST_LOGPS, np.nan))
    loss = list_loss(
        name,
        logps,
        np.where(MASK, REWARDS, np.nan),
        lengths=LIST_LENGTHS * MASK,
        ref=np.where(MASK, LIST_REF, np.inf),
    )
    close(loss, expected)
    (grad,) = torch.autograd.grad(loss.sum(), logps)
    assert (
        grad.isfinite().all()
        and (grad[~torch.from_numpy(MASK)] == 0).all()
        and (grad[0] != 0).any()
    )
    assert torch.autograd.gradcheck(lambda x: list_loss(name, x), f64(LIST_LOGPS))


@pytest.mark.parametrize("name", LISTS)
def test_lists_in_any_order(name):
    """Neither the order of the lists nor, without ties, that within a list matters."""
    b, k = np.array([3, 0, 4, 2, 1]), np.array([2, 0, 3, 1])
    close(
        list_loss(name, LIST_LOGPS[b], REWARDS[b], MASK[b], LIST_LENGTHS[b], LIST_REF[b]),
        list_loss(name, LIST_LOGPS)[b],
    )
    moved = list_loss(
        name, *(x[:1, k] for x in (LIST_LOGPS, REWARDS, MASK, LIST_LENGTHS, LIST_REF))
    )
    close(moved, list_loss(name, LIST_LOGPS)[:1])
    whole = list_loss(name, LIST_LOGPS, REWARDS.astype(int), dtype=torch.float64)
    close(whole, list_formula(name, rewards=REWARDS.astype(int)))


def test_lists_of_two_are_pairs():
    logps, ref, n = np.stack([LC, LR], 1), np.stack([FC, FR], 1), np.stack([NC, NR], 1)
    rewards = np.tile([1.5, -0.5], (B, 1))
    gap = (2**1.5 - 2**-0.5) * (1 / math.log(2) - 1 / math.log(3))
    close(list_loss("lipo", logps, rewards, None, ref=ref), gap * formula("sigmoid"))
    close(list_loss("pro", logps, rewards, None, n), formula("simpo", b=1.0, gamma=0.0) - LC / NC)
    close(list_loss("rrhf", logps, rewards, None, n), np.maximum(0, LR / NR - LC / NC) - LC / NC)


def test_lipo_learns_from_its_start():
    """Where the policy is the reference all s are 0, and the better responses are still pushed up."""
    (logps,) = f64(LIST_REF[:1])
    (grad,) = torch.autograd.grad(
        list_loss("lipo", logps, REWARDS[:1], None, ref=LIST_REF[:1]).sum(), logps
    )
    assert grad[0, 1] < 0 < grad[0, 2]  # the best and the worst


def test_token_rewards_add_up_to_the_implicit_reward():
    logprobs, ref = RNG.uniform(-5, 0, (2, B, 7))
    rewards = dpo.token_rewards(torch.from_numpy(logprobs), torch.from_numpy(ref), beta=0.3)
    close(rewards, 0.3 * (logprobs - ref))
    close(rewards.sum(1), 0.3 * (logprobs.sum(1) - ref.sum(1)))


# What the losses learn, on tables small enough to know the answer

WINS = np.array(
    [[0.5, 0.9, 0.1], [0.1, 0.5, 0.9], [0.9, 0.1, 0.5]]
)  # rock, paper, scissors: P(row beats column)


def fit(ref, wins, **options):
    """The policy of a tabular pair_loss over all ordered pairs, labelled with the chance that the first wins."""
    n = len(ref)
    i, j = (torch.tensor(x) for x in np.nonzero(~np.eye(n, dtype=bool)))
    ref = torch.from_numpy(np.log(ref))
    logits = ref.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logits],
        max_iter=500,
        tolerance_grad=1e-12,
        tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )

    def loss():
        logps = logits.log_softmax(0)
        return dpo.pair_loss(
            "sigmoid",
            logps[i],
            logps[j],
            ref[i],
            ref[j],
            label_smoothing=1 - torch.from_numpy(wins)[i, j],
            **options,
        ).mean()

    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)
    return (logits.log_softmax(0) - ref).detach().numpy(), loss().item()


def test_implicit_rewards_are_those_of_bradley_and_terry():
    """Fitted to chances that come from rewards, b h gives the chances back, whatever the reference."""
    rewards = np.array([0.0, 1.0, -0.7, 2.2, 0.4])
    wins = sg(rewards[:, None] - rewards[None, :])
    for ref in (np.full(5, 0.2), np.array([0.5, 0.05, 0.2, 0.05, 0.2])):
        h, _ = fit(ref, wins, beta=0.5)
        close(sg(0.5 * (h[:, None] - h[None, :])), wins, 1e-5, 1e-5)


def test_no_reward_explains_a_cycle():
    """Rock, paper, scissors at 0.9: the best point rewards are equal, at log 2; a model of pairs would reach 0.3251."""
    h, loss = fit(np.array([0.5, 0.2, 0.3]), WINS)
    close(h, np.zeros(3), atol=1e-5)
    assert loss == pytest.approx(math.log(2), abs=1e-9)


def test_sppo_cycles_and_its_average_does_not():
    """Each round goes to the loss's minimum: pi <- pi exp(0.1 (P - 1/2)), renormalised. The loss is a square, so a slope finds it."""
    logits, policies = torch.tensor([1.0, 0.0, -0.5], dtype=torch.float64), []
    for _ in range(2000):
        logps = logits.log_softmax(0).requires_grad_()
        win = torch.from_numpy(WINS) @ logps.detach().exp()
        loss = dpo.pair_loss(
            "sppo",
            logps,
            logps.detach(),
            logps.detach(),
            logps.detach(),
            beta=10.0,
            chosen_win=win,
            rejected_win=0.5,
        )
        logits = logps.detach() - torch.autograd.grad(loss.sum(), logps)[0]
        policies.append(logps.detach().exp().numpy())
    policies = np.array(policies)
    far = np.abs(policies - 1 / 3).max(1)
    assert 0.3 < far[:500].max() < far[-500:].max() - 0.05  # it spirals outwards
    close(policies.mean(0), np.full(3, 1 / 3), 0, 0.02)
    step = policies[0] * np.exp(0.1 * (WINS @ policies[0] - 0.5))
    close(policies[1], step / step.sum())


def nash_md(mu, beta, steps=1500):
    """Gradient steps on the exact mean of the sampled loss over a table of three actions; the reference is uniform."""
    ref = torch.full((3,), 1 / 3, dtype=torch.float64).log()
    logits, far = torch.tensor([0.5, 0.0, -0.2], dtype=torch.float64, requires_grad=True), []
    for _ in range(steps):
        logps = logits.log_softmax(0)
        mixture = (mu * ref + (1 - mu) * logps.detach()).softmax(0)
        loss = (
            logps.detach().exp()
            * dpo.nash_md_loss(logps, ref, torch.from_numpy(WINS) @ mixture, beta=beta)
        ).sum()
        (grad,) = torch.autograd.grad(loss, logits)
        logits = (logits - 0.5 * grad).detach().requires_grad_()
        far.append((logps.exp() - 1 / 3).abs().max().item())
    return far


def test_nash_md_converges():
    """The last policy is the uniform one; without mixture and KL the same steps move away from it."""
    assert nash_md(mu=0.25, beta=0.1)[-1] < 1e-6
    far = nash_md(mu=0.0, beta=0.0)
    assert max(far[-300:]) > max(far[:300])


def test_nash_md_gradient_counts_the_kl_of_later_tokens():
    """Two tokens from a table: the mean gradient is the slope of -E[P] + b KL(pi || ref), by differences in NumPy."""
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
    logps = x.log_softmax(0)[:, None] + torch.from_numpy(second).log_softmax(
        1
    )  # (V, V), all responses
    loss = dpo.nash_md_loss(
        logps.flatten(),
        torch.from_numpy(joint(rf, rs)).flatten(),
        torch.from_numpy(win).flatten(),
        beta=b,
    )
    (grad,) = torch.autograd.grad((logps.detach().exp().flatten() * loss).sum(), x)
    slope = [(objective(first + d) - objective(first - d)) / 2e-5 for d in 1e-5 * np.eye(V)]
    close(grad, slope, 1e-7, 1e-9)
