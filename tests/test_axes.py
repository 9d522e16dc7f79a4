"""Every row of dpo.AXES is a command line that makes the toy's true reward rise, and stands where
its run shows it to stand."""

import functools
import importlib
import json
import math
import re
import shlex
from pathlib import Path

import pytest
from judge_server import JudgeServer, choice, completion, tokens

import train_dpo
from minirlhf import data
from minirlhf.dpo import AXES, KINDS
from minirlhf.engine import cli, curves

PPO = "train_ppo.py --steps 6 --batch-size 64 --lr 2e-3 --ppo-epochs 1 --advantage"
DPO = "train_dpo.py --steps 12 --lr 1e-3 --loss"
LONG = "train_dpo.py --steps 20 --lr 1e-3 --loss"
ONLINE = "train_dpo.py --steps 10 --lr 1e-3 --batch-size 64 --online --loss"
LABEL = "minirlhf.feedback.label toy --pairs 600 --out OUT/labels.jsonl --labeler"
RM = ("train_rm.py --data OUT/labels.jsonl --out OUT/rm --init SFT --epochs 4 --lr 3e-3 "
      "--embedding-lr 1 --delete 0 --dropout 0")  # fmt: skip
MEND = "minirlhf.feedback.constitution toy --limit 150 --out OUT/mended.jsonl --judge"
SFT = "minirlhf.sft --data OUT/mended.jsonl --init SFT --epochs 1 --lr 3e-4 --out OUT/sft"
# A policy by offline DPO; the best answers of the base model; two rounds of labels
GIVEN = "--data toy --init SFT --response-length 8"
OFFLINE = f"{GIVEN} --reward true --eval-samples 8 --out OUT/dpo"
BEST = "minirlhf.online.best_of SFT --reward true --n 8 --out OUT/best.jsonl"
RAFT = "minirlhf.sft --data OUT/best.jsonl --init SFT --epochs 2 --lr 1e-3"
FIRST = (f"{LABEL} JUDGE --out OUT/said/1.jsonl && {RM} --data OUT/said --out OUT/rm1 && "
         f"{PPO} gae {GIVEN} --reward OUT/rm1 --eval-samples 8 --out OUT/ppo")  # fmt: skip
OWN = "minirlhf.online.best_of OUT/ppo --n 2 --prompts 800 --out OUT/own.jsonl"
LABEL_OWN = "minirlhf.feedback.label OUT/own.jsonl --out OUT/said/2.jsonl --labeler JUDGE"
COMMANDS = {
    **{kind: f"{DPO} {kind}" for kind in (*KINDS, "kto", "una", "rrhf", "pro", "rwr", "lipo")},
    "dpo": f"{DPO} sigmoid",
    "cdpo": f"{DPO} sigmoid --label-smoothing 0.1 --no-soft-labels",
    "exo_pair": f"{DPO} exo_pair --label-smoothing 0.001",
    "ipo": f"{DPO} ipo --loss-options length_normalise=true",
    "dpo_as_q": f"{DPO} sigmoid",  # its loss is DPO's; dpo.token_rewards reads the result by tokens
    "tdpo": f"{DPO} tdpo2",
    "orpo": f"{DPO} orpo --loss-options lam=3",
    # With the defaults these four fall. Most responses are rejected in some pair: what only pushes
    # them down makes the policy leave the language, unless it fades soon (a high beta or alpha) or
    # the preferred are held up. discopop's loss falls to both sides of its start.
    "npo": f"{LONG} npo --beta 3 --lr 5e-4",
    "d2o": f"{LONG} d2o --beta 3 --loss-options alpha=3",
    "apo_down": f"{LONG} apo_down --loss-options nll_weight=3",
    "discopop": f"{DPO} discopop --loss-options temperature=1",
    "sppo": f"{ONLINE} sppo --rounds 3",
    "oaif": f"{ONLINE} sigmoid",
    "iterative_dpo": f"{ONLINE} sigmoid --rounds 3",
    "dno": f"{ONLINE} sigmoid --rounds 3 --samples 4",
    "nash_md": f"{ONLINE} nash_md",
    "xpo": f"{ONLINE} xpo",
    "hybrid": f"{DPO} sigmoid {OFFLINE} && {ONLINE} sigmoid --init OUT/dpo --reference SFT",
    "best_of_n": BEST,
    "raft": f"{BEST} && {RAFT}",
    "iterated_rlhf": f"{FIRST} && {OWN} && {LABEL_OWN} && {RM} --data OUT/said && "
    f"{PPO} gae --reward OUT/rm",
    "ppo": f"{PPO} gae",
    "rloo": f"{PPO} rloo --group-size 4",
    "grpo": f"{PPO} grpo --group-size 4",
    "reinforce": f"{PPO} reinforce",
    # Labels and revisions by a judge before training, and its score during it
    "direct_rlaif": f"{PPO} rloo --group-size 4 --reward JUDGE",
    "rlaif": f"{LABEL} JUDGE && {RM} && {PPO} gae --reward OUT/rm",
    "cai": f"{MEND} JUDGE && {SFT} && {LABEL} JUDGE?principles=default --pairs 250 && "
    f"{RM} --epochs 12 && {PPO} gae --reward OUT/rm --init OUT/sft",
}
# Other losses of the same row run by default; what these differ in, tests/test_dpo.py holds.
SLOW = "cdpo robust hinge sigmoid_norm exo_pair nca_pair bco_pair apo_zero aot_unpaired r_dpo slic "
SLOW += "rlaif iterated_rlhf"  # cai is the same as rlaif, and more
POLICIES = ("train_ppo", "train_dpo")


