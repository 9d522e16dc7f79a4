"""Over-optimisation: what a proxy reward promises, and what another says of what it chose.

    python -m minirlhf.rewards.overoptimisation runs/sft --gold runs/gold/rm \\
        --proxies runs/share05/rm runs/share20/rm runs/rm             # laptop: 3 to 5 minutes
    python -m minirlhf.rewards.overoptimisation runs/sft --gold runs/gold/rm --proxies runs/rm \\
        --policies runs/ppo                                           # and what PPO made of it
    python -m minirlhf.rewards.overoptimisation runs/toy/sft --gold true --proxies runs/toy/rm

The harder a proxy is pressed, the further its own score runs ahead of the gold one, which may turn
and fall (Gao, Schulman, Hilton 2022). BASE answers held-out prompts, so many times each; for each n
the response with the best proxy score of n is chosen, and gold and proxy score it. Policies trained
against a proxy answer the same prompts once. The pressure is the KL from BASE in nats a response,
the gains are over BASE in standard deviations of its responses, with the standard error over
prompts. Prints a table; leaves overoptimisation.jsonl and, with the extra `plot`, a picture.

A model scores the tokens as they were sampled; who reads texts, an ensemble, a function, a judge,
takes a response for finished that reached its length without EOS. `ended` is the share with an EOS.

GOLD and PROXIES are whatever scores: a run or directory of a reward model, RM,RM,... for the mean
of an ensemble, FILE.py:FUNCTION, judge:URL, or `true` for the toy. No reward model is the truth: a
gold one stands for it as far as it knows what the proxies do not, by more labels, say.

Left out: a fit of Gao's laws d (a - b d) and d (a - b log d), d = sqrt(KL), and the exact KL of
best-of-n, of which `best_of_n_kl` is an upper bound.
"""

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from minirlhf.engine import cli, machine
from minirlhf.engine.cli import UserError, knob
from minirlhf.engine.files import atomic_write, file_errors, write_lines
from minirlhf.feedback.preferring import is_ensemble
from minirlhf.look import judging, policies, replies
from minirlhf.look.command import print_figures, shortened

# Best of n


def best_of_n_kl(n):
    """KL from the base of the best of n samples, in nats: log n - (n - 1)/n.

    An upper bound, equal where no two responses have the same score (Beirami et al. 2024, Theorem
    3.1): the base that gives few different responses moves less.
    """
    n = np.asarray(n, dtype=float)
    return np.log(n) - (n - 1) / n


def best_of_n_weights(N, n):
    """(N,) the chance of each of N samples, worst first, to be the best of n drawn from them
    without replacement: C(k-1, n-1) / C(N, n) for the k-th. Raises UserError for n over N."""
    if not 1 <= n <= N:
        raise UserError(f"the best of {n}: expected 1 to {N}, the samples there are")
    k = np.arange(N, n, -1)  # C(k-2, n-1) / C(k-1, n-1) = (k - n) / (k - 1)
    falling = np.cumprod(np.concatenate([[n / N], (k - n) / (k - 1)]))
    return np.concatenate([np.zeros(n - 1), falling[::-1]])


def best_of_n(proxy, values, n):
    """(P,) for each prompt the mean value of the response that is best of n by the proxy.

    proxy, values (P, N): of N >= n samples a prompt. The mean is over all C(N, n) ways to draw n
    of them, which is unbiased and has the least variance (Nakano et al. 2021, appendix; Hilton and
    Gao 2022); among equal proxy scores each is as likely to be chosen.
    """
    proxy, values = np.asarray(proxy, dtype=float), np.asarray(values, dtype=float)
    weights = best_of_n_weights(proxy.shape[1], n)
    found = []
    for scores, worth in zip(proxy, values, strict=True):
        _, group, count = np.unique(scores, return_inverse=True, return_counts=True)
        in_order = np.argsort(group, kind="stable")
        shared = np.bincount(group[in_order], weights) / count  # one weight for equal scores
        found.append(worth @ shared[group])
    return np.array(found)


def powers_up_to(N):
    """1, 2, 4, ..., and N itself."""
    return sorted({2**k for k in range(N.bit_length())} | {N})


