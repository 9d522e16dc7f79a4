"""Who prefers, by texts: an LLM judge against a server that fails, models, functions, people."""

import http.client
import json
import math
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from judge_server import JudgeServer, choice, completion, tokens

from minirlhf import data
from minirlhf.engine.cli import UserError
from minirlhf.engine.rows import pad_rows
from minirlhf.feedback import constitution, endpoint, label, labelers, preferring
from minirlhf.feedback.endpoint import Answer, Cache, read_settings, seconds_to_wait
from minirlhf.feedback.judge import chance_of_first, expected_score
from minirlhf.feedback.preferring import load_preferrer, symmetric
from minirlhf.gpt import GPTConfig, RewardModel
from minirlhf.tokenizer import Tokenizer, load_base

KEY = "sk-a/b-0123456789"


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """A cache of one's own, no pauses, and a key that must not be seen anywhere."""
    monkeypatch.setenv("MINIRLHF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MINIRLHF_JUDGE_KEY", KEY)
    monkeypatch.setattr(endpoint, "FIRST_PAUSE", 0.01)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def responses(question):
    """The two texts that a question compares."""
    first, second = question.split("Response 1: ")[1].split("\n\nResponse 2: ")
    return first, second.split("\n\nWhich")[0]


def longer(talk):
    """A judge that likes length, and the first place."""
    first, second = responses(talk[-1])
    logit = 0.3 * (len(first) - len(second)) + 0.5
    return choice(1 / (1 + math.exp(-logit)))


def texts(n):
    prompts = [f"p{i}" for i in range(n)]
    a = ["x" * (1 + i % 7) + f" {i}" for i in range(n)]
    b = ["y" * (1 + i % 5) + f" {i}" for i in range(n)]
    return prompts, a, b


def by_hand(a, b):
    """P(a over b) of `longer`, both orders averaged."""

    def shown(x, y):
        return 1 / (1 + math.exp(-0.3 * (len(x) - len(y)) - 0.5))

    return [(shown(x, y) + 1 - shown(y, x)) / 2 for x, y in zip(a, b, strict=True)]


# What an answer says


@pytest.mark.parametrize("top, p", [
    ({"1": 0.6, " 2": 0.2, "x": 0.1}, 0.75),
    ({"1": 0.2, " 1": 0.3, "2.": 0.125, "\n2": 0.125}, 2 / 3),
    ({"1": 0.7, "x": 0.2}, 0.875),  # what is not listed has at most what is left, 0.1
    ({"1": 0.5, "x": 0.02}, 0.5 / 0.52),  # nor more than the least that is
])  # fmt: skip
def test_the_chance_is_the_softmax_of_two_tokens(top, p):
    logs = {token: math.log(chance) for token, chance in top.items()}
    assert chance_of_first(Answer("1", [logs]), ("1", "2")) == pytest.approx(p, abs=1e-12)


def test_the_place_where_the_reply_names_an_option():
    opening = {"(": -0.1, "A": -3.0, "B": -5.0}
    at = {"B": math.log(0.9), "A": math.log(0.1)}
    assert chance_of_first(Answer("(B)", [opening, at]), ("A", "B")) == pytest.approx(0.1)
    listed = chance_of_first(Answer("(", [opening]), ("A", "B"))
    assert listed == pytest.approx(1 / (1 + math.exp(-2)))


@pytest.mark.parametrize("text, p", [("1", 1), ("Number 2, not 1", 0), ("12", None), ("", None)])
def test_without_log_probs_the_text_decides(text, p):
    assert chance_of_first(Answer(text, []), ("1", "2")) == p


def logs(**chances):
    return {token[1:]: math.log(p) for token, p in chances.items()}


def test_the_expected_score():
    """By hand; where 10 is two tokens, the second one says how much of the first is 10."""
    top = [logs(_1=0.1, _4=0.3, _10=0.4, _x=0.2)]
    assert expected_score(Answer("10", top)) == pytest.approx((0.1 + 1.2 + 4) / 0.8)
    top = [logs(_1=0.5, _4=0.3), logs(_0=0.6, _x=0.4)]
    assert expected_score(Answer("10", top)) == pytest.approx((0.2 + 1.2 + 3) / 0.8)
    assert expected_score(Answer("7 of 10", [])) == 7
    assert expected_score(Answer("well", [logs(_x=0.9)])) is None


