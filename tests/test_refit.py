"""A reward from a few labels: the likeliest head of a base model that stays as it is."""

import json

import numpy as np
import pytest
import torch

from minirlhf import data
from minirlhf.engine.cli import UserError
from minirlhf.feedback import refit, taste
from minirlhf.feedback.people import Person
from minirlhf.gpt import GPT, RewardModel
from minirlhf.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def learner(toy):
    return refit.Learner(toy / "sft")


def likes_h(prompts, responses):
    """Each letter counts, so hardly two words are worth the same."""
    return [sum(ord(c) - ord("d") for c in text) / 3 for text in responses]


def pairs(n, seed=0, reward=likes_h, **more):
    rng = np.random.default_rng(seed)
    person, labels = Person(reward, beta=3.0, **more), []
    while len(labels) < n:
        texts = ["".join(rng.choice(list("abcdefgh"), rng.integers(4, 11))) for _ in "ab"]
        labels.append(person.ask("comparison", "", texts, rng))
    return labels


def test_the_posterior_is_at_its_top(learner):
    """Its gradient, by loops in NumPy, is 0; and it is no other than that of Bradley and Terry."""
    labels = pairs(30)
    examples = learner.examples(labels)
    prior = examples.priors[0]
    w = refit.likeliest(examples, range(30), prior).numpy().astype(float)
    sums = examples.sums[:, -1].numpy().astype(float)
    covariance = (prior @ prior.T).numpy().astype(float)
    gradient = np.linalg.solve(covariance, w)
    for label in examples.labels:
        best, worst = (sums[label.items[i]] for i in label.said["ranking"])
        chance = 1 / (1 + np.exp(-w @ (best - worst)))
        gradient = gradient - (1 - chance) * (best - worst)
    assert np.abs(w).max() > 0.01
    np.testing.assert_allclose(gradient / np.abs(sums).max(), 0, atol=2e-3)


def test_priors_expect_scores_of_their_variance(learner):
    """Drawn from: w = L v of standard normal v, and the variance of w . whole over texts."""
    examples, rng = learner.examples(pairs(60)), np.random.default_rng(0)
    whole = examples.sums[:, -1].numpy().astype(float)
    for prior in examples.priors:
        w = rng.normal(size=(3000, len(prior))) @ prior.numpy().astype(float).T
        assert (w @ whole.T).var(1).mean() == pytest.approx(refit.VARIANCE, rel=0.1)


def test_a_score_is_the_sum_of_its_tokens(learner, toy):
    learner.fit(pairs(20))
    base = GPT.from_pretrained(toy / "sft" / "model")
    tokenizer = load_tokenizer(toy / "sft" / "model")
    w, shift = learner.model.score.weight[0].detach().double(), learner.model.shift
    for prompt, response in (("", "hhab"), ("ab", "cde")):
        p, r = tokenizer.encode(prompt), tokenizer.encode(response)
        ids = torch.tensor([[tokenizer.eos, *p, *r, tokenizer.eos]])
        with torch.no_grad():
            hidden = base.hidden(ids)[0].double()
        expected = sum(float(hidden[t] @ w) for t in range(1 + len(p), ids.shape[1])) + shift
        (found,) = learner.score([prompt], [response])
        assert found == pytest.approx(expected, abs=1e-4)


def test_it_learns_and_says_how_well(learner):
    seen = []
    labels = pairs(150)
    fit = learner.fit(labels, progress=lambda done, total: seen.append((done, total)))
    assert [size for size, _ in fit.accuracy_by_labels] == [25, 50, 100, 120]
    assert fit.accuracy_by_labels[-1][1] > 0.8
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (seen[-1][1],) * 2
    new = pairs(200, seed=1, flip=0.0)
    right = []
    for label in new:
        best, worst = (label.responses[i] for i in label.said["ranking"])
        gap = likes_h([""], [best])[0] - likes_h([""], [worst])[0]
        a, b = learner.score(["", ""], [best, worst])
        right += [a > b] if gap > 0 else []
    assert np.mean(right) > 0.85
    scores = learner.score([""] * 256, learner.sample([""] * 256, seed=1))
    assert np.mean(scores) == pytest.approx(0, abs=1e-3)
    assert np.std(scores) == pytest.approx(1, abs=1e-3)