def gain(by_prompt):
    """(mean, standard error over prompts) of gains (P,)."""
    by_prompt = np.asarray(by_prompt)
    count = len(by_prompt)
    error = by_prompt.std(ddof=1) / count**0.5 if count > 1 else float("nan")
    return float(by_prompt.mean()), float(error)


def curve(proxy, gold, facts):
    """Rows of best-of-n by a proxy, n = 1, 2, 4, ...: dicts of n, kl, sqrt_kl, the gains of proxy
    and gold over the mean sample of the prompt, with their errors, and the means of facts.

    proxy, gold (P, N): standardised scores of N samples a prompt. facts: {name: (P, N)}, what else
    tells how the chosen ones differ.
    """
    rows = []
    for n in powers_up_to(proxy.shape[1]):
        gains = [best_of_n(proxy, values, n) - values.mean(1) for values in (proxy, gold)]
        row = {"n": n} | point(float(best_of_n_kl(n)), *gains)
        for name, values in facts.items():
            row[name] = float(best_of_n(proxy, values, n).mean())
        rows.append(row)
    return rows


def point(kl, proxy_gains, gold_gains):
    """What a row says of a place on a curve; the gains (P,) are of each prompt."""
    proxy, proxy_error = gain(proxy_gains)
    gold, gold_error = gain(gold_gains)
    where = {"kl": kl, "sqrt_kl": max(0.0, kl) ** 0.5}
    where |= {"proxy_gain": proxy, "proxy_error": proxy_error}
    return where | {"gold_gain": gold, "gold_error": gold_error}


# The command


@dataclass(kw_only=True)
class Knobs(cli.Checked):
    base: list
    proxies: list
    policies: list = ()
    gold: str = knob("", "what stands for the truth: whatever scores, as the proxies do")
    prompts: int = knob(256, "held-out prompts, of the data that BASE was trained on", least=1)
    n: int = knob(64, "responses of BASE to each, of which the best is chosen", least=2)
    response_length: int = knob(24, "most tokens of a response", least=1)
    seed: int = knob(0, "same seed, same responses")
    out: str = knob("runs/overoptimisation", "directory for the rows and the picture")
    device: str = knob("auto", "what computes: cpu, cuda, ...; auto: a GPU where there is one")


def parse(knobs, doc, argv=None):
    """The Knobs of a command line."""
    parser = cli.parser_of(knobs, doc, "minirlhf.rewards.overoptimisation")
    parser.add_argument("base", nargs=1, metavar="BASE", help="a run whose model answers")
    parser.add_argument("--proxies", nargs="+", metavar="PROXY", required=True,
                        help="what scores: a reward model's run, FILE.py:FUNCTION")  # fmt: skip
    parser.add_argument("--policies", nargs="+", metavar="RUN", default=[],
                        help="runs that were trained against one of the proxies")  # fmt: skip
    return knobs(**vars(parser.parse_args(argv)))


def main(knobs):
    """Prints the table, and leaves the rows and the picture in --out; the rows."""
    sources = [knobs.gold, *knobs.proxies]
    cli.refuse({
        "--gold: expected what stands for the truth, a reward model's run, say": not knobs.gold,
        "--gold and --proxies: one of them is given twice": len(set(sources)) < len(sources),
        "--policies: one is given twice": len(set(knobs.policies)) < len(knobs.policies),
    })  # fmt: skip
    rows = measure(knobs)
    out = Path(knobs.out)
    with file_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    write_lines(out / "overoptimisation.jsonl", rows)
    print_rows(rows)
    try:
        draw(rows, out / "overoptimisation.png")
    except ImportError:
        print("the picture is left out: pip install 'minirlhf[plot]'")
    print(f"left in {out}")
    return rows


