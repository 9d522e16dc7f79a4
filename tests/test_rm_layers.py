"""A reward model of the base model's lowest layers."""

import pytest
import torch

import train_ppo
import train_rm
from minirlhf.gpt import GPT, GPTConfig, RewardModel

CONFIG = GPTConfig(vocab_size=11, n_ctx=6, n_layer=3, n_head=2, n_embd=8)
ROWS = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]])


@pytest.fixture
def base():
    torch.manual_seed(0)
    model = GPT(CONFIG)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return model


@pytest.mark.parametrize("layers", [1, 2])
def test_the_lowest_layers_are_those_of_the_base_model(base, layers):
    model = RewardModel.from_base(base, layers=layers).eval()
    whole = RewardModel.from_base(base).eval()
    for block in whole.transformer.h[layers:]:  # what adds nothing is as good as absent
        for matrix in (block.attn.c_proj, block.mlp.c_proj):
            torch.nn.init.zeros_(matrix.weight)
            torch.nn.init.zeros_(matrix.bias)
    assert model.config.n_layer == len(model.transformer.h) == layers
    torch.testing.assert_close(model.transformer.hidden(ROWS), whole.transformer.hidden(ROWS))


def test_more_layers_than_there_are_means_all(base):
    assert RewardModel.from_base(base, layers=9).config.n_layer == 3


def test_the_copy_is_its_own(base):
    before = base.wte.weight.clone()
    model = RewardModel.from_base(base, layers=2)
    torch.nn.init.zeros_(model.transformer.wte.weight)
    assert torch.equal(base.wte.weight, before)


@pytest.mark.parametrize("model", train_rm.MODELS)
@pytest.mark.parametrize(("layers", "kept"), [(0, 3), (2, 2)])
def test_layers_of_the_script(base, model, layers, kept):
    knobs = train_rm.Knobs(layers=layers, model=model)
    assert train_rm.fresh_model(knobs, base).config.n_layer == kept


def test_it_is_kept_and_read_again(base, tmp_path):
    model = RewardModel.from_base(base, layers=2).eval()
    model.save_pretrained(tmp_path)
    again = RewardModel.from_pretrained(tmp_path).eval()
    lengths = torch.tensor([5, 4])
    torch.testing.assert_close(again(ROWS, lengths), model(ROWS, lengths), rtol=0, atol=0)


def test_a_policy_learns_from_it(toy, tmp_path):
    few = {"data": "toy", "init": str(toy / "sft")}
    out = tmp_path / "rm"
    reads = {"epochs": 1, "batch_size": 256, "delete": 0.0, "dropout": 0.0}
    train_rm.main(train_rm.Knobs(**few, **reads, out=out, layers=1))
    asks = {"steps": 2, "batch_size": 8, "response_length": 6, "eval_samples": 4}
    train_ppo.main(train_ppo.Knobs(**few, **asks, reward=str(out), out=tmp_path / "ppo"))
    assert RewardModel.from_pretrained(out / "model").config.n_layer == 1
    assert GPT.from_pretrained(tmp_path / "ppo" / "model").config.n_layer == 2
