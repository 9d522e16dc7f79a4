"""Iterated RLHF as one command: new labels, a reward model, PPO, round after round.

    python -m minirlhf.online.iterate --rounds 3 --labeler "judge:URL?model=NAME"
    python -m minirlhf.online.iterate --data toy --labeler true --prompts 700 \\
        --rm="--epochs 4 --lr 3e-3 --embedding-lr 1 --delete 0 --dropout 0" \\
        --ppo="--steps 20 --lr 2e-3 --ppo-epochs 1"
    python -m minirlhf.online.iterate ... --rm="--loss parl"      # PARL's outer loop: parl.py

A round of the chain (Bai et al. 2022, arXiv 2204.05862, section 4.5; Stiennon et al. 2020), each
stage as a process of its own, in OUT/ROUND:

    1 own.jsonl    the policy so far, at first --init, answers --prompts prompts --n times
    2 labels       --labeler compares pairs of these answers: OUT/labels/ROUND.jsonl
    3 rm           a reward model from all labels so far, on the base model's trunk
    4 ppo          PPO against it

PPO starts at the base model in every round: the policy then has only what this reward model says,
and none of what the last one was wrong about; own samples of the last policy have shown that, and
the new labels know. With --start last it goes on from the last policy. The KL is from the base
model either way. A score is the round's own reward model's, 0 for the base model's answers, so no
round's is to be compared with another's; where --labeler itself gives scores, its mean is shown.

--rm and --ppo are further flags of train_rm.py and train_ppo.py. Killed at any moment, the same
command with --resume goes on: what is finished stays, a stage goes on from its own state; one whose
parent alone was killed works on, and has to be waited for. More --rounds go on, too, and further
flags may be others for stages that have not begun.

Left out: torchrun; people, who label on a page of their own (minirlhf.feedback).
"""

if __name__ == "__main__":  # first, as torch takes a while
    import minirlhf.engine.interrupts  # noqa: F401
import contextlib
import dataclasses
import os
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from minirlhf.engine import cli, place
from minirlhf.engine.cli import UserError, knob
from minirlhf.engine.contain import caught_signals
from minirlhf.engine.files import Lock, file_errors, finished, read_json, read_lines, write_json
from minirlhf.engine.states import states_in
from minirlhf.feedback.preferring import load_preferrer, speaks

OURS = ("data", "init", "out", "seed", "device", "resume", "reward", "reference", "response-length")
TRUE = "minirlhf.data:toy_reward"
STOPPED = "the same command with --resume goes on"


@dataclass(kw_only=True)
class Knobs(cli.Checked):
    rounds: int = knob(2, "rounds of labels, reward model and PPO", least=1, free=True)
    labeler: str = knob("", "who prefers: judge:URL?model=NAME, a model, RM,RM,..., "
                            "FILE.py:FUNCTION, true (of the toy)")  # fmt: skip
    init: str = knob("runs/sft", "base model: run, directory or hub name")
    data: str = knob("reviews", "whose prompts: what --data of train_ppo.py takes")
    out: str = knob("runs/iterate", "directory of all rounds", free=True)
    start: str = knob("base", "where a round's PPO starts: base, or the last policy",
                      ("base", "last"))  # fmt: skip
    prompts: int = knob(512, "training prompts a round that are answered for labels", least=1)
    n: int = knob(2, "answers to each; a label compares two", least=2)
    response_length: int = knob(24, "most tokens of an answer, here and in PPO", least=1)
    rm: str = knob("", 'further flags of train_rm.py, as in --rm="--epochs 4"', free=True)
    ppo: str = knob("", "further flags of train_ppo.py, likewise", free=True)
    seed: int = knob(0, "same seed, same rounds", most=2**63)
    device: str = knob("auto", "what computes: cpu, cuda, ...", free=True)
    resume: bool = knob(False, "go on with what lies in --out", free=True)


