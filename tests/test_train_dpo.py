"""train_dpo: what each loss is fed, own samples, rounds, micro-batches and the cache of reference
log-probs."""

import copy
import functools
import json
import math
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import train_dpo
import train_rm
from minirlhf import data, dpo, gpt
from minirlhf.data import Items, all_logps, parse_record, prefix_kl, stored_logps
from minirlhf.engine import curves
from minirlhf.engine.cli import UserError
from minirlhf.engine.rows import Rows, pad_rows
from minirlhf.feedback import kinds, labelers
from minirlhf.feedback.kinds import Batch, Compared, Ranked, Thumbs, thumbs
from minirlhf.feedback.method import LOSSES, method_of
from minirlhf.feedback.preference_model import PreferenceModel
from minirlhf.gpt import GPT, GPTConfig
from minirlhf.look import accuracy
from minirlhf.online import batches, samples
from minirlhf.tokenizer import Tokenizer

CPU = torch.device("cpu")
PAD = 9


@pytest.fixture(scope="module")
def shared_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


load_feedback = data.load_feedback
load_toy = functools.cache(lambda: load_feedback("toy"))


@pytest.fixture(autouse=True)
def quick(monkeypatch, shared_cache):
    """Without what takes most of the time of a short run."""
    monkeypatch.setenv("MINIRLHF_CACHE", str(shared_cache))
    monkeypatch.setattr(curves, "plot", lambda *_: None)
    load = lambda source: load_toy() if source == "toy" else load_feedback(source)  # noqa: E731
    monkeypatch.setattr(data, "load_feedback", load)


