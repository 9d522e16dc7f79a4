"""The survey's ways to ask for preferences, on worlds whose best policy is known.

    python -m minirlhf.online                                   # which algorithms there are
    python -m minirlhf.online dps                               # a table, and a picture
    python -m minirlhf.online pps --runs 40 --queries 12000 --out pps.png

A run is an experiment of its own, with another person's answers and, where the world is random,
another world. The picture shows the mean over runs of what is lost to the best policy, after each
query and summed up, between standard errors.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from minirlhf.engine import cli
from minirlhf.engine.cli import UserError, knob
from minirlhf.engine.files import atomic_write, file_errors
from minirlhf.engine.terminal import progress_bar
from minirlhf.online import dps, duels, lpbrl, parl, pbop, pools, uniform
from minirlhf.online.environments import grid, random_mdp, river_swim
from minirlhf.online.policies import menus
from minirlhf.online.select import METHODS


@dataclass(kw_only=True)
class Knobs(cli.Checked):
    algorithm: str = knob("", "which one; without one, they are listed")
    runs: int = knob(20, "experiments, over which means and standard errors are", least=2)
    queries: int = knob(0, "comparisons a run; 0: as many as the algorithm's line says", least=0)
    seed: int = knob(0, "same seed, same curves", most=2**64 - 1)
    out: str = knob("", "the picture (default: runs/online/ALGORITHM.png)")


class Algorithm(NamedTuple):
    about: str
    queries: int  # by default
    regrets: object  # of (rng, runs, queries): {curve: (runs, queries)}, the algorithm's own first
    pays: bool  # whether what is shown is what counts, so that regret adds up
    at_once: int  # runs from one step of the progress bar to the next


# Experiments


def dps_regrets(posterior):
    def regrets(rng, runs, queries):
        env = river_swim()
        told = dps.true_rewards(env)
        return {
            "dps": dps.run(env, rng, queries, runs, posterior=posterior).regret,
            "uniform": uniform.run(env, rng, queries, runs, posterior=posterior).regret,
            "psrl, told the reward": dps.run(env, rng, queries, runs, posterior=told).regret,
        }

    return regrets


def search_regrets(name, search, world):
    def regrets(rng, runs, queries):
        rows = {name: [], "evenly": [], "evenly, then at random": []}
        for _ in range(runs):
            env = world(rng)
            found = [
                search(env, rng, affordable(env, name, queries)),
                uniform.evenly(env, rng, queries),
                uniform.evenly(env, rng, queries, build=False),
            ]
            for row, one in zip(rows.values(), found, strict=True):
                row.append(one.regret(queries))
        return {name: np.array(row) for name, row in rows.items()}

    return regrets


def affordable(env, name, queries):
    epsilon = duels.affordable(env, queries)
    if np.isinf(epsilon):
        least = 10 * duels.questions(env)
        raise UserError(f"--queries {queries}: {name} asks each pair of actions in each of its "
                        f"world's states ten times at least: expected {least} or more")  # fmt: skip
    return epsilon


def lpbrl_regrets(rng, runs, queries):
    menu = menus(rng, runs)
    return {n: lpbrl.run(menu, rng, queries, one).regret for n, one in lpbrl.CHOICES.items()}


def pbop_regrets(rng, runs, queries):
    problem = pbop.tables(rng, runs)
    return {n: pbop.run(problem, rng, queries, one).regret for n, one in pbop.CHOICES.items()}


def parl_regrets(rng, runs, queries):
    problem = parl.candidates(rng, runs)
    return {form: parl.run(problem, queries, form).greedy for form in parl.FORMS}


def pool_regrets(rng, runs, queries):
    problems = [pools.people(rng) for _ in range(runs)]
    return {one: pools.run(problems, rng, queries, one).regret for one in METHODS}


ALGORITHMS = {
    "dps": Algorithm(
        "dueling posterior sampling, linear credit; RiverSwim (Novoseller et al. 2020)",
        200, dps_regrets(dps.linear_posterior), True, 10,
    ),
    "dps-logistic": Algorithm(
        "the same, logistic credit",
        200, dps_regrets(dps.logistic_posterior), True, 10,
    ),
    "pps": Algorithm(
        "duels of actions backwards, with a simulator; random world (Xu et al. 2020)",
        20000, search_regrets("pps", duels.pps, random_mdp), False, 1,
    ),
    "peps": Algorithm(
        "the same without one, which walks there; 4 x 4 grid (Xu et al. 2020)",
        4000, search_regrets("peps", duels.peps, grid), False, 1,
    ),
    "lpbrl": Algorithm(
        "the most uncertain pair of all that may be best; 100 policies (Saha et al. 2023)",
        300, lpbrl_regrets, True, 10,
    ),
    "pbop": Algorithm(
        "the same without rewards; 30 policies, circles allowed (Chen et al. 2022)",
        300, pbop_regrets, True, 10,
    ),
    "parl": Algorithm(
        "a reward judged by its policy, on other prompts (Chakraborty et al. 2023)",
        200, parl_regrets, False, 5,
    ),
    "pool": Algorithm(
        "which of 64 prompts' 8 responses to show, as a language model would ask",
        160, pool_regrets, True, 1,
    ),
}  # fmt: skip


# The command


def main(knobs):
    if not knobs.algorithm:
        return print(listed())
    if knobs.algorithm not in ALGORITHMS:
        known = ", ".join(ALGORITHMS)
        raise UserError(f"{knobs.algorithm!r} is no algorithm: expected one of {known}")
    algorithm = ALGORITHMS[knobs.algorithm]
    queries = knobs.queries or algorithm.queries
    out = Path(knobs.out or f"runs/online/{knobs.algorithm}.png")
    if out.suffix != ".png":
        raise UserError(f"--out {out}: expected a name that ends in .png")
    with file_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    curves = gather(knobs, algorithm, queries)
    print(table(curves, algorithm.pays))
    try:
        draw(curves, algorithm, knobs.algorithm, out)
    except ImportError:
        print(f"{out} is left out: pip install 'minirlhf[plot]'")
    else:
        print(f"picture: {out}")


def listed():
    lines = ["algorithms:"]
    for name, algorithm in ALGORITHMS.items():
        lines.append(f"  {name:13} {algorithm.about}; {algorithm.queries} queries")
    return "\n".join(lines)


def gather(knobs, algorithm, queries):
    """{curve: (runs, queries)}, a few runs at a time."""
    parts = []
    rng = np.random.default_rng(knobs.seed)
    with progress_bar(knobs.algorithm, knobs.runs, 0) as bar:
        while bar.n < knobs.runs:
            runs = min(algorithm.at_once, knobs.runs - bar.n)
            parts.append(algorithm.regrets(rng, runs, queries))
            bar.update(runs)
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def spread(curves):
    """Mean (queries,) and its standard error over runs, of curves (runs, queries)."""
    return curves.mean(0), curves.std(0, ddof=1) / np.sqrt(len(curves))


def table(curves, pays):
    """Regret at an eighth, a quarter, half and all of the queries, and the sum where it counts."""
    queries = next(iter(curves.values())).shape[1]
    at = sorted({max(1, queries // part) for part in (8, 4, 2, 1)})
    heads = [f"after {n}" for n in at] + ["sum"] * pays
    lines = [f"{'lost to the best policy':24}" + "".join(f"{head:>18}" for head in heads)]
    for name, rows in curves.items():
        columns = np.stack([rows[:, n - 1] for n in at] + [rows.sum(1)] * pays, axis=1)
        cells = zip(*spread(columns), strict=True)
        lines.append(f"{name:24}" + "".join(f"{m:>9.3f} +- {error:5.3f}" for m, error in cells))
    return "\n".join(lines)


def draw(curves, algorithm, title, path):
    """Writes the PNG. Raises ImportError without matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10 if algorithm.pays else 5.5, 3.8), layout="constrained")
    panels = figure.subplots(1, 1 + algorithm.pays, squeeze=False)[0]
    for name, rows in curves.items():
        for axes, kind in zip(panels, (rows, rows.cumsum(1)), strict=False):
            mean, error = spread(kind)
            at = np.arange(1, len(mean) + 1)
            (line,) = axes.plot(at, mean, label=name, linewidth=1.2)
            colour = line.get_color()
            axes.fill_between(at, mean - error, mean + error, color=colour, alpha=0.25, linewidth=0)
    for axes, label in zip(panels, ("lost to the best policy", "... summed up"), strict=False):
        axes.set_xlabel("queries")
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    panels[0].legend(fontsize=8)
    runs = len(next(iter(curves.values())))
    figure.suptitle(f"{title}, {runs} runs", fontsize=10)
    with atomic_write(path) as tmp:
        figure.savefig(tmp, format="png", dpi=110)
