"""The reward-model script: the losses of a batch, groups and ties, margins, micro-batches, models
without a score; and ridge regression beside it.

Expected losses come from NumPy loops in float64.
"""

import dataclasses
import json
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import train_rm
from minirlhf import data, sft
from minirlhf.data import Compared, Items, parse_record
from minirlhf.engine import parallel
from minirlhf.engine.cli import UserError
from minirlhf.engine.rows import Rows
from minirlhf.feedback import labelers
from minirlhf.feedback.checks import check_rm
from minirlhf.feedback.preference_model import PreferenceModel
from minirlhf.gpt import GPT, GPTConfig, RewardModel
from minirlhf.look.ridge import ridge_scores, words_of
from minirlhf.tokenizer import load_tokenizer

OFF = torch.autocast("cpu", enabled=False)
CONFIG = GPTConfig(vocab_size=50, n_ctx=16, n_layer=2, n_head=2, n_embd=16)


def knobs(**changes):
    return train_rm.Knobs(**changes)


def log_sigmoid(x):
    return -math.log(1 + math.exp(-x))


def pl_loop(best_first):
    terms = [math.exp(r) / sum(map(math.exp, best_first[i:])) for i, r in enumerate(best_first)]
    return -sum(map(math.log, terms))


# Batches: groups of unequal size from records, and ratings with ties

GROUPS = Items(["p"] * 9, list("abcdefghi"), ["l"] * 9, groups=[[2, 0, 1], [4, 3], [5, 6, 7, 8]])
RATINGS = [np.array(r) for r in ([1, 2], [3, 3], [2, 1], [0, 1], [3, 3], [2, 3])]
RATED = Items([""] * 6, list("abcdef"), ["l"] * 6, RATINGS)
MEANS = [1.5, 3, 1.5, 0.5, 3, 2.5]  # 0 and 2 are tied, and 1 and 4
SCORES = np.random.default_rng(0).normal(size=9)


def compared(pairs, labels, n=None):
    """A batch of the first n items."""
    n = n or 1 + max(map(max, pairs))
    rows = np.arange(n)
    return Compared(rows, [rows], np.array(pairs), np.array(labels), np.zeros(len(pairs)))


def epoch(items, batch_size=100, seed=0):
    return next(items.epoch(batch_size, np.random.default_rng(seed)))


def loss_of(items, scores=SCORES, batch_size=100, **changes):
    """The loss of one batch of all items, each with its score; and the batch's order."""
    batch = epoch(items, batch_size)
    outputs = torch.tensor(scores[batch.rows], dtype=torch.float32)
    loss = train_rm.batch_loss(knobs(**changes), None, outputs, items, batch)
    return loss.item(), batch.rows


def test_rankings_of_records_are_whole():
    for batch_size in (100, 4, 9):
        seen = []
        for batch in GROUPS.epoch(batch_size, np.random.default_rng(1)):
            found = [batch.rows[g].tolist() for g in train_rm.rankings(GROUPS, batch, 4)]
            assert found and sum(map(len, found)) == len(batch.rows)
            seen += found
        assert sorted(seen) == sorted(GROUPS.groups)


def test_rankings_of_ratings_leave_ties_out():
    batch = epoch(RATED)
    chosen = batch.rows
    found = train_rm.rankings(RATED, batch, 6)
    assert len(found) == 1
    ranked, order = chosen[found[0]].tolist(), chosen.tolist()
    assert [MEANS[i] for i in ranked] == [3, 2.5, 1.5, 0.5]
    for a, b in ((1, 4), (0, 2)):
        assert (a in ranked) == (order.index(a) < order.index(b))
    for size, groups in ((3, 2), (2, 3), (4, 2)):
        found = train_rm.rankings(RATED, batch, size)
        assert len(found) == groups
        assert len(set(np.concatenate(found))) == sum(map(len, found))
        for group in found:
            means = [MEANS[i] for i in chosen[group]]
            assert all(a > b for a, b in zip(means, means[1:], strict=False))


