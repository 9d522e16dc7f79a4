"""Rows of token ids, and their log-probs under a model: in parts, stored, and as a divergence."""

import contextlib
import hashlib
import math
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.utils.checkpoint import checkpoint

from minirlhf import data, parallel
from minirlhf.checkpoint import save_tensors
from minirlhf.sampling import before_response, response_logprobs, response_mask


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
        parts, undo = data.parts_by_length(lengths[mine], math.ceil(len(mine) / micro_batch if micro_batch else lengths.sum() / some))
        values = []
        for part in (mine[part] for part in parts):
            tokens, lengths = data.pad_rows([self.tokens[i] for i in part], self.pad, self.device)
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


def total(model):
    """The log-prob of each response, summed over its tokens, as a function for Rows.by_parts."""
    return lambda tokens, p, r: response_logprobs(model, tokens, p, r, int(r.max())).sum(1)


@torch.no_grad()
def all_logps(model, rows):
    """Log-probs of all responses (N,); None where there is no model."""
    if model is None:
        return None
    index = np.arange(len(rows.tokens))
    return torch.cat([rows.take(i).by_parts(total(model)) for i in np.split(index, range(128, len(index), 128))])


def stored_logps(model, rows, autocast, dtype):
    """all_logps, computed once and kept in the cache under a digest of all that they depend on; `dtype` is the autocast's name."""
    if model is None:
        return None
    key = hashlib.sha256(repr((model.config, dtype, rows.device.type)).encode())
    for weight in model.state_dict().values():
        key.update(parallel.full(weight).cpu().numpy())
    for row, prompt_length in zip(rows.tokens, rows.prompt_lengths, strict=True):
        key.update(np.array([prompt_length, len(row), *row], dtype=np.int64))
    path, stored = data.cache_directory() / "ref-logps" / f"{key.hexdigest()}.safetensors", None
    with contextlib.suppress(OSError, SafetensorError, KeyError):  # what is not there, or broken, is made
        stored = load_file(path)["logps"].to(rows.device)
    if not parallel.any_process(stored is None, rows.device):
        return stored
    with autocast:
        logps = all_logps(model, rows)
    with contextlib.suppress(OSError):  # a cache that cannot be written costs only time
        path.parent.mkdir(parents=True, exist_ok=True)
        save_tensors({"logps": logps.cpu()}, path, {})
    return logps


def prefix_kl(policy, reference, tokens, prompt_lengths, response_lengths):
    """KL(pi_ref || pi) of the next token, summed over the prefixes of each response (TDPO): (b,), for Rows.by_parts.

    Distributions over the vocabulary exist for 1,024 prefixes at a time, and are made again in backward.
    """
    width, end, lengths = int(response_lengths.max()), tokens.shape[1] - 1, prompt_lengths + response_lengths - 1
    mask = response_mask(response_lengths, width)  # (b, R)
    with torch.no_grad():
        ref_hidden = before_response(reference.hidden(tokens[:, :end], lengths=lengths), prompt_lengths, width)[mask]  # (N, C)
    hidden = before_response(policy.hidden(tokens[:, :end], lengths=lengths), prompt_lengths, width)[mask]

    def kl(hidden, ref_hidden):
        with torch.autocast(hidden.device.type, enabled=False):
            heads = (hidden, policy.lm_head_weight), (ref_hidden, reference.lm_head_weight.detach())
            logp, ref = ((h.float() @ weight.float().t()).log_softmax(1) for h, weight in heads)
            return (ref.exp() * (ref - logp)).sum(1)

    parts = [checkpoint(kl, h, r, use_reentrant=False) for h, r in zip(hidden.split(1024), ref_hidden.split(1024), strict=True)]
    return torch.zeros(mask.shape, device=tokens.device).masked_scatter(mask, torch.cat(parts)).sum(1)
