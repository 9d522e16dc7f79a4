"""The archive of the reviews."""

import gzip
import io
import re
import tarfile

import numpy as np

from minirlhf.engine.cli import UserError
from minirlhf.engine.files import LIMIT, parse_json


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
