"""Every switch of PPO changes what it says and nothing else: the check that belongs to each
published detail."""

import json
import math
import re
import shlex
from functools import partial

import numpy as np
import pytest
import torch

import train_ppo
from minirlhf import data, ppo
from minirlhf.engine import cli, curves, machine, optim, parallel
from minirlhf.engine.cli import UserError
from minirlhf.engine.rows import mean_step, pad_rows
from minirlhf.feedback import labelers
from minirlhf.feedback.scoring import make_scorer
from minirlhf.gpt import GPT
from minirlhf.look import alarms
from minirlhf.sampling import generate
from minirlhf.tokenizer import Tokenizer

R = 8
BASE = dict(data="toy", response_length=R, kl_coef=0.1)
CPU = machine.precision(torch.device("cpu"), "float32")


@pytest.fixture(autouse=True)
def no_plots(monkeypatch):
    monkeypatch.setattr(curves, "plot", lambda *_: None)  # a second each


class Stage:
    """The toy's models, fresh, and one rollout of 32 prompts."""

    def __init__(self, toy, **changes):
        self.knobs = knobs = train_ppo.Knobs(**BASE | {"reward": str(toy / "rm")} | changes)
        self.tokenizer = Tokenizer.load(toy / "sft" / "model")
        self.policy, self.reference = (GPT.from_pretrained(toy / "sft" / "model") for _ in range(2))
        self.feedback = data.load_feedback("toy")
        function = labelers.find_function(knobs.reward, self.feedback)
        self.scorer, self.rm = make_scorer(
            knobs, knobs.reward, function, self.tokenizer, self.reference
        )
        self.critic = train_ppo.make_critic(knobs, self.policy, self.reference, self.rm)
        prompts = data.prompts_of(self.feedback.train, self.tokenizer, np.random.default_rng(0))[
            :32
        ]
        self.batch = pad_rows(prompts, self.tokenizer.pad)

    def rollout(self):
        torch.manual_seed(0)
        with torch.no_grad():
            return train_ppo.rollout(
                self.policy,
                self.reference,
                self.scorer,
                self.critic,
                self.batch,
                self.tokenizer,
                self.knobs,
                self.knobs.kl_coef,
            )

    def models(self):
        return parallel.Together(self.policy, self.critic)

    def update(self, episodes, **changes):
        """What one update by plain gradient descent takes from each weight, and the statistics."""
        before = {name: w.detach().clone() for name, w in self.models().named_parameters()}
        optimizer = torch.optim.SGD(self.models().parameters(), lr=1.0)
        knobs = train_ppo.Knobs(
            **vars(self.knobs) | {"max_grad_norm": 0.0, "ppo_epochs": 1, "minibatches": 1} | changes
        )
        torch.manual_seed(1)
        step = partial(mean_step, self.models(), optimizer, knobs, CPU, None)
        stats = train_ppo.update(self.policy, self.critic, episodes, step, knobs, knobs.kl_coef)
        return {
            name: before[name] - w.detach() for name, w in self.models().named_parameters()
        }, stats


PLAIN = dict(
    kl_coef=0.0, lam=1.0, whiten_advantages=False
)  # then the return of the first token is the score


def scores(episodes):
    return episodes.returns[:, 0]


def response(episodes, b):
    p, r = episodes.prompt_lengths[b], episodes.response_lengths[b]
    return episodes.tokens[b, p : p + r].tolist()


def knobs(**changes):
    return train_ppo.Knobs(**BASE | changes)


def double(x):
    return torch.tensor(x, dtype=torch.float64)


def close(actual, expected, atol=1e-10):
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), rtol=1e-10, atol=atol)


