"""Simulated people: each kind of feedback, from a reward that is known.

Whoever speaks is as rational as `beta`, says something else than was meant in a share `flip` of all
cases, and favours what stands first by `first`. What each kind is to say is how choice.py takes it.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch

from minirlhf.data import parse_label
from minirlhf.engine.cli import UserError
from minirlhf.feedback.choice import proxy_weights, utterance_weights
from minirlhf.feedback.features import feature, standardised

FACES = ((0.7, 0.2, 0.1), (0.15, 0.7, 0.15), (0.1, 0.2, 0.7))  # P(frown, neutral, smile | level)


@dataclass
class Person:
    """reward(prompts, responses) -> numbers, of whole texts and of their beginnings."""

    reward: object
    beta: float = 1.0
    flip: float = 0.0  # share of answers that are others than meant
    first: float = 0.0  # how much the option that stands first is liked for that
    cuts: tuple = (-0.7, 0.7)  # of the reward, between the levels of a critique and of a face
    features: tuple = ("words", "variety")  # what proxies, utterances and traces speak of
    replacements: tuple = ()  # what a piece of a text may be replaced with
    faces: tuple = FACES
    queries: int = 0

    def ask(self, kind, prompt, responses, rng):
        """A data.Label of that kind on the responses, as many as the kind takes, by an rng of
        NumPy. Raises UserError for a kind that is none."""
        if kind not in ANSWERS:
            raise UserError(f"kind {kind}: expected one of {', '.join(ANSWERS)}")
        self.queries += 1
        said = ANSWERS[kind](self, prompt, responses, rng)
        return parse_label({"version": 1, "kind": kind, "prompt": prompt} | said, "simulated")

    def values(self, prompt, texts):
        return np.array(self.reward([prompt] * len(texts), list(texts)), dtype=float)

    def choose(self, values, rng):
        """The index of one of K values, by Boltzmann; or, flipped, any other."""
        values = np.array(values, dtype=float)
        values[0] += self.first
        chosen = int((self.beta * values + rng.gumbel(size=len(values))).argmax())
        return self.other(chosen, len(values), rng)

    def other(self, chosen, n, rng):
        """The index that was meant, or, in a share `flip` of cases, another of n."""
        if n < 2 or rng.random() >= self.flip:
            return chosen
        return int((chosen + rng.integers(1, n)) % n)

    def level(self, value, rng):
        """Which of the levels between the cuts, under logistic noise."""
        noisy = value + rng.logistic() / self.beta
        chosen = int(np.searchsorted(self.cuts, noisy))
        return self.other(chosen, len(self.cuts) + 1, rng)


def steps(text):
    """The ends of the pieces that a text is read in: words, or characters where it is one."""
    spaces = [i for i, c in enumerate(text) if i and c.isspace()]
    return [*spaces, len(text)] if spaces else list(range(1, len(text) + 1))


def critique(person, prompt, responses, rng):
    level = person.level(person.values(prompt, responses[:1])[0], rng)
    return {"response": responses[0], "level": level, "of": len(person.cuts) + 1}


def comparison(person, prompt, responses, rng):
    """A whole ranking: of Gumbel noise, so Plackett-Luce."""
    values = person.values(prompt, responses)
    values[0] += person.first
    order = (-person.beta * values - rng.gumbel(size=len(values))).argsort()
    if rng.random() < person.flip:
        order = order[::-1]
    return {"responses": responses, "ranking": order.tolist()}


def intertemporal(person, prompt, responses, rng):
    """How good it is so far, with logistic noise, drawn over its whole range from 0 to 1."""
    text = responses[0]
    ends = [0, *steps(text)]
    values = person.values(prompt, [text[:end] for end in ends])
    values += rng.logistic(size=len(values)) / person.beta
    curve = (values - values.min()) / max(1e-9, np.ptp(values))
    if rng.random() < person.flip:
        curve = 1 - curve
    points = [[end, round(float(c), 3)] for end, c in zip(ends, curve, strict=True)]
    return {"response": text, "curve": points}


def proxy(person, prompt, responses, rng, n=8):
    """One of n random weightings, by how good what it would have written is."""
    proxies = rng.normal(size=(n, len(person.features))).round(2)
    features = standardised(person.features, responses)
    written = proxy_weights(torch.tensor(features), torch.tensor(proxies)).numpy()
    chosen = person.choose(written @ person.values(prompt, responses), rng)
    named = [dict(zip(person.features, weights.tolist(), strict=True)) for weights in proxies]
    return {"responses": responses, "weights": named.pop(chosen), "others": named}


def social(person, prompt, responses, rng):
    """A level, and of it the face that is made."""
    level = person.level(person.values(prompt, responses[:1])[0], rng)
    reaction = ("frown", "neutral", "smile")[rng.choice(3, p=person.faces[level])]
    return {"response": responses[0], "reaction": reaction}


def improvement(person, prompt, responses, rng):
    """Of all texts with one piece replaced, by Boltzmann; nobody is asked to leave it."""
    text, edits = responses[0], []
    for start, end in zip([0, *steps(text)], steps(text), strict=False):
        piece = text[start:end]
        space = piece[: len(piece) - len(piece.lstrip())]
        edits += [text[:start] + space + new + text[end:] for new in person.replacements]
    edits = [edit for edit in dict.fromkeys(edits) if edit != text]
    if not edits:
        raise UserError("an improvement needs a text, and replacements for its pieces")
    chosen = person.choose(person.values(prompt, edits), rng)
    return {"response": text, "improved": edits[chosen]}


def language(person, prompt, responses, rng):
    """More or less of a feature, by how good the texts are on average that would have it."""
    grammar, worth = [], []
    values = person.values(prompt, responses)
    for name in person.features:
        counts = torch.tensor([feature(name, text) for text in responses], dtype=torch.float64)
        for direction in ("more", "less"):
            weights = utterance_weights(counts, counts[0], direction == "more")
            grammar.append(f"{direction} {name}")
            worth.append(weights.numpy() @ values)
    utterance = grammar[person.choose(worth, rng)]
    said = {"response": responses[0], "others": responses[1:]}
    return said | {"utterance": utterance, "grammar": grammar}


def estop(person, prompt, responses, rng):
    """One of all moments, by how good it is up to there; the last is to let it run."""
    ends = [0, *steps(responses[0])]
    chosen = person.choose(person.values(prompt, [responses[0][:end] for end in ends]), rng)
    return {"response": responses[0], "stop": ends[chosen] if chosen < len(ends) - 1 else None}


def importance(person, prompt, responses, rng, threshold=0.3):
    """A ranking, and of each text the pieces that move its reward by more than a threshold."""
    marks = []
    for text in responses:
        spans = []
        for start, end in zip([0, *steps(text)], steps(text), strict=False):
            whole, without = person.values(prompt, [text, text[:start] + text[end:]])
            matters = abs(whole - without) > threshold
            if matters != (rng.random() < person.flip):
                spans.append([start, end])
        marks.append(spans)
    steady = replace(person, flip=0.0)  # flips are those of marks
    return comparison(steady, prompt, responses, rng) | {"marks": marks}


def trace(person, prompt, responses, rng):
    """The responses sorted by a feature in which they differ, one of each value of it."""
    found = []
    for name in person.features:
        by_value = {feature(name, text): text for text in responses}
        if len(by_value) > 1:
            found.append((name, [by_value[value] for value in sorted(by_value)]))
    if not found:
        raise UserError(f"{len(responses)} responses that differ in no feature have no trace")
    name, rising = found[rng.integers(len(found))]
    return {"responses": rising, "feature": name}


def similarity(person, prompt, responses, rng):
    """Which of three is least like the others, by the squared distance of their features."""
    features = np.array([[feature(n, text) for n in person.features] for text in responses])
    squares = ((features[:, None] - features) ** 2).sum(2)
    alike = [-squares[1, 2], -squares[0, 2], -squares[0, 1]]
    return {"responses": responses, "odd": person.choose(alike, rng)}


ANSWERS = {
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
HOW_MANY = {
    "critique": 1,
    "intertemporal": 1,
    "social": 1,
    "improvement": 1,
    "estop": 1,
    "comparison": 2,
    "importance": 2,
    "similarity": 3,
    "trace": 6,
    "proxy": 8,
    "language": 8,
}
