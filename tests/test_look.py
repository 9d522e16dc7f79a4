"""What `python -m minirlhf.look` shows: each number against another source, and how it looks."""

import io
import json
import re
import shutil
import subprocess
import sys
import unicodedata
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import train_dpo
import train_ppo
from minirlhf import data, ppo
from minirlhf.engine.cli import UserError
from minirlhf.engine.rows import pad_rows
from minirlhf.feedback.preference_model import PreferenceModel
from minirlhf.feedback.scoring import make_scorer
from minirlhf.gpt import GPT, GPTConfig, RewardModel
from minirlhf.look import chat, command, judging, page, policies, terminal, trace
from minirlhf.look.policies import open_policy
from minirlhf.look.replies import Reply, Sampling, replies
from minirlhf.look.terminal import Piece
from minirlhf.rewards.side_by_side import side_by_side
from minirlhf.tokenizer import Tokenizer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def runs(toy):
    """The folder of the toy's runs, with a ppo and a dpo run that have moved a little."""
    shared = {"data": "toy", "steps": 3, "lr": 3e-3, "eval_samples": 20, "response_length": 8}
    train_ppo.main(train_ppo.Knobs(out=str(toy / "ppo"), batch_size=12, warmup=0.0, **shared))
    train_dpo.main(train_dpo.Knobs(out=str(toy / "dpo"), batch_size=16, **shared))
    return toy


@pytest.fixture(scope="module")
def ppo_policy(runs):
    return open_policy(str(runs / "ppo"), CPU)


def look(*argv):
    """Runs the command here."""
    command.main(command.parse(command.Knobs, command.__doc__, [str(x) for x in argv]))


def samples_of(run):
    return [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]


def log_softmax_loop(model, ids, start, temperature=1.0):
    """log p of each token from `start` on, by NumPy on the logits of the whole row."""
    with torch.no_grad():
        logits = model(torch.tensor([ids]))[0].double().numpy() / temperature
    found = []
    for t in range(start, len(ids)):
        row = logits[t - 1]
        top = row.max()
        found.append(row[ids[t]] - top - np.log(np.exp(row - top).sum()))
    return np.array(found)


# Replies


