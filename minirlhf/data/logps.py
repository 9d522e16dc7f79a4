"""Log-probs of rows under a model; the reference's are kept in the cache."""

import contextlib
import hashlib

import numpy as np
import torch
from safetensors import safe_open
from torch.utils.checkpoint import checkpoint

from minirlhf.engine import parallel
from minirlhf.engine.files import cache_directory, save_tensors
from minirlhf.engine.rows import response_mask, window
from minirlhf.engine.states import checksum
from minirlhf.sampling import response_logprobs


def total(model):
    """The log-prob of a whole response, as a function for Rows.by_parts."""
    return lambda tokens, p, r: response_logprobs(model, tokens, p, r, int(r.max())).sum(1)


@torch.no_grad()
def all_logps(model, rows):
    """Log-probs of all responses (N,); None where there is no model."""
    if model is None:
        return None
    index = np.arange(len(rows.tokens))
    parts = np.split(index, range(128, len(index), 128))
    return torch.cat([rows.take(part).by_parts(total(model)) for part in parts])


def stored_logps(model, rows, autocast, dtype):
    """all_logps, computed once and kept in the cache; `dtype` is the autocast's name.

    A digest of all that they depend on is the name of their file. What is in it is believed if its
    checksum is right and there is one number for each row, else it is made again.
    """
    if model is None:
        return None
    name = digest(model, rows, dtype)
    path = cache_directory() / "ref-logps" / f"{name}.safetensors"
    stored = None
    with contextlib.suppress(Exception):  # not there, or broken, which raises many kinds: made
        stored = read_logps(path, len(rows.tokens)).to(rows.device)
    if not parallel.any_process(stored is None, rows.device):
        return stored
    with autocast:
        logps = all_logps(model, rows)
    with contextlib.suppress(OSError):  # a cache that cannot be written costs only time
        path.parent.mkdir(parents=True, exist_ok=True)
        logps_there = logps.cpu()
        save_tensors({"logps": logps_there}, path, {"checksum": str(checksum(logps_there))})
    return logps


def read_logps(path, n):
    """The n log-probs in a file of stored_logps. Raises ValueError for anything else."""
    with safe_open(path, "pt") as file:
        expected = (file.metadata() or {}).get("checksum")
        names = file.keys()
        tensors = [file.get_tensor(name) for name in names]
    (logps,) = tensors
    kind = logps.dtype, tuple(logps.shape), str(checksum(logps))
    if kind != (torch.float32, (n,), expected):
        raise ValueError(f"{path} is damaged")
    return logps


def digest(model, rows, dtype):
    key = hashlib.sha256(repr((model.config, dtype, rows.device.type)).encode())
    for weight in model.state_dict().values():
        key.update(parallel.full(weight).cpu().numpy())
    for row, p in zip(rows.tokens, rows.prompt_lengths, strict=True):
        key.update(np.array([p, len(row), *row], dtype=np.int64))
    return key.hexdigest()


def prefix_kl(policy, reference, tokens, prompt_lengths, response_lengths):
    """KL(pi_ref || pi) of the next token, summed over the prefixes of each response (TDPO): (b,).

    A function for Rows.by_parts. Distributions over the vocabulary exist for 1,024 prefixes at a
    time, and are made again in backward.
    """
    width, end = int(response_lengths.max()), tokens.shape[1] - 1
    lengths = prompt_lengths + response_lengths - 1
    mask = response_mask(response_lengths, width)  # (b, R)

    def before_responses(model):
        hidden = model.hidden(tokens[:, :end], lengths=lengths)  # (b, T, C)
        return window(hidden, prompt_lengths - 1, width)[mask].split(1024)  # (N, C) in all

    def kl(hidden, ref_hidden):
        with torch.autocast(hidden.device.type, enabled=False):
            logp = log_probs(hidden, policy.lm_head_weight)  # (1024, V)
            ref = log_probs(ref_hidden, reference.lm_head_weight.detach())
            return (ref.exp() * (ref - logp)).sum(1)

    with torch.no_grad():
        ref_hidden = before_responses(reference)
    hidden = before_responses(policy)
    parts = zip(hidden, ref_hidden, strict=True)
    kls = [checkpoint(kl, *part, use_reentrant=False) for part in parts]
    zeros = torch.zeros(mask.shape, device=tokens.device)
    return zeros.masked_scatter(mask, torch.cat(kls)).sum(1)


def log_probs(hidden, head):
    return (hidden.float() @ head.float().t()).log_softmax(1)
