"""rewards/calibration, ceiling, held_out and overoptimisation: numbers worked elsewhere."""

import itertools
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest

from minirlhf import data
from minirlhf.engine.cli import UserError
from minirlhf.rewards import calibration, ceiling, held_out, overoptimisation

RNG = np.random.default_rng


def sigmoid(z):
    return 1 / (1 + math.exp(-z))


# Scores of chances


def test_log_loss_and_brier_by_hand():
    p, q = [0.5, 0.8, 1.0], [0.25, 1.0, 1.0]
    assert calibration.log_loss(p, q) == pytest.approx((math.log(2) - math.log(0.8)) / 3)
    assert calibration.brier_score(p, q) == pytest.approx((0.0625 + 0.04) / 3)
    entropy = -0.25 * math.log(0.25) - 0.75 * math.log(0.75)
    assert calibration.label_entropy(q) == pytest.approx(entropy / 3)
    assert calibration.log_loss([0.0], [0.5]) == math.inf


def test_brier_against_a_vote_is_more_by_the_raters_own_variance():
    p, q = RNG(0).random((2, 50))
    votes = [a * (x - 1) ** 2 + (1 - a) * x**2 for x, a in zip(p, q, strict=True)]
    own = [a * (1 - a) for a in q]
    assert np.mean(votes) == pytest.approx(calibration.brier_score(p, q) + np.mean(own))


@pytest.mark.parametrize(
    ("p", "q", "says"),
    [
        ([0.5], [1.5], "labels: expected numbers from 0 to 1"),
        ([math.nan], [1], "chances: expected numbers from 0 to 1"),
        ([0.5, 0.5], [1], "shapes"),
        ([], [], "shapes"),
    ],
)
def test_what_is_no_chance_is_refused(p, q, says):
    with pytest.raises(UserError, match=says):
        calibration.brier_score(p, q)


# Reliability


def by_loop(p, q, edges):
    found = []
    for low, high in itertools.pairwise(edges):
        last = high == edges[-1]
        inside = [i for i in range(len(p)) if low <= p[i] < high or (last and p[i] == high)]
        if inside:
            chance = sum(p[i] for i in inside) / len(inside)
            found.append((chance, sum(q[i] for i in inside) / len(inside), len(inside)))
    return found


@pytest.mark.parametrize("equal", ["width", "count"])
def test_reliability_is_that_of_a_loop(equal):
    p, q = RNG(1).beta(2, 5, (2, 300))
    p[:2] = 0, 1
    edges = [k / 8 for k in range(9)]
    if equal == "count":
        edges = np.quantile(p, edges)
    expected = by_loop(p, q, edges)
    found = calibration.reliability(p, q, 8, equal)
    assert np.allclose(np.array(expected), np.stack(found[2:], 1))
    error = sum(n * abs(c - lab) for c, lab, n in expected) / 300
    assert calibration.expected_calibration_error(p, q, 8, equal) == pytest.approx(error)
    assert equal == "width" or set(found.count) <= {37, 38}


def test_empty_bins_are_left_out_and_equal_chances_are_one_bin():
    bins = calibration.reliability([0.05, 0.95, 0.95], [0, 1, 0], 10)
    assert bins.count.tolist() == [1, 2]
    assert bins.low.tolist() == pytest.approx([0, 0.9])
    assert calibration.reliability([0.3] * 4, [0, 1, 0, 0], 5, "count").count.tolist() == [4]


def test_calibrated_chances_have_a_small_error_and_sure_ones_a_large_one():
    rng = RNG(2)
    z = rng.normal(0, 2, 40_000)
    p = calibration.sigmoid(z)
    labels = rng.random(40_000) < p
    assert calibration.expected_calibration_error(p, labels) < 0.01
    assert calibration.expected_calibration_error(calibration.sigmoid(3 * z), labels) > 0.1


def test_better_ones_first_look_unsure_until_both_ways_are_counted():
    """Raters of a calibrated model, each pair turned so that the label is over one half."""
    rng = RNG(3)
    p = rng.random(20_000)
    q = rng.binomial(9, p) / 9
    turn = q < 0.5
    p, q = np.where(turn, 1 - p, p), np.where(turn, 1 - q, q)
    assert calibration.expected_calibration_error(p, q) > 0.02
    assert calibration.expected_calibration_error(*calibration.both_ways(p, q)) < 0.01


