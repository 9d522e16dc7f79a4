"""The command line of every script: knobs, what the user can mend, exit codes.

Knobs are the fields of one dataclass a script, each made by `knob`; `parse` makes a flag of each.
A UserError is what the person at the keyboard can mend: `run_script` prints it as one line and
exits with 2. Whatever else a program raises is a mistake in it, and keeps its traceback. A
ModelKept says that the mistake came after the training; the exit code is 3.
"""

import argparse
import contextlib
import dataclasses
import math
import numbers
import os
import signal
import sys
import traceback
from dataclasses import dataclass

import numpy as np

from minirlhf.engine.contain import HANG_UP
from minirlhf.engine.contain import contained as contained
from minirlhf.engine.terminal import as_terminal


class UserError(ValueError):
    """Something the person at the keyboard can mend."""


class ModelKept(Exception):
    """What was to come after the training failed; the model is in place. The cause is its own."""


DTYPES = ("float32", "tf32", "bfloat16", "auto")


def knob(default, help, choices=None, *, least=0, most=float("inf"), free=False):
    """A field of a script's dataclass of knobs, with the line that `--help` shows for it.

    A number lies between least and most. A knob that is `free` may differ where a run is resumed:
    it has no part in what the run computes, or its content is compared instead.
    """
    about = {"help": help, "choices": choices, "range": (least, most), "free": free}
    return dataclasses.field(default=default, metadata=about)


def flag_of(field):
    return "--" + field.name.replace("_", "-")


EXPECTED = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


class Checked:
    """What a dataclass of knobs inherits: made in Python, too, it holds what its flags would take.

    A path is taken as its text; a number of another type, NumPy's included, as the same number.
    Raises UserError for another type, a number out of range, and what is not among the choices.
    """

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = as_kind(field.type, getattr(self, field.name))
            setattr(self, field.name, value)
            problem = wrong_with(value, field)
            if problem:
                raise UserError(f"{flag_of(field)} {problem}")


def as_kind(kind, value):
    """The value as bool, int, float or str; as it is where that would change what it says."""
    if kind is str:
        return str(value) if isinstance(value, (str, os.PathLike)) else value
    if isinstance(value, (bool, np.bool_)):
        return bool(value) if kind is bool else value
    if kind is bool or not isinstance(value, numbers.Real):
        return value
    try:
        same = kind(value)
    except (ValueError, OverflowError):  # no whole number is NaN or infinite
        return value
    return same if kind is float or same == value else value


def wrong_with(value, field):
    """What a knob's value is and what was expected; None where all is well."""
    checked = field.metadata and field.type in EXPECTED
    if not checked or (value is None and field.default is None):
        return None
    if type(value) is not field.type:
        return f"{value!r}: expected {EXPECTED[field.type]}"
    choices = field.metadata["choices"]
    if choices and value not in choices:
        return f"{value!r}: expected one of {', '.join(map(repr, choices))}"
    least, most = field.metadata["range"]
    if field.type not in (int, float) or least <= value <= most:
        return None
    if math.isnan(value) and math.isnan(field.default):
        return None
    expected = f"at least {least:g}" if most == math.inf else f"{least:g} to {most:g}"
    return f"{value}: expected {expected}"


def given_or(value, source, reviews, other=0.0):
    """A knob's value; where that is NaN, what the reviews take, or data of other sources."""
    if math.isnan(value):
        return reviews if source == "reviews" else other
    return value


def refuse(wrongs):
    """Raises UserError with the first message of {message: whether it is so} that is so."""
    for message, wrong in wrongs.items():
        if wrong:
            raise UserError(message)


def refuse_idle(knobs, idle):
    """Raises UserError for a knob that was given and has no say beside the others.

    idle: {why: names of such knobs, or nothing where it is not so}. To give a knob its default is
    to say nothing.
    """
    fields = {field.name: field for field in dataclasses.fields(knobs)}
    for why, names in idle.items():
        for name in names.split() if names else ():
            value, default = getattr(knobs, name), fields[name].default
            if value == default or value != value:  # NaN, which stands for none
                continue
            given = f"{flag_of(fields[name])} {value}"
            if value is False:
                given = "--no-" + flag_of(fields[name])[2:]
            raise UserError(f"{given} has no say {why}: leave it out")


@dataclass(kw_only=True)
class RunKnobs(Checked):
    """What every run has, whatever it trains."""

    seed: int = knob(
        0, "all that is random follows from this number: same seed, same run", most=2**64 - 1
    )
    device: str = knob(
        "auto", "what computes: cpu, cuda, cuda:1, ...; auto: the GPU where there is one", free=True
    )
    dtype: str = knob(
        "auto", "how matrices multiply: float32, bfloat16 autocast, a GPU's tf32; auto: "
        "bfloat16 if it has units", DTYPES,
    )  # fmt: skip
    compile: bool = knob(
        False, "compile the models' layers first: a minute, then a tenth quicker", free=True
    )
    letters: float = knob(
        math.nan, "how much tokens of like letters learn together; nan: 6 of reviews, else 0"
    )
    max_grad_norm: float = knob(
        1.0, "a gradient longer than this is shortened to it before a step; 0: never"
    )
    save_every: int = knob(
        200, "steps from one saved state to the next; 0: only that after the last step", free=True
    )
    resume: bool = knob(
        False, "go on from the newest state in --out; without one, from the first step", free=True
    )
    on_nonfinite: str = knob(
        "stop",
        "where a loss or gradient is not finite: stop, or skip that batch",
        ("stop", "skip"),
        free=True,
    )
    shard: bool = knob(
        False, "under torchrun: a GPU holds only its part of weights and states (FSDP2)", free=True
    )


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (--help lists the flags)")


