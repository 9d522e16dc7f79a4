"""The Triton kernels of token log-probs; their plain twin is in logprobs.py.

Forward: a program has a tile of rows and walks over its share of the vocabulary, tile by tile, with
a running maximum and sum; a row's shares are put together afterwards. Backward: a program has one
tile of d loss / d logits, for a chunk of rows at a time, of which two matrix products make the
gradients. README.md in this folder draws both.
"""

import torch

from minirlhf.engine.machine import quick_library
from minirlhf.kernels.choice import jit, tl, triton
from minirlhf.kernels.matmul import aligned, chunks, matmul


def tile_sizes(hidden, rows):
    """(BM, BN, BK, warps, stages), by a sweep on an H100."""
    if not hidden.is_cuda:
        return 16, 64, 64, 4, 1  # the interpreter: few programs
    if hidden.dtype == torch.float32:
        return 64, 64, 32, 4, 3
    return (128, 256, 64, 8, 3) if rows > 512 else (64, 128, 64, 4, 4)


def fused_forward(hidden, weight, targets, temperature, entropy):
    """Log-probs, log-sum-exp and entropy (or an empty tensor) of hidden (N, C), weight (V, C)."""
    (N, C), V = hidden.shape, len(weight)
    if N == 0:
        return tuple(hidden.new_empty(0, dtype=torch.float32) for _ in range(3))
    BM, BN, BK, warps, stages = tile_sizes(hidden, N)
    row_tiles, col_tiles = triton.cdiv(N, BM), triton.cdiv(V, BN)
    # Two programs for each of an H100's 132 multiprocessors.
    splits = min(col_tiles, max(1, 264 // row_tiles))
    tiles = triton.cdiv(col_tiles, splits)
    splits = triton.cdiv(col_tiles, tiles)  # so none is empty
    m, s, z, t = torch.empty(4, splits, N, device=hidden.device)
    split_logsumexp[(row_tiles, splits)](
        hidden, weight, targets, m, s, z, t, N, V, 1 / temperature,
        C=C, TILES=tiles, BM=BM, BN=BN, BK=BK, ENTROPY=entropy, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    lse = torch.logsumexp(m + s.log(), 0)
    whole = lse - (t * (m - lse).exp()).sum(0) if entropy else lse.new_empty(0)
    return z.sum(0) - lse, lse, whole


@jit
def tile_product(
    h_ptr, w_ptr, rows, cols, N, V,
    C: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """hidden[rows] @ weight[cols].T: (BM, BN), fp32."""
    acc = tl.zeros([BM, BN], tl.float32)
    for k in range(0, C, BK):
        ks = k + tl.arange(0, BK)
        a = tl.load(
            h_ptr + rows[:, None] * C + ks[None],
            mask=(rows < N)[:, None] & (ks < C)[None],
            other=0.0,
        )
        b = tl.load(
            w_ptr + cols[None] * C + ks[:, None],
            mask=(cols < V)[None] & (ks < C)[:, None],
            other=0.0,
        )
        acc = tl.dot(a, b, acc, input_precision="ieee")
    return acc


@jit
def split_logsumexp(
    h_ptr, w_ptr, target_ptr, m_ptr, s_ptr, z_ptr, t_ptr, N, V, scale,
    C: tl.constexpr, TILES: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, ENTROPY: tl.constexpr,
):  # fmt: skip
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


def fused_backward(hidden, weight, targets, temperature, dtype, scale, lse):
    """Gradients of hidden and weight: d_logits of a chunk of rows at a time, and two products."""
    d_hidden, h = torch.empty_like(hidden), hidden.to(dtype).contiguous()
    w, V = aligned(weight.to(dtype)), len(weight)
    d_weight = torch.zeros_like(w, dtype=lse.dtype)  # fp32: the sum over chunks must not round
    with quick_library(h), torch.autocast(h.device.type, enabled=False):
        for rows in chunks(len(h), len(w), w.device):
            d_logits = fused_d_logits(
                h[rows], w, lse[rows], targets[rows], scale[rows], temperature, V
            )
            d_hidden[rows] = (d_logits @ w).to(hidden.dtype)
            d_weight += matmul(d_logits.t(), h[rows])
    return d_hidden, d_weight[:V].to(weight.dtype)


def fused_d_logits(hidden, weight, lse, targets, scale, temperature, V):
    """scale * (onehot - softmax) of hidden (n, C) @ weight (W, C).T / temperature.

    (n, W), 0 from column V on.
    """
    (N, C), W = hidden.shape, len(weight)
    BM, BN, BK, warps, stages = tile_sizes(hidden, N)
    out = torch.empty(N, W, dtype=hidden.dtype, device=hidden.device)
    grid = (triton.cdiv(N, BM), triton.cdiv(W, BN))
    d_logits_kernel[grid](
        hidden, weight, lse, targets, scale, out, N, V, W, 1 / temperature,
        C=C, BM=BM, BN=BN, BK=BK, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out


@jit
def d_logits_kernel(
    h_ptr, w_ptr, lse_ptr, target_ptr, scale_ptr, out_ptr, N, V, W, inverse_temperature,
    C: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    cols = tl.program_id(1).to(tl.int64) * BN + tl.arange(0, BN)
    acc = tile_product(h_ptr, w_ptr, rows, cols, N, V, C, BM, BN, BK)
    lse = tl.load(lse_ptr + rows, mask=rows < N, other=0.0)
    target = tl.load(target_ptr + rows, mask=rows < N, other=-1)
    scale = tl.load(scale_ptr + rows, mask=rows < N, other=0.0)
    p = tl.where((cols < V)[None], tl.exp(acc * inverse_temperature - lse[:, None]), 0.0)
    d = (tl.where(cols[None] == target[:, None], 1.0, 0.0) - p) * scale[:, None]
    tl.store(
        out_ptr + rows[:, None] * W + cols[None],
        d.to(out_ptr.dtype.element_ty),
        mask=(rows < N)[:, None] & (cols < W)[None],
    )
