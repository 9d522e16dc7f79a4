"""Simulated people, what their labels stand for, and reward models that learn from them."""

import json
from functools import partial

import numpy as np
import pytest
import torch

import train_rm
from minirlhf import data
from minirlhf.data import show
from minirlhf.data.labels import KINDS
from minirlhf.engine.cli import UserError
from minirlhf.engine.files import write_lines
from minirlhf.engine.rows import Rows, pad_rows
from minirlhf.feedback import choice, mixture, recovery, simulate
from minirlhf.feedback.features import expect_feature, feature, standardised
from minirlhf.feedback.ground import Texts, character_ends, ground, texts_of
from minirlhf.feedback.people import HOW_MANY, Person
from minirlhf.gpt import GPTConfig, RewardModel
from minirlhf.rewards.distances import pearson_distance
from minirlhf.tokenizer import Tokenizer

WORTH = dict(zip("abcdefgh", range(8), strict=True))
FEATURES = tuple(f"text:{c}" for c in "abcdefgh")


def worth(prompts, responses):
    return [float(sum(WORTH[c] for c in text)) for text in responses]


def person(**traits):
    more = {"features": ("text:a", "text:h"), "replacements": tuple("abcdefgh")}
    return Person(worth, **more | traits)


def texts(n, rng, length=6):
    found = ["".join(rng.choice(list("abcdefgh"), length)) for _ in range(n)]
    return found if len(set(found)) == n else texts(n, rng, length)


# People


def test_certain_people_take_the_best():
    rng, sure = np.random.default_rng(0), person(beta=1e6)
    for _ in range(5):
        said = partial(sure.ask, prompt="", rng=rng)
        four = texts(4, rng)
        values = np.array(worth(four, four))
        ranking = said("comparison", responses=four).said["ranking"]
        assert list(values[ranking]) == sorted(values, reverse=True)
        edit = said("improvement", responses=["abcdef"]).responses[1]
        assert edit == "hbcdef"
        assert said("estop", responses=["ab"]).said["stop"] is None
        assert said("estop", responses=["ha"]).said["stop"] in (1, None)  # a is worth nothing
        curve = said("intertemporal", responses=["ahb"]).said["curve"]
        assert curve == [[0, 0], [1, 0], [2, 0.875], [3, 1]]
        assert said("critique", responses=["h"]).said == {"level": 2, "of": 3}
        odd = said("similarity", responses=["aab", "aac", "hhh"])
        assert odd.said["odd"] == 2
        marks = said("importance", responses=["ha", "ah"]).said["marks"]
        assert marks == [[[0, 1]], [[1, 2]]]
    assert sure.queries == 5 * 8
    trace = said("trace", responses=["abab", "aaab", "cccc", "cbch"])
    counts = [feature(trace.said["feature"], text) for text in trace.responses]
    assert counts == sorted(set(counts)) and len(counts) > 1


def test_people_err_as_told():
    rng, pair = np.random.default_rng(0), ["a", "b"]

    def share_of_b(**traits):
        who = Person(lambda p, r: [0.0 if text == "a" else 1.0 for text in r], **traits)
        asked = [who.ask("comparison", "", pair, rng).said["ranking"][0] for _ in range(1500)]
        assert who.queries == 1500
        return np.mean(asked)

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    for traits, expected in [
        ({}, sigmoid(1)),
        ({"beta": 2.0}, sigmoid(2)),
        ({"beta": 0.0}, 0.5),
        ({"beta": 1e6, "flip": 0.2}, 0.8),
        ({"first": 0.5}, sigmoid(0.5)),
    ]:
        assert share_of_b(**traits) == pytest.approx(expected, abs=0.04)
    faces = [person(beta=1e6).ask("social", "", ["h"], rng).said["reaction"] for _ in range(500)]
    assert faces.count("smile") / 500 == pytest.approx(0.7, abs=0.06)
    with pytest.raises(UserError, match="kind love"):
        person().ask("love", "", pair, rng)


