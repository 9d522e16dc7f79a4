"""What the page asks of the server, one function a call: dicts in, dicts out.

A page never learns where a text comes from before it has answered, and with --reveal only then.
"""

import re
from pathlib import Path

from minirlhf.engine.files import file_errors
from minirlhf.feedback.features import FEATURES, standardised
from minirlhf.feedback.page import quality
from minirlhf.feedback.page.session import feature_of, grammar


def calls(session, learning):
    """(reads, writes): {name: function} for server.start."""
    guidelines = read_guidelines(session.knobs.guidelines)
    facts = []
    quality.renew(facts, session.labels.entries)

    def begin(_):
        return {"rater": session.knobs.rater, "guidelines": guidelines, "kinds": session.kinds,
                "learns": learning is not None}  # fmt: skip

    def question(asked):
        return as_shown(session, session.ask(tab_of(asked)))

    def answer(asked):
        tab = tab_of(asked)
        entry = session.answer(tab, asked.get("question"), asked.get("said"), asked.get("seconds"),
                               asked)  # fmt: skip
        return {"written": entry is not None, "reveal": revealed(session, entry), **question(asked)}

    def skip(asked):
        session.skip(tab_of(asked), asked.get("question"))
        return question(asked)

    def undo(asked):
        undone = session.undo(tab_of(asked), asked.get("last"))
        return {"undone": undone is not None, **question(asked)}

    def figures(_):
        with session.lock:
            quality.renew(facts, session.labels.entries)
            now = list(facts)
        found = {"quality": quality.figures(now, session.knobs.rater)}
        return found | ({"learning": learning.state()} if learning else {})

    writes = {"question": question, "answer": answer, "skip": skip, "undo": undo}
    if learning:
        writes |= {"train": learning.train, "write": learning.write}
    return {"begin": begin, "figures": figures}, writes


def tab_of(asked):
    return str(asked.get("tab", ""))[:100]


def read_guidelines(path):
    if not path:
        return ""
    with file_errors(path):
        return Path(path).read_text(encoding="utf-8", errors="replace")


def as_shown(session, asked):
    """A question as the page needs it, and how far the rater is."""
    knobs = session.knobs
    found = {"done": len(session.answered), "left": len(session.left), "last": session.last()}
    if asked is None:
        return found | {"question": None}
    shown = {"name": asked.name, "kind": asked.kind, "prompt": asked.prompt}
    shown["texts"] = [pieces(text) for text in asked.responses]
    if asked.kind == "critique":
        shown["levels"] = knobs.levels
    if asked.kind == "language":
        shown["grammar"] = grammar()
    if asked.kind == "trace":
        shown["feature"] = feature_of(asked, knobs)
    if asked.kind == "proxy":
        names = list(FEATURES)
        shown |= {"features": names, "values": standardised(names, asked.responses).tolist()}
    return found | {"question": shown}


WIDE = "\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff"  # scripts that set no spaces between words
PIECE = re.compile(rf"\s*(?:[{WIDE}]|[^\s{WIDE}]+)|\s+\Z")


def pieces(text):
    """A text in words, each with the space before it: what can be clicked on, and streams. A single
    word comes in letters, as those of the toy language do."""
    found = PIECE.findall(text)
    return found if len(found) > 1 else list(text) or [text]


def revealed(session, entry):
    """Where the texts of an answer came from, in the order in which they stood."""
    if entry is None or not session.knobs.reveal:
        return []
    sources = entry.get("sources", [])
    if "order" in entry:
        sources = [sources[entry["order"].index(i)] for i in range(len(sources))]
    return sources
