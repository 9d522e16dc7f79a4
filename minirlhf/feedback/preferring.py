"""Whoever prefers, by texts: prefer(prompts, a, b) -> P(a over b), for people, rules and models.

    runs/rm                      a reward model: sigmoid of the scores' difference
    runs/pairwise                a preference model: its own
    runs/a/rm,runs/b/rm,...      an ensemble of reward models: by their mean score, with a spread
    people:FILE                  what people said of that prompt and pair, in any --data
    FILE.py:FUNCTION             (prompts, responses) -> scores, or (prompts, a, b) -> P
    judge:URL?model=NAME&...     an LLM behind an OpenAI-compatible address
    true                         the toy's own reward

To swap a and b is to get 1 - P, to the last bit; equal texts are 1/2.
"""

import inspect
import itertools
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from minirlhf import data
from minirlhf.engine.cli import UserError
from minirlhf.engine.rows import pad_rows
from minirlhf.engine.weights import local_directory, model_directory
from minirlhf.feedback import labelers
from minirlhf.feedback.endpoint import read_settings
from minirlhf.feedback.judge import Judge
from minirlhf.feedback.preference_model import PreferenceModel
from minirlhf.gpt import RewardModel
from minirlhf.rewards.fusion import fused
from minirlhf.tokenizer import fit_vocabulary, load_tokenizer


class Preferrer(NamedTuple):
    """Who prefers. None for what they do not do."""

    name: str
    prefer: Callable  # (prompts, a, b), lists of n texts -> (n,) P(a over b)
    score: Callable | None = None  # (prompts, responses) -> (n,) numbers, higher for better
    spread: Callable | None = None  # the same -> (n,) standard deviation over an ensemble
    report: Callable | None = None  # () -> a line on what was asked so far


def load_preferrer(source, feedback=None, device="cpu", fuse=0):
    """The Preferrer that a source names; `feedback` for `true`. Scores of reward models are fused
    with those of at most `fuse` training texts that are like. Raises UserError for what is none,
    before anything is asked."""
    source = str(source)
    function = None if speaks(source) else labelers.find_function(source, feedback)
    expect_model(source, is_ensemble(source) or not (speaks(source) or function), fuse)
    if source.startswith("judge:"):
        judge = Judge(source)
        name = f"judge {judge.settings.model}".strip()
        prefer = partial(symmetric, judge.prefer)
        return Preferrer(name, prefer, judge.score, report=judge.report)
    if source.startswith("people:"):
        people = People(source.removeprefix("people:"))
        return Preferrer(source, partial(symmetric, people.prefer), report=people.report)
    if is_ensemble(source):
        names = source.split(",")
        members = [score_of_model(name, device, fuse) for name in names]
        mean, spread = partial(mean_score, members), partial(spread_of_scores, members)
        return by_scores(source, mean)._replace(spread=spread)
    if function and takes_pairs(function):
        forward = partial(both_orders, function, source)
        return Preferrer(source, partial(symmetric, forward))
    if function:
        return by_scores(source, partial(numbers, function, source))
    directory = local_directory(model_directory(source))
    if labelers.is_pairwise(directory):
        expect_model(source, False, fuse)
        forward = partial(by_pairs, *load_texts_model(PreferenceModel, source, device))
        return Preferrer(source, partial(symmetric, forward))
    return by_scores(source, score_of_model(source, device, fuse))


def expect_model(source, is_one, fuse):
    """Raises UserError where scores of what is no reward model are to be fused."""
    if fuse and not is_one:
        raise UserError(f"--fuse: {source} is no reward model with a score and training texts")


def is_ensemble(source):
    return "," in source and not Path(source).exists()


def speaks(source):
    """Whether a source is one that neither is a model nor a function."""
    return source.startswith(("judge:", "people:")) or is_ensemble(source)


def find_function(source, feedback, device="cpu"):
    """What scores (prompts, responses), lists of texts: a judge, an ensemble, a function as in
    labelers.find_function; None: a model. Raises UserError for who only compares."""
    if not speaks(source):
        return labelers.find_function(source, feedback)
    score = load_preferrer(source, feedback, device).score
    if not score:
        raise UserError(f"--reward {source}: compares responses, and PPO needs a score of each")
    return score


def content_of(source):
    """What a resumed run must find again in the place of a source: of a judge all that decides what
    it says, so another budget will do."""
    source = str(source)
    if source.startswith("judge:"):
        settings = read_settings(source)
        who = settings.model or settings.url
        return repr((who, settings.rationale, settings.principles))
    if source.startswith("people:"):
        return f"{source.removeprefix('people:')}:"
    return source.split(",") if is_ensemble(source) else source


