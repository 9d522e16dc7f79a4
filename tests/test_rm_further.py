"""Further rated text, which is read first."""

from types import SimpleNamespace

import numpy as np
import pytest

import train_rm
from minirlhf import data
from minirlhf.data import Feedback, Items
from minirlhf.engine.cli import UserError
from minirlhf.engine.rows import Rows
from minirlhf.feedback.checks import check_rm
from minirlhf.feedback.further import further_first
from minirlhf.tokenizer import load_tokenizer

TEXTS = ["dog", "cat", "bird", "cow", "hen", "a longer one"]
RATINGS = [np.array([i, i + 1]) for i in range(6)]
BASE = SimpleNamespace(config=SimpleNamespace(n_ctx=9))


@pytest.fixture
def tokenizer(toy):
    return load_tokenizer(toy / "sft" / "model")


def source(ratings):
    items = Items([""] * 3, ["x", "y", "z"], ["w"] * 3, [np.array([1]), np.array([2]), np.zeros(1)])
    return Feedback("words", items, items, more_text=TEXTS, more_ratings=ratings)


def read(tokenizer, feedback, **changes):
    """(items, rows, plan) of the source with its further text, and those without."""
    knobs = train_rm.Knobs(batch_size=2, **changes)
    items, *encoded = data.encode_items(feedback.train, tokenizer, 9)
    rows = Rows(*encoded, tokenizer.pad, "cpu")
    plan = list(items.epoch(4, np.random.default_rng(1)))
    without = items, rows, plan
    rng = np.random.default_rng(0)
    items, rows, first, plan = further_first(knobs, feedback, BASE, tokenizer, rng, *without)
    return (items, rows, first + plan), without


def test_it_stands_behind_the_items_and_is_read_before_them(tokenizer):
    (items, rows, plan), (own, own_rows, own_plan) = read(tokenizer, source(RATINGS), text_epochs=2)
    assert items.responses == own.responses + TEXTS
    assert [r.tolist() for r in items.ratings[3:]] == [r.tolist() for r in RATINGS]
    expected = own_rows.tokens[1].tolist()
    assert rows.tokens[1].tolist() == expected and len(rows.tokens) == 9
    for row, text in zip(rows.tokens[3:8], TEXTS, strict=False):
        assert tokenizer.decode(row) == text and row[0] == row[-1] == tokenizer.eos
    assert len(rows.tokens[8]) == 9  # cut to the context
    assert rows.prompt_lengths.tolist() == [1] * 9
    assert plan[6:] == own_plan
    for part in (plan[:3], plan[3:6]):  # two passes, each text once, three batches
        assert sorted(np.concatenate([batch.rows for batch in part])) == list(range(3, 9))
    assert [batch.rows.tolist() for batch in plan[:3]] != [b.rows.tolist() for b in plan[3:6]]


def test_labels_are_of_its_own_ratings(tokenizer):
    (_, _, plan), _ = read(tokenizer, source(RATINGS))
    for batch in plan[:3]:
        first, second = batch.rows[batch.pairs[0]] - 3
        a, b = RATINGS[first], RATINGS[second]
        chances = [(x > y) + (x == y) / 2 for x in a for y in b]
        assert batch.labels.tolist() == [np.mean(chances)]


@pytest.mark.parametrize("ratings, changes", [([], {}), (RATINGS, {"text_epochs": 0})])
def test_nothing_changes_without_it(tokenizer, ratings, changes):
    found, without = read(tokenizer, source(ratings), **changes)
    assert all(a is b for a, b in zip(found[:2], without[:2], strict=True))
    assert all(a is b for a, b in zip(found[2], without[2], strict=True))


def test_a_share_of_what_was_said_is_one_of_it_too(tokenizer):
    (items, _, plan), _ = read(tokenizer, source(RATINGS), share=0.5)
    assert len(items) == 6 and set(items.responses[3:]) < set(TEXTS)
    assert sorted(np.concatenate([batch.rows for batch in plan[:-1]])) == [3, 4, 5]


def test_passes_over_nothing_are_refused():
    items = source([]).train
    with pytest.raises(UserError, match="--text-epochs 2 has no say where no further text is"):
        check_rm(train_rm.Knobs(text_epochs=2), items)
    check_rm(train_rm.Knobs(text_epochs=2), items, RATINGS)


def test_the_script_reads_it(toy, monkeypatch, tmp_path):
    feedback = data.load_feedback("toy")
    feedback.train.ratings = [np.array([i % 5]) for i in range(len(feedback.train))]
    feedback.more_text, feedback.more_ratings = TEXTS, RATINGS
    monkeypatch.setattr(data, "load_feedback", lambda _: feedback)
    steps = []
    for text_epochs in (0, 3):
        few = {"init": str(toy / "sft"), "epochs": 1, "batch_size": 64, "response_length": 4}
        train_rm.main(train_rm.Knobs(data="words", out=tmp_path, text_epochs=text_epochs, **few))
        steps.append(len((tmp_path / "metrics.jsonl").read_text().splitlines()))
    assert steps[1] - steps[0] == 3
