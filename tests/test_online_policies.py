"""online: LPbRL, PbOP, PARL and the choice of pairs, beside loops, differences and other ways."""

from itertools import product

import numpy as np
import pytest
import torch

from minirlhf.engine.cli import UserError
from minirlhf.online import command, lpbrl, parl, pbop, policies, pools, select
from minirlhf.online.select import NOTHING, Labelled, Pool


def rng_of(seed):
    return np.random.default_rng(seed)


def differences(f, x, step=1e-5):
    """The gradient of a number f(x) by central differences."""
    gradient = np.zeros_like(x)
    for place in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[place] += step
        down[place] -= step
        gradient[place] = (f(up) - f(down)) / (2 * step)
    return gradient


def symmetric_chances(rng, *shape):
    """P(i over j) (..., K, K) of scores."""
    scores = rng.normal(size=shape)
    return 1 / (1 + np.exp(scores[..., None, :] - scores[..., :, None]))


# Policies


def test_menu():
    menu = policies.menus(rng_of(0), runs=3, policies=2000, d=4, size=5)
    assert np.isclose((menu.features**2).sum(-1).mean(), 1, atol=0.05)
    assert np.allclose((menu.weights**2).sum(1), 25)
    by_hand = [[row @ w for row in table] for table, w in zip(*menu, strict=True)]
    assert np.allclose(menu.values, by_hand)


def test_record():
    record = policies.Record(np.array([[4.0, 2, 2, 1]]), np.zeros((1, 4)))
    assert record.cumulative.tolist() == [[4, 6, 8, 9]]
    assert record.second_over_first.tolist() == [0.5]


def test_any_two_are_two():
    pairs = policies.any_two(rng_of(0), 2000, 3)
    assert set(map(tuple, pairs.tolist())) == {
        (a, b) for a, b in product(range(3), repeat=2) if a != b
    }


def test_widest_of_the_allowed():
    width = np.array([[[0, 1, 9], [1, 0, 2], [9, 2, 0.0]]])
    for allowed, pair in ([1, 1, 1], {0, 2}), ([0, 1, 1], {1, 2}), ([0, 1, 0], {1}):
        assert set(policies.widest(width, np.array([allowed], bool))[0].tolist()) == pair


# LPbRL


def test_widths_and_the_plausible_set():
    rng = rng_of(1)
    features = rng.normal(size=(2, 5, 3))
    roots = rng.normal(size=(2, 3, 3))
    design = roots @ roots.swapaxes(1, 2) + np.eye(3)
    values = rng.normal(size=(2, 5))
    width, maybe = lpbrl.widths(features, design), lpbrl.plausible(values, np.ones((2, 5, 5)), 0.7)
    for n, a in product(range(2), range(5)):
        assert maybe[n, a] == all(values[n, a] - values[n, b] + 0.7 >= 0 for b in range(5))
        for b in range(5):
            x = features[n, a] - features[n, b]
            assert np.isclose(width[n, a, b] ** 2, x @ np.linalg.inv(design[n]) @ x)


def record_of(name, runs=10, queries=300):
    menu = policies.menus(rng_of(0), runs)
    return lpbrl.run(menu, rng_of(1), queries, lpbrl.CHOICES[name])


def test_lpbrl_stops_losing():
    ours, uniform = record_of("lpbrl, gamma 2"), record_of("uniform")
    double = record_of("thompson")
    total = ours.cumulative[:, -1].mean()
    assert total < uniform.cumulative[:, -1].mean() / 10  # measured: 1/19; asked for: 1/5
    assert 1.2 * total < double.cumulative[:, -1].mean() < 2.5 * total
    assert ours.regret[:, 150:].sum() < 0.15 * ours.regret[:, :150].sum()
    assert uniform.second_over_first.min() > 0.8
    assert uniform.greedy[:, -1].mean() < 0.1  # it learns as well; the price is what is shown


@pytest.mark.slow
def test_lpbrl_needs_a_wide_set_and_no_more():
    wide, narrow, uniform, most = (
        record_of(name).cumulative[:, -1].mean()
        for name in ("lpbrl, gamma 2", "lpbrl, gamma 1", "uniform", "uncertainty")
    )
    assert narrow > 1.5 * wide
    assert 0.8 < most / uniform < 1.2


