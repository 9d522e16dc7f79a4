"""Stage 2': DPO and its family: a policy straight from preferences.   python train_dpo.py

    python train_dpo.py                                  # laptop, 2 cores: reviews, 3 to 5 minutes
    python train_dpo.py --data toy --out runs/toy/dpo    # a toy language: under a minute
    python train_dpo.py --loss ipo                       # or any other loss: on pairs, on thumbs
                                                         # (kto, una), on lists (rrhf, pro, lipo)
    python train_dpo.py --online                         # on own samples, by the reward model
    python train_dpo.py --online --loss sppo --rounds 3  # against its own last round
    python train_dpo.py --online --labeler judge:http://127.0.0.1:8000/v1     # by an LLM's word
    python train_dpo.py --data hub:Anthropic/hh-rlhf/harmless-base/train.jsonl.gz --init gpt2 \\
        --overlong truncate --dtype bfloat16 --lr 1e-5 --epochs 1 --micro-batch 16 \\
        --out runs/hh/dpo                                # GPU
    torchrun --nproc-per-node 8 train_dpo.py --shard     # many GPUs; --resume after a stop

With h = log pi(response) - log pi_ref(response), beta h is the reward for which the policy pi is
the best there is at that price of KL (Rafailov et al. 2023): so the policy is trained as its own
reward model, without another one and without sampling. One step:

    1 batch        --batch-size responses, and how many people preferred which to which
    2 log-probs    of each whole response, under the policy and under the frozen reference
    3 loss         -log sigmoid(beta (h of the preferred - h of the other)), or another of dpo.py
    4 update       AdamW, its rate with 5 % warm-up, then linear to 0

The reference is the base model, whose log-probs are computed once and kept in the cache, or with
--rounds a copy of the policy that moves (sDPO, iterative DPO, SPPO). With --delete some tokens are
hidden from both, so that fewer texts are learned by heart, and the reference is asked each time.
Where every response has the ratings of several people, all pairs of a batch are compared, and under
sigmoid and r_dpo with soft labels: the chance that a rater of the one gives more than a rater of
the other. Leaves runs/dpo.

Losses without a reference load none: such a run reports no KL, and its implicit reward is the
log-prob itself. With --online each step takes batch-size/2 prompts and --samples responses of the
policy as it is then to each; a labeler says how often each response is preferred to the others, and
the best is set against the worst (Guo et al. 2024; with more samples and rounds, Rosset et al.
2024). With --select only the pairs are asked of which its method would learn most. Nash-MD sets
each response against one of a mixture with the reference, xpo against one of the reference; d2o,
online or not, the rejected responses against --samples answers of the policy's own, of which
nothing is asked. After an offline run, --init runs/dpo --reference runs/sft goes on.

With the commands in tests/test_axes.py every method makes the toy's true reward rise. By default
npo, d2o and apo_down push down what they see until the policy leaves the language (a higher beta or
alpha, or an nll_weight, prevents it), and discopop needs a higher temperature.

Left out: thumbs and lists online.
"""

if __name__ == "__main__":  # first, as torch takes a while
    import minirlhf.engine.interrupts  # noqa: F401
import copy
import math
from dataclasses import dataclass
from functools import partial

import torch

import train_rm
from minirlhf import data, dpo, sft
from minirlhf.data import total
from minirlhf.engine import cli, letters, machine, optim, parallel
from minirlhf.engine.cli import knob
from minirlhf.engine.files import figures_beside
from minirlhf.engine.log import Run
from minirlhf.engine.prepare import prepare
from minirlhf.engine.rows import Rows, endless
from minirlhf.feedback import kinds, labelers, preferring
from minirlhf.feedback.checks import check_dpo
from minirlhf.feedback.method import method_of, moves, step_0_check
from minirlhf.look.accuracy import implicit_accuracy, implicit_rewards
from minirlhf.look.answers import answers, compare
from minirlhf.online import batches
from minirlhf.online.losses import OTHER_LOSSES
from minirlhf.online.select import METHODS
from minirlhf.reward import share_positive
from minirlhf.tokenizer import load_base


