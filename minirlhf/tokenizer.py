"""Byte-level BPE: GPT-2's own vocabulary by name, or one trained on a corpus; served by tiktoken.

A vocabulary is 256 bytes, merges in the order they were learned, and EOS as the last id, as in
GPT-2. It is saved as a `tokenizer.json` of the Hugging Face layout. No text ever encodes to EOS:
it is added by number. `pad` is the id of the byte 0xFF, which no UTF-8 text holds, so padding
needs no place in the vocabulary.

Left out: other split patterns, normalisation, special tokens beyond EOS.
"""

import heapq
import json
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path

import regex  # comes with tiktoken
import tiktoken

from minirlhf.engine.cli import UserError
from minirlhf.engine.files import FileError, MissingFile, atomic_write, read_json
from minirlhf.engine.weights import local_directory

EOS = "<|endoftext|>"

# GPT-2's split of a text into words: a merge never crosses these.
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# GPT-2's order of the bytes: the printable ones first; the others are written as U+0100 and on.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
OTHERS = [b for b in range(256) if b not in PRINTABLE]
BYTES = PRINTABLE + OTHERS
BYTE_TO_CHAR = {b: chr(b) for b in PRINTABLE} | {b: chr(256 + i) for i, b in enumerate(OTHERS)}
CHAR_TO_BYTE = {c: b for b, c in BYTE_TO_CHAR.items()}


class Tokenizer:
    """`encode(text) -> ids`, `decode(ids) -> text`; `eos`, `pad` and `vocab_size` are ints."""

    def __init__(self, ranks, name="trained"):
        """ranks: {bytes: id}, ids 0..len-1 in merge order; EOS is added after them."""
        self.ranks = ranks
        self.eos = len(ranks)
        self.vocab_size = len(ranks) + 1
        self.pad = ranks[b"\xff"]
        self.encoding = tiktoken.Encoding(
            name, pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={EOS: self.eos}
        )

    def encode(self, text):
        if len(text) < 900_000:
            return self.encoding.encode_ordinary(text)
        ids = []  # a word at a time: tiktoken panics at a million white spaces in a row
        for word in regex.findall(PATTERN, text):
            ids += self.encoding._encode_single_piece(word)
        return ids

    def decode(self, ids):
        """Text of the ids, without EOS; bytes that are not UTF-8 become U+FFFD."""
        return self.encoding.decode([i for i in ids if i != self.eos], errors="replace")

    @classmethod
    def train(cls, texts, vocab_size):
        """Learns `vocab_size` - 257 merges, or as many as there are, on an iterable of texts."""
        if vocab_size < 257:
            raise UserError(f"vocabulary of {vocab_size}: expected at least 257, the bytes and EOS")
        return cls(train_ranks(texts, vocab_size - 1))

    @classmethod
    def load(cls, name_or_directory):
        """`gpt2` by name, or the `tokenizer.json` of a directory.

        Raises FileNotFoundError without the file, OSError when GPT-2's vocabulary cannot be had,
        ValueError for another kind of tokenizer.
        """
        path = Path(name_or_directory) / "tokenizer.json"
        if str(name_or_directory) == "gpt2" and not path.exists():
            try:
                return cls(tiktoken.get_encoding("gpt2")._mergeable_ranks, "gpt2")
            except Exception as e:
                message = f"tokenizer gpt2: tiktoken could not fetch its vocabulary: {e}"
                raise FileError(message) from None
        if not path.is_file():
            expected = "expected `gpt2` or a directory with tokenizer.json"
            raise MissingFile(f"{path}: no tokenizer there ({expected})")
        content = read_json(path)
        try:
            return cls(read_ranks(content))
        except (ValueError, KeyError, TypeError, RecursionError) as e:
            message = f"{path}: not a byte-level BPE tokenizer ({type(e).__name__}: {e})"
            raise UserError(message[:400]) from None

    def save(self, directory):
        """Writes `tokenizer.json` for transformers and tokenizers."""
        vocab = {written(token): i for token, i in self.ranks.items()}
        longer = [token for token in self.ranks if len(token) > 1]
        longer.sort(key=self.ranks.get)
        merges = [" ".join(map(written, split(self.ranks, token))) for token in longer]
        eos = {"id": self.eos, "content": EOS, "special": True}
        eos |= dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        byte_level = {"type": "ByteLevel", "add_prefix_space": False}
        byte_level |= {"trim_offsets": True, "use_regex": True}
        content = {"version": "1.0", "added_tokens": [eos]}
        content |= {"pre_tokenizer": byte_level, "decoder": byte_level}
        content["model"] = {"type": "BPE", "vocab": vocab | {EOS: self.eos}, "merges": merges}
        Path(directory).mkdir(parents=True, exist_ok=True)
        with atomic_write(Path(directory) / "tokenizer.json") as tmp:
            tmp.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def load_tokenizer(source):
    """The tokenizer of a model's directory or of a model on the hub; GPT-2's where it has none."""
    directory = local_directory(source)
    return Tokenizer.load(directory if (directory / "tokenizer.json").exists() else "gpt2")


