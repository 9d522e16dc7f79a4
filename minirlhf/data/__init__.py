"""What people said: forms of files, items and comparisons, splits, rows of token ids."""

from minirlhf.data.archive import read_reviews
from minirlhf.data.items import Feedback, Items, human_ceiling, outvotes, split
from minirlhf.data.logps import all_logps, prefix_kl, stored_logps, total
from minirlhf.data.records import parse_record, read_lines
from minirlhf.data.rows import encode, fit, prompts_of
from minirlhf.data.sources import load_feedback, toy_reward

__all__ = [
    "Feedback", "Items", "all_logps", "encode", "fit", "human_ceiling", "load_feedback",
    "outvotes", "parse_record", "prefix_kl", "prompts_of", "read_lines", "read_reviews", "split",
    "stored_logps", "total", "toy_reward",
]  # fmt: skip