def test_direct_scores_are_rescaled():
    with JudgeServer(lambda _: completion("10", tokens(**{"10": 0.5, "1": 0.25, "4": 0.25}))) as s:
        scores = load_preferrer(s.source).score(["p", "p"], ["a", "b"])
    assert scores == pytest.approx([(6.25 - 1) * 2 / 9 - 1] * 2)


# A pair


def test_both_orders_are_averaged_and_a_swap_is_exact():
    prompts, a, b = texts(30)
    with JudgeServer(longer) as server:
        preferrer = load_preferrer(server.source)
        p, q = preferrer.prefer(prompts, a, b), preferrer.prefer(prompts, b, a)
        assert len(server.seen) == 60  # the swap is in the cache
    assert p == pytest.approx(by_hand(a, b), abs=1e-9)
    assert (q == 1 - p).all() and (p == 1 - q).all()
    assert preferrer.prefer(["p"], ["same"], ["same"]) == 0.5
    first = []  # P(the first shown), pairs in one order and in the other
    for x, y in [*zip(a, b, strict=True), *zip(b, a, strict=True)]:
        first.append(1 / (1 + math.exp(-0.3 * (len(x) - len(y)) - 0.5)))
    assert f"position bias {np.mean(first) - 0.5:+.3f}" in preferrer.report()
    gold = np.array([len(x) - len(y) for x, y in zip(a, b, strict=True)])
    raw = np.sign(np.array(first) - 0.5) == np.sign([*gold, *-gold])
    mended = np.sign((p - 0.5).round(9)) == np.sign(gold)
    assert raw.mean() < 0.9 and mended.all()


def test_a_response_that_closes_its_socket_at_its_end(monkeypatch):
    """As the client of Python 3.13 does, of 3.11 only the reading past it."""
    read1 = http.client.HTTPResponse.read1

    def closing(self, n=-1):
        chunk = read1(self, n)
        if self.length == 0 and not self.isclosed():
            self._close_conn()
        return chunk

    monkeypatch.setattr(http.client.HTTPResponse, "read1", closing)
    with JudgeServer(longer) as server:
        p = load_preferrer(server.source).prefer(["p"], ["xxx"], ["y"])
    assert p == pytest.approx(by_hand(["xxx"], ["y"]), abs=1e-9)


def test_a_judge_of_places_alone_says_one_half():
    prompts, a, b = texts(8)
    with JudgeServer(lambda _: choice(0.83)) as server:
        preferrer = load_preferrer(server.source)
        assert (preferrer.prefer(prompts, a, b) == 0.5).all()
    assert "bias +0.330" in preferrer.report() and "decides 100% of 8" in preferrer.report()


@pytest.mark.parametrize("p", [0.1, 1 / 3, 0.7, 1.0, 0.0, 1e-20])
def test_a_swap_is_exact_whatever_the_chance(p):
    a, b = ["a", "b"], ["b", "a"]
    there = symmetric(lambda prompts, x, y: np.full(len(x), p), ["", ""], a, b)
    assert there[0] == 1 - there[1] and there[1] == 1 - there[0]
    assert there[0] == pytest.approx(p, abs=1e-15)


def test_no_log_probs_are_said_once(capsys):
    prompts, a, b = texts(6)
    replies = iter(["1", "2"] * 3 + ["neither"] * 6)
    with JudgeServer(lambda _: completion(next(replies))) as server:
        preferrer = load_preferrer(f"{server.source}?concurrency=1")
        p = [preferrer.prefer([q], [x], [y])[0] for q, x, y in zip(prompts, a, b, strict=True)]
    assert p == [1.0, 1.0, 1.0, 0.5, 0.5, 0.5]  # first shown, and first when it is shown second
    assert capsys.readouterr().out.count("no log-probs") == 1
    assert "6 replies name no option" in preferrer.report()


def test_a_rationale_is_asked_first():
    def reply(talk):
        return completion("It is long.") if "Compare" in talk[-1] else choice(0.9)

    with JudgeServer(reply) as server:
        load_preferrer(f"{server.source}?rationale=1").prefer(["p"], ["a"], ["b"])
    assert len(server.seen) == 4
    last = server.seen[-1]["messages"]
    assert [message["role"] for message in last] == ["user", "assistant", "user"]
    assert last[1]["content"] == "It is long."


