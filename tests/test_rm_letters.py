"""Tokens that learn with their letters: expected sums come from NumPy loops."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import train_rm
from minirlhf.feedback import letters
from minirlhf.gpt import GPT, GPTConfig
from minirlhf.tokenizer import Tokenizer

GONE = ["<go", "gon", "one", "ne>", "<gon", "gone", "one>", "<gone", "gone>"]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["gone goner Gone gone alone honest GONE goner alone"] * 9, 285)


@pytest.fixture
def model(tokenizer):
    """Of a fresh GPT, its vectors of letters drawn at random."""
    torch.manual_seed(0)
    base = GPT(GPTConfig(tokenizer.vocab_size, n_ctx=8, n_layer=1, n_head=2, n_embd=6))
    knobs = train_rm.Knobs(data="toy", letters=2.0)
    model = letters.attach(knobs, train_rm.fresh_model(knobs, base), tokenizer)
    torch.nn.init.normal_(model.transformer.wte.letters.weight)
    return model.eval()


@pytest.mark.parametrize("token, expected", [
    (b" Gone", [("gone",), *GONE]), (b"gone", [("gone",), *GONE]), (b"a", [("a",), "<a>"]),
    (b"\xc3\x89", [("é",), "<é>"]), (b" ", []), (b"\xff", []), (b"", []),
    (b"aaaa", [("aaaa",), "<aa", "aaa", "aa>", "<aaa", "aaaa", "aaa>", "<aaaa", "aaaa>"]),
])  # fmt: skip
def test_groups_of_a_token(token, expected):
    assert letters.letter_groups(token) == expected


def expected_rows(tokenizer, wte, weight):
    """The rows of the embedding and what stands beside them, by a loop."""
    tokens = [b"" if i == tokenizer.eos else tokenizer.decode_bytes([i])
              for i in range(tokenizer.vocab_size)]  # fmt: skip
    groups = [letters.letter_groups(token) for token in tokens]
    order, vectors = [], wte.letters.weight.detach().double().numpy()
    for own in groups:
        order += [g for g in own if g not in order and sum(g in other for other in groups) > 1]
    rows = wte.weight.detach().double().numpy().copy()
    for row, own in zip(rows, groups, strict=True):
        shared = [order.index(g) for g in own if g in order]
        for g in shared:
            row += weight * vectors[g] / np.sqrt(len(shared))
    return rows


def test_embeddings_are_rows_and_letters(tokenizer, model):
    wte = model.transformer.wte
    expected = expected_rows(tokenizer, wte, weight=2.0)
    found = wte(torch.arange(tokenizer.vocab_size)).detach()
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-6)
    alone = [tokenizer.eos, tokenizer.pad]
    assert torch.equal(found[alone], wte.weight[alone])
    moved = (found != wte.weight).any(1)
    assert moved[tokenizer.encode("gone")].all() and moved.sum() > 50


def test_folded_it_is_the_same_model_of_rows_alone(tokenizer, model):
    rows = torch.tensor([(tokenizer.encode("gone alone honest") * 3)[:5], [3, 4, 5, 6, 7]])
    lengths = torch.tensor([5, 4])
    before, names = model(rows, lengths), model.state_dict().keys()
    expected = expected_rows(tokenizer, model.transformer.wte, weight=2.0)
    letters.fold(model)
    np.testing.assert_allclose(model.transformer.wte.weight.detach(), expected, atol=1e-6)
    torch.testing.assert_close(model(rows, lengths), before)
    own = {"transformer.wte.letters.weight", *(f"transformer.wte.letters.{n}" for n in
                                               ("groups", "scale"))}  # fmt: skip
    assert model.state_dict().keys() == names - own
    letters.fold(model)  # nothing more
    np.testing.assert_allclose(model.transformer.wte.weight.detach(), expected, atol=1e-6)


def test_what_one_token_learns_another_knows(tokenizer, model):
    wte = model.transformer.wte
    gone, again, other = (tokenizer.ranks[t] for t in (b"gone", b" Gone", b"h"))
    wte(torch.tensor([[gone]])).sum().backward()
    with torch.no_grad():
        before = wte(torch.tensor([again, other]))
        wte.letters.weight -= 0.1 * wte.letters.weight.grad
        after = wte(torch.tensor([again, other]))
    assert not torch.equal(after[0], before[0]) and torch.equal(after[1], before[1])


@pytest.mark.parametrize("knobs, weight", [
    ({}, 3), ({"letters": 0.0}, 0), ({"letters": 1.5}, 1.5), ({"data": "toy"}, 0),
    ({"data": "toy", "letters": 1.5}, 1.5), ({"model": "pairwise"}, 3),
])  # fmt: skip
def test_where_letters_are_read(tokenizer, knobs, weight):
    base = GPT(GPTConfig(tokenizer.vocab_size, n_ctx=8, n_layer=1, n_head=2, n_embd=6))
    knobs = train_rm.Knobs(**knobs)
    model = letters.attach(knobs, train_rm.fresh_model(knobs, base), tokenizer)
    found = getattr(model.transformer.wte, "letters", None)
    assert (found is not None) == bool(weight)
    if weight:
        one = tokenizer.ranks[b"1"]  # groups of its own alone
        assert not found.weight.any() and found.scale[one] == weight


@pytest.mark.parametrize("kind", train_rm.MODELS)
def test_a_run_goes_on_as_if_never_stopped(toy, tmp_path, kind):
    few = {"data": "toy", "init": str(toy / "sft"), "epochs": 1, "batch_size": 256, "model": kind}
    kept = []
    for name, resume in (("whole", False), ("stopped", False), ("stopped", True)):
        knobs = train_rm.Knobs(
            **few, out=str(tmp_path / name), letters=2.0, save_every=2, resume=resume
        )
        train_rm.main(knobs)
        states = sorted((tmp_path / name / "state").glob("*.safetensors"))
        if name == "stopped" and not resume:
            states[-1].unlink()
            (tmp_path / name / "summary.json").unlink()
    for name in ("whole", "stopped"):
        kept.append(load_file(tmp_path / name / "model" / "model.safetensors"))
    assert kept[0].keys() == kept[1].keys() and not any("letters" in name for name in kept[0])
    assert all(torch.equal(w, kept[1][name]) for name, w in kept[0].items())
