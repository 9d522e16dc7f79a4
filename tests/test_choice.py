"""The likelihoods of eleven kinds: loops over NumPy numbers, differences, invariants."""

import itertools
import math

import numpy as np
import pytest
import torch

from minirlhf import reward
from minirlhf.feedback import choice

RNG = np.random.default_rng(0)
INF = math.inf
VALUES = RNG.normal(size=(5, 4))
VALUES[1, 3] = VALUES[2, 2] = VALUES[2, 3] = -INF
CHOSEN = np.array([0, 2, 1, 3, 2])
TIERS = np.array([[0, 1, 1, 2], [1, 0, 1, 9], [0, 0, 9, 9], [3, 2, 1, 0], [0, 0, 0, 0]])
SCORES, LEVELS, CUTS = RNG.normal(size=5), np.array([0, 1, 2, 3, 1]), np.array([-1.0, 0.2, 0.9])
CURVE = np.array([[0, 0.5, 0.45, 1], [1, 0.2, 0, 0], [0.5, 0.4, 0, 0], [0, 0, 0, 0], [0, 1, 0, 1]])
SHOWN = np.array([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4], [0.1, 0.2, 0.7]])
FACES, BAD = np.array([0, 2, 1, 2, 0]), np.array([True, False, True, False, False])
EMBEDDED, ODD = RNG.normal(size=(5, 3, 2)), np.array([0, 1, 2, 1, 0])
BETA = 1.7


def t(x):
    return torch.as_tensor(x)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def known(row):
    return [v for v in row if v > -INF]


# Each loss in loops


def chosen_by_hand(values):
    out = []
    for row, c in zip(values, CHOSEN, strict=True):
        p = [math.exp(BETA * v) for v in known(row)]
        out.append(-math.log(p[c] / sum(p)))
    return out


def ranked_by_hand(values):
    out = []
    for row in values:
        left, total = known(row), 0
        while left:
            total -= math.log(math.exp(BETA * left[0]) / sum(math.exp(BETA * v) for v in left))
            left = left[1:]
        out.append(total)
    return out


def tiers_by_hand(values):
    out = []
    for row, tier in zip(values, TIERS, strict=True):
        losses = []
        for i, j in itertools.combinations(range(len(known(row))), 2):
            d = BETA * (row[i] - row[j])
            label = 0.5 if tier[i] == tier[j] else float(tier[i] < tier[j])
            losses.append(-label * math.log(sigmoid(d)) - (1 - label) * math.log(sigmoid(-d)))
        out.append(np.mean(losses))
    return out


def levels_by_hand(scores):
    out = []
    for r, level in zip(scores, LEVELS, strict=True):
        at_most = [0, *(sigmoid(BETA * (c - r)) for c in CUTS), 1]
        out.append(-math.log(at_most[level + 1] - at_most[level]))
    return out


def faces_by_hand(scores):
    out = []
    for r, face in zip(scores, FACES, strict=True):
        at_most = [0, *(sigmoid(BETA * (c - r)) for c in CUTS), 1]
        out.append(-math.log(sum(SHOWN[q, face] * (at_most[q + 1] - at_most[q]) for q in range(4))))
    return out


def bad_by_hand(values):
    out = []
    for row, bad in zip(values, BAD, strict=True):
        p = math.prod(sigmoid(BETA * (0.3 - v)) for v in known(row))
        out.append(-math.log(p if bad else 1 - p))
    return out


def sketch_by_hand(values, loss):
    out = []
    for row, curve in zip(values, CURVE, strict=True):
        n = len(known(row))
        pairs = [(i, j) for i in range(n) for j in range(n) if curve[j] - curve[i] > 0.1]
        out.append(np.mean([loss(row[j] - row[i]) for i, j in pairs]) if pairs else 0)
    return out


def trace_by_hand(values):
    out = []
    for row in values:
        pairs = itertools.combinations(known(row), 2)
        out.append(np.mean([-math.log(sigmoid(later - early)) for early, later in pairs]))
    return out


def d2(a, b):
    return ((a - b) ** 2).sum()


def triplet_by_hand(embedded):
    out = []
    for e, odd in zip(embedded, ODD, strict=True):
        a, p = (e[i] for i in range(3) if i != odd)
        n = e[odd]
        out.append(max(0, d2(a, p) - d2(a, n) + 1) + max(0, d2(p, a) - d2(p, n) + 1))
    return out


def odd_by_hand(embedded):
    out = []
    for e, odd in zip(embedded, ODD, strict=True):
        p = [math.exp(-BETA * d2(*(e[i] for i in range(3) if i != k))) for k in range(3)]
        out.append(-math.log(p[odd] / sum(p)))
    return out