# Temperature


def test_temperature_recovers_a_scale():
    rng = RNG(4)
    z = rng.normal(0, 1.5, 30_000)
    q = rng.binomial(20, 1 / (1 + np.exp(-z))) / 20
    found = calibration.fit_temperature(3 * z, q)
    assert found.value == pytest.approx(3, rel=0.02)
    assert found.note == ""


def test_temperature_is_the_best_of_a_grid():
    z, q = RNG(5).normal(0, 1, 40), RNG(6).random(40)
    q = np.where(z > 0, np.maximum(q, 1 - q), np.minimum(q, 1 - q))
    grid = np.exp(np.linspace(-3, 3, 4001))
    losses = []
    for t in grid:
        each = []
        for a, b in zip(z, q, strict=True):
            each.append(-b * math.log(sigmoid(a / t)) - (1 - b) * math.log(1 - sigmoid(a / t)))
        losses.append(np.mean(each))
    best = grid[int(np.argmin(losses))]
    assert calibration.fit_temperature(z, q).value == pytest.approx(best, rel=2e-3)


def test_temperature_is_capped_and_says_so():
    z = np.array([-2.0, 1.0, 3.0])
    separated = calibration.fit_temperature(z, [0, 1, 1])
    assert separated.value < 0.01
    assert "separate" in separated.note
    opposite = calibration.fit_temperature(z, [1, 0, 0])
    assert opposite.value > 100
    assert "do not order" in opposite.note
    assert calibration.fit_temperature([0, 0], [1, 0]).value == 1
    with pytest.raises(UserError, match="finite"):
        calibration.fit_temperature([math.inf], [1])


# Accuracy


def test_accuracy_by_hand():
    right = calibration.is_right([1, -1, 0, 2, 3], [0.9, 0.9, 0.2, 0.4, 0.5])
    assert np.array_equal(right, [1, 0, 0.5, 0, np.nan], equal_nan=True)
    parts = calibration.accuracy_by([0, 1, 2, 5, 5], right, [0, 1, 2, 3, 5])
    assert parts == [(0, 1, 1, 1.0), (1, 2, 1, 0.0), (2, 3, 1, 0.5), (3, 5, 1, 0.0)]


def test_position_by_hand():
    """A judge that likes what comes first: right on three pairs, of which it turns one."""
    found = calibration.position_figures([0.9, 0.8, 0.7, 0.4], [0.2, 0.6, 0.5, 0.6])
    assert found["accuracy_better_first"] == 0.75
    assert found["accuracy_better_second"] == pytest.approx((1 + 0 + 0.5 + 0) / 4)
    assert found["agreement"] == 0.5
    assert found["chance_of_first"] == pytest.approx((2.8 + 1.9) / 8)


# Length


def test_rank_correlation_with_ties_by_hand():
    assert calibration.ranks([3, 1, 3, 2]).tolist() == [2.5, 0, 2.5, 1]
    assert calibration.spearman([1, 2, 3, 4], [1, 8, 27, 64]) == pytest.approx(1)
    assert math.isnan(calibration.pearson([1, 1], [0, 1]))


def test_partial_correlation_is_the_formula_of_three():
    x, y, z = RNG(7).normal(size=(3, 60))
    x, y = x + z, y - 2 * z
    r = np.corrcoef([x, y, z])
    expected = (r[0, 1] - r[0, 2] * r[1, 2]) / math.sqrt((1 - r[0, 2] ** 2) * (1 - r[1, 2] ** 2))
    assert calibration.partial_correlation(x, y, z) == pytest.approx(expected)
    assert calibration.length_figures(x, y, z)["given_rating"] == pytest.approx(expected)


# Ensembles


def test_an_ensemble_is_of_standardised_scores():
    scores = np.array([[0.0, 2.0, 4.0], [300.0, 100.0, 200.0]])
    mean, spread = calibration.ensemble_pairs(scores, [(1, 0), (2, 1)])
    unit = math.sqrt(2 / 3)  # the deviation of -1, 0, 1
    assert mean == pytest.approx([(1 - 2) / 2 / unit, (1 + 1) / 2 / unit])
    assert spread == pytest.approx([1.5 / unit, 0])


