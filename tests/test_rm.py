"""The reward-model script: its losses on a batch, groups and ties, margins, micro-batches, and models without a score.

Expected losses come from NumPy loops in float64.
"""

import dataclasses
import json
import math
import sys
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import train_rm
from minirlhf import data, sft
from minirlhf.data import Items, parse_record
from minirlhf.engine import parallel
from minirlhf.engine.cli import UserError
from minirlhf.feedback import labelers
from minirlhf.feedback.preference_model import PreferenceModel
from minirlhf.gpt import GPT, GPTConfig, RewardModel
from minirlhf.tokenizer import load_tokenizer

OFF = torch.autocast("cpu", enabled=False)
CONFIG = GPTConfig(vocab_size=50, n_ctx=16, n_layer=2, n_head=2, n_embd=16)


def knobs(**changes):
    return train_rm.Knobs(**changes)


def log_sigmoid(x):
    return -math.log(1 + math.exp(-x))


def pl_loop(best_first):
    return -sum(
        math.log(math.exp(r) / sum(map(math.exp, best_first[i:]))) for i, r in enumerate(best_first)
    )


# Batches: groups of unequal size from records, and ratings with ties

GROUPS = Items(["p"] * 9, list("abcdefghi"), ["l"] * 9, groups=[[2, 0, 1], [4, 3], [5, 6, 7, 8]])
RATED = Items(
    [""] * 6,
    list("abcdef"),
    ["l"] * 6,
    [np.array(r) for r in ([1, 2], [3, 3], [2, 1], [0, 1], [3, 3], [2, 3])],
)
SCORES = np.random.default_rng(0).normal(size=9)


def epoch(items, batch_size=100, seed=0):
    return next(items.epoch(batch_size, np.random.default_rng(seed)))


def loss_of(items, **changes):
    """The loss of one batch of all items, each with its score of SCORES; and the batch's order."""
    batch, pairs, labels = epoch(items)
    read = torch.tensor(SCORES[batch], dtype=torch.float32)
    return train_rm.batch_loss(
        knobs(**changes), None, read, items, batch, pairs, labels
    ).item(), batch


def test_rankings_of_records_are_whole():
    for batch_size in (100, 4, 9):
        for batch, pairs, _ in GROUPS.epoch(batch_size, np.random.default_rng(1)):
            found = [batch[g].tolist() for g in train_rm.rankings(GROUPS, batch, pairs, 4)]
            assert (
                found
                and all(g in GROUPS.groups for g in found)
                and sum(map(len, found)) == len(batch)
            )


def test_rankings_of_ratings_leave_ties_out():
    batch, pairs, _ = epoch(RATED)
    means = {0: 1.5, 1: 3, 2: 1.5, 3: 0.5, 4: 3, 5: 2.5}  # 0 and 2 are tied, and 1 and 4
    found = train_rm.rankings(RATED, batch, pairs, 6)
    assert len(found) == 1
    ranked = batch[found[0]].tolist()
    assert [means[i] for i in ranked] == [3, 2.5, 1.5, 0.5]
    order = batch.tolist()
    assert (1 in ranked) == (order.index(1) < order.index(4)) and (0 in ranked) == (
        order.index(0) < order.index(2)
    )
    for size, groups in ((3, 2), (2, 3), (4, 2)):
        found = train_rm.rankings(RATED, batch, pairs, size)
        assert len(found) == groups and len(set(np.concatenate(found))) == sum(map(len, found))
        assert all(
            means[batch[i]] > means[batch[j]] for g in found for i, j in zip(g, g[1:], strict=False)
        )


