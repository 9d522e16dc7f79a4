"""States to resume from: a safetensors file with JSON in its header. Nothing is ever unpickled.

state/00000120.safetensors is the state after 120 steps. The newest two are kept; where the newest
is damaged, the one before it serves.
"""

import dataclasses
import hashlib
import json
import re
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from minirlhf.engine import parallel
from minirlhf.engine.cli import UserError
from minirlhf.engine.files import FileError, file_errors, json_line, parse_json, save_tensors

NAME = re.compile(r"\d{8,}\.safetensors")
BEFORE = {"delete_eos": 0.0}  # what runs did that are older than a knob, if not its default


class State:
    """All that changes in a run's steps, and its files.

    `parts` by name are modules, optimizers, or objects whose attributes are numbers; None is no
    part. `given` by name are what the run starts from and does not change: `fingerprint` tells
    whether it is still the same.
    """

    def __init__(self, folder, stage, knobs, parts, given):
        self.folder = Path(folder)
        self.free = {f.name for f in dataclasses.fields(knobs) if f.metadata["free"]}
        self.parts = {name: part for name, part in parts.items() if part is not None}
        fields = [f for f in dataclasses.fields(knobs) if f.default is not dataclasses.MISSING]
        self.defaults = json.loads(json_line({f.name: f.default for f in fields}))
        self.origin = {
            "stage": stage,
            "knobs": json.loads(json_line(vars(knobs))),
            "given": {name: fingerprint(x) for name, x in given.items()},
        }

    def files(self):
        return states_in(self.folder)

    def tensors(self):
        """All tensors by name, those of sharded models as they are spread."""
        found = {}
        for name, part in self.parts.items():
            if isinstance(part, torch.nn.Module):
                parallel.reshard(part)
                found |= {f"{name}/{key}": p for key, p in part.named_parameters()}
            elif isinstance(part, torch.optim.Optimizer):
                for i, p in enumerate(parameters_of(part)):
                    found |= {f"{name}/{i}/{key}": t for key, t in part.state[p].items()}
        return found

    def save(self, step, **facts):
        """Writes the state after `step` steps, and removes all but the newest two.

        Raises FileError where it cannot be written; then the older ones stay.
        """
        tensors = {}
        for name, t in self.tensors().items():
            t = parallel.full(t.detach())
            if not parallel.rank():
                tensors[name] = t.cpu().contiguous()
        if parallel.rank():
            return
        plain = {k: part for k, part in self.parts.items() if not hasattr(part, "state_dict")}
        numbers = {name: vars(part) for name, part in plain.items()}
        sums = {name: checksum(t) for name, t in tensors.items()}
        facts |= self.origin | {"step": step, "numbers": numbers, "checksums": sums}
        text, path = json.dumps(facts), self.folder / f"{step:08d}.safetensors"
        try:
            save_tensors(tensors, path, {"state": text, "checksum": checksum_of(text)})
        except FileError as e:
            fix = "make room, and go on from the state before it with --resume"
            raise FileError(f"{e}: {fix}") from e
        with file_errors(self.folder):
            for old in self.files()[2:]:
                old.unlink()

    def load(self, say=print):
        """Puts everything back as in the newest whole file: its facts, or None without files.

        Says which files are broken. Raises UserError where all are, and where a file is of another
        run than this one.
        """
        for path in self.files():
            try:
                tensors, facts = read_state(path)
            except (SafetensorError, ValueError, KeyError, TypeError, OSError) as e:
                say(f"{path} is broken ({e}): trying the state before it")
                continue
            self.expect_same(path, facts)
            self.put_back(path, tensors, facts)
            return facts
        if self.files():
            raise UserError(
                f"--resume: no state in {self.folder} is whole: start anew without --resume"
            )
        return None

    def expect_same(self, path, facts):
        """Raises UserError that says in what the run of these facts is another one."""
        fix = "give what it had, or start anew without --resume"
        stage, expected = facts["stage"], self.origin["stage"]
        if stage != expected:
            raise UserError(
                f"{path}: a state of stage {stage}, expected {expected}: give another --out"
            )
        old, new = facts["knobs"], self.origin["knobs"]
        for name in sorted((old.keys() | new.keys()) - self.free):
            before = BEFORE.get(name, self.defaults.get(name))  # of a knob that is new since
            had, has = old.get(name, before), new.get(name)
            if had != has:
                flag = "--" + name.replace("_", "-")
                raise UserError(f"{path}: that run had {flag} {had}, this one has {has}: {fix}")
        for name, print_of in self.origin["given"].items():
            if facts["given"].get(name) != print_of:
                raise UserError(f"{path}: that run had another {name}: {fix}")

    def put_back(self, path, tensors, facts):
        self.make_moments(tensors)
        own = self.tensors()
        for name in sorted(own.keys() | tensors.keys()):
            found, expected = shape_of(tensors, name), shape_of(own, name)
            if found != expected:
                raise UserError(
                    f"{path}: {name} is {found}, expected {expected}: "
                    "the state of a model of another shape; give another --out"
                )
        with torch.no_grad():
            for name, t in own.items():
                parallel.copy_into(t, tensors[name])
        for name, numbers in facts["numbers"].items():
            vars(self.parts[name]).update(numbers)

    def make_moments(self, tensors):
        """Room in the optimizers for what was saved of theirs: before their first step is none."""
        for name, t in tensors.items():
            part, *index, key = name.split("/")
            optimizer = self.parts.get(part)
            if not isinstance(optimizer, torch.optim.Optimizer):
                continue
            p = parameters_of(optimizer)[int(index[0])]
            same = t.shape == p.shape  # then also spread over the processes as p is
            empty = torch.zeros_like(p) if same else torch.zeros_like(t, device=p.device)
            optimizer.state[p][key] = empty