def test_every_method_has_its_command():
    assert COMMANDS.keys() == AXES.keys()


@pytest.fixture(scope="module")
def outcome(toy, tmp_path_factory):
    """command -> (summary, whether labels were bought once a policy was in training, mean true
    reward before, after); each is run once."""
    given = f"--data toy --init {toy / 'sft'} --reward {toy / 'rm'} --response-length 8"
    server = JudgeServer(judge_toy)

    def run(stage):
        script, *flags = shlex.split(stage)
        module = importlib.import_module(script.removesuffix(".py"))
        return module.main(getattr(module, "parse", cli.parse)(module.Knobs, "", flags))

    @functools.cache
    def of(command):
        folder = tmp_path_factory.mktemp("run")
        names = {"JUDGE": server.source, "OUT": folder, "SFT": toy / "sft"}
        for name, value in names.items():
            command = re.sub(rf"\b{name}\b", str(value), command)
        *before, last = command.split("&&")
        asked = []  # of the judge, when the first policy was begun
        (folder / "said").mkdir()
        for stage in before:
            if stage.strip().startswith(POLICIES):
                asked.append(len(server.seen))
            run(stage)
        script, flags = last.strip().split(" ", 1)
        asked.append(len(server.seen))
        out = folder / "out"
        if script.startswith(POLICIES):
            summary = run(f"{script} {given} --eval-samples 96 {flags} --out {out}")
            first = second = read_lines(out / "samples.jsonl")
            bought = "online/labels" in read_lines(out / "metrics.jsonl")[-1]
        else:  # the base model's answers, and the best of them or of who has learnt these
            summary = run(last if script.endswith("best_of") else f"{last} --out {out}")
            first = read_lines(toy / "sft" / "samples.jsonl")
            learnt = out / "samples.jsonl"
            second = read_lines(learnt if learnt.exists() else folder / "best.jsonl")
            bought = False
        bought = bought or len(server.seen) > asked[0]
        return summary, bought, worth(first, "before"), worth(second, "after")

    with server, pytest.MonkeyPatch.context() as patch:
        patch.setattr(curves, "plot", lambda *_: None)
        patch.setattr(data, "load_feedback", functools.cache(data.load_feedback))
        patch.setenv("MINIRLHF_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield of


def judge_toy(talk):
    """A judge who knows the toy's true reward, and favours the first place; as a writer it puts the
    best letter for the worst."""
    text = talk[-1]
    if len(talk) == 3:
        return completion("Too many an a.")
    if len(talk) == 5:
        return completion(talk[1].translate(str.maketrans("abc", "hgf")))
    if "Response 1: " in text or "(A) " in text:
        names = ("Response 1: ", "Response 2: ") if "Response 1: " in text else ("(A) ", "(B) ")
        first, second = (text.split(name, 1)[1].split("\n\n")[0] for name in names)
        ahead, behind = data.toy_reward(["", ""], [first, second])
        p = 1 / (1 + math.exp(behind - ahead - 0.5))
        return choice(p, ("1", "2") if "Response 1: " in text else ("A", "B"))
    response = text.split("Response: ")[1].split("\n\n")[0]
    (worth,) = data.toy_reward([""], [response])  # from -4 to 4
    score = 5.5 + 4.5 * worth / 4
    low, up = math.floor(score), score - math.floor(score)
    return completion(str(low), tokens(**{str(low): 1 - up + 1e-9, str(low + 1): up + 1e-9}))


def worth(rows, when):
    """The mean true reward of a run's samples, before or after where it says so."""
    found = data.toy_reward(rows, [row.get(when, row.get("response")) for row in rows])
    return sum(found) / len(found)


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("method", [
    pytest.param(method, marks=[pytest.mark.slow] * (method in SLOW.split())) for method in AXES
])  # fmt: skip
def test_the_true_reward_rises(method, outcome):
    summary, bought, before, after = outcome(COMMANDS[method])
    print(f"{method}: {before:+.2f} -> {after:+.2f} in {summary['seconds']} s")
    # who is told only what to avoid learns less
    assert after - before > (0.3 if AXES[method]["RM4"] == "positive" else 0.1)
    # RL1 and O as the run shows them: a KL from the base wherever there is a reference, labels
    # bought wherever it is online
    assert ("eval/kl_after" in summary) == (AXES[method]["RL1"] == "reference")
    assert bought == (AXES[method]["O"] == "online")


def test_the_readme_has_the_same_table_and_its_commands_are_understood():
    readme = (Path(train_dpo.__file__).parent / "README.md").read_text(encoding="utf-8")
    rows = {}
    for line in readme.splitlines():
        names, *values = [cell.strip() for cell in line.strip("| \n").split("|")]
        if line.startswith("| ") and len(values) == 8:
            names = names.replace(" and the other pairwise losses", "")
            rows |= dict.fromkeys(names.split(", "), values)
    rows.pop("methods")
    for name, values in rows.items():
        assert list(AXES[name].values()) == values
    # "the other pairwise losses", and tdpo under its two numbers
    others = set(AXES) - rows.keys() - {"tdpo1", "tdpo2"}
    assert others <= KINDS.keys() and all(AXES[name] == AXES["dpo"] for name in others)
    commands = re.findall(r"`python (train_\w+)\.py([^`]*)`", readme)
    assert len(commands) > 15
    for script, flags in commands:
        module = importlib.import_module(script)
        cli.parse(module.Knobs, "", shlex.split(flags))
