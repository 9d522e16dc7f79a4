"""Policy learning whole: XPO and reward-weighted regression against NumPy, the best of n against
brute force, a tuned policy's own base; each is run on the toy in tests/test_axes.py."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_online_policies import differences

import train_dpo
from minirlhf import lists
from minirlhf.engine.cli import UserError, parse
from minirlhf.engine.rows import Rows
from minirlhf.feedback.kinds import Batch, Compared, ranked_groups
from minirlhf.feedback.method import method_of
from minirlhf.look import policies, replies
from minirlhf.online import best_of, samples
from minirlhf.online.losses import OTHER_LOSSES

GENERATOR = np.random.default_rng(0)
LOGPS, REF_LOGPS = -GENERATOR.uniform(2, 9, (2, 5, 2))
WIN = np.array([0.9, 0.5, 0.0, 1.0, 0.3])


def np_xpo(logps, win, beta, alpha):
    """Pair by pair, (mine, reference's): Xie et al. 2024, algorithm 1, the label a chance."""
    losses = []
    for (own, other), (ref_own, ref_other), p in zip(logps, REF_LOGPS, win, strict=False):
        margin = beta * ((own - ref_own) - (other - ref_other))
        dpo = p * math.log(1 + math.exp(-margin)) + (1 - p) * math.log(1 + math.exp(margin))
        losses.append(dpo + alpha * other)
    return np.array(losses)


def np_rwr(logps, rewards, mask, temperature):
    losses = []
    for row, worth, there in zip(logps, rewards, mask, strict=True):
        weights = [math.exp(r / temperature) for r, t in zip(worth, there, strict=True) if t]
        total = sum(weights)
        kept = [x for x, t in zip(row, there, strict=True) if t]
        losses.append(-sum(w / total * x for w, x in zip(weights, kept, strict=True)))
    return np.array(losses)


@pytest.mark.parametrize("beta, alpha", [(0.1, 1e-3), (0.7, 0.2), (0.3, 0.0)])
def test_xpo(beta, alpha):
    logps = torch.tensor(LOGPS, requires_grad=True)
    given = logps, torch.tensor(REF_LOGPS), torch.tensor(WIN)
    losses = lists.xpo_loss(*given, beta=beta, alpha=alpha)
    losses.sum().backward()
    expected = np_xpo(LOGPS, WIN, beta, alpha)
    assert np.allclose(losses.detach(), expected, rtol=1e-10)
    expected = differences(lambda x: np_xpo(x, WIN, beta, alpha).sum(), LOGPS)
    assert np.allclose(logps.grad, expected, atol=1e-8)


def trl_xpo(model, ref, model_on_ref, ref_on_ref, chosen, beta, alpha):
    """The sigmoid loss of TRL 0.x's xpo_trainer.py, line by line, in NumPy: its mask of who won
    chooses among sums of log-probs, and alpha weighs the policy's log-prob of the reference's."""
    won = np.where(chosen, model - ref, model_on_ref - ref_on_ref)
    lost = np.where(chosen, model_on_ref - ref_on_ref, model - ref)
    return -np.log(1 / (1 + np.exp(-beta * (won - lost)))) + alpha * model_on_ref


def test_xpo_with_hard_labels_is_trls():
    win = np.array([1.0, 0, 0, 1, 1])
    given = torch.tensor(LOGPS), torch.tensor(REF_LOGPS), torch.tensor(win)
    columns = LOGPS[:, 0], REF_LOGPS[:, 0], LOGPS[:, 1], REF_LOGPS[:, 1]
    expected = trl_xpo(*columns, win == 1, 0.1, 0.05)
    assert np.allclose(lists.xpo_loss(*given, beta=0.1, alpha=0.05), expected, rtol=1e-10)


@pytest.mark.parametrize("soft, win", [(True, [0.9, 0.3, 0.5]), (False, [1, 0, 0.5])])
def test_a_batch_of_xpo(soft, win):
    """Its rows are pairs of the policy's and the reference's; hard labels are rounded."""
    labels = np.array([0.9, 0.3, 0.5])
    said = Compared(np.arange(6), np.arange(6).reshape(3, 2), labels)
    logps, ref = torch.tensor(LOGPS[:3].ravel()), torch.tensor(REF_LOGPS[:3].ravel())
    knobs = train_dpo.Knobs(
        online=True, loss="xpo", beta=0.1, loss_options="alpha=0.2", soft_labels=soft
    )
    batch = Batch(None, ref, said)
    given = None, None, batch, logps, method_of(knobs), knobs
    losses, chosen, rejected = OTHER_LOSSES["xpo"](*given)
    expected = np_xpo(LOGPS[:3], win, 0.1, 0.2)
    assert np.allclose(losses, expected, rtol=1e-6)
    assert chosen.tolist() == [0, 3] and rejected.tolist() == [1, 2]


@pytest.mark.parametrize("temperature", [0.3, 1.0, 5.0])
def test_rwr(temperature):
    logps, rewards = -GENERATOR.uniform(1, 9, (3, 4)), GENERATOR.normal(size=(3, 4))
    mask = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 1, 1]], dtype=bool)
    given = torch.tensor(logps, requires_grad=True)
    more = torch.tensor(rewards), torch.tensor(mask)
    losses = lists.rwr_loss(given, None, *more, temperature=temperature)
    losses.sum().backward()
    assert np.allclose(losses.detach(), np_rwr(logps, rewards, mask, temperature))
    expected = differences(lambda x: np_rwr(x, rewards, mask, temperature).sum(), logps)
    assert np.allclose(given.grad, expected, atol=1e-8)
    whole = lists.rwr_loss(given, None, more[0], temperature=temperature)
    everyone = np.ones_like(mask)
    assert np.allclose(whole.detach(), np_rwr(logps, rewards, everyone, temperature))


