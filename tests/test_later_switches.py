"""What papers after PPO's changed, a switch each: its value, and that it changes that alone."""

import json
import math
from functools import partial

import numpy as np
import pytest
import torch
from test_switches import CPU, PLAIN, Stage, response, scores, train

import train_ppo
from minirlhf import ppo
from minirlhf.engine import curves
from minirlhf.engine.cli import UserError
from minirlhf.engine.rows import mean_step
from minirlhf.feedback.checks import check_ppo, kl_target_of
from minirlhf.feedback.scoring import charge_unended

GRPO = dict(advantage="grpo", group_size=4, kl_coef=0.0)
RNG = np.random.default_rng(0)
LENGTHS = [5, 1, 3, 5, 2, 4]
OLD, NEW = -RNG.random((6, 5)) * 2, -RNG.random((6, 5)) * 2
ADVANTAGES = RNG.normal(size=(6, 1))
MASK = torch.arange(5) < torch.tensor(LENGTHS)[:, None]


@pytest.fixture(autouse=True)
def no_plots(monkeypatch):
    monkeypatch.setattr(curves, "plot", lambda *_: None)  # a second each


def double(x):
    return torch.tensor(np.asarray(x), dtype=torch.float64)


def loss_of(**options):
    return ppo.policy_loss(double(NEW), double(OLD), double(ADVANTAGES), MASK, **options)


def clipped_terms(low, high, by_response):
    """-min(ratio A, clip(ratio) A) of each response's tokens, by loops."""
    terms = []
    for b, n in enumerate(LENGTHS):
        logs = [NEW[b, t] - OLD[b, t] for t in range(n)]
        logs = [sum(logs) / n] * n if by_response else logs
        held = [min(max(math.exp(u), 1 - low), 1 + high) for u in logs]
        a = ADVANTAGES[b, 0]
        terms.append([-min(math.exp(u) * a, r * a) for u, r in zip(logs, held, strict=True)])
    return terms


@pytest.mark.parametrize("level", ["token", "response"])
@pytest.mark.parametrize("high", [None, 0.5])
def test_the_upper_clip_and_the_ratio_of_a_response(level, high):
    terms = clipped_terms(0.2, high or 0.2, level == "response")
    loss, stats = loss_of(clip_high=high, level=level)
    assert loss.item() == pytest.approx(np.mean(sum(terms, [])), abs=1e-12)
    plain = clipped_terms(math.inf, math.inf, level == "response")
    clipped = np.mean(np.array(sum(terms, [])) > np.array(sum(plain, [])))
    assert stats["ppo/policy/clipfrac"].item() == pytest.approx(clipped) and clipped > 0


def test_tokens_of_a_response_share_its_ratio():
    small = {"level": "response", "clip": 10.0}
    new = double(NEW).requires_grad_()
    ppo.policy_loss(new, double(OLD), double(ADVANTAGES), MASK, **small)[0].backward()
    for b, n in enumerate(LENGTHS):  # a response's tokens share its ratio, and so their gradient
        assert new.grad[b, :n].unique().numel() == 1 and not new.grad[b, n:].any()


@pytest.mark.parametrize("counts", [[1, 1, 1, 1, 1, 1], [1, 0, 1, 0, 0, 1]])
@pytest.mark.parametrize("kind", ppo.LOSS_MEANS)
def test_what_a_token_counts(kind, counts):
    terms = clipped_terms(0.2, 0.2, False)
    kept = [term for term, count in zip(terms, counts, strict=True) if count]
    expected = {
        "token": np.mean(sum(kept, [])),
        "response": np.mean([np.mean(term) for term in kept]),
        "constant": sum(map(sum, kept)) / (len(kept) * 5),
    }
    lengths, counts = torch.tensor(LENGTHS), double(counts)
    weights = ppo.token_weights(lengths, 5, kind, counts)
    assert weights.shape == (6, 1)
    assert loss_of(weights=weights)[0].item() == pytest.approx(expected[kind], abs=1e-12)
    if kind == "token" and counts.all():
        assert (weights == 1).all()  # to the bit
    nothing = ppo.token_weights(lengths, 5, kind, torch.zeros(6))
    assert (nothing == 0).all()


def test_flat_responses():
    scores = torch.tensor([1.0, 1.0, 0.1 + 0.2, 0.3, 2.0, 3.0])
    assert ppo.flat_responses(scores, 2).tolist() == [True] * 4 + [False] * 2
    assert ppo.flat_responses(scores, 3).tolist() == [False] * 6
    assert ppo.flat_responses(scores, 1).tolist() == [False] * 6


# In the script: what one update by gradient descent takes from each weight


def alike(a, b, atol=1e-7):
    return all(torch.allclose(a[name], b[name], atol=atol) for name in a)


