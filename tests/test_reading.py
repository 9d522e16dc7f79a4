"""One conversation, one reading: however it is said, the same prompt and the same answers.

The texts that are expected are put together here by hand, never by the code under test.
"""

import csv
import datetime
import decimal
import gzip
import io
import json
import re
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minirlhf import data
from minirlhf.data import load_feedback, parse_record
from minirlhf.engine.cli import UserError

few = settings(max_examples=25, deadline=None, derandomize=True)
NAMES = {"user": "Human", "assistant": "Assistant", "system": "System"}


def say(role, content):
    return {"role": role, "content": content}


def text_of(turns):
    return "".join(f"\n\n{NAMES[role]}: {content}" for role, content in turns)


def as_turns(turns):
    return [say(*turn) for turn in turns]


def read(record):
    """(prompt, answers) of a record."""
    found = parse_record(record, "here")
    return found.prompt, found.responses


ASK = say("user", "Where does the cat eat?")
BARN, HILL = say("assistant", "In the barn."), say("assistant", "On the hill.")
PROMPT = "\n\nHuman: Where does the cat eat?\n\nAssistant:"
WHOLE = {"chosen": [ASK, BARN], "rejected": [ASK, HILL]}
EXPECTED = PROMPT, [" In the barn.", " On the hill."]


# One comparison in the forms of public files


@pytest.mark.parametrize("record", [
    WHOLE,
    # UltraFeedback's: the question once more as a text, the chosen dialogue as messages, scores
    WHOLE | {"prompt": ASK["content"], "prompt_id": "3f", "messages": WHOLE["chosen"],
             "score_chosen": 8.5, "score_rejected": 3.0},
    WHOLE | {"prompt": f" {ASK['content']}\n"},
    {"prompt": [ASK], "chosen": [BARN], "rejected": [HILL]},
    {"prompt": [ASK], "chosen": BARN, "rejected": HILL},
    {"prompt": ASK, "chosen": BARN, "rejected": HILL},
    {"prompt": ASK["content"], "chosen": [BARN], "rejected": [HILL]},
    {"prompt": [ASK], "chosen": "In the barn.", "rejected": "On the hill."},
    {"question": [ASK], "chosen": "In the barn.", "rejected": "On the hill."},
    # Anthropic's, with and without a prompt key
    {"chosen": PROMPT + " In the barn.", "rejected": PROMPT + " On the hill."},
    {"prompt": PROMPT, "chosen": PROMPT + " In the barn.", "rejected": PROMPT + " On the hill."},
    {"prompt": PROMPT, "chosen": " In the barn.", "rejected": " On the hill."},
    {"prompt": PROMPT, "chosen": [BARN], "rejected": [HILL]},
    {"prompt": ASK["content"], "chosen": PROMPT + " In the barn.",
     "rejected": PROMPT + " On the hill."},
    # ShareGPT's
    {"conversations": [{"from": "human", "value": ASK["content"]}],
     "chosen": {"from": "gpt", "value": "In the barn."},
     "rejected": {"from": "gpt", "value": "On the hill."}},
    # roles of other names, contents in parts
    {"chosen": [say("prompter", ASK["content"]), BARN],
     "rejected": [say("prompter", ASK["content"]), HILL], "prompt": ASK["content"]},
    {"chosen": [say("User", ASK["content"]), BARN],
     "rejected": [say("HUMAN", ASK["content"]), HILL]},
    {"prompt": [say("user", [{"type": "text", "text": "Where does "},
                             {"type": "text", "text": "the cat eat?"}])],
     "chosen": [say("assistant", [{"type": "text", "text": "In the barn."}])],
     "rejected": [HILL]},
    # as a ranking of two
    {"prompt": [ASK], "responses": ["On the hill.", "In the barn."], "ranking": [1, 0]},
    {"prompt": ASK["content"], "responses": [[ASK, HILL], [ASK, BARN]], "ranking": [1, 0]},
    {"completions": [[ASK, HILL], [ASK, BARN]], "ranking": [1, 0]},
])  # fmt: skip
def test_one_comparison_in_many_forms(record):
    assert read(record) == EXPECTED


