"""Distances between rewards, and regret: known values, loops written here, what must hold or fail.

SPARSE, PATH and CLIFF are the gridworld of Gleave et al. 2021, nine states; other processes have
three to six states, drawn at random.
"""

import itertools

import numpy as np
import pytest

from minirlhf.rewards import distances as D
from minirlhf.rewards import regret as G
from minirlhf.rewards import study

SPARSE = (0, 0, 0, 0, 0, 0, 0, 0, 1)
PATH = (0, -1, -1, 0, 0, 0, -1, -1, 4)
CLIFF = (0, -1, -1, 0, 0, 0, -4, -4, 4)
GAMMA = 0.9


def drawn(seed, states=4, actions=3, least=-np.inf):
    """Two plain rewards and dynamics."""
    rng = np.random.default_rng(seed)
    T = G.random_mdp(rng, states, actions, least=least)
    return *rng.standard_normal((2, states, actions, states)), T


def shaped(R, seed=7):
    """R, shaped and scaled."""
    phi = 3 * np.random.default_rng(seed).standard_normal(len(R))
    return 2.5 * (R + GAMMA * phi[None, None, :] - phi[:, None, None])


def redistributed(R, T, seed=8):
    """R plus what has mean 0 over s' ~ T(s, a)."""
    noise = np.random.default_rng(seed).standard_normal(R.shape)
    return R + noise - (T * noise).sum(-1, keepdims=True)


def all_distances(R1, R2, T):
    how = dict(discount=GAMMA)
    return {
        "EPIC": D.epic_distance(R1, R2, **how),
        "DARD": D.dard_distance(R1, R2, T, **how),
        "minimal": D.epic_like_distance(R1, R2, canonicalisation="minimal", **how),
        "STARC": D.starc_distance(R1, R2, T, **how),
        "STARC minimal": D.starc_distance(R1, R2, T, canonicalisation="minimal", **how),
    }


# Known values


@pytest.mark.parametrize(
    "first, second, epic, without_half",
    [(SPARSE, PATH, 0.160182, 0.320364), (SPARSE, CLIFF, 0.367559, 0.735118)]
    + [(PATH, CLIFF, 0.267213, 0.534426)],
)
@pytest.mark.parametrize("of_next", [True, False])
@pytest.mark.parametrize("discount", [0.5, 0.99, 1.0])
def test_gridworld_values(first, second, epic, without_half, of_next, discount):
    """Under uniform coverage neither the discount nor R(s) or R(s') matters, nor do dynamics."""
    R1, R2 = (np.array(values, dtype=float) for values in (first, second))
    R1, R2 = (R[None, None, :] if of_next else R[:, None, None] for R in (R1, R2))
    R1, R2 = (np.broadcast_to(R, (9, 5, 9)) for R in (R1, R2))
    assert D.epic_distance(R1, R2, discount=discount) == pytest.approx(epic, abs=5e-7)
    # the known figures of this form leave out the factor ½
    like = D.epic_like_distance(R1, R2, discount=discount)
    assert 2 * like == pytest.approx(without_half, abs=1e-6)


def test_pearson_by_hand():
    assert D.pearson_distance([1, 2, 3], [2, 4, 6]) == pytest.approx(0, abs=1e-12)
    assert D.pearson_distance([1, 2, 3], [3, 2, 1]) == pytest.approx(1)
    assert D.pearson_distance([1, -1, 0, 0], [0, 0, 1, -1]) == pytest.approx(np.sqrt(0.5))
    assert D.pearson_distance([1, 1], [5, 5]) == 0
    assert D.pearson_distance([0.1] * 3, [1, 2, 3]) == pytest.approx(0.5, abs=1e-12)
    x, y, w = [1.0, 4.0, 2.0], [3.0, 1.0, 1.0], [1, 2, 3]  # weights are repetitions
    many = np.corrcoef(np.repeat(x, w), np.repeat(y, w))[0, 1]
    assert D.pearson_distance(x, y, w) == pytest.approx(np.sqrt((1 - many) / 2))


# Canonical rewards against loops


