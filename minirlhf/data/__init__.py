"""What people said: forms of files, conversations, items and comparisons, splits, rows."""

from importlib import import_module

from minirlhf.data.archive import read_reviews
from minirlhf.data.forms import entries
from minirlhf.data.items import Compared, Items, fill, human_ceiling, level, outvotes
from minirlhf.data.labels import Label, as_entry, parse_label, rankings
from minirlhf.data.records import parse_record
from minirlhf.data.sources import load_feedback, toy_reward
from minirlhf.data.split import Feedback, split, worth_writing

__all__ = [
    "Compared", "Feedback", "Items", "Label", "all_logps", "as_entry", "encode",
    "encode_items", "entries", "fill", "fit", "held_out_prompts", "human_ceiling",
    "level", "load_feedback", "outvotes", "parse_label", "parse_record", "prefix_kl",
    "prompts_of", "rankings", "read_reviews", "split", "stored_logps", "total", "toy_reward",
    "training_prompts", "worth_writing",
]  # fmt: skip

WITH_TORCH = {  # whose import takes seconds: these are imported when they are first asked for
    "logps": ("all_logps", "prefix_kl", "stored_logps", "total"),
    "rows": ("encode", "encode_items", "fit", "held_out_prompts", "prompts_of", "training_prompts"),
}


def __getattr__(name):
    for module, names in WITH_TORCH.items():
        if name in names:
            return getattr(import_module(f"minirlhf.data.{module}"), name)
    raise AttributeError(f"module {__name__} has no {name}")
