"""What a step of train_dpo learns from: responses, and what was said of them; and what train_rm
ranks.

Pairs are compared, thumbs point up or down, lists are ranked. Each kind has a tuple of its own and
a function that yields an epoch of it; `plan` makes all batches of a run. The index of each says
which of the stored responses take part, all else is about their places in the batch.

Left out: thumbs that mean different things from one prompt to another.
"""

from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from minirlhf import data
from minirlhf.engine.cli import UserError, given_or
from minirlhf.engine.rows import Rows
from minirlhf.lists import LISTS, THUMBS


class Compared(NamedTuple):
    """Pairs of b responses."""

    index: np.ndarray  # (b,)
    pairs: np.ndarray  # (P, 2) places
    labels: np.ndarray  # (P,) P(the first is preferred)

    def preferred_first(self, soft):
        """(chosen, rejected, doubt), (P,) each: places, and P(the rejected one is preferred).
        Unless `soft`, ties are left out, and there is no doubt."""
        first, second = self.pairs[:, 0], self.pairs[:, 1]
        label = self.labels.astype(np.float32)  # in float64 a tie can be a hair above one half
        swap = label < 0.5
        chosen, rejected = np.where(swap, second, first), np.where(swap, first, second)
        doubt = 1 - np.where(swap, 1 - label, label)
        if soft:
            return chosen, rejected, doubt
        sure = doubt < 0.5
        return chosen[sure], rejected[sure], np.zeros_like(doubt[sure])


class Thumbs(NamedTuple):
    """Single responses and what they are worth."""

    index: np.ndarray  # (b,)
    scores: np.ndarray  # (b,) numbers or bool, above 0 for the desirable ones


class Ranked(NamedTuple):
    """L lists of at most K of b responses, best first."""

    index: np.ndarray  # (b,)
    lists: np.ndarray  # (L, K) places
    rewards: np.ndarray  # (L, K)
    mask: np.ndarray  # (L, K) which of the K there are


class Batch(NamedTuple):
    """The b responses of a step, and what people or a labeler said of them."""

    rows: Rows
    ref_logps: torch.Tensor | None  # (b,) log-probs under the reference, None without one
    said: Compared | Thumbs | Ranked
    wins: torch.Tensor | None = None  # (b,) how often an own sample is preferred to the others
    bought: int = 0  # comparisons that the labeler was asked for


def settled(knobs):
    """The knobs, with what is usual for their data where nothing is said. Each pass over the stored
    reviews hides other tokens of them, so they bear more passes, in smaller steps."""
    source = "own samples" if knobs.online else knobs.data
    lr = given_or(knobs.lr, source, reviews=1.6e-4, other=2.6e-4)
    beta = given_or(knobs.beta, source, reviews=0.125, other=0.1)
    if knobs.online:
        return replace(knobs, lr=lr, beta=beta)
    delete = given_or(knobs.delete, source, reviews=0.3)
    epochs = knobs.epochs or (10 if source == "reviews" else 3)
    return replace(knobs, lr=lr, beta=beta, delete=delete, epochs=epochs)


def plan(items, kind, knobs, rng):
    """All batches of a run, in the shape that the loss wants; of settled knobs."""
    if kind in THUMBS:
        epoch = partial(thumbs_epoch, *thumbs(items), knobs.batch_size, rng)
    elif kind in LISTS:
        sizes = knobs.batch_size, knobs.group_size
        epoch = partial(lists_epoch, items, *sizes, rng, by_rank=kind != "rwr")
    else:
        epoch = partial(pairs_epoch, items, knobs.batch_size, rng)
    batches = []
    for _ in range(knobs.epochs):
        for batch in epoch():
            batches.append(batch)
            if len(batches) == knobs.steps:
                return batches
    return batches


def pairs_epoch(items, batch_size, rng):
    """Yields Compared: about batch_size items, and what people compared of the same prompt."""
    for batch in items.epoch(batch_size, rng, across=False):
        yield Compared(batch.rows, batch.pairs, batch.labels)


def thumbs(items):
    """Single responses and what they are worth: indices (M,), scores (M,), above 0 for good ones.

    Scores are mean ratings, standardised, so what is rated above the average is desirable; of
    thumbs, or of the upper and the lower half of pairs and rankings, they are bool. What lies
    exactly between is left out, and counted.
    """
    scores = worth(items)
    if not scores.any():
        alike = f"all {len(items)} ratings are alike, no response is better than the others"
        raise UserError(f"{items.where[0]} and on: {alike}")
    index = np.flatnonzero(scores)
    left_out = len(items) - len(index)
    if left_out:
        neither = "responses are neither desirable nor undesirable: left out"
        print(f"{left_out} of {len(items)} {neither}")
    scores = scores[index]
    if items.thumbs or items.ratings is None:
        return index, scores > 0
    return index, (scores / scores.std()).astype(np.float32)