def rest_by_hand(rest):
    return [-math.log(sigmoid(-BETA * r if off else BETA * r))
            for r, off in zip(rest, BAD, strict=True)]  # fmt: skip


def improved_by_hand(after):
    out = []
    for a, b, n in zip(after, SCORES, LEVELS, strict=True):
        out.append(-math.log(sigmoid(BETA * (a - 0.3 * n - b))))
    return out


CASES = {
    "choice": (VALUES, lambda v: choice.choice_nll(v, t(CHOSEN), BETA), chosen_by_hand),
    "ranking": (VALUES, lambda v: choice.ranking_nll(v, BETA), ranked_by_hand),
    "tiers": (VALUES, lambda v: choice.tiers_nll(v, t(TIERS), BETA), tiers_by_hand),
    "critique": (SCORES, lambda r: choice.critique_nll(r, t(LEVELS), t(CUTS), BETA),
                 levels_by_hand),
    "social": (SCORES, lambda r: choice.social_nll(r, t(FACES), t(CUTS), t(SHOWN), BETA),
               faces_by_hand),
    "both bad": (VALUES, lambda v: choice.both_bad_nll(v, t(BAD), 0.3, BETA), bad_by_hand),
    "sketch": (VALUES, lambda v: choice.sketch_nll(v, t(CURVE), beta=BETA),
               lambda v: sketch_by_hand(v, lambda d: -math.log(sigmoid(BETA * d)))),
    "hinge": (VALUES, lambda v: choice.sketch_hinge(v, t(CURVE)),
              lambda v: sketch_by_hand(v, lambda d: max(0, 0.1 - d))),
    "trace": (VALUES, choice.trace_nll, trace_by_hand),
    "triplet": (EMBEDDED, lambda e: choice.triplet_hinge(e, t(ODD)), triplet_by_hand),
    "odd": (EMBEDDED, lambda e: choice.odd_nll(e, t(ODD), BETA), odd_by_hand),
    "e-stop": (SCORES, lambda r: choice.estop_binary_nll(r, t(BAD), BETA), rest_by_hand),
    "improvement": (CUTS[[0, 1, 2, 0, 1]],
                    lambda a: choice.improvement_nll(t(SCORES), a, t(LEVELS), 0.3, BETA),
                    improved_by_hand),
    "occlusion": (SCORES, lambda r: choice.occlusion_penalty(r, t(LEVELS)),
                  lambda r: [(a - b) ** 2 for a, b in zip(r, LEVELS, strict=True)]),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name):
    start, loss, by_hand = CASES[name]
    x = torch.tensor(start, requires_grad=True)
    found = loss(x)
    np.testing.assert_allclose(found.detach(), by_hand(start), rtol=1e-10, atol=1e-10)
    (gradient,) = torch.autograd.grad(found.sum(), x)
    for place in zip(*np.nonzero(start > -INF), strict=True):
        up, down = start.copy(), start.copy()
        up[place] += 1e-5
        down[place] -= 1e-5
        slope = (np.sum(by_hand(up)) - np.sum(by_hand(down))) / 2e-5
        assert gradient[place].item() == pytest.approx(slope, abs=1e-6)
    assert not gradient[t(start == -INF)].any()


# What must hold


def test_a_choice():
    v, chosen = t(VALUES), t(CHOSEN)
    loss = choice.choice_nll(v, chosen, BETA)
    torch.testing.assert_close(choice.choice_nll(v + 3, chosen, BETA), loss)
    every = [choice.choice_nll(v, torch.full((5,), k), BETA) for k in range(4)]
    torch.testing.assert_close((-torch.stack(every)).exp().sum(0), torch.ones(5).double())
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(choice.choice_nll(v[:, order], order.argsort()[chosen], BETA), loss)
    x = v.clone().requires_grad_()
    optimizer = torch.optim.Adam([x], 0.05)
    for _ in range(20):
        optimizer.zero_grad()
        choice.choice_nll(x, chosen).sum().backward()
        optimizer.step()
    assert (choice.choice_nll(x, chosen) < choice.choice_nll(v, chosen)).all()


def test_critiques():
    r, cuts, beta = t(SCORES), t(CUTS), BETA
    p = choice.level_log_probs(r, cuts, beta).exp()
    assert (p >= 0).all()
    torch.testing.assert_close(p.sum(1), torch.ones(5).double())
    torch.testing.assert_close(choice.level_log_probs(r + 2, cuts + 2, beta).exp(), p)
    assert (choice.level_log_probs(r + 0.1, cuts, beta)[:, -1] > p[:, -1].log()).all()
    far = torch.tensor([0.2, INF]).double()
    two = choice.level_log_probs(r, far[:1], beta)
    torch.testing.assert_close(choice.level_log_probs(r, far, beta)[:, :2], two)
    torch.testing.assert_close(two[:, 1], torch.nn.functional.logsigmoid(beta * (r - 0.2)))


