"""Damaged files for every reader: each gives a clear error, or what the file says, in little time.

It touches nothing else. `python tests/fuzz.py` prints a table and exits with 1 where a reader
crashed, hung, lost or changed something, ran or wrote something; `--records 1000` is quick. What a
reader returns is held against a second, small reading of the same bytes (json, zlib, struct and
NumPy; CSV by hand): no record, rating, comparison or key may be lost in silence.
"""

import argparse
import collections
import contextlib
import copy
import faulthandler
import gzip
import io
import json
import os
import pickle
import random
import re
import resource
import signal
import struct
import sys
import tarfile
import tempfile
import time
import zlib
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from minirlhf import data
from minirlhf.data import labels, sources
from minirlhf.engine.cli import UserError
from minirlhf.engine.files import parse_json
from minirlhf.feedback import labelers
from minirlhf.feedback.preference_model import PreferenceModel
from minirlhf.gpt import GPT, GPTConfig, RewardModel
from minirlhf.tokenizer import EOS, Tokenizer

try:
    import pyarrow
    from pyarrow import parquet
except ImportError:
    parquet = None  # no parquet, then

sys.dont_write_bytecode = True
SECONDS = 2  # a record may take


class Hang(BaseException):
    pass


# What readers must not do

FORBIDDEN = {
    "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork",
    "pickle.find_class", "os.mkdir", "os.rename", "os.remove", "os.link", "os.symlink", "os.chmod",
    "os.rmdir", "os.truncate", "socket.connect", "ctypes.dlopen",
}  # fmt: skip
reading, forbidden = [False], []


def audit(event, args):
    flags = os.O_WRONLY | os.O_RDWR | os.O_CREAT
    writes = False
    if event == "open":
        _, mode, opened = args
        writes = any(c in str(mode) for c in "wax+") or (mode is None and opened & flags)
    if reading[0] and (event in FORBIDDEN or writes):
        forbidden.append(f"{event} {args!r}"[:200])


# Damage

TEXTS = ["", " ", "a", "film", "\0", "\u2028", "\x85", "\ufeff", "😀👍🏽", "日本", "e\u0301",
         "\r\n", EOS, "\u202e", "\U0010ffff", "a" * 3000, "\n\nAssistant:"]  # fmt: skip
ODD = [None, True, False, 0, 1, -1, 2**31, 2**63, 2**64, -(2**63), 10**400, 0.0, 1.0, -1.5, 1e308,
       float("nan"), float("inf"), [], {}, [[]], [None], {"a": []}, "\ud800", "@digits@",
       "@1e999@", "@deep@", "@deeper@", "@deepest@", "@objects@", *TEXTS]  # fmt: skip
RAW = {
    "@digits@": "9" * 5000,
    "@1e999@": "1e999",
    "@deep@": "[" * 90 + "]" * 90,
    "@deeper@": "[" * 985 + "]" * 985,
    "@deepest@": "[" * 50_000 + "]" * 50_000,
    "@objects@": '{"a":' * 20_000 + "1" + "}" * 20_000,
}
SNIPPETS = [
    b"\0", b"\xff", b"\xef\xbb\xbf", b"\r\n", b"\n", b"\xe2\x80\xa8", b"\xed\xa0\x80", b"\\ud800",
    b"1e999", b"NaN", b"-", b"[" * 2000, b"9" * 5000, b'"', b"{", b"}", b",", b":", b"\t",
    b"\x1f\x8b\x08\0", b"\x80\x04c", b"null", bytes(512), b"\xff" * 8, b"-1",
]  # fmt: skip


def damage_bytes(rng, raw, other=b""):
    raw = bytearray(raw)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        i, j = rng.randrange(len(raw) + 1), rng.randrange(len(raw) + 1)
        n = rng.choice((1, 2, 8, 100))
        kind = rng.randrange(8)
        if kind == 0 and i < len(raw):
            raw[i] ^= 1 << rng.randrange(8)
        elif kind == 1 and i < len(raw):
            raw[i] = rng.randrange(256)
        elif kind == 2:
            raw[i:i] = rng.randbytes(n)
        elif kind == 3:
            del raw[i : i + n]
        elif kind == 4:
            del raw[i:]
        elif kind == 5:
            raw[i:i] = raw[j : j + n]
        elif kind == 6:
            raw[i:] = other[rng.randrange(len(other) + 1) :]
        else:
            raw[i:i] = rng.choice(SNIPPETS)
    return bytes(raw)


def damage_json(rng, value):
    """JSON text of a value in which something is replaced, deleted, renamed, wrapped or doubled.

    The value itself stays.
    """
    value = json.loads(json.dumps(value))
    for _ in range(rng.choice((1, 1, 2, 3))):
        node = value
        while isinstance(node, (dict, list)) and node:
            key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
            if isinstance(node[key], (dict, list)) and node[key] and rng.random() < 0.7:
                node = node[key]
                continue
            kind = rng.randrange(8)
            if kind == 0:
                del node[key]
            elif kind == 1:
                node[key] = [node[key]]
            elif kind == 2:
                node[key] = {"a": node[key]}
            elif kind == 3 and isinstance(node, dict):
                node[rng.choice(TEXTS)] = node.pop(key)
            elif kind == 4:
                other = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
                node[key] = copy.deepcopy(node[other])
            elif kind == 5 and type(node[key]) in (int, float) and abs(node[key]) < 1e300:
                n = node[key]
                node[key] = rng.choice((n + 1, n - 1, -n, n * 2, float(n), str(n), bool(n)))
            else:
                node[key] = copy.deepcopy(rng.choice(ODD))
            break
        else:
            value = copy.deepcopy(rng.choice(ODD))
    text = json.dumps(value, ensure_ascii=rng.random() < 0.5 or "\\ud8" in json.dumps(value))
    for name, raw in RAW.items():
        text = text.replace(f'"{name}"', raw)
    if rng.random() < 0.05 and text.startswith('{"'):  # a key twice
        text = text[:-1] + ", " + text[1:]
    return text


# JSONL and its records: a second reading

ALIASES = {"question": "prompt", "instruction": "prompt", "query": "prompt",
           "completion": "response", "completions": "responses", "conversations": "messages",
           "conversation": "messages", "score": "rating", "system_prompt": "system"}  # fmt: skip
REFUSED = ("input", "context", "history", "documents", "tools", "functions", "tool_calls", "images",
           "image", "videos", "video", "audios", "audio")  # fmt: skip
