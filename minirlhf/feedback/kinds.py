"""Kinds of human feedback other than pairs, as a step of train_dpo takes them: thumbs up or down, and ranked lists.

Left out: thumbs that mean different things from one prompt to another.
"""


import numpy as np

from minirlhf.engine.cli import UserError


def thumbs(items):
    """Single responses and what they are worth: indices (M,) and scores (M,), above 0 for the desirable ones.

    Scores are mean ratings, standardised, so what is rated above the average is desirable; where there are but two values, or where a
    pair or a ranking has an upper and a lower half, they are bool. What lies exactly between is left out, and counted.
    """
    means = items.means if items.ratings is None else [r.mean() for r in items.ratings]
    scores = np.zeros(len(items)) if means is None else np.array(means, dtype=float) - np.mean(means)
    for group in items.groups if means is None else []:
        half = len(group) // 2
        scores[group[:half]], scores[group[-half:]] = 1, -1
    scores[np.isclose(scores, 0)] = 0
    if not scores.any():
        raise UserError(f"{items.where[0]} and on: all {len(items)} ratings are alike, no response is better than the others")
    index = np.flatnonzero(scores)
    if len(index) < len(items):
        print(f"{len(items) - len(index)} of {len(items)} responses are neither desirable nor undesirable: left out")
    scores = scores[index]
    return index, scores > 0 if len(np.unique(scores)) == 2 else (scores / scores.std()).astype(np.float32)


def thumbs_epoch(index, scores, batch_size, rng):
    """Yields (rows (b,), scores (b,)): about batch_size items of what `thumbs` gives, at random."""
    if min(batch_size, len(index)) < 2:
        raise UserError(f"a batch of {min(batch_size, len(index))} has no response of another row: expected at least 2")
    for part in np.array_split(rng.permutation(len(index)), max(1, round(len(index) / batch_size))):
        yield index[part], scores[part]


def lists_epoch(items, batch_size, group_size, rng):
    """Yields (rows (b,), lists (L, K), rewards (L, K), mask (L, K)): ranked lists of about batch_size items in all.

    lists index into rows, best first; the mask tells which of the K there are. Rated items come in random groups of about group_size,
    their rewards the ranks of their mean ratings, equal for equal ones; a given ranking has rewards K-1 .. 0.
    """
    if items.ratings is not None:
        means = np.array([r.mean() for r in items.ratings])
        groups = np.array_split(rng.permutation(len(items)), max(1, len(items) // group_size))
        groups = [group[np.argsort(-means[group], kind="stable")] for group in groups]
        rewards = [np.unique(means[group], return_inverse=True)[1] for group in groups]
    else:
        groups = items.groups
        rewards = [np.arange(len(group))[::-1] for group in groups]
    size = max(1, batch_size // max(map(len, groups)))
    order = rng.permutation(len(groups))
    for batch in np.split(order, range(size, len(order), size)):
        lengths = np.array([len(groups[i]) for i in batch])
        mask = np.arange(lengths.max()) < lengths[:, None]  # (L, K)
        rows = np.concatenate([groups[i] for i in batch])
        lists, worth = np.zeros(mask.shape, dtype=int), np.zeros(mask.shape, dtype=np.float32)
        lists[mask], worth[mask] = np.arange(len(rows)), np.concatenate([rewards[i] for i in batch])
        yield rows, lists, worth, mask
