"""Rows of token ids of unequal length: padded, in batches, in parts, on many processes."""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint

from minirlhf.engine import parallel


def pad_rows(rows, pad, device="cpu"):
    """Token ids (B, T) of rows of unequal length, right-padded, and their lengths (B,)."""
    lengths = torch.tensor([len(row) for row in rows])
    tokens = torch.full((len(rows), int(lengths.max())), pad)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.as_tensor(row)
    return tokens.to(device), lengths.to(device)


def parts_by_length(lengths, parts):
    """A batch in parts of like length, which saves most of the padding: index arrays, and the order that undoes them."""
    order = np.argsort(lengths, kind="stable")
    return [part for part in np.array_split(order, parts) if len(part)], torch.as_tensor(order.argsort())


def bucketed(lengths, batch_size, rng):
    """Batches of indices of like length in random order: each index once, the last batch of a window perhaps smaller."""
    order, batches = rng.permutation(len(lengths)), []
    for window in np.split(order, range(16 * batch_size, len(order), 16 * batch_size)):
        window = window[np.argsort(lengths[window], kind="stable")]
        batches += np.split(window, range(batch_size, len(window), batch_size))
    return [batches[i] for i in rng.permutation(len(batches))]


def endless(n, batch_size, steps, rng):
    """Indices (steps, batch_size) of n things, in one random order after the other."""
    passes = -(-steps * batch_size // n)
    return np.concatenate([rng.permutation(n) for _ in range(passes)])[: steps * batch_size].reshape(steps, batch_size)


class Rows(NamedTuple):
    """N rows of token ids, `[EOS] prompt response EOS`."""

    tokens: list
    prompt_lengths: np.ndarray  # (N,)
    pad: int
    device: torch.device

    @classmethod
    def sampled(cls, tokens, prompt_lengths, response_lengths, pad):
        """Rows of samples: tokens (N, T), lengths (N,)."""
        rows = zip(tokens.cpu().numpy(), (prompt_lengths + response_lengths).tolist(), strict=True)
        return cls([row[:length] for row, length in rows], prompt_lengths.cpu().numpy(), pad, tokens.device)

    def take(self, index):
        return self._replace(tokens=[self.tokens[i] for i in index], prompt_lengths=self.prompt_lengths[index])

    def lengths(self):
        """Response tokens of each row: (N,)."""
        return torch.tensor([len(row) for row in self.tokens], device=self.device) - torch.as_tensor(self.prompt_lengths).to(self.device)

    def by_parts(self, f, micro_batch=0):
        """f(tokens (b, T), prompt_lengths, response_lengths) -> (b, ...) of all rows, in parts of like length: (N, ...).

        With a `micro_batch`, a part has at most that many rows, and its activations are made again in backward. Each process computes
        its share of the rows.
        """
        mine, _ = parallel.share(len(self.tokens))
        lengths = np.array([len(row) for row in self.tokens])
        # On a CPU, so many tokens' activations fit its cache; more rows at a time take longer.
        some = 1200 * parallel.world() if str(self.device) == "cpu" else lengths.sum()
        parts, undo = parts_by_length(lengths[mine], math.ceil(len(mine) / micro_batch if micro_batch else lengths.sum() / some))
        values = []
        for part in (mine[part] for part in parts):
            tokens, lengths = pad_rows([self.tokens[i] for i in part], self.pad, self.device)
            prompt_lengths = torch.as_tensor(self.prompt_lengths[part], device=self.device)
            row = (tokens, prompt_lengths, lengths - prompt_lengths)
            # Tensors as arguments: checkpoint keeps the random state of their device, for the same dropout in both passes.
            values.append(checkpoint(f, *row, use_reentrant=False) if micro_batch else f(*row))
        return parallel.gather(torch.cat(values)[undo], len(self.tokens))

    def mismatched(self, n_ctx):
        """Each prompt with the response of the row before it, the first with that of the last: where there are no prompts, the same rows.

        A prompt that is too long for its response loses its left end.
        """
        prompts = [row[:p] for row, p in zip(self.tokens, self.prompt_lengths, strict=True)]
        responses = [row[p:] for row, p in zip(self.tokens, self.prompt_lengths, strict=True)]
        responses = responses[-1:] + responses[:-1]
        prompts = [np.append(p[:1], p[1:][max(0, len(p) + len(r) - n_ctx) :]) for p, r in zip(prompts, responses, strict=True)]
        rows = [np.append(p, r) for p, r in zip(prompts, responses, strict=True)]
        return self._replace(tokens=rows, prompt_lengths=np.array([len(p) for p in prompts]))


def response_mask(response_lengths, width):
    """True on real response tokens: (B, R) of lengths (B,)."""
    return torch.arange(width, device=response_lengths.device) < response_lengths[:, None]


def before_response(x, prompt_lengths, width):
    """What stands where each response token is chosen: x (B, T, ...) at positions p-1 .. p+R-2, as (B, R, ...).

    Past the end of x the last position is repeated: outside the mask.
    """
    positions = prompt_lengths[:, None] - 1 + torch.arange(width, device=x.device)  # (B, R)
    return x[torch.arange(len(x), device=x.device)[:, None], positions.clamp(max=x.shape[1] - 1)]
