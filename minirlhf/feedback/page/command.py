"""A page to say what is good on, in this browser.   python -m minirlhf.feedback RUN ...

    python -m minirlhf.feedback runs/ppo                      # its samples, before and after, blind
    python -m minirlhf.feedback runs/ppo runs/dpo --reveal    # which of two runs writes better
    python -m minirlhf.feedback runs/ppo --samples 4 --kind comparison,estop,improvement
    python -m minirlhf.feedback my.jsonl --kind critique --levels 2 --guidelines RULES.md
    python -m minirlhf.feedback runs/ppo --samples 4 --ask dps    # what tells most comes first
    python -m minirlhf.feedback runs/ppo --terminal           # no browser at hand

RUN is the directory of a run, or a file that train_rm.py --data would read. Answers are lines of
RUN/labels.jsonl, which `python train_rm.py --data RUN/labels.jsonl` learns from. The page is for
this machine and for who has its address.

Left out: several people at once, who start a server each, with --rater and --out.
"""

import dataclasses
import getpass
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from minirlhf.engine import cli
from minirlhf.engine.cli import UserError, knob
from minirlhf.engine.files import file_errors, read_lines, write_lines
from minirlhf.feedback.features import expect_feature
from minirlhf.feedback.page.pool import load_pool, parse_kinds
from minirlhf.feedback.page.session import Session, beside
from minirlhf.online.select import METHODS


@dataclass(kw_only=True)
class Knobs(cli.Checked):
    runs: list
    kind: str = knob("comparison", "what is asked: a kind, several with commas, in turn, or all: "
                                   "critique, comparison, intertemporal, proxy, social, "
                                   "improvement, language, estop, importance, trace, "
                                   "similarity")  # fmt: skip
    out: str = knob("", "the labels, to which lines are added (default: labels.jsonl in RUN or "
                        "beside FILE)")  # fmt: skip
    rater: str = knob("", "who answers (default: the user's name)")
    guidelines: str = knob("", "a Markdown file to show beside the questions")
    n: int = knob(2, "responses to compare, rank or sort", least=2, most=9)
    levels: int = knob(5, "of a critique: 2 are thumbs", least=2, most=9)
    ask: str = knob("", "which comparison is asked next, of what a model reads in the texts: "
                        "uniform, uncertainty, dps, lpbrl, pbop (default: any; after training the "
                        "one whose answer is least certain)", ("", *METHODS))  # fmt: skip
    feature: str = knob("", "what traces sort by: words, capitals, word:good, ... (default: any)")
    again: bool = knob(True, "show one question in ten again, to see how steady answers are")
    reveal: bool = knob(False, "tell after each answer which run wrote what")
    samples: int = knob(0, "draw so many responses a prompt from the runs' models, with torch; "
                           "0: those in samples.jsonl", most=64)  # fmt: skip
    prompts: int = knob(64, "--samples: to so many held-out prompts", least=1)
    temperature: float = knob(1.0, "--samples: of sampling")
    port: int = knob(0, "of the page; 0: the last one, or any that is free", most=65535)
    terminal: bool = knob(False, "ask in the terminal instead of on a page")
    seed: int = knob(0, "of the order of questions and sides", most=2**32 - 1)
    device: str = knob("auto", "what trains and samples: cpu, cuda, ...")


def parse(knobs, doc, argv=None):
    """The Knobs of a command line: flags, and runs that have none."""
    parser = cli.parser_of(knobs, doc, "minirlhf.feedback", "RUN [RUN2 ...]")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's directory, or a file")
    return knobs(**vars(parser.parse_args(argv)))


