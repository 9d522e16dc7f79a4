"""Muon for the matrices of blocks: steps by NumPy, and by torch's own Muon."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from minirlhf.engine import muon, optim
from minirlhf.gpt import GPT, GPTConfig

CONFIG = GPTConfig(vocab_size=11, n_ctx=7, n_layer=2, n_head=2, n_embd=8)
LR, DECAY = 0.01, 0.3


def knobs(optimizer="", init=""):
    return SimpleNamespace(optimizer=optimizer, init=init)


def trained(steps, **chosen):
    """(weights by name, the gradients of each step) after steps with random gradients."""
    torch.manual_seed(0)
    model = GPT(CONFIG)
    optimizer = optim.make_optimizer(model, LR, weight_decay=DECAY, embedding_lr=2.0)
    muon.join(knobs(**chosen), optimizer, model)
    gradients = []
    for _ in range(steps):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
        optimizer.step()
    return {name: p.detach().clone() for name, p in model.named_parameters()}, gradients


def in_blocks(weights):
    return [name for name, w in weights.items() if name.startswith("h.") and w.dim() == 2]


def polynomial_of_singular_values(matrix):
    """By the matrix's singular values alone, in float64: no product of matrices in between."""
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    s = s / np.sqrt((s**2).sum())
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u @ np.diag(s) @ v, s


@pytest.mark.parametrize("shape", [(5, 5), (4, 12), (12, 4), (1, 6)])
def test_all_singular_values_become_nearly_one(shape):
    matrix = np.random.default_rng(0).normal(size=shape)
    expected, values = polynomial_of_singular_values(matrix)
    assert values.min() > 0.6 and values.max() < 1.3
    found = muon.orthogonal(torch.tensor(matrix, dtype=torch.float32))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_matrix_of_zeros_stays():
    assert torch.equal(muon.orthogonal(torch.zeros(3, 4)), torch.zeros(3, 4))


def test_three_steps_by_numpy():
    before, _ = trained(0)
    after, gradients = trained(3)
    for name in in_blocks(before):
        w, momentum = before[name].double().numpy(), 0
        for step in gradients:
            g = step[name].double().numpy()
            momentum = 0.95 * momentum + 0.05 * g
            direction, _ = polynomial_of_singular_values(0.05 * g + 0.95 * momentum)
            size = 0.2 * np.sqrt(max(w.shape))
            w = w * (1 - LR * DECAY) - LR * size * direction
        np.testing.assert_allclose(after[name], w, atol=1e-5)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch before 2.9 has no Muon")
def test_the_steps_of_torch():
    """Which multiplies in bfloat16, of eight bits."""
    before, _ = trained(0)
    after, gradients = trained(3)
    for name in in_blocks(before):
        p = torch.nn.Parameter(before[name])
        optimizer = torch.optim.Muon([p], LR, DECAY, adjust_lr_fn="match_rms_adamw")
        for step in gradients:
            p.grad = step[name].clone()
            optimizer.step()
        torch.testing.assert_close(after[name], p.detach(), rtol=0, atol=0.05 * LR)


def test_only_matrices_of_blocks_go_its_way():
    by_muon, _ = trained(2)
    by_adamw, _ = trained(2, optimizer="adamw")
    same = [name for name, w in by_muon.items() if torch.equal(w, by_adamw[name])]
    assert sorted(same) == sorted(by_muon.keys() - in_blocks(by_muon))
    assert len(in_blocks(by_muon)) == 4 * CONFIG.n_layer


def test_a_trained_model_goes_on_by_adamw():
    """What AdamW has trained Muon is no better for (Liu et al. 2025)."""
    fine_tuned, _ = trained(2, init="gpt2")
    by_adamw, _ = trained(2, optimizer="adamw")
    assert all(torch.equal(w, by_adamw[name]) for name, w in fine_tuned.items())
    asked_for, _ = trained(2, init="gpt2", optimizer="muon")
    by_muon, _ = trained(2)
    assert all(torch.equal(w, by_muon[name]) for name, w in asked_for.items())
