"""Where a run may write: a directory that is new, empty, or an older run's.

An older run is told by its config.json: `MARK` says of which stage, and where it is not there, as
in runs of before, the knobs that every run has. Nothing else is written to or deleted, and no link
is followed in it.
"""

import os
import re
from pathlib import Path

from minirlhf.engine.cli import UserError
from minirlhf.engine.files import expect_final, file_errors, read_json
from minirlhf.engine.weights import expect_files, local_directory, model_directory

MARK = "minirlhf"  # the key of config.json that names the stage
KNOBS = {"out", "seed", "save_every", "on_nonfinite"}  # of every run, in config.json

STARTED = r"config\.json\.tmp\d+"

# What a run leaves, by folder; of these an older run's are replaced or deleted
METRICS = r"(metrics|samples|nonfinite-step-\d+-\d+)\.jsonl|summary\.json|curves\.png"
FILES = {"": rf"config\.json|{METRICS}", "state": r"\d{8,}\.safetensors|lock",
         "model": r"(config|tokenizer)\.json|model\.safetensors"}  # fmt: skip


def look_ahead(out, starts, beside, models):
    """Raises UserError for what will not do, before anything is made.

    `starts` are names of what a run starts from, of which some are files; folders `beside` `out`
    hold what other runs left or will leave; `models` are given, and must be there. "" is none.
    """
    for name in filter(None, models):
        model = local_directory(model_directory(name))
        expect_files(model)
        expect_final(model)
    folders = [Path(out).parent / name for name in beside]
    for folder in folders:
        expect_place(folder)
    expect_place(out, existing(*starts) + folders)


def expect_place(out, sources=()):
    """Raises UserError where a run must not write to `out`; nothing there is touched.

    `sources` are the paths of what it starts from.
    """
    out = Path(out)
    for source in sources:
        if source.resolve().is_relative_to(out.resolve()):
            raise UserError(
                f"--out {out}: what this run starts from lies there ({source}); give another folder"
            )
    with file_errors(f"--out {out}"):
        expect_room(out)
        if not out.is_dir():
            return
        if any(out.iterdir()) and not is_run(out) and not is_start_of_run(out):
            raise UserError(
                f"--out {out}: not empty, and no run of ours, so nothing in it is touched; give a "
                "new or an empty folder"
            )
        for path in [out / "state", out / "model", *ours(out)]:
            if path.is_symlink():
                raise UserError(f"{path} is a link, and a run follows none: give another --out")


def existing(*names):
    """The paths behind names of files, directories, or FILE:NAME, as far as there are any."""
    found = []
    for name in filter(None, names):
        paths = Path(name), Path(name.rpartition(":")[0])
        found += [path for path in paths if path.parts and path.exists()]
    return found


def expect_room(out):
    """Raises UserError where `out` is no directory and none can be made, or none to write in."""
    there = next(path for path in [out, *out.absolute().parents] if os.path.lexists(path))
    if not there.is_dir():
        what = "a file, not a directory" if there == out else f"{there} is a file"
        raise UserError(f"--out {out}: {what}")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"--out {out}: no right to write in {there}")


def is_run(out):
    config = out / "config.json"
    if not config.is_file() or config.is_symlink():
        return False
    try:
        knobs = read_json(config)
    except UserError:
        return False
    return isinstance(knobs, dict) and (MARK in knobs or knobs.keys() >= KNOBS)


def is_start_of_run(out):
    """Whether there is nothing but what a run makes before its config.json."""
    state = out / "state"
    first = [path for path in out.iterdir() if not re.fullmatch(STARTED, path.name)]
    if first != [state] or not state.is_dir():
        return not first
    return all(path.name == "lock" for path in state.iterdir())


def ours(out, names=FILES, ending=""):
    """The files of a run in its directory: those by whose name it was written, with an ending."""
    found = []
    for folder, pattern in names.items():
        place = out / folder
        if place.is_dir() and not (folder and place.is_symlink()):
            name = re.compile(f"({pattern}){ending}")
            files = [path for path in place.iterdir() if name.fullmatch(path.name)]
            found += [path for path in sorted(files) if path.is_symlink() or path.is_file()]
    return found


def remove_started(out):
    """What a killed run was writing."""
    for path in ours(out, ending=r"\.tmp\d+"):
        path.unlink()


def remove_run(out):
    """What an older run left, the summary before all, but for its model and its lock."""
    (out / "summary.json").unlink(missing_ok=True)
    for path in ours(out, {"": METRICS, "state": r"\d{8,}\.safetensors"}):
        path.unlink()