SPEAKERS = {"user": "Human", "human": "Human", "prompter": "Human", "gpt": "Assistant",
            "developer": "System"}  # fmt: skip
ANSWER, ASKS = "\n\nAssistant:", ("Human", "System")
TAG = re.compile(r"\s*(Human|System|Assistant): ")
Said = collections.namedtuple("Said", "kind prompt responses number columns unused")


def plain(text):
    """JSON without a key twice."""

    def once(pairs):
        assert len({k for k, _ in pairs}) == len(pairs)
        return dict(pairs)

    return json.loads(text, object_pairs_hook=once)


def turns_of(value):
    """[(who speaks, what)] of a message or several; None of a text."""
    if isinstance(value, str):
        return None
    turns = []
    for m in [value] if isinstance(value, dict) else value:
        for odd in ("tool_calls", "function_call", *REFUSED[7:], "thinking", "reasoning_content"):
            assert not m.get(odd)
        role = m["role"] if "role" in m else m["from"]
        content = m["content"] if "content" in m else m["value"]
        if isinstance(content, list):
            content = "".join(part["text"] for part in content)
        role = role.strip().lower()
        assert role and isinstance(content, str)
        turns.append((SPEAKERS.get(role, role.capitalize()), content))
    return turns


def text_of(turns):
    return "".join(f"\n\n{name}: {content}" for name, content in turns)


def is_tagged(text):
    return bool(TAG.match(text)) and ANSWER in text


def ends_in_header(text):
    return bool(re.search(r"\n\n\w+:\s*$", text))


def longest_shared(texts):
    n = 0
    while n < min(map(len, texts)) and len({text[n] for text in texts}) == 1:
        n += 1
    return texts[0][:n]


def of_texts(prompt, texts):
    """(prompt, responses) of answers that are texts, after a text or None."""
    whole = all(map(is_tagged, texts))
    if prompt is not None and (ends_in_header(prompt) or not whole):
        if ends_in_header(prompt) and all(text.startswith(prompt) for text in texts):
            return prompt, [text[len(prompt) :] for text in texts]
        return prompt, texts
    shared = longest_shared(texts)
    n = shared.rfind(ANSWER) + len(ANSWER) if ANSWER in shared else 0
    if not n or len(texts) == 1 and not is_tagged(shared):
        n = len(shared[: shared.rfind(" ") + 1].rstrip()) if len(texts) > 1 else 0
    assert prompt is None or prompt.strip() in shared
    return shared[:n], [text[n:] for text in texts]


def of_turns(prompt, answers, system):
    """(prompt, responses) of answers that are turns: what all share up to an answer of theirs."""
    dialogues = []
    for answer in answers:
        asked = [content.strip() for _, content in answer[:-1]]
        turns = answer
        if isinstance(prompt, str):
            if prompt.strip() not in asked and not (prompt == "" and answer[0][0] in ASKS):
                assert not any(name in ASKS for name, _ in answer)
                turns = [("Human", prompt), *answer] if prompt else answer
        elif prompt is not None:
            own = [t for i, t in enumerate(prompt) if i or t[0] != "System"]
            given = [t for i, t in enumerate(answer) if i or t[0] != "System"]
            if given[: len(own)] != own or len(given) == len(own):
                turns = prompt + answer
            elif prompt[0][0] == "System" != answer[0][0]:
                turns = prompt[:1] + answer
        if system and turns[0][0] != "System":
            turns = [("System", system), *turns]
        dialogues.append(turns)
    whole = [text_of(turns) for turns in dialogues]
    if len(dialogues) == 1:
        n = len(dialogues[0]) - 1
        if isinstance(prompt, list):
            known = sum(1 for i, t in enumerate(prompt) if i or t[0] != "System")
            n = known + (dialogues[0][0][0] == "System")
    else:
        n = min(map(len, dialogues))
        while len({tuple(turns[:n]) for turns in dialogues}) > 1:
            n -= 1
    cuts = []
    for k in range(n + 1):
        names = {turns[k][0] if k < len(turns) else "" for turns in dialogues}
        if len(names) == 1 and not names & {"", *ASKS}:
            cuts.append(text_of(dialogues[0][:k]) + f"\n\n{names.pop()}:")
    assert all(text.startswith(cuts[-1] + " ") for text in whole)
    return cuts[-1], [text[len(cuts[-1]) :] for text in whole]


def second_reading(record):
    """What a record says. Fails where it says nothing that is known."""
    entry = {k: v for k, v in record.items() if v is not None}
    assert not any(entry.pop(k, None) for k in REFUSED)
    named = {}
    for k, v in entry.items():
        first = named.setdefault(ALIASES.get(k, k), v)
        assert first is v or first == v
    has, used = named.keys(), {"prompt", "messages", "system"}
    turns = turns_of(named["messages"]) if "messages" in has else None
    number = 0.0
    if {"chosen", "rejected"} <= has:
        kind, given = "comparison", [named["chosen"], named["rejected"]]
        used |= {"chosen", "rejected", "margin"}
    elif {"responses", "ranking"} <= has:
        kind, given = "comparison", [named["responses"][i] for i in named["ranking"]]
        assert sorted(named["ranking"]) == list(range(len(named["responses"])))
        used |= {"responses", "ranking", "margin"}
    else:
        key = "response" if "response" in has else None
        key = key or ("messages" if turns and turns[-1][0] not in ASKS else None)
        key = key or ("text" if "text" in has and "prompt" not in has else None)
        kind = next((k for k in ("rating", "label") if k in has), "text") if key else "prompt"
        given = [named[key]] if key else []
        used |= {key, kind} if kind in ("rating", "label") else {key} if key else set()
        turns = None if key == "messages" else turns
        number = float(named[kind]) if kind in ("rating", "label") else 0.0
        assert kind != "label" or named["label"] in (0, 1)
    if kind == "comparison":
        number = float(named.get("margin", 0))
        assert type(named.get("margin", 0)) in (int, float)
    assert abs(number) <= 1e15
    assert kind != "rating" or type(named["rating"]) in (int, float)
    prompt, answers = named.get("prompt"), [turns_of(value) for value in given]
    texts = [value for value in given if isinstance(value, str)]
    if prompt is not None and turns_of(prompt):
        prompt = turns_of(prompt)
    if turns:
        last = turns[-1]
        if turns not in answers:
            if last[1] in texts or [last] in answers:
                turns = turns[:-1]
            assert not turns or prompt is None or prompt in (turns, turns[-1][1])
            prompt = turns or prompt
    system = named.get("system")
    if isinstance(system, list):
        ((_, system),) = turns_of(system)
    system = system if system and system.strip() else None
    unused = set() if kind == "prompt" else {k for k in entry if ALIASES.get(k, k) not in used}
    columns = {k: v for k, v in record.items() if ALIASES.get(k, k) not in used}
    columns = columns if kind == "prompt" else {}
    found = put_together(prompt, answers, texts, system, bool(given))
    return Said(kind, *found, number, columns, unused)


