"""The maths of stage 2: KL, shaped rewards, GAE, whitening, clipped losses, KL control, group baselines; and its alarms.

Tensors in, tensors out; `experience` and `losses` put the pieces together as the script's knobs say. Everything about tokens is
(B, R): response token t of row b, with a mask that is True on real tokens. What lies outside the mask never matters and comes back as 0.

Left out: entropy bonus, dual clip, clamps on log-ratios, bootstrapping the value of a cut response.
"""

import math

import numpy as np
import torch

ADVANTAGES = ("gae", "rloo", "grpo", "reinforce")


def masked_mean(x, mask):
    """The mean of x where the mask is True; 0 where it is nowhere."""
    return torch.where(mask.bool(), x, 0).sum() / mask.sum().clamp(min=1)


def kl_estimate(logprobs, ref_logprobs, kind="k1"):
    """Estimators of KL(policy || reference) from the policy's own samples, elementwise (Schulman 2020).

    With u = logprobs - ref_logprobs: k1 = u, unbiased and of either sign; k2 = u^2/2; k3 = exp(-u) - 1 + u, unbiased and never
    negative. Raises ValueError for another kind.
    """
    u = logprobs - ref_logprobs
    if kind == "k1":
        return u
    if kind == "k2":
        return u**2 / 2
    if kind == "k3":
        return torch.expm1(-u) + u
    raise ValueError(f"kl kind {kind!r}: expected k1, k2 or k3")


def on_last_token(scores, mask):
    """Scores (B,) on the last real token of their rows, 0 elsewhere: (B, R). A row without tokens has no place for one."""
    mask = mask.bool()
    last = (mask.sum(1, keepdim=True) - 1).clamp(min=0)
    return torch.zeros(mask.shape, dtype=scores.dtype, device=scores.device).scatter(1, last, (scores * mask.any(1))[:, None])


def shaped_rewards(scores, kl, mask, kl_coef):
    """Per-token rewards (B, R): -kl_coef * kl at each token, and the score (B,) on the last one (Ziegler et al. 2019, eq. 2).

    Scores (B, R) are what each token earns, and stay where they are.
    """
    scores = scores if scores.dim() == 2 else on_last_token(scores, mask)
    return torch.where(mask.bool(), scores - kl_coef * kl, 0)


def gae(rewards, values, mask, gamma=1.0, lam=0.95):
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16): (advantages, returns), both (B, R).

    delta_t = r_t + gamma V_{t+1} - V_t, A_t = sum over s >= t of (gamma lam)^(s-t) delta_s, return = A + V; V is 0 after the last response
    token. All sums are one product with a triangular matrix; gae_by_loop is the recursion.
    """
    deltas, values = td_errors(rewards, values, mask, gamma)
    exact = torch.float64 if values.is_cuda else values.dtype  # a GPU may round products of fp32
    t = torch.arange(values.shape[1], device=values.device)
    decay = ((gamma * lam) ** (t[:, None] - t).clamp(min=0).to(exact)).tril()  # (R, R): of delta_s in A_t
    with torch.autocast(values.device.type, enabled=False):
        advantages = (deltas.to(exact) @ decay).to(values.dtype)
    return advantages, advantages + values


def gae_by_loop(rewards, values, mask, gamma=1.0, lam=0.95):
    """`gae` a token at a time from the end: A_t = delta_t + gamma lam A_{t+1}. As long as there are tokens, so slow on a GPU."""
    deltas, values = td_errors(rewards, values, mask, gamma)
    advantages, advantage = torch.zeros_like(values), 0
    for t in reversed(range(values.shape[1])):
        advantages[:, t] = advantage = deltas[:, t] + gamma * lam * advantage
    return advantages, advantages + values


def td_errors(rewards, values, mask, gamma):
    """delta_t = r_t + gamma V_{t+1} - V_t and V_t, both (B, R), 0 outside the mask."""
    rewards, values = (torch.where(mask.bool(), x, 0) for x in (rewards, values))
    following = torch.nn.functional.pad(values[:, 1:], (0, 1))
    return rewards + gamma * following - values, values


def whiten(x, mask, shift_mean=True):
    """Masked x with population variance 1; mean 0, or its own mean kept when shift_mean is False."""
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean) ** 2, mask)
    white = (x - mean) * torch.rsqrt(variance + 1e-8)
    return torch.where(mask.bool(), white if shift_mean else white + mean, 0)


def policy_loss(logprobs, old_logprobs, advantages, mask, clip=0.2):
    """PPO's clipped surrogate (Schulman et al. 2017, eq. 7), negated: (scalar mean over the mask, stats)."""
    log_ratio = torch.where(mask.bool(), logprobs - old_logprobs, 0)
    ratio = log_ratio.exp()
    plain, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)
    with torch.no_grad():
        stats = {
            "ppo/policy/ratio": masked_mean(ratio, mask),
            "ppo/policy/approxkl": masked_mean(0.5 * log_ratio**2, mask),
            "ppo/policy/clipfrac": masked_mean((clipped > plain).float(), mask),
        }
    return masked_mean(torch.maximum(plain, clipped), mask), stats