def test_rankings():
    pair = t(VALUES)[:, :2]
    bt = reward.bradley_terry_loss(pair[:, 0], pair[:, 1])
    torch.testing.assert_close(choice.ranking_nll(pair).mean(), bt)
    strict = torch.tensor([[0, 1]] * 5)
    torch.testing.assert_close(choice.tiers_nll(pair, strict).mean(), bt)
    four = t(VALUES)[[0]]
    total = sum(
        (-choice.ranking_nll(four[:, list(o)])).exp() for o in itertools.permutations(range(4))
    )
    torch.testing.assert_close(total, torch.ones(1).double())
    places = torch.arange(4)[None]
    assert abs(choice.tiers_nll(four, places) - choice.ranking_nll(four)) > 0.1
    first = choice.choice_nll(four, torch.tensor([0]))
    rest = choice.ranking_nll(four[:, 1:])
    torch.testing.assert_close(choice.ranking_nll(four), first + rest)
    assert choice.ranking_nll(four[:, 3:]) == 0


def test_soft_labels():
    """Cross entropy by hand; least where the model's chance is p; p = 1 is a plain preference."""
    values, p = t([[0.7, -0.4], [0.1, 0.3]]), t([0.8, 0.25])
    expected = []
    for (a, b), chance in zip(values.tolist(), p.tolist(), strict=True):
        model = 1 / (1 + math.exp(-2.0 * (a - b)))
        expected.append(-chance * math.log(model) - (1 - chance) * math.log(1 - model))
    torch.testing.assert_close(choice.soft_nll(values, p, 2.0), t(expected))
    sure = torch.ones(2).double()
    torch.testing.assert_close(choice.soft_nll(values, sure), choice.ranking_nll(values))
    there = t([[math.log(4.0), 0.0]]).requires_grad_()
    choice.soft_nll(there, p[:1]).sum().backward()
    torch.testing.assert_close(there.grad, torch.zeros(1, 2), atol=1e-6, rtol=0)


def test_curves():
    v, curve = t(VALUES)[[0, 3]], t(CURVE)[[0, 4]]
    same_order = torch.where(curve > 0.4, curve + 1, curve)
    for loss in (choice.sketch_hinge, choice.sketch_nll):
        torch.testing.assert_close(loss(v, same_order), loss(v, curve))
        assert not loss(v, torch.full_like(curve, 0.5)).any()
        level = torch.zeros(2, 4, dtype=torch.float64, requires_grad=True)
        ahead = [torch.autograd.grad(loss(level, c).sum(), level)[0] for c in (curve, -curve)]
        torch.testing.assert_close(ahead[0], -ahead[1])


def test_proxies():
    features, w = t(RNG.normal(size=(6, 3))), t(RNG.normal(size=(4, 3)))
    written = choice.proxy_weights(features, w)
    for k, n in itertools.product(range(4), range(6)):
        e = [math.exp(w[k] @ f) for f in features]
        assert written[k, n].item() == pytest.approx(e[n] / sum(e), abs=1e-10)
    gold = (features @ w[0] + 5)[None]  # proxy 0 up to a shift
    proxies = torch.stack([w[0] * 9, w[0], *w[1:]])
    values = choice.expected_values(gold, choice.proxy_weights(features, proxies)[None])
    assert values.argmax() == 0  # the same at a lower temperature: it does make a difference
    certain = [choice.choice_nll(values[:, 1:], torch.tensor([k]), 1e3).item() for k in range(4)]
    assert np.argmin(certain) == 0
    equal = choice.proxy_weights(features, torch.stack([w[1], w[1], w[2]]))[None]
    nll = [
        choice.choice_nll(choice.expected_values(gold, equal), torch.tensor([k])) for k in (0, 1)
    ]
    assert nll[0] == nll[1]


def test_faces():
    r, cuts, levels = t(SCORES), t(CUTS[:2]), t(LEVELS % 3)
    certain = torch.eye(3).double()
    found = choice.social_nll(r, levels, cuts, certain)
    torch.testing.assert_close(found, choice.critique_nll(r, levels, cuts))
    x = r.clone().requires_grad_()
    choice.social_nll(x, levels, cuts, certain[[0, 0, 0]] * 0 + 1 / 3).sum().backward()
    assert x.grad.abs().max() < 1e-12
    counts = torch.tensor([[5.0, 0, 1], [0, 0, 0], [2, 2, 2]])
    expected = [[6 / 9, 1 / 9, 2 / 9], [1 / 3] * 3, [1 / 3] * 3]
    torch.testing.assert_close(choice.confusion(counts), torch.tensor(expected))


