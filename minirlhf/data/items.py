"""Responses and what people said of them."""

import itertools
from dataclasses import dataclass, field

import numpy as np

from minirlhf.engine.cli import UserError


@dataclass
class Items:
    """N responses to prompts, with what people said about them."""

    prompts: list[str]
    responses: list[str]
    where: list[str]  # the origin of each, for error messages
    ratings: list[np.ndarray] | None = None  # the single ratings of each item
    groups: list[list[int]] = field(default_factory=list)  # or indices of the responses to one prompt, best first
    margins: np.ndarray | None = None  # (N,) how far each should lead the worse ones of its group, where a record says it
    means: list[float] | None = None  # the mean rating of each item, kept where groups took the place of ratings

    def __len__(self):
        return len(self.responses)

    def epoch(self, batch_size, rng):
        """Yields (rows, pairs, labels): indices of about batch_size items at random, and the comparisons among them.

        pairs (P, 2) index into rows; labels (P,) are P(first preferred). Given groups stand in rows one after the other, best first.
        """
        if self.ratings is not None:
            if min(batch_size, len(self)) < 2:
                raise UserError(f"a batch of {min(batch_size, len(self))} has nothing to compare: expected at least 2 responses")
            order = rng.permutation(len(self))
            for rows in np.array_split(order, max(1, round(len(order) / batch_size))):
                first, second = np.triu_indices(len(rows), 1)
                yield rows, np.stack([first, second], 1), outvotes([self.ratings[i] for i in rows])[first, second]
            return
        size = max(1, batch_size // max(map(len, self.groups)))
        order = rng.permutation(len(self.groups))
        for batch in np.split(order, range(size, len(order), size)):
            rows, pairs = [], []
            for group in (self.groups[i] for i in batch):
                pairs += [(len(rows) + i, len(rows) + j) for i, j in itertools.combinations(range(len(group)), 2)]
                rows += group
            yield np.array(rows), np.array(pairs), np.ones(len(pairs))

    def comparisons(self, n, seed):
        """Fixed pairs (P, 2) of item indices, first preferred, and the gap in mean rating of each (1 for given pairs).

        With ratings, n random pairs of different mean ratings; with groups, all pairs.
        """
        if self.ratings is None:
            pairs = [pair for group in self.groups for pair in itertools.combinations(group, 2)]
            if not pairs:
                raise UserError(f"{self.where[0]} and on: the held-out tenth has no two responses to compare; more records are needed")
            return np.array(pairs), np.ones(len(pairs))
        means = np.array([r.mean() for r in self.ratings])
        if len(np.unique(means)) < 2:
            raise UserError(f"{self.where[0]} and on: all {len(self)} ratings are alike, there is nothing to compare")
        rng, pairs = np.random.default_rng(seed), []
        while len(pairs) < n:
            i, j = rng.integers(0, len(self), 2)
            if means[i] != means[j]:
                pairs.append((i, j) if means[i] > means[j] else (j, i))
        pairs = np.array(pairs)
        return pairs, means[pairs[:, 0]] - means[pairs[:, 1]]


@dataclass
class Feedback:
    """A source of feedback, split; the test part enters no training."""

    name: str
    train: Items
    test: Items
    more_text: list[str] = field(default_factory=list)  # further text for the base model
    true_reward: object = None  # the toy's: (prompts, responses) -> floats

    def texts(self):
        """(prompt, response, where) to train a base model on: rated items, or the best of each group, and further text."""
        items = self.train
        chosen = range(len(items)) if items.ratings is not None else dict.fromkeys(g[0] for g in items.groups)
        return [(items.prompts[i], items.responses[i], items.where[i]) for i in chosen] + [
            ("", text, f"{self.name} text {i}") for i, text in enumerate(self.more_text)
        ]


def split(items, groups_of_items, name, **more):
    """The last tenth of the units (each a list of item indices) after a fixed shuffle is the test part."""
    order = np.random.default_rng(0).permutation(len(groups_of_items))
    n_test = len(order) // 10
    if not n_test:
        raise UserError(f"{name}: {len(order)} records with prompts of their own; a tenth is held out, so at least 10 are needed")
    parts = []
    for units in (order[:-n_test], order[-n_test:]):
        chosen = [i for u in units for i in groups_of_items[u]]
        new = {old: i for i, old in enumerate(chosen)}
        parts.append(Items(
            [items.prompts[i] for i in chosen], [items.responses[i] for i in chosen], [items.where[i] for i in chosen],
            None if items.ratings is None else [items.ratings[i] for i in chosen],
            [[new[i] for i in g] for g in items.groups if g[0] in new],
            None if items.margins is None else items.margins[chosen],
            None if items.means is None else [items.means[i] for i in chosen],
        ))  # fmt: skip
    return Feedback(name, *parts, **more)


def outvotes(ratings):
    """(N, N) P(a rater of item i gives more than a rater of item j), ties one half, from the single ratings of each."""
    levels, index = np.unique(np.concatenate(ratings), return_inverse=True)
    share = np.zeros((len(ratings), len(levels)))
    np.add.at(share, (np.repeat(np.arange(len(ratings)), [len(r) for r in ratings]), index), 1)
    share /= share.sum(1, keepdims=True)
    below = np.cumsum(share, 1) - share / 2  # strictly below a level, and half of those at it
    return share @ below.T


def human_ceiling(items, pairs, seed=0):
    """How often one person's rating orders a pair as the mean of the others' does: nan where items have a single rating.

    A pair that the person leaves tied counts one half; one that the others leave tied is no question.
    """
    if items.ratings is None or min(map(len, items.ratings)) < 2:
        return float("nan")
    rng = np.random.default_rng(seed)
    agreed = []
    for i, j in pairs:
        one, other = rng.permutation(items.ratings[i]), rng.permutation(items.ratings[j])
        truth = np.sign(one[1:].mean() - other[1:].mean())
        if truth:
            agreed.append(0.5 + 0.5 * truth * np.sign(one[0] - other[0]))
    return float(np.mean(agreed))
