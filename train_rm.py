"""Stage 1: a reward model from human preferences.   python train_rm.py

    python train_rm.py                                       # laptop, 2 cores: the reviews, 1 to 2 minutes, accuracy 0.76
    python train_rm.py --loss plackett_luce --group-size 8   # rankings; also best_of_k and ratings
    python train_rm.py --model pairwise --out runs/pairwise  # P(a preferred to b) without a score
    python train_rm.py --data hub:Anthropic/hh-rlhf/harmless-base/train.jsonl.gz --init gpt2 --overlong truncate \\
        --dtype bfloat16 --lr 1e-4 --epochs 1 --out runs/hh/rm                                    # GPU
    torchrun --nproc-per-node 8 train_rm.py --shard          # many GPUs; a run that was stopped goes on with --resume

A GPT with a scalar head reads `[EOS] prompt response EOS` and gives its last token a score, trained so that the difference of two
scores predicts which one people prefer (Bradley and Terry 1952). Where every response has the ratings of several people, all pairs of
a batch are compared, each with a soft label: the chance that a rater of the one gives more than a rater of the other. The base model's
weights are the start; dropout and deleted input tokens keep ten thousand snippets from being learned by heart. At the end the score is
normalised to mean 0 and standard deviation 1 on samples of the base model, and that is saved with it. Leaves runs/rm.

With --level token every response token has a reward, and their sum is the score. With --model pairwise each response has an embedding
instead, and two of them say which is preferred: circles, which no score can hold, included. PPO needs a score, so it cannot use that one.

Left out: ensembles.
"""

import math
import re
from collections import Counter
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from minirlhf import data, sft
from minirlhf.engine import cli, machine, optim, parallel
from minirlhf.engine.cli import UserError, knob
from minirlhf.engine.log import Run
from minirlhf.engine.rows import Rows, pad_rows
from minirlhf.feedback.preference_model import PreferenceModel
from minirlhf.gpt import GPT, RewardModel, compile_trunks
from minirlhf.reward import (
    best_of_k_loss,
    bradley_terry_loss,
    normalization,
    plackett_luce_loss,
    rating_loss,
    share_positive,
)
from minirlhf.sampling import generate_all
from minirlhf.tokenizer import load_tokenizer

LOSSES = ("pairs", "plackett_luce", "best_of_k", "ratings")


@dataclass(kw_only=True)
class Knobs(cli.RunKnobs):
    data: str = knob("reviews", "feedback: reviews, toy, a .jsonl[.gz] path, or hub:OWNER/NAME/FILE", free=True)
    init: str = knob("", "base model: a run, a model directory or a name on the hub (default: sft beside --out, made if missing)", free=True)
    out: str = knob("runs/rm", "run directory", free=True)
    overlong: str = knob("", "rows longer than the context: error, or truncate (the default for the reviews)", sft.OVERLONG)
    model: str = knob("pointwise", "pointwise: a score for each response; pairwise: a preference between two", ("pointwise", "pairwise"))
    level: str = knob("response", "the score is that of the last token, or the sum of those of all response tokens", ("response", "token"))
    loss: str = knob("pairs", "all pairs; whole rankings; the best of K against the rest; squared error of the mean rating", LOSSES)
    group_size: int = knob(4, "rated responses in a ranking or a best of K; in a file the record says it", least=2)
    soft_labels: bool = knob(True, "labels of pairs are shares of raters, where there are several; off: the majority, without ties")
    epochs: int = knob(5, "passes over the responses", least=1)
    batch_size: int = knob(64, "responses a step; every pair of them that people compared counts", least=1)
    micro_batch: int = knob(0, "responses in memory at a time, at the price of a second forward pass; 0: all", free=True)
    lr: float = knob(1e-3, "peak learning rate: 5 % warm-up, then linear to 0")
    embedding_lr: float = knob(3.0, "learning rate of the token embeddings, as a multiple of --lr", least=1e-6)
    weight_decay: float = knob(0.01, "AdamW decay of matrices")
    dropout: float = knob(0.2, "dropout while training", most=0.99)
    delete: float = knob(0.35, "share of input tokens deleted at random while training", most=0.99)
    margin: float = knob(0.0, "how far the preferred score should lead, subtracted from the difference; added to a record's own margin")
    center: float = knob(0.0, "weight of (sum of the two scores)^2")
    normalize: bool = knob(True, "scores of base samples get mean 0 and standard deviation 1")
    response_length: int = knob(24, "most tokens of a base sample for the normalisation", least=1)


