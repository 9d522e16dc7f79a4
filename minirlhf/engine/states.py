"""States to resume from: one safetensors file with JSON in its header; nothing pickles, and nothing unpickles."""

import dataclasses
import hashlib
import json
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from minirlhf.engine import parallel
from minirlhf.engine.cli import UserError
from minirlhf.engine.files import json_line, parse_json, save_tensors
from minirlhf.engine.optim import parameters_of


class State:
    """All that changes in a run's steps, and its files: state/00000120.safetensors is that after 120 steps; the newest two are kept.

    `parts` by name are modules, optimizers, or objects whose attributes are numbers; None is no part. `given` by name are what the run
    starts from and does not change: `fingerprint` tells whether it is still the same.
    """

    def __init__(self, folder, stage, knobs, parts, given):
        self.folder = Path(folder)
        self.free = {f.name for f in dataclasses.fields(knobs) if f.metadata["free"]}
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
        for name in sorted((old.keys() | new.keys()) - self.free):
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
