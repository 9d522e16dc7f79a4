"""Token log-probabilities over the vocabulary without ever holding them all.

The log-prob of one token needs the logits of the whole vocabulary, for each position: (N, V) floats are most of the memory of a
training step. Here they exist for a chunk of rows at a time, are reduced to one number a row, and are made again in backward (but for a
problem of a single chunk, which is kept).
Everything is fp32 at least, whatever the autocast: rounded logits are the largest source of a ratio that is not 1.

Left out, so far: fused Triton kernels.
"""

import torch
from torch.autograd.function import once_differentiable

CHUNK = 1 << 24  # logits held at a time: 64 MB in fp32


def token_logprobs(hidden, weight, targets, *, temperature=1.0):
    """log softmax(hidden @ weight.T / temperature) at `targets`: (N,) fp32 (float64 for float64 inputs).

    hidden (N, C), weight (V, C), targets (N,) int. Differentiable in hidden and weight. There is no ignore index: the caller
    gathers the rows it wants, so padding never arrives. Raises ValueError for a temperature that is not positive.
    """
    if not temperature > 0:
        raise ValueError(f"temperature {temperature}: expected a positive number")
    return TokenLogprobs.apply(hidden, weight, targets, temperature)


class TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature):
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        logprobs = torch.empty(len(targets), dtype=dtype, device=hidden.device)
        lse = torch.empty_like(logprobs)
        slices = chunks(len(targets), len(weight))
        for rows in slices:
            logits = chunk_logits(hidden[rows], weight, dtype, temperature)
            lse[rows] = logits.logsumexp(-1)
            logprobs[rows] = logits.gather(1, targets[rows, None]).squeeze(1) - lse[rows]
        ctx.save_for_backward(hidden, weight, targets, lse)
        ctx.temperature, ctx.logits = temperature, logits if len(slices) == 1 and any(ctx.needs_input_grad) else None
        return logprobs

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        hidden, weight, targets, lse = ctx.saved_tensors
        d_hidden = torch.empty_like(hidden)
        d_weight = torch.zeros_like(weight, dtype=lse.dtype)  # fp32: the sum over chunks must not round
        scale = (grad / ctx.temperature)[:, None]
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in chunks(len(targets), len(weight)):
                logits = ctx.logits
                if logits is None:
                    logits = chunk_logits(hidden[rows], weight, lse.dtype, ctx.temperature)
                d_logits = (logits - lse[rows, None]).exp_().mul_(-scale[rows])  # d logp / d logits = onehot - softmax
                d_logits.scatter_add_(1, targets[rows, None], scale[rows])
                d_hidden[rows] = (d_logits @ weight.to(lse.dtype)).to(hidden.dtype)
                d_weight.addmm_(d_logits.t(), hidden[rows].to(lse.dtype))
        return d_hidden, d_weight.to(weight.dtype), None, None


def chunks(rows, vocab):
    step = max(1, CHUNK // vocab)
    return [slice(i, i + step) for i in range(0, rows, step)]


def chunk_logits(hidden, weight, dtype, temperature):
    with torch.autocast(hidden.device.type, enabled=False):
        return (hidden.to(dtype) @ weight.to(dtype).t()).div_(temperature)
