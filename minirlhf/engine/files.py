"""Files that are whole or absent, JSON that is not trusted, and who may write in a directory.

What the system says against reading or writing a file of ours is a FileError: a UserError, which
the scripts print as one line, and an OSError too.
"""

import contextlib
import json
import math
import os
import socket
import weakref
from collections import Counter
from pathlib import Path

from safetensors import SafetensorError

from minirlhf.engine.cli import UserError

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None

LIMIT = 2**26  # bytes of a line, of a JSON file, and of what an archive holds


class FileError(UserError, OSError):
    """A file or directory that cannot be read or written."""


class MissingFile(FileError, FileNotFoundError):
    """A file or directory that is not there."""


@contextlib.contextmanager
def file_errors(where):
    """An OSError of the block becomes a FileError, or a MissingFile, that says where."""
    try:
        yield
    except FileError:
        raise
    except OSError as e:
        kind = MissingFile if isinstance(e, FileNotFoundError) else FileError
        raise kind(f"{where}: {e.strerror or e}") from e


def read_json(path):
    """What a JSON file says.

    Raises FileError where it cannot be read, UserError as in `parse_json` and for one over LIMIT.
    """
    with file_errors(path), open(path, "rb") as file:
        text = file.read(LIMIT + 1)
    if len(text) > LIMIT:
        raise UserError(f"{path}: over {LIMIT >> 20} MiB, which no such file needs")
    return parse_json(text, f"{path} is broken")


def parse_json(text, where):
    """What JSON says, a str or bytes.

    Raises UserError for what is not JSON or too deep, and for a key twice in one object.
    """
    try:
        return json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as e:  # ValueError: not UTF-8, or thousands of digits, too
        raise UserError(f"{where}: not JSON: {e}".replace(": line 1 column", ": column")) from None


def unique(pairs):
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {shown(twice)} twice in one object")
    return found


def shown(value):
    """A value out of JSON, in an error message: its start, or its kind where it may be nested."""
    if isinstance(value, (list, dict)):
        return f"a {type(value).__name__}"
    return json.dumps(value)[:60]


def number_of(value, where, key):
    if type(value) not in (int, float) or not abs(value) < 1e300:
        raise UserError(f"{where}: {key}: expected a finite number, found {shown(value)}")
    return float(value)


@contextlib.contextmanager
def atomic_write(path):
    """Yields a temporary path beside `path` and moves it into place on success.

    So a file is whole or absent after a crash, too. Raises FileError where it cannot be written.
    """
    path = Path(path)
    tmp = path.with_name(f"{path.name}.tmp{os.getpid()}")
    with file_errors(path):
        try:
            yield tmp
            sync(tmp)
            os.replace(tmp, path)
            sync(path.parent)
        finally:
            tmp.unlink(missing_ok=True)


def save_tensors(tensors, path, metadata):
    """A safetensors file, whole or not at all. Raises FileError where it cannot be written."""
    from safetensors.torch import save_file  # with torch, whose import takes seconds

    with atomic_write(path) as tmp:
        try:
            save_file(tensors, tmp, metadata=metadata)
        except SafetensorError as e:  # a full disk
            raise FileError(f"{path} could not be written ({e})") from None


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
    lost = {k: None for k, v in row.items() if isinstance(v, float) and not math.isfinite(v)}
    return json.dumps(row | lost, ensure_ascii=False, **options) + "\n"


def expect_new(path, mark):
    """Raises UserError where a file lies there already whose start does not have our mark."""
    with file_errors(path):
        if not Path(path).exists():
            return
        with open(path, "rb") as file:
            start = file.read(4096)
    if mark.encode() not in start:
        raise UserError(f"{path}: another file lies there, which is left alone: give another name")


def write_json(path, data):
    with atomic_write(path) as tmp:
        tmp.write_text(json_line(data, indent=2), encoding="utf-8")


def write_lines(path, rows):
    """A file of dicts, one a line as JSON."""
    with atomic_write(path) as tmp:
        tmp.write_text("".join(json_line(row) for row in rows), encoding="utf-8")


def read_lines(path):
    """[(place, value)] of a file of JSON, a value a line, as write_lines leaves it.

    Raises FileError where it cannot be read, UserError as in `parse_json`. Lines end where bytes
    say so: texts may hold U+2028 or U+0085, at which Python ends a line of a str.
    """
    with file_errors(path):
        lines = Path(path).read_bytes().splitlines()
    places = [f"{path}:{number}" for number in range(1, len(lines) + 1)]
    return [(place, parse_json(line, place)) for place, line in zip(places, lines, strict=True)]


def finished(directory):
    """The summary of the run in a directory; None where none ended with its model in place.

    It says whether the figures were still to come: `evaluated`. Raises UserError for another file
    of its name.
    """
    directory = Path(directory)
    model, summary = directory / "model" / "model.safetensors", directory / "summary.json"
    with file_errors(directory):
        if not model.exists() or not summary.exists():
            return None
    found = read_json(summary)
    if not isinstance(found, dict) or "data" not in found:
        raise UserError(
            f"{summary}: not the summary of a run: name the model with a flag, or give an --out in "
            "another folder"
        )
    return found if found.get("model_is_final", True) else None


def expect_final(model):
    """Raises UserError where the run of a model directory ended before its model was final."""
    run = Path(model).parent
    try:
        found = read_json(run / "summary.json")
    except UserError:  # none, or a stranger's
        return
    if isinstance(found, dict) and found.get("model_is_final") is False:
        fix = "the command that made it, with --resume, makes up for what is missing"
        raise UserError(f"{run}: its model is not final yet: {fix}")


def figures_of(directory, say=print):
    """The summary of the run in a directory, for figures to stand beside others; {} without one,
    and where it is not ours or broken, which is said."""
    try:
        return finished(directory) or {}
    except UserError as e:
        say(f"note: figures are left out: {e}")
        return {}


def figures_beside(model):
    """As `figures_of`, of the run whose model lies in that directory."""
    return figures_of(Path(model).parent)


class Lock:
    """The right of one run alone to write in a directory, until `close` or the end of the process.

    The system's lock on a file keeps other processes out. Among the runs of one process it does
    not hold, and closing the file anywhere would end it: they look at `held` before they open it.
    Raises UserError where another run has the right.
    """

    held = weakref.WeakValueDictionary()  # {(process, directory): lock}

    def __init__(self, directory):
        self.place = os.getpid(), Path(directory).resolve()
        me = f"process {os.getpid()} on {socket.gethostname()}"
        if self.place in self.held:
            raise taken(directory, me)
        self.file = open(directory / "lock", "a+")  # noqa: SIM115  open as long as the lock
        try:
            if fcntl:
                fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.file.seek(0)
            raise taken(directory, self.file.read().strip()) from None
        self.file.truncate(0)
        self.file.write(f"{me}\n")
        self.file.flush()
        self.held[self.place] = self

    def close(self):
        if self.held.get(self.place) is self:
            del self.held[self.place]
            self.file.close()


def taken(directory, who):
    return UserError(
        f"{directory.parent}: another run is writing here ({who}): "
        "wait for it, or give another --out"
    )


def cache_directory():
    return Path(os.environ.get("MINIRLHF_CACHE") or Path.home() / ".cache" / "minirlhf")
