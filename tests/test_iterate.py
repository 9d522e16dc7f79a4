"""Iterated RLHF: PARL's loss of a reward model against loops, PPO's KL from a named base, and the
runner of rounds: what it starts, what it leaves alone, what it says."""

import dataclasses
import importlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from test_online_policies import differences, symmetric_chances

import train_dpo
import train_ppo
import train_rm
from minirlhf import sft
from minirlhf.data.items import Items
from minirlhf.data.labels import Label
from minirlhf.engine import curves, stages
from minirlhf.engine.cli import UserError, parse
from minirlhf.feedback import labelers
from minirlhf.feedback.checks import check_rm
from minirlhf.feedback.kinds import win_rates
from minirlhf.gpt import GPT
from minirlhf.look import command, policies
from minirlhf.online import iterate, parl
from minirlhf.tokenizer import load_base

ROOT = Path(__file__).parent.parent

# PARL's loss


def parl_by_loops(scores, groups, wins, beta):
    losses = []
    for group, won in zip(groups, wins, strict=True):
        weights = [np.exp(scores[i] / beta) for i in group]
        policy = [w / sum(weights) for w in weights]
        terms = [p * (0.05 * np.log(p * len(group)) - w) for p, w in zip(policy, won, strict=True)]
        losses.append(sum(terms))
    return np.mean(losses)


def batch_of(items, size=100, seed=0):
    return next(items.epoch(size, np.random.default_rng(seed)))


def loss_of(items, scores, batch, beta):
    """(loss, its gradient in the scores of a batch)."""
    given = torch.tensor(scores, requires_grad=True)
    knobs = train_rm.Knobs(loss="parl", beta=beta, group_size=3)
    loss = train_rm.batch_loss(knobs, None, given, items, batch)
    loss.backward()
    return loss.item(), given.grad.numpy()


def test_parl_of_given_comparisons():
    """Lists of two and of three, best first: by hand, the best of three wins (1 + 1 + 1/2) / 3."""
    groups = [[0, 1, 2], [3, 4], [6, 5]]
    items = Items(["p"] * 3 + ["q"] * 2 + ["r"] * 2, list("abcdefg"), ["l"] * 7, groups=groups)
    batch = batch_of(items)
    scores = np.random.default_rng(1).normal(size=7)
    wins = {3: [2.5 / 3, 0.5, 0.5 / 3], 2: [0.75, 0.25]}

    def by_loops(x):
        return parl_by_loops(x, batch.blocks, [wins[len(block)] for block in batch.blocks], 0.7)

    loss, gradient = loss_of(items, scores, batch, 0.7)
    assert loss == pytest.approx(by_loops(scores))
    assert np.allclose(gradient, differences(by_loops, scores), rtol=0, atol=1e-8)
    assert not np.isclose(loss, loss_of(items, scores, batch, 1.4)[0])


def test_parl_of_ratings():
    """Rivals are parts of the batch; a win is how often a rater gives more, ties one half."""
    ratings = [np.array(r) for r in ([1, 2, 3], [2, 2], [0, 4, 4], [1], [3, 0], [4, 4, 1])]
    items = Items([""] * 6, list("abcdef"), ["l"] * 6, ratings)
    batch = batch_of(items)
    groups, wins = win_rates(items, batch, 3)
    assert sorted(np.concatenate(groups)) == list(range(6)) and [len(g) for g in groups] == [3, 3]
    for group, won in zip(groups, wins, strict=True):
        for i, w in zip(group, won, strict=True):
            chances = [0.5]  # itself
            for j in set(group) - {i}:
                mine, its = (ratings[batch.rows[k]] for k in (i, j))
                chances.append(np.mean([(x > y) + (x == y) / 2 for x in mine for y in its]))
            assert w == pytest.approx(np.mean(chances))
    scores = np.random.default_rng(2).normal(size=6)
    loss, _ = loss_of(items, scores, batch, 0.4)
    assert loss == pytest.approx(parl_by_loops(scores, groups, wins, 0.4))


def test_a_label_says_how_sure_it_is():
    said = {"ranking": [1, 0], "p": 0.3}
    labels = [Label("l", "comparison", "p", ["a", "b"], said, {}, (0, 1))]
    labels.append(Label("l", "comparison", "q", ["c", "d"], {"ranking": [0, 1]}, {}, (2, 3)))
    items = Items(list("ppqq"), list("abcd"), ["l"] * 4, groups=[[1, 0], [2, 3]], labels=labels)
    batch = batch_of(items)
    groups, wins = win_rates(items, batch, 4)
    found = {}
    for group, won in zip(groups, wins, strict=True):
        found[items.responses[batch.rows[group[0]]]] = won.tolist()
    assert found["b"] == pytest.approx([0.6, 0.4]) and found["c"] == [0.75, 0.25]


