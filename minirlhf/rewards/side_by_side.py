"""Several reward models as one: their channels side by side, and its score is the mean of theirs.

Models that differ in their random numbers alone err differently, and the mean of their scores
orders pairs better than each (Lakshminarayanan et al. 2017, arXiv 1612.01474). Here that mean is a
plain GPT-2 again, as wide as all together: each model has its part of the residual stream, with
heads and hidden units of its own, and no weight leads from one part to another.

One thing they share: LayerNorm divides by the standard deviation of all channels, where each model
had that of its own. So scores are not quite what they were: on the reviews by .04 to .12 of their
deviation.
"""

import copy
from dataclasses import replace

import torch

from minirlhf.engine import parallel
from minirlhf.gpt import RewardModel

HEAD = 3.0  # length of opposite heads, where that of a single one is near 1


def fresh_members(knobs, make):
    """--members models make(), on the reviews two if they have scores; one where a changed GPT
    cannot lie side by side, which is tried before it learns.

    Of two the heads are opposites, so that what they say at random cancels out: the mean starts at
    0. They are long, as by LayerNorm a score is bounded by the length of its head.
    """
    scores = knobs.data == "reviews" and knobs.model == "pointwise"
    models = [make() for _ in range(knobs.members or (2 if scores else 1))]
    if len(models) == 1:
        return models
    if not fits(models):
        print(f"note: models like these do not fit side by side: one learns, not {len(models)}")
        return models[:1]
    with torch.no_grad():
        for model, other in zip(models[::2], models[1::2], strict=False):
            model.score.weight.mul_(HEAD)
            other.score.weight.copy_(-model.score.weight)
    return models


@torch.no_grad()
def fits(models):
    """Whether the score of fresh models, which differ in their heads alone, side by side is the
    mean of theirs, of two rows of tokens."""
    config, device = models[0].config, models[0].score.weight.device
    rows = torch.arange(2 * config.n_ctx, device=device).view(2, -1) % config.vocab_size
    lengths = torch.full((2,), config.n_ctx, device=device)
    before = models[0].training
    try:
        together = [*models, side_by_side(models)]
        *theirs, score = [model.eval()(rows, lengths, lengths // 2) for model in together]
    except Exception:  # whatever a changed model's layers make of weights of other shapes
        return False
    finally:
        for model in models:
            model.train(before)
    return torch.allclose(score, sum(theirs) / len(theirs), rtol=1e-3, atol=1e-4)


def turns(plans, n):
    """[the batch of each of n models] of each step of the plans, one after the other. Each model
    reads all of a plan, but from another place on: so they differ in what they have read when."""
    steps = []
    for batches in plans:
        for step in range(len(batches)):
            others = [step + k * len(batches) // n for k in range(n)]
            steps.append([batches[i % len(batches)] for i in others])
    return steps


def side_by_side(models):
    """One RewardModel of several of the same sizes; of one, that one."""
    if len(models) == 1:
        return models[0]
    first = models[0]
    n, config = len(models), first.config
    wide = replace(config, n_head=n * config.n_head, n_embd=n * config.n_embd)
    shift = sum(model.shift for model in models) / n
    one = RewardModel(wide, level=first.level, shift=shift)
    theirs = [centered(model) for model in models]
    one.load_state_dict({name: joined(name, [own[name] for own in theirs]) for name in theirs[0]})
    return one.to(first.score.weight.device).train(first.training)


def centered(model):
    """A model's weights, those that write into the residual stream with a mean of 0 over its
    channels. LayerNorm takes the mean away, but then that of all channels together."""
    weights = {name: parallel.full(w).detach().clone() for name, w in model.state_dict().items()}
    for name, w in weights.items():
        if "wte" in name or "wpe" in name:
            w -= w.mean(1, keepdim=True)  # (V, C) or (T, C)
        if "c_proj" in name:
            w -= w.mean(0)  # (C, ...)
    return weights


def joined(name, parts):
    """The weights of that name of all models, as those of the wide one."""
    if name == "score.weight":
        return torch.cat(parts, 1) / len(parts)  # (1, n C)
    if "wte" in name or "wpe" in name:
        return torch.cat(parts, 1)  # (V, n C)
    if "c_attn" in name:  # all queries, then all keys, then all values
        thirds = zip(*(part.chunk(3) for part in parts), strict=True)
        return torch.cat([beside(third) for third in thirds])
    return beside(parts)


def beside(parts):
    """Matrices as blocks on a diagonal, vectors behind one another."""
    return torch.cat(parts) if parts[0].dim() == 1 else torch.block_diag(*parts)


def first_of(model):
    """A copy of the first of the models that lie side by side in a RewardModel; of any other model,
    of all of it."""
    config, weights = model.config, model.state_dict()
    for n in range(config.n_head, 1, -1):
        try:
            parts = {name: apart(name, w, n) for name, w in weights.items()}
            matrices = [name for name in parts if ".h." in name]
            if not all(torch.equal(joined(name, parts[name]), weights[name]) for name in matrices):
                continue
            narrow = replace(config, n_head=config.n_head // n, n_embd=config.n_embd // n)
            one = RewardModel(narrow, level=model.level, shift=model.shift)
            one.load_state_dict({name: own[0] for name, own in parts.items()})
        except Exception:  # sizes that are no multiples, a changed model's layers
            continue
        return one.to(model.score.weight.device).train(model.training)
    return copy.deepcopy(model)


def apart(name, w, n):
    """The weights of that name of each of n models, of which `joined` made w."""
    if name == "score.weight":
        return (n * w).chunk(n, 1)
    if "wte" in name or "wpe" in name:
        return w.chunk(n, 1)
    if "c_attn" in name:
        thirds = [on_diagonal(third, n) for third in w.chunk(3)]
        return [torch.cat(own) for own in zip(*thirds, strict=True)]
    return on_diagonal(w, n)


def on_diagonal(w, n):
    """The n blocks on a matrix's diagonal, or the n parts of a vector."""
    if w.dim() == 1:
        return w.chunk(n)
    return [rows.chunk(n, 1)[i] for i, rows in enumerate(w.chunk(n))]
