"""Do distances between rewards predict regret?  python -m minirlhf.rewards.study

Draws decision processes of 32 states and 4 actions and two rewards for each, walks from the first
reward to the second in 16 steps, and correlates the distance of each step from the first reward
with the regret of optimising one for the other: Pearson's with the mean regret, Spearman's ranks
with the worst-case regret. A row is a canonicalisation, with mean and standard deviation over
seeds. The default takes about a minute and a half on one core.

The steps lie on a line, so canonical rewards (linear) and the polygon of returns are made once a
process and mixed. Left out: rewards that were learned, and processes with structure.
"""

import argparse
import sys

import numpy as np
from tqdm import tqdm

from minirlhf.rewards.distances import canonical, pearson_distance, scaled_distance
from minirlhf.rewards.distances import weights_of_transitions as weights_of
from minirlhf.rewards.regret import (
    mean_regret,
    random_mdp,
    random_reward,
    return_polygon,
    worst_of_polygon,
)

# name in the table: canonicalisation, whether Pearson's distance (else L2 norms), weights by T
ROWS = {
    "none": ("none", False, False),
    "none, Pearson": ("none", True, False),
    "EPIC": ("epic", True, False),
    "DARD": ("dard", True, True),
    "minimal-L2": ("minimal", False, False),
    "STARC (VAL)": ("val", False, True),
    "STARC (minimal)": ("starc_minimal", False, True),
}


def ranks(x):
    """Ranks from 0, equal values sharing their mean rank. -> (N,)"""
    below = (x[:, None] > x[None, :]).sum(1)
    equal = (x[:, None] == x[None, :]).sum(1)
    return below + (equal - 1) / 2


def correlation(x, y):
    """Pearson's correlation; NaN where one of the two does not vary."""
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return np.nan
    return float(np.corrcoef(x, y)[0, 1])


def parts_of_walk(steps):
    """Parts (p1, p2) of the first and second reward at each step; the last is the second reward."""
    part = np.arange(1, steps + 1) / steps
    return np.stack([1 - part, part], axis=1)


def reward_with_a_range(rng, T, discount, varied):
    """A random reward that does not call all policies alike; others have no regret to measure.

    A sparse reward can lie on impossible transitions alone.
    """
    while True:
        R = random_reward(rng, *T.shape[:2], discount=discount, varied=varied)
        if canonical(R, "val", discount=discount, T=T).any():
            return R


def walk_distances(R1, R2, T, discount, parts):
    """Distance of each mixture p1 R1 + p2 R2 from R1, by each of ROWS. -> {name: (steps,)}"""
    found = {}
    for name, (kind, pearson, by_dynamics) in ROWS.items():
        weights = weights_of(R1.shape, None, T if by_dynamics else None)
        C1, C2 = (canonical(R, kind, discount=discount, T=T) for R in (R1, R2))
        mixtures = [p1 * C1 + p2 * C2 for p1, p2 in parts]
        distance = pearson_distance if pearson else scaled_distance
        found[name] = np.array([distance(C1, C, weights) for C in mixtures])
    return found


def walk_regrets(R1, R2, T, discount, parts):
    """Mean and worst-case regret of R1 and each mixture, two arrays (steps,)."""
    mean = [mean_regret(R1, p1 * R1 + p2 * R2, T, discount=discount) for p1, p2 in parts]
    corners = return_polygon(R1, R2, T, discount=discount, tolerance=1e-4)
    worst = []
    for p1, p2 in parts:
        mixed = np.stack([corners[:, 0], corners @ [p1, p2]], axis=1)
        worst.append(worst_of_polygon(mixed))
    return np.array(mean), np.array(worst)


def one_seed(rng, discount, args):
    """Both correlations of each row, over all processes and steps. -> (rows, 2)"""
    size = args.states, args.actions
    parts = parts_of_walk(args.steps)
    distances, means, worsts = {name: [] for name in ROWS}, [], []
    for _ in range(args.processes):
        T = random_mdp(rng, *size, least=-np.inf if args.dense else 1.0)
        R1, R2 = (reward_with_a_range(rng, T, discount, varied=not args.plain) for _ in range(2))
        for name, values in walk_distances(R1, R2, T, discount, parts).items():
            distances[name].extend(values)
        mean, worst = walk_regrets(R1, R2, T, discount, parts)
        means.extend(mean)
        worsts.extend(worst)
    means, order = np.array(means), ranks(np.array(worsts))
    rows = [np.array(distances[name]) for name in ROWS]
    return np.array([(correlation(x, means), correlation(ranks(x), order)) for x in rows])


def count(text):
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def flags():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--states", type=count, default=32, help="states (default %(default)s)")
    add("--actions", type=count, default=4, help="actions (default %(default)s)")
    add("--steps", type=count, default=16, help="steps of a walk (default %(default)s)")
    add("--processes", type=count, default=8, help="processes a seed (default %(default)s)")
    add("--seeds", type=count, default=4, help="seeds (default %(default)s)")
    add("--seed", type=int, default=0, help="the first seed (default %(default)s)")
    add("--dense", action="store_true", help="dynamics that lead from any state to any other")
    add("--plain", action="store_true", help="normal rewards, not sparse, shifted or shaped")
    return parser


def main(argv=None):
    args = flags().parse_args(argv)
    discounts = (0.75, 0.9, 0.99)
    results = {}  # discount: (seeds, rows, 2)
    with tqdm(total=len(discounts) * args.seeds, file=sys.stderr, disable=None) as progress:
        for discount in discounts:
            seeds = []
            for seed in range(args.seed, args.seed + args.seeds):
                seeds.append(one_seed(np.random.default_rng(seed), discount, args))
                progress.update()
            results[discount] = np.array(seeds)
    head = "".join(f"{f'discount {discount}':>15}" for discount in discounts)
    for k, what in enumerate(["Pearson with mean regret", "Spearman with worst-case regret"]):
        print(f"{what:<32}{head}")
        for row, name in enumerate(ROWS):
            cells = [results[discount][:, row, k] for discount in discounts]
            print(f"{name:<32}" + "".join(f"{x.mean():>8.3f} ±{x.std():5.3f}" for x in cells))


if __name__ == "__main__":
    main()
