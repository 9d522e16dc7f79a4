"""Runs that are killed, stopped, filled up or damaged, and resumed: the same weights to the last bit, each step once; what is refused."""

import hashlib
import json
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import train_dpo
import train_ppo
import train_rm
from minirlhf import gpt, sft
from minirlhf.engine import cli, optim, states
from minirlhf.engine.cli import UserError
from minirlhf.engine.log import Run
from minirlhf.tokenizer import load_tokenizer

ROOT = Path(__file__).parent.parent
STAGES = {
    "sft": (sft, dict(n_layer=1, n_head=2, n_embd=32, epochs=2, batch_size=128, save_every=5)),
    "rm": (train_rm, dict(epochs=2, batch_size=128, save_every=5)),
    "ppo": (
        train_ppo,
        dict(
            steps=8,
            batch_size=16,
            response_length=8,
            eval_samples=16,
            save_every=2,
            kl_target=1.0,
            top_k=0,
        ),
    ),
    "dpo": (
        train_dpo,
        dict(epochs=2, batch_size=128, response_length=8, eval_samples=16, save_every=5, rounds=3),
    ),
    "simpo": (
        train_dpo,
        dict(
            loss="simpo", epochs=1, batch_size=128, response_length=8, eval_samples=16, save_every=3
        ),
    ),
    "online": (
        train_dpo,
        dict(
            online=True, steps=10, batch_size=16, response_length=8, eval_samples=16, save_every=3
        ),
    ),
}
PROCESSES = multiprocessing.get_context("forkserver")  # a killed run takes nothing of ours with it
PROCESSES.set_forkserver_preload(["train_dpo", "train_ppo"])


def knobs(stage, toy, out, **changes):
    module, cheap = STAGES[stage]
    needs = {} if stage == "sft" else {"init": str(toy / "sft")}
    needs |= {"reward": str(toy / "rm")} if stage in ("ppo", "online") else {}
    return module.Knobs(**{"data": "toy", "out": str(out)} | needs | cheap | changes)


def train(stage, toy, out, **changes):
    STAGES[stage][0].main(knobs(stage, toy, out, **changes))
    return left(out)


def in_a_process(stage, toy, out, changes, log):
    torch.set_num_threads(1)
    with open(log, "a") as file:  # append: of all lives
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        train(stage, toy, out, **changes)


