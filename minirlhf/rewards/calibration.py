"""Can a reward's chances be trusted? Calibration, accuracy by what a pair is like, length, spread.

Arrays of N pairs: `log_odds` z (N,) that the first is preferred, of scores their difference
r(a) - r(b); `chances` p = sigmoid(z) (Bradley and Terry 1952); `labels` q (N,), the share of raters
who prefer the first. A share that is neither 0 nor 1 is a label as it stands: raters differ, and to
say 0.7 where 7 of 10 prefer the first is to be right. All logarithms are natural.

A trap: held-out pairs are often given with the preferred one first. Then every label is over one
half, and an honest chance of one half looks too low: say `both_ways` before `reliability` or
`expected_calibration_error`. The other figures are the same for a pair and its mirror image.

Left out: standard errors. Pairs share responses, so those of N independent pairs are too small.
"""

from typing import NamedTuple

import numpy as np

from minirlhf.engine.cli import UserError


def sigmoid(z):
    return np.exp(-np.logaddexp(0, -np.asarray(z, dtype=float)))


def both_ways(chances, labels):
    """(chances (2N,), labels (2N,)) of every pair and of the same pair the other way round."""
    p, q = checked(chances, labels)
    return np.concatenate([p, 1 - p]), np.concatenate([q, 1 - q])


def checked(chances, labels):
    """Both as float arrays. Raises UserError for what is no chance, and for unequal lengths."""
    p, q = np.asarray(chances, dtype=float), np.asarray(labels, dtype=float)
    if p.shape != q.shape or p.ndim != 1 or not len(p):
        found = f"{p.shape} and {q.shape}"
        raise UserError(f"chances and labels: expected N of each, found shapes {found}")
    for name, values in (("chances", p), ("labels", q)):
        if not ((values >= 0) & (values <= 1)).all():
            raise UserError(f"{name}: expected numbers from 0 to 1")
    return p, q


# Proper scores: each is least, in expectation, where a chance is the share of raters


def log_loss(chances, labels):
    """Mean of -q log p - (1 - q) log(1 - p), in nats: infinite where a certain chance is wrong."""
    p, q = checked(chances, labels)
    return float(np.mean(times_log(q, p) + times_log(1 - q, 1 - p)))


def times_log(q, p):
    """-q log p, where 0 log 0 is 0."""
    with np.errstate(divide="ignore"):
        logs = -np.log(p)
    return np.multiply(q, logs, out=np.zeros_like(logs), where=q > 0)


def label_entropy(labels):
    """The log loss that no chances beat on these very labels: they would have to be the labels."""
    return log_loss(labels, labels)


def brier_score(chances, labels):
    """Mean of (p - q)^2 (Brier 1950), against the share of raters. Against the vote of a single
    rater it is more by the mean of q (1 - q), whatever the chances are."""
    p, q = checked(chances, labels)
    return float(np.mean((p - q) ** 2))


# Reliability


class Bins(NamedTuple):
    """Pairs by their chance, bins without any left out; arrays (B,)."""

    low: np.ndarray
    high: np.ndarray
    chance: np.ndarray  # mean in the bin
    label: np.ndarray  # mean in the bin: of calibrated chances about the same
    count: np.ndarray


def reliability(chances, labels, bins=10, equal="width"):
    """The reliability curve: Bins of equal width from 0 to 1, or with about equal counts."""
    p, q = checked(chances, labels)
    edges = np.linspace(0, 1, bins + 1)
    if equal == "count":
        edges = np.unique(np.quantile(p, edges))
    elif equal != "width":
        raise UserError(f"bins of equal {equal}: expected width or count")
    edges = np.append(edges, edges[-1])[: max(2, len(edges))]  # chances all alike: one bin
    at = np.searchsorted(edges, p, side="right") - 1
    at = np.clip(at, 0, len(edges) - 2)
    count = np.bincount(at, minlength=len(edges) - 1)
    filled = np.flatnonzero(count)
    chance = np.bincount(at, p)[filled] / count[filled]
    label = np.bincount(at, q)[filled] / count[filled]
    return Bins(edges[filled], edges[filled + 1], chance, label, count[filled])


