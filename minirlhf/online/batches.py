"""Where a step's batch comes from: stored responses or own samples, and a reference that moves.

Left out: thumbs and lists of own samples.
"""

from functools import partial

from minirlhf.data import all_logps
from minirlhf.engine.cli import refuse
from minirlhf.feedback.kinds import Batch
from minirlhf.online.samples import own_batch


class Stored:
    """Batches of stored responses, of which the reference's log-probs (N,) are known, or None."""

    def __init__(self, rows, ref_logps):
        self.rows, self.ref_logps = rows, ref_logps
        self.texts = rows.tokens, rows.prompt_lengths  # what a resumed run must have again

    def at(self, step, said):
        ref_logps = None if self.ref_logps is None else self.ref_logps[said.index]
        return Batch(self.rows.take(said.index), ref_logps, said)

    def moved(self, reference):
        """The reference is another one from now on."""
        self.ref_logps = all_logps(reference, self.rows)


class Own:
    """Batches of what the policy of the moment answers to a step's prompts; see own_batch."""

    def __init__(self, prompts, policy, reference, prefer, tokenizer, kind, knobs):
        self.texts = prompts
        self.answered = partial(own_batch, policy, reference, prefer, tokenizer, kind, knobs)

    def at(self, step, chosen):
        return self.answered([self.texts[i] for i in chosen])

    def moved(self, reference):
        """Nothing: own samples ask the reference of the moment."""


class Rounds:
    """Batches of `supply` in equal parts of a run's steps.

    At the start of each but the first the reference becomes a copy of the policy. Raises UserError
    for more parts than steps.
    """

    def __init__(self, supply, policy, reference, rounds, steps):
        refuse({f"--rounds {rounds}: more than the {steps} steps": rounds > steps})
        self.supply, self.policy, self.reference = supply, policy, reference
        self.rounds, self.steps = rounds, steps
        self.known = False  # whether the supply has seen the reference: not so in a resumed run

    def at(self, step, planned):
        this_round = step * self.rounds // self.steps
        last_round = (step - 1) * self.rounds // self.steps
        if step > 0 and this_round > last_round:
            self.reference.load_state_dict(self.policy.state_dict())
            self.known = False
        if not self.known:
            self.supply.moved(self.reference)
            self.known = True
        return self.supply.at(step, planned)
