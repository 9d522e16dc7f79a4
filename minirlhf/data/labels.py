"""Labels: what a person said of texts, in one of eleven kinds, one JSON object a line.

    {"version": 1, "kind": "comparison", "prompt": "", "responses": ["a", "b"], "ranking": [0, 1]}

| kind | keys besides prompt | what it says |
|---|---|---|
| critique | response, level, of | the response is at this of so many levels, 0 the worst |
| comparison | responses, ranking | indices best first; those in one list are tied |
| | responses, best | this one is the best of them, of the others nothing is said |
| intertemporal | response, curve | [[characters read, how good it is so far, 0 to 1], ...] |
| proxy | responses, weights, others | these weights of features would be a good reward, of all |
| social | response, reaction | frown, neutral or smile |
| improvement | response, improved | the improved text is better than the response |
| language | response, others, utterance, grammar | "more X" or "less X" said of the response |
| estop | response, stop | stopped after so many characters; null: it ran to its end |
| importance | as critique or comparison, marks | of each response the [start, end) that mattered |
| trace | responses, feature | X rises from each response to the next |
| similarity | responses, odd | this one of three is least like the others |

A comparison may say `"both_bad": true`, and one of two responses `"p": 0.8`, how sure it is that
the first is better. All further keys are kept: rater, seconds, reason, and so
on. Kinds: Kaufmann et al. 2023, as Table 3 of arXiv 2503.06072 sorts them; KINDS has its axes.
"""

from typing import NamedTuple

from minirlhf.engine.cli import UserError
from minirlhf.engine.files import shown

VERSION = 1
AXES = ("granularity", "involvement", "arity", "abstraction", "intent", "explicitness")
KINDS = {  # Table 3; "" where it gives none
    "critique": ("", "observed", "single", "", "evaluative", "explicit"),
    "comparison": ("", "observed", "multiple", "", "evaluative", "explicit"),
    "intertemporal": ("segment", "observed", "single", "", "evaluative", "explicit"),
    "proxy": ("episode", "observed", "", "feature", "descriptive", "explicit"),
    "social": ("segment", "observed", "single", "instance", "literal", "implicit"),
    "improvement": ("episode", "co-generative", "single", "instance", "", ""),
    "language": ("", "observed", "single", "", "descriptive", "explicit"),
    "estop": ("episode", "observed", "single", "instance", "literal", "implicit"),
    "importance": ("", "observed", "", "", "descriptive", "explicit"),
    "trace": ("segment", "active", "single", "instance", "descriptive", "explicit"),
    "similarity": ("", "observed", "ternary", "", "descriptive", "explicit"),
}
REACTIONS = ("frown", "neutral", "smile")
TEXTS = {  # the keys of texts, which in this order are `responses`
    "critique": ("response",), "comparison": ("responses",), "intertemporal": ("response",),
    "proxy": ("responses",), "social": ("response",), "improvement": ("response", "improved"),
    "language": ("response", "others"), "estop": ("response",), "trace": ("responses",),
    "similarity": ("responses",),
}  # fmt: skip
COMPARED = ("ranking", "best", "both_bad")
SAID = {  # the keys, besides texts, that are read of each kind; others are kept
    "critique": ("level", "of"),
    "comparison": (*COMPARED, "p"),
    "intertemporal": ("curve",),
    "proxy": ("weights", "others"),
    "social": ("reaction",),
    "improvement": (),
    "language": ("utterance", "grammar"),
    "estop": ("stop",),
    "importance": ("level", "of", *COMPARED, "marks"),
    "trace": ("feature",),
    "similarity": ("odd",),
}


class Label(NamedTuple):
    where: str
    kind: str
    prompt: str
    responses: list  # all texts of the record: response, improved, responses, others
    said: dict  # the kind's own keys
    meta: dict  # all other keys
    items: tuple = ()  # the places of the responses among stored ones, where there are any