def main(knobs):
    """Makes all rounds, prints their table and leaves it in summary.json: the summary."""
    began = time.time()
    more = {name: own_flags(name, getattr(knobs, name)) for name in ("rm", "ppo")}
    check(knobs)
    out = Path(knobs.out)
    with contextlib.closing(enter(out, knobs)):
        rows = []
        for k in range(1, knobs.rounds + 1):
            for name, left, command in stages(knobs, out, k, more):
                if not is_finished(left):
                    work(f"round {k} of {knobs.rounds}, {name}", left, command)
            rows.append(figures(knobs, out, k))
        seconds = round(time.time() - began, 1)
        policy, command = str(out / str(knobs.rounds) / "ppo"), shlex.join(sys.argv)
        about = {"policy": policy, "seed": knobs.seed, "seconds": seconds, "command": command}
        summary = {"rounds": rows} | about
        write_json(out / "summary.json", summary)
    print(table(rows))
    print(f"{seconds:.0f} s; the last policy is {policy}")
    return summary


# Before the first round


def own_flags(name, text):
    """The words of --rm or --ppo. Raises UserError for one that is given by this command."""
    try:
        words = shlex.split(text)
    except ValueError as e:
        raise UserError(f"--{name} {text}: {e}") from None
    for word in words:
        flag = word.partition("=")[0]
        if flag.removeprefix("--").removeprefix("no-") in OURS and flag.startswith("--"):
            raise UserError(f"--{name} {text}: {flag} is given by this command")
    return words


def check(knobs):
    """Refuses what can be known to be wrong before anything is made."""
    cli.refuse({
        "--labeler is missing: who prefers?": not knobs.labeler,
        f"--init {knobs.init}: no base model lies there: python -m minirlhf.sft makes one":
            knobs.init in ("", "runs/sft") and not Path(knobs.init or "none").exists(),
        "--labeler true: only the toy language (--data toy) has a true reward":
            knobs.labeler == "true" and knobs.data != "toy",
        "several processes: this command starts each stage by itself, without torchrun":
            int(os.environ.get("WORLD_SIZE", 1)) > 1,
    })  # fmt: skip
    place.look_ahead(knobs.out, [knobs.data, knobs.init], [], [knobs.init])
    load_preferrer(who(knobs))


def who(knobs):
    return TRUE if knobs.labeler == "true" else knobs.labeler


def enter(out, knobs):
    """The Lock of a directory whose config.json has these knobs. Raises UserError where it has
    others, and where rounds lie there that are not to go on."""
    config, said = out / "config.json", dataclasses.asdict(knobs)
    with file_errors(f"--out {out}"):
        (out / "state").mkdir(parents=True, exist_ok=True)
        lock = Lock(out / "state")
    had = read_json(config) if config.exists() else None
    try:
        if had is not None:
            expect_same(config, had, knobs)
        write_json(config, {place.MARK: "iterate"} | said)
    except BaseException:
        lock.close()
        raise
    return lock


def expect_same(config, had, knobs):
    """Raises UserError where what config.json had does not go on with these knobs."""
    cli.refuse({
        f"{config.parent}: another run lies there: give another --out":
            had.get(place.MARK) != "iterate",
        f"{config.parent}: rounds lie there: --resume goes on with them; else give another --out":
            not knobs.resume,
    })  # fmt: skip
    for field in dataclasses.fields(knobs):
        before, now = had.get(field.name, field.default), getattr(knobs, field.name)
        if not field.metadata["free"] and before != now:
            flag = cli.flag_of(field)
            raise UserError(f"{config}: that run had {flag} {before}, this one has {now}: "
                            "give what it had, or another --out")  # fmt: skip


# A round


