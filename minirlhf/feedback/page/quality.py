"""How good labels are: agreement, position bias, and what they say of the runs compared.

Arrays in, numbers out; `figures` puts them together for the entries of a labels file.

Left out: agreement about spans, stops, curves and edited texts; intervals of alpha.
"""

import itertools
import json
import math
from collections import Counter, defaultdict
from typing import NamedTuple

import numpy as np

LEVELS = {  # kinds whose answers can be the same twice, and how their values are measured
    "comparison": "ordinal",
    "critique": "ordinal",
    "social": "ordinal",
    "importance": "ordinal",
    "language": "nominal",
    "similarity": "nominal",
}
REACTIONS = {"frown": -1.0, "neutral": 0.0, "smile": 1.0}


def krippendorff_alpha(values, level="nominal"):
    """Agreement on U units by R raters: 1 perfect, 0 as by chance. NaN where nothing can be said.

    values: (R, U), NaN where a rater said nothing. level: nominal, ordinal or interval.
    alpha = 1 - observed / expected disagreement, with the coincidences of Krippendorff 2011,
    Computing Krippendorff's Alpha-Reliability.
    """
    values = np.asarray(values, dtype=float)
    names = np.unique(values[~np.isnan(values)])
    counts = (values[:, :, None] == names).sum(0)  # (U, V)
    counts = counts[counts.sum(1) > 1]
    pairs = counts[:, :, None] * counts[:, None, :] - counts[:, :, None] * np.eye(len(names))
    coincidences = (pairs / np.maximum(1, counts.sum(1) - 1)[:, None, None]).sum(0)  # (V, V)
    of_each = coincidences.sum(1)
    distances = squared_distances(names, of_each, level)
    expected = (np.outer(of_each, of_each) * distances).sum()
    if expected == 0:
        return math.nan
    return 1 - (of_each.sum() - 1) * (coincidences * distances).sum() / expected


def squared_distances(names, counts, level):
    """(V, V) between values: of nominal ones 0 or 1; of ordinal ones how many lie between."""
    if level == "nominal":
        return 1 - np.eye(len(names))
    if level == "ordinal":  # sum of the counts from c to k, less half of both ends
        names = counts.cumsum() - counts / 2
    return (names[:, None] - names) ** 2


def share_interval(hits, n):
    """(share, low, high): a share of n with its 95 % interval. Wilson 1927; NaN for n = 0."""
    if n == 0:
        return math.nan, math.nan, math.nan
    z, share = 1.96, hits / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return share, middle - half, middle + half


def bradley_terry(wins):
    """(strengths (K,), standard errors (K,)) of K runs; strengths have the sum 0.

    wins: (K, K), how often i was better than j, a tie being half a win for each. Half a win each
    way is added to every pair that was compared, so that a run that never lost has a strength.
    Maximum likelihood by Newton's method; Bradley and Terry 1952. Errors are of the inverse Fisher
    information, within the sum 0.
    """
    wins = np.asarray(wins, dtype=float)
    n = wins + wins.T
    wins = wins + 0.5 * (n > 0)
    n = wins + wins.T
    strengths = np.zeros(len(wins))
    for _ in range(50):
        chance = 1 / (1 + np.exp(strengths - strengths[:, None]))  # (K, K) i better than j
        gradient = wins.sum(1) - (n * chance).sum(1)
        weights = n * chance * (1 - chance)
        information = np.diag(weights.sum(1)) - weights
        step = np.linalg.pinv(information) @ gradient
        strengths += np.clip(step, -1, 1)
        if abs(step).max() < 1e-12:
            break
    errors = np.sqrt(np.diag(np.linalg.pinv(information)).clip(0))
    return strengths - strengths.mean(), errors


# Of the entries of a labels file


class Fact(NamedTuple):
    """What the figures need of a label, worked out once."""

    entry: dict
    kind: str
    rater: str
    seconds: float | None
    value: float | str | None  # what it says; None where two answers cannot be compared
    first: bool | None  # whether the text that was shown first won, of pairs with a winner
    wins: list  # (better run, worse run, 1), and both ways with a half for a tie


def fact_of(entry):
    seconds, ranks = entry.get("seconds"), ranks_of(entry.get("ranking", []))
    seconds = seconds if type(seconds) in (int, float) else None
    two = len(ranks) == 2 and "sides" in entry and ranks[0] != ranks[1]
    first = ranks[0] < ranks[1] if two else None
    rater = str(entry.get("rater", ""))
    value = value_of(entry, ranks)
    return Fact(entry, entry["kind"], rater, seconds, value, first, wins_of(entry, ranks))


def ranks_of(ranking):
    """{index: rank from 0}, of a ranking in which a list is a tie."""
    ranks = {}
    for rank, tier in enumerate(ranking):
        for i in tier if isinstance(tier, list) else [tier]:
            ranks[i] = rank
    return ranks