def is_label(entry):
    """Whether an entry of a file is meant as one of these, and not as a plain record."""
    return isinstance(entry, dict) and "kind" in entry and "version" in entry


def parse_label(entry, where):
    """The Label of a dict. Raises UserError that says what is wrong with it."""
    if entry["version"] != VERSION:
        raise UserError(f"{where}: version {shown(entry['version'])}, expected {VERSION}")
    kind = entry["kind"]
    if not isinstance(kind, str) or kind not in KINDS:
        raise UserError(f"{where}: kind {shown(kind)}, expected one of {', '.join(KINDS)}")
    prompt = entry.get("prompt", "")
    if not isinstance(prompt, str):
        raise UserError(f"{where}: prompt: expected a text, found {shown(prompt)}")
    keys, responses = text_keys(kind, entry), []
    for key in keys:
        if key not in entry:
            raise UserError(f"{where}: {kind}: expected {key}")
        responses += texts_at(entry[key], key, where)
    said = {key: entry[key] for key in SAID[kind] if key in entry}
    known = {"version", "kind", "prompt", *keys, *SAID[kind]}
    meta = {key: value for key, value in entry.items() if key not in known}
    label = Label(where, kind, prompt, responses, said, meta)
    CHECKS[kind](label)
    return label


def text_keys(kind, said):
    """The keys of a kind's texts; of importance labels those of what was marked."""
    if kind == "importance":
        return TEXTS["critique" if "level" in said else "comparison"]
    return TEXTS[kind]


def texts_at(value, key, where):
    one = key in ("response", "improved")
    texts = [value] if one else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise UserError(f"{where}: {key}: expected {'a text' if one else 'texts'}")
    return texts


def as_entry(label):
    """The dict of a Label: parse_label gives the Label again."""
    entry = {"version": VERSION, "kind": label.kind, "prompt": label.prompt}
    texts = list(label.responses)
    for key in text_keys(label.kind, label.said):
        entry[key] = texts.pop(0) if key in ("response", "improved") else texts
    return entry | label.said | label.meta


def rankings(label):
    """What a label says of its responses as comparisons: lists of indices, best first."""
    if label.kind == "improvement":
        return [[1, 0]]
    said = label.said
    if "best" in said:
        others = [i for i in range(len(label.responses)) if i != said["best"]]
        return [[said["best"], i] for i in others]
    tiers = [tier if isinstance(tier, list) else [tier] for tier in said.get("ranking", [])]
    if all(len(tier) == 1 for tier in tiers):
        return [[i for (i,) in tiers]] if tiers else []
    found = []
    for place, better in enumerate(tiers):
        for worse in tiers[place + 1 :]:
            found += [[i, j] for i in better for j in worse]
    return found


# What each kind has to say


def expect(holds, label, what):
    if not holds:
        raise UserError(f"{label.where}: {label.kind}: expected {what}")


def critique(label):
    expect_texts(label, 1)
    level, of = label.said.get("level"), label.said.get("of")
    expect(type(of) is int and 2 <= of <= 100, label, "of, how many levels there are, 2 to 100")
    expect(type(level) is int and 0 <= level < of, label, f"level from 0 to {of - 1}")


def comparison(label):
    n, said = len(label.responses), label.said
    expect(n >= 2, label, "at least 2 responses")
    expect(len(set(label.responses)) == n, label, "responses that differ")
    expect(("best" in said) != ("ranking" in said), label, "ranking, or best")
    expect(type(said.get("both_bad", False)) is bool, label, "both_bad true or false")
    if "best" in said:
        return expect(is_index(said["best"], n), label, f"best from 0 to {n - 1}")
    order = said["ranking"] if isinstance(said["ranking"], list) else []
    flat = []
    for tier in order:
        flat += tier if isinstance(tier, list) else [tier]
    whole = all(type(i) is int for i in flat) and sorted(flat) == list(range(n))
    expect(whole and [] not in order, label, f"ranking of the indices 0..{n - 1}, best first")
    chance = said.get("p", 0.5)
    two = is_number(chance) and 0 <= chance <= 1 and ("p" not in said or n == 2)
    expect(two, label, "p, of 2 responses, from 0 to 1")


