"""A model's weights on disk, in the Hugging Face layout: config.json, tokenizer.json, and
model.safetensors, or its shards and the model.safetensors.index.json that names them.

Left out: writing shards, pickled weights.
"""

import json
import re
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file

from minirlhf.engine import parallel, vocabulary
from minirlhf.engine.cli import UserError
from minirlhf.engine.files import (
    MissingFile,
    atomic_write,
    file_errors,
    read_json,
    save_tensors,
    shown,
)

# Hugging Face keeps these as Conv1D, whose weight is the transpose of nn.Linear's.
CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def export(state, prefix):
    """A state dict in Hugging Face's names and orientation, on the CPU of the first process."""
    weights = {}
    for name, w in state.items():
        w = parallel.full(w)
        if not parallel.rank():
            w = w.t() if name.endswith(CONV1D) else w
            weights[prefix + name] = w.contiguous().cpu()
    return weights


def save_directory(directory, config, weights, extra, tokenizer):
    """Writes config.json, tokenizer.json and model.safetensors, by the first process.

    Each file whole or not at all, the weights last. Raises FileError where that cannot be.
    """
    if parallel.rank():
        return
    directory = Path(directory)
    with file_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
    settings = {
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_positions": config.n_ctx,
        "n_ctx": config.n_ctx,
        "n_embd": config.n_embd,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "resid_pdrop": 0.0,
    }
    if tokenizer is not None:
        settings |= {"bos_token_id": tokenizer.eos, "eos_token_id": tokenizer.eos}
        tokenizer.save(directory)
    with atomic_write(directory / "config.json") as tmp:
        tmp.write_text(json.dumps(settings | extra, indent=2) + "\n")
    save_tensors(weights, directory / "model.safetensors", {"format": "pt"})


WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
FIXED = {
    "model_type": "gpt2",
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "tie_word_embeddings": True,
}
SIZES = ("vocab_size", "n_positions", "n_layer", "n_head", "n_embd")
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
CAUSAL_MASKS = (".attn.bias", ".attn.masked_bias")  # old checkpoints store them


def read_directory(source):
    """A directory, or a model on the hub: sizes of GPTConfig, weights as ours are, config.json.

    Raises MissingFile, and UserError for what is no such model, or damaged.
    """
    directory = local_directory(source)
    expect_files(directory)
    raw = read_config(directory)
    weights = read_weights(directory)
    sizes = read_sizes(raw, directory)
    expect_room(sizes, weights, directory)
    weights = {name: w for name, w in weights.items() if not name.endswith(CAUSAL_MASKS)}
    for name, w in weights.items():
        if w.dtype not in FLOATS:
            raise UserError(
                f"{directory}: {name[:60]} is of type {w.dtype}, "
                "expected 16, 32 or 64 bit floating point"
            )
        turned = name.endswith(CONV1D) and w.dim() == 2
        weights[name] = w.t().contiguous().float() if turned else w.float()
    return sizes, weights, raw


def expect_files(directory):
    """Raises UserError where a pickle lies there, MissingFile where no model does."""
    safe = (directory / WEIGHTS).exists() or (directory / INDEX).exists()
    pickled = sorted(path.name for path in directory.glob("pytorch_model*.bin"))
    if pickled and not safe:
        raise UserError(
            f"{directory}: only {pickled[0]} lies here, a pickle, which can run code when "
            "read, so it never is: where you trust it, load it with transformers and save it again "
            "with save_pretrained, which writes model.safetensors"
        )
    for name in ("config.json", INDEX if (directory / INDEX).exists() else WEIGHTS):
        if not (directory / name).is_file():
            raise MissingFile(f"{directory}: not a model directory, {name} is missing")


def read_weights(directory):
    """{name: tensor} of model.safetensors, or where that is not there of the shards in its index.

    Raises UserError where a file is broken, or index and shards do not fit together.
    """
    if (directory / WEIGHTS).exists():
        return read_tensors(directory / WEIGHTS)
    shard_of, total = read_index(directory)
    weights = {}
    for shard in sorted(set(shard_of.values())):
        if not (directory / shard).is_file():
            raise MissingFile(f"{directory}: {shard} is missing, which {INDEX} names")
        for name, w in read_tensors(directory / shard).items():
            if shard_of.get(name) != shard:
                place = shard_of.get(name, "no file")
                problem = f"{shown(name)} lies in {shard}, but {INDEX} has it in {place}"
                raise UserError(f"{directory}: {problem}")
            weights[name] = w
    lost = sorted(shard_of.keys() - weights.keys())
    if lost:
        where = f"is not in {shard_of[lost[0]]}, where {INDEX} has it"
        raise UserError(f"{directory}: {shown(lost[0])} {where} ({len(lost)} such tensors)")
    found = sum(w.nbytes for w in weights.values())
    if total not in (None, found):
        raise UserError(
            f"{directory}: the shards hold {found} bytes, but {INDEX} has total_size {shown(total)}"
        )
    return weights


def read_index(directory):
    """({name of a tensor: its shard}, bytes in all or None) of model.safetensors.index.json.

    Raises UserError for another form, and for a shard that is not a file of this directory.
    """
    path = directory / INDEX
    raw = read_json(path)
    raw = raw if isinstance(raw, dict) else {}
    shard_of, facts = raw.get("weight_map"), raw.get("metadata") or {}
    if not isinstance(shard_of, dict) or not shard_of or not isinstance(facts, dict):
        raise UserError(f"{path}: expected an object with weight_map, the file of each tensor")
    for name, shard in shard_of.items():
        plain = isinstance(shard, str) and shard.endswith(".safetensors")
        if not plain or set("/\\:\0") & set(shard):
            expected = "expected the name of a .safetensors file in this directory"
            raise UserError(f"{path}: {shown(name)} lies in {shown(shard)}: {expected}")
    return shard_of, facts.get("total_size")