def written(token):
    """Bytes as the characters that stand for them in tokenizer.json."""
    return "".join(BYTE_TO_CHAR[b] for b in token)


def read_ranks(content):
    """{bytes: id} of a tokenizer.json; ValueError, KeyError or TypeError for another kind."""
    model = content["model"]
    vocab = model["vocab"]
    if model["type"] != "BPE" or content.get("normalizer"):
        raise ValueError(f"model type {model['type']}, normalizer {content.get('normalizer')}")
    if not isinstance(vocab, dict):
        raise ValueError("vocab is not an object")
    words = content["pre_tokenizer"]
    byte_level = words["type"] == "ByteLevel" and not words["add_prefix_space"]
    if not byte_level or not words.get("use_regex", True):
        raise ValueError(f"pre_tokenizer {words}")
    vocab = {EOS: len(vocab) - (EOS in vocab)} | vocab
    tokens = sorted(vocab, key=vocab.get)
    ids = [vocab[token] for token in tokens]
    whole_numbers = set(map(type, ids)) == {int}
    if not whole_numbers or ids != list(range(len(vocab))) or tokens[-1] != EOS:
        raise ValueError(f"expected ids 0 to {len(vocab) - 2} and then {EOS}")
    if not CHAR_TO_BYTE.keys() <= vocab.keys():
        raise KeyError("expected a token for each of the 256 bytes")
    merges = [m.split(" ") if isinstance(m, str) else m for m in model.get("merges", [])]
    made = [first + second for first, second in merges]
    longer = [token for token in tokens[:-1] if len(token) > 1]
    if made != longer or not all(a in vocab and b in vocab for a, b in merges):
        expected = "expected a merge of two tokens for each longer token"
        raise ValueError(f"{expected}, in the order of their ids")
    return {bytes(CHAR_TO_BYTE[c] for c in token): vocab[token] for token in tokens[:-1]}


def split(ranks, token):
    """The two parts whose merge made `token`: what BPE leaves of it with the merges before."""
    parts = [bytes([b]) for b in token]
    while len(parts) > 2:
        found = [ranks.get(a + b, len(ranks)) for a, b in pairwise(parts)]
        i = found.index(min(found))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def train_ranks(texts, size):
    """Byte-pair encoding (Sennrich et al. 2016): {bytes: id} of at most `size` tokens.

    Merges the most frequent pair of neighbours again and again; a tie goes to the lower ids.
    A word is a string here, with the character chr(id) for each token.
    """
    frequency = Counter()
    for text in texts:
        frequency.update(regex.findall(PATTERN, text))
    char = {b: chr(i) for i, b in enumerate(BYTES)}
    words = ["".join(map(char.get, word.encode())) for word in frequency]
    pairs = Pairs(words, list(frequency.values()))
    tokens = [bytes([b]) for b in BYTES]
    ranks = {token: i for i, token in enumerate(tokens)}
    while len(ranks) < size:
        pair = pairs.most_frequent()
        if pair is None:
            break
        token = tokens[ord(pair[0])] + tokens[ord(pair[1])]
        new = ranks.setdefault(token, len(ranks))  # it may spell a token that is there already
        if new == len(tokens):
            tokens.append(token)
        pairs.merge(pair, chr(new))
    return ranks


class Pairs:
    """The pairs of neighbours in words, and which of them is the most frequent.

    They wait in a heap with the count they had when pushed; a stale count is corrected when it
    surfaces, so a merge costs only the words it changes.
    """

    def __init__(self, words, frequency):
        self.words = words
        self.frequency = frequency  # how often each word occurs
        self.count = Counter()  # how often each pair occurs
        self.where = defaultdict(set)  # in which words, by index
        for i in range(len(words)):
            self.add(i)
        self.heap = [(-n, pair) for pair, n in self.count.items()]
        heapq.heapify(self.heap)

    def add(self, i):
        """Counts the pairs of word i."""
        for pair in pairwise(self.words[i]):
            self.count[pair] += self.frequency[i]
            self.where[pair].add(i)

    def most_frequent(self):
        """Takes it out of the heap; None where no pair is left."""
        while self.heap:
            n, pair = heapq.heappop(self.heap)
            if -n == self.count[pair]:
                return pair
            if self.count[pair] > 0:
                heapq.heappush(self.heap, (-self.count[pair], pair))

    def merge(self, pair, new):
        """Puts the character `new` wherever the pair stands."""
        changed = set()
        for i in self.where.pop(pair):
            for old in pairwise(self.words[i]):
                self.count[old] -= self.frequency[i]
            self.words[i] = self.words[i].replace("".join(pair), new)
            self.add(i)
            changed.update(pairwise(self.words[i]))
        for fresh in changed:
            heapq.heappush(self.heap, (-self.count[fresh], fresh))
