"""Runs that are killed, stopped, filled up or damaged, and resumed: the same weights to the last
bit, each step once; what is refused."""

import functools
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
from minirlhf import gpt, ppo, sft
from minirlhf.engine import cli, curves, optim, states
from minirlhf.engine.cli import UserError
from minirlhf.engine.log import Run
from minirlhf.tokenizer import load_tokenizer

ROOT = Path(__file__).parent.parent
SMALL = dict(vocab_size=257, n_layer=1, n_head=2, n_embd=32)
SAMPLES = dict(response_length=8, eval_samples=16)
STAGES = {
    "sft": (sft, dict(epochs=2, batch_size=40, save_every=4, **SMALL)),
    "rm": (train_rm, dict(epochs=2, batch_size=40, save_every=4)),
    "ppo": (train_ppo, dict(steps=8, batch_size=16, save_every=2, kl_target=1.0, **SAMPLES)),
    "dpo": (
        train_dpo,
        dict(epochs=2, batch_size=40, delete=0.2, rounds=3, save_every=4, **SAMPLES),
    ),
    "simpo": (train_dpo, dict(loss="simpo", epochs=1, batch_size=40, save_every=2, **SAMPLES)),
    "online": (train_dpo, dict(online=True, steps=8, batch_size=16, save_every=3, **SAMPLES)),
}
SLOW = [pytest.param(stage, marks=pytest.mark.slow) for stage in ("sft", "dpo", "simpo", "online")]
LATE = [pytest.param(stage, marks=pytest.mark.slow) for stage in ("sft", "ppo", "dpo", "simpo")]
PROCESSES = multiprocessing.get_context("forkserver")  # a killed run takes nothing of ours with it
PROCESSES.set_forkserver_preload(["train_dpo", "train_ppo"])


@pytest.fixture(scope="module")
def needs(toy, tmp_path_factory):
    """Where a base model, a reward model and 400 rated words lie."""
    path = tmp_path_factory.mktemp("words") / "words.jsonl"
    write_words(path, 400)
    return {"sft": toy / "sft", "rm": toy / "rm", "words": path}


def write_words(path, n, sign=1):
    rng = np.random.default_rng(0)
    with open(path, "w") as file:
        for _ in range(n):
            word = "".join(rng.choice(list("abcdefgh"), rng.integers(4, 11)))
            rating = sign * int(np.clip(rng.normal(word.count("h") - word.count("a"), 1), -4, 4))
            file.write(json.dumps({"prompt": "", "response": word, "rating": rating}) + "\n")


@pytest.fixture(autouse=True, scope="module")
def no_picture():
    """Drawing the curves would be most of the time of such short runs; test_log.py has them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(curves, "plot", touch)
        yield


def touch(rows, path):
    path.touch()


def knobs(stage, needs, out, **changes):
    module, cheap = STAGES[stage]
    given = {"data": needs["words"], "out": out, "dtype": "float32"}
    if stage != "sft":
        given |= {"init": needs["sft"]}
    if stage in ("ppo", "online"):
        given |= {"reward": needs["rm"]}
    return module.Knobs(**given | cheap | changes)


def train(stage, needs, out, **changes):
    STAGES[stage][0].main(knobs(stage, needs, out, **changes))
    return left(out)


def left(out):
    """What must be the same: weights, samples, and the metrics but for the clock."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(len(rows)))
    clock = [row["seconds"] for row in rows]
    assert clock == sorted(clock)
    for row in rows:
        for name in curves.CLOCK:
            del row[name]
    weights = (out / "model" / "model.safetensors").read_bytes()
    return hashlib.sha256(weights).hexdigest(), rows, (out / "samples.jsonl").read_text()


# In processes of their own


def alone(stage, needs, out, flags, log, seconds=None, since=0, number=None):
    """The stage as its script runs it.

    It dies after so many seconds of computing (counted from the moment when step `since` begins);
    or it sends itself a signal after its fourth step.
    """
    torch.set_num_threads(1)
    with open(log, "a") as file:  # append: of all lives
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    curves.plot = touch
    logged = []
    if number:
        Run.log = then(Run.log, 3, os.kill, os.getpid(), number)
    # Nothing of Python's sees SIGPROF coming.
    die = functools.partial(signal.setitimer, signal.ITIMER_PROF)
    if seconds and since:
        Run.log = then(Run.log, since - 1, die, seconds)
    elif seconds:
        die(seconds)
    else:
        Run.log = then(Run.log, None, lambda: logged.append(time.process_time()))
    sys.argv = ["script", *flags_of(stage, needs, out), *flags]
    module = STAGES[stage][0]
    cli.run_script(module.main, module.Knobs, "")
    seconds = time.process_time()
    print(f"\nCPU seconds: {seconds} {seconds - max(logged, default=seconds)}")


