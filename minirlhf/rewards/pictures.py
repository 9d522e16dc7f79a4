"""Pictures of numbers as inline SVG: points, lines, axes and names, in colours of the page's style.

A picture has its title, the names of its axes and of its lines within itself. Texts are escaped
here. Class a, b or c of a mark is its colour.
"""

import math
from typing import NamedTuple

import numpy as np

from minirlhf.look.page import visible

WIDTH, HEIGHT = 440, 340
LEFT, RIGHT, TOP, BOTTOM = 62, 92, 58, 46  # what the marks leave free; names stand on the right
LINE = 15  # pixels from one name to the next


class Plot(NamedTuple):
    """What lies on the axes from end to end."""

    x: tuple  # (low, high)
    y: tuple

    def at(self, x, y):
        """Numbers in pixels."""
        across = share_of(x, *self.x)
        up = share_of(y, *self.y)
        width = WIDTH - LEFT - RIGHT
        height = HEIGHT - TOP - BOTTOM
        return LEFT + width * across, TOP + height * (1 - up)


def share_of(values, low, high):
    """How far along the way from low to high."""
    values = np.asarray(values, dtype=float)
    return (values - low) / (high - low)


def span(*values, share=0.05):
    """(low, high) of all numbers with some room; around a single one, too."""
    found = np.concatenate([np.ravel(np.asarray(some, dtype=float)) for some in values])
    low, high = float(found.min()), float(found.max())
    room = share * (high - low) or max(1e-3, 0.1 * abs(high))
    return low - room, high + room


def picture(title, note, plot, x_name, y_name, *marks, percent=""):
    """The svg. percent: the axes, of "xy", whose numbers are shares."""
    middle = (LEFT + WIDTH - RIGHT) / 2
    centre = (TOP + HEIGHT - BOTTOM) / 2
    turned = f'<g transform="translate(13 {centre:.0f}) rotate(-90)">'
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{visible(title)}">',
        text(8, 18, title, "title"),
        text(8, 36, note, "small"),
        axes(plot, percent),
        text(middle, HEIGHT - 8, x_name, "middle"),
        turned + text(0, 0, y_name, "middle") + "</g>",
        *marks,
        "</svg>",
    ]
    return "\n".join(parts)


def text(x, y, words, kind=""):
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}">{visible(words)}</text>'


def axes(plot, percent):
    """A faint line and a number at each tick."""
    parts = []
    for x in ticks(*plot.x):
        at, bottom = plot.at(x, plot.y[0])
        parts.append(f'<path class="grid" d="M{at:.1f} {TOP}V{bottom:.1f}"/>')
        parts.append(text(at, bottom + 18, tick_name(x, "x" in percent), "middle small"))
    for y in ticks(*plot.y):
        left, at = plot.at(plot.x[0], y)
        parts.append(f'<path class="grid" d="M{left:.1f} {at:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(text(left - 5, at + 4, tick_name(y, "y" in percent), "end small"))
    return "\n".join(parts)


def ticks(low, high, most=6):
    """Round numbers from low to high: 1, 2 or 5 times a power of ten apart."""
    step = 10.0 ** math.floor(math.log10((high - low) / most))
    step *= next(n for n in (1, 2, 5, 10) if (high - low) / (n * step) <= most)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 10) for i in range(first, last + 1)]


def tick_name(value, percent):
    return f"{100 * value:.0f} %" if percent else f"{value:g}"


# Marks


def dots(plot, xs, ys, kind, sizes=2.4):
    """A point for each x and y, of one size or of its own."""
    across, up = plot.at(xs, ys)
    sizes = np.broadcast_to(sizes, across.shape)
    marks = []
    for x, y, size in zip(across, up, sizes, strict=True):
        marks.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{size:.1f}"/>')
    return f'<g class="{kind}">{"".join(marks)}</g>'


def line(plot, xs, ys, kind):
    across, up = plot.at(xs, ys)
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(across, up, strict=True))
    return f'<polyline class="{kind}" points="{points}"/>'


def names(plot, ends):
    """Names on the right, each beside the end (y, name, kind) of its line, none on another."""
    ends = sorted(ends, reverse=True)  # from above
    places = [float(plot.at(plot.x[1], y)[1]) + 4 for y, _, _ in ends]
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + LINE)
    over = max(0, places[-1] - (HEIGHT - BOTTOM + 4)) if places else 0
    parts = []
    for place, (_, name, kind) in zip(places, ends, strict=True):
        parts.append(text(WIDTH - RIGHT + 9, place - over, short_name(name), f"name {kind}"))
    return "\n".join(parts)


def short_name(name, most=13):
    """A name in the room that a picture has for it, its end kept."""
    return name if len(name) <= most else name[:2] + ".." + name[4 - most :]
