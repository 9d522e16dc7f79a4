"""RewardFusion: a score averaged with those of the training texts that are most alike.

Shen et al. 2023 (arXiv 2309.16155), at inference: of the texts that a reward model was trained on,
at most K with a cosine of at least .9 to the prompt and response in question are retrieved; the
similarities are their weights, 1 is that of the text itself.

A text's embedding is the mean of the reward model's own last hidden states over its tokens, less
the mean of that over the training texts, without which all texts are alike (the states of a GPT
lie in a narrow cone). So one pass gives score and embedding, and no second model has to be found.

Left out: token-level rewards, of which no text has one, and an index of more texts than fit memory.
"""

from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from minirlhf import data
from minirlhf.engine.cli import UserError
from minirlhf.engine.files import finished, read_json
from minirlhf.engine.rows import Rows
from minirlhf.engine.weights import local_directory, model_directory
from minirlhf.look.policies import from_its_place
from minirlhf.rewards.embedding import mean_hidden

COSINE = 0.9  # below it a text is another one (the authors' threshold)


def reward_fusion(reward, query_embedding, embeddings, rewards, k, cosine=COSINE):
    """(B,) fused rewards of B texts; those of which nothing is retrieved stay as they are.

    reward (B,) and query_embedding (B, C) of the texts, embeddings (N, C) and rewards (N,) of those
    they are compared with. With s_i the k largest cosines, those of at least `cosine` alone:

        (reward + sum_i s_i rewards_i) / (1 + sum_i s_i)
    """
    with torch.autocast(embeddings.device.type, enabled=False):  # bf16 would move the threshold
        similar = F.normalize(query_embedding, dim=-1) @ F.normalize(embeddings, dim=-1).T  # (B, N)
    nearest, index = similar.topk(min(k, len(rewards)), dim=-1)  # (B, K)
    weights = torch.where(nearest >= cosine, nearest, 0)
    total = reward + (weights * rewards[index]).sum(-1)
    return total / (1 + weights.sum(-1))


class Memory(NamedTuple):
    """The N texts that a reward model was trained on."""

    centre: torch.Tensor  # (C,), the mean of their embeddings
    embeddings: torch.Tensor  # (N, C), less the centre
    rewards: torch.Tensor  # (N,)


def fused(rm, source, tokenizer, k):
    """What scores in the place of a RewardModel that lies in `source`, a run or its model: called
    like it, but for k = 0, which leaves the model as it is.

    Raises UserError for a model of token-level rewards, and where its training texts are not known
    any more.
    """
    if not k:
        return rm
    if rm.level == "token":
        raise UserError(f"--fuse: {source} scores tokens; expected one that scores responses")
    return partial(fused_scores, rm, remembered(rm, training_rows(rm, source, tokenizer)), k)


def fused_scores(rm, memory, k, tokens, lengths, prompt_lengths=None):
    """(B,) as RewardModel.forward, by reward_fusion with the memory."""
    scores, embeddings = read(rm, tokens, lengths)
    return reward_fusion(scores, embeddings - memory.centre, *memory[1:], k)


def read(rm, tokens, lengths):
    """(scores (B,), embeddings (B, C)) of rows of `lengths` tokens, in one pass."""
    hidden = rm.transformer.hidden(tokens, lengths)  # (B, T, C)
    ends = hidden[torch.arange(len(hidden), device=hidden.device), lengths - 1]
    scores = rm.score(ends).squeeze(-1) + rm.shift
    return scores.float(), mean_hidden(hidden.float(), lengths)


@torch.no_grad()
def remembered(rm, rows):
    """The Memory of training rows."""
    found = []
    for part in np.array_split(np.arange(len(rows.tokens)), -(-len(rows.tokens) // 128)):
        read_part = partial(read_whole, rm)
        found.append(rows.take(part).by_parts(read_part))
    both = torch.cat(found)
    centre = both[:, 1:].mean(0)
    return Memory(centre, both[:, 1:] - centre, both[:, 0])


def read_whole(rm, tokens, prompt_lengths, response_lengths):
    """`read` as one tensor (B, 1 + C)."""
    scores, embeddings = read(rm, tokens, prompt_lengths + response_lengths)
    return torch.cat([scores[:, None], embeddings], 1)


def training_rows(rm, source, tokenizer):
    """The Rows that the run which made a reward model was trained on, by its config.json."""
    run = Path(local_directory(model_directory(source))).parent
    try:
        knobs = read_json(run / "config.json")
    except UserError:
        knobs = None
    if not isinstance(knobs, dict) or not isinstance(knobs.get("data"), str):
        found = "no run of train_rm.py, whose config.json would say what it was trained on"
        raise UserError(f"--fuse: {source} is {found}")
    name = knobs["data"]
    name = str(from_its_place(name, run, knobs)) if "." in name else name
    feedback = data.load_feedback(name)
    if not feedback.trained(finished(run) or {}, knobs["data"]):
        raise UserError(f"--fuse: {name} is not what {source} was trained on any more")
    said = feedback.train.some(knobs.get("share", 1.0), knobs.get("seed", 0))
    encoded = data.encode_items(said, tokenizer, rm.config.n_ctx, "truncate")
    return Rows(*encoded[1:], tokenizer.pad, rm.score.weight.device)
