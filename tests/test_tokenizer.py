"""Byte-level BPE: merge for merge and id for id as Hugging Face's trainer; every kind of text."""

import json
import random

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from minirlhf import tokenizer
from minirlhf.engine.vocabulary import BYTE_TO_CHAR, EOS, split
from minirlhf.tokenizer import Tokenizer

RANDOM = random.Random(0)
CORPORA = {
    "english": ["It's the world's best film, isn't it? We'll see; they've said I'd like it.",
                "THE END'S near's", "low lower lowest, new newer newest, wide wider widest"] * 3,
    "ties": ["ab ba ca ac bc cb", "abcd dcba", "xyzzy zyxxy"],
    "runs": ["aaaaaaa aaaa aa aaaaa", "ababababab", "abaabaaab", "bbbbbbbbbbbbbbbbbbb"],
    "unicode": ["héllo wörld ñandú", "日本語のテキスト、日本", "Привет, мир", "😀😀👍🏽 e\u0301",
                "١٢٣ ४५६ Ⅷ²"] * 2,
    "space": ["a  b   c    d", "\n\n\n\tx\t\t y \r\n", "  lead and trail  ",
              "\u00a0\u3000 \u2028x\x85y\x1c z", "    "],
    "numbers": ["1 22 333 4444 2024-01-01 3.14159", "a1b2c3 $100,000.00!!! ??? --- ..."],
    "random": ["".join(RANDOM.choices("abcd  é'", k=RANDOM.randint(1, 40))) for _ in range(60)],
    "empty": ["", "x"],
}  # fmt: skip
ALL = [text for corpus in CORPORA.values() for text in corpus]
TEXTS = [*ALL, "unseen Words, 'tis; we've\n\n ok  "]
TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=60)
WORDS = st.text(st.sampled_from("aaabbc 'sté\n日"), max_size=30)


@pytest.fixture(scope="module")
def trained():
    return Tokenizer.train(ALL, 420)


@pytest.fixture(scope="module")
def hf():
    return pytest.importorskip("tokenizers")


def hf_trainer(hf, **options):
    alphabet = hf.pre_tokenizers.ByteLevel.alphabet()
    return hf.trainers.BpeTrainer(initial_alphabet=alphabet, show_progress=False, **options)


def hf_train(hf, texts, size):
    """The model of Hugging Face's own trainer: `size` tokens without EOS."""
    theirs = hf.Tokenizer(hf.models.BPE())
    theirs.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.decoder = hf.decoders.ByteLevel()
    theirs.train_from_iterator(texts, hf_trainer(hf, vocab_size=size))
    return theirs


def chars(token):
    return "".join(BYTE_TO_CHAR[b] for b in token)


def written(ranks):
    """{token: id} with the bytes written as Hugging Face's characters."""
    return {chars(token): i for token, i in ranks.items()}


def assert_same(hf, texts, size):
    ours, theirs = Tokenizer.train(texts, size + 1), hf_train(hf, texts, size)
    assert written(ours.ranks) == theirs.get_vocab()
    merges = [tuple(pair) for pair in json.loads(theirs.to_str())["model"]["merges"]]
    by_rank = sorted(ours.ranks, key=ours.ranks.get)[256:]
    assert merges == [tuple(map(chars, split(ours.ranks, token))) for token in by_rank]
    return ours, theirs


# The trainer of Hugging Face


@pytest.mark.parametrize("size", [256, 257, 290, 500])
@pytest.mark.parametrize("corpus", [*CORPORA, "all"])
def test_trains_as_hugging_face(hf, corpus, size):
    ours, theirs = assert_same(hf, TEXTS if corpus == "all" else CORPORA[corpus], size)
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text).ids


@settings(max_examples=60, deadline=None, derandomize=True)
@given(texts=st.lists(WORDS, max_size=12), text=WORDS, size=st.integers(256, 300))
def test_trains_as_hugging_face_on_anything(texts, text, size):
    ours, theirs = assert_same(pytest.importorskip("tokenizers"), texts, size)
    assert ours.encode(text) == theirs.encode(text).ids


def test_saved_file(hf, trained, tmp_path):
    directory = tmp_path / "deep" / "er"
    trained.save(directory)
    assert [p.name for p in directory.iterdir()] == ["tokenizer.json"]
    ours = Tokenizer.load(directory)
    theirs = hf.Tokenizer.from_file(str(directory / "tokenizer.json"))
    assert (ours.ranks, ours.eos, ours.pad) == (trained.ranks, trained.eos, trained.pad)
    assert theirs.get_vocab() == written(trained.ranks) | {EOS: trained.eos}
    for text in TEXTS:
        assert ours.encode(text) == trained.encode(text) == theirs.encode(text).ids
        assert theirs.decode(theirs.encode(text).ids) == text
    assert theirs.encode(EOS).ids == [trained.eos]


