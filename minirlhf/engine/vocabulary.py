"""A byte-level BPE vocabulary as it is found: tokenizer.json, or vocab.json with merges.txt.

Read is what gives the same ids for the same text as its owner's program, all else is refused by
name: other models than BPE, other splits of a text into words, normalisation, added words. EOS may
have any id. Special tokens added behind all others ([PAD], say) are named, and no text gives them.
"""

import json
from itertools import pairwise
from typing import NamedTuple

from minirlhf.engine.cli import UserError
from minirlhf.engine.files import MissingFile, file_errors, read_json

EOS = "<|endoftext|>"
FILES = ("tokenizer.json", "vocab.json", "merges.txt")
MORE_FILES = ("added_tokens.json", "tokenizer_config.json")  # read where they are there

# GPT-2's order of the bytes: the printable ones first; the others are written as U+0100 and on.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
OTHERS = [b for b in range(256) if b not in PRINTABLE]
BYTES = PRINTABLE + OTHERS
BYTE_TO_CHAR = {b: chr(b) for b in PRINTABLE} | {b: chr(256 + i) for i, b in enumerate(OTHERS)}
CHAR_TO_BYTE = {c: b for b, c in BYTE_TO_CHAR.items()}


class Vocabulary(NamedTuple):
    ranks: dict  # {bytes: id} without EOS; longer ones in the order of their merges
    eos: int
    added: list  # names of the special tokens behind all of these


def lies_in(directory):
    """Whether a directory has a tokenizer, or part of one."""
    return any((directory / name).exists() for name in FILES)


def read_vocabulary(directory):
    """The Vocabulary of a directory. tokenizer.json comes first where both forms are there.

    Raises MissingFile where there is none, UserError for another kind of tokenizer.
    """
    path = directory / FILES[0]
    if not path.exists() and lies_in(directory):
        path = directory / "vocab.json"
    if not path.is_file():
        expected = "expected `gpt2`, or a directory with tokenizer.json or vocab.json"
        raise MissingFile(f"{path}: no tokenizer there ({expected})")
    content = read_json(path)
    try:
        expect_no_prefix(directory)
        if path.name == "vocab.json":
            vocab = expect_object(content, "vocab.json")
            return vocabulary(vocab, read_merges(directory), read_added(directory))
        return of_tokenizer_json(content)
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        message = f"{path}: not a byte-level BPE tokenizer ({type(e).__name__}: {e})"
        raise UserError(message[:400]) from None


def expect_no_prefix(directory):
    """tokenizer_config.json may ask for a space before each text, which changes its first token."""
    path = directory / "tokenizer_config.json"
    settings = expect_object(read_json(path), path.name) if path.exists() else {}
    if settings.get("add_prefix_space"):
        raise ValueError(f"{path.name} has add_prefix_space")


def expect_object(content, name):
    if not isinstance(content, dict):
        raise TypeError(f"{name} is not an object")
    return content


def read_merges(directory):
    path = directory / "merges.txt"
    with file_errors(path):
        lines = path.read_text(encoding="utf-8").split("\n")
    lines = [line.removesuffix("\r") for line in lines]
    return [line for line in lines if line and not line.startswith("#version")]


def read_added(directory):
    """{name: id} of tokens that were added to vocab.json, all of which count as special."""
    path = directory / "added_tokens.json"
    return expect_object(read_json(path), path.name) if path.exists() else {}


def of_tokenizer_json(content):
    model = content["model"]
    vocab = expect_object(model["vocab"], "vocab")
    if model["type"] != "BPE" or content.get("normalizer"):
        raise ValueError(f"model type {model['type']}, normalizer {content.get('normalizer')}")
    words = content["pre_tokenizer"] or {}
    known = words.get("type") == "ByteLevel" and not words["add_prefix_space"]
    if not known or not words.get("use_regex", True):
        raise ValueError(f"pre_tokenizer {words}")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise ValueError(f"{key} {model[key]}")
    added = {}
    for token in content.get("added_tokens") or []:
        name = token["content"]
        if not token["special"] and name != EOS:
            raise ValueError(f"the added token {name!r} is not special, but a word of its own")
        added[name] = token["id"]
    return vocabulary(vocab, model.get("merges", []), added)