@pytest.fixture
def cache(monkeypatch, tmp_path, quick):
    monkeypatch.setenv("MINIRLHF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "ref-logps"


def tiny(seed=0, scale=8.0):
    """A GPT of 10 tokens whose distributions are far from uniform."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(10, 16, 1, 2, 8))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(scale if p.dim() == 2 else 1)
    return model


def some_rows(n=8, seed=0):
    rng = np.random.default_rng(seed)
    tokens = [np.array([0, *rng.integers(1, 9, rng.integers(2, 9)), 0]) for _ in range(n)]
    return Rows(tokens, np.array([rng.integers(1, len(row)) for row in tokens]), PAD, CPU)


def each(rows):
    """(row, prompt length) of each."""
    return list(zip(rows.tokens, rows.prompt_lengths, strict=True))


def prompts_of(rows):
    return [row[:p].tolist() for row, p in each(rows)]


def run(toy, out, **knobs):
    """(summary, rows of metrics, weights) of a short run on the toy language."""
    defaults = dict(data="toy", init=str(toy / "sft"), reward=str(toy / "rm"), out=str(out),
                    batch_size=32, steps=3, lr=1e-2, response_length=6, eval_samples=4)  # fmt: skip
    summary = train_dpo.main(train_dpo.Knobs(**defaults | knobs))
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return summary, metrics, load_file(out / "model" / "model.safetensors")


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def differ(a, b):
    return any(not torch.equal(a[name], b[name]) for name in a)


# Log-probs and KL by NumPy, a row at a time, from the logits of the whole model


def log_softmax(model, row):
    with torch.no_grad():
        logits = model(torch.as_tensor(row)[None])[0].double().numpy()
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


def np_logp(model, row, p):
    logp = log_softmax(model, row)
    return sum(logp[t - 1][row[t]] for t in range(p, len(row)))


def np_kl(policy, reference, row, p):
    q, r = log_softmax(policy, row), log_softmax(reference, row)
    kl = (np.exp(r) * (r - q)).sum(1)
    return sum(kl[t - 1] for t in range(p, len(row)))


def np_h(policy, reference, rows):
    return np.array([np_logp(policy, *row) - np_logp(reference, *row) for row in each(rows)])


def sg(x):
    return 1 / (1 + np.exp(-x))


def loss_of(kind, rows, said, *, policy, reference, wins=None, **knobs):
    """batch_loss on rows, with the reference's log-probs."""
    knobs = train_dpo.Knobs(loss=kind, data="toy", **knobs)
    method, knobs = method_of(knobs), kinds.settled(knobs)
    batch = Batch(rows, all_logps(reference, rows), said, wins)
    return train_dpo.batch_loss(policy, reference, batch, method, knobs)


@pytest.mark.parametrize("micro_batch", [0, 1, 3])
def test_prefix_kl(micro_batch):
    policy, reference, rows = tiny(1), tiny(2), some_rows()

    def by_hand():
        return [np_kl(policy, reference, *row) for row in each(rows)]

    kl = rows.by_parts(lambda *row: prefix_kl(policy, reference, *row), micro_batch)
    assert np.allclose(kl.detach(), by_hand(), atol=1e-4) and min(by_hand()) > 0.01
    kl.sum().backward()
    assert all(p.grad is None for p in reference.parameters())
    weight, step = policy.h[0].mlp.c_fc.weight, 1e-2
    sides = []
    for sign in (1, -1):
        with torch.no_grad():
            weight[3, 2] += sign * step
            sides.append(sum(by_hand()))
            weight[3, 2] -= sign * step
    slope = (sides[0] - sides[1]) / (2 * step)
    assert weight.grad[3, 2].item() == pytest.approx(slope, rel=0.02)


def test_pairs_reach_their_losses(monkeypatch):
    """tdpo1, npo, sppo and d2o get the KL, the win rates and the anchors of the right rows."""
    policy, reference, rows = tiny(1), tiny(2), some_rows(8)
    both = {"policy": policy, "reference": reference}
    h, b = np_h(policy, reference, rows), 0.1
    said = Compared(None, np.array([[0, 1], [2, 3], [5, 4]]), np.array([0.9, 0.3, 1.0]))
    chosen, rejected = np.array([0, 3, 5]), np.array([1, 2, 4])
    kl = np.array([np_kl(policy, reference, *row) for row in each(rows)])
    loss, stats = loss_of("tdpo1", rows, said, **both)
    logit = b * (h[chosen] - h[rejected] - kl[rejected] + kl[chosen])
    assert loss.item() == pytest.approx(-np.log(sg(logit)).mean(), rel=1e-4)
    assert stats["rewards/chosen"].item() == pytest.approx(b * h[chosen].mean(), rel=1e-4)
    assert stats["rewards/accuracies"].item() == pytest.approx((h[chosen] > h[rejected]).mean())
    loss, _ = loss_of("npo", rows, said, **both)
    assert loss.item() == pytest.approx((-2 / b * np.log(sg(-b * h[rejected]))).mean(), rel=1e-4)
    p = np.array([0.9, 0.7, 1.0])
    own_wins = torch.linspace(0, 1, 8), chosen / 7, rejected / 7
    for wins, won, lost in [(None, p, 1 - p), own_wins]:
        loss, _ = loss_of("sppo", rows, said, wins=wins, **both)
        up, down = h[chosen] - (won - 0.5) / b, h[rejected] - (lost - 0.5) / b
        assert loss.item() == pytest.approx((0.5 * (up**2 + down**2)).mean(), rel=1e-4)
    own, real = [], samples.own_answers
    monkeypatch.setattr(samples, "own_answers", lambda *a: own.append(real(*a)) or own[0])
    loss, _ = loss_of("d2o", rows, said, **both, samples=3, response_length=5)
    assert prompts_of(own[0]) == [prompt for prompt in prompts_of(rows) for _ in range(3)]
    anchors = np_h(policy, reference, own[0]).reshape(8, 3).mean(1)
    expected = -np.log(sg(b * (anchors - h)[rejected])).mean()
    assert loss.item() == pytest.approx(expected, rel=1e-4)


def test_thumbs_and_lists_reach_their_losses():
    policy, reference, rows = tiny(1), tiny(2), some_rows(6)
    both = {"policy": policy, "reference": reference}
    h, b = np_h(policy, reference, rows), 0.1
    good = np.array([True, False, True, True, False, False])
    z = max(0.0, np_h(policy, reference, rows.mismatched(16)).mean())
    loss, stats = loss_of("kto", rows, Thumbs(None, good), **both)
    expected = (1 - sg(b * np.where(good, h - z, z - h))).mean()
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    margin = b * (h[good].mean() - h[~good].mean())
    assert stats["rewards/margins"].item() == pytest.approx(margin, rel=1e-3)
    scores = np.array([1.5, -0.5, 0.25, 0.5, -1, -0.75], dtype=np.float32)
    loss, _ = loss_of("una", rows, Thumbs(None, scores), **both)
    assert loss.item() == pytest.approx(((b * h - scores) ** 2).mean(), rel=1e-4)
    loss, _ = loss_of("una", rows, Thumbs(None, good), **both)
    expected = -np.log(sg(np.where(good, b * h, -b * h))).mean()
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    # two lists, of three and of two responses
    lists, rewards = np.array([[4, 0, 1], [3, 5, 0]]), np.array([[2.0, 1, 0], [1, 0, 7]])
    said = Ranked(None, lists, rewards, np.array([[True, True, True], [True, True, False]]))
    s = [np_logp(policy, row, p) / (len(row) - p) for row, p in each(rows)]
    first = max(0, s[0] - s[4]) + max(0, s[1] - s[4]) + max(0, s[1] - s[0]) - s[4]
    second = max(0, s[5] - s[3]) - s[3]
    loss, _ = loss_of("rrhf", rows, said, **both)
    assert loss.item() == pytest.approx((first + second) / 2, rel=1e-4)
    ordered = np.mean([h[4] > h[0], h[4] > h[1], h[0] > h[1], h[3] > h[5]])
    _, stats = loss_of("lipo", rows, said, **both)
    assert stats["rewards/accuracies"].item() == pytest.approx(ordered)


def test_nash_md_learns_from_its_wins():
    policy, reference, rows = tiny(1), tiny(2), some_rows(4)
    wins = torch.tensor([0.9, 0.2, 0.6, 0.5])
    both = {"policy": policy, "reference": reference}
    loss, _ = loss_of("nash_md", rows, None, wins=wins, online=True, **both)
    logp = np.array([np_logp(policy, *row) for row in each(rows)])
    cost = 0.1 * np_h(policy, reference, rows) - (wins.numpy() - 0.5)
    assert loss.item() == pytest.approx((cost * logp).mean(), rel=1e-4)


@pytest.mark.parametrize("kind, soft_labels", [
    ("sigmoid", False), ("ipo", True), ("tdpo2", True), ("sppo", False)
])  # fmt: skip
def test_a_batch_of_ties_says_nothing(kind, soft_labels):
    policy, rows = tiny(1), some_rows(4)
    said = Compared(None, np.array([[0, 1], [2, 3]]), np.array([0.5, 0.5]))
    both = {"policy": policy, "reference": tiny(2)}
    loss, stats = loss_of(kind, rows, said, **both, soft_labels=soft_labels)
    loss.backward()
    assert loss == 0 and all(not p.grad.any() for p in policy.parameters() if p.grad is not None)
    assert stats["rewards/margins"].isnan()


@pytest.mark.parametrize("kind", ["sigmoid", "tdpo2", "aot", "simpo", "kto", "pro"])
def test_micro_batches_give_the_gradient_of_the_whole(kind):
    rows, gradients = some_rows(8), []
    given = {
        "kto": Thumbs(None, np.array([True, False] * 4)),
        "pro": Ranked(None, np.arange(8).reshape(2, 4), np.tile([3.0, 2, 1, 0], (2, 1)),
                      np.ones((2, 4), dtype=bool)),
    }  # fmt: skip
    pairs = Compared(None, np.array([[0, 1], [3, 2], [4, 7], [5, 6]]), np.ones(4))
    for micro_batch in (0, 8, 4, 2):  # as one, and in 1, 2, 4 parts
        policy, reference = tiny(1, scale=3), tiny(2, scale=3)
        both = {"policy": policy, "reference": None if kind in ("simpo", "pro") else reference}
        loss, _ = loss_of(kind, rows, given.get(kind, pairs), **both, micro_batch=micro_batch)
        loss.backward()
        gradients.append([p.grad for p in policy.parameters()])
    assert max(g.abs().max() for g in gradients[0]) > 1e-3
    for other in gradients[1:]:
        for g, same in zip(gradients[0], other, strict=True):
            torch.testing.assert_close(g, same, atol=1e-6, rtol=1e-5)


def test_micro_batch_bounds_the_rows_in_memory():
    seen = []
    rows = some_rows(7)
    rows.by_parts(lambda tokens, p, r: seen.append(len(tokens)) or torch.zeros(len(tokens)), 2)
    assert sum(seen) == 7 and max(seen) == 2
    order = rows.by_parts(lambda tokens, p, r: tokens[:, 1] + 0.0, 3)
    assert order.tolist() == [row[1] for row in rows.tokens]


def test_mismatched_rows():
    tokens = [np.array([0, 1, 2, 5, 0]), np.array([0, 3, 6, 7, 8, 0]), np.array([0, 4, 0])]
    other = Rows(tokens, np.array([3, 2, 2]), PAD, CPU).mismatched(5)
    expected = [[0, 1, 2, 0], [0, 3, 5, 0], [0, 6, 7, 8, 0]]  # the last prompt did not fit
    assert [row.tolist() for row in other.tokens] == expected
    assert other.prompt_lengths.tolist() == [3, 2, 1]


# Shapes of data


def items(n, **more):
    return Items([""] * n, [f"r{i}" for i in range(n)], [f"line {i}" for i in range(n)], **more)


def test_thumbs_of_ratings_rankings_and_labels(capsys):
    rated = items(5, ratings=[np.array(r) for r in ([1, 3], [0.0], [4.0], [1.0], [3.0])])
    index, scores = thumbs(rated)  # the mean is 2
    assert index.tolist() == [1, 2, 3, 4] and "1 of 5" in capsys.readouterr().out
    assert np.allclose(scores, np.array([-2, 2, -1, 1]) / np.sqrt(2.5))
    index, scores = thumbs(items(6, groups=[[1, 0], [4, 3, 5]]))
    assert index.tolist() == [0, 1, 4, 5] and scores.tolist() == [False, True, True, False]
    assert "2 of 6" in capsys.readouterr().out
    labels = [np.array(r) for r in ([1.0], [0.0], [0.0, 0.0, 1.0], [1.0], [0.0, 1.0])]
    index, scores = thumbs(items(5, ratings=labels, thumbs=True))  # the last is neither
    assert index.tolist() == [0, 1, 2, 3] and scores.tolist() == [True, False, False, True]
    assert "1 of 5" in capsys.readouterr().out
    index, scores = thumbs(items(2, ratings=[np.array([1.0])] * 2, thumbs=True))  # all up
    assert index.tolist() == [0, 1] and scores.tolist() == [True, True]
    with pytest.raises(UserError, match="all 2 ratings are alike"):
        thumbs(items(2, ratings=[np.array([1.0])] * 2))
    with pytest.raises(UserError, match="all 3 ratings are alike"):
        thumbs(items(3, ratings=[np.array([0.1])] * 3))  # whose mean is not quite 0.1
    halves = thumbs(items(10, groups=[[i, i + 5] for i in range(5)]))
    drawn = list(kinds.thumbs_epoch(*halves, 4, np.random.default_rng(0)))
    assert sorted(np.concatenate([index for index, _ in drawn])) == list(range(10))
    assert {len(index) for index, _ in drawn} <= {3, 4, 5}
    assert all((index < 5).tolist() == scores.tolist() for index, scores in drawn)
    with pytest.raises(UserError, match="at least 2"):
        list(kinds.thumbs_epoch(*thumbs(items(10, groups=[[0, 1]])), 1, np.random.default_rng(0)))


def test_lists_are_ranked_and_whole():
    groups = [[3, 1, 2], [0, 4], [5, 6, 7], [9, 8]]
    drawn = list(kinds.lists_epoch(items(10, groups=groups), 6, 4, np.random.default_rng(0)))
    assert len(drawn) == 2  # two lists of at most three are six responses
    found = []
    for index, lists, rewards, mask in drawn:
        assert lists.shape == rewards.shape == mask.shape
        assert sorted(lists[mask]) == list(range(len(index)))
        for one, worth, real in zip(lists, rewards, mask, strict=True):
            found.append(index[one[real]].tolist())
            assert worth[real].tolist() == list(range(real.sum()))[::-1]
    assert sorted(found) == sorted(groups)
    means = np.arange(11.0)[::-1] % 4
    rated = items(11, ratings=[np.array([m]) for m in means])
    drawn = list(kinds.lists_epoch(rated, 100, 3, np.random.default_rng(0)))
    ((index, lists, rewards, mask),) = drawn
    assert sorted(index) == list(range(11)) and sorted(mask.sum(1)) == [3, 4, 4]
    for one, worth, real in zip(lists, rewards, mask, strict=True):
        m = means[index[one[real]]].tolist()  # ranks: how many smaller values its list has
        assert worth[real].tolist() == [len({y for y in m if y < x}) for x in m]
        assert (np.diff(worth[real]) <= 0).all()


def test_labels_in_a_file(tmp_path):
    row = {"prompt": "p", "response": "r"}
    for label, number in [(True, 1), (False, 0), (1, 1), (0, 0), (1.0, 1)]:
        found = parse_record(row | {"label": label}, "f")
        assert (found.kind, found.prompt, found.responses) == ("label", "p", ["r"])
        assert found.number == number
    for bad in (2, 0.5, -1, "true", [True]):
        with pytest.raises(UserError, match="f: label: expected true or false"):
            parse_record(row | {"label": bad}, "f")
    path = tmp_path / "labels.jsonl"
    rows = [{"prompt": f"p{i // 2 % 15}", "response": f"r{i}", "label": i % 2 == 0}
            for i in range(60)]  # fmt: skip
    # two thumbs up and two down for each prompt: pairs for those who ask, and the labels stay
    feedback = data.load_feedback(write_lines(path, rows))
    train = feedback.train
    index, scores = thumbs(train)
    assert len(index) == len(train) == 60 - len(feedback.test) and len(train) % 4 == 0
    even = [int(response[1:]) % 2 == 0 for response in train.responses]
    assert scores.tolist() == even == [r.tolist() == [1] for r in train.ratings]
    assert train.thumbs and not train.groups
    pairs, _ = train.comparisons(1000, seed=1, across=False)
    assert len(pairs) == len(train) and all(even[i] and not even[j] for i, j in pairs)
    write_lines(path, [rows[0], {"prompt": "p", "response": "r", "rating": 1}])
    with pytest.raises(UserError, match="line 2: a rating where the others are labels"):
        data.load_feedback(str(path))


@pytest.mark.parametrize("loss", ["kto", "una", "lipo", "pro"])
def test_files_of_labels_and_rankings_train(loss, toy, tmp_path):
    rng = np.random.default_rng(0)

    def word():
        return "".join(rng.choice(list("abcdefgh"), 6))

    label, rank = [], []  # letters late in the alphabet are liked
    for _ in range(60):
        response = word()
        liked = sum(map(ord, response)) > 6 * ord("d")
        label.append({"prompt": word(), "response": response, "label": liked})
    for k in [2, 3, 4] * 10:
        prompt, responses = word(), [word() for _ in range(k)]
        worth = [sum(map(ord, response)) for response in responses]
        ranking = sorted(range(k), key=lambda i: -worth[i])
        rank.append({"prompt": prompt, "responses": responses, "ranking": ranking})
    path = write_lines(tmp_path / "data.jsonl", label if loss in ("kto", "una") else rank)
    more = {"data": path, "epochs": 6, "steps": 0, "lr": 1e-3}
    _, metrics, _ = run(toy, tmp_path / "out", loss=loss, **more)
    assert np.mean([row["rewards/accuracies"] for row in metrics[-4:]]) > 0.7
    if loss == "kto":
        with pytest.raises(UserError, match="no two rated responses share a prompt"):
            run(toy, tmp_path / "out", data=path)


# References


def test_losses_without_a_reference_load_none(toy, tmp_path, monkeypatch):
    models, real = [], train_dpo.prepare

    def prepare(knobs, *given):
        models.extend(filter(None, given))
        real(knobs, *given)

    monkeypatch.setattr(train_dpo, "prepare", prepare)
    free = [kind for kind in LOSSES if dpo.AXES[kind]["RL1"] == "free"]
    assert {"simpo", "orpo", "cpo", "slic", "sft", "rrhf", "pro", "rwr"} == set(free)
    for loss in [*free, "sigmoid"]:
        models.clear()
        summary, _, _ = run(toy, tmp_path, loss=loss, steps=1)
        assert len(set(models)) == 1 + (loss == "sigmoid")
        assert ("eval/kl_after" in summary) == (loss == "sigmoid")
        assert "eval/score_after" in summary


def test_implicit_rewards_by_hand():
    logps, ref = torch.tensor([-6.0, -2.0]), torch.tensor([-5.0, -4.0])
    lengths = torch.tensor([3, 2])

    def rewards(loss, ref, options=""):
        method = method_of(train_dpo.Knobs(loss=loss, loss_options=options))
        return train_dpo.implicit_rewards(logps, ref, lengths, method)

    assert rewards("sigmoid", ref).tolist() == [-1, 2]
    assert rewards("cpo", None).tolist() == [-6, -2]
    assert rewards("simpo", None).tolist() == [-2, -1]
    for loss, options in (("sigmoid_norm", ""), ("ipo", "length_normalise=true")):
        assert torch.equal(rewards(loss, ref, options), torch.tensor([-1 / 3, 1]))


def test_reference_log_probs_are_computed_once(cache, monkeypatch):
    calls, real = [], all_logps
    monkeypatch.setattr(data.logps, "all_logps", lambda *a: calls.append(a) or real(*a))
    model, rows = tiny(1), some_rows()
    off = torch.autocast("cpu", torch.bfloat16, enabled=False)

    def misses(model, rows, dtype="float32"):
        calls.clear()
        logps = stored_logps(model, rows, off, dtype)
        assert torch.equal(logps, real(model, rows))
        return len(calls)

    assert misses(model, rows) == 1 and misses(model, rows) == 0
    assert misses(tiny(1), some_rows()) == 0
    assert misses(tiny(2), rows) == 1 and misses(model, rows, "bfloat16") == 1
    changed = [rows.tokens[0].copy(), *rows.tokens[1:]]
    changed[0][1] = 8 if changed[0][1] != 8 else 7
    assert misses(model, rows._replace(tokens=changed)) == 1
    assert misses(model, rows._replace(prompt_lengths=np.ones(8, dtype=int))) == 1
    assert misses(model, rows.take(np.arange(7))) == 1
    heads = GPT(GPTConfig(10, 16, 1, 4, 8))
    heads.load_state_dict(model.state_dict())  # the same weights, shared out among other heads
    assert misses(heads, rows) == 1
    kept = list(cache.iterdir())
    assert len(kept) == 7 and all(path.suffix == ".safetensors" for path in kept)
    assert stored_logps(None, rows, off, "float32") is None


def test_a_second_run_reads_the_cache(toy, tmp_path, cache, monkeypatch):
    first = run(toy, tmp_path / "a")
    assert len(list(cache.iterdir())) == 2  # training and test rows
    models, real = [], all_logps
    for module in (data.logps, accuracy):
        counted = lambda model, rows: models.append(model) or real(model, rows)  # noqa: E731
        monkeypatch.setattr(module, "all_logps", counted)
    second = run(toy, tmp_path / "b")
    assert len(models) == 1  # the policy's, at the end
    assert not differ(first[2], second[2])
    assert first[0]["eval/implicit_accuracy"] == second[0]["eval/implicit_accuracy"]


def test_deleted_tokens_are_hidden_from_policy_and_reference_alike():
    reference, rows = tiny(1), some_rows(200)
    np.random.seed(0)
    supply = batches.stored(reference, rows, None, train_dpo.Knobs(data="toy", delete=0.3))
    batch = supply.at(0, Compared(np.arange(200), None, None))
    kept = sum(map(len, batch.rows.tokens)) / sum(map(len, rows.tokens))
    inner = 1 - 2 * len(rows.tokens) / sum(map(len, rows.tokens))  # but for those at both ends
    assert abs(kept - (1 - 0.3 * inner)) < 0.03
    for i in (0, 50, 199):
        row, p = batch.rows.tokens[i], batch.rows.prompt_lengths[i]
        assert row[0] == rows.tokens[i][0] and row[-1] == rows.tokens[i][-1]
        logits = reference(torch.tensor(row)[None])[0].detach().double().numpy()
        by_hand = 0
        for t in range(p, len(row)):
            z = logits[t - 1]
            by_hand += z[row[t]] - np.log(np.exp(z - z.max()).sum()) - z.max()
        assert abs(batch.ref_logps[i].item() - by_hand) < 1e-4


def test_each_response_has_its_own_share_of_deleted_tokens():
    rows = Rows([np.arange(1002)] * 400, np.full(400, 2), PAD, CPU)
    np.random.seed(0)
    batch = batches.Stored(rows, None, delete=0.4).at(0, Compared(np.arange(400), None, None))
    shares = np.array([1002 - len(row) for row in batch.rows.tokens]) / 1000
    evenly = np.linspace(0, 0.8, 400)
    np.testing.assert_allclose(np.sort(shares), evenly, atol=0.08)


def test_stored_reviews_are_read_in_their_own_way_unless_said():
    def way(**given):
        knobs = kinds.settled(train_dpo.Knobs(**given))
        return knobs.epochs, knobs.lr, knobs.beta, knobs.delete

    assert way() == way(data="reviews") == (10, 1.6e-4, 0.125, 0.3)
    assert way(data="toy") == (3, 2.6e-4, 0.1, 0.0)
    said = dict(epochs=2, lr=0.5, beta=2.0, delete=0.0)
    assert way(**said) == way(data="toy", **said) == (2, 0.5, 2.0, 0.0)
    epochs, lr, beta, delete = way(online=True)
    assert (epochs, lr, beta) == (0, 2.6e-4, 0.1) and math.isnan(delete)


def test_epochs_and_delete_are_followed(cache):
    off = torch.autocast("cpu", enabled=False)
    for delete in (0.0, 0.3):
        supply = batches.stored(tiny(), some_rows(), off, train_dpo.Knobs(delete=delete))
        assert supply.delete == delete
        assert (supply.reference is None) == (supply.ref_logps is not None) == (not delete)
    halves = items(10, groups=[[i, i + 5] for i in range(5)])
    knobs = train_dpo.Knobs(batch_size=4, epochs=7)
    plan = kinds.plan(halves, "kto", knobs, np.random.default_rng(0))
    read = np.bincount(np.concatenate([batch.index for batch in plan]))
    assert read.tolist() == [7] * 10


def test_what_is_deleted_follows_from_the_seed(toy, tmp_path):
    first = run(toy, tmp_path / "a", delete=0.3, steps=3)
    again = run(toy, tmp_path / "b", delete=0.3, steps=3)
    whole = run(toy, tmp_path / "c", steps=3)
    assert not differ(first[2], again[2]) and differ(first[2], whole[2])


def test_a_cache_that_cannot_be_written_costs_only_time(cache):
    cache.parent.write_text("a file where the folder should be")
    rows = some_rows()
    off = torch.autocast("cpu", enabled=False)
    assert len(stored_logps(tiny(), rows, off, "float32")) == len(rows.tokens)


@pytest.mark.parametrize("online", [False, True])
def test_rounds_move_the_reference(online, toy, tmp_path):
    at_log_2 = []
    for rounds in (1, 2, 4):
        _, metrics, _ = run(toy, tmp_path, rounds=rounds, steps=4, online=online, seed=1)
        at_log_2.append([abs(row["loss"] - np.log(2)) < 1e-4 for row in metrics])
    assert at_log_2 == [[True, False, False, False], [True, False, True, False], [True] * 4]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["eval/kl_after"] > 0.05  # from the base model, not from the last reference


# Own samples


def test_win_rates():
    p = torch.rand(5, 4, 4, generator=torch.manual_seed(0), dtype=torch.float64)
    rates = samples.win_rates(p)
    for b in range(5):
        for i in range(4):
            others = [p[b, i, j] for j in range(4) if j != i]
            assert rates[b, i] == pytest.approx(np.mean(others))


class Letters:
    eos, pad = 0, PAD

    def decode(self, ids):
        return "".join(chr(97 + i) for i in ids)


@pytest.mark.parametrize("kind,K", [("sigmoid", 2), ("sigmoid", 4), ("nash_md", 2)])
def test_own_batch(kind, K):
    """The labeler likes high tokens: best, worst, win rates and order are recomputed here from the
    rows it was shown."""
    shown = []

    def prefer(tokens, prompt_lengths, response_lengths, asked):
        assert asked == K
        rows, scores = [], []
        for row, p, r in zip(tokens.tolist(), prompt_lengths, response_lengths, strict=True):
            rows.append(row[: p + r])
            scores.append(float(np.mean(row[p : p + r])))
        scores = torch.tensor(scores).view(-1, K)
        shown.append((rows, scores.numpy()))
        return torch.sigmoid(scores[:, :, None] - scores[:, None])

    prompts = [np.array([0, *range(1, k)]) for k in (2, 3, 4, 3)]
    knobs = train_dpo.Knobs(samples=K, response_length=5)
    policy, reference = tiny(1, scale=2), tiny(2, scale=2)
    torch.manual_seed(0)
    for _ in range(2):
        batch = samples.own_batch(policy, reference, prefer, Letters, kind, knobs, prompts)
        all_rows, scores = shown.pop()
        assert batch.bought == 4 * K * (K - 1) / 2 and len(all_rows) == 4 * K
        expected, wins, labels = [], [], []
        for i, s in enumerate(scores):
            beats = sg(s[:, None] - s)
            rate = [np.mean(np.delete(beats[a], a)) for a in range(K)]
            order = np.argsort(-np.array(rate), kind="stable")
            order = [0] if kind == "nash_md" else [order[0], order[-1]]
            expected += [all_rows[i * K + a] for a in order]
            wins += [rate[a] for a in order]
            labels.append(beats[order[0], order[-1]])  # P(the best is preferred to the worst)
        rows = batch.rows
        assert [row.tolist() for row in rows.tokens] == expected
        assert np.allclose(batch.wins, wins, atol=1e-6)
        assert np.allclose(batch.said.labels, labels, atol=1e-6)
        k = len(rows.tokens) // 4
        assert batch.said.pairs.tolist() == [[i * k, i * k + k - 1] for i in range(4)]
        assert prompts_of(rows) == [prompt.tolist() for prompt in prompts for _ in range(k)]
        ref_logps = [np_logp(reference, *row) for row in each(rows)]
        assert np.allclose(batch.ref_logps, ref_logps, atol=1e-4)


@pytest.mark.parametrize("mu", [0.0, 0.3, 1.0])
def test_mixture_samples(mu):
    """Two tokens after each of two ragged prompts, as often as the normalised geometric mixture
    says."""
    policy, reference, n = tiny(3, scale=5), tiny(4, scale=5), 20_000
    prompts = torch.tensor([[0, 3, PAD], [0, 5, 2]]).repeat(n, 1)
    given = policy, reference, mu, prompts, torch.tensor([2, 3]).repeat(n), 2
    torch.manual_seed(0)
    tokens, lengths = samples.sample_mixture(*given, eos=0, pad=PAD)

    def mixture(row):
        p = np.exp((1 - mu) * log_softmax(policy, row)[-1] + mu * log_softmax(reference, row)[-1])
        return p / p.sum()

    def shares(tokens):
        return np.bincount(tokens, minlength=10) / len(tokens)

    for which, prompt in enumerate(([0, 3], [0, 5, 2])):
        rows, q = tokens[which::2].numpy(), len(prompt)
        at_once = rows[:, q] == 0
        assert (rows[:, :q] == prompt).all()
        assert ((lengths[which::2] == 1).numpy() == at_once).all()
        assert (rows[at_once, q + 1] == PAD).all()  # nothing after the end
        first = mixture(prompt)
        assert np.abs(shares(rows[:, q]) - first).max() < 0.02
        likely = int(first[1:].argmax()) + 1
        second = rows[rows[:, q] == likely, q + 1]
        assert len(second) > 500
        assert np.abs(shares(second) - mixture([*prompt, likely])).max() < 0.06


def test_online_counts_its_labels_and_answers_to_its_flags(toy, tmp_path):
    def online(name, **knobs):
        _, metrics, weights = run(toy, tmp_path / name, online=True, **knobs)
        return [row["online/labels"] for row in metrics], weights

    labels, plain = online("a")
    assert labels == [16, 32, 48]
    assert not differ(plain, online("b")[1])  # a run repeats
    labels, more = online("c", samples=3)
    assert labels == [48, 96, 144] and differ(plain, more)
    assert differ(plain, online("d", reward="true")[1])
    assert "online/labels" not in run(toy, tmp_path / "e")[1][0]
    nash = [online("f", loss="nash_md", mixture=mu)[1] for mu in (0.0, 1.0)]
    assert differ(*nash)


def test_a_reward_model_that_was_not_asked_for_need_not_fit(toy, tmp_path, capsys):
    shutil.copytree(toy / "rm", tmp_path / "rm")
    gpt.RewardModel(GPTConfig(200, 64, 1, 2, 16)).save_pretrained(tmp_path / "rm" / "model")
    summary, _, _ = run(toy, tmp_path / "dpo", reward="")
    assert "samples are not scored" in capsys.readouterr().out
    assert "eval/score_after" not in summary
    with pytest.raises(UserError, match="257 ids, but the model has 200"):
        run(toy, tmp_path / "dpo", reward=str(tmp_path / "rm"))


@pytest.mark.parametrize("prompt", ["", "p%d"])
def test_labels_without_pairs(prompt, toy, tmp_path):
    """Where all held-out labels are alike, or prompts differ, there is no accuracy, and the run
    ends well."""
    rows = []
    for i in range(60):
        text = "abcdefgh"[i % 8] * 3 + str(i)
        asked = prompt % i if prompt else ""
        rows.append({"prompt": asked, "response": text, "label": i % 20 != 3})
    path = write_lines(tmp_path / "labels.jsonl", rows)
    assert prompt or len({r.mean() for r in data.load_feedback(path).test.ratings}) == 1
    summary, _, _ = run(toy, tmp_path / "dpo", data=path, loss="kto")
    assert "eval/implicit_accuracy" not in summary


def test_online_makes_its_reward_model(toy, tmp_path, monkeypatch):
    made = []

    def rm(knobs):
        made.append((knobs.data, knobs.init, knobs.out))
        raise KeyboardInterrupt

    monkeypatch.setattr(train_dpo.train_rm, "main", rm)
    with pytest.raises(KeyboardInterrupt):
        run(toy, tmp_path / "out", online=True, reward="")
    assert made == [("toy", str(toy / "sft"), str(tmp_path / "rm"))]


def test_bfloat16_online_reaches_every_weight(toy, tmp_path):
    """What autocast cast for sampling, without gradients, must not stand in for the weights in the
    loss."""
    before = load_file(toy / "sft" / "model" / "model.safetensors")
    _, _, after = run(toy, tmp_path, online=True, dtype="bfloat16", steps=1)
    weights = [name for name in before if name.endswith("weight")]
    assert weights and not any(torch.equal(before[name], after[name]) for name in weights)


def test_a_preference_model_labels(toy, tmp_path):
    """Its log-odds are of the embeddings at the last tokens, computed here from transformers' view
    of the saved directory."""
    from transformers import GPT2ForSequenceClassification

    model = PreferenceModel(gpt.GPTConfig(257, 32, 1, 2, 16), dim=4)
    tokenizer = Tokenizer.load(toy / "sft" / "model")
    model.save_pretrained(tmp_path, tokenizer)
    scorer, prefer = labelers.load_labeler(str(tmp_path), None, tokenizer, tiny())
    tokens = torch.tensor([[0, 1, 2, 3], [0, 1, 4, 9], [0, 5, 9, 9], [0, 1, 2, 6]])
    lengths = torch.tensor([3, 2, 1, 3])
    p = prefer(tokens, torch.ones(4, dtype=int), lengths, 2)
    theirs, e = GPT2ForSequenceClassification.from_pretrained(tmp_path), []
    with torch.no_grad():
        for row, n in zip(tokens, lengths.tolist(), strict=True):
            e.append(theirs(row[None, : 1 + n]).logits[0].tolist())

    def wins(i, j):
        a, b = e[i], e[j]
        return sg(sum(a[k] * b[k + 1] - a[k + 1] * b[k] for k in (0, 2)))

    expected = [[[wins(i, j) for j in (g, g + 1)] for i in (g, g + 1)] for g in (0, 2)]
    assert scorer is None and np.allclose(p.detach(), expected, atol=1e-6)


def test_a_trained_preference_model_teaches_online(toy, tmp_path):
    rm = dict(data="toy", init=str(toy / "sft"), out=str(tmp_path / "pm"), epochs=4, lr=3e-3,
              delete=0.0, dropout=0.0)  # fmt: skip
    train_rm.main(train_rm.Knobs(**rm, embedding_lr=1.0, model="pairwise"))
    knobs = dict(reward=str(tmp_path / "pm"), online=True, steps=12, batch_size=64, lr=1e-3,
                 response_length=8, eval_samples=64)  # fmt: skip
    _, metrics, _ = run(toy, tmp_path / "dpo", **knobs)
    lines = (tmp_path / "dpo" / "samples.jsonl").read_text().splitlines()
    answered = [json.loads(line) for line in lines]
    before, after = (np.mean(data.toy_reward([""] * len(answered), [row[when] for row in answered]))
                     for when in ("before", "after"))  # fmt: skip
    assert after > before + 0.3 and metrics[-1]["online/labels"] == 12 * 32


# Flags


@pytest.mark.parametrize("change", [{"group_size": 2}, {"loss_options": "lam=3"}])
def test_flags_of_lists(change, toy, tmp_path):
    plain = run(toy, tmp_path / "a", loss="pro")[2]
    assert differ(plain, run(toy, tmp_path / "b", loss="pro", **change)[2])


@pytest.mark.parametrize("loss,option,value", [
    ("ipo", "length_normalise=true", {"length_normalise": True}),
    ("sigmoid", "divergence=js", {"divergence": "js"}),
    ("simpo", "gamma=1.5,nll_weight=1", {"gamma": 1.5, "nll_weight": 1.0}),
    ("sppo", "divergence=alpha,alpha_divergence=0.3",
     {"divergence": "alpha", "alpha_divergence": 0.3}),
    ("kto", "desirable_weight=2", {"desirable_weight": 2.0}),
    ("exo", "", {}),
])  # fmt: skip
def test_loss_options(loss, option, value):
    smoothing = 0.001 if loss == "exo" else 0.0
    knobs = train_dpo.Knobs(loss=loss, loss_options=option, label_smoothing=smoothing)
    assert method_of(knobs).options == value


@pytest.mark.parametrize("flags,message", [
    ({"loss_options": "gamma=1"}, "loss sigmoid has the options"),
    ({"loss": "simpo", "loss_options": "gamma=high"}, "NAME=NUMBER"),
    ({"loss": "simpo", "loss_options": "gamma"}, "NAME=NUMBER"),
    ({"loss": "lipo", "loss_options": "beta=1"}, "has the options none"),
    ({"loss": "sppo", "loss_options": "chosen_win=1"}, "sppo has"),
    ({"loss": "tdpo1", "loss_options": "chosen_kl=1"}, "tdpo1 has"),
    ({"loss": "simpo", "loss_options": "divergence=js"}, "loss simpo has"),
    ({"loss_options": "divergence=hellinger"}, "expected reverse_kl"),
    ({"loss": "ipo", "loss_options": "alpha_divergence=0.3"}, "--loss ipo: divergence"),
    ({"loss": "nash_md"}, "add --online"),
    ({"loss": "kto", "online": True}, "leave out --online"),
    ({"loss": "pro", "online": True}, "leave out --online"),
    ({"loss": "simpo", "rounds": 2}, "no reference to move"),
    ({"loss": "kto", "label_smoothing": 0.1}, "loss kto has none"),
    ({"loss": "ipo", "label_smoothing": 0.1}, "loss ipo has none"),
    ({"loss": "robust", "label_smoothing": 0.5}, "robust needs less than 1/2"),
    ({"loss": "exo"}, "--label-smoothing above 0"),
    ({"loss": "d2o", "loss_options": "nll_weight=1"}, "no preferred response"),
    ({"samples": 1}, "--samples"),
    ({"group_size": 1}, "--group-size"),
    ({"rounds": 0}, "--rounds"),
    ({"ref_every": 2, "rounds": 2}, "give one"),
    ({"loss": "simpo", "ref_every": 2}, "no reference to move"),
    ({"ref_mix": 0.5}, "ref-mix"),
    ({"loss": "sigmod+sft"}, "expected one of"),
    ({"loss": "sigmoid+kto"}, "kto.* is no term of a sum"),
    ({"loss": "sigmoid+tdpo1"}, "tdpo1.* is no term of a sum"),
    ({"loss": "dpo+0.5*sigmoid"}, "named twice"),
    ({"loss": "sigmoid+0*sft"}, "above 0"),
    ({"loss": "sigmoid+nan*sft"}, "above 0"),
    ({"loss": "0.5*sigmoid"}, "belongs to a sum"),
    ({"loss": "sigmoid+"}, "expected one of"),
    ({"loss": "hinge+sft", "label_smoothing": 0.1}, "has none"),
    ({"loss": "hinge+sft", "soft_labels": False}, "soft-labels"),
    ({"loss": "sft", "beta": 0.3}, "beta"),
    ({"loss": "sft+exo"}, "--label-smoothing above 0"),
    ({"mixture": 1.5}, "--mixture"),
    ({"online": True, "batch_size": 1}, "--batch-size 1"),
])  # fmt: skip
def test_what_does_not_go_together(flags, message):
    with pytest.raises(UserError, match=message):
        method_of(train_dpo.Knobs(**flags))


def test_bad_values_of_options_and_labelers(toy, tmp_path):
    with pytest.raises(UserError, match="divergence"):
        run(toy, tmp_path, loss_options="divergence=hellinger")
    feedback = copy.copy(load_toy())
    feedback.true_reward = None
    with pytest.raises(UserError, match="no known true reward"):
        labelers.load_labeler("true", feedback, Letters, tiny())


def test_a_sum_of_losses_gives_each_term_its_options():
    """By hand: the options and the smoothing go where they are known."""
    knobs = train_dpo.Knobs(
        loss="dpo + 0.2*sft + 3*ipo", loss_options="length_normalise=true,divergence=js"
    )
    method, seen = method_of(knobs), []
    assert method.kind == "sigmoid" and method.has_reference and method.soft

    def of_pairs(kind, **given):
        seen.append((kind, given))
        return {"sigmoid": 100.0, "sft": 10.0, "ipo": 1.0}[kind]

    assert method.losses(of_pairs, 0.3) == pytest.approx(100 + 0.2 * 10 + 3)
    js, normal = {"divergence": "js"}, {"length_normalise": True}
    assert seen == [
        ("sigmoid", js | {"label_smoothing": 0.3}),
        ("sft", {"label_smoothing": 0.0}),
        ("ipo", js | normal | {"label_smoothing": 0.0}),
    ]


def test_ties_are_for_the_soft_terms_of_a_sum_alone():
    """By hand: a tie's loss counts in sigmoid, and in no other term's mean."""
    method = method_of(train_dpo.Knobs(loss="sigmoid+2*hinge", label_smoothing=0.1))
    doubt, seen = torch.tensor([0.1, 0.5, 0.4]), {}

    def of_pairs(kind, label_smoothing):
        seen[kind] = label_smoothing
        return torch.tensor([1.0, 2.0, 4.0]) * (1 if kind == "sigmoid" else 10)

    found = method.losses(of_pairs, 0.1, doubt)
    assert found.mean().item() == pytest.approx(7 / 3 + 2 * (10 + 40) / 2)
    torch.testing.assert_close(seen["sigmoid"], torch.tensor([0.18, 0.5, 0.42]))
    assert seen["hinge"] == 0.0
    both = method_of(train_dpo.Knobs(loss="sigmoid+robust", label_smoothing=0.1))
    both.losses(of_pairs, 0.1, doubt)
    assert seen["robust"] == 0.1  # a number below one half, whatever the raters say


def test_an_nll_weight_in_a_sum_counts_once():
    method = method_of(train_dpo.Knobs(loss="sigmoid+0.2*ipo", loss_options="nll_weight=1"))
    seen = []
    method.losses(lambda kind, **given: seen.append((kind, "nll_weight" in given)) or 0.0, 0.0)
    assert seen == [("sigmoid", True), ("ipo", False)]


def test_a_reference_that_cannot_follow_is_refused(toy, tmp_path):
    other = GPT(GPTConfig(257, 64, 2, 2, 48))
    other.save_pretrained(tmp_path / "wide", Tokenizer.load(toy / "sft" / "model"))
    with pytest.raises(UserError, match="the same sizes"):
        run(toy, tmp_path / "dpo", reference=str(tmp_path / "wide"), rounds=2, steps=4)


def test_a_run_is_not_written_over_its_reference(toy, tmp_path):
    shutil.copytree(toy / "sft", tmp_path / "ref")
    with pytest.raises(UserError, match="ref"):
        run(toy, tmp_path / "ref", reference=str(tmp_path / "ref"), steps=2)


def test_a_sum_trains_and_is_told(toy, tmp_path, capsys):
    hard = {"soft_labels": False}  # then no tie takes part
    both = run(toy, tmp_path / "sum", loss="sigmoid+2*sft", **hard)[2]
    assert "no known value" in capsys.readouterr().out
    assert differ(both, run(toy, tmp_path / "one", **hard)[2])
    with_option = run(toy, tmp_path / "nll", loss_options="nll_weight=2", **hard)[2]
    assert not differ(both, with_option)  # the same said in another way


@pytest.mark.parametrize("online", [False, True])
def test_the_reference_follows(online, monkeypatch, toy, tmp_path):
    """After every two steps it is 0.7 of the way on to the policy, and is asked anew."""
    seen, at = [], batches.Moving.at

    def spy(self, step, planned):
        old, new = ([w.clone() for w in m.parameters()] for m in (self.reference, self.policy))
        batch = at(self, step, planned)
        seen.append((old, new, [w.clone() for w in self.reference.parameters()]))
        with torch.no_grad():
            expected = all_logps(self.reference, batch.rows)
        torch.testing.assert_close(batch.ref_logps, expected, atol=1e-4, rtol=1e-4)
        return batch

    monkeypatch.setattr(batches.Moving, "at", spy)
    run(toy, tmp_path, ref_every=2, ref_mix=0.7, steps=5, online=online)
    for step, (old, new, now) in enumerate(seen):
        share = 0.7 if step in (2, 4) else 0.0
        for a, b, c in zip(old, new, now, strict=True):
            torch.testing.assert_close(c, (1 - share) * a + share * b)
    assert len(seen) == 5


@pytest.mark.parametrize("error", [TypeError, ValueError])
def test_a_loss_of_ones_own(error, monkeypatch):
    """A function in dpo.KINDS is a loss with options; its mistakes keep their type."""

    def mine(pairs, beta, *, power=2.0):
        if power < 0:
            raise error("power")
        return pairs.margin.abs() ** power

    monkeypatch.setitem(dpo.KINDS, "mine", mine)
    monkeypatch.setitem(LOSSES, "mine", mine)
    monkeypatch.setitem(dpo.AXES, "mine", dpo.AXES["sigmoid"])
    both = {"policy": tiny(1), "reference": tiny(2)}
    rows, said = some_rows(4), Compared(None, np.array([[0, 1], [3, 2]]), np.array([0.9, 0.2]))
    knobs = train_dpo.Knobs(loss_options="power=3", beta=0.1)
    knobs.loss = "mine"  # a name that a fork's command line knows
    batch = Batch(rows, all_logps(both["reference"], rows), said)
    loss, _ = train_dpo.batch_loss(*both.values(), batch, method_of(knobs), knobs)
    h = np_h(both["policy"], both["reference"], rows)
    assert loss.item() == pytest.approx(np.mean(np.abs([h[0] - h[1], h[2] - h[3]]) ** 3), rel=1e-4)
    knobs.loss_options = "power=-1"
    with pytest.raises(error, match="power") as caught:
        train_dpo.batch_loss(*both.values(), batch, method_of(knobs), knobs)
    assert type(caught.value) is error


def test_the_toys_own_reward_scores_samples(toy):
    tokenizer = Tokenizer.load(toy / "rm" / "model")
    scorer, prefer = labelers.load_labeler("true", data.load_feedback("toy"), tokenizer, tiny())
    rows = [tokenizer.encode("ab" + word) for word in ("hh", "ha", "a")]
    rows = [np.array([tokenizer.eos, *row, tokenizer.eos]) for row in rows]
    tokens, lengths = pad_rows(rows, tokenizer.pad)
    scores = scorer(tokens, torch.full((3,), 3), lengths - 3)
    assert np.allclose(scores, [4, 0, -4])
    p = prefer(tokens[:2], torch.full((2,), 3), lengths[:2] - 3, 2)
    assert np.allclose(p, [[[0.5, sg(4)], [sg(-4), 0.5]]], atol=1e-6)
