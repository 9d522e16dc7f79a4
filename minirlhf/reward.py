"""The maths of stage 1: what a set of scores says about human choices. Tensors in, tensors out."""

import torch
import torch.nn.functional as F


def bradley_terry_loss(chosen, rejected, *, margin=0.0, label=1.0, center=0.0):
    """Negative log-likelihood of preferences (Bradley and Terry 1952): a scalar, the mean.

    chosen, rejected: scores, any one shape; or the logits of a pairwise preference model, and 0.
    label = P(chosen preferred), a float or that shape: 1 is a plain preference, 0.5 a tie, a share
    of raters a soft label. margin is subtracted from the difference (Llama 2). center weighs
    (chosen + rejected)^2, which pins a reward's free constant (Eisenstein et al. 2023).
    """
    difference = chosen - rejected
    agree = -label * F.logsigmoid(difference - margin)
    loss = agree - (1 - label) * F.logsigmoid(-difference - margin)
    return (loss + center * (chosen + rejected) ** 2).mean()


def plackett_luce_loss(rewards, ranking):
    """Negative log-likelihood of whole rankings (Plackett 1975): a scalar, the mean over rows.

    rewards (B, K); ranking (B, K) int, option indices best first. The best is chosen among all K,
    the next among the rest, and so on; K = 2 is Bradley-Terry. In a row of fewer options the
    missing ones have the reward -inf and stand last in the ranking.
    """
    r = rewards.gather(1, ranking)  # (B, K), best first
    missing = r == float("-inf")
    lowest = torch.finfo(r.dtype).min  # weighs exp(min - r) = 0 as -inf does, and has a gradient
    r = r.masked_fill(missing, lowest)
    rest = r.flip(1).logcumsumexp(1).flip(1)  # log-sum-exp of this option and all behind it
    losses = (rest - r).masked_fill(missing, 0)
    return losses[:, :-1].sum(1).mean()


def best_of_k_loss(rewards, best):
    """Cross entropy of the softmax of K rewards against the best (Ziegler et al. 2019): a scalar.

    rewards (B, K), -inf for missing options; best (B,) int. The first term of Plackett-Luce.
    """
    return F.cross_entropy(rewards, best)


def rating_loss(scores, ratings):
    """Mean squared error of scores (N,) against ratings (N,): a scalar."""
    return F.mse_loss(scores, ratings)


def pair_accuracy(scores, pairs):
    """Share of pairs (P, 2), first preferred, that the scores (N,) order so; a tie counts half."""
    first = scores[pairs[:, 0]]
    second = scores[pairs[:, 1]]
    return share_positive(first - second)


def share_positive(differences):
    """Share of differences (P,) above 0; a 0 counts one half."""
    above = (differences > 0).float()
    equal = differences == 0
    return (above + 0.5 * equal).mean()


def normalization(scores):
    """Mean and population std of scores (N,) on the base model's samples (Ziegler 2019, 2.1). The
    std is 0 where they differ by rounding alone, a few units in the last place."""
    mean = scores.mean().item()
    std = scores.std(correction=0).item()
    last_place = torch.finfo(scores.dtype).eps * scores.abs().max()
    spread = scores.max() - scores.min()
    if spread <= 6 * last_place:
        std = 0.0
    return mean, std