def states_in(folder):
    """The files of states, the newest first."""
    found = Path(folder).glob("*.safetensors")
    return sorted((path for path in found if NAME.fullmatch(path.name)), reverse=True)


def parameters_of(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def read_state(path):
    """(tensors, facts) of a file of `State.save`. Raises any of many errors for a broken one."""
    with safe_open(path, "pt") as file:
        header = file.metadata() or {}
        facts = parse_json(header["state"], path)
        names = file.keys()
        tensors = {name: file.get_tensor(name) for name in names}
    sums = {name: checksum(t) for name, t in tensors.items()}
    if header["checksum"] != checksum_of(header["state"]) or facts["checksums"] != sums:
        raise ValueError("checksums differ")
    return tensors, facts


def shape_of(tensors, name):
    return tuple(tensors[name].shape) if name in tensors else "nothing"


def checksum(tensor):
    return zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy())


def checksum_of(text):
    return str(zlib.crc32(text.encode()))


def fingerprint(x):
    """A short digest of what a run starts from.

    Of arrays, in lists or tuples, that of their numbers; of a model or a function by its path, that
    of its file; of anything else, that of its repr.
    """
    file = file_of(x)
    if file:
        with file_errors(file), open(file, "rb") as f:
            start = f.read(1 << 24)  # 16 MB: training changes all weights
        return hashlib.sha256(start).hexdigest()[:16]
    digest = hashlib.sha256()
    if isinstance(x, (list, tuple)):
        for part in x:
            digest.update(fingerprint(part).encode())
    elif isinstance(x, np.ndarray):
        digest.update(f"{x.dtype} {x.shape}".encode() + x.tobytes())
    else:
        digest.update(repr(x).encode())
    return digest.hexdigest()[:16]


def file_of(x):
    """The file that says what x is, the path of a run or a model, or FILE:FUNCTION; else None."""
    path = str(x) if isinstance(x, (str, Path)) else ""
    if not path:
        return None
    own = Path(path, "model", "model.safetensors")
    weights = Path(path, "model.safetensors")
    shards = sorted(Path(path).glob("model-*.safetensors"))[:1]
    script = Path(path.rpartition(":")[0])
    return next((file for file in (own, weights, *shards, script) if file.is_file()), None)