def test_simulated_labels_as_a_file(tmp_path):
    path = tmp_path / "labels.jsonl"
    ask = "comparison:4=12,trace=3,estop=4"
    for _ in range(2):  # the same again, over the first
        simulate.main(simulate.Knobs(out=str(path), ask=ask))
    feedback = data.load_feedback(str(path))
    found = feedback.train.labels + feedback.test.labels
    assert feedback.counts["kinds"] == {"comparison": 12, "estop": 4, "trace": 3}
    assert {len(one.responses) for one in found if one.kind == "comparison"} == {4}
    with pytest.raises(UserError, match="expected KIND=NUMBER"):
        simulate.main(simulate.Knobs(out=str(path), ask="love=3"))
    with pytest.raises(UserError, match="no estop is of 2 responses"):
        simulate.main(simulate.Knobs(out=str(path), ask="estop:2=3"))
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(UserError, match="another file lies there"):
        simulate.main(simulate.Knobs(out=str(tmp_path / "mine")))
    items = feedback.train
    counts = show.comparison_counts(items)
    assert counts["estop"] == sum(one.kind == "estop" for one in items.labels)
    worse = {i for group in items.groups for i in group[1:]} - {group[0] for group in items.groups}
    assert len(data.worth_writing(items)) == len(items) - len(worse)


def test_features():
    text = "Good, GOOD day! Is it 42?"
    found = {"words": 6, "sentences": 2, "exclamations": 1, "questions": 1, "capitals": 6,
             "digits": 2, "variety": 5 / 6, "word:good": 2, "text:oo": 1}  # fmt: skip
    for name, value in found.items():
        expect_feature(name, "here")
        assert feature(name, text) == pytest.approx(value)
    np.testing.assert_allclose(standardised(["words", "digits"], ["a", "a b c"])[:, 0], [-1, 1])
    for wrong in ("beauty", "word:", "word"):
        with pytest.raises(UserError, match="here: feature .*, expected words, sentences"):
            expect_feature(wrong, "here")


# What a label stands for


def test_characters_become_tokens():
    tokenizer = Tokenizer.train(["ab ab ab ab é"], 259)  # "ab" and one more merge
    ids = tokenizer.encode("abé 😀b")
    ends = character_ends(tokenizer, ids)
    said = [
        len(tokenizer.decode_bytes(ids[: n + 1]).decode(errors="ignore")) for n in range(len(ids))
    ]
    assert ends.tolist() == said and said[-1] == 6
    row = np.array([tokenizer.eos, 1, *ids, tokenizer.eos])
    read = texts_of(Rows([row], np.array([2]), tokenizer.pad, "cpu"), tokenizer)
    assert read.at[0].tolist() == list(range(1, len(row)))
    for characters in range(7):
        n = read.tokens(0, characters)
        assert characters == 0 or ends[n - 1] >= characters
        assert n < 2 or ends[n - 2] < characters
    marked = read.marked(0, [[4, 5]])
    inside = [tokenizer.decode_bytes([i]) for i, m in zip(ids, marked, strict=True) if m]
    assert b"".join(inside).strip() == "😀".encode()
    assert len(character_ends(tokenizer, [])) == 0


def label(kind, **more):
    found = data.parse_label({"version": 1, "kind": kind, "prompt": ""} | more, "here")
    return found._replace(items=tuple(range(len(found.responses))))


def options_of(one):
    """What the options of a label are worth where the prefix of k letters of text i is 10 i + k."""
    at = [np.r_[: len(text) + 1, len(text)] for text in one.responses]
    ends = [np.arange(1, len(text) + 1) for text in one.responses]
    longest = max(map(len, one.responses))
    prefixes = torch.tensor([[10.0 * i + k for k in range(longest + 1)] for i in range(len(at))])
    (group,) = ground([one], range(len(at)), Texts(at, ends))
    return group.form, group.options.values(prefixes)[0].tolist(), group.said[0].tolist()


