"""Matrix products of the head, whose sums stay wide, and parts of the vocabulary that fit memory.

Log-probs are fp32, of logits accumulated in fp32, whatever the autocast: rounded logits are the
largest source of a ratio that is not 1.
"""

import torch
import torch.nn.functional as F

from minirlhf.engine.machine import products
from minirlhf.kernels.choice import fused

# Logits held at a time. CPU: 29 MB in fp32, as the C library keeps an array of up to 32 for the
# next step, and fresh pages cost as much as a matrix product; KEEP such parts stay for backward.
# GPU: 512 MB in bf16.
CHUNK, KEEP = {"cpu": 7 << 20, "cuda": 1 << 28}, 4

# torch >= 2.8: a matrix product of bf16 operands that keeps its fp32 sums
MM_DTYPE = "dtype" in torch.ops.aten.mm.overloads()


def operand_dtype(hidden, weight):
    """The type in which hidden and weight are multiplied; the sums are fp32 or wider.

    On a GPU bf16 operands are where the speed is, so autocast rounds them; on the CPU nothing is
    rounded.
    """
    if hidden.is_cuda and torch.is_autocast_enabled("cuda"):
        return torch.get_autocast_dtype("cuda")
    both = torch.promote_types(hidden.dtype, weight.dtype)
    if hidden.is_cuda or fused(hidden):
        return both
    return torch.promote_types(both, torch.float32)


def head_logits(hidden, weight):
    """hidden @ weight.T: (N, V), fp32 at least."""
    dtype = operand_dtype(hidden, weight)
    with products(hidden):
        return matmul(hidden.to(dtype), weight.to(dtype).t())


def matmul(a, b, temperature=1.0):
    """a @ b / temperature with its sums as they are, fp32 at least."""
    wide = torch.promote_types(a.dtype, torch.float32)
    if a.dtype == wide or not a.is_cuda:
        product = a.to(wide) @ b.to(wide)
    else:
        product = torch.mm(a, b, out_dtype=wide) if MM_DTYPE else (a @ b).to(wide)
    return product if temperature == 1 else product.div_(temperature)


def chunks(total, other, device):
    """Slices of about equal length into `total` rows or columns.

    A slice times `other` is no more than the chunk.
    """
    parts = -(-total * other // CHUNK.get(device.type, CHUNK["cpu"]))
    step = max(1, -(-total // max(1, parts)))
    return [slice(i, min(i + step, total)) for i in range(0, total, step)]


def aligned(weight):
    """weight (V, C), on a GPU with zeros up to a multiple of 64 rows.

    A product of 50,257 columns took seven times one of 50,304 (H100).
    """
    return F.pad(weight, (0, 0, 0, -len(weight) % 64)) if weight.is_cuda else weight
