"""Forms of files: JSONL, a JSON array, gzip, zstd, CSV, parquet, or a folder of them: entries.

Files may come from strangers: sizes are bounded, and nothing is executed or written.

Left out: other encodings than UTF-8, streaming from storage.
"""

import csv
import gzip
import io
import re
import zlib
from decimal import Decimal
from pathlib import Path

from minirlhf.engine.cli import UserError
from minirlhf.engine.files import LIMIT, parse_json

TEXT = (".jsonl", ".json", ".csv")
SUFFIXES = (".parquet", *(text + packed for text in TEXT for packed in ("", ".gz", ".zst")))
NUMBERS = ("rating", "score", "margin")  # columns of a CSV file that are not text
WORDS = {"true": True, "false": False, "1": True, "0": False}


def can_read(path):
    return Path(path).is_dir() or str(path).endswith(SUFFIXES)


def form_of(path):
    """What the form of a file is called."""
    if path.is_dir():
        return f"a folder of {len(files_in(path)[0])} files"
    return next(ending for ending in reversed(SUFFIXES) if path.name.endswith(ending))[1:]


def entries(path):
    """Yields (place, entry) of each entry of a file, or of the files in a folder.

    Raises UserError that names the place: also for a line over LIMIT, and a decompression bomb.
    """
    path = Path(path)
    files, others = files_in(path) if path.is_dir() else ([path], [])
    if others:
        print(f"{path}: not read: {', '.join(others[:5])}{' ...' if others[5:] else ''}")
    for file in files:
        try:
            yield from entries_of(file)
        except FileNotFoundError:
            raise UserError(f"{file}: no such file") from None
        except (OSError, zlib.error, EOFError) as e:
            packed = {".gz": " as gzip", ".zst": " as zstd"}.get(file.suffix, "")
            raise UserError(f"{file}: not readable{packed}: {e}") from None


def files_in(folder):
    """(the files of a folder that can be read, by name; the names of what else lies there)."""
    inside = sorted(p for p in folder.rglob("*") if p.is_file())
    visible = [p for p in inside if "/." not in f"/{p.relative_to(folder).as_posix()}"]
    files = [p for p in visible if p.name.endswith(SUFFIXES)]
    others = [p.name for p in visible if p not in files]
    if not files:
        raise UserError(f"{folder}: no file ending in {', '.join(SUFFIXES)} lies there")
    return files, others


def entries_of(path):
    if path.name.endswith(".parquet"):
        return parquet(path)
    if path.name.endswith((".csv", ".csv.gz", ".csv.zst")):
        return table(path)
    return objects(path)


# JSON


def objects(path):
    """Entries of JSONL, or of one JSON array."""
    lines = list(read_lines(path))
    if lines and lines[0][1].lstrip().startswith("["):
        said = dict(lines)
        text = "\n".join(said.get(n, "") for n in range(1, lines[-1][0] + 1))
        for i, entry in enumerate(parse_json(text, str(path)), 1):
            yield f"{path}, record {i}", entry
        return
    for number, line in lines:
        where = f"{path}, line {number}"
        try:
            entry = parse_json(line, where)
        except UserError as e:
            if number == lines[0][0] and line.strip() == "{":
                expected = "expected one object a line, or a JSON array of them"
                raise UserError(f"{where}: an object over several lines; {expected}") from None
            raise e
        yield where, entry


def read_lines(path):
    """Yields (number, text) of each line that is not blank, whatever ends it."""
    number = 0
    with opened(path) as file:
        for _, packed in numbered_lines(file, path):
            for line in packed.splitlines():  # at CR alone, too, which JSON has in no text
                number += 1
                text = decoded(line, f"{path}, line {number}", "utf-8-sig")
                if text.strip():
                    yield number, text


def decoded(line, where, encoding):
    try:
        return line.decode(encoding)
    except UnicodeDecodeError as e:
        raise UserError(f"{where}: not UTF-8: {e}") from None