def then(log, after, act, *args):
    """Run.log, which acts after that step; after each step for None."""

    def log_and_act(self, step, *rest, **options):
        log(self, step, *rest, **options)
        if after in (None, step):
            act(*args)

    return log_and_act


def flags_of(stage, needs, out):
    """The command line of a stage's knobs."""
    defaults = vars(STAGES[stage][0].Knobs())
    flags = []
    for name, value in vars(knobs(stage, needs, out)).items():
        if str(value) != str(defaults[name]):
            flag = "--" + name.replace("_", "-")
            flags += [flag] if value is True else [flag, str(value)]
    return flags


def begin(*args, **options):
    process = PROCESSES.Process(target=alone, args=args, kwargs=options)
    process.start()
    return process


def ended(*args, **options):
    """The exit code of a process that has ended."""
    process = begin(*args, **options)
    process.join()
    return process.exitcode


@pytest.fixture(scope="module")
def whole(needs, tmp_path_factory):
    """What each stage leaves when nothing happens to it, and where; its seconds of computing, of
    all and after the last step."""

    @functools.cache
    def get(stage):
        out = tmp_path_factory.mktemp(stage)
        log = out.parent / f"{out.name}.txt"
        assert ended(stage, needs, out, [], log) == 0, log.read_text()
        seconds = log.read_text().rpartition("CPU seconds: ")[2].split()
        return left(out), out, *map(float, seconds)

    return get


@pytest.mark.parametrize("stage", ["rm", "ppo", *SLOW])
def test_killed_ten_times(stage, needs, whole, tmp_path):
    expected, _, seconds, _ = whole(stage)
    rng, kills, lives = random.Random(stage), 0, 0
    out, log = tmp_path / "run", tmp_path / "log"
    while kills < 10 or not lives:
        # A life may be longer than the one before by what that one saved.
        limit = rng.uniform(0.001, seconds / 2) if kills < 10 else None
        code = ended(stage, needs, out, ["--resume"], log, seconds=limit)
        if code == -signal.SIGPROF:
            kills += 1
        else:
            assert code == 0, log.read_text()
            assert left(out) == expected
            lives += 1
            shutil.rmtree(out)
    assert kills == 10


@pytest.mark.parametrize("stage", ["rm", *LATE])
def test_killed_after_the_last_step(stage, needs, whole, tmp_path):
    expected, _, _, seconds = whole(stage)
    steps, rng, kept = len(expected[1]), random.Random(stage), []
    while len(kept) < (3 if stage == "rm" else 8):  # the others are slow tests
        out, log = tmp_path / f"run{len(kept)}", tmp_path / "log"
        limit = rng.uniform(0.001, 0.9 * seconds)
        code = ended(stage, needs, out, [], log, seconds=limit, since=steps)
        assert code in (0, -signal.SIGPROF), log.read_text()
        if code == 0:  # it was quicker than the run that was timed
            shutil.rmtree(out)
            continue
        kept.append((out / "model" / "model.safetensors").exists())
        assert len((out / "metrics.jsonl").read_text().splitlines()) == steps
        assert ended(stage, needs, out, ["--resume"], log) == 0, log.read_text()
        assert left(out) == expected
        assert json.loads((out / "summary.json").read_text())["evaluated"]
    print(stage, round(seconds, 2), kept)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_save_and_end_the_run(number, needs, whole, tmp_path):
    out, log = tmp_path / "run", tmp_path / "log"
    assert ended("rm", needs, out, [], log, number=number) == 128 + number
    said = log.read_text()
    assert "stopped after 4 of" in said and "go on with --resume" in said
    assert "Traceback" not in said
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 4
    assert (out / "state" / "00000004.safetensors").exists()
    assert train("rm", needs, out, resume=True) == whole("rm")[0]


def wait_for(path, alive, said):
    while not path.exists() or not path.read_text():
        assert alive(), said()
        time.sleep(0.01)


