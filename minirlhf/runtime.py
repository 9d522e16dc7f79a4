"""What every script needs before the mathematics starts: knobs, device, seeds, optimizer, schedule."""

import argparse
import contextlib
import dataclasses
import functools
import math
import platform
import random
import signal
import sys

import numpy as np
import torch


class UserError(ValueError):
    """Something the person at the keyboard can mend: the scripts print it as one line and exit with 2."""


def knob(default, help, choices=None, *, least=0, most=float("inf")):
    """A field of a script's dataclass of knobs, with the line that `--help` shows for it; a number lies between least and most."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices, "range": (least, most)})


class Ranges:
    """What a dataclass of knobs inherits: a number out of its knob's range is a UserError."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, (least, most) = getattr(self, field.name), field.metadata["range"]
            if field.type in (int, float) and not least <= value <= most and not (math.isnan(value) and math.isnan(field.default)):
                expected = f"at least {least:g}" if most == float("inf") else f"{least:g} to {most:g}"
                raise UserError(f"--{field.name.replace('_', '-')} {value}: expected {expected}")


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (--help lists the flags)")


DTYPES = ("float32", "tf32", "bfloat16")


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


def pick_device(name):
    """`auto` is the GPU when there is one; anything else is torch's name of a device."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"--device {name}: {str(e).splitlines()[0]}") from None
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    return device


def precision(device, dtype):
    """How matrix products are made from now on, and an autocast context for bfloat16 ones of fp32 weights.

    float32 is exact on every device; tf32 lets a GPU round to 10 bits and is float32 elsewhere.
    """
    cuda = "high" if dtype == "tf32" else "highest"
    torch.set_float32_matmul_precision(cpu_precision() if device.type == "cpu" else cuda)
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")


@contextlib.contextmanager
def products(x):
    """Matrix products in the types of their operands, whatever the autocast; on a CPU by the quicker library for x's rows."""
    kind = x.device.type
    with quick_library(x), torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def matmul_precision(name):
    """torch's precision of fp32 matrix products for a while."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def quick_library(x):
    """On a CPU, matrix products by the quicker of its libraries for as many rows as x has."""
    try:
        torch.get_float32_matmul_precision()
    except RuntimeError:  # the caller uses torch's newer switches, which are not to be mixed with this one
        return contextlib.nullcontext()
    return matmul_precision(cpu_precision(len(x))) if x.device.type == "cpu" else contextlib.nullcontext()


def cpu_precision(rows=1024):
    """torch's name for the quicker library of exact fp32 products of that many rows: oneDNN's "medium", or MKL's "highest".

    With few rows a product is a reading of the weights, for which MKL has less to set up.
    """
    return "medium" if rows >= 16 and onednn_is_exact() else "highest"


@functools.cache
def onednn_is_exact():
    """Whether this CPU's products at precision "medium" are those of fp32.

    That precision means oneDNN in place of MKL, and the right to round to bf16, of which oneDNN makes use only where a CPU has units for
    it (AMX). Elsewhere it computes in fp32, and on an AMD EPYC in less than half of MKL's time.
    """
    a, b = torch.randn(2, 256, 256, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu")
    with matmul_precision("medium"), torch.autocast("cpu", enabled=False):
        error = a @ b - (a.double() @ b.double())
    return error.abs().max().item() < 1e-3  # fp32 2e-5, TF32 2e-2, bf16 0.2


def seed_everything(seed, step=None):
    """Seeds Python, NumPy and torch, and returns a NumPy generator: that of the run, which orders the data, or that of one step.

    A step that depends on nothing but its number can be made again by a run that is resumed.
    """
    rng = np.random.default_rng(seed if step is None else (seed, step))
    number = seed if step is None else int(rng.integers(2**62))
    random.seed(number)
    np.random.seed(number % 2**32)
    torch.manual_seed(number)
    return rng


def make_optimizer(model, lr, *, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0, embedding_lr=1.0):
    """Fused AdamW; only matrices decay, as in GPT-2's training.

    Token embeddings get `embedding_lr` times the rate: a rare token's row hardly ever has a gradient.
    """
    groups = [{"params": [], "weight_decay": decay, "scale": scale}
              for decay, scale in ((0.0, 1.0), (weight_decay, 1.0), (weight_decay / embedding_lr, embedding_lr))]  # fmt: skip
    for name, p in model.named_parameters():
        groups[2 if name.endswith("wte.weight") else int(p.dim() >= 2)]["params"].append(p)
    fused = all(p.device.type in ("cpu", "cuda") for p in model.parameters())
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=fused)


def set_lr(optimizer, step, steps, lr, warmup=0.05, schedule="linear"):
    """Linear warm-up over a share of the steps, then linear to 0, along half a cosine to 0, or constant.

    Step 0 is the first, step steps-1 the last above 0. Without warm-up the linear rate is lr * (1 - step/steps).
    """
    rising = max(1, int(warmup * steps)) if warmup else 0
    left = min(1.0, (steps - step) / max(1, steps - rising))
    scale = {"linear": left, "cosine": (1 - math.cos(math.pi * left)) / 2, "constant": 1.0}[schedule]
    scale = min((step + 1) / rising, scale) if rising else scale
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("scale", 1.0) * scale


def parameters_of(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def gradient_norm(parameters):
    """The norm of all gradients together, by way of those of their rows, which sharding leaves whole: to the last digit the same on one
    process and on many."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    sharded = any(hasattr(g, "to_local") for g in gradients)
    parts = [g.to_local() for g in gradients] if sharded else gradients
    squares = sum(torch.linalg.vector_norm(g.flatten(1) if g.dim() > 1 else g[:, None], dim=1).double().square().sum() for g in parts)
    if sharded:
        torch.distributed.all_reduce(squares)
    return squares.sqrt().float()


def optimizer_step(optimizer, max_grad_norm, loss, nonfinite=None):
    """Clips the norm of all gradients together (0: not at all), steps, clears: the numbers (loss, norm before clipping).

    Where one of them is not finite no step is made: that is an error, or what `nonfinite(loss, norm)` makes of it.
    """
    parameters = parameters_of(optimizer)
    norm = gradient_norm(parameters)
    if max_grad_norm:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, norm)
    loss, norm = torch.stack([loss.detach().float(), norm.float()]).tolist()
    if math.isfinite(loss) and math.isfinite(norm):
        optimizer.step()
    elif nonfinite:
        nonfinite(loss, norm)
    else:
        raise UserError(f"loss {loss}, gradient norm {norm}")
    optimizer.zero_grad(set_to_none=True)
    return loss, norm


def versions(device):
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
            "device": f"{device.type} ({name}, {torch.get_num_threads()} threads)"}  # fmt: skip


if __name__ == "__main__":  # python -m minirlhf.runtime --plan gpt2-xl --gpus 8
    from minirlhf import plan

    plan.runtime.run_script(plan.main, plan.Knobs, plan.__doc__)