def test_several_labels_of_two_count_alike():
    """One is sure by .9 of a, one by .8 of b, one is a person's tie, one a person's word for b."""
    labels = []
    for said in ({"ranking": [0, 1], "p": 0.9}, {"ranking": [1, 0], "p": 0.2},
                 {"ranking": [[0, 1]]}, {"best": 1}):  # fmt: skip
        labels.append(Label("l", "comparison", "p", ["a", "b"], said, {}, (0, 1)))
    items = Items(["p"] * 2, list("ab"), ["l"] * 2, groups=[[0, 1], [1, 0], [1, 0]], labels=labels)
    batch = batch_of(items)
    for group, won in zip(*win_rates(items, batch, 4), strict=True):
        first = (0.5 + (0.9 + 0.2 + 0.5 + 0) / 4) / 2
        wins = {"a": first, "b": 1 - first}
        assert won == pytest.approx([wins[items.responses[batch.rows[i]]] for i in group])


def test_copies_have_no_labels():
    labels = [Label("l", "comparison", "p", ["a", "b"], {"ranking": [0, 1]}, {}, (0, 1))]
    items = Items(["p"] * 2, list("ab"), ["l"] * 2, groups=[[0, 1]], labels=labels)
    with pytest.raises(UserError, match="--augment convexda has no say in --loss parl of labels"):
        check_rm(train_rm.Knobs(loss="parl", augment="convexda"), items)
    items.labels = None
    check_rm(train_rm.Knobs(loss="parl", augment="convexda"), items)


def test_detached_it_is_ordinary():
    """The nll form in torch: with its policy detached its gradient is iterated RLHF's, whole it is
    PARL's; the utility has none but by way of the policy, and missing options have no part."""
    rng, beta = np.random.default_rng(3), 0.4
    chances = symmetric_chances(rng, 5)
    rewards = torch.tensor(rng.normal(size=5), requires_grad=True)
    gaps = rewards[:, None] - rewards
    losses = torch.nn.functional.softplus(gaps) - torch.tensor(chances) * gaps
    policy = (rewards / beta).softmax(0)
    given = rewards.detach().numpy(), chances, beta
    for pi, gradient in (
        (policy.detach(), parl.iterated_gradient),
        (policy, parl.nll_gradient),
    ):
        (found,) = torch.autograd.grad(pi @ losses @ pi, rewards, retain_graph=True)
        assert np.allclose(found, gradient(*given), atol=1e-12)
    wins = torch.tensor(chances.mean(-1))
    (alone,) = torch.autograd.grad(parl.bilevel_loss(rewards[None], wins[None], beta), rewards)
    assert np.allclose(alone, parl.utility_gradient(*given))
    padded = torch.cat([rewards, torch.full((2,), -torch.inf)])[None]
    loss = parl.bilevel_loss(padded, torch.cat([wins, torch.zeros(2)])[None], beta)
    (found,) = torch.autograd.grad(loss, rewards)
    assert np.allclose(found, alone) and not (policy.detach() * wins).sum().requires_grad


# PPO from a tuned policy


def test_kl_is_from_the_named_base(toy, tmp_path, monkeypatch):
    """Runs of rate 0 from a tuned policy: from itself the KL is 0, from the base what it was."""
    monkeypatch.setattr(curves, "plot", lambda *_: None)
    given = dict(data="toy", reward=str(toy / "rm"), response_length=8, eval_samples=32)
    given |= dict(batch_size=8, minibatches=1, ppo_epochs=2)
    tuned = dict(init=str(toy / "sft"), out=str(tmp_path / "ppo"), steps=4, lr=3e-3)
    first = train_ppo.main(train_ppo.Knobs(**tuned, **given))
    still = dict(init=str(tmp_path / "ppo"), steps=1, lr=0.0, **given)
    alone = train_ppo.main(train_ppo.Knobs(out=str(tmp_path / "alone"), **still))
    still |= dict(reference=str(toy / "sft"), out=str(tmp_path / "named"))
    both = train_ppo.main(train_ppo.Knobs(**still))
    assert first["eval/kl_after"] > 0.05 and alone["eval/kl_after"] == pytest.approx(0, abs=1e-5)
    assert both["eval/kl_after"] == pytest.approx(first["eval/kl_after"], rel=1e-4)
    assert both["eval/score_before"] == pytest.approx(first["eval/score_before"], abs=1e-5)
    assert both["eval/score_after"] == pytest.approx(alone["eval/score_after"], abs=1e-5)
    rows = [json.loads((tmp_path / x / "metrics.jsonl").read_text()) for x in ("alone", "named")]
    assert abs(rows[0]["objective/kl"]) < 1e-4 < 0.01 < rows[1]["objective/kl"]
    with pytest.raises(UserError, match="nowhere"):
        train_ppo.main(train_ppo.Knobs(**still | dict(reference="nowhere")))