def left(out):
    """What must be the same: weights, samples, and the metrics but for the clock."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(len(rows)))
    clock = [row.pop("seconds") for row in rows]
    assert clock == sorted(clock)
    return (
        hashlib.sha256((out / "model" / "model.safetensors").read_bytes()).hexdigest(),
        rows,
        (out / "samples.jsonl").read_text(),
    )


@pytest.fixture(scope="module")
def whole(toy, tmp_path_factory):
    """What each stage leaves when nothing happens to it, and its seconds."""
    done = {}

    def get(stage):
        if stage not in done:
            out = tmp_path_factory.mktemp(stage)
            start = time.time()
            process = PROCESSES.Process(
                target=in_a_process, args=(stage, toy, out, {}, out / "log")
            )
            process.start()
            process.join()
            assert process.exitcode == 0, (out / "log").read_text()
            done[stage] = left(out), time.time() - start, out
        return done[stage]

    return get


SLOW = [pytest.param(stage, marks=pytest.mark.slow) for stage in ("sft", "dpo", "simpo", "online")]


@pytest.mark.parametrize("stage", ["rm", "ppo", *SLOW])
def test_killed_ten_times(stage, toy, whole, tmp_path):
    expected, seconds, _ = whole(stage)
    rng, kills, lives, out, log = random.Random(stage), 0, 0, tmp_path / "run", tmp_path / "log"
    while kills < 10 or not lives:
        process = PROCESSES.Process(
            target=in_a_process, args=(stage, toy, out, {"resume": True}, log)
        )
        process.start()
        process.join(
            rng.uniform(0, seconds / 2) if kills < 10 else None
        )  # lives grow longer by what is saved
        if process.exitcode is None:
            process.kill()
            process.join()
            kills += 1
        else:
            assert process.exitcode == 0, log.read_text()
            assert left(out) == expected
            lives += 1
            shutil.rmtree(out)
    assert kills == 10


def stopped_after(stage, toy, out, steps, monkeypatch):
    """A run that dies after some steps have been saved, as if killed."""
    with monkeypatch.context() as patch:
        save = Run.save

        def save_and_die(self, step):
            save(self, step)
            if step >= steps:
                raise MemoryError("dead")

        patch.setattr(Run, "save", save_and_die)
        with pytest.raises(MemoryError):
            train(stage, toy, out)


def damage(path, how):
    raw = bytearray(path.read_bytes())
    if how == "truncated":
        raw = raw[: len(raw) // 2]
    elif how == "flipped":
        raw[-100] ^= 16
    elif how == "another step":
        assert raw.count(b'\\"step\\": ') == 1
        at = raw.index(b'\\"step\\": ') + 10
        raw[at : at + 1] = b"9"
    elif how == "zeros at the end":
        raw[-4096:] = bytes(4096)
    path.write_bytes(raw if how != "empty" else b"")


@pytest.mark.parametrize(
    "how", ["truncated", "flipped", "zeros at the end", "empty", "another step"]
)
@pytest.mark.parametrize("stage", ["rm", pytest.param("ppo", marks=pytest.mark.slow)])
def test_a_damaged_newest_state_falls_back(stage, how, toy, whole, tmp_path, monkeypatch, capsys):
    stopped_after(stage, toy, tmp_path, 4, monkeypatch)
    if stage == "rm":
        stopped_after(stage, toy, tmp_path, 10, monkeypatch)
    older, newest = sorted((tmp_path / "state").glob("0*.safetensors"))
    damage(newest, how)
    capsys.readouterr()
    assert train(stage, toy, tmp_path, resume=True) == whole(stage)[0]
    said = capsys.readouterr().out
    assert f"{newest} is broken" in said and f"going on after {int(older.stem)} of" in said


def test_all_states_damaged(toy, tmp_path, monkeypatch):
    stopped_after("ppo", toy, tmp_path, 4, monkeypatch)
    for path in (tmp_path / "state").glob("0*.safetensors"):
        damage(path, "truncated")
    with pytest.raises(UserError, match="no state in .* is whole: start anew without --resume"):
        train("ppo", toy, tmp_path, resume=True)


def test_two_states_are_kept_and_no_other_file(whole):
    out = whole("ppo")[2]
    assert sorted(p.name for p in (out / "state").iterdir()) == [
        "00000006.safetensors",
        "00000008.safetensors",
        "lock",
    ]
    files = {
        "config.json",
        "metrics.jsonl",
        "samples.jsonl",
        "summary.json",
        "curves.png",
        "model",
        "state",
    }
    assert {p.name for p in out.iterdir()} == files | {"log"}


def test_resume_of_a_finished_run_changes_nothing(toy, whole, tmp_path):
    expected, _, out = whole("rm")
    shutil.copytree(out, tmp_path / "run")
    assert train("rm", toy, tmp_path / "run", resume=True) == expected


def test_without_resume_the_state_is_mentioned_and_the_run_begins_anew(
    toy, whole, tmp_path, monkeypatch, capsys
):
    stopped_after("ppo", toy, tmp_path, 4, monkeypatch)
    assert train("ppo", toy, tmp_path) == whole("ppo")[0]
    assert "interrupted run, saved after 4 steps: with --resume" in capsys.readouterr().out


def test_resume_without_a_state_begins(toy, whole, tmp_path, capsys):
    assert train("rm", toy, tmp_path, resume=True) == whole("rm")[0]
    assert f"no state in {tmp_path}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "changes,expected",
    [
        ({"lr": 0.5}, "that run had --lr 0.001, this one has 0.5"),
        ({"seed": 3}, "--seed 0, this one has 3"),
        ({"steps": 9}, "--steps 8, this one has 9"),
        ({"data": "words.jsonl"}, "that run had another data"),
        ({"init": "other"}, "that run had another base model"),
        ({"reward": "true"}, "that run had another reward"),
    ],
)
def test_a_state_of_another_run_is_refused(changes, expected, toy, tmp_path, monkeypatch):
    stopped_after("ppo", toy, tmp_path / "run", 4, monkeypatch)
    before = {
        p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file() and p.name != "lock"
    }
    if "data" in changes:
        words = [{"prompt": f"{i}ab", "response": "hg", "rating": i} for i in range(40)]
        (tmp_path / "words.jsonl").write_text("".join(json.dumps(row) + "\n" for row in words))
        changes = {"data": str(tmp_path / "words.jsonl")}
    elif "init" in changes:
        shutil.copytree(toy / "sft", tmp_path / "other")
        base = gpt.GPT.from_pretrained(tmp_path / "other" / "model")
        with torch.no_grad():
            base.ln_f.bias[0] += 1
        base.save_pretrained(tmp_path / "other" / "model", load_tokenizer(toy / "sft" / "model"))
        changes = {"init": str(tmp_path / "other")}
    with pytest.raises(UserError, match=expected):
        train("ppo", toy, tmp_path / "run", resume=True, **changes)
    assert before == {
        p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file() and p.name != "lock"
    }


def small_state(folder, stage="rm", width=3, vocabulary=5):
    torch.manual_seed(0)
    model = torch.nn.Linear(width, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, width)).sum().backward()
    optimizer.step()
    given = {"tokenizer": {b"a": 0, b"b": vocabulary}}
    folder.mkdir(exist_ok=True)
    return states.State(
        folder, stage, train_rm.Knobs(), {"model": model, "optimizer": optimizer}, given
    )


@pytest.mark.parametrize(
    "other,expected",
    [
        ({"stage": "sft"}, "a state of stage rm, expected sft"),
        (
            {"width": 4},
            r"model/weight is \(2, 3\), expected \(2, 4\): the state of a model of another shape",
        ),
        ({"vocabulary": 6}, "another tokenizer"),
    ],
)
def test_a_state_of_another_stage_shape_or_tokenizer(other, expected, tmp_path):
    small_state(tmp_path).save(7, metrics_bytes=0)
    with pytest.raises(UserError, match=expected):
        small_state(tmp_path, **other).load()


def test_a_state_comes_back_to_the_last_bit(tmp_path):
    state = small_state(tmp_path)
    state.parts["kl"] = train_ppo.ppo.AdaptiveKL(0.1 + 0.2, 6.0, 100)
    state.save(7, seconds=1.5)
    copy = small_state(tmp_path)
    copy.parts["kl"] = train_ppo.ppo.AdaptiveKL(1.0, 6.0, 100)
    for p in copy.parts["model"].parameters():
        p.data.zero_()
    copy.parts["optimizer"].state.clear()
    assert copy.load()["seconds"] == 1.5 and copy.parts["kl"].coef == 0.1 + 0.2
    for a, b in zip(
        state.parts["model"].parameters(), copy.parts["model"].parameters(), strict=True
    ):
        old, new = (s.parts["optimizer"].state[p] for s, p in ((state, a), (copy, b)))
        assert (
            torch.equal(a, b)
            and old.keys() == new.keys()
            and all(torch.equal(old[k], new[k]) for k in old)
        )


def test_other_labels_are_other_data(toy, tmp_path, monkeypatch):
    def write(sign):
        words = [{"prompt": "", "response": f"ab{'h' * i}", "rating": sign * i} for i in range(40)]
        (tmp_path / "words.jsonl").write_text("".join(json.dumps(row) + "\n" for row in words))
        return {
            "data": str(tmp_path / "words.jsonl"),
            "epochs": 20,
            "batch_size": 20,
            "normalize": False,
        }

    write(1)
    with monkeypatch.context() as patch:
        patch.setitem(STAGES, "rm", (train_rm, STAGES["rm"][1] | write(1)))
        stopped_after("rm", toy, tmp_path / "run", 10, monkeypatch)
    with pytest.raises(UserError, match="another data"):
        train("rm", toy, tmp_path / "run", resume=True, **write(-1))
    train("rm", toy, tmp_path / "run", resume=True, **write(1))


def test_a_reward_model_is_what_it_holds(toy, tmp_path):
    shutil.copytree(toy / "rm", tmp_path / "copy")
    (tmp_path / "rule.py").write_text(
        "def score(prompts, responses):\n    return [0.0] * len(responses)\n"
    )
    first = states.fingerprint(f"{tmp_path}/rule.py:score")
    assert states.fingerprint(str(toy / "rm")) == states.fingerprint(tmp_path / "copy" / "model")
    (tmp_path / "rule.py").write_text(
        "def score(prompts, responses):\n    return [1.0] * len(responses)\n"
    )
    assert states.fingerprint(f"{tmp_path}/rule.py:score") != first


def test_only_what_a_run_was_writing_is_cleaned_up(toy, tmp_path, monkeypatch):
    stopped_after("ppo", toy, tmp_path, 4, monkeypatch)
    (tmp_path / "notes").mkdir()
    theirs, ours = (
        [tmp_path / "a.tmpfile", tmp_path / "notes" / "b.tmp1"],
        [tmp_path / "state" / "00000006.safetensors.tmp999"],
    )
    for path in theirs + ours:
        path.write_text("x")
    train("ppo", toy, tmp_path, resume=True)
    assert all(path.exists() for path in theirs) and not any(path.exists() for path in ours)


class Evil:
    def __reduce__(self):
        return os.mkdir, (Evil.trace,)


def test_nothing_is_unpickled_and_absurd_headers_are_refused(tmp_path, capsys):
    Evil.trace, state = str(tmp_path / "executed"), small_state(tmp_path / "state")
    headers = [b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,99999999999]}}',
               b'{"a":{"dtype":"F32","shape":[9223372036854775807,9],"data_offsets":[0,4]}}1234',
               b'{"__metadata__":{"state":"' + b"[" * 100_000 + b'"}}', b"{}"]  # fmt: skip
    crafted = [
        pickle.dumps(Evil()),
        struct.pack("<Q", 2**60) + b"{}",
        *(struct.pack("<Q", len(header)) + header for header in headers),
    ]
    for i, raw in enumerate(crafted):
        (tmp_path / "state" / f"{i:08d}.safetensors").write_bytes(raw)
    with pytest.raises(UserError, match="no state in .* is whole"):
        state.load()
    assert capsys.readouterr().out.count("is broken") == len(crafted)
    assert not Path(Evil.trace).exists() and sorted(p.name for p in tmp_path.iterdir()) == ["state"]


def start(stage, toy, out, *flags, before=(), **env):
    """The stage as a program of its own."""
    module = {"sft": ["-m", "minirlhf.sft"], "online": [ROOT / "train_dpo.py"]}.get(
        stage, [ROOT / f"train_{stage}.py"]
    )
    given = [x for name, value in vars(knobs(stage, toy, out)).items() if value != getattr(STAGES[stage][0].Knobs(), name)
             for x in ([f"--{name.replace('_', '-')}"] if value is True else [f"--{name.replace('_', '-')}", str(value)])]  # fmt: skip
    return subprocess.Popen([*map(str, (*before, sys.executable, *module, *given, *flags))], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | env)  # fmt: skip


def wait_for(path, process):
    while not path.exists() or not path.read_text():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_save_and_end_the_run(number, toy, whole, tmp_path):
    process = start("rm", toy, tmp_path)
    wait_for(tmp_path / "metrics.jsonl", process)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (
        process.returncode == 128 + number
        and "Traceback" not in err
        and "go on with --resume" in out
    )
    steps = len((tmp_path / "metrics.jsonl").read_text().splitlines())
    assert (
        f"stopped after {steps} of" in out
        and (tmp_path / "state" / f"{steps:08d}.safetensors").exists()
    )
    assert train("rm", toy, tmp_path, resume=True) == whole("rm")[0]


def test_two_runs_cannot_write_one_directory(toy, tmp_path):
    first = start("rm", toy, tmp_path, "--epochs", "300")
    wait_for(tmp_path / "metrics.jsonl", first)
    second = start("rm", toy, tmp_path)
    assert second.wait(60) == 2 and "another run is writing here (process" in second.stderr.read()
    first.kill()
    first.communicate()
    assert train("rm", toy, tmp_path)  # a dead run holds no lock


SHELL = """
mount -t tmpfs -o size={size}k none {folder} || exit 77
"$@" --out {folder}/run; echo "code $?"
ls {folder}/run/state
mount -o remount,size=1g {folder} || exit 77
"$@" --out {folder}/run --resume || exit 1
cp -r {folder}/run {kept}
"""


@pytest.mark.parametrize("stage", ["rm", "ppo", *SLOW[:2]])
def test_full_disk(stage, toy, whole, tmp_path):
    (tmp_path / "disk").mkdir()
    states = [p.stat().st_size for p in (whole(stage)[2] / "state").glob("0*")]
    script = SHELL.format(
        size=int(2.5 * max(states)) // 1024, folder=tmp_path / "disk", kept=tmp_path / "kept"
    )
    done = start(
        stage, toy, tmp_path / "disk" / "run", before=("unshare", "-rm", "sh", "-c", script, "sh")
    )
    out, err = done.communicate(timeout=120)
    if done.returncode == 77 or "unshare" in err:
        pytest.skip(f"no small disk can be made here: {err.strip()[:100]}")
    assert done.returncode == 0, err
    assert (
        "code 2" in out
        and "No space left on device" in err
        and "--resume" in err
        and "Traceback" not in err
    )
    kept = [
        line
        for line in out[out.index("code 2") :].splitlines()
        if ".safetensors" in line and "/" not in line
    ]
    assert len(kept) == 2 and all(
        name.endswith(".safetensors") for name in kept
    )  # the two before, and nothing of the third
    assert left(tmp_path / "kept") == whole(stage)[0]


@pytest.mark.parametrize("stage", STAGES)
def test_a_loss_that_is_not_finite(stage, toy, tmp_path, monkeypatch, capsys):
    step = optim.optimizer_step
    calls = []

    def poisoned(optimizer, max_grad_norm, loss, nonfinite=None):
        calls.append(loss)
        if len(calls) == 3:
            next(
                p for group in optimizer.param_groups for p in group["params"] if p.grad is not None
            ).grad.view(-1)[0] = float("nan")
        return step(optimizer, max_grad_norm, loss, nonfinite)

    monkeypatch.setattr(optim, "optimizer_step", poisoned)
    said = r"step \d+: loss [-\d.]+, gradient norm nan; the batch of \d+ rows is in .*--on-nonfinite skip"
    with pytest.raises(UserError, match=said):
        train(stage, toy, tmp_path / "stop")
    (saved,) = (tmp_path / "stop").glob("nonfinite-step-*.jsonl")
    rows = [json.loads(line) for line in saved.read_text().splitlines()]
    assert rows and all(
        row["ids"][0] == 256 and set(row["text"]) <= set("abcdefgh") | {"\ufffd"}
        for row in rows
        if stage != "ppo"
    )
    calls.clear()
    train(stage, toy, tmp_path / "skip", on_nonfinite="skip")
    summary = json.loads((tmp_path / "skip" / "summary.json").read_text())
    assert summary["steps_skipped"] == 1 and "skipped, 1 so far" in capsys.readouterr().out
    assert all(
        np.isfinite(w).all()
        for w in load_file(tmp_path / "skip" / "model" / "model.safetensors").values()
    )


def test_out_of_gpu_memory_names_the_knobs(monkeypatch, capsys):
    def main(_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr(sys, "argv", ["train_rm.py"])
    with pytest.raises(SystemExit) as end:
        cli.run_script(main, train_rm.Knobs, "")
    said = capsys.readouterr().err
    assert end.value.code == 2
    assert all(
        word in said
        for word in ("20.00 GiB", "--micro-batch", "--batch-size", "--dtype bfloat16", "--shard")
    )