@cli.contained
def main(knobs):
    device = parallel.start(knobs.device)
    autocast = machine.precision(device, knobs.dtype)
    feedback = data.load_feedback(knobs.data)
    check(knobs, feedback.train)

    # Models: the base, made now if it is missing, and a fresh head on a copy of its trunk
    source = sft.base_model(knobs)
    rng = machine.seed_everything(knobs.seed)
    base, tokenizer = GPT.from_pretrained(source).to(device), load_tokenizer(source)
    model = fresh_model(knobs, base).to(device)
    if knobs.compile:
        compile_trunks(base, model)
    if knobs.shard:
        parallel.shard(base, model)
    trained = parallel.Together(model)
    optimizer = optim.make_optimizer(trained, knobs.lr, weight_decay=knobs.weight_decay, embedding_lr=knobs.embedding_lr)

    # Data: rows, and the fixed test pairs
    overlong = sft.overlong_rule(knobs.overlong, knobs.data)
    rows, prompt_lengths = encode(feedback.train, tokenizer, model.config.n_ctx, overlong)
    test_rows = encode(feedback.test, tokenizer, model.config.n_ctx, overlong)
    test_pairs, gaps = feedback.test.comparisons(20_000, seed=1)
    plan = [batch for _ in range(knobs.epochs) for batch in feedback.train.epoch(knobs.batch_size, rng)]
    normalize = knobs.normalize and knobs.model == "pointwise"
    if normalize:
        prompts = data.prompts_of(feedback.train, tokenizer, np.random.default_rng(knobs.seed))[:512]
        prompts = data.fit(prompts, base.config.n_ctx - knobs.response_length, "truncate")
    given = {"data": (rows, prompt_lengths, feedback.train.margins), "base model": source}
    run = Run("rm", knobs, plan, device, tokenizer, {"model": trained, "optimizer": optimizer}, given)
    if not run.first:
        run.say(step_0_check(model, test_rows, test_pairs, tokenizer, autocast, device))

    # Loop
    for step, (batch, pairs, labels) in run.steps():
        optim.set_lr(optimizer, step, len(plan), knobs.lr)
        thinned = zip(*(thin(rows[i], prompt_lengths[i], knobs.delete) for i in batch), strict=True)
        with autocast:
            read = forward(model, *thinned, tokenizer.pad, device, knobs.micro_batch)  # (b,) or (b, dim)
        loss = batch_loss(knobs, model, read, feedback.train, batch, pairs, labels)
        trained.backward(loss)
        loss, norm = optim.optimizer_step(optimizer, knobs.max_grad_norm, loss, partial(run.nonfinite, step, [rows[i] for i in batch]))
        agree = ((differences(model, read, pairs) > 0) == (torch.as_tensor(labels).float() > 0.5).to(device)).float().mean()
        run.log(step, {"loss": loss, "rewards/accuracies": agree, "grad_norm": norm}, show=("loss", "rewards/accuracies"))

    # Normalisation on samples of the base model, then evaluation
    if normalize:
        mean, std = normalization(sample_scores(base, model, prompts, knobs.response_length, tokenizer, autocast))
        model.normalize(mean, std)
        run.say(f"raw scores of base samples: mean {mean:.2f}, standard deviation {std:.2f}; now 0 and 1")
    read = read_all(model, *test_rows, tokenizer, autocast, device)
    run.close()
    figures = evaluate(feedback, differences(model, read, test_pairs), test_pairs, gaps)
    model.save_pretrained(run.out / "model", tokenizer)
    scores = [{"score": s.item()} for s in read] if knobs.model == "pointwise" else [{}] * len(read)
    texts = zip(feedback.test.prompts, feedback.test.responses, scores, strict=True)
    run.samples([{"prompt": prompt, "response": response} | score for prompt, response, score in texts][:64])
    summary = run.finish(figures | {"data": knobs.data})
    print(f"reward model: {summary['seconds']:.0f} s; left in {run.out}")
    return summary


