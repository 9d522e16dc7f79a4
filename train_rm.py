"""Stage 1: a reward model from human preferences.   python train_rm.py

    python train_rm.py                                       # laptop: 1 to 2 min; accuracy 0.77
    python train_rm.py --loss plackett_luce --group-size 8   # rankings; also best_of_k and ratings
    python train_rm.py --model pairwise --out runs/pairwise  # P(a preferred to b) without a score
    torchrun --nproc-per-node 8 train_rm.py --shard          # many GPUs; --resume after a stop
    python train_rm.py --data hub:Anthropic/hh-rlhf/harmless-base/train.jsonl.gz --init gpt2 \\
        --overlong truncate --dtype bfloat16 --lr 1e-4 --epochs 1 --out runs/hh/rm     # a GPU

A GPT with a scalar head reads `[EOS] prompt response EOS` and gives its last token a score, trained
so that the difference of two scores predicts which one people prefer (Bradley and Terry 1952).
Where every response has the ratings of several people, all pairs of a batch are compared, with soft
labels: the chance that a rater of the one gives more than a rater of the other. With tokens deleted
less is learned by heart; a fifth is read without its EOS, as what a limit cuts. Tokens that share
letters learn together (engine/letters.py), other rated text is read first (feedback/further.py),
and on the reviews two models end as one of twice the width (rewards/side_by_side.py). At last base
samples get scores of mean 0, deviation 1. Leaves runs/rm.

With --level token every response token has a reward; their sum is the score. With --model pairwise
two embeddings say which is preferred, in circles, too, which no score can hold and PPO cannot use.
Labels of many kinds, stops, say: feedback/mixture.py; misspelt copies: rewards/augment.py.

Left out: ensembles that stay several models (but --reward RM,RM asks several).
"""

if __name__ == "__main__":  # first, as torch takes a while
    import minirlhf.engine.interrupts  # noqa: F401
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from minirlhf import data, reward, sft
from minirlhf.engine import cli, letters, machine, optim, parallel, stages
from minirlhf.engine.cli import knob
from minirlhf.engine.log import Run
from minirlhf.engine.prepare import prepare
from minirlhf.engine.rows import Rows, pad_rows
from minirlhf.feedback import mixture
from minirlhf.feedback.checks import check_rm
from minirlhf.feedback.further import further_first
from minirlhf.feedback.kinds import rankings
from minirlhf.feedback.preference_model import PreferenceModel
from minirlhf.gpt import RewardModel
from minirlhf.look.accuracy import accuracy_figures, scored_texts
from minirlhf.online import losses
from minirlhf.rewards.augment import augmented
from minirlhf.rewards.side_by_side import fresh_members, side_by_side, turns
from minirlhf.sampling import generate
from minirlhf.tokenizer import load_base

MODELS = ("pointwise", "pairwise")
LEVELS = ("response", "token")
LOSSES = ("pairs", "plackett_luce", "best_of_k", "ratings", "parl")
AUGMENT = ("", "convexda")


