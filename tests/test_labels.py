"""Labels of eleven kinds: read, written and refused; the comparisons in them, and their split."""

import json

import numpy as np
import pytest

from minirlhf import data
from minirlhf.data.labels import AXES, KINDS
from minirlhf.engine.cli import UserError
from minirlhf.engine.files import write_lines

TWO = {"responses": ["a b", "c"]}
ONE = {"response": "a b"}
GOOD = [
    ("critique", ONE | {"level": 2, "of": 3}),
    ("comparison", TWO | {"ranking": [1, 0]}),
    ("comparison", TWO | {"ranking": [[0, 1]], "both_bad": True}),
    ("comparison", {"responses": ["a", "b", "c"], "best": 1}),
    ("comparison", TWO | {"ranking": [0, 1], "p": 0.75}),
    ("intertemporal", ONE | {"curve": [[0, 0.5], [3, 1]]}),
    ("proxy", TWO | {"weights": {"words": 1}, "others": [{"words": -1}, {"words": 0, "x": 2.5}]}),
    ("social", ONE | {"reaction": "smile"}),
    ("improvement", ONE | {"improved": "a c"}),
    ("language", ONE | {"others": ["a", "b"], "utterance": "less words",
                        "grammar": ["more words", "less words"]}),
    ("estop", ONE | {"stop": 1}),
    ("estop", ONE | {"stop": None}),
    ("importance", ONE | {"level": 0, "of": 2, "marks": [[[0, 1]]]}),
    ("importance", TWO | {"ranking": [0, 1], "marks": [[], [[0, 1]]]}),
    ("trace", {"responses": ["a", "b", "c"], "feature": "length"}),
    ("similarity", {"responses": ["a", "b", "c"], "odd": 2}),
]  # fmt: skip


def entry_of(kind, more):
    return {"version": 1, "kind": kind, "prompt": "Q: "} | more | {"rater": "ann", "seconds": 2.5}


@pytest.mark.parametrize("kind, more", GOOD)
def test_written_as_it_was_read(kind, more):
    entry = entry_of(kind, more)
    label = data.parse_label(json.loads(json.dumps(entry)), "here")
    assert data.as_entry(label) == entry
    assert label.meta == {"rater": "ann", "seconds": 2.5}
    assert len(KINDS[kind]) == len(AXES)


def test_keys_of_other_kinds_say_nothing():
    entry = entry_of("estop", ONE | {"stop": 1, "best": 0, "level": 7, "both_bad": "no"})
    label = data.parse_label(entry, "here")
    assert label.said == {"stop": 1} and not data.rankings(label)
    assert data.as_entry(label) == entry


BAD = [
    ("critique", ONE | {"level": 3, "of": 3}, "level from 0 to 2"),
    ("critique", TWO | {"level": 0, "of": 3}, "critique: expected response"),
    ("language", {"others": ["a", "b"], "utterance": "more x", "grammar": ["more x", "less x"]},
     "language: expected response"),
    ("estop", {"response": ["a"], "stop": 1}, "response: expected a text"),
    ("comparison", TWO, "ranking, or best"),
    ("comparison", TWO | {"ranking": [0, 0]}, "indices 0..1"),
    ("comparison", TWO | {"ranking": [0, [1], []]}, "indices 0..1"),
    ("comparison", TWO | {"best": 2}, "best from 0 to 1"),
    ("comparison", {"responses": ["a", "a"], "best": 0}, "responses that differ"),
    ("comparison", TWO | {"ranking": [0, 1], "p": 1.5}, "p, of 2 responses, from 0 to 1"),
    ("comparison", {"responses": list("abc"), "ranking": [0, 1, 2], "p": 0.5}, "p, of 2 resp"),
    ("comparison", TWO | {"best": 0, "ranking": [0, 1]}, "ranking, or best"),
    ("intertemporal", ONE | {"curve": [[0, 0.5], [4, 1]]}, "characters from 0 to 3"),
    ("intertemporal", ONE | {"curve": [[1, 0.5], [1, 1]]}, "that rise"),
    ("intertemporal", ONE | {"curve": [[1, 0.5], [2, float("nan")]]}, "values from 0 to 1"),
    ("proxy", TWO | {"weights": {"a": 1}, "others": []}, "others, the weights"),
    ("proxy", TWO | {"weights": {"a": "1"}, "others": [{"a": 1}]}, "objects of"),
    ("social", ONE | {"reaction": "laugh"}, "frown, neutral, smile"),
    ("improvement", ONE | {"improved": "a b"}, "that differs"),
    ("language", ONE | {"others": ["a"], "utterance": "x", "grammar": ["x", "y"]}, "more FEATURE"),
    ("language", ONE | {"others": ["a"], "utterance": "z", "grammar": ["x", "y"]}, "of the gramm"),
    ("estop", ONE, "null where it ran"),
    ("estop", ONE | {"stop": True}, "from 0 to 3, or null"),
    ("importance", ONE | {"level": 0, "of": 2, "marks": [[[1, 1]]]}, "within the 3 characters"),
    ("importance", TWO | {"ranking": [0, 1], "marks": [[]]}, "for each response"),
    ("trace", {"responses": ["a"], "feature": "x"}, "at least 2"),
    ("similarity", {"responses": ["a", "b"], "odd": 0}, "3 responses"),
    ("love", ONE, "kind \"love\", expected one of critique"),
]  # fmt: skip