def test_two_runs_cannot_write_one_directory(needs, tmp_path):
    out, log = tmp_path / "run", tmp_path / "log"
    first = begin("rm", needs, out, [], log, number=signal.SIGSTOP)
    wait_for(out / "metrics.jsonl", first.is_alive, log.read_text)
    assert ended("rm", needs, out, [], tmp_path / "second") == 2
    assert "another run is writing here (process" in (tmp_path / "second").read_text()
    with pytest.raises(UserError, match=f"another run is writing here .process {first.pid} on"):
        train("rm", needs, out)
    first.kill()
    first.join()
    assert train("rm", needs, out)  # a dead run holds no lock


# As programs


def start(stage, needs, out, *flags, before=()):
    name = {"sft": "minirlhf.sft", "online": "train_dpo", "simpo": "train_dpo"}
    command = [sys.executable, "-m", name.get(stage, f"train_{stage}")]
    command = [*before, *command, *flags_of(stage, needs, out), *flags]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([str(word) for word in command], env=env, **pipes)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_to_a_program(number, needs, whole, tmp_path):
    program = start("rm", needs, tmp_path, "--epochs", "3000")
    wait_for(tmp_path / "metrics.jsonl", lambda: program.poll() is None, program.communicate)
    program.send_signal(number)
    out, err = program.communicate(timeout=60)
    assert program.returncode == 128 + number
    assert "Traceback" not in err and "go on with --resume" in out
    steps = len((tmp_path / "metrics.jsonl").read_text().splitlines())
    assert f"stopped after {steps} of" in out
    assert (tmp_path / "state" / f"{steps:08d}.safetensors").exists()


SHELL = """
mount -t tmpfs -o size={size}k none {folder} || exit 77
"$@" --out {folder}/run; echo "code $?"
ls {folder}/run/state
mount -o remount,size=1g {folder} || exit 77
"$@" --out {folder}/run --resume || exit 1
cp -r {folder}/run {kept}
"""


