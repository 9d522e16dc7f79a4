"""Token log-probs from hidden states: what one calls, and the plain twin of the fused kernels.

One idea carries this file and fused_logprobs.py: the log-prob of one token needs the logits of the
whole vocabulary, for each position, and (N, V) floats are most of the memory of a training step.
Here they never exist: forward walks over the vocabulary a part at a time with a running sum (online
softmax, Milakov and Gimelshein 2018), backward makes the logits again, a part at a time.

Left out: attention in training, LayerNorm, GELU and Adam, where PyTorch's own are good.
"""

from functools import partial

import torch
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from minirlhf.engine.machine import few_sizes, quick_library
from minirlhf.kernels.choice import fused
from minirlhf.kernels.fused_logprobs import fused_backward, fused_forward
from minirlhf.kernels.matmul import (
    KEEP,
    chunks,
    gradient_matmul,
    matmul,
    operand_dtype,
    operands,
)


def token_logprobs(hidden, weight, targets, *, temperature=1.0):
    """log softmax(hidden @ weight.T / temperature) at `targets`.

    (N,) fp32 (float64 for float64 inputs), of hidden (N, C), weight (V, C), targets (N,) int.
    Differentiable in hidden and weight. There is no ignore index: the caller gathers the rows it
    wants, so padding never arrives. Raises ValueError for a temperature that is not positive.
    """
    logprobs, _ = token_logprobs_and_entropy(
        hidden, weight, targets, temperature=temperature, entropy=False
    )
    return logprobs


def token_logprobs_and_entropy(hidden, weight, targets, *, temperature=1.0, entropy=True):
    """token_logprobs, and the entropy (N,) of the distribution, in nats; both differentiable."""
    if not temperature > 0:
        raise ValueError(f"temperature {temperature}: expected a positive number")
    grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    keep = KEEP if grad and not fused(hidden) and not hidden.is_cuda else 0
    options = float(temperature), operand_dtype(hidden, weight), keep, entropy and not grad
    walk = token_logprobs_op if torch.compiler.is_compiling() else Walk.apply
    N = len(targets)
    given = few_sizes(hidden), weight, few_sizes(targets.contiguous())
    logprobs, _, entropies, _ = walk(*given, *options)
    if entropy and grad:
        return logprobs[:N], token_entropy(hidden, weight, temperature)
    return logprobs[:N], entropies[:N].detach()


def token_entropy(hidden, weight, temperature=1.0):
    """The entropy (N,) of softmax(hidden @ weight.T / temperature), differentiable.

    Plain PyTorch on every device: the logits of some rows at a time, made again in backward.
    """

    def entropy(h, w):
        wide = torch.promote_types(torch.promote_types(h.dtype, w.dtype), torch.float32)
        with torch.autocast(h.device.type, enabled=False):
            logits = h.to(wide) @ w.to(wide).t()
            logprobs = (logits / temperature).log_softmax(1)
            return -(logprobs.exp() * logprobs).sum(1)

    rows = chunks(len(hidden), len(weight), hidden.device)
    parts = [checkpoint(entropy, hidden[r], weight, use_reentrant=False) for r in rows]
    return torch.cat(parts) if parts else hidden.new_zeros(0)


ARGUMENTS = "Tensor hidden, Tensor weight, Tensor targets, float temperature, ScalarType dtype"


def walk_vocabulary(hidden, weight, targets, temperature, dtype, keep, entropy):
    """Log-probs, log-sum-exp, entropy (N,); softmax - onehot of `keep` parts, for backward."""
    h, w = operands(hidden, weight, dtype)
    if fused(hidden):
        return *fused_forward(h.contiguous(), w.contiguous(), targets, temperature, entropy), []
    if len(targets) and not 0 <= targets.min() <= targets.max() < len(w):
        raise IndexError(f"targets {targets.min()}..{targets.max()}: expected 0..{len(w) - 1}")
    parts, sums, entropies, kept = chunks(len(w), len(h), w.device), [], [], []
    at_target = torch.zeros(len(h), dtype=torch.promote_types(dtype, torch.float32)).to(h.device)
    with quick_library(h), torch.autocast(h.device.type, enabled=False):
        for cols in parts:
            z = matmul(h, w[cols].t(), temperature)  # (N, v)
            largest, places = z.amax(1), places_of(targets, cols)
            at_target[places[0]] = z[places]
            p = torch.softmax(z, 1, out=None if z.is_cuda or entropy else z)
            sums.append(largest - p.amax(1).log())  # the largest p is 1 / sum exp(z - largest)
            if entropy:
                entropies.append(sums[-1] - z.mul_(p).sum(1))
            if len(kept) < keep:
                kept.append(p)
    lse = torch.stack(sums).logsumexp(0)
    shares = [(part - lse).exp() for part in sums]  # of each part in the whole probability
    for p, cols, share in zip(kept, parts, shares, strict=False):
        if len(parts) > 1:
            p.mul_(share[:, None])
        p[places_of(targets, cols)] -= 1
    within = zip(shares, entropies, strict=False)  # the parts; and the choice among them
    whole = [share * part + torch.special.entr(share) for share, part in within]
    return at_target - lse, lse, sum(whole) if entropy else lse.new_empty(0), kept


