"""online/frontier: what is counted of answers by hand; on runs of the toy, one of them sharper."""

import json
import shutil

import numpy as np
import pytest

from minirlhf.engine.cli import UserError
from minirlhf.gpt import GPT
from minirlhf.look import policies, replies
from minirlhf.online import frontier

RULE = "def a(prompts, responses):\n    return [float(r.count('a')) for r in responses]\n"
RULE += "def b(prompts, responses):\n    return [float(r.count('b')) for r in responses]\n"


@pytest.fixture(scope="module")
def runs(toy, tmp_path_factory):
    """A folder with two runs whose next-token distributions are sharper than those of toy/sft."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "rule.py").write_text(RULE)
    for name, factor in (("one", 1.2), ("two", 1.5)):
        shutil.copytree(toy / "sft", folder / name)
        model = GPT.from_pretrained(folder / name / "model")
        model.ln_f.weight.data *= factor
        model.save_pretrained(folder / name / "model")
    return folder


def run(toy, runs, *given):
    given = [*map(str, given), "--base", str(toy / "sft"), "--out", str(runs / "out")]
    given += ["--reward", f"{runs}/rule.py:a", "--prompts", "6", "--n", "4", "--device", "cpu"]
    return frontier.main(frontier.parse(frontier.Knobs, "", given))


def test_rows(toy, runs, capsys):
    one, two, rule = runs / "one", runs / "two", f"{runs}/rule.py:b"
    rows = run(toy, runs, f"sharp={one},{two}", one, toy / "sft", "--judge", rule)
    assert [row.get("n") or row["method"] for row in rows] == [
        *(1, 2, 4), "sharp", str(one), str(toy / "sft")
    ]  # fmt: skip
    base = policies.open_policy(str(toy / "sft"), "cpu", "none")
    prompts = policies.from_data(base, 6)
    found = replies.replies(base, prompts, replies.Sampling(24, n=4))
    counts = [reply.text.count("a") for reply in found]
    ends = [reply.text.count("b") for reply in found]
    mean, std = sum(counts) / 24, np.std(counts)

    most = [max(counts[i : i + 4]) for i in range(0, 24, 4)]
    assert rows[2]["proxy_gain"] == pytest.approx((sum(most) / 6 - mean) / std)
    assert rows[2]["kl"] == pytest.approx(1.386294 - 0.75)
    gains, kls = [], []
    for name in (one, two):
        policy = policies.open_policy(str(name), "cpu", str(toy / "sft"))
        answers = replies.replies(policy, prompts, replies.Sampling(24))
        own = [sum(r.text.count("a") for r in answers) / 6, sum(r.kl for r in answers) / 6]
        last = sum(r.text.count("b") for r in answers) / 6
        gains.append([(own[0] - mean) / std, (last - sum(ends) / 24) / np.std(ends)])
        kls.append(own[1])
    (first, first_by_judge), (second, second_by_judge) = gains
    sharp, alone, same = rows[3:]
    assert sharp["proxy_gain"] == pytest.approx((first + second) / 2)
    assert sharp["proxy_error"] == pytest.approx(abs(first - second) / 2**0.5)
    assert sharp["gold_gain"] == pytest.approx((first_by_judge + second_by_judge) / 2)
    assert sharp["kl"] == pytest.approx(sum(kls) / 2, abs=1e-5) and sharp["runs"] == 2
    assert sharp["kl_error"] == pytest.approx(abs(kls[0] - kls[1]) / 2**0.5, abs=1e-5)
    assert alone["proxy_gain"] == pytest.approx(first) and "kl_error" not in alone
    assert same["kl"] == pytest.approx(0, abs=1e-5)

    left = (runs / "out" / "frontier.jsonl").read_text().splitlines()
    assert list(map(json.loads, left)) == rows
    assert (runs / "out" / "frontier.png").read_bytes()[:4] == b"\x89PNG"
    said = capsys.readouterr().out
    assert "best of 4" in said and f"{sharp['kl']:.2f} +- {sharp['kl_error']:.2f}" in said


@pytest.mark.parametrize(
    "given, expected",
    [
        (["a=x", "a=y"], "a: given twice"),
        (["x", "--reward", ""], "--reward is missing"),
        (["x", "--judge", "r", "--reward", "r"], "--judge: the same"),
        (["x", "--reward", "r"], "x: "),
    ],
)
def test_mistakes(given, expected, tmp_path):
    given += [] if "--reward" in given else ["--reward", "r"]
    with pytest.raises(UserError, match=expected):
        frontier.main(frontier.parse(frontier.Knobs, "", [*given, "--out", str(tmp_path)]))


def test_names_and_folders():
    found = frontier.methods(["runs/lr=1e-3/ppo", "A=runs/b=1,runs/b=2", "x"])
    assert found == {
        "runs/lr=1e-3/ppo": ["runs/lr=1e-3/ppo"], "A": ["runs/b=1", "runs/b=2"], "x": ["x"]
    }  # fmt: skip
    for wrong in ("A=", "=x", "A=x,,y", ""):
        with pytest.raises(UserError, match="expected a run, or NAME=RUN,RUN"):
            frontier.methods([wrong])
