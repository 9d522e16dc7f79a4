"""Many processes are one run: the same losses, weights and samples as on one; what happens when one
of them dies."""

import json
import multiprocessing
import os
import signal
import socket
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
from minirlhf import sft
from minirlhf.engine import cli, curves, parallel
from minirlhf.engine.log import Run

ROOT = Path(__file__).parent.parent
MODULES = {"sft": sft, "rm": train_rm, "ppo": train_ppo, "dpo": train_dpo}
FEW = "--eval-samples 16"
STAGES = {
    "sft": "sft --vocab-size 257 --n-embd 32 --epochs 1 --batch-size 63",
    "rm": "rm --epochs 1 --batch-size 30",
    "ppo": "ppo --steps 8 --batch-size 32 --micro-batch 8 --eval-samples 33",
    "dpo": "dpo --epochs 1 --batch-size 30 --eval-samples 33",
    "grpo": f"ppo --steps 6 {FEW} --advantage grpo --kl-in loss --kl-kind k3",
    "shared": f"ppo --steps 6 {FEW} --critic shared",
    "online": f"dpo --online --loss sppo --rounds 2 --steps 8 {FEW} --batch-size 30",
    "nash_md": f"dpo --online --loss nash_md --steps 5 {FEW}",
    "select": f"dpo --online --select lpbrl --samples 3 --steps 5 {FEW} --batch-size 30",
    "kto": f"dpo --loss kto --steps 8 {FEW}",
    "token": "rm --level token --epochs 1 --batch-size 60 --micro-batch 7",
    "letters": "rm --letters 3 --epochs 1 --batch-size 60 --micro-batch 7 --members 2",
}
LAZY = ["torch._dynamo", "torch.distributed.fsdp"]  # of torch, by what spreads a model
PROCESSES = multiprocessing.get_context("forkserver")  # has imported all, so starts at once
PROCESSES.set_forkserver_preload(["train_dpo", "train_ppo", *LAZY])


@pytest.fixture(scope="module")
def needs(toy, tmp_path_factory):
    """Where a base model, a reward model and 400 rated words lie."""
    path = tmp_path_factory.mktemp("words") / "words.jsonl"
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefgh"), rng.integers(4, 11))) for _ in range(400)]
    rated = [{"response": word, "rating": word.count("h") - word.count("a")} for word in words]
    path.write_text("".join(json.dumps({"prompt": "", **row}) + "\n" for row in rated))
    return {"sft": toy / "sft", "rm": toy / "rm", "words": path}


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def flags_of(stage, needs, out, *flags):
    if "--shard" in flags and torch.__version__ < "2.8":
        pytest.skip("sharding needs torch 2.8")  # so says the flag itself
    module, *given = STAGES[stage].split()
    if module != "sft":
        given += ["--init", needs["sft"]]
    if module == "ppo" or "--online" in given:
        given += ["--reward", needs["rm"]]
    given += ["--data", needs["words"], "--out", out, "--dtype", "float32"]
    return [str(word) for word in (*given, *flags)]