def symmetric(forward, prompts, a, b):
    """(n,) P(a over b) by forward(prompts, first, second) -> (n,) P(the first one).

    It is asked of each pair in one order of the texts, whichever is given, and not of equal ones.
    """
    swap = np.array([x > y for x, y in zip(a, b, strict=True)], dtype=bool)
    differ = [i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y]
    p = np.full(len(swap), 0.5)
    if differ:
        first = [b[i] if swap[i] else a[i] for i in differ]
        second = [a[i] if swap[i] else b[i] for i in differ]
        p[differ] = forward([prompts[i] for i in differ], first, second)
    # 1 - x is exact from 1/2 to 1 alone: so the larger of the two chances is rounded first
    larger = np.maximum(p, 1 - p)
    smaller = 1 - larger
    return np.where((p >= 0.5) != swap, larger, smaller)


# Scores


def by_scores(name, score):
    """A Preferrer by Bradley and Terry."""

    def forward(prompts, first, second):
        both = score([*prompts, *prompts], [*first, *second])
        one, other = torch.as_tensor(both, dtype=torch.float64).float().chunk(2)
        size = torch.maximum(one.abs(), other.abs())
        return labelers.chances(one - other, size).double().numpy()

    return Preferrer(name, partial(symmetric, forward), score)


def load_texts_model(kind, source, device):
    """(model, its tokenizer), of a run, a directory or the hub."""
    directory = local_directory(model_directory(source))
    model, tokenizer = kind.from_pretrained(directory), load_tokenizer(directory)
    fit_vocabulary(model, tokenizer, source)
    return model.to(device).eval(), tokenizer


def score_of_model(source, device, fuse=0):
    """score(prompts, responses) of a reward model: 0 on average on its base model's samples, with
    a standard deviation of 1, as train_rm leaves it; or fused as in rewards/fusion.py."""
    model, tokenizer = load_texts_model(RewardModel, source, device)
    read = partial(labelers.by_model, fused(model, source, tokenizer, fuse))
    return partial(scores_of_texts, read, model, tokenizer)


def scores_of_texts(read, model, tokenizer, prompts, responses):
    """(n,) scores of finished responses: rows `[EOS] prompt response EOS`."""
    return of_texts(read, model, tokenizer, prompts, responses).numpy()


@torch.no_grad()
def of_texts(read, model, tokenizer, prompts, responses):
    """read(tokens (B, T), prompt_lengths, response_lengths) of texts, 128 at a time: (n, ...)."""
    texts = zip(prompts, responses, itertools.repeat("a text that is scored"), strict=False)
    rows, p = data.encode(texts, tokenizer, model.config.n_ctx, "truncate")
    device, found = model.score.weight.device, []
    for start in range(0, len(rows), 128):
        part = slice(start, start + 128)
        tokens, lengths = pad_rows(rows[part], tokenizer.pad, device)
        prompt_lengths = torch.as_tensor(p[part], device=device)
        found.append(read(tokens, prompt_lengths, lengths - prompt_lengths).float().cpu())
    return torch.cat(found)


def mean_score(members, prompts, responses):
    return np.mean([score(prompts, responses) for score in members], axis=0)


def spread_of_scores(members, prompts, responses):
    """(n,) standard deviation of the members' scores: how little they know of a response."""
    return np.std([score(prompts, responses) for score in members], axis=0)


def by_pairs(model, tokenizer, prompts, first, second):
    """P by a preference model."""

    def embed(tokens, prompt_lengths, response_lengths):
        return model.embed(tokens, prompt_lengths + response_lengths)

    both = of_texts(embed, model, tokenizer, [*prompts, *prompts], [*first, *second])
    one, other = both.chunk(2)
    size = one.norm(dim=-1) * other.norm(dim=-1)
    return labelers.chances(model.logit(one, other), size).double().numpy()


# Functions