def worth(items):
    """(N,): how far each item is above the mean rating, or of thumbs above as many down as up; by
    groups in how many more upper halves it is than in lower ones."""
    if items.ratings is not None:
        means = items.means()
        levels = data.level([*means, 0.5 if items.thumbs else means.mean()])
        return levels[:-1] - levels[-1]
    scores = np.zeros(len(items))
    for group in items.groups:
        half = len(group) // 2
        scores[group[:half]] += 1
        scores[group[-half:]] -= 1
    return scores


def thumbs_epoch(index, scores, batch_size, rng):
    """Yields Thumbs: about batch_size items of what `thumbs` gives, at random."""
    smallest = min(batch_size, len(index))
    if smallest < 2:
        alone = "has no response of another row: expected at least 2"
        raise UserError(f"a batch of {smallest} {alone}")
    n_batches = max(1, min(round(len(index) / batch_size), len(index) // 2))
    for part in np.array_split(rng.permutation(len(index)), n_batches):
        yield Thumbs(index[part], scores[part])


def lists_epoch(items, batch_size, group_size, rng, by_rank=True):
    """Yields Ranked: lists of about batch_size items in all."""
    groups, rewards = ranked_groups(items, batch_size, group_size, rng, by_rank)
    order = rng.permutation(len(groups))
    for part in data.fill([len(groups[i]) for i in order], batch_size):
        batch = order[part]
        index = np.concatenate([groups[i] for i in batch])
        lengths = np.array([len(groups[i]) for i in batch])
        mask = np.arange(lengths.max()) < lengths[:, None]  # (L, K)
        places = np.zeros(mask.shape, dtype=int)
        places[mask] = np.arange(len(index))
        worth = np.zeros(mask.shape, dtype=np.float32)
        worth[mask] = np.concatenate([rewards[i] for i in batch])
        yield Ranked(index, places, worth, mask)


def ranked_groups(items, batch_size, group_size, rng, by_rank=True):
    """(groups of indices, best first; the rewards of each).

    The rated answers to one prompt are a group, at most batch_size of them; those without a prompt
    come in random groups of about group_size. Rewards are the ranks of the mean ratings, equal for
    equal ones, or else these means in their standard deviations over all; a given ranking has
    rewards K-1 .. 0.
    """
    if items.ratings is None:
        return items.groups, [np.arange(len(group))[::-1] for group in items.groups]
    means, groups, rewards = items.means(), [], []
    scale = means.std() or 1.0
    for context in items.contexts(across=False):
        size = max(2, batch_size) if items.prompts[context[0]] else group_size
        shuffled = np.array(context)[rng.permutation(len(context))]
        for group in np.array_split(shuffled, max(1, len(context) // size)):
            group = group[np.argsort(-means[group], kind="stable")]
            groups.append(group)
            ranks = np.unique(means[group], return_inverse=True)[1]
            rewards.append(ranks if by_rank else means[group] / scale)
    return groups, rewards


def rankings(items, batch, group_size):
    """What was ranked against each other in a batch: lists of places in it, best first.

    They are the rivals, but of a tie the first in the random order stands for all and the others
    are left out of the list, so no order is made up; a list of one has loss 0.
    """
    groups = rivals(items, batch, group_size)
    if items.ratings is None:
        return groups
    means = data.level([items.ratings[i].mean() for i in batch.rows])
    return [group[np.unique(-means[group], return_index=True)[1]] for group in groups]


def rivals(items, batch, group_size):
    """Lists of places in a batch: given comparisons, best first, the rated answers to one prompt,
    or, where they have none in common, random groups of about group_size."""
    if items.ratings is None:
        return batch.blocks
    groups = []
    for block in batch.blocks:
        prompts = {items.prompts[i] for i in batch.rows[block]}
        one_list = len(prompts) == 1 and "" not in prompts
        parts = 1 if one_list else max(1, round(len(block) / group_size))
        groups += np.array_split(block, parts)
    return groups


def win_rates(items, batch, group_size):
    """(the rivals, how often each of a list is preferred to one of it, itself included, which it is
    one half of the time): two lists of (K,).

    A given comparison is sure, unless labels of the two say how sure it is: see Items.chances.
    """
    pairs = batch.rows[batch.pairs].tolist()
    known = items.chances
    labels = [known.get((i, j), q) for (i, j), q in zip(pairs, batch.labels, strict=True)]
    chances = np.full((len(batch.rows), len(batch.rows)), 0.5)
    first, second = batch.pairs.T
    chances[first, second] = labels
    chances[second, first] = 1 - np.array(labels)
    groups = rivals(items, batch, group_size)
    return groups, [chances[np.ix_(group, group)].mean(1) for group in groups]
