"""Two rewards side by side as one HTML file: table, pictures, pairs. Nothing outside of it, no
script, light and dark, on a phone and in print."""

from itertools import chain

import numpy as np

from minirlhf.look.page import visible, write_html
from minirlhf.rewards import calibration, compare
from minirlhf.rewards.pictures import Plot, dots, line, names, picture, short_name, span
from minirlhf.rewards.table import parts_of, signed

MARK = "minirlhf.reward_eval"  # a file without it is not ours to write over
POINTS = 1500  # most in a picture

STYLE = """
:root { color-scheme: light dark; --a: #0067a8; --b: #b84a00; --c: #5c5c5c; }
@media (prefers-color-scheme: dark) { :root { --a: #62b8f2; --b: #ff9d57; --c: #b4b4b4; } }
body { font: 15px/1.5 system-ui, sans-serif; margin: 1.5rem auto; max-width: 64rem;
  padding: 0 1rem; background: Canvas; color: CanvasText; overflow-wrap: break-word; }
h1 { font-size: 1.35rem; line-height: 1.3; } h2 { font-size: 1.05rem; margin: 2rem 0 .6rem; }
.A { color: var(--a); } .B { color: var(--b); }
.note, td small { font-size: .85rem; opacity: .8; } td small { display: block; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .5rem; text-align: right; vertical-align: top;
  border-bottom: 1px solid rgba(128, 128, 128, .3); }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
th { padding-top: 1.4rem; border-bottom-width: 2px; } td { white-space: nowrap; }
td:first-child { white-space: normal; } .sub { padding-left: 1rem !important; }
.pictures { display: grid; gap: 1.5rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 23rem), 1fr)); }
svg { width: 100%; height: auto; font-size: 12px; fill: currentColor; }
svg .title { font-size: 14.5px; font-weight: 600; } svg .small { font-size: 11px; opacity: .8; }
svg .middle { text-anchor: middle; } svg .end { text-anchor: end; }
svg .grid { stroke: currentColor; opacity: .13; fill: none; }
svg polyline { fill: none; stroke-width: 2; } svg .name { font-weight: 600; }
svg polyline.thin { stroke: var(--c); stroke-width: 1.3; stroke-dasharray: 5 4; }
svg .a { fill: var(--a); } svg .b { fill: var(--b); } svg .c { fill: var(--c); }
svg polyline.a { stroke: var(--a); fill: none; } svg polyline.b { stroke: var(--b); fill: none; }
svg polyline.c { stroke: var(--c); fill: none; } svg .faint { opacity: .4; }
.pair { display: grid; gap: .6rem; margin: .3rem 0 1.2rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 17rem), 1fr)); }
.prompt { background: rgba(128, 128, 128, .14); padding: .4rem .7rem; border-radius: .3rem;
  white-space: pre-wrap; }
.pair > div { border: 1px solid rgba(128, 128, 128, .45); border-radius: .3rem;
  padding: .4rem .7rem; font-family: Georgia, serif; white-space: pre-wrap; }
.pair header { font: .85rem system-ui, sans-serif; opacity: .85; }
@media (max-width: 40rem) { td, th { padding-left: .25rem; padding-right: .25rem; }
  td { white-space: normal; } }
@media print { body { margin: 0; max-width: none; font-size: 10pt; }
  svg, .pair, tr { break-inside: avoid; } }
"""


def write_page(path, short, facts, blocks, found, held, chosen):
    """Writes the file. short: the rewards' names in pictures; the rest as command.main has it."""
    title = f"Two rewards: {short[0]} and {short[1]}"
    lines = [visible(f"{name}: {words}") for name, words in facts]
    parts = [
        f"<h1>{visible(title)}</h1>",
        '<p class="note">' + "<br>\n".join(lines) + "</p>",
        "<table>", *chain(*(rows_of(*block) for block in blocks)), "</table>",
        "<h2>Pictures</h2>",
        '<div class="pictures">', *pictures(short, found, held), "</div>",
    ]  # fmt: skip
    if chosen:
        parts.append("<h2>Pairs that they order in opposite ways, the surest first</h2>")
        parts += [pair(i, found, held) for i in chosen]
    write_html(path, title, parts, STYLE, MARK)