def test_predicts_error_counts_pairs():
    rng = RNG(8)
    values, right = rng.integers(0, 5, 40), rng.integers(0, 2, 40)
    wins = []
    for i, j in itertools.product(np.flatnonzero(right == 0), np.flatnonzero(right == 1)):
        wins.append(0.5 + 0.5 * np.sign(values[i] - values[j]))
    assert calibration.predicts_error(values, right) == pytest.approx(np.mean(wins))
    assert math.isnan(calibration.predicts_error([1, 2], [1, 1]))


# The toy's ceiling


@pytest.fixture(scope="module")
def drawn():
    """60,000 pairs of words, rated as the toy's are: true rewards (P, 2), ratings (P, 2, 9)."""
    rng = RNG(9)
    n = 120_000
    length = rng.integers(4, 11, n)
    worth = np.linspace(-1, 1, 8)[rng.integers(0, 8, (n, 10))]
    used = np.arange(10) < length[:, None]
    reward = 4 * (worth * used).sum(1) / length
    ratings = np.clip(np.round(reward[:, None] + rng.normal(0, 1, (n, 9))), -4, 4)
    return reward.reshape(-1, 2), ratings.reshape(-1, 2, 9)


def test_best_accuracy_on_the_toy(drawn):
    reward, ratings = drawn
    mean = ratings.sum(2)
    differ = mean[:, 0] != mean[:, 1]
    gap = np.round(reward[:, 0] - reward[:, 1], 9)
    right = 0.5 + 0.5 * np.sign(gap) * np.sign(mean[:, 0] - mean[:, 1])
    error = right[differ].std() / differ.sum() ** 0.5
    found = ceiling.toy_ceiling().accuracy
    assert abs(right[differ].mean() - found) < 3 * error
    assert 0.9 < found < 0.92


def test_least_log_loss_on_the_toy(drawn):
    """Cross-fitted: the mean label of pairs with nearly the same gap and level, from the other half
    of the pairs. No such guess beats the floor, and a fine enough one comes near."""
    reward, ratings = drawn
    differ = ratings[:, 0].sum(1) != ratings[:, 1].sum(1)
    reward, ratings = reward[differ], ratings[differ]
    first, second = ratings[:, 0, :, None], ratings[:, 1, None]
    label = (first > second).mean((1, 2)) + (first == second).mean((1, 2)) / 2
    gap = np.round((reward[:, 0] - reward[:, 1]) * 8).astype(int) + 64
    level = np.round(np.abs(reward.sum(1))).astype(int)
    cell = gap * 9 + level
    half = np.arange(len(cell)) % 2
    losses = []
    for side in (0, 1):
        known, asked = half == side, half != side
        count = np.bincount(cell[known], minlength=1300)
        total = np.bincount(cell[known], label[known], 1300)
        p = ((total + 0.5) / (count + 1))[cell[asked]]
        q = label[asked]
        losses.append(np.mean(-q * np.log(p) - (1 - q) * np.log(1 - p)))
    found = ceiling.toy_ceiling().log_loss
    assert -0.004 < np.mean(losses) - found < 0.01


# Best of n


def test_kl_of_best_of_n():
    """Of n draws without ties: the k-th of K equal atoms has chance (k^n - (k-1)^n) / K^n."""
    assert overoptimisation.best_of_n_kl(1) == 0
    K, n = 100_000, 4
    k = np.arange(1, K + 1)
    chance = (k / K) ** n - ((k - 1) / K) ** n
    exact = np.sum(chance * np.log(np.maximum(chance, 1e-300) * K))
    assert overoptimisation.best_of_n_kl(n) == pytest.approx(exact, abs=1e-4)


