"""Functions as rewards: where they are found, what they may give, whose an error is."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch

from minirlhf import data
from minirlhf.engine.cli import UserError
from minirlhf.engine.rows import pad_rows
from minirlhf.feedback import labelers
from minirlhf.feedback.labelers import ask, find_function, load_function
from minirlhf.tokenizer import Tokenizer

TOKENIZER = SimpleNamespace(decode=lambda ids: "".join(map(chr, ids)))
TOKENS = torch.tensor([[97, 98, 99, 0], [97, 98, 99, 100]])
LENGTHS = torch.tensor([1, 2]), torch.tensor([2, 2])  # of prompts and of responses


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The current directory, empty; modules that were imported from it are forgotten."""
    monkeypatch.chdir(tmp_path)
    before, path = set(sys.modules), list(sys.path)
    yield tmp_path
    assert sys.path == path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def asked(function, level="response"):
    return ask(function, "f", level, TOKENIZER, TOKENS, *LENGTHS)


def test_what_a_function_sees_and_gives():
    seen = []

    def keep(prompts, responses):
        seen.append((prompts, responses))
        by_token = isinstance(responses[0], list)
        return [[1, 2.5], [1, 2.5]] if by_token else (float(len(text)) for text in responses)

    assert asked(keep).tolist() == [[2], [2]]
    assert asked(keep, "token").tolist() == [[1, 2.5], [1, 2.5]]
    assert seen[0] == (["a", "ab"], ["bc", "cd"])
    assert seen[1] == (["a", "ab"], [["b", "c"], ["c", "d"]])


@pytest.mark.parametrize("given", [
    None, 1.0, [1.0], [1.0, None], ["1", "2"], [1.0, [2.0]], [1.0, float("inf")], [1, 10**400],
    {"a": 1, "b": 2}, iter([1.0]), torch.zeros(3), torch.zeros(2, 2),
])  # fmt: skip
def test_a_wrong_value_is_one_line(given):
    with pytest.raises(UserError, match="--reward f: expected a finite float for each response, 2"):
        asked(lambda prompts, responses: given)


@pytest.mark.parametrize("error", [TypeError, ValueError, OSError, RuntimeError, ImportError])
def test_an_error_in_a_function_is_its_own(error):
    def now(prompts, responses):
        raise error("mine")

    def later(prompts, responses):
        for _ in responses:
            raise error("mine")
        yield 1.0

    for function in (now, later):
        with pytest.raises(error, match="mine") as raised:
            asked(function)
        assert not isinstance(raised.value, UserError)
        assert raised.traceback[-1].name == function.__name__


RATE = "def rate(prompts, responses):\n    return [1.0] * len(responses)\n"


def test_files_and_modules_of_the_current_directory(here):
    """Also what a function imports when it is called."""
    late = "def late(prompts, texts):\n    import beside\n    return beside.rate(prompts, texts)\n"
    (here / "beside.py").write_text(RATE)
    (here / "rules.py").write_text(f"import beside\n{RATE}{late}")
    (here / "package").mkdir()
    (here / "package" / "rules.py").write_text(RATE)
    for source in ("rules.py:rate", "rules.py:late", "rules:late", "package.rules:rate"):
        function = find_function(source, None)
        sys.modules.pop("beside", None)
        assert asked(function).tolist() == [[1.0], [1.0]]


@pytest.mark.parametrize("source, message", [
    ("rules.py:rate", "--reward rules.py:rate: no file rules.py"),
    ("beside.py:score", "--reward beside.py:score: no function score in beside.py"),
    ("beside.py:RATE", "no function RATE"),
    ("beside:score", "--reward beside:score: no function score in beside"),
    ("rules:rate", "--reward rules:rate: No module named 'rules'"),
    ("package.rules:rate", "No module named 'package'"),
    ("beside.rules:rate", "No module named 'beside.rules'"),
    ("beside.py", "--reward beside.py: which function of it. expected beside.py:FUNCTION"),
])  # fmt: skip
def test_what_is_not_there_is_one_line(source, message, here):
    (here / "beside.py").write_text(f"{RATE}RATE = 1.0\n")
    with pytest.raises(UserError, match=message):
        find_function(source, None)


