"""Held out: which part of what people said enters no training.

The unit is what shares a prompt or a text, directly or through others: it stays whole, so no text
stands on both sides. A unit's side depends on a hash of its own content, so it stays when a file
grows, shrinks or comes in another order.
"""

import hashlib
import itertools
from dataclasses import dataclass, field

import numpy as np

from minirlhf.data.conversations import HEADERS, TAGGED
from minirlhf.data.items import Items, pick, places
from minirlhf.engine.cli import UserError

SHARE = 0.1  # of the units, held out
QUESTIONS = ("Human", "User")


@dataclass
class Feedback:
    """A source of feedback, split; the test part enters no training."""

    name: str
    train: Items
    test: Items
    more_text: list[str] = field(default_factory=list)  # further text
    more_ratings: list[np.ndarray] = field(default_factory=list)  # of each of it, or of none
    true_reward: object = None  # the toy's: (prompts, responses) -> floats
    counts: dict = field(default_factory=dict)  # of the records read, for those who look at them

    def texts(self):
        """(prompt, response, where) to train a base model on.

        Raises UserError where there are prompts alone.
        """
        if self.train.columns is not None:
            problem = "prompts alone hold no answers to train a base model on"
            raise UserError(f"{self.name}: {problem}; name a model with --init")
        return worth_writing(self.train)

    def further(self):
        """The further text as Items."""
        return Items(
            prompts=[""] * len(self.more_text),
            responses=self.more_text,
            where=[f"{self.name} text {i}" for i in range(len(self.more_text))],
            ratings=self.more_ratings or None,
        )

    def fingerprint(self):
        """A short digest of what was said and of how it is split."""
        content = hashlib.sha256()
        for items in (self.train, self.test):
            ratings = [r.tolist() for r in items.ratings or []]
            said = items.prompts, items.responses, ratings, items.groups, items.margins
            content.update(repr((said, items.columns)).encode("utf-8", "surrogatepass"))
            if items.labels is not None:
                content.update(repr(items.labels).encode("utf-8", "surrogatepass"))
        content.update(repr(self.more_text).encode())
        return content.hexdigest()[:16]

    def facts(self, source, tokenizer):
        """What the summary of a run on this source says of its data and tokenizer."""
        return {
            "data": source,
            "data_fingerprint": self.fingerprint(),
            "tokenizer_fingerprint": tokenizer.fingerprint(),
        }

    def trained(self, summary, source):
        """Whether a run of that summary was trained on this feedback, split as it is."""
        known = summary.get("data_fingerprint")
        return known == self.fingerprint() if known else summary.get("data") == source