@pytest.mark.parametrize("stage", ["rm", pytest.param("ppo", marks=pytest.mark.slow), *SLOW[:2]])
def test_full_disk(stage, needs, whole, tmp_path):
    (tmp_path / "disk").mkdir()
    sizes = [p.stat().st_size for p in (whole(stage)[1] / "state").glob("0*")]
    places = {"folder": tmp_path / "disk", "kept": tmp_path / "kept"}
    script = SHELL.format(size=int(2.5 * max(sizes)) // 1024, **places)
    shell = ("unshare", "-rm", "sh", "-c", script, "sh")
    program = start(stage, needs, tmp_path / "disk" / "run", before=shell)
    out, err = program.communicate(timeout=300)
    if program.returncode == 77 or "unshare" in err:
        pytest.skip(f"no small disk can be made here: {err.strip()[:100]}")
    assert program.returncode == 0, err
    assert "code 2" in out and "Traceback" not in err
    assert "No space left on device" in err and "--resume" in err
    lines = out[out.index("code 2") :].splitlines()
    kept = [line for line in lines if ".safetensors" in line and "/" not in line]
    # The two before, and nothing of the third.
    assert len(kept) == 2 and all(name.endswith(".safetensors") for name in kept)
    assert left(tmp_path / "kept") == whole(stage)[0]


# Damage, and what is left of a run that died


@pytest.fixture(scope="module")
def stopped(needs, tmp_path_factory):
    """Copies a run that died, as if killed, when some steps had been saved for the second time."""
    made = {}

    def copy(stage, to):
        if stage not in made:
            made[stage] = tmp_path_factory.mktemp("stopped") / stage
            stop(stage, needs, made[stage], steps=12 if stage == "rm" else 4)
        shutil.copytree(made[stage], to, dirs_exist_ok=True)

    return copy


def stop(stage, needs, out, steps, **changes):
    """A run that dies after so many steps have been saved."""
    save = Run.save

    def save_and_die(self, step):
        save(self, step)
        if step >= steps:
            raise MemoryError("dead")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(Run, "save", save_and_die)
        train(stage, needs, out, **changes)


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


DAMAGES = ["truncated", "flipped", "zeros at the end", "empty", "another step"]


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("stage", ["rm", pytest.param("ppo", marks=pytest.mark.slow)])
def test_a_damaged_newest_state_falls_back(stage, how, needs, stopped, whole, tmp_path, capsys):
    stopped(stage, tmp_path)
    older, newest = sorted((tmp_path / "state").glob("0*.safetensors"))
    damage(newest, how)
    capsys.readouterr()
    assert train(stage, needs, tmp_path, resume=True) == whole(stage)[0]
    said = capsys.readouterr().out
    assert f"{newest} is broken" in said and f"going on after {int(older.stem)} of" in said


def test_all_states_damaged(needs, stopped, tmp_path):
    stopped("ppo", tmp_path)
    for path in (tmp_path / "state").glob("0*.safetensors"):
        damage(path, "truncated")
    with pytest.raises(UserError, match="no state in .* is whole: start anew without --resume"):
        train("ppo", needs, tmp_path, resume=True)


def test_two_states_are_kept_and_no_other_file(whole):
    out = whole("ppo")[1]
    states = {p.name for p in (out / "state").iterdir()}
    assert states == {"00000006.safetensors", "00000008.safetensors", "lock"}
    files = {"config.json", "metrics.jsonl", "samples.jsonl", "summary.json", "curves.png"}
    assert {p.name for p in out.iterdir()} == files | {"model", "state"}


def test_resume_of_a_finished_run_changes_nothing(needs, whole, tmp_path):
    expected, out, *_ = whole("rm")
    shutil.copytree(out, tmp_path / "run")
    assert train("rm", needs, tmp_path / "run", resume=True) == expected


def test_without_resume_the_state_is_mentioned_and_the_run_begins_anew(
    needs, stopped, whole, tmp_path, capsys
):
    stopped("ppo", tmp_path)
    assert train("ppo", needs, tmp_path) == whole("ppo")[0]
    assert "interrupted run, saved after 4 steps: with --resume" in capsys.readouterr().out


def test_resume_without_a_state_begins(needs, whole, tmp_path, capsys):
    assert train("rm", needs, tmp_path, resume=True) == whole("rm")[0]
    assert f"no state in {tmp_path}" in capsys.readouterr().out


def test_only_what_a_run_was_writing_is_cleaned_up(needs, stopped, tmp_path):
    stopped("ppo", tmp_path)
    (tmp_path / "notes").mkdir()
    theirs = [tmp_path / "a.tmpfile", tmp_path / "notes" / "b.tmp1"]
    ours = [tmp_path / "state" / "00000006.safetensors.tmp999"]
    for path in theirs + ours:
        path.write_text("x")
    train("ppo", needs, tmp_path, resume=True)
    assert all(path.exists() for path in theirs)
    assert not any(path.exists() for path in ours)


# What is refused


def contents(out):
    files = [p for p in out.rglob("*") if p.is_file() and p.name != "lock"]
    return {path: path.read_bytes() for path in files}


@pytest.mark.parametrize("changes, expected", [
    ({"lr": 0.5}, "that run had --lr 0.001, this one has 0.5"),
    ({"seed": 3}, "--seed 0, this one has 3"),
    ({"steps": 9}, "--steps 8, this one has 9"),
    ({"data": "other words"}, "that run had another data"),
    ({"init": "other"}, "that run had another base model"),
    ({"reward": "rule"}, "that run had another reward"),
])  # fmt: skip
def test_a_state_of_another_run_is_refused(changes, expected, needs, stopped, tmp_path):
    stopped("ppo", tmp_path / "run")
    before = contents(tmp_path / "run")
    if "data" in changes:
        changes = {"data": tmp_path / "words.jsonl"}
        write_words(changes["data"], 40)
    elif "init" in changes:
        changes = {"init": tmp_path / "other"}
        shutil.copytree(needs["sft"], changes["init"])
        base = gpt.GPT.from_pretrained(changes["init"] / "model")
        with torch.no_grad():
            base.ln_f.bias[0] += 1
        tokenizer = load_tokenizer(needs["sft"] / "model")
        base.save_pretrained(changes["init"] / "model", tokenizer)
    elif "reward" in changes:
        (tmp_path / "rule.py").write_text("def score(prompts, responses):\n    raise ValueError\n")
        changes = {"reward": f"{tmp_path}/rule.py:score"}
    with pytest.raises(UserError, match=expected):
        train("ppo", needs, tmp_path / "run", resume=True, **changes)
    assert before == contents(tmp_path / "run")


@pytest.mark.parametrize("stage, changes", [
    ("rm", {"normalize": False}), ("rm", {"response_length": 5}),
    ("ppo", {"eval_samples": 3}), ("dpo", {"eval_samples": 3}), ("dpo", {"reward": "rm"}),
    ("dpo", {"data": "moved"}),
])  # fmt: skip
def test_what_scores_at_the_end_may_change(stage, changes, needs, stopped, tmp_path, capsys):
    stopped(stage, tmp_path / "run")
    given = dict(changes)
    if "reward" in changes:
        given["reward"] = needs["rm"]
    if "data" in changes:
        given["data"] = shutil.copy(needs["words"], tmp_path / "moved.jsonl")
    train(stage, needs, tmp_path / "run", resume=True, **given)
    assert "going on after" in capsys.readouterr().out


def test_another_number_of_threads_is_said(needs, stopped, tmp_path, capsys, monkeypatch):
    stopped("rm", tmp_path)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    train("rm", needs, tmp_path, resume=True)
    said = capsys.readouterr().out
    assert said.count("that state is of 1 threads and 1 processes, here are 3 threads and 1") == 1
    train("rm", needs, tmp_path, resume=True)
    assert "note: that state" not in capsys.readouterr().out


def small_state(folder, stage="rm", width=3, vocabulary=5):
    torch.manual_seed(0)
    model = torch.nn.Linear(width, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, width)).sum().backward()
    optimizer.step()
    parts = {"model": model, "optimizer": optimizer}
    given = {"tokenizer": {b"a": 0, b"b": vocabulary}}
    folder.mkdir(exist_ok=True)
    return states.State(folder, stage, train_rm.Knobs(), parts, given)


