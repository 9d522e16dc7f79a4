"""The most readable of all equivalent rewards.   python -m minirlhf.rewards.prfi RM RUN

    python -m minirlhf.rewards.prfi runs/rm runs/ppo                  # prfi.png, and colours here
    python -m minirlhf.rewards.prfi runs/rm runs/sft --objective log --show 6

RM is a reward model, RUN what writes: an sft, ppo or dpo run. Jenner and Gleave 2022
(Preprocessing reward functions for interpretability): among the rewards r + gamma Phi(s') - Phi(s),
which order all policies alike, find the one that a simple objective likes best, then look at it.
Here Phi is 0 where an episode ends and, for text, at the prompt, so every return stays as it is.

Of text, a state is a prefix. A reward model of tokens says what each earns. Of one that reads whole
responses a token earns the score of the prefix that it ends less that of the prefix before it: that
sums to the score less the prompt's own, which no choice of words changes. Along a single response
the sum of |r| is as small with all on the last token; but where many ways on leave it at each of
its tokens, what they have in common is cheapest on the token before them, and then a token earns
what it changes of the middle (the median) of what comes of it.

Left out: a learned shift, which would pay for length where an episode ends; a Phi of several
layers; a change of scale.
"""

import sys
import warnings
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from minirlhf.engine import cli, machine
from minirlhf.engine.cli import UserError, knob
from minirlhf.engine.files import atomic_write
from minirlhf.engine.rows import in_parts, pad_rows, window
from minirlhf.feedback.labelers import load_reward_model
from minirlhf.look.policies import held_out, open_policy, prompt_rows
from minirlhf.look.terminal import (
    columns,
    cut,
    escaped,
    has_colour,
    pieces_of,
    print_wrapped,
    shown,
)
from minirlhf.look.trace import token_text
from minirlhf.rewards.language import continued
from minirlhf.sampling import generate

# The objectives, of the rewards (N,) of transitions and of pairs (M, 2) of neighbours among them


def l1(r, pairs):
    """Few and small rewards: mean |r|."""
    return r.abs().mean()


def log(r, pairs):
    """Few rewards, however large: mean log(1 + |r|)."""
    return r.abs().log1p().mean()


def smooth(r, pairs):
    """Rewards like their neighbours': mean |r_i - r_j|."""
    return (r[pairs[:, 0]] - r[pairs[:, 1]]).abs().mean()


def smooth_log(r, pairs):
    """Rewards that seldom change: mean log(1 + |r_i - r_j|)."""
    return (r[pairs[:, 0]] - r[pairs[:, 1]]).abs().log1p().mean()


OBJECTIVES = {"l1": l1, "log": log, "smooth": smooth, "smooth_log": smooth_log}


def neighbours(start, end):
    """Pairs (M, 2) of transitions i and j, j starting where i ends or, once a pair, where i starts;
    start, end (N,): their states."""
    leaving = {}
    for j, state in enumerate(start):
        leaving.setdefault(state, []).append(j)
    pairs = []
    for i, (first, last) in enumerate(zip(start, end, strict=True)):
        pairs += [(i, j) for j in leaving.get(last, []) if j != i]
        pairs += [(i, j) for j in leaving[first] if j > i]
    return np.array(pairs, int).reshape(-1, 2)


# Any states


