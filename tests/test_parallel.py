"""Many processes are one run: the same losses, weights and samples as on one; what happens when one of them dies."""

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
from minirlhf.engine import cli, parallel

ROOT = Path(__file__).parent.parent
STAGES = {
    "sft": ["-m", "minirlhf.sft", "--n-embd", "32", "--epochs", "1", "--batch-size", "63"],
    "rm": ["train_rm.py", "--epochs", "1"],
    "ppo": [
        "train_ppo.py",
        "--steps",
        "20",
        "--batch-size",
        "64",
        "--micro-batch",
        "16",
        "--eval-samples",
        "33",
    ],
    "dpo": ["train_dpo.py", "--epochs", "1", "--eval-samples", "33"],
    "grpo": [
        "train_ppo.py",
        "--steps",
        "6",
        "--eval-samples",
        "16",
        "--advantage",
        "grpo",
        "--kl-in",
        "loss",
        "--kl-kind",
        "k3",
    ],
    "shared": ["train_ppo.py", "--steps", "6", "--eval-samples", "16", "--critic", "shared"],
    "online": [
        "train_dpo.py",
        "--online",
        "--loss",
        "sppo",
        "--rounds",
        "2",
        "--steps",
        "8",
        "--eval-samples",
        "16",
        "--batch-size",
        "30",
    ],
    "nash_md": [
        "train_dpo.py",
        "--online",
        "--loss",
        "nash_md",
        "--steps",
        "5",
        "--eval-samples",
        "16",
    ],
    "kto": ["train_dpo.py", "--loss", "kto", "--steps", "8", "--eval-samples", "16"],
    "token": ["train_rm.py", "--level", "token", "--epochs", "1", "--micro-batch", "7"],
}
MODULES = {"train_rm.py": train_rm, "train_ppo.py": train_ppo, "train_dpo.py": train_dpo, "-m": sft}
PROCESSES = multiprocessing.get_context("forkserver")  # has imported all, so starts at once
PROCESSES.set_forkserver_preload(["train_dpo", "train_ppo"])


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def flags_of(stage, toy, out, flags):
    needs = [] if stage == "sft" else ["--init", toy / "sft"]
    needs += (
        ["--reward", toy / "rm"]
        if STAGES[stage][0] == "train_ppo.py" or "--online" in STAGES[stage]
        else []
    )
    return [
        str(x)
        for x in (
            *STAGES[stage][2 if stage == "sft" else 1 :],
            "--data",
            "toy",
            "--out",
            out,
            *needs,
            *flags,
        )
    ]


def start(stage, toy, out, processes, *flags):
    """The stage under torchrun."""
    launch = [
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        str(processes),
        "--master-port",
        free_port(),
        STAGES[stage][0],
    ]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, *launch, *flags_of(stage, toy, out, flags)], cwd=ROOT, env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip


def wait_for(process, ready):
    while not ready():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def one_of_them(module, flags, rank, processes, port, log):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    torch.set_num_threads(1)
    sys.argv = ["script", *flags]
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        cli.run_script(MODULES[module].main, MODULES[module].Knobs, "")


def run(stage, toy, out, processes, *flags):
    """The stage to its end, as torchrun starts it but without the time to import: what the first process said."""
    port, logs = free_port(), [out.parent / f"{out.name}.{rank}.txt" for rank in range(processes)]
    args = [
        (STAGES[stage][0], flags_of(stage, toy, out, flags), rank, processes, port, log)
        for rank, log in enumerate(logs)
    ]
    started = [PROCESSES.Process(target=one_of_them, args=a) for a in args]
    for process in started:
        process.start()
    for process in started:
        process.join(120)
    assert [p.exitcode for p in started] == [0] * processes, [log.read_text() for log in logs]
    return logs[0].read_text()