def test_rated_answers_to_one_prompt_are_one_list():
    """Whatever the group size: four graded answers are a ranking of four, ties left out of it."""
    grades = [2, 4, 1, 3, 1, 1, 0, 5]
    ratings = [np.array([g]) for g in grades]
    items = Items(["p"] * 4 + ["q"] * 4, list("abcdefgh"), ["l"] * 8, ratings)
    for size in (2, 3, 4, 100):
        batch = epoch(items)
        found = [batch.rows[g].tolist() for g in train_rm.rankings(items, batch, size)]
        by_prompt = {items.prompts[g[0]]: [grades[i] for i in g] for g in found}
        assert len(found) == 2 and by_prompt == {"p": [4, 3, 2, 1], "q": [5, 1, 0]}


@pytest.mark.parametrize("items", [GROUPS, RATED], ids=["records", "ratings"])
def test_ranking_losses_of_a_batch_are_the_loop(items):
    plackett_luce, chosen = loss_of(items, loss="plackett_luce", group_size=3)
    best_of_k, _ = loss_of(items, loss="best_of_k", group_size=3)
    groups = [SCORES[g].tolist() for g in items.groups]
    if items is RATED:  # thirds of the batch in its random order; of equal means the first
        for third in (chosen[:3], chosen[3:]):
            means = [MEANS[i] for i in third]
            kept = [i for n, i in enumerate(third) if means[n] not in means[:n]]
            groups.append([SCORES[i] for i in sorted(kept, key=lambda i: -MEANS[i])])
    assert plackett_luce == pytest.approx(np.mean([pl_loop(g) for g in groups]), rel=1e-5)
    expected = [math.log(sum(map(math.exp, g))) - g[0] for g in groups]
    assert best_of_k == pytest.approx(np.mean(expected), rel=1e-5)


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
            if q == 0.5 and not soft:
                continue
            q = q if soft else float(q > 0.5)
            d = SCORES[i] - SCORES[j]
            loss = -q * log_sigmoid(d - 0.3) - (1 - q) * log_sigmoid(-d - 0.3)
            losses.append(loss + 0.1 * (SCORES[i] + SCORES[j]) ** 2)
    found, _ = loss_of(RATED, soft_labels=soft, margin=0.3, center=0.1)
    assert found == pytest.approx(np.mean(losses), rel=1e-5)


def test_equal_shares_are_a_tie_in_spite_of_rounding():
    """Where float64 misses one half by a rounding error."""
    scores = torch.tensor([3.0, -1.0])
    for label in (0.5 + 1e-12, 0.5 - 1e-12):
        batch = compared([(0, 1)], [label])
        assert train_rm.batch_loss(knobs(soft_labels=False), None, scores, RATED, batch) == 0
        assert train_rm.batch_accuracy(None, scores, batch).isnan()  # nobody says which is better


# Margins of records


def test_margin_of_a_record():
    pair = {"prompt": "p", "chosen": "a", "rejected": "b"}
    ranking = {"prompt": "p", "responses": ["a", "b", "c"], "ranking": [1, 0, 2]}
    cases = [(pair, 2, ["a", "b"]), (ranking, -0.5, ["b", "a", "c"]), (pair, 0, ["a", "b"])]
    for record, margin, responses in cases:
        found = parse_record(record | {"margin": margin}, "here")
        assert (found.prompt, found.responses, found.number) == ("p", responses, margin)
    assert parse_record(pair | {"margin": None}, "here").number == 0  # null is nothing said
    for bad in ("1", True, math.inf, math.nan):
        with pytest.raises(UserError, match="here: margin: expected a finite number"):
            parse_record(pair | {"margin": bad}, "here")
    for bad in (1e39, -1e16):
        with pytest.raises(UserError, match=r"here: margin: .* is beyond 1e\+15"):
            parse_record(pair | {"margin": bad}, "here")


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_margins_go_with_their_records(tmp_path):
    plain = [{"prompt": f"p{i}", "chosen": f"+{i}", "rejected": f"-{i}"} for i in range(40)]
    records = [r | ({"margin": i / 10} if i % 3 else {}) for i, r in enumerate(plain)]
    feedback = data.load_feedback(str(write(tmp_path / "m.jsonl", records)))
    for items in (feedback.train, feedback.test):
        numbers = [int(items.prompts[good][1:]) for good, _ in items.groups]
        assert items.margins == [i / 10 if i % 3 else 0 for i in numbers]
    items, scores = feedback.train, np.random.default_rng(3).normal(size=len(feedback.train))
    loss, _ = loss_of(items, scores, 1000, margin=0.2)
    losses = []
    for (i, j), margin in zip(items.groups, items.margins, strict=True):
        losses.append(-log_sigmoid(scores[i] - scores[j] - 0.2 - margin))
    assert loss == pytest.approx(np.mean(losses), rel=1e-5)
    assert data.load_feedback(str(write(tmp_path / "m.jsonl", plain))).train.margins is None