def test_a_run_answers_as_it_did_when_it_ended(runs):
    for name in ("ppo", "dpo"):
        policy = open_policy(str(runs / name), CPU)
        recorded = samples_of(runs / name)
        prompts = policies.held_out([policy], 20)
        assert prompts == list(dict.fromkeys(row["prompt"] for row in recorded))
        prompts = [row["prompt"] for row in recorded]
        found = replies(policy, prompts, Sampling(8))
        judge = judging.load_judge(policies.reward_beside(policy), policy)
        found = judging.scored(judge, policy, found)
        assert [reply.text for reply in found] == [row["after"] for row in recorded]
        scores = [row["score_after"] for row in recorded]
        np.testing.assert_allclose([reply.score for reply in found], scores, atol=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_numbers_of_tokens(ppo_policy, temperature):
    found = replies(ppo_policy, ["ab", "hhg", ""], Sampling(8, temperature, n=2, seed=3))
    assert [reply.prompt for reply in found] == ["ab", "ab", "hhg", "hhg", "", ""]
    for reply in found:
        ids, start = reply.prompt_ids + reply.ids, len(reply.prompt_ids)
        assert ids[0] == ppo_policy.tokenizer.eos
        logprobs = log_softmax_loop(ppo_policy.model, ids, start, temperature)
        ref_logprobs = log_softmax_loop(ppo_policy.reference, ids, start, temperature)
        ratios = logprobs - ref_logprobs
        assert len(reply.pieces) == len(reply.ids)  # the toy's tokens are letters
        np.testing.assert_allclose([p.logprob for p in reply.pieces], logprobs, atol=1e-4)
        np.testing.assert_allclose([p.ratio for p in reply.pieces], ratios, atol=1e-4)
        assert reply.kl == pytest.approx(ratios.sum(), abs=1e-4)
        assert reply.ended == (reply.ids[-1] == ppo_policy.tokenizer.eos)
    assert max(abs(reply.kl) for reply in found) > 0.01  # else it would show nothing


def test_sampling_has_a_say(ppo_policy):
    def texts(*args, **options):
        return [reply.text for reply in replies(ppo_policy, ["ab"], Sampling(*args, **options))]

    usual = texts(8, n=4)
    assert texts(8, n=4) == usual != texts(8, n=4, seed=1)
    assert len(set(texts(8, top_k=1, n=4))) == 1
    assert texts(8, 0.0) == texts(8, top_k=1)
    assert len(texts(3)[0]) <= 3 < len(max(usual, key=len))
    assert Sampling(8).of(ppo_policy) == 1.0
    assert Sampling(8).of(ppo_policy._replace(knobs={"temperature": 0.3})) == 0.3
    with pytest.raises(UserError, match="context of 64"):
        texts(64)


def test_a_long_prompt_keeps_its_right_end(ppo_policy, capsys):
    prompt = "abcdefgh" * 10
    (reply,) = replies(ppo_policy, [prompt], Sampling(8))
    assert reply.prompt == prompt
    kept = [ppo_policy.tokenizer.eos, *ppo_policy.tokenizer.encode(prompt)[-55:]]  # 56 + 8 = 64
    assert reply.prompt_ids == kept
    assert "the prompt has lost the left end" in capsys.readouterr().out


# Judges


def reply_of(text, prompt="", tokenizer=None):
    eos = [tokenizer.eos] if tokenizer else []
    ids = tokenizer.encode(text) if tokenizer else []
    head = eos + (tokenizer.encode(prompt) if tokenizer else [])
    return Reply(prompt, text, head, ids + eos, [Piece(text)], 0.0, True)


def test_win_rate_by_hand(ppo_policy, tmp_path, monkeypatch):
    (tmp_path / "rule.py").write_text(
        "def score(prompts, responses):\n    return [float(r.count('h')) for r in responses]\n"
    )
    monkeypatch.chdir(tmp_path)
    judge = judging.load_judge("rule.py:score", ppo_policy)
    mine, other = ["hh", "h", "a", "b", "hhh", "a"], ["h", "h", "h", "a", "", "h"]
    sides = []
    for texts in (mine, other):
        found = [reply_of(text, "abc", ppo_policy.tokenizer) for text in texts]
        sides.append((ppo_policy, found))
    scores = [reply.score for reply in judging.scored(judge, *sides[0])]
    assert scores == [2, 1, 0, 0, 3, 0]
    # wins 1, 1/2, 0, 1/2, 1, 0; by prompts of two replies 3/4, 1/4, 1/2
    share, error = judging.win_rate(judge, *sides, 1)
    assert share == 0.5
    assert error == pytest.approx(np.std([1, 0.5, 0, 0.5, 1, 0], ddof=1) / np.sqrt(6))
    share, error = judging.win_rate(judge, *sides, 2)
    assert share == 0.5
    assert error == pytest.approx(0.25 / np.sqrt(3))
    assert np.isnan(judging.win_rate(judge, *[(p, f[:1]) for p, f in sides], 1)[1])


def test_a_judge_with_a_favourite_place_judges_nothing(ppo_policy):
    """Both orders: who always prefers what stands first is even between all."""

    def first(tokens, p, r, K):
        return torch.tensor([[0.5, 0.9], [0.1, 0.5]]).expand(len(tokens) // 2, 2, 2)

    judge = judging.Judge("first", None, first, ppo_policy.tokenizer, CPU, 64)
    sides = [(ppo_policy, [reply_of(t, "", ppo_policy.tokenizer)]) for t in ("ab", "cd")]
    assert judging.win_rate(judge, *sides, 1)[0] == 0.5


def test_preference_model_as_judge(ppo_policy, tmp_path):
    torch.manual_seed(0)
    model = PreferenceModel(GPTConfig(257, 64, 1, 1, 16), 4)
    model.save_pretrained(tmp_path / "pm", ppo_policy.tokenizer)
    judge = judging.load_judge(str(tmp_path / "pm"), ppo_policy)
    texts = ["abc", "hgf", "dd", "e", "aaaa", "hh"], ["h", "gg", "abc", "cc", "b", "ghgh"]
    sides = [[reply_of(t, "ab", ppo_policy.tokenizer) for t in some] for some in texts]
    assert judging.scored(judge, ppo_policy, sides[0]) == sides[0]  # it has no scores
    wins = []
    for one, other in zip(*sides, strict=True):
        rows = [torch.tensor([r.prompt_ids + r.ids]) for r in (one, other)]
        with torch.no_grad():
            a, b = (model.embed(row, torch.tensor([row.shape[1]]))[0] for row in rows)
        logit = sum(a[i] * b[i + 1] - a[i + 1] * b[i] for i in (0, 2))
        wins.append(float(logit > 0))
    assert 0 < np.mean(wins) < 1
    found = judging.win_rate(judge, *[(ppo_policy, side) for side in sides], 1)
    assert found[0] == np.mean(wins)


def test_another_tokenizer_reads_the_text(ppo_policy, tmp_path):
    """A judge with other ids than the policy's has the same text to read, cut to its context."""
    tokenizer = Tokenizer.train(["abcabcabc hhgg abc"] * 5, 262)
    torch.manual_seed(1)
    rm = RewardModel(GPTConfig(tokenizer.vocab_size, 12, 1, 1, 16))
    rm.save_pretrained(tmp_path / "rm", tokenizer)
    judge = judging.load_judge(str(tmp_path / "rm"), ppo_policy)
    texts = ["abcabc", "hg", "deedeedee"]
    found = [reply_of(text, "abcdefdefdef", ppo_policy.tokenizer) for text in texts]
    scores = [reply.score for reply in judging.scored(judge, ppo_policy, found)]
    for text, score in zip(texts, scores, strict=True):
        response = [*tokenizer.encode(text), tokenizer.eos]
        prompt = tokenizer.encode("abcdefdefdef")[-(11 - len(response)) :]
        row = torch.tensor([[tokenizer.eos, *prompt, *response]])
        assert row.shape[1] == 12
        with torch.no_grad():
            expected = rm(row, torch.tensor([12])).item()
        assert score == pytest.approx(expected, abs=1e-5)


# Traces


def rollout_of_train_ppo(policy, knobs, critic, count, reward):
    """(Episodes of train_ppo, those of look) on the same prompts, with the same seed."""
    scorer, rm = make_scorer(knobs, reward, None, policy.tokenizer, policy.reference)
    critic = critic or train_ppo.make_critic(knobs, policy.model, policy.reference, rm)
    texts = policies.held_out([policy], count)
    rows = [torch.tensor([policy.tokenizer.eos, *policy.tokenizer.encode(t)]) for t in texts]
    if knobs.advantage != "gae":
        rows = [row for row in rows for _ in range(knobs.group_size)]
    batch = pad_rows(rows, policy.tokenizer.pad)
    both = []
    for make in (train_ppo.rollout, trace.rollout):
        torch.manual_seed(5)
        args = policy.model, policy.reference, scorer, critic, batch, policy.tokenizer, knobs, 0.1
        with torch.no_grad():
            both.append(make(*args))
    return both[0][0], both[1]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"whiten_rewards": True, "kl_kind": "k3", "gamma": 0.9, "temperature": 0.7},
        {"missing_eos_score": -1.0, "whiten_advantages": False, "critic": "shared", "lam": 0.5},
        {"advantage": "rloo", "group_size": 3, "kl_in": "loss", "kl_kind": "k2"},
        {"advantage": "grpo", "group_size": 2, "top_k": 3, "missing_eos_penalty": 1.5},
        {"stop_at_eos": False, "truncate": "c", "truncate_after": 2, "missing_eos_score": 0.0},
    ],
)
def test_a_traced_rollout_is_that_of_train_ppo(ppo_policy, runs, options):
    knobs = train_ppo.Knobs(data="toy", batch_size=6, response_length=8, **options)
    theirs, mine = rollout_of_train_ppo(ppo_policy, knobs, None, 6, str(runs / "rm"))
    for name in set(theirs._fields) - {"weights"}:
        expected, found = getattr(theirs, name), getattr(mine, name)
        assert (expected is None) == (found is None), name
        if expected is not None:
            assert torch.equal(expected, found), name


