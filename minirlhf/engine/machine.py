"""The machine: device, seeds, and how matrix products are made on it.

A CPU has two libraries for exact fp32 products, which torch calls by the names of its precisions:
oneDNN is "medium", MKL "highest". With many rows oneDNN is the quicker one. With few, a product is
a reading of the weights, for which MKL has less to set up.
"""

import contextlib
import ctypes
import functools
import os
import platform
import random

import numpy as np
import torch
import torch.nn.functional as F

from minirlhf.engine.cli import UserError

# oneDNN keeps the code of 1,024 sizes of products, half a megabyte each and more: with rows of all
# lengths that is most of a run's memory. With few_sizes half as many are enough.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "512")


# In the names that oneDNN gives to the instructions it may use, of those with bf16
KNOW_BF16 = "BF16", "FP16", "AMX", "AVX10", "ALL", "DEFAULT"


# Of malloc.h, and the variables that set them before a process starts
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
MALLOC_VARIABLES = {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"}


def keep_freed_memory():
    """Lets glibc keep what a step frees for the next one: it would give arrays of over 32 MB, and
    the heap's free end, back to the system, whose fresh pages take up to a tenth of a step. What
    the caller has set stays."""
    if platform.libc_ver()[0] == "glibc" and not MALLOC_VARIABLES & os.environ.keys():
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_TRIM_THRESHOLD, 1 << 30)
        mallopt(M_MMAP_THRESHOLD, 1 << 28)


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


def pick_dtype(name, device):
    """`auto` is bfloat16 where the device has units for it, else float32, and says so."""
    if name != "auto":
        return name
    on_gpu = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    on_cpu = device.type == "cpu" and has_bf16_units()
    found = "bfloat16" if on_gpu or on_cpu else "float32"
    print(f"--dtype auto: {found}")
    return found


def precision(device, dtype):
    """How matrix products are made from now on, and an autocast context for bfloat16 ones.

    float32 is exact on every device; tf32 lets a GPU round to 10 bits and is float32 elsewhere.
    Weights are fp32 in all cases.
    """
    if dtype == "tf32" and device.type != "cuda":
        print(f"note: --dtype tf32 is float32 on {device.type}")
    cuda = "high" if dtype == "tf32" else "highest"
    torch.set_float32_matmul_precision(cpu_precision() if device.type == "cpu" else cuda)
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")


@contextlib.contextmanager
def matmul_precision(name):
    """torch's precision of fp32 matrix products for a while."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def quick_library(x):
    """On a CPU, matrix products by the quicker of its libraries for as many rows as x has."""
    before = None
    with contextlib.suppress(RuntimeError):  # where the caller set torch's newer switches
        before = torch.get_float32_matmul_precision()
    try:
        if before and x.device.type == "cpu":
            torch.set_float32_matmul_precision(cpu_precision(len(x)))
        yield
    finally:
        if before:
            torch.set_float32_matmul_precision(before)


def few_sizes(x):
    """x (N, ...), on a CPU with zeros up to a multiple of 64 rows, or of 8 below 256: for each new
    size of a product oneDNN writes code, on one core, for longer than many a product takes."""
    spare = -len(x) % (8 if len(x) < 256 else 64) if x.device.type == "cpu" else 0
    return F.pad(x, (0, 0) * (x.dim() - 1) + (0, spare)) if spare else x


def cpu_precision(rows=1024):
    """torch's name for the quicker library of exact fp32 products of that many rows."""
    return "medium" if rows >= 16 and onednn_is_exact() else "highest"


@functools.cache
def onednn_is_exact():
    """Whether this CPU's products at precision "medium" are those of fp32.

    That precision means oneDNN in place of MKL, and the right to round to bf16, of which oneDNN
    makes use only where a CPU has units for it (AMX). Elsewhere it computes in fp32, and on an AMD
    EPYC in less than half of MKL's time.
    """
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 256, 256, generator=generator, dtype=torch.float32, device="cpu")
    with matmul_precision("medium"), torch.autocast("cpu", enabled=False):
        error = a @ b - (a.double() @ b.double())
    return error.abs().max().item() < 1e-3  # fp32 2e-5, TF32 2e-2, bf16 0.2


@functools.cache
def has_bf16_units():
    """Whether this CPU has instructions for products of bf16 numbers, as far as torch can say, and
    oneDNN may use them: held to older ones it takes up to seventy times as long."""
    asked = "_is_avx512_bf16_supported", "_is_amx_tile_supported"
    units = any(getattr(torch.cpu, name, bool)() for name in asked)
    onednn = torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled
    held = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or "ALL"
    return units and onednn and any(name in held.upper() for name in KNOW_BF16)


def seed_everything(seed, step=None):
    """Seeds Python, NumPy and torch; returns a NumPy generator: the run's, or that of one step.

    The run's orders the data. A step depends on nothing but its number, so a run that is resumed
    can make it again.
    """
    rng = np.random.default_rng(seed if step is None else (seed, step))
    number = seed if step is None else int(rng.integers(2**62))
    random.seed(number)
    np.random.seed(number % 2**32)
    torch.manual_seed(number)
    return rng


def versions(device):
    """Of Python and libraries; the device, a CPU with the widest instructions that torch uses."""
    kind = platform.processor() or platform.machine()
    name = f"{kind}, {torch.backends.cpu.get_cpu_capability()}"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "device": f"{device.type} ({name}, {torch.get_num_threads()} threads)",
    }
