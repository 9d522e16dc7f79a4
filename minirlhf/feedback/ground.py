"""What labels stand for among the rows of a batch: options, each a mean of what prefixes are worth.

A reward says of each prefix of a response what it is worth: at response level the head at its last
token, at token level the sum of the head over its tokens. So one forward pass serves all kinds.
Characters in labels become tokens by decoding: a prefix of so many characters ends with the token
in which the last of them lies.
"""

from typing import NamedTuple

import numpy as np
import torch

from minirlhf.data.labels import REACTIONS
from minirlhf.feedback.choice import proxy_weights, utterance_weights
from minirlhf.feedback.features import expect_feature, feature, standardised


class Texts(NamedTuple):
    """Of N rows, where in them the prefixes of their responses end."""

    at: list  # (n + 2,) of each: the last place of no token, of 1, ... n tokens, of all with EOS
    ends: list  # (n,) of each: how many characters are whole after so many tokens

    def take(self, index):
        return Texts([self.at[i] for i in index], [self.ends[i] for i in index])

    def tokens(self, row, characters):
        """How many response tokens it takes to read so many characters."""
        if not characters:
            return 0
        n = len(self.ends[row])
        return min(n, int(np.searchsorted(self.ends[row], characters)) + 1)

    def marked(self, row, spans):
        """(n,) bool: which response tokens share a character with one of the spans."""
        ends = self.ends[row]
        starts = np.r_[0, ends[:-1]]
        ends = np.maximum(ends, starts + 1)  # half a character belongs to the one it ends in
        found = np.zeros(len(ends), dtype=bool)
        for start, end in spans:
            found |= (starts < end) & (ends > start)
        return found


def texts_of(rows, tokenizer):
    """Texts of whole engine.rows.Rows."""
    at, ends = [], []
    for row, p in zip(rows.tokens, rows.prompt_lengths, strict=True):
        at.append(np.arange(p - 1, len(row)))
        ends.append(character_ends(tokenizer, row[p:-1].tolist()))
    return Texts(at, ends)


def character_ends(tokenizer, ids):
    """(n,): how many characters are whole after each of n tokens, which may hold half of one."""
    sizes = [len(tokenizer.decode_bytes([i])) for i in ids]
    text = np.frombuffer(tokenizer.decode_bytes(ids), dtype=np.uint8)
    goes_on = (text & 0xC0) == 0x80  # a byte in the middle of a character of UTF-8
    is_last = np.r_[~goes_on[1:], True][: len(text)]
    whole = np.r_[0, np.cumsum(is_last)]  # characters within so many bytes
    return whole[np.cumsum(sizes, dtype=int)]


class Options(NamedTuple):
    """B labels of at most K options, each a weighted sum of prefixes: M entries in all."""

    rows: torch.Tensor  # (M,)
    places: torch.Tensor  # (M,)
    weights: torch.Tensor  # (M,)
    cells: torch.Tensor  # (M,) b * K + k
    there: torch.Tensor  # (B, K) which options there are

    def values(self, prefixes):
        """(B, K), -inf where there is no option, of what prefixes (N, T) are worth."""
        worth = prefixes[self.rows, self.places] * self.weights.to(prefixes)
        flat = worth.new_zeros(self.there.numel()).index_add(0, self.cells, worth)
        return flat.view(self.there.shape).masked_fill(~self.there, -torch.inf)


class Group(NamedTuple):
    """Labels of one kind that are read alike."""

    kind: str
    form: str  # a key of mixture.LOSSES
    about: object  # how many levels a critique has, which feature a trace is of
    options: Options
    said: torch.Tensor  # (B,) or (B, K): what was chosen, its level, tiers, a curve


def ground(labels, row_of, texts, device="cpu"):
    """Groups of labels, whose items are the rows row_of[item] of the texts."""
    found = {}
    for label in labels:
        rows = [row_of[i] for i in label.items]
        readings = [READ[label.kind](label, rows, texts)]
        if "both_bad" in label.said:
            wholes = [whole(row, texts) for row in rows]
            readings.append(("both_bad", None, wholes, label.said["both_bad"]))
        for form, about, options, said in readings:
            found.setdefault((label.kind, form, about), []).append((options, said))
    groups = []
    for (kind, form, about), read in found.items():
        options, said = zip(*read, strict=True)
        groups.append(Group(kind, form, about, collate(options, device), stack(said, device)))
    return groups


