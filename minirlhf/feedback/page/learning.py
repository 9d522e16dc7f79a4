"""What the page learns while a person labels: one job at a time, in a thread of its own.

`train` fits a reward model to the labels so far; `write` shows what the policy writes when the best
of several samples by that model is kept. Pages ask for `state` and see how far a job is.

Left out: stopping a job; more than one learner.
"""

import contextlib
import math
import threading
import traceback
from importlib.util import find_spec
from pathlib import Path

from minirlhf.data.labels import parse_label
from minirlhf.engine.cli import UserError

UNSURE = 2000  # questions whose answers the model is asked about, after training
WRITTEN = 6  # prompts that are written to
BEST_OF = 16  # samples of which the best is kept


class Learning:
    """make() gives a refit.Learner; it is called in a thread, by the first job or by warm_up."""

    def __init__(self, session, make):
        self.session, self.make, self.learner = session, make, None
        self.lock, self.making = threading.Lock(), threading.Lock()
        self.warming = threading.Thread(target=self.quietly, daemon=True)
        self.job, self.done, self.total, self.error = "", 0, 1, ""
        self.fit, self.written, self.saved = None, [], ""

    def state(self):
        return {"job": self.job, "done": self.done, "total": self.total, "error": self.error,
                "fit": self.fit, "written": self.written, "saved": self.saved}  # fmt: skip

    def train(self, _):
        return self.begin("train", self.run_train)

    def write(self, _):
        if self.fit is None:
            raise UserError("write: train first")
        return self.begin("write", self.run_write)

    def begin(self, job, run):
        """Starts a job, unless one is running."""
        with self.lock:
            if not self.job:
                self.job, self.done, self.total, self.error = job, 0, 1, ""
                threading.Thread(target=self.guarded, args=(run,), daemon=True).start()
        return self.state()

    def guarded(self, run):
        try:
            self.get_ready()
            run()
        except UserError as e:
            self.error = str(e)
        except Exception as e:  # a mistake of ours: the page goes on, and the terminal has it whole
            traceback.print_exc()
            self.error = f"{type(e).__name__}: {e}"
        finally:
            self.job = ""

    def get_ready(self):
        with self.making:
            self.learner = self.learner or self.make()

    def warm_up(self):
        """Makes the learner while the first questions are read: torch takes seconds."""
        self.warming.start()

    def quietly(self):
        with contextlib.suppress(UserError):  # the first job will say it
            self.get_ready()

    def let_go(self):
        """Waits for what is being imported: a process that ends in the middle of it may hang."""
        if self.warming.is_alive():
            self.warming.join()

    def progress(self, done, total):
        self.done, self.total = done, total

    def run_train(self):
        session = self.session
        with session.lock:
            entries = list(session.labels.entries)
        labels = [parse_label(e, f"{session.knobs.out}:{i + 1}") for i, e in enumerate(entries)]
        fit = self.learner.fit(labels, progress=self.progress)
        shown = [self.disagreement(entries[i]) for i in fit.disagreements[:20]]
        self.reorder()
        out = Path(session.knobs.out).with_suffix(".rm")
        self.learner.save(str(out))
        known = [(int(n), float(a)) for n, a in fit.accuracy_by_labels if math.isfinite(a)]
        self.fit = {"labels": len(labels), "accuracy": known,
                    "seconds": round(fit.seconds, 1), "disagreements": shown}  # fmt: skip
        self.saved = str(out)

    def disagreement(self, entry):
        """A label, and what the model thinks of its texts."""
        texts = entry.get("responses") or [entry[k] for k in ("response", "improved") if k in entry]
        scores = self.learner.score([entry["prompt"]] * len(texts), texts)
        rows = [{"text": t, "score": plain(s)} for t, s in zip(texts, scores, strict=True)]
        best = entry.get("best", (entry.get("ranking") or [None])[0])
        best = 1 if entry["kind"] == "improvement" else best
        return {"prompt": entry["prompt"], "kind": entry["kind"], "texts": rows, "best": best}

    def reorder(self):
        """What the model is least sure of comes first: the smallest difference of its two best."""
        session = self.session
        with session.lock:
            left = [i for i in session.left if len(session.questions[i].responses) > 1][:UNSURE]
        prompts, texts = [], []
        for i in left:
            asked = session.questions[i]
            prompts += [asked.prompt] * len(asked.responses)
            texts += asked.responses
        scores = iter(self.learner.score(prompts, texts) if texts else [])
        margins = {}
        for i in left:
            best = sorted(next(scores) for _ in session.questions[i].responses)[-2:]
            margins[i] = best[1] - best[0] if math.isfinite(sum(best)) else math.inf
        with session.lock:
            session.margins = margins

    def run_write(self):
        """New samples beside the old ones, which join what is asked."""
        session = self.session
        groups = {}
        for asked in session.questions:
            groups.setdefault(asked.prompt, asked)
        first = len(session.written) % len(groups)  # others than last time
        prompts = (list(groups)[first:] + list(groups)[:first])[:WRITTEN]
        new = self.learner.write(prompts, BEST_OF, self.progress)
        rows, lines = [], []
        for prompt, text in zip(prompts, new, strict=True):
            old = groups[prompt].responses[0]
            rows.append({"prompt": prompt, "old": old, "new": text})
            lines.append({"prompt": prompt, "before": old, "after": text})
        scores = self.learner.score(
            [row["prompt"] for row in rows for _ in range(2)],
            [row[side] for row in rows for side in ("old", "new")],
        )
        for row, old, new in zip(rows, scores[::2], scores[1::2], strict=True):
            row |= {"old_score": plain(old), "new_score": plain(new)}
        session.add_written(lines)
        self.written = rows


def plain(score):
    """A score as JSON knows numbers: None where it is not finite."""
    return round(float(score), 2) if math.isfinite(score) else None


def find_learner(session, run):
    """Learning for a run whose policy and reward can be trained here; None for a file, and where
    the module is missing. It is imported, and torch with it, when something is to be learned."""
    if not Path(run).is_dir() or find_spec("minirlhf.feedback.refit") is None:
        return None

    def make():
        from minirlhf.feedback import refit

        return refit.Learner(run, device=session.knobs.device)

    return Learning(session, make)