def test_best_of_n_is_the_mean_over_all_subsets():
    proxy = np.array([[0.3, 2.0, 0.3, -1.0, 2.0, 5.0], [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]])
    gold = RNG(10).normal(size=(2, 6))
    for n in range(1, 7):
        expected = []
        for scores, worth in zip(proxy, gold, strict=True):
            found = []
            for subset in itertools.combinations(range(6), n):
                top = max(scores[i] for i in subset)
                found.append(np.mean([worth[i] for i in subset if scores[i] == top]))
            expected.append(np.mean(found))
        assert overoptimisation.best_of_n(proxy, gold, n) == pytest.approx(expected)
    with pytest.raises(UserError, match="expected 1 to 6"):
        overoptimisation.best_of_n(proxy, gold, 7)


def test_best_of_n_is_unbiased():
    """Against fresh draws of n, for a gold score that goes with the proxy's square."""
    rng = RNG(11)
    proxy = rng.normal(size=(4000, 12))
    found = overoptimisation.best_of_n(proxy, proxy**2, 5)
    best = rng.normal(size=(200_000, 5)).max(1) ** 2
    error = found.std() / 4000**0.5 + best.std() / 200_000**0.5
    assert abs(found.mean() - best.mean()) < 3 * error


def test_weights_of_many_samples_add_up():
    for n in (1, 2, 63, 500, 1000):
        assert overoptimisation.best_of_n_weights(1000, n).sum() == pytest.approx(1)
    assert overoptimisation.powers_up_to(12) == [1, 2, 4, 8, 12]


def test_a_gain_is_over_the_prompts_own_mean():
    """A shift of a prompt changes nothing, and n = 1 gains nothing, with no error."""
    rng = RNG(12)
    proxy, gold = rng.normal(size=(2, 20, 8))
    rows = overoptimisation.curve(proxy, gold, {})
    shifted = overoptimisation.curve(proxy, gold + rng.normal(size=(20, 1)) * 50, {"x": gold})
    assert [row["n"] for row in rows] == [1, 2, 4, 8]
    for row, other in zip(rows, shifted, strict=True):
        assert row["gold_gain"] == pytest.approx(other["gold_gain"], abs=1e-9)
        assert row["gold_error"] == pytest.approx(other["gold_error"], abs=1e-9)
    assert rows[0]["gold_gain"] == pytest.approx(0, abs=1e-12)
    assert shifted[-1]["x"] == pytest.approx(gold[np.arange(20), proxy.argmax(1)].mean())
    best = proxy.max(1) - proxy.mean(1)
    assert rows[-1]["proxy_gain"] == pytest.approx(best.mean())
    assert rows[-1]["proxy_error"] == pytest.approx(best.std(ddof=1) / 20**0.5)


# The commands


@pytest.fixture(scope="module")
def rule(tmp_path_factory):
    """A rule that likes length."""
    path = tmp_path_factory.mktemp("rule") / "rule.py"
    path.write_text(
        "def length(prompts, responses):\n    return [len(text) for text in responses]\n"
        "def nothing(prompts, responses):\n    return [0.0 for text in responses]\n"
    )
    return path


def press(toy, out, *argv):
    main, parse = overoptimisation.main, overoptimisation.parse
    small = ["--prompts", "24", "--n", "8", "--response-length", "8", "--out", str(out)]
    given = [str(toy / "sft"), *map(str, argv), *small]
    return main(parse(overoptimisation.Knobs, "", given))


def test_a_rule_is_exploited_and_a_reward_model_less(toy, rule, tmp_path, capsys):
    import train_ppo

    about = {"data": "toy", "steps": 2, "response_length": 8, "eval_samples": 8, "batch_size": 16}
    train_ppo.main(train_ppo.Knobs(out=str(toy / "pressed"), warmup=0.0, lr=3e-3, **about))
    rows = press(toy, tmp_path, "--gold", "true", "--proxies", toy / "rm", f"{rule}:length",
                 "--policies", toy / "pressed")  # fmt: skip
    last = {row["proxy"]: row for row in rows if row.get("n") == 8}
    assert last["rm"]["gold_gain"] > 0.5
    by_length = last["rule.py:length"]
    assert by_length["proxy_gain"] > 1
    assert by_length["gold_gain"] < 0.4
    assert by_length["tokens"] > last["true"]["tokens"]
    assert last["true"]["gold_gain"] > last["rm"]["gold_gain"]
    (policy,) = (row for row in rows if "policy" in row)
    assert policy["proxy"] == "rm"
    assert policy["sqrt_kl"] == pytest.approx(max(0, policy["kl"]) ** 0.5)
    lines = (tmp_path / "overoptimisation.jsonl").read_text().splitlines()
    assert [json.loads(line)["proxy"] for line in lines] == [row["proxy"] for row in rows]
    shown = capsys.readouterr().out
    assert "best of 8" in shown
    assert "pressed" in shown


