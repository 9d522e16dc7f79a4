"""A picture of a run's metrics: one small panel each, over the steps."""

from minirlhf.engine.files import atomic_write

MANY = 60  # points, from which a line is noise under its running mean
DARK, PALE = "#1f4e79", "#9db4c8"


def plot(rows, path):
    """Writes a PNG of the rows of metrics.jsonl. Raises ImportError without matplotlib."""
    from matplotlib.figure import Figure

    keys = dict.fromkeys(key for row in rows for key in row)
    names = [key for key in keys if key not in ("step", "seconds")]
    columns = min(4, len(names)) or 1
    lines = -(-len(names) // columns)
    figure = Figure(figsize=(3.4 * columns, 2.3 * lines), layout="constrained")
    for panel, name in enumerate(names):
        axes = figure.add_subplot(lines, columns, panel + 1)
        draw(axes, [(row["step"], row[name]) for row in rows if name in row])
        axes.set_title(name, fontsize=9)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.3)
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
