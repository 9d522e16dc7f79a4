"""Tokens that learn with their letters: expected values come from NumPy loops, and from a model
that holds rows and vectors apart."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import train_dpo
import train_ppo
import train_rm
from minirlhf import sft
from minirlhf.engine import letters, optim
from minirlhf.gpt import GPT, GPTConfig
from minirlhf.tokenizer import Tokenizer

GONE = ["<go", "gon", "one", "ne>", "<gon", "gone", "one>", "<gone", "gone>"]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["gone goner Gone gone alone honest GONE goner alone"] * 9, 285)


def dense(tokenizer, weight):
    """S, (V, count), by a loop."""
    tokens = [b"" if i == tokenizer.eos else tokenizer.decode_bytes([i])
              for i in range(tokenizer.vocab_size)]  # fmt: skip
    groups = [letters.letter_groups(token) for token in tokens]
    order = []
    for own in groups:
        order += [g for g in own if g not in order and sum(g in other for other in groups) > 1]
    S = np.zeros((len(tokens), len(order)))
    for row, own in zip(S, groups, strict=True):
        shared = [order.index(g) for g in own if g in order]
        row[shared] = weight / np.sqrt(max(1, len(shared)))
    return S


@pytest.mark.parametrize("token, expected", [
    (b" Gone", [("gone",), *GONE]), (b"gone", [("gone",), *GONE]), (b"a", [("a",), "<a>"]),
    (b"\xc3\x89", [("é",), "<é>"]), (b" ", []), (b"\xff", []), (b"", []),
    (b"aaaa", [("aaaa",), "<aa", "aaa", "aa>", "<aaa", "aaaa", "aaa>", "<aaaa", "aaaa>"]),
])  # fmt: skip
def test_groups_of_a_token(token, expected):
    assert letters.letter_groups(token) == expected


def test_sums_over_groups_and_over_tokens(tokenizer):
    S = dense(tokenizer, weight=2.0)
    found = letters.Letters(*letters.numbered_groups(tokenizer), 2.0, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    vectors, rows = (torch.randn(n, 6, generator=generator) for n in S.shape[::-1])
    np.testing.assert_allclose(found.of_tokens(vectors), S @ vectors.numpy(), atol=1e-5)
    np.testing.assert_allclose(found.of_groups(rows), S.T @ rows.numpy(), atol=1e-5)
    alone = [tokenizer.eos, *tokenizer.encode("1")]  # no letters; groups of its own alone
    assert not S[alone].any() and S[tokenizer.encode("gone")].any()


def fresh_gpt(tokenizer):
    torch.manual_seed(0)
    return GPT(GPTConfig(tokenizer.vocab_size, n_ctx=8, n_layer=1, n_head=2, n_embd=6))


def test_the_embedding_learns_as_rows_and_vectors_apart_would(tokenizer):
    """A GPT beside one whose token embedding is a function of two parameters, as autograd sees it;
    the embedding is the head, too, so that every row has a gradient."""
    together, apart = fresh_gpt(tokenizer), fresh_gpt(tokenizer)
    S = torch.tensor(dense(tokenizer, weight=1.5), dtype=torch.float32)
    sum_of = Sum(S, width=6)
    torch.nn.utils.parametrize.register_parametrization(apart.wte, "weight", sum_of)
    knobs = sft.Knobs(data="toy", letters=1.5)
    optimizer = optim.make_optimizer(together, 0.01)
    letters.join(knobs, optimizer, together, tokenizer)
    usual = torch.optim.AdamW(apart.parameters(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.0)
    before = together.wte.weight.detach().clone()
    batches = torch.randint(tokenizer.vocab_size, (4, 3, 8), generator=torch.manual_seed(1))
    for tokens in batches:
        loss = sft.row_logprobs(together, tokens, torch.tensor([8, 8, 5])).mean()
        loss.backward()
        found, _ = optim.optimizer_step(optimizer, 0.0, loss)
        loss = sft.row_logprobs(apart, tokens, torch.tensor([8, 8, 5])).mean()
        usual.zero_grad()
        loss.backward()
        usual.step()
        assert found == pytest.approx(loss.item(), rel=1e-5)
    torch.testing.assert_close(together.wte.weight, apart.wte.weight, atol=1e-5, rtol=1e-4)
    moved = (S @ sum_of.vectors).abs().sum(1)
    assert moved[tokenizer.encode("gone")] > 0.05 and not moved[tokenizer.eos]
    assert not torch.equal(before, together.wte.weight)


class Sum(torch.nn.Module):
    def __init__(self, S, width):
        super().__init__()
        self.S, self.vectors = S, torch.nn.Parameter(torch.zeros(S.shape[1], width))

    def forward(self, rows):
        return rows + self.S @ self.vectors


def test_what_one_token_learns_another_knows(tokenizer):
    wte = torch.nn.Embedding(tokenizer.vocab_size, 6)
    before = wte.weight.detach().clone()
    optimizer = torch.optim.AdamW(wte.parameters(), weight_decay=0.0)
    letters.join(sft.Knobs(), optimizer, torch.nn.ModuleDict({"wte": wte}), tokenizer)
    gone, again, other = (tokenizer.ranks[t] for t in (b"gone", b" Gone", b"h"))
    wte(torch.tensor([[gone]])).sum().backward()
    optimizer.step()
    moved = (wte.weight != before).any(1)
    assert moved[gone] and moved[again] and not moved[other]
    optimizer.zero_grad()
    before = wte.weight.detach().clone()
    optimizer.step()  # no gradient: nothing moves
    assert torch.equal(wte.weight, before)


@pytest.mark.parametrize("stage", [sft, train_rm, train_ppo, train_dpo])
@pytest.mark.parametrize("given, weight", [
    ({}, 6), ({"letters": 0.0}, 0), ({"letters": 1.5}, 1.5), ({"data": "toy"}, 0),
    ({"data": "toy", "letters": 1.5}, 1.5),
])  # fmt: skip
def test_where_letters_are_read(tokenizer, stage, given, weight):
    wte = torch.nn.Embedding(tokenizer.vocab_size, 6)
    before = wte.weight.detach().clone()
    optimizer = torch.optim.SGD(wte.parameters(), lr=1.0)
    letters.join(stage.Knobs(**given), optimizer, torch.nn.ModuleDict({"wte": wte}), tokenizer)
    gradient = torch.randn(before.shape, generator=torch.manual_seed(0))
    wte.weight.grad = gradient.clone()
    optimizer.step()  # rows get the gradient, and by way of vectors S S^T times it
    S = torch.tensor(dense(tokenizer, weight), dtype=torch.float32)
    torch.testing.assert_close(wte.weight, before - gradient - S @ (S.T @ gradient))


STAGES = {
    "sft": (sft, {"vocab_size": 257, "n_embd": 32, "batch_size": 256}),
    "pointwise": (train_rm, {"batch_size": 256}),
    "pairwise": (train_rm, {"batch_size": 256, "model": "pairwise"}),
}


@pytest.mark.parametrize("name", STAGES)
def test_a_run_goes_on_as_if_never_stopped(toy, tmp_path, name):
    stage, more = STAGES[name]
    if stage is train_rm:
        more = more | {"init": str(toy / "sft")}
    knobs = {"data": "toy", "epochs": 1, "letters": 2.0, "save_every": 2} | more
    for folder, resume in (("whole", False), ("stopped", False), ("stopped", True)):
        stage.main(stage.Knobs(**knobs, out=str(tmp_path / folder), resume=resume))
        states = sorted((tmp_path / folder / "state").glob("*.safetensors"))
        if folder == "stopped" and not resume:
            states[-1].unlink()
            (tmp_path / folder / "summary.json").unlink()
    kept = [load_file(tmp_path / folder / "model" / "model.safetensors")
            for folder in ("whole", "stopped")]  # fmt: skip
    assert kept[0].keys() == kept[1].keys()
    assert all(torch.equal(w, kept[1][name]) for name, w in kept[0].items())
