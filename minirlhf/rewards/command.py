"""Two rewards side by side: a table, and a page with pictures.   python -m minirlhf.reward_eval A B

    python -m minirlhf.reward_eval runs/rm runs/other/rm             # laptop: half a minute
    python -m minirlhf.reward_eval runs/rm rule.py:score --html rewards.html
    python -m minirlhf.reward_eval runs/rm runs/a/rm,runs/b/rm --base runs/ppo
    python -m minirlhf.reward_eval rule.py:score true --data toy --base none

A and B are whatever scores: a run or directory of a reward model, RM,RM,... for an ensemble,
FILE.py:FUNCTION or package.module:FUNCTION on (prompts, responses), judge:URL, `true` for the toy.

How far apart they are is measured on samples of a base model, where a policy begins to search, and
on held-out texts. How good each is is measured on the held-out pairs that train_rm has its accuracy
of: order, calibration, length, spelling. Each +- is a standard error over prompts or texts.

Left out: who only compares, a preference model or people:FILE, since distance and length are of
scores; rewards of single tokens, which rewards/language.py has. Responses are read as finished
texts, also those that were cut.
"""

import contextlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from minirlhf import data
from minirlhf.engine import cli, machine
from minirlhf.engine.cli import UserError, knob
from minirlhf.engine.files import expect_new, finished
from minirlhf.feedback.preferring import is_ensemble, load_preferrer
from minirlhf.look.command import shown_text
from minirlhf.look.policies import base_of, from_its_place, open_policy, read_knobs
from minirlhf.look.replies import Sampling, replies
from minirlhf.look.terminal import columns, print_wrapped
from minirlhf.rewards import calibration, compare, held_out
from minirlhf.rewards.consistency import perturbed, perturbed_consistency
from minirlhf.rewards.page import MARK, write_page
from minirlhf.rewards.table import parts_of, print_blocks, short_names, table_of

NOISE = 0.05  # of the words of a text are misspelt


@dataclass(kw_only=True)
class Knobs(cli.Checked):
    rewards: list  # A and B
    data: str = knob("", "whose held-out part: reviews, toy, a file, ... (default: that of A's "
                         "run, or of B's)")  # fmt: skip
    base: str = knob("", "whose samples are scored: a run, a directory, a hub name; none (default: "
                         "the base model of A's run, or of B's)")  # fmt: skip
    prompts: int = knob(128, "held-out prompts that the base model answers", least=1)
    samples: int = knob(8, "responses to each", least=2)
    response_length: int = knob(0, "most tokens of a response; 0: as in the run of the reward")
    pairs: int = knob(20_000, "most held-out pairs; the default is that of train_rm, fewer mean "
                              "fewer texts to score", least=2)  # fmt: skip
    show: int = knob(5, "pairs to print of those that A and B order in opposite ways")
    html: str = knob("", "write table, pictures and 20 such pairs to this file, as a page")
    seed: int = knob(0, "of samples and misspellings: same seed, same figures")
    device: str = knob("auto", "what computes: cpu, cuda, ...; auto: a GPU where there is one")


class Held(NamedTuple):
    """The held-out texts that pairs compare, and what raters said of them."""

    items: data.Items
    pairs: np.ndarray  # (M, 2), the better one first
    labels: np.ndarray  # (M,) share of raters who prefer the first
    lengths: np.ndarray  # (N,)
    unit: str  # of lengths
    human: float  # accuracy of a single rater; nan where it is not known


def parse(knobs, doc, argv=None):
    """The Knobs of a command line: flags, and two rewards that have none."""
    parser = cli.parser_of(knobs, doc, "minirlhf.reward_eval", "A B")
    parser.add_argument("a", metavar="A", help="what scores")
    parser.add_argument("b", metavar="B", help="what else scores")
    given = vars(parser.parse_args(argv))
    return knobs(rewards=[given.pop("a"), given.pop("b")], **given)