def one_of_them(stage, flags, rank, processes, port, log, pause):
    """One process of a run, as torchrun starts it but without the time to import."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    torch.set_num_threads(1)
    sys.argv = ["script", *flags]
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    curves.plot = lambda rows, path: None  # most of the time of such short runs
    if pause is not None:
        Run.log = then_wait(Run.log, pause)
    module, output = MODULES[STAGES[stage].split()[0]], sys.stdout
    cli.run_script(module.main, module.Knobs, "")
    assert sys.stdout is output  # of all processes, also those that print nothing meanwhile


def then_wait(log, pause):
    """After that step, a process waits for the signal that a test sends it."""

    def log_and_wait(self, step, *args, **options):
        log(self, step, *args, **options)
        if step == pause:
            (self.out / f"waiting.{parallel.rank()}").write_text(str(step))
            signal.pause()

    return log_and_wait


class Together:
    """The processes of a run, by rank."""

    def __init__(self, stage, needs, out, processes, *flags, pause=None):
        port, self.out = free_port(), out
        self.logs = [out.parent / f"{out.name}.{rank}.txt" for rank in range(processes)]
        self.all = []
        for rank, log in enumerate(self.logs):
            log.touch()
            args = (stage, flags_of(stage, needs, out, *flags), rank, processes, port, log, pause)
            self.all.append(PROCESSES.Process(target=one_of_them, args=args))
        for process in self.all:
            process.start()

    def wait_for(self, *names):
        """Until these files of the run have been written."""
        for path in [self.out / name for name in names]:
            while not path.exists() or not path.read_text():
                assert all(process.is_alive() for process in self.all), self.said()
                time.sleep(0.02)

    def end(self):
        """The exit codes."""
        for process in self.all:
            process.join(300)
        return [process.exitcode for process in self.all]

    def said(self):
        return [log.read_text() for log in self.logs]


def run(stage, needs, out, processes, *flags):
    """The stage to its end: what the first process said."""
    started = Together(stage, needs, out, processes, *flags)
    assert started.end() == [0] * processes, started.said()
    return started.said()[0]


def rows(out, name="metrics.jsonl"):
    return [json.loads(line) for line in (out / name).read_text().splitlines()]


def same(one, many, atol=1e-3):
    """Losses of each step within 1e-4, all other figures near, weights within 1e-3, samples
    equal. Rounding may order a few pairs that a fresh model scores alike, and move a token."""
    assert [row["step"] for row in rows(one)] == [row["step"] for row in rows(many)]
    for a, b in zip(rows(one), rows(many), strict=True):
        for key in a.keys() - set(curves.CLOCK):
            within = 1e-4 if "loss" in key else 5e-3 if "accuracies" in key else 1e-3
            assert a[key] == pytest.approx(b[key], abs=within, nan_ok=True), (key, a["step"])
    a, b = (load_file(out / "model" / "model.safetensors") for out in (one, many))
    assert a.keys() == b.keys()
    assert all(np.abs(a[key] - b[key]).max() < atol for key in a)
    equal = [x == y for x, y in zip(texts(one), texts(many), strict=True)]
    assert np.mean(equal) > 0.95
    assert not list((many / "model").glob("*.tmp*"))


def texts(out):
    """The samples without their scores."""
    found = rows(out, "samples.jsonl")
    return [{key: value for key, value in row.items() if "score" not in key} for row in found]


@pytest.fixture(scope="module")
def one(needs, tmp_path_factory):
    """What a stage leaves when it runs on one process."""
    done = {}

    def get(stage):
        if stage not in done:
            done[stage] = tmp_path_factory.mktemp(stage)
            run(stage, needs, done[stage], 1)
        return done[stage]

    return get


CASES = [("rm", False), ("dpo", True), ("ppo", True)]  # and PPO by DDP: test_torchrun_...
LONGER = [("sft", False), ("sft", True), ("rm", True), ("dpo", False), ("ppo", False)]
LONGER += [("grpo", False), ("shared", True), ("online", False), ("online", True)]
LONGER += [("nash_md", True)]
LONGER += [("kto", True), ("token", False), ("select", True)]
LONGER += [("letters", True), ("letters", False)]
CASES += [pytest.param(*case, marks=pytest.mark.slow) for case in LONGER]


@pytest.mark.parametrize("stage, sharded", CASES)
def test_two_processes_are_one(stage, sharded, needs, one, tmp_path):
    shard = ["--shard"] * sharded
    run(stage, needs, tmp_path, 2, *shard)
    same(one(stage), tmp_path)
    assert json.loads((tmp_path / "summary.json").read_text())["processes"] == 2


@pytest.mark.slow
def test_three_processes_and_batches_that_are_no_multiple(needs, one, tmp_path):
    run("rm", needs, tmp_path, 3)
    same(one("rm"), tmp_path)


DDP, SHARD = pytest.param([], id="ddp"), pytest.param(["--shard"], id="shard")
SLOW_DDP = pytest.param([], id="ddp", marks=pytest.mark.slow)
SLOW_SHARD = pytest.param(["--shard"], id="shard", marks=pytest.mark.slow)


@pytest.mark.parametrize("shard", [SLOW_DDP, SHARD])
def test_resume_on_another_number_of_processes(shard, needs, one, tmp_path):
    """All are killed after a step that was not saved."""
    started = Together("ppo", needs, tmp_path, 2, "--save-every", "3", *shard, pause=4)
    started.wait_for("waiting.0", "waiting.1")
    for process in started.all:
        process.kill()
    assert started.end() == [-signal.SIGKILL] * 2
    assert "going on after 3 of 8" in run("ppo", needs, tmp_path, 1, "--resume")
    same(one("ppo"), tmp_path)


@pytest.mark.parametrize("shard", [DDP, SLOW_SHARD])
def test_a_dead_process_ends_the_run(shard, needs, tmp_path):
    started = Together("rm", needs, tmp_path, 2, "--epochs", "500", *shard)
    started.wait_for("metrics.jsonl")
    killed = time.time()
    started.all[1].kill()
    assert started.end() == [2, -signal.SIGKILL]
    assert time.time() - killed < 60
    (said, _) = started.said()
    assert "error: another process of this run has died" in said and "Traceback" not in said


def test_a_mistake_is_told_and_ends_all(needs, tmp_path):
    started = Together("rm", needs, tmp_path / "run", 2, "--data", "missing.jsonl")
    assert started.end() == [2, 2]
    assert all("error: missing.jsonl: no such file" in said for said in started.said())


# Under torchrun itself


def torchrun(stage, needs, out, *flags):
    """The stage on two processes."""
    module = {"sft": "minirlhf.sft"}.get(stage, f"train_{stage}")
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", free_port()]
    launch += ["-m", module, *flags_of(stage, needs, out, *flags)]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *launch], env=env, **pipes)


def wait_for_metrics(process, out):
    path = out / "metrics.jsonl"
    while not path.exists() or not path.read_text():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def test_torchrun_and_a_signal_that_saves_on_all(needs, one, tmp_path):
    process = torchrun("ppo", needs, tmp_path)
    wait_for_metrics(process, tmp_path)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=120)
    assert process.returncode != 0 and "go on with --resume" in out
    run("ppo", needs, tmp_path, 2, "--resume")
    same(one("ppo"), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("shard", [DDP, SHARD])
def test_torchrun_to_the_end(shard, needs, one, tmp_path):
    process = torchrun("ppo", needs, tmp_path, *shard)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    same(one("ppo"), tmp_path)


@pytest.mark.slow
def test_torchrun_and_a_dead_process(needs, tmp_path):
    process = torchrun("rm", needs, tmp_path, "--epochs", "500")
    wait_for_metrics(process, tmp_path)
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    killed = time.time()
    os.kill(int(found.stdout.split()[-1]), signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0 and time.time() - killed < 60
    assert "another process of this run has died" in err or "Signal 9" in err


@pytest.mark.slow
def test_torchrun_and_a_mistake(needs, tmp_path):
    process = torchrun("rm", needs, tmp_path / "run", "--data", "missing.jsonl")
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0 and "error: missing.jsonl: no such file" in err


# Shares of rows


def test_shares_cover_all_rows_once(monkeypatch):
    for world in (1, 2, 3, 8):
        for n in (1, 2, 7, 8, 64):
            taken = []
            for rank in range(world):
                monkeypatch.setattr(parallel, "world", lambda world=world: world)
                monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
                index, counts = parallel.share(n)
                assert len(index) == len(counts) == -(-n // world) and index.max() < n
                taken += index[counts].tolist()
            assert taken == list(range(n))


def test_one_process_gathers_nothing():
    x = torch.arange(6.0, requires_grad=True)
    assert parallel.gather(x, 6) is x and parallel.total(x) is x
    assert parallel.gather(None, 6) is None
