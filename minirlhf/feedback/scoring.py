"""What a response earns in PPO, and whether it ended: by a model, a function or a judge."""

import math
from functools import partial

import torch
import torch.nn.functional as F

from minirlhf import ppo
from minirlhf.engine import cli, machine
from minirlhf.engine.cli import UserError
from minirlhf.engine.rows import in_parts, response_mask, window
from minirlhf.engine.weights import local_directory, read_config, read_sizes
from minirlhf.feedback import labelers, preferring
from minirlhf.rewards.fusion import fused
from minirlhf.tokenizer import load_tokenizer

LEVELS = ("", "response", "token")  # what a function rates; "": the default


def find_function(knobs, feedback):
    """The function behind --reward; None: a model, which has a level of its own."""
    device = machine.pick_device(knobs.device)
    function = preferring.find_function(knobs.reward, feedback, device)
    if preferring.speaks(knobs.reward) and knobs.reward_level == "token":
        raise UserError(f"--reward-level token: {knobs.reward} scores whole responses")
    cli.refuse_idle(knobs, {
        "where a model scores": not function and "reward_level",
        "where no model scores": function and "fuse",
    })  # fmt: skip
    return function


def expect_fit(knobs, base):
    """Raises UserError where a base model's directory has no such token as --truncate's, or no room
    for a response: before a reward model is made from it."""
    stop_token(knobs, load_tokenizer(base))
    context = read_sizes(read_config(local_directory(base)), base)[1]
    if knobs.response_length >= context:
        raise UserError(
            f"--response-length {knobs.response_length}: expected less than the context of the "
            f"base model {base}, {context} tokens, as a prompt comes before it"
        )


def stop_token(knobs, tokenizer):
    """The token that ends a response for the scorer."""
    stop = tokenizer.encode(knobs.truncate) or [tokenizer.eos]
    if len(stop) > 1:
        found = f"{len(stop)} tokens of this tokenizer; expected a text of one"
        raise UserError(f"--truncate {knobs.truncate!r}: {found}")
    return stop[0]


def make_scorer(knobs, source, function, tokenizer, policy, feedback=None):
    """(scorer, its reward model or None), of a function, which may take columns of the feedback, or
    else the model that is the source.

    scorer(tokens (B, T), prompt_lengths, response_lengths) -> what each response token earns,
    (B, R), a whole response on its last one; and which responses ended, (B,): by EOS, or by
    --truncate's token, behind which the scorer sees nothing.
    """
    R, stop = knobs.response_length, stop_token(knobs, tokenizer)
    rm = read = None
    level = knobs.reward_level or "response"
    if function:
        columns = {}
        if feedback:
            room = policy.config.n_ctx - R
            columns = labelers.asked_columns(function, source, feedback, tokenizer, room)
        rate = partial(labelers.ask, function, source, level, tokenizer, columns=columns)
    else:
        rm = labelers.load_reward_model(source, tokenizer, policy)
        read, level = fused(rm, source, tokenizer, knobs.fuse), rm.level
        if knobs.reward_level not in ("", level):
            found = f"the reward model {source} scores by the {level}"
            raise UserError(f"--reward-level {knobs.reward_level}: {found}")

    def seen_part(tokens, p, r):
        """Where the scorer stops to read, and whether the response ended there."""
        hit = (window(tokens, p, R) == stop) & response_mask(r, R)  # (B, R)
        hit[:, : knobs.truncate_after] = False
        ended = hit.any(1)
        return torch.where(ended, hit.int().argmax(1) + 1, r), ended

    def by_response(tokens, p, r):
        seen, ended = seen_part(tokens, p, r)
        if rm:
            scores = in_parts(read, knobs.micro_batch, tokens, p + seen).float()
        else:
            scores = rate(tokens, p, seen)[:, 0]
        return ppo.on_last_token(scores, response_mask(r, R)), ended

    def by_token(tokens, p, r):
        seen, ended = seen_part(tokens, p, r)
        if rm:
            values = in_parts(rm.values, knobs.micro_batch, tokens, p + r).float()
            values = window(values, p, R)
        else:
            values = rate(tokens, p, seen)
        values = F.pad(values, (0, R - values.shape[1]))
        values = torch.where(response_mask(seen, R), values, 0)
        shift = torch.full_like(values[:, 0], rm.shift if rm else 0.0)  # of the whole response
        return values + ppo.on_last_token(shift, response_mask(r, R)), ended

    return by_response if level == "response" else by_token, rm


def charge_unended(scores, ended, mask, knobs):
    """Scores (B, R) by train_ppo's switches: what never ended has --missing-eos-score, if any, in
    place of its own, and loses --missing-eos-penalty, both on its last token."""
    if not math.isnan(knobs.missing_eos_score):
        missing = torch.full_like(scores[:, 0], knobs.missing_eos_score)
        missing = ppo.on_last_token(missing, mask)
        scores = torch.where(ended[:, None], scores, missing)
    unended = ppo.on_last_token((~ended).float(), mask)
    return scores - knobs.missing_eos_penalty * unended
