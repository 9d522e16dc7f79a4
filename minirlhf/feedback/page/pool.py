"""What can be asked: the texts of runs and files, and the questions made of them.

A question is one kind of feedback about a few responses to one prompt. Its number, order of texts
and name follow from the pool and the seed alone, so that a server that starts again asks on where
it was, and an answer finds its question. No torch is needed here.

Left out: questions about texts of different prompts; samples drawn while the server starts, except
where a run has none.
"""

import hashlib
import itertools
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from minirlhf import data
from minirlhf.data.labels import KINDS
from minirlhf.engine.cli import UserError
from minirlhf.engine.files import file_errors, read_lines

MOST = 20_000  # questions
ONE = ("critique", "intertemporal", "social", "improvement", "estop")  # kinds about a single text


class Group(NamedTuple):
    """Different responses to one prompt, and where each comes from."""

    prompt: str
    responses: list
    sources: list  # the name of a run, or ""


class Question(NamedTuple):
    name: str  # the same for the same kind, prompt and texts
    kind: str
    prompt: str
    responses: list  # as they are shown
    sources: list
    sides: list  # the place of each shown response in its group
    again: str = ""  # the question that this one repeats


# Texts


def load_pool(sources, draw=None):
    """Groups of the texts of runs, or of files. Raises UserError where there are none.

    draw(run) gives {"prompt", "response"} sampled from a run's model, instead of its samples.jsonl.
    """
    named = []
    for source in sources:
        path = Path(source) / "samples.jsonl"
        with file_errors(source):
            found, is_run = path.is_file(), Path(source, "config.json").is_file()
        if draw and is_run:
            named += [(row["prompt"], row["response"], source) for row in draw(source)]
        elif found:
            named += of_samples(path, source, len(sources) > 1)
        else:
            named += of_feedback(source)
    if not named:
        raise UserError(f"{', '.join(sources)}: no texts to ask about")
    return grouped(named)


def grouped(named):
    """Groups of (prompt, response, source); of equal texts the first counts."""
    groups, seen = {}, set()
    for prompt, response, source in named:
        group = groups.setdefault(prompt, Group(prompt, [], []))
        if (prompt, response) not in seen:
            seen.add((prompt, response))
            group.responses.append(response)
            group.sources.append(source)
    return list(groups.values())


def of_samples(path, run, several):
    """(prompt, response, source) of a run's samples.jsonl, of several runs those after training."""
    found = []
    for where, entry in read_lines(path):
        if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str):
            raise UserError(f"{where}: expected an object with a prompt")
        names = {"before": f"{run} before", "after": run, "response": run}
        for key, name in names.items():
            if isinstance(entry.get(key), str) and not (several and key == "before"):
                found.append((entry["prompt"], entry[key], name))
    return found


def of_feedback(source):
    """(prompt, response, "") of anything that is read as feedback."""
    feedback = data.load_feedback(source)
    found = []
    for items in (feedback.train, feedback.test):
        if items.columns is not None:
            raise UserError(f"{source}: prompts without answers: there is nothing to ask about")
        found += zip(items.prompts, items.responses, itertools.repeat(""))
    return found


# Questions


def needed(kind, n):
    """(least, most) responses of a question of a kind."""
    if kind in ONE:
        return 1, 1
    if kind == "similarity":
        return 3, 3
    if kind == "importance":
        return 2, 2
    return (2, max(3, n)) if kind in ("trace", "proxy", "language") else (2, n)


def questions(groups, kinds, n, seed):
    """All Questions, shuffled, those of each kind in turn.

    Of each group there are all combinations, or as many as it has responses where that is less; in
    all there are MOST, more than anybody answers. Raises UserError for a kind that no prompt has
    enough responses for.
    """
    rng = np.random.default_rng(seed)
    by_kind = []
    for kind in kinds:
        least, most = needed(kind, n)
        found = []
        for group in groups:
            size = min(most, len(group.responses))
            if size >= least:
                found += [(group, places) for places in sets(group, size, rng)]
        if not found:
            few = f"no prompt has the {least} different responses that it needs"
            fix = "--samples 4 draws some from a run's model, or give another run, too"
            raise UserError(f"--kind {kind}: {few}: {fix}")
        order = rng.permutation(len(found))[: MOST // len(kinds)]
        by_kind.append([question(kind, *found[i], seed) for i in order])
    return [q for row in itertools.zip_longest(*by_kind) for q in row if q is not None]


def sets(group, size, rng):
    """Places of `size` responses: all combinations of a small group, else random ones."""
    count = len(group.responses)
    if math.comb(count, size) <= max(count, 20):
        return list(itertools.combinations(range(count), size))
    found = set()
    while len(found) < count:
        order = rng.permutation(count).tolist()
        parts = [order[i : i + size] for i in range(0, count - size + 1, size)]
        found.update(tuple(sorted(part)) for part in parts)
    return sorted(found)


def question(kind, group, places, seed):
    """The Question about these responses, in a random order that its name decides."""
    texts = [kind, group.prompt, *(group.responses[i] for i in places)]
    content = hashlib.sha256()
    for text in texts:
        raw = text.encode("utf-8", "surrogatepass")
        content.update(b"%d:" % len(raw) + raw)
    name = content.hexdigest()[:20]

    def drawn(place):  # a generator of NumPy's for each would take seconds for 10,000 questions
        return hashlib.sha256(f"{seed} {name} {place}".encode()).digest()

    sides = sorted(places, key=drawn)
    return shown_in(Question(name, kind, group.prompt, [], [], []), group, sides)


def shown_in(asked, group, sides):
    responses = [group.responses[i] for i in sides]
    sources = [group.sources[i] for i in sides]
    return asked._replace(responses=responses, sources=sources, sides=list(sides))


def again(asked):
    """The same question with its texts the other way round, to see whether a person agrees with
    themselves."""
    turned = {key: getattr(asked, key)[::-1] for key in ("responses", "sources", "sides")}
    return asked._replace(name=f"{asked.name}-again", again=asked.name, **turned)


def choose(left, state, rng):
    """Which of the questions that are left to ask next: a place in `left`, a list of indices.

    By --ask, if it was given; else uniform, or, where a model has been trained on the answers so
    far, the one whose answer it is least certain of: state.margins is {index: how sure it is}.
    """
    if state.asker:
        return state.asker.choose(left, rng)
    if state.margins:
        sure = [state.margins.get(i, math.inf) for i in left]
        if min(sure) < math.inf:
            return int(np.argmin(sure))
    return int(rng.integers(len(left)))


def parse_kinds(text):
    """The kinds of --kind, separated by commas, or `all`. Raises UserError."""
    kinds = list(KINDS) if text == "all" else [kind.strip() for kind in text.split(",")]
    for kind in kinds:
        if kind not in KINDS:
            raise UserError(f"--kind {kind}: expected all, or some of {', '.join(KINDS)}")
    return list(dict.fromkeys(kinds))
