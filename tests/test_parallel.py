"""Many processes are one run: the same losses, weights and samples as on one; what happens when one of them dies."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from minirlhf import parallel

ROOT = Path(__file__).parent.parent
STAGES = {
    "sft": ["-m", "minirlhf.sft", "--n-embd", "32", "--epochs", "1", "--batch-size", "63"],
    "rm": ["train_rm.py", "--epochs", "1"],
    "ppo": ["train_ppo.py", "--steps", "20", "--eval-samples", "33"],
    "dpo": ["train_dpo.py", "--epochs", "1", "--eval-samples", "33"],
    "grpo": ["train_ppo.py", "--steps", "6", "--eval-samples", "16", "--advantage", "grpo", "--kl-in", "loss", "--kl-kind", "k3"],
    "shared": ["train_ppo.py", "--steps", "6", "--eval-samples", "16", "--critic", "shared"],
    "online": ["train_dpo.py", "--online", "--loss", "sppo", "--rounds", "2", "--steps", "8", "--eval-samples", "16", "--batch-size", "30"],
    "nash_md": ["train_dpo.py", "--online", "--loss", "nash_md", "--steps", "5", "--eval-samples", "16"],
    "kto": ["train_dpo.py", "--loss", "kto", "--steps", "8", "--eval-samples", "16"],
    "token": ["train_rm.py", "--level", "token", "--epochs", "1", "--micro-batch", "7"],
}
STARTUP = ["-m", "torch.distributed.run", "--nproc-per-node"]


def command(stage, toy, out, processes=1, *flags):
    needs = [] if stage == "sft" else ["--init", toy / "sft"]
    needs += ["--reward", toy / "rm"] if STAGES[stage][0] == "train_ppo.py" or "--online" in STAGES[stage] else []
    port = 20_000 + os.getpid() % 20_000
    launch = [*STARTUP, processes, "--master-port", port] if processes > 1 else []
    return [str(x) for x in (sys.executable, *launch, *STAGES[stage], "--data", "toy", "--out", out, *needs, *flags)]


def start(*args):
    return subprocess.Popen(command(*args), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})  # fmt: skip


def run(*args):
    process = start(*args)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out


def rows(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def same(one, many, atol=1e-3):
    """Losses of each step within 1e-4, all other figures near, weights within 1e-3, samples equal."""
    assert [row["step"] for row in rows(one)] == [row["step"] for row in rows(many)]
    for a, b in zip(rows(one), rows(many), strict=True):
        for key in a.keys() - {"seconds"}:
            assert a[key] == pytest.approx(b[key], abs=1e-4 if "loss" in key else 1e-3, nan_ok=True), (key, a["step"])
    a, b = (load_file(out / "model" / "model.safetensors") for out in (one, many))
    assert a.keys() == b.keys() and all(np.abs(a[key] - b[key]).max() < atol for key in a)
    samples = [[json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()] for out in (one, many)]
    texts = [[{key: value for key, value in row.items() if "score" not in key} for row in sample] for sample in samples]
    assert np.mean([x == y for x, y in zip(*texts, strict=True)]) > 0.95  # rounding may move a token
    assert not list((many / "model").glob("*.tmp*"))


@pytest.fixture(scope="module")
def one(toy, tmp_path_factory):
    """What a stage leaves when it runs on one process."""
    done = {}

    def get(stage):
        if stage not in done:
            done[stage] = tmp_path_factory.mktemp(stage)
            run(stage, toy, done[stage])
        return done[stage]

    return get


CASES = [(stage, shard) for stage in ("sft", "rm", "ppo", "dpo") for shard in (False, True)]
CASES += [("grpo", False), ("shared", True), ("online", False), ("nash_md", True), ("kto", True), ("token", False)]


@pytest.mark.parametrize("stage,sharded", CASES)
def test_two_processes_are_one(stage, sharded, toy, one, tmp_path):
    shard = ["--shard"] * sharded
    run(stage, toy, tmp_path, 2, *shard)
    same(one(stage), tmp_path)
    assert json.loads((tmp_path / "summary.json").read_text())["processes"] == 2


def test_three_processes_and_batches_that_are_no_multiple(toy, one, tmp_path):
    run("rm", toy, tmp_path, 3)
    same(one("rm"), tmp_path)


@pytest.mark.parametrize("shard", [[], ["--shard"]], ids=["ddp", "shard"])
def test_resume_on_another_number_of_processes(shard, toy, one, tmp_path):
    process = start("ppo", toy, tmp_path, 2, "--save-every", "3", *shard)
    while not list(tmp_path.glob("state/0*.safetensors")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.kill()
    subprocess.run(["pkill", "-9", "-f", str(tmp_path)])
    process.communicate()
    assert "going on after" in run("ppo", toy, tmp_path, 1, "--resume")
    same(one("ppo"), tmp_path)


@pytest.mark.parametrize("shard", [[], ["--shard"]], ids=["ddp", "shard"])
def test_a_dead_process_ends_the_run(shard, toy, tmp_path):
    process = start("rm", toy, tmp_path, 2, "--epochs", "500", *shard)
    while not (tmp_path / "metrics.jsonl").exists() or not (tmp_path / "metrics.jsonl").read_text():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    killed = time.time()
    os.kill(int(children[-1]), signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0 and time.time() - killed < 60
    assert "another process of this run has died" in err or "Signal 9" in err


def test_a_signal_saves_on_all(toy, one, tmp_path):
    process = start("ppo", toy, tmp_path, 2)
    while not (tmp_path / "metrics.jsonl").exists() or not (tmp_path / "metrics.jsonl").read_text():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode != 0 and "go on with --resume" in out
    run("ppo", toy, tmp_path, 2, "--resume")
    same(one("ppo"), tmp_path)


def test_a_mistake_is_told_and_ends_all(toy, tmp_path):
    process = start("rm", toy, tmp_path / "run", 2, "--data", "missing.jsonl")
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0 and "error: missing.jsonl: no such file" in err
    process = start("rm", toy, tmp_path / "run", 1, "--shard")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2 and "torchrun --nproc-per-node" in err


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
    assert parallel.gather(x, 6) is x and parallel.total(x) is x and parallel.gather(None, 6) is None