def takes_pairs(function):
    """Whether a function has three parameters, (prompts, a, b)."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # one that is not written in Python
        return False
    needed = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and p.default is p.empty]
    return len(needed) == 3


def both_orders(function, source, prompts, first, second):
    forth = numbers(function, source, prompts, first, second)
    back = numbers(function, source, prompts, second, first)
    if min(forth.min(), back.min()) < 0 or max(forth.max(), back.max()) > 1:
        raise UserError(f"{source}: expected P(a over b) of each pair, from 0 to 1")
    return (forth + 1 - back) / 2


def numbers(function, source, *texts):
    """(n,) what a function of lists of n texts gives. Raises UserError where that is not n finite
    numbers; what the function raises is its own."""
    with labelers.current_directory():
        given = list(function(*map(list, texts)))
    try:
        found = np.array([float(value) for value in given])
    except (TypeError, ValueError, OverflowError):
        found = np.array([np.nan])
    if len(found) != len(texts[0]) or not np.isfinite(found).all():
        raise UserError(f"{source}: expected a finite number for each of {len(texts[0])} texts")
    return found


# People


class People:
    """What people said, by prompt and text: ratings, or comparisons."""

    def __init__(self, source):
        self.source, self.ratings, self.wins = source, {}, Counter()
        self.asked = self.unknown = 0
        feedback = data.load_feedback(source)
        for items in (feedback.train, feedback.test):
            self.read(items)
        if not self.ratings and not self.wins:
            raise UserError(f"people:{source}: expected ratings or comparisons, found none")

    def read(self, items):
        texts = list(zip(items.prompts, items.responses, strict=True))
        if items.ratings is not None:
            self.ratings |= dict(zip(texts, items.ratings, strict=True))
            return
        for group in items.groups:
            for better, worse in itertools.combinations(group, 2):
                self.wins[(*texts[better], items.responses[worse])] += 1
        for label in items.labels or ():
            for i, j in tied(label):
                prompt, one = texts[label.items[i]]
                other = items.responses[label.items[j]]
                self.wins[prompt, one, other] += 0.5
                self.wins[prompt, other, one] += 0.5

    def prefer(self, prompts, a, b):
        """(n,) the share of comparisons that a won, ties one half; of rated ones the chance that a
        rater of a gives more than one of b. 1/2 where nobody said anything, and that is counted."""
        found = [self.share(*row) for row in zip(prompts, a, b, strict=True)]
        self.asked += len(found)
        self.unknown += found.count(None)
        return np.array([0.5 if share is None else share for share in found])

    def share(self, prompt, a, b):
        if (prompt, a) in self.ratings and (prompt, b) in self.ratings:
            return data.outvotes([self.ratings[prompt, a], self.ratings[prompt, b]])[0, 1]
        won, lost = self.wins[prompt, a, b], self.wins[prompt, b, a]
        return won / (won + lost) if won + lost else None

    def report(self):
        known = self.asked - self.unknown
        return f"people: {known} of {self.asked} pairs had been compared, the others are 1/2"


def tied(label):
    """Pairs (i, j) of a label's responses that stand in one place."""
    pairs = []
    for tier in label.said.get("ranking", []):
        if isinstance(tier, list):
            pairs += itertools.combinations(tier, 2)
    return pairs


# Rows of tokens, as training has them


def model_of(source):
    """The source where it is the name of a model, to be looked for ahead; else ""."""
    return "" if source == "true" or ":" in source or "," in source else source


def load_both(knobs, reward, *args):
    """(scorer, prefer) of train_dpo: the reward scores; --labeler compares, or else the reward.

    A reward that merely lies beside --out, was not asked for and does not fit is left out.
    """
    scorer = prefer = None
    needed = knobs.reward or (knobs.online and not knobs.labeler)
    try:
        scorer, prefer = labelers.load_labeler(reward, *args)
    except UserError as e:
        if needed:
            raise
        print(f"samples are not scored: {e}")
    if knobs.labeler:
        _, prefer = load_labeler(knobs.labeler, *args)
    return scorer, prefer


def load_labeler(source, feedback, tokenizer, base):
    """(scorer, prefer) on rows of tokens, as labelers.load_labeler has them of models, of anyone
    that load_preferrer knows."""
    source = str(source)
    function = speaks(source) or (source != "true" and labelers.find_function(source, feedback))
    if not function:
        return labelers.load_labeler(source, feedback, tokenizer, base)
    preferrer = load_preferrer(source, feedback, base.lm_head_weight.device)
    return of_rows(preferrer, tokenizer)


def of_rows(preferrer, tokenizer):
    """(scorer or None, prefer) of a Preferrer, on rows of tokens."""
    scorer = partial(score_rows, preferrer.score, tokenizer) if preferrer.score else None
    return scorer, partial(prefer_rows, preferrer.prefer, tokenizer)


def texts_of(tokenizer, tokens, prompt_lengths, response_lengths):
    """(prompts, responses) of rows, as texts without EOS."""
    prompts, responses = [], []
    rows = zip(tokens.tolist(), prompt_lengths.tolist(), response_lengths.tolist(), strict=True)
    for ids, p, r in rows:
        prompts.append(tokenizer.decode(ids[:p]))
        responses.append(tokenizer.decode(ids[p : p + r]))
    return prompts, responses


def score_rows(score, tokenizer, tokens, prompt_lengths, response_lengths):
    """(B,) scores."""
    texts = texts_of(tokenizer, tokens, prompt_lengths, response_lengths)
    return torch.as_tensor(score(*texts), dtype=torch.float32).to(tokens.device)


def prefer_rows(prefer, tokenizer, tokens, prompt_lengths, response_lengths, K):
    """(B/K, K, K) P(i preferred to j) among K rows in turn; each pair is asked once."""
    prompts, responses = texts_of(tokenizer, tokens, prompt_lengths, response_lengths)
    n = len(prompts) // K
    first, second = np.triu_indices(K, 1)
    start = K * np.arange(n)[:, None]
    one, other = (start + first).ravel(), (start + second).ravel()
    asked = [prompts[i] for i in one]
    p = prefer(asked, [responses[i] for i in one], [responses[i] for i in other])
    found = torch.full((n, K, K), 0.5)
    p = torch.as_tensor(np.asarray(p), dtype=torch.float32).view(n, -1)
    found[:, first, second] = p
    found[:, second, first] = 1 - p
    return found.to(tokens.device)
