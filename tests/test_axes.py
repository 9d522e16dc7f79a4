"""Every row of dpo.AXES is a command line that makes the toy's true reward rise, and stands where its run shows it to stand."""

import importlib
import json
import re
import shlex
from pathlib import Path

import pytest

import train_dpo
import train_ppo
from minirlhf import data
from minirlhf.dpo import AXES, KINDS
from minirlhf.engine import cli, log

PPO = "train_ppo.py --steps 8 --batch-size 64 --lr 2e-3 --ppo-epochs 1 --advantage"
DPO = "train_dpo.py --steps 20 --lr 1e-3 --loss"
ONLINE = "train_dpo.py --steps 12 --lr 1e-3 --batch-size 64 --online --loss"
COMMANDS = {
    **{kind: f"{DPO} {kind}" for kind in (*KINDS, "dpo", "kto", "una", "rrhf", "pro", "lipo")},
    "cdpo": f"{DPO} sigmoid --label-smoothing 0.1 --no-soft-labels",
    "exo_pair": f"{DPO} exo_pair --label-smoothing 0.001",
    "ipo": f"{DPO} ipo --loss-options length_normalise=true",
    "dpo_as_q": f"{DPO} dpo",  # its loss is DPO's; dpo.token_rewards reads the result by tokens
    "tdpo": f"{DPO} tdpo2",
    "orpo": f"{DPO} orpo --loss-options lam=3",
    # With the defaults these four fall. Most responses are rejected in some pair: what only pushes them down makes the policy leave the
    # language, unless it fades soon (a high beta or alpha) or the preferred are held up. discopop's loss falls to both sides of its start.
    "npo": f"{DPO} npo --beta 3 --lr 5e-4",
    "d2o": f"{DPO} d2o --beta 1 --loss-options alpha=1 --lr 5e-4",
    "apo_down": f"{DPO} apo_down --loss-options nll_weight=3",
    "discopop": f"{DPO} discopop --loss-options temperature=1",
    "sppo": f"{ONLINE} sppo --rounds 3",
    "oaif": f"{ONLINE} sigmoid",
    "iterative_dpo": f"{ONLINE} sigmoid --rounds 3",
    "dno": f"{ONLINE} sigmoid --rounds 3 --samples 4",
    "nash_md": f"{ONLINE} nash_md",
    "ppo": f"{PPO} gae",
    "rloo": f"{PPO} rloo --group-size 4",
    "grpo": f"{PPO} grpo --group-size 4",
    "reinforce": f"{PPO} reinforce",
}


def test_every_method_has_its_command():
    assert COMMANDS.keys() == AXES.keys()


@pytest.mark.parametrize("method", AXES)
def test_the_true_reward_rises(method, toy, tmp_path, monkeypatch):
    monkeypatch.setattr(log.Run, "plot", lambda self: None)
    script, *flags = shlex.split(COMMANDS[method])
    flags += ["--data", "toy", "--init", toy / "sft", "--reward", toy / "rm", "--out", tmp_path, "--response-length", "12",
              "--eval-samples", "150"]  # fmt: skip
    module = {"train_dpo.py": train_dpo, "train_ppo.py": train_ppo}[script]
    summary = module.main(cli.parse(module.Knobs, "", [str(flag) for flag in flags]))
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    before, after = (
        data.toy_reward([row["prompt"] for row in rows], [row[when] for row in rows])
        for when in ("before", "after")
    )
    rise = sum(after) / len(rows) - sum(before) / len(rows)
    print(
        f"{method}: {sum(before) / len(rows):+.2f} -> {sum(after) / len(rows):+.2f} in {summary['seconds']} s"
    )
    assert rise > (
        0.3 if AXES[method]["RM4"] == "positive" else 0.1
    )  # who is told only what to avoid learns less
    # RL1 and O as the run shows them: a KL from the base wherever there is a reference, labels bought wherever it is online
    assert ("eval/kl_after" in summary) == (AXES[method]["RL1"] == "reference")
    metrics = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert ("online/labels" in metrics) == (AXES[method]["O"] == "online")


def test_the_readme_has_the_same_table_and_its_commands_are_understood():
    readme = (Path(train_dpo.__file__).parent / "README.md").read_text(encoding="utf-8")
    lines = [
        [cell.strip() for cell in line.strip("| \n").split("|")]
        for line in readme.splitlines()
        if line.startswith("| ")
    ]
    lines = [
        (names.replace(" and the other pairwise losses", ""), values)
        for names, *values in lines
        if len(values) == 8
    ]
    rows = {name: values for names, values in lines for name in names.split(", ")}
    rows.pop("methods")
    for name, values in rows.items():
        assert list(AXES[name].values()) == values
    others = set(AXES) - rows.keys()  # "the other pairwise losses", and tdpo under its two numbers
    assert others - {"tdpo1", "tdpo2"} <= KINDS.keys() and all(
        AXES[name] == AXES["dpo"] for name in others - {"tdpo1", "tdpo2"}
    )
    commands = re.findall(r"`python (train_\w+)\.py([^`]*)`", readme)
    assert len(commands) > 15
    for script, flags in commands:
        module = importlib.import_module(script)
        cli.parse(module.Knobs, "", shlex.split(flags))
