"""A step of --online that asks about some pairs of own samples only, which select.py chooses.

Left out: thumbs and lists; pairs across prompts; old answers that count less than new ones.
"""

from functools import partial

import numpy as np
import torch

from minirlhf.data import all_logps
from minirlhf.engine.rows import Rows, pad_rows, rowwise
from minirlhf.feedback.kinds import Batch, Compared
from minirlhf.online.hidden import features_of, pool_of
from minirlhf.online.samples import preferences_of, several
from minirlhf.online.select import NOTHING, select_all


class Asked(torch.nn.Module):
    """What a run has asked so far, saved with its state: hence of full length from the start.

    differences (L, C) of the two responses' features, outcomes (L,) P(the first is preferred), nan
    where there is none yet.
    """

    def __init__(self, length, width):
        super().__init__()
        unknown = torch.full((length,), torch.nan, dtype=torch.float64)
        nothing = torch.zeros(length, width, dtype=torch.float64)
        self.outcomes = torch.nn.Parameter(unknown, requires_grad=False)
        self.differences = torch.nn.Parameter(nothing, requires_grad=False)

    def __len__(self):
        return int((~self.outcomes.isnan()).sum())

    def so_far(self):
        """(differences, outcomes) as arrays."""
        n = len(self)
        return self.differences[:n].numpy(), self.outcomes[:n].numpy()

    def note(self, differences, outcomes):
        n = len(self)
        self.differences[n : n + len(outcomes)] = torch.as_tensor(differences)
        self.outcomes[n : n + len(outcomes)] = torch.as_tensor(outcomes)


def make_asked(base, steps, knobs):
    return Asked(steps * budget_of(knobs), base.config.n_embd)


def budget_of(knobs):
    """Pairs a step: --budget, or one a prompt."""
    return knobs.budget or knobs.batch_size // 2


@torch.no_grad()
def asked_batch(asked, base, policy, reference, prefer, tokenizer, knobs, prompts):
    """The Batch of the pairs that --select chooses among samples to n prompts, rows of ids.

    Of each prompt there are --samples. The labeler is asked about these pairs alone, and the
    responses of no pair take no part in the batch.
    """
    device, pad, K = policy.wte.weight.device, tokenizer.pad, knobs.samples
    to, lengths = pad_rows(prompts, pad, device)  # (n, Q), (n,)
    options = {"eos": tokenizer.eos, "pad": pad}
    tokens, written = several(
        policy, K, knobs.response_length, to, lengths, **options
    )  # (n, K, ..)
    every = tokens.flatten(0, 1), lengths.repeat_interleave(K), written.flatten()
    rows = Rows.sampled(*every, pad)
    features = features_of(base, rows).reshape(len(prompts), K, -1)

    rng = np.random.default_rng(torch.randint(2**62, ()).item())
    pool = pool_of(features, *asked.so_far())
    pairs = select_all(pool, NOTHING, budget_of(knobs), knobs.select, rng)  # (P, 3)
    prompt, first, second = pairs.T
    across, sides = torch.as_tensor(prompt[:, None]), torch.as_tensor(pairs[:, 1:])
    shown = tokens[across, sides], lengths[across[:, 0]], written[across, sides]
    preferences = rowwise(partial(preferences_of, prefer), 0, *shown)  # (P, 2, 2)
    labels = preferences[:, 0, 1].cpu().numpy()
    asked.note(features[prompt, first] - features[prompt, second], labels)

    place = prompt[:, None] * K + pairs[:, 1:]  # (P, 2) among all n K
    kept, place_in_batch = np.unique(place, return_inverse=True)
    said = Compared(kept, place_in_batch.reshape(place.shape), labels)
    rows = rows.take(kept)
    return Batch(rows, all_logps(reference, rows), said, bought=len(pairs))
