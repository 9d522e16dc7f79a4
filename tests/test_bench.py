"""The benchmark's clockwork: that rows run beside their peers, say what they must, and are appended."""

import json

import pytest
import torch

from minirlhf import bench, runtime
from minirlhf.gpt import GPTConfig


def test_rows_are_appended(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "GPTConfig", lambda *_: GPTConfig(300, 64, 1, 2, 32))
    path, threads = tmp_path / "rows.jsonl", torch.get_num_threads()
    bench.main(bench.Knobs(device="cpu", rows="lm,rollout,adamw,reward,dpo", peers="hf", out=str(path)))
    bench.main(bench.Knobs(device="cpu", rows="adamw", out=str(path)))
    torch.set_num_threads(threads)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    names = ["language-model step", "rollout, batch 1", "rollout, batch 64", "AdamW step", "reward-model step", "DPO step", "AdamW step"]
    assert [row["row"] for row in rows] == names
    for row in rows:
        assert row["ours"] > 0 and row["n"] > 1 and row["torch"] == torch.__version__ and row["dtype"] == "float32"
    assert {"hf", "ratio/hf", "share of roof"} <= rows[0].keys() and rows[0]["ratio/hf"] == pytest.approx(rows[0]["ours"] / rows[0]["hf"])
    assert rows[3]["ours"] == pytest.approx(rows[3]["ratio/foreach"] * rows[3]["foreach"])


@pytest.mark.parametrize("flags", [{"rows": "lm,sleep"}, {"peers": "jax"}])
def test_unknown_names(flags):
    with pytest.raises(runtime.UserError, match="expected some of"):
        bench.main(bench.Knobs(device="cpu", **flags))