def test_options_by_hand():
    three = {"responses": ["abc", "de", "f"]}
    wholes = [3.0, 12.0, 21.0]
    for one, expected in [
        (label("critique", response="abc", level=1, of=4), ("levels", [3.0], 1)),
        (label("social", response="abc", reaction="smile"), ("faces", [3.0], 2)),
        (label("comparison", **three, best=1), ("choice", wholes, 1)),
        (label("comparison", **three, ranking=[2, 0, 1]), ("ranking", [21.0, 3.0, 12.0], 0)),
        (label("comparison", **three, ranking=[[2, 0], 1]), ("tiers", wholes, [0, 1, 0])),
        (label("intertemporal", response="abc", curve=[[0, 0.5], [2, 1]]),
         ("sketch", [0.0, 2.0], [0.5, 1.0])),
        (label("improvement", response="abc", improved="de"), ("choice", [12.0, 3.0], 0)),
        (label("estop", response="abc", stop=1), ("choice", [0.0, 1.0, 2.0, 3.0], 1)),
        (label("estop", response="abc", stop=None), ("choice", [0.0, 1.0, 2.0, 3.0], 3)),
        (label("importance", **three, ranking=[0, 1, 2], marks=[[], [], []]),
         ("ranking", wholes, 0)),
        (label("language", response="abc", others=["aab", "f"], utterance="less text:a",
               grammar=["more text:a", "less text:a", "more text:x"]),
         ("choice", [13.0, 21.0, 3.0], 1)),
        (label("similarity", **three, odd=2), ("odd", [0.0, 10.0, 20.0], 2)),
        (label("trace", **three, feature="new"), ("trace", [0.0, 10.0, 20.0], 0)),
    ]:  # fmt: skip
        assert options_of(one) == expected, one.kind
    two = {"responses": ["a!", "b"], "weights": {"exclamations": 2}, "others": [{"words": 1}]}
    e, _ = np.exp([2, -2]), None  # standardised, the feature is 1 and -1
    form, values, said = options_of(label("proxy", **two))
    assert (form, said) == ("choice", 0)
    np.testing.assert_allclose(values, [(2 * e[0] + 11 * e[1]) / e.sum(), 6.5], rtol=1e-6)


# The reward that a kind tells


@pytest.mark.parametrize("name", [name for name in recovery.ROWS if name != "similarity"])
def test_recovered(name):
    whole = partial(recovery.recovered, name)
    recover = recovery.recovered_feature if name == "trace" else whole
    few, many = recover(30, 0), recover(400, 0)
    assert many < few and many < 0.15


def test_recovered_from_similar_texts():
    """Twenty pairs are few: the mean of three seeds."""
    found = []
    for n in (0, 30, 400):
        found.append(np.mean([recovery.recovered_from_similar(n, seed) for seed in range(3)]))
    assert found[0] > found[1] > found[2] and found[2] < 0.15


def test_marks_keep_what_only_goes_along_out():
    """Letter h is worth nothing, and nearly always in the better text."""

    def fitted(weight, seed):
        rng = np.random.default_rng(seed)
        gold = np.array([*rng.normal(size=7), 0])
        counts = rng.multinomial(6, np.ones(8) / 8, size=(30, 2)).astype(float)
        values = counts @ gold + rng.gumbel(size=(30, 2))
        counts = counts[np.arange(30)[:, None], values.argsort(1)[:, ::-1]]
        counts[:, 0, 7] += rng.random(30) < 0.9
        x, w = torch.tensor(counts), torch.zeros(8, dtype=torch.float64, requires_grad=True)
        matters = torch.tensor(np.abs(gold) > 0.3)

        def nll():
            penalty = choice.occlusion_penalty(x @ w, x @ (w * matters)).mean()
            return choice.ranking_nll(x @ w).sum() + 30 * weight * penalty

        recovery.fit(nll, [w], 30)
        others = rng.multinomial(6, np.ones(8) / 8, size=1000)
        return pearson_distance(others @ w.detach().numpy(), others @ gold)

    without, with_marks = (np.mean([fitted(weight, s) for s in range(4)]) for weight in (0, 1))
    assert with_marks < without - 0.03


# Training