@pytest.mark.parametrize("kind, more, problem", BAD)
def test_what_it_must_say(kind, more, problem):
    with pytest.raises(UserError, match="^here: .*") as e:
        data.parse_label(entry_of(kind, more), "here")
    assert problem in str(e.value)


@pytest.mark.parametrize("kind, more", GOOD)
def test_texts_of_another_kind_are_kept_apart(kind, more):
    """They are no further texts of this one."""
    stray = {"response": "stray", "responses": ["s", "t"], "improved": "u", "others": ["v"]}
    entry = entry_of(kind, stray | more)
    label, plain = data.parse_label(entry, "here"), data.parse_label(entry_of(kind, more), "here")
    assert (label.responses, label.said) == (plain.responses, plain.said)
    assert data.as_entry(label) == entry


def test_a_later_version_is_refused():
    with pytest.raises(UserError, match="version 2, expected 1"):
        data.parse_label(entry_of("estop", ONE | {"stop": 1}) | {"version": 2}, "here")


@pytest.mark.parametrize(
    "kind, more, expected",
    [
        ("comparison", {"responses": list("abc"), "ranking": [2, 0, 1]}, [[2, 0, 1]]),
        ("comparison", {"responses": list("abc"), "ranking": [[2], [0, 1]]}, [[2, 0], [2, 1]]),
        ("comparison", {"responses": list("ab"), "ranking": [[0, 1]]}, []),
        ("comparison", {"responses": list("abc"), "best": 1}, [[1, 0], [1, 2]]),
        ("improvement", ONE | {"improved": "c"}, [[1, 0]]),
        ("estop", ONE | {"stop": 0}, []),
    ],
)
def test_comparisons_in_labels(kind, more, expected):
    label = data.parse_label(entry_of(kind, more), "here")
    found = [list(order) for order in data.rankings(label)]
    assert sorted(found) == sorted(expected)


def test_a_file_of_all_kinds(tmp_path):
    path, labels = tmp_path / "labels.jsonl", []
    for n in range(8):
        for kind, more in GOOD:
            more = {k: [f"{t} {n}" for t in v] if k in ("responses", "others") and kind != "proxy"
                    else f"{v} {n}" if k in ("response", "improved") else v
                    for k, v in more.items()}  # fmt: skip
            labels.append(data.parse_label(entry_of(kind, more), "here"))
    write_lines(path, map(data.as_entry, labels))
    feedback = data.load_feedback(str(path))
    assert feedback.counts["records"] == len(labels) == 128
    assert feedback.counts["kinds"] == {
        "comparison": 32, "critique": 8, "estop": 16, "importance": 16, "improvement": 8,
        "intertemporal": 8, "language": 8, "proxy": 8, "similarity": 8, "social": 8, "trace": 8,
    }  # fmt: skip
    kept = 0
    for items in (feedback.train, feedback.test):
        kept += len(items.labels)
        for label in items.labels:
            assert [items.responses[i] for i in label.items] == label.responses
        orders = sum(len(data.rankings(label)) for label in items.labels)
        assert len(items.groups) == orders
    assert kept == len(labels)
    assert not set(feedback.train.responses) & set(feedback.test.responses)


def test_critiques_alone_are_ratings(tmp_path):
    path, labels = tmp_path / "labels.jsonl", []
    for n in range(40):
        more = {"response": f"text {n // 2}", "level": n % 5, "of": 5}
        labels.append(data.parse_label(entry_of("critique", more), "here"))
    write_lines(path, map(data.as_entry, labels))
    feedback = data.load_feedback(str(path))
    found = {}
    for items in (feedback.train, feedback.test):
        found |= dict(zip(items.responses, items.ratings, strict=True))
    assert len(found) == 20
    for n in range(0, 40, 2):
        np.testing.assert_array_equal(found[f"text {n // 2}"], [n % 5, (n + 1) % 5])


def test_other_lines_in_such_a_file_are_refused(tmp_path):
    path = tmp_path / "labels.jsonl"
    path.write_text(json.dumps(entry_of("critique", ONE | {"level": 0, "of": 2})) + "\n{}\n")
    with pytest.raises(UserError, match="line 2: no label, as the others are"):
        data.load_feedback(str(path))
