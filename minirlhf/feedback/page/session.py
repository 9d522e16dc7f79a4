"""What a person is asked and has answered: the state behind the page and the terminal.

The labels file is the truth. A label names its question, so that after a restart what was answered
is not asked again. An undo takes the last label's line off the file; a skipped question stands in a
file of its own, with the number of labels before it, so that an undo knows which came last. Every
answer is on the disk before the next question is shown.

Left out: one file for raters on several machines. Concatenate their files: agreement is worked out
from what a file holds.
"""

import bisect
import math
import threading
from pathlib import Path

import numpy as np

from minirlhf.data.labels import VERSION, as_entry, is_label, parse_label
from minirlhf.engine.cli import UserError
from minirlhf.engine.files import read_lines, write_lines
from minirlhf.feedback.features import FEATURES, feature
from minirlhf.feedback.page.lines import Lines
from minirlhf.feedback.page.pool import again, choose, grouped, question, questions
from minirlhf.feedback.page.quality import LEVELS

AGAIN_EVERY = 10  # one question in so many repeats an earlier one
SAID = {  # what the page says of each kind; all else of a label is the server's
    "critique": ("level",),
    "comparison": ("ranking", "best", "both_bad"),
    "intertemporal": ("curve",),
    "proxy": ("weights",),
    "social": ("reaction",),
    "improvement": ("improved",),
    "language": ("utterance",),
    "estop": ("stop",),
    "importance": ("ranking", "marks"),
    "trace": ("order",),
    "similarity": ("odd",),
}
NOTES = ("reason", "remark")  # texts a person may add
LONGEST = 100_000  # characters of a text that a person writes


