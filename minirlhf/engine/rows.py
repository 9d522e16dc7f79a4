"""Rows of token ids of unequal length: padded, in batches and in parts, by one process or many.

A row is `[EOS] prompt response EOS`, left-aligned, with padding on its right only; what was cut has
no EOS at its end. What is computed for rows is the same whoever computes it: `rowwise` and
`Rows.by_parts` give each process its share of the rows and everyone the result of all; the gradient
comes out right, too.
"""

import math
from collections import Counter
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint

from minirlhf.engine import optim, parallel


def pad_rows(rows, pad, device="cpu"):
    """Token ids (B, T) of rows of unequal length, right-padded, and their lengths (B,)."""
    lengths = torch.tensor([len(row) for row in rows])
    shape = len(rows), int(lengths.max())
    tokens = np.full(shape, pad, dtype=np.int64)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
    return torch.from_numpy(tokens).to(device), lengths.to(device)


def cut_left(ids, room):
    """The last of a prompt's ids that fit into so much room with an EOS before them."""
    first = max(0, len(ids) + 1 - room)
    return ids[first:]


def response_mask(lengths, width):
    """True on the first `lengths` (B,) places of each row: (B, width)."""
    return torch.arange(width, device=lengths.device) < lengths[:, None]


def window(x, start, width):
    """x (B, T, ...) at places start (B,) .. start + width - 1 of its own row: (B, width, ...).
    Past the end of x the last place is repeated: outside any mask."""
    places = start[:, None] + torch.arange(width, device=x.device)  # (B, width)
    row = torch.arange(len(x), device=x.device)[:, None]
    return x[row, places.clamp(max=x.shape[1] - 1)]


# Batches of indices


def bucketed(lengths, batch_size, rng):
    """Batches of like length in random order: each index once, the last of a window perhaps
    smaller."""
    order, batches = rng.permutation(len(lengths)), []
    many = 16 * batch_size
    for some in np.split(order, range(many, len(order), many)):
        by_length = np.argsort(lengths[some], kind="stable")
        starts = range(batch_size, len(some), batch_size)
        batches += np.split(some[by_length], starts)
    return [batches[i] for i in rng.permutation(len(batches))]


