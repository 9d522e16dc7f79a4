"""What a run leaves behind, who may write there, and the figures over sampled answers."""

import contextlib
import gc
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train_dpo
import train_ppo
import train_rm
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
    knobs = {"out": "x", "seed": 0, "save_every": 200, "on_nonfinite": "stop", "lr": 1.0}
    (tmp_path / "config.json").write_text(json.dumps(knobs))  # of a version without a mark
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


@cli.contained
def timed(out, clock, last=5, resume=False):
    """The bar's words of a run whose step n takes n + 1 seconds, a state 2 and its start 50."""
    new = run(6, out=out, save_every=3, resume=resume)
    save = new.state.save
    new.state.save = lambda *args, **facts: (clock.append(clock[-1] + 2), save(*args, **facts))
    clock.append(clock[-1] + 50)
    for step, _ in new.steps():
        clock.append(clock[-1] + step + 1)
        new.log(step, {"loss": 1.0, "perf/tokens": 60}, show=("loss",))
        if step == last:
            return new.bar.postfix


def test_tokens_a_second_and_time_left(tmp_path, monkeypatch):
    """By hand; the second life goes on after three steps, of whose time it knows nothing."""
    clock = [100.0]
    monkeypatch.setattr(log, "time", SimpleNamespace(perf_counter=lambda: clock[-1]))
    assert timed(tmp_path / "whole", clock) == "loss=1, tokens/s=10"
    timed(tmp_path / "two", clock, last=4)
    timed(tmp_path / "two", clock, resume=True)
    found = {}
    for name in ("whole", "two"):
        rows = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        found[name] = [(row["perf/tokens_per_s"], row["perf/seconds_left"]) for row in rows]
    first = [(60, 5), (30, 6), (20, 6)]
    assert found["whole"] == [*first, (10, 6), (12, 3.4), (10, 0)]  # a state was saved before 10
    assert found["two"] == [*first, (15, 8), (12, 4.5), (10, 0)]


