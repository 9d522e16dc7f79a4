"""Stage 2': DPO and its family: a policy straight from preferences, without a reward model and without sampling.   python train_dpo.py

    python train_dpo.py                                    # laptop, 2 cores: the reviews, 2 to 3 minutes
    python train_dpo.py --loss ipo --no-soft-labels        # any loss of minirlhf.dpo: on pairs, on thumbs (kto, una), on lists (rrhf, ...)
    python train_dpo.py --online                           # on samples of its own, compared by the reward model
    python train_dpo.py --online --loss sppo --rounds 3    # against its own last round
    python train_dpo.py --data hub:Anthropic/hh-rlhf/harmless-base/train.jsonl.gz --init gpt2 --overlong truncate \\
        --dtype bfloat16 --lr 1e-5 --epochs 1 --micro-batch 16 --out runs/hh/dpo                      # GPU
    torchrun --nproc-per-node 8 train_dpo.py --shard       # many GPUs; a run that was stopped goes on with --resume

With h = log pi(response) - log pi_ref(response), beta h is the reward for which the policy pi is the best there is at that price of KL
(Rafailov et al. 2023): so the policy is trained as its own reward model. The reference is the frozen base model, whose log-probs are
computed once and kept in the cache, or with --rounds a copy of the policy that moves (sDPO, iterative DPO, SPPO). Where every response
has the ratings of several people, all pairs of a batch are compared, and under the sigmoid loss with soft labels: the chance that a
rater of the one gives more than a rater of the other. Leaves runs/dpo.

Losses without a reference load none: such a run reports no KL, and its implicit reward is the log-prob itself.
With --online each step takes batch-size/2 prompts and --samples responses of the policy as it is then to each; a labeler says how often
each response is preferred to the others, and the best is set against the worst (Guo et al. 2024; with more samples and rounds, Rosset
et al. 2024). Nash-MD sets each response against one of a mixture with the reference; d2o, online or not, the rejected responses against
--samples answers of the policy's own, of which nothing is asked.
Every method makes the toy's true reward rise; tests/test_axes.py has the commands. With the defaults four do not: npo, d2o and apo_down
push down most of what they see until the policy leaves the language, which a higher beta or alpha or an nll_weight prevents, and
discopop's loss falls to both sides of where it starts, but for a higher temperature.

Left out: thumbs and lists online, a reference that follows by a running mean.
"""

import copy
import itertools
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

import train_rm
from minirlhf import data, dpo, sft
from minirlhf.data import all_logps, prefix_kl, stored_logps, total
from minirlhf.engine import cli, machine, optim, parallel
from minirlhf.engine.cli import UserError, knob
from minirlhf.engine.files import finished
from minirlhf.engine.log import Run
from minirlhf.engine.rows import Rows, endless
from minirlhf.feedback import labelers
from minirlhf.feedback.kinds import lists_epoch, thumbs, thumbs_epoch
from minirlhf.gpt import GPT, compile_trunks
from minirlhf.lists import GAMES, LISTS, OPTIONS, THUMBS
from minirlhf.look.answers import answers, compare
from minirlhf.online import samples
from minirlhf.reward import pair_accuracy, share_positive
from minirlhf.tokenizer import load_tokenizer

LOSSES = dpo.KINDS | THUMBS | LISTS | GAMES
PER_TOKEN = ("simpo", "orpo", "rrhf", "pro", "sigmoid_norm")  # what these compare is per token