def value_loss(values, old_values, returns, mask, clip=0.2):
    """Half the squared error, or that of the value held within `clip` of the old one, whichever is larger.

    Returns (scalar mean over the mask, stats), as in Ziegler et al. 2019.
    """
    values, old_values, returns = (torch.where(mask.bool(), x, 0) for x in (values, old_values, returns))
    near = torch.minimum(torch.maximum(values, old_values - clip), old_values + clip)
    plain, clipped = (values - returns) ** 2, (near - returns) ** 2
    with torch.no_grad():
        stats = {"ppo/val/clipfrac": masked_mean((clipped > plain).float(), mask)}
    return 0.5 * masked_mean(torch.maximum(plain, clipped), mask), stats


def explained_variance(values, returns, mask):
    """1 - var(returns - values) / var(returns) over the mask: 1 is a perfect critic, 0 one that knows only the mean."""

    def variance(x):
        return masked_mean((x - masked_mean(x, mask)) ** 2, mask)

    return 1 - variance(returns - values) / variance(returns)


def group_advantages(scores, group_size, kind):
    """One advantage a response (B,), against the others of its prompt; the `group_size` rows of a prompt are consecutive.

    rloo: the score minus the mean of the others (Ahmadian et al. 2024). grpo: minus the group's mean, over its unbiased standard
    deviation + 1e-4 (Shao et al. 2024). reinforce: minus the group's mean alone ("Dr. GRPO", Liu et al. 2025); elsewhere the word can
    mean no baseline at all. Raises ValueError for another kind, for a group of one, and when B is not a multiple.
    """
    if group_size < 2 or len(scores) % group_size:
        raise ValueError(f"{len(scores)} scores in groups of {group_size}: expected whole groups of at least 2")
    groups = scores.view(-1, group_size)
    centred = groups - groups.mean(1, keepdim=True)
    if kind == "rloo":
        centred = centred * group_size / (group_size - 1)
    elif kind == "grpo":
        centred = centred / (groups.std(1, keepdim=True) + 1e-4)
    elif kind != "reinforce":
        raise ValueError(f"group baseline {kind!r}: expected rloo, grpo or reinforce")
    return centred.flatten()


def experience(scores, logprobs, ref_logprobs, values, mask, knobs, kl_coef):
    """Steps 3 to 6 on a given rollout: (rewards, advantages, returns), each (B, R).

    scores (B,), or (B, R) where each token earns its own. Without a critic values are None, and so are the returns: the advantage of a
    response, from the sum of its rewards, is that of each of its tokens.
    """
    # 3 KL and 4 reward
    kl = kl_estimate(logprobs, ref_logprobs, knobs.kl_kind)
    rewards = shaped_rewards(scores, kl, mask, kl_coef if knobs.kl_in == "reward" else 0.0)
    if knobs.whiten_rewards:
        rewards = whiten(rewards, mask, shift_mean=False)

    # 6 advantages
    if values is None:
        advantages = group_advantages(rewards.sum(1), knobs.group_size, knobs.advantage)  # (B,)
        return rewards, advantages[:, None] * mask, None
    advantages, returns = gae(rewards, values, mask, knobs.gamma, knobs.lam)
    return rewards, whiten(advantages, mask) if knobs.whiten_advantages else advantages, returns