@pytest.mark.parametrize("record", [
    {"messages": [ASK, BARN]},
    {"conversation": [ASK, BARN]},
    {"prompt": ASK["content"], "messages": [ASK, BARN]},  # UltraChat's
    {"prompt": [ASK], "completion": [BARN]},
    {"prompt": [ASK], "response": "In the barn."},
    {"prompt": ASK["content"], "response": [ASK, BARN]},
    {"prompt": [ASK], "response": [ASK, BARN]},
    {"prompt": PROMPT, "response": " In the barn."},
    {"prompt": PROMPT, "response": BARN},
    {"prompt": PROMPT, "response": PROMPT + " In the barn."},
    {"conversations": [{"from": "human", "value": ASK["content"]},
                       {"from": "gpt", "value": "In the barn."}]},
])  # fmt: skip
@pytest.mark.parametrize("said, number", [({}, 0), ({"rating": 3}, 3), ({"label": 1}, 1)])
def test_one_answer_in_many_forms(record, said, number):
    found = parse_record(record | said, "here")
    assert (found.prompt, found.responses) == (PROMPT, [" In the barn."])
    assert found.kind == (next(iter(said), None) or "text") and found.number == number


SYSTEM = say("system", "Be brief.")
BRIEF = "\n\nSystem: Be brief." + PROMPT


@pytest.mark.parametrize("record", [
    {"chosen": [SYSTEM, ASK, BARN], "rejected": [SYSTEM, ASK, HILL]},
    {"prompt": ASK["content"], "chosen": [SYSTEM, ASK, BARN], "rejected": [SYSTEM, ASK, HILL]},
    {"prompt": [ASK], "chosen": [SYSTEM, ASK, BARN], "rejected": [SYSTEM, ASK, HILL]},
    {"prompt": [SYSTEM, ASK], "chosen": [ASK, BARN], "rejected": [ASK, HILL]},
    {"prompt": [SYSTEM, ASK], "chosen": "In the barn.", "rejected": "On the hill."},
    {"system": "Be brief.", **WHOLE},
    {"system": "Be brief.", "prompt": ASK["content"], **WHOLE},
    {"system": "Be brief.", "prompt": [ASK], "chosen": [BARN], "rejected": [HILL]},
    {"system_prompt": "Be brief.", "prompt": ASK["content"], "chosen": "In the barn.",
     "rejected": "On the hill."},
    {"system": "Be brief.", "prompt": [SYSTEM, ASK], "chosen": [BARN], "rejected": [HILL]},
    {"system": "Be brief.", "prompt": PROMPT, "chosen": [BARN], "rejected": [HILL]},
    {"system": "Be brief.", "prompt": PROMPT, "chosen": " In the barn.",
     "rejected": " On the hill."},
    {"system": "Be brief.", "chosen": PROMPT + " In the barn.",
     "rejected": PROMPT + " On the hill."},
    {"chosen": [say("developer", "Be brief."), ASK, BARN], "rejected": [SYSTEM, ASK, HILL]},
])  # fmt: skip
def test_a_system_text_stands_once_before_all(record):
    assert read(record) == (BRIEF, EXPECTED[1])


def test_no_system_text_is_none():
    plain = {"prompt": "Q", "chosen": "a", "rejected": "b"}
    for nothing in ("", " ", None):
        assert read(plain | {"system": nothing}) == ("Q", ["a", "b"])
        assert read(WHOLE | {"system": nothing}) == EXPECTED


# Dialogues of several questions

MORE = [say("user", "And the dog?"), say("assistant", "At the well."), say("user", "When?")]
SEVERAL = [ASK, BARN, *MORE]
LONG = PROMPT + " In the barn.\n\nHuman: And the dog?\n\nAssistant: At the well."
LONG += "\n\nHuman: When?\n\nAssistant:"