@pytest.mark.parametrize("source", ["rules.py:rate", "rules:rate", "package.rules:rate"])
@pytest.mark.parametrize("wrong, error", [
    ("import nothing_of_this_name", ModuleNotFoundError),
    ("import rules.parts", ModuleNotFoundError),
    ("from beside import nothing", ImportError),
    ("open('nothing.txt')", FileNotFoundError),
    ("1 +", SyntaxError),
    ("1 + ''", TypeError),
])  # fmt: skip
def test_an_error_in_a_file_is_its_own(source, wrong, error, here):
    (here / "beside.py").touch()
    (here / "package").mkdir()
    for folder in (here, here / "package"):
        (folder / "rules.py").write_text(f"{wrong}\n{RATE}")
    with pytest.raises(error) as raised:
        find_function(source, None)
    assert not isinstance(raised.value, UserError)


def test_everything_else_is_a_model(here):
    for source in ("runs/rm", "runs.py/rm", "owner/name", here / "rm", "no such:thing", "a..b:f"):
        assert find_function(source, None) is None


def test_the_toys_own_reward():
    own = SimpleNamespace(name="toy", true_reward=len)
    assert find_function("true", own) is len
    with pytest.raises(UserError, match="mine has no known true reward"):
        find_function("true", SimpleNamespace(name="mine", true_reward=None))


def test_a_path_of_its_own_stays(here):
    """What a file does to the path is not undone; that is the file's."""
    (here / "rules.py").write_text(f"import sys\nsys.path.append('own')\n{RATE}")
    load_function("rules.py", "rate")
    assert sys.path.pop() == "own"


# Columns of bare prompts


def bare_prompts(tmp_path, n=20):
    path = tmp_path / "prompts.jsonl"
    lines = [
        {"prompt": f"what is {i} + {i}?", "answer": str(2 * i), "hard": i > 9} for i in range(n)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return data.load_feedback(str(path))


@pytest.mark.parametrize("room", [64, 6])
def test_a_function_takes_columns_by_name(tmp_path, room):
    """Also of prompts that lost their left end to leave room for the response."""
    feedback, tokenizer = bare_prompts(tmp_path), Tokenizer.train([], 257)
    seen = []

    def score(prompts, responses, answer, *, other=None):
        seen.append((prompts, responses, answer, other))
        return [float(a in r) for a, r in zip(answer, responses, strict=True)]

    columns = labelers.asked_columns(score, "f", feedback, tokenizer, room)
    assert columns.keys() == {"answer"}
    rows = []
    for i, reply in ((3, "it is 6"), (17, "it is 6")):
        ids = tokenizer.encode(f"what is {i} + {i}?")[-(room - 1) :]
        rows.append(([tokenizer.eos, *ids], tokenizer.encode(reply)))
    tokens, lengths = pad_rows([[*p, *r] for p, r in rows], tokenizer.pad)
    p = torch.tensor([len(p) for p, _ in rows])
    scores = labelers.ask(score, "f", "response", tokenizer, tokens, p, lengths - p, columns)
    assert scores.tolist() == [[1.0], [0.0]] and seen[0][2] == ["6", "34"]


def test_all_columns_and_none(tmp_path):
    feedback, tokenizer = bare_prompts(tmp_path), Tokenizer.train([], 257)
    all_of_them = labelers.asked_columns(lambda p, r, **more: [], "f", feedback, tokenizer, 64)
    assert all_of_them.keys() == {"answer", "hard"} and len(all_of_them["hard"]) == 20
    assert labelers.asked_columns(lambda p, r: [], "f", feedback, tokenizer, 64) == {}
    with pytest.raises(UserError, match="f: it takes truth, which no record has"):
        labelers.asked_columns(lambda p, r, truth: [], "f", feedback, tokenizer, 64)
