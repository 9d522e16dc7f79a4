"""Which loss train_dpo trains with, and its options, out of its knobs."""

import inspect
import math
from typing import NamedTuple

import torch

from minirlhf import dpo
from minirlhf.engine import cli
from minirlhf.engine.cli import UserError
from minirlhf.lists import GAMES, LISTS, OPTIONS, THUMBS

LOSSES = dpo.KINDS | THUMBS | LISTS | GAMES
NAMES = (*LOSSES, *dpo.ALIASES)
PER_TOKEN = ("simpo", "orpo", "rrhf", "pro", "sigmoid_norm")  # what these compare is per token
SWITCHES = ("length_normalise",)  # options that are true or false, not numbers
NO_BETA = ("orpo", "slic", "sft", "rrhf", "pro", "rwr")
BY_THEMSELVES = ("sppo", "tdpo1", "tdpo2", "d2o")  # these take more than the log-probs of pairs
SOFT = ("sigmoid", "r_dpo", "sppo", "xpo")  # what takes shares of raters for labels


class Method(NamedTuple):
    kind: str  # a key of LOSSES; of a sum, that of its first term
    options: dict  # keywords of the loss
    has_reference: bool
    per_token: bool  # whether its implicit rewards are those of a token, not of a response
    terms: list  # of a sum of losses of pairs, [(weight, kind)]; else the kind alone

    @property
    def soft(self):
        """Whether it takes shares of raters for labels."""
        return any(kind in SOFT for _, kind in self.terms)

    def losses(self, of_pairs, smoothing, doubt=None):
        """The loss of each pair (B,), of of_pairs(kind, **keywords) with all else that it needs.

        A term of a sum takes those of the options that it has, the first the nll_weight, and the
        label smoothing if it has any. `doubt` (B,), the share of raters against the label, is for
        the soft ones; the others leave out ties.
        """
        swapped = smoothing if doubt is None else doubt + smoothing * (1 - 2 * doubt)
        if len(self.terms) == 1:
            return of_pairs(self.kind, label_smoothing=swapped, **self.options)
        total = 0
        for i, (weight, kind) in enumerate(self.terms):
            known = set(dpo.options_of(kind)) - ({"nll_weight"} if i else set())
            own = {name: value for name, value in self.options.items() if name in known}
            hard = smoothing if has_smoothing(kind) else 0.0
            loss = of_pairs(kind, label_smoothing=swapped if kind in SOFT else hard, **own)
            if doubt is not None and kind not in SOFT:
                sure = (doubt < 0.5).to(loss)
                loss = loss * sure * len(sure) / sure.sum().clamp(min=1)
            total = total + weight * loss
        return total


def method_of(knobs):
    """The Method that the knobs name. Raises UserError for what does not go together."""
    method = named_method(knobs)
    check(knobs, method)
    return method


def named_method(knobs):
    """The same of any object with `loss` and `loss_options`, which are not held against others."""
    terms = read_terms(knobs.loss)
    kind = terms[0][1]
    options = read_options(knobs.loss_options, [kind for _, kind in terms])
    has_reference = any(dpo.AXES[kind]["RL1"] == "reference" for _, kind in terms)
    per_token = kind in PER_TOKEN or bool(options.get("length_normalise"))
    return Method(kind, options, has_reference, per_token, terms)


def read_terms(loss):
    """[(weight, kind)] of --loss: [(1.0, "sigmoid"), (0.2, "sft")] of sigmoid+0.2*sft."""
    terms = []
    for term in loss.split("+"):
        weight, star, name = term.strip().rpartition("*")
        kind = dpo.ALIASES.get(name.strip(), name.strip())
        if kind not in LOSSES:
            raise UserError(f"--loss {loss}: expected one of {', '.join(NAMES)}, found {name!r}")
        terms.append((weight_of(weight, loss) if star else 1.0, kind))
    alone = [kind for _, kind in terms if kind not in dpo.KINDS or kind in BY_THEMSELVES]
    kinds = [kind for _, kind in terms]
    cli.refuse({
        f"--loss {loss}: {alone} is no term of a sum, which takes losses of stored pairs":
            len(terms) > 1 and alone,
        f"--loss {loss}: a loss is named twice": len(set(kinds)) < len(kinds),
        f"--loss {loss}: a weight belongs to a sum, as in sigmoid+0.2*sft":
            len(terms) == 1 and "*" in loss,
    })  # fmt: skip
    return terms


def weight_of(text, loss):
    """The number before a term's star."""
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not 0 < weight < math.inf:
        raise UserError(f"--loss {loss}: expected weights above 0, found {text!r}")
    return weight


def read_options(text, kinds):
    """The keywords in "gamma=1.2,length_normalise=true", of one loss or of the terms of a sum."""
    known = []
    for kind in kinds:
        known += dpo.options_of(kind) if kind in dpo.KINDS else OPTIONS.get(kind, ())
    known = list(dict.fromkeys(known))
    options = {}
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        if name not in known:
            has = ", ".join(known) or "none"
            raise UserError(f"--loss-options {part}: loss {'+'.join(kinds)} has the options {has}")
        if name in options:
            raise UserError(f"--loss-options {text}: {name} twice")
        options[name] = option(name, value, part)
    return options