def minimise(objective, r, start, end, free, features=None, discount=1.0, steps=1000, lr=0.05):
    """(readable rewards (N,), Phi (S,), objective before, and after), float64 NumPy.

    r (N,): rewards of transitions between states start and end (N,). Phi is 0 where not free (S,);
    elsewhere features (S, d) times weights, or without them a number of its own for each state. By
    Adam, whose rate falls to 0 and is in units of the largest reward; the best of all steps, the
    first included. Raises ValueError for an unknown objective, and for a smooth one without
    neighbours.
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"objective {objective!r}: expected one of {', '.join(OBJECTIVES)}")
    smoothed = objective.startswith("smooth")
    pairs = neighbours(list(start), list(end)) if smoothed else np.zeros((0, 2), int)
    if smoothed and not len(pairs):
        raise ValueError("no transition has a neighbour")
    pairs, start, end = (torch.as_tensor(x) for x in (pairs, start, end))
    r, free = (torch.as_tensor(x, dtype=torch.float64) for x in (r, free))
    many = len(free)
    if features is not None:
        features = torch.as_tensor(features, dtype=torch.float64) * free[:, None]
        many = features.shape[1]
    weights = torch.zeros(many, dtype=torch.float64, requires_grad=True)
    rate = lr * float(r.abs().max())
    optimizer = torch.optim.Adam([weights], lr=rate)
    losses, best = [], None
    for step in range(steps + 1):
        potential = free * weights if features is None else features @ weights  # (S,)
        shaped = r + discount * potential[end] - potential[start]
        loss = OBJECTIVES[objective](shaped, pairs)
        losses.append(loss.item())
        if best is None or losses[-1] < best[0]:
            best = losses[-1], shaped.detach(), potential.detach()
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = rate * (1 - step / (steps + 1))
        optimizer.step()
    after, shaped, potential = best
    return shaped.numpy(), potential.numpy(), losses[0], after


def prfi(R, discount=0.99, *, possible=None, terminal=(), objective="l1", steps=1000, lr=0.05):
    """(the most readable reward (S, A, S) equivalent to R, its potential (S,)).

    The objective is a mean over the `possible` transitions, (S, A, S) true or above 0: all without
    it. Phi is 0 in `terminal` states, which no transition that counts should leave. R itself where
    no step improves on it. Raises ValueError for other shapes and an unknown objective.
    """
    R = np.asarray(R, float)
    S = len(R)
    possible = np.ones(R.shape) if possible is None else np.asarray(possible)
    if R.ndim != 3 or R.shape[2] != S or possible.shape != R.shape or not possible.any():
        shapes = f"R {R.shape}, possible {possible.shape}"
        raise ValueError(f"{shapes}: expected (S, A, S), and something possible")
    start, _, end = np.nonzero(possible)
    free = ~np.isin(np.arange(S), list(terminal))
    options = {"discount": discount, "steps": steps, "lr": lr}
    _, potential, _, _ = minimise(objective, R[possible > 0], start, end, free, **options)
    shaping = discount * potential - potential[:, None]  # (S, S')
    return R + shaping[:, None], potential


# Text: states are prefixes


class Told(NamedTuple):
    """N responses, and what their tokens earn before and after."""

    responses: list  # ids
    base: list  # of a response's score, what no token earns
    before: list  # of arrays (r,): base + their sum is the score
    after: list  # the same sums
    objective: tuple  # before and after


def readable_tokens(rm, tokens, prompt_lengths, response_lengths, objective="l1", linear=False,
                    steps=1000, lr=0.05):  # fmt: skip
    """Told of responses in rows of tokens (N, T) by a RewardModel.

    Each pair of a prefix and its next token counts once in the objective. Phi has a number for each
    prefix, or is `linear` in the reward model's hidden state there. Give many responses that leave
    each other at many places: along a single one any rewards that do not cancel have the same sum
    of |r|, and one token may keep all.
    """
    rows = tokens, prompt_lengths, response_lengths
    rewards, base, hidden = (x.cpu().double().numpy() for x in read(rm, *rows))
    lengths = (prompt_lengths + response_lengths).tolist()
    texts = [ids[:n] for ids, n in zip(tokens.tolist(), lengths, strict=True)]
    nodes, ends = prefix_tree(texts, prompt_lengths.tolist())
    places = {node: n for n, node in enumerate(nodes)}
    for node in nodes:  # prompts come last
        places.setdefault(node[:-1], len(places))
    free = np.zeros(len(places))
    features = np.zeros((len(places), hidden.shape[2]))
    for n, (node, (row, t)) in enumerate(nodes.items()):
        free[n] = node not in ends
        features[n] = hidden[row, t + 1]
    features = features / np.linalg.norm(hidden, axis=2).mean() if linear else None
    r = np.array([rewards[where] for where in nodes.values()])
    start = [places[node[:-1]] for node in nodes]
    end = list(range(len(nodes)))
    after, _, *values = minimise(objective, r, start, end, free, features, steps=steps, lr=lr)
    told = Told([], base.tolist(), [], [], tuple(values))
    for ids, p in zip(texts, prompt_lengths.tolist(), strict=True):
        path = [places[(p, *ids[:n])] for n in range(p + 1, len(ids) + 1)]
        told.responses.append(ids[p:])
        told.before.append(r[path])
        told.after.append(after[path])
    return told


def branching(policy, prompts, prompt_lengths, R, branches, *, pad, **options):
    """A response to each of the prompts (B, Q), and then so many others that leave it at each of
    its tokens: tokens (N, Q+R), prompt lengths, response lengths."""
    tokens, p, r, _ = generate(policy, prompts, prompt_lengths, R, pad=pad, **options)
    found = [(tokens, p, r)]
    for t in range(int(r.max())):
        on = r > t
        whole, *lengths = continued(t, policy, tokens[on], p[on], R, branches, pad=pad, **options)
        whole = F.pad(whole, (0, tokens.shape[1] - whole.shape[1]), value=pad)
        found.append((whole, *lengths))
    return tuple(torch.cat(some) for some in zip(*found, strict=True))


@torch.no_grad()
def read(rm, tokens, prompt_lengths, response_lengths):
    """What response tokens earn (N, R), what none of them does (N,), and the hidden states of the
    prefixes, the prompt first (N, R+1, C)."""
    R = int(response_lengths.max())

    def of_prefixes(tokens, p, r):
        return window(rm.transformer.hidden(tokens, lengths=p + r), p - 1, R + 1)

    hidden = in_parts(of_prefixes, 256, tokens, prompt_lengths, response_lengths)
    values = rm.score(hidden).squeeze(2)  # (N, R+1)
    if rm.level == "token":
        return values[:, 1:], torch.full_like(values[:, 0], rm.shift), hidden
    return values.diff(dim=1), values[:, 0] + rm.shift, hidden


def prefix_tree(texts, prompt_lengths):
    """({node: (row, t) of its token}, nodes where a response ends). A node is a tuple: the length
    of the prompt, so that no prompt is another's response, and the ids up to a response token."""
    nodes, ends = {}, set()
    for row, (ids, p) in enumerate(zip(texts, prompt_lengths, strict=True)):
        for t in range(len(ids) - p):
            nodes.setdefault((p, *ids[: p + t + 1]), (row, t))
        ends.add((p, *ids))
    return nodes, ends


