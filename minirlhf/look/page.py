"""Replies as one HTML file: nothing outside of it, no script, light and dark, fit for print.

Left out: sorting, filters; traces, which are for the terminal.
"""

from html import escape

from minirlhf.engine.files import atomic_write
from minirlhf.engine.terminal import code
from minirlhf.look.terminal import unprintable

MARK = "minirlhf.look"  # a file without it is not ours to write over

STYLE = """
:root { color-scheme: light dark; --up: 0, 120, 190; --down: 215, 95, 0; }
body { font: 15px/1.55 system-ui, sans-serif; margin: 2rem auto; max-width: 80rem;
  padding: 0 1rem; background: Canvas; color: CanvasText; }
h1 { font-size: 1.3rem; } h2 { font-size: 1rem; margin: 2rem 0 .5rem; }
.prompt, .text { font-family: Georgia, serif; font-size: 1.05rem; white-space: pre-wrap;
  overflow-wrap: anywhere; }
.prompt { background: rgba(128, 128, 128, .14); padding: .4rem .7rem; border-radius: .3rem; }
.side { display: grid; gap: .8rem; margin: .8rem 0 1.8rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 17rem), 1fr)); }
.reply { border: 1px solid rgba(128, 128, 128, .45); border-radius: .3rem; padding: .5rem .7rem; }
.reply header { display: flex; justify-content: space-between; gap: 1rem; font-size: .85rem;
  opacity: .85; flex-wrap: wrap; }
.text { margin: .3rem 0 0; } .text + .text { border-top: 1px dotted rgba(128, 128, 128, .6);
  padding-top: .3rem; }
.t { border-radius: .15rem; padding: .05rem 0; } .end { opacity: .6; font-size: .8em; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .8rem; text-align: right; white-space: nowrap;
  border-bottom: 1px solid rgba(128, 128, 128, .35); }
th:first-child, td:first-child { text-align: left; }
.wide { overflow-x: auto; } .score { font-variant-numeric: tabular-nums; }
.legend span { padding: .1rem .45rem; } .note { font-size: .9rem; opacity: .85; }
@media print { body { margin: 0; max-width: none; font-size: 10pt; }
  .reply, tr, .prompt { break-inside: avoid; }
  .t, .legend span, .prompt { print-color-adjust: exact; -webkit-print-color-adjust: exact; } }
"""
FULL = 5.0  # nats at which a colour is as strong as it gets


def write_page(path, title, table, facts, groups, names):
    """Writes the file. table: rows of cells, the head first; facts: (name, text); groups: (prompt,
    [for each name a list of replies])."""
    parts = [f"<h1>{visible(title)}</h1>"]
    lines = [visible(f"{name}: {text}") for name, text in facts]
    parts.append('<p class="note">' + "<br>\n".join(lines) + "</p>")
    parts.append(f'<div class="wide">{table_of(table)}</div>')
    pieces = [piece for _, sides in groups for side in sides for r in side for piece in r.pieces]
    if any(piece.ratio is not None for piece in pieces):
        parts.append(legend())
    for number, (prompt, sides) in enumerate(groups, 1):
        parts.append(f'<h2>Prompt {number}</h2>\n<div class="prompt" dir="auto">{visible(prompt)}')
        parts.append('</div>\n<div class="side">')
        parts += [card(name, side) for name, side in zip(names, sides, strict=True)]
        parts.append("</div>")
    write_html(path, title, parts, STYLE, MARK)


def write_html(path, title, parts, style, mark):
    """Writes a page of its own, by which nothing is loaded: parts of HTML, and the mark by which it
    is known for one that may be written over."""
    body = "\n".join(parts)
    head = f'<meta charset="utf-8">\n<meta name="generator" content="{mark}">'
    head += f"\n<title>{visible(title)}</title>\n<style>{style}</style>"
    head += '\n<meta name="viewport" content="width=device-width, initial-scale=1">'
    html = f'<!DOCTYPE html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n{body}\n</body>\n'
    with atomic_write(path) as tmp:
        tmp.write_text(html + "</html>\n", encoding="utf-8")


def visible(text):
    """A text as HTML, on which it has no effect; controls and what turns the direction of writing
    as their escapes."""
    kept = "\n\t\u200c\u200d"  # joiners belong to scripts and to emoji
    found = []
    for c in text:
        hidden = unprintable(c) and c not in kept and not joins(c)
        found.append(code(c) if hidden else c)
    return escape("".join(found))


def joins(c):
    """Variation selectors and skin tones: a page has no columns that they could shift."""
    return "\ufe00" <= c <= "\ufe0f" or "\U0001f3fb" <= c <= "\U0001f3ff"


def table_of(rows):
    head, *body = [[visible(cell).replace("+-", "±") for cell in row] for row in rows]
    lines = ["<table>", "<tr>" + "".join(f"<th>{cell}</th>" for cell in head) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in body]
    return "\n".join([*lines, "</table>"])


def card(name, replies):
    """What one run answered to a prompt."""
    scores = [f"{reply.score:+.2f}" for reply in replies if reply.score == reply.score]
    score = f'<span class="score">score {", ".join(scores)}</span>' if scores else ""
    lines = [f'<div class="reply"><header><b>{visible(name)}</b>{score}</header>']
    for reply in replies:
        tokens = "".join(map(token, reply.pieces))
        lines.append(f'<p class="text" dir="auto">{tokens}</p>')
    return "\n".join([*lines, "</div>"])


def token(piece):
    """A span with the colour of its log-ratio, and the numbers for whoever points at it."""
    numbers = f"log-prob {piece.logprob:.2f}"
    style = ""
    if piece.ratio is not None:
        numbers = f"log-ratio {piece.ratio:+.2f}, {numbers}"
        style = f' style="background:{colour(piece.ratio)}"'
    kind = "t end" if piece.text == "[EOS]" else "t"
    return f'<span class="{kind}"{style} title="{numbers}">{visible(piece.text)}</span>'


def colour(ratio):
    """Blue for likelier than in the reference, orange for less likely; as strong as it is far."""
    strength = min(abs(ratio) / FULL, 1) * 0.6
    return f"rgba(var(--{'up' if ratio > 0 else 'down'}),{strength:.2f})"


def legend():
    steps = [-5, -3, -1, 0, 1, 3, 5]
    marks = "".join(f'<span style="background:{colour(x)}">{x:+d}</span>' for x in steps)
    text = "log-ratio of a token to the base model, in nats: orange less likely, blue likelier"
    return f'<p class="note legend">{marks} {text}; the numbers of a token are in its tooltip</p>'
