"""What a run leaves behind, and what it prints.

config.json, metrics.jsonl, state/ to resume from; as soon as the last step is done model/ and a
summary.json; then samples.jsonl, curves.png and the figures in the summary. Left out, so far:
TensorBoard and W&B.
"""

import contextlib
import dataclasses
import json
import math
import os
import sys
import time
from pathlib import Path
from signal import SIGTERM

import torch

from minirlhf.engine import curves, machine, parallel, place
from minirlhf.engine.cli import ModelKept, UserError
from minirlhf.engine.contain import at_end, caught_signals
from minirlhf.engine.files import (
    FileError,
    Lock,
    figures_of,
    file_errors,
    finished,
    json_line,
    write_json,
    write_lines,
)
from minirlhf.engine.machine import versions
from minirlhf.engine.states import State, states_in
from minirlhf.engine.terminal import progress_bar, say_above


class Run:
    """A run directory, the loop's bookkeeping and its progress bar.

    `parts` and `given` as in states.State; watch(rows) -> texts finds signs of trouble in
    the metrics so far, and each is said once. A new run empties what an older one left there first,
    the summary before all: `finished` tells by it whether a directory holds a whole run. With
    --resume it goes on from the newest state, if there is one. Raises UserError where another run
    is writing, where the directory cannot be written, and where the state is another run's.
    """

    def __init__(self, name, knobs, plan, device, tokenizer, parts, given, watch=None):
        self.name, self.knobs, self.plan = name, knobs, plan
        self.device, self.tokenizer = device, tokenizer
        self.out, self.start = Path(knobs.out), time.perf_counter()
        self.began = self.logged = self.start  # the loop; the newest line of metrics
        self.first, self.rows, self.skipped, self.bar = 0, [], 0, None
        self.facts, self.whole = {}, False  # for the summary; whether an older life wrote it
        self.watch, self.told = watch or (lambda rows: []), set()
        self.writes = not parallel.rank()  # the first process has the files
        given = given | {"data": (given["data"], plan), "tokenizer": tokenizer.ranks}
        self.state = State(self.out / "state", name, knobs, parts, given)
        with file_errors(f"--out {self.out}"):
            self.enter()
        self.bar = progress_bar(name, len(plan), self.first)
        at_end(self.close_quietly)

    def enter(self):
        """Locks the directory, and goes on with what lies there or clears it."""
        if self.writes:
            place.expect_place(self.out)
            self.state.folder.mkdir(parents=True, exist_ok=True)
            self.lock = Lock(self.state.folder)
            at_end(self.lock.close)
            place.remove_started(self.out)
        facts = self.state.load(self.say) if self.knobs.resume else None
        if facts:
            self.go_on(facts)
        elif self.writes:
            self.begin()
        parallel.barrier()
        path = self.out / "metrics.jsonl" if self.writes else os.devnull
        # Each line is on its way to the disk when it is written.
        self.metrics = open(path, "a", buffering=1, encoding="utf-8")  # noqa: SIM115  until close

    def begin(self):
        """Empties the directory of an older run."""
        states = self.state.files()
        if self.knobs.resume:
            self.say(f"--resume: no state in {self.out}, so {self.name} starts at its first step")
        elif states and not finished(self.out):
            self.say(
                f"note: {self.out} held an interrupted run, saved after {int(states[0].stem)} "
                "steps: with --resume it would have gone on from there"
            )
        place.remove_run(self.out)
        mark = {place.MARK: self.name}
        write_json(self.out / "config.json", mark | dataclasses.asdict(self.knobs))

    def go_on(self, facts):
        """From a state: the metrics up to its step, its clock, its count."""
        path, expected = self.out / "metrics.jsonl", facts["metrics_bytes"]
        self.first, self.skipped = facts["step"], facts["skipped"]
        with file_errors(path), open(path, "rb") as file:
            kept = file.read(expected)
        if len(kept) < expected:
            raise UserError(
                f"{path}: {len(kept)} bytes, expected {expected} at step {self.first}: "
                "start anew without --resume"
            )
        rows = [json.loads(line) for line in kept.splitlines()]
        self.rows = [{k: math.nan if v is None else v for k, v in row.items()} for row in rows]
        for n in range(self.first):
            self.told |= set(self.watch(self.rows[: n + 1]))
        self.start -= facts["seconds"]
        if self.first == len(self.plan):
            self.whole = bool(figures_of(self.out, self.say))
        parallel.barrier()  # all have read
        if self.writes:
            os.truncate(path, len(kept))
        self.say(f"{self.out}: going on after {self.first} of {len(self.plan)} steps")
        now = workers()
        then = {name: facts.get(name, n) for name, n in now.items()}
        if then != now:
            was, here = (" and ".join(f"{n} {name}" for name, n in x.items()) for x in (then, now))
            self.say(f"note: that state is of {was}, here are {here}: sums may end in other digits")

    def steps(self):
        """Yields (step, batch) of the plan, with all random numbers seeded for the step.

        Saves the state after each --save-every steps, after the last, and on SIGINT, SIGTERM and
        SIGHUP, which end the run with the exit code 128 + signal.
        """
        every, total = self.knobs.save_every, len(self.plan)
        self.began = self.logged = time.perf_counter()
        with caught_signals() as caught:
            for step in range(self.first, total):
                machine.seed_everything(self.knobs.seed, step)
                yield step, self.plan[step]
                for sign in sorted(set(self.watch(self.rows)) - self.told):
                    self.told.add(sign)
                    self.say(f"alarm at step {step}: {sign}")
                done = step + 1
                stop = parallel.any_process(bool(caught), self.device)
                if stop or done == total or (every and done % every == 0):
                    self.save(done)
                if stop:
                    self.stop(done)
                    raise SystemExit(128 + (caught or [SIGTERM])[0])
            machine.seed_everything(self.knobs.seed, total)

    def stop(self, done):
        self.close()
        print(
            f"stopped after {done} of {len(self.plan)} steps; "
            f"saved in {self.state.folder}: go on with --resume",
            flush=True,
        )

    def save(self, step):
        with file_errors(self.metrics.name):
            self.metrics.flush()
            if self.writes:
                os.fsync(self.metrics.fileno())
            end = self.metrics.tell()
        seconds = time.perf_counter() - self.start
        facts = {"metrics_bytes": end, "seconds": seconds, "skipped": self.skipped}
        self.state.save(step, **facts, **workers())

    def log(self, step, metrics, show=()):
        """Writes one line of metrics.jsonl and shows the named figures at the progress bar.

        `perf/tokens` among the metrics are the step's real tokens, of all processes together.
        """
        values = {key: float(value) for key, value in metrics.items()}  # a GPU has done it then
        now = time.perf_counter()
        row = {"step": step, "seconds": round(now - self.start, 2)}
        row |= values | self.pace(step, values.get("perf/tokens"), now)
        self.rows.append(row)
        try:
            self.metrics.write(json_line(row))
        except OSError as e:
            raise FileError(f"{self.metrics.name}: {e.strerror}") from e
        shown = {key.split("/")[-1]: f"{row[key]:.3g}" for key in show if key in row}
        if "perf/tokens_per_s" in row:
            shown["tokens/s"] = f"{row['perf/tokens_per_s']:.0f}"
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update()

    def pace(self, step, tokens, now):
        """Metrics of the clock: tokens a second since the line before, saved states included; and
        how many seconds the steps to come take at the mean speed of this process so far."""
        since, self.logged = now - self.logged, now
        done, to_come = step + 1 - self.first, len(self.plan) - step - 1
        mean = (now - self.began) / done
        found = {"perf/seconds_left": round(mean * to_come, 2)}
        if tokens is not None:
            found["perf/tokens_per_s"] = round(tokens / since, 1)
        return found

    def nonfinite(self, step, rows, loss, norm):
        """Keeps a batch whose loss or gradient is not finite for study, and ends the run.

        With --on-nonfinite skip, counts it.
        """
        path = self.out / f"nonfinite-step-{step}-{self.skipped}.jsonl"
        rows = [row.tolist() for row in rows]
        if self.writes:
            write_lines(path, [{"text": self.tokenizer.decode(row), "ids": row} for row in rows])
        what = (
            f"{self.name} step {step}: loss {loss}, gradient norm {norm}; "
            f"the batch of {len(rows)} rows is in {path}"
        )
        if self.knobs.on_nonfinite == "stop":
            raise UserError(
                f"{what}: lower --lr, look at the batch and the scale of its loss, or leave such "
                "batches out: --on-nonfinite skip"
            )
        self.skipped += 1
        self.say(f"skipped, {self.skipped} so far: {what}")

    def say(self, text=""):
        say_above(self.bar, text)

    # After the last step

    @contextlib.contextmanager
    def kept(self, model, final=True, **facts):
        """Keeps the model at once; the block makes the figures, and all that it can spoil is them.

        `facts` are for the summary. Raises ModelKept in place of an error in the block.
        """
        self.facts = facts
        self.keep(model, final)
        try:
            self.close()
            yield
        except Exception as e:
            reason = (str(e).splitlines() or [""])[0] or type(e).__name__
            raise ModelKept(f"{self.what_is_kept()} But {reason}") from e
        except BaseException:  # a signal
            self.say(self.what_is_kept())
            raise

    def keep(self, model, final=True):
        """Writes model/ and, beside it, the summary of a run whose figures are to come.

        A model that is not `final` is kept for --resume alone: to `finished` it is none.
        """
        self.final = final or self.whole
        if self.whole and not final:  # an older life has left the final one
            return
        model.save_pretrained(self.out / "model", self.tokenizer)
        if self.writes and not self.whole:
            marks = {"evaluated": False} | ({} if final else {"model_is_final": False})
            write_json(self.out / "summary.json", self.summary() | marks)
        parallel.barrier()

    def what_is_kept(self):
        state = "in place" if self.final else "trained and kept, but not yet final"
        return (
            f"{self.out}: the model is {state}; the same command with --resume makes up for what "
            "is missing."
        )

    def samples(self, rows):
        if self.writes:
            write_lines(self.out / "samples.jsonl", rows)

    def close(self):
        """Ends the progress bar and the metrics."""
        self.bar.close()
        with file_errors(self.metrics.name):
            self.metrics.close()

    def close_quietly(self):
        with contextlib.suppress(OSError):
            self.close()

    def finish(self, figures):
        """Adds the figures to summary.json, and writes curves.png where matplotlib is installed:
        the summary."""
        self.close()
        summary = figures | self.summary()
        if self.writes:
            path = self.out / "summary.json"
            write_json(path, summary | {"evaluated": False})
            try:
                curves.plot(self.rows, self.out / "curves.png")
            except ImportError:
                self.say("curves.png is left out: pip install 'minirlhf[plot]'")
            write_json(path, summary | {"evaluated": True})
            self.lock.close()
        parallel.barrier()
        return summary | {"evaluated": True}

    def summary(self):
        """What it says besides figures."""
        found = self.facts | {
            "seconds": round(time.perf_counter() - self.start, 1),
            "steps_skipped": self.skipped,
            "seed": self.knobs.seed,
            "command": " ".join(sys.argv),
            "processes": parallel.world(),
        }
        return found | versions(self.device)


def complete(summary, main, knobs):
    """The summary of an older run of main(knobs); with --resume, with the figures it lacked."""
    missing = not summary.get("evaluated", True)
    if missing and knobs.resume and states_in(Path(knobs.out) / "state"):
        try:
            return main(knobs)
        except UserError as e:  # it had other knobs
            print(f"note: {knobs.out} stays without its figures: {e}")
    return summary


def workers():
    """Whose sums a run's are; on other numbers of them they are added in another order."""
    return {"threads": torch.get_num_threads(), "processes": parallel.world()}