class Session:
    """One rater's questions and labels. Its methods may be called from several threads."""

    def __init__(self, groups, knobs, kinds):
        self.knobs, self.kinds = knobs, kinds
        self.lock = threading.RLock()
        self.labels = Lines(knobs.out)
        self.skips = Lines(beside(knobs.out, "skipped"))
        self.questions = questions(groups, kinds, knobs.n, knobs.seed)
        self.by_name = {asked.name: i for i, asked in enumerate(self.questions)}
        self.written = read_written(beside(knobs.out, "written"))
        self.left = []
        self.take_written(self.written)
        self.margins = {}  # of questions, by index: how sure a trained model is of the answer
        self.asker = None  # of --ask: an asking.Asker
        self.shown = {}  # {tab: the Question it shows}
        self.answered = {}  # {name of a question that this rater has answered: index of the label}
        self.repeatable = []  # names of this rater's answered questions, in order
        for i, entry in enumerate(self.labels.entries):
            parse_label(entry_of(entry, f"{knobs.out}:{i + 1}"), f"{knobs.out}:{i + 1}")
            if entry.get("rater") == knobs.rater:
                self.note(entry, i)
        skipped = {entry.get("question") for entry in self.own(self.skips.entries)}
        self.left = [
            i
            for i, asked in enumerate(self.questions)
            if asked.name not in self.answered and asked.name not in skipped
        ]

    def own(self, entries):
        return [entry for entry in entries if entry.get("rater") == self.knobs.rater]

    def note(self, entry, index):
        name = entry.get("question")
        if isinstance(name, str):
            self.answered[name] = index
            repeats = entry["kind"] in LEVELS and "again" not in entry
            if repeats and name in self.by_name:
                self.repeatable.append(name)

    def add_written(self, rows):
        """Samples written after training, {"prompt", "before", "after"} each, join the questions,
        and come first."""
        with self.lock:
            self.written = self.written + rows
            write_lines(beside(self.knobs.out, "written"), self.written)
            for i in self.take_written(rows):
                self.margins[i] = -1.0

    def take_written(self, rows):
        """The indices of new comparisons of samples that differ."""
        sides = {"before": "before", "after": "written"}
        texts = [(row["prompt"], row[key], sides[key]) for row in rows for key in sides]
        new = []
        for group in grouped(texts):
            if len(group.responses) > 1:
                asked = question("comparison", group, [0, 1], self.knobs.seed)
                if asked.name not in self.by_name:
                    self.by_name[asked.name] = len(self.questions)
                    new.append(len(self.questions))
                    self.questions.append(asked)
        self.left += new
        return new

    # What is asked

    def ask(self, tab):
        """The Question that a tab shows: the one it has, if that is still open, else another.

        None where all are answered. No two tabs show one question while there are others.
        """
        with self.lock:
            asked = self.shown.get(tab)
            if asked is None or not self.is_open(asked):
                asked = self.repeat() or self.fresh(tab)
                self.shown[tab] = asked
            return asked

    def is_open(self, asked):
        if asked.again:
            return asked.name not in self.answered and asked.again in self.answered
        place = bisect.bisect_left(self.left, self.by_name[asked.name])
        return self.left[place : place + 1] == [self.by_name[asked.name]]

    def repeat(self):
        """An earlier question, when one is due; None."""
        due = len(self.repeatable) // (AGAIN_EVERY - 1)
        if not self.knobs.again or due == 0:
            return None
        name = self.repeatable[(due - 1) * (AGAIN_EVERY - 1)]  # eight answers ago, or more
        asked = again(self.questions[self.by_name[name]])
        held = any(other and other.name == asked.name for other in self.shown.values())
        return None if held or asked.name in self.answered or self.is_skipped(asked) else asked

    def is_skipped(self, asked):
        return any(entry["question"] == asked.name for entry in self.own(self.skips.entries))

    def fresh(self, tab):
        """The next question by `choose`, of those that no other tab shows."""
        others = {q.name for t, q in self.shown.items() if q and t != tab}
        free = [i for i in self.left if self.questions[i].name not in others] or self.left
        if not free:
            return None
        passed = len(self.answered) + len(self.skips.entries)
        rng = np.random.default_rng([self.knobs.seed, passed])
        turn = passed % len(self.kinds)  # kinds take turns
        for kind in self.kinds[turn:] + self.kinds[:turn]:
            some = [i for i in free if self.questions[i].kind == kind]
            if some:
                return self.questions[some[choose(some, self, rng)]]
        return self.questions[free[0]]

    def find(self, name):
        """The Question of a name. Raises UserError where there is none."""
        plain = str(name).removesuffix("-again")
        if plain not in self.by_name:
            raise UserError("this question is not one of this page")
        asked = self.questions[self.by_name[plain]]
        return asked if plain == name else again(asked)

    # What is answered

    def answer(self, tab, name, said, seconds=None, notes=None):
        """Writes the label of an answer, once; returns its entry, None where it was there already.

        Raises UserError for an answer that is no label of its kind.
        """
        with self.lock:
            asked = self.find(name)
            if name in self.answered:
                return None
            entry = self.label_of(asked, said, seconds, notes or {})
            self.labels.append(entry)
            self.close(tab, asked)
            self.note(entry, len(self.labels.entries) - 1)
            return entry

    def label_of(self, asked, said, seconds, notes):
        """The entry of a Label. Raises UserError."""
        if not isinstance(said, dict) or not set(said) <= set(SAID[asked.kind]):
            raise UserError(f"{asked.kind}: expected {', '.join(SAID[asked.kind])}")
        entry = {"version": VERSION, "kind": asked.kind, "prompt": asked.prompt}
        entry |= texts_and_said(asked, said, self.knobs)
        entry |= {"rater": self.knobs.rater, "question": asked.name, "sides": asked.sides}
        if asked.again:
            entry["again"] = asked.again
        if any(asked.sources) and "sources" not in entry:
            entry["sources"] = asked.sources
        if type(seconds) in (int, float) and 0 <= seconds < math.inf:
            entry["seconds"] = round(seconds, 2)
        for key in NOTES:
            text = notes.get(key)
            if isinstance(text, str) and text.strip():
                entry[key] = text.strip()[:LONGEST]
        return as_entry(parse_label(entry, "this answer"))

    def close(self, tab, asked):
        if not asked.again:
            index = self.by_name[asked.name]
            place = bisect.bisect_left(self.left, index)
            if self.left[place : place + 1] == [index]:
                del self.left[place]
        self.shown.pop(tab, None)

    def skip(self, tab, name):
        with self.lock:
            asked = self.find(name)
            if self.is_open(asked):
                place = {"rater": self.knobs.rater, "labels": len(self.labels.entries)}
                self.skips.append({"question": name} | place)
                self.close(tab, asked)

    def last(self):
        """The name of the question that this rater answered or skipped last; "" without one, and
        where that was about other texts or somebody else came after."""
        labels, skips = self.labels.entries, self.skips.entries
        lines = skips if self.skipped_last() else labels
        entry = lines[-1] if lines else {}
        name = entry.get("question")
        mine = entry.get("rater") == self.knobs.rater and isinstance(name, str)
        return name if mine and name.removesuffix("-again") in self.by_name else ""

    def skipped_last(self):
        skips = self.skips.entries
        return bool(skips) and skips[-1].get("labels") == len(self.labels.entries)

    def undo(self, tab, name):
        """Takes back the last answer or skip of this rater, if that is still the one named; returns
        its Question, which the tab shows again, or None. So an undo that is sent twice takes back
        one, and never what another tab has said meanwhile."""
        with self.lock:
            if not name or name != self.last():
                return None
            if self.skipped_last():
                self.skips.pop()
            else:
                self.labels.pop()
                del self.answered[name]
                if self.repeatable and self.repeatable[-1] == name:
                    self.repeatable.pop()
            asked = self.find(name)
            if not asked.again and not self.is_open(asked):
                bisect.insort(self.left, self.by_name[name])
            self.shown[tab] = asked
            return asked


