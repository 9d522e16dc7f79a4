"""Answers to one prompt that compete in PPO without a critic, as train_ppo's switches have it."""

from minirlhf import ppo


def rivals(knobs):
    """How many answers to a prompt compete: one where a critic judges each."""
    return 1 if knobs.advantage == "gae" else knobs.group_size


def learned_from(scores, knobs):
    """Of scores (B, R): where those of a response's group are all alike, (B,); and (B,) 1 where the
    policy learns from a response, 0 where --skip-flat leaves it out."""
    flat = ppo.flat_responses(scores.sum(1), rivals(knobs))
    left_out = flat & knobs.skip_flat
    return flat, (~left_out).float()