@dataclass(kw_only=True)
class Knobs(cli.RunKnobs):
    data: str = knob("reviews", "feedback: reviews, toy, a .jsonl[.gz] path, or hub:OWNER/NAME/FILE", free=True)
    init: str = knob("", "base model: a run, a model directory or a name on the hub (default: sft beside --out, made if missing)", free=True)
    reward: str = knob("", "reward or preference model that labels online samples and scores samples before and after: a run, a directory, "
                           "or true: the toy's own (default: rm beside --out, made if missing with --online)", free=True)  # fmt: skip
    out: str = knob("runs/dpo", "run directory", free=True)
    overlong: str = knob("", "rows longer than the context: error, or truncate (the default for the reviews)", sft.OVERLONG)
    loss: str = knob("sigmoid", "pairs: " + ", ".join(dpo.KINDS) + "; thumbs: kto, una; ranked lists: rrhf, pro, lipo; online: nash_md",
                     (*LOSSES, *dpo.ALIASES))  # fmt: skip
    loss_options: str = knob("", "options of the loss, as gamma=1.2 or divergence=js,length_normalise=true")
    beta: float = knob(0.1, "price of a nat of KL from the base model; orpo, slic, rrhf and pro have none", least=1e-6)
    label_smoothing: float = knob(0.0, "probability that a label is swapped, for losses that have it", most=1)
    soft_labels: bool = knob(True, "under the sigmoid and the sppo loss: labels are shares of raters, where there are several")
    group_size: int = knob(4, "rated responses to a ranked list; of a file, a record is a list", least=2)
    online: bool = knob(False, "compare the policy's own samples, not stored responses")
    samples: int = knob(2, "own samples to a prompt, online (nash_md takes one) and for d2o", least=2)
    mixture: float = knob(0.125, "nash_md: the reference's share of the opponent (Munos et al. 2023)", most=1)
    rounds: int = knob(1, "equal parts of the run; at the start of each the reference becomes a copy of the policy", least=1)
    epochs: int = knob(3, "passes over the responses, stored ones", least=1)
    steps: int = knob(0, "optimizer steps at most; 0: all of --epochs, or online 100")
    batch_size: int = knob(64, "responses a step; every pair of them that people compared counts", least=1)
    micro_batch: int = knob(0, "responses in memory at a time; 0: the whole batch", free=True)
    lr: float = knob(5e-4, "peak learning rate: 5 % warm-up, then linear to 0")
    weight_decay: float = knob(0.0, "AdamW decay of matrices")
    response_length: int = knob(24, "most tokens of a sample", least=1)
    eval_samples: int = knob(512, "held-out prompts answered before and after", least=1, free=True)


