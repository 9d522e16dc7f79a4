"""What a run leaves behind: config.json, metrics.jsonl, samples.jsonl, summary.json, curves.png; and what it prints.

Left out, so far: TensorBoard and W&B.
"""

import dataclasses
import json
import math
import os
import signal
import sys
import threading
import time
from pathlib import Path

from tqdm import tqdm

from minirlhf.engine import machine, parallel
from minirlhf.engine.cli import UserError
from minirlhf.engine.files import atomic_write, finished, json_line, lock, write_json
from minirlhf.engine.machine import versions
from minirlhf.engine.states import State


class Run:
    """A run directory, the loop's bookkeeping and its progress bar.

    `parts` and `given` as in checkpoint.State. A new run empties what an older one left there first, the summary before all: `finished`
    tells by it whether a directory holds a whole run. With --resume it goes on from the newest state, if there is one. Raises UserError
    where another run is writing, and where the state is another run's.
    """

    def __init__(self, name, knobs, plan, device, tokenizer, parts, given):
        self.name, self.knobs, self.plan, self.device, self.tokenizer = name, knobs, plan, device, tokenizer
        self.out, self.start, self.first, self.rows, self.skipped = Path(knobs.out), time.time(), 0, [], 0
        self.writes = not parallel.rank()  # the first process has the files
        self.state = State(self.out / "state", name, knobs, parts, given | {"data": (given["data"], plan), "tokenizer": tokenizer.ranks})
        if self.writes:
            try:
                self.state.folder.mkdir(parents=True, exist_ok=True)
            except (FileExistsError, NotADirectoryError):
                raise UserError(f"--out {self.out}: a file, not a directory") from None
            self.lock = lock(self.state.folder)
            for part in [p for folder in ("", "state", "model") for p in (self.out / folder).glob("*.tmp[0-9]*")]:
                part.unlink()  # what a killed run was writing
        facts = self.state.load(self.say) if knobs.resume else None
        if facts:
            self.go_on(facts)
        elif self.writes:
            self.begin()
        parallel.barrier()
        self.metrics = open(self.out / "metrics.jsonl" if self.writes else os.devnull, "a", encoding="utf-8")  # noqa: SIM115
        self.bar = tqdm(total=len(plan), initial=self.first, desc=name, unit="step", mininterval=1, file=sys.stdout, dynamic_ncols=True)

    def begin(self):
        """Empties the directory of an older run."""
        if self.knobs.resume:
            self.say(f"--resume: no state in {self.out}, so {self.name} starts at its first step")
        elif self.state.files() and not finished(self.out):
            step = int(self.state.files()[0].stem)
            self.say(f"note: {self.out} held an interrupted run, saved after {step} steps: with --resume it would have gone on from there")
        for old in ("summary.json", "metrics.jsonl", "samples.jsonl", "curves.png", "nonfinite-step-*.jsonl", "state/*.safetensors"):
            for path in self.out.glob(old):
                path.unlink()
        write_json(self.out / "config.json", dataclasses.asdict(self.knobs))

    def go_on(self, facts):
        """From a state: the metrics up to its step, its clock, its count."""
        path, self.first, self.skipped = self.out / "metrics.jsonl", facts["step"], facts["skipped"]
        with open(path, "rb") as file:
            kept = file.read(facts["metrics_bytes"])
        if len(kept) < facts["metrics_bytes"]:
            expected = facts["metrics_bytes"]
            raise UserError(f"{path}: {len(kept)} bytes, expected {expected} at step {self.first}: start anew without --resume")
        self.rows = [{key: math.nan if value is None else value for key, value in json.loads(line).items()} for line in kept.splitlines()]
        self.start -= facts["seconds"]
        parallel.barrier()  # all have read
        if self.writes:
            os.truncate(path, len(kept))
        self.say(f"{self.out}: going on after {self.first} of {len(self.plan)} steps")

    def steps(self):
        """Yields (step, batch) of the plan, with every generator of random numbers seeded for the step; saves the state after each
        --save-every steps, after the last, and on SIGINT and SIGTERM, which end the run with the exit code 128 + signal."""
        caught = []

        def catch(number, _):
            if caught:  # asked twice: at once
                raise SystemExit(128 + number)
            caught.append(number)

        own = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
        before = {number: signal.signal(number, catch) for number in own}
        try:
            for step in range(self.first, len(self.plan)):
                machine.seed_everything(self.knobs.seed, step)
                yield step, self.plan[step]
                done, stop = step + 1, parallel.any_process(bool(caught), self.device)
                if stop or done == len(self.plan) or (self.knobs.save_every and done % self.knobs.save_every == 0):
                    self.save(done)
                if stop:
                    self.close()
                    print(f"stopped after {done} of {len(self.plan)} steps; saved in {self.state.folder}: go on with --resume", flush=True)
                    raise SystemExit(128 + (caught or [signal.SIGTERM])[0])
            machine.seed_everything(self.knobs.seed, len(self.plan))
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def save(self, step):
        self.metrics.flush()
        if self.writes:
            os.fsync(self.metrics.fileno())
        self.state.save(step, metrics_bytes=self.metrics.tell(), seconds=time.time() - self.start, skipped=self.skipped)

    def log(self, step, metrics, show=()):
        """Writes one line of metrics.jsonl and shows the named figures at the progress bar."""
        row = {"step": step, "seconds": round(time.time() - self.start, 2)}
        row |= {key: float(value) for key, value in metrics.items()}
        self.rows.append(row)
        self.metrics.write(json_line(row))
        self.metrics.flush()
        self.bar.set_postfix({key.split("/")[-1]: f"{row[key]:.3g}" for key in show if key in row}, refresh=False)
        self.bar.update()

    def nonfinite(self, step, rows, loss, norm):
        """Keeps a batch whose loss or gradient is not finite for study, and ends the run; with --on-nonfinite skip, counts it."""
        path, rows = self.out / f"nonfinite-step-{step}-{self.skipped}.jsonl", [row.tolist() for row in rows]
        if self.writes:
            with atomic_write(path) as tmp:
                tmp.write_text("".join(json_line({"text": self.tokenizer.decode(row), "ids": row}) for row in rows), "utf-8")
        what = f"{self.name} step {step}: loss {loss}, gradient norm {norm}; the batch of {len(rows)} rows is in {path}"
        if self.knobs.on_nonfinite == "stop":
            raise UserError(f"{what}: lower --lr, look at the batch and the reward's scale, or leave such batches out: --on-nonfinite skip")
        self.skipped += 1
        self.say(f"skipped, {self.skipped} so far: {what}")

    def say(self, text=""):
        tqdm.write(text, file=sys.stdout)

    def samples(self, rows):
        if not self.writes:
            return
        with atomic_write(self.out / "samples.jsonl") as tmp:
            tmp.write_text("".join(json_line(row) for row in rows), encoding="utf-8")

    def close(self):
        """Ends the progress bar and the metrics: what follows is evaluation."""
        self.bar.close()
        self.metrics.close()

    def finish(self, figures):
        """Writes curves.png where matplotlib is installed, and summary.json last. Returns the summary."""
        self.close()
        seconds = round(time.time() - self.start, 1)
        summary = figures | {"seconds": seconds, "steps_skipped": self.skipped, "seed": self.knobs.seed, "command": " ".join(sys.argv)}
        summary |= {"processes": parallel.world()} | versions(self.device)
        if self.writes:
            self.plot()
            write_json(self.out / "summary.json", summary)
            self.lock.close()
        parallel.barrier()
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