def put_together(prompt, answers, texts, system, any_answer):
    if not any_answer and isinstance(prompt, str) and not system:
        return prompt, []
    first = text_of([("System", system)]) if system else ""
    if not texts and any_answer:
        header = isinstance(prompt, str) and ends_in_header(prompt)
        if not header or max(map(len, answers)) > 1:
            return of_turns(prompt, answers, system)
        spoken = [" " + content for ((_, content),) in answers]
        return of_texts(first + prompt, spoken)
    assert len(texts) == len(answers)
    if isinstance(prompt, list) and prompt[0][0] == "System":
        first = ""
    if any_answer and all(map(is_tagged, texts)):
        question = prompt if isinstance(prompt, str) else None
        if question is None or not ends_in_header(question):
            return of_texts(question, [first + text for text in texts])
        if first:
            return of_texts(first + question, [first + text for text in texts])
    if isinstance(prompt, list) or (first and not ends_in_header(prompt)):
        asked = prompt if isinstance(prompt, list) else [("Human", prompt)]
        return first + text_of(asked) + ANSWER, [" " + text for text in texts]
    return of_texts(first + prompt if first else prompt, texts)


def check_record(record, found):
    said = second_reading(record)
    texts = (found.prompt, *found.responses)
    assert all(isinstance(t, str) and t.encode() is not None for t in texts)
    assert found.kind == said.kind and found.prompt == said.prompt
    assert found.responses == said.responses and len(set(said.responses)) == len(said.responses)
    assert found.number == said.number and type(found.number) is float
    assert set(found.unused) == said.unused and same(found.columns, said.columns)


def same(a, b):
    return json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)


def check_feedback(records, feedback):
    """Nothing is lost: what was read, merged and left unused is what was there, on two sides."""
    said = [second_reading(record) for record in records]
    assert len({s.kind for s in said}) == 1
    ratings, compared = collections.defaultdict(list), collections.Counter()
    answers, unused = 0, set()
    for s in said:
        items = [(s.prompt, response) for response in s.responses or [""]]
        answers, unused = answers + len(items), unused | s.unused
        for item in items:
            ratings[item].append(s.number)
        if s.kind == "comparison":
            compared[tuple(items), s.number] += 1
    rated, found = said[0].kind in ("rating", "label"), collections.Counter()
    read = {}
    for items in (feedback.train, feedback.test):
        keys = list(zip(items.prompts, items.responses, strict=True))
        for i, key in enumerate(keys):
            if rated:
                assert key not in read
            read[key] = sorted(items.ratings[i].tolist()) if rated else None
        for g, group in enumerate(items.groups):
            margin = items.margins[g] if items.margins else 0.0
            found[tuple(keys[i] for i in group), margin] += 1
        assert items.thumbs == (said[0].kind == "label")
        assert (items.columns is None) == (said[0].kind != "prompt")
    assert read == {key: sorted(r) if rated else None for key, r in ratings.items()}
    assert found == compared
    counts = {"records": len(records), "kind": said[0].kind, "answers": answers}
    counts |= {"items": len(ratings), "merged": answers - len(ratings), "unused": sorted(unused)}
    assert {k: feedback.counts[k] for k in counts} == counts


def lines_of(raw):
    """Entries of JSONL, or of one JSON array."""
    lines = [line.decode("utf-8-sig") for line in raw.splitlines()]
    lines = [line for line in lines if line.strip()]
    if lines and lines[0].lstrip().startswith("["):
        return plain("\n".join(lines))
    return [plain(line) for line in lines]


def cells_of(raw):
    """Entries of CSV (RFC 4180), a character at a time."""
    text, rows, row, cell, quoted = raw.decode("utf-8-sig"), [], [], "", None
    i = 0
    while i < len(text):
        c = text[i]
        if quoted == "open":
            if c == '"' and text[i + 1 : i + 2] == '"':
                cell, i = cell + '"', i + 1
            elif c == '"':
                quoted = "closed"
            else:
                cell += c
        elif c in ",\r\n":
            row, cell, quoted = [*row, cell], "", None
            if c != ",":
                i += text[i : i + 2] == "\r\n"
                rows, row = [*rows, row], []
        elif c == '"' and not cell and quoted is None:
            quoted = "open"
        else:
            assert quoted is None
            cell += c
        i += 1
    assert quoted != "open"
    rows += [[*row, cell]] if row or cell or quoted else []
    names, *rows = [row for n, row in enumerate(rows) if row != [""] or n == 0]
    assert all(len(row) == len(names) for row in rows)
    return [{n: value_of(n, c) for n, c in zip(names, row, strict=True)} for row in rows]


def value_of(name, text):
    if not text:
        return None
    if name == "label":
        return {"true": True, "false": False, "1": True, "0": False}[text.lower()]
    if name in ("rating", "score", "margin"):
        return float(text)
    if text[0] in "[{":
        try:
            value = plain(text)
        except Exception:
            return text
        messages = value if isinstance(value, list) else [value]
        if messages and all(isinstance(m, dict) and ("role" in m or "from" in m) for m in messages):
            return value
        return value if name in ("responses", "completions", "ranking") else text
    return text


def of_table(value):
    """A value of parquet as JSON has it."""
    if isinstance(value, (dict, list)):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        read = {k: of_table(v) for k, v in pairs}
        return read if isinstance(value, dict) else list(read.values())
    return value.decode(errors="backslashreplace") if isinstance(value, bytes) else value


def rows_of(raw):
    """Entries of a parquet file."""
    return of_table(parquet.read_table(io.BytesIO(raw), use_threads=False).to_pylist())