def losses(logprobs, values, minibatch, mask, knobs, kl_coef):
    """Step 7: (policy loss + vf_coef * value loss, stats), means over the mask; values None leaves the value loss out.

    minibatch: logprobs, ref_logprobs, advantages, values and returns (B, R) of the rollout. With kl_in "loss" the policy loss includes
    kl_coef times the mean KL estimate.
    """
    pg_loss, stats = policy_loss(logprobs, minibatch.logprobs, minibatch.advantages, mask, knobs.clip)
    if knobs.kl_in == "loss":
        inside = (torch.where(mask.bool(), x, 0) for x in (logprobs, minibatch.ref_logprobs))
        pg_loss = pg_loss + kl_coef * masked_mean(kl_estimate(*inside, knobs.kl_kind), mask)
    stats["ppo/policy/loss"] = pg_loss
    if values is None:
        return pg_loss, stats
    vf_loss, vf_stats = value_loss(values, minibatch.values, minibatch.returns, mask, knobs.value_clip)
    return pg_loss + knobs.vf_coef * vf_loss, stats | vf_stats | {"ppo/val/loss": vf_loss}


class AdaptiveKL:
    """A KL coefficient that steers `objective/kl` towards a target in nats (Ziegler et al. 2019, 2.2).

    After n episodes: coef *= 1 + clip(kl/target - 1, -0.2, 0.2) * n / horizon. A KL that is not finite changes nothing.
    """

    def __init__(self, coef, target, horizon):
        self.coef, self.target, self.horizon = coef, target, horizon

    def update(self, kl, n):
        error = min(max(kl / self.target - 1, -0.2), 0.2) if math.isfinite(kl) else 0
        self.coef *= 1 + error * n / self.horizon


def alarms(rows):
    """Signs of trouble in the metrics of all steps so far, each with its likeliest causes first; a healthy run shows none."""

    def last(key, n):
        return np.array([row.get(key, math.nan) for row in rows[-n:]] if len(rows) >= n else [math.nan])  # nan: no alarm

    first, kl, length = rows[0], last("objective/kl", 10), last("objective/response_length", 5).mean()
    growth = length / first["objective/response_length"]
    signs = (
        (kl.mean() < -0.02 - 3 * kl.std() / len(kl) ** 0.5,  # three standard errors, and more than rounding
         "KL is negative on average: a filter in sampling (--top-k); a reference that is not the policy's start"),
        (rows[-1]["ppo/policy/first_approxkl"] > 0.002,  # log-ratios of 0.06; the mean ratio is near 1 under any two distributions
         "ratio is not 1 before the first update: dropout; another temperature or dtype on one side; old log-probs of other weights"),
        (last("objective/entropy", 5).mean() < 0.1 * growth * first["objective/entropy"],  # a token's; healthy runs keep a quarter
         "entropy collapses: --kl-coef too small; a reward model that is fooled (read samples); a low --temperature"),
        (last("objective/score", 5).mean() > first["objective/score"] and growth > 2
         and last("objective/ended", 5).mean() < 0.5 * first["objective/ended"],  # longer alone can be better
         "score rises while length explodes: the reward likes length; no --missing-eos-score"),
        (last("ppo/val/explained_variance", 20).max() < 0,  # a critic with a fresh head may need ten steps
         "explained variance stays below 0: --whiten-rewards on raw values; the critic's --lr; values read one position off"),
    )  # fmt: skip
    return [text for sign, text in signs if sign]
