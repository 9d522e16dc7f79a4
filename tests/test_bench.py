"""The benchmark's clockwork: that rows run beside their peers, say what they must, and are appended."""

import json

import pytest
import torch

from minirlhf.bench import clock, rows
from minirlhf.engine.cli import UserError
from minirlhf.gpt import GPTConfig


def test_rows_are_appended(tmp_path, monkeypatch):
    monkeypatch.setattr(clock, "GPTConfig", lambda *_: GPTConfig(300, 64, 1, 2, 32))
    path, threads = tmp_path / "rows.jsonl", torch.get_num_threads()
    rows.main(
        rows.Knobs(device="cpu", rows="lm,rollout,adamw,reward,dpo", peers="hf", out=str(path))
    )
    rows.main(rows.Knobs(device="cpu", rows="adamw", out=str(path)))
    torch.set_num_threads(threads)
    found = [json.loads(line) for line in path.read_text().splitlines()]
    names = [
        "language-model step",
        "rollout, batch 1",
        "rollout, batch 64",
        "AdamW step",
        "reward-model step",
        "DPO step",
        "AdamW step",
    ]
    assert [row["row"] for row in found] == names
    for row in found:
        assert (
            row["ours"] > 0
            and row["n"] > 1
            and row["torch"] == torch.__version__
            and row["dtype"] == "float32"
        )
    assert {"hf", "ratio/hf", "share of roof"} <= found[0].keys() and found[0][
        "ratio/hf"
    ] == pytest.approx(found[0]["ours"] / found[0]["hf"])
    assert found[3]["ours"] == pytest.approx(found[3]["ratio/foreach"] * found[3]["foreach"])


@pytest.mark.parametrize("flags", [{"rows": "lm,sleep"}, {"peers": "jax"}])
def test_unknown_names(flags):
    with pytest.raises(UserError, match="expected some of"):
        rows.main(rows.Knobs(device="cpu", **flags))
