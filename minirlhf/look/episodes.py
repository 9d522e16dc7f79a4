"""What metrics.jsonl says of PPO's rollouts and updates."""

import torch

from minirlhf.ppo import all_alike, masked_mean


def rollout_stats(episodes, mask, earned, entropy, sampled_logprobs, kl_coef):
    """Metrics of train_ppo's Episodes; earned: scores, rewards (B, R), which ended (B,),
    and whose group earned the same throughout (B,)."""
    scores, rewards, ended, flat = earned
    logprobs, scores = episodes.logprobs, scores.sum(1)
    stats = {
        "objective/score": scores.mean(),
        "objective/score_std": scores.std(correction=0),
        "objective/kl": (logprobs - episodes.ref_logprobs).sum(1).mean(),
        "objective/kl_coef": torch.tensor(kl_coef),
        "objective/entropy": -logprobs.sum(1).mean(),
        "ppo/policy/entropy": masked_mean(entropy, mask),
        "objective/reward": rewards.sum(1).mean(),
        "objective/response_length": mask.sum(1).float().mean(),
        "objective/ended": ended.float().mean(),
        "objective/mismatch": (logprobs - sampled_logprobs).abs().sum() / mask.sum(),
        "perf/tokens": (episodes.prompt_lengths + episodes.response_lengths).sum(),
    }
    values, returns = episodes.values, episodes.returns
    if values is None:
        stats["objective/flat_groups"] = flat.float().mean()
    else:
        stats["ppo/returns/mean"] = masked_mean(returns, mask)
        stats["ppo/val/explained_variance"] = explained_variance(values, returns, mask)
    return stats


def explained_variance(values, returns, mask):
    """1 - var(returns - values) / var(returns): 1 of a perfect critic, 0 of a constant one; 0 where
    the returns are all alike."""
    errors = returns - values
    around_mean = errors - masked_mean(errors, mask)
    unexplained = masked_mean(around_mean**2, mask)
    around_mean = returns - masked_mean(returns, mask)
    variance = masked_mean(around_mean**2, mask)
    explained = 1 - unexplained / variance
    alike = all_alike(returns, mask).squeeze()
    return explained.masked_fill(alike, 0)


def update_stats(history):
    """Of the {name: number} of each optimizer step the means, how many there were, and the ratio
    and approxkl of the first, before anything has moved."""
    stats = mean_of(history)
    stats["ppo/optimizer_steps"] = torch.tensor(float(len(history)))
    for name in ("ratio", "approxkl"):
        stats[f"ppo/policy/first_{name}"] = history[0][f"ppo/policy/{name}"]
    return stats


def mean_of(history):
    """The mean of each statistic of {name: number} in a list."""
    columns = {name: [torch.as_tensor(stats[name]) for stats in history] for name in history[0]}
    return {name: torch.stack(column).mean() for name, column in columns.items()}


def step_0_check(stats):
    """Before any update, policy and reference are one: the KL is 0, and so is the first log-ratio;
    and the sampler's log-probs are those that the model gives when it reads the whole row."""
    names = "ppo/policy/first_ratio", "objective/kl", "objective/mismatch"
    ratio, kl, mismatch = (stats[name].item() for name in names)
    right = abs(ratio - 1) < 1e-4 and abs(kl) < 1e-4 and mismatch < 0.05
    found = f"first ratio {ratio:.6f}, KL {kl:.6f} nats, sampler off by {mismatch:.6f} nats a token"
    return f"step-0 check: {found}: {'' if right else 'NOT '}as they should be"
