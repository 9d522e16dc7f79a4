"""What a policy writes, and what an episode was made of.   python -m minirlhf.look RUN ...

    python -m minirlhf.look runs/ppo                        # held-out prompts, answered now
    python -m minirlhf.look runs/sft runs/ppo runs/dpo      # side by side; wins over the first
    python -m minirlhf.look runs/ppo --prompt "The film is" --n 3 --temperature 0.7
    python -m minirlhf.look runs/sft runs/ppo --prompts 256 --html look.html
    python -m minirlhf.look runs/sft runs/ppo --judge judge:http://127.0.0.1:8000/v1   # an LLM's
    python -m minirlhf.look runs/hh/dpo --chat              # a line of standard input is a turn
    python -m minirlhf.look runs/ppo --trace                # an episode, a token a line
    python -m minirlhf.look runs/dpo --trace --index 3      # a pair, as two columns of tokens

RUN is the directory of an sft, ppo or dpo run, a model's directory, or a model on the hub. Tokens
are coloured by log pi - log pi_ref, the reference being the base model of the run; without colour
there are marks under them. Replies are scored by --reward, or by the reward model beside the run.

Left out: top-p and beam search; judging by people, who have minirlhf.feedback.
"""

import math
from dataclasses import dataclass
from pathlib import Path

from minirlhf.engine import cli, machine
from minirlhf.engine.cli import UserError, knob
from minirlhf.engine.files import expect_new
from minirlhf.look.policies import held_out, open_policy, reward_beside
from minirlhf.look.replies import Sampling, figures, replies
from minirlhf.look.terminal import (
    LEGEND,
    columns,
    escaped,
    has_colour,
    number,
    padded,
    print_wrapped,
    shown,
)


@dataclass(kw_only=True)
class Knobs(cli.Checked):
    runs: list
    prompt: list | None = None
    chat: bool = knob(False, "answer lines of standard input, as a dialogue")
    trace: bool = knob(False, "one episode of a ppo run, or one pair of a dpo run's data")
    prompts: int = knob(16, "held-out prompts to answer", least=1)
    show: int = knob(3, "how many of them to print with their replies; figures are of all")
    n: int = knob(1, "replies to a prompt", least=1)
    index: int = knob(0, "--trace: which held-out prompt or pair, from 0")
    episodes: int = knob(32, "--trace: of a rollout, within which advantages are whitened, at most "
                             "as many as the run had; 0: all of them")  # fmt: skip
    temperature: float = knob(math.nan, "of sampling; 0: the likeliest; nan: each run's own")
    top_k: int = knob(0, "sample from the k likeliest only; 0: off")
    response_length: int = knob(0, "most tokens of a reply; 0: as in the first run that says so")
    seed: int = knob(0, "same seed, same replies")
    reward: str = knob("", "what scores and compares: a run or directory of a reward or preference "
                           "model, true, FILE.py:FUNCTION, package.module:FUNCTION; none "
                           "(default: the run's own, or rm beside it)")  # fmt: skip
    fuse: int = knob(0, "average a score with those of at most this many like training texts")
    judge: str = knob("", "who compares, where --reward only scores: what --reward takes, or "
                          "judge:URL, people:FILE, RM,RM,... (default: --reward)")  # fmt: skip
    reference: str = knob("", "what log-ratios are to: a run, a directory, a hub name; none "
                              "(default: each run's base model)")  # fmt: skip
    html: str = knob("", "write all replies to this file, too, as a page")
    device: str = knob("auto", "what computes: cpu, cuda, ...; auto: a GPU where there is one")


def parse(knobs, doc, argv=None):
    """The Knobs of a command line: flags, and runs that have none."""
    parser = cli.parser_of(knobs, doc, "minirlhf.look", "RUN [RUN2 ...]")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run, a directory, a hub name")
    parser.add_argument("--prompt", action="append", metavar="TEXT",
                        help="complete this text; may be given several times")  # fmt: skip
    return knobs(**vars(parser.parse_args(argv)))


