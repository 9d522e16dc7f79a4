"""The maths of stage 2: KL, shaped rewards, GAE, whitening, clipped losses, KL control, baselines.

Tensors in, tensors out. Everything about tokens is (B, R): response token t of row b, with a mask
that is True on real tokens. What lies outside the mask never matters and comes back as 0.

Left out: dual clip, clamps on log-ratios, bootstrapping the value of a cut response.
"""

import math

import torch
import torch.nn.functional as F

ADVANTAGES = ("gae", "rloo", "grpo", "reinforce")
LOSS_MEANS = ("token", "response", "constant")


def masked(x, mask):
    """x where the mask is True, 0 elsewhere."""
    return torch.where(mask.bool(), x, 0)


def masked_mean(x, mask):
    """The mean of x where the mask is True; 0 where it is nowhere."""
    count = mask.sum().clamp(min=1)
    return masked(x, mask).sum() / count


def kl_estimate(logprobs, ref_logprobs, kind="k1"):
    """Estimators of KL(policy || reference) at each of the policy's samples (Schulman 2020): k1 is
    unbiased, k2 never negative, k3 both. Raises ValueError for another kind."""
    u = logprobs - ref_logprobs
    estimates = {"k1": u, "k2": u**2 / 2, "k3": torch.expm1(-u) + u}
    if kind not in estimates:
        raise ValueError(f"kl kind {kind!r}: expected k1, k2 or k3")
    return estimates[kind]


def kl_loss(logprobs, ref_logprobs, mask, kind, weights=1.0):
    """The mean KL estimate over the mask: a scalar, for a KL that the loss pays (k2 or k3); with
    `weights` as in policy_loss."""
    logprobs, ref_logprobs = masked(logprobs, mask), masked(ref_logprobs, mask)
    kl = kl_estimate(logprobs, ref_logprobs, kind)
    return masked_mean(weights * kl, mask)


def on_last_token(scores, mask):
    """Scores (B,) on the last real token of their rows, where there is one, 0 elsewhere: (B, R)."""
    lengths = mask.bool().sum(1, keepdim=True)  # (B, 1)
    last = (lengths - 1).clamp(min=0)
    zeros = scores.new_zeros(mask.shape)
    scores = scores * mask.bool().any(1)
    return zeros.scatter(1, last, scores[:, None])


def shaped_rewards(scores, kl, mask, kl_coef):
    """Rewards of tokens (B, R): -kl_coef * kl, and on the last one the score (B,) (Ziegler et al.
    2019, eq. 2); scores (B, R) are what each token earns."""
    if scores.dim() == 1:
        scores = on_last_token(scores, mask)
    return masked(scores - kl_coef * kl, mask)


def gae(rewards, values, mask, gamma=1.0, lam=0.95):
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16): (advantages, returns).

    From the last token backwards, A_t = delta_t + gamma lam A_{t+1}, of the errors delta_t = r_t +
    gamma V_{t+1} - V_t, with V = 0 after the last response token; return = A + V. (B, R) each.
    """
    deltas, values = td_errors(rewards, values, mask, gamma)
    advantages, advantage = torch.zeros_like(values), 0
    for t in reversed(range(values.shape[1])):
        advantage = deltas[:, t] + gamma * lam * advantage
        advantages[:, t] = advantage
    return advantages, advantages + values


def fast_gae(rewards, values, mask, gamma=1.0, lam=0.95):
    """`gae` in one product: A_t is the sum over s >= t of (gamma lam)^(s-t) delta_s."""
    deltas, values = td_errors(rewards, values, mask, gamma)
    t = torch.arange(values.shape[1], device=values.device)
    exact = torch.float64 if values.is_cuda else values.dtype  # a GPU may round products of fp32
    distance = (t[:, None] - t).clamp(min=0).to(exact)
    decay = ((gamma * lam) ** distance).tril()  # (R, R): of delta_s in A_t
    with torch.autocast(values.device.type, enabled=False):
        advantages = (deltas.to(exact) @ decay).to(values.dtype)
    return advantages, advantages + values


def td_errors(rewards, values, mask, gamma):
    """delta_t = r_t + gamma V_{t+1} - V_t and V_t, both (B, R), 0 outside the mask."""
    rewards, values = masked(rewards, mask), masked(values, mask)
    following = F.pad(values[:, 1:], (0, 1))
    return rewards + gamma * following - values, values


def is_rounding(difference, size):
    """Whether differences of numbers of that size are a few units in the last place, as sums in
    another order leave them: divided by a spread, they would look like a signal."""
    last_place = torch.finfo(size.dtype).eps * size
    return difference.abs() <= 6 * last_place


def all_alike(x, mask, dim=()):
    """Whether x, where the mask is True, differs along dim by rounding alone. The dims, all of them
    without `dim`, are kept, of one place."""
    mask = mask.bool()
    low = torch.where(mask, x, torch.inf)
    low = low.amin(dim, keepdim=True)
    high = torch.where(mask, x, -torch.inf)
    high = high.amax(dim, keepdim=True)
    size = torch.maximum(low.abs(), high.abs())
    return is_rounding(high - low, size)


def whiten(x, mask, shift_mean=True):
    """Masked x with population variance 1; mean 0, or without shift_mean its own mean kept. What
    is all alike has no variance, and is its mean."""
    mean = masked_mean(x, mask)
    centred = x - mean
    variance = masked_mean(centred**2, mask)
    white = centred * torch.rsqrt(variance + 1e-8)
    alike = all_alike(x, mask)
    white = white.masked_fill(alike, 0)
    white = white if shift_mean else white + mean
    return masked(white, mask)


def policy_loss(logprobs, old_logprobs, advantages, mask, clip=0.2, clip_high=None,
                level="token", weights=1.0):  # fmt: skip
    """PPO's clipped surrogate (Schulman et al. 2017, eq. 7), negated: (masked mean, stats).

    A ratio is held between 1 - clip and 1 + clip, or 1 + clip_high (DAPO, Yu et al. 2025, eq. 8).
    It is a token's or, by `level` response, the geometric mean of those of its response, for each
    of its tokens (GSPO, Zheng et al. 2025, eq. 7). `weights` (B, 1): what a token counts.
    """
    log_ratio = masked(logprobs - old_logprobs, mask)
    if level == "response":
        log_ratio = response_mean(log_ratio, mask)
        log_ratio = masked(log_ratio, mask)
    ratio = log_ratio.exp()
    high = clip if clip_high is None else clip_high
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip, 1 + high)
    with torch.no_grad():
        stats = {
            "ppo/policy/ratio": masked_mean(ratio, mask),
            "ppo/policy/approxkl": masked_mean(0.5 * log_ratio**2, mask),
            "ppo/policy/clipfrac": masked_mean((clipped > plain).float(), mask),
        }
    larger = weights * torch.maximum(plain, clipped)
    return masked_mean(larger, mask), stats


def response_mean(x, mask):
    """The mean of masked x over each row's tokens: (B, 1)."""
    lengths = mask.sum(1, keepdim=True)
    return x.sum(1, keepdim=True) / lengths.clamp(min=1)


