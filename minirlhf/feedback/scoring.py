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


def refuse_idle(knobs):
    """Refuses train_ppo's switches of scoring that make no sense together, and those that have no
    say beside others; says what top-k means."""
    last = knobs.response_length if knobs.truncate else 1
    cli.refuse({
        "--truncate needs --missing-eos-score (-1 is usual)":
            knobs.truncate and math.isnan(knobs.missing_eos_score),
        "--truncate-after: needs --truncate; 0 to R-1": knobs.truncate_after >= last,
    })  # fmt: skip
    groups = knobs.advantage != "gae"
    one_step = knobs.ppo_epochs * knobs.minibatches == 1
    cli.refuse_idle(knobs, {
        f"with --advantage {knobs.advantage}, which has no critic":
            groups and "gamma lam whiten_advantages critic value_clip vf_coef",
        "with --advantage gae, which takes one answer to a prompt": not groups and "group_size",
        "without --kl-target": not knobs.kl_target and "kl_horizon",
        "at --kl-coef 0": knobs.kl_coef == 0 and "kl_target kl_kind kl_in",
        "at one optimizer step an iteration, whose ratios are 1": one_step and "clip value_clip",
    })  # fmt: skip
    if knobs.top_k:
        print(f"note: --top-k {knobs.top_k} samples from another distribution than the one that is "
              "scored: objective/kl can be negative")  # fmt: skip


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


def make_scorer(knobs, source, function, tokenizer, reference, feedback=None):
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
            room = reference.config.n_ctx - R
            columns = labelers.asked_columns(function, source, feedback, tokenizer, room)
        rate = partial(labelers.ask, function, source, level, tokenizer, columns=columns)
    else:
        rm = labelers.load_reward_model(source, tokenizer, reference)
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