def test_epic_and_dard_by_loops():
    R, _, T = drawn(0, states=3, actions=2)
    to, by = np.array([0.2, 0.3, 0.5]), np.array([0.4, 0.6])
    epic, dard = np.zeros(R.shape), np.zeros(R.shape)
    everywhere = list(itertools.product(range(3), range(2), range(3)))
    for s, a, t in everywhere:
        epic[s, a, t] = dard[s, a, t] = R[s, a, t]
        for x, b, y in everywhere:  # S = x, A = b, S' = y
            gain = GAMMA * R[t, b, y] - R[s, b, y] - GAMMA * R[x, b, y]
            epic[s, a, t] += to[x] * by[b] * to[y] * gain
            dard[s, a, t] += by[b] * GAMMA * T[t, b, y] * R[t, b, y] / 3
            dard[s, a, t] -= by[b] * T[s, b, y] * R[s, b, y] / 3
            dard[s, a, t] -= GAMMA * by[b] * T[s, b, x] * T[t, b, y] * R[x, b, y]
    made = D.epic_canonical(R, discount=GAMMA, state_dist=to, action_dist=by)
    np.testing.assert_allclose(made, epic, atol=1e-12)
    made = D.dard_canonical(R, T, discount=GAMMA, action_dist=by)
    np.testing.assert_allclose(made, dard, atol=1e-12)


def test_val_is_the_advantage():
    R, _, T = drawn(1, states=3, actions=2)
    pi = np.array([[0.3, 0.7], [1.0, 0.0], [0.5, 0.5]])
    values = np.zeros(3)
    for _ in range(600):  # Bellman's equation, iterated
        worth = np.zeros((3, 2))
        for s, a, t in itertools.product(range(3), range(2), range(3)):
            worth[s, a] += T[s, a, t] * (R[s, a, t] + GAMMA * values[t])
        values = np.array([pi[s] @ worth[s] for s in range(3)])
    made = D.val_canonical(R, T, discount=GAMMA, pi=pi)
    for t in range(3):
        np.testing.assert_allclose(made[:, :, t], worth - values[:, None], atol=1e-10)


def test_minimal_is_least():
    """No shaping makes the weighted norm smaller: its derivative is 0, by central differences."""
    R, _, T = drawn(2, states=3, actions=2)
    weights = np.random.default_rng(0).random(R.shape)
    made = D.minimal_canonical(R, discount=GAMMA, coverage=weights)
    flat = D.starc_minimal_canonical(R, T, discount=GAMMA, coverage=weights.sum(2))[:, :, 0]
    for s in range(3):
        phi = 1e-4 * np.eye(3)[s]
        move = GAMMA * phi[None, None, :] - phi[:, None, None]
        sizes = [(weights * (made + sign * move) ** 2).sum() for sign in (1, -1)]
        assert abs(sizes[0] - sizes[1]) < 1e-12
        move = GAMMA * T @ phi - phi[:, None]
        sizes = [(weights.sum(2) * (flat + sign * move) ** 2).sum() for sign in (1, -1)]
        assert abs(sizes[0] - sizes[1]) < 1e-12


@pytest.mark.parametrize("kind", D.CANONICALISATIONS)
def test_canonical_is_linear_and_forgets(kind):
    R1, R2, T = drawn(3)

    def c(R):
        return D.canonical(R, kind, discount=GAMMA, T=T)

    np.testing.assert_allclose(c(2 * R1 - 3 * R2), 2 * c(R1) - 3 * c(R2), atol=1e-10)
    if kind in ("minimal", "val", "starc_minimal"):
        np.testing.assert_allclose(c(c(R1)), c(R1), atol=1e-10)
    unit = np.eye(R1.size).reshape(-1, *R1.shape)
    rank = np.linalg.matrix_rank(np.stack([c(R).ravel() for R in unit]), tol=1e-9)
    whole = R1.size if kind == "none" else R1.size - 4
    assert rank == (4 * 3 - 4 if kind in ("val", "starc_minimal") else whole)


# What must hold, and what must fail


@pytest.mark.parametrize("seed", range(3))
def test_shaped_and_scaled_is_the_same(seed):
    R1, R2, T = drawn(seed, least=0.0)
    assert max(all_distances(R1, shaped(R1), T).values()) < 1e-10
    before, after = all_distances(R1, R2, T), all_distances(shaped(R1), R2, T)
    assert before == pytest.approx(after, abs=1e-10)
    assert list(all_distances(R1, -shaped(R1), T).values()) == pytest.approx([1] * 5, abs=1e-10)