def read_tensors(path):
    try:
        return load_file(path)
    except Exception as e:  # broken bytes raise more than SafetensorError
        raise UserError(f"{path.parent}: broken {path.name}: {str(e)[:200]}") from None


def read_sizes(raw, directory):
    """The sizes of GPTConfig in config.json. Raises UserError for another kind of model."""
    sizes = [raw.get(key) for key in SIZES]
    if not all(type(n) is int and 0 < n < 2**31 for n in sizes) or sizes[4] % sizes[3]:
        found = ", ".join(map(shown, sizes))
        raise UserError(
            f"{directory}/config.json: expected positive vocab_size, n_positions, n_layer, n_head, "
            f"and n_embd, a multiple of n_head; found {found}"
        )
    fixed = FIXED | {"n_inner": 4 * raw["n_embd"]}
    for key, expected in fixed.items():
        found = raw.get(key, expected)
        if found != expected and not (key == "n_inner" and found is None):
            raise UserError(
                f"{directory}/config.json: {key} is {shown(found)}, but this GPT-2 has {expected!r}"
            )
    return sizes


def expect_room(sizes, weights, directory):
    """Raises UserError for a model much larger than the file: nothing is allocated for it."""
    vocab, context, layers, _, width = sizes
    rows = vocab + context + layers * (12 * width + 13) + outputs_of(weights)
    if layers > len(weights) or width * rows > 2 * sum(w.numel() for w in weights.values()):
        raise UserError(
            f"{directory}: config.json asks for a larger model than lies there: "
            f"{layers} layers of width {width}"
        )


def read_config(directory):
    """config.json as it is.

    Raises UserError where it is broken, is no object, or counts labels by anything but an int.
    """
    raw = read_json(directory / "config.json")
    if not isinstance(raw, dict) or type(raw.get("num_labels", 1)) is not int:
        raise UserError(
            f"{directory}/config.json: expected an object, and in it a whole number as num_labels"
        )
    return raw


def outputs_of(weights):
    """The outputs of the head of a model that has one; else 0."""
    return weights["score.weight"].shape[:1].numel() if "score.weight" in weights else 0


def local_directory(name):
    """A Path: the directory of that name, or else the model of that name fetched from the hub.

    Raises MissingFile, a FileNotFoundError.
    """
    if Path(name).is_dir():
        return Path(name)
    if not HUB_NAME.fullmatch(str(name)):
        raise MissingFile(f"{name}: no such directory")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise MissingFile(
            f"{name}: no such directory (for a model on the hub: pip install 'minirlhf[hub]')"
        ) from None
    files = ["config.json", WEIGHTS, INDEX, *vocabulary.FILES, *vocabulary.MORE_FILES]
    try:
        directory = Path(snapshot_download(str(name), allow_patterns=files))
        if (directory / INDEX).exists() and not (directory / WEIGHTS).exists():
            shards = sorted(set(read_index(directory)[0].values()))
            directory = Path(snapshot_download(str(name), allow_patterns=[*files, *shards]))
        return directory
    except UserError:
        raise
    except Exception as e:
        raise MissingFile(
            f"{name}: no such directory; asked for a model of that name, the hub said: {e}"
        ) from None


def expect_kind(expected, source, weights):
    """The number of outputs of the head. Raises UserError when another kind of model lies there."""
    outputs = outputs_of(weights)
    found = ("language model", "reward model", "preference model")[min(outputs, 2)]
    if found != expected:
        raise UserError(f"{source}: a {found} lies here, expected a {expected}")
    if found == "preference model" and outputs % 2:
        raise UserError(
            f"{source}: score.weight has {outputs} rows; a preference model has an even number"
        )
    return outputs


def load_strictly(model, weights, source):
    """The model with these weights. Raises UserError that names what does not fit."""
    expected = model.state_dict()
    wrong = [f"{name} is missing" for name in expected.keys() - weights.keys()]
    wrong += [f"{name} is unexpected" for name in weights.keys() - expected.keys()]
    for name in expected.keys() & weights.keys():
        found, shape = tuple(weights[name].shape), tuple(expected[name].shape)
        if found != shape:
            wrong.append(f"{name} has shape {found}, expected {shape}")
    for name, w in weights.items():
        if not w.isfinite().all():
            wrong.append(f"{name} has numbers that are not finite")
    if wrong:
        first = sorted(wrong)[0][:200]
        hint = "they are of another kind of model, or of another version of its code"
        found = f"{first} ({len(wrong)} such problems)"
        raise UserError(f"{source}: weights do not fit: {found}: {hint}")
    model.load_state_dict(weights)
    return model


def cut_vocabulary(model, n):
    """Leaves a GPT, or the one under a head, the first n ids."""
    gpt = getattr(model, "transformer", model)
    rows = gpt.wte.weight.detach()[:n].clone()
    gpt.wte = torch.nn.Embedding.from_pretrained(rows, freeze=False)
    model.config = gpt.config = replace(model.config, vocab_size=n)


def model_directory(path):
    """The model directory of a run, or the directory or hub name as it is."""
    inner = Path(path) / "model"
    return inner if inner.is_dir() else path