def main(knobs):
    """Prints all of it, writes the page; the figures."""
    if knobs.html:
        expect_new(knobs.html, MARK)
    device = machine.pick_device(knobs.device)
    machine.precision(device, "float32")
    given = knobs.rewards
    source = knobs.data or data_of(given)
    feedback = data.load_feedback(source)
    notes = set()
    score = [scorer(name, feedback, device, notes) for name in given]
    held = held_out_part(feedback, knobs)
    base, texts = samples_of(given, feedback, knobs, device)
    notes = [*map(other_data, given, [feedback] * 2)]

    items = held.items
    noisy = perturbed(items.responses, np.random.default_rng(knobs.seed), NOISE)
    scores = np.array([some(items.prompts, items.responses) for some in score])
    misspelt = np.array([some(items.prompts, noisy) for some in score])
    samples = None
    if texts:
        samples = np.array([some(*texts).reshape(-1, knobs.samples) for some in score])
    found = all_figures(scores, misspelt, samples, held, knobs)

    names = short_names(given)
    facts = [*zip("AB", given, strict=True)]
    facts.append(("held-out", f"{len(items):,} texts of {source}, {len(held.pairs):,} pairs"))
    facts.append(("samples", base))
    for name, own in zip("AB", found["each"], strict=True):
        if own["temperature"].note:
            notes.append(f"{name} has no temperature, {own['temperature'].note}")
    facts += [("note", note) for note in notes if note]
    blocks = table_of(found, names, held)
    chosen = compare.disagreements(*found["margins"], held.pairs, max(knobs.show, 20))
    if knobs.html:  # before all that is printed, which a closed pipe could end
        write_page(knobs.html, names, facts, blocks, found, held, chosen[:20])
        facts.append(("page", knobs.html))
    for fact in facts:
        print_wrapped(*fact)
    print_blocks(blocks)
    print_disagreements(chosen[: knobs.show], held, found)
    return found


# What is read


