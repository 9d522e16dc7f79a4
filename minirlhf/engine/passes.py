"""How a forward pass goes."""

import math

import torch
import torch.nn.functional as F


def attention(q, k, v, dropout=0.0, noise=None):
    """Causal attention, softmax(q k^T / sqrt(D)) v: (B, H, T, D) of q, k, v (B, H, T, D); noise as in `drop_out`, (B, T)."""
    B, H, T, D = q.shape
    if q.device.type != "cpu" or (T > 256 and noise is None):
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
    # Written out, short rows take half the time on a CPU: torch's flash kernel multiplies in small pieces, one head at a time.
    future = torch.full((T, T), -math.inf, dtype=q.dtype, device=q.device).triu(1)
    q, k, v = (x.reshape(B * H, T, D) for x in (q, k, v))
    weights = torch.baddbmm(future, q, k.transpose(1, 2), alpha=D**-0.5).softmax(-1)  # (B H, T, T)
    if noise is not None:
        noise = (noise[:, None] + torch.arange(2, 2 + H)[:, None]).view(B * H, T)
    return torch.bmm(drop_out(weights, dropout, noise), v).view(B, H, T, D)


def heads(qkv, n_head):
    """q, k, v, (B, H, T, C/H) each, of their projections (B, T, 3C)."""
    B, T, C3 = qkv.shape
    return (x.view(B, T, n_head, -1).transpose(1, 2) for x in qkv.split(C3 // 3, dim=2))


def drop_out(x, p, noise=None):
    """x (..., n) with a share p of its numbers set to 0 and the others scaled to keep the mean.

    With `noise` (...), int64, the same noise drops the same numbers, and p is rounded to a multiple of 1/256: of the values of a random
    byte. torch's own draws a float a number, and takes six times as long on a CPU.
    """
    if not p or noise is None:
        return F.dropout(x, p) if p else x
    n, dropped = x.shape[-1], min(255, round(256 * p))
    eight = scramble(noise[..., None] + 0x1E3779B97F4A7C15 * torch.arange(1, -(-n // 8) + 1))  # an int64 has the bytes of eight numbers
    kept = (eight.view(torch.uint8)[..., :n] >= dropped).view(torch.uint8)  # as bytes they become floats in a third of the time
    return x * kept.to(x.dtype).mul_(256 / (256 - dropped))


def scramble(h):
    """Random bits of int64 numbers, in place: the finalizer of splitmix64 (Steele et al. 2014)."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15), (31, 1)):
        h.bitwise_xor_((h >> shift).bitwise_and_((1 << 64 - shift) - 1)).mul_(factor)  # >> repeats the sign, which is no part of the shift
    return h


def noise_of(idx, lengths=None):
    """(B, T) int64 of right-padded token ids (B, T), for dropout: of torch's seed, all real tokens of the row, and the place in it. So a
    row has the same noise in any batch and on any number of processes, and no two rows have the same."""
    places = torch.arange(idx.shape[1])
    rows = scramble(idx + 0x632BE59BD9B4E019 * places)
    rows = (rows if lengths is None else rows * (places < lengths[:, None])).sum(1, keepdim=True)
    return scramble(rows + (torch.initial_seed() & (1 << 62) - 1) + 0x4F1BBCDCBFA53E0B * places)


class Layout:
    """Where the real tokens of right-padded rows (B, T) of these lengths are, so that the layers compute nothing else.

    Layers see the N real tokens as (N, C). Attention puts them back into rows, in groups of like length: more of them where rows are long.
    """

    def __init__(self, lengths, T):
        order, device = lengths.argsort(), lengths.device
        self.shape, where, self.groups = (len(lengths), T), [], []
        for rows in order.tensor_split(min(4, 1 + T // 64, -(-len(order) // 8))):
            longest = max(1, int(lengths[rows[-1]]))
            inside = torch.arange(longest, device=device) < lengths[rows, None]  # (b, t)
            row, column = inside.nonzero().unbind(1)
            where.append(rows[row] * T + column)
            self.groups.append((*inside.shape, row * longest + column))
        self.where = torch.cat(where)  # (N,) places in the flattened rows

    def attention(self, qkv, n_head, dropout, noise):
        """(N, C) of qkv (N, 3C)."""
        out, sizes = [], [len(inside) for *_, inside in self.groups]
        noises = [None] * len(sizes) if noise is None else noise.split(sizes)
        for part, some, (b, t, inside) in zip(qkv.split(sizes), noises, self.groups, strict=True):
            rows = part.new_zeros(b * t, part.shape[1]).index_copy(0, inside, part).view(b, t, -1)
            if some is not None:
                some = some.new_zeros(b * t).index_copy(0, inside, some).view(b, t)
            y = attention(*heads(rows, n_head), dropout, some)  # (b, H, t, C/H)
            out.append(y.transpose(1, 2).reshape(b * t, -1)[inside])
        return torch.cat(out)

    def padded(self, x):
        """(B, T, C) of x (N, C), 0 where there is no token."""
        B, T = self.shape
        return x.new_zeros(B * T, x.shape[1]).index_copy(0, self.where, x).view(B, T, -1)