def moved(toy, episodes=None, **changes):
    stage = Stage(toy, **GRPO | changes)
    return stage.update(episodes or stage.rollout()[0])[0]


@pytest.mark.parametrize("kind", ppo.LOSS_MEANS)
def test_the_mean_of_a_loss_is_the_same_in_parts(kind, toy):
    whole, parts = (moved(toy, loss_mean=kind, micro_batch=m) for m in (0, 5))
    assert alike(whole, parts, 1e-6)
    assert alike(whole, moved(toy, micro_batch=0)) == (kind == "token")


def flat_rule(tmp_path):
    """A reward that is alike for the answers to some prompts, and not to others."""
    (tmp_path / "rule.py").write_text(
        "def score(prompts, responses):\n"
        "    return [len(r) * (len(p) % 2) for p, r in zip(prompts, responses)]\n"
    )
    return f"{tmp_path}/rule.py:score"


def grouped(stage):
    """The stage's prompts, each four times."""
    stage.batch = [x[:8].repeat_interleave(4, 0) for x in stage.batch]
    return stage


def test_groups_without_spread_are_counted_and_can_be_left_out(toy, tmp_path):
    rule = dict(reward=flat_rule(tmp_path), kl_in="loss", kl_kind="k3") | GRPO | dict(kl_coef=0.5)
    stage = grouped(Stage(toy, **rule))
    with torch.no_grad():
        stage.policy.h[0].mlp.c_fc.weight.mul_(1.1)  # so that the KL is not 0
    episodes, stats = stage.rollout()
    prompts = [int(episodes.prompt_lengths[b]) - 1 for b in range(32)]
    texts = [stage.tokenizer.decode(episodes.tokens[b, 1 : 1 + n]) for b, n in enumerate(prompts)]
    even = [len(text) % 2 == 0 for text in texts]
    answers = [response(episodes, b) for b in range(32)]
    same = [len({len(stage.tokenizer.decode([i for i in answers[c] if i != 256]))
                 for c in range(b - b % 4, b - b % 4 + 4)}) == 1 for b in range(32)]  # fmt: skip
    flat = [a or b for a, b in zip(even, same, strict=True)]
    assert stats["objective/flat_groups"] == pytest.approx(np.mean(flat))
    assert 0 < sum(flat) < 32
    keep = torch.tensor([not x for x in flat])
    left_out = episodes._replace(weights=keep.float())
    alone = type(episodes)(*(None if x is None else x[keep] for x in episodes))
    policy = {name: w.clone() for name, w in stage.policy.state_dict().items()}
    found = []
    for some in (left_out, alone, episodes):
        stage.policy.load_state_dict(policy)
        found.append(stage.update(some)[0])
    assert alike(found[0], found[1], 1e-6) and not alike(found[0], found[2], 1e-6)
    stage.policy.load_state_dict(policy)
    stage.knobs.skip_flat = True
    assert torch.equal(stage.rollout()[0].weights, left_out.weights)


def test_where_all_groups_are_flat_nothing_moves(toy, tmp_path):
    (tmp_path / "one.py").write_text("def score(p, r):\n    return [1.0] * len(r)\n")
    stage = grouped(Stage(toy, reward=f"{tmp_path}/one.py:score", skip_flat=True, **GRPO))
    episodes, stats = stage.rollout()
    assert stats["objective/flat_groups"] == 1
    found, stats = stage.update(episodes)
    assert not any(w.any() for w in found.values()) and all(map(math.isfinite, stats.values()))


def test_a_penalty_is_taken_off_what_never_ended(toy):
    off, on = (Stage(toy, missing_eos_penalty=c, **PLAIN).rollout()[0] for c in (0.0, 2.5))
    unended = torch.tensor([256 not in response(off, b) for b in range(32)])
    assert 0 < unended.sum() < 32
    torch.testing.assert_close(scores(on), scores(off) - 2.5 * unended)


@pytest.mark.parametrize(
    "data, switches, target",
    [
        ("reviews", {}, 8.3),
        ("reviews", {"kl_target": 0.0}, 0.0),
        ("toy", {}, 0.0),
        ("mine.jsonl", {"kl_target": 6.0}, 6.0),
    ],
)
def test_what_the_kl_is_steered_to_by_default(data, switches, target):
    assert kl_target_of(train_ppo.Knobs(data=data, **switches)) == target


@pytest.mark.parametrize(
    "switches, score",
    [({}, 2.0), ({"missing_eos_penalty": 0.25}, 1.75), ({"missing_eos_score": -1.0}, -1.0)],
)
def test_what_the_unended_have(switches, score):
    knobs = train_ppo.Knobs(**switches)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    given = torch.tensor([[0.0, 3.0, 0.0], [0.0, 0.0, 2.0]])
    found = charge_unended(given, torch.tensor([True, False]), mask, knobs)
    assert found.tolist() == [[0, 3, 0], [0, 0, score]]


