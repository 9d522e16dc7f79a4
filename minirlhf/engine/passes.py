"""How one pass through a GPT goes: which tokens the layers see, what they attend to, what dropout
drops.

A block computes `x + run.drop(self.attn(self.ln_1(x), run))`; only `run` knows what kind of pass it
is:

    Pass   rows of token ids (B, T). Layers see (B, T, C), or where a sixth is padding the N real
           tokens alone, (N, C). With a cache, keys and values stay there for the steps to come.
    Step   the newest token of each row, which attends to its row's cache. Layers see (B, C).

`run.idx` and `run.places` are the ids and the positions of the tokens that the layers see.
"""

import functools
import itertools
import math

import torch
import torch.nn.functional as F

from minirlhf.engine import parallel
from minirlhf.kernels.decoding import decode_attention


class Pass:
    """Rows (B, T), right-padded where there are `lengths` (B,); cache (L, 2, B, H, S, C/H)."""

    def __init__(self, model, idx, lengths=None, cache=None):
        B, T = self.shape = idx.shape
        self.idx = idx
        self.places = torch.arange(T, device=idx.device)
        self.cache = cache
        self.layer = self.drops = 0  # where in the network it is
        self.p = model.config.dropout if model.training else 0.0
        self.where = self.noise = None
        if self.p and idx.device.type == "cpu" and not torch.compiler.is_compiling():
            self.noise = noise_of(idx, lengths)
        if lengths is not None and lengths.sum() < 0.85 * B * T:
            self.pack(lengths)

    def pack(self, lengths):
        """Leaves the padding out. Attention puts tokens back into rows, in groups of like length:
        more of them where rows are long."""
        B, T = self.shape
        where, self.groups = [], []
        parts = min(4, 1 + T // 64, -(-B // 8))
        for rows in lengths.argsort().tensor_split(parts):
            longest = max(1, int(lengths[rows[-1]]))
            places = torch.arange(longest, device=rows.device)
            row, column = (places < lengths[rows, None]).nonzero().unbind(1)
            where.append(rows[row] * T + column)
            self.groups.append((len(rows), longest, row * longest + column))
        self.where = torch.cat(where)  # (N,) places in the flattened rows
        self.idx = self.idx.flatten()[self.where]
        self.places = self.where % T
        if self.noise is not None:
            self.noise = self.noise.flatten()[self.where]

    def attend(self, qkv, n_head):
        """Causal attention within rows: (..., C) of queries, keys, values side by side (...,
        3C)."""
        self.layer += 1
        self.drops = 0
        noise = self.noise_here(2)
        if self.cache is not None:
            kv = qkv.unflatten(2, (3, n_head, -1))[:, :, 1:]  # (B, T, 2, H, D)
            self.cache[self.layer - 1, :, :, :, : self.shape[1]] = kv.permute(2, 0, 3, 1, 4)
        if self.where is None:
            return attention(qkv, n_head, self.p, noise)
        out, first = [], 0
        for b, t, inside in self.groups:
            part = slice(first, first + len(inside))
            first = part.stop
            rows = spread(qkv[part], inside, b, t)
            key = None if noise is None else spread(noise[part], inside, b, t)
            y = attention(rows, n_head, self.p, key)
            out.append(y.flatten(0, 1)[inside])
        return torch.cat(out)

    def drop(self, x):
        """Dropout, with noise of this place in the network."""
        if not self.p:
            return x
        noise = self.noise_here(self.drops)
        self.drops += 1
        return drop_out(x, self.p, noise)

    def noise_here(self, k):
        return None if self.noise is None else self.noise + (4096 * self.layer + k)

    def padded(self, x):
        """(B, T, C) of what the layers saw, 0 where there is no token."""
        return x if self.where is None else spread(x, self.where, *self.shape)


def spread(x, where, B, T):
    """(B, T, ...) with x (N, ...) at the flattened places `where` (N,), 0 elsewhere."""
    rows = x.new_zeros(B * T, *x.shape[1:])
    return rows.index_copy(0, where, x).view(B, T, *x.shape[1:])


class Step:
    """The newest token (B,) of each row, at its slot (B,) of a cache (L, 2, B, H, S, C/H)."""

    def __init__(self, token, slot, cache):
        self.idx, self.places = token, slot
        self.cache, self.layer = cache, 0
        slots = torch.arange(cache.shape[4], device=slot.device)
        self.mask = (slots <= slot[:, None])[:, None, None]  # (B, 1, 1, S)

    def attend(self, qkv, n_head):
        """(B, C) of (B, 3C): attends to the row's cache, where the token's key and value stay."""
        cache = self.cache[self.layer]
        self.layer += 1
        y = decode_attention(qkv, cache, self.places, self.mask)  # (B, H, 1, C/H)
        return y.view(len(qkv), -1)

    def drop(self, x):
        return x

    def padded(self, x):
        return x


def attention(qkv, n_head, dropout=0.0, noise=None):
    """Causal attention, softmax(q k^T / sqrt(D)) v: (B, T, C) of rows (B, T, 3C); `noise` (B,
    T)."""
    B, T, C3 = qkv.shape
    C = C3 // 3
    q, k, v = (x.view(B, T, n_head, -1).transpose(1, 2) for x in qkv.split(C, dim=2))
    if qkv.device.type != "cpu" or (T > 256 and noise is None):
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        return y.transpose(1, 2).reshape(B, T, C)
    # Written out, short rows take half the time on a CPU: torch's kernel goes head by head.
    future = torch.full((T, T), -math.inf, dtype=qkv.dtype).triu(1)
    q, k, v = (x.reshape(B * n_head, T, -1) for x in (q, k, v))
    scale = q.shape[2] ** -0.5
    logits = torch.baddbmm(future, q, k.transpose(1, 2), alpha=scale)
    weights = logits.softmax(-1)  # (B H, T, T)
    if noise is not None:
        noise = noise[:, None] + torch.arange(n_head)[:, None]  # (B, H, T)
        noise = noise.view(B * n_head, T)
    if dropout:
        weights = drop_out(weights, dropout, noise)
    y = torch.bmm(weights, v).view(B, n_head, T, -1)
    return y.transpose(1, 2).reshape(B, T, C)


# Dropout noise that belongs to a row and a place in it, so that it does not depend on the batch


def drop_out(x, p, noise=None):
    """x (..., n) with a share p of its numbers set to 0 and the others scaled to keep the mean.

    The same `noise` (...), int64, drops the same numbers; p is rounded to a multiple of 1/256, of
    the values of a random byte. torch's own draws a float a number: six times as long on a CPU.
    """
    if noise is None:
        return F.dropout(x, p)
    n, dropped = x.shape[-1], min(255, round(256 * p))
    words = torch.arange(1, -(-n // 8) + 1)  # an int64 has the bytes of eight numbers
    eight = scramble(noise[..., None] + 0x1E3779B97F4A7C15 * words)
    kept = eight.view(torch.uint8)[..., :n] >= dropped
    # as bytes they become floats in a third of the time
    return x * kept.view(torch.uint8).to(x.dtype).mul_(256 / (256 - dropped))


def scramble(h):
    """Random bits of int64 numbers, in place: the finalizer of splitmix64 (Steele et al. 2014)."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15), (31, 1)):
        moved = (h >> shift).bitwise_and_((1 << 64 - shift) - 1)  # >> repeats the sign
        h.bitwise_xor_(moved).mul_(factor)
    return h


def noise_of(idx, lengths=None):
    """(B, T) int64 of right-padded ids (B, T): of torch's seed, all real tokens of the row, and the
    place in it. No two rows have the same, and a row has the same in any batch."""
    places = torch.arange(idx.shape[1])
    rows = scramble(idx + 0x632BE59BD9B4E019 * places)
    rows = rows if lengths is None else rows * (places < lengths[:, None])
    seed = torch.initial_seed() & (1 << 62) - 1
    return scramble(rows.sum(1, keepdim=True) + seed + 0x4F1BBCDCBFA53E0B * places)


# --compile, --shard


def prepare(knobs, *models):
    """Compiles the models' layers and spreads their weights, as the knobs say; None is no model."""
    if knobs.compile:
        compile_models(*models)
    if knobs.shard:
        parallel.shard(*models)


@functools.cache
def compiled_pass():
    """plain_pass for all shapes and models at once, so that nothing is compiled again in a run."""
    return torch.compile(plain_pass, dynamic=True)


def plain_pass(model, idx):
    return model.trunk(Pass(model, idx))


def compiled_hidden(model, idx):
    """plain_pass of a model by compiled code: (B, T, C) of token ids (B, T)."""
    B, T = idx.shape
    # One row, or one token, would be compiled for itself.
    padded = F.pad(idx, (0, min(-T % 8, model.config.n_ctx - T), 0, int(B == 1)))
    return compiled_pass()(model, padded)[:B, :T]


def compile_models(*models):
    """Compiles the layers of all GPTs in the models (None is no model), or prints why not."""
    parts = itertools.chain.from_iterable(model.modules() for model in filter(None, models))
    for gpt in parts:
        if not hasattr(gpt, "trunk"):
            continue
        gpt.compiled = True
        try:
            gpt.hidden(torch.zeros(2, 8, dtype=torch.int64, device=gpt.lm_head_weight.device))
        except Exception as e:  # no compiler, no Triton, a Python that is too new
            gpt.compiled = False
            reason = str(e).strip().splitlines()[0]
            return print(f"--compile: not possible here, going on without: {reason}", flush=True)
