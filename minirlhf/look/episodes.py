"""What metrics.jsonl says of PPO's rollouts."""

import torch

from minirlhf.ppo import explained_variance, masked_mean


def mean_of(history):
    """The mean of each statistic of {name: number} in a list."""
    columns = {name: [torch.as_tensor(stats[name]) for stats in history] for name in history[0]}
    return {name: torch.stack(column).mean() for name, column in columns.items()}


def rollout_stats(episodes, mask, earned, entropy, sampled_logprobs, kl_coef):
    """Metrics of train_ppo's Episodes; earned: scores, rewards (B, R), which ended (B,)."""
    scores, rewards, ended = earned
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
    }
    values, returns = episodes.values, episodes.returns
    if values is not None:
        stats["ppo/returns/mean"] = masked_mean(returns, mask)
        stats["ppo/val/explained_variance"] = explained_variance(values, returns, mask)
    return stats