def measure(knobs):
    """The rows of every proxy, of gold as its own proxy, and of the policies."""
    device = machine.pick_device(knobs.device)
    machine.precision(device, "float32")
    loaded = {}
    base = policies.open_policy(knobs.base[0], device, "none", loaded)
    if not base.run:
        raise UserError(f"{base.name}: a model of no run has no held-out prompts: expected a run")
    pressed = []
    for name in knobs.policies:
        pressed.append(policies.open_policy(name, device, base.name, loaded))
    against = [trained_against(policy, knobs.proxies) for policy in pressed]
    judges = [judging.load_judge(source, base) for source in (knobs.gold, *knobs.proxies)]
    names = names_of([judge.name for judge in judges])
    for judge in judges:
        if not judge.score:
            raise UserError(f"{judge.name}: compares two responses, and gives no score of one")

    prompts = policies.from_data(base, knobs.prompts)
    print(f"{base.name} answers {len(prompts)} prompts {knobs.n} times each", flush=True)
    sampling = replies.Sampling(knobs.response_length, seed=knobs.seed, n=knobs.n)
    found = replies.replies(base, prompts, sampling)
    scales = [scale_of(judge, scores_of(judge, base, found), len(prompts)) for judge in judges]
    facts = {}
    for key, values in facts_of(found).items():
        facts[key] = np.reshape(values, (len(prompts), -1))
    rows = []
    for name, scale in zip(names, scales, strict=True):
        of_proxy = curve(scale.base, scales[0].base, facts)
        rows += [{"proxy": name, "gold": names[0]} | row for row in of_proxy]
    shown = names_of([policy.name for policy in pressed])
    for policy, name, i in zip(pressed, shown, against, strict=True):
        answers = replies.replies(policy, prompts, sampling._replace(n=1))
        gains = []
        for k in (i + 1, 0):  # its proxy, and gold
            own = (scores_of(judges[k], policy, answers) - scales[k].mean) / scales[k].std
            gains.append(own - scales[k].base.mean(1))
        kl = replies.mean([answer.kl for answer in answers])
        row = {"proxy": names[i + 1], "gold": names[0], "policy": name}
        row |= point(kl, *gains)
        for key, values in facts_of(answers).items():
            row[key] = replies.mean(values)
        rows.append(row)
    return rows


def facts_of(answers):
    """{name: a number of each reply}: a proxy is often exploited by what shows in these."""
    tokens = [float(len(answer.ids)) for answer in answers]
    return {"tokens": tokens, "ended": [float(answer.ended) for answer in answers]}


class Scale(NamedTuple):
    """A judge's scores of the base model's responses, and how they are standardised."""

    mean: float
    std: float
    base: np.ndarray  # (P, N), with mean 0 and standard deviation 1 over all


def scale_of(judge, scores, prompts):
    """The Scale of scores (P N,). Raises UserError where they are all the same."""
    mean, std = scores.mean(), scores.std()
    if not std:
        raise UserError(f"{judge.name}: gives all {len(scores)} responses the same score")
    return Scale(mean, std, ((scores - mean) / std).reshape(prompts, -1))


def names_of(sources):
    """Short names of sources, of an ensemble those of its members."""
    members = [name.split(",") if is_ensemble(name) else [name] for name in sources]
    every = list(dict.fromkeys(itertools.chain(*members)))
    short = dict(zip(every, shortened(every), strict=True))
    return [" + ".join(short[name] for name in some) for some in members]


def trained_against(policy, proxies):
    """Which of the proxies a policy was trained against."""
    reward = policies.reward_beside(policy)
    for i, proxy in enumerate(proxies):
        if reward and Path(reward).resolve() == Path(proxy).resolve():
            return i
    found = f"was trained against {reward}" if reward else "names no reward of its training"
    raise UserError(f"--policies {policy.name}: {found}, which is not among --proxies")


def scores_of(judge, policy, answers):
    """(N,) scores of a policy's Replies."""
    scored = judging.scored(judge, policy, answers)
    return np.array([reply.score for reply in scored])


def print_rows(rows):
    """A line for each n of each proxy, and for each policy."""
    table = [["chosen by", "how", "sqrt(KL)", "proxy gain", "gold gain", "tokens", "ended"]]
    for row in rows:
        how = f"best of {row['n']}" if "n" in row else row["policy"]
        cells = [row["proxy"], how, f"{row['sqrt_kl']:.2f}"]
        for key in ("proxy", "gold"):
            value = round(row[f"{key}_gain"], 2) + 0.0  # no -0.00
            cells.append(f"{value:.2f} +- {row[f'{key}_error']:.2f}")
        table.append([*cells, f"{row['tokens']:.1f}", f"{row['ended']:.2f}"])
    print()
    print_figures(table)