def test_rwr_rests_at_the_tilted_reference():
    """Of samples that are just as pi_ref says, nothing pulls at pi_ref exp(r / temperature) / Z."""
    p, r = np.array([0.5, 0.3, 0.2]), np.array([0.0, 1.0, 2.0])
    drawn = np.repeat(np.arange(3), [5, 3, 2])

    def pull(probs):
        logits = torch.tensor(np.log(probs), requires_grad=True)
        logps = logits.log_softmax(0)[drawn][None]
        lists.rwr_loss(logps, None, torch.tensor(r[drawn])[None], temperature=0.8).sum().backward()
        return logits.grad.abs().max().item()

    assert pull(p * np.exp(r / 0.8)) < 1e-12 and pull(p) > 0.1


def test_rewards_of_rwr_are_ratings_in_their_standard_deviations():
    means = np.array([2.0, -1, 0, 2])

    def contexts(across):
        return [[0, 1, 2, 3]]

    items = SimpleNamespace(ratings=[means], means=lambda: means, contexts=contexts,
                            prompts=["a"] * 4, groups=[])  # fmt: skip
    (group,), (rewards,) = ranked_groups(items, 8, 4, np.random.default_rng(0), by_rank=False)
    assert np.allclose(rewards, means[group] / means.std())
    _, (ranks,) = ranked_groups(items, 8, 4, np.random.default_rng(0))
    assert ranks.tolist() == [2, 2, 1, 0]


def test_scores_of_preferences_are_bradley_terrys():
    scores = np.array([[0.3, -1.2, 2.0], [5.0, 5.0, -60.0]])
    p = 1 / (1 + np.exp(scores[:, None] - scores[:, :, None]))
    found = samples.scores_of(torch.tensor(p)).numpy()
    assert np.allclose(found[0] - found[0].mean(), scores[0] - scores[0].mean())
    assert np.isfinite(found).all()  # a sure preference has no infinite worth
    assert found[1, 0] == found[1, 1] > found[1, 2]


