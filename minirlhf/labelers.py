"""Who prefers: a reward model, a preference model, or the toy's own true reward, asked about responses to one prompt.

Left out, so far: people, judge models, rules.
"""

import json

import torch

from minirlhf import sft
from minirlhf.gpt import PreferenceModel, local_directory
from minirlhf.runtime import UserError


def load_labeler(source, feedback, tokenizer, base):
    """(scorer, prefer) of a reward model, of a preference model (no scorer), or of `true`, the toy's own reward; None: neither.

    scorer(tokens (B, T), prompt_lengths, response_lengths) -> (B,). prefer(the same, K), where K rows in turn stand to one prompt
    -> (B/K, K, K): P(i preferred to j), with scores by Bradley and Terry.
    """
    if source is None:
        return None, None
    if source == "true":
        if feedback.true_reward is None:
            raise UserError(f"--reward true: {feedback.name} has no known true reward (toy has)")

        def scorer(tokens, prompt_lengths, response_lengths):
            rows = zip(tokens.tolist(), prompt_lengths.tolist(), response_lengths.tolist(), strict=True)
            texts = [(tokenizer.decode(row[:p]), tokenizer.decode(row[p : p + r])) for row, p, r in rows]
            return torch.tensor(feedback.true_reward(*zip(*texts, strict=True)), device=tokens.device)

    else:
        config = local_directory(sft.model_directory(source)) / "config.json"
        if config.is_file() and json.loads(config.read_text()).get("num_labels", 1) > 1:
            model = PreferenceModel.from_pretrained(config.parent).to(base.wte.weight.device).eval()

            def prefer(tokens, prompt_lengths, response_lengths, K):
                e = model.embed(tokens, prompt_lengths + response_lengths).float()
                e = e.view(-1, K, e.shape[-1])
                return torch.sigmoid(model.logit(e[:, :, None], e[:, None]))

            return None, prefer
        rm = sft.load_reward_model(source, tokenizer, base)

        def scorer(tokens, prompt_lengths, response_lengths):
            return rm(tokens, prompt_lengths + response_lengths, prompt_lengths).float()

    def prefer(tokens, prompt_lengths, response_lengths, K):
        scores = scorer(tokens, prompt_lengths, response_lengths).view(-1, K)
        return torch.sigmoid(scores[:, :, None] - scores[:, None, :])

    return scorer, prefer
