"""Byte-level BPE: GPT-2's own vocabulary by name, or one trained here on a corpus; both served by tiktoken.

A vocabulary is 256 bytes, merges in the order they were learned, and EOS as the last id, as in GPT-2. It is saved as a
`tokenizer.json` of the Hugging Face layout. No text ever encodes to EOS: it is added by number. `pad` is the id of the byte
0xFF, which no UTF-8 text holds, so padding needs no place in the vocabulary.

Left out: other split patterns, normalisation, special tokens beyond EOS.
"""

import heapq
import json
from collections import Counter, defaultdict
from pathlib import Path

import regex  # comes with tiktoken
import tiktoken

from minirlhf.engine.cli import UserError
from minirlhf.engine.files import atomic_write, read_json

EOS = "<|endoftext|>"
from minirlhf.engine.weights import local_directory

# GPT-2's split of a text into words: a merge never crosses these.
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


# GPT-2's order of the bytes: the printable ones first. The others are written as characters from 256 on.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]


BYTES = PRINTABLE + [b for b in range(256) if b not in PRINTABLE]


BYTE_TO_CHAR = {b: chr(b if i < len(PRINTABLE) else 256 + i - len(PRINTABLE)) for i, b in enumerate(BYTES)}


CHAR_TO_BYTE = {c: b for b, c in BYTE_TO_CHAR.items()}


class Tokenizer:
    """`encode(text) -> ids`, `decode(ids) -> text`; `eos`, `pad` and `vocab_size` are ints."""

    def __init__(self, ranks, name="trained"):
        """ranks: {bytes: id}, ids 0..len-1 in merge order; EOS is added after them."""
        self.ranks, self.eos, self.vocab_size, self.pad = ranks, len(ranks), len(ranks) + 1, ranks[b"\xff"]
        self.encoding = tiktoken.Encoding(
            name, pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={EOS: self.eos}
        )

    def encode(self, text):
        if len(text) < 900_000:
            return self.encoding.encode_ordinary(text)
        # tiktoken panics at a million white spaces in a row
        return [i for word in regex.findall(PATTERN, text) for i in self.encoding._encode_single_piece(word)]

    def decode(self, ids):
        """Text of the ids, without EOS; bytes that are not UTF-8 become U+FFFD."""
        return self.encoding.decode([i for i in ids if i != self.eos], errors="replace")

    @classmethod
    def train(cls, texts, vocab_size):
        """Learns `vocab_size` - 257 merges, or as many as there are pairs, on an iterable of texts."""
        if vocab_size < 257:
            raise UserError(f"vocabulary of {vocab_size}: expected at least 257, the bytes and EOS")
        return cls(train_ranks(texts, vocab_size - 1))

    @classmethod
    def load(cls, name_or_directory):
        """`gpt2` by name, or the `tokenizer.json` of a directory.

        Raises FileNotFoundError without the file, OSError when GPT-2's vocabulary cannot be had, ValueError for another
        kind of tokenizer.
        """
        path = Path(name_or_directory) / "tokenizer.json"
        if str(name_or_directory) == "gpt2" and not path.exists():
            try:
                return cls(tiktoken.get_encoding("gpt2")._mergeable_ranks, "gpt2")
            except Exception as e:
                raise OSError(f"tokenizer gpt2: tiktoken could not fetch its vocabulary: {e}") from None
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no tokenizer there (expected `gpt2` or a directory with tokenizer.json)")
        whole = read_json(path)
        try:
            model, vocab = whole["model"], whole["model"]["vocab"]
            if model["type"] != "BPE" or whole.get("normalizer"):
                raise ValueError(f"model type {model['type']}, normalizer {whole.get('normalizer')}")
            if not isinstance(vocab, dict):
                raise ValueError("vocab is not an object")
            words = whole["pre_tokenizer"]
            if words["type"] != "ByteLevel" or words["add_prefix_space"] or not words.get("use_regex", True):
                raise ValueError(f"pre_tokenizer {words}")
            vocab = {EOS: len(vocab) - (EOS in vocab)} | vocab
            order = sorted(vocab, key=vocab.get)
            if {*map(type, vocab.values())} != {int} or [vocab[t] for t in order] != list(range(len(vocab))) or order.pop() != EOS:
                raise ValueError(f"expected ids 0 to {len(vocab) - 2} and then {EOS}")
            if not CHAR_TO_BYTE.keys() <= vocab.keys():
                raise KeyError("expected a token for each of the 256 bytes")
            merges = [m.split(" ") if isinstance(m, str) else m for m in model.get("merges", [])]
            if [a + b for a, b in merges] != [t for t in order if len(t) > 1] or not all(a in vocab and b in vocab for a, b in merges):
                raise ValueError("expected a merge of two tokens for each longer token, in the order of their ids")
            return cls({bytes(CHAR_TO_BYTE[c] for c in token): vocab[token] for token in order})
        except (ValueError, KeyError, TypeError, RecursionError) as e:
            raise UserError(f"{path}: not a byte-level BPE tokenizer ({type(e).__name__}: {e})"[:400]) from None

    def save(self, directory):
        """Writes `tokenizer.json` for transformers and tokenizers."""
        text = {token: "".join(BYTE_TO_CHAR[b] for b in token) for token in self.ranks}
        merges = [
            " ".join("".join(BYTE_TO_CHAR[b] for b in part) for part in split(self.ranks, token))
            for token in sorted(self.ranks, key=self.ranks.get)
            if len(token) > 1
        ]
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        special = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        data = {
            "version": "1.0",
            "added_tokens": [{"id": self.eos, "content": EOS, "special": True, **special}],
            "pre_tokenizer": byte_level,
            "decoder": byte_level,
            "model": {"type": "BPE", "vocab": {text[t]: i for t, i in self.ranks.items()} | {EOS: self.eos},
                      "merges": merges},
        }  # fmt: skip
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        with atomic_write(directory / "tokenizer.json") as tmp:
            tmp.write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")