def expected_calibration_error(chances, labels, bins=10, equal="width"):
    """Mean over pairs of their bin's |mean chance - mean label| (Naeini et al. 2015, Guo et al.
    2017). Chance alone makes it positive: n pairs in a bin leave a gap of about
    0.8 standard deviations of a label / sqrt(n)."""
    found = reliability(chances, labels, bins, equal)
    return float(np.average(np.abs(found.chance - found.label), weights=found.count))


# Temperature


class Temperature(NamedTuple):
    value: float  # the log-odds are divided by it: over 1 where they were too sure
    note: str  # why it was capped; "" where it was not


def fit_temperature(log_odds, labels, most=1e3):
    """The Temperature T of least log loss of sigmoid(z / T) (Platt 1999; Guo et al. 2017, 4.2).

    In b = 1/T the loss is convex, with the slope mean(z (sigmoid(b z) - q)), whose root is found
    by halving an interval. T lies between s/most and s*most, s the root mean square of z: no finite
    b is best where all labels are 0 or 1 and in order, and none over 0 where z says nothing.
    """
    z, (_, q) = np.asarray(log_odds, dtype=float), checked(labels, labels)
    if z.shape != q.shape or not np.isfinite(z).all():
        raise UserError(f"log-odds: expected {len(q)} finite numbers")
    size = np.sqrt(np.mean(z**2))
    if not size:
        return Temperature(1.0, "all log-odds are 0, which no temperature mends")

    def slope(b):
        return np.mean(z * (sigmoid(b * z) - q))

    low, high = -np.log(most * size), np.log(most / size)  # of log b
    if slope(np.exp(low)) >= 0:
        return Temperature(most * size, "capped: the log-odds do not order the labels")
    if slope(np.exp(high)) <= 0:
        return Temperature(size / most, "capped: the log-odds separate the labels perfectly")
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(np.exp(middle)) < 0 else (low, middle)
    return Temperature(float(np.exp(-low)), "")


def calibration_figures(log_odds, labels, temperature=1.0, bins=10):
    """{name: number} of pairs at a temperature, with the calibration error of both ways."""
    chances = sigmoid(np.asarray(log_odds, dtype=float) / temperature)
    return {
        "log_loss": log_loss(chances, labels),
        "label_entropy": label_entropy(labels),
        "brier": brier_score(chances, labels),
        "ece": expected_calibration_error(*both_ways(chances, labels), bins),
    }


# Accuracy


def is_right(log_odds, labels):
    """(N,) 1 where a pair is ordered as most raters do, 0 where not, 1/2 where the log-odds are 0;
    nan where the raters are divided, which is no question."""
    z, q = np.asarray(log_odds, dtype=float), np.asarray(labels, dtype=float)
    right = (1 + np.sign(z) * np.sign(q - 0.5)) / 2
    return np.where(q == 0.5, np.nan, right)


class Accuracy(NamedTuple):
    low: float
    high: float
    count: int
    accuracy: float


def accuracy_by(values, right, edges):
    """[Accuracy] of the pairs whose value is in [low, high) of each two edges, the last end with
    it; parts without a pair left out.

    right (N,) is of `is_right`, nan for no question. Values (N,) that tell something: the margin
    |z|, the gap in mean ratings, the spread of an ensemble, the tokens by which the preferred one
    is longer (a reward that likes length is right where that is positive, and wrong elsewhere).
    """
    values, right = np.asarray(values, dtype=float), np.asarray(right, dtype=float)
    found = []
    for low, high in zip(edges, edges[1:], strict=False):
        inside = (values >= low) & (values < high) & ~np.isnan(right)
        if high == edges[-1]:
            inside |= (values == high) & ~np.isnan(right)
        if inside.any():
            share = float(right[inside].mean())
            found.append(Accuracy(float(low), float(high), int(inside.sum()), share))
    return found


def equal_counts(values, parts):
    """Edges of parts of about equally many values: fewer where many values are alike."""
    return np.unique(np.quantile(values, np.linspace(0, 1, parts + 1)))