@dataclass(kw_only=True)
class Knobs(cli.RunKnobs):
    data: str = knob("reviews", "reviews, toy, a file, a folder, hub:OWNER/NAME/FILE", free=True)
    init: str = knob("", "base model: run, directory, hub name (none: sft beside --out)", free=True)
    reference: str = knob(
        "", "base that log-ratios and KL are to, where --init is tuned (default: --init)", free=True
    )
    reward: str = knob(
        "", "reward or preference model that labels online samples and scores those before and "
        "after: a run, a directory, or true: the toy's own (default: rm beside --out, made if "
        "missing with --online)", free=True,
    )  # fmt: skip
    labeler: str = knob(
        "", "who compares online samples, where --reward only scores: judge:URL, people:FILE, "
        "RM,RM,..., FILE.py:FUNCTION, or what --reward takes (default: --reward)", free=True,
    )  # fmt: skip
    out: str = knob("runs/dpo", "run directory", free=True)
    overlong: str = knob("", "too long rows: error; truncate (default for reviews)", sft.OVERLONG)
    loss: str = knob(
        "sigmoid", "pairs: " + ", ".join(dpo.KINDS) + ", or a sum, as sigmoid+0.2*sft; thumbs: "
        "kto, una; ranked lists: rrhf, pro, lipo, rwr; online: rwr, nash_md, xpo",
    )  # fmt: skip
    loss_options: str = knob("", "of the loss, as gamma=1.2 or divergence=js,length_normalise=true")
    beta: float = knob(
        math.nan, "price of a nat of KL; nan: 0.125 of stored reviews, else 0.1", least=1e-6
    )
    label_smoothing: float = knob(
        0.0, "probability that a label is swapped, for losses that have it", most=1
    )
    soft_labels: bool = knob(
        True, "sigmoid, r_dpo, sppo: labels are shares of raters, where there are several"
    )
    group_size: int = knob(
        4, "rated responses to a ranked list; of a file, a record is a list", least=2
    )
    online: bool = knob(False, "compare the policy's own samples, not stored responses")
    samples: int = knob(
        2, "own samples to a prompt, online (nash_md, xpo: one) and for d2o", least=2
    )
    select: str = knob("", "which pairs of own samples are asked; default: all", ("", *METHODS))
    budget: int = knob(0, "--select: pairs a step, of all prompts; 0: one a prompt on average")
    mixture: float = knob(
        0.125, "nash_md: the reference's share of the opponent (Munos et al. 2023)", most=1
    )
    rounds: int = knob(
        1, "equal parts of the run; at each start the reference becomes the policy of then", least=1
    )
    ref_every: int = knob(0, "steps after which the reference follows (TR-DPO); 0: it stays")
    ref_mix: float = knob(0.6, "share of the policy in it then; 1: a copy", least=1e-6, most=1)
    epochs: int = knob(0, "passes over the responses, stored ones; 0: 10 of reviews, else 3")
    steps: int = knob(0, "optimizer steps at most; 0: all of --epochs, or online 100")
    batch_size: int = knob(64, "responses a step; every compared pair of them counts", least=1)
    micro_batch: int = knob(0, "responses in memory at a time; 0: the whole batch", free=True)
    lr: float = knob(math.nan, "peak learning rate; nan: 1.6e-4 of stored reviews, else 2.6e-4")
    weight_decay: float = knob(0.0, "AdamW decay of matrices")
    delete: float = knob(
        math.nan, "share of tokens that policy and reference both do not see, of each stored "
        "response another, 0 to twice this; nan: 0.3 of the reviews, else 0", most=0.5,
    )  # fmt: skip
    response_length: int = knob(24, "most tokens of a sample", least=1)
    eval_samples: int = knob(512, "held-out prompts answered before and after", least=1, free=True)


