"""Consistency of rewards, ConvexDA and RewardFusion, against loops and cases by hand."""

import itertools

import numpy as np
import pytest
import torch

import train_ppo
import train_rm
from minirlhf import data
from minirlhf.engine.cli import UserError
from minirlhf.engine.rows import Rows
from minirlhf.feedback import preferring, simulate
from minirlhf.gpt import GPT, RewardModel
from minirlhf.look.command import Knobs as LookKnobs
from minirlhf.look.command import main as look
from minirlhf.rewards import augment, consistency, fusion
from minirlhf.tokenizer import Tokenizer

# Contrast Instructions


def contrasts(score, xs, ys, pairs):
    return consistency.contrast_instructions(*consistency.contrast_scores(score, xs, ys, pairs))


def table_score(table):
    """score(prompts, responses) of texts that are numbers, by a table."""

    def score(prompts, responses):
        return [table[int(x), int(y)] for x, y in zip(prompts, responses, strict=True)]

    return score


def test_contrast_instructions_against_a_loop():
    rng = np.random.default_rng(0)
    table = rng.integers(0, 3, (6, 6)).astype(float)  # with ties
    texts = [str(i) for i in range(6)]
    pairs = [(0, 1), (2, 5), (3, 4)]
    res = ins = 0
    for i, j in pairs:
        for x, other in ((i, j), (j, i)):
            res += table[x, x] > table[x, other]
            ins += table[x, x] > table[other, x]
    assert contrasts(table_score(table), texts, texts, pairs) == (res / 6, ins / 6)


def test_what_ignores_one_side_has_no_consistency():
    texts, pairs = [str(i) for i in range(4)], [(0, 1), (2, 3)]
    of_answer = np.tile([1.0, 2.0, 3.0, 4.0], (4, 1))
    assert contrasts(table_score(of_answer), texts, texts, pairs) == (0.5, 0.0)
    assert contrasts(table_score(of_answer.T), texts, texts, pairs) == (0.0, 0.5)
    assert contrasts(table_score(np.eye(4)), texts, texts, pairs) == (1.0, 1.0)


def test_contrast_pairs_are_alike_and_answered_otherwise():
    angles = np.radians([0, 30, 5, 200, 235])
    embeddings = np.stack([np.cos(angles), np.sin(angles)], 1) * [[1], [2], [3], [4], [5]]
    # 0-2 (cosine .996) is above the band; 0-1 (.87), 1-2 (.91) and 3-4 (.82) lie in it
    found = consistency.contrast_pairs(embeddings, ["a", "b", "a", "c", "d"])
    assert found.tolist() == [[0, 1], [1, 2], [3, 4]]
    found = consistency.contrast_pairs(embeddings, ["a", "b", "b", "c", "c"])
    assert found.tolist() == [[0, 1]]
    assert consistency.contrast_pairs(embeddings, ["a"] * 5).shape == (0, 2)


# Misspelt