def test_principles_are_averaged(alone):
    (alone / "mine.txt").write_text("Be kind.\n\nBe short.\n")
    chances = {"Be kind.": 0.9, "Be short.": 0.4}

    def reply(talk):
        p = chances[talk[0].split("Principle: ")[1].split("\n")[0]]
        return choice(p if "(A) good" in talk[0] else 1 - p, ("A", "B"))

    with JudgeServer(reply) as server:
        p = load_preferrer(f"{server.source}?principles=mine.txt").prefer(["p"], ["good"], ["bad"])
    assert p == pytest.approx([0.65], abs=1e-9) and len(server.seen) == 4
    with pytest.raises(UserError, match="none.txt"):
        load_preferrer(f"{server.source}?principles=none.txt")


@pytest.mark.parametrize("p, clamped", [(0.99, 0.6), (0.01, 0.4), (0.55, 0.55)])
def test_principles_with_a_rationale_are_clamped(p, clamped):
    def reply(talk):
        if "Compare" in talk[-1]:
            return completion("Because.")
        return choice(p if "(A) good" in talk[0] else 1 - p, ("A", "B"))

    with JudgeServer(reply) as server:
        source = f"{server.source}?principles=default&rationale=1"
        found = load_preferrer(source).prefer(["p"], ["good"], ["bad"])
    assert found == pytest.approx([clamped], abs=1e-9)


# A server that fails


@pytest.mark.parametrize("fault", ["429", "500", "json", "shape", "drop", "cut", "slow", "drip"])
def test_what_may_pass_is_tried_again(fault):
    prompts, a, b = texts(4)
    late = fault in ("slow", "drip")
    with JudgeServer(longer, [fault, fault]) as server:
        preferrer = load_preferrer(f"{server.source}?timeout={0.3 if late else 30}")
        assert preferrer.prefer(prompts, a, b) == pytest.approx(by_hand(a, b), abs=1e-9)
        # 8 and the two that failed; on a slow machine others can be late, too
        assert len(server.seen) >= 10 if late else len(server.seen) == 10
        assert f" {len(server.seen)} requests" in preferrer.report()
    assert len(lines_of_cache()) == 8


def test_retry_after_is_kept():
    with JudgeServer(longer, ["429"], retry_after="1") as server:
        start = time.monotonic()
        load_preferrer(server.source).prefer(*texts(1))
        assert 1 <= time.monotonic() - start < 3
    assert seconds_to_wait("12") == 12 and seconds_to_wait("soon") == seconds_to_wait(None) == 0
    date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 60))
    assert 55 < seconds_to_wait(date) <= 60
    tomorrow = JudgeServer(longer, ["429"], retry_after="86400")
    with tomorrow, pytest.raises(UserError, match="status 429.*come back in 86400 s"):
        load_preferrer(tomorrow.source).prefer(*texts(1))


def test_pauses_grow_and_differ(monkeypatch):
    monkeypatch.setattr(endpoint, "FIRST_PAUSE", 0.5)
    for attempt, most in ((1, 0.5), (2, 1), (3, 2), (20, 30)):
        found = [endpoint.pause(attempt) for _ in range(50)]
        assert most / 2 <= min(found) < max(found) <= most


@pytest.mark.parametrize("fault, cause", [
    ("500", "status 500: no: Bearer \\[key\\]"), ("json", "not a chat completion"),
    ("drop", "3 tries"), ("slow", "no answer in time"), ("401", "status 401"),
])  # fmt: skip
def test_after_the_last_retry_nothing_is_lost(fault, cause):
    prompts, a, b = texts(10)
    with JudgeServer(longer) as server:
        load_preferrer(server.source).prefer(prompts[:4], a[:4], b[:4])
        server.faults = [fault] * 1000
        source = f"{server.source}?retries=2&timeout=0.3"
        with pytest.raises(UserError, match=cause) as raised:
            load_preferrer(source).prefer(prompts, a, b)
        message = str(raised.value)
        assert server.url in message and "8 of 20 answers are in" in message
        assert KEY not in message
        server.faults, server.seen = [], []
        p = load_preferrer(server.source).prefer(prompts, a, b)
        assert len(server.seen) == 12
    assert p == pytest.approx(by_hand(a, b), abs=1e-9)
    assert len(lines_of_cache()) == len({line["key"] for line in lines_of_cache()}) == 20


def test_nobody_is_there():
    with JudgeServer(longer) as server:
        pass
    with pytest.raises(UserError, match="no answer in 2 tries: .*refused"):
        load_preferrer(f"{server.source}?retries=1").prefer(*texts(1))