@pytest.mark.parametrize("changes, names", [
    ({"loss": "ratings"}, "--loss ratings.*no ratings"),
    ({"loss": "plackett_luce"}, "margins"),
    ({"loss": "best_of_k"}, "margins"),
    ({"group_size": 1}, "--group-size 1.*2"),
    ({"model": "pairwise", "center": 0.1}, "pairwise.*no --center"),
    ({"model": "pairwise", "level": "token"}, "pairwise.*--level response"),
])  # fmt: skip
def test_knobs_that_say_nothing_together(changes, names):
    items = dataclasses.replace(GROUPS, margins=[1.0] * 3)
    with pytest.raises(UserError, match=names):
        check_rm(knobs(**changes), items)
    if changes.get("loss") in ("plackett_luce", "best_of_k"):
        check_rm(knobs(**changes), GROUPS)  # fine without margins
    else:
        with pytest.raises(UserError):
            check_rm(knobs(**changes), GROUPS)


def test_ratings_take_no_switch_of_pairs():
    for more in ({"margin": 0.1}, {"center": 0.1}, {"soft_labels": False}):
        with pytest.raises(UserError, match="belong to --loss pairs"):
            check_rm(knobs(loss="ratings", **more), RATED)
    check_rm(knobs(loss="ratings"), RATED)


# Rows and micro-batches


def test_thinned_rows_keep_both_ends_and_count_the_prompt():
    row, prompt_lengths = np.arange(100, 160), np.array([1, 20, 59])
    np.random.seed(0)
    thinned = Rows([row] * 3, prompt_lengths, 0, "cpu").thinned(0.5)
    for n, kept, p in zip(prompt_lengths, thinned.tokens, thinned.prompt_lengths, strict=True):
        assert kept[0] == 100 and kept[-1] == 159 and 10 < len(kept) < 50
        assert kept[:p].tolist() == [t for t in kept if t < 100 + n]
    assert thinned.thinned(0.0).tokens[2].tolist() == thinned.tokens[2].tolist()


def test_a_share_of_thinned_rows_lose_their_eos_if_more_of_the_response_is_left():
    rows = [np.array([7, 1, 2, 3, 9]), np.array([7, 1, 2, 9])] * 500  # the second has its EOS alone
    rows = Rows(rows, np.array([2, 3] * 500), 0, "cpu")
    np.random.seed(0)
    for share, low, high in ((0.0, 0, 0), (0.2, 60, 140), (1.0, 500, 500)):
        found = [row.tolist() for row in rows.thinned(0.0, share).tokens]
        assert found[1::2] == [[7, 1, 2, 9]] * 500
        assert low <= found[::2].count([7, 1, 2, 3]) <= high
        assert found[::2].count([7, 1, 2, 3, 9]) + found[::2].count([7, 1, 2, 3]) == 500
    few = rows.thinned(0.9, 1.0)
    assert all(len(row) > p for row, p in zip(few.tokens, few.prompt_lengths, strict=True))


def some_rows(n=8, seed=0):
    rng = np.random.default_rng(seed)
    rows = [rng.integers(0, 50, k) for k in rng.integers(3, 16, n)]
    lengths = [int(rng.integers(1, len(row))) for row in rows]
    return Rows(rows, np.array(lengths), 0, torch.device("cpu"))