def rows_of(head, rows):
    cells = head[0], *map(short_name, head[1:])
    yield "<tr>" + "".join(f"<th>{visible(cell)}</th>" for cell in cells) + "</tr>"
    for name, one, other, means in rows:
        kind = ' class="sub"' if name.startswith(" ") else ""
        hint = f"<small>{visible(means)}</small>" if means else ""
        cells = "".join(f"<td>{visible(unbroken(cell))}</td>" for cell in (one, other))
        yield f"<tr><td{kind}>{visible(name.strip())}{hint}</td>{cells}</tr>"


def unbroken(cell):
    """A cell that a narrow page breaks before its error alone."""
    return cell.replace(" ", "\u00a0").replace("\u00a0+-", " ±")


def pair(i, found, held):
    """A pair, the text that raters prefer first."""
    a, b = found["margins"][:, i]
    texts = [held.items.responses[item] for item in held.pairs[i]]
    prompts = {held.items.prompts[item] for item in held.pairs[i]} - {""}
    lines = [f'<div class="prompt" dir="auto">{visible(prompt)}</div>' for prompt in prompts]
    lines.append('<div class="pair">')
    heads = f"{held.labels[i]:.0%} of raters prefer this one", "the other"
    for head, sign, words in zip(heads, (1, -1), texts, strict=True):
        liked = "A" if sign * a > 0 else "B"
        lead = abs(a if liked == "A" else b)
        who = f'<b class="{liked}">{liked}</b> prefers it, by {lead:.2f}'
        lines.append(f'<div dir="auto"><header>{head}; {who}</header>{visible(words)}</div>')
    return "\n".join([*lines, "</div>"])


# Pictures


def pictures(short, found, held):
    """The svgs, each of one question."""
    yield scatter(short, found)
    yield reliability(short, found, "before", "as they are")
    yield reliability(short, found, "after", "at their temperatures")
    yield by_margin(short, found, held)
    if len(np.unique(held.labels)) > 2:
        yield by_raters(short, found, held)
    if len(np.unique(held.lengths)) > 2:
        yield by_length(short, found, held)


def scatter(short, found):
    """The same texts by both, less their prompt's mean."""
    key = "held-out" if found["samples"] is None else "samples"
    scores = found["samples"]
    if scores is None:
        scores = [compare.by_context(some, found["contexts"]) for some in found["scores"]]
    x, y = (compare.within(some) for some in scores)
    if len(x) > POINTS:
        kept = np.random.default_rng(0).choice(len(x), POINTS, replace=False)
        x, y = x[kept], y[kept]
    whole = span(x, y)
    plot = Plot(whole, whole)
    alike = f"ordered alike: {found['alike'][key]:.0%} of the pairs of one prompt"
    marks = [
        line(plot, whole, whole, "thin"),
        dots(plot, x, y, "c faint"),
        names(plot, [(whole[1], "the same", "c")]),
    ]
    title = f"Do they agree? {len(x):,} {'samples' if key == 'samples' else 'held-out texts'}"
    x_name = f"{short[0]}: score less its prompt's mean, in sd"
    return picture(title, f"distance {found['distance'][key][0]:.3f}; {alike}", plot, x_name,
                   f"{short[1]}: the same", *marks)  # fmt: skip


def reliability(short, found, key, how):
    """Chance given against share of raters."""
    plot, marks, ends = Plot((0, 1), (0, 1)), [], [(1.0, "calibrated", "c")]
    marks.append(line(plot, (0, 1), (0, 1), "thin"))
    errors = []
    for name, kind, own in zip(short, "ab", found["each"], strict=True):
        curve = own[key]["curve"]
        sizes = 1.5 + 6 * np.sqrt(curve.count / curve.count.sum())
        marks.append(line(plot, curve.chance, curve.label, kind))
        marks.append(dots(plot, curve.chance, curve.label, kind, sizes))
        ends.append((curve.label[-1], name, kind))
        errors.append(f"{kind.upper()} {own[key]['ece']:.3f}")
    note = f"error {', '.join(errors)}; a larger dot has more pairs"
    return picture(f"Can chances be trusted, {how}?", note, plot, "chance that the reward gives",
                   "share of raters", *marks, names(plot, ends), percent="xy")  # fmt: skip


