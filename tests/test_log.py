"""What a run leaves behind, who may write there, and the figures over sampled answers."""

import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from minirlhf import sft
from minirlhf.engine import cli, log
from minirlhf.engine.cli import UserError
from minirlhf.engine.files import FileError, finished
from minirlhf.look.answers import Answer, answer_figures, distinct_bigrams

CPU = torch.device("cpu")


def run(steps=1, **knobs):
    tokenizer = SimpleNamespace(ranks={b"a": 0})
    return log.Run("x", sft.Knobs(**knobs), range(steps), CPU, tokenizer, {}, {"data": None})


def test_distinct_bigrams_by_hand():
    # (a b) (b a) (a b) | (b a): 4 pairs, 2 distinct
    assert distinct_bigrams(["a b a b", "b a"]) == 0.5
    assert distinct_bigrams(["word", ""]) == 0


def test_answer_figures_are_means():
    answers = [Answer("p", "good", 3, 1.0, -1.0), Answer("p", "bad bad", 5, 4.0, 3.0)]
    figures = answer_figures(answers)
    assert figures["eval/score"] == 1.0
    assert figures["eval/kl"] == 2.5
    assert figures["eval/response_length"] == 4.0


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
    states = ["state/00000004.safetensors", "state/00000008.safetensors.tmp1"]
    for old in (*states, "samples.jsonl.tmp1", "model/model.safetensors.tmp1"):
        (tmp_path / old).touch()
    assert finished(tmp_path) == {"data": "toy"}
    run(out=tmp_path)
    assert finished(tmp_path) is None
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {"config.json", "metrics.jsonl", "state/lock", "model/model.safetensors"}


def test_rows_summary_and_curves(tmp_path):
    new = run(3, out=tmp_path, seed=7)
    for step in range(3):
        figures = {"loss": torch.tensor(2.0 - step), "eval/np": np.float64(step)}
        new.log(step, figures, show=("loss",))
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
        assert len(lines) == step + 1  # each is there as soon as it is logged
    summary = new.finish({"eval/x": 1.5})
    rows = [json.loads(line) for line in lines]
    found = [(row["step"], row["loss"], row["eval/np"]) for row in rows]
    assert found == [(0, 2.0, 0.0), (1, 1.0, 1.0), (2, 0.0, 2.0)]
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert summary["seed"] == 7 and summary["eval/x"] == 1.5
    pytest.importorskip("matplotlib")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("n", [0, 1, 61])
def test_curves_of_few_and_of_many_points(n, tmp_path):
    pytest.importorskip("matplotlib")
    values = [float("nan"), -1e-6, 1e7]
    rows = [{"step": i, "seconds": 1, "a/b": values[i % 3], "c": i / 7} for i in range(n)]
    log.curves.plot(rows, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


# One directory, one run


def is_free(out):
    """Whether another process could have the lock."""
    lock = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'a'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    command = [sys.executable, "-c", lock, out / "state" / "lock"]
    return not subprocess.run(command, capture_output=True).returncode


def test_two_runs_of_one_process_exclude_each_other(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "run", target_is_directory=True)
    first = run(out=tmp_path / "run")
    for again in (tmp_path / "run", tmp_path / "link", os.path.relpath(tmp_path / "run")):
        with pytest.raises(UserError, match=f"another run is writing here .process {os.getpid()} "):
            run(out=again)
    assert not is_free(tmp_path / "run")  # to be refused did not open and close the lock's file
    assert run(out=tmp_path / "other")
    first.finish({})
    second = run(out=tmp_path / "link")
    first.lock.close()  # once more: that is no longer its own
    with pytest.raises(UserError, match="another run is writing here"):
        run(out=tmp_path / "run")
    second.finish({})
    assert is_free(tmp_path / "run")


def test_a_run_that_is_forgotten_holds_no_lock(tmp_path):
    run(out=tmp_path)
    gc.collect()
    assert is_free(tmp_path) and run(out=tmp_path)


def test_a_stage_that_fails_holds_no_lock(tmp_path):
    """In whatever line, and although the error's traceback still holds the run."""
    kept = []

    @cli.contained
    def main(where):
        new = run(2, out=tmp_path, resume=where == "begin")
        for step, _ in new.steps():
            new.log(step, {"loss": 1.0})
            if where == "loop":
                raise LookupError

    (tmp_path / "state").mkdir()
    broken = tmp_path / "state" / "00000001.safetensors"
    broken.write_text("broken")
    for where, error in (("begin", UserError), ("loop", LookupError)):
        with pytest.raises(error) as caught:
            main(where)
        kept.append(caught.value.__traceback__)
        assert is_free(tmp_path)
        broken.unlink(missing_ok=True)
    main("nowhere")
    assert len(kept) == 2 and is_free(tmp_path)


# What cannot be written is the user's to mend


def test_out_that_is_a_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="not a directory"):
        run(out=tmp_path / "file")


def test_out_that_cannot_be_written(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(FileError, match=f"^--out {tmp_path}/new: Permission denied$"):
        run(out=tmp_path / "new")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_while_metrics_are_written(tmp_path):
    @cli.contained
    def main():
        new = run(out=tmp_path)
        new.metrics = open("/dev/full", "a", buffering=1)  # noqa: SIM115
        new.log(0, {"loss": 1.0})

    with pytest.raises(FileError, match="^/dev/full: No space left on device$"):
        main()


def test_a_full_disk_while_the_summary_is_written(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    new = run(out=tmp_path)
    monkeypatch.setattr(log.curves, "plot", lambda rows, path: None)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FileError, match="summary.json: No space left on device$"):
        new.finish({})
    assert not list(tmp_path.glob("*.tmp*")) and not (tmp_path / "summary.json").exists()
