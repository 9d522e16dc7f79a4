"""A reward model from labels of all kinds: its loss, and what is learned beside it.

The loss of a batch is the mean over its labels of weight * -log P(what was said), with a weight and
a beta for each kind. Cuts between levels, the bar of "both bad", a head for each feature of which
there are traces, and the projection in which similar texts are near are trained beside the reward
model, and not kept. Traces and similar texts say nothing of the reward: they shape the hidden
states it is read from.

Left out: betas that are fitted along with the reward (the two have one scale), costs of edits.
"""

import math
from collections import Counter
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from minirlhf import data
from minirlhf.data.labels import REACTIONS
from minirlhf.engine import cli, parallel
from minirlhf.engine.cli import UserError
from minirlhf.engine.rows import window
from minirlhf.feedback import choice
from minirlhf.feedback.features import expect_feature
from minirlhf.feedback.ground import ground, texts_of
from minirlhf.feedback.people import FACES

OCCLUSION = 1.0  # weight of an occlusion penalty beside the loss of its label
DIMENSIONS = 8  # in which similar texts are near


class Batch(NamedTuple):
    """Some labels, and the items they speak of."""

    labels: np.ndarray
    rows: np.ndarray


def reads(knobs, items):
    """Whether train_rm's knobs have the items' labels read as such, each by its kind."""
    return items.labels is not None and knobs.loss == "pairs" and knobs.model == "pointwise"


def check(knobs, items):
    """Refuses knobs, and features in labels, that say nothing here."""
    weights = by_kind(knobs.kind_weights, "--kind-weights", items.labels, 0)
    by_kind(knobs.kind_betas, "--kind-betas", items.labels, 1e-3)
    cli.refuse({
        "--shard: labels of many kinds are not read where weights are spread": knobs.shard,
        f"--kind-weights {knobs.kind_weights}: nothing is left to learn": not any(weights.values()),
    })  # fmt: skip
    idle = "margin center soft_labels group_size augment delete_eos"
    cli.refuse_idle(knobs, {"in labels of many kinds": idle})
    for label in items.labels:
        names = set()
        for weights in (label.said.get("weights", {}), *label.said.get("others", ())):
            names |= set(weights)
        names |= {utterance[5:] for utterance in label.said.get("grammar", ())}
        for name in sorted(names):
            expect_feature(name, label.where)


def fresh(knobs, items, tokenizer, width):
    """The Mixture of the items' labels, or None where they are not read as such."""
    if not reads(knobs, items):
        return None
    return Mixture(items.labels, width, tokenizer, knobs.kind_weights, knobs.kind_betas)


def held_out_pairs(items, n):
    """What items.comparisons gives of n pairs; of labels without a comparison nothing."""
    if items.labels is not None and not items.can_compare():
        return np.zeros((0, 2), dtype=int), np.zeros(0)
    return items.comparisons(n, seed=1)


def plan(kinds, items, knobs, rng):
    """The batches of all --epochs passes, of labels of many kinds or of one."""
    batches = partial(epoch, items) if kinds else items.epoch
    return [batch for _ in range(knobs.epochs) for batch in batches(knobs.batch_size, rng)]


def epoch(items, batch_size, rng):
    """Yields Batches: all labels once, about batch_size responses in each."""
    order = rng.permutation(len(items.labels))
    sizes = [len(items.labels[i].items) for i in order]
    for chosen in data.fill(sizes, batch_size):
        labels = order[chosen]
        yield Batch(labels, rows_of(items, labels))


def rows_of(items, labels):
    """(b,) the items that labels speak of, each once."""
    return np.array(list(dict.fromkeys(i for n in labels for i in items.labels[n].items)))