def split(ranks, token):
    """The two parts whose merge made `token`: what BPE leaves of it with the merges learned before."""
    parts = [bytes([b]) for b in token]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, len(ranks)) for a, b in zip(parts, parts[1:], strict=False)]
        i = min(range(len(pairs)), key=pairs.__getitem__)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def train_ranks(texts, size):
    """Byte-pair encoding (Sennrich et al. 2016): {bytes: id} of at most `size` tokens.

    Merges the most frequent pair of neighbours again and again; a tie goes to the pair of lower ids. Pairs wait in a heap with the
    count they had when pushed; a stale count is corrected when it surfaces, so a merge costs only the words it changes.
    """
    words = Counter(w for text in texts for w in regex.findall(PATTERN, text))
    frequency = list(words.values())
    index = {b: i for i, b in enumerate(BYTES)}
    words = [[index[b] for b in w.encode()] for w in words]
    tokens = [bytes([b]) for b in BYTES]
    ranks = {token: i for i, token in enumerate(tokens)}
    count, where = Counter(), defaultdict(set)  # of each pair: how often it occurs, and in which words
    for i, word in enumerate(words):
        for pair in zip(word, word[1:], strict=False):
            count[pair] += frequency[i]
            where[pair].add(i)
    heap = [(-n, pair) for pair, n in count.items()]
    heapq.heapify(heap)
    while heap and len(ranks) < size:
        n, pair = heapq.heappop(heap)
        if -n != count[pair]:
            if count[pair] > 0:
                heapq.heappush(heap, (-count[pair], pair))
            continue
        token, changed = tokens[pair[0]] + tokens[pair[1]], set()
        new = ranks.setdefault(token, len(ranks))  # a merge may spell a token that is there already
        if new == len(tokens):
            tokens.append(token)
        for i in where.pop(pair):
            word, merged, j = words[i], [], 0
            for old in zip(word, word[1:], strict=False):
                count[old] -= frequency[i]
            while j < len(word):
                if j + 1 < len(word) and (word[j], word[j + 1]) == pair:
                    merged.append(new)
                    j += 2
                else:
                    merged.append(word[j])
                    j += 1
            words[i] = merged
            for fresh in zip(merged, merged[1:], strict=False):
                count[fresh] += frequency[i]
                where[fresh].add(i)
                changed.add(fresh)
        for fresh in changed:
            heapq.heappush(heap, (-count[fresh], fresh))
    return ranks


def load_tokenizer(source):
    """The tokenizer of a model directory or of a model on the hub; GPT-2's for a directory without one."""
    source = local_directory(source)
    return Tokenizer.load(source if (source / "tokenizer.json").exists() else "gpt2")