@pytest.mark.parametrize("items", [GROUPS, RATED], ids=["records", "ratings"])
def test_ranking_losses_of_a_batch_are_the_loop(items):
    plackett_luce, batch = loss_of(items, loss="plackett_luce", group_size=3)
    best_of_k, _ = loss_of(items, loss="best_of_k", group_size=3)
    if items is GROUPS:
        groups = [SCORES[g].tolist() for g in items.groups]
    else:  # thirds of the batch in its random order; of equal means the first
        groups = []
        for third in (batch[:3], batch[3:]):
            means = [items.ratings[i].mean() for i in third]
            kept = [i for n, i in enumerate(third) if means[n] not in means[:n]]
            groups.append([SCORES[i] for i in sorted(kept, key=lambda i: -items.ratings[i].mean())])
    assert plackett_luce == pytest.approx(np.mean([pl_loop(g) for g in groups]), rel=1e-5)
    assert best_of_k == pytest.approx(
        np.mean([math.log(sum(map(math.exp, g))) - g[0] for g in groups]), rel=1e-5
    )


def test_a_group_of_ties_says_nothing():
    alike = dataclasses.replace(RATED, ratings=[np.array([2])] * 6)
    for changes in ({"loss": "plackett_luce"}, {"loss": "best_of_k"}, {"soft_labels": False}):
        assert loss_of(alike, **changes)[0] == 0


def test_rating_loss_of_a_batch():
    expected = np.mean([(SCORES[i] - np.mean(r)) ** 2 for i, r in enumerate(RATED.ratings)])
    assert loss_of(RATED, loss="ratings")[0] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("soft", [True, False])
def test_soft_labels_or_the_majority_without_ties(soft):
    losses = []
    for i in range(6):
        for j in range(i):
            a, b = RATED.ratings[i], RATED.ratings[j]
            q = np.mean([(x > y) + (x == y) / 2 for x in a for y in b])
            if soft or q != 0.5:
                q = q if soft else float(q > 0.5)
                d = SCORES[i] - SCORES[j]
                losses.append(
                    -q * log_sigmoid(d - 0.3)
                    - (1 - q) * log_sigmoid(-d - 0.3)
                    + 0.1 * (SCORES[i] + SCORES[j]) ** 2
                )
    assert loss_of(RATED, soft_labels=soft, margin=0.3, center=0.1)[0] == pytest.approx(
        np.mean(losses), rel=1e-5
    )


def test_equal_shares_are_a_tie_in_spite_of_rounding():
    """Where float64 misses one half by a rounding error."""
    batch, pairs = np.array([0, 1]), np.array([[0, 1]])
    read = torch.tensor([3.0, -1.0])
    for label in (0.5 + 1e-12, 0.5 - 1e-12):
        assert (
            train_rm.batch_loss(
                knobs(soft_labels=False), None, read, RATED, batch, pairs, np.array([label])
            )
            == 0
        )


# Margins of records


def test_margin_of_a_record():
    pair, ranking = (
        {"prompt": "p", "chosen": "a", "rejected": "b"},
        {"prompt": "p", "responses": ["a", "b", "c"], "ranking": [1, 0, 2]},
    )
    assert parse_record(json.dumps(pair | {"margin": 2}), "here") == ("p", ["a", "b"], 2.0)
    assert parse_record(json.dumps(ranking | {"margin": -0.5}), "here") == (
        "p",
        ["b", "a", "c"],
        -0.5,
    )
    for bad in ("1", None, True, math.inf):
        with pytest.raises(UserError, match="here: margin: expected a finite number"):
            parse_record(json.dumps(pair | {"margin": bad}), "here")


def test_margins_go_with_their_records(tmp_path):
    path = tmp_path / "m.jsonl"
    records = [
        {"prompt": f"p{i}", "chosen": f"good{i}", "rejected": f"bad{i}"}
        | ({"margin": i / 10} if i % 3 else {})
        for i in range(40)
    ]
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    feedback = data.load_feedback(str(path))
    for items in (feedback.train, feedback.test):
        expected = [i / 10 if i % 3 else 0 for i in (int(p[1:]) for p in items.prompts)]
        assert items.margins.tolist() == expected
    items, scores = feedback.train, np.random.default_rng(3).normal(size=72)
    batch, pairs, labels = epoch(items, 1000)
    read = torch.tensor(scores[batch], dtype=torch.float32)
    loss = train_rm.batch_loss(knobs(margin=0.2), None, read, items, batch, pairs, labels)
    losses = [-log_sigmoid(scores[i] - scores[j] - 0.2 - items.margins[i]) for i, j in items.groups]
    assert loss.item() == pytest.approx(np.mean(losses), rel=1e-5)
    path.write_text(
        "".join(json.dumps({k: v for k, v in r.items() if k != "margin"}) + "\n" for r in records)
    )
    assert data.load_feedback(str(path)).train.margins is None


