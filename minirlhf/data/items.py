"""Responses and what people said of them."""

import itertools
from dataclasses import dataclass, field

import numpy as np

from minirlhf.engine.cli import UserError


@dataclass
class Items:
    """N responses to prompts, with what people said about them: single ratings, or groups."""

    prompts: list[str]
    responses: list[str]
    where: list[str]  # the origin of each, for error messages
    ratings: list[np.ndarray] | None = None  # the single ratings of each item
    groups: list[list[int]] = field(default_factory=list)  # responses to one prompt, best first
    margins: np.ndarray | None = None  # (N,) of a record: how far each should lead worse ones
    means: list[float] | None = None  # the mean rating of each, where groups replaced ratings

    def __len__(self):
        return len(self.responses)

    def take(self, chosen):
        """The items of these indices in that order, and the groups whose first is among them."""
        new = {old: i for i, old in enumerate(chosen)}
        groups = []
        for group in self.groups:
            if group[0] in new:
                groups.append([new[i] for i in group])
        return Items(
            prompts=pick(self.prompts, chosen),
            responses=pick(self.responses, chosen),
            where=pick(self.where, chosen),
            ratings=pick(self.ratings, chosen),
            groups=groups,
            margins=None if self.margins is None else self.margins[chosen],
            means=pick(self.means, chosen),
        )

    def epoch(self, batch_size, rng):
        """Yields (rows, pairs, labels): about batch_size random items, and their comparisons.

        rows are indices of items; pairs (P, 2) index into rows; labels (P,) are P(first
        preferred). Given groups stand in rows one after the other, best first.
        """
        if self.ratings is not None:
            return self.epoch_of_ratings(batch_size, rng)
        return self.epoch_of_groups(batch_size, rng)

    def epoch_of_ratings(self, batch_size, rng):
        """Every pair of a batch is compared; a label is how often raters of the first give more."""
        smallest = min(batch_size, len(self))
        if smallest < 2:
            expected = "expected at least 2 responses"
            raise UserError(f"a batch of {smallest} has nothing to compare: {expected}")
        order = rng.permutation(len(self))
        n_batches = max(1, round(len(order) / batch_size))
        for rows in np.array_split(order, n_batches):
            first, second = np.triu_indices(len(rows), 1)
            labels = outvotes([self.ratings[i] for i in rows])[first, second]
            yield rows, np.stack([first, second], 1), labels

    def epoch_of_groups(self, batch_size, rng):
        """Every pair of a group is a comparison, and its label is 1."""
        per_batch = max(1, batch_size // max(map(len, self.groups)))
        order = rng.permutation(len(self.groups))
        for batch in np.split(order, range(per_batch, len(order), per_batch)):
            rows, pairs = [], []
            for index in batch:
                group = self.groups[index]
                places = range(len(rows), len(rows) + len(group))
                pairs += itertools.combinations(places, 2)
                rows += group
            yield np.array(rows), np.array(pairs), np.ones(len(pairs))

    def comparisons(self, n, seed):
        """Fixed pairs (P, 2) of item indices, first preferred, and each one's gap in mean rating.

        With ratings, n random pairs of different mean ratings; with groups, all pairs, of gap 1.
        """
        if self.ratings is not None:
            return self.random_pairs(n, seed)
        pairs = []
        for group in self.groups:
            pairs += itertools.combinations(group, 2)
        if not pairs:
            problem = "the held-out tenth has no two responses to compare"
            raise UserError(f"{self.where[0]} and on: {problem}; more records are needed")
        return np.array(pairs), np.ones(len(pairs))

    def random_pairs(self, n, seed):
        """n random pairs of items with different mean ratings, the better one first; their gaps."""
        means = np.array([r.mean() for r in self.ratings])
        if len(np.unique(means)) < 2:
            problem = f"all {len(self)} ratings are alike, there is nothing to compare"
            raise UserError(f"{self.where[0]} and on: {problem}")
        rng = np.random.default_rng(seed)
        pairs = []
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
        """(prompt, response, where) to train a base model on.

        They are the rated items, or the best of each group, and further text.
        """
        items = self.train
        chosen = range(len(items))
        if items.ratings is None:
            chosen = dict.fromkeys(group[0] for group in items.groups)
        texts = [(items.prompts[i], items.responses[i], items.where[i]) for i in chosen]
        for i, text in enumerate(self.more_text):
            texts.append(("", text, f"{self.name} text {i}"))
        return texts


def split(items, units, name, **more):
    """Feedback whose test part is the last tenth of the units after a fixed shuffle.

    units: lists of item indices; a unit stays whole.
    """
    order = np.random.default_rng(0).permutation(len(units))
    n_test = len(order) // 10
    if not n_test:
        problem = f"{len(order)} records with prompts of their own"
        raise UserError(f"{name}: {problem}; a tenth is held out, so at least 10 are needed")
    shuffled = [units[i] for i in order]
    train = list(itertools.chain(*shuffled[:-n_test]))
    test = list(itertools.chain(*shuffled[-n_test:]))
    return Feedback(name, items.take(train), items.take(test), **more)


def pick(values, chosen):
    return None if values is None else [values[i] for i in chosen]


def outvotes(ratings):
    """(N, N) P(a rater of item i gives more than a rater of item j), ties one half.

    ratings: the single ratings of each of the N items.
    """
    levels, level = np.unique(np.concatenate(ratings), return_inverse=True)
    item = np.repeat(np.arange(len(ratings)), [len(r) for r in ratings])
    share = np.zeros((len(ratings), len(levels)))
    np.add.at(share, (item, level), 1)
    share /= share.sum(1, keepdims=True)
    below = np.cumsum(share, 1) - share / 2  # strictly below a level, and half of those at it
    return share @ below.T


def human_ceiling(items, pairs, seed=0):
    """How often one person's rating orders a pair as the mean of the others' does.

    A pair that the person leaves tied counts one half; one that the others leave tied is no
    question. It is nan where an item has a single rating.
    """
    if items.ratings is None or min(map(len, items.ratings)) < 2:
        return float("nan")
    rng = np.random.default_rng(seed)
    agreed = []
    for i, j in pairs:
        one = rng.permutation(items.ratings[i])
        other = rng.permutation(items.ratings[j])
        truth = np.sign(one[1:].mean() - other[1:].mean())
        if truth:
            agreed.append(0.5 + 0.5 * truth * np.sign(one[0] - other[0]))
    return float(np.mean(agreed))
