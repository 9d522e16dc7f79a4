"""The command line of every script: knobs, what the user can mend, exit codes."""

import argparse
import dataclasses
import math
import signal
import sys
from dataclasses import dataclass

import torch


class UserError(ValueError):
    """Something the person at the keyboard can mend: the scripts print it as one line and exit with 2."""


DTYPES = ("float32", "tf32", "bfloat16")


def knob(default, help, choices=None, *, least=0, most=float("inf"), free=False):
    """A field of a script's dataclass of knobs, with the line that `--help` shows for it.

    A number lies between least and most. A knob that is `free` may differ where a run is resumed: it has no part
    in what the run computes, or its content is compared instead.
    """
    about = {"help": help, "choices": choices, "range": (least, most), "free": free}
    return dataclasses.field(default=default, metadata=about)


class Checked:
    """What a dataclass of knobs inherits: a number out of its knob's range is a UserError."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, (least, most) = getattr(self, field.name), field.metadata["range"]
            if field.type in (int, float) and not least <= value <= most and not (math.isnan(value) and math.isnan(field.default)):
                expected = f"at least {least:g}" if most == float("inf") else f"{least:g} to {most:g}"
                raise UserError(f"--{field.name.replace('_', '-')} {value}: expected {expected}")


@dataclass(kw_only=True)
class RunKnobs(Checked):
    """What every run has, whatever it trains."""

    seed: int = knob(0, "seed of everything random")
    device: str = knob("auto", "auto, cpu, cuda, cuda:1, ...", free=True)
    dtype: str = knob("float32", "float32, bfloat16 autocast, or tf32 on a GPU", DTYPES)
    compile: bool = knob(False, "compile the models' layers: a minute, then a tenth quicker", free=True)
    max_grad_norm: float = knob(1.0, "gradient norm is clipped to this; 0: off")
    save_every: int = knob(200, "steps between states to resume from; 0: the last alone", free=True)
    resume: bool = knob(False, "go on from the state in --out, if there is one", free=True)
    on_nonfinite: str = knob(
        "stop", "a loss or gradient that is not finite: stop, or skip it", ("stop", "skip"), free=True
    )
    shard: bool = knob(False, "under torchrun: FSDP2, weights and states in parts", free=True)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (--help lists the flags)")


def parse(knobs, doc, argv=None):
    """The dataclass `knobs` filled from the command line: a flag a field; an unknown flag or a bad value is an error."""
    parser = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    for field in dataclasses.fields(knobs):
        text = field.metadata["help"].replace("%", "%%")
        text += f" (default: {field.default})" if field.default not in ("", None) else ""
        flag = "--" + field.name.replace("_", "-")
        if field.type is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=field.default, help=text)
        else:
            parser.add_argument(flag, type=field.type, default=field.default, help=text, choices=field.metadata["choices"],
                                metavar=field.type.__name__)  # fmt: skip
    return knobs(**vars(parser.parse_args(argv)))


def run_script(main, knobs, doc):
    """`main(parse(knobs))`, with what the user can mend printed as one line: exit code 2, no traceback."""

    def stop(number, _):
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        main(parse(knobs, doc))
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except (UserError, OSError, RuntimeError) as e:
        if not (message := explained(e)):
            raise
        print("\nerror: " + " ".join(message.split()), file=sys.stderr, flush=True)
        raise SystemExit(2) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def explained(error):
    """What to tell a user about an error, or None where it is a mistake in the program."""
    if isinstance(error, (UserError, OSError)):
        return str(error)
    first = (str(error).splitlines() or [""])[0]
    if isinstance(error, torch.OutOfMemoryError):
        return (f"{first} What takes less: a smaller --micro-batch (the same result), --batch-size or --response-length, "
                "--dtype bfloat16, a base model of a shorter context, or more GPUs and --shard")  # fmt: skip
    if torch.distributed.is_initialized() and ("gloo" in first or "NCCL" in first):
        return f"another process of this run has died or cannot be reached; start all of them again, with --resume ({first[:200]})"
    return None
