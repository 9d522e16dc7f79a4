"""Numbers that differ by rounding alone are no signal, and small differences that are real are one.

Expected values by NumPy in float64, on the numbers as they are.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_train_dpo import some_rows, tiny

import train_rm
from minirlhf import data
from minirlhf.data import all_logps, stored_logps
from minirlhf.feedback import labelers
from minirlhf.feedback.preference_model import PreferenceModel
from minirlhf.gpt import GPTConfig, RewardModel
from minirlhf.look.episodes import explained_variance
from minirlhf.ppo import group_advantages, whiten
from minirlhf.reward import normalization

MANY = settings(max_examples=200, deadline=None, derandomize=True)


def sums_in_other_orders(n=24, scale=0.1):
    """The same n numbers added up in other orders, in fp32: (32,)."""
    rng = np.random.default_rng(n)
    x = (scale * rng.random(n)).astype(np.float32)
    sums = [np.cumsum(x[rng.permutation(n)], dtype=np.float32)[-1] for _ in range(32)]
    return torch.tensor(np.array(sums))


def noise_of_an_ulp(size):
    rng = np.random.default_rng(1)
    x = np.full(32, size, np.float32)
    return torch.tensor(x + np.spacing(x) * rng.integers(-1, 2, 32).astype(np.float32))


ALIKE = {
    "0.1, other orders": sums_in_other_orders(),
    "8 numbers, other orders": sums_in_other_orders(8, 1e4),
    "1e6": noise_of_an_ulp(1e6), "-3e-7": noise_of_an_ulp(-3e-7), "1": noise_of_an_ulp(1),
    "all 0.1": torch.full((32,), 0.1), "all 0": torch.zeros(32), "1e30": noise_of_an_ulp(1e30),
    "double": torch.full((32,), 0.3).double() + 1e-16 * (torch.arange(32) % 2),
}  # fmt: skip
REAL = {
    "1e-3 around 1e3": 1e3 + 1e-3 * (torch.arange(32) % 2),
    "1e-3 of spread around 1e3": 1e3 - 1e-3 + 2e-3 * (torch.arange(32) % 3 > 0),
    "1e-4 around 1": 1 + 1e-4 * torch.sin(torch.arange(32.0)),
    "tiny": 1e-3 * torch.sin(torch.arange(32.0)), "one differs": torch.eye(32)[3],
    "double": 1e3 + 1e-9 * torch.sin(torch.arange(32.0)).double(),
}  # fmt: skip
alike = pytest.mark.parametrize("x", ALIKE.values(), ids=ALIKE)
real = pytest.mark.parametrize("x", REAL.values(), ids=REAL)


def test_the_cases_are_what_they_say():
    assert len(set(ALIKE["0.1, other orders"].tolist())) > 2
    assert ALIKE["1e6"].std() > 0.01  # divided by that, it would be +-1
    assert all(len(set(x.tolist())) > 1 for x in REAL.values())


@alike
@pytest.mark.parametrize("shift_mean", [True, False])
def test_nothing_to_whiten(x, shift_mean):
    mask = torch.ones(32).bool()
    mask[5] = False
    white = whiten(x.where(mask, 99), mask, shift_mean)
    mean = x[mask].double().mean().item()
    expected = torch.zeros(32) if shift_mean else torch.full((32,), mean) * mask
    if shift_mean:
        assert torch.equal(white.float(), expected)
    else:
        torch.testing.assert_close(white.float(), expected, rtol=1e-6, atol=0)
        assert white[mask].unique().numel() == 1


@real
def test_something_to_whiten(x):
    mask = torch.ones(32).bool()
    mask[5] = False
    n = x[mask].double().numpy()
    expected = (n - n.mean()) / np.sqrt(n.var() + 1e-8)
    white = whiten(x.where(mask, 99), mask)
    slack = 0.1 if x.dtype == torch.float32 and x.max() > 500 else 1e-3  # its mean is rounded
    np.testing.assert_allclose(white[mask], expected, atol=slack)
    assert white[5] == 0 and (n.std() < 1e-4 or white.std() > 0.5)


def test_nothing_at_all_to_whiten():
    assert torch.equal(whiten(torch.ones(3), torch.zeros(3).bool()), torch.zeros(3))
    assert torch.equal(whiten(torch.full((1,), 0.1), torch.ones(1).bool()), torch.zeros(1))
    assert whiten(torch.tensor([1.0, math.nan]), torch.ones(2).bool()).isnan().all()


@pytest.mark.parametrize("kind", ["rloo", "grpo", "reinforce"])
@alike
def test_groups_that_are_all_alike(x, kind):
    """Beside a group that is not."""
    rest = torch.tensor([0.0, 3.0, 0.0, 1.0]).to(x)
    advantages = group_advantages(torch.cat([x[:12], rest, x[12:]]), 4, kind)
    assert torch.equal(advantages[:12], torch.zeros_like(advantages[:12]))
    assert torch.equal(advantages[16:], torch.zeros_like(advantages[16:]))
    centred = np.array([-1.0, 2.0, -1.0, 0.0])
    by = {"rloo": 4 / 3, "reinforce": 1, "grpo": 1 / (math.sqrt(2) + 1e-4)}[kind]
    np.testing.assert_allclose(advantages[12:16], centred * by, rtol=1e-5)


@real
def test_groups_that_differ_a_little(x):
    n = x.double().numpy().reshape(8, 4)
    spread = n - n.mean(1, keepdims=True)
    expected = spread / (n.std(1, keepdims=True, ddof=1) + 1e-4)
    slack = 0.1 if x.dtype == torch.float32 and x.max() > 500 else 1e-3
    np.testing.assert_allclose(group_advantages(x, 4, "grpo").view(8, 4), expected, atol=slack)


@alike
def test_returns_that_are_all_alike(x):
    """A variance that is rounding is not explained, and not divided by."""
    mask = torch.ones(32).bool()
    for values in (x, x + 0.5 * x, torch.sin(torch.arange(32.0)).to(x)):
        assert explained_variance(values, x, mask).item() == 0
    wave = torch.sin(torch.arange(32.0))
    assert explained_variance(wave, wave, mask).item() == 1


@MANY
@given(size=st.floats(1e-20, 1e20), sign=st.sampled_from([-1, 1]), n=st.integers(1, 9),
       data=st.data())  # fmt: skip
def test_any_numbers_within_three_ulps(size, sign, n, data):
    ulps = data.draw(st.lists(st.integers(-3, 3), min_size=n, max_size=n))
    x = np.full(n, sign * size, np.float32)
    x = torch.tensor(x + np.spacing(x) * np.array(ulps, np.float32))
    assert not whiten(x, torch.ones(n).bool()).any()
    assert normalization(x)[1] == 0
    if n > 1:
        assert not any(group_advantages(x, n, k).any() for k in ("rloo", "grpo", "reinforce"))


@MANY
@given(size=st.floats(1e-2, 1e20), share=st.floats(2e-5, 1))
def test_any_numbers_far_enough_apart(size, share):
    x = torch.tensor([size, size * (1 + share)])
    gap = (x[1].double() - x[0].double()).item()
    assert normalization(x)[1] == pytest.approx(gap / 2, rel=0.2)
    rloo = group_advantages(x, 2, "rloo")
    assert rloo[1] > 0 > rloo[0] and rloo[1] - rloo[0] == pytest.approx(2 * gap, rel=0.2)


# The reward model's scale


@alike
def test_no_scale_to_normalise_by(x):
    torch.manual_seed(0)
    model = RewardModel(GPTConfig(10, 8, 1, 2, 8))
    before = {name: p.clone() for name, p in model.named_parameters()}
    said = train_rm.normalize(model, x)
    assert "stay as they are" in said and f"{x.mean():.2f}" in said
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert model.shift == 0


@real
def test_a_small_scale_to_normalise_by(x):
    mean, std = normalization(x)
    n = x.double().numpy()
    assert mean == pytest.approx(n.mean()) and std == pytest.approx(n.std(), rel=0.1)
    torch.manual_seed(0)
    model = RewardModel(GPTConfig(10, 8, 1, 2, 8))
    weight = model.score.weight.clone()
    assert "now 0 and 1" in train_rm.normalize(model, x)
    torch.testing.assert_close(model.score.weight, weight / std)


# Labels


@alike
def test_equal_scores_are_a_tie(x):
    scorer = lambda *_: x  # noqa: E731
    assert torch.equal(
        labelers.by_scores(scorer, None, None, None, 4), torch.full((8, 4, 4), 0.5).to(x)
    )


@real
def test_scores_that_differ_a_little(x):
    n = x.double().numpy().reshape(8, 4)
    expected = 1 / (1 + np.exp(n[:, None, :] - n[:, :, None]))
    found = labelers.by_scores(lambda *_: x, None, None, None, 4)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    different = n[:, None, :] != n[:, :, None]
    if x.dtype == torch.float32 and n.std() > 1e-4:
        assert ((found.numpy() != 0.5) == different).all()


def test_an_answer_is_not_preferred_to_its_like():
    """Embeddings that differ by rounding: their log-odds are rounding of products, not of 0."""
    torch.manual_seed(0)
    model = PreferenceModel(GPTConfig(10, 8, 1, 2, 8), 4)
    one = 100 * torch.randn(1, 4)
    other = torch.tensor([[3.0, 1.0, -2.0, 5.0]])
    e = torch.cat([one, one * (1 + 2**-23), other])
    model.embed = lambda tokens, lengths: e
    p = labelers.by_embeddings(model, None, torch.ones(3), torch.ones(3), 3)[0]
    assert (p[:2, :2] == 0.5).all()
    x, y = e.double().numpy()[[0, 2]]
    odds = sum(x[i] * y[i + 1] - x[i + 1] * y[i] for i in (0, 2))
    assert p[0, 2] == pytest.approx(1 / (1 + math.exp(-odds)), abs=1e-6)


class Rated:
    """Mean ratings that are equal but for the order of the sum, one that is higher."""

    prompts = [""] * 3
    ratings = [np.array(r) for r in ([0.1, 0.2, 0.3], [0.3, 0.2, 0.1], [0.2, 0.3, 0.4])]


def one_block(n):
    """n responses that were all compared with each other, of which no pair counts."""
    none = np.zeros((0, 2), int), np.zeros(0), np.zeros(0)
    return data.Compared(np.arange(n), [np.arange(n)], *none)


def test_no_ranking_is_made_of_rounding():
    assert Rated.ratings[0].mean() != Rated.ratings[1].mean()
    (group,) = train_rm.rankings(Rated, one_block(3), 4)
    assert group.tolist() in ([2, 0], [2, 1])


@pytest.mark.parametrize("soft", [True, False])
def test_a_batch_of_one_response(soft):
    """No pair: a loss of 0, and no gradient."""
    knobs = train_rm.Knobs(soft_labels=soft)
    outputs = torch.tensor([1.5], requires_grad=True)
    loss = train_rm.batch_loss(knobs, RewardModel, outputs, Rated, one_block(1))
    loss.backward()
    assert loss.item() == 0 and outputs.grad.item() == 0


# What was kept of the reference


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """(a function that asks for the log-probs, their file), after the first time."""
    monkeypatch.setenv("MINIRLHF_CACHE", str(tmp_path))
    model, rows = tiny(1), some_rows()
    off = torch.autocast("cpu", torch.bfloat16, enabled=False)
    stored_logps(model, rows, off, "float32")
    (path,) = (tmp_path / "ref-logps").iterdir()
    expected = all_logps(model, rows)
    return (lambda: stored_logps(model, rows, off, "float32")), path, expected


def rewrite(change):
    def damage(path):
        save_file({"logps": change(load_file(path)["logps"])}, path)

    return damage


def flip(path, place):
    raw = bytearray(path.read_bytes())
    raw[place] ^= 1
    path.write_bytes(bytes(raw))


@pytest.mark.parametrize("damage", [
    rewrite(lambda x: x + 1), rewrite(lambda x: x[:-1]), rewrite(lambda x: x[:1]),
    rewrite(lambda x: x[:, None]), rewrite(lambda x: x * math.nan), rewrite(torch.clone),
    rewrite(lambda x: x.double()), lambda path: path.write_bytes(b""),
    lambda path: path.write_bytes(path.read_bytes()[:-4]), lambda path: flip(path, -1),
    lambda path: path.write_bytes(path.read_bytes().replace(b"F32", b"I32")),
    lambda path: save_file({"other": torch.zeros(8)}, path), lambda path: save_file({}, path),
    lambda path: save_file({"logps": torch.zeros(8)}, path, {"checksum": "0"}),
])  # fmt: skip
def test_log_probs_that_are_damaged_are_made_again(kept, damage):
    """Without a checksum, too, as older versions left them."""
    ask, path, expected = kept
    whole = path.read_bytes()
    damage(path)
    assert torch.equal(ask(), expected)
    assert path.read_bytes() == whole  # and kept again


def test_every_bit_of_what_is_kept_counts(kept):
    ask, path, expected = kept
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole)
        flip(path, place)
        assert torch.equal(ask(), expected)


def test_what_is_whole_is_read(kept, monkeypatch):
    ask, path, expected = kept
    monkeypatch.setattr("minirlhf.data.logps.all_logps", None)
    assert torch.equal(ask(), expected)