def test_thompson_draws_from_laplace():
    """Where all is known, both draws have the same favourite; else as often as w falls there."""
    features = np.tile([[[1.0], [-1.0]]], (4000, 1, 1))
    weights, hessian = np.full((4000, 1), 0.5), np.full((4000, 1, 1), 4.0)
    pairs = lpbrl.thompson(features, lpbrl.Estimate(weights, hessian, None), rng_of(0))
    assert abs((pairs == 0).mean() - 0.8413) < 0.015  # P(0.5 + z / 2 > 0)
    pairs = lpbrl.thompson(features, lpbrl.Estimate(weights, 1e6 * hessian, None), rng_of(0))
    assert (pairs == 0).all()


# PbOP


def test_tables_have_a_winner_and_circles():
    chances = pbop.tables(rng_of(0), policies=6, hypotheses=40).chances
    assert np.allclose(chances + chances.swapaxes(1, 2), 1)
    beats, circles = chances > 0.5, 0
    for table, won in zip(beats, pbop.winners(chances), strict=True):
        assert not table[:, won].any()
        circles += any(table[a, b] and table[b, c] and table[c, a]
                       for a, b, c in product(range(6), repeat=3))  # fmt: skip
    assert circles > 20


def test_bonus_and_belief():
    rng = rng_of(2)
    chances = rng.random((4, 3, 3))
    losses = np.array([[5.0, 5, 5, 5], [0, 0.1, 9, 1]])
    belief = pbop.believed(losses)
    assert belief.tolist() == [[True] * 4, [True, True, False, True]]  # slack(4) = 1.84
    found = pbop.bonus(chances, belief)
    for n, a, b in product(range(2), range(3), range(3)):
        told = [chances[m, a, b] for m in range(4) if belief[n, m]]
        assert found[n, a, b] == max(told) - min(told)


def test_the_truth_stays_believed():
    """Ville's inequality, on 2,000 runs of a fair coin that five tables guess at."""
    rng, guesses = rng_of(3), np.array([0.5, 0.3, 0.45, 0.6, 0.8])
    answers = rng.random((2000, 400, 1)) < 0.5
    losses = ((guesses - answers) ** 2).cumsum(1)
    excess = losses[..., 0] - losses.min(-1)
    assert (excess.max(1) > pbop.slack(5)).mean() < pbop.DELTA


def test_pbop_stops_losing():
    problem = pbop.tables(rng_of(0))
    ours, uniform = (
        pbop.run(problem, rng_of(1), 300, pbop.CHOICES[name]) for name in ("pbop", "uniform")
    )
    assert ours.regret[:, 150:].sum() == 0
    assert 3 * ours.cumulative[:, -1].mean() < uniform.cumulative[:, -1].mean()
    assert 0.9 < uniform.regret[:, 150:].sum() / uniform.regret[:, :150].sum() < 1.1
    for record in ours, uniform:
        assert record.greedy[:, 100:].max() == 0


# PARL


def test_the_softmax_is_the_best_policy():
    """No policy nearby has more of E r - beta KL."""
    rng = rng_of(4)
    rewards, beta = rng.normal(size=5), 0.3
    policy = parl.softmax(rewards / beta)

    def worth(p):
        return p @ rewards - beta * (p * np.log(5 * p)).sum()

    for _ in range(50):
        other = policy * np.exp(rng.normal(size=5) / 10)
        assert worth(other / other.sum()) < worth(policy)


def nll_by_loops(rewards, policy, chances):
    total = 0.0
    for i, j in product(range(len(rewards)), repeat=2):
        chance = 1 / (1 + np.exp(rewards[j] - rewards[i]))
        loss = -chances[i, j] * np.log(chance) - chances[j, i] * np.log(1 - chance)
        total += policy[i] * policy[j] * loss
    return total