def main(knobs):
    check(knobs)
    device = machine.pick_device(knobs.device)
    machine.precision(device, "float32")
    loaded = {}
    policies = [open_policy(name, device, knobs.reference, loaded) for name in knobs.runs]
    if knobs.trace:
        return trace(policies[0], knobs)
    sampling = sampling_of(policies, knobs)
    if knobs.chat:
        from minirlhf.look.chat import chat

        return chat(policies, short_names(policies), sampling)
    return answer(policies, knobs, sampling)


def check(knobs):
    """Refuses flags that have no say together."""
    modes = knobs.chat + knobs.trace + bool(knobs.prompt)
    cli.refuse({
        "--chat, --trace and --prompt: give one of them": modes > 1,
        "--trace is of one run": knobs.trace and len(knobs.runs) > 1,
        "--html is a page of replies: leave out --chat and --trace":
            knobs.html and (knobs.chat or knobs.trace),
        "--fuse is of scores of replies: leave out --reward none, --chat and --trace":
            knobs.fuse and (knobs.reward == "none" or knobs.chat or knobs.trace),
        f"--index {knobs.index}: is for --trace": knobs.index and not knobs.trace,
        "--judge compares runs: give a second one, and leave out --chat and --trace":
            knobs.judge and (len(knobs.runs) < 2 or knobs.chat or knobs.trace),
        "a run is given twice": len(set(knobs.runs)) < len(knobs.runs),
    })  # fmt: skip
    if knobs.html:
        from minirlhf.look.page import MARK

        expect_new(knobs.html, MARK)


