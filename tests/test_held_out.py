"""One record more changes no other; what is held out was not seen; what is compared is cut, filled
into batches and counted as it should be.

Expected values are worked by hand or by small loops here.
"""

import collections
import itertools
import json
import math
import random
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import train_dpo
import train_rm
from minirlhf import data, lists
from minirlhf.data import Items, load_feedback
from minirlhf.engine.cli import UserError
from minirlhf.engine.rows import Rows
from minirlhf.feedback import kinds
from minirlhf.feedback.kinds import Batch, Compared
from minirlhf.feedback.method import method_of
from minirlhf.look import accuracy
from minirlhf.look.accuracy import accuracy_figures
from minirlhf.look.ridge import ridge_scores
from minirlhf.tokenizer import Tokenizer

few = settings(max_examples=25, deadline=None, derandomize=True)
BYTES = Tokenizer.train([], 257)


def rng(seed=0):
    return np.random.default_rng(seed)


def load(folder, records):
    path = folder / "a.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return load_feedback(str(path))


def pair(i, j=0):
    return {"prompt": f"p{i}", "chosen": f"good {i} {j}", "rejected": f"bad {i} {j}"}


def rated(i, rating, prompt=""):
    return {"prompt": prompt, "response": f"answer {i}", "rating": rating}


def thumb(i, up, prompt=""):
    return {"prompt": prompt, "response": f"answer {i}", "label": up}


def turns(questions, answer, role="assistant", greeting=None):
    """A dialogue of these questions, with `A n` between them."""
    said = [{"role": role, "content": greeting}] if greeting else []
    for n, question in enumerate(questions):
        said += [{"role": "user", "content": question}, {"role": role, "content": f"A {n}"}]
    return [*said[:-1], {"role": role, "content": answer}]


def both(feedback):
    return feedback.train, feedback.test


# 2: one record more changes no other


def said_of(feedback):
    """What is said of each item: {(prompt, response): ratings}, and the comparisons as texts."""
    ratings, compared = {}, collections.Counter()
    for items in both(feedback):
        key = list(zip(items.prompts, items.responses, strict=True))
        assert len(set(key)) == len(key)
        for i, k in enumerate(key):
            ratings[k] = sorted(items.ratings[i]) if items.ratings is not None else None
        margins = items.margins or [0] * len(items.groups)
        for group, margin in zip(items.groups, margins, strict=True):
            compared[(tuple(key[i] for i in group), margin)] += 1
    return ratings, compared


def test_thumbs_stay_thumbs_beside_a_prompt_that_came_twice(tmp_path):
    """61 thumbs, two of them on one prompt: all others train as if that prompt were its own."""
    records = [thumb(i, i % 3 > 0, f"What of animal {i}?") for i in range(60)]
    alone = load(tmp_path, records)
    more = load(tmp_path, [*records, thumb(60, False, "What of animal 7?")])
    assert more.train.thumbs and more.train.ratings is not None and not more.train.groups
    assert len(more.train) + len(more.test) == 61
    before, after = said_of(alone)[0], said_of(more)[0]
    assert after.pop(("What of animal 7?", "answer 60")) == [0] and after == before
    index, good = kinds.thumbs(more.train)
    assert len(index) == len(more.train) > 45
    assert [r.tolist() == [1] for r in more.train.ratings] == good.tolist()
    texts = [t[:2] for t in more.texts()]  # of the shared prompt the better one, else all
    expected = set(zip(more.train.prompts, more.train.responses, strict=True))
    assert set(texts) == expected - {("What of animal 7?", "answer 60")}
    assert not more.test.can_compare(across=False)


def test_several_ratings_of_one_answer_are_one_item(tmp_path):
    """As five lines or as one: never pairs of equal texts."""
    ratings = {i: rng(i).integers(0, 5, 5).tolist() for i in range(60)}
    records = [rated(i, r) for i in ratings for r in ratings[i]]
    feedback = load(tmp_path, records)
    found = {k[1]: r for k, r in said_of(feedback)[0].items()}
    assert found == {f"answer {i}": sorted(r) for i, r in ratings.items()}
    assert feedback.counts["answers"] == 300 and feedback.counts["merged"] == 240
    for items in both(feedback):
        pairs, _ = items.comparisons(10**6, seed=1)
        assert all(items.responses[i] != items.responses[j] for i, j in pairs)


def grades(as_ranking):
    records = []
    for i in range(60):
        answers = [f"Grade {g} answer to {i}." for g in (1, 2, 3, 4)]
        if as_ranking:
            records.append({"prompt": f"q{i}", "responses": answers, "ranking": [3, 2, 1, 0]})
        else:
            for grade, answer in enumerate(answers, 1):
                records.append({"prompt": f"q{i}", "response": answer, "rating": grade})
    return records


