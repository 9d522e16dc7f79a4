"""Matrix products of the head, whose sums stay wide, and parts of the vocabulary that fit memory.

Log-probs are fp32, of logits accumulated in fp32, whatever the autocast: rounded logits are the
largest source of a ratio that is not 1.
"""

import torch
import torch.nn.functional as F

from minirlhf.engine.machine import has_bf16_units, quick_library
from minirlhf.kernels.choice import fused

# Logits held at a time. CPU: 29 MB in fp32, as the C library keeps an array of up to 32 for the
# next step, and fresh pages cost as much as a matrix product; KEEP such parts stay for backward.
# GPU: 512 MB in bf16.
CHUNK, KEEP = {"cpu": 7 << 20, "cuda": 1 << 28}, 4

# torch >= 2.8: a matrix product of bf16 operands that keeps its fp32 sums
MM_DTYPE = "dtype" in torch.ops.aten.mm.overloads()


def operand_dtype(hidden, weight):
    """The type in which hidden and weight are multiplied; on a CPU that of backward's products."""
    both = torch.promote_types(hidden.dtype, weight.dtype)
    if hidden.is_cuda:
        return torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else both
    if fused(hidden):  # in the interpreter
        return both
    if torch.is_autocast_enabled("cpu") and has_bf16_units():
        return torch.get_autocast_dtype("cpu")
    return torch.promote_types(both, torch.float32)


def operands(hidden, weight, dtype):
    """Both as a forward product takes them: on a CPU in fp32 at least, as there no product of
    narrow ones keeps its sums."""
    if not hidden.is_cuda and not fused(hidden):
        dtype = torch.promote_types(dtype, torch.float32)
    return hidden.to(dtype), weight.to(dtype)


def head_logits(hidden, weight):
    """hidden @ weight.T: (N, V), fp32 at least."""
    h, w = operands(hidden, weight, operand_dtype(hidden, weight))
    with quick_library(hidden), torch.autocast(hidden.device.type, enabled=False):
        return matmul(h, w.t())


def matmul(a, b, temperature=1.0):
    """a @ b / temperature with its sums as they are, fp32 at least."""
    wide = torch.promote_types(a.dtype, torch.float32)
    narrow = a.is_cuda and a.dtype != wide
    product = narrow_matmul(a, b, wide) if narrow else a.to(wide) @ b.to(wide)
    return product if temperature == 1 else product.div_(temperature)


def gradient_matmul(a, b):
    """a @ b in fp32 at least; on a CPU sums of narrow operands are rounded first, as a gradient's
    may be under autocast, which takes half the time."""
    return matmul(a, b) if a.is_cuda else (a @ b).to(torch.promote_types(a.dtype, torch.float32))


def narrow_matmul(a, b, wide):
    """a @ b of narrow operands on a GPU, which keeps their sums where torch can say so."""
    return torch.mm(a, b, out_dtype=wide) if MM_DTYPE else (a @ b).to(wide)


def chunks(total, other, device):
    """Slices of about equal length of `total` rows or columns: none times `other` exceeds CHUNK."""
    parts = -(-total * other // CHUNK.get(device.type, CHUNK["cpu"]))
    step = max(1, -(-total // max(1, parts)))
    return [slice(i, min(i + step, total)) for i in range(0, total, step)]


def aligned(weight):
    """weight (V, C), on a GPU with zeros up to a multiple of 64 rows.

    A product of 50,257 columns took seven times one of 50,304 (H100).
    """
    return F.pad(weight, (0, 0, 0, -len(weight) % 64)) if weight.is_cuda else weight
