"""Files from strangers: any text is handled, and crafted files are refused without doing anything.

`fuzz.py` damages files at random.
"""

import gzip
import io
import json
import math
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from minirlhf import data
from minirlhf.data import sources
from minirlhf.engine.cli import UserError
from minirlhf.engine.rows import pad_rows
from minirlhf.engine.vocabulary import BYTE_TO_CHAR, EOS
from minirlhf.feedback import labelers
from minirlhf.feedback.preference_model import PreferenceModel
from minirlhf.gpt import GPT, GPTConfig, RewardModel
from minirlhf.tokenizer import Tokenizer

CONFIG = GPTConfig(vocab_size=258, n_ctx=8, n_layer=1, n_head=2, n_embd=4)
WORDS = Tokenizer.train([f"the film, the films {EOS} 日本 \n\n aaaa"] * 3, 300)
TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=40)
TEXT |= st.sampled_from([EOS, f"a{EOS}{EOS} b", "\ufeff\0\u2028", "\r\n 😀👍🏽"])
stable = settings(max_examples=150, deadline=None, derandomize=True)


def pair(i):
    return json.dumps({"prompt": f"p{i}", "chosen": f"good {i}", "rejected": f"bad {i}"})


def listing(folder):
    found = []
    for path in Path(folder).rglob("*"):
        about = path.lstat()
        found.append((str(path.relative_to(folder)), about.st_mtime_ns, about.st_size))
    return sorted(found)


# Any text


@stable
@given(TEXT)
def test_tokenizer_round_trip(text):
    ids = WORDS.encode(text)
    assert WORDS.decode(ids) == text and all(0 <= i < WORDS.eos for i in ids)


@pytest.mark.parametrize("space", [" ", "\n", "\u3000", " \n"])
def test_a_million_white_spaces(space):
    text = "a" + space * (1_100_000 // len(space)) + "the film"
    assert WORDS.decode(WORDS.encode(text)) == text


def test_long_texts_get_the_tokens_of_short_ones():
    text = "the films,\n\n  the  film's 日本😀 \x1c \u00a0 x\x85 " * 25_000
    assert len(text) > 900_000 and WORDS.encode(text) == WORDS.encoding.encode_ordinary(text)


@stable
@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=5), st.integers(3, 40))
def test_rows(texts, n_ctx):
    texts_here = [(prompt, response, "here") for prompt, response in texts]
    rows, lengths = data.encode(texts_here, WORDS, n_ctx, overlong="truncate")
    assert len(rows) == len(lengths) == len(texts)
    for (prompt, response), row, n in zip(texts, rows, lengths, strict=True):
        p, r = WORDS.encode(prompt), WORDS.encode(response)[: n_ctx - 2]
        assert row[0] == row[-1] == WORDS.eos and WORDS.eos not in row[1:-1]
        assert len(row) == min(n_ctx, 2 + len(p) + len(r))
        assert row[n:-1].tolist() == r and row[1:n].tolist() == p[len(p) - n + 1 :]
    tokens, widths = pad_rows(rows, WORDS.pad)
    assert widths.tolist() == [len(row) for row in rows]
    assert tokens.shape == (len(rows), max(map(len, rows)))
    for row, padded in zip(rows, tokens.tolist(), strict=True):
        assert padded == row.tolist() + [WORDS.pad] * (len(padded) - len(row))


ENDS = st.sampled_from(["\n", "\r\n"])
MARKS = st.sampled_from([b"", b"\xef\xbb\xbf"])


@stable
@given(TEXT, TEXT, st.booleans(), ENDS, MARKS)
def test_any_text_of_a_line_comes_back(tmp_path_factory, prompt, response, ascii_only, end, mark):
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    record = {"prompt": prompt, "response": response, "rating": 2}
    path.write_bytes(mark + (json.dumps(record, ensure_ascii=ascii_only) + end).encode() * 2)
    found = list(data.entries(path))
    assert found == [(f"{path}, line {n}", record) for n in (1, 2)]
    if not any(word in response for word in ("Human:", "System:", "Assistant:")):
        parsed = data.parse_record(found[0][1], "here")
        assert (parsed.prompt, parsed.responses, parsed.number) == (prompt, [response], 2.0)


