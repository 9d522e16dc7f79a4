"""Where a step's batch comes from: stored responses or own samples, and a reference that moves.

Left out: thumbs and lists of own samples.
"""

import copy
from functools import partial

import numpy as np
import torch

from minirlhf.data import all_logps, stored_logps
from minirlhf.engine import parallel
from minirlhf.engine.cli import refuse
from minirlhf.feedback.kinds import Batch
from minirlhf.online.asked import asked_batch, make_asked
from minirlhf.online.samples import own_batch
from minirlhf.tokenizer import load_base


def base_of(knobs, policy, tokenizer):
    """The model that log-ratios are to, on the policy's device: a copy of it, or --reference.
    Raises UserError where that has another tokenizer or less context."""
    if not knobs.reference:
        return copy.deepcopy(policy)
    base, own = load_base(knobs.reference, policy.wte.weight.device)
    refuse({
        f"--reference {knobs.reference}: its tokenizer is not that of the policy":
            own.fingerprint() != tokenizer.fingerprint(),
        f"--reference {knobs.reference}: a context of {base.config.n_ctx} tokens, the policy's has "
        f"{policy.config.n_ctx}": base.config.n_ctx < policy.config.n_ctx,
    })  # fmt: skip
    return base


def sizes_of(model):
    return [tuple(p.shape) for p in model.parameters()]


def stored(base, rows, autocast, knobs):
    """Stored responses with the base's log-probs, which are known from the start unless --delete
    hides other tokens each time; of settled knobs."""
    if knobs.delete:
        return Stored(rows, None, base, knobs.delete)
    return Stored(rows, stored_logps(base, rows, autocast, knobs.dtype))


class Stored:
    """Batches of stored responses, of which a share of the tokens may be deleted at random, of each
    another share, so that some are read whole: `delete` in the mean. The reference's log-probs (N,)
    are known, or it is asked batch by batch; or there is none."""

    def __init__(self, rows, ref_logps, reference=None, delete=0.0):
        self.rows, self.ref_logps = rows, ref_logps
        self.reference, self.delete = reference, delete
        self.texts = rows.tokens, rows.prompt_lengths  # what a resumed run must have again
        self.parts = {}  # what of it changes, and is saved

    def at(self, step, said):
        rows, ref_logps = self.rows.take(said.index), None
        if self.delete:
            shares = np.random.uniform(0, 2 * self.delete, len(rows.tokens))
            rows = rows.thinned(shares)
        if self.reference:
            ref_logps = all_logps(self.reference, rows)
        elif self.ref_logps is not None:
            ref_logps = self.ref_logps[said.index]
        return Batch(rows, ref_logps, said)

    def moved(self, reference):
        """The reference is another one from now on, which is asked batch by batch."""
        self.reference = reference


class Own:
    """Batches of what the policy of the moment answers to a step's prompts.

    See own_batch, and with --select asked_batch, for whose `steps` the base model has the features.
    """

    def __init__(self, prompts, steps, policy, base, reference, prefer, tokenizer, method, knobs):
        self.texts, self.parts = prompts, {}
        models, labeler = (policy, reference), (prefer, tokenizer)
        self.answered = partial(own_batch, *models, *labeler, method.kind, knobs)
        if knobs.select:
            asked = make_asked(base, steps, knobs)
            self.parts = {"asked": asked}
            self.answered = partial(asked_batch, asked, base, *models, *labeler, knobs)

    def at(self, step, chosen):
        return self.answered([self.texts[i] for i in chosen])

    def moved(self, reference):
        """Nothing: own samples ask the reference of the moment."""


class Moving:
    """Batches of `supply`, whose reference follows the policy.

    At the start of each of --rounds equal parts but the first it becomes a copy; or after every
    --ref-every steps it goes the share --ref-mix of the way to the policy, weight by weight
    (the soft update of TR-DPO, Gorbatovski et al. 2024). UserError for more parts than steps, and
    for two models of other sizes.
    """

    def __init__(self, supply, policy, reference, knobs, steps):
        rounds = knobs.rounds
        refuse({
            f"--rounds {rounds}: more than the {steps} steps": rounds > steps,
            f"--reference {knobs.reference}: --rounds and --ref-every mix the policy into it: "
            "expected a model of the same sizes": sizes_of(reference) != sizes_of(policy),
        })  # fmt: skip
        self.supply, self.policy, self.reference = supply, policy, reference
        self.parts = supply.parts | {"reference": reference}
        self.rounds, self.steps = rounds, steps
        self.every, self.mix = knobs.ref_every, knobs.ref_mix
        self.known = None  # whether the supply has seen the reference that has moved

    def moves(self, step):
        """Whether the reference moves before this step."""
        if self.every:
            return step > 0 and step % self.every == 0
        this_round = step * self.rounds // self.steps
        last_round = (step - 1) * self.rounds // self.steps
        return step > 0 and this_round > last_round

    @torch.no_grad()
    def at(self, step, planned):
        if self.known is None:  # a run that goes on may be past its first move
            self.known = not any(map(self.moves, range(step)))
        if self.moves(step):
            mix = self.mix if self.every else 1.0
            for model in (self.reference, self.policy):
                parallel.reshard(model)  # a part that is still whole has another kind of weights
            weights = zip(self.reference.parameters(), self.policy.parameters(), strict=True)
            for old, new in weights:
                old.lerp_(new, mix)
            self.known = False
        if not self.known:
            self.supply.moved(self.reference)
            self.known = True
        return self.supply.at(step, planned)
