"""Signs of trouble in a PPO run's metrics, with their likely causes.

Left out: alarms for the other stages.
"""

import math

import numpy as np

CAUSES = {  # of each sign, the likeliest first
    "KL is negative on average": (
        "a filter in sampling (--top-k); a reference that is not the policy's start"
    ),
    "ratio is not 1 before the first update": (
        "dropout; another temperature or dtype on one side; old log-probs of other weights"
    ),
    "entropy collapses": (
        "--kl-coef too small; a reward model that is fooled (read samples); a low --temperature"
    ),
    "score rises while length explodes": "the reward likes length; no --missing-eos-score",
    "explained variance stays below 0": (
        "--whiten-rewards on raw values; the critic's --lr; values read one position off"
    ),
}


def alarms(rows):
    """Signs of trouble in the metrics of all steps so far, with causes; a healthy run has none."""
    first = rows[0]
    kl = newest(rows, "objective/kl", 10)
    score = newest(rows, "objective/score", 5).mean()
    ended = newest(rows, "objective/ended", 5).mean()
    length = newest(rows, "objective/response_length", 5).mean()
    entropy = newest(rows, "objective/entropy", 5).mean()
    explained = newest(rows, "ppo/val/explained_variance", 20)
    growth = length / first["objective/response_length"]
    longer = growth > 2 and ended < 0.5 * first["objective/ended"]  # longer alone can be better
    signs = (
        kl.mean() < -0.02 - 3 * kl.std() / len(kl) ** 0.5,  # three standard errors, and rounding
        rows[-1]["ppo/policy/first_approxkl"] > 0.002,  # log-ratios of 0.06; the mean hides them
        entropy < 0.1 * growth * first["objective/entropy"],  # a token's; healthy runs keep 1/4
        score > first["objective/score"] and longer,
        explained.max() < 0,  # a critic with a fresh head may need ten steps
    )
    return [f"{sign}: {CAUSES[sign]}" for sign, seen in zip(CAUSES, signs, strict=True) if seen]


def newest(rows, key, n):
    """The last n values of a metric; where there are not yet n of them a nan, which is no sign."""
    if len(rows) < n:
        return np.array([math.nan])
    return np.array([row.get(key, math.nan) for row in rows[-n:]])
