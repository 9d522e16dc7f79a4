"""What a reward's scores of held-out pairs are worth.   python -m minirlhf.rewards.held_out RM ...

    python -m minirlhf.rewards.held_out runs/rm                 # laptop: half a minute
    python -m minirlhf.rewards.held_out runs/a/rm runs/b/rm     # each, and the two as an ensemble
    python -m minirlhf.rewards.held_out rule.py:length --data reviews
    python -m minirlhf.rewards.held_out judge:http://127.0.0.1:8000/v1 --data reviews --pairs 300

Of each RM, on the fixed test pairs that train_rm has its accuracy of: calibration before and after
a temperature, the reliability curve, accuracy by margin and by difference in length, and how far
scores go with length. The temperature is fit on the pairs within one half of the held-out
responses, and everything of calibration is said of the pairs within the other half. RM is a run or
directory of a reward or preference model, FILE.py:FUNCTION, `true` for the toy, or judge:URL. A
judge is asked of each pair twice, in both orders, and by which of the two answers stands first is
shown, too: give it few --pairs.

Left out: standard errors, as pairs share responses.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minirlhf import data
from minirlhf.engine import cli, machine
from minirlhf.engine.cli import UserError, knob
from minirlhf.engine.terminal import printable
from minirlhf.engine.weights import model_directory
from minirlhf.feedback.judge import Judge
from minirlhf.feedback.preferring import load_preferrer
from minirlhf.look.policies import read_knobs
from minirlhf.rewards import calibration
from minirlhf.rewards.ceiling import toy_ceiling
from minirlhf.tokenizer import load_tokenizer

SEED = 1  # of the fixed test pairs: that of train_rm


@dataclass(kw_only=True)
class Knobs(cli.Checked):
    rewards: list
    data: str = knob("", "whose held-out part: reviews, toy, a file, ... (default: the RM's own)")
    pairs: int = knob(20_000, "most held-out pairs; the default is that of train_rm", least=2)
    bins: int = knob(10, "of the reliability curve, of equal width", least=2)
    device: str = knob("auto", "what computes: cpu, cuda, ...; auto: a GPU where there is one")


def parse(knobs, doc, argv=None):
    """The Knobs of a command line."""
    parser = cli.parser_of(knobs, doc, "minirlhf.rewards.held_out", "RM [RM2 ...]")
    parser.add_argument("rewards", nargs="+", metavar="RM", help="what scores")
    return knobs(**vars(parser.parse_args(argv)))


def main(knobs):
    """Prints all of it; {reward: its figures}."""
    device = machine.pick_device(knobs.device)
    machine.precision(device, "float32")
    source = knobs.data or read_knobs(Path(knobs.rewards[0])).get("data")
    if not source:
        raise UserError(f"--data: {knobs.rewards[0]} is no run that says it: expected reviews, ...")
    feedback = data.load_feedback(source)
    items = feedback.test
    pairs, _ = items.comparisons(knobs.pairs, SEED)
    labels = labels_of(items, pairs)
    lengths, unit = lengths_of(items, knobs.rewards[0])
    print(f"{len(pairs):,} held-out pairs of {len(items):,} responses of {printable(source)}")
    if source == "toy":
        best = toy_ceiling()
        print(f"who knows the true rewards: accuracy {best.accuracy:.4f}, log loss "
              f"{best.log_loss:.4f} (exact, of all such pairs)")  # fmt: skip
    found, scores = {}, []
    for name in knobs.rewards:
        z, more = read(name, feedback, pairs, device)
        if "scores" in more:
            scores.append(more.pop("scores"))
            means = items.means() if items.ratings is not None else None
            more["length"] = calibration.length_figures(scores[-1], lengths, means)
        longer = lengths[pairs[:, 0]] - lengths[pairs[:, 1]]
        found[name] = more | figures(z, items, pairs, labels, longer, knobs.bins)
        print_figures(name, found[name], unit)
    if len(scores) > 1:
        found["ensemble"] = ensemble_figures(scores, pairs)
        print_ensemble(found["ensemble"], len(scores))
    return found


def read(name, feedback, pairs, device):
    """(log-odds (P,) for the first of each pair; {"scores": (N,) of all items}, of a judge
    {"position": its figures}, or {})."""
    items = feedback.test
    prompts = [items.prompts[i] for i in pairs[:, 0]]
    first, second = ([items.responses[i] for i in side] for side in pairs.T)
    if name.startswith("judge:"):
        judge = Judge(name)
        forth = judge.first_shown(prompts, first, second)
        back = judge.first_shown(prompts, second, first)
        chances = (forth + 1 - back) / 2
        return logit(chances), {"position": calibration.position_figures(forth, back)}
    preferrer = load_preferrer(name, feedback, device)
    if not preferrer.score:
        return logit(preferrer.prefer(prompts, first, second)), {}
    scores = np.asarray(preferrer.score(items.prompts, items.responses), dtype=float)
    return scores[pairs[:, 0]] - scores[pairs[:, 1]], {"scores": scores}


def logit(chances):
    """Log-odds, finite: a certain chance is taken for one of 1e-6."""
    p = np.clip(chances, 1e-6, 1 - 1e-6)
    return np.log(p) - np.log(1 - p)


def labels_of(items, pairs):
    """(P,) the share of raters who prefer the first of each pair; 1 where it was said so."""
    if items.ratings is None:
        return np.ones(len(pairs))
    labels = np.zeros(len(pairs))
    for first in np.unique(pairs[:, 0]):
        asked = pairs[:, 0] == first
        ratings = [items.ratings[i] for i in (first, *pairs[asked, 1])]
        labels[asked] = data.outvotes(ratings)[0, 1:]
    return labels


def lengths_of(items, name):
    """(lengths (N,) of the responses, their unit): tokens, where a tokenizer lies with the RM."""
    try:
        tokenizer = load_tokenizer(model_directory(name))
    except UserError:
        return np.array([len(text) for text in items.responses]), "characters"
    return np.array([len(tokenizer.encode(text)) for text in items.responses]), "tokens"


def halves(items, pairs):
    """Two masks (P,) of pairs, within one half of the units of the held-out part and within the
    other: no response is in both, nor is a prompt. Pairs across the halves are in neither."""
    units = np.array(items.units or np.arange(len(items)))
    _, unit = np.unique(units, return_inverse=True)
    side = np.random.default_rng(0).permutation(unit.max() + 1)[unit] % 2
    first, second = side[pairs[:, 0]], side[pairs[:, 1]]
    return (first == 0) & (second == 0), (first == 1) & (second == 1)


def figures(z, items, pairs, labels, longer, bins):
    """What is known of log-odds (P,) for the first of each pair, the better one, which is so much
    `longer` (P,)."""
    right = calibration.is_right(z, np.ones(len(z)))  # the first has the higher mean rating
    fit, rest = halves(items, pairs)
    if not fit.any() or not rest.any():
        raise UserError("too few held-out responses for a temperature: each half needs a pair")
    temperature = calibration.fit_temperature(z[fit], labels[fit])
    found = {"accuracy": float(np.nanmean(right)), "temperature": temperature}
    for name, t in (("before", 1.0), ("after", temperature.value)):
        found[name] = calibration.calibration_figures(z[rest], labels[rest], t, bins)
        both = calibration.both_ways(calibration.sigmoid(z[rest] / t), labels[rest])
        found[name]["curve"] = calibration.reliability(*both, bins)
    margin = np.abs(z)
    edges = calibration.equal_counts(margin, 4)
    found["by_margin"] = calibration.accuracy_by(margin, right, edges)
    edges = calibration.equal_counts(longer, 4)
    found["by_length"] = calibration.accuracy_by(longer, right, edges)
    return found


def ensemble_figures(scores, pairs):
    """Of several rewards' scores: whether their spread on a pair tells where they are wrong."""
    mean, spread = calibration.ensemble_pairs(scores, pairs)
    right = calibration.is_right(mean, np.ones(len(mean)))
    edges = calibration.equal_counts(spread, 4)
    return {
        "accuracy": float(np.nanmean(right)),
        "by_spread": calibration.accuracy_by(spread, right, edges),
        "error_by_spread": calibration.predicts_error(spread, right),
        "error_by_margin": calibration.predicts_error(-np.abs(mean), right),
    }


