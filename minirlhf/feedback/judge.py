"""An LLM as a judge: which of two answers is better, how good one is, and under which principle.

Asked which is better it says "1" or "2", and P is the softmax of the two tokens' log-probs. Judges
favour a place (position bias), so each pair is asked in both orders and the two are averaged (Lee
et al. 2023, arXiv 2309.00267). Asked for a score it says 1 to 10, and the score is the mean of that
distribution, from -1 to 1: direct RLAIF of the same paper. Under principles it chooses (A) or (B),
averaged over them: Constitutional AI (Bai et al. 2022, arXiv 2212.08073).

Left out: worked examples in the question; answers that quote the question's own form are not told
from it.
"""

import math
import re
from pathlib import Path

import numpy as np

from minirlhf.engine.cli import UserError
from minirlhf.engine.files import file_errors
from minirlhf.feedback.endpoint import Endpoint, read_settings

PREAMBLE = (
    "A good response fits its prompt, is well written, and is helpful and honest. You are given a "
    "prompt and responses to it, and judge how good they are."
)
PRINCIPLES = (
    "A response should be helpful, honest and harmless.",
    "A response should not be rude, hateful, insulting or cruel.",
    "A response should claim nothing that is not true.",
    "A response should be clear and well written.",
)
SHORT = {"temperature": 0, "max_tokens": 4, "logprobs": True, "top_logprobs": 20}
LONG = {"temperature": 0, "max_tokens": 256}
CLAMP = 0.4, 0.6  # of P under principles after a rationale, which makes a judge too sure of itself


class Judge:
    """A judge behind an Endpoint, and what is known of its judgements so far."""

    def __init__(self, source):
        self.settings = read_settings(source)
        self.principles = read_principles(self.settings.principles)
        self.endpoint = Endpoint(self.settings)
        self.sums = np.zeros(3)  # of pairs: how many; P(the first shown), and whether the place
        # decides, each summed
        self.undecided = self.bare = 0  # replies that name no option; that have no log-probs

    def prefer(self, prompts, a, b):
        """(n,) P(a over b): both orders averaged; under principles over these, too."""
        n = len(prompts)
        twice = [*prompts, *prompts], [*a, *b], [*b, *a]
        first = self.first_shown(*twice)  # (2n,)
        forth, back = first[:n], first[n:]
        p = (forth + 1 - back) / 2
        if self.principles and self.settings.rationale:
            p = p.clip(*CLAMP)
        decided = (forth - 0.5) * (back - 0.5) > 0  # the first one wins, or loses, both times
        self.sums += [n, first.sum() / 2, decided.sum()]
        return p

    def first_shown(self, prompts, first, second):
        """(n,) P(the first), as the judge says in this order."""
        rows = list(zip(prompts, first, second, strict=True))
        if not self.principles:
            questions = [comparison(*row) for row in rows]
            return self.choose(questions, ("1", "2"))
        shares = []
        for principle in self.principles:
            questions = [multiple_choice(principle, *row) for row in rows]
            shares.append(self.choose(questions, ("A", "B")))
        return np.mean(shares, axis=0)

    def choose(self, questions, options):
        """(n,) P(the first of two options)."""
        ending = f"Answer with {options[0]} or {options[1]} alone."
        answers = self.ask(questions, ending)
        chances = [chance_of_first(answer, options) for answer in answers]
        return self.known(chances, 0.5)

    def score(self, prompts, responses):
        """(n,) the expected score of 1 to 10, as -1 to 1."""
        rows = zip(prompts, responses, strict=True)
        answers = self.ask([rating(*row) for row in rows], "Answer with the number alone.")
        scores = self.known([expected_score(answer) for answer in answers], 5.5)
        return (scores - 1) * 2 / 9 - 1

    def ask(self, questions, ending):
        """Answers of few tokens; with a rationale before them, if that is wanted."""
        talks = [[said("user", f"{question}\n{ending}")] for question in questions]
        if self.settings.rationale:
            why = "Compare and weigh in a few sentences; say what is better at the end."
            talks = [[said("user", f"{question}\n{why}")] for question in questions]
            reasons = self.endpoint.chat([{"messages": talk} | LONG for talk in talks])
            for talk, reason in zip(talks, reasons, strict=True):
                talk += [said("assistant", reason.text), said("user", f"So? {ending}")]
        answers = self.endpoint.chat([{"messages": talk} | SHORT for talk in talks])
        bare = sum(not answer.top for answer in answers)
        if bare and not self.bare:
            print("note: the judge gives no log-probs: what its replies say decides, 1 or 0")
        self.bare += bare
        return answers

    def known(self, values, middle):
        """An array, the middle where a reply names no option."""
        self.undecided += values.count(None)
        return np.array([middle if value is None else value for value in values])

    def write(self, talks):
        """Free replies to lists of messages, as texts."""
        answers = self.endpoint.chat([{"messages": talk} | LONG for talk in talks])
        return [answer.text.strip() for answer in answers]

    def report(self):
        """What it did, in a line."""
        endpoint = self.endpoint
        parts = [f"{endpoint.asked} requests, {endpoint.found} answers out of the cache"]
        pairs, first, decided = self.sums
        if pairs:
            bias = f"position bias {first / pairs - 0.5:+.3f} before both orders are averaged"
            parts.append(f"{bias}; the place decides {decided / pairs:.0%} of {pairs:.0f} pairs")
        if self.undecided:
            parts.append(f"{self.undecided} replies name no option, and count as the middle")
        return "judge: " + "; ".join(parts)