def check(knobs, items):
    """Refuses knobs that say nothing together."""
    if knobs.loss == "ratings" and items.ratings is None:
        raise UserError(f"--loss ratings: {knobs.data} has no ratings on one scale (those of responses that share a prompt are compared)")
    if knobs.loss != "pairs" and (knobs.margin or knobs.center or items.margins is not None or not knobs.soft_labels):
        raise UserError(f"--loss {knobs.loss}: margins, --center and --no-soft-labels belong to --loss pairs")
    if knobs.model == "pairwise" and (knobs.loss != "pairs" or knobs.center or knobs.level != "response"):
        raise UserError("--model pairwise has no scores: expected --loss pairs, --level response and no --center")


def fresh_model(knobs, base):
    """A fresh head on a copy of the base model."""
    if knobs.model == "pairwise":
        return PreferenceModel.from_base(base, dropout=knobs.dropout)
    model = RewardModel.from_base(base, dropout=knobs.dropout, level=knobs.level)
    if knobs.level == "response" and knobs.loss != "ratings" and not knobs.center:
        model.transformer.ln_f.bias.requires_grad_(False)  # in no difference of scores: its gradient is rounding, which Adam blows up
    return model


def step_0_check(model, test_rows, test_pairs, tokenizer, autocast, device, n=300):
    """What a fresh head makes of the pairs among the first n test rows; all of them would hold up the first step."""
    few = test_pairs[(test_pairs < n).all(1)]
    share = share_positive(differences(model, read_all(model, *(x[:n] for x in test_rows), tokenizer, autocast, device), few))
    return f"step-0 check: a fresh head orders {share:.3f} of {len(few)} test pairs (chance is 0.5)"


def encode(items, tokenizer, n_ctx, overlong):
    """Rows of token ids, and prompt lengths (N,)."""
    return data.encode(zip(items.prompts, items.responses, items.where, strict=True), tokenizer, n_ctx, overlong)


def thin(row, prompt_length, delete):
    """A row of token ids without a random share of them, the EOS at both ends excepted, and what is left of its prompt length."""
    keep = np.random.random(len(row)) >= delete
    keep[[0, -1]] = True
    return row[keep], int(keep[:prompt_length].sum())


def forward(model, rows, prompt_lengths, pad, device, micro_batch=0):
    """Scores (b,), or embeddings (b, dim), of rows of token ids.

    The loss compares all rows of a batch, so with a `micro_batch` the gradient is that of the whole: of each part only the result is
    kept, and backward computes the part again (Chen et al. 2016).
    """

    def read(tokens, prompt_lengths, response_lengths):
        lengths = prompt_lengths + response_lengths
        return (model.embed(tokens, lengths) if isinstance(model, PreferenceModel) else model(tokens, lengths, prompt_lengths)).float()

    return Rows(rows, np.array(prompt_lengths), pad, device).by_parts(read, micro_batch)


def differences(model, read, pairs):
    """(P,) score differences, or logits of the pairwise model: what speaks for the first of each of the pairs (P, 2)."""
    first, second = read[torch.as_tensor(pairs, device=read.device)].unbind(1)
    return model.logit(first, second) if isinstance(model, PreferenceModel) else first - second


def batch_loss(knobs, model, read, items, batch, pairs, labels):
    """The loss of a batch: `read` (b,) or (b, dim) of the items at `batch`; pairs (P, 2) into it, labels (P,) = P(first preferred)."""

    def tensor(x):
        return torch.as_tensor(x, device=read.device, dtype=torch.float32)

    if knobs.loss == "ratings":
        return rating_loss(read, tensor([items.ratings[i].mean() for i in batch]))
    if knobs.loss != "pairs":
        groups = rankings(items, batch, pairs, knobs.group_size)
        K = max(map(len, groups))
        index = torch.tensor([[*group, *[0] * (K - len(group))] for group in groups], device=read.device)  # (G, K)
        missing = torch.arange(K, device=read.device) >= tensor([len(group) for group in groups])[:, None]
        rewards = read[index].masked_fill(missing, float("-inf"))  # best first
        if knobs.loss == "best_of_k":
            return best_of_k_loss(rewards, torch.zeros_like(index[:, 0]))
        return plackett_luce_loss(rewards, torch.arange(K, device=read.device).expand_as(index))
    if not knobs.soft_labels:  # a tie says nothing then; in float64 it may miss one half by rounding
        labels = labels.astype(np.float32)
        pairs, labels = pairs[labels != 0.5], labels[labels != 0.5] > 0.5
        if not len(pairs):
            return 0 * read.sum()
    margin = knobs.margin if items.margins is None else knobs.margin + tensor(items.margins[batch[pairs[:, 0]]])
    if isinstance(model, PreferenceModel):
        return bradley_terry_loss(differences(model, read, pairs), 0, label=tensor(labels), margin=margin)
    first, second = read[torch.as_tensor(pairs, device=read.device)].unbind(1)  # (P,) each
    return bradley_terry_loss(first, second, label=tensor(labels), margin=margin, center=knobs.center)