def sampling_of(policies, knobs):
    own = [p.knobs["response_length"] for p in policies if "response_length" in p.knobs]
    room = min(policy.model.config.n_ctx for policy in policies)
    length = knobs.response_length or (own or [min(24, room // 2)])[0]
    temperature = None if math.isnan(knobs.temperature) else knobs.temperature
    return Sampling(length, temperature, knobs.top_k, knobs.seed, knobs.n)


def trace(policy, knobs):
    """An episode or a pair, of the run's own kind."""
    reward = "" if knobs.reward == "none" else knobs.reward
    if policy.stage == "ppo":
        from minirlhf.look.trace import print_episode

        return print_episode(policy, knobs.index, knobs.seed, reward, knobs.episodes)
    if policy.stage == "dpo":
        from minirlhf.look.pair import print_pair

        return print_pair(policy, knobs.index)
    raise UserError(f"--trace {policy.name}: nothing to trace there: expected a ppo or a dpo run")


def answer(policies, knobs, sampling):
    """Replies of all policies to the same prompts, in print and as a page, and their figures."""
    prompts = knobs.prompt or held_out(policies, knobs.prompts)
    judge = judge_of(policies, knobs)
    comparer = comparer_of(policies, knobs) or judge
    found = [replies(policy, prompts, sampling) for policy in policies]
    if judge:
        from minirlhf.look.judging import scored

        pairs = zip(policies, found, strict=True)
        found = [scored(judge, policy, some) for policy, some in pairs]
    n, groups, names = sampling.n, [], short_names(policies)
    for i, prompt in enumerate(prompts):
        groups.append((prompt, [some[i * n : (i + 1) * n] for some in found]))
    facts = [("run", f"{policy.name}, {policy.says()}") for policy in policies]
    facts += [("scores", judge.name)] if judge else []
    facts += [("wins", f"by {comparer.name}")] if knobs.judge else []
    table = table_of(policies, names, found, comparer, n)
    if knobs.html:  # before all that is printed, which a closed pipe could end
        from minirlhf.look.page import write_page

        write_page(knobs.html, " | ".join(names), table, facts, groups, names)
        facts.append(("page", knobs.html))
    for fact in facts:
        print_wrapped(*fact)
    printed = groups if knobs.prompt else groups[: knobs.show]
    for prompt, sides in printed:
        print_group(prompt, names, sides, judge)
    print()
    print_figures(table)
    for asked in {id(one): one for one in (judge, comparer) if one and one.report}.values():
        print_wrapped("asked", asked.report())
    if printed and any(policy.reference for policy in policies) and not has_colour():
        print(f"\n{LEGEND}")


def judge_of(policies, knobs):
    """What --reward names, or the first of what lies beside the runs; None."""
    if knobs.reward == "none":
        return None
    beside = filter(None, map(reward_beside, policies))
    source = knobs.reward or next(beside, None)
    if not source:
        cli.refuse({"--fuse: no reward model scores: name one with --reward": knobs.fuse})
        return None
    if not knobs.reward and str(source).startswith("judge:"):
        print("note: replies are not scored: the run's reward is a judge, which --reward asks")
        return None
    from minirlhf.look.judging import load_judge

    try:
        return load_judge(source, policies[0], knobs.fuse)
    except UserError as e:
        if knobs.reward or knobs.fuse:
            raise
        print(f"note: replies are not scored: {e}")
        return None


def comparer_of(policies, knobs):
    """What --judge names; None without it."""
    if not knobs.judge:
        return None
    from minirlhf.look.judging import load_judge

    return load_judge(knobs.judge, policies[0])


def print_group(prompt, names, sides, judge):
    """A prompt, and under it each run's replies."""
    label = min(20, max(map(len, names), default=0)) + 1
    print()
    lead = label + (7 if judge and judge.score else 0)
    for i, line in enumerate(shown_text(prompt, columns() - lead)):
        print(padded("" if i else "prompt", lead) + line)
    for name, side in zip(names, sides, strict=True):
        for reply in side:
            score = f"{reply.score:+6.2f} " if lead > label else ""
            for line in shown(reply.pieces, columns() - lead, has_colour()):
                print(padded(escaped(name), label) + padded(score, lead - label) + line)
                name = score = ""


def shown_text(text, room):
    from minirlhf.look.terminal import Piece

    return shown([Piece(text)], room, False)


def short_names(policies):
    return shortened([policy.name for policy in policies])


def shortened(names):
    """The ends of the names of runs, by which they differ."""
    parts = [Path(name).parts or (name,) for name in names]
    kept = 1
    while kept < max(map(len, parts), default=0) and len({part[-kept:] for part in parts}) < len(
        parts
    ):
        kept += 1
    return ["/".join(part[-kept - (part[-1] == "model") :]) for part in parts]


def table_of(policies, names, found, judge, n):
    """The figures as rows of text, the head first; the last column how often a run wins over the
    first."""
    per = [figures(some) for some in found]
    keys = [key for key in per[0] if any(not math.isnan(row[key]) for row in per)]
    wins = judge is not None and len(policies) > 1
    count = len(found[0])
    rows = [[f"{count} {'replies' if count > 1 else 'reply'} each", *keys]]
    rows[0] += [f"wins over {names[0]}"] if wins else []
    for policy, name, some, row in zip(policies, names, found, per, strict=True):
        cells = [name, *(number(row[key], 6).strip() for key in keys)]
        if wins:
            cells.append("" if some is found[0] else won(judge, policies, found, policy, some, n))
        rows.append(cells)
    return rows


def won(judge, policies, found, policy, some, n):
    from minirlhf.look.judging import win_rate

    share, error = win_rate(judge, (policy, some), (policies[0], found[0]), n)
    return f"{share:.3f}" + ("" if math.isnan(error) else f" +- {error:.3f}")


def print_figures(table):
    """The rows, their cells under one another; a name that is too long is cut on its left."""
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    room = columns() - sum(widths[1:]) - 2 * len(widths[1:])
    widths[0] = max(8, min(widths[0], room))
    for row in table:
        name = escaped(row[0])
        name = name if len(name) <= widths[0] else ".." + name[2 - widths[0] :]
        cells = "".join(f"  {escaped(c):>{w}}" for c, w in zip(row[1:], widths[1:], strict=True))
        print((padded(name, widths[0]) + cells).rstrip())