def test_what_it_disagrees_with(learner):
    """One label of a hundred that says the contrary is the first of those."""
    labels = pairs(100)
    odd = {"version": 1, "kind": "comparison", "responses": ["hhhhhh", "aaaaaa"], "ranking": [1, 0]}
    fit = learner.fit([*labels, data.parse_label(odd, "here")])
    assert fit.disagreements[0] == 100


def test_the_accuracy_is_of_texts_that_were_held_out(learner):
    """Labels that are coin flips on ever the same two texts leave nothing to test."""
    label = pairs(1)[0]
    assert learner.fit([label] * 20).accuracy_by_labels == []


def test_labels_of_other_kinds(learner):
    rng = np.random.default_rng(0)
    person, labels = Person(likes_h, beta=3.0, cuts=(-0.5, 0.5)), []
    for label in pairs(120):
        kind = ("critique", "estop", "social")[len(labels) % 3]
        labels.append(person.ask(kind, "", label.responses[:1], rng))
    fit = learner.fit(labels)
    good, bad = learner.score(["", ""], ["hhhh", "aaaa"])
    assert good > bad + 0.5
    assert all(0 <= accuracy <= 1 for _, accuracy in fit.accuracy_by_labels)


def test_what_says_nothing_of_the_reward(learner):
    rng = np.random.default_rng(0)
    one = Person(likes_h).ask("similarity", "", ["a", "bb", "ccc"], rng)
    with pytest.raises(UserError, match="no label yet that says which text is better"):
        learner.fit([one])
    with pytest.raises(UserError, match="no label yet"):
        learner.fit([])


def test_it_is_kept_as_a_reward_model(learner, tmp_path):
    learner.fit(pairs(40))
    learner.save(tmp_path / "rm")
    learner.save(tmp_path / "rm")  # over its own
    model = RewardModel.from_pretrained(tmp_path / "rm" / "model")
    assert model.level == "token"
    ids = [learner.tokenizer.eos, *learner.tokenizer.encode("hhab"), learner.tokenizer.eos]
    one = torch.tensor([1])
    with torch.no_grad():
        (found,) = model(torch.tensor([ids]), len(ids) * one, one)
    assert found.item() == pytest.approx(learner.score([""], ["hhab"])[0], abs=1e-5)
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text("{}")
    with pytest.raises(UserError, match="no run of ours"):
        learner.save(other)


def test_the_best_of_n(learner):
    learner.fit(pairs(80))
    first = learner.score([""] * 20, learner.sample([""] * 20, seed=0))
    best = learner.score([""] * 20, learner.write([""] * 20, n=8))
    assert all(a > b - 1e-4 for a, b in zip(best, first, strict=True))
    assert np.mean(best) > np.mean(first) + 0.5


def test_no_language_model(tmp_path):
    with pytest.raises(UserError):
        refit.Learner(tmp_path)


def test_wishes():
    fulfilled = taste.wishes_of("actors", 4)
    found = fulfilled(["The ", "A film", "Its stars"], ["actors shine.", " of facts", " are cast."])
    np.testing.assert_array_equal(found, [[True, True], [False, True], [True, True]])
    assert not fulfilled(["one two three four "], ["five"])[0, 1]


@pytest.mark.parametrize("text", ["", "25,", "x", "1", "25,-3"])
def test_numbers_of_labels(text):
    with pytest.raises(UserError, match="--labels"):
        taste.numbers(text)


@pytest.mark.slow
def test_a_taste_is_followed(toy, tmp_path, monkeypatch, capsys):
    """Toy words of at most one word are all short; the person wishes for the letter h."""
    monkeypatch.setitem(taste.ABOUT, "actors", "h")
    monkeypatch.setattr(taste, "PPO", ["--steps", "2", "--batch-size", "16", "--eval-samples", "32",
                                       "--response-length", "8"])  # fmt: skip
    knobs = taste.Knobs(base=str(toy / "sft"), data="toy", out=str(tmp_path), labels="20", seeds=1)
    (row,) = taste.main(knobs)
    assert row["labels"] == 20 and row["short_before"] == 1.0
    assert json.loads((tmp_path / "taste-actors-0.json").read_text()) == [row]
    assert "labels   wishes" in capsys.readouterr().out