def test_the_entropy_bonus_is_the_gradient_of_the_mean_entropy(toy):
    plain, bonus = (moved(toy, entropy_coef=c) for c in (0.0, 0.3))
    stage = Stage(toy, **GRPO)
    episodes, _ = stage.rollout()
    total = 0  # of softmax over the whole vocabulary, at each response token
    for b in range(32):
        logits = stage.policy(episodes.tokens[b : b + 1])[0]
        p, r = int(episodes.prompt_lengths[b]), int(episodes.response_lengths[b])
        logp = logits[p - 1 : p + r - 1].log_softmax(1)
        total = total - (logp.exp() * logp).sum()
    (total / episodes.response_lengths.sum()).backward()
    for name, weight in stage.policy.named_parameters():
        rise = plain[f"0.{name}"] - bonus[f"0.{name}"]  # what the bonus adds, uphill
        torch.testing.assert_close(rise, 0.3 * weight.grad, atol=2e-6, rtol=1e-3)


def test_the_critic_can_be_ahead(toy):
    stage = Stage(toy, critic_warmup=3, entropy_coef=0.1)
    episodes, _ = stage.rollout()
    for step, moves in ((2, False), (3, True)):
        mb = train_ppo.minibatch(episodes, torch.arange(32), stage.knobs, step)
        assert mb.weights.any() == moves
    found, _ = stage.update(episodes)  # of step 0
    assert not any(w.any() for name, w in found.items() if name.startswith("0."))
    assert all(w.any() for name, w in found.items() if name == "1.score.weight")
    plain, _ = Stage(toy).update(episodes)
    assert all(torch.equal(w, plain[n]) for n, w in found.items() if n.startswith("1."))


def test_a_policy_that_waits_has_no_steps_behind_it(toy):
    """Adam's first step after the warm-up is as large as a first step is."""
    stage = Stage(toy, critic_warmup=1)
    episodes, _ = stage.rollout()
    optimizer = torch.optim.Adam(stage.models().parameters(), lr=1e-3)
    step = partial(mean_step, stage.models(), optimizer, stage.knobs, CPU, None)
    args = stage.policy, stage.critic, episodes, step, stage.knobs, stage.knobs.kl_coef
    train_ppo.update(*args, 0)
    assert not any(p in optimizer.state for p in stage.policy.parameters())
    assert all(p in optimizer.state for p in stage.critic.parameters() if p.requires_grad)
    train_ppo.update(*args, 1)
    assert all(p in optimizer.state for p in stage.policy.parameters())


@pytest.mark.parametrize("limit, passes", [(0.0, 4), (1e-9, 2), (1e9, 4)])
def test_passes_stop_where_the_policy_has_moved_enough(limit, passes, toy):
    """The ratios of a first pass of one step are 1, so that the second is the first that can."""
    stage = Stage(toy, ppo_epochs=4, stop_kl=limit)
    episodes, _ = stage.rollout()
    _, stats = stage.update(episodes, ppo_epochs=4, minibatches=1)
    assert stats["ppo/optimizer_steps"] == passes


def test_switches_go_through_a_run_and_processes_agree(toy, tmp_path):
    all_on = dict(advantage="grpo", clip_high=0.28, ratio="response", loss_mean="response",
                  entropy_coef=0.01, stop_kl=0.5, ppo_epochs=2, skip_flat=True,
                  missing_eos_penalty=1.0, kl_in="loss", kl_kind="k3")  # fmt: skip
    rows = train(toy, tmp_path, **all_on)
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert {"objective/flat_groups", "ppo/optimizer_steps"} <= rows[0].keys()
    assert json.loads((tmp_path / "config.json").read_text())["ratio"] == "response"


@pytest.mark.parametrize("given, said", [
    (dict(ratio="response"), "--ratio response"),
    (dict(critic_warmup=1, critic="shared"), "--critic-warmup"),
    (dict(missing_eos_penalty=1.0, missing_eos_score=-1.0), "--missing-eos-penalty"),
    (dict(skip_flat=True), "skip-flat"),
    (dict(critic_warmup=2, advantage="rloo"), "critic-warmup"),
    (dict(stop_kl=0.1, ppo_epochs=1), "stop-kl"),
    (dict(clip_high=0.3, ppo_epochs=1, minibatches=1), "clip-high"),
])  # fmt: skip
def test_what_has_no_say_is_refused(given, said):
    with pytest.raises(UserError, match=said):
        check_ppo(train_ppo.Knobs(**given))
