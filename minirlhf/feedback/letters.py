"""Tokens that share letters learn together, as words do in fastText (Bojanowski et al. 2017, arXiv
1607.04606).

In ten thousand snippets most words stand a few times. While a model learns, the embedding of a
token is its own row plus the sum of the vectors of its groups of letters, over the root of their
number; at the end the sums are added to the rows. So the model that is kept is one of rows alone.

Left out: groups that reach over several tokens, whose sums no row could hold.
"""

from collections import Counter
from itertools import chain

import torch
import torch.nn as nn
import torch.nn.functional as F

from minirlhf.engine import parallel

SIZES = (3, 4, 5)  # letters in a group, the marks of a token's ends counted


class Letters(nn.Module):
    """Vectors of all groups of letters that two tokens or more have, 0 at first."""

    def __init__(self, tokenizer, width, weight):
        super().__init__()
        groups, count = numbered_groups(tokenizer)
        most = max(map(len, groups))
        padded = [own + [count] * (most - len(own)) for own in groups]
        sizes = torch.tensor([[max(1, len(own))] for own in groups])
        self.weight = nn.Parameter(torch.zeros(count + 1, width))  # the last is of no group: 0
        self.register_buffer("groups", torch.tensor(padded))  # (V, most)
        self.register_buffer("scale", weight * sizes**-0.5)  # (V, 1)

    def forward(self, idx):
        """What is added to the embeddings of token ids (...): (..., C)."""
        return self.sums(self.weight, idx.flatten()).view(*idx.shape, -1)

    def sums(self, vectors, ids):
        last = len(vectors) - 1
        sums = F.embedding_bag(self.groups[ids], vectors, mode="sum", padding_idx=last)
        return sums * self.scale[ids]


def attach(knobs, model, tokenizer):
    """The model, of a GPT and a head, whose token embedding learns with its letters until `fold`,
    if --letters says so."""
    weight = knobs.letters
    if weight < 0:
        weight = 3.0 if knobs.data == "reviews" else 0.0
    if weight:
        wte = model.transformer.wte
        wte.letters = Letters(tokenizer, wte.embedding_dim, weight)
        wte.letters.hook = wte.register_forward_hook(add_letters)
    return model


def add_letters(wte, given, rows):
    return rows + wte.letters(*given)


@torch.no_grad()
def fold(model):
    """The model, after its token embedding's rows got what they learned with their letters."""
    wte = model.transformer.wte
    letters = getattr(wte, "letters", None)
    if letters is not None:
        parallel.reshard(model)
        rows, vectors = parallel.full(wte.weight), parallel.full(letters.weight)
        every = torch.arange(len(rows), device=rows.device)
        parallel.copy_into(wte.weight, rows + letters.sums(vectors, every))
        letters.hook.remove()
        del wte.letters
    return model


def numbered_groups(tokenizer):
    """(the numbers of each token's groups of letters, how many groups there are): those that two
    tokens or more have."""
    tokens = [letter_groups(tokenizer.decode_bytes([i])) for i in range(tokenizer.vocab_size)]
    counts = Counter(chain.from_iterable(tokens))
    shared = [group for group, n in counts.items() if n > 1]
    number = {group: i for i, group in enumerate(shared)}
    groups = []
    for own in tokens:
        groups.append([number[group] for group in own if group in number])
    return groups, len(shared)


def letter_groups(token):
    """The groups of letters of a token's bytes, each once: the whole of it, in small letters and
    without spaces around, and what stands side by side in it between the marks < and >."""
    word = token.decode(errors="ignore").strip().lower()
    marked = f"<{word}>"
    parts = [marked[i : i + n] for n in SIZES for i in range(len(marked) - n + 1)]
    return list(dict.fromkeys([(word,), *parts])) if word else []