def utility_by_loops(rewards, chances, beta):
    weights = [np.exp(r / beta) for r in rewards]
    total, n = 0.0, len(rewards)
    for i, weight in enumerate(weights):
        p = weight / sum(weights)
        wins = sum(chances[i, j] for j in range(n)) / n
        total += p * (wins - 0.05 * np.log(p * n))
    return total


@pytest.mark.parametrize("seed", range(3))
def test_hypergradients(seed):
    """Direct plus distribution is the whole, and each is what differences say, in float64."""
    rng, beta = rng_of(seed), 0.4
    rewards, chances = rng.normal(size=5), symmetric_chances(rng, 5)
    policy = parl.softmax(rewards / beta)
    direct = parl.direct_term(rewards, policy, chances)
    distribution = parl.distribution_term(rewards, policy, chances, beta)

    def whole(r):
        return nll_by_loops(r, parl.softmax(r / beta), chances)

    def held_policy(r):
        return nll_by_loops(r, policy, chances)

    def held_reward(r):
        return nll_by_loops(rewards, parl.softmax(r / beta), chances)

    assert np.isclose(parl.nll(rewards, policy, chances), whole(rewards))
    close = {"rtol": 0, "atol": 1e-8}  # asked for: 1e-6
    assert np.allclose(direct, differences(held_policy, rewards), **close)
    assert np.allclose(distribution, differences(held_reward, rewards), **close)
    total = parl.nll_gradient(rewards, chances, beta)
    assert np.allclose(total, differences(whole, rewards), **close)
    assert np.allclose(direct + distribution, total, rtol=0, atol=1e-15)
    ours = parl.utility_gradient(rewards, chances, beta)
    theirs = differences(lambda r: -utility_by_loops(r, chances, beta), rewards)
    assert np.allclose(ours, theirs, **close)
    assert np.allclose(parl.iterated_gradient(rewards, chances, beta), direct, atol=1e-15)
    even = differences(lambda r: nll_by_loops(r, np.full(5, 0.2), chances), rewards)
    assert np.allclose(parl.one_shot_gradient(rewards, chances, beta), even, **close)


def test_the_loss_for_language_models():
    """Its value by loops, its autograd by differences; a detached softmax would have none."""
    rng = rng_of(5)
    chances = symmetric_chances(rng, 3, 4)
    rewards = torch.tensor(rng.normal(size=(3, 4)), requires_grad=True)
    loss = parl.bilevel_loss(rewards, torch.tensor(chances.mean(-1)), beta=0.7)
    loss.backward()

    def by_loops(r):
        return -np.mean([utility_by_loops(*row, 0.7) for row in zip(r, chances, strict=True)])

    value = rewards.detach().numpy()
    assert np.isclose(loss.item(), by_loops(value))
    assert np.allclose(rewards.grad.numpy(), differences(by_loops, value), rtol=0, atol=1e-8)


def test_adam():
    """By hand: a step of `rate` down any constant slope; then slopes of 1 and of -1."""
    steady = list(parl.adam(lambda w: np.array([1.0, -3]), np.zeros(2), 20))
    assert np.allclose(steady[-1], [-1, 1])
    slopes = iter([1.0, -1.0])
    (first, second) = parl.adam(lambda w: np.array(next(slopes)), np.zeros(()), 2)
    assert np.isclose(second - first, 0.05 * 0.01 / 0.19)  # (.9 x .1 - .1) / (1 - .81), over 1


def test_best_utility_is_a_policys():
    problem = parl.candidates(rng_of(0), runs=1, prompts=2)
    wins = problem.chances.mean(-1)
    best = parl.softmax(wins / parl.KL_WEIGHT)
    assert np.isclose(parl.best_utility(problem)[0], parl.utility(best, wins).mean())


def test_forms_of_parl():
    """The warning: pairs that are easy to predict are not good responses."""
    problem = parl.candidates(rng_of(0))
    shown, held = problem.part(slice(64)), problem.part(slice(64, None))
    learned = {form: parl.learn(shown, 150, form)[-1] for form in parl.FORMS}
    found = {form: parl.utility_of(held, nu, 0.5) for form, nu in learned.items()}
    means = {form: values.mean() for form, values in found.items()}
    assert means["utility"] > means["iterated"] > means["one-shot"] > means["nll"] + 0.04
    best_temperature = np.max(
        [parl.utility_of(held, learned["one-shot"], beta) for beta in np.geomspace(0.05, 5, 25)],
        axis=0,
    )
    assert (found["utility"] > best_temperature).all()
    assert (found["utility"] > found["iterated"]).all()