def by_kind(text, flag, labels, least):
    """{kind: number} in "comparison=1,estop=0.5"; 1 for those not named.

    Raises UserError for what is no kind, is said twice, is not a finite number of at least `least`,
    or where no label is of that kind.
    """
    kinds = Counter(label.kind for label in labels)
    found = {}
    for part in filter(None, text.split(",")):
        kind, _, number = part.partition("=")
        if kind not in kinds:
            raise UserError(f"{flag} {part}: the data have labels of {', '.join(sorted(kinds))}")
        if kind in found:
            raise UserError(f"{flag} {text}: {kind} twice")
        try:
            found[kind] = float(number)
        except ValueError:
            found[kind] = math.nan
        if not least <= found[kind] < math.inf:
            raise UserError(f"{flag} {part}: expected {kind}=NUMBER, at least {least:g}")
    return dict.fromkeys(kinds, 1.0) | found


class Mixture(nn.Module):
    """What the labels are read with, for a reward model of hidden states of so many numbers."""

    def __init__(self, labels, width, tokenizer=None, weights="", betas=""):
        super().__init__()
        self.tokenizer = tokenizer
        self.weights = by_kind(weights, "--kind-weights", labels, 0)
        self.betas = by_kind(betas, "--kind-betas", labels, 1e-3)
        self.cuts = nn.ParameterDict()
        for of, shares in level_shares(labels).items():
            self.cuts[str(of)] = nn.Parameter(raw_cuts(shares))
        self.cuts["faces"] = nn.Parameter(raw_cuts(np.ones(3) / 3))
        self.bar = nn.Parameter(torch.zeros(1))
        self.register_buffer("shown", shown_faces(labels))
        self.traced = sorted({label.said["feature"] for label in labels if label.kind == "trace"})
        self.psi = nn.Parameter(torch.randn(width, len(self.traced)) / math.sqrt(width))
        self.phi = nn.Parameter(torch.randn(width, DIMENSIONS) / math.sqrt(width))
        for p in self.parameters():  # each process has the gradient of all rows, not of its own
            p.register_hook(lambda g: g / parallel.world())

    def nll(self, groups, prefixes, last):
        """{kind: -log P (B,) of what its labels say}, of prefixes (N, T) and hidden states of whole
        rows (N, C). A kind may have several groups."""
        found = {}
        for group in groups:
            beta = self.betas[group.kind]
            losses = LOSSES[group.form](self, group, prefixes, last, beta)
            found.setdefault(group.kind, []).append(losses)
        return {kind: torch.cat(losses) for kind, losses in found.items()}

    def can_read(self, label):
        """Whether there was its like among the labels this was made for."""
        about, said = label.kind in self.weights, label.said
        if "level" in said:
            return about and str(said["of"]) in self.cuts
        return about and (label.kind != "trace" or said["feature"] in self.traced)

    def cuts_of(self, name):
        raw = self.cuts[str(name)]
        return torch.cat([raw[:1], raw[:1] + raw[1:].exp().cumsum(0)])


def level_shares(labels):
    """{number of levels: the share of critiques at each, one added}."""
    found = {}
    for label in labels:
        if "level" in label.said:
            shares = found.setdefault(label.said["of"], np.ones(label.said["of"]))
            shares[label.said["level"]] += 1
    return {of: counts / counts.sum() for of, counts in found.items()}


def raw_cuts(shares):
    """(L-1,): the first cut, and logs of the gaps behind it, at which a reward of 0 has levels of
    these shares."""
    below = np.cumsum(shares)[:-1]
    cuts = np.log(below / (1 - below))
    return torch.tensor([cuts[0], *np.log(np.diff(cuts))], dtype=torch.float32)


def shown_faces(labels):
    """P(reaction | third of the levels) (3, 3): counted on texts with both a critique and a
    reaction; where there are none, people.FACES is taken for granted."""
    thirds, counts = {}, torch.zeros(3, 3)
    for label in labels:
        if label.kind == "critique":
            third = 3 * label.said["level"] // label.said["of"]
            thirds.setdefault(label.items, []).append(third)
    for label in labels:
        for third in thirds.get(label.items, ()) if label.kind == "social" else ():
            counts[third, REACTIONS.index(label.said["reaction"])] += 1
    return choice.confusion(counts) if counts.any() else torch.tensor(FACES)


