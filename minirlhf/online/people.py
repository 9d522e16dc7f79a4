"""How many answers of people a choice of what to ask saves.   python -m minirlhf.online.people

    python -m minirlhf.online.people --run runs/sft           # each method of select.py, a table
    python -m minirlhf.online.people --run runs/dpo --seeds 5

Reviews that people have rated are dealt into prompts of eight. Asked about two of a prompt, one
random rater of each says what they gave: the higher wins, and a tie is one half. Responses are
known by their hidden states under the run's model, of which the principal components are kept, and
the head learnt of the answers so far is tried elsewhere. Everything is dealt anew by each seed.

    accuracy    on the fixed test pairs: how often the head orders two reviews as people do
    favourite   points that the head's favourite of eight test reviews lacks to the best of them
    shown       points that the reviews shown so far lacked to the best of their prompts, a mean

Left out: heads that know how many people have rated; prompts that are texts.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from minirlhf import data
from minirlhf.engine import cli, machine
from minirlhf.engine.cli import UserError, knob
from minirlhf.engine.rows import Rows
from minirlhf.engine.terminal import progress_bar
from minirlhf.online.hidden import features_of
from minirlhf.online.pools import regret
from minirlhf.online.select import METHODS, NOTHING, Pool, posterior, select_all
from minirlhf.tokenizer import load_base

AT = (25, 50, 100, 200, 400)  # answers
BATCH = 5  # pairs that are chosen at a time
PROMPTS, K = 100, 8


@dataclass(kw_only=True)
class Knobs(cli.Checked):
    run: str = knob("runs/sft", "whose model reads the texts: a run, a directory, a hub name")
    data: str = knob("reviews", "rated responses: reviews, a file, ...")
    dimensions: int = knob(32, "principal components that are kept", least=1)
    seeds: int = knob(20, "experiments, over which means and standard errors are", least=2)
    device: str = knob("auto", "what reads: cpu, cuda, ...")


class Rated(NamedTuple):
    features: np.ndarray  # (N, D)
    ratings: list  # of each, (n,)
    means: np.ndarray  # (N,)

    def dealt(self, rng, prompts):
        """Indices (prompts, K), as many prompts as there are at most."""
        order = rng.permutation(len(self.means))
        prompts = min(prompts, len(order) // K)
        return order[: prompts * K].reshape(prompts, K)


# What is known of the texts


def rated(knobs):
    """(train, test) Rated, and the test pairs (P, 2). Raises UserError where nothing is rated."""
    feedback = data.load_feedback(knobs.data)
    if feedback.train.ratings is None:
        raise UserError(f"{knobs.data}: expected responses that people have rated")
    model, tokenizer = load_base(knobs.run, machine.pick_device(knobs.device))
    model.eval()
    found = []
    for items in (feedback.train, feedback.test):
        items, *rows = data.encode_items(items, tokenizer, model.config.n_ctx, "truncate")
        features = features_of(model, Rows(*rows, tokenizer.pad, model.wte.weight.device))
        found.append((features, items))
    (features, train), (others, test) = found
    features, others = components(features, others, knobs.dimensions)
    pairs, _ = test.comparisons(20_000, seed=1)
    train = Rated(features, train.ratings, train.means())
    return train, Rated(others, test.ratings, test.means()), pairs


def components(x, others, n):
    """The first n principal components of x (N, C), and the same of others; those of x have a mean
    square length of 1."""
    mean = x.mean(0)
    _, _, axes = np.linalg.svd(x - mean, full_matrices=False)
    x, others = (x - mean) @ axes[:n].T, (others - mean) @ axes[:n].T
    size = np.sqrt((x**2).sum(1).mean())
    return x / size, others / size


# One experiment


def answer(ratings, others, rng):
    """How far the first is preferred, by one random rater of each."""
    return (1 + np.sign(rng.choice(ratings) - rng.choice(others))) / 2


def run_one(train, test, pairs, method, seed):
    """(len(AT), 3): accuracy, favourite and shown, after each of AT answers."""
    rng = np.random.default_rng(seed)  # the same texts for all methods
    index, held = train.dealt(rng, PROMPTS), test.dealt(rng, PROMPTS)
    pool, points = Pool(train.features[index]), train.means[index]
    labelled, lost, found = NOTHING, [], []
    while len(lost) < AT[-1]:
        chosen = select_all(pool, labelled, BATCH, method, rng)
        answers = []
        for prompt, first, second in chosen:
            sides = index[prompt, first], index[prompt, second]
            answers.append(answer(*(train.ratings[i] for i in sides), rng))
            shown = points[prompt, first] + points[prompt, second]
            lost.append(points[prompt].max() - shown / 2)
        labelled = labelled.and_these(chosen, answers)
        if len(lost) in AT:
            head, _ = posterior(pool.features, labelled)
            gaps = (test.features[pairs[:, 0]] - test.features[pairs[:, 1]]) @ head
            right = (1 + np.sign(gaps)).mean() / 2
            favourite = regret(test.means[held], test.features[held] @ head)
            found.append((right, favourite, np.mean(lost)))
    return np.array(found)


# The command


def main(knobs):
    train, test, pairs = rated(knobs)
    least = PROMPTS * K
    if len(train.means) < least:
        raise UserError(f"{knobs.data}: {len(train.means)} rated responses, expected {least}")
    found = {}
    with progress_bar("people", len(METHODS) * knobs.seeds, 0) as bar:
        for method in METHODS:
            found[method] = []
            for seed in range(knobs.seeds):
                found[method].append(run_one(train, test, pairs, method, seed))
                bar.update()
    print(f"{len(train.means):,} reviews, {len(pairs):,} test pairs; {knobs.seeds} seeds, mean +- "
          "standard error; less uniform: of the same seed")  # fmt: skip
    print(table({method: np.array(runs) for method, runs in found.items()}))


def table(found):
    """The text of {method: (seeds, len(AT), 3)}."""
    lines = []
    for which, name in enumerate(("accuracy", "favourite", "shown")):
        lines.append(f"\n{name:14}" + "".join(f"{n:>17}" for n in AT))
        for method, runs in found.items():
            lines.append(f"{method:14}" + cells(runs[:, :, which]))
        for method, runs in found.items():
            if method != "uniform":
                apart = (runs - found["uniform"])[:, :, which]
                lines.append(f"{method[:7]} - unif." + cells(apart, "+"))
    return "\n".join(lines)


def cells(rows, sign=""):
    """Mean +- standard error of each column."""
    means, errors = rows.mean(0), rows.std(0, ddof=1) / np.sqrt(len(rows))
    return "".join(f"{m:>{sign}8.3f} +- {e:.3f}" for m, e in zip(means, errors, strict=True))


if __name__ == "__main__":
    cli.run_script(main, Knobs, __doc__)