def by_margin(short, found, held):
    """Accuracy in tenths of the pairs by a reward's own margin."""
    curves = []
    edges = np.linspace(0, 1, 1 + parts_of(len(held.pairs)))
    for z in found["margins"]:
        size = np.abs(z)
        right = calibration.is_right(z, np.ones(len(z)))
        parts = calibration.accuracy_by(rank_share(size), right, edges)
        curves.append([((part.low + part.high) / 2, part.accuracy) for part in parts])
    values = [y for curve in curves for _, y in curve]
    low = min(0.5, *values)
    plot, marks, ends = Plot((0, 1), (low - 0.03, 1.02)), [], []
    marks.append(line(plot, (0, 1), (0.5, 0.5), "thin"))
    ends.append((0.5, "a coin", "c"))
    if held.human == held.human:
        marks.append(line(plot, (0, 1), (held.human, held.human), "thin"))
        ends.append((held.human, "one rater", "c"))
    for name, kind, curve in zip(short, "ab", curves, strict=True):
        xs, ys = zip(*curve, strict=True)
        marks += [line(plot, xs, ys, kind), dots(plot, xs, ys, kind, 3.2)]
        ends.append((ys[-1], name, kind))
    accuracies = [f"{k} {x:.1%}" for k, x in zip("AB", found["accuracy"], strict=True)]
    return picture("Is it right where it is sure?", f"of all pairs: {', '.join(accuracies)}", plot,
                   "pairs, from the smallest margin to the largest", "ordered as raters do",
                   *marks, names(plot, ends), percent="xy")  # fmt: skip


def rank_share(values):
    """(n,) ranks from 0 to 1, equal ones sharing theirs."""
    return calibration.ranks(values) / max(1, len(values) - 1)


def by_raters(short, found, held):
    """Accuracy by how much raters agree on a pair."""
    edges = calibration.equal_counts(held.labels, parts_of(len(held.pairs)))
    middle = [held.labels[(held.labels >= low) & (held.labels <= high)].mean()
              for low, high in zip(edges, edges[1:], strict=False)]  # fmt: skip
    curves = []
    for z in found["margins"]:
        right = calibration.is_right(z, np.ones(len(z)))
        curves.append(
            [part.accuracy for part in calibration.accuracy_by(held.labels, right, edges)]
        )
    low = min(0.5, *chain(*curves))
    plot, marks = Plot((min(middle) - 0.01, 1), (low - 0.03, 1.02)), []
    marks.append(line(plot, (max(0.5, plot.x[0]), 1), (max(0.5, plot.x[0]), 1), "thin"))
    ends = [(1.0, "one rater", "c")]
    for name, kind, ys in zip(short, "ab", curves, strict=True):
        marks += [line(plot, middle, ys, kind), dots(plot, middle, ys, kind, 3.2)]
        ends.append((ys[-1], name, kind))
    return picture("Which pairs does it get wrong?", "parts of the pairs, by how far raters agree",
                   plot, "share of raters who prefer the better text", "ordered as raters do",
                   *marks, names(plot, ends), percent="xy")  # fmt: skip


def by_length(short, found, held):
    """Mean score of texts by length, beside raters' own."""
    kinds = [*zip(short, "ab", found["scores"], strict=True)]
    if held.items.ratings is not None:
        kinds.append(("raters", "c", held.items.means()))
    edges = calibration.equal_counts(held.lengths, 8)
    at = np.clip(np.searchsorted(edges, held.lengths, side="right") - 1, 0, len(edges) - 2)
    filled = np.unique(at)
    xs = [held.lengths[at == i].mean() for i in filled]
    curves = []
    for name, kind, values in kinds:
        sd = (values - values.mean()) / (values.std() or 1)
        curves.append((name, kind, [sd[at == i].mean() for i in filled]))
    ys = [curve for _, _, curve in curves]
    plot, marks, ends = Plot(span(xs), span([-0.5, 0.5], *ys)), [], []
    marks.append(line(plot, plot.x, (0, 0), "thin"))
    for name, kind, curve in curves:
        marks += [line(plot, xs, curve, kind), dots(plot, xs, curve, kind, 3.2)]
        ends.append((curve[-1], name, kind))
    lengths = [f"{kind.upper()} {signed(own['length']['pearson'])}"
               for kind, own in zip("ab", found["each"], strict=True)]  # fmt: skip
    return picture("Does it like long texts?", f"correlation with length: {', '.join(lengths)}",
                   plot, f"length in {held.unit}, eighths of the held-out texts",
                   "mean score, in sd", *marks, names(plot, ends))  # fmt: skip