def test_a_run_of_parl():
    record = parl.run(parl.candidates(rng_of(1), runs=2, prompts=80), 40)
    assert record.regret.shape == record.greedy.shape == (2, 40)
    assert (record.greedy[:, -1] < record.greedy[:, 0]).all() and (record.greedy > 0).all()


# The choice of pairs


def some_labels(rng, pool, n):
    free = select.any_pairs(select.unasked(pool.shape, NOTHING), n, rng)
    return Labelled(free, rng.integers(2, size=n).astype(float))


def test_posterior_is_where_the_slope_is_none():
    rng = rng_of(6)
    features = rng.normal(size=(4, 3, 2))
    labelled = some_labels(rng, Pool(features), 6)
    head, covariance = select.posterior(features, labelled)

    def loss(w):
        total = w @ w / 2
        for (p, a, b), y in zip(*labelled, strict=True):
            chance = 1 / (1 + np.exp((features[p, b] - features[p, a]) @ w))
            total -= y * np.log(chance) + (1 - y) * np.log(1 - chance)
        return total

    assert np.allclose(differences(loss, head), 0, atol=1e-4)
    curvature = differences_twice(loss, head)
    assert np.allclose(np.linalg.inv(covariance), curvature, atol=1e-4)


def differences_twice(f, x):
    rows = []
    for unit in np.eye(len(x)):
        up, down = (differences(f, x + sign * 1e-4 * unit, 1e-4) for sign in (1, -1))
        rows.append((up - down) / 2e-4)
    return np.array(rows)


def test_a_belief_of_features():
    rng = rng_of(7)
    pool = Pool(rng.normal(size=(4, 3, 2)))
    labelled = some_labels(rng, pool, 5)
    head, covariance = select.posterior(pool.features, labelled)
    belief = select.believe(pool, labelled, rng)
    width = select.deviations(belief.factors)
    for p, a, b in product(range(4), range(3), range(3)):
        x = pool.features[p, a] - pool.features[p, b]
        assert np.isclose(width[p, a, b] ** 2, x @ covariance @ x)
        assert np.isclose(belief.mean[p, a], pool.features[p, a] @ head)
    assert belief.draws.shape == (4, 3, select.DRAWS)


def test_a_belief_of_an_ensemble():
    scores = rng_of(8).normal(size=(5, 4, 3))
    belief = select.believe(Pool(scores=scores), NOTHING, rng_of(0))
    assert np.allclose(belief.draws, np.moveaxis(scores, 0, -1))
    width = select.deviations(belief.factors)
    for p, a, b in product(range(4), range(3), range(3)):
        assert np.isclose(width[p, a, b], (scores[:, p, a] - scores[:, p, b]).std(ddof=1))


def test_once_asked_is_known_better():
    """By the inverse of the covariance, to which a label adds p (1 - p) x x'."""
    rng = rng_of(9)
    pool = Pool(rng.normal(size=(3, 4, 3)))
    labelled = some_labels(rng, pool, 4)
    head, covariance = select.posterior(pool.features, labelled)
    after = select.once_asked(select.believe(pool, labelled, rng), (1, 0, 2))
    x = pool.features[1, 0] - pool.features[1, 2]
    p = 1 / (1 + np.exp(-x @ head))
    covariance = np.linalg.inv(np.linalg.inv(covariance) + p * (1 - p) * np.outer(x, x))
    flat = pool.features.reshape(-1, 3)
    factors = after.factors.reshape(-1, 3)
    assert np.allclose(factors @ factors.T, flat @ covariance @ flat.T)