def table(text):
    """Rows of a printed table, from the line under its head to the sums: lists of cells."""
    lines = text.splitlines()
    start = next(
        i
        for i, line in enumerate(lines)
        if line.split()[-1:] in (["loss"], ["reward"]) and " ref " in line
    )
    rows = []
    for line in lines[start + 1 :]:
        rows.append(line)
        if line.strip().startswith("sum"):
            return rows
    raise AssertionError("no sums")


def test_trace_by_numpy(runs, ppo_policy, capsys):
    """Every number of the printed table, by loops over logits and a GAE by hand."""
    look(runs / "ppo", "--trace", "--index", 2, "--seed", 4)
    text = capsys.readouterr().out
    rows = [line.split() for line in table(text)]
    knobs = json.loads((runs / "ppo" / "config.json").read_text())
    ids = [int(row[1]) for row in rows[:-1]]
    prompt = policies.held_out([ppo_policy], 3)[2]
    head = [ppo_policy.tokenizer.eos, *ppo_policy.tokenizer.encode(prompt)]
    whole, start = head + ids, len(head)
    logp = log_softmax_loop(ppo_policy.model, whole, start)
    ref = log_softmax_loop(ppo_policy.reference, whole, start)
    row, end = torch.tensor([whole]), torch.tensor([len(whole)])
    critic, _ = critic_by_hand(runs / "ppo" / "state" / "00000003.safetensors")
    with torch.no_grad():
        score = RewardModel.from_pretrained(runs / "rm" / "model").eval()(row, end).item()
        values = critic.values(row)[0, start - 1 : -1].double().numpy()
    rewards = -knobs["kl_coef"] * (logp - ref)
    rewards[-1] += score
    advantages, following, next_value = np.zeros(len(ids)), 0.0, 0.0
    for t in reversed(range(len(ids))):
        delta = rewards[t] + knobs["gamma"] * next_value - values[t]
        following = delta + knobs["gamma"] * knobs["lam"] * following
        advantages[t], next_value = following, values[t]
    returns = advantages + values
    printed = np.array([[float(cell) for cell in row[3:]] for row in rows[:-1]])
    by_hand = [logp, ref, logp - ref, rewards, values, returns]
    np.testing.assert_allclose(printed[:, :6], np.array(by_hand).T, atol=0.006)
    # whitened: one line through all of the raw ones; loss terms from what is printed
    slope, shift = np.polyfit(advantages, printed[:, 6], 1)
    np.testing.assert_allclose(printed[:, 6], slope * advantages + shift, atol=0.02)
    terms = -printed[:, 6] + knobs["vf_coef"] * (values - returns) ** 2 / 2
    np.testing.assert_allclose(printed[:, 7], terms, atol=0.012)
    sums = [float(cell) for cell in rows[-1][1:]]
    np.testing.assert_allclose(sums, [x.sum() for x in by_hand[:4]], atol=0.006)
    assert f"score of the response {score:.3f}" in text
    assert max(map(len, text.splitlines())) <= 80