def gradients(model, rows, micro_batch):
    """Of a loss that compares all rows with each other."""
    model.zero_grad()
    outputs = train_rm.forward(model, rows, micro_batch)
    n = len(rows.tokens)
    pairs = np.array([(i, j) for i in range(n) for j in range(i)])
    batch = compared(pairs, np.ones(len(pairs)))
    train_rm.batch_loss(knobs(), model, outputs, GROUPS, batch).backward()
    return outputs.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])


def by_token(config):
    return RewardModel(config, level="token")


@pytest.mark.parametrize("make", [RewardModel, by_token, PreferenceModel])
def test_micro_batches_give_the_gradient_of_the_whole(make):
    torch.manual_seed(0)
    model, rows = make(CONFIG), some_rows()
    outputs, whole = gradients(model, rows, 8)
    for micro_batch in (0, 4, 3, 2, 1):
        again, gradient = gradients(model, rows, micro_batch)
        torch.testing.assert_close(again, outputs, rtol=0, atol=1e-5)
        assert (gradient - whole).norm() < 1e-6 * whole.norm()


def test_micro_batches_repeat_their_dropout_in_backward():
    """Each row has its own dropout, whatever the rows beside it: the same scores and gradient."""
    torch.manual_seed(0)
    model, rows = RewardModel(dataclasses.replace(CONFIG, dropout=0.3)), some_rows()
    found = []
    for micro_batch in (0, 8, 3, 1):
        torch.manual_seed(1)
        found.append(gradients(model, rows, micro_batch))
    (first, whole), (again, gradient), *parts = found
    assert torch.equal(first, again)
    torch.testing.assert_close(whole, gradient, rtol=0, atol=1e-6)
    for outputs, gradient in parts:
        torch.testing.assert_close(outputs, first, rtol=0, atol=1e-5)
        assert (gradient - whole).norm() < 1e-6 * whole.norm()
    assert not torch.allclose(gradients(model.eval(), rows, 0)[0], first, atol=1e-2)


def test_micro_batch_is_the_number_of_rows_in_memory(monkeypatch):
    model, rows, seen = RewardModel(CONFIG), some_rows(), []
    real = model.transformer.hidden

    def hidden(idx, **more):
        seen.append(len(idx))
        return real(idx, **more)

    monkeypatch.setattr(model.transformer, "hidden", hidden)
    gradients(model, rows, 3)
    assert max(seen) == 3 and sum(seen) == 16  # 8 rows forward and again in backward


@pytest.mark.parametrize("micro_batch", [0, 1, 2, 4])
def test_base_model_micro_batches_give_the_gradient_of_the_whole(micro_batch):
    model, rows, found = GPT(CONFIG), some_rows().tokens, []
    for n in (len(rows), micro_batch):
        model.zero_grad()
        loss = sft.add_gradient(parallel.Together(model), rows, n, 0, OFF, "cpu")
        found.append((loss, torch.cat([p.grad.flatten() for p in model.parameters()])))
    (loss, whole), (again, gradient) = found
    logprobs = []
    for row in rows:
        logits = model(torch.as_tensor(row)[None])[0, :-1]
        logprobs.append(logits.log_softmax(1)[range(len(row) - 1), row[1:]])
    assert loss.item() == pytest.approx(-torch.cat(logprobs).mean().item(), rel=1e-5)
    assert again.item() == pytest.approx(loss.item(), rel=1e-6)
    assert (gradient - whole).norm() < 1e-6 * whole.norm()


# Ridge regression