@dataclass(kw_only=True)
class Knobs(cli.RunKnobs):
    data: str = knob(
        "reviews", "feedback: reviews, toy, a file, a folder, hub:OWNER/NAME/FILE", free=True
    )
    init: str = knob("", "base model: run, directory, hub name (none: sft beside --out)", free=True)
    out: str = knob("runs/rm", "run directory", free=True)
    overlong: str = knob("", "too long rows: error; truncate (default for reviews)", sft.OVERLONG)
    share: float = knob(1.0, "of what people said, how much is learned from", least=1e-6, most=1)
    model: str = knob("pointwise", "a score of each response, or pairwise preferences", MODELS)
    layers: int = knob(0, "how many of the base model's lowest blocks are read; 0: all")
    members: int = knob(0, "models that learn at once and end as one; 0: 2 of the reviews, else 1")
    level: str = knob("response", "the score is of the last token, or a sum over tokens", LEVELS)
    loss: str = knob(
        "pairs", "all pairs; whole rankings; the best of K; squared error of mean ratings; the "
        "win rate of the policy that the reward will make", LOSSES,
    )  # fmt: skip
    beta: float = knob(1.0, "parl: what a nat of KL costs that policy, in raw scores", least=1e-6)
    group_size: int = knob(4, "rated responses in a ranking; in a file the record says it", least=2)
    soft_labels: bool = knob(True, "labels are shares of raters; off: the majority, without ties")
    epochs: int = knob(5, "passes over the responses", least=1)
    text_epochs: int = knob(1, "passes before, over the source's further text, if that is rated")
    batch_size: int = knob(64, "responses a step; what people compared of them counts", least=1)
    micro_batch: int = knob(
        0, "responses in memory at a time, for a second forward pass; 0: all", free=True
    )
    lr: float = knob(1e-3, "peak learning rate: 5 % warm-up, then linear to 0")
    embedding_lr: float = knob(3.0, "rate of token embeddings, as a multiple of --lr", least=1e-6)
    weight_decay: float = knob(0.01, "AdamW decay of matrices")
    dropout: float = knob(0.0, "dropout while training", most=0.99)
    delete: float = knob(0.45, "share of input tokens deleted at random in training", most=0.99)
    delete_eos: float = knob(0.2, "share of responses that lose their EOS, as cut ones do", most=1)
    augment: str = knob("", "convexda: misspelt copies of the responses are read, too", AUGMENT)
    margin: float = knob(0.0, "how far the preferred score should lead; plus a record's own")
    center: float = knob(0.0, "weight of (sum of the two scores)^2")
    kind_weights: str = knob("", 'of labels of many kinds, as in "comparison=1,estop=0.5"; else 1')
    kind_betas: str = knob("", "how rational people are in each kind, said likewise; else 1")
    normalize: bool = knob(
        True, "scores of base samples get mean 0 and standard deviation 1", free=True
    )
    response_length: int = knob(
        24, "most tokens of a base sample for the normalisation", least=1, free=True
    )


@cli.contained
def main(knobs):
    device, autocast = parallel.start(knobs)
    feedback = data.load_feedback(knobs.data)
    check_rm(knobs, feedback.train, feedback.more_ratings)
    mixture.held_out_pairs(feedback.test, 1)  # an error now, where there are none
    stages.look_ahead(knobs, {"sft": knobs.init})

    # Models: the base, made now if it is missing, and a fresh head on a copy of its trunk
    source = sft.base_model(knobs, feedback)
    rng = machine.seed_everything(knobs.seed)
    base, tokenizer = load_base(source, device)
    members = fresh_members(knobs, lambda: fresh_model(knobs, base).to(device))
    prepare(knobs, base, *members)
    kinds = mixture.fresh(knobs, feedback.train, tokenizer, base.config.n_embd)
    trained = parallel.Together(*members)
    learned = torch.nn.ModuleList(filter(None, (trained, kinds and kinds.to(device))))
    optimizer = optim.make_optimizer(learned, knobs.lr, **optim.rates_of(knobs))
    letters.join(knobs, optimizer, trained, tokenizer)

    # Data: rows of token ids, the fixed test pairs, and which responses each step compares
    train, train_rows = encode(feedback.train.some(knobs.share, knobs.seed), tokenizer, base, knobs)
    test, test_rows = encode(feedback.test, tokenizer, base, knobs)
    test_pairs, gaps = mixture.held_out_pairs(test, 20_000)
    plan = mixture.plan(kinds, train, knobs, rng)
    read = augmented(knobs.augment, train, train_rows, plan, base, tokenizer, rng)
    read, read_rows, *plans = further_first(knobs, feedback, base, tokenizer, rng, *read)
    plan = turns(plans, len(members))
    prompts = sample_prompts(train, tokenizer, base, knobs)

    parts = {"model": learned if kinds else trained, "optimizer": optimizer}
    given = {"data": (read_rows.tokens, read_rows.prompt_lengths), "base model": source}
    run = Run("rm", knobs, plan, device, tokenizer, parts, given)
    if run.first == 0 and len(gaps):
        run.say(step_0_check(members[0], test_rows, test_pairs, autocast))

    for step, batches in run.steps():
        optim.set_lr(optimizer, step, len(plan), knobs.lr)
        loss, stats = mean_loss(kinds, knobs, members, read, read_rows, autocast, batches)
        trained.backward(loss)
        some = [read_rows.tokens[i] for batch in batches for i in batch.rows]
        nonfinite = partial(run.nonfinite, step, some)
        loss, norm = optim.optimizer_step(optimizer, knobs.max_grad_norm, loss, nonfinite)
        stats |= {"loss": loss, "grad_norm": norm}
        run.log(step, stats, show=("loss", "rewards/accuracies"))

    # One model, its normalisation on samples of the base model, then evaluation
    model = side_by_side(members)
    with run.kept(model, final=not prompts, **feedback.facts(knobs.data, tokenizer)):
        figures = mixture.held_out(kinds, model, test, test_rows, autocast) if kinds else {}
        if prompts:
            scores = sample_scores(base, model, prompts, knobs.response_length, tokenizer, autocast)
            run.say(normalize(model, scores))
            run.keep(model)
        outputs = read_all(model, test_rows, autocast)
        ahead = differences(model, outputs, test_pairs)
        figures |= accuracy_figures(train, test, ahead, test_pairs, gaps) if len(gaps) else {}
        run.samples(scored_texts(test, outputs))
        summary = run.finish(figures)
        print(f"reward model: {summary['seconds']:.0f} s; left in {run.out}")
        return summary