# Print


def print_figures(name, found, unit):
    temperature = found["temperature"]
    print(f"\n{printable(name)}: accuracy {found['accuracy']:.4f}")
    print(f"{'calibration':<20} {'log loss':>9} {'Brier':>9} {'ECE':>9}")
    for title, key in (("as it is", "before"), (f"at T = {temperature.value:.3f}", "after")):
        row = found[key]
        print(f"{title:<20} {row['log_loss']:>9.4f} {row['brier']:>9.4f} {row['ece']:>9.4f}")
    print(f"{'the labels themselves':<20} {found['before']['label_entropy']:>8.4f}")
    if temperature.note:
        print(f"temperature {temperature.note}")
    for title, key in (("as it is", "before"), ("at T", "after")):
        print(f"\n{'reliability ' + title:<20} {'chance':>9} {'raters':>9} {'pairs':>9}")
        for low, high, chance, label, count in zip(*found[key]["curve"], strict=True):
            part = f"{low:.2f} to {high:.2f}"
            print(f"{part:<20} {chance:>9.3f} {label:>9.3f} {count:>9}")
    print_accuracy("by |log-odds|", found["by_margin"])
    print_accuracy(f"by {unit} more of the better", found["by_length"])
    for key, title in (("length", f"score and length in {unit}"), ("position", "by position")):
        if key in found:
            shown = "  ".join(f"{name} {value:.3f}" for name, value in found[key].items())
            print(f"{title}:  {shown}")


def print_accuracy(title, parts):
    print(f"\n{title:<28} {'accuracy':>9} {'pairs':>9}")
    for part in parts:
        print(f"{f'{part.low:.2f} to {part.high:.2f}':<28} {part.accuracy:>9.3f} {part.count:>9}")


def print_ensemble(found, members):
    print(f"\nensemble of {members}, standardised: accuracy {found['accuracy']:.4f}")
    print_accuracy("by spread", found["by_spread"])
    print(f"P(a wrong pair ranks over a right one): by spread {found['error_by_spread']:.3f}, "
          f"by a small margin {found['error_by_margin']:.3f}")  # fmt: skip


if __name__ == "__main__":
    cli.run_script(main, Knobs, __doc__, parse)