def test_names_are_short_where_they_differ():
    sources = ["runs/a/rm,runs/b/rm", "runs/c/rm", "true", "runs/a/rm"]
    assert overoptimisation.names_of(sources) == ["a/rm + b/rm", "c/rm", "true", "a/rm"]
    assert overoptimisation.names_of([]) == []


def test_mistakes_are_said(toy, rule, tmp_path):
    knobs = SimpleNamespace(gold="true", proxies=["true"], policies=[])
    with pytest.raises(UserError, match="given twice"):
        overoptimisation.main(knobs)
    with pytest.raises(UserError, match="names no reward|is not among"):
        press(toy, tmp_path, "--gold", "true", "--proxies", f"{rule}:length", "--policies",
              toy / "sft")  # fmt: skip
    with pytest.raises(UserError, match="the same score"):
        press(toy, tmp_path, "--gold", "true", "--proxies", f"{rule}:nothing")


def test_the_picture_is_drawn_without_a_policy(tmp_path):
    pytest.importorskip("matplotlib")
    proxy, gold = RNG(13).normal(size=(2, 10, 4))
    rows = [
        {"proxy": "gold", "gold": "gold"} | row for row in overoptimisation.curve(gold, gold, {})
    ]
    rows += [
        {"proxy": "a", "gold": "gold"} | row for row in overoptimisation.curve(proxy, gold, {})
    ]
    overoptimisation.draw(rows, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_held_out_pairs_of_the_toy(toy, rule, capsys):
    argv = [str(toy / "rm"), f"{rule}:length"]
    found = held_out.main(held_out.parse(held_out.Knobs, "", argv))
    summary = json.loads((toy / "rm" / "summary.json").read_text())
    model, length, both = found.values()
    assert model["accuracy"] == pytest.approx(summary["eval/accuracy"], abs=1e-4)
    assert length["length"]["pearson"] == pytest.approx(1)
    assert length["by_length"][0].accuracy < 0.1 < 0.9 < length["by_length"][-1].accuracy
    assert both["error_by_margin"] > 0.5
    assert found["ensemble"]["accuracy"] < model["accuracy"]
    shown = capsys.readouterr().out
    assert "accuracy 0.9078" in shown
    assert "ensemble of 2" in shown


def test_a_judge_is_asked_in_both_orders(monkeypatch, capsys):
    """A judge that knows the toy's reward and likes what comes first."""

    class FirstLover:
        def __init__(self, source):
            pass

        def first_shown(self, prompts, first, second):
            ahead = np.subtract(data.toy_reward(prompts, first), data.toy_reward(prompts, second))
            return 1 / (1 + np.exp(-2 * ahead - 1))

    monkeypatch.setattr(held_out, "Judge", FirstLover)
    argv = ["judge:http://x", "--data", "toy", "--pairs", "400"]
    (found,) = held_out.main(held_out.parse(held_out.Knobs, "", argv)).values()
    position = found["position"]
    assert position["accuracy_better_first"] > 0.85 > position["accuracy_better_second"]
    assert position["chance_of_first"] > 0.55
    assert 0.85 < found["accuracy"] < 0.95
    assert "accuracy_better_second" in capsys.readouterr().out


def test_halves_share_no_response():
    items = SimpleNamespace(units=["a", "a", "b", "c", "d", "e"], __len__=lambda: 6)
    pairs = np.array(list(itertools.combinations(range(6), 2)))
    first, second = held_out.halves(items, pairs)
    assert not (first & second).any()
    assert not set(pairs[first].ravel()) & set(pairs[second].ravel())
    assert first[0] or second[0]  # the two of unit a stay together
