"""What a run leaves behind, and the figures over sampled answers."""

import json

import numpy as np
import pytest
import torch

from minirlhf import log, sft
from minirlhf.checkpoint import finished
from minirlhf.sampling import Answer

CPU = torch.device("cpu")


def test_distinct_bigrams_by_hand():
    # (a b) (b a) (a b) | (b a): 4 pairs, 2 distinct
    assert log.distinct_bigrams(["a b a b", "b a"]) == 0.5
    assert log.distinct_bigrams(["word", ""]) == 0


def test_answer_figures_are_means():
    answers = [Answer("p", "good", 3, 1.0, -1.0), Answer("p", "bad bad", 5, 4.0, 3.0)]
    figures = log.answer_figures(answers)
    assert figures["eval/score"] == 1.0 and figures["eval/kl"] == 2.5 and figures["eval/response_length"] == 4.0


def test_vader_reads_prompt_and_response():
    pytest.importorskip("vaderSentiment")
    good, bad = (log.answer_figures([Answer("The film is", text, 3, 0.0, 0.0)])["eval/vader"] for text in (" great.", " awful."))
    assert good > 0.4 > -0.4 > bad


def test_a_new_run_empties_an_old_one(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").touch()
    for old in ("summary.json", "metrics.jsonl", "samples.jsonl", "curves.png"):
        (tmp_path / old).write_text("{}")
    assert finished(tmp_path) == {}
    log.Run("x", sft.Knobs(out=str(tmp_path)), 1, CPU)
    assert finished(tmp_path) is None
    assert not (tmp_path / "samples.jsonl").exists() and not (tmp_path / "curves.png").exists()


def test_rows_summary_and_curves(tmp_path):
    run = log.Run("x", sft.Knobs(out=str(tmp_path), seed=7), 3, CPU)
    for step in range(3):
        run.log(step, {"loss": torch.tensor(2.0 - step), "eval/np": np.float64(step)}, show=("loss",))
    summary = run.finish({"eval/x": 1.5})
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(r["step"], r["loss"], r["eval/np"]) for r in rows] == [(0, 2.0, 0.0), (1, 1.0, 1.0), (2, 0.0, 2.0)]
    assert json.loads((tmp_path / "summary.json").read_text()) == summary and summary["seed"] == 7 and summary["eval/x"] == 1.5
    pytest.importorskip("matplotlib")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_out_that_is_a_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(log.UserError, match="not a directory"):
        log.Run("x", sft.Knobs(out=str(tmp_path / "file")), 1, CPU)
