"""A model of preferences without scores.

Left out: more than one response a row; the pairwise model in PPO, which needs a score.
"""

import math

from minirlhf.engine.weights import expect_kind, load_strictly, read_directory
from minirlhf.gpt import GPTConfig, HeadedGPT


class PreferenceModel(HeadedGPT):
    """The general preference model of Zhang et al. 2024 (arXiv 2410.02197).

    P(a preferred to b) without a score of a or b: each response has an embedding of `dim` = 2k
    numbers, and logit(a, b) = sum_i a_2i b_2i+1 - a_2i+1 b_2i. Those are k planes, in each of which
    a beats what lies up to half a turn ahead of it. So logit(b, a) = -logit(a, b), and circles of
    preference can be held. The head's standard deviation makes fresh logits of independent
    unit-variance hidden states have one near 1. Raises ValueError for an odd dim.
    """

    def __init__(self, config, dim=8):
        if dim < 2 or dim % 2:
            raise ValueError(f"dim {dim}: expected an even number, two for each plane")
        super().__init__(config, dim, dim**-0.25 / math.sqrt(config.n_embd + 1))

    def embed(self, idx, lengths):
        """The embedding (B, dim) of each row: the head at its last real token."""
        last = self.transformer.hidden(idx, lengths=lengths, at=lengths - 1)  # (B, C)
        return self.score(last)

    def forward(self, idx, lengths, prompt_lengths=None):
        """`embed`, called as one calls a RewardModel; where the response begins says nothing."""
        return self.embed(idx, lengths)

    def logit(self, a, b):
        """The log-odds that a is preferred to b: (...) of embeddings (..., dim); they broadcast."""
        ahead = a[..., ::2] * b[..., 1::2]
        behind = a[..., 1::2] * b[..., ::2]
        return (ahead - behind).sum(-1)

    def save_pretrained(self, directory, tokenizer=None):
        self.save(directory, {}, tokenizer)

    @classmethod
    def from_pretrained(cls, directory, *, dropout=0.0):
        """Reads a directory that save_pretrained wrote; errors as in GPT.from_pretrained."""
        sizes, weights, _ = read_directory(directory)
        dim = expect_kind("preference model", directory, weights)
        model = cls(GPTConfig(*sizes, dropout=dropout), dim)
        return load_strictly(model, weights, directory)
