"""Agreement, position bias and strengths, by published and hand-worked values and by loops."""

import itertools
import json
import math

import numpy as np
import pytest

from minirlhf.feedback.page.quality import (
    about,
    bradley_terry,
    fact_of,
    figures,
    krippendorff_alpha,
    renew,
    share_interval,
)

# Krippendorff 2011, Computing Krippendorff's Alpha-Reliability, section D: 4 observers, 12 units
OBSERVERS = """
    1 2 3 3 2 1 4 1 2 . . .
    1 2 3 3 2 2 4 1 2 5 . 3
    . 3 3 3 2 3 4 2 2 5 1 .
    1 2 3 3 2 4 4 1 2 5 1 ."""


def observers():
    rows = [row.split() for row in OBSERVERS.strip().splitlines()]
    return np.array([[math.nan if x == "." else float(x) for x in row] for row in rows])


@pytest.mark.parametrize(
    ("level", "alpha"), [("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849)]
)
def test_krippendorffs_own_example(level, alpha):
    assert krippendorff_alpha(observers(), level) == pytest.approx(alpha, abs=5e-4)


def test_alpha_by_hand():
    """Two raters, ten binary units, of Krippendorff's section A: .095."""
    a = [0, 1, 0, 0, 0, 0, 0, 0, 1, 0]
    b = [1, 1, 1, 0, 0, 1, 0, 0, 0, 0]
    assert krippendorff_alpha([a, b]) == pytest.approx(0.095, abs=5e-4)
    assert krippendorff_alpha([a, a]) == 1
    assert math.isnan(krippendorff_alpha([[1, 1], [1, 1]]))  # nothing could have differed
    assert math.isnan(krippendorff_alpha([[1, math.nan], [math.nan, 0]]))


@pytest.mark.parametrize("level", ["nominal", "ordinal", "interval"])
def test_alpha_by_loops(level):
    """Mean squared distance within units over that among all values that can be paired."""
    rng = np.random.default_rng(0)
    values = rng.integers(0, 4, (3, 20)).astype(float)
    values[rng.random((3, 20)) < 0.3] = math.nan
    units = [[x for x in column if x == x] for column in values.T]
    units = [unit for unit in units if len(unit) > 1]
    everything = [x for unit in units for x in unit]

    def distance(x, y):
        if level == "nominal":
            return float(x != y)
        if level == "interval":
            return (x - y) ** 2
        low, high = sorted((x, y))
        between = sum(low <= z <= high for z in everything)
        return (between - (everything.count(x) + everything.count(y)) / 2) ** 2

    n = len(everything)
    observed = 0.0
    for unit in units:
        total = sum(distance(x, y) for x, y in itertools.permutations(unit, 2))
        observed += total / (len(unit) - 1) / n
    expected = sum(distance(x, y) for x, y in itertools.permutations(everything, 2))
    expected /= n * (n - 1)
    assert krippendorff_alpha(values, level) == pytest.approx(1 - observed / expected, abs=1e-10)


def test_share_interval():
    """Wilson's for 5 of 10: .5 +- 1.96 / (1 + .38416) * sqrt(.025 + .009604)."""
    share, low, high = share_interval(5, 10)
    half = 1.96 / 1.38416 * math.sqrt(0.034604)
    assert (share, low, high) == pytest.approx((0.5, 0.5 - half, 0.5 + half))
    assert share_interval(0, 10)[1] == pytest.approx(0) and all(
        map(math.isnan, share_interval(0, 0))
    )


def test_two_runs_by_hand():
    """8.5 to 2.5 with the halves: the difference is their log-odds, its variance 1 / (n p q)."""
    strengths, errors = bradley_terry([[0, 8], [2, 0]])
    p, n = 8.5 / 11, 11
    assert strengths == pytest.approx([math.log(8.5 / 2.5) / 2, -math.log(8.5 / 2.5) / 2])
    assert errors == pytest.approx([math.sqrt(1 / (n * p * (1 - p))) / 2] * 2)


def test_strengths_are_the_maximum_of_the_likelihood():
    """No step to either side makes the data likelier; errors are those of a simulation."""
    true, rng = np.array([0.5, 0.0, -0.5]), np.random.default_rng(1)
    found = []
    for _ in range(60):
        wins = np.zeros((3, 3))
        for i, j in [(0, 1), (1, 2), (0, 2)]:
            wins[i, j] = rng.binomial(200, 1 / (1 + math.exp(true[j] - true[i])))
            wins[j, i] = 200 - wins[i, j]
        strengths, errors = bradley_terry(wins)
        found.append(strengths)

    def likelihood(s):
        pairs = itertools.permutations(range(3), 2)
        return sum((wins[i, j] + 0.5) * -math.log1p(math.exp(s[j] - s[i])) for i, j in pairs)

    for i, step in itertools.product(range(3), (-1e-3, 1e-3)):
        assert likelihood(strengths) > likelihood(strengths + step * np.eye(3)[i])
    assert np.mean(found, 0) == pytest.approx(true, abs=0.04)
    assert np.std(found, 0) == pytest.approx(errors, rel=0.3)


def test_a_run_that_never_lost_has_a_strength():
    strengths, errors = bradley_terry([[0, 5], [0, 0]])
    assert strengths[0] == pytest.approx(math.log(5.5 / 0.5) / 2) and np.isfinite(errors).all()


# Of labels


def pair(rater, winner, order=("x", "y"), n=0, **more):
    """A comparison of the texts x and y, shown in that order."""
    place = order.index(winner) if winner else None
    ranking = [[0, 1]] if winner is None else [place, 1 - place]
    sources = [{"x": "run", "y": "other"}[text] for text in order]
    label = {"kind": "comparison", "prompt": f"p{n}", "responses": list(order), "ranking": ranking}
    return label | {"rater": rater, "question": f"q{n}", "sides": [0, 1], "sources": sources} | more


def test_figures_by_hand():
    labels = [
        pair("Ann", "x", n=0, seconds=1.0),
        pair("Ann", "y", n=1, seconds=3.0),
        pair("Ann", None, n=2, seconds=8),
        pair("Ann", "x", ("y", "x"), n=3),
        pair("Ann", "x", ("y", "x"), 0, question="q0-again", again="q0"),
        pair("Ann", "x", ("y", "x"), 1, question="q1-again", again="q1"),
        pair("Bob", "x", ("y", "x"), n=0),
        pair("Bob", "x", n=1),
        {"kind": "critique", "prompt": "", "response": "x", "level": 1, "of": 2, "rater": "Ann"},
    ]
    found = figures([fact_of(json.loads(json.dumps(label))) for label in labels], "Ann")
    assert found["labels"] == 7 and found["kinds"] == {"comparison": 6, "critique": 1}
    assert found["seconds"] == 3.0
    # q0 first, q1 second, q2 a tie, q3 second; both repeats second
    assert found["compared"] == 5 and found["first"][0] == 0.2
    assert (found["agreed"], found["repeated"]) == (1, 2)
    # units q0 (x, x) and q1 (y, x), values -1 and 1: n = 4, counts 1 and 3
    (alpha,) = found["agreement"]
    assert alpha["alpha"] == 0.0 and (alpha["raters"], alpha["units"]) == (2, 2)
    # repeats do not count: x won q0, q3 and Bob's two, y won q1, q2 is a tie
    strengths = {row["run"]: row["strength"][0] for row in found["runs"]}
    assert strengths["run"] == pytest.approx(math.log(5 / 2) / 2, abs=1e-4)
    assert list(strengths) == ["run", "other"]


def test_position_does_not_change_what_was_said():
    one, other = pair("Ann", "x"), pair("Ann", "x", ("y", "x"))
    assert about(one) == about(other)
    assert fact_of(one).value == fact_of(other).value != fact_of(pair("Ann", "y")).value
    odd = {"kind": "similarity", "responses": ["a", "b", "c"], "odd": 0}
    assert fact_of(odd).value == fact_of(odd | {"responses": ["c", "b", "a"], "odd": 2}).value
    three = {"kind": "comparison", "responses": ["a", "b", "c"], "ranking": [2, [0, 1]]}
    turned = three | {"responses": ["c", "b", "a"], "ranking": [0, [2, 1]]}
    assert fact_of(three).value == fact_of(turned).value


def test_figures_without_labels():
    found = figures([], "Ann")
    assert found["labels"] == 0 and found["seconds"] is None and found["runs"] == []
    assert found["first"] == [None, None, None] and found["agreement"] == []


def test_facts_follow_the_file():
    entries, facts = [pair("Ann", "x", n=i) for i in range(4)], []
    renew(facts, entries)
    changed = [*entries[:2], pair("Ann", "y", n=9)]
    renew(facts, changed)
    assert [fact.entry for fact in facts] == changed
    renew(facts, [])
    assert facts == []
