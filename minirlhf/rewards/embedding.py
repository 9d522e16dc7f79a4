"""A text as a vector: the mean of a GPT's last hidden states over its tokens."""

import numpy as np
import torch

from minirlhf.engine.rows import response_mask


def mean_hidden(hidden, lengths):
    """(B, C) means of hidden states (B, T, C) over the first `lengths` (B,) places of each row."""
    inside = response_mask(lengths, hidden.shape[1])  # (B, T)
    return hidden.masked_fill(~inside[..., None], 0).sum(1) / lengths[:, None]


@torch.no_grad()
def embed_rows(gpt, rows, size=128):
    """(N, C) of the whole rows, prompt and response, on the CPU; `rows` as engine.rows.Rows."""

    def embed(tokens, prompt_lengths, response_lengths):
        lengths = prompt_lengths + response_lengths
        return mean_hidden(gpt.hidden(tokens, lengths).float(), lengths)

    index = np.arange(len(rows.tokens))
    parts = np.split(index, range(size, len(index), size))
    return torch.cat([rows.take(part).by_parts(embed).cpu() for part in parts])
