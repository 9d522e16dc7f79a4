"""Files of human feedback: JSONL, one object a line, in any of six forms; and the archive of the reviews.

A bad line is an error that names it. Files may come from strangers: sizes are bounded, and nothing is executed or written.

Left out: other file formats; dialogues keep the plain-text form of Bai et al. 2022.
"""

import gzip
import io
import json
import os
import re
import tarfile
import zlib
from collections import Counter

import numpy as np

from minirlhf.runtime import UserError

LIMIT = 2**26  # bytes of a line, of a JSON file, and of what an archive holds


def read_lines(path):
    """(number, text) of each line that is not blank. Raises UserError, also for a line over LIMIT and for a decompression bomb."""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as lines:
            room = max(LIMIT, 200 * path.stat().st_size)  # text is packed 3 to 10 times, a bomb 1,000 times
            for number, line in enumerate(iter(lambda: lines.readline(LIMIT + 1), b""), 1):
                room -= len(line)
                if len(line) > LIMIT:
                    raise UserError(f"{path}, line {number}: a line of over {LIMIT >> 20} MiB; expected one record a line")
                if room < 0:
                    raise UserError(f"{path}, line {number}: unpacks to over 200 times the file's size; expected records")
                if line.strip():
                    yield number, line.decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, zlib.error, EOFError) as e:
        raise UserError(f"{path}: not readable{' as gzip' if path.suffix == '.gz' else ''}: {e}") from None
    except UnicodeDecodeError as e:
        raise UserError(f"{path}, line {number}: not UTF-8: {e}") from None


def read_json(path):
    """What a JSON file says. Raises FileNotFoundError, or UserError as in `parse_json` and for a file over LIMIT."""
    with open(path, "rb") as file:
        text = file.read(LIMIT + 1)
    if len(text) > LIMIT:
        raise UserError(f"{path}: over {LIMIT >> 20} MiB, which no such file needs")
    return parse_json(text, f"{path} is broken")


def parse_json(text, where):
    """What JSON, a str or bytes, says. Raises UserError for what is not JSON or too deep, and for a key twice in one object."""
    try:
        return json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as e:  # ValueError: not UTF-8, or an integer of thousands of digits, too
        raise UserError(f"{where}: not JSON: {e}".replace(": line 1 column", ": column")) from None


def unique(pairs):
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {shown(twice)} twice in one object")
    return found


def shown(value):
    """A value out of JSON, in an error message: its start, or its kind where it may be nested."""
    return f"a {type(value).__name__}" if isinstance(value, (list, dict)) else json.dumps(value)[:60]


def parse_record(line, where):
    """(prompt, responses best first, the record's number or None) of one line in any of the forms below. Raises UserError.

    {"prompt", "chosen", "rejected"}, as text or as lists of {"role", "content"}; {"chosen", "rejected"}, two dialogues that share a
    prefix (Bai et al. 2022); {"prompt", "responses", "ranking"}, indices best first; {"prompt", "response", "rating"};
    {"prompt", "response", "label"}, true or false: thumbs up or down. The number is the rating or label of a single response; a
    comparison may have a "margin", how far each score should lead those of worse responses (Llama 2).
    """
    record = parse_json(line, where)
    keys = set(record) if isinstance(record, dict) else set()
    prompt = text_of(record["prompt"], where, "prompt") if "prompt" in keys else ""
    margin = number_of(record["margin"], where, "margin") if "margin" in keys else None
    if {"chosen", "rejected"} <= keys:
        chosen, rejected = (text_of(record[key], where, key) for key in ("chosen", "rejected"))
        if "prompt" not in keys:
            prompt = shared_prefix(chosen, rejected)
        pair = [chosen, rejected]
        if chosen.startswith(prompt) and rejected.startswith(prompt):
            pair = [text.removeprefix(prompt) for text in pair]
        if pair[0] == pair[1]:
            raise UserError(f"{where}: chosen and rejected are the same text")
        return prompt, pair, margin
    if {"prompt", "responses", "ranking"} <= keys:
        responses, ranking = record["responses"], record["ranking"]
        if not isinstance(responses, list) or len(responses) < 2:
            raise UserError(f"{where}: responses: expected a list of at least 2")
        if not isinstance(ranking, list) or [type(i) for i in ranking] != [int] * len(responses) or len(set(ranking)) < len(ranking) \
                or not 0 <= min(ranking) <= max(ranking) < len(ranking):  # fmt: skip
            raise UserError(f"{where}: ranking: expected the indices 0..{len(responses) - 1} of the responses, best first")
        texts = [text_of(response, where, "responses") for response in responses]
        if len(set(texts)) < len(texts):
            raise UserError(f"{where}: responses: the same text twice")
        return prompt, [texts[i] for i in ranking], margin
    if {"prompt", "response", "rating"} <= keys:
        return prompt, [text_of(record["response"], where, "response")], number_of(record["rating"], where, "rating")
    if {"prompt", "response", "label"} <= keys:
        if type(record["label"]) is not bool:
            raise UserError(f"{where}: label: expected true or false, found {shown(record['label'])}")
        return prompt, [text_of(record["response"], where, "response")], record["label"]
    raise UserError(
        f"{where}: found keys {str(sorted(keys))[:200]}, expected prompt+chosen+rejected, chosen+rejected, prompt+responses+ranking, "
        "prompt+response+rating, or prompt+response+label"
    )


