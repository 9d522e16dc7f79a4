"""Token log-probs by fused Triton kernels, each beside its plain PyTorch twin. Those of a decoding step are in decode_kernels.py.

One idea carries this file: the log-prob of one token needs the logits of the whole vocabulary, for each position, and (N, V) floats
are most of the memory of a training step. Here they never exist: forward walks over tiles of the vocabulary with a running maximum and
sum (online softmax, Milakov and Gimelshein 2018), backward makes them again, a part at a time.
Log-probs are fp32, of logits accumulated in fp32, whatever the autocast: rounded logits are the largest source of a ratio that is not 1.

MINIRLHF_KERNELS=torch|triton|auto chooses; auto takes Triton on a GPU. Left out: attention in training, LayerNorm, GELU and Adam, where
PyTorch's own are good; a gradient of the entropy.
"""

import os
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from minirlhf.engine.machine import products

try:
    import triton
    import triton.language as tl

    jit = triton.jit
except ImportError:  # then the twins do everything
    triton, tl, jit = None, SimpleNamespace(constexpr=None), lambda f: f


# Logits held at a time: 29 MB in fp32, as the C library keeps an array of up to 32 for the next step, and fresh pages cost as much as a
# matrix product (KEEP such parts stay for backward); 512 MB in bf16 on a GPU.
CHUNK, KEEP = {"cpu": 7 << 20, "cuda": 1 << 28}, 4


MM_DTYPE = "dtype" in torch.ops.aten.mm.overloads()  # torch >= 2.8: a matrix product of bf16 operands that keeps its fp32 sums


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton read it too, just now


def fused(x):
    """Whether tensor x goes to the Triton kernels. Raises RuntimeError when they are demanded and Triton is not there."""
    if triton and not (x.is_cuda or INTERPRETED):
        return False
    choice = os.environ.get("MINIRLHF_KERNELS", "auto")
    if choice == "triton" and triton is None:
        raise RuntimeError("MINIRLHF_KERNELS=triton, but triton is not installed")
    return triton is not None and choice != "torch" and (x.is_cuda or choice == "triton")


def token_logprobs(hidden, weight, targets, *, temperature=1.0):
    """log softmax(hidden @ weight.T / temperature) at `targets`: (N,) fp32 (float64 for float64 inputs).

    hidden (N, C), weight (V, C), targets (N,) int. Differentiable in hidden and weight. There is no ignore index: the caller
    gathers the rows it wants, so padding never arrives. Raises ValueError for a temperature that is not positive.
    """
    return token_logprobs_and_entropy(hidden, weight, targets, temperature=temperature, entropy=False)[0]


def token_logprobs_and_entropy(hidden, weight, targets, *, temperature=1.0, entropy=True):
    """token_logprobs, and from the same pass the entropy (N,) of the whole distribution, in nats, which has no gradient."""
    if not temperature > 0:
        raise ValueError(f"temperature {temperature}: expected a positive number")
    grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    keep = KEEP if grad and not fused(hidden) and not hidden.is_cuda else 0
    outputs = token_logprobs_op(hidden, weight, targets.contiguous(), float(temperature), operand_dtype(hidden, weight), keep, entropy)
    return outputs[0], outputs[2].detach()


