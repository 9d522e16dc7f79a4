"""Responses and what people said of them: each item once, whatever the number of records."""

import itertools
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np

from minirlhf.data.labels import Label, rankings
from minirlhf.engine.cli import UserError


class Compared(NamedTuple):
    """A batch of responses, and the comparisons among them."""

    rows: np.ndarray  # (b,) items
    blocks: list[np.ndarray]  # places in the batch of what was compared with each other; of a given
    # comparison best first
    pairs: np.ndarray  # (P, 2) places
    labels: np.ndarray  # (P,) P(the first is preferred)
    margins: np.ndarray  # (P,) how far the first should lead, where it is preferred


@dataclass
class Items:
    """N responses to prompts, no two alike, with what people said about them.

    Either every one has its ratings (a thumb up or down is a rating of 1 or 0), or they stand in
    groups, the given comparisons; or nothing was said, or there are prompts alone.
    """

    prompts: list[str]
    responses: list[str]
    where: list[str]  # the origin of each, for error messages
    ratings: list[np.ndarray] | None = None  # the single ratings of each item
    groups: list[list[int]] = field(default_factory=list)  # responses to one prompt, best first
    margins: list[float] | None = None  # of each group: how far each should lead worse ones
    thumbs: bool = False  # whether the ratings are thumbs
    columns: list[dict] | None = None  # of prompts alone, what else a record says
    units: list[str] | None = None  # what each belongs to, which was split as a whole
    labels: list[Label] | None = None  # of all kinds; groups or ratings are what compares of them

    def __len__(self):
        return len(self.responses)

    def statements(self):
        """What was said, as lists of items: labels, comparisons, or each item by itself."""
        if self.labels is not None:
            return [list(label.items) for label in self.labels]
        return self.groups or [[i] for i in range(len(self))]

    def take(self, chosen):
        """What the statements of these indices say, and their items, in the order of both."""
        if self.labels is not None:
            return self.take_labels([self.labels[i] for i in chosen])
        if not self.groups:
            return self.take_items(chosen, [])
        groups = [self.groups[g] for g in chosen]
        items = list(dict.fromkeys(itertools.chain(*groups)))
        taken = self.take_items(items, groups)
        taken.margins = pick(self.margins, chosen)
        return taken

    def some(self, share, seed):
        """A random share of the statements, at least one, in their order; all of them at 1."""
        if share == 1:
            return self
        count = len(self.statements())
        chosen = np.random.default_rng(seed).permutation(count)[: max(1, round(share * count))]
        return self.take(sorted(chosen.tolist()))

    def take_labels(self, labels):
        chosen = list(dict.fromkeys(itertools.chain(*(label.items for label in labels))))
        taken = self.take_items(chosen, [])
        new = {old: i for i, old in enumerate(chosen)}
        taken.labels = []
        for label in labels:
            taken.labels.append(label._replace(items=tuple(new[i] for i in label.items)))
        if self.ratings is None:
            taken.groups = groups_of(taken.labels)
        return taken

    def take_items(self, chosen, groups):
        new = {old: i for i, old in enumerate(chosen)}
        return Items(
            prompts=pick(self.prompts, chosen),
            responses=pick(self.responses, chosen),
            where=pick(self.where, chosen),
            ratings=pick(self.ratings, chosen),
            groups=[[new[i] for i in group] for group in groups],
            thumbs=self.thumbs,
            columns=pick(self.columns, chosen),
            units=pick(self.units, chosen),
        )

    @cached_property
    def chances(self):
        """{(i, j): P(item i is better than j)}, both ways, the mean of what labels of two say."""
        found = {}
        for label in self.labels or ():
            if label.kind == "comparison" and len(label.items) == 2:
                sure = [order == [0, 1] for order in rankings(label)] or [0.5]
                p = label.said.get("p", sure[0])
                found.setdefault(label.items, []).append(p)
                found.setdefault(label.items[::-1], []).append(1 - p)
        return {pair: np.mean(said) for pair, said in found.items()}

    # Who is compared with whom

    def contexts(self, across=True):
        """Lists of rated items that are compared with each other.

        They are those that share a prompt, or have none; and, `across` prompts, all those that
        are alone with theirs: on one scale of ratings there is no other way to compare these.
        """
        by_prompt = places(self.prompts).values()
        shared = [same for same in by_prompt if len(same) > 1]
        alone = [same[0] for same in by_prompt if len(same) == 1]
        return shared + [alone] if across and len(alone) > 1 else shared

    def epoch(self, batch_size, rng, across=True):
        """Yields Compared: about batch_size random items in each, none of a comparison divided.

        Of ratings every pair of a context is compared, a large one in random parts, and a label is
        how often raters of the first give more. Of a given comparison every pair is, label 1.
        """
        blocks, margins = self.blocks(batch_size, rng, across)
        if not blocks:
            raise UserError(f"{self.where[0]} and on: there is nothing to compare")
        for chosen in fill([len(block) for block in blocks], batch_size):
            yield self.compared([blocks[i] for i in chosen], [margins[i] for i in chosen])

    def blocks(self, batch_size, rng, across):
        """(lists of items that are compared in one batch, in random order; the margin of each)."""
        if self.ratings is None:
            order = rng.permutation(len(self.groups))
            margins = self.margins or np.zeros(len(order))
            return [np.array(self.groups[i]) for i in order], [margins[i] for i in order]
        smallest = min(batch_size, len(self))
        if smallest < 2:
            expected = "expected at least 2 responses"
            raise UserError(f"a batch of {smallest} has nothing to compare: {expected}")
        contexts = self.contexts(across)
        blocks = []
        for context in contexts:
            shuffled = np.array(context)[rng.permutation(len(context))]
            parts = min(round(len(context) / batch_size), len(context) // 2)
            blocks += np.array_split(shuffled, max(1, parts))
        if len(contexts) > 1:
            blocks = [blocks[i] for i in rng.permutation(len(blocks))]
        return blocks, [0.0] * len(blocks)

    def compared(self, blocks, margins):
        ends = np.cumsum([len(block) for block in blocks])
        places_of = np.split(np.arange(ends[-1]), ends[:-1])
        pairs, labels, leads = [], [], []
        for block, at, margin in zip(blocks, places_of, margins, strict=True):
            first, second = np.triu_indices(len(block), 1)
            pairs.append(np.stack([at[first], at[second]], 1))
            label = np.ones(len(first))
            if self.ratings is not None:
                label = outvotes([self.ratings[i] for i in block])[first, second]
            labels.append(label)
            leads.append(np.full(len(first), margin))
        pairs, labels, leads = map(np.concatenate, (pairs, labels, leads))
        return Compared(np.concatenate(blocks), places_of, pairs, labels, leads)

    def comparisons(self, n, seed, across=True):
        """Fixed pairs (P, 2) of items, first preferred, and each one's gap in mean rating.

        Of given comparisons all, with gap 1. Of ratings all pairs of a context with different
        means, or n random ones where there are more. Raises UserError where there are none.
        """
        if self.ratings is not None:
            pairs, gaps = self.rated_pairs(n, seed, across)
        else:
            pairs = []
            for group in self.groups:
                pairs += itertools.combinations(group, 2)
            pairs, gaps = np.array(pairs), np.ones(len(pairs))
        if not len(pairs):
            problem = "the held-out part has no two responses of which one is better"
            raise UserError(f"{self.where[0]} and on: {problem}; more records are needed")
        return pairs, gaps

    def can_compare(self, across=True):
        """Whether `comparisons` finds any."""
        if self.ratings is None:
            return bool(self.groups)
        means = self.means()
        return any(len(np.unique(means[same])) > 1 for same in self.contexts(across))

    def rated_pairs(self, n, seed, across):
        means = self.means()
        contexts = self.contexts(across)
        below = []  # of each item of each context: its context by mean, and how many are worse
        for context in contexts:
            by_mean = np.array(context)[np.argsort(means[context], kind="stable")]
            worse = np.searchsorted(means[by_mean], means[by_mean])
            below += [(i, by_mean, k) for i, k in zip(by_mean, worse, strict=True)]
        counts = np.array([k for _, _, k in below], dtype=int)
        total = counts.sum()
        rng = np.random.default_rng(seed)
        if len(contexts) == 1 and total > max(n, len(self) ** 2 // 20):
            pairs = drawn_pairs(means, contexts[0], n, rng)
        else:
            which = np.arange(total) if total <= n else rng.choice(total, n, replace=False)
            ends = np.cumsum(counts)
            item = np.searchsorted(ends, which, side="right")
            rank = which - (ends - counts)[item]
            pairs = [(below[i][0], below[i][1][k]) for i, k in zip(item, rank, strict=True)]
        pairs = np.array(pairs, dtype=int).reshape(-1, 2)
        return pairs, means[pairs[:, 0]] - means[pairs[:, 1]]

    def means(self):
        """(N,) mean ratings; what differs by rounding alone is made equal."""
        return level([ratings.mean() for ratings in self.ratings])


def groups_of(labels):
    """The comparisons among the items of labels, best first."""
    groups = []
    for label in labels:
        groups += [[label.items[i] for i in order] for order in rankings(label)]
    return groups


def drawn_pairs(means, context, n, rng):
    """n random pairs of different means, where at least a tenth of all pairs is that."""
    pairs = []
    while len(pairs) < n:
        i, j = (context[k] for k in rng.integers(0, len(context), 2))
        if means[i] != means[j]:
            pairs.append((i, j) if means[i] > means[j] else (j, i))
    return pairs


def level(values):
    """The values (N,), those that differ by rounding alone made equal."""
    values = np.asarray(values, dtype=float)
    order = np.argsort(values, kind="stable")
    ascending = values[order]
    close = np.diff(ascending) <= 1e-12 * np.maximum(1, np.abs(ascending[1:]))
    first = np.maximum.accumulate(np.where(np.r_[False, close], 0, np.arange(len(values))))
    values[order] = ascending[first]
    return values


def fill(sizes, batch_size):
    """Batches of things of these sizes, in their order, none divided: arrays of indices.

    The sizes of a batch add up to about batch_size, however large the largest is.
    """
    sizes = np.array(sizes)
    middles = np.cumsum(sizes) - sizes / 2
    n_batches = max(1, round(sizes.sum() / batch_size))
    batch = (middles / sizes.sum() * n_batches).astype(int)
    return np.split(np.arange(len(sizes)), np.flatnonzero(np.diff(batch)) + 1)


def places(values):
    """{value: the indices where it stands}, in the order of their first."""
    found = {}
    for i, value in enumerate(values):
        found.setdefault(value, []).append(i)
    return found


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
    question, nor is one of a response with a single rating. It is nan where no pair is one.
    """
    rng = np.random.default_rng(seed)
    agreed = []
    for i, j in pairs if items.ratings is not None else ():
        if min(len(items.ratings[i]), len(items.ratings[j])) < 2:
            continue
        one = rng.permutation(items.ratings[i])
        other = rng.permutation(items.ratings[j])
        truth = np.sign(one[1:].mean() - other[1:].mean())
        if truth:
            agreed.append(0.5 + 0.5 * truth * np.sign(one[0] - other[0]))
    return float(np.mean(agreed)) if agreed else float("nan")
