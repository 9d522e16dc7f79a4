"""What is looked at: a run's policy with its reference and its knobs, or a bare model.

Left out: several references of one run.
"""

import json
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from minirlhf.engine.cli import UserError
from minirlhf.engine.files import FileError, finished, read_json, read_lines
from minirlhf.engine.rows import cut_left
from minirlhf.engine.states import file_of, fingerprint, states_in
from minirlhf.engine.weights import local_directory, model_directory
from minirlhf.gpt import GPT
from minirlhf.tokenizer import Tokenizer, fit_vocabulary, load_tokenizer

STAGES = {"kl_coef": "ppo", "beta": "dpo", "vocab_size": "sft", "level": "rm"}  # by a knob


class Policy(NamedTuple):
    name: str  # as it was given
    stage: str  # ppo, dpo, sft, or "" for a model of no run
    run: Path | None  # None for a model of no run
    knobs: dict  # of config.json, {} for a model of no run
    directory: Path  # of the model
    model: GPT
    tokenizer: Tokenizer
    base: str | None  # where the reference lies
    reference: GPT | None

    def path(self, given):
        """What a knob names: as it is, or from where the run was made."""
        return str(from_its_place(given, self.run, self.knobs))

    def says(self):
        """A line about it."""
        parameters = sum(p.numel() for p in self.model.parameters()) / 1e6
        kinds = {"sft": "base model", "": "model"}
        kind = kinds.get(self.stage, f"policy by {self.stage.upper()}")
        ratios = f"; log-ratios to {self.base}" if self.reference else ""
        return f"{kind} of {parameters:.2f} M parameters{ratios}"


def open_policy(name, device, reference="", loaded=None):
    """The Policy of a run, of a model's directory or of a model on the hub; `reference` in place of
    the run's own base model, or `none`; `loaded` are models by place, for several policies.

    Raises UserError, or MissingFile, for what is none. Prints what is odd.
    """
    run = Path(name)
    knobs = read_knobs(run)
    stage = next((stage for knob, stage in STAGES.items() if knob in knobs), "")
    refuse_rewards(run, stage, name)
    if "rounds" in knobs and not stage:
        raise UserError(f"{name}: rounds of online.iterate: name one's policy, as in {name}/1/ppo")
    if knobs and not (run / "model").is_dir():
        fix = "go on with --resume, and it will have one at its end"
        raise UserError(f"{name}: a run without a model yet, it was stopped or still works: {fix}")
    directory = local_directory(model_directory(name))
    if run.is_dir() and not (directory / "config.json").is_file():
        expected = "expected a run (runs/ppo, say), or a directory with config.json and weights"
        raise UserError(f"{name}: neither a run nor a model: {expected}")
    loaded = {} if loaded is None else loaded
    tokenizer = load_tokenizer(directory)
    model = load_gpt(directory, tokenizer, device, loaded)
    base = reference or base_of(run, stage, knobs)
    base = None if base == "none" else base
    beside = open_reference(name, base, directory, model, tokenizer, loaded, bool(reference))
    if beside and knobs and not reference:
        expect_own(name, run, base)
    return Policy(
        name, stage, run if knobs else None, knobs, directory, model, tokenizer, base, beside
    )


def load_gpt(directory, tokenizer, device, loaded):
    place = Path(directory).resolve()
    if place not in loaded:
        model = GPT.from_pretrained(directory)
        fit_vocabulary(model, tokenizer, directory)
        loaded[place] = model.to(device).eval()
    return loaded[place]


def read_knobs(run):
    """The knobs of a run; {} where none lies there."""
    config = run / "config.json"
    if not config.is_file():
        return {}
    knobs = read_json(config)
    return knobs if isinstance(knobs, dict) and {"out", "seed", "data"} <= knobs.keys() else {}


def refuse_rewards(run, stage, name):
    """Raises UserError where a model lies there that writes nothing."""
    weights = next(filter(Path.is_file, map(run.joinpath, WEIGHTS)), None)
    if stage != "rm" and not (weights and has_score(weights)):
        return
    fix = f"look at a policy beside it: python -m minirlhf.look POLICY --reward {name}"
    raise UserError(f"{name}: a reward or preference model lies here, which writes no text: {fix}")


WEIGHTS = "model/model.safetensors", "model.safetensors"


def has_score(path):
    try:
        with safe_open(path, "pt") as file:
            return "score.weight" in file.keys()  # noqa: SIM118  no dict
    except (SafetensorError, OSError):
        return False  # whoever reads it will say what is wrong


def base_of(run, stage, knobs):
    """Where the model lies that a run started from; None for one of fresh weights and for no
    run."""
    if not knobs or (stage == "sft" and not knobs["init"]):
        return None
    named = knobs.get("reference") or knobs.get("init")
    if named:
        return str(from_its_place(named, run, knobs))
    return str(run.parent / "sft")