def entry_of(entry, where):
    if not is_label(entry):
        raise UserError(f"{where}: no label: expected version and kind; give another --out")
    return entry


def read_written(path):
    """The samples of an earlier session. Raises UserError where the file is another."""
    if not path.exists():
        return []
    rows = [row for _, row in read_lines(path)]
    for row in rows:
        texts = [row.get(key) for key in ("prompt", "before", "after")]
        if not all(isinstance(text, str) for text in texts):
            raise UserError(f"{path}: expected prompt, before and after; take the file away")
    return rows


def beside(out, what):
    return Path(out).with_suffix(f".{what}.jsonl")


def texts_and_said(asked, said, knobs):
    """The texts of a label and what was said of them, in the keys of its kind."""
    kind, texts = asked.kind, asked.responses
    if kind == "trace":
        order, n = said.get("order"), len(texts)
        whole = isinstance(order, list) and all(type(i) is int for i in order)
        if not whole or sorted(order) != list(range(n)):
            raise UserError(f"trace: expected an order of 0 to {n - 1}")
        found = {"responses": [texts[i] for i in order], "feature": feature_of(asked, knobs)}
        sources = {"sources": [asked.sources[i] for i in order]} if any(asked.sources) else {}
        return found | sources | {"order": order}
    if kind == "language":
        return {"response": texts[0], "others": texts[1:], "grammar": grammar()} | said
    if kind == "proxy":
        return {"responses": texts, "others": other_weights(said.get("weights"))} | said
    if kind in ("comparison", "importance", "similarity"):
        return {"responses": texts} | said
    levels = {"of": knobs.levels} if kind == "critique" else {}
    return {"response": texts[0]} | levels | said


def grammar():
    """All that can be said of a text by its features."""
    return [f"{way} {name}" for name in FEATURES for way in ("more", "less")]


def other_weights(chosen):
    """The weights that a proxy reward could have had, too: each feature alone, for or against."""
    found = []
    for name in FEATURES:
        for sign in (1, -1):
            weights = {other: sign * (other == name) for other in FEATURES}
            if weights != chosen:
                found.append(weights)
    return found


def feature_of(asked, knobs):
    """The feature that a trace is about: --feature, or one that differs among its texts."""
    if knobs.feature:
        return knobs.feature
    texts = asked.responses
    differ = [name for name in FEATURES if len({feature(name, text) for text in texts}) > 1]
    names = differ or list(FEATURES)
    return names[int(asked.name.removesuffix("-again")[-4:], 16) % len(names)]