@pytest.mark.parametrize("reference, base", [("", "tuned"), ("base", "base")])
def test_a_missing_reward_model_is_of_the_reference(reference, base, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(stages, "stage_before", lambda _, __, own, ___: asked.append(own.init))
    given = dict(data="toy", init="tuned", reference=reference, out=str(tmp_path / "policy"))
    sft.stage_beside("reward model", "rm", train_rm, train_ppo.Knobs(**given), None)
    labelers.reward_beside(train_dpo.Knobs(**given, online=True), None, train_rm)
    assert asked == [base, base]


def test_a_reference_of_another_size(toy, tmp_path, monkeypatch, capsys):
    """Wider and of a longer context: what reads the policy's answers has to fit the policy."""
    monkeypatch.setattr(curves, "plot", lambda *_: None)
    policy, tokenizer = load_base(toy / "sft")
    sizes = dataclasses.replace(policy.config, n_ctx=2 * policy.config.n_ctx, n_embd=24, n_head=2)
    GPT(sizes).save_pretrained(tmp_path / "base", tokenizer)
    out = tmp_path / "ppo"
    given = dict(data="toy", init=str(toy / "sft"), reward=str(toy / "rm"), out=str(out), steps=1)
    given |= dict(reference=str(tmp_path / "base"), response_length=4, batch_size=8)
    summary = train_ppo.main(train_ppo.Knobs(**given, eval_samples=8, critic="shared"))
    assert np.isfinite(summary["eval/score_after"])
    command.main(command.parse(command.Knobs, "", [str(out), "--trace"]))
    assert "score of the response" in capsys.readouterr().out


# The runner


SMALL = "--batch-size 8 --eval-samples 8 --steps 2 --save-every 1"
RM = "--epochs 1 --batch-size 16 --save-every 2"


def knobs_of(toy, out, **changes):
    given = dict(data="toy", labeler="true", init=str(toy / "sft"), out=str(out), prompts=60)
    return iterate.Knobs(**given | dict(response_length=8, rm=RM, ppo=SMALL, rounds=1) | changes)


def words(command):
    """{flag: its word} of a stage's command."""
    command = [str(word) for word in command]
    pairs = zip(command, command[1:], strict=False)
    return {flag: word for flag, word in pairs if flag.startswith("--")}


def test_what_a_round_starts(toy, tmp_path):
    more = {"rm": ["--loss", "parl"], "ppo": ["--steps", "5"]}
    for start in ("base", "last"):
        knobs = knobs_of(toy, tmp_path, start=start, n=4, seed=7)
        first, second = (iterate.stages(knobs, tmp_path, k, more) for k in (1, 2))
        assert [name for name, _, _ in first] == ["own samples", "labels", "reward model", "PPO"]
        base, last = str(toy / "sft"), str(tmp_path / "1" / "ppo")
        assert str(first[0][2][1]) == base and str(second[0][2][1]) == last
        assert words(second[1][2])["--pairs"] == "120"  # of four answers two pairs
        rm, ppo = words(second[2][2]), words(second[3][2])
        assert rm["--data"] == str(tmp_path / "labels") and rm["--init"] == base
        assert rm["--loss"] == "parl" and ppo["--steps"] == "5"
        assert ppo["--reward"] == rm["--out"] == str(tmp_path / "2" / "rm")
        assert ppo["--init"] == (base if start == "base" else last)
        assert ppo.get("--reference") == (None if start == "base" else base)
        assert "--reference" not in words(first[3][2])
        assert {words(c)["--seed"] for _, _, c in first} == {"7"} != words(ppo)


@pytest.fixture
def faked(monkeypatch):
    """The commands that were run, of stages that leave what such stages leave."""
    seen = []

    def run(command):
        seen.append(command[2])
        given = words(command)
        out = Path(given["--out"])
        if out.suffix:
            out.write_text("{}\n" * 3)
            return 0, "", []
        (out / "model").mkdir(parents=True)
        (out / "model" / "model.safetensors").touch()
        found = {"data": "x", "seconds": 1, "eval/accuracy": 0.75, "eval/score_after": 1.5}
        (out / "summary.json").write_text(json.dumps(found | {"evaluated": True}))
        row = {"prompt": "", "before": "aa", "after": "ha"}  # worth 0, the mean of 4 and -4
        (out / "samples.jsonl").write_text(json.dumps(row))
        return 0, "", []

    monkeypatch.setattr(iterate, "run", run)
    return seen


STAGES = ["minirlhf.online.best_of", "minirlhf.feedback.label", "train_rm", "train_ppo"]


def test_what_is_finished_is_left_alone(toy, tmp_path, faked, capsys):
    summary = iterate.main(knobs_of(toy, tmp_path, rounds=2))
    assert faked == 2 * STAGES
    assert [row["labels"] for row in summary["rounds"]] == [3, 6]
    last = summary["rounds"][1]
    assert (last["accuracy"], last["score"], last["kl"], last["labeler"]) == (0.75, 1.5, None, 0.0)
    assert json.loads((tmp_path / "summary.json").read_text())["rounds"] == summary["rounds"]
    assert capsys.readouterr().out.count("0.75") == 2
    faked.clear()
    iterate.main(knobs_of(toy, tmp_path, rounds=2, resume=True))
    assert faked == []
    iterate.main(knobs_of(toy, tmp_path, rounds=3, resume=True))
    assert faked == STAGES
    faked.clear()
    (tmp_path / "labels" / "3.jsonl").unlink()
    (tmp_path / "3" / "rm" / "summary.json").unlink()
    shutil.rmtree(tmp_path / "3" / "rm" / "model")
    iterate.main(knobs_of(toy, tmp_path, rounds=3, resume=True))
    assert faked == ["minirlhf.feedback.label", "train_rm"]
    with pytest.raises(UserError, match=f"name one's policy, as in {tmp_path}/1/ppo"):
        policies.open_policy(str(tmp_path), "cpu")
    for changes, says in (
        ({}, "rounds lie there: --resume"),
        ({"resume": True, "seed": 4}, "--seed 0, this one has 4"),
        ({"resume": True, "start": "last"}, "--start base, this one has last"),
    ):
        with pytest.raises(UserError, match=says):
            iterate.main(knobs_of(toy, tmp_path, **changes))
    lock = iterate.enter(tmp_path, knobs_of(toy, tmp_path, resume=True))
    with pytest.raises(UserError, match="another run is writing here"):
        iterate.main(knobs_of(toy, tmp_path, resume=True))
    lock.close()


def test_a_stage_half_way_goes_on(toy, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(iterate, "run", lambda command: seen.append(command) or (0, "", []))
    state = tmp_path / "rm" / "state" / "00000004.safetensors"
    iterate.work("rm", tmp_path / "rm", ("train_rm",))
    state.parent.mkdir(parents=True)
    state.touch()
    iterate.work("rm", tmp_path / "rm", ("train_rm",))
    assert [command[2:] for command in seen] == [["train_rm"], ["train_rm", "--resume"]]


@pytest.mark.parametrize("changes, says", [
    ({"labeler": ""}, "--labeler is missing"),
    ({"labeler": "nowhere"}, "nowhere"),
    ({"labeler": "no.py:f"}, "no file no.py"),
    ({"data": "reviews"}, "only the toy language"),
    ({"init": "nowhere"}, "nowhere"),
    ({"rm": "--out x"}, "--rm --out x: --out is given by this command"),
    ({"ppo": "--steps 3 --no-resume"}, "--no-resume is given"),
    ({"ppo": "--seed=3"}, "--seed is given"),
    ({"rm": "'"}, "No closing quotation"),
])  # fmt: skip
def test_mistakes_are_found_first(changes, says, toy, tmp_path, faked, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=says):
        iterate.main(knobs_of(toy, tmp_path / "out", **changes))
    assert not faked and not (tmp_path / "out").exists()


FAILS = """
import os, signal, sys, time
what = sys.argv[1]
if what == "error":
    print("a warning", "", "error: --lr x: expected a number", sep="\\n", file=sys.stderr)
    sys.exit(2)
if what == "dies":
    os.kill(os.getpid(), signal.SIGKILL)
if what == "fine":
    print("a note", file=sys.stderr)
    sys.exit(0)
heard = []
signal.signal(int(what), lambda *_: heard.append(1))
os.kill(os.getppid(), int(what))
while not heard:
    time.sleep(0.01)
time.sleep(0.2)  # to save its state
open("heard", "w").write(str(len(heard)))
"""


@pytest.mark.parametrize("what, code, says", [
    ("error", 2, "a warning\n\n\nerror: round 1, PPO: --lr x: expected a number\n"),
    ("dies", 137, f"\nerror: round 1, PPO: ended by signal 9; {iterate.STOPPED}\n"),
    (str(int(signal.SIGINT)), 130, f"interrupted; {iterate.STOPPED}"),
    (str(int(signal.SIGTERM)), 143, f"interrupted; {iterate.STOPPED}"),
])  # fmt: skip
def test_a_stage_that_fails_or_is_stopped(what, code, says, tmp_path, monkeypatch, capsys):
    (tmp_path / "stage.py").write_text(FAILS)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        iterate.work("round 1, PPO", tmp_path / "ppo", ("stage", what))
    assert ended.value.code == code
    said = capsys.readouterr().err
    assert says in said if "interrupted" in says else said == says
    if "interrupted" in says:
        assert Path("heard").read_text() == "1"
    iterate.work("round 1, PPO", tmp_path / "ppo", ("stage", "fine"))
    assert capsys.readouterr().err == "a note\n"


def in_process(command):
    """A stage's command without a process of its own."""
    _, _, name, *flags = command
    module = importlib.import_module(name)
    module.main(getattr(module, "parse", parse)(module.Knobs, "", flags))
    return 0, "", []


@pytest.mark.parametrize("start", ["last", pytest.param("base", marks=pytest.mark.slow)])
def test_two_rounds_of_the_toy(start, toy, tmp_path, monkeypatch):
    monkeypatch.setattr(iterate, "run", in_process)
    monkeypatch.setattr(curves, "plot", lambda *_: None)
    flags = f"--data toy --labeler true --init {toy / 'sft'} --out {tmp_path} --prompts 120 "
    flags += f'--response-length 8 --start {start} --rm="--loss parl --epochs 2 --lr 3e-3" '
    flags += f'--ppo="{SMALL} --batch-size 32 --lr 3e-3"'
    summary = iterate.main(parse(iterate.Knobs, "", shlex.split(flags)))
    first, second = summary["rounds"]
    assert 60 < first["labels"] < second["labels"] <= 240
    labels = [(tmp_path / "labels" / f"{k}.jsonl").read_text().splitlines() for k in (1, 2)]
    assert sum(map(len, labels)) == second["labels"] and not set(labels[0]) & set(labels[1])
    config = json.loads((tmp_path / "2" / "ppo" / "config.json").read_text())
    assert config["reference"] == (str(toy / "sft") if start == "last" else "")
    assert first["kl"] > 0 < second["kl"] and first["score"] and second["score"]


def life(out, flags, log, seconds=None):
    """The exit code of the command; after so many seconds it and its stage are killed at once."""
    command = [sys.executable, "-m", "minirlhf.online.iterate", *flags, "--out", out, "--resume"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=out.parent, env=env, stdout=log, stderr=log)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGSTOP)  # so that it starts no more
        stages = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        for pid in [process.pid, *map(int, stages)]:
            os.kill(pid, signal.SIGKILL)
        return process.wait()


def left(out):
    """What must be the same: all files of texts, weights, and metrics but for the clock."""
    found = {path.name: path.read_bytes() for path in (out / "labels").iterdir()}
    for path in sorted(out.glob("*/*/model/model.safetensors")) + sorted(out.glob("*/own.jsonl")):
        found[str(path.relative_to(out))] = path.read_bytes()
    for path in sorted(out.glob("*/*/metrics.jsonl")):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        found[str(path.relative_to(out))] = [row | dict.fromkeys(curves.CLOCK, 0) for row in rows]
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc for its children")
def test_killed_at_any_moment(toy, tmp_path):
    flags = ["--data", "toy", "--labeler", "true", "--init", str(toy / "sft"), "--rounds", "1"]
    flags += ["--prompts", "120", "--response-length", "8", f"--rm={RM}"]
    flags += ["--ppo=--batch-size 16 --eval-samples 8 --steps 6 --save-every 1"]
    rng = np.random.default_rng(0)
    with open(tmp_path / "log", "w+") as log:
        began = time.time()
        assert life(tmp_path / "whole", flags, log) == 0
        seconds = time.time() - began
        out, kills = tmp_path / "out", 0
        for _ in range(6):
            code = life(out, flags, log, rng.uniform(0.1, 0.7) * seconds)
            assert code in (0, -signal.SIGKILL)
            kills += code != 0
        assert life(out, flags, log) == 0
        log.seek(0)
        print(kills, "kills,", log.read().count("going on after"), "times from a state")
    assert kills > 2 and left(out) == left(tmp_path / "whole")
    rows = []
    for folder in out, tmp_path / "whole":
        (row,) = json.loads((folder / "summary.json").read_text())["rounds"]
        rows.append(row | {"seconds": 0})
    assert rows[0] == rows[1]
