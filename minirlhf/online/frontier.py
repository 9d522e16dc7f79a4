"""What a gain costs: policies beside the best of n.   python -m minirlhf.online.frontier RUN ...

    python -m minirlhf.online.frontier runs/ppo runs/dpo --reward runs/rm      # laptop: 3 minutes
    python -m minirlhf.online.frontier PPO=runs/ppo,runs/ppo1,runs/ppo2 DPO=runs/dpo \\
        --reward runs/rm --judge runs/gold/rm

However a policy was made, it pays for its gain with KL from the base model. The best of n samples
of the base by --reward is what can be had without training, for log n - (n - 1)/n nats: a line, and
nearly the best win rate over the base that there is at a KL (Gui et al. 2024). A policy under the
line pays too much. --judge scores the same answers, in a panel of its own, if another one does.

Each RUN answers held-out prompts once. NAME=RUN,RUN,... are seeds of one method, whose mean is a
point, +- the standard deviation between them; a single run has its standard error over prompts.
Gains are over the base's mean answer, in standard deviations of its answers. Prints a table; leaves
frontier.jsonl and, with the extra `plot`, frontier.png.

Left out: the exact KL of the best of n; policies of different bases.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minirlhf.engine import cli, machine
from minirlhf.engine.cli import knob
from minirlhf.engine.files import atomic_write, file_errors, write_lines
from minirlhf.look import judging, policies, replies
from minirlhf.look.command import print_figures
from minirlhf.rewards import overoptimisation as best


@dataclass(kw_only=True)
class Knobs(cli.Checked):
    runs: list
    reward: str = knob(
        "", "who chooses the best: a run of train_rm.py, RM,RM,..., FILE.py:FUNCTION"
    )
    judge: str = knob("", "who else scores what was chosen; of the same kinds")
    base: str = knob("", "the base model (default: the first run's own)")
    prompts: int = knob(256, "held-out prompts, of the first run's data", least=2)
    n: int = knob(64, "answers of the base to each, of which the best is chosen", least=2)
    response_length: int = knob(24, "most tokens of an answer", least=1)
    seed: int = knob(0, "same seed, same answers")
    out: str = knob("runs/frontier", "directory for the rows and the picture")
    device: str = knob("auto", "what computes: cpu, cuda, ...; auto: a GPU where there is one")


def parse(knobs, doc, argv=None):
    """The Knobs of a command line."""
    parser = cli.parser_of(knobs, doc, "minirlhf.online.frontier")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a policy, or NAME=RUN,RUN,...")
    return knobs(**vars(parser.parse_args(argv)))


def main(knobs):
    """Prints the table, and leaves the rows and the picture in --out; the rows."""
    cli.refuse({
        "--reward is missing: who chooses the best of n?": not knobs.reward,
        "--judge: the same as --reward": knobs.judge == knobs.reward,
    })  # fmt: skip
    rows = measure(knobs)
    out = Path(knobs.out)
    with file_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    write_lines(out / "frontier.jsonl", rows)
    judges = {"proxy": knobs.reward} | ({"gold": knobs.judge} if knobs.judge else {})
    judges = dict(zip(judges, best.names_of(judges.values()), strict=True))
    print_rows(rows, judges)
    try:
        draw(rows, judges, out / "frontier.png")
    except ImportError:
        print("the picture is left out: pip install 'minirlhf[plot]'")
    print(f"left in {out}")
    return rows


def methods(given):
    """{name: its runs} of NAME=RUN,RUN,... or RUN, whose folder may be called lr=1e-3, say.
    UserError for a name that is given twice, and for none of a run."""
    found = {}
    for text in given:
        name, named, runs = text.partition("=")
        if not named or "/" in name:
            name = runs = text
        cli.refuse({
            f"{name}: given twice, where a method is NAME=RUN,RUN": name in found,
            f"{text}: expected a run, or NAME=RUN,RUN": not all([name, *runs.split(",")]),
        })  # fmt: skip
        found[name] = runs.split(",")
    return found


def measure(knobs):
    """The rows of the best of n, and one of each method; `proxy` is --reward, `gold` --judge."""
    device = machine.pick_device(knobs.device)
    machine.precision(device, "float32")
    named, loaded = methods(knobs.runs), {}
    first = policies.open_policy(next(iter(named.values()))[0], device, knobs.base, loaded)
    base = policies.open_policy(knobs.base or first.base or first.name, device, "none", loaded)
    opened = {}
    for name, runs in named.items():
        opened[name] = [policies.open_policy(run, device, base.name, loaded) for run in runs]
    judges = [judging.load_judge(who, base) for who in (knobs.reward, knobs.judge) if who]
    for judge in judges:
        compares = f"{judge.name}: compares two responses, and gives no score of one"
        cli.refuse({compares: not judge.score})

    prompts = policies.from_data(first, knobs.prompts)
    print(f"{base.name} answers {len(prompts)} prompts {knobs.n} times each", flush=True)
    sampling = replies.Sampling(knobs.response_length, seed=knobs.seed, n=knobs.n)
    found = replies.replies(base, prompts, sampling)
    scales = []
    for judge in judges:
        scales.append(best.scale_of(judge, best.scores_of(judge, base, found), len(prompts)))
    facts = best.facts_of(found)
    facts = {key: np.reshape(values, (len(prompts), -1)) for key, values in facts.items()}
    rows = best.curve(scales[0].base, scales[-1].base, facts)
    for name, seeds in opened.items():
        each = []
        for policy in seeds:
            answers = replies.replies(policy, prompts, sampling._replace(n=1))
            each.append(place(policy, answers, judges, scales))
        rows.append({"method": name, "runs": len(each)} | across(each))
    return rows


def place(policy, answers, judges, scales):
    """Where a policy's answers, one a prompt, stand: a row of floats."""
    gains = []
    for judge, scale in zip(judges, scales, strict=True):
        own = (best.scores_of(judge, policy, answers) - scale.mean) / scale.std
        gains.append(own - scale.base.mean(1))
    row = best.point(replies.mean([answer.kl for answer in answers]), gains[0], gains[-1])
    return row | {key: replies.mean(values) for key, values in best.facts_of(answers).items()}