def gunzip(raw):
    """All members, by RFC 1952; zeros may follow each."""
    out = b""
    while raw:
        assert raw[:3] == b"\x1f\x8b\x08"
        flags, at = raw[3], 10
        if flags & 4:
            at += 2 + int.from_bytes(raw[at : at + 2], "little")
        for flag in (8, 16):  # a name, a comment
            at = raw.index(b"\0", at) + 1 if flags & flag else at
        one = zlib.decompressobj(-15)
        part = one.decompress(raw[at + 2 * (flags >> 1 & 1) :]) + one.flush()
        assert one.eof and struct.pack("<II", zlib.crc32(part), len(part)) == one.unused_data[:8]
        out, raw = out + part, one.unused_data[8:].lstrip(b"\0")
    return out


def form(rng, kind, i):
    """A valid record of one of the kinds that do not mix."""
    texts = [*TEXTS, f"p{i} q", f"r{i}"]
    a, b = rng.choice(texts), f"{rng.choice(texts)}{i}"
    ask = [{"role": "user", "content": f"{a}{i}"}]
    ask = [{"role": "system", "content": "S"}] * (rng.random() < 0.2) + ask
    answers = [{"role": "assistant", "content": b + x} for x in ("", "!", "?")]
    whole = [[*ask, answer] for answer in answers]
    grown = [{"role": "user", "content": f"q{i}"}, {"role": "gpt", "content": b}]
    if kind in ("rating", "label", "text"):
        record = rng.choice((
            {"prompt": rng.choice((f"p{i}", "")), "response": a}, {"messages": whole[0]},
            {"prompt": ask, "completion": b}, {"text": f"{a} {i}"},
            {"conversations": [{"from": "human", "value": a}, {"from": "gpt", "value": b}]},
        ))  # fmt: skip
        numbers = {"rating": rng.choice((1, -2.5, i, 1e14)), "label": rng.random() < 0.5}
        return record if kind == "text" else record | {kind: numbers[kind]}
    if kind == "prompt":
        return {rng.choice(("prompt", "question")): rng.choice((ask, f"p{i}")), "answer": a}
    return rng.choice((
        {"prompt": f"p{i}", "chosen": b, "rejected": b + "x", "margin": 0.5},
        {"chosen": f"x{i} y " + b, "rejected": f"x{i} y " + b + "z", "source": "a"},
        {"chosen": whole[0], "rejected": whole[1]},
        {"prompt": f"{a}{i}", "chosen": whole[0], "rejected": whole[1], "score_chosen": 1},
        {"prompt": ask, "chosen": b + "c", "rejected": "d"},
        {"prompt": ask, "responses": answers, "ranking": rng.sample(range(3), 3)},
        {"responses": whole, "ranking": rng.sample(range(3), 3), "margin": 2},
        {"messages": ask, "chosen": answers[0], "rejected": answers[1]},
        {"prompt": f"\n\nHuman: {i}{ANSWER}", "chosen": f" {b}", "rejected": f" {b}x"},
        {"chosen": f"\n\nHuman: {i}{ANSWER} a{i}", "rejected": f"\n\nHuman: {i}{ANSWER} b{i}"},
        {"system": f"s{a}", "prompt": f"q{i}", "chosen": "c" + b, "rejected": "r" + b},
        {"system": f"s{a}", "chosen": whole[0][-2:], "rejected": whole[1][-2:]},
        {"prompt": f"q{i}", "chosen": grown + whole[0][-2:], "rejected": grown + whole[1][-2:]},
        {"prompt": f"{a}p{i}", "responses": [b, b + "1", b + "2"],
         "ranking": rng.sample(range(3), 3)},
    ))  # fmt: skip


def with_more(rng, record):
    """The record with keys of another; its own stay."""
    other = form(rng, rng.choice(ALL), rng.randrange(99))
    more = rng.sample(sorted(other), rng.randint(1, len(other)))
    mixed = list(({key: other[key] for key in more} | record).items())
    rng.shuffle(mixed)
    return dict(mixed)


ALL = ("pair", "pair", "rating", "label", "text", "prompt")


PACKED = ("none", "snappy", "zstd")


# The readers, each a class: `make(rng)` -> what to read and whether it is undamaged; `read`;
# `check` against the second reading


class Line:
    share, name = 28, "JSONL line"

    def __init__(self, folder):
        pass

    def make(self, rng):
        record = form(rng, rng.choice(ALL), rng.randrange(99))
        if rng.random() < 0.1:
            return json.dumps(record, ensure_ascii=rng.random() < 0.5), True
        if rng.random() < 0.2:
            return json.dumps(with_more(rng, record)), False
        if rng.random() < 0.6:
            return damage_json(rng, record), False
        other = b'{"prompt": "", "response": "b", "rating": 1}'
        raw = damage_bytes(rng, json.dumps(record).encode(), other)
        return raw.decode(errors="replace"), False

    def read(self, text):
        return data.parse_record(parse_json(text, "line 7"), "line 7")

    def check(self, text, found):
        check_record(plain(text), found)


class File:
    share, name, suffix = 12, "JSONL file", ".jsonl"
    kinds = ALL

    def __init__(self, folder):
        self.path = folder / f"data{self.suffix}"

    def records(self, rng):
        """(records of one kind, whether all must be read)."""
        kind = rng.choice(self.kinds)
        return [form(rng, kind, i) for i in range(rng.choice((11, 14)))], kind == "pair"

    def make(self, rng):
        records, whole = self.records(rng)
        lines = [json.dumps(record, ensure_ascii=rng.random() < 0.5) for record in records]
        whole = whole and rng.random() < 0.1
        if not whole and rng.random() < 0.5:
            i = rng.randrange(len(lines))
            one = damage_json(rng, json.loads(lines[i]))
            twice = lines[i] + "\n" + lines[i]
            more = json.dumps(with_more(rng, records[i]))
            others = "", " ", "\ufeff" + lines[i], lines[i] + "\r", twice
            lines[i] = rng.choice((one, more, *others))
        raw = "\n".join(lines).encode(errors="surrogatepass") + rng.choice((b"", b"\n", b"\r\n\n"))
        if not whole and rng.random() < 0.5:
            raw = damage_bytes(rng, raw, raw)
        return self.pack(rng, raw, whole), whole

    def pack(self, rng, raw, whole):
        return raw

    entries = staticmethod(lines_of)

    def read(self, raw):
        self.path.write_bytes(raw)
        reading[0] = True
        return data.load_feedback(str(self.path))

    def check(self, raw, found):
        check_feedback(self.entries(raw), found)


