"""`python -m minirlhf.data`: its figures, rows and suspicions, on small files counted by hand."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from minirlhf import sft
from minirlhf.data import __main__ as command
from minirlhf.data import load_feedback, show
from minirlhf.tokenizer import Tokenizer

BYTES = Tokenizer.train([], 257)
ROOT = Path(__file__).parent.parent


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def pair(i, **more):
    texts = {"prompt": f"q{i}", "chosen": f"good {i}", "rejected": f"bad {i}"}
    return texts | more


def shown(path, capsys, **knobs):
    """(the JSON figures, what a person reads) of a source."""
    command.main(command.Knobs(data=path, json=True, **knobs))
    found = json.loads(capsys.readouterr().out)
    command.main(command.Knobs(data=path, **knobs))
    return found, capsys.readouterr().out


def test_without_a_model_it_has_the_tokens_of_a_fresh_one():
    assert command.Knobs().vocab_size == sft.Knobs().vocab_size


def test_figures_of_pairs(tmp_path, capsys):
    """40 pairs, one of them twice, and a ranking of three; a key that no form uses."""
    records = [pair(i, source="web") for i in range(40)] + [pair(3)]
    records.append({"prompt": "r", "responses": ["x", "y", "z"], "ranking": [2, 0, 1]})
    found, text = shown(write(tmp_path / "a.jsonl", records), capsys, vocab_size=257)
    assert (found["records"], found["answers"], found["items"], found["merged"]) == (42, 85, 83, 2)
    assert found["kind"] == "comparison" and found["form"] == "jsonl"
    assert found["unused"] == ["source"] and "source" not in found["keys"]
    train, test = found["train"], found["test"]
    assert train["items"] + test["items"] == 83 and train["units"] + test["units"] == 41
    pairs = train["comparisons"]["pairs"] + test["comparisons"].get("pairs", 0)
    lists = [side["comparisons"].get("rankings of 3", 0) for side in (train, test)]
    assert (pairs, sum(lists)) == (41, 1)
    assert found["test_texts_seen_in_training"] == 0 and found["share_seen"] == 0
    assert train["prompt_tokens"][2] == 3 and train["response_tokens"][2] == len("good 39") + 1
    assert found["base_model_texts"] == train["units"]
    for words in ("keys not used", "source", "said again, merged", "rankings of 3"):
        assert words in text
    lines = text.replace(str(tmp_path), "").split("\n")
    assert max(map(len, lines)) <= 80


def test_rows(tmp_path, capsys):
    records = [pair(i) for i in range(30)]
    records.append({"prompt": "r", "responses": ["x", "y", "z"], "ranking": [2, 0, 1]})
    rows = tmp_path / "rows.jsonl"
    shown(write(tmp_path / "a.jsonl", records), capsys, rows=str(rows), vocab_size=257)
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    assert len(lines) == 63 and {line["split"] for line in lines} == {"train", "test"}
    won = set()
    for line in lines:
        ids = [BYTES.eos, *f"{line['prompt']}{line['response']}".encode(), BYTES.eos]
        assert len(line["tokens"]) == len(ids)
        assert line["prompt_length"] == 1 + len(line["prompt"])
        for other in line["compared_with"]:
            assert lines[other]["unit"] == line["unit"] and lines[other]["split"] == line["split"]
            won.add((line["response"], lines[other]["response"]))
    expected = {(f"good {i}", f"bad {i}") for i in range(30)}
    assert won == expected | {("z", "x"), ("z", "y"), ("x", "y")}


@pytest.mark.parametrize("key, low, high", [("rating", 1.5, 4), ("label", False, True)])
def test_rows_of_rated_answers(tmp_path, capsys, key, low, high):
    """Two answers to each of 15 prompts, one of them rated twice, and one alone with its own."""
    records = []
    for i in range(15):
        records.append({"prompt": f"q{i}", "response": f"a{i}", key: low})
        records.append({"prompt": f"q{i}", "response": f"b{i}", key: high})
    records += [records[0] | {key: high}, {"prompt": "alone", "response": "c", key: low}]
    rows = tmp_path / "rows.jsonl"
    shown(write(tmp_path / "a.jsonl", records), capsys, rows=str(rows), vocab_size=257)
    lines = {}
    numbered = [json.loads(line) for line in rows.read_text().splitlines()]
    for line in numbered:
        lines[line["response"]] = line
    assert len(numbered) == len(lines) == 31
    twice = [float(low), float(high)]
    assert lines["a0"]["ratings"] == twice
    said = [lines["a1"].get("label"), lines["a1"].get("ratings")]
    assert said == ([False, None] if key == "label" else [None, [1.5]])
    for i in range(15):
        beaten = [numbered[k]["response"] for k in lines[f"b{i}"]["compared_with"]]
        assert beaten == [f"a{i}"] and lines[f"a{i}"]["compared_with"] == []
    assert lines["c"]["compared_with"] == []


def test_prompts_alone(tmp_path, capsys):
    records = [{"prompt": f"what is {i} + {i}", "answer": 2 * i} for i in range(20)]
    rows = tmp_path / "rows.jsonl"
    found, _ = shown(write(tmp_path / "a.jsonl", records), capsys, rows=str(rows), vocab_size=257)
    assert found["kind"] == "prompt" and "base_model_texts" not in found
    for line in map(json.loads, rows.read_text().splitlines()):
        i = int(line["prompt"].split()[2])
        assert line["columns"] == {"answer": 2 * i} and line["response"] == ""
        assert line["tokens"] == [BYTES.eos, *BYTES.encode(line["prompt"])]


def signs_of(tmp_path, capsys, records):
    path = write(tmp_path / "a.jsonl", records)
    found, text = shown(path, capsys, vocab_size=257, n_ctx=256)
    assert all(sign.split(":")[0].split()[0] in text for sign in found["suspicious"])
    return " | ".join(found["suspicious"])


ANIMALS = "ant bee cat dog eel fox gnu hen ibis jay kite lark mole newt owl pig rat seal"
WORDS = ANIMALS.split()


def sentence(i, n=9):
    """n words, other ones for each i."""
    return " ".join(WORDS[(i * 7 + k * (1 + i // 18)) % 18] + str(i) for k in range(n))


def test_nothing_suspicious(tmp_path, capsys):
    records = []
    for i in range(100, 400):
        words = {"chosen": f"{sentence(i)} joy", "rejected": f"{sentence(i + 500)} woe"}
        records.append({"prompt": f"q{i}", **words})
    assert signs_of(tmp_path, capsys, records) == ""


def test_signs(tmp_path, capsys):
    alike = [pair(i) | {"chosen": f"Well {i} aa", "rejected": f"Well {i} b"} for i in range(60)]
    signs = signs_of(tmp_path, capsys, alike)
    assert "begin alike, with 'Well'" in signs and "longer of two answers" in signs
    assert "little for a vocabulary of 257" in signs
    shared = [pair(i) | {"rejected": "No."} for i in range(60)]
    assert "stand in training too" in signs_of(tmp_path, capsys, shared)
    empty = [pair(i) | {"rejected": ""} for i in range(60)]
    assert "are empty" in signs_of(tmp_path, capsys, empty)


def test_near_duplicates():
    train = ["The quick brown fox jumps over the lazy dog today", "something else entirely"]
    test = ["the QUICK brown fox jumps over the lazy dog, today!", train[0], "nothing of the sort"]
    assert show.near_duplicates(train, test) == [test[0]]


def test_chance(tmp_path, capsys):
    """Labels by coin are named as chance, labels by a word are not."""
    records = []
    for i in range(1500):
        a, b = f"good {sentence(i, 4)}", f"poor {sentence(i + 5000, 4)}"
        coin = (i * 2654435761 >> 7) % 2
        texts = {"chosen": a if coin else b, "rejected": b if coin else a}
        records.append({"prompt": f"q{i}", **texts})
    assert "labels may be chance" in signs_of(tmp_path, capsys, records)
    for record in records:
        pair_of = sorted((record["chosen"], record["rejected"]))
        record["chosen"], record["rejected"] = pair_of
    assert "labels may be chance" not in signs_of(tmp_path, capsys, records)


def test_the_command(tmp_path):
    """As a person calls it, with a text that would move the cursor of a terminal."""
    records = [pair(i) | {"chosen": f"\x1b[2J good {i}"} for i in range(12)]
    write(tmp_path / "a.jsonl", records)
    argv = [sys.executable, "-m", "minirlhf.data", "a.jsonl", "--vocab-size", "257"]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, env=env())
    assert done.returncode == 0 and "a.jsonl: 12 records" in done.stdout, done.stderr
    assert "\x1b" not in done.stdout and "\\x1b[2J" in done.stdout.replace("|", "")
    argv[3] = "none.jsonl"
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, env=env())
    assert done.returncode == 2 and "none.jsonl: no such file" in done.stderr
    assert "Traceback" not in done.stderr


def env():
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def test_feedback_of_units(tmp_path):
    feedback = load_feedback(write(tmp_path / "a.jsonl", [pair(i) for i in range(40)]))
    for items in (feedback.train, feedback.test):
        assert all(len({items.units[i] for i in group}) == 1 for group in items.groups)
        assert len(set(items.units)) == len(items.groups)
