"""A policy that follows a taste of one's own: what a few labels are worth, with a simulated person.

    python -m minirlhf.feedback.taste runs/sft --out runs/taste --seeds 5

The person wants sentences of at most so many words that speak of something (actors, say), which is
another taste than that of the ratings. The person is asked for so many comparisons of two samples
of the base model. The labels make a reward (refit.py), and train_ppo.py follows it; then the person
judges what the policy wrote to held-out prompts. Wishes are counted: 0, 1 or 2 are fulfilled.
"""

import itertools
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minirlhf import data
from minirlhf.engine import cli
from minirlhf.engine.cli import UserError, knob
from minirlhf.engine.files import atomic_write, read_json, read_lines
from minirlhf.feedback.people import Person
from minirlhf.feedback.refit import Learner

ABOUT = {
    "actors": r"\b(act|acts|acting|actors?|actress|actresses|cast|performances?|stars?|roles?)\b",
    "films": r"\b(films?|movies?)\b",
}
PPO = ["--steps", "24", "--batch-size", "128", "--missing-eos-penalty", "0.5"]


@dataclass(kw_only=True)
class Knobs:
    base: str = knob("runs/sft", "base model: a run, a directory, or a hub name", free=True)
    data: str = knob("reviews", "where the prompts are from", free=True)
    out: str = knob("runs/taste", "folder of the runs, and of taste.json", free=True)
    about: str = knob("actors", "what texts should speak of", tuple(ABOUT))
    words: int = knob(12, "and how many words they should have at most", least=1)
    labels: str = knob("25,50,100,200", "how many comparisons the person is asked for", free=True)
    seeds: int = knob(5, "persons asked", least=1)
    beta: float = knob(4.0, "how sure the person is of a wish")
    kl_coef: float = knob(0.06, "train_ppo.py's price of a nat")
    flip: float = knob(0.0, "share of labels turned round", most=1)


def main(knobs):
    """Prints a table with a row for each number of labels, and leaves its figures as taste.json."""
    sizes = numbers(knobs.labels)
    wishes = wishes_of(knobs.about, knobs.words)
    learner = Learner(knobs.base)
    items = data.load_feedback(knobs.data).train
    rows = data.prompts_of(items, learner.tokenizer, np.random.default_rng(0))[: 2 * max(sizes)]
    prompts = [learner.tokenizer.decode(row[1:]) for row in rows]
    found = []
    for seed, size in itertools.product(range(knobs.seeds), sizes):
        labels = asked(learner, prompts, wishes, knobs, size, seed)
        name = f"{knobs.about}-{size}-{knobs.flip:g}-{seed}"
        place = Path(knobs.out) / name
        fit = learner.fit(labels)
        learner.save(place / "rm")
        run_ppo(knobs, place, seed)
        figures = outcome(place / "ppo", wishes)
        found.append({"labels": size, "seed": seed, "fit_seconds": fit.seconds} | figures)
        print(json.dumps(found[-1]), flush=True)
    with atomic_write(Path(knobs.out) / f"taste-{knobs.about}-{knobs.flip:g}.json") as tmp:
        Path(tmp).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print_table(found, knobs)
    return found


def numbers(text):
    parts = text.split(",")
    if not all(part.isdigit() and int(part) >= 2 for part in parts):
        raise UserError(f"--labels {text}: expected numbers of at least 2 with commas between")
    return [int(part) for part in parts]


def wishes_of(about, words):
    """(prompts, responses) -> (N, 2) bool: whether texts speak of it, and are short."""
    pattern = re.compile(ABOUT[about], re.IGNORECASE)

    def fulfilled(prompts, responses):
        texts = [p + r for p, r in zip(prompts, responses, strict=True)]
        return np.array([(bool(pattern.search(t)), len(t.split()) <= words) for t in texts])

    return fulfilled


def asked(learner, prompts, wishes, knobs, size, seed):
    """So many labels of a person: comparisons of two samples to a prompt."""

    def wanted(prompts, responses):
        return wishes(prompts, responses).sum(1)

    person = Person(wanted, beta=knobs.beta, flip=knobs.flip)
    rng = np.random.default_rng(seed)
    some = [prompts[i] for i in rng.permutation(len(prompts))[: 2 * size]]
    one = learner.sample(some, seed=2 * seed)
    other = learner.sample(some, seed=2 * seed + 1)
    labels = []
    for prompt, a, b in zip(some, one, other, strict=True):
        if a != b and len(labels) < size:
            labels.append(person.ask("comparison", prompt, [a, b], rng))
    return labels


def run_ppo(knobs, place, seed):
    command = [sys.executable, "-m", "train_ppo", "--init", knobs.base, "--data", knobs.data, *PPO]
    command += ["--kl-coef", str(knobs.kl_coef)]
    command += ["--reward", str(place / "rm"), "--out", str(place / "ppo"), "--seed", str(seed)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{' '.join(command)}: {(done.stderr or done.stdout).strip()[-500:]}")


def outcome(run, wishes):
    """{figure: value} of a run of train_ppo: wishes fulfilled before and after, of held-out
    prompts, and the KL."""
    rows = [row for _, row in read_lines(run / "samples.jsonl")]
    prompts = [row["prompt"] for row in rows]
    before = wishes(prompts, [row["before"] for row in rows])
    after = wishes(prompts, [row["after"] for row in rows])
    figures = {}
    for name, of in (("before", before), ("after", after)):
        figures |= {f"wishes_{name}": of.sum(1).mean(), f"about_{name}": of[:, 0].mean()}
        figures[f"short_{name}"] = of[:, 1].mean()
    spread = before.sum(1).std()
    figures["gain"] = (figures["wishes_after"] - figures["wishes_before"]) / spread
    figures = {name: round(float(value), 4) for name, value in figures.items()}
    return figures | {"kl": read_json(run / "summary.json")["eval/kl_after"]}


def print_table(found, knobs):
    """Means over persons, with the standard deviation of the gain."""
    first = found[0]
    print(f"\nabout {knobs.about}, at most {knobs.words} words; {knobs.flip:.0%} of labels turned "
          f"round; base model: {first['wishes_before']:.2f} wishes fulfilled, about "
          f"{first['about_before']:.0%}, short {first['short_before']:.0%}")  # fmt: skip
    print(f"{'labels':>8} {'wishes':>8} {'gain, sd':>16} {'about':>8} {'short':>8} {'KL':>8}")
    for size in dict.fromkeys(row["labels"] for row in found):
        rows = [row for row in found if row["labels"] == size]
        mean = {name: np.mean([row[name] for row in rows]) for name in rows[0]}
        gain = f"{mean['gain']:.2f} +- {np.std([row['gain'] for row in rows]):.2f}"
        print(f"{size:>8} {mean['wishes_after']:>8.2f} {gain:>16} {mean['about_after']:>8.0%} "
              f"{mean['short_after']:>8.0%} {mean['kl']:>8.1f}")  # fmt: skip


if __name__ == "__main__":
    cli.run_script(main, Knobs, __doc__)