class Array(File):
    share, name, suffix = 5, "JSON array", ".json"

    def make(self, rng):
        records, whole = self.records(rng)
        whole = whole and rng.random() < 0.1
        text = json.dumps(records, indent=rng.choice((None, 1)), ensure_ascii=rng.random() < 0.5)
        if not whole and rng.random() < 0.5:
            text = damage_json(rng, records)
        raw = text.encode(errors="surrogatepass")
        return (raw if whole or rng.random() < 0.5 else damage_bytes(rng, raw, raw)), whole


def line_of(cells):
    """Of a CSV file. Python 3.10's writer refuses a NUL."""
    texts = []
    for text in map(str, cells):
        special = any(c in text for c in ',"\r\n')
        texts.append('"' + text.replace('"', '""') + '"' if special else text)
    return ",".join(texts)


class Table(File):
    share, name, suffix = 6, "CSV file", ".csv"

    def make(self, rng):
        kind = rng.choice(("pair", "rating", "label", "prompt"))
        lines, end = [], rng.choice(("\n", "\r\n"))
        names = {
            "pair": ["prompt", "chosen", "rejected", "margin"],
            "prompt": ["prompt", "answer"],
            "rating": ["response", "rating"],
            "label": ["prompt", "response", "label"],
        }[kind]
        lines.append(line_of(names))
        for i in range(rng.choice((11, 14))):
            a, b = (rng.choice([*TEXTS, "a,b", '"', "[1]", '{"role": 1}', "a\nb"]) for _ in "ab")
            turns = json.dumps([{"role": "user", "content": a}])
            cells = {"pair": [rng.choice((f"p{i}", f"{a}{i}")), b + "x", b + "y", i / 2],
                     "rating": [f"{a}{i}", i], "label": [f"p{i}", f"{a}{i}", i % 2],
                     "prompt": [rng.choice((f"p{i}", f"{b}{i}", turns)), a]}[kind]  # fmt: skip
            lines.append(line_of(cells))
        raw = "".join(line + end for line in lines).encode()
        whole = kind == "pair" and rng.random() < 0.1
        raw = raw if whole or rng.random() < 0.2 else damage_bytes(rng, raw, raw)
        refused = sys.version_info < (3, 11) and b"\0" in raw  # by Python's reader
        return raw, whole and not refused

    entries = staticmethod(cells_of)


class Parquet(File):
    share, name, suffix = 4, "parquet file", ".parquet"

    def make(self, rng):
        """Flat columns, lists of structs, nulls, and bytes where text is meant."""
        kind, n = rng.choice(("pair", "whole", "rating", "prompt")), rng.choice((11, 14))
        rows = []
        for i in range(n):
            a, b = rng.choice(TEXTS), rng.choice(TEXTS)
            ask = {"role": "user", "content": f"{a}{i}"}
            answers = [{"role": "assistant", "content": f"{b}{x}"} for x in "xy"]
            rows.append({
                "pair": {"prompt": f"p{i}", "chosen": b + "x", "rejected": b + "y",
                         "margin": rng.choice((None, i / 2))},
                "whole": {"chosen": [ask, answers[0]], "rejected": [ask, answers[1]], "source": a},
                "rating": {"response": f"{a}{i}".encode(), "rating": rng.choice((i, 0.5))},
                "prompt": {"prompt": f"p{i % 12}", "answer": str(i % 12), "note": None},
            }[kind])  # fmt: skip
        out = io.BytesIO()
        parquet.write_table(pyarrow.Table.from_pylist(rows), out, compression=rng.choice(PACKED))
        raw, whole = out.getvalue(), kind == "pair" and rng.random() < 0.2
        return (raw if whole or rng.random() < 0.4 else damage_bytes(rng, raw, raw)), whole

    entries = staticmethod(rows_of)


class Gzip(File):
    share, name, suffix = 9, "gzip file", ".jsonl.gz"

    def entries(self, raw):
        return lines_of(gunzip(raw))

    def pack(self, rng, raw, whole):
        half = rng.randrange(len(raw) + 1)
        packed = rng.choice((
            lambda: gzip.compress(raw, 1),
            lambda: gzip.compress(raw[:half], 1) + gzip.compress(raw[half:], 1),
            lambda: gzip.compress(raw, 0) + bytes(rng.randrange(9)),
        ))()  # fmt: skip
        return packed if whole or rng.random() < 0.3 else damage_bytes(rng, packed, packed)


class TokenizerFile:
    share, name = 7, "tokenizer.json"

    def __init__(self, folder):
        self.path, self.seeds = folder / "tokenizer.json", []
        film = "the film, the films"
        corpora = ([film], 257), ([film, "日本 \n\n aaaa"], 290), (["aaaaaaaa bbbb"], 262)
        for texts, size in corpora:
            Tokenizer.train(texts, size).save(folder)
            self.seeds.append(json.loads(self.path.read_text()))
        # as in GPT-2's bytes_to_unicode
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [b for b in range(256) if b not in printable]
        self.byte = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}

    def make(self, rng):
        seed = rng.choice(self.seeds)
        kind = rng.random()
        if kind < 0.1:
            return json.dumps(seed).encode(), True
        if kind < 0.4:
            return damage_bytes(rng, json.dumps(seed).encode(), b'"merges": [["a", "b"]]}}'), False
        if kind < 0.7:
            return damage_json(rng, seed).encode(errors="surrogatepass"), False
        model = seed["model"]
        part = rng.choice(("vocab", "merges"))
        whole = json.dumps(seed | {"model": model | {part: "@part@"}})
        text = whole.replace('"@part@"', damage_json(rng, model[part]))
        return text.encode(errors="surrogatepass"), False

    def read(self, raw):
        self.path.write_bytes(raw)
        reading[0] = True
        tokenizer = Tokenizer.load(self.path.parent)
        return tokenizer, tokenizer.encode("the film 日本 \0" + EOS)

    def check(self, raw, found):
        tokenizer, ids = found
        content = json.loads(raw)
        vocab = dict(content["model"]["vocab"])
        added = {t["content"]: t["id"] for t in content.get("added_tokens") or []}
        behind = {name: i for name, i in added.items() if name != EOS}
        vocab = {token: i for token, i in vocab.items() if token not in behind}
        eos = vocab.pop(EOS, added.get(EOS))
        assert eos == tokenizer.eos == added.get(EOS, eos) and eos not in vocab.values()
        assert all(type(i) is int for i in [*vocab.values(), *behind.values()])
        assert min(behind.values(), default=len(vocab) + 1) > len(vocab)
        ranks = {bytes(self.byte[c] for c in token): i for token, i in vocab.items()}
        assert tokenizer.ranks == ranks
        assert sorted([*vocab.values(), eos]) == list(range(len(vocab) + 1)) and eos not in ids
        assert tokenizer.decode(ids) == "the film 日本 \0" + EOS