def opened(path):
    """A file of bytes, unpacked as its name says."""
    if path.suffix == ".gz":
        return gzip.open(path, "rb")
    if path.suffix == ".zst":
        return open_zstd(path)
    return open(path, "rb")


def open_zstd(path):
    try:
        from compression import zstd  # Python 3.14

        return zstd.open(path, "rb")
    except ImportError:
        pass
    try:
        from pyarrow import CompressedInputStream

        return io.BufferedReader(CompressedInputStream(str(path), "zstd"))
    except ImportError:
        need = "needs Python 3.14 or an extra: pip install 'minirlhf[data]'"
        raise UserError(f"{path}: {need}") from None


def numbered_lines(file, path):
    """Yields (number, bytes) of each line of an open file, of which it reads LIMIT at most."""
    room = max(LIMIT, 200 * path.stat().st_size)  # text is packed 3 to 10 times, a bomb 1,000 times
    lines = iter(lambda: file.readline(LIMIT + 1), b"")
    for number, line in enumerate(lines, 1):
        where = f"{path}, line {number}"
        room -= len(line)
        if len(line) > LIMIT:
            size = f"{LIMIT >> 20} MiB"
            raise UserError(f"{where}: a line of over {size}; expected one record a line")
        if room < 0:
            expected = "expected records"
            raise UserError(f"{where}: unpacks to over 200 times the file's size; {expected}")
        yield number, line


# Tables


def table(path):
    """Entries of a CSV file with a line of names; an empty cell is nothing said."""
    text = "".join(line for _, line in read_lines_with_blanks(path))
    csv.field_size_limit(LIMIT)
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        names = next(rows, [])
        if len(set(names)) < len(names) or not all(names):
            raise UserError(f"{path}, line 1: expected names of columns, each once")
        for row in rows:
            where = f"{path}, line {rows.line_num}"
            if row and len(row) != len(names):
                raise UserError(f"{where}: {len(row)} cells, expected {len(names)}")
            if row:
                yield where, {n: cell(n, c, where) for n, c in zip(names, row, strict=True)}
    except csv.Error as e:
        raise UserError(f"{path}, line {rows.line_num}: not CSV: {e}") from None


def read_lines_with_blanks(path):
    """As read_lines; a blank line may be part of a cell."""
    with opened(path) as file:
        for number, line in numbered_lines(file, path):
            encoding = "utf-8-sig" if number == 1 else "utf-8"
            yield number, decoded(line, f"{path}, line {number}", encoding)


def cell(name, text, where):
    """What a cell says: numbers and labels are read, texts stay, lists are JSON."""
    if text == "":
        return None
    if name == "label":
        return WORDS.get(text.lower(), text)
    if name in NUMBERS:
        if not re.fullmatch(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*", text, re.ASCII):
            raise UserError(f"{where}: {name}: expected a number, found {text[:60]!r}")
        return float(text)
    return structured(name, text)


def structured(name, text):
    """A text, or what it says as JSON where that is a list of turns, of responses or a ranking."""
    if not text.startswith(("[", "{")):
        return text
    try:
        value = parse_json(text, name)
    except UserError:
        return text
    turns = value if isinstance(value, list) else [value]
    said = turns and all(isinstance(t, dict) and {"role", "from"} & t.keys() for t in turns)
    return value if said or name in ("responses", "completions", "ranking") else text


def parquet(path):
    """Entries of a parquet file, whose rows are numbered from 1."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path}: needs an extra: pip install 'minirlhf[data]'") from None
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(1024, use_threads=False):
                for entry in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", as_json(entry)
    except FileNotFoundError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError) as e:
        reason = " ".join(str(e).split())[:200]
        raise UserError(f"{path}: not readable as parquet: {reason}") from None


def as_json(value):
    """A value of a table in the types of JSON: bytes that are UTF-8 as text, dates as text."""
    if isinstance(value, dict):
        return {key: as_json(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(part) for part in value]
    if isinstance(value, Decimal):
        return float(value)
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="backslashreplace")
    return value if value is None or isinstance(value, (str, bool, int, float)) else str(value)
