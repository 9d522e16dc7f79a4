"""Which loss train_dpo trains with, and its options, out of its knobs."""

import inspect
from typing import NamedTuple

import torch

from minirlhf import dpo
from minirlhf.engine.cli import UserError
from minirlhf.lists import GAMES, LISTS, OPTIONS, THUMBS

LOSSES = dpo.KINDS | THUMBS | LISTS | GAMES
NAMES = (*LOSSES, *dpo.ALIASES)
PER_TOKEN = ("simpo", "orpo", "rrhf", "pro", "sigmoid_norm")  # what these compare is per token


class Method(NamedTuple):
    kind: str  # a key of LOSSES
    options: dict  # keywords of the loss
    has_reference: bool
    per_token: bool  # whether its implicit rewards are those of a token, not of a response


def method_of(knobs):
    """The Method that the knobs name. Raises UserError for what does not go together."""
    kind = dpo.ALIASES.get(knobs.loss, knobs.loss)
    options = read_options(knobs.loss_options, kind)
    has_reference = dpo.AXES[kind]["RL1"] == "reference"
    check(knobs, kind, options, has_reference)
    per_token = kind in PER_TOKEN or bool(options.get("length_normalise"))
    return Method(kind, options, has_reference, per_token)


def read_options(text, kind):
    """The keywords in "gamma=1.2,length_normalise=true"."""
    known = dpo.options_of(kind) if kind in dpo.KINDS else OPTIONS.get(kind, ())
    options = {}
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        options[name] = value if name == "divergence" else number(value, part)
        if name not in known:
            has = ", ".join(known) or "none"
            raise UserError(f"--loss-options {part}: loss {kind} has the options {has}")
    return options


def number(value, part):
    if value in ("true", "false"):
        return value == "true"
    try:
        return float(value)
    except ValueError:
        expected = "expected NAME=NUMBER, NAME=true or NAME=false"
        raise UserError(f"--loss-options {part}: {expected}") from None


def check(knobs, kind, options, has_reference):
    """Refuses what makes no sense together."""
    online, rounds, smoothing = knobs.online, knobs.rounds, knobs.label_smoothing
    for wrong, message in (
        (kind in GAMES and not online,
         f"--loss {kind} learns from the policy's own samples: add --online"),
        (kind in THUMBS | LISTS and online,
         f"--loss {kind} takes stored responses: leave out --online"),
        (rounds > 1 and not has_reference,
         f"--rounds {rounds}: loss {kind} has no reference to move"),
        (smoothing and not has_smoothing(kind),
         f"--label-smoothing {smoothing}: loss {kind} has none"),
        (kind == "robust" and smoothing >= 0.5,
         f"--label-smoothing {smoothing}: loss robust needs less than 1/2"),
        (kind == "exo_pair" and not smoothing,
         f"--loss {kind} needs --label-smoothing above 0 (1e-3, say)"),
        (kind == "d2o" and "nll_weight" in options,
         f"--loss {kind} has no preferred response to take nll_weight"),
        (online and knobs.batch_size < 2,
         f"--batch-size {knobs.batch_size}: expected at least 2 responses"),
    ):  # fmt: skip
        if wrong:
            raise UserError(message)
    try:
        divergence = {name: options[name] for name in dpo.DIVERGENCE if name in options}
        dpo.f_divergence(torch.zeros(1), **divergence)
    except ValueError as e:
        raise UserError(f"--loss {knobs.loss}: {e}") from None


def has_smoothing(kind):
    return kind in dpo.KINDS and "label_smoothing" in inspect.signature(dpo.KINDS[kind]).parameters