@pytest.mark.parametrize("prompt", [
    {}, {"prompt": "When?"}, {"prompt": ASK["content"]}, {"prompt": "And the dog?"},
    {"prompt": SEVERAL}, {"messages": SEVERAL},
])  # fmt: skip
def test_whole_dialogues_of_several_questions(prompt):
    answers = [say("assistant", a) for a in ("At noon.", "At dawn.", "Never.")]
    whole = [[*SEVERAL, a] for a in answers]
    expected = LONG, [" At noon.", " Never."]
    assert read({"chosen": whole[0], "rejected": whole[2], **prompt}) == expected
    expected = LONG, [" Never.", " At noon.", " At dawn."]
    assert read({"responses": whole, "ranking": [2, 0, 1], **prompt}) == expected


def test_dialogues_that_part_early():
    """What they share ends at the last answer that begins in all, of turns as of text."""
    ask = "\n\nHuman: Q\n\nAssistant:"
    a, b, user = say("assistant", "A"), say("assistant", "B"), say("user", "Q")
    other = say("user", "R")
    cases = [
        ([user, a, user, b], [user, b, user, a], (ask, [f" A{ask} B", f" B{ask} A"])),
        ([user, a, user, a], [user, a, other, b],
         (ask, [f" A{ask} A", " A\n\nHuman: R\n\nAssistant: B"])),
        ([user, a], [user, a, other, b], (ask, [" A", " A\n\nHuman: R\n\nAssistant: B"])),
    ]  # fmt: skip
    for chosen, rejected, expected in cases:
        assert read({"chosen": chosen, "rejected": rejected}) == expected
        chosen, rejected = (
            text_of([(t["role"], t["content"]) for t in turns]) for turns in (chosen, rejected)
        )
        assert read({"chosen": chosen, "rejected": rejected}) == expected


@pytest.mark.parametrize("role, shown", [
    ("model", "Model"), ("bot", "Bot"), ("Model", "Model"), ("gpt", "Assistant")
])  # fmt: skip
def test_words_of_an_answer_stay_in_it_whatever_its_role(role, shown):
    chosen, rejected = ([ASK, say(role, f"The answer is {x}")] for x in ("16", "not 16, but 17"))
    for prompt in ({}, {"prompt": ASK["content"]}, {"prompt": [ASK]}):
        found = read({"chosen": chosen, "rejected": rejected, **prompt})
        header = f"\n\nHuman: {ASK['content']}\n\n{shown}:"
        assert found == (header, [" The answer is 16", " The answer is not 16, but 17"])


# Plain strings stay as they are


@pytest.mark.parametrize("prompt, answers", [
    ("Hi", ["Hidden fees apply.", "His car is red."]),
    ("Hello", ["Hello! How can I help?", "Hello you."]),
    ("p ", ["p c", "p r"]), ("", [" a", "a"]), ("Q\n", ["Q\nA", "Q\nB"]), ("ab", ["ab", "abab"]),
    ("Who?", ["Human: a person", "Human: b"]), ("", ["Human: a", "Human: b"]),
    ("Who?", ["Assistant: yes", "System: no"]), ("{}", ["[]", '{"role": "user"}']),
    (PROMPT, [" Human: a", " Human: b"]),
])  # fmt: skip
def test_plain_strings_stay_to_the_character(prompt, answers):
    assert read({"prompt": prompt, "chosen": answers[0], "rejected": answers[1]}) == (
        prompt, answers
    )  # fmt: skip
    ranked = {"prompt": prompt, "responses": [*answers[::-1], "x"], "ranking": [1, 0, 2]}
    assert read(ranked) == (prompt, [*answers, "x"])
    assert read({"prompt": prompt, "response": answers[0], "rating": 1}) == (prompt, answers[:1])


# What is refused, by name

CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]}
IMAGE = say("user", [{"type": "image_url", "image_url": "x"}, {"type": "text", "text": "Q"}])