def parse(knobs, doc, argv=None):
    """The dataclass `knobs` filled from the command line: a flag a field.

    `--help` shows the script's own knobs first, then those that every run has. Raises UserError for
    an unknown flag and for a bad value.
    """
    parser = Parser(
        description=doc,
        usage="%(prog)s [--flag value ...]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=False,
    )
    shared = dataclasses.fields(RunKnobs) if issubclass(knobs, RunKnobs) else ()
    shared = {field.name for field in shared}
    method = parser.add_argument_group("knobs of this script")
    run = parser.add_argument_group("knobs of every run") if shared else method
    for field in dataclasses.fields(knobs):
        add_flag(run if field.name in shared else method, field)
    run.add_argument("-h", "--help", action="help", help="show this, and do nothing")
    return knobs(**vars(parser.parse_args(argv)))


def parser_of(knobs, doc, name, usage=None):
    """A Parser of the flags of `knobs`, for `python -m name`, to which its caller adds what has no
    flag: fields without help."""
    layout = argparse.RawDescriptionHelpFormatter
    prog, usage = f"python -m {name}", usage and f"%(prog)s {usage} [--flag value ...]"
    parser = Parser(
        description=doc, prog=prog, usage=usage, formatter_class=layout, allow_abbrev=False
    )
    for field in dataclasses.fields(knobs):
        if field.metadata:
            add_flag(parser, field)
    return parser


def add_flag(group, field):
    text = field.metadata["help"].replace("%", "%%")
    if field.default not in ("", None):
        text += f" (default: {field.default})"
    about = {"default": field.default, "help": text}
    if field.type is bool:
        about |= {"action": argparse.BooleanOptionalAction}
    else:
        about |= {"type": field.type, "metavar": field.type.__name__}
        about |= {"choices": field.metadata["choices"]}
    group.add_argument(flag_of(field), **about)


def run_script(main, knobs, doc, parse=parse):
    """`main(parse(knobs))`; what the user can mend is printed as one line, and the exit code 2."""

    def stop(number, _):
        raise SystemExit(128 + number)

    begun = signal.getsignal(signal.SIGINT)
    if getattr(begun, "__module__", "") == "minirlhf.engine.interrupts":
        signal.signal(signal.SIGINT, signal.default_int_handler)
    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, HANG_UP) if number}
    any_encoding()
    try:
        main(parse(knobs, doc))
        if processes := process_group():
            processes.destroy_process_group()
        let_go_of_output()
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except ModelKept as e:
        if not explained(e.__cause__):
            traceback.print_exception(e.__cause__)
        end(e, 3)
    except (UserError, OSError, RuntimeError) as e:
        if not (message := explained(e)):
            raise
        end(message, 2)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def process_group():
    """torch.distributed where this process is one of several; else None.

    That is so, too, where nothing has needed torch yet, whose import takes seconds, or where a
    thread is about to import it.
    """
    processes = getattr(sys.modules.get("torch"), "distributed", None)
    begun = getattr(processes, "is_initialized", bool)
    return processes if begun() else None


def any_encoding():
    """Standard output takes any text, whatever its encoding; what goes to standard error of texts,
    names and messages is printable."""
    with contextlib.suppress(AttributeError, ValueError):  # no stream of Python's own
        sys.stdout.reconfigure(errors="backslashreplace")
    sys.stderr = as_terminal(sys.stderr)


def end(message, code):
    print("\nerror: " + " ".join(str(message).split()), file=sys.stderr, flush=True)
    raise SystemExit(code) from None


def explained(error):
    """What to tell a user about an error, or None where it is a mistake in the program."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError):
        return unwritable_output()
    first = (str(error).splitlines() or [""])[0]
    if type(error).__name__ == "OutOfMemoryError":  # torch's
        return (
            f"{first} What takes less: a smaller --micro-batch (the same result), --batch-size or "
            "--response-length, --dtype bfloat16, a base model of a shorter context, or more GPUs "
            "and --shard"
        )
    if process_group() and ("gloo" in first or "NCCL" in first):
        return (
            "another process of this run has died or cannot be reached; start all of them again, "
            f"with --resume ({first[:200]})"
        )
    return None


def unwritable_output():
    """What to tell where nothing can be printed any more, as to a closed pipe; else None."""
    try:
        print(flush=True)
    except OSError as e:
        let_go_of_output()
        return f"standard output: {e.strerror}"
    return None


def let_go_of_output():
    """Nothing more is said at the end of the process about an output that cannot be written to."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError, AttributeError):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
