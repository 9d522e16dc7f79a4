"""Fused Triton kernels, each beside its plain PyTorch twin: token log-probs, the sampler, the attention of a decoding step.

One idea carries the first: the log-prob of one token needs the logits of the whole vocabulary, for each position, and (N, V) floats
are most of the memory of a training step. Here they never exist: forward walks over tiles of the vocabulary with a running maximum and
sum (online softmax, Milakov and Gimelshein 2018), backward makes them again for a chunk of rows at a time.
Log-probs are fp32, of logits accumulated in fp32, whatever the autocast: rounded logits are the largest source of a ratio that is not 1.

MINIRLHF_KERNELS=torch|triton|auto chooses; auto takes Triton on a GPU. Left out: attention in training, LayerNorm, GELU and Adam, where
PyTorch's own are good; top-k in the sampler.
"""

import contextlib
import functools
import os
from types import SimpleNamespace

import torch
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl

    jit = triton.jit
except ImportError:  # then the twins do everything
    triton, tl, jit = None, SimpleNamespace(constexpr=None), lambda f: f

# Logits held at a time: 29 MB in fp32, as the C library keeps an array of up to 32 for the next step, and fresh pages cost as much as a
# matrix product (KEEP such parts stay for backward); 512 MB in bf16 on a GPU.
CHUNK = {"cpu": 7 << 20, "cuda": 1 << 28}
KEEP = 4
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


# Token log-probs


def token_logprobs(hidden, weight, targets, *, temperature=1.0):
    """log softmax(hidden @ weight.T / temperature) at `targets`: (N,) fp32 (float64 for float64 inputs).

    hidden (N, C), weight (V, C), targets (N,) int. Differentiable in hidden and weight. There is no ignore index: the caller
    gathers the rows it wants, so padding never arrives. Raises ValueError for a temperature that is not positive.
    """
    if not temperature > 0:
        raise ValueError(f"temperature {temperature}: expected a positive number")
    grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    keep = KEEP if grad and not fused(hidden) and not hidden.is_cuda else 0
    return token_logprobs_op(hidden, weight, targets, float(temperature), operand_dtype(hidden, weight), keep)[0]


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


def matmul(a, b):
    """a @ b with its sums as they are, fp32 at least."""
    wide = torch.promote_types(a.dtype, torch.float32)
    if a.dtype == wide or not a.is_cuda:
        return a.to(wide) @ b.to(wide)
    return torch.mm(a, b, out_dtype=wide) if MM_DTYPE else (a @ b).to(wide)


@contextlib.contextmanager
def products(x):
    """Matrix products in the types of their operands, whatever the autocast; on a CPU by the quicker library for x's rows."""
    kind = x.device.type
    with quick_library(x), torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def quick_library(x):
    """On a CPU, matrix products by the quicker of its libraries for as many rows as x has."""
    before = torch.get_float32_matmul_precision()
    if x.device.type == "cpu":
        torch.set_float32_matmul_precision(cpu_precision(len(x)))
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


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
    a, b = torch.randn(2, 256, 256, generator=torch.Generator().manual_seed(0))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    error = a @ b - (a.double() @ b.double())
    torch.set_float32_matmul_precision(before)
    return error.abs().max().item() < 1e-3  # fp32 2e-5, TF32 2e-2, bf16 0.2