def test_curves_leave_out_the_clock(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    drawn = []
    monkeypatch.setattr(log.curves, "draw", lambda axes, points: drawn.append(points))
    new = run(1, out=tmp_path)
    new.log(0, {"loss": 1.5, "perf/tokens": 60})
    new.finish({})
    assert drawn == [[(0, 1.5)], [(0, 60)]]


@pytest.mark.parametrize("n", [0, 1, 61])
def test_curves_of_few_and_of_many_points(n, tmp_path):
    pytest.importorskip("matplotlib")
    values = [float("nan"), -1e-6, 1e7]
    rows = [{"step": i, "seconds": 1, "a/b": values[i % 3], "c": i / 7} for i in range(n)]
    log.curves.plot(rows, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


# A directory is a run's, or nothing in it is touched

KNOBS = '{"out": "runs/x", "seed": 0, "save_every": 200, "on_nonfinite": "stop", "lr": 0.001}'
FOREIGN = {
    "a model": {"config.json": '{"model_type": "gpt2"}', "model.safetensors": "weights"},
    "a model of a run": {"model/config.json": "{}", "model/model.safetensors": "weights"},
    "data named as ours": {"metrics.jsonl": '{"prompt": "a"}', "samples.jsonl": "{}"},
    "states of another program": {"state/00000001.safetensors": "x", "state/lock": "x"},
    "a project": {"pyproject.toml": "x", "config.json": "not JSON"},
    "settings": {"config.json": '["out", "seed", "save_every", "on_nonfinite"]'},
    "a summary": {"summary.json": '{"data": "toy"}'},
    "a mark elsewhere": {"model/config.json": KNOBS},
    "a hidden file": {".git/config": "x"},
    "started by another": {"notes.json.tmp12": "x"},
}


def contents(folder):
    """All that lies there, links not followed."""
    found = {}
    for path in sorted(folder.rglob("*")):
        plain = path.is_file() and not path.is_symlink()
        found[str(path)] = path.read_bytes() if plain else os.path.islink(path)
    return found


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("kind", FOREIGN)
def test_a_folder_that_is_not_ours_is_left_alone(kind, resume, tmp_path):
    for name, text in FOREIGN[kind].items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    before = contents(tmp_path)
    with pytest.raises(UserError, match="not empty, and no run of ours"):
        run(out=tmp_path, resume=resume)
    with pytest.raises(UserError, match="not empty, and no run of ours"):
        sft.main(sft.Knobs(data="toy", out=tmp_path, resume=resume))
    assert contents(tmp_path) == before


OURS = {
    "new": {},
    "a run of before": {"config.json": KNOBS, "metrics.jsonl": "{}", "notes.txt": "mine"},
    "killed at its first file": {"state/lock": "process 1"},
    "killed a bit later": {"state/lock": "process 1", "config.json.tmp17": "{"},
}


@pytest.mark.parametrize("kind", OURS)
def test_a_folder_that_is_ours_is_taken(kind, tmp_path):
    for name, text in OURS[kind].items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    run(out=tmp_path).finish({})
    assert json.loads((tmp_path / "config.json").read_text())["minirlhf"] == "x"
    assert not list(tmp_path.glob("*.tmp*"))
    assert not OURS[kind].get("notes.txt") or (tmp_path / "notes.txt").read_text() == "mine"
    run(out=tmp_path)  # by its mark


LINKS = ["config.json", "metrics.jsonl", "samples.jsonl", "summary.json", "curves.png", "state",
         "model", "state/lock", "state/00000001.safetensors", "model/model.safetensors",
         "model/config.json", "model/tokenizer.json", "config.json.tmp5"]  # fmt: skip


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("name", LINKS)
def test_no_link_is_followed(name, resume, tmp_path):
    out, theirs = tmp_path / "run", tmp_path / "theirs"
    theirs.mkdir()
    for file in ("00000001.safetensors", "model.safetensors", "file.tmp1", "config.json"):
        (theirs / file).write_text(KNOBS)
    run(out=out).finish({})
    (out / "model").mkdir()
    link, is_folder = out / name, name in ("state", "model")
    if link.is_dir():
        link.rename(tmp_path / "away")
    link.unlink(missing_ok=True)
    link.symlink_to(theirs if is_folder else theirs / "config.json", target_is_directory=is_folder)
    before = contents(theirs)
    expected = pytest.raises(UserError, match="is a link|no run of ours")
    with contextlib.nullcontext() if "tmp" in name else expected:
        run(out=out, resume=resume)
    assert contents(theirs) == before and (link.is_symlink() or "tmp" in name)


def test_only_leftovers_of_our_own_names_go(tmp_path):
    run(out=tmp_path).finish({})
    (tmp_path / "model").mkdir()
    ours = ["summary.json.tmp1", "samples.jsonl.tmp23", "curves.png.tmp4", "config.json.tmp5",
            "nonfinite-step-3-0.jsonl.tmp6", "state/00000001.safetensors.tmp7",
            "model/model.safetensors.tmp8", "model/tokenizer.json.tmp9"]  # fmt: skip
    theirs = ["results.tmp1", "summary.json.tmp", "summary.json.tmpx1", "summary.json.tmp1.bak",
              "x-summary.json.tmp1", "model/notes.tmp1", "state/mine.safetensors",
              "state/1.safetensors", "nonfinite-step-mine.jsonl", "a/config.json.tmp1"]  # fmt: skip
    (tmp_path / "a").mkdir()
    (tmp_path / "curves.png.tmp99").mkdir()
    for name in ours + theirs:
        (tmp_path / name).write_text("x")
    run(out=tmp_path)
    assert not any((tmp_path / name).exists() for name in ours)
    assert all((tmp_path / name).read_text() == "x" for name in theirs)
    assert (tmp_path / "curves.png.tmp99").is_dir()


def inputs(tmp_path):
    """Scripts with knobs of which something lies in --out, itself or behind a link."""
    out = tmp_path / "out"
    inside = {"data": out / "words.jsonl", "init": out, "reward": out}
    files = {"reward": f"{out}/rules.py:score"}
    for script in (sft, train_rm, train_ppo, train_dpo):
        for name, path in inside.items():
            if not hasattr(script.Knobs(), name):
                continue
            own = {} if script is sft or name == "init" else {"init": tmp_path / "base"}
            yield script, own | {name: path}
            if path == out:
                yield script, own | {name: path / "model"}
            link = tmp_path / f"link{path.suffix}"
            link.unlink(missing_ok=True)
            link.symlink_to(path)
            yield script, own | {name: link}
    yield train_ppo, {"init": tmp_path / "base"} | files


def test_what_a_run_starts_from_is_not_written_over(toy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(toy / "sft", tmp_path / "base")
    shutil.copytree(toy / "rm", tmp_path / "out")
    words = [{"prompt": "", "response": "ab" * i, "rating": i} for i in range(1, 40)]
    (tmp_path / "out" / "words.jsonl").write_text("\n".join(map(json.dumps, words)))
    (tmp_path / "out" / "rules.py").write_text("def score(prompts, responses):\n    pass\n")
    before = contents(tmp_path / "out")
    tried = 0
    for script, given in inputs(tmp_path):
        for out in ("out", tmp_path / "base" / ".." / "out"):
            knobs = script.Knobs(**{"data": "toy"} | given | {"out": out})
            with pytest.raises(UserError, match="--out .*: what this run starts from lies there"):
                script.main(knobs)
            tried += 1
    assert tried > 40 and contents(tmp_path / "out") == before


def test_a_model_directory_is_no_run(toy, tmp_path):
    shutil.copytree(toy / "sft", tmp_path / "a")
    before = contents(tmp_path)
    for out in (tmp_path / "a" / "model", tmp_path / "a" / "state"):
        with pytest.raises(UserError, match="no run of ours"):
            sft.main(sft.Knobs(data="toy", init=tmp_path / "a", out=out))
    assert contents(tmp_path) == before


def test_wrong_places_are_found_before_anything_is_made(toy, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "taken" / "rm").mkdir(parents=True)
    (tmp_path / "taken" / "rm" / "config.json").write_text("{}")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    before = contents(tmp_path)
    for out, expected in (
        ("file", "a file, not a directory"), ("dangling", "a file, not a directory"),
        ("file/below/ppo", "file is a file"), ("taken/ppo", "taken/rm: not empty, and no run"),
        ("/proc/none/ppo", "--out|no right to write"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=expected):
            train_ppo.main(train_ppo.Knobs(data="toy", out=tmp_path / out))
    assert contents(tmp_path) == before


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