@pytest.mark.parametrize("kind", ["features", "scores"])
@pytest.mark.parametrize("method", select.METHODS)
def test_pairs_are_new_and_of_two(method, kind):
    rng = rng_of(10)
    table = rng.normal(size=(6, 4, 5) if kind == "features" else (5, 6, 4))
    pool = Pool(**{kind: table})
    labelled, seen = NOTHING, set()
    for _ in range(3):
        pairs = select.select(pool, labelled, 5, method, rng)
        for p, a, b in pairs.tolist():
            assert a != b and (p, min(a, b), max(a, b)) not in seen
            seen.add((p, min(a, b), max(a, b)))
        labelled = labelled.and_these(pairs, rng.random(len(pairs)))
    assert len(seen) == 15 or (kind == "scores" and method in ("lpbrl", "pbop", "dps"))
    assert 0 < (labelled.pairs[:, 1] < labelled.pairs[:, 2]).sum() < len(seen)


def test_every_pair_once():
    pairs = select.select(Pool(np.ones((3, 4, 1))), NOTHING, 99, "uniform", rng_of(0))
    assert len({(p, *sorted(two)) for p, *two in pairs.tolist()}) == len(pairs) == 3 * 6


def members(*tables):
    """A pool of one prompt by the scores of each member."""
    return Pool(scores=np.array(tables, float)[:, None])


@pytest.mark.parametrize(("method", "pair"), [
    ("uncertainty", {2, 3}),  # bad ones of which the members say most different things
    ("lpbrl", {0, 1}),
    ("pbop", {0, 1}),
    ("dps", {0, 1}),
])  # fmt: skip
def test_what_is_known_to_be_bad_is_not_asked(method, pair):
    pool = members([3, 2, -9, -3], [2, 3, -4, -8], [2.4, 2.6, -8, -4])
    ((_, *two),) = select.select(pool, NOTHING, 1, method, rng_of(0)).tolist()
    assert set(two) == pair


@pytest.mark.parametrize("method", ["dps", "lpbrl", "pbop"])
def test_no_question_where_all_agree(method):
    pool = members([3, 0, 1], [3.1, 0, 1], [2.9, 0.5, 1])
    assert select.select(pool, NOTHING, 5, method, rng_of(0)).shape == (0, 3)


def test_a_batch_tells_different_things():
    """Two directions: most uncertain pairs alone would ask of the longer one twice."""
    features = np.zeros((3, 2, 2))
    features[:, 0] = [4, 0], [3.9, 0], [0, 2]  # of [3.9, 0] a variance of 15.2 / 5 is left
    pairs = select.select(Pool(features), NOTHING, 2, "uncertainty", rng_of(0))
    assert set(pairs[:, 0].tolist()) == {0, 2}


def test_no_such_method():
    with pytest.raises(UserError, match="expected one of uniform, dps, uncertainty, lpbrl, pbop"):
        select.select(Pool(np.ones((1, 2, 1))), NOTHING, 1, "best", rng_of(0))


def test_what_people_have_to_read():
    """64 prompts of 8 responses, labels in eights: better favourites, for fewer bad responses."""
    rows = {}
    for method in "uniform", "dps", "lpbrl":
        problems = [pools.people(rng) for rng in rng_of(0).spawn(10)]
        rows[method] = pools.run(problems, rng_of(1), 168, method)
    uniform = rows.pop("uniform")
    for record in rows.values():
        for labels in 80, 160:
            assert record.greedy[:, labels].mean() < 0.8 * uniform.greedy[:, labels].mean()
        assert record.regret[:, 80:].mean() < 0.5 * uniform.regret[:, 80:].mean()


def test_regret_of_favourites():
    scores = np.array([[1.0, 3], [2, 0]])
    assert pools.regret(scores, np.array([[5, 0], [9, 1]])) == 1.0  # 2 lost of the first, 0 of next


@pytest.mark.parametrize("name", ["lpbrl", "pbop", "parl", "pool"])
def test_the_command_knows_them(name):
    curves = command.ALGORITHMS[name].regrets(rng_of(0), 2, 9)
    assert {row.shape for row in curves.values()} == {(2, 9)}
    assert next(iter(curves)).startswith(name) or name in ("parl", "pool")
