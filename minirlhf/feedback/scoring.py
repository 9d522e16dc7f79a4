"""What a response earns in PPO, and whether it ended: by a reward model or by a Python function."""

from functools import partial

import torch
import torch.nn.functional as F

from minirlhf import ppo
from minirlhf.engine.cli import UserError
from minirlhf.engine.rows import in_parts, response_mask, window
from minirlhf.feedback import labelers

LEVELS = ("", "response", "token")  # what a function rates; "": the default


def make_scorer(knobs, source, feedback, tokenizer, reference):
    """(scorer, its reward model or None).

    scorer(tokens (B, T), prompt_lengths, response_lengths) -> what each response token earns,
    (B, R), a whole response on its last one; and which responses ended, (B,): by EOS, or by
    --truncate's token, behind which the scorer sees nothing.
    """
    R, stop = knobs.response_length, tokenizer.encode(knobs.truncate) or [tokenizer.eos]
    if len(stop) > 1:
        found = f"{len(stop)} tokens of this tokenizer; expected a text of one"
        raise UserError(f"--truncate {knobs.truncate!r}: {found}")
    rm, level = None, knobs.reward_level or "response"
    function = labelers.find_function(source, feedback)
    if function:
        rate = partial(labelers.ask, function, source, level, tokenizer)
    else:
        rm = labelers.load_reward_model(source, tokenizer, reference)
        level = rm.level
        if knobs.reward_level not in ("", level):
            found = f"the reward model {source} scores by the {level}"
            raise UserError(f"--reward-level {knobs.reward_level}: {found}")

    def seen_part(tokens, p, r):
        """Where the scorer stops to read, and whether the response ended there."""
        hit = (window(tokens, p, R) == stop[0]) & response_mask(r, R)  # (B, R)
        hit[:, : knobs.truncate_after] = False
        ended = hit.any(1)
        return torch.where(ended, hit.int().argmax(1) + 1, r), ended

    def by_response(tokens, p, r):
        seen, ended = seen_part(tokens, p, r)
        if rm:
            scores = in_parts(rm, knobs.micro_batch, tokens, p + seen).float()
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