def test_ridge_is_that_of_a_dense_solver():
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(list("abcdefg!"), rng.integers(2, 7))) for _ in range(60)]
    ratings = [rng.normal(size=3) for _ in texts]
    train = SimpleNamespace(responses=texts[:40], ratings=ratings[:40])
    test = SimpleNamespace(responses=texts[40:], ratings=ratings[40:])
    bags = [words_of(text) for text in texts]
    assert words_of("A b, a") == {"a", "b", ",", ("a", "b"), ("b", ","), (",", "a")}
    known = {word for bag in bags[:40] for word in bag if sum(word in b for b in bags[:40]) > 1}
    X = np.array([[word in bag for word in sorted(known, key=str)] for bag in bags], dtype=float)
    y = np.array([r.mean() for r in ratings[:40]])
    gram = X[:40].T @ X[:40] + 2.0 * np.eye(X.shape[1])
    weights = np.linalg.solve(gram, X[:40].T @ (y - y.mean()))
    found = ridge_scores(train, test, strength=2.0, iterations=200)
    np.testing.assert_allclose(found, X[40:] @ weights, atol=1e-6)


# Whole runs

CHEAP = dict(epochs=1, batch_size=256, delete=0.0, delete_eos=0.0, dropout=0.0)


def train(source, init, out, **changes):
    given = dict(data=str(source), init=str(init), out=str(out))
    summary = train_rm.main(knobs(**given | CHEAP | changes))
    return summary, load_file(out / "model" / "model.safetensors")