def write(path, kinds, n, **traits):
    rng = np.random.default_rng(0)
    who = Person(data.toy_reward, features=FEATURES, replacements=tuple("abcdefgh"), **traits)
    labels = [who.ask(k, "", texts(HOW_MANY[k], rng), rng) for _ in range(n) for k in kinds]
    write_lines(path, map(data.as_entry, labels))
    return str(path)


def train(toy, path, **changes):
    base = {"epochs": 2, "lr": 3e-3, "delete": 0.1, "normalize": False}
    knobs = train_rm.Knobs(data=path, init=str(toy / "sft"), **base | changes)
    return train_rm.main(knobs)


@pytest.mark.parametrize("level", ["response", "token"])
def test_all_kinds_train_a_reward_model(toy, tmp_path, level):
    path = write(tmp_path / "all.jsonl", KINDS, 20, beta=3.0)
    more = {"batch_size": 32, "epochs": 3, "lr": 5e-3}
    train(toy, path, level=level, out=str(tmp_path / "rm"), **more)
    rows = [json.loads(line) for line in (tmp_path / "rm" / "metrics.jsonl").open()]
    assert {f"nll/{kind}" for kind in KINDS} <= set().union(*rows)
    rm = RewardModel.from_pretrained(tmp_path / "rm" / "model")  # nothing of the mixture in it
    assert rm.level == level
    tokenizer = Tokenizer.load(tmp_path / "rm" / "model")
    words = texts(300, np.random.default_rng(1))
    rows = [[tokenizer.eos, *tokenizer.encode(word), tokenizer.eos] for word in words]
    idx, lengths = pad_rows(rows, tokenizer.pad)
    with torch.no_grad():
        scores = rm(idx, lengths, torch.ones_like(lengths))
    assert np.corrcoef(scores, data.toy_reward(words, words))[0, 1] > 0.6


def test_stops_alone_have_a_likelihood(toy, tmp_path):
    path = write(tmp_path / "stops.jsonl", ["estop"], 120, beta=3.0)
    summary = train(toy, path, epochs=8, kind_betas="estop=3", out=str(tmp_path / "rm"))
    assert summary["eval/nll/estop"] < summary["eval/nll_of_chance/estop"]
    assert "eval/accuracy" not in summary


def test_resumed_as_if_not_stopped(toy, tmp_path):
    path = write(tmp_path / "some.jsonl", ["critique", "trace", "similarity", "comparison"], 15)
    whole = train(toy, path, out=str(tmp_path / "a"), save_every=3)
    states = sorted((tmp_path / "a" / "state").glob("*.safetensors"))
    states[-1].unlink()
    (tmp_path / "a" / "summary.json").unlink()
    again = train(toy, path, out=str(tmp_path / "a"), save_every=3, resume=True)
    figures = [name for name in whole if name.startswith("eval/")]
    assert figures and all(whole[name] == again[name] for name in figures)


@pytest.mark.parametrize(
    "changes, problem",
    [
        ({"kind_weights": "estop=1"}, "labels of comparison, critique"),
        ({"kind_weights": "critique=1,critique=2"}, "critique twice"),
        ({"kind_betas": "critique=nan"}, "critique=NUMBER, at least 0.001"),
        ({"kind_betas": "critique=0"}, "at least 0.001"),
        ({"kind_weights": "critique=-1"}, "at least 0"),
        ({"kind_weights": "critique=0,comparison=0"}, "nothing is left to learn"),
        ({"margin": 1.0}, "no say in labels of many kinds"),
        ({"delete_eos": 0.1}, "no say in labels of many kinds"),
        ({"shard": True}, "--shard"),
        ({"loss": "ratings"}, "comparisons, and no ratings"),
        ({"loss": "best_of_k", "kind_weights": "critique=2"}, "not read by their kinds"),
    ],
)
def test_refused(toy, tmp_path, changes, problem):
    path = write(tmp_path / "two.jsonl", ["critique", "comparison"], 20)
    with pytest.raises(UserError, match=problem):
        train(toy, path, out=str(tmp_path / "rm"), **changes)


