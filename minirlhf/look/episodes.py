"""What metrics.jsonl says of PPO's rollouts."""

import torch

from minirlhf.ppo import explained_variance, masked_mean


def mean_of(history):
    """The mean of each statistic of {name: number} in a list."""
    means = {}
    for name in history[0]:
        column = [torch.as_tensor(stats[name]) for stats in history]
        means[name] = torch.stack(column).mean()
    return means


def rollout_stats(episodes, mask, earned, entropy, sampled_logprobs, kl_coef):
    """Metrics of train_ppo's Episodes; earned: scores, rewards (B, R), which ended (B,)."""
    scores, rewards, ended = earned
    logprobs, scores = episodes.logprobs, scores.sum(1)
    off = (logprobs - sampled_logprobs).abs().sum()
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
        "objective/mismatch": off / mask.sum(),
    }
    returns = episodes.returns
    if returns is not None:
        stats["ppo/returns/mean"] = masked_mean(returns, mask)
        explained = explained_variance(episodes.values, returns, mask)
        stats["ppo/val/explained_variance"] = explained
    return stats
