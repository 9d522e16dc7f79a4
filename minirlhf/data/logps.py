"""Log-probs of rows."""

import contextlib
import hashlib

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.utils.checkpoint import checkpoint

from minirlhf.engine import parallel
from minirlhf.engine.files import cache_directory, save_tensors
from minirlhf.sampling import before_response, response_logprobs, response_mask


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
    path, stored = cache_directory() / "ref-logps" / f"{key.hexdigest()}.safetensors", None
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