def test_a_rollout_of_fewer_episodes(runs, capsys):
    """The episode is the same in any rollout; what it is whitened among is not."""
    tables = []
    for n, count in ((0, 12), (4, 4), (1, 2), (99, 12)):
        look(runs / "ppo", "--trace", "--index", 1, "--episodes", n)
        text = capsys.readouterr().out
        assert f"one of a rollout of {count} (12 in training)" in text
        tables.append([line.split() for line in table(text)])
    raw, fewer = ([row[:9] for row in found] for found in tables[:2])
    assert raw == fewer and tables[0] != tables[1] and tables[0] == tables[3]


def critic_by_hand(path):
    """The critic as it lies in a state: all that begins with models/1."""
    tensors = load_file(path)
    prefix = "models/1."
    weights = {k.removeprefix(prefix): w for k, w in tensors.items() if k.startswith(prefix)}
    critic = RewardModel(GPTConfig(257, 64, 2, 2, 64))
    critic.load_state_dict(weights)
    return critic.eval(), weights


def test_where_values_come_from(runs, ppo_policy, tmp_path):
    knobs = trace.knobs_of(ppo_policy)
    rm = RewardModel.from_pretrained(runs / "rm" / "model")
    critic, whose = trace.critic_of(ppo_policy, knobs, rm)
    expected, _ = critic_by_hand(runs / "ppo" / "state" / "00000003.safetensors")
    assert "after step 3" in whose
    ids = torch.arange(40).view(2, 20)
    assert torch.equal(critic.values(ids), expected.values(ids))
    assert not torch.equal(critic.values(ids), rm.values(ids))  # it was trained
    stateless = ppo_policy._replace(run=tmp_path)
    critic, whose = trace.critic_of(stateless, knobs, rm)
    assert "reward model" in whose and torch.equal(critic.values(ids), rm.values(ids))
    critic, whose = trace.critic_of(stateless, knobs, None)
    assert "zeros" in whose and not critic.values(ids).any()
    knobs.advantage = "rloo"
    assert trace.critic_of(ppo_policy, knobs, rm)[0] is None


@pytest.mark.parametrize(
    "changes, penalty",
    [
        ({"data": "reviews"}, 0.5),
        ({}, 0.0),
        ({"data": "reviews", "missing_eos_score": -1.0}, 0.0),
        ({"data": "reviews", "stop_at_eos": False}, 0.0),
        ({"data": "reviews", "missing_eos_penalty": 0.25}, 0.25),
    ],
)
def test_a_run_that_is_older_had_a_penalty_on_the_reviews(ppo_policy, changes, penalty):
    """Its NaN, null in the file, was 0.5 there for what never ended, but beside two switches."""
    older = ppo_policy.knobs | {"missing_eos_penalty": None} | changes
    found = trace.knobs_of(ppo_policy._replace(knobs=older))
    assert found.missing_eos_penalty == penalty


def test_a_shared_critic_is_read_from_its_state(toy, tmp_path, capsys):
    shutil.copytree(toy / "sft", tmp_path / "sft")
    shutil.copytree(toy / "rm", tmp_path / "rm")
    out = tmp_path / "ppo"
    knobs = train_ppo.Knobs(data="toy", out=str(out), steps=1, batch_size=4, response_length=6,
                            eval_samples=4, critic="shared", warmup=0.0, kl_target=3.0)  # fmt: skip
    train_ppo.main(knobs)
    policy = open_policy(str(out), CPU)
    critic, _ = trace.critic_of(policy, trace.knobs_of(policy), None)
    head = load_file(out / "state" / "00000001.safetensors")["models/1.score.weight"]
    assert torch.equal(critic.score.weight, head) and head.any()
    assert critic.transformer is policy.model
    capsys.readouterr()
    look(out, "--trace")
    coef = 0.08 * (1 - 0.2 * 4 / 2560)  # Ziegler et al. 2019, 2.2: the KL was 0, far below 3
    assert f"a nat costs {coef:.4g} at the end" in " ".join(capsys.readouterr().out.split())