def test_perturbed_is_one_word_in_twenty():
    words = ["film", "acting", "splendid", "terrible", "plot", "a", "of", "in", "it"]
    rng = np.random.default_rng(0)
    for length in (3, 19, 20, 39, 40, 100):
        text = " ".join(rng.choice(words, length - 3)) + " the film, again"
        noisy = consistency.perturbed([text], rng)[0]
        before, after = text.split(" "), noisy.split(" ")
        wrong = [(a, b) for a, b in zip(before, after, strict=True) if a != b]
        assert len(wrong) == max(1, length // 20)
        assert all(a[0] == b[0] and abs(len(a) - len(b)) <= 1 and len(a) > 2 for a, b in wrong)
    assert consistency.perturbed(["", "a of 12345", "!"], rng) == ["", "a of 12345", "!"]


def test_perturbed_repeats_and_is_of_many_kinds():
    found = consistency.perturbed(["splendid"] * 200, np.random.default_rng(1))
    assert found == consistency.perturbed(["splendid"] * 200, np.random.default_rng(1))
    assert {len(word) for word in found} == {7, 8, 9}
    assert any(sorted(word) == sorted("splendid") for word in found)


def test_perturbed_consistency_against_a_loop():
    rng = np.random.default_rng(0)
    before, after = rng.integers(0, 5, 20) / 2, rng.integers(0, 5, 20) / 2
    pairs = list(itertools.combinations(range(20), 2))
    one = both = 0
    for i, j in pairs:
        for first, second in ((after[i], before[j]), (before[i], after[j])):
            one += (before[i] - before[j]) * (first - second) > 0
        both += (before[i] - before[j]) * (after[i] - after[j]) > 0
    found = consistency.perturbed_consistency(before, after, pairs)
    assert found["one side"] == pytest.approx(one / 2 / len(pairs))
    assert found["both sides"] == pytest.approx(both / len(pairs))
    change = sum(abs(a - b) for a, b in zip(after, before, strict=True)) / 20
    assert found["change"] == pytest.approx(change)
    assert found["relative"] == pytest.approx(change / np.std(before))
    constant = consistency.perturbed_consistency(np.ones(20), np.ones(20), pairs)
    assert constant == {"one side": 0, "both sides": 0, "change": 0, "relative": 0}


def test_on_perturbed_asks_of_the_texts_and_of_their_misspelt_copies():
    asked = []

    def score(prompts, responses):
        asked.append((prompts, responses))
        return [len(y) + (x == "b") for x, y in zip(prompts, responses, strict=True)]

    texts = ["a film like this", "plot"]
    found = consistency.on_perturbed(score, ["a", "b"], texts, [(0, 1)], np.random.default_rng(2))
    noisy = consistency.perturbed(texts, np.random.default_rng(2))
    assert asked == [(["a", "b"], texts), (["a", "b"], noisy)]
    change = sum(abs(len(y) - len(x)) for x, y in zip(texts, noisy, strict=True)) / 2
    assert found == {"one side": 1, "both sides": 1, "change": change, "relative": change / 5.5}


# ConvexDA


def outside_of_the_others(points, i):
    """Whether a line through a point has all others on one side: looked for in 20,000 ways."""
    angles = np.linspace(0, 2 * np.pi, 20_000, endpoint=False)
    ahead = (points[i] - np.delete(points, i, 0)) @ np.stack([np.cos(angles), np.sin(angles)])
    return (ahead > 0).all(0).any()


@pytest.mark.parametrize("n", [3, 5, 12])
def test_hull_is_who_lies_outside_the_hull_of_the_others(n):
    points = np.random.default_rng(n).normal(size=(n, 2))
    expected = [i for i in range(n) if outside_of_the_others(points, i)]
    assert augment.hull(points) == expected
    in_space = points @ np.linalg.qr(np.random.default_rng(0).normal(size=(7, 2)))[0].T
    assert augment.convex_da(in_space) == expected  # principal axes only turn it
    assert augment.convex_da(-in_space + 3) == expected


def test_hull_by_hand():
    square = [[0, 0], [2, 0], [2, 2], [0, 2]]
    assert augment.hull(np.array([[1, 1], *square, [1, 0], [2, 2]], float)) == [1, 2, 3, 4]


@pytest.mark.parametrize("points,expected", [
    ([[1.0, 2, 3]], [0]),
    ([[1.0, 2, 3], [1, 2, 3]], [0]),
    ([[1.0, 2, 3], [1, 2, 4]], [0, 1]),
    ([[1.0], [3], [2], [0]], [1, 3]),
    ([[0.1, 0.3], [0.2, 0.6], [0.7, 2.1], [0.4, 1.2]], [0, 2]),  # a line, but for rounding
])  # fmt: skip
def test_convex_da_of_few_points_and_of_a_line(points, expected):
    assert augment.convex_da(points) == expected


def test_convex_da_sees_the_two_widest_axes():
    """A cross: wide along axes 3 and 1, narrow along 2, where the rest lies."""
    points = np.zeros((6, 4))
    points[[0, 1], 3] = 9, -9
    points[[2, 3], 1] = 7, -7
    points[[4, 5], 2] = 1, -1
    assert augment.convex_da(points) == [0, 1, 2, 3]


def augmented_toy(toy, groups=False):
    """(items, rows, plan, as they were; the same, augmented; the tokenizer)."""
    items = data.load_feedback("toy").train
    items = items.take(range(40))
    if groups:
        items.groups, items.ratings = [[2 * i, 2 * i + 1] for i in range(20)], None
    tokenizer = Tokenizer.load(toy / "sft" / "model")
    base = GPT.from_pretrained(toy / "sft" / "model")
    items, *encoded = data.encode_items(items, tokenizer, base.config.n_ctx)
    rows = Rows(*encoded, tokenizer.pad, "cpu")
    plan = [b for _ in range(30) for b in items.epoch(10, np.random.default_rng(0))]
    given = items, rows, plan
    rng = np.random.default_rng(1)
    return given, augment.augmented("convexda", *given, base, tokenizer, rng), tokenizer


@pytest.mark.parametrize("groups", [False, True], ids=["ratings", "pairs"])
def test_copies_have_the_label_of_their_response_and_differ(toy, groups, capsys):
    (items, rows, plan), (more, many, drawn), tokenizer = augmented_toy(toy, groups)
    assert f"{len(more) - len(items)} misspelt copies of {len(items)}" in capsys.readouterr().out
    forms = {}  # of each response, what stands in its place in the plan
    for batch, other in zip(plan, drawn, strict=True):
        for field in ("pairs", "labels", "margins"):
            assert (getattr(batch, field) == getattr(other, field)).all()
        for i, k in zip(batch.rows.tolist(), other.rows.tolist(), strict=True):
            forms.setdefault(i, set()).add(k)
    seen = set()
    for i, own in forms.items():
        texts = [more.responses[k] for k in own]
        assert i in own and len(set(texts)) == len(texts)  # not the last vertex again and again
        assert 2 <= len(own) <= 6
        seen |= own
        for k in own:
            length = many.prompt_lengths[k]
            assert tokenizer.decode(many.tokens[k][length:]) == more.responses[k]
            assert many.tokens[k][-1] == tokenizer.eos and more.prompts[k] == items.prompts[i]
            assert groups or (more.ratings[k] == items.ratings[i]).all()
    assert seen == set(range(len(more))) == set(range(len(many.tokens)))
    assert (many.tokens[0] == rows.tokens[0]).all()


def test_without_augment_nothing_is_touched():
    given = object(), object(), object()
    assert augment.augmented("", *given, None, None, None) == given


def test_augment_is_not_for_labels_of_many_kinds(tmp_path):
    path = str(tmp_path / "labels.jsonl")
    simulate.main(simulate.Knobs(out=path, ask="comparison=40,estop=10"))
    with pytest.raises(UserError, match="--augment convexda.* in labels of many kinds"):
        train_rm.main(train_rm.Knobs(data=path, augment="convexda", out=str(tmp_path / "rm")))


# RewardFusion


def test_reward_fusion_against_a_loop():
    rng = np.random.default_rng(0)
    query, known = rng.normal(size=(30, 3)), rng.normal(size=(50, 3))
    reward, rewards = rng.normal(size=30), rng.normal(size=50)
    found = fusion.reward_fusion(*map(torch.tensor, (reward, query, known, rewards)), 4)
    sizes = []
    for b in range(30):
        cosines = [q @ query[b] / np.linalg.norm(q) / np.linalg.norm(query[b]) for q in known]
        best = sorted(range(50), key=lambda i: -cosines[i])[:4]
        used = [(cosines[i], rewards[i]) for i in best if cosines[i] >= 0.9]
        total = reward[b] + sum(s * r for s, r in used)
        assert found[b].item() == pytest.approx(total / (1 + sum(s for s, _ in used)))
        least, *_, most = sorted([reward[b], reward[b], *(r for _, r in used)])
        assert least - 1e-12 <= found[b] <= most + 1e-12
        sizes.append(len(used))
    assert {0, 4} < set(sizes)  # nothing was retrieved: the plain reward; and all


def test_reward_fusion_by_hand():
    given = [torch.tensor(x) for x in ([1.0], [[2.0, 0]], [[5.0, 0], [0, 1]], [4.0, 100])]
    assert fusion.reward_fusion(*given, 5).item() == pytest.approx(2.5)  # cosine 1: half and half
    assert fusion.reward_fusion(*given, 5, cosine=-1).item() == pytest.approx(2.5)  # weight 0
    assert fusion.reward_fusion(*given, 5, cosine=1.1).item() == 1


def test_fused_scores_of_a_model(toy):
    """The same, worked out from what the plain model says."""
    source = toy / "rm"
    rm = RewardModel.from_pretrained(source / "model").eval()
    tokenizer = Tokenizer.load(source / "model")
    assert fusion.fused(rm, source, tokenizer, 0) is rm
    items = data.load_feedback("toy").train
    texts = [*items.responses[:3], "gggabc"]
    score = preferring.score_of_model(source, "cpu", fuse=2)
    plain = preferring.score_of_model(source, "cpu")

    def embeddings(texts):
        ids = [[tokenizer.eos, *tokenizer.encode(text), tokenizer.eos] for text in texts]
        longest = max(map(len, ids))
        padded = torch.tensor([row + [0] * (longest - len(row)) for row in ids])
        with torch.no_grad():
            hidden = rm.transformer.hidden(padded).numpy()
        return np.stack([h[: len(row)].mean(0) for h, row in zip(hidden, ids, strict=True)])

    known = embeddings(items.responses)
    rewards = plain([""] * len(items), items.responses)
    centre = known.mean(0)
    unit = (known - centre) / np.linalg.norm(known - centre, axis=1, keepdims=True)
    expected = []
    for query, reward in zip(embeddings(texts), plain([""] * 4, texts), strict=True):
        query = query - centre
        cosines = unit @ (query / np.linalg.norm(query))
        best = [i for i in np.argsort(-cosines)[:2] if cosines[i] >= 0.9]
        weights = np.array([1, *cosines[best]])
        expected.append(weights @ [reward, *rewards[best]] / weights.sum())
    assert score([""] * 4, texts) == pytest.approx(expected, abs=1e-4)
    assert not np.allclose(score([""] * 4, texts), plain([""] * 4, texts), atol=1e-3)


def test_fuse_needs_a_model_and_its_run(toy, tmp_path):
    def wrong(source, message):
        with pytest.raises(UserError, match=message):
            preferring.load_preferrer(source, data.load_feedback("toy"), fuse=2)

    wrong("true", "true is no reward model")
    wrong("judge:http://127.0.0.1:1/v1", "no reward model")
    rm = RewardModel.from_pretrained(toy / "rm" / "model")
    rm.save_pretrained(tmp_path / "bare", Tokenizer.load(toy / "rm" / "model"))
    wrong(tmp_path / "bare", "is no run of train_rm.py")
    rm.level = "token"
    rm.save_pretrained(tmp_path / "bare", Tokenizer.load(toy / "rm" / "model"))
    wrong(tmp_path / "bare", "scores tokens")
    knobs = {"data": "toy", "init": str(toy / "sft"), "out": str(tmp_path / "ppo"), "steps": 1}
    with pytest.raises(UserError, match="--fuse.*where no model scores"):
        train_ppo.main(train_ppo.Knobs(**knobs, reward="true", fuse=2))


def test_look_fuses(toy, capsys):
    """A reply's score in print is another one with --fuse."""
    knobs = {"runs": [str(toy / "sft")], "reward": str(toy / "rm"), "prompts": 4}
    tables = []
    for fuse in (0, 0, 5):
        look(LookKnobs(**knobs, fuse=fuse))
        tables.append(capsys.readouterr().out)
    assert tables[0] == tables[1] != tables[2]
    with pytest.raises(UserError, match="--fuse is of scores"):
        look(LookKnobs(**knobs | {"reward": "none"}, fuse=5))