def worth_writing(items):
    """(prompt, response, where) of what a base model should learn to write.

    Of given comparisons the best of each, and of labels what no other is better than, too. Of rated
    answers to one prompt the best quarter, ties at its end included; where there is no prompt, or
    nothing was said, all.
    """
    chosen = list(range(len(items)))
    if items.groups:
        chosen = list(dict.fromkeys(group[0] for group in items.groups))
        if items.labels is not None:
            compared = set(itertools.chain(*items.groups))
            chosen = sorted({*chosen, *range(len(items))} - (compared - {*chosen}))
    elif items.ratings is not None and any(items.prompts):
        chosen, means = [], items.means()
        for same in places(items.prompts).values():
            worst = np.sort(means[same])[-max(1, len(same) // 4)]
            chosen += same if not items.prompts[same[0]] else [i for i in same if means[i] >= worst]
        chosen.sort()
    return [(items.prompts[i], items.responses[i], items.where[i]) for i in chosen]


# Units and their sides


def split(items, name, **more):
    """Feedback whose test part is about a tenth of the units."""
    for limit, least in ((0.75, 5), (SHARE, 5), (0, 10)):
        parts, held_out = units(items, limit)
        if len(parts) >= least and len(items.statements()) >= 10:
            break
    else:
        problem = f"{len(parts)} records with prompts and texts of their own"
        raise UserError(f"{name}: {problem}; a tenth is held out, so at least 10 are needed")
    statements = items.statements()
    sizes = [sum(map(len, pick(statements, part))) for part in parts]
    largest = max(SHARE * sum(sizes), min(sizes))  # what is more than a tenth is trained on
    small = [size <= largest for size in sizes]
    held_out = [out and fits for out, fits in zip(held_out, small, strict=True)]
    if not any(held_out):  # of a small file, the nearest
        held_out[small.index(True)] = True
    sides, items.units = [[], []], [""] * len(items)
    for number, (part, out) in enumerate(zip(parts, held_out, strict=True)):
        sides[out] += part
        for i in itertools.chain(*pick(statements, part)):
            items.units[i] = str(number)
    train, test = (items.take(sorted(side)) for side in sides)
    return Feedback(name, train, test, **more)


def units(items, limit):
    """(lists of indices of statements, whether each is held out), those nearest to that first.

    Where more than a share `limit` of the statements hang together, by an answer that many have,
    say, they are divided: by the openings of their prompts, then by prompts, by items, at last by
    what is equal.
    """
    statements = items.statements()
    pending, found = list(range(len(statements))), []
    for links in (prompts_and_texts, openings, prompts, same_items, same_statement):
        large = []
        own = openings if links is prompts_and_texts else links
        own = texts_alone if links in (same_items, same_statement) else own
        for part in connected(links(items, [statements[i] for i in pending])):
            chosen = [pending[i] for i in part]
            if len(chosen) > limit * len(statements) and links is not same_statement:
                large += chosen
            else:
                found.append((side_of(own(items, [statements[i] for i in chosen])), chosen))
        pending = large
    found.sort()
    return [part for _, part in found], [side < SHARE for side, _ in found]


def side_of(keys):
    """A number from 0 to 1 that is that of a unit's least key: what else joins it seldom moves
    it."""
    least = min(digest(key) for key in set().union(*keys))
    return int(digest(least)[:13], 16) / 16**13


def digest(key):
    return hashlib.sha256(repr(key).encode("utf-8", "surrogatepass")).hexdigest()


# What links statements: sets of keys, one of each


def prompts_and_texts(items, statements):
    """The opening of the prompt, every text, and a dialogue that goes on after an answer."""
    keys = []
    texts = texts_alone(items, statements)
    for i, said in enumerate(statements):
        keys.append(texts[i] | {opening(items.prompts[k]) for k in said})
        keys[i] = keys[i] - {""} or {""}
    for shorter, longer in continued(items, statements):
        keys[longer] = keys[longer] | keys[shorter]
    return keys


def openings(items, statements):
    """The opening of the prompt; without one, the texts."""
    texts = texts_alone(items, statements)
    keys = [{opening(items.prompts[k]) for k in said} for said in statements]
    return [own - {""} or texts[i] for i, own in enumerate(keys)]


def prompts(items, statements):
    """The whole prompt; without one, the texts."""
    texts = texts_alone(items, statements)
    keys = [{plain(items.prompts[k]) for k in said} for said in statements]
    return [own - {""} or texts[i] for i, own in enumerate(keys)]


def texts_alone(items, statements):
    """The texts, of prompts alone these; an empty one links nothing to others."""
    texts = items.responses if items.columns is None else items.prompts
    keys = [{plain(texts[k]) for k in said} for said in statements]
    return [own - {""} or {""} for own in keys]


def same_items(items, statements):
    return [{items.prompts[k] + "\0" + items.responses[k] for k in said} for said in statements]


def same_statement(items, statements):
    return [{tuple(sorted(keys))} for keys in same_items(items, statements)]


def plain(text):
    return " ".join(text.split())


def opening(prompt):
    """A dialogue up to its first question, by which all that grows out of it is one; else all."""
    asked, place = False, len(prompt)
    for found in HEADERS.finditer(prompt) if TAGGED.match(prompt) else ():
        asks = found[0][2:-1] in QUESTIONS
        if asked and not asks:
            place = found.start()
            break
        asked = asked or asks
    return plain(prompt[:place])


def continued(items, statements):
    """Yields (i, j): a prompt of statement j begins with prompt and response of statement i."""
    texts = []
    for i, said in enumerate(statements):
        for k in said:
            if items.prompts[k]:
                texts.append((items.prompts[k], 1, i))
                if items.columns is None:
                    texts.append((items.prompts[k] + items.responses[k], 0, i))
    before = []  # whole texts, each the beginning of the next
    for text, asks, i in sorted(texts):
        while before and not text.startswith(before[-1][0]):
            before.pop()
        if not asks:
            before.append((text, i))
        elif before and before[-1][1] != i:
            yield before[-1][1], i


def connected(keys):
    """Lists of indices that share a key, directly or through others, in the order of their first.

    keys: a set of each.
    """
    leader = list(range(len(keys)))

    def find(i):
        while leader[i] != i:
            leader[i] = leader[leader[i]]
            i = leader[i]
        return i

    first = {}
    for i, own in enumerate(keys):
        for key in own:
            a, b = sorted((find(first.setdefault(key, i)), find(i)))
            leader[b] = a
    found = {}
    for i in range(len(keys)):
        found.setdefault(find(i), []).append(i)
    return list(found.values())


def seen_in_training(feedback):
    """(how many of the texts held out stand in the training part too, of how many)."""
    train, test = (
        items.responses if items.columns is None else items.prompts
        for items in (feedback.train, feedback.test)
    )
    seen = {plain(text) for text in itertools.chain(train, feedback.more_text)} - {""}
    return sum(plain(text) in seen for text in test), len(test)