@pytest.mark.parametrize("record, names", [
    ({"chosen": [ASK, CALL], "rejected": [ASK, HILL]}, "chosen: .*tool_calls"),
    ({"chosen": [ASK, BARN], "rejected": [ASK, CALL]}, "rejected: .*tool_calls"),
    ({"prompt": [ASK, CALL, say("tool", "3")], "chosen": "a", "rejected": "b"},
     "prompt: .*tool_calls"),
    ({"messages": [ASK, {"role": "assistant", "function_call": {"name": "f"}}]}, "function_call"),
    ({"prompt": "Q", "response": "a", "rating": 1, "tools": [{"name": "f"}]}, "tools changes"),
    ({"messages": [ASK, BARN], "functions": "f()"}, "functions changes"),
    ({"instruction": "Translate.", "input": "le chat", "response": "a"}, "input changes"),
    ({"prompt": "Q", "chosen": "a", "rejected": "b", "history": [["q", "a"]]}, "history changes"),
    ({"prompt": "Q", "images": ["x.png"], "response": "a", "label": True}, "images changes"),
    ({"messages": [IMAGE, BARN]}, "image_url"),
    ({"messages": [say("user", "Q"), say("assistant", None)]}, "content is null"),
    ({"messages": [{"role": "user", "content": "Q", "audio": {"id": 1}}, BARN]}, "audio"),
    ({"messages": [ASK, BARN | {"reasoning_content": "Hm."}]}, "reasoning_content"),
    ({"prompt": [ASK], "chosen": [BARN], "rejected": "On the hill."}, "some are texts"),
    ({"prompt": "What?", **WHOLE}, "prompt: none of the turns"),
    ({"prompt": "a", "chosen": PROMPT + " x", "rejected": PROMPT + " y"}, "prompt: none of the"),
    ({"prompt": PROMPT, "chosen": PROMPT + " x", "rejected": " y"}, "in some of them"),
    ({"chosen": [ASK, BARN], "rejected": [say("user", "Else?"), BARN]}, "different questions"),
    ({"chosen": [ASK, BARN], "rejected": [ASK, BARN]}, "the same|no answer"),
    ({"messages": []}, "empty list"), ({"messages": "Q"}, "messages: expected a list"),
    ({"messages": [ASK, BARN], "prompt": [say("user", "Else?")], "chosen": "a", "rejected": "b"},
     "messages: another conversation"),
    ({"prompt": [ASK, BARN], "chosen": "a", "rejected": "b"}, "ends in an answer"),
    ({"system": "S", **WHOLE, "prompt": [SYSTEM, ASK]}, "two system texts"),
    ({"system": [1], **WHOLE}, "system: expected"),
    ({"prompt": "Q", "response": "a", "score": 1, "rating": 2}, "score and rating"),
    ({"prompt": "Q", "question": "R", "response": "a"}, "prompt and question"),
    ({"prompt": "Q", "response": "a", "rating": 1e16}, "beyond"),
    ({"prompt": "Q", "chosen": "a"}, "found keys .'chosen', 'prompt'., expected"),
    ({"prompt": "Q", "responses": ["a", "b"]}, "found keys"),
    ({"text": "\ud800"}, "surrogate"),
    ({"system": "\ud800", **WHOLE}, "system: .*surrogate"),
    ({"messages": [say("user\ud800", "Q"), BARN]}, "surrogate"),
    ({"prompt": 3, "response": "a"}, "prompt: expected a string"),
    ({}, "found keys"), ([], "expected an object"), (None, "expected an object"),
])  # fmt: skip
def test_what_is_left_out_is_refused_by_name(record, names):
    with pytest.raises(UserError, match=names) as caught:
        parse_record(record, "f.jsonl, line 7")
    message = str(caught.value)
    assert message.startswith("f.jsonl, line 7: ") and "\n" not in message and len(message) < 700


@pytest.mark.parametrize("nothing", [None, [], "", {}])
def test_an_empty_key_says_nothing(nothing):
    for key in ("tools", "images", "history", "input", "documents"):
        assert read(WHOLE | {key: nothing}) == EXPECTED
    empty = {"tool_calls": nothing, "function_call": nothing, "refusal": nothing}
    assert read({"chosen": [ASK, BARN | empty], "rejected": [ASK, HILL]}) == EXPECTED


