"""What lies on disk is whole or absent: atomic writes, and which run directories hold a finished run.

Left out, so far: the state of an interrupted run, to resume from.
"""

import contextlib
import json
import math
import os
from pathlib import Path


@contextlib.contextmanager
def atomic_write(path):
    """Yields a temporary path beside `path` and moves it into place on success: a file is whole or absent."""
    tmp = Path(f"{path}.tmp{os.getpid()}")
    try:
        yield tmp
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)


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
    return json.loads((directory / "summary.json").read_text())
