"""What a run leaves behind, and the figures over sampled answers."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from minirlhf import sft
from minirlhf.engine import log
from minirlhf.engine.cli import UserError
from minirlhf.engine.files import finished
from minirlhf.look.answers import Answer, answer_figures, distinct_bigrams

CPU = torch.device("cpu")


def run(steps=1, **knobs):
    return log.Run(
        "x",
        sft.Knobs(**knobs),
        range(steps),
        CPU,
        SimpleNamespace(ranks={b"a": 0}),
        {},
        {"data": None},
    )


def test_distinct_bigrams_by_hand():
    # (a b) (b a) (a b) | (b a): 4 pairs, 2 distinct
    assert distinct_bigrams(["a b a b", "b a"]) == 0.5
    assert distinct_bigrams(["word", ""]) == 0


def test_answer_figures_are_means():
    answers = [Answer("p", "good", 3, 1.0, -1.0), Answer("p", "bad bad", 5, 4.0, 3.0)]
    figures = answer_figures(answers)
    assert (
        figures["eval/score"] == 1.0
        and figures["eval/kl"] == 2.5
        and figures["eval/response_length"] == 4.0
    )


def test_vader_reads_prompt_and_response():
    pytest.importorskip("vaderSentiment")
    good, bad = (
        answer_figures([Answer("The film is", text, 3, 0.0, 0.0)])["eval/vader"]
        for text in (" great.", " awful.")
    )
    assert good > 0.4 > -0.4 > bad


def test_a_new_run_empties_an_old_one(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").touch()
    for old in ("summary.json", "metrics.jsonl", "samples.jsonl", "curves.png"):
        (tmp_path / old).write_text('{"data": "toy"}')
    (tmp_path / "state").mkdir()
    for old in (
        "state/00000004.safetensors",
        "state/00000008.safetensors.tmp1",
        "samples.jsonl.tmp1",
        "model/model.safetensors.tmp1",
    ):
        (tmp_path / old).touch()
    assert finished(tmp_path) == {"data": "toy"}
    run(out=str(tmp_path))
    assert finished(tmp_path) is None
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {"config.json", "metrics.jsonl", "state/lock", "model/model.safetensors"}


def test_rows_summary_and_curves(tmp_path):
    new = run(3, out=str(tmp_path), seed=7)
    for step in range(3):
        new.log(
            step, {"loss": torch.tensor(2.0 - step), "eval/np": np.float64(step)}, show=("loss",)
        )
    summary = new.finish({"eval/x": 1.5})
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(r["step"], r["loss"], r["eval/np"]) for r in rows] == [
        (0, 2.0, 0.0),
        (1, 1.0, 1.0),
        (2, 0.0, 2.0),
    ]
    assert (
        json.loads((tmp_path / "summary.json").read_text()) == summary
        and summary["seed"] == 7
        and summary["eval/x"] == 1.5
    )
    pytest.importorskip("matplotlib")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_out_that_is_a_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="not a directory"):
        run(out=str(tmp_path / "file"))