def test_keys_that_are_not_used_are_named():
    record = {"prompt": "Q", "chosen": "a", "rejected": "b", "score_chosen": 1, "source": "x"}
    assert set(parse_record(record, "here").unused) == {"score_chosen", "source"}
    assert parse_record(record | {"margin": 1}, "here").number == 1
    record = {"question": "Q", "completion": "a", "score": 2, "margin": 3, "ranking": [0]}
    found = parse_record(record, "here")
    assert (found.kind, found.number, set(found.unused)) == ("rating", 2, {"margin", "ranking"})


@pytest.mark.parametrize("prompt", ["Q", [ASK]])
@pytest.mark.parametrize(
    "key, value",
    [("chosen", "b"), ("rejected", "a"), ("rating", 2), ("label", True), ("response", "c")],
)
def test_a_key_of_another_form_changes_nothing(key, value, prompt):
    """A ranking was taken for given best first where the record had a key `chosen`, too."""
    record = {"prompt": prompt, "responses": ["a", "b", "c"], "ranking": [2, 0, 1]}
    plain, found = parse_record(record, "here"), parse_record({key: value} | record, "here")
    assert [text.strip() for text in plain.responses] == ["c", "a", "b"]
    assert found == plain._replace(unused=(key,))
    pair = {"prompt": prompt, "chosen": "a", "rejected": "b"}
    more = {"ranking": [1, 0], "responses": ["x", "y"], "rating": 1}
    assert parse_record(more | pair, "here")._replace(unused=()) == parse_record(pair, "here")


def test_prompts_alone_keep_their_columns():
    found = parse_record({"question": "2 + 2?", "answer": "4", "level": 1, "source": None}, "here")
    assert (found.kind, found.prompt, found.responses) == ("prompt", "2 + 2?", [])
    assert found.columns == {"answer": "4", "level": 1, "source": None} and found.unused == ()
    for record in ({"prompt": [ASK]}, {"messages": [ASK]}, {"prompt": ASK["content"],
                                                           "messages": [ASK]}):  # fmt: skip
        found = parse_record(record | {"answer": "4"}, "here")
        assert (found.kind, found.prompt, found.columns) == ("prompt", PROMPT, {"answer": "4"})


# The same conversation, said in any of its forms

WORDS = st.text("ab é.:\n\t", max_size=6).map(lambda t: f"x{t}y")
ANSWER = st.text("ab é.\n", max_size=8)
TURNS = st.lists(st.tuples(WORDS, WORDS), max_size=2)  # questions and answers before the last


def forms_of(before, answers, rng):
    """Records that say how answers to the end of `before`, turns, compare, best first."""
    prompt = as_turns(before)
    as_text = text_of(before) + "\n\nAssistant:"
    asked = [content for role, content in before if role == "user"]
    single = [say("assistant", a) for a in answers]
    shapes = {
        "texts": answers, "turns": single, "lists": [[a] for a in single],
        "whole": [[*prompt, a] for a in single], "after a header": [f" {a}" for a in answers],
        "whole texts": [f"{as_text} {a}" for a in answers],
    }  # fmt: skip
    prompts = {"none": {}, "turns": {"prompt": prompt}, "messages": {"messages": prompt},
               "text": {"prompt": as_text}, "first": {"prompt": asked[0]},
               "last": {"prompt": asked[-1]}}  # fmt: skip
    together = [("turns", x) for x in ("texts", "turns", "lists", "whole")]
    together += [("messages", x) for x in ("texts", "turns", "lists")]
    together += [(x, "whole") for x in ("none", "first", "last")]
    together += [("text", x) for x in ("turns", "lists", "after a header", "whole texts")]
    together += [(x, "whole texts") for x in ("none", "first", "last")]
    if len(before) == 1:
        together += [("first", "turns"), ("first", "lists")]
    for asking, answering in together:
        given = shapes[answering]
        record = dict(prompts[asking])
        if len(given) == 2 and rng.random() < 0.5:
            record |= {"chosen": given[0], "rejected": given[1]}
        else:
            order = rng.sample(range(len(given)), len(given))
            ranking = [order.index(i) for i in range(len(given))]
            record |= {"responses": [given[i] for i in order], "ranking": ranking}
        yield (asking, answering), renamed(record, rng)