@cli.contained
def main(knobs):
    method, knobs = method_of(knobs), kinds.settled(knobs)
    device, autocast = parallel.start(knobs)
    feedback = data.load_feedback(knobs.data)
    check_dpo(feedback, method, knobs)

    # Models: the base, made now if it is missing, and its copies; what labels and scores samples
    source = sft.base_model(knobs, feedback)
    reward, reward_summary = labelers.reward_beside(knobs, feedback, train_rm)
    rng = machine.seed_everything(knobs.seed)
    policy, tokenizer = load_base(source)
    base, reference = copies(policy, tokenizer, method, knobs, device)
    scorer, prefer = preferring.load_both(knobs, reward, feedback, tokenizer, policy)
    trained = parallel.Together(policy)
    decay = knobs.weight_decay
    optimizer = optim.make_optimizer(trained, knobs.lr, betas=(0.9, 0.999), weight_decay=decay)
    letters.join(knobs, optimizer, policy, tokenizer)

    # Data: the plan of all batches, of stored responses or of prompts that the policy answers
    room = policy.config.n_ctx - knobs.response_length
    if knobs.online:
        prompts = data.training_prompts(feedback, tokenizer, room, knobs, rng)
        plan = endless(len(prompts), knobs.batch_size // 2, knobs.steps or 100, rng)
        models = policy, base, reference
        supply = batches.Own(prompts, len(plan), *models, prefer, tokenizer, method, knobs)
    else:
        train, rows = encode(feedback.train, tokenizer, knobs, policy)
        plan = kinds.plan(train, method.kind, knobs, rng)
        supply = batches.stored(base, rows, autocast, knobs)
    labels = knobs.online and preferring.content_of(knobs.labeler or reward)
    given = {"data": supply.texts, "base model": knobs.reference or source, "reward": labels}
    if moves(knobs):
        supply = batches.Moving(supply, policy, reference, knobs, len(plan))
    parts = {"policy": trained, "optimizer": optimizer} | supply.parts
    test, test_rows = encode(feedback.test, tokenizer, knobs, policy)
    held_out = data.held_out_prompts(feedback, tokenizer, room, knobs)
    ask = partial(sample, base, scorer, held_out, tokenizer, knobs, autocast)
    before = None if base else ask(policy)  # a base can be asked at the end
    run = Run("dpo", knobs, plan, device, tokenizer, parts, given)

    for step, planned in run.steps():
        optim.set_lr(optimizer, step, len(plan), knobs.lr)
        with autocast:
            batch = supply.at(step, planned)
        with autocast:  # anew: it would use again what it cast for sampling, without a gradient
            loss, stats = batch_loss(policy, reference, batch, method, knobs)
        if step == 0 and base and not knobs.reference:
            run.say(step_0_check(method, knobs, loss.item(), stats))
        trained.backward(loss)
        nonfinite = partial(run.nonfinite, step, batch.rows.tokens)
        loss, norm = optim.optimizer_step(optimizer, knobs.max_grad_norm, loss, nonfinite)
        stats |= {"loss": loss, "grad_norm": norm}
        if knobs.online:
            stats["online/labels"] = (step + 1) * batch.bought
        run.log(step, stats, show=("loss", "rewards/accuracies"))

    with run.kept(policy, **feedback.facts(knobs.data, tokenizer)):
        before, after = before or ask(base), ask(policy)
        more = implicit_accuracy(policy, base, test, test_rows, method, autocast, knobs)
        return compare(run, before, after, figures_beside(source) | reward_summary, more)


def copies(policy, tokenizer, method, knobs, device):
    """With the policy on its device, the base, if the loss has a reference: a copy, or --reference;
    and that reference, which is the base itself unless rounds move it."""
    policy.to(device)
    base = batches.base_of(knobs, policy, tokenizer) if method.has_reference else None
    reference = copy.deepcopy(base) if moves(knobs) else base
    prepare(knobs, policy, base, reference)
    return base, reference


def encode(items, tokenizer, knobs, policy):
    """The items that differ within the context, and their Rows."""
    overlong = sft.overlong_rule(knobs.overlong, knobs.data)
    items, *rows = data.encode_items(items, tokenizer, policy.config.n_ctx, overlong)
    return items, Rows(*rows, tokenizer.pad, policy.wte.weight.device)


def sample(base, scorer, prompts, tokenizer, knobs, autocast, model):
    """Answers to held-out prompts; without a base there is no KL from it."""
    found = answers(model, base or model, scorer, prompts, tokenizer, knobs.response_length, 1.0,
                    autocast, knobs.seed)  # fmt: skip
    return found if base else [answer._replace(kl=math.nan) for answer in found]


def batch_loss(policy, reference, batch, method, knobs):
    """Steps 2 and 3: the mean loss of a batch, and its statistics."""
    logps = batch.rows.by_parts(total(policy), knobs.micro_batch)  # (b,) of whole responses
    if method.kind in OTHER_LOSSES:
        other_losses = OTHER_LOSSES[method.kind]
        losses, chosen, rejected = other_losses(policy, reference, batch, logps, method, knobs)
        return losses.mean(), statistics(batch, logps, chosen, rejected, method, knobs)

    # Places of the preferred and of the other response of each pair, (P,); P(it is the other way)
    soft = knobs.soft_labels and method.soft
    chosen, rejected, doubt = batch.said.preferred_first(soft)
    sure = doubt < 0.5
    stats = statistics(batch, logps, chosen[sure], rejected[sure], method, knobs)
    if not len(chosen):  # nothing but ties
        return (0 * logps).mean(), stats
    if soft:
        doubt = torch.as_tensor(doubt, device=logps.device)
    ref_chosen = ref_rejected = None
    if method.has_reference:
        ref_chosen, ref_rejected = batch.ref_logps[chosen], batch.ref_logps[rejected]
    lengths = batch.rows.lengths()
    of_pairs = partial(
        dpo.pair_loss,
        policy_chosen_logps=logps[chosen],
        policy_rejected_logps=logps[rejected],
        ref_chosen_logps=ref_chosen,
        ref_rejected_logps=ref_rejected,
        beta=knobs.beta,
        chosen_lengths=lengths[chosen],
        rejected_lengths=lengths[rejected],
    )
    losses = method.losses(of_pairs, knobs.label_smoothing, doubt if soft else None)
    return losses.mean(), stats


@torch.no_grad()
def statistics(batch, logps, chosen, rejected, method, knobs):
    """Of all pairs in which one response is preferred."""
    lengths = batch.rows.lengths()
    rewards = knobs.beta * implicit_rewards(logps, batch.ref_logps, lengths, method)
    margins = rewards[chosen] - rewards[rejected]
    return {
        "rewards/chosen": rewards[chosen].mean(),
        "rewards/rejected": rewards[rejected].mean(),
        "rewards/margins": margins.mean(),
        "rewards/accuracies": share_positive(margins),
        "logps/chosen": logps[chosen].mean(),
        "logps/rejected": logps[rejected].mean(),
        "perf/tokens": sum(map(len, batch.rows.tokens)),
    }


if __name__ == "__main__":
    cli.run_script(main, Knobs, __doc__)
