"""What to ask next of own samples: features, choice and labels of train_dpo --select, the page."""

import functools
import itertools
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import train_dpo
from minirlhf import data
from minirlhf.engine import curves
from minirlhf.engine.cli import UserError
from minirlhf.engine.log import Run
from minirlhf.engine.rows import Rows
from minirlhf.feedback.page.asking import Asker, parts_of
from minirlhf.feedback.page.command import Knobs, open_session
from minirlhf.feedback.page.pool import Group
from minirlhf.gpt import GPT, GPTConfig
from minirlhf.online import asked, hidden, people, select
from minirlhf.online.select import METHODS, NOTHING, Labelled, Pool

load_toy = functools.cache(functools.partial(data.load_feedback, "toy"))


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    monkeypatch.setenv("MINIRLHF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(curves, "plot", lambda *_: None)
    load = data.load_feedback
    monkeypatch.setattr(data, "load_feedback", lambda s: load_toy() if s == "toy" else load(s))


# Features, and the choice among them


def test_features_are_means_over_responses():
    torch.manual_seed(0)
    model = GPT(GPTConfig(10, 16, 1, 2, 8)).eval()
    rows = [np.array(row) for row in ([0, 1, 2, 3, 0], [0, 4, 5, 0], [0, 6, 7, 8, 9, 1, 0])]
    prompts = np.array([2, 1, 4])
    found = hidden.features_of(model, Rows(rows, prompts, 9, torch.device("cpu")))
    for row, p, feature in zip(rows, prompts, found, strict=True):
        states = model.hidden(torch.as_tensor(row)[None])[0].detach().numpy()
        np.testing.assert_allclose(feature, states[p:].mean(0), atol=1e-5)


def test_a_pool_is_of_length_one_and_its_past_is_scaled_alike():
    features = np.array([[[3.0, 1.0], [5.0, 1.0]], [[0.0, 7.0], [0.0, 1.0]]])
    pool = hidden.pool_of(features, np.array([[10.0, 0.0]]), np.array([1.0]))
    size = np.sqrt((1 + 1 + 9 + 9) / 4)  # squares about (4, 1) and (0, 4)
    np.testing.assert_allclose(pool.features[0], [[-1 / size, 0], [1 / size, 0]])
    np.testing.assert_allclose(pool.earlier[0], [[10 / size, 0]])
    same = hidden.pool_of(np.ones((1, 2, 2)), np.zeros((0, 2)), np.zeros(0))
    assert not same.features.any()


def test_what_was_said_before_counts_as_if_it_were_in_the_pool():
    rng = np.random.default_rng(0)
    features, answers = rng.standard_normal((5, 3, 4)), np.array([1.0, 0.0, 0.7])
    pairs = np.array([[0, 0, 1], [3, 2, 0], [4, 1, 2]])
    whole = select.posterior(features, Labelled(pairs, answers))
    gone = [features[b, i] - features[b, j] for b, i, j in pairs[:2]]
    parts = select.posterior(features, Labelled(pairs[2:], answers[2:]), (gone, answers[:2]))
    for one, other in zip(whole, parts, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-10)


@pytest.mark.parametrize("method", METHODS)
def test_only_what_is_free_is_asked(method):
    rng = np.random.default_rng(0)
    pool = Pool(3 * rng.standard_normal((4, 3, 2)))
    free = np.zeros((4, 3, 3), bool)
    free[1, 0, 2] = free[3, 1, 2] = True
    pairs = select.select(pool, NOTHING, 9, method, rng, free)
    assert {(b, *sorted((i, j))) for b, i, j in pairs.tolist()} <= {(1, 0, 2), (3, 1, 2)}


def test_others_fill_a_budget_up():
    """Of one feature and much said, the best are known: dps has no pair of its own."""
    features = np.tile([[0.0], [1.0], [5.0]], (6, 1, 1))
    pool = Pool(features, earlier=(np.full((500, 1), 2.0), np.ones(500)))
    rng = np.random.default_rng(0)
    assert not len(select.select(pool, NOTHING, 10, "dps", rng))
    pairs = select.select_all(pool, NOTHING, 10, "dps", rng)
    assert len({(b, *sorted((i, j))) for b, i, j in pairs.tolist()}) == 10
    assert len(select.select_all(pool, NOTHING, 99, "dps", rng)) == 18  # there are no more


# train_dpo


def run(toy, out, **knobs):
    """(rows of metrics without the clock, weights) of a short run on the toy language."""
    defaults = dict(data="toy", init=str(toy / "sft"), reward=str(toy / "rm"), out=str(out),
                    batch_size=16, steps=4, lr=1e-2, response_length=6, eval_samples=4,
                    samples=4, online=True)  # fmt: skip
    train_dpo.main(train_dpo.Knobs(**defaults | knobs))
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        for name in curves.CLOCK:
            del row[name]
    return rows, load_file(out / "model" / "model.safetensors")


@pytest.fixture
def labeled(monkeypatch):
    """The shapes of what the labeler is asked to compare."""
    shapes, compare = [], asked.preferences_of

    def spy(prefer, tokens, *lengths):
        shapes.append(tuple(tokens.shape[:2]))
        return compare(prefer, tokens, *lengths)

    monkeypatch.setattr(asked, "preferences_of", spy)
    return shapes


def test_each_method_asks_for_its_budget(toy, tmp_path, labeled):
    weights = {}
    for method in METHODS:
        rows, weights[method] = run(toy, tmp_path / method, select=method, budget=5, steps=2)
        assert [row["online/labels"] for row in rows] == [5, 10]
    assert labeled == [(5, 2)] * 2 * len(METHODS)
    del weights["lpbrl"]  # so early all may be best, so that it asks as uncertainty does
    sums = {sum(w.double().sum().item() for w in found.values()) for found in weights.values()}
    assert len(sums) == len(METHODS) - 1
    labeled.clear()
    rows, _ = run(toy, tmp_path / "default", select="uniform", steps=1)
    assert labeled == [(8, 2)] and rows[0]["online/labels"] == 8  # one a prompt
    for loss in ("sppo", "d2o"):  # which take more than pairs
        rows, _ = run(toy, tmp_path / loss, select="pbop", steps=1, loss=loss)
        assert np.isfinite(rows[0]["loss"])


def test_what_was_asked_is_learnt_from_and_survives(toy, tmp_path, monkeypatch):
    seen, choose = [], asked.select_all

    def spy(pool, *rest):
        pairs = choose(pool, *rest)
        seen.append((len(pool.earlier[1]), pairs))
        return pairs

    monkeypatch.setattr(asked, "select_all", spy)
    given = dict(select="lpbrl", budget=5, rounds=2, save_every=2)
    whole = run(toy, tmp_path / "whole", **given)
    assert [n for n, _ in seen] == [0, 5, 10, 15]
    with monkeypatch.context() as patch:
        patch.setattr(Run, "log", stopped_at(3, Run.log))
        with pytest.raises(InterruptedError):
            run(toy, tmp_path / "parts", **given)
    parts = run(toy, tmp_path / "parts", **given, resume=True)
    assert [n for n, _ in seen] == [0, 5, 10, 15] * 2 + [10, 15]  # the last step it lost
    np.testing.assert_equal(seen[-1][1], seen[3][1])
    assert parts[0] == whole[0]
    assert all(torch.equal(parts[1][name], whole[1][name]) for name in whole[1])


def stopped_at(step, log):
    def stop(self, now, *rest, **more):
        if now == step:
            raise InterruptedError
        return log(self, now, *rest, **more)

    return stop


@pytest.mark.parametrize("given, problem", [
    ({"online": False, "samples": 2}, "--select dps has no say without --online"),
    ({"loss": "simpo"}, "loss simpo has no reference"),
    ({"loss": "nash_md", "samples": 2}, "--select dps has no say in loss nash_md"),
    ({"budget": 49}, "a step has 48 pairs"),
    ({"select": "", "budget": 4}, "--budget 4 has no say without --select"),
    ({"select": "best"}, "--select 'best': expected"),
])  # fmt: skip
def test_mistakes_are_lines(given, problem, toy, tmp_path):
    with pytest.raises(UserError, match=problem):
        run(toy, tmp_path / "out", **{"select": "dps"} | given)


# The page


def session_of(source, out, **knobs):
    return open_session(Knobs(runs=[str(source)], rater="Ann", again=False, out=str(out), **knobs))


def test_the_page_asks_what_is_least_known(tmp_path):
    """Differences along one axis are 4 and 3.9, along the other 3 and .1. What was said of the
    first makes the second less uncertain than the third: by hand, 1.8 and 1.9."""
    ends, known = ([4, 0], [3.9, 0], [0, 3], [0, 0.1]), {}
    with open(tmp_path / "samples.jsonl", "w") as file:
        for name, end in zip("abcd", ends, strict=True):
            known |= {(name, f"{name}0"): [0, 0], (name, f"{name}1"): end}
            row = {"prompt": name, "before": f"{name}0", "after": f"{name}1"}
            file.write(json.dumps(row) + "\n")
    session = session_of(tmp_path, tmp_path / "labels.jsonl", ask="uniform")
    groups = [Group(name, [f"{name}0", f"{name}1"], ["", ""]) for name in "abcd"]
    features = lambda texts: np.array([known[text] for text in texts], float)  # noqa: E731
    session.asker = Asker(session, groups, "uncertainty", features)
    asked = []
    for _ in range(4):
        question = session.ask("tab")
        asked.append(question.prompt)
        best = question.responses.index(f"{question.prompt}1")
        session.answer("tab", question.name, {"ranking": [best, 1 - best]})
    assert asked == list("acbd") and session.ask("tab") is None
    gaps, outcomes = session.asker.told()
    np.testing.assert_equal(gaps, [ends[0], ends[2], ends[1], ends[3]])
    np.testing.assert_equal(outcomes, 1)
    session.undo("tab", session.last())
    assert len(session.asker.told()[1]) == 3
    session.shown.clear()
    session.add_written([{"prompt": "e", "before": "old", "after": "new"}])
    assert session.ask("tab").prompt == "e"  # what was written just now comes first


@pytest.mark.parametrize("method", METHODS)
def test_the_page_asks_by_a_run(method, toy, tmp_path):
    given = dict(samples=4, prompts=3, ask=method)
    session = session_of(toy / "sft", tmp_path / "labels.jsonl", **given)
    if method == METHODS[0]:
        assert session.asker.features.shape[:2] == (3, 4)
    for n in range(5):
        question = session.ask("tab")
        session.answer("tab", question.name, {"ranking": [[0, 1]] if n == 3 else [1, 0]})
    assert len(session.answered) == 5
    gaps, outcomes = session.asker.told()
    assert outcomes.tolist() == [1, 1, 1, 0.5, 1] and len(gaps) == 5


def test_large_groups_are_asked_in_parts():
    texts = [str(i) for i in range(13)]
    parts = parts_of([Group("p", texts, list("abcdefghijklm")), Group("q", ["x"], [""])])
    assert [len(part.responses) for part in parts] == [5, 4, 4, 1]
    assert [text for part in parts[:3] for text in part.responses] == texts
    assert parts[1].sources == list("fghi")


def test_asking_needs_a_model_and_pairs(tmp_path):
    path = tmp_path / "answers.jsonl"
    rows = [{"prompt": str(i), "responses": ["a", "b"], "ranking": [0, 1]} for i in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for given, problem in (({}, "expected a run"), ({"n": 3}, "comparisons of two"),
                           ({"kind": "critique"}, "comparisons of two")):  # fmt: skip
        with pytest.raises(UserError, match=problem):
            session_of(path, tmp_path / "out.jsonl", ask="dps", **given)


# On people


def test_components_are_of_the_covariance():
    rng = np.random.default_rng(0)
    x, others = rng.standard_normal((50, 4)) * [5, 1, 3, 0.1], rng.standard_normal((6, 4))
    kept, mapped = people.components(x, others, 2)
    _, axes = np.linalg.eigh(np.cov(x.T))
    by_hand = (x - x.mean(0)) @ axes[:, :1:-1]
    by_hand /= np.sqrt((by_hand**2).sum(1).mean())
    np.testing.assert_allclose(abs(kept), abs(by_hand), atol=1e-10)
    middle = people.components(x, x.mean(0)[None], 2)[1]
    np.testing.assert_allclose(middle, 0, atol=1e-10)
    assert mapped.shape == (6, 2)


def test_people_say_what_a_rater_gave():
    rng = np.random.default_rng(0)
    said = [people.answer(np.array([0, 2]), np.array([1, 0]), rng) for _ in range(4000)]
    shares = [np.mean(np.array(said) == value) for value in (0, 0.5, 1)]
    np.testing.assert_allclose(shares, [0.25, 0.25, 0.5], atol=0.03)  # of 0 1, 0 0, 2 1, 2 0


def test_what_is_shown_and_learnt_is_measured(monkeypatch):
    """Where all know what is best and its one feature tells: 8 points from 0 to 7 a prompt."""
    monkeypatch.setattr(people, "AT", (10, 56))
    monkeypatch.setattr(people, "PROMPTS", 2)
    points = np.arange(16.0) // 2
    both = people.Rated(points[:, None] / 10, [[point] for point in points], points)
    pairs = np.array([[8, 0], [15, 3], [4, 2], [3, 2]])
    found = people.run_one(both, both, pairs, "uniform", 0)
    np.testing.assert_allclose(found[:, :2], [[0.875, 0], [0.875, 0]])  # one pair is a tie
    rng = np.random.default_rng(0)
    dealt = points[both.dealt(rng, 2)]
    lost = [row.max() - (a + b) / 2 for row in dealt for a, b in itertools.combinations(row, 2)]
    assert len(lost) == 56
    np.testing.assert_allclose(found[1, 2], np.mean(lost))  # in the end all pairs are shown


def test_the_command_of_people(toy, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(people, "AT", (5, 10))
    monkeypatch.setattr(people, "PROMPTS", 9)
    path, rng = tmp_path / "words.jsonl", np.random.default_rng(0)
    with open(path, "w") as file:
        for _ in range(120):
            word = "".join(rng.choice(list("abcdefgh"), 6))
            row = {"prompt": "", "response": word, "rating": int(rng.integers(5))}
            file.write(json.dumps(row) + "\n")
    given = dict(run=str(toy / "sft"), data=str(path), seeds=2, dimensions=4)
    people.main(people.Knobs(**given))
    said = capsys.readouterr().out
    assert all(f"\n{name}" in said for name in (*METHODS, "accuracy", "favourite", "shown"))
    monkeypatch.setattr(people, "PROMPTS", 90)
    with pytest.raises(UserError, match="expected 720"):
        people.main(people.Knobs(**given))