def across(each):
    """The mean row of a method's runs; its errors are between them, where there are several."""
    row = {key: replies.mean([one[key] for one in each]) for key in each[0]}
    if len(each) > 1:
        for key in ("proxy", "gold"):
            row[f"{key}_error"] = float(np.std([one[f"{key}_gain"] for one in each], ddof=1))
        row["kl_error"] = float(np.std([one["kl"] for one in each], ddof=1))
    return row


def print_rows(rows, judges):
    table = [["", "KL", *(f"gain by {who}" for who in judges.values()), "tokens", "ended"]]
    for row in rows:
        name = row.get("method") or f"best of {row['n']}"
        price = f"{row['kl']:.2f}"
        price += f" +- {row['kl_error']:.2f}" if "kl_error" in row else ""
        cells = [name, price]
        for key in judges:
            gain = round(row[f"{key}_gain"], 2) + 0.0  # no -0.00
            cells.append(f"{gain:.2f} +- {row[f'{key}_error']:.2f}")
        table.append([*cells, f"{row['tokens']:.1f}", f"{row['ended']:.2f}"])
    print_figures(table)


# The picture

COLOURS = "tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown", "tab:pink"


def draw(rows, judges, path):
    """Writes a PNG: for each judge, {key: name}, a panel with the line of the best of n and a point
    for each method. Raises ImportError without matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(0.5 + 6 * len(judges), 4.8), layout="constrained")
    panels = figure.subplots(1, len(judges), squeeze=False)[0]
    chosen = [row for row in rows if "n" in row]
    points = [row for row in rows if "method" in row]
    for axes, (key, who) in zip(panels, judges.items(), strict=True):
        name = f"best of 1 to {chosen[-1]['n']}"
        ends = [best.line(axes, chosen, key, "black", "-", name)]
        for i, row in enumerate(points):
            x, y = row["sqrt_kl"], row[f"{key}_gain"]
            colour = COLOURS[i % len(COLOURS)]
            axes.errorbar(x, y, yerr=row[f"{key}_error"], color=colour, marker="o", capsize=2)
            ends.append((x, y, row["method"], colour))
        axes.set_title(f"gain by {who}", fontsize=10)
        axes.grid(alpha=0.3)
        write_names(axes, ends)
    figure.supxlabel("square root of the KL from the base model (KL in nats a response)")
    panels[0].set_ylabel("standard deviations of the base's answers")
    with atomic_write(path) as tmp:
        figure.savefig(tmp, format="png", dpi=110)


def write_names(axes, ends):
    """Names of (x, y, name, colour) in a column right of the panel, a thin line from each to it."""
    low, high = axes.get_ylim()
    gap = (high - low) / max(20, len(ends))  # a line of text
    free = high
    for left, (x, y, name, colour) in enumerate(sorted(ends, key=lambda end: -end[1])):
        lowest = low + gap * (len(ends) - 1 - left)  # the others need room, too
        place = max(lowest, min(y, free))
        free = place - gap
        thin = {"arrowstyle": "-", "color": colour, "alpha": 0.4, "shrinkB": 4}
        thin["relpos"] = 0, 0.5  # it ends where the name begins
        where = (1.02, place), axes.get_yaxis_transform()
        axes.annotate(name, (x, y), where[0], textcoords=where[1], color=colour, fontsize=8,
                      verticalalignment="center", arrowprops=thin)  # fmt: skip


if __name__ == "__main__":
    cli.run_script(main, Knobs, __doc__, parse)
