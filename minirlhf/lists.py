"""The maths of stage 2' beside pairs: thumbs, ranked lists and games. Tensors in, tensors out.

h = log pi - log pi_ref of a response, as in dpo.py. Left out: PRO's temperatures.
"""

import torch
import torch.nn.functional as F
from torch.nn.functional import logsigmoid


def kto_loss(policy_logps, ref_logps, desirable, kl_logratios, *,
             beta=0.1, desirable_weight=1.0, undesirable_weight=1.0):  # fmt: skip
    """KTO (Ethayarajh et al. 2024, eq. 8) for single responses with a thumb up or down: (B,).

    1 - sigmoid(beta (h - z)) for a thumb up, 1 - sigmoid(beta (z - h)) for one down. desirable (B,)
    bool; kl_logratios (M,): h of responses matched with other prompts; z, the reference point, is
    their mean, at least 0, and takes no gradient. The weights make up for unequal numbers.
    """
    h = policy_logps - ref_logps
    z = kl_logratios.mean().clamp(min=0).detach()
    too_low = beta * (z - h)
    too_high = beta * (h - z)
    up = desirable_weight * too_low.sigmoid()
    down = undesirable_weight * too_high.sigmoid()
    return torch.where(desirable, up, down)


def una_loss(policy_logps, ref_logps, scores, *, beta=0.1):
    """UNA (Wang et al. 2024), (B,): beta h fitted to scores (B,); on pairs it is DPO.

    Scores are numbers (squared error) or bool (cross entropy).
    """
    reward = beta * (policy_logps - ref_logps)
    if scores.dtype == torch.bool:
        signed = torch.where(scores, reward, -reward)
        return -logsigmoid(signed)
    return (reward - scores) ** 2


def rrhf_loss(logps, lengths, rewards, mask=None):
    """RRHF (Yuan et al. 2023): sum over r_i > r_j of max(0, s_j - s_i), minus s of the best: (B,).

    logps, lengths, rewards (B, K); mask (B, K) bool: which of the K responses exist; s: log-prob
    per token, no reference, so that -s is a next-token loss.
    """
    per_token = logps / lengths.clamp(min=1)
    s, better, best = ranked(per_token, rewards, mask)
    lead = s.unsqueeze(1) - s.unsqueeze(2)  # [i, j]: of j over i
    wrong = F.relu(lead) * better
    return wrong.sum((1, 2)) - best


def pro_loss(logps, lengths, rewards, mask=None, *, lam=1.0):
    """PRO (Song et al. 2023): Plackett-Luce on s as in rrhf_loss, minus lam s of the best: (B,).

    Equal rewards do not compete. The authors' last term sums over tokens, lam = 0.05 (K - 1)^2.
    """
    per_token = logps / lengths.clamp(min=1)
    s, better, best = ranked(per_token, rewards, mask)
    itself = torch.eye(s.shape[1]).to(better)
    rivals = better | itself  # [i, j]: i competes with itself and with the worse
    scores = s.unsqueeze(1).masked_fill(~rivals, -torch.inf)
    losses = scores.logsumexp(2) - s
    return losses.sum(1) - lam * best


def rwr_loss(logps, lengths, rewards, mask=None, *, temperature=1.0):
    """Reward-weighted regression (Peters and Schaal 2007; Peng et al. 2019), (B,): each response's
    next-token loss by its share in softmax(rewards / temperature) of its list. Arguments as in
    rrhf_loss; no reference, and lengths have no say: of samples of pi_ref it is, but for a
    constant, KL(p || pi) with p = pi_ref exp(rewards / temperature) / Z."""
    if mask is None:
        mask = torch.ones_like(rewards).bool()
    scores = rewards.to(logps) / temperature
    scores = scores.masked_fill(~mask, -torch.inf)
    weights = scores.softmax(1)
    losses = -logps.masked_fill(~mask, 0)
    return (weights * losses).sum(1)


def lipo_loss(policy_logps, ref_logps, rewards, mask=None, *, beta=0.1):
    """LiPO-lambda (Liu et al. 2024): DPO on a list's pairs, weights from DCG after a swap: (B,).

    Sum over r_i > r_j of |2^r_i - 2^r_j| |1/log(1 + rank_i) - 1/log(1 + rank_j)| times the loss
    -log sigmoid(s_i - s_j), s = beta h; ranks by s from 1, different for equal s, else nothing
    would weigh anything at the start. All (B, K), mask as in rrhf_loss.
    """
    if mask is None:
        mask = torch.ones_like(rewards).bool()
    s = beta * (policy_logps - ref_logps)
    s, better, _ = ranked(s, rewards, mask)
    missing_last = s.masked_fill(~mask, -torch.inf)
    order = missing_last.argsort(dim=1, descending=True, stable=True)
    rank = 1 + order.argsort(dim=1).to(s)
    gain = 2.0 ** rewards.masked_fill(~mask, 0)
    discount = 1 / torch.log(1 + rank)
    weight = differences(gain) * differences(discount)
    right = logsigmoid(differences(s))
    losses = better * weight.abs() * right
    return -losses.sum((1, 2))


def ranked(s, rewards, mask):
    """s, 0 outside the mask (B, K); [i, j]: is i better than j (B, K, K); s of the best (B,)."""
    if mask is None:
        mask = torch.ones_like(rewards).bool()
    s = s.masked_fill(~mask, 0)
    rewards = rewards.to(s)
    rewards = rewards.masked_fill(~mask, -torch.inf)
    better = rewards.unsqueeze(2) > rewards.unsqueeze(1)
    better = better & mask.unsqueeze(1)
    best = rewards.argmax(1, keepdim=True)
    return s, better, s.gather(1, best).squeeze(1)


def differences(x):
    """[i, j]: x_i - x_j, of each list (B, K): (B, K, K)."""
    return x.unsqueeze(2) - x.unsqueeze(1)


def nash_md_loss(policy_logps, ref_logps, win, *, beta=0.1):
    """Nash-MD (Munos et al. 2023), sampled: (B,); gradient of -E[P] + beta KL(pi || pi_ref).

    Responses are pi's samples; win (B,): P(preferred to a sample of the normalised pi_ref^mu
    pi^(1 - mu)). The log-ratio is the whole response's, and a constant: an early token answers for
    the KL of all later ones. Only the gradient of the mean means something, the value nothing.
    """
    h = policy_logps - ref_logps
    advantage = win - 0.5
    cost = beta * h.detach() - advantage
    return cost * policy_logps


def xpo_loss(policy_logps, ref_logps, win, *, beta=0.1, alpha=1e-3):
    """XPO (Xie et al. 2024, algorithm 1): (n,), of log-probs (n, 2): pi's sample, pi_ref's sample.

    DPO with win (n,), P(the first is preferred), plus alpha log pi of the second: what the
    reference writes gets less likely, as if what it seldom writes were good until it is tried.
    """
    h = policy_logps - ref_logps
    margin = beta * (h[:, 0] - h[:, 1])
    first = win * logsigmoid(margin)
    second = (1 - win) * logsigmoid(-margin)
    optimism = alpha * policy_logps[:, 1]
    return optimism - first - second


THUMBS = {"kto": kto_loss, "una": una_loss}
LISTS = {
    "rrhf": rrhf_loss,
    "pro": pro_loss,
    "rwr": rwr_loss,
    "lipo": lipo_loss,
}
GAMES = {"nash_md": nash_md_loss, "xpo": xpo_loss}
OPTIONS = {  # that a command line may set, besides beta
    "kto": ("desirable_weight", "undesirable_weight"),
    "pro": ("lam",),
    "rwr": ("temperature",),
    "xpo": ("alpha",),
}