def parse_safetensors(raw):
    """{name: array}, by struct, json and NumPy."""
    (n,) = struct.unpack("<Q", raw[:8])
    types = {"F32": "<f4", "F64": "<f8", "F16": "<f2"}
    header, out = json.loads(raw[8 : 8 + n]), {}
    for name, t in header.items():
        if name != "__metadata__":
            a, b = t["data_offsets"]
            part = raw[8 + n + a : 8 + n + b]
            if t["dtype"] == "BF16":
                numbers = (np.frombuffer(part, "<u2").astype("<u4") << 16).view("<f4")
            else:
                numbers = np.frombuffer(part, types[t["dtype"]])
            out[name] = numbers.reshape(t["shape"])
    return out


class Model:
    """A model directory, of which one file is damaged."""

    def __init__(self, folder):
        self.folder, self.seeds = folder, []
        config = GPTConfig(vocab_size=258, n_ctx=8, n_layer=1, n_head=2, n_embd=4)
        self.tokenizer, self.base = Tokenizer.train(["ab"], 258), GPT(config)
        models = [GPT(config), RewardModel(config)]
        models += [RewardModel(config, level="token", shift=0.5), PreferenceModel(config, 4)]
        for model in models:
            model.save_pretrained(folder)
            files = [(folder / name).read_bytes() for name in ("config.json", "model.safetensors")]
            self.seeds.append((type(model), *files))

    def read(self, case):
        cls, config, weights = case
        (self.folder / "config.json").write_bytes(config)
        (self.folder / "model.safetensors").write_bytes(weights)
        reading[0] = True
        try:
            place = str(self.folder)
            labels = cls is not GPT and labelers.load_labeler(
                place, None, self.tokenizer, self.base
            )
        except UserError:
            labels = None
        return cls.from_pretrained(self.folder), labels

    def check(self, case, found):
        (cls, config, weights), (model, labels) = case, found
        settings, c = plain(config), model.config
        sizes = ("vocab_size", "n_positions", "n_layer", "n_head", "n_embd")
        assert [settings[k] for k in sizes] == [*vars(c).values()][:5]
        transposed = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight")
        transposed += ("mlp.c_proj.weight",)
        expected = {}
        for name, w in parse_safetensors(weights).items():
            name = name.removeprefix("transformer.") if cls is GPT else name
            if not name.endswith((".attn.bias", ".attn.masked_bias", "lm_head.weight")):
                expected[name] = w.T if name.endswith(transposed) else w
        state = model.state_dict()
        assert state.keys() == expected.keys()
        for name, w in expected.items():
            assert state[name].dtype == torch.float32
            assert np.array_equal(state[name].numpy(), w.astype(np.float32))
        if cls is RewardModel:
            assert model.level == settings.get("reward_level", "response")
            assert model.shift == settings.get("reward_shift", 0.0)
        if labels:
            assert (labels[0] is None) == (settings.get("num_labels", 1) > 1)


class Config(Model):
    share, name = 8, "config.json"

    def make(self, rng):
        cls, config, weights = rng.choice(self.seeds)
        kind = rng.random()
        if kind < 0.1:
            return (cls, config, weights), True
        if kind < 0.4:
            return (cls, damage_bytes(rng, config, self.seeds[1][1]), weights), False
        if kind < 0.7:
            text = damage_json(rng, json.loads(config))
            return (cls, text.encode(errors="surrogatepass"), weights), False
        keys = ("vocab_size", "n_positions", "n_layer", "n_head", "n_embd", "num_labels")
        key = rng.choice((*keys, "reward_level", "reward_shift"))
        value = rng.choice((*ODD, 10**9, 2**30, 3, 6, 1000, "token", "1"))
        text = json.dumps(json.loads(config) | {key: value})
        for name, raw in RAW.items():
            text = text.replace(f'"{name}"', raw)
        return (cls, text.encode(), weights), False


class Safetensors(Model):
    share, name = 8, "model.safetensors"

    def make(self, rng):
        cls, config, weights = rng.choice(self.seeds)
        kind = rng.random()
        if kind < 0.1:
            return (cls, config, weights), True
        if kind < 0.12:
            return (cls, config, pickle.dumps({"wte.weight": [1.0]})), False
        n = struct.unpack("<Q", weights[:8])[0]
        if kind < 0.45:
            return (cls, config, damage_bytes(rng, weights, self.seeds[0][2])), False
        if kind < 0.6:
            at = rng.randrange(8 + n, len(weights))
            return (cls, config, weights[:at] + rng.randbytes(4) + weights[at + 4 :]), False
        header, body = json.loads(weights[8 : 8 + n]), weights[8 + n :]
        if kind < 0.8:
            text = damage_json(rng, header).encode(errors="surrogatepass")
        else:
            self.damage_header(rng, header, len(body))
            if rng.random() < 0.3:
                body = self.fitting_body(rng, header)
            text = json.dumps(header).encode()
        length = rng.choice((len(text),) * 8 + (0, 2**60, 2**64 - 1, len(text) + 1, len(text) - 1))
        return (cls, config, struct.pack("<Q", length) + text + body), False

    def damage_header(self, rng, header, end):
        """One tensor's type, shape or place is another."""
        one = header[rng.choice([k for k in header if k != "__metadata__"])]
        shape, offsets = one["shape"], one["data_offsets"]
        dtypes = ("F16", "BF16", "F64", "I32", "U8", "BOOL", "F8_E4M3", "F8_E8M0", "F4", "F6_E2M3",
                  "C64", "Q")  # fmt: skip
        shapes = ([2**32, 2**32], [2**63, 0], [2**60, 0], [0], [-1], shape[::-1], [*shape, 1],
                  [1.0], "4")  # fmt: skip
        places = ([0, 2**63], [-4, 0], [0, 0], [8, 4], [0, end], offsets[::-1], [0], [0.0, 16])
        dtype, shape, offsets = rng.choice(dtypes), rng.choice(shapes), rng.choice(places)
        one |= rng.choice(({"dtype": dtype}, {"shape": shape}, {"data_offsets": offsets}))

    def fitting_body(self, rng, header):
        """Numbers of one type for all tensors of a header, which is made to fit."""
        size = {"F16": 2, "BF16": 2, "BOOL": 1, "U8": 1, "F8_E4M3": 1, "F8_E8M0": 1, "I32": 4,
                "F64": 8, "C64": 8}  # fmt: skip
        dtype, at, body = rng.choice(list(size)), 0, b""
        for name, t in header.items():
            if name != "__metadata__":
                shape = t["shape"] if isinstance(t["shape"], list) else [1]
                count = int(np.prod(np.array(shape, dtype=np.float64)) % 1000)
                n = count * size[dtype]
                body += rng.randbytes(n) if rng.random() < 0.1 else bytes(n)
                t |= {"dtype": dtype, "data_offsets": [at, len(body)]}
                at = len(body)
        return body