@pytest.mark.parametrize(
    "changes, names",
    [
        ({"loss": "ratings"}, "--loss ratings.*no ratings"),
        ({"loss": "plackett_luce"}, "margins"),
        ({"loss": "best_of_k"}, "margins"),
        ({"group_size": 1}, "--group-size 1.*2"),
        ({"model": "pairwise", "center": 0.1}, "pairwise.*no --center"),
        ({"model": "pairwise", "level": "token"}, "pairwise.*--level response"),
    ],
)
def test_knobs_that_say_nothing_together(changes, names):
    items = dataclasses.replace(GROUPS, margins=np.ones(9))
    with pytest.raises(UserError, match=names):
        train_rm.check(knobs(**changes), items)
    with (
        nullcontext()
        if "loss" in changes and changes["loss"] != "ratings"
        else pytest.raises(UserError)
    ):
        train_rm.check(knobs(**changes), GROUPS)  # rankings are fine without margins
    for more in ({"margin": 0.1}, {"center": 0.1}, {"soft_labels": False}):
        with pytest.raises(UserError, match="belong to --loss pairs"):
            train_rm.check(knobs(loss="ratings", **more), RATED)
    train_rm.check(knobs(loss="ratings"), RATED)


# Rows and micro-batches


def test_thin_keeps_both_ends_and_counts_the_prompt():
    row = np.arange(100, 160)
    np.random.seed(0)
    for prompt_length in (1, 20, 59):
        kept, p = train_rm.thin(row, prompt_length, 0.5)
        assert kept[0] == 100 and kept[-1] == 159 and 10 < len(kept) < 50
        assert kept[:p].tolist() == [t for t in kept if t < 100 + prompt_length]


def some_rows(n=8, seed=0):
    rng = np.random.default_rng(seed)
    rows = [rng.integers(0, 50, k) for k in rng.integers(3, 16, n)]
    return rows, [int(rng.integers(1, len(row))) for row in rows]


def gradients(model, rows, prompt_lengths, micro_batch):
    """Of a loss that compares all rows with each other."""
    model.zero_grad()
    read = train_rm.forward(model, rows, prompt_lengths, 0, "cpu", micro_batch)
    pairs = np.array([(i, j) for i in range(len(rows)) for j in range(i)])
    train_rm.batch_loss(
        knobs(), model, read, GROUPS, np.arange(len(rows)), pairs, np.ones(len(pairs))
    ).backward()
    return read.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize(
    "make", [RewardModel, lambda c: RewardModel(c, level="token"), PreferenceModel]
)
def test_micro_batches_give_the_gradient_of_the_whole(make):
    torch.manual_seed(0)
    model, rows = make(CONFIG), some_rows()
    read, whole = gradients(model, *rows, 8)
    for micro_batch in (0, 4, 3, 2, 1):
        again, gradient = gradients(model, *rows, micro_batch)
        torch.testing.assert_close(again, read, rtol=0, atol=1e-5)
        assert (gradient - whole).norm() < 1e-6 * whole.norm()


def test_micro_batches_repeat_their_dropout_in_backward():
    """Each row has its own dropout, whatever the rows beside it: the same scores, and the same gradient."""
    torch.manual_seed(0)
    model, rows = RewardModel(dataclasses.replace(CONFIG, dropout=0.3)), some_rows()
    found = []
    for micro_batch in (0, 8, 3, 1):
        torch.manual_seed(1)
        found.append(gradients(model, *rows, micro_batch))
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1], rtol=0, atol=1e-6)
    for read, gradient in found[2:]:
        torch.testing.assert_close(read, found[0][0], rtol=0, atol=1e-5)
        assert (gradient - found[0][1]).norm() < 1e-6 * found[0][1].norm()
    assert not torch.allclose(gradients(model.eval(), *rows, 0)[0], found[0][0], atol=1e-2)