def stages(knobs, out, k, more):
    """[(name, what it leaves, its command)] of round k."""
    here, last = out / str(k), out / str(k - 1) / "ppo"
    own, labels = here / "own.jsonl", out / "labels" / f"{k}.jsonl"
    rm, ppo = here / "rm", here / "ppo"
    policy = knobs.init if k == 1 else last
    start, reference = knobs.init, ()
    if knobs.start == "last" and k > 1:
        start, reference = last, ("--reference", knobs.init)
    seed = ("--seed", knobs.seed + 1000 * (k - 1))  # another round, other prompts and noise
    device = ("--device", knobs.device)
    length = ("--response-length", knobs.response_length)
    asked = ("--data", knobs.data, "--prompts", knobs.prompts, "--n", knobs.n)
    pairs = ("--pairs", knobs.prompts * (knobs.n // 2))
    said = ("--data", out / "labels", "--init", knobs.init)
    given = ("--data", knobs.data, "--init", start, *reference, "--reward", rm)
    return [
        ("own samples", own,
         ("minirlhf.online.best_of", policy, *asked, *length, *seed, *device, "--out", own)),
        ("labels", labels,
         ("minirlhf.feedback.label", own, "--labeler", who(knobs), *pairs, *seed, "--out", labels)),
        ("reward model", rm,
         ("train_rm", *said, *length, *seed, *device, "--out", rm, *more["rm"])),
        ("PPO", ppo,
         ("train_ppo", *given, *length, *seed, *device, "--out", ppo, *more["ppo"])),
    ]  # fmt: skip


def is_finished(left):
    """Whether a file is there, which is whole then, or a run with its figures."""
    if left.suffix == ".jsonl":
        return left.exists()
    summary = finished(left)
    return summary is not None and summary.get("evaluated", True)


def work(what, left, command):
    """Runs a stage to its end, from its newest state where it has one.

    Raises SystemExit where it fails or is stopped, with its exit code and its last line.
    """
    left.parent.mkdir(exist_ok=True)
    for started in left.parent.glob(f"{left.name}.tmp*"):  # what was being written at a kill
        started.unlink()
    command = [sys.executable, "-m", *map(str, command)]
    if states_in(left / "state"):
        command.append("--resume")
    print(f"\n{what}: {shlex.join(['python', *command[1:]])}", flush=True)
    code, said, signals = run(command)
    if signals:
        print(f"\n{what}: interrupted; {STOPPED}", file=sys.stderr)
        raise SystemExit(128 + signals[0])
    lines = said.strip().splitlines()
    last = lines.pop() if lines and code > 0 else ""
    print("".join(f"{line}\n" for line in lines), end="", file=sys.stderr)
    if code < 0:
        cli.end(f"{what}: ended by signal {-code}; {STOPPED}", 128 - code)
    if code:
        cli.end(f"{what}: {last.removeprefix('error: ') or f'ended with exit code {code}'}", code)


def run(command):
    """(exit code, what it said to standard error, the signals that came meanwhile).

    The process is in a session of its own, so that a terminal's interrupt reaches it once, by way
    of us: it then saves its state. A second one ends us, and it with us.
    """
    with caught_signals() as caught, tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, stderr=errors, start_new_session=True)
        handed_on = 0
        try:
            while process.poll() is None:
                if len(caught) > handed_on:
                    process.send_signal(caught[handed_on])
                    handed_on += 1
                time.sleep(0.05)
        finally:
            process.kill()
            process.wait()
        errors.seek(0)
        return process.returncode, errors.read().decode("utf-8", "replace"), list(caught)


# The table


def figures(knobs, out, k):
    """What round k bought and what came of it; None for what there is not."""
    here = out / str(k)
    rm, ppo = finished(here / "rm"), finished(here / "ppo")
    labels = sum(len(read_lines(out / "labels" / f"{i}.jsonl")) for i in range(1, k + 1))
    row = {"round": k, "labels": labels}
    row |= {"accuracy": rm.get("eval/accuracy"), "of pairs": rm.get("eval/pairs")}
    row |= {"score": ppo.get("eval/score_after"), "kl": ppo.get("eval/kl_after")}
    row["labeler"] = by_labeler(who(knobs), here / "ppo" / "samples.jsonl")
    return row | {"seconds": rm["seconds"] + ppo["seconds"]}


def by_labeler(source, samples):
    """The labeler's own mean score of a policy's held-out answers; None of one who is asked for
    money or time, or gives no scores."""
    score = None if speaks(source) else load_preferrer(source).score
    if not score:
        return None
    rows = [row for _, row in read_lines(samples)]
    return float(score([row["prompt"] for row in rows], [row["after"] for row in rows]).mean())


def table(rows):
    columns = list(rows[0])
    lines = ["", "".join(f"{name:>10}" for name in columns)]
    for row in rows:
        cells = ("-" if value is None else f"{value:.4g}" for value in row.values())
        lines.append("".join(f"{cell:>10}" for cell in cells))
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run_script(main, Knobs, __doc__)