SHAPE = r"model/weight is \(2, 3\), expected \(2, 4\): the state of a model of another shape"


@pytest.mark.parametrize("other, expected", [
    ({"stage": "sft"}, "a state of stage rm, expected sft"),
    ({"width": 4}, SHAPE),
    ({"vocabulary": 6}, "another tokenizer"),
])  # fmt: skip
def test_a_state_of_another_stage_shape_or_tokenizer(other, expected, tmp_path):
    small_state(tmp_path).save(7, metrics_bytes=0)
    with pytest.raises(UserError, match=expected):
        small_state(tmp_path, **other).load()


def test_a_state_that_is_older_than_a_knob(tmp_path):
    """It had what is the default now, but before there was --delete-eos every EOS was read."""
    older = small_state(tmp_path)
    for name in ("augment", "delete_eos"):
        del older.origin["knobs"][name]
    older.save(7, seconds=1.5)
    with pytest.raises(UserError, match=r"had --delete-eos 0\.0, this one has 0\.2"):
        small_state(tmp_path).load()
    now = small_state(tmp_path)
    now.origin["knobs"]["delete_eos"] = 0.0
    assert now.load()["seconds"] == 1.5


def test_a_state_comes_back_to_the_last_bit(tmp_path):
    state = small_state(tmp_path)
    state.parts["kl"] = ppo.AdaptiveKL(0.1 + 0.2, 6.0, 100)
    state.save(7, seconds=1.5)
    copy = small_state(tmp_path)
    copy.parts["kl"] = ppo.AdaptiveKL(1.0, 6.0, 100)
    for p in copy.parts["model"].parameters():
        p.data.zero_()
    copy.parts["optimizer"].state.clear()
    assert copy.load()["seconds"] == 1.5 and copy.parts["kl"].coef == 0.1 + 0.2
    pairs = zip(*(s.parts["model"].parameters() for s in (state, copy)), strict=True)
    for a, b in pairs:
        old, new = state.parts["optimizer"].state[a], copy.parts["optimizer"].state[b]
        assert torch.equal(a, b) and old.keys() == new.keys()
        assert all(torch.equal(old[key], new[key]) for key in old)


def test_other_labels_are_other_data(needs, tmp_path):
    few = dict(data=tmp_path / "words.jsonl", epochs=8, batch_size=20, normalize=False)
    write_words(few["data"], 90)
    stop("rm", needs, tmp_path / "run", 8, **few)
    write_words(few["data"], 90, sign=-1)
    with pytest.raises(UserError, match="another data"):
        train("rm", needs, tmp_path / "run", resume=True, **few)
    write_words(few["data"], 90)
    train("rm", needs, tmp_path / "run", resume=True, **few)