def test_improvements():
    before, after, edits = t(SCORES), t(SCORES[::-1].copy()), torch.tensor([1, 2, 1, 1, 3])
    bt = choice.ranking_nll(torch.stack([after, before], 1))
    torch.testing.assert_close(choice.improvement_nll(before, after, edits), bt)
    assert (choice.improvement_nll(before, after, edits, cost=1e3) > 500).all()
    edited = torch.tensor([[0, 1, 1, 0, 1], [0, 0, 0, 0, 0], [1, 1, 0, 1, 1]]).bool()
    rewards = choice.intervention_rewards(edited)
    assert rewards.tolist() == [[0, -1, 0, 0, -1], [0] * 5, [-1, 0, 0, -1, 0]]


def test_utterances():
    counts = torch.tensor([1.0, 3, 0, 3, 1])
    assert choice.utterance_weights(counts, counts[0], True).tolist() == [0, 0.5, 0, 0.5, 0]
    assert choice.utterance_weights(counts, counts[0], False).tolist() == [0, 0, 1, 0, 0]
    assert choice.utterance_weights(counts, counts[1], True).tolist() == [1, 0, 0, 0, 0]
    values = t(RNG.normal(size=(1, 5)))
    grounded = torch.stack([choice.utterance_weights(counts, 1, True)] * 2).double()
    alike = choice.expected_values(values, grounded[None])
    torch.testing.assert_close(alike[0, 0], values[0, [1, 3]].mean())
    assert choice.choice_nll(alike, torch.tensor([0])).item() == pytest.approx(math.log(2))


def test_estops():
    prefixes = torch.cat([torch.zeros(5, 1), t(VALUES[:, :2]).float().cumsum(1)], 1)
    stop = torch.tensor([0, 1, 2, 0, 2])
    more = prefixes + 0.5 * torch.arange(3)  # a constant for each token is no constant
    assert (choice.choice_nll(more, stop) - choice.choice_nll(prefixes, stop)).abs().min() > 0.01
    rest = torch.tensor([2.0])
    ran, off = (choice.estop_binary_nll(rest, torch.tensor([s])) for s in (False, True))
    assert ran < math.log(2) < off
    torch.testing.assert_close((-ran).exp() + (-off).exp(), torch.ones(1))


def test_traces():
    psi = t(VALUES)
    torch.testing.assert_close(choice.trace_nll(psi + 2), choice.trace_nll(psi))
    four = psi[[0]]
    torch.testing.assert_close(choice.trace_nll(four.flip(1)), choice.trace_nll(-four))
    x = torch.zeros(1, 4, requires_grad=True)
    optimizer = torch.optim.Adam([x], 0.1)
    for _ in range(50):
        optimizer.zero_grad()
        choice.trace_nll(x).sum().backward()
        optimizer.step()
    assert (x.diff(dim=1) > 0).all()


def test_similar_texts():
    turned, _ = torch.linalg.qr(t(RNG.normal(size=(2, 2))))
    moved = t(EMBEDDED) @ turned + 3
    for loss in (choice.triplet_hinge, choice.odd_nll):
        torch.testing.assert_close(loss(moved, t(ODD)), loss(t(EMBEDDED), t(ODD)))
        assert not torch.allclose(loss(2 * moved, t(ODD)), loss(moved, t(ODD)))


# Rationality


@pytest.mark.parametrize("beta", [0.3, 1.0, 3.0])
def test_fit_beta(beta):
    rng = np.random.default_rng(1)
    values = rng.normal(size=(2000, 4))
    chosen = (beta * values + rng.gumbel(size=values.shape)).argmax(1)
    assert choice.fit_beta(t(values), t(chosen)) == pytest.approx(beta, rel=0.15)


def test_fit_beta_at_its_ends():
    values = t(VALUES[[0, 3, 4]])
    assert choice.fit_beta(values, values.argmax(1), cap=20) == 20
    assert choice.fit_beta(values, values.argmin(1)) == 0
    assert choice.fit_beta(torch.zeros(3, 4), torch.tensor([0, 1, 2])) == 1
    missing = torch.cat([values, torch.full((3, 2), -INF)], 1)
    chosen = torch.tensor([0, 1, 2])
    assert choice.fit_beta(missing, chosen) == pytest.approx(choice.fit_beta(values, chosen))