@pytest.mark.parametrize("kind", ["xpo", "rwr"])
def test_own_batches_of(kind, monkeypatch):
    """All responses stay, in their order: XPO's are the policy's and the reference's."""
    n, K, R = 3, 2 if kind == "xpo" else 4, 2
    called = []

    def write(model, prompts, lengths, width, **options):
        called.append(model)
        tokens = torch.cat([prompts, torch.full((len(prompts), R), 1 + len(called))], 1)
        return SimpleNamespace(tokens=tokens, response_lengths=torch.full((len(prompts),), R))

    scores = torch.tensor(GENERATOR.normal(size=(n, K)))
    weights = SimpleNamespace(weight=torch.zeros(1))
    policy, reference = SimpleNamespace(wte=weights), SimpleNamespace(wte=weights)
    monkeypatch.setattr(samples, "generate", write)
    monkeypatch.setattr(samples, "all_logps", lambda model, rows: torch.zeros(n * K))
    knobs = train_dpo.Knobs(samples=max(2, K), response_length=R)
    letters = SimpleNamespace(eos=0, pad=9)

    def prefer(tokens, p, r, asked):
        return torch.sigmoid(scores[:, :, None] - scores[:, None])

    prompts = [np.array([0, 5])] * n
    batch = samples.own_batch(policy, reference, prefer, letters, kind, knobs, prompts)
    assert isinstance(batch.rows, Rows) and batch.bought == n * K * (K - 1) / 2
    written = [row.tolist()[2] for row in batch.rows.tokens]
    if kind == "xpo":
        assert called == [policy, reference] and written == [2, 3] * n
        expected = 1 / (1 + np.exp(scores[:, 1] - scores[:, 0]))
        assert np.allclose(batch.said.labels, expected)
    else:
        assert called == [policy]
        assert batch.said.lists.tolist() == np.arange(12).reshape(3, 4).tolist()
        gaps = batch.said.rewards - batch.said.rewards[:, :1]
        assert np.allclose(gaps, scores - scores[:, :1], atol=1e-6) and batch.said.mask.all()


# Best of n


def test_best_of_n_by_brute_force(toy, tmp_path, monkeypatch, capsys):
    """Fixed answers and scores: who is written, the gain and its error."""
    N, n = 4, 3
    scores = [[1.0, 3, 2], [0, 0, -1], [5, 4, 6], [2, 1, 0]]
    flat = [s for row in scores for s in row]
    prompts = []

    def answers(policy, texts, sampling):
        prompts.extend(texts)
        assert sampling.n == n
        found = []
        for i, text in enumerate(t for t in texts for _ in range(n)):
            ended = i != 8  # the best of the third prompt never ended
            empty = "" if i == 9 else f"answer {i}"  # of the fourth
            found.append(replies.Reply(text, empty, [], [], [], 0.0, ended))
        return found

    def scored(judge, policy, found):
        return [reply._replace(score=s) for reply, s in zip(found, flat, strict=True)]

    monkeypatch.setattr(best_of.replies, "replies", answers)
    monkeypatch.setattr(best_of.judging, "scored", scored)
    out = tmp_path / "best.jsonl"
    knobs = dict(source=str(toy / "sft"), prompts=N, n=n, out=str(out))
    figures = best_of.main(best_of.Knobs(reward="true", **knobs))
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert lines == [
        {"prompt": prompts[0], "response": "answer 1"},
        {"prompt": prompts[1], "response": "answer 3"},  # the first of equal ones
    ]
    gains = [max(row) - sum(row) / n for row in scores]
    mean = sum(gains) / N
    spread = math.sqrt(sum((g - mean) ** 2 for g in gains) / (N - 1))
    assert figures["gain"] == pytest.approx(mean)
    assert figures["gain_error"] == pytest.approx(spread / math.sqrt(N))
    assert figures["kl"] == pytest.approx(math.log(3) - 2 / 3)
    assert figures["ties"] == 0.25 and figures["written"] == 2
    said = capsys.readouterr().out
    assert "a gain of 0.833 +- 0.167" in said and "2 left out that had no end or no text" in said
    with pytest.raises(UserError, match="a file lies there already"):
        best_of.main(best_of.Knobs(**knobs))
    more = best_of.main(best_of.Knobs(**knobs | {"out": str(tmp_path / "all.jsonl")}))
    assert more["written"] == 12 and "gain" not in more  # the empty one, too


