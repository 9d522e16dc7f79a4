"""How good is a reward?   python -m minirlhf.reward_eval A B compares two of them.

The names of the room rewards/ that other people's code imports, each read from its file when it is
first asked for: to import torch takes seconds.
"""

from importlib import import_module

PLACES = {
    "pearson_distance": "distances",
    "epic_distance": "distances",
    "dard_distance": "distances",
    "starc_distance": "distances",
    "epic_like_distance": "distances",
    "epic_sample": "distances",
    "bandit_distance": "language",
    "worst_regret": "regret",
    "mean_regret": "regret",
    "prfi": "prfi",
    "contrast_instructions": "consistency",
    "convex_da": "augment",
    "reward_fusion": "fusion",
}
__all__ = list(PLACES)  # noqa: PLE0604


def __getattr__(name):
    if name in PLACES:
        return getattr(import_module(f"minirlhf.rewards.{PLACES[name]}"), name)
    raise AttributeError(f"module {__name__} has no {name}")


if __name__ == "__main__":
    from minirlhf.engine.cli import run_script
    from minirlhf.rewards.command import Knobs, __doc__, main, parse

    run_script(main, Knobs, __doc__, parse)
