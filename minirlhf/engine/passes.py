"""How one pass through a GPT goes: which tokens the layers see, what they attend to, what dropout
drops.

A block computes `x + run.drop(self.attn(self.ln_1(x), run))`, and goes on with `run.wanted(x)`;
only `run` knows what kind of pass it is:

    Pass   rows of token ids (B, T). Layers see (B, T, C), or where a sixth is padding the N real
           tokens alone, (N, C), on a CPU with a few that nobody reads behind them (few_sizes). With
           a cache, keys and values stay there for the steps to come.
    Step   the newest token of each row, which attends to its row's cache. Layers see (B, C).

`run.idx` and `run.places` are the ids and the positions of the tokens that the layers see.
"""

import functools
import math

import torch
import torch.nn.functional as F

from minirlhf.engine.machine import few_sizes
from minirlhf.engine.rows import window
from minirlhf.kernels.attention import attention, drop_out, noise_of
from minirlhf.kernels.decoding import decode_attention


class Pass:
    """Rows (B, T), right-padded where there are `lengths` (B,); cache (L, 2, B, H, S, C/H). Where
    the caller reads one place of each row, `at` (B,), the last block ends with those alone."""

    def __init__(self, model, idx, lengths=None, cache=None, at=None):
        B, T = self.shape = idx.shape
        self.idx = idx
        self.places = torch.arange(T, device=idx.device)
        self.cache = cache
        self.layer = self.drops = 0  # where in the network it is
        self.layers, self.at, self.cut = model.config.n_layer, at, False
        self.p = model.config.dropout if model.training else 0.0
        self.where = self.noise = None
        if self.p and idx.device.type == "cpu" and not torch.compiler.is_compiling():
            self.noise = noise_of(idx, lengths)
        if lengths is not None and lengths.sum() < 0.85 * B * T:
            self.pack(lengths)

    def pack(self, lengths):
        """Leaves padding out; attention puts tokens back into rows, in groups of like length."""
        B, T = self.shape
        where, self.groups, first = [], [], 0
        parts = min(4, 1 + T // 64, -(-B // 8))
        for rows in lengths.argsort().tensor_split(parts):
            longest = max(1, int(lengths[rows[-1]]))
            longest = -(-longest // 8) * 8  # few sizes of attention's products, too
            places = torch.arange(longest, device=rows.device)
            row, column = (places < lengths[rows, None]).nonzero().unbind(1)
            where.append(rows[row] * T + column)
            shape, part = (len(rows), longest), slice(first, first + len(row))
            self.groups.append((part, row * longest + column, shape))
            first = part.stop
        self.where = torch.cat(where)  # (N,) places in the flattened rows
        self.idx = few_sizes(self.idx.flatten()[self.where])
        self.places = few_sizes(self.where % T)
        if self.noise is not None:
            self.noise = few_sizes(self.noise.flatten()[self.where])

    def attend(self, qkv, n_head):
        """Causal attention within rows: (..., C) of q, k and v side by side (..., 3C)."""
        self.expect(not self.cut)
        self.layer += 1
        self.drops = 0
        noise = None if self.noise is None else self.noise + (4096 * self.layer + 2)
        if self.cache is not None:
            kv = qkv.unflatten(2, (3, n_head, -1))[:, :, 1:]  # (B, T, 2, H, D)
            self.cache[self.layer - 1, :, :, :, : self.shape[1]] = kv.permute(2, 0, 3, 1, 4)
        if self.where is None:
            return attention(qkv, n_head, self.p, noise)
        found = []
        for part, inside, shape in self.groups:
            key = None if noise is None else spread(noise[part], inside, shape)
            y = attention(spread(qkv[part], inside, shape), n_head, self.p, key)
            found.append(y.flatten(0, 1)[inside])
        return few_sizes(torch.cat(found))

    def drop(self, x):
        """Dropout, with noise of this place in the network."""
        if not self.p:
            return x
        noise = None if self.noise is None else self.noise + (4096 * self.layer + self.drops)
        self.drops += 1
        return drop_out(x, self.p, noise)

    def wanted(self, x):
        """What the rest of a block goes on with: all tokens, or of the last block those read."""
        if self.at is None or self.layer < self.layers:
            return x
        B, T = self.shape
        index = torch.arange(B, device=x.device) * T + self.at
        if self.where is not None:
            places = self.where.new_empty(B * T)
            places[self.where] = torch.arange(len(self.where), device=x.device)
            index = places[index]
        self.cut = True
        if self.noise is not None:
            self.noise = self.noise.flatten()[index]
        return x.flatten(0, -2)[index]

    def padded(self, x):
        """(B, T, C) of what the layers saw, 0 where there is no token; or (B, C) of those read."""
        if self.cut:
            self.expect(x.shape[:-1] == self.shape[:1])
            return x
        if self.where is not None:
            x = spread(x[: len(self.where)], self.where, self.shape)
        return x if self.at is None else window(x, self.at, 1)[:, 0]

    @staticmethod
    def expect(holds):
        """Raises ValueError where a fork's layers go on with what `wanted` has left out."""
        if not holds:
            what = "layers go on with tokens that run.wanted left out"
            raise ValueError(f"{what}: take `x = run.wanted(x)` out of Block.forward")


def spread(x, where, shape):
    """(B, T, ...) with x (N, ...) at the flattened places `where` (N,), 0 elsewhere."""
    rows = x.new_zeros(math.prod(shape), *x.shape[1:])
    return rows.index_copy(0, where, x).unflatten(0, shape)


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

    def wanted(self, x):
        return x

    def padded(self, x):
        return x


# --compile


@functools.cache
def compiled_pass():
    """plain_pass for all shapes and models at once, so that nothing is compiled again in a run."""
    return torch.compile(plain_pass, dynamic=True)


def plain_pass(model, idx):
    return model.trunk(Pass(model, idx))


def compiled_hidden(model, idx, at=None):
    """plain_pass of a model by compiled code: (B, T, C) of token ids (B, T), or (B, C) at `at`."""
    B, T = idx.shape
    # One row, or one token, would be compiled for itself.
    padded = F.pad(idx, (0, min(-T % 8, model.config.n_ctx - T), 0, int(B == 1)))
    found = compiled_pass()(model, padded)[:B, :T]
    return found if at is None else window(found, at, 1)[:, 0]