def chunks(total, other, device):
    """Slices of about equal length into `total` rows or columns, so that a slice times `other` is no more than the chunk."""
    parts = -(-total * other // CHUNK.get(device.type, CHUNK["cpu"]))
    step = max(1, -(-total // max(1, parts)))
    return [slice(i, min(i + step, total)) for i in range(0, total, step)]


def aligned(weight):
    """A head's weight (V, C) with rows of zeros up to a multiple of 64 on a GPU, where a matrix product of 50,257 columns takes up to
    seven times as long as one of 50,304 (H100, bf16)."""
    return F.pad(weight, (0, 0, 0, -len(weight) % 64)) if weight.is_cuda else weight


ARGUMENTS = "Tensor hidden, Tensor weight, Tensor targets, float temperature, ScalarType dtype"


@torch.library.custom_op("minirlhf::token_logprobs", mutates_args=(), schema=f"({ARGUMENTS}, int keep) -> (Tensor, Tensor, Tensor[])")
def token_logprobs_op(hidden, weight, targets, temperature, dtype, keep):
    """Log-probs and log-sum-exp, (N,) each, and softmax of the first `keep` parts of the vocabulary, which backward need not make again."""
    wide = torch.promote_types(dtype, torch.float32)
    logprobs, lse = (torch.empty(len(targets), dtype=wide, device=hidden.device) for _ in range(2))
    if fused(hidden):
        fused_forward(hidden.to(dtype).contiguous(), weight.to(dtype).contiguous(), targets, temperature, logprobs, lse)
        return logprobs, lse, []
    h, w = (hidden if temperature == 1 else hidden / temperature).to(dtype), weight.to(dtype)
    sums, kept = [], []
    with products(h):
        for cols in chunks(len(w), len(h), w.device):
            z = matmul(h, w[cols].t())  # (N, v)
            largest = z.amax(1)
            p = torch.softmax(z, 1, out=None if z.is_cuda else z)
            sums.append(largest - p.amax(1).log())  # the largest probability is 1 / sum exp(z - largest)
            kept += [p] if len(kept) < keep else []
        at_target = (h.to(wide) * w[targets].to(wide)).sum(1)
    lse = torch.stack(sums).logsumexp(0)
    if len(sums) > 1:
        kept = [p.mul_((part - lse).exp_()[:, None]) for p, part in zip(kept, sums, strict=False)]
    return at_target - lse, lse, kept


@token_logprobs_op.register_fake
def _(hidden, weight, targets, temperature, dtype, keep):
    wide = torch.promote_types(dtype, torch.float32)
    parts = chunks(len(weight), len(hidden), weight.device)[:keep]
    kept = [hidden.new_empty((len(hidden), cols.stop - cols.start), dtype=wide) for cols in parts]
    return *(hidden.new_empty(len(targets), dtype=wide) for _ in range(2)), kept


@torch.library.custom_op("minirlhf::token_logprobs_backward", mutates_args=(),
                         schema=f"({ARGUMENTS}, Tensor grad, Tensor lse, Tensor[] kept) -> (Tensor, Tensor)")  # fmt: skip
def token_logprobs_backward_op(hidden, weight, targets, temperature, dtype, grad, lse, kept):
    """Gradients of hidden and weight, by d logp / d logits = onehot - softmax: logits anew for a part, and two matrix products."""
    scale = grad / temperature
    if fused(hidden):
        return fused_backward(hidden, weight, targets, temperature, dtype, scale, lse)
    h, w = (hidden if temperature == 1 else hidden / temperature).to(dtype), weight.to(dtype)
    d_hidden, d_weight = torch.zeros_like(hidden, dtype=lse.dtype), torch.empty_like(weight, dtype=lse.dtype)
    scaled = (scale[:, None] * hidden).to(dtype)  # what is to be done to a row of logits is done to its C columns
    with products(h):
        for i, cols in enumerate(chunks(len(w), len(h), w.device)):
            p = kept[i] if i < len(kept) else matmul(h, w[cols].t()).sub_(lse[:, None]).exp_()
            p = p.to(dtype)
            d_hidden += matmul(p, w[cols])
            d_weight[cols] = matmul(p.t(), scaled)
    d_hidden = scale[:, None] * (w[targets] - d_hidden)
    d_weight = d_weight.neg_().index_add_(0, targets, scaled.to(lse.dtype))
    return d_hidden.to(hidden.dtype), d_weight.to(weight.dtype)


@token_logprobs_backward_op.register_fake
def _(hidden, weight, targets, temperature, dtype, grad, lse, kept):
    return torch.empty_like(hidden), torch.empty_like(weight)


def save_for_backward(ctx, inputs, output):
    hidden, weight, targets, ctx.temperature, ctx.dtype, _ = inputs
    ctx.save_for_backward(hidden, weight, targets, output[1], *output[2])
    ctx.set_materialize_grads(False)  # else zeros as large as what is kept


def backward(ctx, grad, *_):
    if grad is None:
        return (None,) * 6
    hidden, weight, targets, lse, *kept = ctx.saved_tensors
    d = token_logprobs_backward_op(hidden, weight, targets, ctx.temperature, ctx.dtype, grad.contiguous(), lse, kept)
    return *d, None, None, None, None


token_logprobs_op.register_autograd(backward, setup_context=save_for_backward)

# Forward without logits. A program owns BM rows and walks over one split of the vocabulary, BN columns a tile:
#
#                  vocabulary ->
#            split 0          split 1            each tile: acc (BM, BN) += hidden (BM, BK) @ weight (BN, BK).T over C / BK steps,
#   rows  [ >tile>tile> ] [ >tile>tile> ]        then for each row  m' = max(m, max z),  s = s exp(m - m') + sum exp(z - m')
#     |   [ >tile>tile> ] [ >tile>tile> ]        and z at the target where it lies in the tile
#     v
# Reads hidden (N, C) once a tile (from the cache) and weight (V, C) once per BM rows; writes three floats a row and split.
# The splits' (m, s, z) are put together by a few small PyTorch operations.


def fused_forward(hidden, weight, targets, temperature, logprobs, lse):
    (N, C), V = hidden.shape, len(weight)
    if N == 0:
        return
    BM, BN, BK, warps, stages = tile_sizes(hidden, N)
    row_tiles, col_tiles = triton.cdiv(N, BM), triton.cdiv(V, BN)
    splits = min(col_tiles, max(1, 264 // row_tiles))  # two programs for each of an H100's 132 multiprocessors
    tiles = triton.cdiv(col_tiles, splits)
    splits = triton.cdiv(col_tiles, tiles)  # so none is empty
    m, s, z = torch.empty(3, splits, N, device=hidden.device)
    split_logsumexp[(row_tiles, splits)](hidden, weight, targets, m, s, z, N, V, 1 / temperature, C=C, TILES=tiles, BM=BM, BN=BN, BK=BK,
                                         num_warps=warps, num_stages=stages)  # fmt: skip
    torch.logsumexp(m + s.log(), 0, out=lse)
    torch.sub(z.sum(0), lse, out=logprobs)


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
def split_logsumexp(h_ptr, w_ptr, target_ptr, m_ptr, s_ptr, z_ptr, N, V, scale, C: tl.constexpr, TILES: tl.constexpr, BM: tl.constexpr,
                    BN: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    split = tl.program_id(1)
    target = tl.load(target_ptr + rows, mask=rows < N, other=-1)
    m = tl.full([BM], float("-inf"), tl.float32)
    s = tl.zeros([BM], tl.float32)
    at_target = tl.zeros([BM], tl.float32)
    for tile in range(TILES):
        cols = (split * TILES + tile).to(tl.int64) * BN + tl.arange(0, BN)
        acc = tile_product(h_ptr, w_ptr, rows, cols, N, V, C, BM, BN, BK)
        z = tl.where((cols < V)[None], acc * scale, float("-inf"))
        larger = tl.maximum(m, tl.max(z, 1))
        s = s * tl.exp(m - larger) + tl.sum(tl.exp(z - larger[:, None]), 1)
        at_target += tl.sum(tl.where(cols[None] == target[:, None], z, 0.0), 1)
        m = larger
    out = split.to(tl.int64) * N + rows
    tl.store(m_ptr + out, m, mask=rows < N)
    tl.store(s_ptr + out, s, mask=rows < N)
    tl.store(z_ptr + out, at_target, mask=rows < N)


# Backward makes the same tiles again, one program each, and turns them into d_logits before they leave the registers:
# reads hidden and weight, writes d_logits (rows of a chunk, V) in the type of the two matrix products that follow.


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
            if dtype == lse.dtype:
                d_weight.addmm_(d_logits.t(), h[rows])
            else:
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


# The sampler: Gumbel-max (the index of the largest z + g is a sample of softmax z, for g = -log(-log u)). A program owns a split of a row
# and reads it once: temperature, noise, maximum and log-sum-exp together; a second kernel puts a row's splits together.
# Reads 4 V bytes a row, writes five numbers a split.


def sample_logits(logits, temperature, seed, step):
    """Tokens (B,) sampled from fp32 logits (B, V) at a temperature, and their log-probs (B,); temperature 0 takes the largest.

    The noise is a function of seed (1,) int64, the row, and step (1,) int64: tensors on the device, so that a captured graph can be
    replayed with others.
    """
    B, V = logits.shape
    block = min(2048, max(16, triton.next_power_of_2(V)))
    splits = triton.cdiv(V, block)
    parts = torch.empty(4, B, splits, device=logits.device)
    candidates = torch.empty(B, splits, dtype=torch.int64, device=logits.device)
    tokens, logprobs = torch.empty(B, dtype=torch.int64, device=logits.device), torch.empty(B, device=logits.device)
    sample_kernel[(B, splits)](logits, seed, step, parts, candidates, V, logits.stride(0), 1 / (temperature or 1), B * splits,
                               NOISE=temperature > 0, BLOCK=block)  # fmt: skip
    sample_combine[(B,)](parts, candidates, tokens, logprobs, splits, B * splits, SPLITS=triton.next_power_of_2(splits), num_warps=1)
    return tokens, logprobs


@jit
def sample_kernel(z_ptr, seed_ptr, step_ptr, parts_ptr, candidate_ptr, V, stride, scale, size, NOISE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    z = tl.load(z_ptr + row * stride + cols, mask=cols < V, other=float("-inf")) * scale
    m = tl.max(z, 0)
    noisy = z
    if NOISE:
        key = tl.load(seed_ptr) + (row << 32) + tl.load(step_ptr)
        four = tl.rand4x(key, tl.program_id(1) * (BLOCK // 4) + tl.arange(0, BLOCK // 4))  # what one call of Philox gives
        u = tl.reshape(tl.join(tl.join(four[0], four[1]), tl.join(four[2], four[3])), [BLOCK])
        noisy = tl.where(cols < V, z - tl.log(-tl.log(u)), float("-inf"))
    best = tl.argmax(noisy, 0)
    out = row * tl.num_programs(1) + tl.program_id(1)
    tl.store(parts_ptr + out, tl.max(noisy, 0))
    tl.store(parts_ptr + size + out, tl.sum(tl.where(tl.arange(0, BLOCK) == best, z, 0.0), 0))
    tl.store(parts_ptr + 2 * size + out, m)
    tl.store(parts_ptr + 3 * size + out, tl.sum(tl.exp(z - m), 0))
    tl.store(candidate_ptr + out, tl.program_id(1) * BLOCK + best)


@jit
def sample_combine(parts_ptr, candidate_ptr, token_ptr, logprob_ptr, splits, size, SPLITS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, SPLITS)
    ptr = parts_ptr + row * splits + at
    noisy = tl.load(ptr, mask=at < splits, other=float("-inf"))
    z = tl.load(ptr + size, mask=at < splits, other=0.0)
    m = tl.load(ptr + 2 * size, mask=at < splits, other=float("-inf"))
    s = tl.load(ptr + 3 * size, mask=at < splits, other=0.0)
    best = tl.argmax(noisy, 0)
    largest = tl.max(m, 0)
    lse = largest + tl.log(tl.sum(s * tl.exp(m - largest), 0))
    tl.store(token_ptr + row, tl.load(candidate_ptr + row * splits + best))
    tl.store(logprob_ptr + row, tl.sum(tl.where(at == best, z, 0.0), 0) - lse)


# The attention of one decoding step: a program owns a head of a row, puts its key and value into the cache and reads the
# slots before them, with a running maximum and sum as above. It reads what is filled, 2 p D numbers, not the whole cache.
#
#     cache of a head   [ k k k k k k . . . . ]      p = 6: slots 0..5 are read, slot 6 is written, its k and v are at hand
#                         block    block


def decode_attention(qkv, cache, positions, mask):
    """Stores the new token's key and value in its row's slot of the cache, and attends to all slots up to its own: (B, H, 1, D).

    qkv (B, 1, 3 H D); cache (2, B, H, S, D), changed in place; positions (B,): the new token's slot; mask (B, 1, 1, S): the slots up to
    it, which only the twin needs.
    """
    _, B, H, S, D = cache.shape
    q, k, v = qkv = qkv.view(B, 3, H, 1, D).transpose(0, 1)
    if not fused(q):
        cache.scatter_(3, positions.view(-1, 1, 1, 1).expand(2, B, H, 1, D), qkv[1:])
        return F.scaled_dot_product_attention(q, cache[0], cache[1], attn_mask=mask)
    out = torch.empty(B, H, 1, D, dtype=q.dtype, device=q.device)
    decode_attention_kernel[(B * H,)](q, k, v, cache[0], cache[1], positions, out, q.stride(0), q.stride(1), H, S, D=D,
                                      BD=triton.next_power_of_2(D), BLOCK=64, num_warps=2)  # fmt: skip
    return out


@jit
def decode_attention_kernel(q_ptr, k_ptr, v_ptr, k_cache, v_cache, position_ptr, out_ptr, stride_row, stride_head, H, S,
                            D: tl.constexpr, BD: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BD)
    new = (program // H) * stride_row + (program % H) * stride_head + d
    q = tl.load(q_ptr + new, mask=d < D, other=0.0).to(tl.float32) / D**0.5
    k = tl.load(k_ptr + new, mask=d < D, other=0.0)
    v = tl.load(v_ptr + new, mask=d < D, other=0.0)
    p = tl.load(position_ptr + program // H)
    cache = program * S * D
    tl.store(k_cache + cache + p * D + d, k, mask=d < D)
    tl.store(v_cache + cache + p * D + d, v, mask=d < D)
    m = tl.sum(q * k.to(tl.float32), 0)
    s = m * 0.0 + 1.0
    acc = v.to(tl.float32)
    for start in range(0, p, BLOCK):
        slots = start + tl.arange(0, BLOCK)
        inside = (slots < p)[:, None] & (d < D)[None]
        at = cache + slots[:, None] * D + d[None]
        keys = tl.load(k_cache + at, mask=inside, other=0.0).to(tl.float32)
        values = tl.load(v_cache + at, mask=inside, other=0.0).to(tl.float32)
        z = tl.where(slots < p, tl.sum(keys * q[None], 1), float("-inf"))
        larger = tl.maximum(m, tl.max(z, 0))
        weight = tl.exp(z - larger)
        shrink = tl.exp(m - larger)
        s = s * shrink + tl.sum(weight, 0)
        acc = acc * shrink + tl.sum(weight[:, None] * values, 0)
        m = larger
    tl.store(out_ptr + program * D + d, (acc / s).to(out_ptr.dtype.element_ty), mask=d < D)
