"""What lies on disk is whole or absent: atomic writes, states to resume from, locks, and which directories hold a finished run.

A state is one safetensors file with JSON in its header: nothing here pickles, and nothing unpickles.
"""

import contextlib
import hashlib
import json
import math
import os
import socket
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from minirlhf import parallel
from minirlhf.records import parse_json, read_json
from minirlhf.runtime import UserError, parameters_of

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


# States


MAY_DIFFER = {"out", "resume", "save_every", "on_nonfinite", "device", "shard", "compile", "micro_batch", "eval_samples"}
MAY_DIFFER |= {"data", "init", "reward"}  # of these the content counts


class State:
    """All that changes in a run's steps, and its files: state/00000120.safetensors is that after 120 steps; the newest two are kept.

    `parts` by name are modules, optimizers, or objects whose attributes are numbers; None is no part. `given` by name are what the run
    starts from and does not change: `fingerprint` tells whether it is still the same.
    """

    def __init__(self, folder, stage, knobs, parts, given):
        self.folder = Path(folder)
        self.parts = {name: part for name, part in parts.items() if part is not None}
        self.origin = {"stage": stage, "knobs": json.loads(json_line(vars(knobs))), "given": {k: fingerprint(x) for k, x in given.items()}}

    def files(self):
        return sorted(self.folder.glob("[0-9]*.safetensors"), reverse=True)

    def tensors(self):
        """All tensors by name, those of sharded models as they are spread."""
        found = {}
        for name, part in self.parts.items():
            if isinstance(part, torch.nn.Module):
                parallel.reshard(part)
                found |= {f"{name}/{key}": p for key, p in part.named_parameters()}
            elif isinstance(part, torch.optim.Optimizer):
                found |= {f"{name}/{i}/{key}": t for i, p in enumerate(parameters_of(part)) for key, t in part.state[p].items()}
        return found

    def save(self, step, **facts):
        """Writes the state after `step` steps, and removes all but the newest two. Raises OSError, and then the older ones stay."""
        tensors = {}
        for name, t in self.tensors().items():
            t = parallel.full(t.detach())
            if not parallel.rank():
                tensors[name] = t.cpu().contiguous()
        if parallel.rank():
            return
        numbers = {name: vars(part) for name, part in self.parts.items() if not hasattr(part, "state_dict")}
        facts |= self.origin | {"step": step, "numbers": numbers, "checksums": {name: checksum(t) for name, t in tensors.items()}}
        text, path = json.dumps(facts), self.folder / f"{step:08d}.safetensors"
        try:
            save_tensors(tensors, path, {"state": text, "checksum": str(zlib.crc32(text.encode()))})
        except OSError as e:
            raise OSError(f"{e}: make room, and go on from the state before it with --resume") from None
        for old in self.files()[2:]:
            old.unlink()

    def load(self, say=print):
        """Puts everything back as in the newest file that is whole, and returns its facts; None without files.

        Says which files are broken. Raises UserError where all are, and where a file is of another run than this one.
        """
        for path in self.files():
            try:
                with safe_open(path, "pt") as file:
                    header = file.metadata() or {}
                    facts = parse_json(header["state"], path)
                    tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dict
                sums = {name: checksum(t) for name, t in tensors.items()}
                if header["checksum"] != str(zlib.crc32(header["state"].encode())) or facts["checksums"] != sums:
                    raise ValueError("checksums differ")
            except (SafetensorError, ValueError, KeyError, TypeError, OSError) as e:
                say(f"{path} is broken ({e}): trying the state before it")
                continue
            self.expect_same(path, facts)
            self.put_back(path, tensors, facts)
            return facts
        if self.files():
            raise UserError(f"--resume: no state in {self.folder} is whole: start anew without --resume")
        return None

    def expect_same(self, path, facts):
        """Raises UserError that says in what the run of these facts is another one."""
        fix = "give what it had, or start anew without --resume"
        if facts["stage"] != self.origin["stage"]:
            raise UserError(f"{path}: a state of stage {facts['stage']}, expected {self.origin['stage']}: give another --out")
        old, new = facts["knobs"], self.origin["knobs"]
        for name in sorted((old.keys() | new.keys()) - MAY_DIFFER):
            if old.get(name) != new.get(name):
                raise UserError(f"{path}: that run had --{name.replace('_', '-')} {old.get(name)}, this one has {new.get(name)}: {fix}")
        for name, print_of in self.origin["given"].items():
            if facts["given"].get(name) != print_of:
                raise UserError(f"{path}: that run had another {name}: {fix}")

    def put_back(self, path, tensors, facts):
        for name, t in tensors.items():  # an optimizer has no tensors before its first step
            part, *index, key = name.split("/")
            if isinstance(self.parts.get(part), torch.optim.Optimizer):
                p = parameters_of(self.parts[part])[int(index[0])]
                self.parts[part].state[p][key] = torch.zeros_like(p) if t.shape == p.shape else torch.zeros_like(t, device=p.device)
        expected = self.tensors()
        for name in sorted(expected.keys() | tensors.keys()):
            found, wanted = (tuple(x[name].shape) if name in x else "nothing" for x in (tensors, expected))
            if found != wanted:
                raise UserError(f"{path}: {name} is {found}, expected {wanted}: the state of a model of another shape; give another --out")
        with torch.no_grad():
            for name, t in expected.items():
                parallel.copy_into(t, tensors[name])
        for name, numbers in facts["numbers"].items():
            vars(self.parts[name]).update(numbers)


def checksum(tensor):
    return zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy())


def fingerprint(x):
    """A short digest of what a run starts from: arrays, in lists or tuples; a model or a function by its path; anything by its repr."""
    digest, path = hashlib.sha256(), str(x) if isinstance(x, (str, Path)) else ""
    for file in (Path(path, "model", "model.safetensors"), Path(path, "model.safetensors"), Path(path.rpartition(":")[0])):
        if path and file.is_file():
            with open(file, "rb") as f:  # the first 16 MB: training changes all weights
                return hashlib.sha256(f.read(1 << 24)).hexdigest()[:16]
    if isinstance(x, (list, tuple)):
        for part in x:
            digest.update(fingerprint(part).encode())
    elif isinstance(x, np.ndarray):
        digest.update(f"{x.dtype} {x.shape}".encode() + x.tobytes())
    else:
        digest.update(repr(x).encode())
    return digest.hexdigest()[:16]