def main(knobs):
    session = open_session(knobs)
    if session.knobs.terminal:
        from minirlhf.feedback.page.terminal import converse

        return converse(session)
    from minirlhf.feedback.page.calls import calls
    from minirlhf.feedback.page.learning import find_learner
    from minirlhf.feedback.page.server import start

    learning = find_learner(session, knobs.runs[0])
    remembered = Path(session.knobs.out).with_suffix(".address")
    server = start(*calls(session, learning), knobs.port, remembered)
    print(f"{len(session.left):,} questions; answers go to {session.knobs.out}")
    print(f"open {server.address}\nCtrl-C ends it", flush=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        if learning:
            learning.warm_up()
        while True:  # serve_forever in this thread would not see a signal while it shuts down
            time.sleep(1)  # a signal just before a sleep begins is seen only when that ends
    except KeyboardInterrupt:
        pass
    finally:
        server.shutdown()
        if learning:
            learning.let_go()
    print(f"\n{len(session.labels.entries):,} labels in {session.knobs.out}")


def open_session(knobs):
    """The Session of a command. Raises UserError."""
    kinds = parse_kinds(knobs.kind)
    pairs = kinds == ["comparison"] and knobs.n == 2
    cli.refuse({
        f"--ask {knobs.ask}: is for comparisons of two: leave out --kind and --n":
            knobs.ask and not pairs,
        "a run is given twice": len(set(knobs.runs)) < len(knobs.runs),
        f"--feature {knobs.feature}: is for --kind trace": knobs.feature and "trace" not in kinds,
    })  # fmt: skip
    if knobs.feature:
        expect_feature(knobs.feature, "--feature")
    first = Path(knobs.runs[0])
    out = knobs.out or str(default_out(first))
    knobs = dataclasses.replace(knobs, out=out, rater=knobs.rater or user())
    if first.resolve() == Path(out).resolve():
        raise UserError(f"{out}: its own texts would be asked about: give another --out")
    draw = None
    if knobs.samples:
        draw = Drawn(knobs, beside(out, "drawn")).of
    groups = load_pool(knobs.runs, draw)
    if not knobs.ask:
        return Session(groups, knobs, kinds)
    from minirlhf.feedback.page.asking import make_asker, parts_of

    groups = parts_of(groups)
    session = Session(groups, knobs, kinds)
    session.asker = make_asker(session, groups, knobs)
    return session


def default_out(first):
    with file_errors(first):
        if first.is_dir():
            return first / "labels.jsonl"
    name = first.name.split(".")[0]
    return first.with_name(f"{name}.labels.jsonl") if first.parent.is_dir() else "labels.jsonl"


def user():
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):  # a user id without a name
        return "rater"


class Drawn:
    """Responses sampled from the models of runs, kept in a file, so that they are drawn once."""

    def __init__(self, knobs, path):
        self.knobs, self.path, self.rows = knobs, path, []
        if path.exists():
            self.rows = [row for _, row in read_lines(path)]

    def of(self, run):
        asked = [self.knobs.samples, self.knobs.prompts, self.knobs.temperature, self.knobs.seed]
        key = {"run": run, "drawn": asked}
        found = [row for row in self.rows if {k: row.get(k) for k in key} == key]
        if not found:
            print(f"{run}: drawing {self.knobs.samples} responses a prompt", flush=True)
            found = [row | key for row in sampled(run, self.knobs)]
            self.rows += found
            write_lines(self.path, self.rows)
        return found


def sampled(run, knobs):
    """{"prompt", "response"} of the run's policy to its held-out prompts."""
    from minirlhf.engine import machine
    from minirlhf.look.policies import held_out, open_policy
    from minirlhf.look.replies import Sampling, replies

    device = machine.pick_device(knobs.device)
    machine.precision(device, "float32")
    policy = open_policy(run, device, "none", {})
    room = policy.model.config.n_ctx
    length = policy.knobs.get("response_length") or min(24, room // 2)
    sampling = Sampling(length, knobs.temperature, 0, knobs.seed, knobs.samples)
    found = replies(policy, held_out([policy], knobs.prompts), sampling)
    return [{"prompt": reply.prompt, "response": reply.text} for reply in found]