def test_only_starc_forgets_redistribution():
    R1, _, T = drawn(4)
    found = all_distances(R1, redistributed(shaped(R1), T), T)
    assert max(found["STARC"], found["STARC minimal"]) < 1e-10
    assert min(found["EPIC"], found["DARD"], found["minimal"]) > 0.1


def test_only_starc_forgets_impossible_transitions():
    R1, _, T = drawn(5, states=6, least=0.5)
    assert (T == 0).any()
    bumped = R1 + 3 * (T == 0) * np.random.default_rng(1).standard_normal(R1.shape)
    found = all_distances(R1, bumped, T)
    assert max(found["STARC"], found["STARC minimal"]) < 1e-10
    assert min(found["EPIC"], found["DARD"]) > 0.05
    # where the next state depends on the action alone, DARD does not read them either
    T = np.broadcast_to(np.eye(3), (3, 3, 3))
    R1 = np.random.default_rng(2).standard_normal((3, 3, 3))
    bumped = R1 + 5 * (T == 0) * np.random.default_rng(3).standard_normal((3, 3, 3))
    found = all_distances(R1, bumped, T)
    assert found["DARD"] < 1e-10 < 0.05 < found["EPIC"]


def test_a_reward_that_orders_nothing():
    R1, _, T = drawn(6)
    nothing = shaped(np.zeros(R1.shape))
    assert list(all_distances(nothing, 2 * nothing, T).values()) == [0] * 5
    assert list(all_distances(R1, nothing, T).values()) == pytest.approx([0.5] * 5)


@pytest.mark.parametrize("norm", ["L1", "L2", "Linf"])
def test_norms_by_loops(norm):
    R1, R2, T = drawn(7, states=3, actions=2)
    weights = np.random.default_rng(4).random(R1.shape)
    weights[0, 1, 2] = 0
    weights /= weights.sum()

    def size(x):
        terms = [(w, abs(v)) for w, v in zip(weights.ravel(), x.ravel(), strict=True) if w > 0]
        sums = {"L1": sum(w * v for w, v in terms), "Linf": max(v for _, v in terms)}
        return {**sums, "L2": sum(w * v * v for w, v in terms) ** 0.5}[norm]

    made = D.epic_like_distance(
        R1, R2, canonicalisation="none", norm=norm, metric=norm, coverage=weights
    )
    assert made == pytest.approx(size(R1 / size(R1) - R2 / size(R2)) / 2, abs=1e-12)


def test_epic_sample():
    R1, R2, _ = drawn(8, states=3, actions=2)
    mesh = [x.ravel() for x in np.indices(R1.shape)]
    batch = [x.ravel() for x in np.indices(R1.shape[1:])]
    first, second, again = (lambda s, a, t, R=R: R[s, a, t] for R in (R1, R2, shaped(R1)))
    made = D.epic_sample(first, second, mesh, batch, discount=GAMMA)
    assert made == pytest.approx(D.epic_distance(R1, R2, discount=GAMMA), abs=1e-12)
    few, some = [x[::4] for x in mesh], [x[1:4] for x in batch]
    assert D.epic_sample(first, again, few, some, discount=GAMMA) < 1e-10


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda R, T: D.epic_distance(R[0], R[0]), "expected \\(S, A, S\\)"),
        (lambda R, T: D.epic_distance(R, R[:, :1]), "differ in shape"),
        (lambda R, T: D.epic_distance(R * np.nan, R), "not finite"),
        (lambda R, T: D.dard_distance(R, R, 2 * T), "sum to 1"),
        (lambda R, T: D.starc_distance(R, R, T, discount=1), "discount"),
        (lambda R, T: D.starc_distance(R, R, T, pi=np.ones((4, 3))), "pi must"),
        (lambda R, T: D.starc_distance(R, R, T, canonicalisation="epic"), "val or minimal"),
        (lambda R, T: D.epic_like_distance(R, R, canonicalisation="val"), "needs the dynamics"),
        (lambda R, T: D.epic_like_distance(R, R, norm="L3"), "L1, L2 or Linf"),
        (lambda R, T: D.epic_distance(R, R, coverage=-np.ones(R.shape)), "coverage must"),
        (lambda R, T: G.worst_regret(R, R, T, start=[1, 0]), "start has shape"),
    ],
)
def test_mistakes_are_said(call, message):
    R, _, T = drawn(9)
    with pytest.raises(ValueError, match=message):
        call(R, T)