class Archive:
    share, name = 7, "reviews archive"
    texts, rates = "movieReviewSnippets_GroundTruth", "movieReviewSnippets_anonDataRatings"
    others = ("amazonReviewSnippets_GroundTruth", "nytEditorialSnippets_GroundTruth",
              "tweets_GroundTruth")  # fmt: skip
    other_rates = ("amazonReviewSnippets_anonDataRatings", "nytEditorialSnippets_anonDataRatings",
                   "tweets_anonDataRatings")  # fmt: skip

    def __init__(self, folder):
        self.path = folder / "reviews.tar.gz"
        tables = {
            self.texts: [f"{i}\t0.5\t snippet {i} café " for i in range(1, 13)],
            self.rates: [f"{i}\t0\t1\t[{i % 5}, {i % 5 - 4}]" for i in range(1, 13)],
        }
        tables |= {name: [f"1_1\t0\t{name} one", "1_2\t0\ttwo\r"] for name in self.others}
        rated = ["1_2\t0\t1\t[-4, 0]", "1_1\t0\t1\t[3]"]
        tables |= dict.fromkeys(self.other_rates, rated)
        self.files = {}
        for name, lines in tables.items():
            self.files[f"{sources.FOLDER}{name}.txt"] = "\n".join(lines).encode()

    @staticmethod
    def tar(files, odd=None):
        """An uncompressed archive; `odd` changes a member's header."""
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w") as archive:
            for name, content in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                if odd and odd[0] == name:
                    info.type, info.linkname, info.name = odd[1], odd[2], odd[3] or name
                archive.addfile(info, io.BytesIO(content))
        return out.getvalue()

    def make(self, rng):
        kind, files, odd = rng.random(), dict(self.files), None
        name = rng.choice(list(files))
        if 0.1 < kind < 0.4:
            files[name] = damage_bytes(rng, files[name], files[rng.choice(list(files))])
        elif kind < 0.5 and kind > 0.1:
            type_ = rng.choice((
                tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE,
                tarfile.DIRTYPE, tarfile.REGTYPE, tarfile.GNUTYPE_SPARSE, tarfile.XHDTYPE,
                tarfile.GNUTYPE_LONGNAME,
            ))  # fmt: skip
            link = rng.choice(("/etc/passwd", "../../x", name))
            odd = name, type_, link, rng.choice((None, None, "../x", "/tmp/x", "a" * 300))
        inner = self.tar(files, odd)
        if 0.5 < kind < 0.7:
            inner = damage_bytes(rng, inner, inner)
        elif 0.7 < kind < 0.75:  # a header whose checksum is right
            at = rng.choice([i for i in range(0, len(inner), 512) if inner[i : i + 4] == b"hutt"])
            head = bytearray(inner[at : at + 512])
            sizes = (b"\xff" * 12, b"\x80" + b"\xff" * 11, b"77777777777\0", b"-0000000512\0",
                     bytes(12))  # fmt: skip
            head[124:136] = rng.choice(sizes)
            head[148:156] = b" " * 8
            head[148:156] = b"%06o\0 " % sum(head)
            inner = inner[:at] + bytes(head) + inner[at + 512 :]
        inner = gzip.compress(inner, 1)
        if 0.75 < kind < 0.8:
            inner = damage_bytes(rng, inner, inner)
        outer = self.tar({sources.INNER: inner})
        if 0.8 < kind < 0.9:
            outer = damage_bytes(rng, outer, inner)
        outer = gzip.compress(outer, 1)
        return (outer if kind < 0.9 else damage_bytes(rng, outer, inner)), kind < 0.1

    def read(self, raw):
        self.path.write_bytes(raw)
        reading[0] = True
        return data.read_reviews(self.path, sources.INNER, sources.FOLDER)

    def walk(self, raw):
        """{name: bytes} of a tar archive, from the fields of its headers (POSIX ustar)."""
        at, out = 0, {}
        while at + 512 <= len(raw) and raw[at]:
            head = raw[at : at + 512]
            given = re.match(rb" *([0-7]*)", head[148:156])[1]
            checksum = sum(head[:148]) + 8 * 32 + sum(head[156:])
            if int(given or b"0", 8) != checksum:  # an archive ends at a wrong one
                break
            size = int(head[124:136].strip(b" \0") or b"0", 8)
            if head[156:157] in (b"0", b"\0"):
                name = head[:100].rstrip(b"\0").split(b"\0")[0].decode()
                out.setdefault(name, raw[at + 512 : at + 512 + size])
            at += 512 + -(-size // 512) * 512
        return out

    def check(self, raw, found):
        files = self.walk(gunzip(self.walk(gunzip(raw))[sources.INNER]))
        rows = {}
        for name, table in files.items():
            lines = [line for line in table.split(b"\n") if line.strip()]
            name = name.removeprefix(sources.FOLDER)[:-4]
            rows[name] = [line.rstrip(b"\r").split(b"\t") for line in lines]
        snippets, ratings, others, their_ratings = found
        texts = {int(i): t.decode(errors="replace").strip() for i, _, t in rows[self.texts]}
        assert snippets == texts
        given = {int(row[0]): json.loads(row[3]) for row in rows[self.rates]}
        assert given == {i: r.tolist() for i, r in ratings.items()}
        assert given.keys() == snippets.keys() and len(given) == len(rows[self.rates])
        sentences = [row[2].decode("latin-1").strip() for name in self.others for row in rows[name]]
        assert others == sentences
        expected = []
        for name, rates in zip(self.others, self.other_rates, strict=True):
            said = {row[0].removeprefix(b"\xef\xbb\xbf"): row[3] for row in rows[rates]}
            expected += [json.loads(said[row[0]]) for row in rows[name]]
        assert expected == [r.tolist() for r in their_ratings]


class LabelLine:
    """A label of one of the eleven kinds; nothing of it is lost where it is read."""

    share, name = 6, "label of a kind"

    def __init__(self, folder):
        pass

    def make(self, rng):
        entry = {"version": 1, "prompt": rng.choice(TEXTS), "rater": "r"} | label_of(rng)
        if rng.random() < 0.1:
            return json.dumps(entry), True
        other = label_of(rng)
        if rng.random() < 0.3:
            more = rng.sample(sorted(other), rng.randint(1, len(other)))
            return json.dumps({key: other[key] for key in more} | entry), False
        return damage_json(rng, entry), False

    def read(self, text):
        entry = parse_json(text, "line 7")
        if not labels.is_label(entry):
            raise UserError("line 7: no label")
        return labels.parse_label(entry, "line 7")

    def check(self, text, found):
        entry = plain(text)
        written = labels.as_entry(found)
        assert written | {"prompt": entry.get("prompt", "")} == entry | {
            "prompt": written["prompt"]
        }
        assert all(isinstance(text, str) for text in [found.prompt, *found.responses])


def label_of(rng):
    """What a label of one of the kinds says."""
    a, b, c = (f"{rng.choice(TEXTS)} x{i}" for i in range(3))
    one, three = {"response": a}, {"responses": [a, b, c]}
    ends = sorted(rng.sample(range(len(a) + 1), 2))
    curve = [[end, round(rng.random(), 2)] for end in ends]
    grammar = ["more words", "less words"]
    return rng.choice((
        {"kind": "critique", "level": rng.randrange(3), "of": 3} | one,
        {"kind": "comparison", "ranking": rng.sample(range(3), 3)} | three,
        {"kind": "comparison", "ranking": [[0, 2], [1]], "both_bad": rng.random() < 0.5} | three,
        {"kind": "comparison", "best": rng.randrange(3)} | three,
        {"kind": "comparison", "responses": [a, b], "ranking": [0, 1], "p": rng.random()},
        {"kind": "intertemporal", "curve": curve} | one,
        {"kind": "proxy", "weights": {"words": 1}, "others": [{"words": -1.5}]} | three,
        {"kind": "social", "reaction": rng.choice(("frown", "neutral", "smile"))} | one,
        {"kind": "improvement", "improved": b} | one,
        {"kind": "language", "others": [b, c], "utterance": grammar[0], "grammar": grammar} | one,
        {"kind": "estop", "stop": rng.choice((None, len(a)))} | one,
        {"kind": "importance", "level": 0, "of": 2, "marks": [[ends]]} | one,
        {"kind": "importance", "best": 0, "marks": [[], [], [[0, 1]]]} | three,
        {"kind": "trace", "feature": "words"} | three,
        {"kind": "similarity", "odd": rng.randrange(3)} | three,
    ))  # fmt: skip


READERS = [Line, LabelLine, File, Gzip, Array, Table, TokenizerFile, Config, Safetensors, Archive]
READERS += [Parquet] if parquet else []


def attempt(reader, case, whole):
    """ "correct", "error", or what went wrong."""
    try:
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            reading[0] = isinstance(reader, (Line, LabelLine))
            with contextlib.redirect_stdout(None):
                found = reader.read(case)
        finally:
            reading[0] = False
            signal.setitimer(signal.ITIMER_REAL, 0)
    except UserError as e:
        if forbidden:
            return f"did what no reader may do: {forbidden.pop()}"
        named = any(where in str(e) for where in ("line 7", "/dev/shm", tempfile.gettempdir()))
        if not 10 < len(str(e)) < 900 or not named:
            return f"an unclear error: {str(e)[:300]}"
        return f"refused what is right: {e}" if whole else "error"
    except Hang:
        return f"took over {SECONDS} s"
    except BaseException as e:  # a panic of Rust is no Exception
        if isinstance(e, KeyboardInterrupt):
            raise
        return f"crash: {type(e).__name__}: {str(e)[:300]}"
    if forbidden:
        return f"did what no reader may do: {forbidden.pop()}"
    try:
        reader.check(case, found)
    except Exception as e:
        return f"not what the file says: {type(e).__name__}: {str(e)[:300]}"
    return "correct"


def hang(*_):
    raise Hang


COLUMNS = "{:<18}{:>14,}{:>9,}{:>14,}{:>9,}"


def try_out(cls, place, n, seed):
    """Gives a reader n files, prints its row of the table, and returns the numbers of it."""
    reader, rng = cls(place), random.Random(f"{seed} {cls.name}")
    slowest, before = 0.0, None
    counts = {"correct": 0, "error": 0}
    for i in range(n):
        if i % 500 == 0:
            faulthandler.dump_traceback_later(120, exit=True)  # a hang that no signal ends
        case, whole = reader.make(rng)
        began = time.perf_counter()
        outcome = attempt(reader, case, whole)
        slowest = max(slowest, time.perf_counter() - began)
        counts[outcome] = counts.get(outcome, 0) + 1
        before = before or set(os.listdir(place))
    counts["files left behind"] = len(set(os.listdir(place)) - before)
    bad = {k: v for k, v in counts.items() if k not in ("correct", "error") and v}
    row = [n, counts["correct"], counts["error"], sum(bad.values())]
    print(COLUMNS.format(cls.name, *row) + f"{1000 * slowest:>12.1f}", flush=True)
    for outcome in list(bad)[:5]:
        print("   ", outcome.encode("ascii", "backslashreplace").decode())
    return row


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--records", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=0)
    knobs = parser.parse_args()
    torch.set_num_threads(1)
    # an absurd allocation fails instead of filling the machine
    resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
    signal.signal(signal.SIGALRM, hang)
    sys.addaudithook(audit)
    total, start = [0] * 4, time.time()
    names = "records tried", "correct", "clear errors", "crashes", "slowest ms"
    print("{:<18}{:>14}{:>9}{:>14}{:>9}{:>12}".format("reader", *names))
    shm = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(dir=shm) as folder:
        for cls in READERS:
            place = Path(folder) / cls.__name__
            place.mkdir()
            n = max(1, knobs.records * cls.share // 100)
            row = try_out(cls, place, n, knobs.seed)
            total = [a + b for a, b in zip(total, row, strict=True)]
    faulthandler.cancel_dump_traceback_later()
    print(COLUMNS.format("total", *total) + f"   in {time.time() - start:.0f} s")
    sys.stdout.flush()
    os._exit(int(total[3] > 0))  # at once: threads of Arrow's pool may still wait at the usual end


if __name__ == "__main__":
    main()