def samples_of(out):
    return [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def rated(tmp_path_factory):
    """A file of 400 toy words with their mean ratings."""
    toy, path = data.load_feedback("toy"), tmp_path_factory.mktemp("rated") / "toy.jsonl"
    records = []
    for items, n in ((toy.train, 360), (toy.test, 40)):
        for response, ratings in zip(items.responses[:n], items.ratings, strict=False):
            records.append({"prompt": "", "response": response, "rating": ratings.mean()})
    return write(path, records)


CASES = {  # {name: (knobs, whether the last LayerNorm's bias stays)}
    "pairs": ({}, True),
    "plackett_luce": ({"loss": "plackett_luce"}, True),
    "best_of_k": ({"loss": "best_of_k"}, True),
    "ratings": ({"loss": "ratings"}, False),
    "center": ({"center": 0.1}, False),
    "token": ({"level": "token"}, False),
    "pairwise": ({"model": "pairwise"}, False),
}


@pytest.fixture(scope="module")
def weights_of(toy, rated, tmp_path_factory):
    """weights_of(knobs): those of a short run with them, made once."""
    made = {}

    def weights(**changes):
        key = tuple(sorted(changes.items()))
        if key not in made:
            out = tmp_path_factory.mktemp("rm")
            raw = {} if changes.get("model") == "pairwise" else {"normalize": False}
            made[key] = train(rated, toy / "sft", out, **raw, **changes)[1]
        return made[key]

    return weights


def test_group_size(weights_of):
    four, two = (weights_of(loss="plackett_luce", **k) for k in ({}, {"group_size": 2}))
    assert not torch.allclose(four["score.weight"], two["score.weight"], atol=1e-4)


def test_micro_batch_of_a_run(weights_of, monkeypatch):
    seen = []

    def checkpoint(f, tokens, *lengths, use_reentrant):
        seen.append(len(tokens))
        return f(tokens, *lengths)

    monkeypatch.setattr(sys.modules["minirlhf.engine.rows"], "checkpoint", checkpoint)
    weights_of(micro_batch=50)
    assert max(seen) <= 50 and sum(seen) == 360


@pytest.mark.parametrize("name", CASES)
def test_a_bias_that_is_in_no_difference_stays(name, toy, weights_of):
    """The last LayerNorm's bias adds the same to every score.

    Where only differences count it is what it was, else it is learned.
    """
    changes, stays = CASES[name]
    before, after = load_file(toy / "sft" / "model" / "model.safetensors"), weights_of(**changes)
    for key, expected in (("bias", stays), ("weight", False)):
        equal = torch.equal(after[f"transformer.ln_f.{key}"], before[f"transformer.ln_f.{key}"])
        assert equal == expected


def test_a_norm_without_a_bias(monkeypatch):
    """As of a fork with RMSNorm."""
    monkeypatch.setattr(torch.nn, "LayerNorm", torch.nn.RMSNorm)
    model = train_rm.fresh_model(knobs(), GPT(CONFIG))
    assert all(p.requires_grad for p in model.parameters())


def test_token_level_run(toy, rated, tmp_path):
    changes = dict(level="token", epochs=4, batch_size=32, lr=3e-3)
    summary, _ = train(rated, toy / "sft", tmp_path / "rm", **changes)
    assert summary["eval/accuracy"] > 0.75
    rm = RewardModel.from_pretrained(tmp_path / "rm" / "model").eval()
    base = GPT.from_pretrained(toy / "sft" / "model")
    tokenizer = load_tokenizer(toy / "sft" / "model")
    items = data.load_feedback("toy").train
    prompts = data.prompts_of(items, tokenizer, np.random.default_rng(5))[:1000]
    torch.manual_seed(9)
    scores = train_rm.sample_scores(base, rm, prompts, 24, tokenizer, OFF)
    assert rm.level == "token" and abs(scores.mean()) < 0.15 and abs(scores.std() - 1) < 0.15


def test_only_the_pairwise_model_holds_a_circle(toy, tmp_path):
    """Rock beats scissors, scissors beat paper, paper beats rock: no score orders more than two.

    The first gradient of a circle grows with how far apart the base model's states are, so they are
    moved apart here.
    """
    beats = [("aaa", "ddd"), ("ddd", "hhh"), ("hhh", "aaa")]
    records = []
    for i, (a, b) in enumerate(20 * beats):  # each asked anew, so that some can be held out
        prompt = "abcdefgh"[i // 8] + "abcdefgh"[i % 8]
        records.append({"prompt": prompt, "chosen": a, "rejected": b})
    path = write(tmp_path / "circle.jsonl", records)
    base = GPT.from_pretrained(toy / "sft" / "model")
    torch.manual_seed(0)
    with torch.no_grad():
        for p in base.parameters():
            p.add_(0.2 * torch.randn_like(p))
    base.save_pretrained(tmp_path / "base", load_tokenizer(toy / "sft" / "model"))
    accuracy = {}
    for model in ("pointwise", "pairwise"):
        summary, _ = train(path, tmp_path / "base", tmp_path / model, model=model, epochs=30)
        accuracy[model] = summary["eval/accuracy"]
    assert accuracy["pointwise"] < 0.9 and accuracy["pairwise"] == 1.0
    assert all(row.keys() == {"prompt", "response"} for row in samples_of(tmp_path / "pairwise"))
    with pytest.raises(UserError, match="a preference model lies here, expected a reward model"):
        labelers.load_reward_model(tmp_path / "pairwise", None, None)


def test_rankings_of_unequal_length_from_a_file(tmp_path):
    rng, records = np.random.default_rng(0), []
    for i in range(200):
        letters = rng.choice(list("abcdefgh"), rng.integers(2, 6), replace=False).tolist()
        ranking = sorted(range(len(letters)), key=lambda j: letters[j])  # a before b
        record = {"prompt": f"{i} ", "responses": letters, "ranking": ranking}
        if i % 4 == 0:
            record = {"prompt": f"{i} ", "chosen": min(letters), "rejected": max(letters)}
        records.append(record)
    path, base = write(tmp_path / "k.jsonl", records), tmp_path / "sft"
    small = dict(vocab_size=257, n_layer=1, n_head=2, n_embd=32, epochs=1, n_ctx=32)
    sft.main(sft.Knobs(data=str(path), out=str(base), **small))
    for loss in ("plackett_luce", "best_of_k"):
        changes = dict(loss=loss, epochs=5, batch_size=32, lr=1e-2)
        summary, _ = train(path, base, tmp_path / loss, **changes)
        assert summary["eval/accuracy"] > 0.9


def test_ratings_are_regressed(toy, rated, tmp_path):
    """Without the normalisation, scores stay on the raters' scale."""
    changes = dict(loss="ratings", epochs=16, batch_size=32, lr=3e-3, normalize=False)
    train(rated, toy / "sft", tmp_path / "rm", **changes)
    scores = np.array([row["score"] for row in samples_of(tmp_path / "rm")])
    truth = np.array([r[0] for r in data.load_feedback(str(rated)).test.ratings])
    assert np.mean((scores - truth) ** 2) < 0.5 * truth.var()
