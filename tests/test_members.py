"""Several reward models side by side in one."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import train_ppo
import train_rm
from minirlhf.engine import cli
from minirlhf.gpt import GPT, GPTConfig, RewardModel
from minirlhf.rewards.side_by_side import first_of, fresh_members, side_by_side, turns

CONFIG = GPTConfig(vocab_size=11, n_ctx=7, n_layer=2, n_head=2, n_embd=8)
ROWS = torch.tensor([[1, 2, 3, 4, 5, 6], [6, 7, 8, 9, 10, 0]])
LENGTHS = torch.tensor([6, 4])


def fresh(seed, **options):
    torch.manual_seed(seed)
    model = RewardModel(CONFIG, **options).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.4)
    return model


def shuffled(model, seed, **options):
    """Another model that computes the same, its channels in another order."""
    order = torch.from_numpy(np.random.default_rng(seed).permutation(CONFIG.n_embd))
    other = RewardModel(CONFIG, **options).eval()
    weights = {name: w.clone() for name, w in model.state_dict().items()}
    for name, w in weights.items():
        reads = ("c_attn.weight", "c_fc.weight", "wte.weight", "wpe.weight", "score.weight")
        if name.endswith(reads):
            weights[name] = w[:, order]
        if "c_proj" in name or "ln_" in name:
            weights[name] = w[order]
    other.load_state_dict(weights)
    return other


@pytest.mark.parametrize("level", train_rm.LEVELS)
def test_models_whose_channels_vary_alike_have_the_mean_of_their_scores(level):
    """Channels in another order have the same deviation at each token: nothing is lost."""
    first = fresh(0, level=level, shift=1.0)
    others = [shuffled(first, seed, level=level, shift=4.0) for seed in (1, 2)]
    for seed, other in enumerate(others):
        torch.manual_seed(7 + seed)
        torch.nn.init.normal_(other.score.weight)
    args = ROWS, LENGTHS, torch.tensor([1, 2])
    expected = sum(model(*args) for model in (first, *others)) / 3
    one = side_by_side([first, *others])
    assert (one.config.n_embd, one.config.n_head, one.config.n_layer) == (24, 6, 2)
    assert not one.training and one.shift == 3.0
    torch.testing.assert_close(one(*args), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("n", [2, 3])
def test_the_first_of_several_scores_as_it_did(n):
    models = [fresh(seed, shift=1.0) for seed in range(n)]
    one = first_of(side_by_side(models))
    assert one.config == CONFIG
    args = ROWS, LENGTHS, torch.tensor([1, 2])
    torch.testing.assert_close(one(*args), models[0](*args), rtol=1e-4, atol=1e-5)


def test_the_critic_is_the_first_of_two():
    first, rm = fresh(0), side_by_side([fresh(0), fresh(1)])
    critic = train_ppo.make_critic(train_ppo.Knobs(), GPT(CONFIG), GPT(CONFIG), rm)
    assert critic.config == CONFIG and rm.config.n_embd == 2 * CONFIG.n_embd
    expected = first.values(ROWS, LENGTHS)
    torch.testing.assert_close(critic.values(ROWS, LENGTHS), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("level", train_rm.LEVELS)
def test_of_a_model_that_is_not_several_the_first_is_all_of_it(level):
    model = fresh(0, level=level)
    copied = first_of(model)
    assert copied is not model and copied.config == CONFIG and copied.level == level
    weights = copied.state_dict()
    assert all(torch.equal(w, weights[name]) for name, w in model.state_dict().items())


def test_of_a_changed_model_the_first_is_all_of_it():
    model = fresh(0)
    model.transformer.h[0].gate = torch.nn.Parameter(torch.ones(3, 5, 7))  # parts of no size fit
    assert torch.equal(first_of(model).transformer.h[0].gate, torch.ones(3, 5, 7))


def streams(models, tokens):
    """Scores of one row by the formulas, in float64: two streams of C channels, each normalised by
    the deviation of all 2 C of them."""
    W = [{name: w.double().numpy() for name, w in m.state_dict().items()} for m in models]
    T, C, H = len(tokens), CONFIG.n_embd, CONFIG.n_head

    def norms(x, name):
        centred = [part - part.mean(1, keepdims=True) for part in x]
        std = np.sqrt(np.concatenate(centred, 1).var(1, keepdims=True) + 1e-5)
        full = f"transformer.{name}"
        return [
            part / std * w[f"{full}.weight"] + w[f"{full}.bias"]
            for part, w in zip(centred, W, strict=True)
        ]

    def linear(x, name):
        full = f"transformer.{name}"
        pairs = zip(x, W, strict=True)
        return [part @ w[f"{full}.weight"].T + w[f"{full}.bias"] for part, w in pairs]

    def attended(qkv):
        q, k, v = (part.reshape(T, H, C // H) for part in np.split(qkv, 3, 1))
        out = np.zeros((T, C))
        for t in range(T):
            for h in range(H):
                z = k[: t + 1, h] @ q[t, h] / np.sqrt(C // H)
                p = np.exp(z - z.max())
                out[t, h * C // H : (h + 1) * C // H] = p / p.sum() @ v[: t + 1, h]
        return out

    def gelu(x):
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    x = [w["transformer.wte.weight"][tokens] + w["transformer.wpe.weight"][:T] for w in W]
    for i in range(CONFIG.n_layer):
        heads = [attended(part) for part in linear(norms(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn")]
        added = linear(heads, f"h.{i}.attn.c_proj")
        x = [a + b for a, b in zip(x, added, strict=True)]
        hidden = linear(norms(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc")
        added = linear([gelu(part) for part in hidden], f"h.{i}.mlp.c_proj")
        x = [a + b for a, b in zip(x, added, strict=True)]
    ends = [part[-1] @ w["score.weight"][0] for part, w in zip(norms(x, "ln_f"), W, strict=True)]
    return sum(ends) / len(ends)


def test_other_models_share_the_deviation_alone():
    models = [fresh(0), fresh(1)]
    one = side_by_side(models)
    got = one(ROWS, LENGTHS)
    for row, n, score in zip(ROWS, LENGTHS, got, strict=True):
        assert score.item() == pytest.approx(streams(models, row[:n].numpy()), abs=1e-4)
    apart = [model(ROWS, LENGTHS) for model in models]
    assert not torch.allclose(got, sum(apart) / 2, atol=1e-3)  # so it is said


def test_one_model_is_itself_and_theirs_stay(tmp_path):
    models = [fresh(0), fresh(1)]
    before = [{name: w.clone() for name, w in m.state_dict().items()} for m in models]
    assert side_by_side(models[:1]) is models[0]
    one = side_by_side(models)
    for model, weights in zip(models, before, strict=True):
        for name, w in model.state_dict().items():
            assert torch.equal(w, weights[name])
    one.save_pretrained(tmp_path)
    again = RewardModel.from_pretrained(tmp_path).eval()
    assert torch.equal(again(ROWS, LENGTHS), one(ROWS, LENGTHS))


@pytest.mark.parametrize(
    "given, n",
    [({"data": "toy"}, 1), ({"model": "pairwise"}, 1), ({"members": 1}, 1), ({}, 2),
     ({"members": 3, "data": "toy"}, 3)],
)  # fmt: skip
def test_how_many_learn(given, n):
    base = GPT(replace(CONFIG, dropout=0.5))
    knobs = train_rm.Knobs(**given)
    models = fresh_members(knobs, lambda: train_rm.fresh_model(knobs, base))
    assert len(models) == n and all(model.training for model in models)
    heads = [model.score.weight for model in models]
    assert n == 1 or not torch.equal(heads[0], heads[1])


class RMSNorm(torch.nn.RMSNorm):
    """Does not take a mean away, so models with one are not what they were once centred."""


class Unknown(torch.nn.Module):
    """A layer whose weights are no matrices or vectors."""

    def __init__(self, width):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(2, 2, width))

    def forward(self, x):
        return x * self.weight.mean((0, 1))


@pytest.mark.parametrize("norm", [RMSNorm, Unknown])
@pytest.mark.parametrize("where", ["ln_f", "ln_1"])
def test_one_learns_where_a_fork_does_not_fit(norm, where, capsys):
    torch.manual_seed(0)
    base = GPT(CONFIG)
    torch.nn.init.normal_(base.wte.weight)

    def make():
        model = RewardModel.from_base(base)
        trunk = model.transformer
        setattr(trunk if where == "ln_f" else trunk.h[1], where, norm(CONFIG.n_embd))
        return model

    (model,) = fresh_members(train_rm.Knobs(), make)
    assert isinstance(model, RewardModel)
    assert "do not fit side by side: one learns, not 2" in capsys.readouterr().out


def test_one_learns_where_the_norm_keeps_the_mean(monkeypatch, capsys):
    """A fork of gpt.py, whose wide model is one of the fork, too: the weights fit, the scores do
    not."""
    monkeypatch.setattr(torch.nn, "LayerNorm", torch.nn.RMSNorm)
    torch.manual_seed(0)
    base = GPT(CONFIG)
    torch.nn.init.normal_(base.wte.weight, mean=1.0)
    models = fresh_members(train_rm.Knobs(), lambda: RewardModel.from_base(base))
    assert len(models) == 1 and "one learns" in capsys.readouterr().out
    monkeypatch.undo()
    plain = GPT(CONFIG)
    assert len(fresh_members(train_rm.Knobs(), lambda: RewardModel.from_base(plain))) == 2


def test_two_start_with_opposite_heads():
    torch.manual_seed(0)
    base = GPT(CONFIG)
    models = fresh_members(train_rm.Knobs(members=3), lambda: RewardModel.from_base(base))
    first, second, third = (model.eval()(ROWS, LENGTHS) for model in models)
    torch.testing.assert_close(first + second, torch.zeros(2), rtol=0, atol=1e-6)
    torch.manual_seed(0)
    GPT(CONFIG)
    alone = RewardModel.from_base(base)
    assert torch.equal(models[0].score.weight, 3 * alone.score.weight)
    assert first.abs().max() > 0.1 and (first - third).abs().max() > 0.1
    assert all(model.score.weight.requires_grad for model in models)


def test_each_reads_all_of_a_plan_from_a_place_of_its_own():
    steps = turns([["a", "b"], [], list(range(7))], 3)
    first, second, third = zip(*steps, strict=True)
    assert first == ("a", "b", 0, 1, 2, 3, 4, 5, 6)
    assert second == ("a", "b", 2, 3, 4, 5, 6, 0, 1)  # 2 / 3 of a step is none
    assert third == ("b", "a", 4, 5, 6, 0, 1, 2, 3)
    assert turns([["a", "b"]], 1) == [["a"], ["b"]]


def test_a_run_leaves_one_model_twice_as_wide(toy, tmp_path):
    out = tmp_path / "rm"
    flags = ["--data", "toy", "--init", toy / "sft", "--members", "2", "--out", out]
    flags += ["--lr", "3e-3", "--embedding-lr", "1", "--delete", "0", "--dropout", "0"]
    knobs = cli.parse(train_rm.Knobs, "", [str(flag) for flag in flags])
    summary = train_rm.main(knobs)
    base, config = (json.loads((path / "model" / "config.json").read_text())
                    for path in (toy / "sft", out))  # fmt: skip
    assert (config["n_embd"], config["n_head"]) == (2 * base["n_embd"], 2 * base["n_head"])
    assert summary["eval/accuracy"] > 0.6
    with pytest.raises(cli.UserError, match="members"):
        train_rm.main(train_rm.Knobs(data="toy", members=2, model="pairwise", out=str(out)))
