"""The benchmark's clockwork: rows run beside their peers, say what they must, and are appended."""

import json
import os
import platform
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minirlhf.bench import clock, rows
from minirlhf.engine import machine
from minirlhf.engine.cli import UserError
from minirlhf.gpt import GPTConfig

ROWS = [
    "language-model step",
    "rollout, batch 1",
    "rollout, batch 64",
    "AdamW step",
    "reward-model step",
    "DPO step",
    "PPO iteration",
    "AdamW step",
]


@pytest.fixture
def quick(monkeypatch):
    """Tiny models, and two runs of each function."""
    seconds = clock.Bench.seconds
    monkeypatch.setattr(clock, "GPTConfig", lambda *_: GPTConfig(300, 64, 1, 2, 32))
    monkeypatch.setattr(clock.Bench, "seconds", lambda self, *f, n=None: seconds(self, *f, n=2))
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    yield
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)


def test_rows_are_appended(tmp_path, quick):
    out = str(tmp_path / "rows.jsonl")
    some = "lm,rollout,adamw,reward,dpo,ppo"
    rows.main(rows.Knobs(device="cpu", rows=some, peers="hf", out=out))
    rows.main(rows.Knobs(device="cpu", rows="adamw", out=out))
    found = [json.loads(line) for line in Path(out).read_text().splitlines()]
    assert [row["row"] for row in found] == ROWS
    for row in found:
        assert row["ours"] > 0 and row["n"] > 1
        assert row["torch"] == torch.__version__ and row["dtype"] == "float32"
    assert {"hf", "ratio/hf", "share of roof"} <= found[0].keys()
    assert found[0]["ratio/hf"] == pytest.approx(found[0]["ours"] / found[0]["hf"])
    assert found[3]["ours"] == pytest.approx(found[3]["ratio/foreach"] * found[3]["foreach"])


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="needs Linux's list of features")
def test_versions_name_the_instructions():
    features = Path("/proc/cpuinfo").read_text().split()
    widest = "AVX512" if "avx512f" in features else "AVX2" if "avx2" in features else "DEFAULT"
    asked = os.environ.get("ATEN_CPU_CAPABILITY", "").upper()
    if platform.machine() == "x86_64" and not asked:
        assert f", {widest}, " in machine.versions(torch.device("cpu"))["device"]


@pytest.mark.parametrize("flags", [{"rows": "lm,sleep"}, {"peers": "jax"}])
def test_unknown_names(flags):
    with pytest.raises(UserError, match="expected some of"):
        rows.main(rows.Knobs(device="cpu", **flags))


@pytest.mark.parametrize("module", ["minirlhf.bench", "minirlhf.bench.plan", "minirlhf.runtime"])
@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_commands_have_help(module, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["python", "--help"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module(module, run_name="__main__")
    said = capsys.readouterr().out
    assert stopped.value.code == 0 and "Left out:" in said and "--device" in said


def test_the_room_imports_no_peer():
    """Nor a script, nor torch: what is heavy waits until a row needs it."""
    code = "import sys, minirlhf.bench; print(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"transformers", "trl", "datasets", "torch", "train_ppo"}
    assert "minirlhf" in done.stdout.split() and not heavy & set(done.stdout.split())