def test_graded_answers_are_a_ranking_however_they_are_said(tmp_path):
    """Four grades to a prompt: lists of four, and the base model learns the best of them.

    LiPO's loss at the start, by hand: log 2 times the sum of |2^r_i - 2^r_j| and of what the ranks
    1..4 differ in 1 / ln(1 + rank).
    """
    lipo = 0
    for i, j in itertools.combinations(range(4), 2):
        lipo += (2 ** (3 - i) - 2 ** (3 - j)) * (1 / math.log(2 + i) - 1 / math.log(2 + j))
    assert math.log(2) * lipo == pytest.approx(9.393, abs=1e-3)
    held_out = []
    for as_ranking in (True, False):
        feedback = load(tmp_path, grades(as_ranking))
        assert {r.split()[1] for _, r, _ in feedback.texts()} == {"4"}
        assert len(feedback.texts()) == len(feedback.train) / 4
        held_out.append(sorted(zip(feedback.test.prompts, feedback.test.responses, strict=True)))
        seen = 0
        for said in kinds.lists_epoch(feedback.train, 32, 4, rng()):
            assert said.mask.all() and said.rewards.tolist() == [[3, 2, 1, 0]] * len(said.lists)
            ordered = np.array(feedback.train.responses)[said.index[said.lists]]
            assert all([r.split()[1] for r in row] == list("4321") for row in ordered)
            logps = torch.zeros(said.lists.shape)
            loss = lists.LISTS["lipo"](logps, logps, torch.from_numpy(said.rewards))
            assert np.allclose(loss, math.log(2) * lipo)
            seen += len(said.lists)
        assert seen == len(feedback.train) / 4
        batches = list(feedback.train.epoch(32, rng(), across=False))
        assert sum(len(b.pairs) for b in batches) == 6 * seen
    assert held_out[0] == held_out[1]


def test_one_long_ranking_leaves_the_batches_of_others(tmp_path):
    """A ranking of 40 among 1,000 pairs: batches stay full."""
    records = [pair(i) for i in range(1000)]
    answers = [f"answer {i}" for i in range(40)]
    long = {"prompt": "long", "responses": answers, "ranking": list(range(40))}
    sizes = {}
    for more in (0, 1):
        train = load(tmp_path, records + [long] * more).train
        batches = list(train.epoch(64, rng()))
        sizes[more] = [len(b.rows) for b in batches]
        assert len(batches) == round(len(train) / 64)
    assert min(sizes[1]) >= 40 and max(sizes[1]) <= 64 + 40 and max(sizes[0]) <= 66


