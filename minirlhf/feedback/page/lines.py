"""A JSONL file that grows and shrinks at its end, and is on the disk when a method returns.

A process that is killed leaves every line whole but the last, which can be a part of one only while
it was being written, before anybody was told that it is there; the next start cuts it off. Where
the system has locks, no second process writes in it meanwhile.
"""

import json
import os
from pathlib import Path

from minirlhf.engine.cli import UserError
from minirlhf.engine.files import FileError, file_errors, parse_json, sync

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None


class Lines:
    """The objects of a JSONL file, in `entries`. Raises UserError where one is broken, FileError
    where the file cannot be read or written."""

    def __init__(self, path):
        self.path = Path(path)
        with file_errors(path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = open(path, "a+b", buffering=0)  # noqa: SIM115  open as long as its lock
            self.lock()
            sync(self.path.parent)
        self.entries, self.starts, self.end = [], [], 0
        self.read()

    def lock(self):
        try:
            if fcntl:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.file.close()
            taken = "another process writes there: end it, or give another --out"
            raise UserError(f"{self.path}: {taken}") from None

    def read(self):
        self.file.seek(0)
        *lines, rest = self.file.read().split(b"\n")
        for number, line in enumerate(lines, 1):
            self.entries.append(parse_json(line, f"{self.path}:{number}"))
            self.starts.append(self.end)
            self.end += len(line) + 1
        if rest:
            print(f"{self.path}: its last line was not written to its end, and is cut off")
            self.cut(self.end)

    def append(self, entry):
        raw = json.dumps(entry).encode() + b"\n"
        try:
            with file_errors(self.path):
                if self.file.write(raw) < len(raw):
                    raise FileError(f"{self.path}: the disk is full")
                os.fsync(self.file.fileno())
        except FileError:
            self.cut(self.end)
            raise
        self.entries.append(entry)
        self.starts.append(self.end)
        self.end += len(raw)

    def pop(self):
        """Takes the last line away, and returns its object."""
        self.cut(self.starts[-1])
        self.end = self.starts.pop()
        return self.entries.pop()

    def cut(self, size):
        with file_errors(self.path):
            self.file.truncate(size)
            os.fsync(self.file.fileno())

    def close(self):
        self.file.close()