def fresh_model(knobs, base):
    """A fresh head on a copy of the base model, or of its lowest layers."""
    size = {"layers": knobs.layers, "dropout": knobs.dropout}
    if knobs.model == "pairwise":
        return PreferenceModel.from_base(base, **size)
    model = RewardModel.from_base(base, level=knobs.level, **size)
    bias = getattr(model.transformer.ln_f, "bias", None)
    relative = knobs.level == "response" and knobs.loss != "ratings" and not knobs.center
    if relative and bias is not None:
        # In no difference of scores: its gradient is rounding, which Adam would blow up.
        bias.requires_grad_(False)
    return model


def encode(items, tokenizer, base, knobs):
    """The items that differ within the context, and their Rows."""
    overlong = sft.overlong_rule(knobs.overlong, knobs.data)
    items, *encoded = data.encode_items(items, tokenizer, base.config.n_ctx, overlong)
    return items, Rows(*encoded, tokenizer.pad, base.lm_head_weight.device)


def sample_prompts(items, tokenizer, base, knobs):
    """256 to 512 prompts that leave room for a sample; none where nothing is normalised."""
    if knobs.model == "pairwise" or not knobs.normalize:
        return []
    prompts = data.prompts_of(items, tokenizer, np.random.default_rng(knobs.seed))[:512]
    prompts = data.fit(prompts, base.config.n_ctx - knobs.response_length, "truncate")
    rounds = -(-256 // len(prompts))  # a few prompts are answered several times
    return prompts * rounds


def step_0_check(model, rows, pairs, autocast, n=300):
    """What a fresh head makes of the pairs among the first n rows; all would hold up the start."""
    few = pairs[(pairs < n).all(1)]
    first = np.arange(min(n, len(rows.tokens)))
    outputs = read_all(model, rows.take(first), autocast)
    ahead = differences(model, outputs, few)
    share = reward.share_positive(ahead)
    return f"step-0 check: a fresh head orders {share:.3f} of {len(few)} test pairs (chance is 0.5)"


def mean_loss(kinds, knobs, members, items, rows, autocast, batches):
    """The mean of the members' losses, each of its own batch, and the last one's statistics."""
    step_loss = partial(mixture.step_loss, kinds) if kinds else compared_loss
    losses = []
    for model, batch in zip(members, batches, strict=True):
        loss, stats = step_loss(knobs, model, items, rows, autocast, batch)
        losses.append(loss)
    return torch.stack(losses).mean(), stats


def compared_loss(knobs, model, items, rows, autocast, batch):
    """(loss, {metric: value}) of a batch, a data.Compared of items, whose Rows are `rows`."""
    thinned = rows.take(batch.rows).thinned(knobs.delete, knobs.delete_eos)
    with autocast:
        outputs = forward(model, thinned, knobs.micro_batch)  # (b,) or (b, dim)
    loss = batch_loss(knobs, model, outputs, items, batch)
    accuracy = batch_accuracy(model, outputs.detach(), batch)
    n_tokens = sum(map(len, thinned.tokens))
    return loss, {"rewards/accuracies": accuracy, "perf/tokens": n_tokens}


def forward(model, rows, micro_batch=0):
    """What the model says of each row: a score (b,), or of a pairwise one an embedding (b, dim)."""

    def of_part(tokens, prompt_lengths, response_lengths):
        return model(tokens, prompt_lengths + response_lengths, prompt_lengths).float()

    return rows.by_parts(of_part, micro_batch)


def batch_loss(knobs, model, outputs, items, batch):
    """The loss of a batch, a data.Compared of items, of which the model said `outputs`."""
    if knobs.loss == "pairs":
        return pairs_loss(knobs, model, outputs, batch)
    if knobs.loss == "ratings":
        means = [items.ratings[i].mean() for i in batch.rows]
        return reward.rating_loss(outputs, as_floats(means, outputs))
    if knobs.loss == "parl":
        return losses.parl(knobs, outputs, items, batch)
    groups = rankings(items, batch, knobs.group_size)
    best_first = [outputs[group] for group in groups]
    scores = pad_sequence(best_first, batch_first=True, padding_value=-torch.inf)  # (G, K)
    in_order = torch.arange(scores.shape[1], device=scores.device).expand_as(scores)
    if knobs.loss == "best_of_k":
        return reward.best_of_k_loss(scores, in_order[:, 0])
    return reward.plackett_luce_loss(scores, in_order)


def pairs_loss(knobs, model, outputs, batch):
    """Bradley-Terry on the batch's pairs."""
    pairs, labels, margin = batch.pairs, batch.labels, batch.margins
    if not knobs.soft_labels:
        labels = labels.astype(np.float32)  # in float64 a tie may miss one half by rounding
        decided = labels != 0.5
        pairs, margin = pairs[decided], margin[decided]
        labels = labels[decided] > 0.5
    if not len(pairs):  # nothing but ties, or one response alone
        return 0 * outputs.sum()
    margin = as_floats(margin + knobs.margin, outputs)
    label = as_floats(labels, outputs)
    first, second = sides(model, outputs, pairs)
    return reward.bradley_terry_loss(first, second, label=label, margin=margin, center=knobs.center)


def as_floats(values, like):
    return torch.as_tensor(values, device=like.device, dtype=torch.float32)


def sides(model, outputs, pairs):
    """The scores (P,) of the first and the second of each pair; or log-odds (P,), and 0."""
    first, second = outputs[torch.as_tensor(pairs, device=outputs.device)].unbind(1)
    if isinstance(model, PreferenceModel):
        return model.logit(first, second), 0
    return first, second


def differences(model, outputs, pairs):
    """(P,) what speaks for the first of each pair: a difference of scores, or log-odds."""
    first, second = sides(model, outputs, pairs)
    return first - second


def batch_accuracy(model, outputs, batch):
    """The share of pairs that the model orders as most people do, where people are not divided."""
    label = batch.labels.astype(np.float32)  # in float64 a tie may miss one half by rounding
    swap = label < 0.5
    other_way = batch.pairs[:, ::-1]
    pairs = np.where(swap[:, None], other_way, batch.pairs)
    decided = pairs[label != 0.5]
    ahead = differences(model, outputs, decided)
    return reward.share_positive(ahead)


def sample_scores(base, model, prompts, response_length, tokenizer, autocast):
    """Scores (n,) of one response of the base model to each prompt."""
    tokens, lengths = pad_rows(prompts, tokenizer.pad, base.lm_head_weight.device)
    ends = {"eos": tokenizer.eos, "pad": tokenizer.pad}
    with autocast:
        sampled = generate(base, tokens, lengths, response_length, **ends)
    rows = Rows.sampled(*sampled[:3], tokenizer.pad)
    return read_all(model, rows, autocast)


def normalize(model, scores):
    """Gives scores of this mean and standard deviation the mean 0 and 1; says what they were."""
    mean, std = reward.normalization(scores)
    if not std:
        return f"raw scores of base samples: all {mean:.2f}, so they stay as they are"
    model.normalize(mean, std)
    moments = f"mean {mean:.2f}, standard deviation {std:.2f}"
    return f"raw scores of base samples: {moments}; now 0 and 1"


@torch.no_grad()
def read_all(model, rows, autocast):
    """`forward` of any number of rows, without dropout: (N,) or (N, dim), on the CPU."""
    model.eval()
    index = np.arange(len(rows.tokens))
    outputs = []
    for part in np.split(index, range(128, len(index), 128)):
        with autocast:
            outputs.append(forward(model, rows.take(part)).cpu())
    model.train()
    return torch.cat(outputs)


if __name__ == "__main__":
    cli.run_script(main, Knobs, __doc__)