def renamed(record, rng):
    """The record with other names of keys and roles, which say the same."""
    text = json.dumps(record)
    if rng.random() < 0.3:
        text = text.replace('"role": ', '"from": ').replace('"content": ', '"value": ')
        text = text.replace('"assistant"', '"gpt"').replace('"user"', '"human"')
    if rng.random() < 0.3:
        text = text.replace('"user"', '"User"').replace('"system"', '"developer"')
    if rng.random() < 0.3:
        names = {"prompt": ["question", "instruction"], "messages": ["conversations"],
                 "responses": ["completions"]}  # fmt: skip
        for name, others in names.items():
            text = text.replace(f'"{name}": ', f'"{rng.choice(others)}": ')
    return json.loads(text)


@few
@given(TURNS, WORDS, st.lists(ANSWER, min_size=2, max_size=3, unique=True),
       st.none() | WORDS, st.randoms(use_true_random=False))  # fmt: skip
def test_the_same_two_strings_in_any_form(pairs, question, answers, system, rng):
    before = [("system", system)] if system else []
    for asked, answered in pairs:
        before += [("user", asked), ("assistant", answered)]
    before.append(("user", question))
    expected = text_of(before) + "\n\nAssistant:", [f" {a}" for a in answers]
    for form, record in forms_of(before, answers, rng):
        assert read(record) == expected, (form, record)
        if system and form[0] == "turns":
            apart = json.loads(json.dumps(record))
            key = next(k for k in ("prompt", "question", "instruction") if k in apart)
            apart[key] = apart[key][1:]
            assert read(apart | {"system": system}) == expected, (form, apart)


# Forms of files


def pairs(n=40):
    return [{"prompt": f"p{i}, \"é\"\n日", "chosen": f"good {i}", "rejected": f"bad\r\n{i}",
             "margin": i / 4} for i in range(n)]  # fmt: skip


def zstd(raw):
    pyarrow = pytest.importorskip("pyarrow")
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as out:
        out.write(raw)
    return sink.getvalue().to_pybytes()


def lines_of(records):
    return "".join(json.dumps(r) + "\n" for r in records).encode()


def csv_of(records):
    out = io.StringIO(newline="")
    table = csv.DictWriter(out, list(records[0]))
    table.writeheader()
    table.writerows(records)
    return out.getvalue().encode()


def parquet_of(records):
    parquet = pytest.importorskip("pyarrow.parquet")
    table = sys.modules["pyarrow"].Table.from_pylist(records)
    out = io.BytesIO()
    parquet.write_table(table, out)
    return out.getvalue()


