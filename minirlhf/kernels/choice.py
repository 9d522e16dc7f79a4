"""Which way a tensor goes: by a Triton kernel, or by its plain PyTorch twin.

MINIRLHF_KERNELS=torch|triton|auto chooses; auto takes Triton on a GPU. With TRITON_INTERPRET=1 and
MINIRLHF_KERNELS=triton the kernels run on a CPU, in Triton's interpreter.
"""

import os
from types import SimpleNamespace

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton reads it, too, at its import
DEMANDED = os.environ.get("MINIRLHF_KERNELS") == "triton"

try:
    if not (torch.cuda.is_available() or INTERPRETED or DEMANDED):
        raise ImportError("a third of a second for nothing")
    import triton
    import triton.language as tl

    jit = triton.jit
except ImportError:  # then the twins do everything
    triton, tl, jit = None, SimpleNamespace(constexpr=None), lambda f: f


def fused(x):
    """Whether x goes to the Triton kernels; RuntimeError where they are demanded and missing."""
    choice = os.environ.get("MINIRLHF_KERNELS", "auto")
    if choice == "triton" and triton is None:
        raise RuntimeError("MINIRLHF_KERNELS=triton, but triton is not installed, or came too late")
    possible = triton is not None and (x.is_cuda or INTERPRETED)
    return possible and (choice == "triton" or (choice == "auto" and x.is_cuda))
