"""The archive of the reviews, read in memory: nothing of it is unpacked to the disk."""

import gzip
import io
import re
import tarfile

import numpy as np

from minirlhf.engine.cli import UserError
from minirlhf.engine.files import LIMIT, parse_json

OTHERS = "amazonReviewSnippets", "nytEditorialSnippets", "tweets"


def read_reviews(path, inner, folder):
    """({id: snippet}, {id: its ratings (n,)}, [other sentences], [their ratings]) of an archive of
    the reviews.

    `inner` is the archive inside it, `folder` the place of the tables in that one. Raises
    UserError that names table and line.
    """
    kinds = ["movieReviewSnippets", *OTHERS]
    texts, *others = [f"{folder}{kind}_GroundTruth.txt" for kind in kinds]
    rates, *other_rates = [f"{folder}{kind}_anonDataRatings.txt" for kind in kinds]
    inside = unpack(path, [inner], path)[inner]
    names = [texts, rates, *others, *other_rates]
    files = unpack(io.BytesIO(inside), names, path)
    texts_of = by_number(table(files[texts], 3, f"{path}: {texts}"))
    ratings_of = by_number(table(files[rates], 4, f"{path}: {rates}"))
    snippets, ratings = {}, {}
    for i, (where, last) in (texts_of | ratings_of).items():
        if i not in texts_of or i not in ratings_of:
            raise UserError(f"{where}: {i} is in only one of the tables of snippets and of ratings")
        snippets[i] = texts_of[i][1].strip()
        ratings[i] = parse_ratings(last, where)
    sentences, given = [], []
    for name, rated in zip(others, other_rates, strict=True):
        said = table(files[rated], 4, f"{path}: {rated}", encoding="utf-8-sig")
        found = {number: parse_ratings(last, where) for where, number, last in said}
        for where, number, text in table(files[name], 3, f"{path}: {name}", encoding="latin-1"):
            if number not in found:
                raise UserError(f"{where}: {number} has no ratings in {rated}")
            sentences.append(text.strip())
            given.append(found[number])
    return snippets, ratings, sentences, given


def table(content, columns, where, encoding="utf-8"):
    """Yields (place, first column, last column) of each line that is not blank."""
    text = content.decode(encoding, errors="replace")
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        row = line.rstrip("\r").split("\t")
        place = f"{where}, line {number}"
        if len(row) != columns:
            raise UserError(f"{place}: expected {columns} columns between tabs, found {len(row)}")
        yield place, row[0], row[-1]


def by_number(rows):
    """{number in the first column: (place, last column)}."""
    found = {}
    for place, number, last in rows:
        if not re.fullmatch("[0-9]{1,9}", number) or int(number) in found:
            raise UserError(f"{place}: expected a number of its own, found {number[:60]!r}")
        found[int(number)] = place, last
    return found


def parse_ratings(text, where):
    given = parse_json(text, where)
    whole = isinstance(given, list) and len(given) > 0
    if not whole or not all(type(r) in (int, float) and -4 <= r <= 4 for r in given):
        raise UserError(f"{where}: expected a list of ratings from -4 to 4")
    return np.array(given)


def unpack(file, names, path):
    """{name: bytes} of these files in a gzipped tar archive, which `path` names in messages.

    Raises UserError, also where they are links, devices or folders, or a bomb.
    """
    with gzip.open(file) as packed:
        try:
            raw = packed.read(LIMIT + 1)
            if len(raw) > LIMIT:
                raise ValueError(f"it unpacks to over {LIMIT >> 20} MiB")
            return members(raw, names)
        except Exception as e:  # broken bytes raise nearly anything in tarfile
            message = f"{path}: not the archive of the reviews: {str(e)[:200]}"
            raise UserError(message) from None


def members(raw, names):
    """{name: bytes} of these files in a tar archive. Raises ValueError."""
    found = {}
    # as a stream, which a negative size cannot send back
    with tarfile.open(fileobj=io.BytesIO(raw), mode="r|") as archive:
        for member in archive:
            if member.name not in names:
                continue
            plain = member.isreg() and not member.issparse() and member.size >= 0
            if not plain or member.name in found:
                raise ValueError(f"{member.name} is not one plain file")
            found[member.name] = archive.extractfile(member).read()
    for name in names:
        if name not in found:
            raise ValueError(f"{name} is missing")
    return found