def option(name, value, part):
    """The value as the option's type."""
    if name == "divergence":
        return value
    if name in SWITCHES:
        if value in ("true", "false"):
            return value == "true"
        raise UserError(f"--loss-options {part}: expected {name}=true or {name}=false")
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"--loss-options {part}: expected NAME=NUMBER, a finite one")
    return number


def check(knobs, method):
    """Refuses what makes no sense together."""
    kind, options = method.kind, method.options
    kinds = [kind for _, kind in method.terms]
    online, rounds, smoothing = knobs.online, knobs.rounds, knobs.label_smoothing
    pairs = knobs.batch_size // 2 * math.comb(knobs.samples, 2)
    cli.refuse({
        f"--loss {kind} learns from the policy's own samples: add --online":
            kind in GAMES and not online,
        f"--loss {kind} takes stored responses: leave out --online":
            kind in THUMBS | LISTS and kind != "rwr" and online,
        f"--rounds {rounds}: loss {kind} has no reference to move":
            rounds > 1 and not method.has_reference,
        f"--ref-every {knobs.ref_every}: loss {kind} has no reference to move":
            knobs.ref_every and not method.has_reference,
        "--ref-every and --rounds both move the reference: give one":
            knobs.ref_every and rounds > 1,
        f"--label-smoothing {smoothing}: loss {kind} has none":
            smoothing and not any(map(has_smoothing, kinds)),
        f"--label-smoothing {smoothing}: loss robust needs less than 1/2":
            "robust" in kinds and smoothing >= 0.5,
        "--loss exo_pair needs --label-smoothing above 0 (1e-3, say)":
            "exo_pair" in kinds and not smoothing,
        "--loss exo_pair needs --label-smoothing below 1": "exo_pair" in kinds and smoothing == 1,
        f"--loss {kind} has no preferred response to take nll_weight":
            kind == "d2o" and "nll_weight" in options,
        f"--batch-size {knobs.batch_size}: expected at least 2 responses":
            online and knobs.batch_size < 2,
        f"--select {knobs.select}: loss {kind} has no reference, whose features it is made by":
            knobs.select and not method.has_reference,
        f"--budget {knobs.budget}: a step has {pairs} pairs of own samples":
            knobs.select and knobs.budget > pairs,
    })  # fmt: skip
    many = kind == "d2o" or (online and kind not in GAMES)
    cli.refuse_idle(knobs, {
        f"in loss {kind}": set(kinds) <= set(NO_BETA) and "beta",
        f"in loss {kind}, whose labels are hard": not method.soft and "soft_labels",
        f"in loss {kind}, which has no ranked lists": kind not in LISTS and "group_size",
        "where a list is what answers a prompt, --samples": online and "group_size",
        f"in loss {kind}, which has no reference": not method.has_reference and "reference",
        f"in loss {kind}, which takes one sample to a prompt": kind in GAMES and "samples select",
        "where nothing is sampled: offline": not many and "samples",
        f"in loss {kind}, which has no mixture": kind != "nash_md" and "mixture",
        "where nothing is stored: --online has --steps": online and "epochs delete",
        "without --ref-every": not knobs.ref_every and "ref_mix",
        "without --online, where people have compared": not online and "labeler select",
        "without --select": not knobs.select and "budget",
    })  # fmt: skip
    try:
        divergence = {name: options[name] for name in dpo.DIVERGENCE if name in options}
        dpo.f_divergence(torch.zeros(1), **divergence)
    except ValueError as e:
        raise UserError(f"--loss {knobs.loss}: {e}") from None


def moves(knobs):
    """Whether the reference follows the policy."""
    return knobs.rounds > 1 or knobs.ref_every > 0


def has_smoothing(kind):
    return kind in dpo.KINDS and "label_smoothing" in inspect.signature(dpo.KINDS[kind]).parameters


LOG2 = math.log(2)
AT_START = dict.fromkeys(("sigmoid", "robust", "sigmoid_norm", "aot", "aot_unpaired"), LOG2)
AT_START |= {"tdpo1": LOG2, "tdpo2": LOG2, "d2o": LOG2, "nca_pair": 2 * LOG2, "bco_pair": 2 * LOG2}
AT_START |= {"hinge": 1.0, "apo_zero": 1.0, "apo_down": 1.0, "discopop": (LOG2 + 1) / 2}


def loss_at_start(kind, beta):
    """The loss while policy = reference: one number, as long as no option changes it, or None."""
    of_beta = {"npo": 2 / beta * LOG2, "ipo": 0.25 / beta**2, "sppo_hard": 0.5 / beta**2}
    return (AT_START | of_beta).get(dpo.ALIASES.get(kind, kind))


def step_0_check(method, knobs, loss, stats):
    """Before any update, policy and reference are one: rewards are 0, and the sigmoid loss of any
    pair is log 2."""
    margin = stats["rewards/margins"].item()
    right = not abs(margin) >= 1e-4  # nan: no pair
    known = not method.options and len(method.terms) == 1
    expected = loss_at_start(method.kind, knobs.beta) if known else None
    known = "no known value"
    if expected:
        right = right and abs(loss - expected) < 1e-4 * max(1, expected)
        known = f"expected {expected:.6f}"
    said = f"step-0 check: loss {loss:.6f} ({known}), reward margin {margin:.6f}: "
    return said + ("as they should be" if right else "NOT as they should be")