# How each form of what was said is read: (B,) of a Mixture, a Group, prefixes, last, beta


def choices(mixture, group, prefixes, last, beta):
    return choice.choice_nll(group.options.values(prefixes), group.said, beta)


def rankings(mixture, group, prefixes, last, beta):
    return choice.ranking_nll(group.options.values(prefixes), beta)


def soft(mixture, group, prefixes, last, beta):
    return choice.soft_nll(group.options.values(prefixes), group.said, beta)


def tiers(mixture, group, prefixes, last, beta):
    return choice.tiers_nll(group.options.values(prefixes), group.said, beta)


def both_bad(mixture, group, prefixes, last, beta):
    values = group.options.values(prefixes)
    return choice.both_bad_nll(values, group.said, mixture.bar, beta)


def levels(mixture, group, prefixes, last, beta):
    scores = group.options.values(prefixes)[:, 0]
    return choice.critique_nll(scores, group.said, mixture.cuts_of(group.about), beta)


def faces(mixture, group, prefixes, last, beta):
    scores, cuts = group.options.values(prefixes)[:, 0], mixture.cuts_of("faces")
    return choice.social_nll(scores, group.said, cuts, mixture.shown, beta)


def sketch(mixture, group, prefixes, last, beta):
    return choice.sketch_nll(group.options.values(prefixes), group.said, beta=beta)


def trace(mixture, group, prefixes, last, beta):
    psi = last @ mixture.psi[:, [mixture.traced.index(group.about)]]  # (N, 1)
    return choice.trace_nll(group.options.values(beta * psi))


def odd(mixture, group, prefixes, last, beta):
    three = group.options.rows.view(-1, 3)
    return choice.odd_nll((last @ mixture.phi)[three], group.said, beta)


LOSSES = {
    "choice": choices,
    "ranking": rankings,
    "soft": soft,
    "tiers": tiers,
    "both_bad": both_bad,
    "levels": levels,
    "faces": faces,
    "sketch": sketch,
    "trace": trace,
    "odd": odd,
}


# A step of training


def read(model, rows, micro_batch=0):
    """(prefixes (N, T), last (N, C)): what the prefixes of rows are worth, and their last hidden
    states."""
    width = max(map(len, rows.tokens))

    def of_part(tokens, p, r):
        hidden = model.transformer.hidden(tokens, lengths=p + r)
        worth = model.score(hidden).squeeze(-1).float()  # (b, t)
        if model.level == "token":
            where = torch.arange(worth.shape[1], device=worth.device)
            worth = worth.masked_fill(where < p[:, None], 0).cumsum(1)
        last = window(hidden, p + r - 1, 1).squeeze(1).float()
        return torch.cat([F.pad(worth, (0, width - worth.shape[1])), last], 1)

    both = rows.by_parts(of_part, micro_batch)
    return both[:, :width], both[:, width:]


def thinned(rows, texts, kept):
    """(Rows, Texts) with the tokens of each row that are kept: bool (n,) of each."""
    tokens = [row[keep] for row, keep in zip(rows.tokens, kept, strict=True)]
    n = [keep[:p].sum() for keep, p in zip(kept, rows.prompt_lengths, strict=True)]
    at = [np.cumsum(keep)[at] - 1 for keep, at in zip(kept, texts.at, strict=True)]
    return rows._replace(tokens=tokens, prompt_lengths=np.array(n)), texts._replace(at=at)


def deleted(rows, share):
    """Which tokens of each row stay when a share is deleted at random: the EOS at both ends do."""
    kept = []
    for row in rows.tokens:
        keep = np.random.random(len(row)) >= share
        keep[[0, -1]] = True
        kept.append(keep)
    return kept