# The picture, the terminal, the command


def plot(told, prompts, tokenizer, path):
    """Writes a PNG: of the first responses, one to each of the prompts' texts, what each token
    earns, before and after. Raises ImportError without matplotlib."""
    from matplotlib.figure import Figure

    count = len(prompts)
    figure = Figure(figsize=(10, 2.6 * count), layout="constrained")
    panels = figure.subplots(count, 1, squeeze=False)[:, 0]
    for i, axes in enumerate(panels):
        places = np.arange(len(told.responses[i]))
        axes.bar(places - 0.2, told.before[i], 0.4, color="#9db4c8", label="before")
        axes.bar(places + 0.2, told.after[i], 0.4, color="#1f4e79", label="after")
        names = [token_text(token, tokenizer) for token in told.responses[i]]
        axes.set_xticks(places, names, rotation=45, ha="right", fontsize=8, parse_math=False)
        axes.tick_params(axis="y", labelsize=8)
        axes.axhline(0, color="black", linewidth=0.6)
        axes.set_ylabel("reward of the token", fontsize=8)
        name = f"{cut(escaped(prompts[i]), 70)} ...   (both sum to {told.before[i].sum():+.2f})"
        axes.set_title(name, fontsize=9, loc="left", parse_math=False)
    panels[0].legend(fontsize=8, frameon=False, ncols=2, loc="lower right", bbox_to_anchor=(1, 1))
    with warnings.catch_warnings(), atomic_write(path) as tmp:
        warnings.filterwarnings("ignore", "Glyph")  # a box stands for it
        figure.savefig(tmp, format="png", dpi=110)


