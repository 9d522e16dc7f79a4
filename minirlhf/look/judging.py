"""Who scores the replies, and how often one policy's are preferred to another's."""

import sys
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from minirlhf.engine.rows import pad_rows
from minirlhf.engine.weights import local_directory, model_directory
from minirlhf.feedback import labelers, preferring
from minirlhf.feedback.preference_model import PreferenceModel
from minirlhf.gpt import RewardModel
from minirlhf.look.policies import feedback_of, tokenizer_like
from minirlhf.look.replies import mean, standard_error
from minirlhf.rewards.fusion import fused
from minirlhf.tokenizer import Tokenizer


class Judge(NamedTuple):
    """A labeler: score(tokens (B, T), p, r) -> (B,), None of a preference model; prefer(the same,
    K), where K rows in turn answer one prompt -> (B/K, K, K), P(i preferred to j)."""

    name: str
    score: object
    prefer: object
    tokenizer: Tokenizer  # of the rows
    device: torch.device
    n_ctx: int
    report: object = None  # () -> what was asked so far, in a line


def load_judge(source, policy, fuse=0):
    """The Judge that --reward or --judge names, one of those of feedback/preferring.py; `fuse`: see
    there."""
    data = feedback_of(policy) if source == "true" else None
    device = policy.model.lm_head_weight.device
    function = None if preferring.speaks(source) else labelers.find_function(source, data)
    if preferring.speaks(source) or (function and preferring.takes_pairs(function)):
        preferrer = preferring.load_preferrer(source, data, device, fuse)
        both = preferring.of_rows(preferrer, policy.tokenizer)
        rows = policy.tokenizer, device, sys.maxsize
        return Judge(preferrer.name, *both, *rows, preferrer.report)
    preferring.expect_model(source, not function, fuse)
    if function:
        rate = partial(labelers.ask, function, source, "response", policy.tokenizer)
        score = partial(labelers.first_column, rate)
        prefer = partial(labelers.by_scores, score)
        return Judge(source, score, prefer, policy.tokenizer, device, sys.maxsize)
    directory = local_directory(model_directory(source))
    pairwise = labelers.is_pairwise(directory)
    preferring.expect_model(source, not pairwise, fuse)
    model = (PreferenceModel if pairwise else RewardModel).from_pretrained(directory)
    model = model.to(device).eval()
    tokenizer = tokenizer_like(directory, policy.directory, policy.tokenizer)
    known = tokenizer, device, model.config.n_ctx
    if pairwise:
        return Judge(source, None, partial(labelers.by_embeddings, model), *known)
    score = partial(labelers.by_model, fused(model, source, tokenizer, fuse))
    return Judge(source, score, partial(labelers.by_scores, score), *known)


def rows_for(judge, policy, found):
    """Replies as the judge reads them, rows of ids with their prompts' lengths: as they were
    sampled, or from their text where its tokenizer is another one."""
    rows = [(reply.prompt_ids, reply.ids) for reply in found]
    other = judge.tokenizer
    if other.ranks != policy.tokenizer.ranks:
        rows = []
        for reply in found:
            closing = [other.eos] if reply.ended else []
            prompt = [other.eos, *other.encode(reply.prompt)]
            rows.append((prompt, other.encode(reply.text) + closing))
    return [fitting(*row, judge.n_ctx) for row in rows]


def fitting(prompt, response, n_ctx):
    """Cut to a context: the prompt loses its left end, then the response its right one."""
    response = response[: n_ctx - 1]
    room = n_ctx - len(response) - 1  # after the EOS
    return prompt[:1] + prompt[max(1, len(prompt) - room) :], response


def batch_of(judge, rows):
    """(tokens (B, T), prompt lengths, response lengths) of rows (prompt, response)."""
    whole = [torch.tensor(prompt + response) for prompt, response in rows]
    tokens, lengths = pad_rows(whole, judge.tokenizer.pad, judge.device)
    p = torch.tensor([len(prompt) for prompt, _ in rows], device=judge.device)
    return tokens, p, lengths - p


@torch.no_grad()
def scored(judge, policy, found):
    """The replies with their scores; as they are, for a judge of pairs alone."""
    if not judge.score:
        return found
    scores = []
    rows = rows_for(judge, policy, found)
    for start in range(0, len(rows), 128):
        scores += judge.score(*batch_of(judge, rows[start : start + 128])).tolist()
    return [reply._replace(score=s) for reply, s in zip(found, scores, strict=True)]


@torch.no_grad()
def win_rate(judge, one, other, n):
    """(share of wins of the one (policy, replies) over the other, its standard error). The n
    replies to a prompt meet in turn; each pair is judged in both orders, a tie is half a win, and
    the replies to one prompt count as one observation."""
    first, second = (rows_for(judge, *side) for side in (one, other))
    wins = []
    for start in range(0, len(first), 64):
        part = slice(start, start + 64)
        forth = verdicts(judge, first[part], second[part])
        back = 1 - verdicts(judge, second[part], first[part])
        wins += ((forth + back) / 2).tolist()
    by_prompt = np.array(wins).reshape(-1, n).mean(1)
    return mean(by_prompt), standard_error(by_prompt)


def verdicts(judge, first, second):
    """1 where the first row of a pair is preferred, 0 where the second one is, 1/2 for a tie."""
    rows = [row for pair in zip(first, second, strict=True) for row in pair]
    preferred = judge.prefer(*batch_of(judge, rows), 2)[:, 0, 1]
    return (0.5 + 0.5 * (preferred - 0.5).sign()).cpu().numpy()
