"""What is printed: for any encoding, and with nothing in it that would steer the terminal.

Texts of strangers can hold escape sequences, carriage returns and marks that turn the direction of
writing. `printable` shows them by their numbers, as Python does. A `Terminal` does so with all that
is written to it, and never fails: a closed pipe costs a run no more than its words.
"""

import contextlib
import os
import sys
import unicodedata

from tqdm import tqdm

ESCAPED = "backslashreplace"


def printable(text, encoding=None):
    """The text with what is not printable, or not in the encoding, as \\x1b or \\u202e."""
    if not text.isprintable():
        text = "".join(c if is_plain(c) else code(c) for c in text)
    if encoding and not text.isascii():
        text = text.encode(encoding, ESCAPED).decode(encoding)
    return text


def is_plain(c):
    """Line ends and tabs, and the wide spaces that isprintable leaves out, are plain."""
    return c in "\n\t" or c.isprintable() or unicodedata.category(c) == "Zs"


def code(c):
    """A character by its number."""
    return c.encode("ascii", ESCAPED).decode() if ord(c) > 127 else f"\\x{ord(c):02x}"


class Terminal:
    """A text stream that escapes what is not printable.

    Where it cannot be written to, it says so once, and from then on forgets what it is given.
    """

    def __init__(self, stream):
        self.stream = stream

    def write(self, text):
        encoding = getattr(self.stream, "encoding", None)
        self.attempt("write", printable(text, encoding))
        return len(text)

    def flush(self):
        self.attempt("flush")

    def attempt(self, name, *args):
        try:
            getattr(self.stream, name)(*args)
        except (OSError, ValueError) as e:  # ValueError: it is closed
            self.stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
            reason = getattr(e, "strerror", None) or e
            with contextlib.suppress(OSError, ValueError, AttributeError):
                print(f"note: going on without output: {reason}", file=sys.stderr, flush=True)

    def __getattr__(self, name):
        return getattr(self.stream, name)


class Bare(Terminal):
    """A Terminal's stream as the progress bar needs it: its carriage returns are let through."""

    def write(self, text):
        self.stream.attempt("write", text)


def as_terminal(stream):
    """The stream as a Terminal; None, of a program without one, stays None."""
    return stream if stream is None or isinstance(stream, Terminal) else Terminal(stream)


def progress_bar(name, total, initial):
    out = as_terminal(sys.stdout)
    show = {"desc": name, "unit": "step", "mininterval": 1, "dynamic_ncols": True}
    return tqdm(total=total, initial=initial, file=out and Bare(out), **show)


def say_above(bar, text):
    """Prints a line above a progress bar, if there is one yet."""
    if bar is None:
        return print(text, flush=True)
    with bar.external_write_mode(file=bar.fp):
        print(text)
