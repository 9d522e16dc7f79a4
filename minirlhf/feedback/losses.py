"""The losses of train_dpo that are not of pairs and their log-probs alone: a batch in, losses out.

Each is f(policy, reference, batch, logps, method, knobs), with the policy's log-probs (b,) of the
batch, and gives (losses, better, worse): the last two are the places of all pairs of which one
response is preferred, for the statistics. Those of own samples: minirlhf/online/losses.py.
"""

from functools import partial

import numpy as np
import torch

from minirlhf import dpo
from minirlhf.data import all_logps, prefix_kl
from minirlhf.lists import LISTS, THUMBS


def tdpo(policy, reference, batch, logps, method, knobs):
    """Pairs with the KL of all prefixes of their responses."""
    chosen, rejected, _ = batch.said.preferred_first(soft=False)
    kl = batch.rows.by_parts(partial(prefix_kl, policy, reference), knobs.micro_batch)
    kls = {"chosen_kl": kl[chosen], "rejected_kl": kl[rejected]}
    return of_pairs(batch, logps, chosen, rejected, method, knobs, **kls), chosen, rejected


def of_pairs(batch, logps, chosen, rejected, method, knobs, **more):
    """dpo.pair_loss with `more` than the log-probs; 0 where no response is preferred."""
    if not len(chosen):
        return 0 * logps
    lengths = batch.rows.lengths()
    return dpo.pair_loss(
        method.kind,
        logps[chosen],
        logps[rejected],
        batch.ref_logps[chosen],
        batch.ref_logps[rejected],
        beta=knobs.beta,
        chosen_lengths=lengths[chosen],
        rejected_lengths=lengths[rejected],
        **method.options,
        **more,
    )


def of_thumbs(policy, reference, batch, logps, method, knobs):
    """Single responses, each desirable or not; kto's have a reference point of mismatched ones."""
    scores = batch.said.scores
    good = scores > 0
    options = method.options | {"beta": knobs.beta}
    if method.kind == "kto":
        other = batch.rows.mismatched(policy.config.n_ctx)
        kl = all_logps(policy, other) - all_logps(reference, other)
        desirable = torch.as_tensor(good, device=logps.device)
        losses = THUMBS["kto"](logps, batch.ref_logps, desirable, kl, **options)
    else:
        scores = torch.as_tensor(scores, device=logps.device)
        losses = THUMBS[method.kind](logps, batch.ref_logps, scores, **options)
    return losses, *good_before_bad(good)


def good_before_bad(good):
    """The places of all pairs of a good response and one that is not: of good (b,) bool."""
    return np.nonzero(good[:, None] & ~good)


def of_lists(policy, reference, batch, logps, method, knobs):
    """Ranked lists."""
    said, loss = batch.said, LISTS[method.kind]
    places = said.lists
    rewards = torch.as_tensor(said.rewards, device=logps.device)
    mask = torch.as_tensor(said.mask, device=logps.device)
    if method.has_reference:
        options = method.options | {"beta": knobs.beta}
        losses = loss(logps[places], batch.ref_logps[places], rewards, mask, **options)
    else:
        lengths = batch.rows.lengths().float()[places]
        losses = loss(logps[places], lengths, rewards, mask, **method.options)
    both = said.mask[:, :, None] & said.mask[:, None]
    ahead = both & (said.rewards[:, :, None] > said.rewards[:, None])  # (L, K, K)
    one, better, worse = np.nonzero(ahead)
    return losses, places[one, better], places[one, worse]


LOSSES = {
    "tdpo1": tdpo,
    "tdpo2": tdpo,
    **dict.fromkeys(THUMBS, of_thumbs),
    **dict.fromkeys(LISTS, of_lists),
}
