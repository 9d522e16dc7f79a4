"""A dialogue with policies: a line of standard input is a turn, in the project's form of text."""

import sys
from functools import cache

from minirlhf.look.replies import replies
from minirlhf.look.terminal import columns, escaped, has_colour, shown, width

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


def chat(policies, names, sampling):
    """Answers each line until the end of the input; each policy has a dialogue of its own."""
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")
    say = cache(print)  # the same note but once
    said = [""] * len(policies)
    for turn, line in enumerate(lines()):
        for i, policy in enumerate(policies):
            prompt = f"{said[i]}{HUMAN} {line}{ASSISTANT}"
            again = sampling._replace(seed=sampling.seed + turn, n=1)
            reply = until_human(replies(policy, [prompt], again, say)[0])
            said[i] = prompt + reply.text
            name = f"{escaped(names[i])}: " if len(policies) > 1 else ""
            for text in shown(reply.pieces, columns() - width(name), has_colour()):
                print(name + text)
                name = " " * width(name)
            sys.stdout.flush()


def lines():
    """What a person types, without empty lines; asked for where a person sits there."""
    asked = sys.stdin.isatty()
    if asked:
        print("a line is a turn; Ctrl-D ends")
    while True:
        if asked:
            print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            if not asked:  # where nobody types, nothing shows what was said
                print("> " + escaped(line.strip()))
            yield line.strip()


def until_human(reply):
    """The reply up to where it goes on in the human's name."""
    text, mark, _ = reply.text.partition(HUMAN)
    if not mark:
        return reply
    kept, length = [], 0
    for piece in reply.pieces:
        if length + len(piece.text) > len(text):
            piece = piece._replace(text=piece.text[: len(text) - length])
        length += len(piece.text)
        kept += [piece] if piece.text else []
    return reply._replace(text=text, pieces=kept)
