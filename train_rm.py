"""Stage 1: a reward model from human preferences.   python train_rm.py

    python train_rm.py                                       # laptop, 2 cores: the reviews, 1 to 3 minutes, accuracy 0.76
    python train_rm.py --data hub:Anthropic/hh-rlhf/harmless-base/train.jsonl.gz --init gpt2 --overlong truncate \\
        --dtype bfloat16 --lr 1e-4 --epochs 1 --out runs/hh/rm                                    # GPU

A GPT with a scalar head reads `[EOS] prompt response EOS` and gives its last token a score, trained so that the difference of two
scores predicts which one people prefer (Bradley and Terry 1952). Where every response has the ratings of several people, all pairs of
a batch are compared, each with a soft label: the chance that a rater of the one gives more than a rater of the other. The base model's
weights are the start; dropout and deleted input tokens keep ten thousand snippets from being learned by heart. At the end the score is
normalised to mean 0 and standard deviation 1 on samples of the base model, and that is saved with it. Leaves runs/rm.

Left out: K-wise ranking losses (minirlhf.reward has Plackett-Luce), ensembles, gradient accumulation.
"""

import math
import re
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch

from minirlhf import data, runtime, sft
from minirlhf.gpt import GPT, RewardModel
from minirlhf.log import Run
from minirlhf.reward import bradley_terry_loss, normalization, pair_accuracy
from minirlhf.runtime import knob
from minirlhf.sampling import generate


@dataclass
class Knobs:
    data: str = knob("reviews", "feedback: reviews, toy, a .jsonl[.gz] path, or hub:OWNER/NAME/FILE")
    init: str = knob("", "base model: a run, a model directory or a name on the hub (default: sft beside --out, made if missing)")
    out: str = knob("runs/rm", "run directory")
    overlong: str = knob("", "rows longer than the context: error, or truncate (the default for the reviews)", sft.OVERLONG)
    epochs: int = knob(5, "passes over the responses")
    batch_size: int = knob(64, "responses a step; every pair of them that people compared counts")
    lr: float = knob(1e-3, "peak learning rate: 5 % warm-up, then linear to 0")
    embedding_lr: float = knob(3.0, "learning rate of the token embeddings, as a multiple of --lr")
    weight_decay: float = knob(0.01, "AdamW decay of matrices")
    dropout: float = knob(0.2, "dropout while training")
    delete: float = knob(0.35, "share of input tokens deleted at random while training")
    margin: float = knob(0.0, "how far the preferred score should lead, subtracted from the difference")
    center: float = knob(0.0, "weight of (sum of the two scores)^2")
    max_grad_norm: float = knob(1.0, "gradient norm is clipped to this; 0: off")
    normalize: bool = knob(True, "scores of base samples get mean 0 and standard deviation 1")
    response_length: int = knob(24, "most tokens of a base sample for the normalisation")
    seed: int = knob(0, "seed of head, order, dropout and samples")
    device: str = knob("auto", "auto, cpu, cuda, cuda:1, ...")
    dtype: str = knob("float32", "float32, or bfloat16 autocast", runtime.DTYPES)