@cli.contained
def main(knobs):
    kind, options = loss_of(knobs)
    device = parallel.start(knobs.device)
    autocast = machine.precision(device, knobs.dtype)
    feedback = data.load_feedback(knobs.data)

    # Models: the base, made now if it is missing, twice where the loss has a reference; what labels and scores samples
    source = sft.base_model(knobs)
    labeler, reward_summary = find_labeler(knobs)
    rng, tokenizer = machine.seed_everything(knobs.seed), load_tokenizer(source)
    policy, base, reference = load_models(source, kind, knobs, device)
    scorer, prefer = load_labeler(knobs, labeler, feedback, tokenizer, policy)
    trained = parallel.Together(policy)
    optimizer = optim.make_optimizer(trained, knobs.lr, weight_decay=knobs.weight_decay)

    # Data: stored rows, their reference log-probs and the plan of all batches, or batches of own samples
    room = policy.config.n_ctx - knobs.response_length
    if knobs.online:
        rows = data.fit(data.prompts_of(feedback.train, tokenizer, rng), room, knobs.overlong)
        plan = endless(len(rows), knobs.batch_size // 2, knobs.steps or 100, rng)
        own = partial(samples.own_batch, policy, reference, prefer, tokenizer, kind, knobs)
    else:
        rows = encode(feedback.train, tokenizer, kind, knobs, policy)
        ref_logps = stored_logps(base, rows, autocast, knobs.dtype)  # (N,)
        plan = plan_of(feedback.train, kind, knobs, rng)
    test_rows = encode(feedback.test, tokenizer, kind, knobs, policy)
    held_out = data.fit(data.prompts_of(feedback.test, tokenizer, np.random.default_rng(1)), room, knobs.overlong)[: knobs.eval_samples]
    ask = partial(sample, base, scorer, held_out, tokenizer, knobs, autocast)
    before = None if base else ask(policy)  # a base can be asked at the end
    parts = {"policy": trained, "optimizer": optimizer, "reference": reference if knobs.rounds > 1 else None}
    given = {"data": rows if knobs.online else rows[:2], "base model": source, "reward": labeler}
    run = Run("dpo", knobs, plan, device, tokenizer, parts, given)

    # Loop
    for step, batch in run.steps():
        optim.set_lr(optimizer, step, len(plan), knobs.lr)
        with autocast:  # apart from the loss's: what autocast once cast without a gradient it would use again without one
            if begins := step and step * knobs.rounds // len(plan) > (step - 1) * knobs.rounds // len(plan):  # a round
                reference.load_state_dict(policy.state_dict())
            if knobs.rounds > 1 and not knobs.online and (begins or step == run.first):
                ref_logps = all_logps(reference, rows)
            if knobs.online:
                bought, *batch = own([rows[i] for i in batch])
            else:
                batch = rows.take(batch[0]), None if ref_logps is None else ref_logps[batch[0]], *batch[1:]
        with autocast:
            loss, stats = batch_loss(policy, reference, kind, options, knobs, *batch)
        if step == 0 and base:
            run.say(step_0_check(kind, options, knobs, loss.item(), stats))
        trained.backward(loss)
        loss, norm = optim.optimizer_step(optimizer, knobs.max_grad_norm, loss, partial(run.nonfinite, step, batch[0].tokens))
        stats |= {"loss": loss, "grad_norm": norm} | ({"online/labels": (step + 1) * bought} if knobs.online else {})
        run.log(step, stats, show=("loss", "rewards/accuracies"))

    # Evaluation
    before, after = before or ask(base), ask(policy)
    run.close()
    more = implicit_accuracy(policy, base, feedback.test, test_rows, kind, options, knobs, autocast)
    policy.save_pretrained(run.out / "model", tokenizer)
    return compare(run, before, after, (finished(Path(source).parent) or {}) | reward_summary, more)


def load_models(source, kind, knobs, device):
    """The policy; the base, if the loss has a reference; and that reference, the base itself unless rounds move it."""
    policy = GPT.from_pretrained(source).to(device)
    base = GPT.from_pretrained(source).to(device) if dpo.AXES[kind]["RL1"] == "reference" else None
    reference = copy.deepcopy(base) if knobs.rounds > 1 else base
    if knobs.compile:
        compile_trunks(policy, reference)
    if knobs.shard:
        parallel.shard(policy, base, reference)
    return policy, base, reference


def loss_of(knobs):
    """The kind of loss and its options, as keywords; what does not go together is an error."""
    kind, options = dpo.ALIASES.get(knobs.loss, knobs.loss), {}
    pairwise = kind in dpo.KINDS
    known = dpo.options_of(kind) if pairwise else OPTIONS.get(kind, ())
    for part in filter(None, knobs.loss_options.split(",")):
        name, _, value = part.partition("=")
        try:
            options[name] = value if name == "divergence" else value == "true" if value in ("true", "false") else float(value)
        except ValueError:
            raise UserError(f"--loss-options {part}: expected NAME=NUMBER, NAME=true or NAME=false") from None
        if name not in known:
            raise UserError(f"--loss-options {part}: loss {kind} has the options {', '.join(known) or 'none'}")
    free = dpo.AXES[kind]["RL1"] == "free"
    for wrong, message in (
        (kind == "nash_md" and not knobs.online, "--loss nash_md learns from the policy's own samples: add --online"),
        (kind in THUMBS | LISTS and knobs.online, f"--loss {kind} takes stored responses: leave out --online"),
        (free and knobs.rounds > 1, f"--rounds {knobs.rounds}: loss {kind} has no reference to move"),
        (knobs.label_smoothing and not pairwise, f"--label-smoothing {knobs.label_smoothing}: loss {kind} has none"),
        (kind == "d2o" and "nll_weight" in options, "--loss d2o has no preferred response to take nll_weight"),
        (knobs.online and knobs.batch_size < 2, f"--batch-size {knobs.batch_size}: expected at least 2 responses"),
    ):
        if wrong:
            raise UserError(message)
    return kind, options


def find_labeler(knobs):
    """(what scores samples, the summary of its training): --reward, or the reward model beside --out, which --online cannot do without."""
    beside = Path(knobs.out).parent / "rm"
    sft.keep_apart(knobs.reward or beside, knobs.out)
    if knobs.reward:
        return knobs.reward, finished(knobs.reward) or {}
    if knobs.online:
        own = train_rm.Knobs(init=knobs.init, out=str(beside), **sft.earlier(knobs))
        return sft.stage_before("reward model", train_rm.main, own)
    summary = finished(beside) or {}
    return (beside, summary) if summary.get("data") == knobs.data else (None, {})


def load_labeler(knobs, source, *args):
    """labelers.load_labeler; what merely lies beside --out, was not asked for and does not fit is left out."""
    try:
        return labelers.load_labeler(source, *args)
    except UserError as e:
        if knobs.reward or knobs.online:
            raise
        print(f"samples are not scored: {e}")
        return None, None


def encode(items, tokenizer, kind, knobs, policy):
    """The Rows of items. Responses are compared only when they answer the same prompt."""
    if items.ratings is not None and any(items.prompts) and not (knobs.online or kind in THUMBS):
        raise UserError(f"{knobs.data}: no two rated responses share a prompt, so DPO has no pairs; --loss kto needs none")
    texts = zip(items.prompts, items.responses, items.where, strict=True)
    encoded = data.encode(texts, tokenizer, policy.config.n_ctx, sft.overlong_rule(knobs.overlong, knobs.data))
    return Rows(*encoded, tokenizer.pad, policy.wte.weight.device)


def plan_of(items, kind, knobs, rng):
    """All batches of the run in the shape that the loss wants: indices of rows, and what people said of them."""
    if kind in THUMBS:
        scored = thumbs(items)
        epochs = (thumbs_epoch(*scored, knobs.batch_size, rng) for _ in range(knobs.epochs))
    elif kind in LISTS:
        epochs = (lists_epoch(items, knobs.batch_size, knobs.group_size, rng) for _ in range(knobs.epochs))
    else:
        epochs = (items.epoch(knobs.batch_size, rng) for _ in range(knobs.epochs))
    return list(itertools.islice((batch for epoch in epochs for batch in epoch), knobs.steps or None))


def sample(base, scorer, prompts, tokenizer, knobs, autocast, policy):
    """Answers to held-out prompts; without a base there is no KL from it."""
    sampled = answers(policy, base or policy, scorer, prompts, tokenizer, knobs.response_length, 1.0, autocast, knobs.seed)
    return sampled if base else [answer._replace(kl=math.nan) for answer in sampled]


def batch_loss(policy, reference, kind, options, knobs, rows, ref_logps, *labels):
    """The mean loss of a batch, and its statistics over all pairs in which one response is preferred.

    ref_logps (b,) or None; labels as `plan_of` and `own_batches` give them after the rows.
    """
    logps = rows.by_parts(total(policy), knobs.micro_batch)  # (b,)
    lengths, tensor = rows.lengths().float(), partial(torch.as_tensor, device=rows.device)
    if kind in dpo.KINDS:
        losses, chosen, rejected = pair_losses(policy, reference, kind, options, knobs, rows, logps, ref_logps, *labels)
    elif kind in LISTS:
        lists, rewards, mask = labels  # (L, K)
        i, j, k = np.nonzero((rewards[:, :, None] > rewards[:, None]) & mask[:, :, None] & mask[:, None])
        chosen, rejected = lists[i, j], lists[i, k]
        if kind == "lipo":
            losses = LISTS[kind](logps[lists], ref_logps[lists], tensor(rewards), tensor(mask), beta=knobs.beta)
        else:
            losses = LISTS[kind](logps[lists], lengths[lists], tensor(rewards), tensor(mask), **options)
    else:
        scores = labels[-1] if kind in THUMBS else labels[-1].cpu().numpy() > 0.5
        chosen, rejected = np.nonzero(np.greater.outer(scores > 0, scores > 0))
        given = [tensor(labels[-1])]
        if kind == "kto":
            other = rows.mismatched(policy.config.n_ctx)
            given = [tensor(scores > 0), all_logps(policy, other) - all_logps(reference, other)]
        losses = LOSSES[kind](logps, ref_logps, *given, beta=knobs.beta, **options)
    with torch.no_grad():
        rewards = knobs.beta * rewards_of(kind, options, logps, ref_logps, lengths)
        margins = rewards[chosen] - rewards[rejected]
        stats = {"rewards/chosen": rewards[chosen].mean(), "rewards/rejected": rewards[rejected].mean(),
                 "rewards/margins": margins.mean(), "rewards/accuracies": share_positive(margins),
                 "logps/chosen": logps[chosen].mean(), "logps/rejected": logps[rejected].mean()}  # fmt: skip
    return losses.mean(), stats


def pair_losses(policy, reference, kind, options, knobs, rows, logps, ref_logps, pairs, labels, wins=None):
    """The losses of a batch's comparisons, and the rows (P,) of the preferred and of the other responses.

    pairs (P, 2) index into the rows; labels (P,) = P(first preferred); wins (b,): win rates among own samples.
    """
    labels = np.asarray(labels, dtype=np.float32)  # in float64 a tie can be a hair above one half
    swap = labels < 0.5
    chosen, rejected = np.where(swap[:, None], pairs[:, ::-1], pairs).T
    label = np.where(swap, 1 - labels, labels)
    soft = knobs.soft_labels and kind in ("sigmoid", "sppo")
    if not soft:  # a tie says nothing then
        chosen, rejected, label = chosen[label > 0.5], rejected[label > 0.5], np.ones(int((label > 0.5).sum()))
    if not len(label):  # nothing but ties
        return 0 * logps, chosen, rejected
    flipped = torch.as_tensor(1 - label, device=logps.device, dtype=torch.float32)
    smoothing = flipped + knobs.label_smoothing * (1 - 2 * flipped) if soft and kind == "sigmoid" else knobs.label_smoothing
    if kind == "sppo":
        won = (wins[chosen], wins[rejected]) if soft and wins is not None else (1 - flipped, flipped)
        options = options | {"chosen_win": won[0], "rejected_win": won[1]}
    if kind in ("tdpo1", "tdpo2"):
        kl = rows.by_parts(partial(prefix_kl, policy, reference), knobs.micro_batch)
        options = options | {"chosen_kl": kl[chosen], "rejected_kl": kl[rejected]}
    lengths = rows.lengths()
    sides = [None if x is None else x[side] for x in (logps, ref_logps) for side in (chosen, rejected)]
    try:
        if kind == "d2o":  # in the place of the preferred: what the policy itself answers to the prompt of the rejected
            own = samples.own_answers(policy, rows, knobs.samples, knobs.response_length)
            for side, own_logps in ((0, own.by_parts(total(policy), knobs.micro_batch)), (2, all_logps(reference, own))):
                sides[side] = own_logps.view(-1, knobs.samples).mean(1)[rejected]
        losses = dpo.pair_loss(kind, *sides, beta=knobs.beta, label_smoothing=smoothing, chosen_lengths=lengths[chosen],
                               rejected_lengths=lengths[rejected], **options)  # fmt: skip
    except ValueError as e:
        raise UserError(f"--loss {knobs.loss}: {e}") from None
    return losses, chosen, rejected


def rewards_of(kind, options, logps, ref_logps, lengths):
    """The implicit rewards, as multiples of beta: log-ratios, or without a reference log-probs, of the response or a token."""
    rewards = logps if ref_logps is None else logps - ref_logps
    return rewards / lengths if kind in PER_TOKEN or options.get("length_normalise") else rewards


def step_0_check(kind, options, knobs, loss, stats):
    """Before any update, policy and reference are one: rewards are 0, and the sigmoid loss of any pair is log 2."""
    expected, margin = None if options else dpo.loss_at_start(kind, knobs.beta), stats["rewards/margins"].item()
    right = not abs(margin) >= 1e-4 and (expected is None or abs(loss - expected) < 1e-4 * max(1, expected))
    return (f"step-0 check: loss {loss:.6f}" + (f" (expected {expected:.6f})" if expected else "") + f", reward margin {margin:.6f}: "
            + ("as they should be" if right else "NOT as they should be"))  # fmt: skip


def implicit_accuracy(policy, base, items, rows, kind, options, knobs, autocast):
    """How often the policy's implicit reward orders test pairs as people do; nothing where no two responses can be compared."""
    if items.ratings is not None and (any(items.prompts) or len({rating.mean() for rating in items.ratings}) < 2):
        return {}
    pairs, _ = items.comparisons(20_000, seed=1)
    with autocast:
        logps = all_logps(policy, rows)
    rewards = rewards_of(kind, options, logps, stored_logps(base, rows, autocast, knobs.dtype), rows.lengths())
    accuracy = pair_accuracy(rewards, torch.as_tensor(pairs, device=rows.device)).item()
    print(f"\nthe policy's implicit reward orders {accuracy:.3f} of {len(pairs):,} test pairs as people do")
    return {"eval/implicit_accuracy": accuracy}


if __name__ == "__main__":
    cli.run_script(main, Knobs, __doc__)