def value_of(entry, ranks):
    """What a label says as a number or a text, whatever side its texts stood on."""
    texts = entry.get("responses", [])
    if len(ranks) == 2:
        first, second = (0, 1) if texts[0] < texts[1] else (1, 0)
        return float(np.sign(ranks[second] - ranks[first]))
    if ranks:
        return json.dumps(sorted((rank, texts[i]) for i, rank in ranks.items()))
    if "best" in entry:
        return json.dumps([[0, texts[entry["best"]]]])
    if "level" in entry:
        return float(entry["level"])
    if entry["kind"] == "social":
        return REACTIONS[entry["reaction"]]
    if entry["kind"] == "similarity":
        return texts[entry["odd"]]
    return entry.get("utterance")


def wins_of(entry, ranks):
    sources, found = entry.get("sources"), []
    if not isinstance(sources, list) or len(sources) < len(ranks) or "again" in entry:
        return found
    for i, j in itertools.permutations(ranks, 2):
        if sources[i] != sources[j] and ranks[i] <= ranks[j]:
            found.append((str(sources[i]), str(sources[j]), 1 if ranks[i] < ranks[j] else 0.5))
    return found


def renew(facts, entries):
    """Brings a list of Facts up to the entries of a file that has changed at its end alone."""
    while facts and facts[-1].entry is not (entries[len(facts) - 1 :] or [None])[0]:
        facts.pop()
    facts.extend(map(fact_of, entries[len(facts) :]))


def figures(facts, rater):
    """All figures of the labels of a file, those about one person of this rater."""
    mine = [fact for fact in facts if fact.rater == rater]
    seconds = [fact.seconds for fact in mine if fact.seconds is not None]
    first = [fact.first for fact in mine if fact.first is not None]
    agreed, repeated = self_agreement(mine)
    return {
        "labels": len(mine),
        "kinds": dict(Counter(fact.kind for fact in mine)),
        "seconds": float(np.median(seconds)) if seconds else None,
        "first": numbers(share_interval(sum(first), len(first))),
        "compared": len(first),
        "agreed": agreed,
        "repeated": repeated,
        "agreement": agreement(facts),
        "runs": strengths(facts),
    }


def numbers(values):
    """Numbers as JSON knows them: None for NaN."""
    return [None if math.isnan(value) else round(float(value), 4) for value in values]


def self_agreement(facts):
    """(how often a rater said the same of a question shown again, how often it was)."""
    again = [fact for fact in facts if "again" in fact.entry]
    asked = {fact.entry["again"] for fact in again}
    before = {f.entry["question"]: f.value for f in facts if f.entry.get("question") in asked}
    pairs = [(before.get(fact.entry["again"]), fact.value) for fact in again]
    pairs = [pair for pair in pairs if None not in pair]
    return sum(one == other for one, other in pairs), len(pairs)


def agreement(facts):
    """Krippendorff's alpha of each kind that several raters gave about the same texts."""
    said = defaultdict(lambda: defaultdict(dict))
    if len({fact.rater for fact in facts}) < 2:
        return []
    for fact in facts:
        if fact.kind in LEVELS and fact.value is not None and "again" not in fact.entry:
            said[fact.kind][about(fact.entry)][fact.rater] = fact.value
    found = []
    for kind, units in said.items():
        units = [by_rater for by_rater in units.values() if len(by_rater) > 1]
        if units:
            table, level = as_table(units, LEVELS[kind])
            alpha = numbers([krippendorff_alpha(table, level)])[0]
            found.append({"kind": kind, "alpha": alpha, "raters": len(table), "units": len(units)})
    return found


def about(entry):
    """What a label is about: the same for the same texts in any order."""
    texts = entry.get("responses") or [entry.get("response"), *entry.get("others", [])]
    return entry.get("prompt", ""), tuple(sorted(map(str, texts)))


def as_table(units, level):
    """((R, U) numbers, NaN where nothing was said; the level) of a {rater: value} for each unit.
    Values that are texts get numbers, and are nominal."""
    raters = sorted({rater for by_rater in units for rater in by_rater})
    names, table = {}, np.full((len(raters), len(units)), math.nan)
    for u, by_rater in enumerate(units):
        for rater, value in by_rater.items():
            if isinstance(value, str):
                value, level = names.setdefault(value, len(names)), "nominal"
            table[raters.index(rater), u] = value
    return table, level


def strengths(facts):
    """Bradley-Terry strengths of the runs whose texts were compared, the strongest first."""
    results = Counter()
    for fact in facts:
        for better, worse, amount in fact.wins:
            results[better, worse] += amount
    runs = sorted({run for pair in results for run in pair})
    if not runs:
        return []
    wins = np.array([[results[one, other] for other in runs] for one in runs])
    found, errors = bradley_terry(wins)
    rows = []
    for i in np.argsort(-found):
        low, high = found[i] - 1.96 * errors[i], found[i] + 1.96 * errors[i]
        rows.append({"run": runs[i], "strength": numbers([found[i], low, high])})
    return rows
