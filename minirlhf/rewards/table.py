"""The figures of two rewards as rows of text, for the terminal and for the page.

A block is (head, rows): the head a title and the names of two columns, a row (name, cell, cell,
what it means).
"""

import math
from pathlib import Path

from minirlhf.look.terminal import cut, escaped, padded

NAME, CELL = 45, 16  # columns of a terminal: 79 with the spaces between


def short_names(given):
    """A name for each of two, by which they differ: "A rm" and "B vader", or "A one" and "B two" of
    runs/one/rm and runs/two/rm."""
    parts = []
    for name in given:
        file, _, function = name.rpartition(":")
        parts.append([*Path(file).parts, function] if file else Path(name).parts or (name,))
    ends = [part[-1] for part in parts]
    for pair in zip(*map(reversed, parts), strict=False):
        if pair[0] != pair[1]:
            ends = pair
            break
    return [f"A {ends[0]}", f"B {ends[1]}"]


def parts_of(pairs):
    """How many parts so many pairs are sorted into: ten, where these are of twenty or more."""
    return max(2, min(10, pairs // 20))


def table_of(found, names, held):
    """Blocks of the figures of command.all_figures."""
    return [
        of_both(found),
        beside_people(found, names, held),
        (("chances, on held-out pairs", *names), of_chances(found, held)),
        (("length and spelling, held-out", *names), of_texts(found, held)),
    ]


def of_both(found):
    distance, alike, shares = found["distance"], found["alike"], found["outcomes"]
    rows = [
        ("distance: 0 same, .71 unrelated, 1 opposite",
         plus_minus(*distance.get("samples", (math.nan, math.nan))),
         plus_minus(*distance["held-out"]),
         "root of (1 - r) / 2, r the correlation of the scores less their prompt's mean: what "
         "shifts or scales all scores to a prompt changes nothing. A constant reward is at .5 of "
         "all others"),
        ("pairs of one prompt ordered alike",
         percent(alike.get("samples", math.nan)), percent(alike["held-out"]),
         "a tie is one half, so two unrelated rewards have 50 %"),
        ("both order a pair as raters do", "-", percent(shares["both"]), "raters: their mean"),
        ("neither does", "-", percent(shares["neither"]), "what no choice of the two mends"),
    ]  # fmt: skip
    return ("A and B", "samples", "held-out"), rows


def beside_people(found, names, held):
    errors, shares = found["errors"], found["outcomes"]
    accuracies = [plus_minus(100 * x, 100 * e, 1) + " %"
                  for x, e in zip(found["accuracy"], errors[:2], strict=True)]  # fmt: skip
    rows = [("pairs ordered as raters do", *accuracies, "accuracy on held-out pairs")]
    if not math.isnan(held.human):
        one = percent(held.human)
        rows.append(("  a single rater, as the others' mean", one, one, "the human ceiling"))
    ahead = found["accuracy"][0] - found["accuracy"][1]
    lead = plus_minus(100 * ahead, 100 * errors[2], 1, "+") + " %"
    rows.append(("  A ahead of B", lead, "", "of the same pairs, so its error is its own"))
    rows.append(("right where the other is wrong", percent(shares["a"]), percent(shares["b"]),
                 "of all held-out pairs"))  # fmt: skip
    return ("each beside raters", *names), rows


def of_chances(found, held):
    rows = Rows(*found["each"])
    rows.add("Brier score", lambda own: own["before"]["brier"],
             "mean square of chance less share of raters, where chance = sigmoid(difference of the "
             "two scores): 0 is best")  # fmt: skip
    rows.add("  at its temperature", lambda own: own["after"]["brier"], "all differences over it")
    rows.add("  if all chances were one half", lambda own: found["coin"], "who knows nothing")
    rows.add(
        "calibration error",
        lambda own: own["before"]["ece"],
        f"mean gap between chance and share of raters, in {parts_of(len(held.pairs))} bins",
    )
    rows.add("  at its temperature", lambda own: own["after"]["ece"], "what no scale mends")
    rows.add("temperature that mends it", temperature_of,
             "over 1: its differences are too large for how much raters agree. It is fit on one "
             "half of the texts; the errors above are of the other half", short_number)  # fmt: skip
    return rows.found


def temperature_of(own):
    found = own["temperature"]
    return math.nan if found.note else found.value


def of_texts(found, held):
    rows = Rows(*found["each"])
    rows.add("score and length: correlation", lambda own: own["length"]["pearson"],
             f"length in {held.unit}", signed)  # fmt: skip
    if held.items.ratings is not None:
        rows.add("  of texts that raters rate alike", lambda own: own["length"]["given_rating"],
                 "what the reward adds to raters' own taste for length", signed)  # fmt: skip
        rows.add("  raters' own ratings", lambda own: own["length"]["of_people"], "", signed)
    rows.add("orders kept where both are misspelt", lambda own: own["spelling"]["both sides"],
             "one letter wrong in 5 % of the words, and in one at least; a tie is not kept",
             percent)  # fmt: skip
    rows.add("  scores move by, in their sd", lambda own: own["spelling"]["relative"],
             "mean change, over the standard deviation of the scores")  # fmt: skip
    return rows.found


class Rows:
    """Rows of a block, each the same figure of two rewards."""

    def __init__(self, one, other):
        self.each, self.found = (one, other), []

    def add(self, name, get, means, form=None):
        cells = [(form or number)(get(own)) for own in self.each]
        self.found.append((name, *cells, means))


# Cells


def number(value, digits=3, sign=""):
    return "-" if math.isnan(value) else f"{round(value, digits) + 0.0:{sign}.{digits}f}"  # no -0


def signed(value):
    return number(value, 2, "+")


def short_number(value):
    return "-" if math.isnan(value) else f"{value:.3g}"


def percent(value):
    return "-" if math.isnan(value) else f"{100 * value:.1f} %"


def plus_minus(value, error, digits=3, sign=""):
    text = number(value, digits, sign)
    return text if math.isnan(error) else f"{text} +- {error:.{digits}f}"


def print_blocks(blocks):
    for head, rows in blocks:
        print("\n" + line(*head))
        for name, one, other, _ in rows:
            print(line(name, one, other))


def line(name, one, other):
    cells = [padded_left(escaped(cell), CELL) for cell in (one, other)]
    return (padded(name, NAME) + " " + " ".join(cells)).rstrip()


def padded_left(text, columns):
    text = cut(text, columns)
    return " " * (columns - len(text)) + text
