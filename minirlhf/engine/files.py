"""Files that are whole or absent, JSON that is not trusted, and which directories hold a finished run."""

import contextlib
import json
import math
import os
import socket
from collections import Counter
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file

from minirlhf.engine.cli import UserError

LIMIT = 2**26  # bytes of a line, of a JSON file, and of what an archive holds


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


def number_of(value, where, key):
    if type(value) not in (int, float) or not abs(value) < 1e300:
        raise UserError(f"{where}: {key}: expected a finite number, found {shown(value)}")
    return float(value)


try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None


@contextlib.contextmanager
def atomic_write(path):
    """Yields a temporary path beside `path` and moves it into place on success: after a crash, too, a file is whole or absent."""
    path = Path(path)
    tmp = path.with_name(f"{path.name}.tmp{os.getpid()}")
    try:
        yield tmp
        sync(tmp)
        os.replace(tmp, path)
        sync(path.parent)
    finally:
        tmp.unlink(missing_ok=True)


def save_tensors(tensors, path, metadata):
    """A safetensors file, whole or not at all. Raises OSError where it cannot be written."""
    with atomic_write(path) as tmp:
        try:
            save_file(tensors, tmp, metadata=metadata)
        except SafetensorError as e:  # a full disk
            raise OSError(f"{path} could not be written ({e})") from None


def sync(path):
    """Waits until a file, or what names a directory has, is on the disk."""
    if os.name == "posix" or Path(path).is_file():
        descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def json_line(row, **options):
    """A dict as JSON, with null for a number that is not one: NaN is no JSON."""
    row = {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}
    return json.dumps(row, ensure_ascii=False, **options) + "\n"


def write_json(path, data):
    with atomic_write(path) as tmp:
        tmp.write_text(json_line(data, indent=2), encoding="utf-8")


def finished(directory):
    """The summary of the run in a directory, or None when no run ended there with its model in place."""
    directory = Path(directory)
    if not (directory / "model" / "model.safetensors").exists() or not (directory / "summary.json").exists():
        return None
    summary = read_json(directory / "summary.json")
    if not isinstance(summary, dict) or "data" not in summary:
        raise UserError(f"{directory}/summary.json: not the summary of a run; delete {directory} to make it again")
    return summary


def lock(directory):
    """A file that this process alone may hold open, until it ends. Raises UserError when another one writes in the directory."""
    file = open(directory / "lock", "a+")  # noqa: SIM115  open as long as the lock
    if fcntl:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            who = file.read().strip()
            raise UserError(f"{directory.parent}: another run is writing here ({who}): wait for it, or give another --out") from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


def cache_directory():
    return Path(os.environ.get("MINIRLHF_CACHE") or Path.home() / ".cache" / "minirlhf")