def collate(options, device):
    """Options of a list of entries (row, place, weight) for each option of each label."""
    sizes = np.array([len(own) for own in options])
    K, entries = sizes.max(), []
    for b, own in enumerate(options):
        for k, entry in enumerate(own):
            entries += [(row, place, weight, b * K + k) for row, place, weight in entry]
    rows, places, weights, cells = map(np.array, zip(*entries, strict=True))
    there = np.arange(K) < sizes[:, None]
    parts = rows, places, weights.astype(np.float64), cells, there
    return Options(*(torch.as_tensor(part, device=device) for part in parts))


def stack(said, device):
    """Numbers (B,), or lists of unequal length (B, K), of which the last is repeated."""
    if isinstance(said[0], list):
        longest = max(map(len, said))
        said = [own + own[-1:] * (longest - len(own)) for own in said]
    return torch.as_tensor(said, device=device)


# One label: (form, about, options, what was said)


def whole(row, texts):
    return [(row, texts.at[row][-1], 1.0)]


def prefix(row, tokens, texts):
    """An option: that many of the response tokens; all of them are the whole."""
    n = len(texts.ends[row])
    return whole(row, texts) if tokens >= n else [(row, texts.at[row][tokens], 1.0)]


def mean(rows, weights, texts):
    """An option: the mean of whole responses under weights (n,)."""
    last = [texts.at[row][-1] for row in rows]
    return [entry for entry in zip(rows, last, weights.tolist(), strict=True) if entry[2]]


def critique(label, rows, texts):
    return "levels", label.said["of"], [whole(rows[0], texts)], label.said["level"]


def social(label, rows, texts):
    return "faces", None, [whole(rows[0], texts)], REACTIONS.index(label.said["reaction"])


def comparison(label, rows, texts):
    wholes = [whole(row, texts) for row in rows]
    if "best" in label.said:
        return "choice", None, wholes, label.said["best"]
    if "p" in label.said:
        return "soft", None, wholes, float(label.said["p"])
    ranking = label.said["ranking"]
    order = [tier if isinstance(tier, list) else [tier] for tier in ranking]
    if all(len(tier) == 1 for tier in order):
        return "ranking", None, [wholes[i] for (i,) in order], 0
    tiers = [0] * len(rows)
    for number, tier in enumerate(order):
        for i in tier:
            tiers[i] = number
    return "tiers", None, wholes, tiers


def importance(label, rows, texts):
    return (critique if "level" in label.said else comparison)(label, rows, texts)


def intertemporal(label, rows, texts):
    ends, curve = zip(*label.said["curve"], strict=True)
    options = [prefix(rows[0], texts.tokens(rows[0], end), texts) for end in ends]
    return "sketch", None, options, [float(value) for value in curve]


def proxy(label, rows, texts):
    proxies = [label.said["weights"], *label.said["others"]]
    names = sorted(set().union(*proxies))
    for name in names:
        expect_feature(name, label.where)
    weights = np.array([[float(own.get(name, 0)) for name in names] for own in proxies])
    features = standardised(names, label.responses)
    written = proxy_weights(torch.tensor(features), torch.tensor(weights))
    return "choice", None, [mean(rows, own, texts) for own in written], 0


def improvement(label, rows, texts):
    return "choice", None, [whole(rows[1], texts), whole(rows[0], texts)], 0


def language(label, rows, texts):
    options = []
    for utterance in label.said["grammar"]:
        direction, _, name = utterance.partition(" ")
        expect_feature(name, label.where)
        counts = torch.tensor([feature(name, text) for text in label.responses])
        weights = utterance_weights(counts, counts[0], direction == "more")
        options.append(mean(rows, weights, texts))
    return "choice", None, options, label.said["grammar"].index(label.said["utterance"])


def estop(label, rows, texts):
    row, stop = rows[0], label.said["stop"]
    n = len(texts.ends[row])
    options = [prefix(row, tokens, texts) for tokens in range(n + 1)]
    return "choice", None, options, n if stop is None else texts.tokens(row, stop)


def trace(label, rows, texts):
    return "trace", label.said["feature"], [[(row, 0, 1.0)] for row in rows], 0


def similarity(label, rows, texts):
    return "odd", None, [[(row, 0, 1.0)] for row in rows], label.said["odd"]


READ = {
    "critique": critique,
    "comparison": comparison,
    "intertemporal": intertemporal,
    "proxy": proxy,
    "social": social,
    "improvement": improvement,
    "language": language,
    "estop": estop,
    "importance": importance,
    "trace": trace,
    "similarity": similarity,
}