# The picture

WIDTH, HEIGHT = 4.6, 3.8  # inches of a panel
PROXY, GOLD, BEST = "#b3541e", "#1f4e79", "#8a8a8a"


def draw(rows, path):
    """Writes a PNG: a panel for each proxy, with what it says and what gold says of its choice.
    Raises ImportError without matplotlib."""
    from matplotlib.figure import Figure

    gold = rows[0]["gold"]
    best = [row for row in rows if row["proxy"] == gold and "n" in row]
    names = list(dict.fromkeys(row["proxy"] for row in rows if row["proxy"] != gold)) or [gold]
    columns = min(3, len(names))
    lines = -(-len(names) // columns)
    size = (max(6.5, WIDTH * columns), HEIGHT * lines + 0.9)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).ravel()
    drawn = []
    for axes, name in zip(panels, names, strict=False):
        drawn.append(draw_proxy(axes, [row for row in rows if row["proxy"] == name], best))
        axes.set_title(f"chosen by {name}", fontsize=10)
    panels[0].set_xlim(-0.05, 1.6 * max(row["sqrt_kl"] for row in rows))  # room for names
    for axes, ends in drawn:
        write_names(axes, ends)
    for axes in panels[len(names) :]:
        axes.set_visible(False)
    title = f"Best of 1 to {best[-1]['n']} responses by a proxy reward:"
    title = f"{title}\nwhat the proxy and what gold ({gold}) say of the chosen one"
    figure.suptitle(f"{title}; bands: one standard error", fontsize=10)
    x = "square root of the KL from the base model (KL in nats a response)"
    figure.supxlabel(x, fontsize=9)
    y = "gain over the base model\n(standard deviations of its responses)"
    figure.supylabel(y, fontsize=9)
    with atomic_write(path) as tmp:
        figure.savefig(tmp, format="png", dpi=110)


def draw_proxy(axes, rows, best):
    """One panel: lines of best-of-n, and points of policies, each with its name at its end."""
    chosen = [row for row in rows if "n" in row]
    ends = [line(axes, best, "gold", BEST, ":", "chosen by gold")]
    ends.append(line(axes, chosen, "proxy", PROXY, "--", "the proxy itself"))
    ends.append(line(axes, chosen, "gold", GOLD, "-", "gold"))
    for row in rows:
        if "policy" in row:
            for key, colour in (("proxy", PROXY), ("gold", GOLD)):
                x, y = row["sqrt_kl"], row[f"{key}_gain"]
                axes.errorbar(x, y, yerr=row[f"{key}_error"], color=colour, marker="o")
                ends.append((x, y, f"{row['policy']}: {key}", colour))
    axes.axhline(0, color="black", linewidth=0.6)
    axes.grid(alpha=0.3)
    axes.tick_params(labelsize=8, labelbottom=True)
    return axes, ends


def line(axes, rows, key, colour, style, name):
    """Draws a gain along sqrt(KL); where its name belongs: (x, y, name, colour)."""
    x = np.array([row["sqrt_kl"] for row in rows])
    y = np.array([row[f"{key}_gain"] for row in rows])
    error = np.nan_to_num([row[f"{key}_error"] for row in rows])
    axes.plot(x, y, style, color=colour, marker=".", markersize=4)
    axes.fill_between(x, y - error, y + error, color=colour, alpha=0.15, linewidth=0)
    return x[-1], y[-1], name, colour


def write_names(axes, ends):
    """Names to the right of their ends, moved up where they would lie on one another."""
    low, high = axes.get_ylim()
    gap = (high - low) / 18  # a line of text
    placed = []
    for x, y, name, colour in sorted(ends, key=lambda end: end[:2]):
        near = [other for at, other in placed if abs(at - x) < 0.5 and abs(other - y) < gap]
        shifted = max(near) + gap if near else y
        placed.append((x, shifted))
        axes.annotate(name, (x, shifted), (6, 0), textcoords="offset points", color=colour,
                      fontsize=8, verticalalignment="center")  # fmt: skip


if __name__ == "__main__":
    cli.run_script(main, Knobs, __doc__, parse)