def from_its_place(given, run, knobs):
    """A path that a run's knob names, from the directory that the run was started in, which --out
    and the run's place tell; as it is, where nothing lies there."""
    out = Path(knobs.get("out", "")).parts
    place = run.resolve().parts
    if not out or place[-len(out) :] != out:
        return given
    moved = Path(*place[: -len(out)], given)
    elsewhere = moved.exists() and moved.resolve() != Path(given).resolve()
    return moved if elsewhere else given


def open_reference(name, base, directory, model, tokenizer, loaded, must):
    """The model that log-ratios are to; None, and a line why, where there is none to be had."""
    if not base:
        return None
    try:
        other = tokenizer_like(model_directory(base), directory, tokenizer)
        device = model.lm_head_weight.device
        reference = load_gpt(model_directory(base), other, device, loaded)
        same = other.fingerprint() == tokenizer.fingerprint()
    except UserError as e:
        if must:
            raise
        print(f"note: {name} is shown without log-ratios: {e}")
        return None
    if not same or reference.config.n_ctx < model.config.n_ctx:
        problem = f"{base} has another tokenizer or a shorter context than {name}"
        if must:
            raise UserError(f"--reference: {problem}")
        print(f"note: {name} is shown without log-ratios: {problem}")
        return None
    return reference


def tokenizer_like(source, directory, tokenizer):
    """The tokenizer of a model; that of `directory`, which is at hand, where the files are alike:
    to read one takes a tenth of a second."""
    files = [Path(place, "tokenizer.json") for place in (source, directory)]
    if all(file.is_file() for file in files):
        first, second = (file.read_bytes() for file in files)
        if first == second:
            return tokenizer
    return load_tokenizer(source)


def expect_own(name, run, base):
    """Says so where the base model has changed since the run began."""
    known = newest_state(run)[1].get("given", {})
    started = known.get("base model", known.get("init"))
    if started and file_of(base) and started != fingerprint(base):
        print(f"note: {base} is not the base model any more that {name} started from")


def newest_state(run):
    """(path, facts) of the newest state that a run saved; (None, {}) without one."""
    for path in states_in(run / "state"):
        try:
            with safe_open(path, "pt") as file:
                return path, json.loads(file.metadata()["state"])
        except (SafetensorError, OSError, ValueError, KeyError, TypeError):
            continue
    return None, {}


def reward_beside(policy):
    """What scores a run's answers if nothing else is given: the --reward that it had, or the
    reward model beside it that was trained on its data; None."""
    if not policy.run:
        return None
    if policy.knobs.get("reward"):
        return policy.path(policy.knobs["reward"])
    beside = policy.run.parent / "rm"
    summary = finished(beside) or {}
    return str(beside) if summary.get("data") == policy.knobs["data"] else None


def held_out(policies, count):
    """Texts of held-out prompts: those that the first run with any has answered itself.

    Raises UserError where none of them is a run, and where its data are gone.
    """
    runs = [policy for policy in policies if policy.run]
    runs.sort(key=lambda policy: policy.stage == "sft")  # whose own prompts are others
    for policy in runs:
        found = answered(policy.run / "samples.jsonl")
        if found:
            return found[:count]
    if not runs:
        raise UserError("a model of no run has no held-out prompts: give a --prompt, or a run too")
    return from_data(runs[0], count)


def answered(path):
    """The prompts in a run's samples, once each."""
    if not path.is_file():
        return []
    try:
        prompts = [row["prompt"] for _, row in read_lines(path)]
    except FileError:
        raise
    except (UserError, KeyError, TypeError):
        return []
    return list(dict.fromkeys(prompt for prompt in prompts if isinstance(prompt, str)))


def from_data(policy, count):
    import numpy as np

    from minirlhf import data

    feedback = feedback_of(policy)
    rows = data.prompts_of(feedback.test, policy.tokenizer, np.random.default_rng(1))
    return [policy.tokenizer.decode(row) for row in rows[:count]]


def feedback_of(policy):
    """The data of a run, from where it was made. Raises UserError where they are gone."""
    from minirlhf import data

    name = policy.knobs["data"]
    name = policy.path(name) if "." in name else name
    try:
        return data.load_feedback(name)
    except UserError as e:
        raise UserError(f"{policy.name}: its data cannot be read any more: {e}") from None


def prompt_rows(texts, tokenizer, room):
    """Ids `[EOS] prompt` of texts; one that leaves no room for the response loses its left end.
    Returns also how many did."""
    rows, cuts = [], 0
    for text in texts:
        ids = tokenizer.encode(text)
        kept = cut_left(ids, room)
        cuts += len(kept) < len(ids)
        rows.append(torch.tensor([tokenizer.eos, *kept]))
    return rows, cuts
