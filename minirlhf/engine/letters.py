"""Tokens that share letters learn together, as words do in fastText (Bojanowski et al. 2017, arXiv
1607.04606).

In a small text most tokens stand a few times. So a token's embedding is the sum of a row of its own
and of the vectors of its groups of letters, these times a weight over the root of their number:
rows + S vectors. Only the sum is held, as the model's token embedding, so at any time the model is
one of rows alone. The gradient of the vectors is S^T that of the sum, and what an optimizer's step
adds to the vectors is added to the sum by way of S.

Left out: groups that reach over several tokens, whose sums no row could hold.
"""

from collections import Counter
from itertools import chain

import numpy as np
import torch
import torch.nn.functional as F

from minirlhf.engine import cli, parallel

SIZES = (3, 4, 5)  # letters in a group, the marks of a token's ends counted


def join(knobs, optimizer, model, tokenizer):
    """From now on the optimizer trains the token embedding of each GPT in the model by way of its
    letters, too, at the rate of matrices, if --letters says so."""
    weight = cli.given_or(knobs.letters, knobs.data, reviews=6.0)
    if weight:
        groups, count = numbered_groups(tokenizer)
        for part in model.modules():
            if hasattr(part, "wte"):
                learn_together(optimizer, part.wte, groups, count, weight)


def learn_together(optimizer, wte, groups, count, weight):
    """wte: nn.Embedding (V, C); groups: of each token, the numbers of its groups, of `count`."""
    letters = Letters(groups, count, weight, wte.weight.device)
    change = torch.nn.Parameter(torch.zeros(count, wte.embedding_dim, device=wte.weight.device))
    optimizer.add_param_group({"params": [change], "weight_decay": 0.0, "scale": 1.0})

    def before(*_):
        gradient = wte.weight.grad
        change.grad = None if gradient is None else letters.of_groups(parallel.full(gradient))

    @torch.no_grad()
    def after(*_):
        wte.weight += parallel.spread(letters.of_tokens(change), wte.weight)
        change.zero_()

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)


class Letters:
    """S, (V, count): which token has which groups, times weight / root of their number."""

    def __init__(self, groups, count, weight, device):
        owners = [[] for _ in range(count)]
        for token, own in enumerate(groups):
            for group in own:
                owners[group].append(token)
        self.groups, self.owners = bags(groups, device), bags(owners, device)
        sizes = torch.tensor([[max(1, len(own))] for own in groups], device=device)
        self.scale = weight * sizes**-0.5  # (V, 1)

    def of_tokens(self, vectors):
        """S vectors: (V, C) of (count, C)."""
        return self.scale * F.embedding_bag(self.groups[0], vectors, self.groups[1], mode="sum")

    def of_groups(self, rows):
        """S^T rows: (count, C) of (V, C)."""
        return F.embedding_bag(self.owners[0], self.scale * rows, self.owners[1], mode="sum")


def bags(lists, device):
    """(all numbers of the lists, where each list begins in them), as embedding_bag reads them."""
    numbers = torch.tensor(list(chain.from_iterable(lists)), device=device)
    starts = np.cumsum([0, *map(len, lists)])[:-1]
    return numbers, torch.tensor(starts, device=device)


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