def test_the_critic_of_a_reward_model_of_two_is_read_from_its_state(toy, tmp_path, capsys):
    shutil.copytree(toy / "sft", tmp_path / "sft")
    first, second = (RewardModel.from_pretrained(toy / "rm" / "model") for _ in range(2))
    with torch.no_grad():
        second.score.weight.neg_().add_(0.1)
    tokenizer = Tokenizer.load(toy / "sft" / "model")
    side_by_side([first, second]).save_pretrained(tmp_path / "both", tokenizer)
    out = tmp_path / "ppo"
    small = {"steps": 1, "batch_size": 4, "response_length": 6, "eval_samples": 4, "warmup": 0.0}
    reward = str(tmp_path / "both")
    train_ppo.main(train_ppo.Knobs(data="toy", out=str(out), reward=reward, **small))
    expected, _ = critic_by_hand(out / "state" / "00000001.safetensors")
    policy = open_policy(str(out), CPU)
    rm = RewardModel.from_pretrained(tmp_path / "both")
    critic, whose = trace.critic_of(policy, trace.knobs_of(policy), rm)
    ids = torch.arange(40).view(2, 20)
    assert "after step 1" in whose and torch.equal(critic.values(ids), expected.values(ids))
    capsys.readouterr()
    look(out, "--trace")
    assert "the critic after step 1" in " ".join(capsys.readouterr().out.split())


def test_a_pair_by_numpy(runs, capsys):
    look(runs / "dpo", "--trace", "--index", 3)
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    test = data.load_feedback("toy").test
    pair = test.comparisons(4, seed=1)[0][3]
    means = [test.ratings[i].mean() for i in pair]
    assert means[0] > means[1] and f"{means[0]:.2f} and {means[1]:.2f} on average" in text
    policy = open_policy(str(runs / "dpo"), CPU)
    rows = table(text)
    sums, losses = rows[-1].split(), []
    for side, i in enumerate(pair):
        ids = [*policy.tokenizer.encode(test.responses[i]), policy.tokenizer.eos]
        logp = log_softmax_loop(policy.model, [policy.tokenizer.eos, *ids], 1)
        ref = log_softmax_loop(policy.reference, [policy.tokenizer.eos, *ids], 1)
        for t in range(len(ids)):
            cells = rows[t][41 * side :].split()
            assert cells[0] == ("[EOS]" if t == len(ids) - 1 else f"'{test.responses[i][t]}'")
            found = [float(cell) for cell in cells[1:4]]
            expected = [logp[t], ref[t], 0.1 * (logp[t] - ref[t])]
            np.testing.assert_allclose(found, expected, atol=0.006)
        found = [float(cell) for cell in sums[4 * side + 1 : 4 * side + 4]]
        expected = [logp.sum(), ref.sum(), 0.1 * (logp - ref).sum()]
        np.testing.assert_allclose(found, expected, atol=0.006)
        losses.append(expected[2])
    margin = losses[0] - losses[1]
    assert f"margin {margin:.3f}" in text
    assert f"{1 / (1 + np.exp(-margin)):.3f}" in text
    assert f"loss sigmoid of this pair {np.log(1 + np.exp(-margin)):.3f}" in text


# On the terminal

# Columns by hand: two of an ideograph, of kana, of an emoji; none of an accent that combines.
COLUMNS = {"a": 1, "語": 2, "か": 2, "🙂": 2, "ü": 1, "e\u0301": 1, "Ａ": 2, "\u200b": 6, "\x1b": 4,
           "\n": 2, "\x9b": 4, "\u202e": 6, "👍🏽": 12, "\udc80": 6, "\U000e0041": 10}  # fmt: skip


def test_columns_of_characters():
    for text, expected in COLUMNS.items():
        assert terminal.width(terminal.escaped(text)) == expected, ascii(text)
        for room in range(1, 14):
            filled = terminal.padded(terminal.escaped(text) * 3, room)
            assert terminal.width(filled) == room, ascii(text)


@given(st.text(), st.integers(10, 40))
@settings(max_examples=150, deadline=None)
def test_any_text_on_any_width(text, room):
    escaped = terminal.escaped(text)
    assert all(c.isprintable() or unicodedata.category(c) == "Zs" for c in escaped)
    escaped.encode("utf-8")
    for ratio in (0.0, 2.0):
        lines = terminal.shown([Piece(text, 0.0, ratio)], room, False)
        assert all(terminal.width(line) <= room for line in lines)
        if not ratio:  # no marks: all of the text, but for spaces where a line ends
            assert "".join(lines).replace(" ", "") == escaped.replace(" ", "")