def print_told(told, prompts, tokenizer):
    """The first responses, one to each of the prompts' texts, their tokens coloured or marked by
    what they earn."""
    unit = float(np.mean(np.abs(np.concatenate(told.before)))) or 1.0
    for i, prompt in enumerate(prompts):
        print()
        print_wrapped("prompt", prompt)
        print(f"{'score':<8} {told.base[i] + told.before[i].sum():+.2f}, of which the tokens earn "
              f"{told.before[i].sum():+.2f}")  # fmt: skip
        for name, rewards in (("before", told.before[i]), ("after", told.after[i])):
            ids = told.responses[i]
            pieces = pieces_of(ids, [0.0] * len(ids), (rewards / unit).tolist(), tokenizer)
            for line in shown(pieces, columns() - 9, has_colour()):
                print(f"{name:<8} {line}")
                name = ""
    marks = "bright colours" if has_colour() else "# and ="
    print(f"\nmarked: more than {unit:.2g} up (cyan, +) or down (magenta, -); {marks}: "
          f"more than {3 * unit:.2g}")  # fmt: skip


@dataclass(kw_only=True)
class Knobs(cli.Checked):
    rm: str
    run: str
    objective: str = knob("l1", "what is made small", tuple(OBJECTIVES))
    prompts: int = knob(16, "held-out prompts that are answered", least=1)
    linear: bool = knob(False, "Phi is linear in the hidden states; off: a number for each prefix")
    branches: int = knob(8, "other ways on from each prefix of a response", least=1)
    show: int = knob(3, "responses that are shown", least=1)
    response_length: int = knob(24, "most tokens of a response", least=1)
    steps: int = knob(1000, "of Adam", least=1)
    lr: float = knob(0.05, "its first rate, in units of the largest reward")
    out: str = knob("prfi.png", "the picture")
    seed: int = knob(0, "same seed, same responses")
    device: str = knob("auto", "what computes: cpu, cuda, ...; auto: a GPU where there is one")


def parse(knobs, doc, argv=None):
    """The Knobs of a command line: RM, RUN and flags."""
    parser = cli.parser_of(knobs, doc, "minirlhf.rewards.prfi", "RM RUN")
    parser.add_argument("rm", metavar="RM", help="a run or directory of a reward model")
    parser.add_argument("run", metavar="RUN", help="what writes: an sft, ppo or dpo run")
    return knobs(**vars(parser.parse_args(argv)))


def main(knobs):
    device = machine.pick_device(knobs.device)
    machine.precision(device, "float32")
    policy = open_policy(knobs.run, device, "none")
    if not policy.run:
        raise UserError(f"{knobs.run}: a model of no run, so without held-out prompts: name a run")
    tokenizer = policy.tokenizer
    rm = load_reward_model(knobs.rm, tokenizer, policy.model)
    texts = held_out([policy], knobs.prompts)
    room = policy.model.config.n_ctx - knobs.response_length
    if room < 1:
        problem = f"expected less than the context, {policy.model.config.n_ctx} tokens"
        raise UserError(f"--response-length {knobs.response_length}: {problem}")
    rows, _ = prompt_rows(texts, tokenizer, room)
    batch = pad_rows(rows, tokenizer.pad, device)
    generator = torch.Generator().manual_seed(knobs.seed)
    options = {"eos": tokenizer.eos, "pad": tokenizer.pad, "generator": generator}
    rows = branching(policy.model, *batch, knobs.response_length, knobs.branches, **options)
    options = {"linear": knobs.linear, "steps": knobs.steps, "lr": knobs.lr}
    told = readable_tokens(rm, *rows, knobs.objective, **options)
    shown_texts = texts[: knobs.show]
    print_told(told, shown_texts, tokenizer)
    before, after = told.objective
    print(f"{OBJECTIVES[knobs.objective].__doc__} {before:.4f} before, {after:.4f} after, over "
          f"all prefixes of {len(rows[0]):,} responses")  # fmt: skip
    try:
        plot(told, shown_texts, tokenizer, knobs.out)
        print(f"the picture: {knobs.out}")
    except ImportError:
        print(f"{knobs.out} is left out: pip install 'minirlhf[plot]'")


if __name__ == "__main__":
    sys.argv[0] = "python -m minirlhf.rewards.prfi"
    cli.run_script(main, Knobs, __doc__, parse)