token_logprobs_op = torch.library.custom_op(
    "minirlhf::token_logprobs",
    walk_vocabulary,
    mutates_args=(),
    schema=f"({ARGUMENTS}, int keep, bool entropy) -> (Tensor, Tensor, Tensor, Tensor[])",
)


def places_of(targets, cols):
    """The rows whose target is in a part of the vocabulary, and its place in it: (n,) each."""
    rows = ((targets >= cols.start) & (targets < cols.stop)).nonzero().squeeze(1)
    return rows, targets[rows].long() - cols.start


@token_logprobs_op.register_fake
def _(hidden, weight, targets, temperature, dtype, keep, entropy):
    N, wide = len(targets), torch.promote_types(dtype, torch.float32)
    logprobs, lse = (hidden.new_empty(N, dtype=wide) for _ in range(2))
    whole = hidden.new_empty(N if entropy else 0, dtype=wide)
    kept = []
    for cols in chunks(len(weight), len(hidden), weight.device)[:keep]:
        kept.append(hidden.new_empty((len(hidden), cols.stop - cols.start), dtype=wide))
    return logprobs, lse, whole, kept


def walk_back(hidden, weight, targets, temperature, dtype, grad, lse, kept):
    """Gradients of hidden and weight, by d logp / d logits = onehot - softmax, a part at a time."""
    scale = grad / temperature
    if fused(hidden):
        return fused_backward(hidden, weight, targets, temperature, dtype, scale, lse)
    h, w = operands(hidden, weight, dtype)
    d_hidden, d_weight = torch.zeros_like(h, dtype=lse.dtype), torch.empty_like(w, dtype=lse.dtype)
    narrow = w.to(dtype)
    scaled = (-scale[:, None] * hidden).to(dtype)  # rather than each row of logits
    with quick_library(h), torch.autocast(h.device.type, enabled=False):
        for i, cols in enumerate(chunks(len(w), len(h), w.device)):
            if i < len(kept):
                p = kept[i]
            else:
                p = matmul(h, w[cols].t(), temperature).sub_(lse[:, None]).exp_()
                p[places_of(targets, cols)] -= 1
            error = p.to(dtype)
            d_hidden += gradient_matmul(error, narrow[cols])
            d_weight[cols] = gradient_matmul(error.t(), scaled)
    return (-scale[:, None] * d_hidden).to(hidden.dtype), d_weight.to(weight.dtype)


token_logprobs_backward_op = torch.library.custom_op(
    "minirlhf::token_logprobs_backward",
    walk_back,
    mutates_args=(),
    schema=f"({ARGUMENTS}, Tensor grad, Tensor lse, Tensor[] kept) -> (Tensor, Tensor)",
)


@token_logprobs_backward_op.register_fake
def _(hidden, weight, targets, temperature, dtype, grad, lse, kept):
    return torch.empty_like(hidden), torch.empty_like(weight)


def save_for_backward(ctx, inputs, output):
    hidden, weight, targets, ctx.temperature, ctx.dtype, *_ = inputs
    ctx.save_for_backward(hidden, weight, targets, output[1], *output[3])
    ctx.set_materialize_grads(False)  # else zeros as large as what is kept


def backward(walk, ctx, grad, *_):
    if grad is None:
        return (None,) * 7
    hidden, weight, targets, lse, *kept = ctx.saved_tensors
    given = hidden, weight, targets, ctx.temperature, ctx.dtype, grad.contiguous(), lse, kept
    return *walk(*given), *(None,) * 5


of_op = partial(backward, token_logprobs_backward_op)
token_logprobs_op.register_autograd(of_op, setup_context=save_for_backward)


class Walk(torch.autograd.Function):
    """The operator without torch.library, which loads torch._dynamo at the first call of one: over
    a second and 145 MB of each process."""

    forward = staticmethod(walk_vocabulary)
    setup_context = staticmethod(save_for_backward)
    backward = staticmethod(once_differentiable(partial(backward, walk_back)))
