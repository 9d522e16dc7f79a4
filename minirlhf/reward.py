"""The maths of stage 1: what a set of scores says about human choices. Tensors in, tensors out.

Left out: best-of-K cross entropy (the first term of Plackett-Luce), regression on ratings.
"""

import torch.nn.functional as F


def bradley_terry_loss(chosen, rejected, *, margin=0.0, label=1.0, center=0.0):
    """Negative log-likelihood of pairwise preferences (Bradley and Terry 1952): a scalar, the mean over pairs.

    chosen, rejected: scores, any one shape. label = P(chosen preferred), a float or that shape: 1 is a plain preference, 0.5 a tie,
    the share of raters who agree a soft label. margin is subtracted from the difference (Llama 2). center weighs
    (chosen + rejected)^2, which pins the free constant of a reward (Eisenstein et al. 2023).
    """
    difference = chosen - rejected
    loss = -label * F.logsigmoid(difference - margin) - (1 - label) * F.logsigmoid(-difference - margin)
    return (loss + center * (chosen + rejected) ** 2).mean()


def plackett_luce_loss(rewards, ranking):
    """Negative log-likelihood of whole rankings (Plackett 1975): a scalar, the mean over rows.

    rewards (B, K); ranking (B, K) int, option indices best first. The best is chosen among all K, the next among the rest, and so on;
    K = 2 is Bradley-Terry.
    """
    r = rewards.gather(1, ranking)  # (B, K), best first
    rest = r.flip(1).logcumsumexp(1).flip(1)  # log-sum-exp of this option and all behind it
    return (rest - r)[:, :-1].sum(1).mean()


def pair_accuracy(scores, pairs):
    """Share of pairs (P, 2), first preferred, that the scores (N,) order so; an equal score counts one half."""
    difference = scores[pairs[:, 0]] - scores[pairs[:, 1]]
    return ((difference > 0).float() + 0.5 * (difference == 0)).mean()


def normalization(scores):
    """Mean and population standard deviation of scores (N,) on samples of the base model (Ziegler et al. 2019, 2.1)."""
    return scores.mean().item(), scores.std(correction=0).item()
