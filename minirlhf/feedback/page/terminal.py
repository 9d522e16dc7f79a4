"""The page's questions in a terminal, for a server without a browser at hand.

A line is an answer. `u` takes the last one back, `s` skips, `q` ends; a line that begins with a
colon is the reason of the answer that follows. What was written is on the disk before the next
question is shown.

Left out: the learning and its figures; texts stream no slower than they print.
"""

import sys
import time

from minirlhf.engine.cli import UserError
from minirlhf.engine.terminal import printable
from minirlhf.feedback.features import FEATURES
from minirlhf.feedback.page.calls import pieces
from minirlhf.feedback.page.session import feature_of, grammar

HELP = "u undo, s skip, q quit, :TEXT a reason for the next answer"
TAB = "terminal"


def converse(session, lines=None, say=None):
    """Asks until nothing is left, or `q`, or the end of the input."""
    lines = sys.stdin if lines is None else lines
    say = say or show
    say(f"{len(session.left):,} questions; answers go to {session.knobs.out}\n{HELP}")
    asked, since, notes = present(session, say), time.monotonic(), {}
    for line in lines:
        said = line.strip()
        if said == "q" or asked is None and said != "u":
            break
        if said.startswith(":"):
            notes = {"reason": said[1:]}
            continue
        try:
            if said == "u":
                done = session.undo(TAB, session.last())
                say("taken back" if done else "there is nothing to take back")
            elif said == "s":
                session.skip(TAB, asked.name)
            else:
                answer = ANSWERS[asked.kind](asked, line.rstrip("\n"), session.knobs)
                session.answer(TAB, asked.name, answer, time.monotonic() - since, notes)
                reveal(session, asked, say)
        except (UserError, ValueError, IndexError) as e:
            wrong = str(e) if isinstance(e, UserError) else f"expected {asks(asked, session.knobs)}"
            say(f"not taken: {wrong}")
            continue
        asked, since, notes = present(session, say), time.monotonic(), {}
    say(f"{len(session.labels.entries):,} labels in {session.knobs.out}")


def show(text):
    print(printable(text, sys.stdout.encoding), flush=True)


def present(session, say):
    """Shows the next question, and returns it; None where there is none."""
    asked = session.ask(TAB)
    if asked is None:
        say("\nthat was all")
        return None
    say(f"\n[{len(session.answered)} answered, {len(session.left)} left] {asked.kind}")
    if asked.prompt:
        say(f"prompt: {asked.prompt}")
    numbered = asked.kind in ("intertemporal", "estop", "importance")
    for i, text in enumerate(asked.responses, 1):
        words = [f"{word}[{w}]" for w, word in enumerate(pieces(text), 1)]
        say(f"  {i}: {''.join(words) if numbered else text}")
    say(f"{asks(asked, session.knobs)}?")
    return asked


def reveal(session, asked, say):
    if session.knobs.reveal and any(asked.sources):
        say(", ".join(f"{i}: {source}" for i, source in enumerate(asked.sources, 1)))


def asks(asked, knobs):
    """What an answer of a kind looks like."""
    n = len(asked.responses)
    ranking = f"the numbers best first, = between equals (2=1 3); one number: the best of {n}"
    return {
        "critique": f"1 worst to {knobs.levels} best",
        "comparison": "1 or 2 is better, t tie, x both bad" if n == 2 else ranking,
        "intertemporal": "a digit 0 to 9 for each word, how good it is so far (5 5 7 2)",
        "proxy": f"weights of {', '.join(FEATURES)} (words=-1 variety=2)",
        "social": "1 frown, 2 neutral, 3 smile",
        "improvement": "the improved text",
        "language": f"more or less of {', '.join(FEATURES)} (less words), said of 1",
        "estop": "the number of the last good word; 0: stop at once; e: it may run to its end",
        "importance": "1, 2 or t, then the words that mattered (2 1:3 2:1)",
        "trace": f"the numbers, least {feature_of(asked, knobs)} first",
        "similarity": "the number of the odd one",
    }[asked.kind]


# An answer's line as what is said. Raise ValueError or IndexError for any other


def number_in(text, n):
    """An index from 0, of a number from 1 to n."""
    if not 1 <= int(text) <= n:
        raise ValueError
    return int(text) - 1


def of_pair(text):
    return {"ranking": {"1": [0, 1], "2": [1, 0], "t": [[0, 1]]}[text]}


def comparison(asked, line, _):
    n, said = len(asked.responses), line.strip()
    if n == 2:
        both_bad = {"ranking": [[0, 1]], "both_bad": True}
        return both_bad if said == "x" else expect(of_pair, said)
    tiers = [[number_in(i, n) for i in tier.split("=")] for tier in said.split()]
    if len(tiers) == 1 == len(tiers[0]):
        return {"best": tiers[0][0]}
    return {"ranking": [tier if len(tier) > 1 else tier[0] for tier in tiers]}


def expect(read, text):
    try:
        return read(text)
    except KeyError:
        raise ValueError from None


def critique(asked, line, knobs):
    return {"level": number_in(line, knobs.levels)}


def intertemporal(asked, line, _):
    words, end, curve = pieces(asked.responses[0]), 0, []
    for word, digit in zip(words, line.split(), strict=True):
        end += len(word)
        curve.append([end, number_in(str(int(digit) + 1), 10) / 9])
    return {"curve": curve if len(curve) > 1 else [[0, 0.5], *curve]}


def proxy(asked, line, _):
    weights = dict.fromkeys(FEATURES, 0.0)
    for part in line.split():
        name, value = part.split("=")
        if name not in FEATURES:
            raise ValueError
        weights[name] = float(value)
    return {"weights": weights}


def social(asked, line, _):
    return {"reaction": ("frown", "neutral", "smile")[number_in(line, 3)]}


def improvement(asked, line, _):
    return {"improved": line}


def language(asked, line, _):
    said = " ".join(line.split())
    if said not in grammar():
        raise ValueError
    return {"utterance": said}


def estop(asked, line, _):
    words = pieces(asked.responses[0])
    if line.strip() == "e":
        return {"stop": None}
    kept = 0 if line.strip() == "0" else number_in(line, len(words)) + 1
    return {"stop": len("".join(words[:kept]))}


def importance(asked, line, _):
    choice, *words = line.split()
    marks = [[] for _ in asked.responses]
    for word in words:
        text, place = word.split(":")
        k = number_in(text, len(marks))
        parts = pieces(asked.responses[k])
        start = len("".join(parts[: number_in(place, len(parts))]))
        part = parts[int(place) - 1]
        blank = len(part) - len(part.lstrip())
        marks[k].append([start + blank, start + len(part)])
    return expect(of_pair, choice) | {"marks": [sorted(spans) for spans in marks]}


def trace(asked, line, _):
    return {"order": [number_in(i, len(asked.responses)) for i in line.split()]}


def similarity(asked, line, _):
    return {"odd": number_in(line, 3)}


ANSWERS = {
    "critique": critique, "comparison": comparison, "intertemporal": intertemporal, "proxy": proxy,
    "social": social, "improvement": improvement, "language": language, "estop": estop,
    "importance": importance, "trace": trace, "similarity": similarity,
}  # fmt: skip
