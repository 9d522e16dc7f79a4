"""Byte-level BPE: that of a model, GPT-2's by name, or one trained on a corpus; run by tiktoken.

A vocabulary is 256 bytes, merges in the order they were learned, and EOS, behind them as in GPT-2
where we train it. It is saved as a `tokenizer.json` of the Hugging Face layout. No text ever
encodes to EOS: it is added by number. `pad` is the id of the byte 0xFF, which no UTF-8 text holds,
so padding needs no place in the vocabulary.

Left out: other split patterns, normalisation, special tokens beyond EOS.
"""

import hashlib
import heapq
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path

import regex  # comes with tiktoken
import tiktoken

from minirlhf.engine import vocabulary
from minirlhf.engine.cli import UserError
from minirlhf.engine.files import FileError, atomic_write
from minirlhf.engine.vocabulary import BYTES, EOS
from minirlhf.engine.weights import cut_vocabulary, local_directory, model_directory, read_config
from minirlhf.gpt import GPT

# GPT-2's split of a text into words: a merge never crosses these.
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


class Tokenizer:
    """`encode(text) -> ids`, `decode(ids) -> text`; `eos`, `pad` and `vocab_size` are ints."""

    def __init__(self, ranks, name="trained", eos=None):
        """ranks: {bytes: id}, ids in merge order; EOS comes after them, or has the id left free."""
        self.ranks = ranks
        self.eos = len(ranks) if eos is None else eos
        self.vocab_size = len(ranks) + 1
        self.pad = ranks[b"\xff"]
        self.added = []  # names of special tokens that a directory has beside these, of no use here
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
        return self.decode_bytes(ids).decode(errors="replace")

    def decode_bytes(self, ids):
        """The bytes of the ids, without EOS: a token may hold half a character."""
        return self.encoding.decode_bytes([i for i in ids if i != self.eos])

    def fingerprint(self):
        """Hex digits of what the ids mean: equal for tokenizers that are the same."""
        by_id = sorted((i, token) for token, i in self.ranks.items())
        return hashlib.sha256(repr((by_id, self.eos)).encode()).hexdigest()[:16]

    @classmethod
    def train(cls, texts, vocab_size):
        """Learns `vocab_size` - 257 merges, or as many as there are, on an iterable of texts."""
        if vocab_size < 257:
            raise UserError(f"vocabulary of {vocab_size}: expected at least 257, the bytes and EOS")
        return cls(train_ranks(texts, vocab_size - 1))

    @classmethod
    def load(cls, name_or_directory):
        """`gpt2` by name, or what a directory holds: tokenizer.json, or vocab.json with merges.txt.

        Raises FileNotFoundError without them, OSError when GPT-2's vocabulary cannot be had,
        ValueError for another kind of tokenizer.
        """
        directory = Path(name_or_directory)
        if str(name_or_directory) == "gpt2" and not vocabulary.lies_in(directory):
            try:
                return cls(tiktoken.get_encoding("gpt2")._mergeable_ranks, "gpt2")
            except Exception as e:
                message = f"tokenizer gpt2: tiktoken could not fetch its vocabulary: {e}"
                raise FileError(message) from None
        found = vocabulary.read_vocabulary(directory)
        tokenizer = cls(found.ranks, eos=found.eos)
        tokenizer.added = found.added
        return tokenizer

    def save(self, directory):
        """Writes `tokenizer.json` for transformers and tokenizers."""
        Path(directory).mkdir(parents=True, exist_ok=True)
        with atomic_write(Path(directory) / "tokenizer.json") as tmp:
            text = vocabulary.as_tokenizer_json(self.ranks, self.eos)
            tmp.write_text(text, encoding="utf-8")


# A model and the tokenizer that belongs to it


def load_base(source, device="cpu"):
    """(base model, tokenizer) of a run, a directory or a model on the hub, which fit together."""
    directory = local_directory(model_directory(source))
    tokenizer = load_tokenizer(directory)
    model = GPT.from_pretrained(directory)
    fit_vocabulary(model, tokenizer, source)
    return model.to(device), tokenizer


def load_tokenizer(source):
    """The tokenizer of a model's directory or of a model on the hub; GPT-2's where it has none."""
    directory = local_directory(source)
    if vocabulary.lies_in(directory):
        return Tokenizer.load(directory)
    size = read_config(directory).get("vocab_size")
    if size != 50257:
        missing = "neither tokenizer.json nor vocab.json with merges.txt lies there"
        raise UserError(f"{source}: {missing}, and a vocabulary of {size} is not gpt2's, of 50257")
    return Tokenizer.load("gpt2")


def fit_vocabulary(model, tokenizer, source):
    """Cuts off a model's rows of ids that have no text (padding to a multiple of 64, [PAD] and the
    like behind all others): so they are never sampled. Raises UserError for a model that is too
    small."""
    ids, rows = tokenizer.vocab_size, model.config.vocab_size
    if rows < ids:
        raise UserError(f"{source}: the tokenizer has {ids} ids, but the model has {rows}")
    if rows > ids:
        cut_vocabulary(model, ids)
        names = "".join(f", {name!r}" for name in tokenizer.added)
        print(f"{source}: cut off the {rows - ids} of {rows} ids that have no text{names}")


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
        fresh = set()  # the other pairs do not become more frequent
        for i in self.where.pop(pair):
            for old in pairwise(self.words[i]):
                self.count[old] -= self.frequency[i]
            self.words[i] = self.words[i].replace("".join(pair), new)
            self.add(i)
            fresh.update(found for found in pairwise(self.words[i]) if new in found)
        for found in fresh:
            heapq.heappush(self.heap, (-self.count[found], found))