def test_an_unknown_feature_is_refused(toy, tmp_path):
    path = write(tmp_path / "words.jsonl", ["language"], 20)
    lines = (tmp_path / "words.jsonl").read_text().replace("text:a", "beauty")
    (tmp_path / "words.jsonl").write_text(lines)
    with pytest.raises(UserError, match='line .*: feature "beauty", expected words'):
        train(toy, path, out=str(tmp_path / "rm"))


def test_weights_and_betas_in_the_loss(tmp_path):
    """By hand: the mean over labels of weight * loss, at another beta each; nothing is deleted."""
    torch.manual_seed(0)
    tokenizer = Tokenizer.train(["abcdefgh"], 257)
    model = RewardModel(GPTConfig(257, 16, 1, 1, 8), level="token")
    feedback = data.load_feedback(write(tmp_path / "l.jsonl", ["estop", "importance"], 20))
    items = feedback.train
    knobs = train_rm.Knobs(
        data="", kind_weights="estop=0.25", kind_betas="estop=2,importance=3", delete=0.0
    )
    rows = Rows(*data.encode_items(items, tokenizer, 16)[1:], tokenizer.pad, "cpu")
    batch = next(mixture.epoch(items, 12, np.random.default_rng(0)))
    kinds = mixture.fresh(knobs, items, tokenizer, 8)
    found, stats = mixture.step_loss(kinds, knobs, model, items, rows, torch.no_grad(), batch)

    def rewards(text, keep=None):
        ids = [tokenizer.eos, *tokenizer.encode(text), tokenizer.eos]
        ids = [i for n, i in enumerate(ids) if keep is None or n in keep]
        with torch.no_grad():
            return model.values(torch.tensor([ids]))[0].double().numpy()[1:]

    total, penalties, n_important = 0.0, [], 0
    for n in batch.labels:
        one = items.labels[n]
        if one.kind == "estop":
            r = rewards(one.responses[0])
            prefixes = 2 * np.array([*(r[:k].sum() for k in range(6)), r.sum()])
            stop = 6 if one.said["stop"] is None else one.said["stop"]
            total += 0.25 * (np.log(np.exp(prefixes).sum()) - prefixes[stop])
            continue
        n_important += 1
        scores = [rewards(text).sum() for text in one.responses]
        first, second = one.said["ranking"]
        total += np.log1p(np.exp(-3 * (scores[first] - scores[second])))
        for text, score, spans in zip(one.responses, scores, one.said["marks"], strict=True):
            keep = {0, 7, *(start + 1 for start, _ in spans)}
            penalties.append((score - rewards(text, keep).sum()) ** 2)
    total += n_important * np.mean(penalties)
    assert n_important and n_important < len(batch.labels)
    assert found.item() == pytest.approx(total / len(batch.labels), rel=1e-4)
    assert set(stats) == {"nll/estop", "nll/importance", "perf/tokens"}
    texts_read = sum(len(items.labels[n].responses) for n in batch.labels)
    assert stats["perf/tokens"] == 8 * texts_read  # six letters between two EOS


def test_both_bad_and_counted_faces():
    bad = label("comparison", responses=["a", "b"], ranking=[[0, 1]], both_bad=True)
    groups = ground([bad], range(2), Texts([np.arange(3)] * 2, [np.array([1])] * 2))
    assert [group.form for group in groups] == ["tiers", "both_bad"]
    kinds = mixture.Mixture([bad], 4)
    prefixes = torch.tensor([[0.0, 0, 1], [0.0, 0, 2]])
    (nll,) = kinds.nll(groups, prefixes, None).values()
    first = np.log(1 + np.exp(1)) / 2 + np.log(1 + np.exp(-1)) / 2
    second = np.log(1 + np.exp(1)) + np.log(1 + np.exp(2))
    np.testing.assert_allclose(nll.detach(), [first, second], rtol=1e-6)
    faces = [label("critique", response="a", level=2, of=3)]
    faces += [label("social", response="a", reaction="smile")] * 2
    expected = np.ones((3, 3)) / 3
    expected[2] = [0.2, 0.2, 0.6]
    np.testing.assert_allclose(mixture.Mixture(faces, 4).shown, expected, rtol=1e-6)
