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
    K = knobs.samples
    options = {"eos": tokenizer.eos, "pad": tokenizer.pad}
    device = policy.wte.weight.device
    to, lengths = pad_rows(prompts, tokenizer.pad, device)  # (n, Q), (n,)
    sampled = several(policy, K, knobs.response_length, to, lengths, **options)
    tokens, response_lengths = sampled  # (n, K, Q+R), (n, K)
    rows = Rows.sampled(
        tokens.flatten(0, 1),
        lengths.repeat_interleave(K),
        response_lengths.flatten(),
        tokenizer.pad,
    )
    features = features_of(base, rows).reshape(len(prompts), K, -1)

    pairs = chosen(asked, features, knobs)  # (P, 3)
    labels = labels_of(pairs, prefer, tokens, lengths, response_lengths)
    prompt, first, second = pairs.T
    differences = features[prompt, first] - features[prompt, second]
    asked.note(differences, labels)

    place = prompt[:, None] * K + pairs[:, 1:]  # (P, 2) among all n K
    kept, place_in_batch = np.unique(place, return_inverse=True)
    both = place_in_batch.reshape(place.shape)
    said = Compared(kept, both, labels)
    rows = rows.take(kept)
    return Batch(rows, all_logps(reference, rows), said, bought=len(pairs))


def chosen(asked, features, knobs):
    """Pairs (P, 3) of prompt, first and second response, by the step's own random numbers."""
    seed = torch.randint(2**62, ()).item()
    pool = pool_of(features, *asked.so_far())
    rng = np.random.default_rng(seed)
    return select_all(pool, NOTHING, budget_of(knobs), knobs.select, rng)


def labels_of(pairs, prefer, tokens, prompt_lengths, response_lengths):
    """(P,) how often the labeler prefers the first of each pair: nothing else is asked."""
    prompt = torch.as_tensor(pairs[:, 0], device=tokens.device)
    sides = torch.as_tensor(pairs[:, 1:], device=tokens.device)
    across = prompt[:, None]
    shown = tokens[across, sides], prompt_lengths[prompt], response_lengths[across, sides]
    compare = partial(preferences_of, prefer)
    preferences = rowwise(compare, 0, *shown)  # (P, 2, 2)
    return preferences[:, 0, 1].cpu().numpy()