def token_weights(lengths, width, kind, counts):
    """What a token of each response counts (B, 1), so that a mean over all tokens of a batch is

    token: that over the tokens of responses that count (DAPO's, Yu et al. 2025, eq. 8);
    response: the mean over responses of each one's mean (GRPO's, Shao et al. 2024, eq. 3);
    constant: their sum over responses times width (Dr. GRPO's, Liu et al. 2025).

    lengths (B,), numbers of tokens; counts (B,), 1 where a response counts, else 0.
    """
    responses = counts.sum().clamp(min=1)
    if kind == "token":
        tokens = counts * lengths
        parts = tokens.sum().clamp(min=1)
    elif kind == "response":
        parts = responses * lengths.clamp(min=1)
    else:
        parts = responses * width
    shares = counts * lengths.sum() / parts
    return shares[:, None]


def value_loss(values, old_values, returns, mask, clip=0.2):
    """Half the squared error, or that of the value held within `clip` of the old one: the larger.
    Returns (mean over the mask, stats), as in Ziegler et al. 2019."""
    values, old_values = masked(values, mask), masked(old_values, mask)
    returns = masked(returns, mask)
    near = torch.maximum(values, old_values - clip)
    near = torch.minimum(near, old_values + clip)
    plain = (values - returns) ** 2
    clipped = (near - returns) ** 2
    with torch.no_grad():
        stats = {"ppo/val/clipfrac": masked_mean((clipped > plain).float(), mask)}
    larger = torch.maximum(plain, clipped)
    return 0.5 * masked_mean(larger, mask), stats


def group_advantages(scores, group_size, kind):
    """One advantage a response (B,), against the others of its prompt; the `group_size` rows of a
    prompt are consecutive.

    rloo: the score minus the mean of the others (Ahmadian et al. 2024). grpo: minus the group's
    mean, over its unbiased standard deviation + 1e-4 (Shao et al. 2024). reinforce: minus the
    group's mean alone ("Dr. GRPO", Liu et al. 2025); elsewhere the word can mean no baseline at
    all. Scores that are all alike have the advantage 0. Raises ValueError for another kind, for a
    group of one, and when B is not a multiple.
    """
    groups = as_groups(scores, group_size)
    mean = groups.mean(1, keepdim=True)
    flat = flat_groups(groups)[:, None]
    centred = (groups - mean).masked_fill(flat, 0)
    if kind == "rloo":
        centred = centred * group_size / (group_size - 1)
    elif kind == "grpo":
        centred = centred / (groups.std(1, keepdim=True) + 1e-4)
    elif kind != "reinforce":
        raise ValueError(f"group baseline {kind!r}: expected rloo, grpo or reinforce")
    return centred.flatten()


def as_groups(scores, group_size):
    """(groups, group_size) of scores (B,); errors as in group_advantages."""
    if group_size < 2 or len(scores) % group_size:
        given = f"{len(scores)} scores in groups of {group_size}"
        raise ValueError(f"{given}: expected whole groups of at least 2")
    return scores.view(-1, group_size)


def flat_responses(scores, group_size):
    """Where the scores of a whole group are alike, so that nothing is learned from it: (B,);
    nowhere in groups of one."""
    if group_size == 1:
        return torch.zeros_like(scores, dtype=torch.bool)
    groups = as_groups(scores, group_size)
    return flat_groups(groups).repeat_interleave(group_size)


def flat_groups(groups):
    """Which rows of scores (groups, group_size) are alike throughout: (groups,)."""
    whole = torch.ones_like(groups, dtype=torch.bool)
    return all_alike(groups, whole, dim=1).squeeze(1)


class AdaptiveKL:
    """A KL coefficient that steers the KL to a target in nats (Ziegler et al. 2019, 2.2).

    After n episodes: coef *= 1 + clip(kl/target - 1, -0.2, 0.2) * n / horizon. Without a target, or
    at a KL that is not finite, it stays.
    """

    def __init__(self, coef, target, horizon):
        self.coef = coef
        self.target = target
        self.horizon = horizon

    def update(self, kl, n):
        if self.target and math.isfinite(kl):
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.coef *= 1 + error * n / self.horizon
