"""Log-probs of logits that are there already, and their gradient: one program a row.

The twin is torch's cross entropy, in fp32 at least.
"""

import torch
import torch.nn.functional as F

from minirlhf.kernels.choice import fused, jit, tl, triton


def logprob_from_logits(logits, targets, *, temperature=1.0):
    """log softmax(logits / temperature) at `targets`.

    (N,) fp32 (float64 for float64), of logits (N, V), differentiable in them, and targets (N,) int.
    Raises ValueError for a temperature that is not positive.
    """
    if not temperature > 0:
        raise ValueError(f"temperature {temperature}: expected a positive number")
    if fused(logits) and logits.dtype != torch.float64:
        logprobs, _ = logprob_from_logits_op(
            logits.contiguous(), targets.contiguous(), float(temperature)
        )
        return logprobs
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    scaled = logits if temperature == 1 else logits / temperature
    nobody = -(1 << 40)  # no target is left out
    return -F.cross_entropy(scaled, targets.long(), reduction="none", ignore_index=nobody)


@torch.library.custom_op(
    "minirlhf::logprob_from_logits",
    mutates_args=(),
    schema="(Tensor z, Tensor targets, float temperature) -> (Tensor, Tensor)",
)
def logprob_from_logits_op(logits, targets, temperature):
    """Log-probs and log-sum-exp (N,)."""
    N, V = logits.shape
    logprobs, lse = (torch.empty(N, device=logits.device) for _ in range(2))
    block = min(4096, triton.next_power_of_2(V))
    row_logsumexp[(N,)](logits, targets, logprobs, lse, V, 1 / temperature, BLOCK=block)
    return logprobs, lse


@torch.library.custom_op(
    "minirlhf::logprob_from_logits_backward",
    mutates_args=(),
    schema="(Tensor z, Tensor targets, float temperature, Tensor grad, Tensor lse) -> Tensor",
)
def logprob_from_logits_backward_op(logits, targets, temperature, grad, lse):
    N, V = logits.shape
    d_logits = torch.empty_like(logits)
    scale = 1 / temperature
    block = min(4096, triton.next_power_of_2(V))
    row_gradient[(N,)](logits, targets, scale * grad, lse, d_logits, V, scale, BLOCK=block)
    return d_logits


@logprob_from_logits_op.register_fake
def _(logits, targets, temperature):
    return tuple(logits.new_empty(len(logits), dtype=torch.float32) for _ in range(2))


@logprob_from_logits_backward_op.register_fake
def _(logits, targets, temperature, grad, lse):
    return torch.empty_like(logits)


def save_logits(ctx, inputs, output):
    logits, targets, ctx.temperature = inputs
    _, lse = output
    ctx.save_for_backward(logits, targets, lse)


def logits_backward(ctx, grad, _):
    logits, targets, lse = ctx.saved_tensors
    d_logits = logprob_from_logits_backward_op(
        logits, targets, ctx.temperature, grad.contiguous(), lse
    )
    return d_logits, None, None


logprob_from_logits_op.register_autograd(logits_backward, setup_context=save_logits)


@jit
def row_logsumexp(z_ptr, target_ptr, logprob_ptr, lse_ptr, V, scale, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    m = tl.full([BLOCK], float("-inf"), tl.float32)  # a running maximum and sum in each lane
    s = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        z = tl.load(
            z_ptr + row * V + cols, mask=cols < V, other=float("-inf")
        ).to(tl.float32) * scale  # fmt: skip
        larger = tl.maximum(m, z)
        s = tl.where(larger == float("-inf"), 0.0, s * tl.exp(m - larger) + tl.exp(z - larger))
        m = larger
    largest = tl.max(m, 0)
    lse = largest + tl.log(tl.sum(s * tl.exp(m - largest), 0))
    at_target = tl.load(z_ptr + row * V + tl.load(target_ptr + row)).to(tl.float32) * scale
    tl.store(lse_ptr + row, lse)
    tl.store(logprob_ptr + row, at_target - lse)


@jit
def row_gradient(z_ptr, target_ptr, grad_ptr, lse_ptr, out_ptr, V, scale, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row)
    grad = tl.load(grad_ptr + row)
    lse = tl.load(lse_ptr + row)
    for start in range(0, V, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        z = tl.load(z_ptr + row * V + cols, mask=cols < V, other=0.0).to(tl.float32) * scale
        d = grad * (tl.where(cols == target, 1.0, 0.0) - tl.exp(z - lse))
        tl.store(out_ptr + row * V + cols, d.to(out_ptr.dtype.element_ty), mask=cols < V)