def test_micro_batch_is_the_number_of_rows_in_memory(monkeypatch):
    model, rows, seen = RewardModel(CONFIG), some_rows(), []
    real = model.transformer.hidden
    monkeypatch.setattr(
        model.transformer, "hidden", lambda idx, **more: seen.append(len(idx)) or real(idx, **more)
    )
    gradients(model, *rows, 3)
    assert max(seen) == 3 and sum(seen) == 16  # 8 rows forward and again in backward


@pytest.mark.parametrize("micro_batch", [0, 1, 2, 4])
def test_base_model_micro_batches_give_the_gradient_of_the_whole(micro_batch):
    model, (rows, _), found = GPT(CONFIG), some_rows(), []
    for n in (len(rows), micro_batch):
        model.zero_grad()
        loss = sft.add_gradient(parallel.Together(model), rows, n, 0, OFF, "cpu")
        found.append((loss, torch.cat([p.grad.flatten() for p in model.parameters()])))
    (loss, whole), (again, gradient) = found
    logprobs = [
        model(torch.as_tensor(row)[None])[0, :-1].log_softmax(1)[range(len(row) - 1), row[1:]]
        for row in rows
    ]
    assert loss.item() == pytest.approx(-torch.cat(logprobs).mean().item(), rel=1e-5)
    assert again.item() == pytest.approx(loss.item(), rel=1e-6)
    assert (gradient - whole).norm() < 1e-6 * whole.norm()


# Whole runs

CHEAP = dict(epochs=1, batch_size=256, delete=0.0, dropout=0.0)


