"""A model of preferences without scores."""

import math

import torch

from minirlhf.engine.weights import (
    expect_kind,
    load_strictly,
    read_directory,
)
from minirlhf.gpt import GPTConfig, HeadedGPT


class PreferenceModel(HeadedGPT):
    """The general preference model of Zhang et al. 2024 (arXiv 2410.02197): P(a preferred to b) without a score of a or b.

    Each response has an embedding of `dim` = 2k numbers, and logit(a, b) = sum_i a_2i b_2i+1 - a_2i+1 b_2i: k planes, in each of which
    a beats what lies up to half a turn ahead of it. So logit(b, a) = -logit(a, b), and circles of preference can be held. The head's
    standard deviation makes fresh logits of independent unit-variance hidden states have one near 1. Raises ValueError for an odd dim.
    """

    def __init__(self, config, dim=8):
        if dim < 2 or dim % 2:
            raise ValueError(f"dim {dim}: expected an even number, two for each plane")
        super().__init__(config, dim, dim**-0.25 / math.sqrt(config.n_embd + 1))

    def embed(self, idx, lengths):
        """The embedding (B, dim) of each row: the head at its last real token."""
        hidden = self.transformer.hidden(idx, lengths=lengths)
        return self.score(hidden[torch.arange(len(idx), device=idx.device), lengths - 1])

    def logit(self, a, b):
        """The log-odds that a is preferred to b: (...) of embeddings (..., dim), which broadcast."""
        return (a[..., ::2] * b[..., 1::2] - a[..., 1::2] * b[..., ::2]).sum(-1)

    def save_pretrained(self, directory, tokenizer=None):
        self.save(directory, {}, tokenizer)

    @classmethod
    def from_pretrained(cls, directory, *, dropout=0.0):
        """Reads a directory that save_pretrained wrote; errors as in GPT.from_pretrained."""
        sizes, weights, _ = read_directory(directory)
        dim = expect_kind("preference model", directory, weights)
        return load_strictly(cls(GPTConfig(*sizes, dropout=dropout), dim), weights, directory)