def read_principles(name):
    """The lines of a file; those above for `default`; () for none."""
    if name in ("", "default"):
        return PRINCIPLES if name else ()
    with file_errors(name):
        lines = Path(name).read_text(encoding="utf-8", errors="replace").splitlines()
    principles = [line.strip() for line in lines if line.strip()]
    if not principles:
        raise UserError(f"{name}: no principles: expected one a line")
    return principles


# What is asked


def said(role, content):
    return {"role": role, "content": content}


def asked(prompt):
    return f"Prompt: {prompt or '(none: any text will do)'}"


def comparison(prompt, first, second):
    parts = [PREAMBLE, asked(prompt), f"Response 1: {first}", f"Response 2: {second}"]
    return "\n\n".join([*parts, "Which response is better, 1 or 2?"])


def multiple_choice(principle, prompt, first, second):
    parts = [f"Principle: {principle}", asked(prompt), f"(A) {first}", f"(B) {second}"]
    return "\n\n".join([*parts, "Which response follows the principle better, (A) or (B)?"])


def rating(prompt, response):
    parts = [PREAMBLE, asked(prompt), f"Response: {response}"]
    return "\n\n".join([*parts, "How good is the response, from 1 (bad) to 10 (excellent)?"])


# What the answers say


def chance_of_first(answer, options):
    """P(the first of two options): the softmax of their log-probs where the reply names one of
    them. A token that is an option but for spaces and signs is one; an option that is not listed
    is as likely as it can be at most. Without log-probs the text decides; None: it names neither.
    """
    place = place_of(answer.top, options)
    if place is None:
        named = re.findall("|".join(rf"\b{option}\b" for option in options), answer.text)
        return float(named[0] == options[0]) if named else None
    chances = chances_at(answer.top[place])
    first, second = (chances.get(option) or unlisted(answer.top[place]) for option in options)
    return first / (first + second)


def expected_score(answer):
    """The mean of the scores 1 to 10 under their chances where the reply names one; None: it names
    none. Where "10" is two tokens, a "1" is 10 as far as a "0" follows: which is known only if it
    is the likeliest token, else it counts as 1."""
    scores = [str(i) for i in range(1, 11)]
    place = place_of(answer.top, scores)
    if place is None:
        named = re.search(r"\b(10|[1-9])\b", answer.text)
        return float(named[0]) if named else None
    chances = chances_at(answer.top[place])
    p = np.array([chances.get(score, 0.0) for score in scores])
    following = answer.top[place + 1 : place + 2]
    if p.argmax() == 0 and following:
        zero = sum(math.exp(v) for token, v in following[0].items() if token.startswith("0"))
        p[9] += p[0] * min(1, zero)
        p[0] *= 1 - min(1, zero)
    return float(p @ np.arange(1, 11) / p.sum()) if p.sum() else None


def place_of(top, options):
    """The first token of a reply that is an option, as it is the likeliest there; else the first
    of all, if options are listed there; else None."""
    for place, tokens in enumerate(top):
        if tokens and bare(max(tokens, key=tokens.get)) in options:
            return place
    listed = top and chances_at(top[0]).keys() & set(options)
    return 0 if listed else None


def chances_at(tokens):
    """{token without spaces and signs: its chance}, of {token: log-prob}."""
    found = {}
    for token, logprob in tokens.items():
        found[bare(token)] = found.get(bare(token), 0.0) + math.exp(logprob)
    return found


def bare(token):
    return re.sub(r"\W+", "", token)


def unlisted(tokens):
    """The most that a token can have which is not among the likeliest: no more than the least of
    these, nor than what they leave."""
    chances = [math.exp(logprob) for logprob in tokens.values()]
    return max(1e-12, min(min(chances), 1 - sum(chances)))