@contextlib.contextmanager
def notes_once(notes):
    """Prints only those lines that are not among the notes yet: the same texts are read often."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        yield
    for line in said.getvalue().splitlines():
        if line not in notes:
            print(line)
            notes.add(line)


def scorer(name, feedback, device, notes):
    """score(prompts, responses) -> (n,) of what a source names, checked.

    Raises UserError for who only compares, and for what is not a finite number.
    """
    preferrer = load_preferrer(name, feedback, device)
    if not preferrer.score:
        expected = "expected a reward model, a rule, RM,RM,... or a judge"
        raise UserError(f"{name}: only compares, and gives no score of a response: {expected}")

    def score(prompts, responses):
        with notes_once(notes):
            found = np.asarray(preferrer.score(prompts, responses), dtype=float)
        if not np.isfinite(found).all():
            wrong = np.count_nonzero(~np.isfinite(found))
            raise UserError(f"{name}: {wrong} of {len(found)} scores are not finite numbers")
        return found

    return score


def directories(given):
    """The sources that lie on this disk, of an ensemble the first member."""
    names = [name.split(",")[0] if is_ensemble(name) else name for name in given]
    return [name for name in names if not name.startswith("judge:") and Path(name).is_dir()]


def runs_of(given):
    """(run, its knobs) of each source that is one."""
    runs = map(Path, directories(given))
    return [(run, knobs) for run in runs if (knobs := read_knobs(run))]


def data_of(given):
    """The --data of A's run, or of B's."""
    for run, knobs in runs_of(given):
        source = knobs["data"]
        return str(from_its_place(source, run, knobs)) if "." in source else source
    raise UserError("--data: neither A nor B is a run that says it: expected reviews, toy, a file")


def other_data(name, feedback):
    """A line where a run was trained on other data than those whose held-out part is used."""
    for run, _ in runs_of([name]):
        known = (finished(run) or {}).get("data_fingerprint")
        if known and known != feedback.fingerprint():
            return f"{name} was trained on other data: it may have seen texts held out here"
    return None


def held_out_part(feedback, knobs):
    """The Held of the test part: its pairs, at most so many, and the texts in them."""
    pairs, _ = feedback.test.comparisons(knobs.pairs, held_out.SEED)
    if len(pairs) > knobs.pairs:  # given comparisons come all
        rng = np.random.default_rng(held_out.SEED)
        pairs = pairs[np.sort(rng.choice(len(pairs), knobs.pairs, replace=False))]
    chosen, at = np.unique(pairs, return_inverse=True)
    items, pairs = feedback.test.take_items(chosen, []), at.reshape(-1, 2)
    labels = held_out.labels_of(items, pairs)
    lengths, unit = np.array([len(text) for text in items.responses]), "characters"
    for name in directories(knobs.rewards)[:1]:
        lengths, unit = held_out.lengths_of(items, name)
    return Held(items, pairs, labels, lengths, unit, data.human_ceiling(items, pairs))


def samples_of(given, feedback, knobs, device):
    """(a line about them, (prompts, responses) of the base model, each prompt's in turn; None)."""
    base = knobs.base
    for run, own in runs_of(given):
        base = base or base_of(run, "rm", own) or ""
    if base in ("", "none"):
        return ("none" if base else "none: neither A nor B is a run; --base names a model"), None
    policy = open_policy(base, device, "none")
    rows = data.prompts_of(feedback.test, policy.tokenizer, np.random.default_rng(1))
    prompts = [policy.tokenizer.decode(row[1:]) for row in rows[: knobs.prompts]]
    lengths = [own["response_length"] for _, own in runs_of(given) if "response_length" in own]
    length = knobs.response_length or (lengths or [24])[0]
    length = length if knobs.response_length else min(length, policy.model.config.n_ctx // 2)
    found = replies(policy, prompts, Sampling(length, 1.0, 0, knobs.seed, knobs.samples))
    about = f"{len(prompts)} prompts x {knobs.samples} of {base}, at most {length} tokens"
    return about, ([reply.prompt for reply in found], [reply.text for reply in found])


# What is found


def all_figures(scores, misspelt, samples, held, knobs):
    """{name: figures}: of both, and under "each" of either."""
    items, pairs = held.items, held.pairs
    contexts = items.contexts()
    units = np.array(items.units or np.arange(len(items)))
    found = compare.figures(scores, samples, contexts, pairs, units, knobs.seed)
    found |= {"scores": scores, "samples": samples, "contexts": contexts}
    _, rest = held_out.halves(items, pairs)
    found["coin"] = float(np.mean((0.5 - held.labels[rest]) ** 2)) if rest.any() else np.nan
    longer = held.lengths[pairs[:, 0]] - held.lengths[pairs[:, 1]]
    means = items.means() if items.ratings is not None else None
    found["each"] = []
    for before, after, z in zip(scores, misspelt, found["margins"], strict=True):
        own = held_out.figures(z, items, pairs, held.labels, longer, parts_of(len(pairs)))
        own["length"] = calibration.length_figures(before, held.lengths, means)
        own["spelling"] = perturbed_consistency(before, after, pairs)
        found["each"].append(own)
    return found


def print_disagreements(chosen, held, found):
    """Pairs, the one first that raters prefer, each with the rewards' margins."""
    if chosen:
        print("\nopposite orders, the surest first: + for the text that raters prefer")
    room = columns() - 4
    for i in chosen:
        first, second = held.pairs[i]
        a, b = found["margins"][:, i]
        print(f"\n{held.labels[i]:.0%} of raters prefer +, A by {a:+.2f}, B by {b:+.2f}")
        texts = held.items.responses[first], held.items.responses[second]
        if held.items.prompts[first] == held.items.prompts[second] != "":
            print_text("  ", held.items.prompts[first], room)
        for mark, text in zip("+-", texts, strict=True):
            print_text(f"  {mark} ", text, room)


def print_text(mark, text, room, most=4):
    """A text in at most so many lines."""
    lines = shown_text(text, room)
    if len(lines) > most:
        lines = [*lines[: most - 1], f"... ({len(lines) - most + 1} lines more)"]
    for i, line in enumerate(lines):
        print((mark if i == 0 else " " * len(mark)) + line)