def intertemporal(label):
    expect_texts(label, 1)
    curve = label.said.get("curve")
    pairs = isinstance(curve, list) and all(isinstance(p, list) and len(p) == 2 for p in curve)
    expect(pairs and len(curve) >= 2, label, "curve, a list of [characters, value], 2 or more")
    length = len(label.responses[0])
    for end, value in curve:
        expect(type(end) is int and 0 <= end <= length, label, f"characters from 0 to {length}")
        expect(is_number(value) and 0 <= value <= 1, label, "values from 0 to 1")
    ends = [end for end, _ in curve]
    expect(sorted(set(ends)) == ends, label, "characters that rise along the curve")


def proxy(label):
    expect(len(label.responses) >= 2, label, "at least 2 responses to choose from")
    others = label.said.get("others")
    expect(isinstance(others, list) and others, label, "others, the weights not chosen, a list")
    for weights in (label.said.get("weights"), *others):
        known = isinstance(weights, dict) and weights and all(map(is_number, weights.values()))
        expect(known, label, "weights, and others, as objects of {feature: number}")


def social(label):
    expect_texts(label, 1)
    expect(label.said.get("reaction") in REACTIONS, label, f"reaction: {', '.join(REACTIONS)}")


def improvement(label):
    expect_texts(label, 2)
    expect(label.responses[0] != label.responses[1], label, "an improved text that differs")


def language(label):
    expect(len(label.responses) >= 2, label, "response, and others it could have been")
    grammar, utterance = label.said.get("grammar"), label.said.get("utterance")
    words = isinstance(grammar, list) and all(isinstance(text, str) for text in grammar)
    expect(words and len(set(grammar)) >= 2, label, "grammar, all that could be said, 2 or more")
    expect(utterance in grammar, label, "an utterance of the grammar")
    known = all(text.startswith(("more ", "less ")) for text in grammar)
    expect(known, label, 'utterances like "more FEATURE" and "less FEATURE"')


def estop(label):
    expect_texts(label, 1)
    stop, length = label.said.get("stop", 0), len(label.responses[0])
    expect("stop" in label.said, label, "stop, null where it ran to its end")
    fits = stop is None or (type(stop) is int and 0 <= stop <= length)
    expect(fits, label, f"stop from 0 to {length}, or null")


def importance(label):
    (comparison if "level" not in label.said else critique)(label)
    marks = label.said.get("marks")
    each = isinstance(marks, list) and len(marks) == len(label.responses)
    expect(each, label, "marks, a list of [start, end] for each response")
    for spans, text in zip(marks, label.responses, strict=True):
        for span in spans if isinstance(spans, list) else [None]:
            two = isinstance(span, list) and len(span) == 2 and all(type(i) is int for i in span)
            inside = two and 0 <= span[0] < span[1] <= len(text)
            expect(inside, label, f"[start, end] within the {len(text)} characters")


def trace(label):
    expect(len(label.responses) >= 2, label, "at least 2 responses along which a feature rises")
    feature = label.said.get("feature")
    expect(isinstance(feature, str) and feature, label, "feature, its name")


def similarity(label):
    expect_texts(label, 3)
    expect(is_index(label.said.get("odd"), 3), label, "odd from 0 to 2")


def expect_texts(label, n):
    expect(len(label.responses) == n, label, f"{n} response{'s' * (n > 1)}")


def is_index(value, n):
    return type(value) is int and 0 <= value < n


def is_number(value):
    return type(value) in (int, float) and abs(value) < 1e15


CHECKS = {
    "critique": critique, "comparison": comparison, "intertemporal": intertemporal, "proxy": proxy,
    "social": social, "improvement": improvement, "language": language, "estop": estop,
    "importance": importance, "trace": trace, "similarity": similarity,
}  # fmt: skip