def rankings(items, batch, pairs, group_size):
    """What was ranked against each other in a batch: lists of positions in it, best first.

    Given groups, or random groups of about group_size rated items by mean rating. Of a tie the first in the random order stands for all
    and the others are left out of the group, so no order is made up; a group of one has loss 0.
    """
    places = np.arange(len(batch))
    if items.ratings is None:  # one after the other, and only the best of a group is never second
        return np.split(places, np.setdiff1d(places, pairs[:, 1])[1:])
    groups = []
    for group in np.array_split(places, max(1, round(len(batch) / group_size))):
        _, first = np.unique([-items.ratings[i].mean() for i in batch[group]], return_index=True)
        groups.append(group[first])
    return groups


@torch.no_grad()
def read_all(model, rows, prompt_lengths, tokenizer, autocast, device, batch_size=128):
    """`forward` of any number of rows, without dropout: (N,) or (N, dim), on the CPU."""
    model.eval()
    parts = []
    for start in range(0, len(rows), batch_size):
        part = slice(start, start + batch_size)
        with autocast:
            parts.append(forward(model, rows[part], prompt_lengths[part], tokenizer.pad, device).cpu())
    model.train()
    return torch.cat(parts)


def sample_scores(base, rm, prompts, response_length, tokenizer, autocast):
    """Scores of one response of the base model to each prompt."""
    device = base.wte.weight.device
    tokens, lengths = pad_rows(prompts, tokenizer.pad, device)
    with autocast:
        rollout = generate_all(base, tokens, lengths, response_length, eos=tokenizer.eos, pad=tokenizer.pad)
    whole = rollout.prompt_lengths + rollout.response_lengths
    rows = [row[:n] for row, n in zip(rollout.tokens.cpu(), whole.cpu(), strict=True)]
    return read_all(rm, rows, rollout.prompt_lengths.tolist(), tokenizer, autocast, device)


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


def evaluate(feedback, ahead, pairs, gaps):
    """Figures of the summary, and a table of pair accuracy by the gap between the two mean ratings; ahead (P,) of the test pairs."""
    rated = feedback.train.ratings is not None
    columns = {"reward model": ahead}
    if rated:
        ridge = ridge_scores(feedback.train, feedback.test)
        columns["ridge"] = ridge[pairs[:, 0]] - ridge[pairs[:, 1]]
    human = data.human_ceiling(feedback.test, pairs)
    figures = {"eval/accuracy": share_positive(ahead).item(), "eval/pairs": len(pairs)}
    if rated:
        figures["eval/ridge_accuracy"] = share_positive(columns["ridge"]).item()
    if not math.isnan(human):
        figures["eval/human_ceiling"] = human
    edges = [0, 0.5, 1, 2, 3, math.inf] if rated else [0, math.inf]
    print(f"\npair accuracy on {len(pairs):,} test pairs\n{'rating gap':>12} {'pairs':>7}", *(f"{c:>13}" for c in columns),
          f"{'one person':>11}" if human == human else "")  # fmt: skip
    for low, high in [*zip(edges, edges[1:], strict=False), (0, math.inf)][: len(edges) if rated else 1]:
        part = (gaps > low) & (gaps <= high)
        if part.any():
            name = "all" if (low, high) == (0, math.inf) else f"{low:g} to {high:g}" if high < math.inf else f"over {low:g}"
            cells = [share_positive(c[part]).item() for c in columns.values()]
            ceiling = data.human_ceiling(feedback.test, pairs[part])
            print(f"{name:>12} {part.sum():>7}", *(f"{c:>13.3f}" for c in cells), f"{ceiling:>11.3f}" if ceiling == ceiling else "")
    print()
    return figures


if __name__ == "__main__":
    cli.run_script(main, Knobs, __doc__)
