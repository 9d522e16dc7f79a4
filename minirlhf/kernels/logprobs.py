"""Token log-probs from hidden states: what one calls, and the plain twin of the fused kernels.

One idea carries this file and fused_logprobs.py: the log-prob of one token needs the logits of the
whole vocabulary, for each position, and (N, V) floats are most of the memory of a training step.
Here they never exist: forward walks over the vocabulary a part at a time with a running sum (online
softmax, Milakov and Gimelshein 2018), backward makes the logits again, a part at a time.

Left out: attention in training, LayerNorm, GELU and Adam, where PyTorch's own are good.
"""

import torch
from torch.utils.checkpoint import checkpoint

from minirlhf.engine.machine import products
from minirlhf.kernels.choice import fused
from minirlhf.kernels.fused_logprobs import fused_backward, fused_forward
from minirlhf.kernels.matmul import KEEP, chunks, matmul, operand_dtype


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
    """token_logprobs, and the entropy (N,) of the whole distribution, in nats.

    Without a gradient both come from one pass. Where the log-probs have one, the entropy has one
    too, and is made by token_entropy.
    """
    if not temperature > 0:
        raise ValueError(f"temperature {temperature}: expected a positive number")
    grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    keep = KEEP if grad and not fused(hidden) and not hidden.is_cuda else 0
    dtype, together = operand_dtype(hidden, weight), entropy and not grad
    logprobs, _, entropies, _ = token_logprobs_op(
        hidden, weight, targets.contiguous(), float(temperature), dtype, keep, together
    )
    if entropy and grad:
        return logprobs, token_entropy(hidden, weight, temperature)
    return logprobs, entropies.detach()


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


@torch.library.custom_op(
    "minirlhf::token_logprobs",
    mutates_args=(),
    schema=f"({ARGUMENTS}, int keep, bool entropy) -> (Tensor, Tensor, Tensor, Tensor[])",
)
def token_logprobs_op(hidden, weight, targets, temperature, dtype, keep, entropy):
    """Log-probs, log-sum-exp and, where asked for, entropy, (N,) each.

    And of the first `keep` parts of the vocabulary softmax - onehot, for backward.
    """
    h, w = hidden.to(dtype), weight.to(dtype)
    if fused(hidden):
        found = fused_forward(h.contiguous(), w.contiguous(), targets, temperature, entropy)
        return *found, []
    if len(targets) and not (targets.min() >= 0 and targets.max() < len(w)):
        span = f"{targets.min()} to {targets.max()}"
        raise IndexError(f"targets {span}: expected 0 to {len(w) - 1}")
    parts = chunks(len(w), len(h), w.device)
    at_target, sums, entropies, kept = 0, [], [], []
    with products(h):
        for cols in parts:
            z = matmul(h, w[cols].t(), temperature)  # (N, v)
            largest = z.amax(1)
            place, inside = place_of(targets, cols)
            at_target = at_target + torch.where(inside, z.gather(1, place), 0).squeeze(1)
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
        minus_onehot(p, targets, cols)
    whole = lse.new_empty(0)
    if entropy:  # within the parts, and of the choice among them
        both = zip(shares, entropies, strict=True)
        whole = sum(share * part + torch.special.entr(share) for share, part in both)
    return at_target - lse, lse, whole, kept


def place_of(targets, cols):
    """Where in a part of the vocabulary each target is, and whether it is in it: (N, 1) each."""
    place = targets.long()[:, None] - cols.start
    last = cols.stop - cols.start - 1
    return place.clamp(0, last), (place >= 0) & (place <= last)


def minus_onehot(p, targets, cols):
    """d(-logp) / d logits = softmax - onehot of a part of the vocabulary.

    In place of its softmax p (N, v).
    """
    place, inside = place_of(targets, cols)
    return p.scatter_add_(1, place, -inside.to(p.dtype))


@token_logprobs_op.register_fake
def _(hidden, weight, targets, temperature, dtype, keep, entropy):
    N, wide = len(targets), torch.promote_types(dtype, torch.float32)
    logprobs, lse = (hidden.new_empty(N, dtype=wide) for _ in range(2))
    whole = hidden.new_empty(N if entropy else 0, dtype=wide)
    kept = []
    for cols in chunks(len(weight), len(hidden), weight.device)[:keep]:
        kept.append(hidden.new_empty((len(hidden), cols.stop - cols.start), dtype=wide))
    return logprobs, lse, whole, kept


@torch.library.custom_op(
    "minirlhf::token_logprobs_backward",
    mutates_args=(),
    schema=f"({ARGUMENTS}, Tensor grad, Tensor lse, Tensor[] kept) -> (Tensor, Tensor)",
)
def token_logprobs_backward_op(hidden, weight, targets, temperature, dtype, grad, lse, kept):
    """Gradients of hidden and weight, by d logp / d logits = onehot - softmax.

    The logits of a part that was not kept are made anew; two matrix products a part.
    """
    scale = grad / temperature
    if fused(hidden):
        return fused_backward(hidden, weight, targets, temperature, dtype, scale, lse)
    h, w = hidden.to(dtype), weight.to(dtype)
    d_hidden = torch.zeros_like(hidden, dtype=lse.dtype)
    d_weight = torch.empty_like(weight, dtype=lse.dtype)
    # What is to be done to a row of logits is done to its C columns.
    scaled = (-scale[:, None] * hidden).to(dtype)
    with products(h):
        for i, cols in enumerate(chunks(len(w), len(h), w.device)):
            if i < len(kept):
                error = kept[i].to(dtype)
            else:
                z = matmul(h, w[cols].t(), temperature)
                p = z.sub_(lse[:, None]).exp_()
                error = minus_onehot(p, targets, cols).to(dtype)
            d_hidden += matmul(error, w[cols])
            d_weight[cols] = matmul(error.t(), scaled)
    return (-scale[:, None] * d_hidden).to(hidden.dtype), d_weight.to(weight.dtype)


@token_logprobs_backward_op.register_fake
def _(hidden, weight, targets, temperature, dtype, grad, lse, kept):
    return torch.empty_like(hidden), torch.empty_like(weight)


def save_for_backward(ctx, inputs, output):
    hidden, weight, targets, ctx.temperature, ctx.dtype, *_ = inputs
    _, lse, _, kept = output
    ctx.save_for_backward(hidden, weight, targets, lse, *kept)
    ctx.set_materialize_grads(False)  # else zeros as large as what is kept


def backward(ctx, grad, *_):
    if grad is None:
        return (None,) * 7
    hidden, weight, targets, lse, *kept = ctx.saved_tensors
    d_hidden, d_weight = token_logprobs_backward_op(
        hidden, weight, targets, ctx.temperature, ctx.dtype, grad.contiguous(), lse, kept
    )
    return d_hidden, d_weight, None, None, None, None, None


token_logprobs_op.register_autograd(backward, setup_context=save_for_backward)
