"""Stage 2': DPO and its family: a policy straight from preferences, without a reward model and without sampling.   python train_dpo.py

    python train_dpo.py                                    # laptop, 2 cores: the reviews, 2 to 3 minutes
    python train_dpo.py --loss ipo --no-soft-labels        # any pairwise loss of minirlhf.dpo
    python train_dpo.py --data hub:Anthropic/hh-rlhf/harmless-base/train.jsonl.gz --init gpt2 --overlong truncate \\
        --dtype bfloat16 --lr 1e-5 --epochs 1 --out runs/hh/dpo                                      # GPU

With h = log pi(response) - log pi_ref(response), beta h is the reward for which the policy pi is the best there is at that price of KL
(Rafailov et al. 2023): so the policy is trained as its own reward model. The reference is the frozen base model; its log-probs are
computed once. Where every response has the ratings of several people, all pairs of a batch are compared, and under the sigmoid loss
with soft labels: the chance that a rater of the one gives more than a rater of the other. Leaves runs/dpo.

Left out: moving references, losses on more than pairs, gradient accumulation.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from minirlhf import data, dpo, runtime, sft
from minirlhf.checkpoint import finished
from minirlhf.gpt import GPT
from minirlhf.log import Run
from minirlhf.reward import pair_accuracy
from minirlhf.runtime import UserError, knob
from minirlhf.sampling import answers, response_logprobs


@dataclass
class Knobs:
    data: str = knob("reviews", "feedback: reviews, toy, a .jsonl[.gz] path, or hub:OWNER/NAME/FILE")
    init: str = knob("", "base model: a run, a model directory or a name on the hub (default: sft beside --out, made if missing)")
    reward: str = knob("", "reward model that scores samples before and after: a run or a directory (default: rm beside --out, if any)")
    out: str = knob("runs/dpo", "run directory")
    overlong: str = knob("", "rows longer than the context: error, or truncate (the default for the reviews)", sft.OVERLONG)
    loss: str = knob("sigmoid", "a kind of minirlhf.dpo.pair_loss: " + ", ".join(dpo.KINDS), (*dpo.KINDS, *dpo.ALIASES))
    beta: float = knob(0.1, "price of a nat of KL from the base model")
    label_smoothing: float = knob(0.0, "probability that a label is swapped, for losses that have it")
    soft_labels: bool = knob(True, "under the sigmoid loss: labels are shares of raters, where there are several")
    epochs: int = knob(3, "passes over the responses")
    batch_size: int = knob(64, "responses a step; every pair of them that people compared counts")
    lr: float = knob(5e-4, "peak learning rate: 5 % warm-up, then linear to 0")
    weight_decay: float = knob(0.0, "AdamW decay of matrices")
    max_grad_norm: float = knob(1.0, "gradient norm is clipped to this; 0: off")
    response_length: int = knob(24, "most tokens of a sample")
    eval_samples: int = knob(512, "held-out prompts answered before and after")
    seed: int = knob(0, "seed of order and samples")
    device: str = knob("auto", "auto, cpu, cuda, cuda:1, ...")
    dtype: str = knob("float32", "float32, or bfloat16 autocast", runtime.DTYPES)


def main(knobs):
    device = runtime.pick_device(knobs.device)
    autocast = runtime.precision(device, knobs.dtype)
    feedback = data.load_feedback(knobs.data)

    # Models: the base, made now if it is missing, twice
    source = sft.base_model(knobs)
    rng = runtime.seed_everything(knobs.seed)
    tokenizer = sft.load_tokenizer(source)
    policy, reference = GPT.from_pretrained(source).to(device), GPT.from_pretrained(source).to(device)
    optimizer = runtime.make_optimizer(policy, knobs.lr, weight_decay=knobs.weight_decay)

    # Data: rows, their reference log-probs, the plan of all batches, the fixed test pairs
    rows, test_rows = (Rows(items, tokenizer, knobs, policy.config.n_ctx) for items in (feedback.train, feedback.test))
    ref_logps, test_ref_logps = (all_logps(reference, r, tokenizer.pad, autocast, device) for r in (rows, test_rows))  # (N,)
    lengths = np.array([len(row) for row in rows.tokens])
    plan = [batch for _ in range(knobs.epochs) for batch in feedback.train.epoch(knobs.batch_size, rng)]
    test_pairs, _ = feedback.test.comparisons(20_000, seed=1)
    room = policy.config.n_ctx - knobs.response_length
    held_out = data.fit(data.prompts_of(feedback.test, tokenizer, np.random.default_rng(1)), room, knobs.overlong)[: knobs.eval_samples]
    scorer, reward_summary = find_scorer(knobs, tokenizer, reference)

    def sample():
        torch.manual_seed(knobs.seed)  # the same random numbers before and after
        return answers(policy, reference, scorer, held_out, tokenizer, knobs.response_length, 1.0, autocast)

    run = Run("dpo", knobs, len(plan), device)
    before = sample()

    # Loop
    for step, (batch, pairs, labels) in enumerate(plan):
        runtime.set_lr(optimizer, step, len(plan), knobs.lr)
        with autocast:
            logps = sum_logps(policy, rows, batch, tokenizer.pad, device)  # (b,)
        loss, stats = comparison_loss(knobs, logps, ref_logps[batch], lengths[batch] - rows.prompt_lengths[batch], pairs, labels)
        loss_number = runtime.finite(loss, f"dpo step {step}: loss")
        if step == 0:
            run.say(step_0_check(knobs, loss_number, stats))
        loss.backward()
        norm = runtime.optimizer_step(optimizer, knobs.max_grad_norm)
        run.log(step, {"loss": loss_number, "grad_norm": norm} | stats, show=("loss", "rewards/accuracies"))

    # Evaluation
    after = sample()
    run.close()
    implicit = all_logps(policy, test_rows, tokenizer.pad, autocast, device) - test_ref_logps
    accuracy = pair_accuracy(implicit, torch.as_tensor(test_pairs, device=device)).item()
    policy.save_pretrained(run.out / "model", tokenizer)
    earlier = (finished(Path(source).parent) or {}) | reward_summary
    print(f"\nthe policy's implicit reward orders {accuracy:.3f} of {len(test_pairs):,} test pairs as people do")
    return run.compare(before, after, earlier | {"eval/implicit_accuracy": accuracy})


class Rows:
    """Token rows of items, with prompt lengths (N,); responses of one row are compared only when the prompt is the same."""

    def __init__(self, items, tokenizer, knobs, n_ctx):
        if items.ratings is not None and any(items.prompts):
            raise UserError(f"{knobs.data}: no two rated responses share a prompt, so DPO has no pairs")
        texts = zip(items.prompts, items.responses, items.where, strict=True)
        self.tokens, self.prompt_lengths = data.encode(texts, tokenizer, n_ctx, sft.overlong_rule(knobs.overlong, knobs.data))


def sum_logps(model, rows, index, pad, device):
    """Log-prob of each response, summed over its tokens: (b,) fp32 of rows (b,)."""
    parts, undo = data.parts_by_length([len(rows.tokens[i]) for i in index])
    logps = []
    for part in parts:
        tokens, lengths = data.pad_rows([rows.tokens[index[i]] for i in part], pad, device)
        prompt_lengths = torch.as_tensor(rows.prompt_lengths[index[part]], device=device)
        response_lengths = lengths - prompt_lengths
        logps.append(response_logprobs(model, tokens, prompt_lengths, response_lengths, int(response_lengths.max())).sum(1))
    return torch.cat(logps)[undo]


@torch.no_grad()
def all_logps(model, rows, pad, autocast, device):
    """sum_logps of all rows: (N,)."""
    with autocast:
        index = np.arange(len(rows.tokens))
        return torch.cat([sum_logps(model, rows, i, pad, device) for i in np.split(index, range(128, len(index), 128))])


def comparison_loss(knobs, logps, ref_logps, lengths, pairs, labels):
    """The mean loss of a batch's comparisons, and their statistics.

    logps, ref_logps, lengths (b,); pairs (P, 2) index into them, labels (P,) = P(first preferred).
    """
    swap = labels < 0.5
    chosen, rejected = np.where(swap[:, None], pairs[:, ::-1], pairs).T
    label = np.where(swap, 1 - labels, labels)
    soft = knobs.soft_labels and dpo.ALIASES.get(knobs.loss, knobs.loss) == "sigmoid"
    if not soft:  # a tie says nothing then
        chosen, rejected, label = chosen[label > 0.5], rejected[label > 0.5], np.ones(int((label > 0.5).sum()))
    flipped = torch.as_tensor(1 - label, device=logps.device, dtype=torch.float32)
    smoothing = flipped + knobs.label_smoothing * (1 - 2 * flipped) if soft else knobs.label_smoothing
    lengths = torch.as_tensor(lengths, device=logps.device)
    try:
        losses = dpo.pair_loss(knobs.loss, logps[chosen], logps[rejected], ref_logps[chosen], ref_logps[rejected], beta=knobs.beta,
                               label_smoothing=smoothing, chosen_lengths=lengths[chosen], rejected_lengths=lengths[rejected])  # fmt: skip
    except ValueError as e:
        raise UserError(f"--loss {knobs.loss}: {e}") from None
    with torch.no_grad():
        rewards = knobs.beta * (logps - ref_logps)
        margins = rewards[chosen] - rewards[rejected]
        stats = {"rewards/chosen": rewards[chosen].mean(), "rewards/rejected": rewards[rejected].mean(),
                 "rewards/margins": margins.mean(), "rewards/accuracies": (margins > 0).float().mean(),
                 "logps/chosen": logps[chosen].mean(), "logps/rejected": logps[rejected].mean()}  # fmt: skip
    return losses.mean(), stats


def step_0_check(knobs, loss, stats):
    """Before any update, policy and reference are one: rewards are 0, and the sigmoid loss of any pair is log 2."""
    expected, margin = dpo.log_two(knobs.loss), stats["rewards/margins"].item()
    right = abs(margin) < 1e-4 and (expected is None or abs(loss - expected) < 1e-4)
    return (f"step-0 check: loss {loss:.6f}" + (f" (log 2 is {expected:.6f})" if expected else "") + f", reward margin {margin:.6f}: "
            + ("as they should be" if right else "NOT as they should be"))  # fmt: skip


def find_scorer(knobs, tokenizer, reference):
    """(scorer of sampled rows or None, summary of the reward model's training)."""
    beside = Path(knobs.out).parent / "rm"
    summary = finished(knobs.reward or beside) or {}
    if not knobs.reward and summary.get("data") != knobs.data:
        return None, {}
    rm = sft.load_reward_model(knobs.reward or beside, tokenizer, reference)
    return (lambda tokens, p, r: rm(tokens, p + r).float()), summary


if __name__ == "__main__":
    runtime.run_script(main, Knobs, __doc__)