def main(knobs):
    device = runtime.pick_device(knobs.device)
    autocast = runtime.precision(device, knobs.dtype)
    feedback = data.load_feedback(knobs.data)

    # Models: the base, made now if it is missing, and a fresh scalar head on a copy of its trunk
    source = sft.base_model(knobs)
    rng = runtime.seed_everything(knobs.seed)
    base, tokenizer = GPT.from_pretrained(source).to(device), sft.load_tokenizer(source)
    rm = RewardModel.from_base(base, dropout=knobs.dropout).to(device)
    optimizer = runtime.make_optimizer(rm, knobs.lr, weight_decay=knobs.weight_decay, embedding_lr=knobs.embedding_lr)

    # Data: rows, and the fixed test pairs
    overlong = sft.overlong_rule(knobs.overlong, knobs.data)
    rows = encode(feedback.train, tokenizer, rm.config.n_ctx, overlong)
    test_rows = encode(feedback.test, tokenizer, rm.config.n_ctx, overlong)
    test_pairs, gaps = feedback.test.comparisons(20_000, seed=1)
    plan = [batch for _ in range(knobs.epochs) for batch in feedback.train.epoch(knobs.batch_size, rng)]
    run = Run("rm", knobs, len(plan), device)
    fresh = pair_accuracy(score(rm, test_rows, tokenizer, autocast, device), torch.as_tensor(test_pairs))
    run.say(f"step-0 check: a fresh head orders {fresh:.3f} of the test pairs (chance is 0.5)")

    # Loop
    for step, (batch, pairs, labels) in enumerate(plan):
        runtime.set_lr(optimizer, step, len(plan), knobs.lr)
        thinned = [thin(rows[i], knobs.delete, rng) for i in batch]
        with autocast:
            scores = forward(rm, thinned, tokenizer.pad, device)  # (B,)
        first, second = scores[torch.as_tensor(pairs, device=device)].unbind(1)  # (P,) each
        label = torch.as_tensor(labels, device=device, dtype=torch.float32)
        loss = bradley_terry_loss(first, second, label=label, margin=knobs.margin, center=knobs.center)
        loss_number = runtime.finite(loss, f"rm step {step}: loss")
        loss.backward()
        norm = runtime.optimizer_step(optimizer, knobs.max_grad_norm)
        agree = ((first > second) == (label > 0.5)).float().mean()
        run.log(step, {"loss": loss_number, "rewards/accuracies": agree, "grad_norm": norm}, show=("loss", "rewards/accuracies"))

    # Normalisation on samples of the base model, then evaluation
    if knobs.normalize:
        prompts = data.prompts_of(feedback.train, tokenizer, np.random.default_rng(knobs.seed))[:512]
        samples = sample_scores(base, rm, prompts, knobs.response_length, tokenizer, autocast)
        mean, std = normalization(samples)
        rm.normalize(mean, std)
        run.say(f"raw scores of base samples: mean {mean:.2f}, standard deviation {std:.2f}; now 0 and 1")
    scores = score(rm, test_rows, tokenizer, autocast, device)
    run.close()
    figures = evaluate(feedback, scores, test_pairs, gaps)
    rm.save_pretrained(run.out / "model", tokenizer)
    samples = [{"prompt": feedback.test.prompts[i], "response": feedback.test.responses[i], "score": scores[i].item()}
               for i in range(min(64, len(test_rows)))]  # fmt: skip
    run.samples(samples)
    summary = run.finish(figures | {"data": knobs.data})
    print(f"reward model: {summary['seconds']:.0f} s; left in {run.out}")
    return summary


def encode(items, tokenizer, n_ctx, overlong):
    return data.encode(zip(items.prompts, items.responses, items.where, strict=True), tokenizer, n_ctx, overlong)[0]


def thin(row, delete, rng):
    """A row of token ids without a random share of them; the EOS at both ends stay."""
    keep = rng.random(len(row)) >= delete
    keep[[0, -1]] = True
    return row[keep]


def forward(rm, rows, pad, device):
    """Scores (B,) of rows of token ids."""
    parts, undo = data.parts_by_length([len(row) for row in rows])
    return torch.cat([rm(*data.pad_rows([rows[i] for i in part], pad, device)).float() for part in parts])[undo]


@torch.no_grad()
def score(rm, rows, tokenizer, autocast, device, batch_size=128):
    """Scores (N,) of rows of token ids, on the CPU."""
    rm.eval()
    scores = []
    for start in range(0, len(rows), batch_size):
        with autocast:
            scores.append(forward(rm, rows[start : start + batch_size], tokenizer.pad, device).cpu())
    rm.train()
    return torch.cat(scores)


