"""What a run leaves behind: config.json, metrics.jsonl, samples.jsonl, summary.json, curves.png; and what it prints.

Left out, so far: TensorBoard and W&B.
"""

import dataclasses
import sys
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

from minirlhf.checkpoint import atomic_write, json_line, write_json
from minirlhf.runtime import UserError, versions


class Run:
    """A run directory and its progress bar.

    A new run empties what an older one left there first, the summary before all: `finished` tells by it whether a directory holds a
    whole run.
    """

    def __init__(self, name, knobs, steps, device):
        self.name, self.out, self.device, self.start = name, Path(knobs.out), device, time.time()
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            raise UserError(f"--out {self.out}: a file, not a directory") from None
        for old in ("summary.json", "metrics.jsonl", "samples.jsonl", "curves.png"):
            (self.out / old).unlink(missing_ok=True)
        write_json(self.out / "config.json", dataclasses.asdict(knobs))
        self.metrics = open(self.out / "metrics.jsonl", "w")  # noqa: SIM115  open as long as the run
        self.knobs, self.rows = knobs, []
        self.bar = tqdm(total=steps, desc=name, unit="step", mininterval=1, file=sys.stdout, dynamic_ncols=True)

    def log(self, step, metrics, show=()):
        """Writes one line of metrics.jsonl and shows the named figures at the progress bar."""
        row = {"step": step, "seconds": round(time.time() - self.start, 2)}
        row |= {key: float(value) for key, value in metrics.items()}
        self.rows.append(row)
        self.metrics.write(json_line(row))
        self.metrics.flush()
        self.bar.set_postfix({key.split("/")[-1]: f"{row[key]:.3g}" for key in show if key in row}, refresh=False)
        self.bar.update()

    def say(self, text=""):
        tqdm.write(text, file=sys.stdout)

    def compare(self, before, after, earlier, more=None):
        """Ends a run that tuned a policy: answers to the same prompts before and after, side by side, and their figures.

        `earlier` are the summaries of the stages before, for the figures to stand beside, `more` this run's own. Returns the summary.
        """
        rows = [{"prompt": b.prompt, "before": b.response, "after": a.response, "score_before": b.score, "score_after": a.score}
                for b, a in zip(before, after, strict=True)]  # fmt: skip
        self.samples(rows)
        old, new = answer_figures(before), answer_figures(after)
        figures = {key: value for key, value in earlier.items()
                   if key.startswith("eval/") and not key.endswith(("_before", "_after", "implicit_accuracy"))}  # fmt: skip
        figures |= {f"{key}_before": value for key, value in old.items()} | {f"{key}_after": value for key, value in new.items()}
        summary = self.finish(figures | (more or {}) | {"data": self.knobs.data})
        print("\nsix held-out prompts, answered by the base model and by the policy")
        for row in rows[:6]:
            print(f"\n  prompt  {row['prompt']!r}\n  before  {row['before']!r}  ({row['score_before']:+.2f})"
                  f"\n  after   {row['after']!r}  ({row['score_after']:+.2f})")  # fmt: skip
        print()
        if "eval/perplexity" in figures:
            print(f"base model     perplexity {figures['eval/perplexity']:.1f} on held-out texts")
        if "eval/accuracy" in figures:
            print(f"reward model   orders {figures['eval/accuracy']:.3f} of the test pairs as people do"
                  + (f"; one person does {figures['eval/human_ceiling']:.3f}" if "eval/human_ceiling" in figures else ""))  # fmt: skip
        print(f"{f'policy, {len(rows)} held-out prompts':<40} {'before':>8} {'after':>8}")
        for key in old:
            print(f"  {key.removeprefix('eval/'):<38} {old[key]:>8.3f} {new[key]:>8.3f}")
        print(f"{summary['seconds']:.0f} s; left in {self.out}")
        return summary

    def samples(self, rows):
        with atomic_write(self.out / "samples.jsonl") as tmp:
            tmp.write_text("".join(json_line(row) for row in rows), encoding="utf-8")

    def close(self):
        """Ends the progress bar and the metrics: what follows is evaluation."""
        self.bar.close()
        self.metrics.close()

    def finish(self, figures):
        """Writes curves.png where matplotlib is installed, and summary.json last. Returns the summary."""
        self.close()
        self.plot()
        seconds = round(time.time() - self.start, 1)
        summary = figures | {"seconds": seconds, "seed": self.knobs.seed, "command": " ".join(sys.argv)} | versions(self.device)
        write_json(self.out / "summary.json", summary)
        return summary

    def plot(self):
        """One small panel a metric, over the steps."""
        try:
            from matplotlib.figure import Figure
        except ImportError:
            self.say("curves.png is left out: pip install 'minirlhf[plot]'")
            return
        names = list(dict.fromkeys(key for row in self.rows for key in row if key not in ("step", "seconds")))
        columns = min(4, len(names)) or 1
        lines = -(-len(names) // columns)
        figure = Figure(figsize=(3.4 * columns, 2.3 * lines), layout="constrained")
        for panel, name in enumerate(names):
            axes = figure.add_subplot(lines, columns, panel + 1)
            points = [(row["step"], row[name]) for row in self.rows if name in row]
            steps, values = zip(*points, strict=True)
            axes.plot(steps, values, color="#9db4c8" if len(points) > 60 else "#1f4e79", linewidth=1)
            if len(points) > 60:  # a running mean on top of the noise
                n = len(points) // 25
                axes.plot(steps[n - 1 :], [sum(values[i : i + n]) / n for i in range(len(values) - n + 1)], color="#1f4e79")
            axes.set_title(name, fontsize=9)
            axes.tick_params(labelsize=7)
            axes.grid(alpha=0.3)
        figure.supxlabel("step", fontsize=8)
        with atomic_write(self.out / "curves.png") as tmp:
            figure.savefig(tmp, format="png", dpi=110)


def answer_figures(answers):
    """Means over sampled answers; VADER (Hutto and Gilbert 2014), a rule-based rater of sentiment from -1 to 1, where installed."""
    figures = {
        "eval/score": float(np.mean([a.score for a in answers])), "eval/kl": float(np.mean([a.kl for a in answers])),
        "eval/response_length": float(np.mean([a.tokens for a in answers])),
        "eval/distinct_bigrams": distinct_bigrams([a.response for a in answers]),
    }  # fmt: skip
    figures = {key: value for key, value in figures.items() if value == value}  # without a scorer there is no score
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError:
        return figures
    judge = SentimentIntensityAnalyzer()
    return figures | {"eval/vader": float(np.mean([judge.polarity_scores(a.prompt + a.response)["compound"] for a in answers]))}


def distinct_bigrams(texts):
    """Distinct over all pairs of neighbouring words in all texts together: it falls when a policy collapses."""
    pairs = [pair for text in texts for words in [text.split()] for pair in zip(words, words[1:], strict=False)]
    return len(set(pairs)) / max(1, len(pairs))