def vocabulary(vocab, merges, added):
    """The Vocabulary of {written token: id}, merges ("a b" or [a, b]) and {special token: id}.

    Raises ValueError, KeyError or TypeError where that is another kind.
    """
    for name, i in added.items():
        if vocab.get(name, i) != i:
            raise ValueError(f"two ids of {name}: {vocab[name]} and {i}")
    special = vocab | added
    if EOS not in special:
        others = ", ".join(map(repr, added)) or "no special token"
        raise ValueError(f"no token {EOS}, but {others}")
    eos = special[EOS]
    behind = {name: i for name, i in added.items() if name != EOS}
    words = {token: i for token, i in vocab.items() if token != EOS and token not in behind}
    expect_ids(words, eos, behind)
    if {token for token in words if len(token) < 2} != CHAR_TO_BYTE.keys():
        raise KeyError("expected a token for each of the 256 bytes")
    ranks = {}
    for token in sorted(words, key=words.get):
        ranks[bytes(CHAR_TO_BYTE[c] for c in token)] = words[token]
    expect_merges(ranks, merges)
    return Vocabulary(ranks, eos, list(behind))


def expect_ids(words, eos, behind):
    """Raises ValueError where the ids of words and EOS are not 0, 1, 2 and so on, and those of
    other special tokens behind them."""
    ids = [*words.values(), eos]
    if set(map(type, [*ids, *behind.values()])) != {int}:
        raise ValueError("expected whole numbers as ids")
    expected = set(range(len(ids)))
    holes = expected - set(ids)
    names = {i: repr(name) for name, i in behind.items()}
    wrong = sorted(holes | (expected & names.keys()))
    if wrong:
        who = names.get(wrong[0], "no token")
        there = f"expected words and {EOS} at the ids 0 to {len(ids) - 1}, and other tokens behind"
        raise ValueError(f"{there}: id {wrong[0]} is that of {who}")


def expect_merges(ranks, merges):
    """Raises ValueError where the merges do not make the longer tokens in the order of their ids,
    each of what is left of it by the merges before."""
    longer = [token for token in ranks if len(token) > 1]
    pairs = [m.split(" ") if isinstance(m, str) else m for m in merges]
    if len(pairs) != len(longer):
        raise ValueError(f"{len(pairs)} merges of {len(longer)} longer tokens")
    for pair, token in zip(pairs, longer, strict=True):
        if pair != list(map(written, split(ranks, token))):
            expected = "expected a merge of two tokens for each longer token, in the order of ids"
            raise ValueError(f"{expected}; found {str(pair)[:60]} for {written(token)[:60]!r}")


def split(ranks, token):
    """The two parts whose merge made `token`: what BPE leaves of it with the merges before."""
    parts = [bytes([b]) for b in token]
    none = len(ranks) + 1  # EOS is no merge, so no id is that large
    while len(parts) > 2:
        found = [ranks.get(a + b, none) for a, b in pairwise(parts)]
        i = found.index(min(found))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def written(token):
    """Bytes as the characters that stand for them in these files."""
    return "".join(BYTE_TO_CHAR[b] for b in token)


def as_tokenizer_json(ranks, eos):
    """The text of a tokenizer.json for transformers and tokenizers."""
    vocab = {written(token): i for token, i in ranks.items()}
    longer = [token for token in ranks if len(token) > 1]
    longer.sort(key=ranks.get)
    merges = [" ".join(map(written, split(ranks, token))) for token in longer]
    added = {"id": eos, "content": EOS, "special": True}
    added |= dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False}
    byte_level |= {"trim_offsets": True, "use_regex": True}
    content = {"version": "1.0", "added_tokens": [added]}
    content |= {"pre_tokenizer": byte_level, "decoder": byte_level}
    content["model"] = {"type": "BPE", "vocab": vocab | {EOS: eos}, "merges": merges}
    return json.dumps(content, ensure_ascii=False)