# Regret against all deterministic policies


def returns_by_loops(R, T, start, discount):
    """J of each deterministic policy of 3 states, 2 actions, by iterating its values."""
    found = []
    for choice in itertools.product(range(2), repeat=3):
        values = np.zeros(3)
        for _ in range(400):
            values = np.array(
                [
                    sum(T[s, a, t] * (R[s, a, t] + discount * values[t]) for t in range(3))
                    for s, a in enumerate(choice)
                ]
            )
        found.append(start @ values)
    return np.array(found)


@pytest.mark.parametrize("seed", range(4))
def test_regret_by_enumeration(seed):
    R1, R2, T = drawn(20 + seed, states=3, actions=2)
    start, how = np.array([0.5, 0.2, 0.3]), dict(discount=0.8)
    J1, J2 = (returns_by_loops(R, T, start, 0.8) for R in (R1, R2))
    first = (J1.max() - J1[J2.argmax()]) / np.ptp(J1)
    second = (J2.max() - J2[J1.argmax()]) / np.ptp(J2)
    assert G.regret(R1, R2, T, start=start, **how) == pytest.approx(first, abs=1e-9)
    mean = G.mean_regret(R1, R2, T, start=start, **how)
    assert mean == pytest.approx((first + second) / 2, abs=1e-9)
    # a stochastic policy reaches every mixture of two deterministic ones; a dense grid of levels
    part = np.linspace(0, 1, 801)
    i, j = np.triu_indices(8)
    one, two = (J[i][:, None] * part + J[j][:, None] * (1 - part) for J in (J1, J2))
    one, two = one.ravel(), two.ravel()
    order = np.argsort(two)
    one, two = one[order], two[order]
    below, above = np.maximum.accumulate(one), np.minimum.accumulate(one[::-1])[::-1]
    deterministic = max(
        a - b for a, c in zip(J1, J2, strict=True) for b, d in zip(J1, J2, strict=True) if d >= c
    )
    worst = G.worst_regret(R1, R2, T, start=start, **how)
    assert worst == pytest.approx((below - above).max() / np.ptp(J1), abs=5e-3)
    assert worst >= deterministic / np.ptp(J1) - 1e-9


@pytest.mark.parametrize("seed", range(3))
def test_worst_regret_of_same_and_opposite(seed):
    R1, _, T = drawn(seed, states=6)
    same = redistributed(shaped(R1), T)
    assert G.worst_regret(R1, same, T, discount=GAMMA) < 1e-6
    assert G.worst_regret(R1, -same, T, discount=GAMMA) == pytest.approx(1)
    assert G.mean_regret(R1, same, T, discount=GAMMA) < 1e-9


def test_starc_bounds_and_ranks_worst_regret():
    """Sound: regret / distance stays bounded. EPIC has no bound: equal to 0 regret far away."""
    ratios, far, distance, worst = [], [], [], []
    for seed in range(25):
        R1, R2, T = drawn(100 + seed, states=5, actions=2)
        part = seed / 24
        mixed = redistributed((1 - part) * R1 + part * R2, T)
        distance.append(D.starc_distance(R1, mixed, T, discount=GAMMA))
        worst.append(G.worst_regret(R1, mixed, T, discount=GAMMA))
        if seed:
            ratios.append(worst[-1] / distance[-1])
        far.append(D.epic_distance(R1, mixed, discount=GAMMA))
    assert max(ratios) < 5
    assert far[0] > 0.1 and worst[0] < 1e-6
    order = [np.argsort(np.argsort(x)) for x in (distance, worst)]
    assert np.corrcoef(*order)[0, 1] > 0.8


def test_study_prints_its_table(capsys):
    small = ["--states=6", "--actions=2", "--steps=4", "--processes=2", "--seeds=1"]
    study.main(small)
    plain = capsys.readouterr().out
    assert "STARC (VAL)" in plain and "worst-case" in plain
    for flag in ("--plain", "--dense"):
        study.main([*small, flag])
        assert capsys.readouterr().out != plain


def test_ranks_share_ties():
    assert study.ranks(np.array([3.0, 1.0, 3.0, 0.0])).tolist() == [2.5, 1, 2.5, 0]