def test_prompts_of_best_of_n_are_of_the_training_part(toy, tmp_path):
    """Real answers of the toy, each prompt once; the same seed gives the same file."""
    files = []
    for name in ("a", "b"):
        files.append(tmp_path / f"{name}.jsonl")
        knobs = dict(n=2, prompts=40, response_length=8, out=str(files[-1]), seed=3)
        best_of.main(best_of.Knobs(source=str(toy / "sft"), reward=str(toy / "rm"), **knobs))
    assert files[0].read_bytes() == files[1].read_bytes()
    rows = [json.loads(line) for line in files[0].read_text().splitlines()]
    prompts = [row["prompt"] for row in rows]
    assert 10 < len(set(prompts)) == len(prompts) <= 40
    feedback = policies.feedback_of(policies.open_policy(str(toy / "sft"), "cpu"))
    whole = set(feedback.train.responses)
    assert all(any(text.startswith(prompt) for text in whole) for prompt in prompts)


# A tuned policy's own base


def test_kl_of_a_tuned_policy_is_from_its_reference(toy, tmp_path):
    """Two runs of one step of rate 0 from a DPO policy: from itself the KL is 0, from the base
    model it is what the first run had. The policy is what --init says either way."""
    given = dict(data="toy", reward=str(toy / "rm"), response_length=8, eval_samples=32)
    first = train_dpo.main(
        train_dpo.Knobs(init=str(toy / "sft"), out=str(tmp_path / "dpo"), steps=6, lr=2e-3, **given)
    )
    still = dict(init=str(tmp_path / "dpo"), online=True, steps=1, batch_size=4, lr=0.0, **given)
    alone = train_dpo.main(train_dpo.Knobs(out=str(tmp_path / "alone"), **still))
    named = dict(reference=str(toy / "sft"), out=str(tmp_path / "named"), **still)
    both = train_dpo.main(train_dpo.Knobs(**named))
    assert first["eval/kl_after"] > 0.05 and alone["eval/kl_after"] == pytest.approx(0, abs=1e-5)
    assert both["eval/kl_after"] == pytest.approx(first["eval/kl_after"], rel=1e-4)
    assert both["eval/score_after"] == pytest.approx(alone["eval/score_before"], abs=1e-5)
    assert both["eval/score_before"] == pytest.approx(first["eval/score_before"], abs=1e-5)
    margins = []
    for name in ("alone", "named"):
        (row,) = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        margins.append(json.loads(row)["rewards/margins"])
    assert margins[0] == pytest.approx(0, abs=1e-5) and abs(margins[1]) > 1e-4
    seen = policies.open_policy(str(tmp_path / "named"), "cpu")
    assert seen.base == str(toy / "sft")


@pytest.mark.parametrize("flags, says", [
    ("--loss xpo", "add --online"),
    ("--loss xpo --online --mixture 0.5", "mixture"),
    ("--loss xpo --online --samples 4", "samples"),
    ("--loss rrhf --online", "leave out --online"),
    ("--loss rwr --online --group-size 8", "group-size"),
    ("--loss rwr --beta 0.5", "beta"),
    ("--loss simpo --reference runs/sft", "no reference"),
    ("--loss rwr --loss-options alpha=1", "temperature"),
])  # fmt: skip
def test_flags_of_whole(flags, says):
    with pytest.raises(UserError, match=says):
        method_of(parse(train_dpo.Knobs, "", flags.split()))
