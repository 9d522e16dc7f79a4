"""Causal attention in whole rows, and dropout whose noise belongs to a row and a place in it.

On a GPU attention is torch's own; on a CPU short rows take half its time when it is written out, as
torch goes head by head there. Noise of a row and a place does not depend on the batch. A share is
dropped by random bytes, eight of an int64 number, so as a multiple of 1/256: torch's own dropout
draws a float a number, which takes a CPU six times as long.
"""

import math

import torch
import torch.nn.functional as F


def attention(qkv, n_head, dropout=0.0, noise=None):
    """Causal attention, softmax(q k^T / sqrt(D)) v: (B, T, C) of rows (B, T, 3C); noise (B, T)."""
    B, T, _ = qkv.shape
    q, k, v = (x.view(B, T, n_head, -1).transpose(1, 2) for x in qkv.chunk(3, dim=2))
    if qkv.device.type != "cpu" or (T > 256 and noise is None):
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        return y.transpose(1, 2).reshape(B, T, -1)
    future = torch.full((T, T), -math.inf, dtype=qkv.dtype).triu(1)
    q, k, v = (x.reshape(B * n_head, T, -1) for x in (q, k, v))
    weights = torch.baddbmm(future, q, k.transpose(1, 2), alpha=q.shape[2] ** -0.5).softmax(-1)
    if noise is not None:
        noise = (noise[:, None] + torch.arange(n_head)[:, None]).flatten(0, 1)  # (B H, T)
    weights = drop_out(weights, dropout, noise) if dropout else weights
    return torch.bmm(weights, v).view(B, n_head, T, -1).transpose(1, 2).reshape(B, T, -1)


def drop_out(x, p, noise=None):
    """x (..., n) with a share p of its numbers set to 0 and the others scaled to keep the mean; the
    same `noise` (...), int64, drops the same."""
    if noise is None:
        return F.dropout(x, p)
    n, dropped = x.shape[-1], min(255, round(256 * p))
    words = torch.arange(1, -(-n // 8) + 1)  # an int64 has the bytes of eight numbers
    eight = scramble(noise[..., None] + 0x1E3779B97F4A7C15 * words)
    kept = eight.view(torch.uint8)[..., :n].to(x.dtype)
    kept.sub_(dropped - 1).clamp_(0, 1)  # byte >= dropped: in half the time of comparing bytes
    return x * kept.mul_(256 / (256 - dropped))


def scramble(h):
    """Random bits of int64 numbers, in place: the finalizer of splitmix64 (Steele et al. 2014)."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15), (31, 1)):
        moved = (h >> shift).bitwise_and_((1 << 64 - shift) - 1)  # >> repeats the sign
        h.bitwise_xor_(moved).mul_(factor)
    return h


def noise_of(idx, lengths=None):
    """(B, T) int64 of right-padded ids: of torch's seed, the row's real tokens, and the place."""
    places = torch.arange(idx.shape[1])
    rows = scramble(idx + 0x632BE59BD9B4E019 * places)
    rows = rows if lengths is None else rows * (places < lengths[:, None])
    seed = torch.initial_seed() & (1 << 62) - 1
    return scramble(rows.sum(1, keepdim=True) + seed + 0x4F1BBCDCBFA53E0B * places)