FILES = {  # {name: how its bytes are made of records}
    "a.jsonl": lines_of,
    "marked.jsonl": lambda r: b"\xef\xbb\xbf" + lines_of(r).replace(b"\n", b"\r\n"),
    "cr.jsonl": lambda r: lines_of(r).replace(b"\n", b"\r"),
    "one-line.jsonl": lambda r: json.dumps(r).encode(),
    "indented.json": lambda r: json.dumps(r, indent=2, ensure_ascii=False).encode(),
    "lines.json": lines_of,
    "rows.json": lambda r: b"[\n" + b",\n".join(json.dumps(x).encode() for x in r) + b"\n]\n",
    "a.jsonl.gz": lambda r: gzip.compress(lines_of(r)),
    "a.json.gz": lambda r: gzip.compress(json.dumps(r).encode()),
    "a.jsonl.zst": lambda r: zstd(lines_of(r)),
    "a.csv": csv_of,
    "a.csv.gz": lambda r: gzip.compress(csv_of(r)),
    "marked.csv": lambda r: b"\xef\xbb\xbf" + csv_of(r),
    "a.csv.jsonl": lines_of,
    "a.parquet": parquet_of,
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_any_form_says_the_same(tmp_path, name):
    records = pairs()
    (tmp_path / name).write_bytes(FILES[name](records))
    found = list(data.entries(tmp_path / name))
    assert [entry for _, entry in found] == records
    assert all(where.startswith(str(tmp_path / name)) for where, _ in found)
    assert len({where for where, _ in found}) == len(records)
    (tmp_path / "b.jsonl").write_bytes(lines_of(records))
    feedback = load_feedback(str(tmp_path / name))
    assert feedback.fingerprint() == load_feedback(str(tmp_path / "b.jsonl")).fingerprint()
    assert feedback.counts["records"] == 40 and feedback.counts["answers"] == 80


def test_places_are_those_of_the_file(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('\n{"text": "a"}\n\n \n{"text": "b"}\n')
    assert [w for w, _ in data.entries(path)] == [f"{path}, line 2", f"{path}, line 5"]
    path = tmp_path / "a.csv"
    path.write_text('text\na\n"b\nc"\nd\n')
    assert [w.rsplit(" ", 1)[1] for w, _ in data.entries(path)] == ["2", "4", "5"]
    assert [e["text"] for _, e in data.entries(path)] == ["a", "b\nc", "d"]


def test_a_folder_of_shards_is_its_files(tmp_path, capsys):
    records = pairs()
    (tmp_path / "one.jsonl").write_bytes(lines_of(records))
    folder = tmp_path / "shards"
    (folder / "data").mkdir(parents=True)
    shards = {"a.jsonl": "a.jsonl", "b.csv": "a.csv", "c.json": "one-line.jsonl"}
    shards["data/d.jsonl.gz"] = "a.jsonl.gz"
    for i, (name, form) in enumerate(shards.items()):
        (folder / name).write_bytes(FILES[form](records[10 * i : 10 * i + 10]))
    (folder / "README.md").write_text("# not data")
    (folder / ".hidden.jsonl").write_text("not data")
    assert [entry for _, entry in data.entries(folder)] == records
    said = capsys.readouterr().out
    assert "README.md" in said and "hidden" not in said
    feedback = load_feedback(str(folder))
    assert feedback.fingerprint() == load_feedback(str(tmp_path / "one.jsonl")).fingerprint()
    (folder / "z.jsonl").write_text('{"prompt": "p", "response": "r", "rating": 1}\n')
    with pytest.raises(UserError, match="z.jsonl, line 1: a rating where"):
        load_feedback(str(folder))


def test_cells_of_a_table(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('prompt,response,label,note\nQ,a,true,x\nQ,b,0,\n"""Q""",1,False,1\n')
    found = [entry for _, entry in data.entries(path)]
    assert found == [
        {"prompt": "Q", "response": "a", "label": True, "note": "x"},
        {"prompt": "Q", "response": "b", "label": False, "note": None},
        {"prompt": '"Q"', "response": "1", "label": False, "note": "1"},
    ]
    turns = json.dumps([ASK, BARN]).replace('"', '""')
    for name in ("messages", "conversations", "conversation"):
        path.write_text(f'{name},rating\n"{turns}",-1.5e0\n')
        ((_, entry),) = data.entries(path)
        assert read(entry) == (PROMPT, [" In the barn."]) and entry["rating"] == -1.5
    path.write_text('prompt,responses,ranking\nQ,"[""a"", ""b""]","[1, 0]"\n')
    ((_, entry),) = data.entries(path)
    assert read(entry) == ("Q", ["b", "a"])


def test_values_that_json_has_not(tmp_path):
    """A table's own types are texts and numbers, or one line: never a crash."""
    day, path = datetime.date(2026, 1, 2), tmp_path / "a.parquet"
    rows = []
    for i in range(12):
        row = {"prompt": b"p%d" % i, "response": f"r{i}", "rating": decimal.Decimal("1.5")}
        rows.append(row | {"when": day, "raw": b"\xff"})
    path.write_bytes(parquet_of(rows))
    feedback = load_feedback(str(path))
    prompts = feedback.train.prompts + feedback.test.prompts
    assert sorted(prompts) == sorted(f"p{i}" for i in range(12))
    assert {float(r[0]) for r in feedback.train.ratings} == {1.5}
    path.write_bytes(parquet_of([{"response": "r", "rating": day}] * 12))
    with pytest.raises(UserError, match="a.parquet, row 1: rating: expected"):
        load_feedback(str(path))


def half(raw):
    return raw[: len(raw) // 2]


@pytest.mark.parametrize("name, damage, names", [
    ("a.jsonl", lambda raw: raw.replace(b'"p7,', b'"p7", x'), "line 8: not JSON: .*column"),
    ("a.jsonl", lambda raw: raw.replace(b"bad", b"b\xff", 1), "line 1: not UTF-8"),
    ("a.jsonl", lambda raw: raw.decode().encode("utf-16"), "line 1: not UTF-8"),
    ("cr.jsonl", lambda raw: raw.replace(b'"p7,', b'"p7", x'), "line 8: not JSON"),
    ("one-line.jsonl", half, "not JSON: .*column"),
    ("indented.json", lambda raw: raw.replace(b'"p7,', b'"p7", x'), "not JSON: .*line 45"),
    ("rows.json", lambda raw: raw.replace(b'"p7,', b'7, "'), "not JSON"),
    ("rows.json", lambda raw: raw.replace(b'{"prompt": "p7', b'["p7').replace(b"1.75}", b"7]"),
     "not JSON|record 8: expected an object"),
    ("a.jsonl.gz", half, "not readable as gzip"),
    ("a.json.gz", half, "not readable as gzip"),
    ("a.jsonl.zst", half, "not readable as zstd|not JSON"),
    ("a.jsonl.zst", lambda raw: b"x" + raw, "not readable as zstd"),
    ("a.csv", lambda raw: raw.replace(b'"p7,', b'x"p7,'), "line [0-9]+: "),
    ("a.csv", lambda raw: raw.replace(b"good 7", b"good,7"), "line [0-9]+: 5 cells, expected 4"),
    ("a.csv", lambda raw: raw.replace(b"1.75", b"high"), "line [0-9]+: margin: expected a number"),
    ("a.csv", lambda raw: raw[:-5] + b'"', "line [0-9]+: "),
    ("a.csv", lambda raw: raw.replace(b"rejected", b"chosen", 1), "line 1: .*each once"),
    ("a.csv", lambda raw: raw.replace(b"good 7", b"\xff"), "line [0-9]+: not UTF-8"),
    ("a.csv", lambda raw: raw.replace(b",", b";"), "found keys|cells|not CSV"),
    ("a.parquet", half, "not readable as parquet"),
    ("a.parquet", lambda raw: b"PAR1" + bytes(60) + b"PAR1", "not readable as parquet"),
])  # fmt: skip
def test_damage_is_one_line_that_names_the_place(tmp_path, name, damage, names):
    path = tmp_path / name
    path.write_bytes(damage(FILES[name](pairs())))
    with pytest.raises(UserError, match=re.escape(str(path)) + f".*({names})") as caught:
        load_feedback(str(path))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 900


@pytest.mark.parametrize("name, text, names", [
    ("a.json", '{\n "data": [\n  {"text": "a"}\n ]\n}', "an object over several lines"),
    ("a.json", '{"data": [{"text": "a"}]}', "line 1: found keys"),
    ("a.json", "[1, 2]", "record 1: expected an object"),
    ("a.json", "[]", "no records"), ("a.csv", "", "no records"), ("a.csv", "text\n", "no records"),
    ("a.jsonl", "[]\n{}", "not JSON"), ("a.csv", "prompt,,x\n1,2,3", "line 1: expected names"),
    ("a.txt", "text", "expected reviews, toy"), ("", "", "expected reviews, toy"),
])  # fmt: skip
def test_files_that_hold_no_records(tmp_path, name, text, names):
    if name:
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=names):
        load_feedback(str(tmp_path / name) if name else "")


def test_what_needs_an_extra_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    monkeypatch.setitem(sys.modules, "compression", None)
    for name in ("a.parquet", "a.jsonl.zst"):
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(UserError, match=rf"{name}: needs .*pip install 'minirlhf\[data\]'"):
            load_feedback(str(tmp_path / name))
