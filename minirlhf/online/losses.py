"""Losses of own samples, in the form of minirlhf/feedback/losses.py: sppo, d2o, Nash-MD, XPO; and
PARL's of a reward model."""

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from minirlhf import dpo
from minirlhf.data import all_logps, total
from minirlhf.feedback.kinds import win_rates
from minirlhf.feedback.losses import LOSSES, good_before_bad, of_pairs
from minirlhf.lists import GAMES
from minirlhf.online import samples
from minirlhf.online.parl import bilevel_loss


def sppo(policy, reference, batch, logps, method, knobs):
    """Pairs with the chances of their responses to beat the last policy's.

    Online those are win rates among own samples, else of a pair's other response; without soft
    labels 1 and 0.
    """
    soft = knobs.soft_labels
    chosen, rejected, doubt = batch.said.preferred_first(soft)
    sure = doubt < 0.5
    doubt = torch.as_tensor(doubt, device=logps.device)
    won, lost = 1 - doubt, doubt
    if soft and batch.wins is not None:
        won, lost = batch.wins[chosen], batch.wins[rejected]
    chances = {"chosen_win": won, "rejected_win": lost}
    losses = of_pairs(batch, logps, chosen, rejected, method, knobs, **chances)
    return losses, chosen[sure], rejected[sure]


def d2o(policy, reference, batch, logps, method, knobs):
    """Rejected responses, each against what the policy itself answers to the same prompt."""
    chosen, rejected, _ = batch.said.preferred_first(soft=False)
    if not len(rejected):  # nothing but ties
        return 0 * logps, chosen, rejected
    K = knobs.samples
    own = samples.own_answers(policy, batch.rows, K, knobs.response_length)
    own_logps = own.by_parts(total(policy), knobs.micro_batch).view(-1, K).mean(1)  # (b,)
    ref_own_logps = all_logps(reference, own).view(-1, K).mean(1)
    losses = dpo.pair_loss(
        "d2o",
        own_logps[rejected],
        logps[rejected],
        ref_own_logps[rejected],
        batch.ref_logps[rejected],
        beta=knobs.beta,
        **method.options,
    )
    return losses, chosen, rejected


def nash_md(policy, reference, batch, logps, method, knobs):
    """Responses of the policy, each with its chance to beat one of the mixture."""
    losses = GAMES["nash_md"](logps, batch.ref_logps, batch.wins, beta=knobs.beta)
    good = batch.wins.cpu().numpy() > 0.5
    return losses, *good_before_bad(good)


def xpo(policy, reference, batch, logps, method, knobs):
    """Pairs of the policy's response and the reference's, in this order."""
    win = batch.said.labels
    if not knobs.soft_labels:
        win = np.where(win == 0.5, win, win > 0.5)
    win = torch.as_tensor(win, dtype=logps.dtype, device=logps.device)
    both, ref_both = logps.view(-1, 2), batch.ref_logps.view(-1, 2)
    losses = GAMES["xpo"](both, ref_both, win, beta=knobs.beta, **method.options)
    chosen, rejected, _ = batch.said.preferred_first(soft=False)
    return losses, chosen, rejected


def parl(knobs, scores, items, batch):
    """PARL's loss of a batch, a data.Compared of items, of which a reward model says scores (b,).

    Rivals, K responses to one prompt, are taken for samples of the reference. What is learned is
    the reward whose policy people prefer, not a reward that explains each label: see bilevel_loss.
    """
    groups, wins = win_rates(items, batch, knobs.group_size)
    rewards = [scores[group] for group in groups]
    rewards = pad_sequence(rewards, batch_first=True, padding_value=-torch.inf)  # (G, K)
    wins = pad_sequence([torch.as_tensor(w) for w in wins], batch_first=True).to(rewards)
    return bilevel_loss(rewards, wins, knobs.beta)


# What does not take pairs and their log-probs alone, stored responses' or own samples'
OTHER_LOSSES = LOSSES | {"sppo": sppo, "d2o": d2o, "nash_md": nash_md, "xpo": xpo}