def number_of(value, where, key):
    if type(value) not in (int, float) or not abs(value) < 1e300:
        raise UserError(f"{where}: {key}: expected a finite number, found {shown(value)}")
    return float(value)


def text_of(value, where, key):
    """A string as it is; a list of messages as a dialogue in the form of Bai et al. 2022."""
    if isinstance(value, str):
        if re.search("[\ud800-\udfff]", value):
            raise UserError(f"{where}: {key}: half a surrogate pair, which no text holds")
        return value
    if not isinstance(value, list) or not all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in value
    ):
        raise UserError(f"{where}: {key}: expected a string or a list of {{role, content}}, found {shown(value)}")
    names = {"user": "Human", "assistant": "Assistant"}
    return text_of("".join(f"\n\n{names.get(m['role'], m['role'].capitalize())}: {m['content']}" for m in value), where, key)


def shared_prefix(chosen, rejected):
    """What two dialogues share up to the last turn that begins in both; what they share of plain text, up to a word."""
    prefix = os.path.commonprefix([chosen, rejected])
    turn = prefix.rfind("\n\nAssistant:")
    return prefix[: turn + len("\n\nAssistant:")] if turn >= 0 else prefix[: prefix.rfind(" ") + 1].rstrip()


def read_reviews(path, inner, folder):
    """({id: snippet}, {id: its ratings (n,)}, [other sentences]) of an archive of the reviews: `inner` is the archive inside, `folder` the
    place of the tables in it. Raises UserError that names table and line."""
    texts, rates = (f"{folder}movieReviewSnippets_{kind}.txt" for kind in ("GroundTruth", "anonDataRatings"))
    others = [f"{folder}{kind}_GroundTruth.txt" for kind in ("amazonReviewSnippets", "nytEditorialSnippets", "tweets")]
    files = unpack(io.BytesIO(unpack(path, [inner], path)[inner]), [texts, rates, *others], path)

    def table(name, columns):
        """(place, first column, last column) of each line that is not blank."""
        text = files[name].decode("utf-8" if "movie" in name else "latin-1", errors="replace")
        for number, line in enumerate(text.split("\n"), 1):
            row, where = line.rstrip("\r").split("\t"), f"{path}: {name}, line {number}"
            if line.strip() and len(row) != columns:
                raise UserError(f"{where}: expected {columns} columns between tabs, found {len(row)}")
            if line.strip():
                yield where, row[0], row[-1]

    def by_number(name, columns):
        """{number: (place, last column)}."""
        rows = {}
        for where, number, last in table(name, columns):
            if not re.fullmatch("[0-9]{1,9}", number) or int(number) in rows:
                raise UserError(f"{where}: expected a number of its own, found {number[:60]!r}")
            rows[int(number)] = where, last
        return rows

    snippets, ratings = by_number(texts, 3), by_number(rates, 4)
    for i, (where, last) in (snippets | ratings).items():
        if i not in snippets or i not in ratings:
            raise UserError(f"{where}: {i} is in only one of the tables of snippets and of ratings")
        given = parse_json(last, where)
        if not isinstance(given, list) or not given or not all(type(r) in (int, float) and -4 <= r <= 4 for r in given):
            raise UserError(f"{where}: expected a list of ratings from -4 to 4")
        ratings[i] = np.array(given)
    return {i: text.strip() for i, (_, text) in snippets.items()}, ratings, [text.strip() for name in others for *_, text in table(name, 3)]


def unpack(file, names, path):
    """{name: bytes} of these files in a gzipped tar archive. Raises UserError, also where they are links, devices or folders, or a bomb."""
    found = {}
    with gzip.open(file) as packed:
        try:
            raw = packed.read(LIMIT + 1)
            if len(raw) > LIMIT:
                raise ValueError(f"it unpacks to over {LIMIT >> 20} MiB")
            with tarfile.open(fileobj=io.BytesIO(raw), mode="r|") as archive:  # as a stream, which a negative size cannot send back
                for member in archive:
                    if member.name in names:
                        if not member.isreg() or member.issparse() or member.size < 0 or member.name in found:
                            raise ValueError(f"{member.name} is not one plain file")
                        found[member.name] = archive.extractfile(member).read()
            missing = [name for name in names if name not in found]
            if missing:
                raise ValueError(f"{missing[0]} is missing")
        except Exception as e:  # broken bytes raise nearly anything in tarfile
            raise UserError(f"{path}: not the archive of the reviews: {str(e)[:200]}") from None
    return found