def lines_of_cache():
    return [json.loads(line) for line in Path("cache/judge.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("budget", [1, 5, 39])
def test_the_budget_is_never_exceeded(budget):
    prompts, a, b = texts(20)
    with JudgeServer(longer, ["500", "drop", "json"]) as server:
        with pytest.raises(UserError, match=f"budget of {budget} requests is spent"):
            load_preferrer(f"{server.source}?budget={budget}&concurrency=8").prefer(prompts, a, b)
        assert len(server.seen) == budget
        done = len(lines_of_cache()) if Path("cache/judge.jsonl").exists() else 0
        assert done == max(0, budget - 3)
        server.seen = []
        p = load_preferrer(f"{server.source}?budget={40 - done + 2}").prefer(prompts, a, b)
        assert len(server.seen) == 40 - done + (2 if budget == 1 else 0)
    assert p == pytest.approx(by_hand(a, b), abs=1e-9)


def test_so_many_at_a_time_and_equal_questions_once():
    def slowly(talk):
        time.sleep(0.02)
        return longer(talk)

    with JudgeServer(slowly) as server:
        load_preferrer(f"{server.source}?concurrency=3").prefer(*texts(12))
        assert server.busiest == 3
        server.seen = []
        load_preferrer(f"{server.source}?model=m").prefer(["p"] * 9, ["a"] * 9, ["b"] * 9)
        assert len(server.seen) == 2 and server.seen[0]["model"] == "m"


# The cache and the key


def test_the_cache_outlives_a_crash():
    prompts, a, b = texts(5)
    with JudgeServer(longer) as server:
        p = load_preferrer(server.source).prefer(prompts, a, b)
        whole = Path("cache/judge.jsonl").read_bytes()
        Path("cache/judge.jsonl").write_bytes(b'{"key": 1}\n[]\n' + whole[:-20])
        server.seen = []
        assert (load_preferrer(server.source).prefer(prompts, a, b) == p).all()
        assert len(server.seen) == 1
        assert (load_preferrer(server.source).prefer(prompts, a, b) == p).all()
        assert len(server.seen) == 1
    assert len(Cache("cache/judge.jsonl").answers) == 10


def test_another_address_of_the_same_model_is_not_asked():
    with JudgeServer(longer) as one, JudgeServer(longer) as other:
        load_preferrer(f"{one.source}?model=m").prefer(*texts(2))
        load_preferrer(f"{other.source}?model=m&timeout=9").prefer(*texts(2))
        assert not other.seen
        load_preferrer(f"{other.source}?model=n").prefer(*texts(2))
        load_preferrer(other.source).prefer(*texts(2))
        assert len(other.seen) == 8


def test_the_key_is_sent_and_never_seen(alone, capfd):
    """Also where a server says it back, in its texts, tokens and errors."""
    echo = json.dumps({"choices": [{
        "message": {"content": f"1 {KEY}"},
        "logprobs": {"content": [{"token": KEY, "logprob": -1, "top_logprobs": [
            {"token": KEY, "logprob": -1}, {"token": "1", "logprob": -2},
            {"token": "2", "logprob": -3}]}]},
    }]}).replace("a/b", "a\\/b")  # fmt: skip
    said = []
    for faults in ([], ["401"], ["500"] * 9, ["json"] * 9):
        with JudgeServer(lambda _: echo, faults) as server:
            try:
                preferrer = load_preferrer(f"{server.source}?retries=1")
                preferrer.prefer(*texts(2))
                said.append(preferrer.report())
            except UserError as e:
                said += [str(e), repr(e.__cause__)]
            assert set(server.keys) == {f"Bearer {KEY}"}
    files = [path.read_text() for path in alone.rglob("*") if path.is_file()]
    assert len(said) == 7 and files
    everything = "".join([*said, *files, *capfd.readouterr()])
    for form in (KEY, KEY.replace("/", "\\/"), KEY[6:]):
        assert form not in everything
    assert "[key]" in everything


@pytest.mark.parametrize("query, message", [
    ("?api_key=sk-1", "'api_key': expected some of model, budget"),
    ("?model=a&model=b", "'model': expected"), ("?budget=-1", "budget: expected int, at least 0"),
    ("?timeout=nan", "timeout"), ("?timeout=0", "timeout above 0"), ("?rationale=yes", "0 or 1"),
    ("?concurrency=0", "concurrency"), ("?url=x", "'url'"),
])  # fmt: skip
def test_settings_are_checked(query, message):
    with pytest.raises(UserError, match=message) as raised:
        read_settings(f"judge:http://h/v1{query}")
    assert "sk-1" not in str(raised.value)


@pytest.mark.parametrize("source", [
    "judge:", "judge:h/v1", "judge:ftp://h", "judge:http://", "judge:http://h:port/", "judge:http:",
    "judge:http://me:sk-1@h/v1", "judge:http://h/v 1", "judge:http://h/v\u00e9",
])  # fmt: skip
def test_an_address_is_one(source):
    with pytest.raises(UserError, match="expected judge:http|MINIRLHF_JUDGE_KEY") as raised:
        load_preferrer(source)
    assert "sk-1" not in str(raised.value)


def test_a_key_goes_over_no_open_line():
    load_preferrer("judge:https://h/v1")
    with pytest.raises(UserError, match="http://h/v1: .*in the clear"):
        load_preferrer("judge:http://h/v1")


def test_a_key_that_is_none(monkeypatch):
    monkeypatch.setenv("MINIRLHF_JUDGE_KEY", "sk-1\nX: y")
    with pytest.raises(UserError, match="MINIRLHF_JUDGE_KEY is no key") as raised:
        load_preferrer("judge:http://h/v1")
    assert "sk-1" not in str(raised.value)


# Models, functions, people


@pytest.fixture
def models(alone):
    """Three reward models of fresh weights, with their tokenizer."""
    tokenizer, names = Tokenizer.train([], 257), []
    for seed in range(3):
        torch.manual_seed(seed)
        model = RewardModel(GPTConfig(257, 24, 1, 1, 8))
        model.normalize(0.0, 0.02)
        model.save_pretrained(alone / f"rm{seed}", tokenizer)
        names.append(f"rm{seed}")
    return names


def test_an_ensemble_is_the_mean_with_a_spread(models):
    prompts, a, b = ["p", "q"], ["abc", "b"], ["d", "efg"]
    tokenizer, scores = Tokenizer.train([], 257), []
    for name in models:  # a row at a time
        model, row = RewardModel.from_pretrained(name).eval(), []
        for prompt, text in zip(prompts * 2, a + b, strict=True):
            eos = [tokenizer.eos]
            ids = eos + tokenizer.encode(prompt) + tokenizer.encode(text) + eos
            row.append(model(torch.tensor([ids]), torch.tensor([len(ids)])).item())
        scores.append(row)
    scores = np.array(scores)  # (3, 4)
    preferrer = load_preferrer(",".join(models))
    assert preferrer.score(prompts, a) == pytest.approx(scores.mean(0)[:2], abs=1e-5)
    assert preferrer.spread(prompts, b) == pytest.approx(scores.std(0)[2:], abs=1e-5)
    margin = scores.mean(0)[:2] - scores.mean(0)[2:]
    p = preferrer.prefer(prompts, a, b)
    assert p == pytest.approx(1 / (1 + np.exp(-margin)), abs=1e-5)
    assert (preferrer.prefer(prompts, b, a) == 1 - p).all()
    one = load_preferrer(models[0])
    assert one.score(prompts, a) == pytest.approx(scores[0, :2], abs=1e-5) and not one.spread


def test_functions_give_scores_or_chances(alone):
    Path("rules.py").write_text(
        "def length(prompts, responses):\n    return [len(r) for r in responses]\n"
        "def first(prompts, a, b):\n    return [0.9 if x < 'm' else 0.3 for x in a]\n"
        "def wrong(prompts, a, b):\n    return [1.5 for x in a]\n"
        "def short(prompts, responses):\n    return [1.0]\n"
    )
    p = load_preferrer("rules.py:length").prefer(["", ""], ["abc", "b"], ["a", "b"])
    assert p == pytest.approx([1 / (1 + math.exp(-2)), 0.5])
    preferrer = load_preferrer("rules.py:first")
    assert preferrer.score is None
    p = preferrer.prefer([""] * 3, ["a", "z", "b"], ["z", "a", "c"])
    assert p == pytest.approx([0.8, 0.2, 0.5])  # (.9 + 1 - .3) / 2, its swap, (.9 + 1 - .9) / 2
    for name in ("wrong", "short"):
        with pytest.raises(UserError, match=f"rules.py:{name}: expected"):
            load_preferrer(f"rules.py:{name}").prefer(["", ""], ["a", "b"], ["b", "c"])


def others(**keys):
    """Records of other texts, as a tenth is held out of a file."""
    return [{"prompt": f"about {i}"} | {k: f"{v} {i}" for k, v in keys.items()} for i in range(12)]


def write(path, rows):
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_people_by_hand(alone):
    pair = {"prompt": "q", "chosen": "a", "rejected": "b"}
    other = {"prompt": "q", "chosen": "b", "rejected": "a"}
    third = {"prompt": "r", "chosen": "c", "rejected": "d"}
    write("pairs.jsonl", [pair, pair, other, third, *others(chosen="x", rejected="y")])
    people = load_preferrer("people:pairs.jsonl")
    p = people.prefer(["q", "q", "r", "q"], ["a", "b", "d", "a"], ["b", "a", "c", "c"])
    assert p == pytest.approx([2 / 3, 1 / 3, 0, 0.5])
    assert people.report().startswith("people: 3 of 4 pairs")
    rated = [("a", 1), ("a", 3), ("b", 2), ("b", 3), ("b", 0)]
    rows = [{"prompt": "", "response": text, "rating": n} for text, n in rated]
    write("rated.jsonl", rows + [row | {"rating": 0} for row in others(response="z")])
    p = load_preferrer("people:rated.jsonl").prefer([""], ["a"], ["b"])
    assert p == pytest.approx([(1 + 2 + 0.5) / 6])  # 1 beats 0; 3 beats 2 and 0, and ties with 3


def test_ties_of_people_count_one_half(alone):
    entry = {"version": 1, "kind": "comparison", "prompt": "", "responses": ["a", "b", "c"]}
    more = [entry | {"prompt": f"about {i}", "best": 0} for i in range(12)]
    write("labels.jsonl", [entry | {"ranking": [[0, 1], 2]}, entry | {"ranking": [0, 1, 2]}, *more])
    people = load_preferrer("people:labels.jsonl")
    p = people.prefer(["", "", ""], ["a", "a", "b"], ["b", "c", "c"])
    assert p == pytest.approx([0.75, 1, 1])


# On rows, in files


def test_rows_of_tokens_are_asked_as_texts():
    """Each pair once, and a swap is 1 - P."""
    tokenizer, seen = Tokenizer.train([], 257), []

    def prefer(prompts, a, b):
        seen.extend(zip(prompts, a, b, strict=True))
        return np.linspace(0.1, 0.6, len(a))

    def row(prompt, text):
        return [tokenizer.eos, *tokenizer.encode(prompt + text), tokenizer.eos]

    rows = [row("p", t) for t in "abc"] + [row("q", t) for t in "def"]
    lengths = torch.full((6,), 2)
    found = preferring.prefer_rows(prefer, tokenizer, torch.tensor(rows), lengths, lengths, 3)
    assert seen == [("p", "a", "b"), ("p", "a", "c"), ("p", "b", "c"),
                    ("q", "d", "e"), ("q", "d", "f"), ("q", "e", "f")]  # fmt: skip
    assert found[1].tolist() == [
        pytest.approx(row) for row in ([0.5, 0.4, 0.5], [0.6, 0.5, 0.6], [0.5, 0.4, 0.5])
    ]


def test_labels_to_train_on(alone, capsys):
    rows = [{"prompt": f"p{i}", "before": "b" * (1 + i % 3), "after": "a" * 2} for i in range(30)]
    Path("run").mkdir()
    write("run/samples.jsonl", rows)
    with JudgeServer(longer) as server:
        label.main(label.Knobs(source="run", labeler=server.source, out="labels.jsonl"))
    feedback = data.load_feedback("labels.jsonl")
    said = {}
    for line in Path("labels.jsonl").read_text().splitlines():
        entry = json.loads(line)
        said[entry["prompt"]] = entry
    assert len(said) == 30 and len(feedback.train) + len(feedback.test) == 60
    assert said["p0"]["responses"] == ["b", "aa"] and said["p0"]["ranking"] == [1, 0]
    assert said["p0"]["p"] == pytest.approx(by_hand(["b"], ["aa"])[0])
    assert said["p1"]["ranking"] == [[0, 1]] and said["p2"]["ranking"] == [0, 1]
    assert "30 pairs, 10 of them ties" in capsys.readouterr().out
    label.main(label.Knobs(source="toy", labeler="true", out="toy.jsonl", pairs=50, margin=0.1))
    for line in Path("toy.jsonl").read_text().splitlines():
        entry = json.loads(line)
        one, other = data.toy_reward(["", ""], entry["responses"])
        assert entry["p"] == pytest.approx(1 / (1 + math.exp(other - one)), abs=1e-6)
        tie = abs(entry["p"] - 0.5) <= 0.1
        assert entry["ranking"] == ([[0, 1]] if tie else [0, 1] if one > other else [1, 0])
    with pytest.raises(UserError, match="lies there already"):
        label.main(label.Knobs(source="run", labeler="true", out="labels.jsonl"))


def test_pairs_share_no_text():
    from minirlhf.feedback.answered import pairs_of

    answers = {"p": list("abcde"), "q": ["x"], "r": list("yz")}
    found = pairs_of(answers, 99, 0)
    texts = [text for _, one, other in found for text in (one, other)]
    assert len(set(texts)) == len(texts) == 6 and {"y", "z"} < set(texts)
    assert [prompt for prompt, _, _ in found].count("p") == 2
    assert len(pairs_of(answers, 2, 0)) == 2
    with pytest.raises(UserError, match="no prompt has two answers"):
        pairs_of({"p": ["a"]}, 9, 0)


def mend(talk):
    """A writer that says what is wrong, and then says one "bad" less."""
    if len(talk) == 1:
        return completion("Hello.")
    mended = talk[1].replace("bad", "good \ud800", 1)  # half a character, as no file takes it
    return completion("It says bad." if len(talk) == 3 else mended)


def test_a_revision_has_less_of_what_it_should_not(alone, capsys):
    write("mine.jsonl", [{"prompt": f"p{i}", "response": f"bad, bad {i}"} for i in range(25)])
    with JudgeServer(mend) as server:
        knobs = {"source": "mine.jsonl", "judge": server.source}
        constitution.main(constitution.Knobs(**knobs, out="once.jsonl"))
        constitution.main(constitution.Knobs(**knobs, out="twice.jsonl", rounds=2))
    for name, bad in (("once.jsonl", 1), ("twice.jsonl", 0)):
        rows = [json.loads(line) for line in Path(name).read_text().splitlines()]
        assert rows and {row["response"].count("bad") for row in rows} == {bad}
        assert data.load_feedback(name).train.responses
    used = {body["messages"][2]["content"] for body in server.seen}
    assert len(used) > 2  # principles, at random


def test_bare_prompts_are_drafted(alone):
    write("bare.jsonl", [{"prompt": f"p{i}"} for i in range(20)])
    with JudgeServer(mend) as server:
        knobs = constitution.Knobs(source="bare.jsonl", judge=server.source, out="o.jsonl", limit=3)
        constitution.main(knobs)
    rows = [json.loads(line) for line in Path("o.jsonl").read_text().splitlines()]
    assert [row["response"] for row in rows] == ["Hello."] * 3 and len(server.seen) == 9


# In training, and between runs


@pytest.fixture
def trained(toy, alone, monkeypatch):
    """main(**knobs) of train_dpo --online for two steps."""
    import train_dpo
    from minirlhf.engine import curves

    monkeypatch.setattr(curves, "plot", lambda *_: None)

    def main(out, **knobs):
        models = {"init": str(toy / "sft"), "reward": str(toy / "rm")}
        sizes = {"steps": 2, "batch_size": 16, "response_length": 6, "eval_samples": 8, "lr": 5e-4}
        own = models | sizes | {"save_every": 1} | knobs
        own = {"data": "toy", "online": True, "out": str(out)} | own
        return train_dpo.main(train_dpo.Knobs(**own))

    return main


def compare_length(talk):
    first, second = responses(talk[-1])
    return choice(1 / (1 + math.exp(len(second) - len(first))))


def test_whoever_prefers_labels_own_samples(toy, trained, alone):
    Path("rules.py").write_text(
        "def longer(prompts, a, b):\n"
        "    return [1 / (1 + 2.718281828459045 ** (len(y) - len(x))) for x, y in zip(a, b)]\n"
    )
    with JudgeServer(compare_length) as server:
        trained("judge", labeler=server.source)
        assert 16 < len(server.seen) <= 32  # two orders of 16 pairs, some of equal texts
    trained("rules", labeler="rules.py:longer")
    last = [Path(out, "metrics.jsonl").read_text().splitlines()[-1] for out in ("judge", "rules")]
    judge, rules = map(json.loads, last)
    assert judge["online/labels"] == rules["online/labels"] == 16
    assert judge["loss"] == pytest.approx(rules["loss"], abs=1e-5)
    trained("people", labeler="people:toy", reward="")
    with pytest.raises(UserError, match="no say without --online"):
        trained("off", labeler="people:toy", online=False, steps=0)
    with pytest.raises(UserError, match="nowhere"):
        trained("off", labeler="nowhere/rm")


def test_texts_and_rows_are_scored_alike(toy):
    """An ensemble of one model twice, by texts, beside that model on the rows."""
    base, tokenizer = load_base(toy / "sft" / "model")
    texts = ["abc", "hgf", "e", "dd"]
    rows = [[tokenizer.eos, *tokenizer.encode(f"b{text}"), tokenizer.eos] for text in texts]
    tokens, lengths = pad_rows(rows, tokenizer.pad)
    rows = tokens, torch.full((4,), 2), lengths - 2
    given = None, tokenizer, base
    score, prefer = labelers.load_labeler(f"{toy}/rm", *given)
    mean, by_mean = preferring.load_labeler(f"{toy}/rm,{toy}/rm", *given)
    with torch.no_grad():
        assert torch.allclose(score(*rows), mean(*rows), atol=1e-5)
        assert torch.allclose(prefer(*rows, 2), by_mean(*rows, 2), atol=1e-5)


def test_a_run_goes_on_with_more_budget(trained, alone):
    with JudgeServer(compare_length) as server:
        whole = trained("whole", labeler=server.source)
        Path("cache/judge.jsonl").unlink()
        server.seen = []
        with pytest.raises(UserError, match="budget of 20 requests is spent"):
            trained("part", labeler=f"{server.source}?budget=20")
        assert len(server.seen) == 20
        again = trained("part", labeler=f"{server.source}?budget=99", resume=True)
    for key in ("eval/score_after", "eval/kl_after"):
        assert whole[key] == again[key]


def test_win_rates_by_a_judge(toy, trained, alone, capsys):
    from minirlhf.look import command

    with JudgeServer(compare_length) as server:
        trained("run", labeler=server.source)
        capsys.readouterr()
        knobs = {"runs": [str(toy / "sft"), "run"], "reward": "none", "prompts": 6}
        command.main(command.Knobs(**knobs, judge=server.source))
        by_judge = capsys.readouterr().out
    Path("rules.py").write_text("def length(p, r):\n    return [float(len(x)) for x in r]\n")
    command.main(command.Knobs(**knobs, judge="rules.py:length"))
    by_rule = capsys.readouterr().out
    assert "by judge" in by_judge and "position bias +0.000" in by_judge
    figures = [line for line in by_judge.splitlines() if line.startswith("run ")][-1]
    assert figures in by_rule.splitlines()
    with pytest.raises(UserError, match="give a second one"):
        command.main(command.Knobs(runs=["run"], judge="x"))


def test_command_lines(alone):
    from minirlhf.feedback.answered import parse as parse_source

    knobs = parse_source(label.Knobs, "", ["runs/x", "--labeler", "true", "--out", "o.jsonl"])
    assert knobs.source == "runs/x" and knobs.pairs == 1000
    with pytest.raises(UserError, match="--labeler is missing"):
        label.main(label.Knobs(source="x"))
    with pytest.raises(UserError, match="judge:URL is missing"):
        constitution.main(constitution.Knobs(source="x"))
    with pytest.raises(UserError, match="ending in .jsonl"):
        label.main(label.Knobs(source="x", labeler="true", out="o.txt"))


def test_what_a_resumed_run_must_find():
    """Not the address of a named model, nor its budget."""
    of = preferring.content_of
    assert of("judge:http://h/v1?model=m&budget=9") == of("judge:http://i/v1?model=m")
    assert of("judge:http://h/v1?model=m") != of("judge:http://h/v1?model=m&rationale=1")
    assert of("a,b") == ["a", "b"] and of("runs/rm") == "runs/rm"


def test_who_only_compares_is_no_reward(alone):
    write("pairs.jsonl", others(chosen="x", rejected="y"))
    with pytest.raises(UserError, match="PPO needs a score"):
        preferring.find_function("people:pairs.jsonl", None)