def rows(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def same(one, many, atol=1e-3):
    """Losses of each step within 1e-4, all other figures near, weights within 1e-3, samples equal."""
    assert [row["step"] for row in rows(one)] == [row["step"] for row in rows(many)]
    for a, b in zip(rows(one), rows(many), strict=True):
        for key in a.keys() - {"seconds"}:
            assert a[key] == pytest.approx(
                b[key], abs=1e-4 if "loss" in key else 1e-3, nan_ok=True
            ), (key, a["step"])
    a, b = (load_file(out / "model" / "model.safetensors") for out in (one, many))
    assert a.keys() == b.keys() and all(np.abs(a[key] - b[key]).max() < atol for key in a)
    samples = [
        [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
        for out in (one, many)
    ]
    texts = [
        [{key: value for key, value in row.items() if "score" not in key} for row in sample]
        for sample in samples
    ]
    assert (
        np.mean([x == y for x, y in zip(*texts, strict=True)]) > 0.95
    )  # rounding may move a token
    assert not list((many / "model").glob("*.tmp*"))


@pytest.fixture(scope="module")
def one(toy, tmp_path_factory):
    """What a stage leaves when it runs on one process."""
    done = {}

    def get(stage):
        if stage not in done:
            done[stage] = tmp_path_factory.mktemp(stage)
            run(stage, toy, done[stage], 1)
        return done[stage]

    return get


CASES = [("rm", False), ("dpo", True)]  # PPO: test_torchrun
LONGER = [
    ("sft", False),
    ("sft", True),
    ("rm", True),
    ("dpo", False),
    ("grpo", False),
    ("shared", True),
    ("online", False),
]
LONGER += [("nash_md", True), ("kto", True), ("token", False)]
CASES += [pytest.param(*case, marks=pytest.mark.slow) for case in LONGER]


@pytest.mark.parametrize("stage,sharded", CASES)
def test_two_processes_are_one(stage, sharded, toy, one, tmp_path):
    shard = ["--shard"] * sharded
    run(stage, toy, tmp_path, 2, *shard)
    same(one(stage), tmp_path)
    assert json.loads((tmp_path / "summary.json").read_text())["processes"] == 2


@pytest.mark.parametrize("shard", [[], ["--shard"]], ids=["ddp", "shard"])
def test_torchrun(shard, toy, one, tmp_path):
    process = start("ppo", toy, tmp_path, 2, *shard)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    same(one("ppo"), tmp_path)


@pytest.mark.slow
def test_three_processes_and_batches_that_are_no_multiple(toy, one, tmp_path):
    run("rm", toy, tmp_path, 3)
    same(one("rm"), tmp_path)


@pytest.mark.parametrize(
    "shard", [pytest.param([], marks=pytest.mark.slow), ["--shard"]], ids=["ddp", "shard"]
)
def test_resume_on_another_number_of_processes(shard, toy, one, tmp_path):
    process = start("ppo", toy, tmp_path, 2, "--save-every", "3", *shard)
    wait_for(process, lambda: list(tmp_path.glob("state/0*.safetensors")))
    process.kill()
    subprocess.run(["pkill", "-9", "-f", str(tmp_path)])
    process.communicate()
    assert "going on after" in run("ppo", toy, tmp_path, 1, "--resume")
    same(one("ppo"), tmp_path)


@pytest.mark.parametrize(
    "shard", [[], pytest.param(["--shard"], marks=pytest.mark.slow)], ids=["ddp", "shard"]
)
def test_a_dead_process_ends_the_run(shard, toy, tmp_path):
    process = start("rm", toy, tmp_path, 2, "--epochs", "500", *shard)
    wait_for(
        process,
        lambda: list(tmp_path.glob("metrics.jsonl")) and (tmp_path / "metrics.jsonl").read_text(),
    )
    children = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True
    ).stdout.split()
    killed = time.time()
    os.kill(int(children[-1]), signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0 and time.time() - killed < 60
    assert "another process of this run has died" in err or "Signal 9" in err


def test_a_signal_saves_on_all(toy, one, tmp_path):
    process = start("ppo", toy, tmp_path, 2)
    wait_for(
        process,
        lambda: list(tmp_path.glob("metrics.jsonl")) and (tmp_path / "metrics.jsonl").read_text(),
    )
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode != 0 and "go on with --resume" in out
    run("ppo", toy, tmp_path, 2, "--resume")
    same(one("ppo"), tmp_path)


def test_a_mistake_is_told_and_ends_all(toy, tmp_path):
    process = start("rm", toy, tmp_path / "run", 2, "--data", "missing.jsonl")
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0 and "error: missing.jsonl: no such file" in err


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
    assert (
        parallel.gather(x, 6) is x and parallel.total(x) is x and parallel.gather(None, 6) is None
    )