def test_one_instruction_for_all_records(tmp_path):
    """200 pairs that answer it are split by pair; 1,000 rated answers are one scale."""
    ask = "Tell me about an animal."
    pairs = [{"prompt": ask, "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(200)]
    feedback = load(tmp_path, pairs)
    assert len(feedback.train.groups) + len(feedback.test.groups) == 200
    assert 8 <= len(feedback.test.groups) <= 40
    assert not set(feedback.train.responses) & set(feedback.test.responses)
    feedback = load(tmp_path, [rated(i, i % 7, ask) for i in range(1000)])
    assert len(feedback.train) + len(feedback.test) == 1000 and 60 <= len(feedback.test) <= 140
    for items in both(feedback):
        pairs, gaps = items.comparisons(500, seed=1)
        assert len(pairs) == 500 and (gaps > 0).all()
    best = {int(r.split()[1]) % 7 for _, r, _ in feedback.texts()}
    assert best == {5, 6}  # the best quarter, ties at its end included


KINDS = ("comparison", "ranking", "rating", "label", "text", "prompt")
WORDS = st.text("abc", min_size=1, max_size=3)


@st.composite
def files(draw):
    """12 to 40 records of one kind, on few prompts and texts, so that much is shared."""
    kind, n = draw(st.sampled_from(KINDS)), draw(st.integers(12, 40))
    some = random.Random(draw(st.integers(0, 10**6)))
    word = lambda k: "".join(some.choice("abcdefgh") for _ in range(k))  # noqa: E731
    records, shortest = [], some.choice([1, 1, 4])
    for _ in range(n):
        prompt = some.choice(["", f"p{some.randrange(n)}", f"p{word(shortest)}"])
        words = [some.choice([word(shortest), word(2), word(5)]) for _ in range(3)]
        texts = [*dict.fromkeys(words), "x", f"y{word(1)}"]
        record = {"prompt": prompt or "p"} if kind in ("text", "prompt") else {"prompt": prompt}
        if kind == "comparison":
            record |= {"chosen": texts[0], "rejected": texts[-1], "margin": some.randrange(3)}
        elif kind == "ranking":
            record |= {"responses": texts, "ranking": some.sample(range(len(texts)), len(texts))}
        elif kind != "prompt":
            record |= {"response": texts[0]}
        if kind in ("rating", "label"):
            if records and some.random() < 0.2:
                record = dict(some.choice(records))  # the same answer, rated again
            record[kind] = some.randrange(2 if kind == "label" else 5)
        records.append(record)
    return records


def expected_of(records):
    """The ratings of each item and the comparisons, read by a loop of ten lines."""
    ratings, compared = collections.defaultdict(list), collections.Counter()
    for record in records:
        prompt = record["prompt"]
        answers = [record[k] for k in ("chosen", "rejected", "response") if k in record]
        if "ranking" in record:
            answers = [record["responses"][i] for i in record["ranking"]]
        for answer in answers or [""]:
            ratings[prompt, answer].append(record.get("rating", record.get("label", None)))
        if len(answers) > 1:
            key = tuple((prompt, answer) for answer in answers)
            compared[key, record.get("margin", 0)] += 1
    rated = "rating" in records[0] or "label" in records[0]
    return {k: sorted(r) if rated else None for k, r in ratings.items()}, compared


def try_load(folder, records):
    try:
        return load(folder, records)
    except UserError as e:
        assert "at least 10" in str(e)
        return None


@few
@given(files(), st.randoms(use_true_random=False))
def test_reading_is_invariant(tmp_path_factory, records, some):
    """Under order, and under one record more or less, which is of the same kind."""
    folder = tmp_path_factory.getbasetemp()
    *records, extra = records
    first = try_load(folder, records)
    if first is None:
        return
    assert said_of(first) == expected_of(records)
    shuffled = some.sample(records, len(records))
    other = try_load(folder, shuffled)
    assert said_of(other) == said_of(first)
    assert {*zip(other.test.prompts, other.test.responses, strict=True)} == {
        *zip(first.test.prompts, first.test.responses, strict=True)
    }
    more = try_load(folder, [*records, extra])
    assert said_of(more) == expected_of([*records, extra])
    if first.train.columns is None and not extra.get("responses"):
        prompts = {extra["prompt"]}
        before, after = base_texts(first), base_texts(more)
        seen_by_both = items_of(first.train) & items_of(more.train)
        for key in seen_by_both:
            if key[0] not in prompts:
                assert (key in before) == (key in after)


def base_texts(feedback):
    return {t[:2] for t in feedback.texts()}


def items_of(items):
    return set(zip(items.prompts, items.responses, strict=True))


def epoch_of(items, **given):
    """All comparisons of an epoch, as texts."""
    found = collections.Counter()
    for batch in items.epoch(8, rng(), **given):
        for (i, j), label in zip(batch.pairs, batch.labels, strict=True):
            a, b = batch.rows[i], batch.rows[j]
            keys = [(items.prompts[k], items.responses[k]) for k in (a, b)]
            if label < 0.5:
                keys, label = keys[::-1], 1 - label
            elif label == 0.5:
                keys.sort()
            found[(*keys, round(label, 9))] += 1
    return found


def test_the_epoch_of_others_is_as_it_was():
    """One item more at a prompt: the comparisons of the other prompts are the same."""
    prompts = [f"p{i // 4}" for i in range(40)]
    ratings = [rng(i).integers(0, 4, 3).astype(float) for i in range(41)]
    texts = [f"r{i}" for i in range(41)]
    items = Items(prompts, texts[:40], texts[:40], ratings[:40])
    more = Items([*prompts, "p3"], texts, texts, ratings)
    before, after = (epoch_of(x, across=False) for x in (items, more))
    assert sum(before.values()) == 60 and sum(after.values()) == 64
    assert {k for k in before if k[0][0] != "p3"} == {k for k in after if k[0][0] != "p3"}
    groups = [[i, i + 1] for i in range(0, 40, 2)]
    items = Items(prompts, texts[:40], texts[:40], groups=groups)
    more = Items([*prompts, "p3"], texts, texts, groups=[*groups, [40, 12]])
    assert epoch_of(more) - epoch_of(items) == {(("p3", "r40"), ("p3", "r12"), 1.0): 1}


# 3: held out, and not seen


def seen(feedback):
    """Texts of the test part that are in the training part."""
    parts = [
        items.responses if items.columns is None else items.prompts for items in both(feedback)
    ]
    train, test = ({" ".join(text.split()) for text in part} - {""} for part in parts)
    return train & test


def shared_prompts(feedback):
    train, test = (set(items.prompts) - {""} for items in both(feedback))
    return train & test


GREETING = "Hello, how can I help?"
SHARED = {  # name: records in which much is shared, the most of it by less than half
    "five ratings as five lines": [rated(i % 60, i % 4) for i in range(300)],
    "thumbs three times": [thumb(i % 60, i % 4 > 0) for i in range(180)],
    "pairs twice, without prompts":
        [{"chosen": f"c{i % 60}x", "rejected": f"r{i % 60}y"} for i in range(120)],
    "pairs swapped": [{"chosen": f"c{i}x", "rejected": f"r{i}y"} for i in range(60)]
        + [{"chosen": f"r{i}y", "rejected": f"c{i}x"} for i in range(60)],
    "three pairs to a prompt": [pair(i % 40, i) for i in range(120)],
    "all six pairs of four answers": [
        {"prompt": f"p{i}", "chosen": f"{i} a{j}", "rejected": f"{i} a{k}"}
        for i in range(30) for j, k in itertools.combinations(range(4), 2)],
    "six pairs of four answers, eight prompts": [
        {"prompt": f"p{i}", "chosen": f"{i} a{j}", "rejected": f"{i} a{k}"}
        for i in range(8) for j, k in itertools.combinations(range(4), 2)],
    "answers shared by two prompts each": [
        {"prompt": f"p{i}", "chosen": f"good {i // 2}", "rejected": f"bad {i}"} for i in range(80)],
    "a refusal to a third": [
        {"prompt": f"p{i}", "chosen": f"good {i}", "rejected": f"bad {i}" if i % 3 else "No."}
        for i in range(90)],
    "rankings that overlap": [
        {"prompt": f"p{i // 2}", "responses": [f"{i // 2} a{j}" for j in range(i % 2, i % 2 + 3)],
         "ranking": [0, 1, 2]} for i in range(80)],
    "white space": [rated(i, i % 5) | {"response": f"the  film {i // 2}{' ' * (i % 2)}"}
                    for i in range(120)],
    "growing dialogues": [
        {"chosen": turns([f"q{i} {k}" for k in range(n)], f"c{i} {n}"),
         "rejected": turns([f"q{i} {k}" for k in range(n)], f"r{i} {n}")}
        for i in range(40) for n in (1, 2, 3)],
    "growing dialogues of a model": [
        {"chosen": turns([f"q{i} {k}" for k in range(n)], f"c{i} {n}", "model"),
         "rejected": turns([f"q{i} {k}" for k in range(n)], f"r{i} {n}", "model")}
        for i in range(40) for n in (1, 2, 3)],
    "dialogues after one greeting": [
        {"messages": turns([f"q{i}"], f"c{i} {n}", greeting=GREETING), "rating": n}
        for i in range(40) for n in (1, 2, 3)],
    "dialogues that grow by their own answers": [
        {"messages": turns([f"q{i} {k}" for k in range(n + 1)], f"A {n}" if n < 2 else f"end {i}")}
        for i in range(60) for n in (0, 1, 2)],
    "one question twice": [{"messages": turns([f"q{i // 2}"], f"c{i}")} for i in range(80)],
    "prompts alone, twice": [{"prompt": f"p{i // 2}", "answer": str(i // 2)} for i in range(80)],
    "prompts alone that grow": [
        {"prompt": turns([f"q{i} {k}" for k in range(n + 1)], "")[:-1]}
        for i in range(40) for n in (0, 1, 2)],
}  # fmt: skip


@pytest.mark.parametrize("name", SHARED)
def test_no_text_and_no_prompt_stands_on_both_sides(tmp_path, name):
    feedback = load(tmp_path, SHARED[name])
    answers = len(feedback.train) + len(feedback.test)
    assert not shared_prompts(feedback)
    if name != "dialogues that grow by their own answers":  # `A 0` and `A 1` are in all
        assert not seen(feedback)
    assert 0 < len(feedback.test) <= 0.3 * answers
    firsts = []
    for items in both(feedback):
        asked = {p.split("\n\nHuman: ")[1].split("\n\n")[0] for p in items.prompts if "Human" in p}
        firsts.append({question.split()[0] for question in asked})
    assert not firsts[0] & firsts[1]  # all that grows out of a question is on one side


LARGE = {  # what more than half of the file shares, and the prompts stay whole all the same
    "one answer for all": [
        {"prompt": f"p{i // 2}", "chosen": f"good {i}", "rejected": "No."} for i in range(120)],
    "a greeting and one first question": [
        {"messages": turns(["Hi", f"q{i}"], f"c{i} {n}"), "rating": n}
        for i in range(40) for n in (1, 2, 3)],
    "yes and no": [{"prompt": f"p{i // 2}", "response": ["Yes.", "No."][i % 2], "label": i % 3 > 0}
                   for i in range(160)],
}  # fmt: skip


@pytest.mark.parametrize("name", LARGE)
def test_what_all_share_divides_no_prompt(tmp_path, name):
    feedback = load(tmp_path, LARGE[name])
    assert not shared_prompts(feedback) and 0 < len(feedback.test) <= 0.3 * len(feedback.train)


@few
@given(files())
def test_the_split_is_disjoint_on_text(tmp_path_factory, records):
    feedback = try_load(tmp_path_factory.getbasetemp(), records)
    if feedback is None:
        return
    parts = linked(records)
    if len(parts) >= 10 and max(map(len, parts)) <= len(records) / 2:
        assert not seen(feedback) and not shared_prompts(feedback)
        sides = [items_of(items) for items in both(feedback)]
        for part in parts:
            keys = set(expected_of([records[i] for i in part])[0])
            assert keys <= sides[0] or keys <= sides[1]


def linked(records):
    """Lists of records that share a prompt or a text, directly or through others."""
    parts = []
    for i, record in enumerate(records):
        keys = {("prompt", record["prompt"])} if record["prompt"] else set()
        keys |= {("text", r) for _, r in expected_of([record])[0] if r}
        touched = [part for part in parts if part[0] & keys]
        parts = [part for part in parts if not part[0] & keys]
        parts.append((keys.union(*(k for k, _ in touched)), [i, *sum((m for _, m in touched), [])]))
    return [members for _, members in parts]


FORMS = {
    "pairs": pair,
    "ratings": lambda i: rated(i, i % 5, f"p{i}"),
    "thumbs": lambda i: thumb(i, i % 3 > 0, f"p{i}"),
    "dialogues": lambda i: {"messages": turns([f"q{i}", "Why?"], f"end {i}")},
    "rankings": lambda i: {"prompt": f"p{i}", "responses": [f"{i} a", f"{i} b", f"{i} c"],
                           "ranking": [2, 0, 1]},
    "prompts": lambda i: {"prompt": f"p{i}", "answer": str(i)},
    "texts": lambda i: {"text": f"a text {i}"},
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_a_side_stays_when_the_file_changes(tmp_path, form):
    """A file that grew, shrank, lost its head or was sorted anew: none changes its side."""
    records = [FORMS[form](i) for i in range(300)]
    whole = load(tmp_path, records)
    test, train = (items_of(items) for items in both(whole)[::-1])
    assert 12 <= len(test) / (len(train) + len(test)) * 300 <= 50
    changed = [records[:150], records[150:], records[::2], records[::-1]]
    changed += [[FORMS[form](i) for i in range(300, 400)] + records]
    for others in changed:
        other = load(tmp_path, others)
        assert items_of(other.test) & train == set() and items_of(other.train) & test == set()
        assert len(items_of(other.test) & test) > 0


def test_a_dialogue_that_went_on_stays_on_its_side(tmp_path):
    """The next file holds the same dialogues with a question more, and none of the old ends."""
    first = [{"messages": turns([f"q{i}"], f"c{i}")} for i in range(200)]
    second = [{"messages": turns([f"q{i}", "Why?"], f"d{i}")} for i in range(200)]
    sides = []
    for records in (first, second, first + second):
        asked = [
            {p.split(":")[1].split("\n")[0] for p in x.prompts}
            for x in both(load(tmp_path, records))
        ]
        sides.append(asked)
    assert sides[0] == sides[1] == sides[2] and len(sides[0][1]) > 5


# Chance is one half, and the best is 1

OFF = torch.autocast("cpu", enabled=False)


def coin(seed, n):
    return rng(seed).integers(0, 2, n).tolist()


def random_texts(n, seed=0):
    """Texts of four words each of many; no two alike."""
    some = rng(seed)
    return [" ".join(f"w{k}" for k in some.integers(0, 300, 4)) + f" n{i}" for i in range(n)]


def duplicated(kind):
    """Records whose labels are coins, and of which much is said twice."""
    texts, coins = random_texts(900), coin(1, 3000)
    if kind == "pairs twice":
        records = []
        for i in range(0, 900, 2):
            a, b = (texts[i], texts[i + 1])[:: 1 if coins[i] else -1]
            records += [{"prompt": f"p{i}", "chosen": a, "rejected": b}] * 2
        return records
    if kind == "pairs of shared answers":
        records = []
        for i in range(300):
            for n in range(3):
                a, b = (texts[3 * i + n], texts[3 * i + (n + 1) % 3])[
                    :: 1 if coins[3 * i + n] else -1
                ]
                records.append({"prompt": f"p{i}" if n else "", "chosen": a, "rejected": b})
        return records
    if kind == "growing dialogues":
        records = []
        for i in range(300):
            for n in range(3):
                a, b = (texts[3 * i], texts[3 * i + 1])[:: 1 if coins[i] else -1]
                asked = [f"q{i}", "And?", "Then?"][: n + 1]
                records.append({"chosen": turns(asked, a), "rejected": turns(asked, b)})
        return records
    if kind == "ratings as lines":
        return [{"response": texts[i % 900], "rating": coins[i % 900] * 3} for i in range(2700)]
    if kind == "thumbs on shared prompts":
        return [{"prompt": f"p{i % 225}", "response": texts[i % 900], "label": coins[i % 900]}
                for i in range(2700)]  # fmt: skip
    return [{"response": f"{texts[i // 2]}{' ' * (i % 2)}", "rating": coins[i // 2]}
            for i in range(1800)]  # fmt: skip


@pytest.mark.parametrize("kind", [
    "pairs twice", "pairs of shared answers", "growing dialogues", "ratings as lines",
    "thumbs on shared prompts", "white space",
])  # fmt: skip
def test_coins_cannot_be_foretold(tmp_path, kind):
    """Who has learned the training part by heart is at chance on the held-out part."""
    feedback = load(tmp_path, duplicated(kind))
    train, test = both(feedback)
    known = collections.defaultdict(float)
    pairs, _ = train.comparisons(20_000, seed=1)
    for i, j in pairs:
        known[train.responses[i].strip()] += 1
        known[train.responses[j].strip()] -= 1
    right = [
        known[train.responses[i].strip()] > known[train.responses[j].strip()] for i, j in pairs
    ]
    assert np.mean(right) > 0.7
    pairs, gaps = test.comparisons(20_000, seed=1)
    by_heart = np.array([known[text.strip()] for text in test.responses])
    ahead = torch.from_numpy(by_heart[pairs[:, 0]] - by_heart[pairs[:, 1]])
    figures = accuracy_figures(train, test, ahead, pairs, gaps)
    n = len(test)  # independent coins
    noise = 2 / math.sqrt(n)
    assert n >= 30 and figures["eval/accuracy"] == pytest.approx(0.5, abs=1e-6)
    if train.ratings is not None:
        assert figures["eval/ridge_accuracy"] == pytest.approx(0.5, abs=noise)


RATED = Items(
    ["p"] * 5 + ["q"] * 5 + [""] * 6, [f"r{i}" for i in range(16)], ["here"] * 16,
    [np.array(r, dtype=float) for r in (
        [1, 1], [2, 2], [2, 2], [3, 3], [3, 3], [0], [0], [4], [4], [5],
        [1, 1, 1], [1], [2, 2], [3], [3], [0])],
)  # fmt: skip
THUMBED = Items(
    ["p"] * 8, [f"r{i}" for i in range(8)], ["here"] * 8,
    [np.array(r, dtype=float) for r in ([1], [0], [1], [0], [1, 1], [0, 0], [1, 0], [0, 1])],
    thumbs=True,
)  # fmt: skip
RANKED = Items(["p"] * 9, [f"r{i}" for i in range(9)], ["here"] * 9,
               groups=[[2, 0, 1], [4, 3], [5, 6, 7, 8], [2, 0]])  # fmt: skip
WORTH = {  # a perfect score of each item
    "ratings": (RATED, [r.mean() for r in RATED.ratings]),
    "thumbs": (THUMBED, [r.mean() for r in THUMBED.ratings]),
    "rankings": (RANKED, [2, 1, 3, 0, 1, 9, 8, 7, 6]),
}


@pytest.mark.parametrize("name", WORTH)
@pytest.mark.parametrize("scorer, expected", [("constant", 0.5), ("perfect", 1), ("worst", 0)])
def test_accuracy_of_a_reward_model(name, scorer, expected, capsys):
    items, worth = WORTH[name]
    scores = {"constant": [7.25] * len(items), "perfect": worth, "worst": [-w for w in worth]}
    scores = torch.tensor(scores[scorer])
    pairs, gaps = items.comparisons(20_000, seed=1)
    ahead = train_rm.differences(None, scores, pairs)
    figures = accuracy_figures(items, items, ahead, pairs, gaps)
    assert figures["eval/accuracy"] == expected and figures["eval/pairs"] == len(pairs)
    cells = [line.split() for line in capsys.readouterr().out.splitlines() if "all" in line]
    assert float(cells[-1][2]) == expected
    for batch in items.epoch(100, rng()):  # in training
        assert train_rm.batch_accuracy(None, scores[batch.rows], batch) == expected


@pytest.mark.parametrize("soft", [True, False])
@pytest.mark.parametrize("name", WORTH)
@pytest.mark.parametrize("scorer, expected", [("constant", 0.5), ("perfect", 1), ("worst", 0)])
def test_accuracy_of_a_policy(name, scorer, expected, soft, monkeypatch):
    """Its log-ratios order as people do, in training and on test pairs, whatever is tied."""
    items, worth = WORTH[name]
    scores = {"constant": [-3.0] * len(items), "perfect": worth, "worst": [-w for w in worth]}
    scores = torch.tensor(scores[scorer], dtype=torch.float32)
    tokens = [np.array([0, 1, 0])] * len(items)
    rows = Rows(tokens, np.ones(len(items), dtype=int), 9, torch.device("cpu"))
    knobs = train_dpo.Knobs(soft_labels=soft, beta=0.1)
    method = method_of(knobs)
    monkeypatch.setattr(accuracy, "all_logps", lambda policy, rows: scores - 4)
    monkeypatch.setattr(accuracy, "stored_logps", lambda *_: torch.full_like(scores, -4))
    found = train_dpo.implicit_accuracy(None, None, items, rows, method, OFF, knobs)
    assert found == {"eval/implicit_accuracy": expected}
    monkeypatch.setattr(train_dpo, "total", lambda policy: policy)
    for said in kinds.pairs_epoch(items, 100, rng()):
        given = rows.take(said.index)
        reference = torch.full((len(said.index),), -4.0)
        monkeypatch.setattr(Rows, "by_parts", lambda *_: scores[said.index] - 4)  # noqa: B023
        batch = Batch(given, reference, said)
        _, stats = train_dpo.batch_loss(None, None, batch, method, knobs)
        assert stats["rewards/accuracies"] == expected


def test_a_person_and_ridge_on_what_cannot_be_known():
    """Raters who toss coins agree with the others half the time; texts without words are equal."""
    ratings = [rng(i).integers(0, 2, 8).astype(float) for i in range(120)]
    items = Items([""] * 120, ["same words"] * 120, ["here"] * 120, ratings)
    pairs, _ = items.comparisons(5000, seed=1)
    assert data.human_ceiling(items, pairs) == pytest.approx(0.5, abs=0.08)
    scores = ridge_scores(items, items)
    assert np.ptp(np.asarray(scores)) == 0
    apart = torch.as_tensor(scores)[pairs[:, 0]] - torch.as_tensor(scores)[pairs[:, 1]]
    figures = accuracy_figures(items, items, apart, pairs, np.ones(len(pairs)))
    assert figures["eval/accuracy"] == figures["eval/ridge_accuracy"] == 0.5
    sure = Items([""] * 6, list("abcdef"), [""] * 6, [np.array([i, i, i]) for i in range(6)])
    assert data.human_ceiling(sure, sure.comparisons(100, seed=1)[0]) == 1


# 4: cut together


def held(items, i):
    return items.prompts[i], items.responses[i]


def cut(items, n_ctx):
    items, rows, lengths = data.encode_items(items, BYTES, n_ctx, "truncate")
    prompts = [BYTES.decode(row[1:p]) for row, p in zip(rows, lengths, strict=True)]
    answers = [BYTES.decode(row[p:-1]) for row, p in zip(rows, lengths, strict=True)]
    assert all(row[0] == row[-1] == BYTES.eos and len(row) <= n_ctx for row in rows)
    return items, prompts, answers


LENGTHS = st.lists(st.integers(0, 30), min_size=2, max_size=4)


@few
@given(st.lists(st.tuples(st.integers(0, 40), LENGTHS), min_size=1, max_size=4),
       st.integers(4, 40), st.booleans())  # fmt: skip
def test_what_is_compared_keeps_one_prompt(sets, n_ctx, as_ratings):
    prompts, responses, groups = [], [], []
    for s, (p, lengths) in enumerate(sets):
        first = len(prompts)
        for k, n in enumerate(lengths):
            prompts.append("".join(chr(97 + (s + i) % 26) for i in range(p)) + f"?{s}")
            responses.append(f"{s}{k}" + "x" * n)
        groups.append(list(range(first, len(prompts))))
    where = [f"line {i}" for i in range(len(prompts))]
    ratings = [np.array([float(i)]) for i in range(len(prompts))] if as_ratings else None
    given = Items(prompts, responses, where, ratings, [] if as_ratings else groups)
    kept, before, after = cut(given, n_ctx)
    assert kept.responses == responses  # all differ in their first two letters
    for group in groups:
        room = n_ctx - 2 - max(min(len(responses[i]), n_ctx - 2) for i in group)
        for i in group:
            expected = prompts[i][max(0, len(prompts[i]) - room) :] if room else ""
            assert before[i] == expected and after[i] == responses[i][: n_ctx - 2]


def test_a_short_and_a_long_answer_to_one_prompt(capsys):
    """Both stand behind what the longer one leaves of the prompt; others keep theirs."""
    prompt = "".join(map(str, range(30)))  # 50 bytes
    items = Items([prompt, prompt, "q"], ["No.", "Yes, " + "very " * 5, "z" * 3], ["line"] * 3,
                  groups=[[1, 0], [0, 1]])  # fmt: skip
    items.groups = [[1, 0]]
    kept, prompts, answers = cut(items, 52)
    assert prompts[:2] == [prompt[-20:]] * 2 and answers[:2] == items.responses[:2]
    assert "rows were cut" in capsys.readouterr().out
    rated = Items([prompt] * 3, ["a", "b" * 10, "c" * 45], ["line"] * 3,
                  [np.array([1.0])] * 3)  # fmt: skip
    assert cut(rated, 52)[1] == [prompt[-5:]] * 3
    chain = Items(["p" * 40] * 4, ["a", "b" * 30, "c", "d" * 20], ["line"] * 4,
                  groups=[[0, 1], [2, 3], [2, 0]])  # fmt: skip
    assert cut(chain, 52)[1] == ["p" * 20] * 4  # one prompt for all that hang together


def test_equal_after_the_cut_is_no_comparison(capsys):
    """Left out and counted; a ranking loses the worse of the two; ratings are merged."""
    same = "x" * 20
    items = Items(["p", "p", "q", "q", "r", "r", "r"],
                  [same + "good", same + "bad", "up", "down", same + "1", same + "2", "third"],
                  [f"line {i}" for i in range(7)], groups=[[0, 1], [2, 3], [4, 5, 6]],
                  margins=[1.0, 2.0, 3.0])  # fmt: skip
    kept, _, answers = cut(items, 22)
    said = capsys.readouterr().out
    assert "1 comparisons" in said or "1 comparison" in said
    assert [[answers[i] for i in group] for group in kept.groups] == [
        ["up", "down"],
        [same, "third"],
    ]
    assert kept.margins == [2.0, 3.0] and len(kept) == 4
    assert kept.where == ["line 2", "line 3", "line 4", "line 6"]
    rated = Items(["p"] * 3, [same + "1", same + "2", "other"], ["line"] * 3,
                  [np.array([1.0, 2.0]), np.array([4.0]), np.array([0.0])])  # fmt: skip
    kept, _, answers = cut(rated, 22)
    assert answers == [same, "other"] and "1 rated" in capsys.readouterr().out
    assert [sorted(r) for r in kept.ratings] == [[1, 2, 4], [0]]
    with pytest.raises(UserError, match="line 0.*no two responses differ within .* 22 tokens"):
        cut(Items(["p", "p"], [same + "a", same + "b"], ["line 0", "line 1"], groups=[[0, 1]]), 22)


def test_equal_words_of_two_reviews_stay_two(capsys):
    items = Items(
        ["", ""], ["good film", "good film"], ["a", "b"], [np.array([1.0]), np.array([2.0])]
    )
    kept, _, _ = cut(items, 60)
    assert len(kept) == 2 and capsys.readouterr().out == ""


# 9: batches, and comparisons, in time


def groups_of(sizes):
    ends = np.cumsum([0, *sizes])
    groups = [list(range(a, b)) for a, b in zip(ends, ends[1:], strict=False)]
    n = int(ends[-1])
    return Items(["p"] * n, [f"r{i}" for i in range(n)], ["here"] * n, groups=groups)


def test_the_longest_list_does_not_make_the_batch():
    """3 lists of 64 and 108 pairs: 408 responses are 6 to 8 steps of about 64."""
    items = groups_of([64] * 3 + [2] * 108)
    for seed in range(5):
        for batches in (list(items.epoch(64, rng(seed))),
                        list(kinds.lists_epoch(items, 64, 4, rng(seed))),
                        list(kinds.pairs_epoch(items, 64, rng(seed)))):  # fmt: skip
            sizes = [len(b[0]) for b in batches]
            assert 6 <= len(sizes) <= 8 and sum(sizes) == 408 and max(sizes) <= 64 + 63
            assert sorted(np.concatenate([b[0] for b in batches])) == list(range(408))


@few
@given(st.lists(st.integers(2, 30), min_size=1, max_size=40), st.integers(1, 40),
       st.integers(0, 5))  # fmt: skip
def test_batches_of_lists(sizes, batch_size, seed):
    """Nothing divided, everything once, about as many as wanted, nothing without a comparison."""
    items = groups_of(sizes)
    batches = list(items.epoch(batch_size, rng(seed)))
    seen = [tuple(b.rows[block]) for b in batches for block in b.blocks]
    assert sorted(seen) == sorted(map(tuple, items.groups))
    expected = sum(sizes) / batch_size
    assert len(batches) <= max(1, round(expected))
    for b in batches:
        assert (
            len(b.pairs) == len(b.labels) == sum(len(x) * (len(x) - 1) // 2 for x in b.blocks) > 0
        )
        assert len(b.rows) <= batch_size * sum(sizes) / (max(1, round(expected)) * batch_size) + 30


@few
@given(st.lists(st.integers(1, 30), min_size=1, max_size=12), st.integers(2, 40),
       st.booleans(), st.integers(0, 5))  # fmt: skip
def test_batches_of_ratings(sizes, batch_size, across, seed):
    prompts = [f"p{s}" for s, n in enumerate(sizes) for _ in range(n)]
    n = len(prompts)
    items = Items(prompts, [f"r{i}" for i in range(n)], ["here"] * n,
                  [np.array([float(i % 3)]) for i in range(n)])  # fmt: skip
    alone = sizes.count(1)
    compared = sum(k for k in sizes if k > 1) + (alone if across and alone > 1 else 0)
    if not compared:
        with pytest.raises(UserError, match="here and on: |a batch of 1"):
            list(items.epoch(batch_size, rng(seed), across))
        return
    batches = list(items.epoch(batch_size, rng(seed), across))
    rows = np.concatenate([b.rows for b in batches])
    assert len(rows) == len(set(rows)) == compared
    for b in batches:
        assert len(b.pairs) > 0 and len(b.rows) >= 2
        for i, j in b.rows[b.pairs]:
            same = prompts[i] == prompts[j]
            assert same or (across and prompts.count(prompts[i]) == prompts.count(prompts[j]) == 1)


@pytest.mark.parametrize("n", range(2, 12))
@pytest.mark.parametrize("batch_size", [2, 3, 4])
def test_no_thumb_is_alone_in_its_batch(n, batch_size):
    batches = list(kinds.thumbs_epoch(np.arange(n), np.arange(n) % 2 > 0, batch_size, rng()))
    assert sorted(np.concatenate([b.index for b in batches])) == list(range(n))
    assert min(len(b.index) for b in batches) >= 2


@pytest.mark.parametrize("n, odd", [(3000, 1), (3000, 3), (20_000, 1), (400, 0)])
def test_comparisons_of_nearly_equal_ratings(n, odd):
    """Every pair of different ratings once, however rare, at once."""
    ratings = [np.array([1.0])] * (n - odd) + [np.array([2.0])] * odd
    items = Items([""] * n, [f"r{i}" for i in range(n)], ["here"] * n, ratings)
    start = time.process_time()
    if not odd:
        with pytest.raises(UserError, match="no two responses of which one is better"):
            items.comparisons(20_000, seed=1)
        assert not items.can_compare()
    else:
        pairs, gaps = items.comparisons(20_000, seed=1)
        found = {tuple(map(int, p)) for p in pairs}
        assert len(found) == len(pairs) == min(20_000, odd * (n - odd)) and (gaps == 1).all()
        assert all(i >= n - odd > j for i, j in found)
    assert time.process_time() - start < 2


def test_two_ratings_make_one_comparison():
    items = Items(["p", "p"], ["a", "b"], ["here"] * 2, [np.array([1.0]), np.array([2.0])])
    pairs, gaps = items.comparisons(20_000, seed=1)
    assert pairs.tolist() == [[1, 0]] and gaps.tolist() == [1]
    (batch,) = items.epoch(64, rng())
    assert len(batch.pairs) == 1
    assert Compared(batch.rows, batch.pairs, batch.labels).preferred_first(False)[0].shape == (1,)


def test_ratings_equal_but_for_rounding_are_equal():
    """The mean of three tenths and 0.1 * 3 differ in the last bit, and in nothing people said."""
    ratings = [np.array([0.1, 0.2, 0.3]), np.array([0.3, 0.2, 0.1]), np.array([0.2])]
    items = Items([""] * 3, list("abc"), ["here"] * 3, ratings)
    assert not items.can_compare() and len(set(items.means())) == 1
    spread = SimpleNamespace(means=items.means())
    assert np.ptp(spread.means) == 0
