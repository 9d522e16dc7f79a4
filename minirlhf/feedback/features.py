"""What people may name of a text: a small library of features, each a number.

words, sentences, exclamations, questions, capitals, digits: how many there are; variety: the share
of words that differ. "word:good" counts a word, in any case; "text:oo" a run of characters.
"""

import re
from functools import cache

import numpy as np

from minirlhf.engine.cli import UserError
from minirlhf.engine.files import shown


def words(text):
    return re.findall(r"\w+", text.lower())


def variety(text):
    found = words(text)
    return len(set(found)) / max(1, len(found))


FEATURES = {
    "words": lambda text: len(words(text)),
    "sentences": lambda text: len(re.findall(r"[^.!?]*\w[^.!?]*", text)),
    "exclamations": lambda text: text.count("!"),
    "questions": lambda text: text.count("?"),
    "capitals": lambda text: sum(c.isupper() for c in text),
    "digits": lambda text: sum(c.isdigit() for c in text),
    "variety": variety,
}


def expect_feature(name, where):
    """Raises UserError for a name that is none."""
    key, _, rest = name.partition(":")
    if name not in FEATURES and not (key in ("word", "text") and rest):
        known = ", ".join(FEATURES)
        raise UserError(f"{where}: feature {shown(name)}, expected {known}, word:... or text:...")


@cache
def feature(name, text):
    """The number of a text. Names are those of expect_feature."""
    key, _, rest = name.partition(":")
    if key == "word":
        return float(words(text).count(rest.lower()))
    if key == "text":
        return float(text.count(rest))
    return float(FEATURES[name](text))


def standardised(names, texts):
    """(N, F) features of texts, each of mean 0 and deviation 1 among them, so that the weights of
    different ones compare; 0 where all are alike."""
    values = np.array([[feature(name, text) for name in names] for text in texts])
    spread = values.std(0)
    return (values - values.mean(0)) / np.where(spread > 0, spread, 1)