@pytest.mark.parametrize("response", ["", "a", "\0", "\u2028", "\ufeff"])
def test_shortest_responses(response):
    record = {"prompt": "the", "chosen": response, "rejected": "bad"}
    _, _, prompt, responses, *_ = data.parse_record(record, "here")
    assert (prompt, responses) == ("the", [response, "bad"])
    (row,), lengths = data.encode([(prompt, responses[0], "here")], WORDS, 20)
    assert row.tolist() == [WORDS.eos, *WORDS.encode("the"), *WORDS.encode(response), WORDS.eos]
    assert lengths.tolist() == [1 + len(WORDS.encode("the"))]


# JSONL


@pytest.mark.parametrize("line, names", [
    ('{"prompt": "a", "response": "b", "rating": 1, "rating": 2}', "twice"),
    ('{"prompt": "a", "response": "b", "rating": ' + "9" * 5000 + "}", "rating|digits"),
    ('{"prompt": "a", "response": "b", "rating": ' + "9" * 400 + "}", "finite"),
    ('{"prompt": "a", "response": "b", "rating": -1e999}', "finite"),
    ('{"prompt": "a", "response": "b", "rating": NaN}', "finite"),
    ('{"prompt": "a", "chosen": "b", "rejected": "c", "margin": Infinity}', "margin"),
    ('{"prompt": ' + "[" * 100_000 + "]" * 100_000 + "}", "not JSON"),
    ('{"a":' * 100_000, "not JSON"),
    ('{"prompt": ' + "[" * 900 + "]" * 900 + ', "chosen": "b", "rejected": "c"}',
     "prompt: expected a string"),
    ('{"prompt": "\\ud83d", "chosen": "b", "rejected": "c"}', "surrogate"),
    ('{"prompt": "\0"}', "not JSON"),
    ('{"prompt": "a", "chosen": "b", "rejected": "b"}', "same"),
    ("[" + "1," * 10 + "1]", "expected"), ("\ufeff\ufeff{}", "not JSON"),
    (json.dumps({"x" * 10_000: 1}), "found keys"),
    (json.dumps({"prompt": "", "response": "", "rating": "x" * 10_000}), "rating"),
])  # fmt: skip
def test_lines_that_are_refused(tmp_path, line, names):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join([*map(pair, range(12)), line]))
    with pytest.raises(UserError, match=f"a.jsonl, line 13: .*({names})") as caught:
        data.load_feedback(str(path))
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
@pytest.mark.parametrize("mib", [10, 65])
def test_long_lines(tmp_path, suffix, mib):
    """10 MB is a long text, 65 MiB an attack, whose bytes need not even be unpacked to the end."""
    chosen = "no " * (mib * 2**20 // 3)
    long = f'{{"prompt": "long", "chosen": "{chosen}", "rejected": "yes"}}'
    raw = "\n".join([*map(pair, range(12)), long]).encode()
    path = tmp_path / f"a{suffix}"
    path.write_bytes(gzip.compress(raw, 1) if suffix.endswith("gz") else raw)
    if mib == 65:
        with pytest.raises(UserError, match=rf"a{suffix}, line 13: .*64 MiB"):
            data.load_feedback(str(path))
    else:
        feedback = data.load_feedback(str(path))
        responses = feedback.train.responses + feedback.test.responses
        assert max(map(len, responses)) == mib * 2**20 // 3 * 3


def test_bomb_of_short_lines(tmp_path):
    mebibyte = gzip.compress((b" " * 1023 + b"\n") * 2**10)
    (tmp_path / "a.jsonl.gz").write_bytes(mebibyte * 80)
    with pytest.raises(UserError, match=r"a.jsonl.gz, line \d+: .*200 times"):
        data.load_feedback(str(tmp_path / "a.jsonl.gz"))


def test_too_many_pairs(tmp_path):
    """4,000 rated answers are no pairs before a batch asks for some; a ranking of them is."""
    path = tmp_path / "a.jsonl"
    rated = [{"prompt": "p", "response": f"r{i}", "rating": i} for i in range(4000)]
    path.write_text("\n".join(map(json.dumps, rated)))
    feedback = data.load_feedback(str(path))
    assert len(feedback.train) + len(feedback.test) == 4000 and len(feedback.test) > 300
    responses = [str(i) for i in range(4000)]
    ranked = {"prompt": "p", "responses": responses, "ranking": list(range(4000))}
    path.write_text("\n".join([*map(pair, range(12)), json.dumps(ranked)]))
    with pytest.raises(UserError, match="a.jsonl: 7,998,012 pairs"):
        data.load_feedback(str(path))


def test_a_directory_is_a_folder_of_files(tmp_path):
    (tmp_path / "a.jsonl").mkdir()
    with pytest.raises(UserError, match="a.jsonl: no file ending in .* lies there"):
        data.load_feedback(str(tmp_path / "a.jsonl"))


# tokenizer.json

BYTES = {BYTE_TO_CHAR[b]: b for b in range(256)}


def tokenizer_file(folder, vocab, merges=(), raw=None):
    words = {"type": "ByteLevel", "add_prefix_space": False}
    model = {"type": "BPE", "vocab": vocab, "merges": merges}
    text = json.dumps({"pre_tokenizer": words, "model": model})
    (folder / "tokenizer.json").write_text(raw or text, encoding="utf-8")
    return folder


def test_merges_as_text_and_as_pairs(tmp_path):
    vocab = BYTES | {"ab": 256, "abc": 257, EOS: 258}
    for merges in (["a b", "ab c"], [["a", "b"], ["ab", "c"]]):
        tokenizer = Tokenizer.load(tokenizer_file(tmp_path, vocab, merges))
        assert tokenizer.encode("abc") == [257]
        assert (tokenizer.eos, tokenizer.vocab_size) == (258, 259)


@pytest.mark.parametrize("vocab, merges", [
    (BYTES | {"ab": True}, ["a b"]), (BYTES | {"ab": 256.0}, ["a b"]),
    (BYTES | {"ab": 255}, ["a b"]), (BYTES | {"ab": 2**40}, ["a b"]),
    (BYTES | {"ab": None}, ["a b"]), (BYTES | {"!": -1}, []), (BYTES | {EOS: 300}, []),
    (BYTES | {EOS: 256.0}, []), (BYTES | {"": 256}, [["", ""]]),
    ({c: i for i, c in enumerate(sorted(BYTES)[1:])}, []), ({**BYTES, "日": 256}, []),
    (BYTES | {"ab": 256}, []), (BYTES | {"ab": 256}, ["a b", "a b"]),
    (BYTES | {"ab": 256}, ["b a"]), (BYTES | {"abc": 256}, ["ab c"]),
    (BYTES | {"ab": 256, "bc": 257}, ["b c", "a b"]), (BYTES, 3), (BYTES | {"ab": 256}, [1]),
    (BYTES | {"ab": 256}, [[["a"], ["b"]]]),
])  # fmt: skip
def test_vocabularies_that_are_refused(tmp_path, vocab, merges):
    with pytest.raises(UserError, match="tokenizer.json: not a byte-level BPE tokenizer"):
        Tokenizer.load(tokenizer_file(tmp_path, vocab, merges))


@pytest.mark.parametrize("raw", [
    "[" * 200_000, '{"model": ' + "[" * 900 + "]" * 900 + "}", '{"model": {}, "model": {}}', "\0",
    "9" * 5000,
])  # fmt: skip
def test_tokenizer_files_that_are_refused(tmp_path, raw):
    with pytest.raises(UserError, match="tokenizer.json"):
        Tokenizer.load(tokenizer_file(tmp_path, {}, raw=raw))


# Model directories


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    RewardModel(CONFIG).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("changes, names", [
    ({"vocab_size": 2**30}, "larger model"), ({"n_layer": 10**9}, "larger model"),
    ({"n_embd": 2**20}, "larger model"), ({"n_positions": 2**31 - 1}, "larger model"),
    ({"n_embd": 10**400}, "expected positive"), ({"n_layer": True}, "expected positive"),
    ({"n_embd": 4.0}, "expected positive"), ({"n_layer": [[1]]}, "expected positive"),
    ({"n_head": 3}, "n_head"), ({"reward_level": "word"}, "reward_level"),
    ({"reward_level": ["token"]}, "reward_level"), ({"reward_shift": "0"}, "reward_shift"),
    ({"reward_shift": math.nan}, "reward_shift"), ({"reward_shift": True}, "reward_shift"),
    ({"num_labels": "2"}, "num_labels"), ({"num_labels": None}, "num_labels"),
    ({"activation_function": ["gelu_new"]}, "activation_function"),
])  # fmt: skip
def test_configs_that_are_refused(model, changes, names):
    settings = json.loads((model / "config.json").read_text()) | changes
    (model / "config.json").write_text(json.dumps(settings))
    start = time.perf_counter()
    with pytest.raises(UserError, match=f"{model}.*{names}"):
        RewardModel.from_pretrained(model)
    if "num_labels" in changes:
        with pytest.raises(UserError, match="num_labels"):
            labelers.load_labeler(str(model), None, WORDS, GPT(CONFIG))
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize("text", [
    "[" * 200_000, '{"n_layer": ' + "[" * 900 + "]" * 900 + "}", '"config"', "\ud800",
    '{"a": 1, "a": 2}', "9" * 5000,
])  # fmt: skip
def test_config_files_that_are_refused(model, text):
    (model / "config.json").write_text(text, errors="surrogatepass")
    with pytest.raises(UserError, match="config.json"):
        RewardModel.from_pretrained(model)
    with pytest.raises(UserError, match="config.json"):
        labelers.load_labeler(str(model), None, WORDS, GPT(CONFIG))


def edit_weights(folder, **weights):
    save_file(load_file(folder / "model.safetensors") | weights, folder / "model.safetensors")


BIAS = "transformer.ln_f.bias"


@pytest.mark.parametrize("name, weight, names", [
    ("transformer.wte.weight", torch.zeros(258, 4, dtype=torch.int64), "int64"),
    (BIAS, torch.zeros(4, dtype=torch.bool), "bool"),
    (BIAS, torch.zeros(4, dtype=torch.complex64), "complex64"),
    (BIAS, torch.zeros(4, dtype=torch.float8_e4m3fn), "float8"),
    (BIAS, torch.full((4,), 1e300, dtype=torch.float64), "not finite"),  # infinite in fp32
    ("transformer.h.0.attn.c_attn.weight", torch.zeros(4, 3, 4), "has shape"),
    ("score.weight", torch.zeros(3, 4), "preference model"),
    ("score.weight", torch.zeros(2**50, 0), "larger model"),
    ("score.weight", torch.tensor(1.0), "has shape"),
])  # fmt: skip
def test_weights_that_are_refused(model, name, weight, names):
    edit_weights(model, **{name: weight})
    with pytest.raises(UserError, match=f"{model}.*{names}"):
        RewardModel.from_pretrained(model)


def test_an_odd_preference_model(model):
    edit_weights(model, **{"score.weight": torch.zeros(3, 4)})
    with pytest.raises(UserError, match="3 rows"):
        PreferenceModel.from_pretrained(model)


def test_a_weight_with_and_without_its_prefix(tmp_path):
    GPT(CONFIG).save_pretrained(tmp_path)
    edit_weights(tmp_path, **{"ln_f.bias": torch.ones(4)})
    with pytest.raises(UserError, match="prefix.*ln_f.bias"):
        GPT.from_pretrained(tmp_path)


def header(shape=(4,), offsets=(0, 16), dtype="F32", n=None, **more):
    one = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
    text = json.dumps({"a": one, **more}).encode()
    return struct.pack("<Q", len(text) if n is None else n) + text + bytes(16)


@pytest.mark.parametrize("raw", [
    b"", bytes(7), bytes(8), header(n=2**60), header(n=2**64 - 1), header(n=0),
    header(offsets=(-16, 0)), header(offsets=(16, 0)), header(offsets=(0, 2**63)),
    header(shape=(2**32, 2**32)), header(shape=(2**63, 0), offsets=(0, 0)), header(shape=(-4,)),
    header(dtype="Q"), header(shape=(8,), dtype="F6_E2M3", offsets=(0, 6)),
    header(b={"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}),
    header(b={"dtype": "F32", "shape": [4], "data_offsets": [8, 24]}),
    header()[:-1], header() + b"\0", header()[:20], struct.pack("<Q", 9) + b"[" * 9,
])  # fmt: skip
def test_safetensors_that_are_refused(model, raw):
    (model / "model.safetensors").write_bytes(raw)
    with pytest.raises(UserError, match=f"{model}: broken model.safetensors"):
        RewardModel.from_pretrained(model)


class Attack:
    """Unpickled, it writes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_pickles_are_never_read(model, tmp_path, name):
    raw, victim = pickle.dumps(Attack(tmp_path / "victim")), tmp_path / "victim"
    pickle.loads(raw).close()  # the attack works
    victim.unlink()
    (model / "model.safetensors").unlink()
    (model / name).write_bytes(raw)
    before = listing(tmp_path)
    names = "pickle.*save_pretrained" if name.endswith("bin") else "broken model.safetensors"
    for cls in (GPT, RewardModel, PreferenceModel):
        with pytest.raises(UserError, match=names):
            cls.from_pretrained(model)
    assert listing(tmp_path) == before and not victim.exists()


# The reviews

TEXTS, RATES = "movieReviewSnippets_GroundTruth", "movieReviewSnippets_anonDataRatings"
KINDS = "amazonReviewSnippets", "nytEditorialSnippets", "tweets"
OTHERS = [f"{kind}_GroundTruth" for kind in KINDS]
OTHER_RATES = [f"{kind}_anonDataRatings" for kind in KINDS]


def tar(files):
    """A gzipped archive of {name: bytes, or (type, link)}."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
            else:
                info.type, info.linkname = content
                archive.addfile(info)
    return out.getvalue()


def archive(path, more=(), **tables):
    """The reviews in small, with some tables replaced, and with more members in front."""
    lines = {
        TEXTS: [f"{i}\t0.5\t snippet {i} café " for i in range(1, 13)],
        RATES: [f"{i}\t0\t1\t[{i % 5}, -4]" for i in range(1, 13)],
        **{name: ["1_1\t0\tone", "1_2\t0\ttwo\r"] for name in OTHERS},
        **{name: ["1_2\t0\t1\t[2]", "1_1\t0\t1\t[1, 3]\r"] for name in OTHER_RATES},
    }
    contents = {name: "\n".join(rows).encode() for name, rows in lines.items()} | tables
    files = dict(more)
    files |= {f"{sources.FOLDER}{name}.txt": content for name, content in contents.items()}
    path.write_bytes(tar({sources.INNER: tar(files)}))
    return path


def read(path):
    return data.read_reviews(path, sources.INNER, sources.FOLDER)


def test_reviews_without_the_checksum(tmp_path):
    snippets, ratings, others, their_ratings = read(archive(tmp_path / "a.tar.gz"))
    assert snippets == {i: f"snippet {i} café" for i in range(1, 13)}
    assert others == ["one", "two"] * 3
    assert [r.tolist() for r in their_ratings] == [[1, 3], [2]] * 3
    assert {i: r.tolist() for i, r in ratings.items()} == {i: [i % 5, -4] for i in range(1, 13)}
    assert all(np.issubdtype(r.dtype, np.integer) for r in ratings.values())


RATINGS = ["[5]", "[]", "1", "[1, NaN]", "[true]", '["1"]', "[1e999]", "[[1]]", "[" * 100_000,
           "[" + "9" * 5000 + "]"]  # fmt: skip


@pytest.mark.parametrize("table, line, names", [
    (TEXTS, "x\t0\tt", "line 2: expected a number.*'x'"),
    (TEXTS, "1\t0\tt", "line 2: .*of its own"), (TEXTS, "2\t0", "line 2: expected 3 col"),
    (TEXTS, "2\t0\tt", "line 2: 2 is in only one"), (RATES, "1\t0\t1\t[", "line 2: .*own"),
    (RATES, "2\t0\t1\t[1]", "line 2: 2 is in only one"),
    (RATES, "9" * 5000 + "\t0\t1\t[1]", "line 2: expected a number"),
    (OTHERS[0], "1\tt", "line 2: expected 3 columns"),
    (OTHERS[2], "1_2\t0\tt\tu", "line 2: expected 3 columns"),
    (OTHERS[1], "1_3\t0\tt", "line 2: 1_3 has no ratings"),
    (OTHER_RATES[1], "1_2\t0\t[1]", "line 2: expected 4 columns"),
    (OTHER_RATES[0], "1_2\t0\t1\t[5]", "line 2: expected a list"),
    *((RATES, f"1\t0\t1\t{ratings}", "line 1: ") for ratings in RATINGS),
])  # fmt: skip
def test_tables_that_are_refused(tmp_path, table, line, names):
    rated = "1\t0\t1\t[1]\n"
    start = {TEXTS: "1\t0\tfirst\n", RATES: rated} | dict.fromkeys(OTHER_RATES, rated)
    start = start.get(table, "1_1\t0\tt\n")
    if "line 2" not in names:
        start = ""
    tables = {TEXTS: b"1\t0\tfirst", RATES: b"1\t0\t1\t[1]"} | {table: (start + line).encode()}
    with pytest.raises(UserError, match=f"a.tar.gz: .*{table}.txt, {names}"):
        read(archive(tmp_path / "a.tar.gz", **tables))


@pytest.mark.parametrize("kind", [
    tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE,
    tarfile.GNUTYPE_SPARSE,
])  # fmt: skip
@pytest.mark.parametrize(
    "target", ["/etc/passwd", "../../etc/passwd", "hutto_ICWSM_2014/_README_.txt"]
)
def test_links_for_tables_are_refused(tmp_path, kind, target):
    path = archive(tmp_path / "a.tar.gz", **{RATES: (kind, target)})
    before = listing(tmp_path)
    with pytest.raises(UserError, match="a.tar.gz: not the archive"):
        read(path)
    path.write_bytes(tar({sources.INNER: (kind, target)}))
    with pytest.raises(UserError, match="a.tar.gz: not the archive"):
        read(path)
    assert [row[0] for row in listing(tmp_path)] == [row[0] for row in before]


def test_nothing_is_unpacked(tmp_path, monkeypatch):
    """Members that would leave the folder are of no interest; the reader writes nothing at all."""
    folder = tmp_path / "deep" / "er"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    outside = {name: b"x" for name in ("../evil", "../../evil", str(tmp_path / "evil"), "evil")}
    outside["link"] = tarfile.SYMTYPE, "/etc/passwd"
    path = archive(folder / "a.tar.gz", more=outside)
    before = listing(tmp_path)
    assert len(read(path)[0]) == 12
    assert listing(tmp_path) == before and not os.path.lexists("/evil")


@pytest.mark.parametrize("where", ["outer", "inner", "table", "claimed size"])
def test_bombs_are_refused(tmp_path, where):
    path, zeros = tmp_path / "a.tar.gz", bytes(70 * 2**20)
    if where == "claimed size":
        head = tarfile.TarInfo(sources.INNER)
        head.size = 2**62
        path.write_bytes(gzip.compress(head.tobuf(tarfile.GNU_FORMAT) + bytes(1024)))
    elif where == "table":
        archive(path, **{RATES: zeros})
    else:
        bomb = gzip.compress(zeros, 1)
        path.write_bytes(bomb if where == "outer" else tar({sources.INNER: bomb}))
    with pytest.raises(UserError, match="a.tar.gz: not the archive"):
        read(path)


def test_no_archive(tmp_path):
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "a.tar.gz")
    half = archive(tmp_path / "b.tar.gz").read_bytes()[:-300]
    for raw in (b"", b"x", gzip.compress(b""), gzip.compress(b"x" * 5000), half):
        (tmp_path / "a.tar.gz").write_bytes(raw)
        with pytest.raises(UserError, match="a.tar.gz: not the archive"):
            read(tmp_path / "a.tar.gz")


# At random


def test_fuzz():
    command = [sys.executable, str(Path(__file__).parent / "fuzz.py")]
    command += ["--records", "3000", "--seed", "7"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "total" in done.stdout and "3,000" in done.stdout