def endless(n, batch_size, steps, rng):
    """Indices (steps, batch_size) of n things, in one random order after the other."""
    taken = steps * batch_size
    passes = -(-taken // n)
    order = np.concatenate([rng.permutation(n) for _ in range(passes)])
    return order[:taken].reshape(steps, batch_size)


# Functions of rows, in parts and on many processes


def rowwise(f, size, *rows):
    """f(*rows), a tensor (B, ...) or several, computed `size` rows at a time; 0: all."""
    n = len(rows[0])
    mine, _ = parallel.share(n)
    return parallel.gather(in_parts(f, size, *(x[mine] for x in rows)), n)


def in_parts(f, size, *rows):
    """f(*rows), a tensor (B, ...) or several, of at most `size` rows at a time; 0: all."""
    split = [x.split(size or len(x)) for x in rows]
    found = [f(*part) for part in zip(*split, strict=True)]
    if torch.is_tensor(found[0]):
        return torch.cat(found)
    return [torch.cat(x) for x in zip(*found, strict=True)]


def some(batch, index):
    """Some rows of a batch, a NamedTuple of tensors (B, ...) or None, without the padding of tokens
    (B, T) that none of these needs."""
    taken = batch._make(None if x is None else x[index] for x in batch)
    lengths = taken.prompt_lengths + taken.response_lengths
    longest = int(lengths.max())
    return taken._replace(tokens=taken.tokens[:, :longest])


def mean_step(trained, optimizer, knobs, autocast, nonfinite, batch, loss_of):
    """One optimizer step on loss_of(part) -> (loss, stats), means over the response tokens of a
    part of the batch: (stats of the whole batch, gradient norm). Each process has its share of its
    rows, --micro-batch of them in memory at a time. Where the batch's weights are all 0, the first
    of the models learns nothing."""
    n_tokens, sums = batch.response_lengths.sum(), Counter()
    mine, counts = parallel.share(len(batch.tokens))
    size = knobs.micro_batch or len(mine)
    for start in range(0, len(mine), size):
        where = slice(start, start + size)
        part = some(batch, mine[where])
        once = torch.as_tensor(counts[where], device=n_tokens.device)  # no row counts twice
        lengths = part.response_lengths * once
        with autocast:
            loss, stats = loss_of(part._replace(response_lengths=lengths))
        weight = lengths.sum() / n_tokens
        trained.backward(loss * weight, last=where.stop >= len(mine))
        for name, value in (stats | {"loss": loss}).items():
            sums[name] += value.detach() * weight
    if len(trained) > 1 and not batch.weights.any():
        for p in trained[0].parameters():
            p.grad = None  # Adam would count these zeros as steps, and take too large ones later
    values = parallel.total(torch.stack(list(sums.values())))
    means = dict(zip(sums, values, strict=True))
    skip = partial(nonfinite, batch.tokens) if nonfinite else optim.refuse
    _, norm = optim.optimizer_step(optimizer, knobs.max_grad_norm, means.pop("loss"), skip)
    return means, norm


class Rows(NamedTuple):
    """N rows of token ids."""

    tokens: list
    prompt_lengths: np.ndarray  # (N,)
    pad: int
    device: torch.device

    @classmethod
    def sampled(cls, tokens, prompt_lengths, response_lengths, pad):
        """Rows of samples: tokens (N, T), lengths (N,)."""
        lengths = prompt_lengths + response_lengths
        padded = zip(tokens.cpu().numpy(), lengths.tolist(), strict=True)
        rows = [row[:n] for row, n in padded]
        prompt_lengths = prompt_lengths.cpu().numpy()
        return cls(rows, prompt_lengths, pad, tokens.device)

    def take(self, index):
        tokens = [self.tokens[i] for i in index]
        prompt_lengths = self.prompt_lengths[index]
        return self._replace(tokens=tokens, prompt_lengths=prompt_lengths)

    def thinned(self, delete, delete_eos=0.0):
        """These rows without a random share of their tokens, of all or of each row its own; the EOS
        at both ends stay, but the last one not in a share `delete_eos` of the rows."""
        shares = np.broadcast_to(delete, len(self.tokens))
        tokens, prompt_lengths = [], []
        for row, p, share in zip(self.tokens, self.prompt_lengths, shares, strict=True):
            keep = np.random.random(len(row)) >= share
            keep[[0, -1]] = True
            cut = delete_eos and np.random.random() < delete_eos
            if cut:
                rest = keep[p:-1]
                keep[-1] = not rest.any()  # it stays where nothing else is left of a response
            tokens.append(row[keep])
            prompt_lengths.append(keep[:p].sum())
        return self._replace(tokens=tokens, prompt_lengths=np.array(prompt_lengths))

    def joined(self, others):
        """These rows, and the others behind them."""
        tokens = self.tokens + others.tokens
        prompt_lengths = np.append(self.prompt_lengths, others.prompt_lengths)
        return self._replace(tokens=tokens, prompt_lengths=prompt_lengths)

    def lengths(self):
        """Response tokens of each row: (N,)."""
        whole = torch.tensor([len(row) for row in self.tokens])
        return (whole - torch.as_tensor(self.prompt_lengths)).to(self.device)

    def by_parts(self, f, micro_batch=0):
        """f(tokens (b, T), prompt_lengths, response_lengths) -> (b, ...) of all rows: (N, ...), of
        like length together. With a `micro_batch` of at most that many, whose activations are made
        again in backward (Chen et al. 2016), so a loss may compare all rows."""
        mine, _ = parallel.share(len(self.tokens))
        whole = np.array([len(row) for row in self.tokens])
        # On a CPU, so many tokens' activations fit its cache; more rows at a time take longer.
        some = 1200 * parallel.world() if str(self.device) == "cpu" else whole.sum()
        parts = len(mine) / micro_batch if micro_batch else whole.sum() / some
        parts = min(math.ceil(parts), len(mine))
        order = np.argsort(whole[mine], kind="stable")
        call = partial(checkpoint, f, use_reentrant=False) if micro_batch else f
        values = []
        for part in np.array_split(mine[order], parts):
            rows = [self.tokens[i] for i in part]
            tokens, lengths = pad_rows(rows, self.pad, self.device)
            p = torch.as_tensor(self.prompt_lengths[part], device=self.device)
            values.append(call(tokens, p, lengths - p))
        undo = torch.as_tensor(order.argsort())
        values = torch.cat(values)[undo]
        return parallel.gather(values, len(self.tokens))

    def mismatched(self, n_ctx):
        """Each prompt with the response of the row before it, the first with that of the last:
        where there are no prompts, the same rows. A prompt that is too long loses its left end."""
        rows, lengths = [], []
        for i, row in enumerate(self.tokens):
            p = self.prompt_lengths[i]
            other = self.prompt_lengths[i - 1]
            response = self.tokens[i - 1][other:]
            cut = max(0, p + len(response) - n_ctx)
            kept = row[1 + cut : p]
            prompt = np.append(row[:1], kept)
            whole = np.append(prompt, response)
            rows.append(whole)
            lengths.append(len(prompt))
        return self._replace(tokens=rows, prompt_lengths=np.array(lengths))
