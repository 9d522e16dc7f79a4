"""A picture of a run's metrics: one small panel each, over the steps.

Panels have fixed places and few ticks: to measure every label first would take most of the time of
a short run.
"""

from minirlhf.engine.files import atomic_write

CLOCK = ("seconds", "perf/tokens_per_s", "perf/seconds_left")  # no two runs have these alike
WIDTH, HEIGHT = 3.4, 2.3  # inches of a panel
MANY = 60  # points, from which a line is noise under its running mean
DARK, PALE = "#1f4e79", "#9db4c8"


def plot(rows, path):
    """Writes a PNG of the rows of metrics.jsonl. Raises ImportError without matplotlib."""
    from matplotlib.figure import Figure

    keys = dict.fromkeys(key for row in rows for key in row)
    names = [key for key in keys if key not in ("step", *CLOCK)]
    columns = min(4, len(names)) or 1
    lines = -(-len(names) // columns) or 1
    width, height = WIDTH * columns, HEIGHT * lines
    figure = Figure(figsize=(width, height))
    figure.subplots_adjust(left=0.55 / width, right=1 - 0.1 / width, wspace=0.22)
    figure.subplots_adjust(bottom=0.45 / height, top=1 - 0.3 / height, hspace=0.35)
    for panel, name in enumerate(names):
        axes = figure.add_subplot(lines, columns, panel + 1)
        draw(axes, [(row["step"], row[name]) for row in rows if name in row])
        axes.set_title(name, fontsize=9)
    figure.supxlabel("step", fontsize=8)
    with atomic_write(path) as tmp:
        figure.savefig(tmp, format="png", dpi=110)


def draw(axes, points):
    steps, values = zip(*points, strict=True)
    many = len(points) > MANY
    axes.plot(steps, values, color=PALE if many else DARK, linewidth=1)
    if many:
        n = len(points) // 25
        means = [sum(values[i : i + n]) / n for i in range(len(values) - n + 1)]
        axes.plot(steps[n - 1 :], means, color=DARK)
    axes.locator_params(nbins=4)
    axes.ticklabel_format(axis="y", scilimits=(-2, 5))
    axes.yaxis.get_offset_text().set_fontsize(7)
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.3)
