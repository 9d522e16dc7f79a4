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
NO_BETA = ("orpo", "slic", "rrhf", "pro")
SOFT = ("sigmoid", "sppo")  # what takes shares of raters for labels


class Method(NamedTuple):
    kind: str  # a key of LOSSES
    options: dict  # keywords of the loss
    has_reference: bool
    per_token: bool  # whether its implicit rewards are those of a token, not of a response


def method_of(knobs):
    """The Method that the knobs name. Raises UserError for what does not go together."""
    method = named_method(knobs)
    check(knobs, method.kind, method.options, method.has_reference)
    return method


def named_method(knobs):
    """The same of any object with `loss` and `loss_options`, which are not held against others."""
    kind = dpo.ALIASES.get(knobs.loss, knobs.loss)
    options = read_options(knobs.loss_options, kind)
    has_reference = dpo.AXES[kind]["RL1"] == "reference"
    per_token = kind in PER_TOKEN or bool(options.get("length_normalise"))
    return Method(kind, options, has_reference, per_token)


def read_options(text, kind):
    """The keywords in "gamma=1.2,length_normalise=true"."""
    known = dpo.options_of(kind) if kind in dpo.KINDS else OPTIONS.get(kind, ())
    options = {}
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        if name not in known:
            has = ", ".join(known) or "none"
            raise UserError(f"--loss-options {part}: loss {kind} has the options {has}")
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


def check(knobs, kind, options, has_reference):
    """Refuses what makes no sense together."""
    online, rounds, smoothing = knobs.online, knobs.rounds, knobs.label_smoothing
    cli.refuse({
        f"--loss {kind} learns from the policy's own samples: add --online":
            kind in GAMES and not online,
        f"--loss {kind} takes stored responses: leave out --online":
            kind in THUMBS | LISTS and online,
        f"--rounds {rounds}: loss {kind} has no reference to move":
            rounds > 1 and not has_reference,
        f"--label-smoothing {smoothing}: loss {kind} has none":
            smoothing and not has_smoothing(kind),
        f"--label-smoothing {smoothing}: loss robust needs less than 1/2":
            kind == "robust" and smoothing >= 0.5,
        f"--loss {kind} needs --label-smoothing above 0 (1e-3, say)":
            kind == "exo_pair" and not smoothing,
        f"--loss {kind} needs --label-smoothing below 1":
            kind == "exo_pair" and smoothing == 1,
        f"--loss {kind} has no preferred response to take nll_weight":
            kind == "d2o" and "nll_weight" in options,
        f"--batch-size {knobs.batch_size}: expected at least 2 responses":
            online and knobs.batch_size < 2,
    })  # fmt: skip
    many = kind == "d2o" or (online and kind not in GAMES)
    cli.refuse_idle(knobs, {
        f"in loss {kind}": kind in NO_BETA and "beta",
        f"in loss {kind}, whose labels are hard": kind not in SOFT and "soft_labels",
        f"in loss {kind}, which has no ranked lists": kind not in LISTS and "group_size",
        f"in loss {kind}, which takes one sample to a prompt": kind in GAMES and "samples",
        "where nothing is sampled: offline": not many and "samples",
        f"in loss {kind}, which has no mixture": kind not in GAMES and "mixture",
        "where nothing is stored: --online has --steps": online and "epochs",
        "without --online, where people have compared": not online and "labeler",
    })  # fmt: skip
    try:
        divergence = {name: options[name] for name in dpo.DIVERGENCE if name in options}
        dpo.f_divergence(torch.zeros(1), **divergence)
    except ValueError as e:
        raise UserError(f"--loss {knobs.loss}: {e}") from None


def has_smoothing(kind):
    return kind in dpo.KINDS and "label_smoothing" in inspect.signature(dpo.KINDS[kind]).parameters