@pytest.mark.parametrize("how", ["AutoTokenizer", "PreTrainedTokenizerFast"])
def test_transformers_reads_the_saved_file(trained, tmp_path, how):
    transformers = pytest.importorskip("transformers")
    trained.save(tmp_path)
    if how == "AutoTokenizer":
        (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    else:
        theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=f"{tmp_path}/tokenizer.json")
    for text in TEXTS:
        assert theirs(text).input_ids == trained.encode(text)


# Any text, and EOS


@settings(max_examples=200, deadline=None, derandomize=True)
@given(text=TEXT)
def test_round_trip(trained, text):
    ids = trained.encode(text)
    assert trained.decode(ids) == text
    assert trained.decode([trained.eos, *ids, trained.eos]) == text
    assert all(0 <= i < trained.eos and i != trained.pad for i in ids)


@pytest.mark.parametrize(
    "text", [EOS, f"a {EOS} b", EOS * 3, f"{EOS}{EOS[:5]}", "<|endof<|endoftext|>text|>"]
)
def test_text_never_becomes_eos(trained, text):
    assert trained.eos not in trained.encode(text)
    assert trained.decode(trained.encode(text)) == text
    assert trained.eos not in Tokenizer.train([text] * 50, 400).encode(text)


def test_ids(trained):
    """The order of the bytes is GPT-2's: its `!`, `A`, space and newline are 0, 32, 220 and 198."""
    assert [trained.ranks[b] for b in (b"!", b"A", b" ", b"\n")] == [0, 32, 220, 198]
    assert sorted(trained.ranks.values()) == list(range(trained.eos))
    assert trained.vocab_size == 420 == trained.eos + 1
    assert trained.pad == trained.ranks[b"\xff"] == 187
    assert trained.decode([trained.pad]) == "\ufffd"


@pytest.mark.parametrize("texts, size, expected", [
    ([], 300, 257), (["a"], 300, 257), (["ab"], 300, 258), (["abc"], 300, 259),
    (["aaaa"], 300, 259), (["abc"], 258, 258), (TEXTS, 257, 257), (TEXTS, 301, 301),
    (iter(["ab", "ab"]), 300, 258),
])  # fmt: skip
def test_vocab_size(texts, size, expected):
    assert Tokenizer.train(texts, size).vocab_size == expected


def test_merges_by_hand():
    """ab occurs 3 times, abc twice, abd once. In abcabcab, abc and cab tie: c comes before ab."""
    tokenizer = Tokenizer.train(["abc", "abc", "abd"], 259)
    assert list(tokenizer.ranks)[256:] == [b"ab", b"abc"]
    assert [tokenizer.decode([i]) for i in tokenizer.encode("abcd ab")] == ["abc", "d", " ", "ab"]
    assert list(Tokenizer.train(["abcabcab"], 259).ranks)[256:] == [b"ab", b"cab"]


@pytest.mark.parametrize(
    "token, parts", [(b"abcd", [b"abc", b"d"]), (b"abc", [b"ab", b"c"]), (b"ab", [b"a", b"b"])]
)
def test_split(token, parts):
    longer = {b"ab": 256, b"bc": 257, b"abc": 258, b"abcd": 259}
    ranks = {bytes([b]): b for b in range(256)} | longer
    assert split(ranks, token) == parts


# Loading


def content(**model):
    vocab = written({bytes([b]): b for b in range(256)})
    return json.dumps({"model": {"type": "BPE", "vocab": vocab} | model})


@pytest.mark.parametrize("text, names", [
    ("{", "JSON"), ("[]", "TypeError"), ("{}", "model"), (content(type="Unigram"), "Unigram"),
    (content(vocab={"a": 0}), "KeyError"), (content(vocab={"日": 0}), "KeyError"),
    (content(vocab=[["a", 0]]), "vocab"),
])  # fmt: skip
def test_not_a_tokenizer(tmp_path, text, names):
    (tmp_path / "tokenizer.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=rf"tokenizer.json.*{names}"):
        Tokenizer.load(tmp_path)


def test_another_byte_level_tokenizer_is_refused(hf, tmp_path):
    """What would load as a vocabulary but give other ids than its owner does."""
    theirs = hf_train(hf, TEXTS, 300)
    theirs.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=True)
    theirs.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="tokenizer.json"):
        Tokenizer.load(tmp_path)


def test_missing_tokenizer(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.*tokenizer.json"):
        Tokenizer.load(tmp_path / "nothing")


def test_gpt2_by_name(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pattern, special = tokenizer.PATTERN, {EOS: trained.eos}

    def online(name):
        return tiktoken.Encoding(
            name, pat_str=pattern, mergeable_ranks=trained.ranks, special_tokens=special
        )

    monkeypatch.setattr(tokenizer.tiktoken, "get_encoding", online)
    assert Tokenizer.load("gpt2").encode(TEXTS[0]) == trained.encode(TEXTS[0])

    def offline(name):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(tokenizer.tiktoken, "get_encoding", offline)
    with pytest.raises(OSError, match="gpt2.*no route to host"):
        Tokenizer.load("gpt2")
    Tokenizer.train(["ab"], 258).save("gpt2")  # a directory of that name comes first
    assert Tokenizer.load("gpt2").vocab_size == 258
