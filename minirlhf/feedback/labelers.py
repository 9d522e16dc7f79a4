"""Who prefers: a reward model, a preference model, a Python function, or the toy's own true reward.

Left out, so far: people, judge models, rules.
"""

import importlib
import runpy
import sys
from functools import partial

import torch

from minirlhf.engine.cli import UserError
from minirlhf.engine.weights import (
    local_directory,
    model_directory,
    read_config,
)
from minirlhf.feedback.preference_model import PreferenceModel
from minirlhf.gpt import RewardModel


def load_labeler(source, feedback, tokenizer, base):
    """(scorer, prefer) of a reward model, of a preference model (no scorer), or of `true`, the toy's own reward; None: neither.

    scorer(tokens (B, T), prompt_lengths, response_lengths) -> (B,). prefer(the same, K), where K rows in turn stand to one prompt
    -> (B/K, K, K): P(i preferred to j), with scores by Bradley and Terry.
    """
    if source is None:
        return None, None
    if source == "true":
        rate = partial(ask, true_reward(feedback), source, "response", tokenizer)

        def scorer(tokens, prompt_lengths, response_lengths):
            return rate(tokens, prompt_lengths, response_lengths)[:, 0]

    else:
        config = local_directory(model_directory(source)) / "config.json"
        if config.is_file() and read_config(config.parent).get("num_labels", 1) > 1:
            model = PreferenceModel.from_pretrained(config.parent).to(base.wte.weight.device).eval()

            def prefer(tokens, prompt_lengths, response_lengths, K):
                e = model.embed(tokens, prompt_lengths + response_lengths).float()
                e = e.view(-1, K, e.shape[-1])
                return torch.sigmoid(model.logit(e[:, :, None], e[:, None]))

            return None, prefer
        rm = load_reward_model(source, tokenizer, base)

        def scorer(tokens, prompt_lengths, response_lengths):
            return rm(tokens, prompt_lengths + response_lengths, prompt_lengths).float()

    def prefer(tokens, prompt_lengths, response_lengths, K):
        scores = scorer(tokens, prompt_lengths, response_lengths).view(-1, K)
        return torch.sigmoid(scores[:, :, None] - scores[:, None, :])

    return scorer, prefer


def load_function(file, name):
    """A function of FILE.py, or of a module by its dotted name."""
    sys.path.insert(0, "")  # the current directory
    try:
        names = runpy.run_path(file) if file.endswith(".py") else vars(importlib.import_module(file))
    except ModuleNotFoundError as e:
        raise UserError(f"--reward {file}:{name}: {e}") from None
    if not callable(names.get(name)):
        raise UserError(f"--reward {file}:{name}: no function {name} in {file}")
    return names[name]


def true_reward(feedback):
    """The function behind `--reward true`. Raises UserError where the data have none."""
    if feedback.true_reward is None:
        raise UserError(f"--reward true: {feedback.name} has no known true reward (toy has)")
    return feedback.true_reward


def ask(function, source, level, tokenizer, tokens, prompt_lengths, response_lengths):
    """What a Python function says of the text of token rows: (B, 1), or (B, longest response) at the token level."""
    rows = zip(tokens.tolist(), prompt_lengths.tolist(), response_lengths.tolist(), strict=True)
    prompts, responses = zip(*((tokenizer.decode(row[:p]), row[p : p + r]) for row, p, r in rows), strict=True)
    apart = level == "token"
    texts = [[tokenizer.decode([i]) for i in ids] if apart else tokenizer.decode(ids) for ids in responses]
    expected, given = [len(ids) if apart else 1 for ids in responses], function(list(prompts), texts)
    try:
        scores = [torch.tensor(s if apart else [s], dtype=torch.float32) for s in given]
    except (TypeError, ValueError):
        scores = []
    if [s.shape for s in scores] != [(n,) for n in expected] or not all(s.isfinite().all() for s in scores):
        raise UserError(f"--reward {source}: expected a finite float for each {level}, {sum(expected)} in {len(responses)} responses")
    return torch.nn.utils.rnn.pad_sequence(scores, batch_first=True).to(tokens.device)


def load_reward_model(path, tokenizer, base):
    """The reward model of a run or a directory, on the base model's device. Raises UserError when the two do not fit together."""
    rm = RewardModel.from_pretrained(model_directory(path)).to(base.wte.weight.device).eval()
    if rm.config.vocab_size != tokenizer.vocab_size or rm.config.n_ctx < base.config.n_ctx:
        raise UserError(f"reward model {path}: vocabulary {rm.config.vocab_size} and context {rm.config.n_ctx}, but the base model "
                        f"has {tokenizer.vocab_size} and {base.config.n_ctx}: train it from this base model")  # fmt: skip
    return rm