def position_figures(better_first, better_second):
    """Whether it matters to a judge which answer is given first.

    (N,) chances that the answer given first is preferred, of the same pairs asked twice: with the
    one that people prefer given first, and given second. Where a model is a score, or log-odds that
    change sign with the order as a PreferenceModel's do, both accuracies are the same, the
    agreement is 1 and P(first) 1/2 by construction; so it is of whatever feedback/preferring.py
    has made symmetric. feedback/judge.py has the plain answers in `first_shown`.
    """
    forth, back = (np.asarray(p, dtype=float) for p in (better_first, better_second))
    votes = np.sign(forth - 0.5), np.sign(0.5 - back)  # 1 for the better answer, either way
    return {
        "accuracy_better_first": float(np.mean(0.5 + votes[0] / 2)),
        "accuracy_better_second": float(np.mean(0.5 + votes[1] / 2)),
        "agreement": float(np.mean(votes[0] == votes[1])),
        "chance_of_first": float(np.mean(np.concatenate([forth, back]))),
    }


# Correlation with length


def pearson(x, y):
    """Correlation of x (N,) and y (N,); nan where one of them does not vary."""
    x, y = (np.asarray(v, dtype=float) - np.mean(v) for v in (x, y))
    size = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / size) if size else float("nan")


def ranks(x):
    """(N,) ranks from 0, equal values sharing the mean of theirs."""
    _, group, count = np.unique(x, return_inverse=True, return_counts=True)
    first = np.cumsum(count) - count
    return (first + (count - 1) / 2)[group]


def spearman(x, y):
    return pearson(ranks(x), ranks(y))


def partial_correlation(x, y, given):
    """Correlation of what is left of x and of y after a straight line in `given` (N,)."""
    z = np.asarray(given, dtype=float) - np.mean(given)
    left = []
    for v in (x, y):
        v = np.asarray(v, dtype=float) - np.mean(v)
        left.append(v - z * (v @ z) / (z @ z) if z.any() else v)
    return pearson(*left)


def length_figures(scores, lengths, ratings=None):
    """How far scores (N,) go with lengths (N,) in tokens. `given_rating` is what is left among
    responses that people rate (N,) alike; people's own taste for length is in `of_people`."""
    found = {"pearson": pearson(scores, lengths), "rank": spearman(scores, lengths)}
    if ratings is not None:
        found["given_rating"] = partial_correlation(scores, lengths, ratings)
        found["of_people"] = pearson(ratings, lengths)
    return found


# Ensembles


def standardised(scores):
    """scores (M, N) of M members, each with mean 0 and standard deviation 1: else the member with
    the largest numbers has the most votes. One that does not vary is 0."""
    scores = np.asarray(scores, dtype=float)
    centred = scores - scores.mean(1, keepdims=True)
    size = scores.std(1, keepdims=True)
    return centred / np.where(size > 0, size, 1)


def ensemble_pairs(scores, pairs):
    """(mean (P,), spread (P,)) over M members of the differences of their standardised scores
    (M, N) on pairs (P, 2); the spread is a standard deviation."""
    members = standardised(scores)
    pairs = np.asarray(pairs)
    ahead = members[:, pairs[:, 0]] - members[:, pairs[:, 1]]
    return ahead.mean(0), ahead.std(0)


def predicts_error(values, right):
    """P(a pair that is ordered wrong has the larger value than one ordered right), ties one half:
    the area under the ROC curve. 1/2: values say nothing of errors. nan without one of each.

    Compare a spread's with that of -|margin|: it is worth an ensemble only where it is larger.
    """
    values, right = np.asarray(values, dtype=float), np.asarray(right, dtype=float)
    known = (right == 0) | (right == 1)
    wrong = right[known] == 0
    n, m = wrong.sum(), (~wrong).sum()
    if not n or not m:
        return float("nan")
    above = ranks(values[known])[wrong].sum() - n * (n - 1) / 2  # Mann and Whitney 1947
    return float(above / (n * m))