def test_an_output_that_has_only_ascii(monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", out)
    assert terminal.escaped("naïve 語🙂") == r"na\xefve \u8a9e\U0001f642"


@given(st.lists(st.integers(0, 256), max_size=30))
@settings(max_examples=200, deadline=None)
def test_pieces_are_the_text(ids):
    """Whatever the bytes: the text is the tokenizer's, and no number is lost at its characters."""
    tokenizer = BYTES
    ids = [i for i in ids if i != tokenizer.eos] + [tokenizer.eos]
    numbers = [0.5 + i for i in range(len(ids))]
    pieces = terminal.pieces_of(ids, numbers, numbers, tokenizer)
    assert "".join(p.text for p in pieces) == tokenizer.decode(ids) + "[EOS]"
    assert sum(p.ratio for p in pieces) == pytest.approx(sum(numbers))
    assert sum(p.logprob for p in pieces) == pytest.approx(sum(numbers))


BYTES = Tokenizer.train([""], 257)


def test_a_character_of_several_tokens():
    ids = BYTES.encode("x語y")
    pieces = terminal.pieces_of(ids, [1, 1, 1, 1, 1], [1, 2, 3, 4, 5], BYTES)
    assert [(p.text, p.ratio) for p in pieces] == [("x", 1), ("語", 9), ("y", 5)]


def test_marks_and_colours():
    words = ("up", 2.0), (" 語", 4.0), (" ab", -1.5), (" cd", -9.0), (" same", 0.9), (" x", None)
    pieces = [Piece(text, 0.0, ratio) for text, ratio in words]
    text, marks = terminal.shown(pieces, 40, False)
    assert text == "up 語 ab cd same x"
    assert marks == "++###---==="
    (coloured,) = terminal.shown(pieces, 40, True)
    ends = "\x1b[0m"
    assert coloured == (
        f"\x1b[36mup{ends}\x1b[30;46m 語{ends}\x1b[35m ab{ends}\x1b[30;45m cd{ends} same x"
    )
    assert terminal.shown([Piece("plain", 0.0, None)], 40, False) == ["plain"]


@pytest.mark.parametrize(
    "value, text",
    [(-0.001, "  0.00"), (1234.567, "1234.6"), (-12345.6, "-12346"), (None, "     -"),
     (float("nan"), "     -"), (123456789.0, " 1e+08"), (float("-inf"), "  -inf")],
)  # fmt: skip
def test_numbers_fit_their_columns(value, text):
    assert terminal.number(value, 6) == text


def test_a_table_is_straight_whatever_the_tokens():
    tokens = ["語", "🙂", "e\u0301", "\x1b[31m", "\u202e", "long" * 9, " ", "\n"]
    tokenizer = SimpleNamespace(
        eos=-1, encoding=SimpleNamespace(decode_single_token_bytes=lambda i: tokens[i].encode())
    )
    for i in range(len(tokens)):
        cell = terminal.padded(trace.token_text(i, tokenizer), 13)
        assert terminal.width(cell) == 13 and cell.isprintable()


# The command


def test_side_by_side(runs, monkeypatch, capsys):
    monkeypatch.chdir(runs)
    look("sft", "ppo", "dpo", "--prompts", 6, "--show", 2, "--n", 2, "--seed", 1)
    text = capsys.readouterr().out
    assert "\x1b" not in text
    assert max(map(terminal.width, text.splitlines())) <= 80
    assert text.count("\nprompt ") == 2
    figures = text[text.index("12 replies each") :]
    assert "wins over sft" in figures and figures.count(" +- 0.") == 2
    policy = open_policy("ppo", CPU)
    prompts = policies.held_out([policy], 6)
    found = replies(policy, prompts, Sampling(8, n=2, seed=1))
    mean = np.mean([reply.kl for reply in found])
    lengths = np.mean([len(reply.ids) for reply in found])
    row = next(line for line in figures.splitlines() if line.startswith("ppo ")).split()
    assert row[3:5] == [f"{mean:.2f}", f"{lengths:.2f}"]


def test_names_by_their_ends():
    for names, expected in (
        (["runs/ppo"], ["ppo"]),
        (["runs/ppo/model"], ["ppo/model"]),
        (["runs/sft", "runs/ppo"], ["sft", "ppo"]),
        (["a/ppo", "b/ppo", "ppo"], ["a/ppo", "b/ppo", "ppo"]),
        (["gpt2", "/x/y/dpo/"], ["gpt2", "dpo"]),
        (["."], ["."]),
    ):
        assert command.short_names([SimpleNamespace(name=name) for name in names]) == expected


def test_prompts_of_ones_own(runs, capsys):
    look(runs / "ppo" / "model", "--prompt", "ab\x1b[2J", "--prompt", "c", "--response-length", 5)
    text = capsys.readouterr().out
    assert r"ab\x1b[2J" in text and "\x1b" not in text
    assert "2 replies each" in text and "score" not in text  # of no run: nothing lies beside it
    look(
        runs / "ppo" / "model",
        "--prompt",
        "c",
        "--reward",
        runs / "rm",
        "--reference",
        runs / "sft",
    )
    text = capsys.readouterr().out
    assert "score" in text and " KL " in text
    look(runs / "ppo", "--prompt", "c", "--reward", "none", "--reference", "none")
    text = capsys.readouterr().out
    assert "score" not in text and " KL " not in text


def test_true_reward_scores(runs, capsys):
    look(runs / "ppo", "--reward", "true", "--prompts", 9)
    row = capsys.readouterr().out.split(" each ")[1].splitlines()[1]
    policy = open_policy(str(runs / "ppo"), CPU)
    prompts = policies.held_out([policy], 9)
    texts = [reply.text for reply in replies(policy, prompts, Sampling(8))]
    assert f"{np.mean(data.toy_reward(prompts, texts)):.2f}" in row


def test_a_run_without_samples_reads_its_data(runs, tmp_path, capsys):
    shutil.copytree(runs / "ppo", tmp_path / "ppo")
    (tmp_path / "ppo" / "samples.jsonl").unlink()
    policy = open_policy(str(tmp_path / "ppo"), CPU)
    assert "without log-ratios" in capsys.readouterr().out and policy.reference is None
    recorded = [row["prompt"] for row in samples_of(runs / "ppo")]
    assert policies.held_out([policy], 20) == recorded
    gone = policy._replace(knobs=policy.knobs | {"data": "gone.jsonl"})
    with pytest.raises(UserError, match="its data cannot be read any more.*gone.jsonl"):
        policies.held_out([gone], 20)
    with pytest.raises(UserError, match="its data cannot be read any more"):
        judging.load_judge("true", gone)
    with pytest.raises(UserError, match="no reward model lies beside it"):
        look(tmp_path / "ppo", "--trace")


def test_a_changed_base_model_is_named(runs, tmp_path, capsys):
    for name in ("sft", "ppo"):
        shutil.copytree(runs / name, tmp_path / name)
    open_policy(str(tmp_path / "ppo"), CPU)
    assert capsys.readouterr().out == ""
    model = GPT.from_pretrained(tmp_path / "sft" / "model")
    torch.nn.init.zeros_(model.wpe.weight)
    model.save_pretrained(tmp_path / "sft" / "model")
    open_policy(str(tmp_path / "ppo"), CPU)
    assert "is not the base model any more" in capsys.readouterr().out


def test_paths_are_from_where_the_run_was_made(tmp_path, monkeypatch):
    run = tmp_path / "made" / "runs" / "x" / "ppo"
    run.mkdir(parents=True)
    (tmp_path / "made" / "bases").mkdir()
    knobs = {"out": "runs/x/ppo", "init": "bases"}
    monkeypatch.chdir(tmp_path)
    found = policies.base_of(Path("made/runs/x/ppo"), "ppo", knobs)
    assert Path(found).resolve() == (tmp_path / "made" / "bases").resolve()
    monkeypatch.chdir(tmp_path / "made")
    assert policies.base_of(Path("runs/x/ppo"), "ppo", knobs) == "bases"
    assert policies.base_of(Path("runs/x/ppo"), "ppo", knobs | {"init": "gpt2"}) == "gpt2"
    assert policies.base_of(Path("runs/x/ppo"), "ppo", knobs | {"init": ""}) == "runs/x/sft"
    assert policies.base_of(Path("runs/x/sft"), "sft", knobs | {"init": ""}) is None


@pytest.mark.parametrize(
    "argv, message",
    [
        (["RUNS/rm"], "a reward or preference model lies here.*--reward"),
        (["RUNS/rm/model", "--prompt", "a"], "a reward or preference model lies here"),
        (["RUNS"], "neither a run nor a model"),
        (["RUNS/ppo/model"], "no held-out prompts: give a --prompt"),
        (["RUNS/sft", "--trace"], "expected a ppo or a dpo run"),
        (["RUNS/ppo", "RUNS/dpo", "--trace"], "of one run"),
        (["RUNS/ppo", "RUNS/ppo"], "given twice"),
        (["RUNS/ppo", "--chat", "--trace"], "give one of them"),
        (["RUNS/ppo", "--chat", "--html", "x"], "leave out --chat"),
        (["RUNS/ppo", "--index", "1"], "is for --trace"),
        (["RUNS/ppo", "--trace", "--index", "999"], "expected 0 to"),
        (["RUNS/ppo", "--response-length", "64"], "context of 64"),
        (["RUNS/ppo", "--reward", "RUNS/rm.py:f"], "no file"),
        (["RUNS/ppo", "--prompts", "0"], "--prompts 0: expected at least 1"),
        (["RUNS/ppo", "--wrong"], "unrecognized arguments"),
        ([], "required: RUN"),
    ],
)
def test_what_the_user_can_mend(runs, argv, message):
    with pytest.raises(UserError, match=message) as caught:
        look(*[arg.replace("RUNS", str(runs)) for arg in argv])
    assert "\n" not in str(caught.value)


def test_a_run_that_was_stopped(runs, tmp_path):
    shutil.copytree(runs / "ppo", tmp_path / "ppo")
    shutil.rmtree(tmp_path / "ppo" / "model")
    with pytest.raises(UserError, match="a run without a model yet.*--resume"):
        look(tmp_path / "ppo")


def test_chat_is_a_dialogue(runs, monkeypatch, capsys):
    asked = []
    said = iter([" Hi.\n\nHuman: me", " Yes."])

    def answer(policy, prompts, sampling, say):
        asked.append((prompts[0], sampling.seed))
        text = next(said)
        return [Reply(prompts[0], text, [], [], [Piece(c) for c in text], 0.0, True)]

    monkeypatch.setattr(chat, "replies", answer)
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n\n  and you? \n"))
    look(runs / "ppo", "--chat", "--seed", 7)
    first = "\n\nHuman: hello\n\nAssistant:"
    assert asked == [(first, 7), (f"{first} Hi.\n\nHuman: and you?\n\nAssistant:", 8)]
    assert capsys.readouterr().out == "> hello\n Hi.\n> and you?\n Yes.\n"
    said = iter(["A", "B"])
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello"))
    look(runs / "ppo", runs / "dpo", "--chat")
    assert asked[2][0] == asked[3][0] == first
    assert capsys.readouterr().out == "> hello\nppo: A\ndpo: B\n"


# The page


class Reader(HTMLParser):
    """What a browser would make of a page: open tags, attributes, the visible text."""

    def __init__(self, html):
        super().__init__()
        self.open, self.attributes, self.texts = [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.attributes += [(tag, *pair) for pair in attributes]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if "style" not in self.open:
            self.texts.append(text)


def test_the_page_stands_alone(runs, tmp_path, capsys):
    file = tmp_path / "look.html"
    hostile = "<script>alert(1)</script>&amp;\x1b\u202e\"'"
    look(runs / "ppo", runs / "dpo", "--prompt", hostile, "--prompt", "ab", "--html", file)
    html = file.read_text(encoding="utf-8")
    reader = Reader(html)
    assert not reader.open
    text = "".join(reader.texts)
    assert hostile.replace("\x1b", r"\x1b").replace("\u202e", r"\u202e") in text
    assert "\x1b" not in html and "<script" not in html
    names = {name for _, name, _ in reader.attributes}
    assert not names & {"src", "href", "onload", "onclick"} and "url(" not in html
    assert "prefers-color-scheme" in html or "color-scheme: light dark" in html
    assert "@media print" in html
    policy = open_policy(str(runs / "ppo"), CPU)
    for reply in replies(policy, [hostile, "ab"], Sampling(8)):
        written = "".join(p.text for p in reply.pieces)
        written = re.sub(r"[\x00-\x08\x0e-\x1f]", lambda c: rf"\x{ord(c[0]):02x}", written)
        assert written in text
        for piece in reply.pieces:
            title = f"log-ratio {piece.ratio:+.2f}, log-prob {piece.logprob:.2f}"
            assert ("span", "title", title) in reader.attributes
    printed = capsys.readouterr().out
    row = next(line for line in printed.splitlines() if line.startswith("ppo ")).split()
    assert row[1] in text


def test_colours_of_the_page():
    assert page.colour(2.5) == "rgba(var(--up),0.30)"
    assert page.colour(-9) == "rgba(var(--down),0.60)"
    assert page.colour(0) == "rgba(var(--down),0.00)"
    assert page.visible("👍🏽 e\u0301 می\u200cخواهم\x00") == "👍🏽 e\u0301 می\u200cخواهم\\x00"


def test_the_program_in_a_pipe(runs):
    """No colours, and nothing imported that takes seconds and is not needed."""
    check = (
        "import runpy, sys\n"
        "runpy.run_module('minirlhf.look', run_name='__main__')\n"
        "slow = {'torch._dynamo', 'triton', 'matplotlib', 'transformers'} & sys.modules.keys()\n"
        "assert not slow, slow\n"
    )
    environment = {"PATH": "/usr/bin", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": "."}
    root = Path(__file__).parent.parent
    command_line = [sys.executable, "-c", check, str(runs / "ppo"), "--show", "1"]
    done = subprocess.run(command_line, capture_output=True, text=True, cwd=root, env=environment)
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout and "16 replies each" in done.stdout


@pytest.mark.parametrize("mean", ppo.LOSS_MEANS)
def test_traced_losses_count_as_in_training(mean, ppo_policy, runs):
    """Their mean over all tokens is the loss of the rollout as one minibatch."""
    options = {"advantage": "rloo", "group_size": 3, "loss_mean": mean, "kl_in": "loss"}
    knobs = train_ppo.Knobs(
        data="toy", batch_size=6, response_length=8, kl_kind="k3", skip_flat=True, **options
    )
    theirs, mine = rollout_of_train_ppo(ppo_policy, knobs, None, 6, str(runs / "rm"))
    mb = train_ppo.minibatch(theirs, torch.arange(len(theirs.tokens)), knobs, 0)
    mask = torch.arange(8) < mb.response_lengths[:, None]
    loss, _ = train_ppo.losses(mb.logprobs, None, mb, mask, knobs, 0.1)
    terms = [trace.loss_terms(mine, row, 0.1, knobs) for row in range(len(mine.tokens))]
    assert torch.cat(terms).mean().item() == pytest.approx(loss.item(), abs=1e-6)