def occluded(labels, row_of, rows, texts):
    """(row, keep) of each marked response: which tokens stay when the unmarked ones are left
    out."""
    found = []
    for label in labels:
        marks = label.said["marks"] if label.kind == "importance" else ()
        for i, spans in zip(label.items, marks, strict=False):
            row = row_of[i]
            keep = np.ones(len(rows.tokens[row]), dtype=bool)
            keep[rows.prompt_lengths[row] : -1] = texts.marked(row, spans)
            found.append((row, keep))
    return found


def losses_of(mixture, knobs, model, items, rows, autocast, batch):
    """({kind: -log P (B,)}, the mean penalty (scalar) of occlusion, 0 without marks, how many
    tokens were read) of a Batch of items, whose Rows are `rows`; unmarked tokens are left out of
    the row that was read."""
    labels = [items.labels[n] for n in batch.labels]
    row_of = {item: row for row, item in enumerate(batch.rows)}
    own = rows.take(batch.rows)
    texts = texts_of(own, mixture.tokenizer)
    kept = deleted(own, knobs.delete)
    n_tokens = sum(keep.sum() for keep in kept)  # not those that are read again
    hidden = occluded(labels, row_of, own, texts)
    again = [row for row, _ in hidden]
    every = [*range(len(kept)), *again]
    kept += [kept[row] & keep for row, keep in hidden]
    with autocast:
        seen, texts = thinned(own.take(every), texts.take(every), kept)
        prefixes, last = read(model, seen, knobs.micro_batch)
    groups = ground(labels, row_of, texts, prefixes.device)
    found = mixture.nll(groups, prefixes, last)
    if not hidden:
        return found, 0.0, n_tokens
    scores = torch.stack([prefixes[row, at[-1]] for row, at in enumerate(texts.at)])
    penalty = choice.occlusion_penalty(scores[again], scores[len(batch.rows) :])
    return found, penalty.mean(), n_tokens


def step_loss(mixture, knobs, model, items, rows, autocast, batch):
    """(loss, {metric: value}) of a Batch."""
    found, penalty, n_tokens = losses_of(mixture, knobs, model, items, rows, autocast, batch)
    loss = 0.0
    for kind, nll in found.items():
        share = len(nll) / len(batch.labels)
        own = nll.mean() + (OCCLUSION * penalty if kind == "importance" else 0.0)
        loss = loss + mixture.weights[kind] * share * own
    stats = {f"nll/{kind}": nll.detach().mean() for kind, nll in found.items()}
    return loss, stats | {"perf/tokens": n_tokens}


@torch.no_grad()
def held_out(mixture, model, items, rows, autocast):
    """{figure: value}: of each kind -log P a label, the same of a reward that is always 0, and,
    where it is a choice, the beta under which the choices are likeliest; printed, too."""
    chosen = [n for n, label in enumerate(items.labels) if mixture.can_read(label)]
    if not chosen:
        return {}
    index = rows_of(items, chosen)
    own = rows.take(index)
    model.eval()
    with autocast:
        prefixes, last = read(model, own)
    model.train()
    row_of = {item: row for row, item in enumerate(index)}
    labels = [items.labels[n] for n in chosen]
    groups = ground(labels, row_of, texts_of(own, mixture.tokenizer), prefixes.device)
    fitted = {}
    for group in groups:
        if group.form == "choice":
            values = group.options.values(prefixes)
            fitted[group.kind] = choice.fit_beta(values, group.said)
    flat = mixture.nll(groups, 0 * prefixes, 0 * last)
    figures = {f"eval/beta/{kind}": beta for kind, beta in fitted.items()}
    print(f"\n{'-log P a held-out label':<24} {'labels':>8} {'here':>8} {'chance':>8} {'beta':>8}")
    for kind, nll in mixture.nll(groups, prefixes, last).items():
        here, chance = nll.mean().item(), flat[kind].mean().item()
        figures |= {f"eval/nll/{kind}": here, f"eval/nll_of_chance/{kind}": chance}
        beta = f"{fitted[kind]:>8.2f}" if kind in fitted else ""
        print(f"{kind:<24} {len(nll):>8} {here:>8.3f} {chance:>8.3f} {beta}")
    return figures