def operand_dtype(hidden, weight):
    """The type in which hidden and weight are multiplied; the sums are fp32 or wider.

    On a GPU bf16 operands are where the speed is, so autocast rounds them; on the CPU nothing is rounded.
    """
    if hidden.is_cuda and torch.is_autocast_enabled("cuda"):
        return torch.get_autocast_dtype("cuda")
    both = torch.promote_types(hidden.dtype, weight.dtype)
    return both if hidden.is_cuda or fused(hidden) else torch.promote_types(both, torch.float32)


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
    """Slices of about equal length into `total` rows or columns, so that a slice times `other` is no more than the chunk."""
    parts = -(-total * other // CHUNK.get(device.type, CHUNK["cpu"]))
    step = max(1, -(-total // max(1, parts)))
    return [slice(i, min(i + step, total)) for i in range(0, total, step)]


def aligned(weight):
    """weight (V, C), on a GPU with zeros up to a multiple of 64 rows: a product of 50,257 columns took seven times one of 50,304 (H100)."""
    return F.pad(weight, (0, 0, 0, -len(weight) % 64)) if weight.is_cuda else weight


ARGUMENTS = "Tensor hidden, Tensor weight, Tensor targets, float temperature, ScalarType dtype"


@torch.library.custom_op("minirlhf::token_logprobs", mutates_args=(),
                         schema=f"({ARGUMENTS}, int keep, bool entropy) -> (Tensor, Tensor, Tensor, Tensor[])")  # fmt: skip
def token_logprobs_op(hidden, weight, targets, temperature, dtype, keep, entropy):
    """Log-probs, log-sum-exp and, where asked for, entropy, (N,) each; and softmax - onehot of the first `keep` parts, for backward."""
    if fused(hidden):
        return *fused_forward(hidden.to(dtype).contiguous(), weight.to(dtype).contiguous(), targets, temperature, entropy), []
    if len(targets) and not (targets.min() >= 0 and targets.max() < len(weight)):
        raise IndexError(f"targets {targets.min()} to {targets.max()}: expected 0 to {len(weight) - 1}")
    h, w, parts = hidden.to(dtype), weight.to(dtype), chunks(len(weight), len(hidden), weight.device)
    at_target, sums, entropies, kept = 0, [], [], []
    with products(h):
        for cols in parts:
            z = matmul(h, w[cols].t(), temperature)  # (N, v)
            largest, (place, inside) = z.amax(1), place_of(targets, cols)
            at_target = at_target + torch.where(inside, z.gather(1, place), 0).squeeze(1)
            p = torch.softmax(z, 1, out=None if z.is_cuda or entropy else z)
            sums.append(largest - p.amax(1).log())  # the largest probability is 1 / sum exp(z - largest)
            entropies += [sums[-1] - z.mul_(p).sum(1)] if entropy else []
            kept += [p] if len(kept) < keep else []
    lse = torch.stack(sums).logsumexp(0)
    shares = [(part - lse).exp() for part in sums]  # of each part in the whole probability
    whole = kept if len(parts) == 1 else [p.mul_(share[:, None]) for p, share in zip(kept, shares, strict=False)]
    kept = [minus_onehot(p, targets, cols) for p, cols in zip(whole, parts, strict=False)]
    inside = [share * part + torch.special.entr(share) for share, part in zip(shares, entropies, strict=False)]
    return at_target - lse, lse, sum(inside) if entropy else lse.new_empty(0), kept


def place_of(targets, cols):
    """Where in a part of the vocabulary each target is, and whether it is in it: (N, 1) each."""
    place, last = targets.long()[:, None] - cols.start, cols.stop - cols.start - 1
    return place.clamp(0, last), (place >= 0) & (place <= last)


def minus_onehot(p, targets, cols):
    """d(-logp) / d logits = softmax - onehot of a part of the vocabulary, in place of its softmax p (N, v)."""
    place, inside = place_of(targets, cols)
    return p.scatter_add_(1, place, -inside.to(p.dtype))


@token_logprobs_op.register_fake
def _(hidden, weight, targets, temperature, dtype, keep, entropy):
    wide = torch.promote_types(dtype, torch.float32)
    kept = [hidden.new_empty((len(hidden), c.stop - c.start), dtype=wide) for c in chunks(len(weight), len(hidden), weight.device)[:keep]]
    return *(hidden.new_empty(n, dtype=wide) for n in (len(targets), len(targets), len(targets) if entropy else 0)), kept


@torch.library.custom_op("minirlhf::token_logprobs_backward", mutates_args=(),
                         schema=f"({ARGUMENTS}, Tensor grad, Tensor lse, Tensor[] kept) -> (Tensor, Tensor)")  # fmt: skip
def token_logprobs_backward_op(hidden, weight, targets, temperature, dtype, grad, lse, kept):
    """Gradients of hidden and weight, by d logp / d logits = onehot - softmax: logits anew for a part, and two matrix products."""
    scale = grad / temperature
    if fused(hidden):
        return fused_backward(hidden, weight, targets, temperature, dtype, scale, lse)
    h, w = hidden.to(dtype), weight.to(dtype)
    d_hidden, d_weight = torch.zeros_like(hidden, dtype=lse.dtype), torch.empty_like(weight, dtype=lse.dtype)
    scaled = (-scale[:, None] * hidden).to(dtype)  # what is to be done to a row of logits is done to its C columns
    with products(h):
        for i, cols in enumerate(chunks(len(w), len(h), w.device)):
            z = None if i < len(kept) else matmul(h, w[cols].t(), temperature)
            error = (kept[i] if z is None else minus_onehot(z.sub_(lse[:, None]).exp_(), targets, cols)).to(dtype)
            d_hidden += matmul(error, w[cols])
            d_weight[cols] = matmul(error.t(), scaled)
    return (-scale[:, None] * d_hidden).to(hidden.dtype), d_weight.to(weight.dtype)


@token_logprobs_backward_op.register_fake
def _(hidden, weight, targets, temperature, dtype, grad, lse, kept):
    return torch.empty_like(hidden), torch.empty_like(weight)


def save_for_backward(ctx, inputs, output):
    hidden, weight, targets, ctx.temperature, ctx.dtype, *_ = inputs
    ctx.save_for_backward(hidden, weight, targets, output[1], *output[3])
    ctx.set_materialize_grads(False)  # else zeros as large as what is kept


def backward(ctx, grad, *_):
    if grad is None:
        return (None,) * 7
    hidden, weight, targets, lse, *kept = ctx.saved_tensors
    d = token_logprobs_backward_op(hidden, weight, targets, ctx.temperature, ctx.dtype, grad.contiguous(), lse, kept)
    return *d, None, None, None, None, None


token_logprobs_op.register_autograd(backward, setup_context=save_for_backward)


def fused_forward(hidden, weight, targets, temperature, entropy):
    """Log-probs, log-sum-exp and entropy (or an empty tensor) of hidden (N, C) and weight (V, C)."""
    (N, C), V = hidden.shape, len(weight)
    if N == 0:
        return tuple(hidden.new_empty(0, dtype=torch.float32) for _ in range(3))
    BM, BN, BK, warps, stages = tile_sizes(hidden, N)
    row_tiles, col_tiles = triton.cdiv(N, BM), triton.cdiv(V, BN)
    splits = min(col_tiles, max(1, 264 // row_tiles))  # two programs for each of an H100's 132 multiprocessors
    tiles = triton.cdiv(col_tiles, splits)
    splits = triton.cdiv(col_tiles, tiles)  # so none is empty
    m, s, z, t = torch.empty(4, splits, N, device=hidden.device)
    split_logsumexp[(row_tiles, splits)](hidden, weight, targets, m, s, z, t, N, V, 1 / temperature, C=C, TILES=tiles, BM=BM, BN=BN, BK=BK,
                                         ENTROPY=entropy, num_warps=warps, num_stages=stages)  # fmt: skip
    lse = torch.logsumexp(m + s.log(), 0)
    return z.sum(0) - lse, lse, lse - (t * (m - lse).exp()).sum(0) if entropy else lse.new_empty(0)


def tile_sizes(hidden, rows):
    """(BM, BN, BK, warps, stages), by a sweep on an H100."""
    if not hidden.is_cuda:
        return 16, 64, 64, 4, 1  # the interpreter: few programs
    if hidden.dtype == torch.float32:
        return 64, 64, 32, 4, 3
    return (128, 256, 64, 8, 3) if rows > 512 else (64, 128, 64, 4, 4)


@jit
def tile_product(h_ptr, w_ptr, rows, cols, N, V, C: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """hidden[rows] @ weight[cols].T: (BM, BN), fp32."""
    acc = tl.zeros([BM, BN], tl.float32)
    for k in range(0, C, BK):
        ks = k + tl.arange(0, BK)
        a = tl.load(h_ptr + rows[:, None] * C + ks[None], mask=(rows < N)[:, None] & (ks < C)[None], other=0.0)
        b = tl.load(w_ptr + cols[None] * C + ks[:, None], mask=(cols < V)[None] & (ks < C)[:, None], other=0.0)
        acc = tl.dot(a, b, acc, input_precision="ieee")
    return acc


@jit
def split_logsumexp(h_ptr, w_ptr, target_ptr, m_ptr, s_ptr, z_ptr, t_ptr, N, V, scale, C: tl.constexpr, TILES: tl.constexpr,
                    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, ENTROPY: tl.constexpr):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    split = tl.program_id(1)
    target = tl.load(target_ptr + rows, mask=rows < N, other=-1)
    m = tl.full([BM], float("-inf"), tl.float32)
    s = tl.zeros([BM], tl.float32)
    t = tl.zeros([BM], tl.float32)
    at_target = tl.zeros([BM], tl.float32)
    for tile in range(TILES):
        cols = (split * TILES + tile).to(tl.int64) * BN + tl.arange(0, BN)
        acc = tile_product(h_ptr, w_ptr, rows, cols, N, V, C, BM, BN, BK)
        z = tl.where((cols < V)[None], acc * scale, float("-inf"))
        larger = tl.maximum(m, tl.max(z, 1))
        e = tl.exp(z - larger[:, None])
        s = s * tl.exp(m - larger) + tl.sum(e, 1)
        if ENTROPY:
            t = t * tl.exp(m - larger) + tl.sum(tl.where((cols < V)[None], e * z, 0.0), 1)
        at_target += tl.sum(tl.where(cols[None] == target[:, None], z, 0.0), 1)
        m = larger
    out = split.to(tl.int64) * N + rows
    tl.store(m_ptr + out, m, mask=rows < N)
    tl.store(s_ptr + out, s, mask=rows < N)
    tl.store(z_ptr + out, at_target, mask=rows < N)
    if ENTROPY:
        tl.store(t_ptr + out, t, mask=rows < N)


def fused_d_logits(hidden, weight, lse, targets, scale, temperature, V):
    """scale * (onehot - softmax) of hidden (n, C) @ weight (W, C).T / temperature: (n, W), 0 from column V on."""
    (N, C), W = hidden.shape, len(weight)
    BM, BN, BK, warps, stages = tile_sizes(hidden, N)
    out = torch.empty(N, W, dtype=hidden.dtype, device=hidden.device)
    grid = (triton.cdiv(N, BM), triton.cdiv(W, BN))
    d_logits_kernel[grid](hidden, weight, lse, targets, scale, out, N, V, W, 1 / temperature, C=C, BM=BM, BN=BN, BK=BK,
                          num_warps=warps, num_stages=stages)  # fmt: skip
    return out


def fused_backward(hidden, weight, targets, temperature, dtype, scale, lse):
    """Gradients of hidden and weight: d_logits for a chunk of rows at a time, and two matrix products."""
    d_hidden, h, w = torch.empty_like(hidden), hidden.to(dtype).contiguous(), aligned(weight.to(dtype))
    d_weight = torch.zeros_like(w, dtype=lse.dtype)  # fp32: the sum over chunks must not round
    with products(h):
        for rows in chunks(len(h), len(w), w.device):
            d_logits = fused_d_logits(h[rows], w, lse[rows], targets[rows], scale[rows], temperature, len(weight))
            d_hidden[rows] = (d_logits @ w).to(hidden.dtype)
            d_weight += matmul(d_logits.t(), h[rows])
    return d_hidden, d_weight[: len(weight)].to(weight.dtype)


@jit
def d_logits_kernel(h_ptr, w_ptr, lse_ptr, target_ptr, scale_ptr, out_ptr, N, V, W, inverse_temperature, C: tl.constexpr,
                    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    cols = tl.program_id(1).to(tl.int64) * BN + tl.arange(0, BN)
    acc = tile_product(h_ptr, w_ptr, rows, cols, N, V, C, BM, BN, BK)
    lse = tl.load(lse_ptr + rows, mask=rows < N, other=0.0)
    target = tl.load(target_ptr + rows, mask=rows < N, other=-1)
    scale = tl.load(scale_ptr + rows, mask=rows < N, other=0.0)
    p = tl.where((cols < V)[None], tl.exp(acc * inverse_temperature - lse[:, None]), 0.0)
    d = (tl.where(cols[None] == target[:, None], 1.0, 0.0) - p) * scale[:, None]
    tl.store(out_ptr + rows[:, None] * W + cols[None], d.to(out_ptr.dtype.element_ty), mask=(rows < N)[:, None] & (cols < W)[None])