def sample_scores(base, rm, prompts, response_length, tokenizer, autocast):
    """Scores of one response of the base model to each prompt."""
    prompts = data.fit(prompts, base.config.n_ctx - response_length, "truncate")
    device = base.wte.weight.device
    tokens, lengths = data.pad_rows(prompts, tokenizer.pad, device)
    with autocast:
        rollout = generate(base, tokens, lengths, response_length, eos=tokenizer.eos, pad=tokenizer.pad)
    whole = rollout.prompt_lengths + rollout.response_lengths
    rows = [row[:n] for row, n in zip(rollout.tokens.cpu(), whole.cpu(), strict=True)]
    return score(rm, rows, tokenizer, autocast, device)


def ridge_scores(train, test, strength=10.0, iterations=60):
    """What a bag of words makes of the same ratings: ridge regression of the mean rating on words and word pairs, by conjugate
    gradients. Returns scores (N,) of the test items."""

    def words(text):
        w = re.findall(r"[a-z0-9']+|[^\sa-z0-9]", text.lower())
        return {*w, *zip(w, w[1:], strict=False)}

    train_words, test_words = ([words(text) for text in items.responses] for items in (train, test))
    known = [w for w, n in Counter(w for text in train_words for w in text).items() if n > 1]
    index = {w: i for i, w in enumerate(known)}

    def sparse(texts):
        pairs = [(row, index[w]) for row, text in enumerate(texts) for w in text if w in index]
        return np.array(pairs, dtype=int).reshape(-1, 2).T

    row, column = sparse(train_words)
    y = np.array([r.mean() for r in train.ratings])

    def normal(w):  # (X'X + strength I) w
        return np.bincount(column, np.bincount(row, w[column], len(y))[row], len(index)) + strength * w

    weights = np.zeros(len(index))
    residual = np.bincount(column, (y - y.mean())[row], len(index))
    direction = residual.copy()
    for _ in range(iterations):
        image, size = normal(direction), residual @ residual
        if size < 1e-12:
            break
        step = size / (direction @ image)
        weights, residual = weights + step * direction, residual - step * image
        direction = residual + (residual @ residual) / size * direction
    row, column = sparse(test_words)
    return torch.from_numpy(np.bincount(row, weights[column], len(test)))


def evaluate(feedback, scores, pairs, gaps):
    """Figures of the summary, and a table of pair accuracy by the gap between the two mean ratings."""
    rated = feedback.train.ratings is not None
    columns = {"reward model": scores} | ({"ridge": ridge_scores(feedback.train, feedback.test)} if rated else {})
    human = data.human_ceiling(feedback.test, pairs)
    figures = {"eval/accuracy": pair_accuracy(scores, torch.as_tensor(pairs)).item(), "eval/pairs": len(pairs)}
    if rated:
        figures["eval/ridge_accuracy"] = pair_accuracy(columns["ridge"], torch.as_tensor(pairs)).item()
    if not math.isnan(human):
        figures["eval/human_ceiling"] = human
    edges = [0, 0.5, 1, 2, 3, math.inf] if rated else [0, math.inf]
    print(f"\npair accuracy on {len(pairs):,} test pairs\n{'rating gap':>12} {'pairs':>7}", *(f"{c:>13}" for c in columns),
          f"{'one person':>11}" if human == human else "")  # fmt: skip
    for low, high in [*zip(edges, edges[1:], strict=False), (0, math.inf)][: len(edges) if rated else 1]:
        part = pairs[(gaps > low) & (gaps <= high)]
        if len(part):
            name = "all" if (low, high) == (0, math.inf) else f"{low:g} to {high:g}" if high < math.inf else f"over {low:g}"
            cells = [pair_accuracy(c, torch.as_tensor(part)).item() for c in columns.values()]
            ceiling = data.human_ceiling(feedback.test, part)
            print(f"{name:>12} {len(part):>7}", *(f"{c:>13.3f}" for c in cells), f"{ceiling:>11.3f}" if ceiling == ceiling else "")
    print()
    return figures


if __name__ == "__main__":
    runtime.run_script(main, Knobs, __doc__)
