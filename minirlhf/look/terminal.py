"""Text of models and tables of numbers on a terminal, in a pipe or in a file.

What a model wrote is not trusted: whatever would move the cursor, turn the direction of writing or
be seen by nobody stands as its escape, as in \\x1b. Lines are filled by the columns that a terminal
gives a character, two for wide ones. Tokens are coloured by a number, the log-ratio to a reference;
without colour a second line has a mark under each.
"""

import codecs
import os
import shutil
import sys
import textwrap
import unicodedata
from itertools import groupby
from typing import NamedTuple

from minirlhf.engine.terminal import code, printable

# Characters


def escaped(text):
    """The text with what is not printable, here or by this output's encoding, as escapes."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    text = text.replace("\n", "\\n").replace("\t", "\\t")
    return printable("".join(code(c) if unprintable(c) else c for c in text), encoding)


def unprintable(c):
    """Controls, formats, surrogates, what has no meaning, and what changes its neighbour's width:
    variation selectors and skin tones."""
    strange = unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
    return strange or "\ufe00" <= c <= "\ufe0f" or "\U0001f3fb" <= c <= "\U0001f3ff"


def width(text):
    """The columns that a text takes."""
    return sum(map(width_of, text))


def width_of(c):
    if unicodedata.category(c) in ("Mn", "Me") or "\u1160" <= c <= "\u11ff":
        return 0  # on the character before it
    return 2 if unicodedata.east_asian_width(c) in "WF" else 1


def cut(text, columns):
    """The text in at most so many columns; where it is cut, dots stand in the last two."""
    if width(text) <= columns:
        return text
    dots = ".."[: max(0, columns)]
    while width(text) > columns - len(dots) and text:
        text = text[:-1]
    return text + dots


def padded(text, columns):
    """The text in just so many columns, cut or filled up on its right."""
    text = cut(text, columns)
    return text + " " * (columns - width(text))


def columns():
    """Of the terminal, 100 at most; 80 where there is none."""
    if not sys.stdout.isatty():
        return 80
    return min(100, shutil.get_terminal_size((80, 24)).columns)


def has_colour():
    """A terminal that is not said to have none (no-color.org)."""
    dumb = os.environ.get("TERM") == "dumb" or os.environ.get("NO_COLOR")
    return sys.stdout.isatty() and not dumb


# Tokens


class Piece(NamedTuple):
    """A token, or several that share a character, by the text that one sees."""

    text: str
    logprob: float = 0.0
    ratio: float | None = None  # log pi - log pi_ref, where there is a reference


def pieces_of(ids, logprobs, ratios, tokenizer):
    """The Pieces of a response. A character may be the end of several tokens, whose numbers add up;
    EOS shows as itself."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    pieces, logprob, ratio = [], 0.0, 0.0
    for i, token in enumerate(ids):
        logprob += logprobs[i]
        ratio += ratios[i] if ratios else 0.0
        ends = token == tokenizer.eos
        text = decoder.decode(bytes_of(token, tokenizer), final=ends or i == len(ids) - 1)
        text += "[EOS]" if ends else ""
        if text:
            pieces.append(Piece(text, logprob, ratio if ratios else None))
            logprob, ratio = 0.0, 0.0
    return pieces


def bytes_of(token, tokenizer):
    """Of one id; none of EOS and of an id that has no text."""
    if token == tokenizer.eos:
        return b""
    try:
        return tokenizer.encoding.decode_single_token_bytes(token)
    except KeyError:
        return b""


MARKS = "=- +#"  # of the five levels
COLOURS = "30;45", "35", "", "36", "30;46"  # black on magenta, magenta, none, cyan, black on cyan
LEGEND = "+ likelier than in the base model by 1 to 3 nats, # by more; - and = less likely"


def level_of(ratio):
    """0 to 4: less likely than in the reference by 3 nats, by 1, alike, likelier by 1, by 3."""
    if ratio is None:
        return 2
    return 2 + (ratio > 1) + (ratio > 3) - (ratio < -1) - (ratio < -3)


def filled(pieces, room):
    """Lines of at most `room` columns, broken at spaces where there are some: lists of cells, each
    a character with those upon it, and its level."""
    lines, line, used = [], [], 0
    room = max(room, 10)
    for piece in pieces:
        for c in escaped(piece.text):
            if used + width_of(c) > room:
                line, rest = broken(line)
                lines.append(line)
                line, used = rest, sum(width(text) for text, _ in rest)
            line.append((c, level_of(piece.ratio)))
            used += width_of(c)
    return [*lines, line]


def broken(line):
    """A full line in two, the second of them its last word, unless that is most of it."""
    spaces = [i for i, (c, _) in enumerate(line) if c == " "]
    if not spaces or spaces[-1] < len(line) / 2:
        return line, []
    return line[: spaces[-1]], line[spaces[-1] + 1 :]


def shown(pieces, room, colour):
    """The lines of a response: coloured, or with a line of marks below each that has any."""
    found = []
    for line in filled(pieces, room):
        if colour:
            runs = groupby(line, key=lambda cell: cell[1])
            found.append("".join(painted(text_of(cells), level) for level, cells in runs))
            continue
        marks = "".join(MARKS[level] * width_of(c) for c, level in line)
        found.append(text_of(line))
        if marks.strip():
            found.append(marks.rstrip())
    return found


def text_of(cells):
    return "".join(c for c, _ in cells)


def painted(text, level):
    return f"\x1b[{COLOURS[level]}m{text}\x1b[0m" if COLOURS[level] else text


def number(value, columns, digits=2):
    """A number in so many columns, with fewer digits where it is large; "-" where there is none."""
    if value is None or value != value:
        return f"{'-':>{columns}}"
    for d in range(digits, -1, -1):
        text = f"{round(value, d) + 0.0:{columns}.{d}f}"  # not -0.00
        if len(text) <= columns:
            return text
    return f"{value:{columns}.{max(0, columns - 7)}e}"


def print_wrapped(name, text):
    """A name, and a text beside it in lines that fit."""
    lines = textwrap.wrap(escaped(text), columns() - 9, break_on_hyphens=False)
    for first, line in zip([name, *[""] * len(lines)], lines, strict=False):
        print(f"{first:<8} {line}")