def metrics(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def train(toy, out, **changes):
    """The metrics of a short run."""
    small = dict(
        init=str(toy / "sft"),
        reward=str(toy / "rm"),
        steps=2,
        batch_size=8,
        eval_samples=4,
        out=str(out),
    )
    train_ppo.main(train_ppo.Knobs(**BASE | small | changes))
    return metrics(out)


# The published recipes

LAUNCHES = [
    shlex.split(line, comments=True)[2:]
    for line in re.findall(
        r"^ +(python train_ppo.py .*)$", train_ppo.__doc__.replace("\\\n", " "), re.M
    )
]
COMMON = dict(
    temperature=0.7,
    top_k=0,
    missing_eos_score=-1,
    kl_kind="k1",
    kl_in="reward",
    whiten_advantages=True,
    gamma=1,
    lam=0.95,
    clip=0.2,
    value_clip=0.2,
    vf_coef=0.1,
    ppo_epochs=4,
    minibatches=1,
    max_grad_norm=0,
    adam_eps=1e-5,
    warmup=0,
    lr_schedule="linear",
    advantage="gae",
    batch_size=512,
)
RECIPES = [
    COMMON
    | dict(
        response_length=24,
        stop_at_eos=False,
        truncate=".",
        truncate_after=16,
        whiten_rewards=True,
        kl_coef=0.15,
        kl_target=6,
        kl_horizon=10000,
        critic="shared",
        lr=1e-5,
    ),
    COMMON
    | dict(
        response_length=53,
        stop_at_eos=True,
        truncate="",
        whiten_rewards=False,
        kl_coef=0.05,
        kl_target=0,
        critic="own",
        lr=3e-6,
    ),
]


@pytest.mark.parametrize("recipe", range(2))
def test_published_recipes_are_launch_lines(recipe, toy, tmp_path):
    launches = [line for line in LAUNCHES if "--lam" in line]
    assert len(LAUNCHES) == 6 and len(launches) == 2
    given = cli.parse(train_ppo.Knobs, "", launches[recipe])
    assert {key: getattr(given, key) for key in RECIPES[recipe]} == RECIPES[recipe]
    assert 0 <= 1_000_000 - given.steps * given.batch_size < given.batch_size
    small = {
        "data": "toy",
        "init": str(toy / "sft"),
        "reward": str(toy / "rm"),
        "steps": 2,
        "batch_size": 8,
        "eval_samples": 4,
    }
    train_ppo.main(train_ppo.Knobs(**vars(given) | small | {"out": str(tmp_path)}))
    assert all(math.isfinite(value) for row in metrics(tmp_path) for value in row.values())


# 1 rollout


def test_temperature_on_one_side_only_moves_the_first_ratio(toy):
    stage = Stage(toy, temperature=0.5)
    episodes, stats = stage.rollout()
    assert abs(stats["objective/kl"]) < 1e-4
    right, wrong = (stage.update(episodes, temperature=t)[1] for t in (0.5, 1.0))
    assert (
        right["ppo/policy/first_ratio"] == pytest.approx(1, abs=1e-4)
        and right["ppo/policy/first_approxkl"] < 1e-6
    )
    assert (
        abs(wrong["ppo/policy/first_ratio"] - 1) > 1e-2
        and wrong["ppo/policy/first_approxkl"] > 0.01
    )


@pytest.mark.parametrize(
    "variant",
    [dict(), dict(critic="shared"), dict(advantage="grpo")],
    ids=["gae", "shared", "grpo"],
)
def test_models_read_a_rollout_in_parts(variant, toy, monkeypatch):
    """At most --micro-batch rows at a time, which changes no number."""
    found, hidden = [], GPT.hidden
    for micro_batch in (0, 5):
        stage, seen = Stage(toy, micro_batch=micro_batch, **variant), []

        def spy(model, idx, cache=None, lengths=None, at=None, seen=seen):
            seen += [len(idx)] if cache is None else []  # with a cache it is the sampler
            return hidden(model, idx, lengths, cache, at)

        generate(stage.policy, *stage.batch, 1, eos=-1, pad=0)  # tried before its first use
        monkeypatch.setattr(GPT, "hidden", spy)
        found.append(stage.rollout())
        models = 3 if variant.get("advantage") else 4  # policy, reference, reward model and critic
        assert max(seen) == (micro_batch or 32) and sum(seen) == 32 * models
    (whole, stats), (parts, same) = found
    for a, b in zip(whole, parts, strict=True):
        assert a is b is None or torch.allclose(a.double(), b.double(), atol=1e-5)
    for key in stats:
        assert same[key].item() == pytest.approx(stats[key].item(), rel=1e-4, abs=1e-5), key


@pytest.mark.parametrize("k", [0, 2])
def test_top_k_narrows_the_sampler(k, toy):
    stage = Stage(toy, top_k=k)
    episodes, _ = stage.rollout()
    ranks = []
    for b in range(32):
        logits = stage.policy(episodes.tokens[b : b + 1])[0]
        start = episodes.prompt_lengths[b] - 1
        ranks += [
            int((logits[start + t] > logits[start + t, token]).sum())
            for t, token in enumerate(response(episodes, b))
        ]
    assert (max(ranks) < 2) == (k == 2)


@pytest.mark.parametrize("k", [0, 2])
def test_top_k_is_warned_about(k, toy, tmp_path, capsys):
    train(toy, tmp_path, top_k=k, steps=1)
    assert ("note: --top-k 2" in capsys.readouterr().out) == (k == 2)


def test_without_stopping_the_tokens_up_to_eos_are_the_same(toy):
    (stopped, stats), (full, full_stats) = (
        Stage(toy, stop_at_eos=stop, **PLAIN).rollout() for stop in (True, False)
    )
    eos = 256
    ends = [response(full, b).index(eos) + 1 if eos in response(full, b) else R for b in range(32)]
    assert (
        (full.response_lengths == R).all()
        and stopped.response_lengths.tolist() == ends
        and min(ends) < R
    )
    assert all(response(full, b)[: ends[b]] == response(stopped, b) for b in range(32))
    assert stats["objective/ended"] == full_stats["objective/ended"]
    torch.testing.assert_close(
        scores(full), scores(stopped), atol=1e-5, rtol=1e-5
    )  # what follows EOS is hidden from the scorer


def test_dropout_makes_the_first_kl_nonzero(toy):
    stage = Stage(toy)
    assert abs(stage.rollout()[1]["objective/kl"]) < 1e-4
    stage.policy = GPT.from_pretrained(toy / "sft" / "model", dropout=0.1).train()
    assert abs(stage.rollout()[1]["objective/kl"]) > 1e-3


# 2 score


@pytest.mark.parametrize("level", ["response", "token"])
def test_missing_eos_score_replaces_unfinished_rows_only(level, toy, tmp_path):
    (tmp_path / "rule.py").write_text(
        "def response(prompts, responses):\n    return [len(r) / 3 for r in responses]\n"
        "def token(prompts, responses):\n    return [[1 / 3] * len(r) for r in responses]\n"
    )
    given = PLAIN | {"reward": f"{tmp_path}/rule.py:{level}", "reward_level": level}
    (off, _), (on, stats) = (
        Stage(toy, missing_eos_score=c, **given).rollout() for c in (math.nan, -3.0)
    )
    unfinished = torch.tensor([256 not in response(off, b) for b in range(32)])
    assert 0 < unfinished.sum() < 32
    assert torch.equal(scores(on), torch.where(unfinished, -3.0, scores(off)))
    assert stats["objective/score"] == pytest.approx(scores(on).mean().item(), abs=1e-5)
    assert (
        on.returns[unfinished] == -3
    ).all()  # on the last token: every token before it has it to come


def hand(toy, tmp_path, texts, **changes):
    """What a function that records its arguments sees of the given responses, and what the scorer
    says."""
    (tmp_path / "seen.py").write_text(
        "import json\n"
        "def rate(prompts, responses):\n"
        f"    json.dump(responses, open({str(tmp_path / 'seen.json')!r}, 'w'))\n"
        "    return [7.0 + i for i in range(len(responses))]\n"
    )
    stage = Stage(toy, reward=f"{tmp_path}/seen.py:rate", **changes)
    letters = {"$": [256]} | {c: stage.tokenizer.encode(c) for c in "abc"}
    rows = [np.array([256, 70, 71, *(i for c in text for i in letters[c])]) for text in texts]
    tokens, lengths = pad_rows(rows, stage.tokenizer.pad)
    scored, ended = stage.scorer(tokens, torch.full_like(lengths, 3), lengths - 3)
    return json.loads((tmp_path / "seen.json").read_text()), scored, ended.tolist()


def test_truncate_hides_what_follows_the_token(toy, tmp_path):
    """$ is EOS. The c at position 1 or 2 comes before --truncate-after, so only a later one
    counts."""
    texts = ["abcabc", "acaacaac", "abcab$", "cccc", "c"]
    seen, scored, ended = hand(
        toy, tmp_path, texts, truncate="c", truncate_after=3, missing_eos_score=-1.0
    )
    assert seen == ["abcabc", "acaac", "abcab", "cccc", "c"] and ended == [
        True,
        True,
        False,
        True,
        False,
    ]
    expected = np.zeros((5, R))
    expected[range(5), [len(text) - 1 for text in texts]] = [
        7,
        8,
        9,
        10,
        11,
    ]  # still on the last token, hidden or not
    close(scored, expected)
    seen, _, ended = hand(toy, tmp_path, texts, truncate="c", missing_eos_score=-1.0)
    assert seen == ["abc", "ac", "abc", "c", "c"] and all(ended)
    seen, _, ended = hand(toy, tmp_path, texts)
    assert seen == ["abcabc", "acaacaac", "abcab", "cccc", "c"] and ended == [
        False,
        False,
        True,
        False,
        False,
    ]


def test_truncate_moves_the_reward_model_and_the_training_stays_whole(toy):
    stage = Stage(toy, truncate="d", missing_eos_score=-9.0, stop_at_eos=False, **PLAIN)
    episodes, stats = stage.rollout()
    (d,) = stage.tokenizer.encode("d")
    assert (episodes.response_lengths == R).all()
    for b in range(32):
        text, p = response(episodes, b), int(episodes.prompt_lengths[b])
        score = -9.0
        if d in text:
            row = episodes.tokens[b : b + 1, : p + text.index(d) + 1]
            score = stage.rm(row, torch.tensor([row.shape[1]])).item()
        assert scores(episodes)[b] == pytest.approx(score, abs=1e-4)
    assert 0 < stats["objective/ended"] < 1
    assert (episodes.advantages != 0).float().mean() > 0.9


@pytest.mark.parametrize(
    "level,rule,expected",
    [
        ("token", "[[(t == 'h') - 0.5 for t in r] for r in responses]", None),
        ("token", "[[1.0] for r in responses]", "a finite float for each token"),
        ("response", "[1.0]", "a finite float for each response"),
        ("response", "[float('nan') for r in responses]", "a finite float for each response"),
    ],
)
def test_python_rewards_by_token(level, rule, expected, toy, tmp_path):
    (tmp_path / "rule.py").write_text(f"def rate(prompts, responses):\n    return {rule}\n")
    stage = Stage(
        toy,
        reward=f"{tmp_path}/rule.py:rate",
        reward_level=level,
        gamma=0.0,
        whiten_advantages=False,
        kl_coef=0.0,
    )
    if expected:
        with pytest.raises(UserError, match=expected):
            stage.rollout()
        return
    episodes, stats = stage.rollout()
    h = stage.tokenizer.encode("h")[0]
    by_hand = [[(token == h) - 0.5 for token in response(episodes, b)] for b in range(32)]
    for b, row in enumerate(
        by_hand
    ):  # without discounting and with a critic of zeros, a return is the reward of its token
        close(episodes.returns[b], row + [0] * (R - len(row)))
    assert stats["objective/score"] == pytest.approx(np.mean([sum(row) for row in by_hand]))


def test_a_reward_model_knows_its_level(toy, monkeypatch):
    whole = labelers.load_reward_model

    def by_token(*args):
        rm = whole(*args)
        rm.level, rm.shift = "token", 0.5
        return rm

    with pytest.raises(UserError, match="scores by the response"):
        Stage(toy, reward_level="token")
    monkeypatch.setattr(labelers, "load_reward_model", by_token)
    with pytest.raises(UserError, match="scores by the token"):
        Stage(toy, reward_level="response")
    stage = Stage(toy)
    episodes, _ = stage.rollout()
    scored, _ = stage.scorer(*episodes[:3])
    for b in range(32):
        p, r = episodes.prompt_lengths[b], episodes.response_lengths[b]
        values = stage.rm.values(episodes.tokens[b : b + 1, : p + r])[
            0, p:
        ].tolist()  # each at its own token
        values[-1] += 0.5  # the constant of a response is paid at its end
        np.testing.assert_allclose(scored[b].detach(), values + [0] * (R - int(r)), atol=1e-5)


def test_a_function_of_a_module(tmp_path, monkeypatch):
    (tmp_path / "own_rewards").mkdir()
    (tmp_path / "own_rewards" / "__init__.py").write_text("")
    (tmp_path / "own_rewards" / "rules.py").write_text(
        "def rate(prompts, responses):\n    return [1.0] * len(responses)\n"
    )
    monkeypatch.chdir(tmp_path)
    assert labelers.load_function("own_rewards.rules", "rate")([""], ["x"]) == [1.0]
    for module, name, message in (
        ("own_rewards.rules", "nothing", "no function nothing"),
        ("own_rewards.none", "rate", "No module"),
    ):
        with pytest.raises(UserError, match=message):
            labelers.load_function(module, name)


def test_a_module_by_flag(toy, tmp_path, monkeypatch):
    (tmp_path / "flag_rewards.py").write_text(
        "def rate(prompts, responses):\n    return [5.0] * len(responses)\n"
    )
    monkeypatch.chdir(tmp_path)
    assert Stage(toy, reward="flag_rewards:rate").rollout()[1]["objective/score"] == 5


# 3 to 6: experience

MASK = torch.tensor([[True, True, False], [True, True, True]])
LOGPROBS, REF = double([[-1, -2, 0], [-1, -1, -2]]), double([[-2, -1, 0], [-1, -3, -3]])
SCORES, VALUES = double([3, -1]), double([[1, 2, 0], [0, 1, 1]])
BY_HAND = knobs(
    lam=0.5, whiten_advantages=False
)  # gamma 1, KL coefficient 0.1; k1 = [[1, -1], [0, 2, 1]]


def test_the_example_by_hand_in_one_piece():
    for pad in (0, 9, 1e6):  # whatever the padding holds
        logprobs, ref, values = (
            torch.where(MASK, x, pad * s) for x, s in ((LOGPROBS, 1), (REF, -0.9), (VALUES, 5))
        )
        rewards, advantages, returns = experience(SCORES, logprobs, ref, values, MASK, BY_HAND, 0.1)
        close(rewards, [[-0.1, 3.1, 0], [0, -0.2, -1.1]])
        close(advantages, [[1.45, 1.1, 0], [0.375, -1.25, -2.1]])
        close(returns, [[2.45, 3.1, 0], [0.375, -0.25, -1.1]])
    # the score one token earlier is another example
    moved = torch.zeros(2, 3, dtype=torch.float64).index_put(
        (torch.arange(2), torch.tensor([0, 1])), SCORES
    )
    assert not torch.allclose(
        experience(moved, LOGPROBS, REF, VALUES, MASK, BY_HAND, 0.1)[1], advantages
    )


def test_token_scores_stay_at_their_tokens():
    earned = double([[1, 2, 8], [3, 4, 5]])  # the 8 is padding
    rewards, _, _ = experience(earned, LOGPROBS, REF, VALUES, MASK, BY_HAND, 0.1)
    close(rewards, [[0.9, 2.1, 0], [3, 3.8, 4.9]])


@pytest.mark.parametrize(
    "kind,kl",
    [
        ("k1", [1, -1, 0, 2, 1]),
        ("k2", [0.5, 0.5, 0, 2, 0.5]),
        ("k3", [math.exp(-1), math.exp(1) - 2, 0, math.exp(-2) + 1, math.exp(-1)]),
    ],
)
def test_kl_kind_in_the_reward(kind, kl):
    rewards, _, _ = experience(0 * SCORES, LOGPROBS, REF, VALUES, MASK, knobs(kl_kind=kind), 2.0)
    close(rewards[MASK], [-2 * x for x in kl])


def test_kl_in_the_loss_leaves_the_reward_alone():
    rewards, _, _ = experience(
        SCORES, LOGPROBS, REF, VALUES, MASK, knobs(kl_in="loss", kl_kind="k3"), 1e3
    )
    assert torch.equal(rewards, double([[0, 3, 0], [0, 0, -1]]))


def experience(scores, logprobs, ref_logprobs, values, mask, knobs, kl_coef):
    """Steps 3, 4 and 6 of the script on a given rollout: (rewards, advantages, returns)."""
    kl = ppo.kl_estimate(logprobs, ref_logprobs, knobs.kl_kind)
    rewards = train_ppo.token_rewards(scores, kl, mask, knobs, kl_coef)
    return rewards, *train_ppo.token_advantages(rewards, values, mask, knobs)


def random_rollout(B=6, width=5, seed=0):
    rng = np.random.default_rng(seed)
    mask = torch.arange(width) < torch.tensor([5, 1, 3, 2, 5, 4])[:B, None]
    return (
        torch.from_numpy(rng.normal(size=B)),
        *(torch.from_numpy(rng.normal(size=(B, width))) * mask for _ in range(3)),
        mask,
    )


def test_whitened_rewards_keep_their_mean():
    *rollout, mask = random_rollout()
    plain, _, _ = experience(*rollout, mask, knobs(), 0.1)
    white, _, _ = experience(*rollout, mask, knobs(whiten_rewards=True), 0.1)
    assert plain[mask].mean().item() == pytest.approx(white[mask].mean().item(), abs=1e-6)
    assert white[mask].std(correction=0).item() == pytest.approx(1, abs=1e-6) and plain[
        mask
    ].std() != pytest.approx(1, abs=0.05)
    assert (white[~mask] == 0).all()


def test_whitened_advantages_have_population_variance_one():
    *rollout, mask = random_rollout()
    (rewards, plain, returns), (same, white, also) = (
        experience(*rollout, mask, knobs(whiten_advantages=on), 0.1) for on in (False, True)
    )
    assert torch.equal(rewards, same) and torch.equal(
        returns, also
    )  # returns are those before whitening
    real = plain[mask].numpy()
    close(white[mask], (real - real.mean()) / np.sqrt(real.var() + 1e-8))
    close((plain + rollout[3])[mask], returns[mask])


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_lambda_0_is_delta_and_lambda_1_is_reward_to_go(gamma):
    *rollout, mask = random_rollout()
    values = rollout[3]
    for lam in (0.0, 1.0):
        rewards, advantages, _ = experience(
            *rollout, mask, knobs(lam=lam, gamma=gamma, whiten_advantages=False), 0.1
        )
        for b, n in enumerate(mask.sum(1).tolist()):
            for t in range(n):
                after = values[b, t + 1].item() if t + 1 < n else 0.0
                delta = rewards[b, t].item() + gamma * after
                to_go = sum(gamma ** (i - t) * rewards[b, i].item() for i in range(t, n))
                assert advantages[b, t].item() == pytest.approx(
                    (to_go if lam else delta) - values[b, t].item(), abs=1e-10
                )


@pytest.mark.parametrize("kind", ["rloo", "grpo", "reinforce"])
def test_group_kinds_spread_a_shaped_total(kind):
    given, logprobs, ref, _, mask = random_rollout()
    group = knobs(advantage=kind, group_size=3)
    rewards, advantages, returns = experience(given, logprobs, ref, None, mask, group, 0.3)
    total = given.numpy() - 0.3 * ((logprobs - ref) * mask).sum(1).numpy()
    close(rewards.sum(1), total)
    assert returns is None
    for b in range(6):
        mates = [total[i] for i in range(3 * (b // 3), 3 * (b // 3) + 3)]
        others = [total[i] for i in range(3 * (b // 3), 3 * (b // 3) + 3) if i != b]
        by_hand = {
            "rloo": total[b] - np.mean(others),
            "reinforce": total[b] - np.mean(mates),
            "grpo": (total[b] - np.mean(mates)) / (np.std(mates, ddof=1) + 1e-4),
        }[kind]
        close(advantages[b], [by_hand if real else 0 for real in mask[b]])
    in_loss = knobs(advantage=kind, group_size=3, kl_in="loss", kl_kind="k2")
    close(experience(given, logprobs, ref, None, mask, in_loss, 0.3)[0].sum(1), given)
    close(advantages.numpy()[:, 0].reshape(2, 3).sum(1), [0, 0])


@pytest.mark.parametrize("kind", ["rloo", "grpo", "reinforce"])
def test_group_kinds_have_no_critic(kind, toy, tmp_path, monkeypatch):
    batches, optimizers = [], []
    rollout, make = train_ppo.rollout, optim.make_optimizer
    monkeypatch.setattr(
        train_ppo, "rollout", lambda *args: batches.append(args[4]) or rollout(*args)
    )
    monkeypatch.setattr(
        optim,
        "make_optimizer",
        lambda *args, **more: optimizers.append(make(*args, **more)) or optimizers[-1],
    )
    rows = train(toy, tmp_path, advantage=kind, group_size=4)
    for tokens, lengths in batches:
        assert (
            len(tokens) == 8
            and (tokens.view(2, 4, -1) == tokens.view(2, 4, -1)[:, :1]).all()
            and len(set(lengths.tolist())) <= 2
        )
        assert not torch.equal(tokens[0], tokens[4])
    policy = GPT.from_pretrained(toy / "sft" / "model")
    assert sum(len(g["params"]) for g in optimizers[0].param_groups) == len(
        list(policy.parameters())
    )
    assert not any("val/" in key or "returns" in key for row in rows for key in row)
    assert all(math.isfinite(value) for row in rows for value in row.values())


# KL control


def test_a_larger_coefficient_ends_nearer_the_base_model(toy, tmp_path, capsys):
    longer = dict(steps=10, batch_size=32, lr=2e-3)
    loose, tight = (train(toy, tmp_path / str(c), kl_coef=c, **longer) for c in (0.0, 1.0))
    by_loss = train(toy, tmp_path / "loss", kl_coef=1.0, kl_in="loss", kl_kind="k2", **longer)
    end = [np.mean([row["objective/kl"] for row in rows[-3:]]) for rows in (loose, tight, by_loss)]
    assert end[1] < 0.5 * end[0] and end[2] < 0.5 * end[0]
    assert "alarm" not in capsys.readouterr().out  # healthy runs


@pytest.mark.parametrize(
    "place", [dict(kl_in="reward"), dict(kl_in="loss", kl_kind="k2")], ids=["reward", "loss"]
)
def test_adaptive_kl_follows_its_rule_in_both_places(place, toy, tmp_path, monkeypatch):
    losses, used = train_ppo.losses, []
    monkeypatch.setattr(train_ppo, "losses", lambda *args: used.append(args[5]) or losses(*args))
    rows = train(
        toy,
        tmp_path,
        steps=5,
        kl_target=0.5,
        kl_horizon=20,
        lr=1e-2,
        ppo_epochs=1,
        minibatches=1,
        **place,
    )
    assert used == pytest.approx([row["objective/kl_coef"] for row in rows], rel=1e-5)
    coef = 0.1
    for row in rows:
        assert row["objective/kl_coef"] == pytest.approx(coef, rel=1e-5)
        coef *= 1 + min(max(row["objective/kl"] / 0.5 - 1, -0.2), 0.2) * 8 / 20
    assert len({round(row["objective/kl_coef"], 6) for row in rows}) > 2


# 5 and 7: critic and update


def test_own_critic_starts_as_the_reward_model(toy):
    stage = Stage(toy)
    episodes, _ = stage.rollout()
    last = episodes.prompt_lengths + episodes.response_lengths - 1
    values = stage.critic.values(episodes.tokens).gather(1, last[:, None]).squeeze(1)
    torch.testing.assert_close(values, stage.scorer(*episodes[:3])[0].sum(1), atol=1e-5, rtol=1e-5)
    assert stage.critic is not stage.rm


def test_values_are_those_of_the_state_before_each_token(toy, monkeypatch):
    """In the rollout, each row alone; and in the update, the same numbers before anything has
    moved."""
    stage = Stage(toy)
    episodes, _ = stage.rollout()
    for b in range(32):
        p, r = int(episodes.prompt_lengths[b]), int(episodes.response_lengths[b])
        values = stage.critic.values(episodes.tokens[b : b + 1, : p + r])[
            0, p - 1 : p + r - 1
        ].tolist()
        np.testing.assert_allclose(episodes.values[b], values + [0] * (R - r), atol=1e-5)
    seen, losses = [], train_ppo.losses
    monkeypatch.setattr(train_ppo, "losses", lambda *args: seen.append(args) or losses(*args))
    stage.update(episodes, micro_batch=8)
    for logprobs, values, mb, mask, *_ in seen:
        torch.testing.assert_close(values[mask], mb.values[mask], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(logprobs, mb.logprobs, atol=1e-5, rtol=1e-5)
    assert len(seen) == 4


def test_shared_critic_is_a_head_on_the_policy(toy):
    stage = Stage(toy, critic="shared")
    assert stage.critic.transformer is stage.policy
    episodes, _ = stage.rollout()
    assert (episodes.values == 0).all()
    optimizer = optim.make_optimizer(stage.models(), 1e-3)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(held) == len({id(p) for p in held}) == len(list(stage.policy.parameters())) + 1
    moved, stats = stage.update(episodes)
    assert stats["ppo/grad_norm"] == pytest.approx(
        math.sqrt(sum((g.double() ** 2).sum().item() for g in moved.values())), rel=1e-4
    )
    assert moved["1.score.weight"].abs().max() > 0
    stage.update(episodes)  # from a head that is no longer 0, the value loss reaches the trunk
    without, _ = stage.update(episodes, vf_coef=0.0)
    again = Stage(toy, critic="shared")
    for _ in range(2):
        again.update(episodes)
    with_value, _ = again.update(episodes)
    assert not torch.allclose(with_value["0.wte.weight"], without["0.wte.weight"])


def test_what_is_saved_is_the_policy_whatever_the_critic(toy, tmp_path):
    train(toy, tmp_path, critic="shared", steps=1)
    saved = GPT.from_pretrained(
        tmp_path / "model"
    )  # strict: no more and no fewer weights than a GPT's
    base = GPT.from_pretrained(toy / "sft" / "model")
    assert saved.config == base.config and not torch.equal(saved.wte.weight, base.wte.weight)


@pytest.mark.parametrize("critic", ["own", "shared"])
def test_value_weight_of_zero_leaves_the_critic(critic, toy):
    stage = Stage(toy, critic=critic)
    moved, _ = stage.update(stage.rollout()[0], vf_coef=0.0)
    name = "1.score.weight"
    assert not moved[name].any() and stage.update(stage.rollout()[0], vf_coef=0.1)[0][name].any()


VARIANTS = [
    dict(),
    dict(critic="shared"),
    dict(advantage="grpo", kl_in="loss", kl_kind="k3", whiten_rewards=False),
]


@pytest.mark.parametrize("variant", VARIANTS, ids=["gae", "shared", "grpo"])
def test_micro_batches_and_padding_do_not_change_the_gradient(variant, toy):
    """32 ragged rows in 1, 2 and 4 parts; then with other tokens in the padding."""
    stage = Stage(toy, **variant)
    with torch.no_grad():
        for p in stage.reference.parameters():  # so that there is a KL
            p.mul_(0.9)
    episodes, _ = stage.rollout()
    assert len(set(episodes.response_lengths.tolist())) > 3
    start = {k: w.clone() for k, w in stage.models().state_dict().items()}
    real = (
        torch.arange(episodes.tokens.shape[1])
        < (episodes.prompt_lengths + episodes.response_lengths)[:, None]
    )
    other = episodes._replace(
        tokens=torch.where(real, episodes.tokens, torch.randint_like(episodes.tokens, 250))
    )
    results = []
    for given, micro in [(episodes, 0), (episodes, 16), (episodes, 8), (other, 8)]:
        stage.models().load_state_dict(start)
        results.append(stage.update(given, micro_batch=micro))
    whole, whole_stats = results[0]
    for moved, stats in results[1:]:
        for name in whole:
            torch.testing.assert_close(moved[name], whole[name], atol=2e-6, rtol=1e-4)
        for key in whole_stats:
            assert stats[key] == pytest.approx(whole_stats[key].item(), rel=1e-4, abs=1e-5), key


def test_optimizer_steps_and_shuffles(toy, monkeypatch):
    """Epochs times minibatches steps; each epoch sees every row once, in an order of its own."""
    stage = Stage(toy)
    episodes, _ = stage.rollout()
    episodes = episodes._replace(
        advantages=torch.arange(32.0)[:, None].expand(32, R)
    )  # rows by number
    steps, losses = [[]], train_ppo.losses

    def spy(logprobs, values, minibatch, *rest):
        steps[-1] += minibatch.advantages[:, 0].int().tolist()
        return losses(logprobs, values, minibatch, *rest)

    monkeypatch.setattr(train_ppo, "losses", spy)
    monkeypatch.setattr(optim, "optimizer_step", lambda *args: steps.append([]) or (0.0, 0.0))
    stage.update(episodes, ppo_epochs=3, minibatches=4, micro_batch=3)
    steps.pop()
    assert len(steps) == 12 and all(len(rows) == 8 for rows in steps)
    epochs = [steps[i : i + 4] for i in (0, 4, 8)]
    assert all(sorted(sum(epoch, [])) == list(range(32)) for epoch in epochs)
    assert len({tuple(sorted(epoch[0])) for epoch in epochs}) == 3


def test_gradient_clipping(toy):
    stage = Stage(toy)
    episodes, _ = stage.rollout()

    def norm(max_grad_norm):
        moved, stats = stage.update(episodes, max_grad_norm=max_grad_norm)
        return math.sqrt(sum((g.double() ** 2).sum().item() for g in moved.values())), stats[
            "ppo/grad_norm"
        ].item()

    clipped, before = norm(0.01)
    assert (
        clipped == pytest.approx(0.01, rel=1e-3) and before > 0.02
    )  # the norm before clipping is what is logged
    free, before = norm(0.0)
    assert free == pytest.approx(before, rel=1e-3) and free > 0.02


@pytest.mark.parametrize("eps", [1e-5, 1e-2])
def test_adam_epsilon_sets_the_first_step(eps):
    """With m/(1-b1) = g and v/(1-b2) = g^2, the first step is lr g / (|g| + eps)."""
    model = torch.nn.Linear(3, 1, bias=False)
    before, g = model.weight.detach().clone(), torch.tensor([[1e-3, -1e-5, 2.0]])
    optimizer = optim.make_optimizer(model, 0.1, betas=(0.9, 0.999), eps=eps)
    model.weight.grad = g.clone()
    optimizer.step()
    torch.testing.assert_close(
        before - model.weight.detach(), 0.1 * g / (g.abs() + eps), atol=1e-6, rtol=1e-3
    )


def rates(steps, **options):
    optimizer, result = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0), []
    for step in range(steps):
        optim.set_lr(optimizer, step, steps, 2.0, **options)
        result.append(optimizer.param_groups[0]["lr"])
    return result


def test_learning_rate_schedules():
    N = 48
    assert rates(N, warmup=0.0) == pytest.approx(
        [2 * (1 - (u - 1) / N) for u in range(1, N + 1)], rel=1e-14
    )
    assert rates(N, warmup=0.0, schedule="constant") == [2.0] * N
    assert rates(N, warmup=0.0, schedule="cosine") == pytest.approx(
        [1 + math.cos(math.pi * t / N) for t in range(N)], abs=1e-12
    )
    main_job = [2 * (t + 1) / 9 for t in range(9)] + [
        2 * (48 - t) / 39 for t in range(9, 48)
    ]  # nine steps up
    assert rates(48, warmup=0.2) == main_job
    for schedule in ("constant", "cosine"):
        warm = rates(48, warmup=0.2, schedule=schedule)
        assert warm[:9] == main_job[:9] and warm[9] == 2.0
    assert rates(48, warmup=0.2, schedule="cosine")[28] == pytest.approx(
        1 + math.cos(math.pi * 19 / 39)
    )
    assert rates(1) == rates(1, warmup=0.0) == [2.0]


def test_the_schedule_is_the_runs(toy, tmp_path, monkeypatch):
    seen = []
    set_lr = optim.set_lr

    def spy(optimizer, *args):
        set_lr(optimizer, *args)
        seen.append(optimizer.param_groups[0]["lr"])

    monkeypatch.setattr(optim, "set_lr", spy)
    train(toy, tmp_path, steps=4, warmup=0.0, lr=1e-3, lr_schedule="linear")
    assert seen == pytest.approx([1e-3, 0.75e-3, 0.5e-3, 0.25e-3])


# Mistakes and alarms

MISTAKES = [
    (dict(kl_in="loss"), "--kl-kind k2 or k3"),
    (dict(advantage="rloo", group_size=1), "--group-size 1"),
    (dict(advantage="grpo", batch_size=6), "--batch-size 6"),
    (dict(advantage="grpo", whiten_rewards=True), "--whiten-rewards"),
    (dict(truncate="a"), "--missing-eos-score"),
    (dict(truncate="ab", missing_eos_score=-1.0), "2 tokens"),
    (dict(truncate="a", missing_eos_score=-1.0, truncate_after=R), "--truncate-after"),
    (dict(top_k=-1), "--top-k -1"),
]


@pytest.mark.parametrize("flags,message", MISTAKES)
def test_senseless_switches_are_refused(flags, message, toy, tmp_path):
    with pytest.raises(UserError, match=message):
        train(toy, tmp_path, **flags)
    assert not (tmp_path / "metrics.jsonl").exists()


def history(steps=30, **series):
    """Rows of a healthy run, with some series replaced by functions of the step."""
    rng = np.random.default_rng(0)
    noise = rng.normal(size=steps)
    healthy = {
        "objective/kl": lambda i: 0.4 * i + 0.3 * noise[i],
        "objective/score": lambda i: 0.05 * i,
        "objective/entropy": lambda i: 95 - i / 2,
        "objective/response_length": lambda i: 17 + i / 6,
        "objective/ended": lambda i: 0.9 - i / 40,
        "ppo/policy/first_approxkl": lambda i: 1e-6,
        "ppo/val/explained_variance": lambda i: -0.3 + 0.2 * min(i, 5) + 0.01 * noise[i],
    }
    series = healthy | {
        next(key for key in healthy if key.endswith(name)): f for name, f in series.items()
    }
    return [{key: float(f(i)) for key, f in series.items()} for i in range(steps)], noise


def raised(rows):
    return [text.split()[0] for n in range(1, len(rows) + 1) for text in alarms.alarms(rows[:n])]


def test_alarms_are_silent_on_healthy_runs():
    rows, noise = history()
    assert raised(rows) == []
    near_zero, _ = history(
        kl=lambda i: 0.01 + 0.05 * noise[i]
    )  # a policy that hardly moves: single steps are negative
    assert min(row["objective/kl"] for row in near_zero) < 0 and raised(near_zero) == []
    assert (
        raised([{key: row[key] for key in row if "val" not in key} for row in rows]) == []
    )  # no critic


@pytest.mark.parametrize(
    "name,series",
    [
        ("KL", dict(kl=lambda i: -0.3 - 0.02 * i)),
        ("ratio", dict(first_approxkl=lambda i: 0.02)),
        ("entropy", dict(entropy=lambda i: 95 * 0.8**i)),
        (
            "score",
            dict(
                response_length=lambda i: 10 + 3 * i,
                ended=lambda i: 0.9 * 0.9**i,
                entropy=lambda i: 50 + 15 * i,
            ),
        ),
        ("explained", dict(explained_variance=lambda i: -0.2)),
    ],
)
def test_each_alarm_has_its_sign(name, series):
    assert set(raised(history(**series)[0])) == {name}


def test_an_alarm_is_printed_once(toy, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_ppo, "alarms", lambda rows: ["smoke"] if len(rows) > 1 else [])
    train(toy, tmp_path, steps=4)
    assert re.findall(r"alarm at step \d+: smoke", capsys.readouterr().out) == [
        "alarm at step 1: smoke"
    ]


def test_an_alarm_is_not_repeated_by_a_resumed_run(toy, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_ppo, "alarms", lambda rows: ["smoke"] if len(rows) > 1 else [])
    rollout, calls = train_ppo.rollout, []

    def broken_off(*args):
        calls.append(args)
        if len(calls) == 4:
            raise RuntimeError("power cut")
        return rollout(*args)

    monkeypatch.setattr(train_ppo, "rollout", broken_off)
    with pytest.raises(RuntimeError, match="power cut"):
        train(toy, tmp_path, steps=6, save_every=1)
    assert "alarm at step 1: smoke" in capsys.readouterr().out
    train(toy, tmp_path, steps=6, save_every=1, resume=True)
    out = capsys.readouterr().out
    assert "going on after 3 of 6 steps" in out and "smoke" not in out
