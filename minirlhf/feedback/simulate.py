"""Labels of all kinds by a simulated person, on words of the toy language.

    python -m minirlhf.feedback.simulate labels.jsonl --ask comparison=100,estop=50,social=200
    python -m minirlhf.feedback.simulate labels.jsonl --ask comparison:4=60    # rankings of four
    python train_rm.py --data labels.jsonl --init runs/sft                     # a reward from them

Whoever is asked knows the toy's true reward. So it can be tried what kinds of feedback are worth,
and what errors cost, before people are asked.
"""

import sys
from dataclasses import dataclass

import numpy as np

from minirlhf import data
from minirlhf.data.sources import TOY_LETTERS
from minirlhf.engine import cli
from minirlhf.engine.cli import UserError, knob
from minirlhf.engine.files import expect_new, write_lines
from minirlhf.feedback.people import HOW_MANY, Person


@dataclass(kw_only=True)
class Knobs(cli.Checked):
    out: str = knob("labels.jsonl", "the file to write")
    ask: str = knob("comparison=200", "how many of each kind; comparison:4=50 are of 4 words each")
    beta: float = knob(2.0, "how rational: 0 is chance")
    flip: float = knob(0.0, "share of answers that are others than meant", most=1)
    first: float = knob(0.0, "how much what stands first is liked for that")
    seed: int = knob(0, "all that is random follows from this number")


def main(knobs):
    asked = read_asked(knobs.ask)
    expect_new(knobs.out, '{"version": 1')
    rng = np.random.default_rng(knobs.seed)
    words = sorted(set(data.load_feedback("toy").train.responses))
    person = Person(
        data.toy_reward,
        beta=knobs.beta,
        flip=knobs.flip,
        first=knobs.first,
        features=tuple(f"text:{c}" for c in TOY_LETTERS),
        replacements=tuple(TOY_LETTERS),
    )
    labels = []
    for kind, k, n in asked:
        for _ in range(n):
            chosen = rng.choice(words, k, replace=False).tolist()
            labels.append(person.ask(kind, "", chosen, rng))
    write_lines(knobs.out, map(data.as_entry, labels))
    print(f"{len(labels):,} labels in {knobs.out}")


def read_asked(text):
    """[(kind, responses to each, how many)] of "comparison:4=50,estop=20"."""
    found = []
    for part in filter(None, text.split(",")):
        name, _, n = part.partition("=")
        kind, _, k = name.partition(":")
        k = k or str(HOW_MANY.get(kind, 0))
        if kind not in HOW_MANY or not (n.isdecimal() and k.isdecimal()):
            known = ", ".join(HOW_MANY)
            raise UserError(f"--ask {part}: expected KIND=NUMBER, of {known}")
        fixed = HOW_MANY[kind] == 1 or kind == "similarity"
        if int(k) != HOW_MANY[kind] and (fixed or not 2 <= int(k) <= 100):
            raise UserError(f"--ask {part}: no {kind} is of {k} responses")
        found.append((kind, int(k), int(n)))
    return found


if __name__ == "__main__":
    sys.argv[0] = "python -m minirlhf.feedback.simulate FILE"
    if len(sys.argv) > 1 and not sys.argv[1].startswith("-"):
        sys.argv.insert(1, "--out")
    cli.run_script(main, Knobs, __doc__)