def test_a_reward_model_is_what_it_holds(toy, tmp_path):
    shutil.copytree(toy / "rm", tmp_path / "copy")
    rule = tmp_path / "rule.py"
    rule.write_text("def score(prompts, responses):\n    return [0.0] * len(responses)\n")
    first = states.fingerprint(f"{rule}:score")
    assert states.fingerprint(str(toy / "rm")) == states.fingerprint(tmp_path / "copy" / "model")
    rule.write_text("def score(prompts, responses):\n    return [1.0] * len(responses)\n")
    assert states.fingerprint(f"{rule}:score") != first


class Evil:
    def __reduce__(self):
        return os.mkdir, (Evil.trace,)


def test_nothing_is_unpickled_and_absurd_headers_are_refused(tmp_path, capsys):
    Evil.trace, state = str(tmp_path / "executed"), small_state(tmp_path / "state")
    headers = [
        b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,99999999999]}}',
        b'{"a":{"dtype":"F32","shape":[9223372036854775807,9],"data_offsets":[0,4]}}1234',
        b'{"__metadata__":{"state":"' + b"[" * 100_000 + b'"}}',
        b"{}",
    ]
    crafted = [pickle.dumps(Evil()), struct.pack("<Q", 2**60) + b"{}"]
    crafted += [struct.pack("<Q", len(header)) + header for header in headers]
    for i, raw in enumerate(crafted):
        (tmp_path / "state" / f"{i:08d}.safetensors").write_bytes(raw)
    with pytest.raises(UserError, match="no state in .* is whole"):
        state.load()
    assert capsys.readouterr().out.count("is broken") == len(crafted)
    assert not Path(Evil.trace).exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["state"]


# Numbers that are not finite


FEW = {  # at least three optimizer steps each
    "sft": dict(epochs=1, batch_size=120),
    "rm": dict(epochs=1, batch_size=90),
    "ppo": dict(steps=2, eval_samples=4),
    "dpo": dict(epochs=1, batch_size=90, eval_samples=4),
    "simpo": dict(epochs=1, batch_size=90, eval_samples=4),
    "online": dict(steps=4, eval_samples=4),
}


def spelled(ids):
    """The text of single bytes in the order of GPT-2's: those that one can see come first."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    order = seen + sorted(set(range(256)) - set(seen))
    return bytes(order[i] for i in ids if i < 256).decode(errors="replace")


@pytest.mark.parametrize("stage", STAGES)
def test_a_loss_that_is_not_finite(stage, needs, tmp_path, monkeypatch, capsys):
    step = optim.optimizer_step
    calls = []

    def poisoned(optimizer, max_grad_norm, loss, nonfinite=None):
        calls.append(loss)
        if len(calls) == 3:
            gradients = [p.grad for p in states.parameters_of(optimizer) if p.grad is not None]
            gradients[0].view(-1)[0] = float("nan")
        return step(optimizer, max_grad_norm, loss, nonfinite)

    monkeypatch.setattr(optim, "optimizer_step", poisoned)
    said = r"step \d+: loss [-\d.]+, gradient norm nan; the batch of \d+ rows is in .*"
    with pytest.raises(UserError, match=said + "--on-nonfinite skip"):
        train(stage, needs, tmp_path / "stop", **FEW[stage])
    (saved,) = (tmp_path / "stop").glob("nonfinite-step-*.jsonl")
    rows = [json.loads(line) for line in saved.read_text().splitlines()]
    assert rows
    if stage != "ppo":
        assert all(row["ids"][0] == 256 and row["text"] == spelled(row["ids"]) for row in rows)
    if stage not in ("ppo", "online"):  # whose rows are samples, of any byte
        assert all(set(row["text"]) <= set("abcdefgh") for row in rows)
    calls.clear()
    train(stage, needs, tmp_path / "skip", on_nonfinite="skip", **FEW[stage])
    summary = json.loads((tmp_path / "skip" / "summary.json").read_text())
    assert summary["steps_skipped"] == 1 and "skipped, 1 so far" in capsys.readouterr().out
    weights = load_file(tmp_path / "skip" / "model" / "model.safetensors")
    assert all(np.isfinite(w).all() for w in weights.values())


def test_a_run_from_before_a_knob_goes_on_where_it_has_its_default(tmp_path):
    def state(**knobs):
        return states.State(tmp_path, "rm", train_rm.Knobs(**knobs), {}, {})

    facts = json.loads(json.dumps(state().origin))
    del facts["knobs"]["share"]
    state().expect_same("x", facts)
    with pytest.raises(UserError, match="--share 1.0, this one has 0.5"):
        state(share=0.5).expect_same("x", facts)