def train(source, init, out, **changes):
    summary = train_rm.main(
        knobs(data=str(source), init=str(init), out=str(out), **CHEAP | changes)
    )
    return summary, load_file(out / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def rated(tmp_path_factory):
    """A file of 400 toy words with their mean ratings."""
    items, path = data.load_feedback("toy").train, tmp_path_factory.mktemp("rated") / "toy.jsonl"
    rows = [
        {"prompt": "", "response": items.responses[i], "rating": items.ratings[i].mean()}
        for i in range(400)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_group_size_and_micro_batch(toy, rated, tmp_path):
    def weights(name, **changes):
        return train(rated, toy / "sft", tmp_path / name, **changes)[1]["score.weight"]

    four, two = (weights(f"k{k}", loss="plackett_luce", group_size=k) for k in (4, 2))
    assert not torch.allclose(four, two, atol=1e-4)
    seen = []

    def checkpoint(read, tokens, *lengths, use_reentrant):
        seen.append(len(tokens))
        return read(tokens, *lengths)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["minirlhf.engine.rows"], "checkpoint", checkpoint)
        weights("micro", micro_batch=50)
    assert max(seen) <= 50 and sum(seen) == 360


@pytest.mark.parametrize("loss, frozen", [
    ({"loss": "pairs"}, True), ({"loss": "plackett_luce"}, True), ({"loss": "best_of_k"}, True), ({"loss": "ratings"}, False),
    ({"center": 0.1}, False), ({"level": "token"}, False), ({"model": "pairwise"}, False)])  # fmt: skip
def test_a_bias_that_is_in_no_difference_stays(loss, frozen, toy, rated, tmp_path):
    """The last LayerNorm's bias adds the same to every score: where only differences count it is what it was, else it is learned."""
    before = load_file(toy / "sft" / "model" / "model.safetensors")
    _, after = train(rated, toy / "sft", tmp_path, normalize=False, **loss)
    stays = {
        key: torch.equal(after[f"transformer.ln_f.{key}"], before[f"transformer.ln_f.{key}"])
        for key in ("bias", "weight")
    }
    assert stays == {"bias": frozen, "weight": False}


def test_token_level_run(toy, rated, tmp_path):
    summary, _ = train(
        rated, toy / "sft", tmp_path / "rm", level="token", epochs=4, batch_size=32, lr=3e-3
    )
    assert summary["eval/accuracy"] > 0.75
    rm = RewardModel.from_pretrained(tmp_path / "rm" / "model").eval()
    base, tokenizer = (
        GPT.from_pretrained(toy / "sft" / "model"),
        load_tokenizer(toy / "sft" / "model"),
    )
    prompts = data.prompts_of(data.load_feedback("toy").train, tokenizer, np.random.default_rng(5))[
        :1000
    ]
    torch.manual_seed(9)
    scores = train_rm.sample_scores(base, rm, prompts, 24, tokenizer, OFF)
    assert rm.level == "token" and abs(scores.mean()) < 0.15 and abs(scores.std() - 1) < 0.15


def test_only_the_pairwise_model_holds_a_circle(toy, tmp_path):
    """Rock beats scissors, scissors beat paper, paper beats rock: no score orders more than two of the three.

    The first gradient of a circle grows with how far apart the base model's states are, so they are moved apart here.
    """
    beats, path = [("aaa", "ddd"), ("ddd", "hhh"), ("hhh", "aaa")], tmp_path / "circle.jsonl"
    path.write_text(
        "".join(
            json.dumps(dict(zip(("chosen", "rejected"), beats[i % 3], strict=True))) + "\n"
            for i in range(60)
        )
    )
    base = GPT.from_pretrained(toy / "sft" / "model")
    torch.manual_seed(0)
    with torch.no_grad():
        for p in base.parameters():
            p.add_(0.2 * torch.randn_like(p))
    base.save_pretrained(tmp_path / "base", load_tokenizer(toy / "sft" / "model"))
    accuracy = {}
    for model in ("pointwise", "pairwise"):
        accuracy[model] = train(path, tmp_path / "base", tmp_path / model, model=model, epochs=30)[
            0
        ]["eval/accuracy"]
    assert accuracy["pointwise"] < 0.9 and accuracy["pairwise"] == 1.0
    lines = (tmp_path / "pairwise" / "samples.jsonl").read_text().splitlines()
    assert all(json.loads(line).keys() == {"prompt", "response"} for line in lines)
    with pytest.raises(UserError, match="a preference model lies here, expected a reward model"):
        labelers.load_reward_model(tmp_path / "pairwise", None, None)


def test_rankings_of_unequal_length_from_a_file(tmp_path):
    rng, path = np.random.default_rng(0), tmp_path / "k.jsonl"
    words = "abcdefgh"
    with path.open("w") as file:
        for i in range(200):
            letters = rng.choice(list(words), rng.integers(2, 6), replace=False).tolist()
            ranking = sorted(range(len(letters)), key=lambda j: letters[j])  # a before b
            record = {"prompt": f"{i} ", "responses": letters, "ranking": ranking}
            if i % 4 == 0:
                record = {"prompt": f"{i} ", "chosen": min(letters), "rejected": max(letters)}
            file.write(json.dumps(record) + "\n")
    sft.main(
        sft.Knobs(
            data=str(path),
            out=str(tmp_path / "sft"),
            vocab_size=257,
            n_layer=1,
            n_head=2,
            n_embd=32,
            epochs=1,
            n_ctx=32,
        )
    )
    for loss in ("plackett_luce", "best_of_k"):
        assert (
            train(
                path, tmp_path / "sft", tmp_path / loss, loss=loss, epochs=5, batch_size=32, lr=1e-2
            )[0]["eval/accuracy"]
            > 0.9
        )


def test_ratings_are_regressed(toy, rated, tmp_path):
    """Without the normalisation, scores stay on the raters' scale."""
    train(
        rated,
        toy / "sft",
        tmp_path / "rm",
        loss="ratings",
        epochs=8,
        batch_size=32,
        lr=3e-3,
        normalize=False,
    )
    scores = [
        json.loads(line)["score"]
        for line in (tmp_path / "rm" / "samples.jsonl").read_text().splitlines()
    ]
    truth = np.array([r[0] for r in data.load_feedback(str(rated)).test.ratings])
    assert np.mean((np.array(scores) - truth) ** 2) < 0.5 * truth.var()
