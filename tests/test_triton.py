"""The Triton kernels in Triton's interpreter, on the CPU, against float64 and against their twins."""

import math

import pytest
import torch

from minirlhf import kernels
from minirlhf.gpt import GPT, GPTConfig
from minirlhf.kernels import decoding as decode_kernels
from minirlhf.sampling import generate

pytest.importorskip("triton", reason="the kernels are Triton's: pip install triton")
pytestmark = pytest.mark.skipif(
    not kernels.INTERPRETED, reason="needs TRITON_INTERPRET=1; on a GPU see test_gpu.py"
)


@pytest.fixture(autouse=True)
def use_triton(monkeypatch):
    monkeypatch.setenv("MINIRLHF_KERNELS", "triton")


def head(N, C, V, std, dtype=torch.float32, seed=0):
    """hidden, weight, targets with logits of standard deviation std; targets in the first and the last tile."""
    generator = torch.Generator().manual_seed(seed)
    hidden = (
        (torch.randn(N, C, generator=generator) * std / math.sqrt(C)).to(dtype).requires_grad_()
    )
    weight = torch.randn(V, C, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(0, V, (N,), generator=generator)
    targets[0], targets[-1] = 0, V - 1
    return hidden, weight, targets


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.mark.parametrize("N, C, V", [(5, 64, 17), (33, 96, 1000), (20, 40, 2048)])
@pytest.mark.parametrize("dtype, std, temperature, grad_tolerance",
                         [(torch.float32, 3, 1.0, 1e-5), (torch.float32, 30, 0.7, 1e-5), (torch.float16, 10, 1.3, 1e-3)])  # fmt: skip
def test_token_logprobs(N, C, V, dtype, std, temperature, grad_tolerance):
    hidden, weight, targets = head(N, C, V, std, dtype)
    upstream = torch.linspace(-1, 2, N)
    got = kernels.token_logprobs(hidden, weight, targets, temperature=temperature)
    logits = hidden.double() @ weight.double().t() / temperature
    expected = logits.log_softmax(-1)[torch.arange(N), targets]
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=5e-5)
    for a, b in zip(torch.autograd.grad(got, (hidden, weight), upstream),
                    torch.autograd.grad(expected, (hidden, weight), upstream.double()), strict=True):  # fmt: skip
        assert a.dtype == dtype and relative(a, b) < grad_tolerance


def test_equal_logits_no_rows_and_a_tied_weight():
    hidden, weight, targets = head(7, 32, 100, 1.0)
    same = kernels.token_logprobs(torch.zeros_like(hidden), weight, targets)
    torch.testing.assert_close(same, torch.full((7,), -math.log(100)))
    assert kernels.token_logprobs(hidden[:0], weight, targets[:0]).shape == (0,)
    grads = []
    for choice in ("triton", "torch"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MINIRLHF_KERNELS", choice)
            tied = torch.tanh(weight[targets] * 1.3)
            loss = kernels.token_logprobs(tied, weight, targets.roll(1)).square().sum()
            grads.append(torch.autograd.grad(loss, weight)[0])
    assert relative(*grads) < 1e-5


def test_chunks_do_not_change_the_gradient(monkeypatch):
    hidden, weight, targets = head(19, 32, 100, 3.0)
    whole = torch.autograd.grad(
        kernels.token_logprobs(hidden, weight, targets).sum(), (hidden, weight)
    )
    monkeypatch.setitem(kernels.CHUNK, "cpu", 700)  # 7 rows
    for a, b in zip(
        torch.autograd.grad(
            kernels.token_logprobs(hidden, weight, targets).sum(), (hidden, weight)
        ),
        whole,
        strict=True,
    ):
        assert relative(a, b) < 1e-6


@pytest.mark.parametrize("N, C, V, T", [(5, 64, 17, 1.0), (20, 40, 1000, 0.7)])
def test_entropy(N, C, V, T):
    hidden, weight, targets = head(N, C, V, 5.0)
    logprobs, entropy = kernels.token_logprobs_and_entropy(hidden, weight, targets, temperature=T)
    p = (hidden.double() @ weight.double().t() / T).softmax(1)
    torch.testing.assert_close(entropy.double(), -(p * p.log()).sum(1), rtol=0, atol=5e-5)
    assert torch.equal(logprobs, kernels.token_logprobs(hidden, weight, targets, temperature=T))


@pytest.mark.parametrize("V", [17, 1000, 5003])
@pytest.mark.parametrize("dtype, std, temperature, grad_tolerance",
                         [(torch.float32, 3, 1.0, 1e-5), (torch.float32, 30, 0.7, 1e-5), (torch.float16, 10, 1.3, 1e-3)])  # fmt: skip
def test_logprob_from_logits(V, dtype, std, temperature, grad_tolerance):
    torch.manual_seed(V)
    logits, targets = (std * torch.randn(6, V)).to(dtype), torch.tensor([0, V - 1, 3, 5, 7, 11])
    logits[5] = -math.inf
    logits[5, [11, 2]] = 1.0  # a filter's work
    logits.requires_grad_()
    got = kernels.logprob_from_logits(logits, targets, temperature=temperature)
    expected = (logits.double() / temperature).log_softmax(1)[torch.arange(6), targets]
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=5e-5)
    upstream = torch.linspace(-1, 2, 6)
    ours, theirs = (
        torch.autograd.grad(x, logits, upstream.to(x.dtype))[0] for x in (got, expected)
    )
    assert ours.dtype == dtype and relative(ours, theirs) < grad_tolerance
    assert kernels.logprob_from_logits(logits[:0], targets[:0]).shape == (0,)


def test_targets_with_a_stride():
    hidden, weight, targets = head(7, 32, 100, 1.0)
    strided = torch.stack([targets, targets.flip(0)], 1)[:, 0]
    assert torch.equal(
        kernels.token_logprobs(hidden, weight, strided),
        kernels.token_logprobs(hidden, weight, targets),
    )
    logits = hidden @ weight.t()
    assert torch.equal(
        kernels.logprob_from_logits(logits, strided), kernels.logprob_from_logits(logits, targets)
    )


def test_torch_compile_takes_the_operators_whole():
    hidden, weight, targets = head(6, 32, 50, 1.0)
    compiled = torch.compile(
        lambda h, w: kernels.token_logprobs(h, w, targets) * 2, fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(
        compiled(hidden, weight), 2 * kernels.token_logprobs(hidden, weight, targets)
    )
    given = torch.randn(6, 50, requires_grad=True)
    compiled = torch.compile(
        lambda z: kernels.logprob_from_logits(z, targets).sum(), fullgraph=True, backend="aot_eager"
    )
    ours, theirs = (
        torch.autograd.grad(f(given), given)[0]
        for f in (compiled, lambda z: kernels.logprob_from_logits(z, targets).sum())
    )
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float16, 2e-3)])
@pytest.mark.parametrize("D", [16, 24])
def test_decode_attention_is_its_twin(monkeypatch, dtype, tolerance, D):
    B, H, S = 4, 2, 150
    torch.manual_seed(0)
    qkv = torch.randn(B, 3 * H * D).to(dtype)
    positions = torch.tensor([0, 63, 64, 149])
    mask = (torch.arange(S) <= positions[:, None])[:, None, None]
    cache = torch.randn(2, B, H, S, D).to(dtype)
    cache.masked_fill_(~mask.transpose(2, 3), 1e4)  # what lies past a row must not matter
    results = []
    for choice in ("triton", "torch"):
        monkeypatch.setenv("MINIRLHF_KERNELS", choice)
        own = cache.clone()
        results.append((decode_kernels.decode_attention(qkv, own, positions, mask), own))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=0, atol=tolerance)
    assert torch.equal(results[0][1], results[1][1])


def test_sampler_draws_from_the_softmax():
    n, V, T = 250, 6, 0.8
    torch.manual_seed(0)
    logits = (2 * torch.randn(1, V)).repeat(n, 1)
    one = torch.ones(1, dtype=torch.int64)
    tokens, logprobs = decode_kernels.sample_logits(logits, T, one * 5, one)
    expected = (logits[0].double() / T).softmax(0)
    torch.testing.assert_close(logprobs, expected[tokens].log().float(), rtol=0, atol=1e-5)
    chi2 = ((torch.bincount(tokens, minlength=V) - n * expected) ** 2 / (n * expected)).sum()
    assert chi2 < 26  # 5 degrees of freedom: 1 in 10,000
    again, _ = decode_kernels.sample_logits(logits[:30], T, one * 5, one)
    other, _ = decode_kernels.sample_logits(logits[:30], T, one * 5, one * 2)
    assert torch.equal(tokens[:30], again) and not torch.equal(again, other)


def test_sampler_noise_is_the_rows():
    """Rows counted from `first` up, as Decoder.start says it by the seed, are sampled as in the whole batch; steps are no rows."""
    torch.manual_seed(0)
    logits, one = torch.randn(40, 50), torch.ones(1, dtype=torch.int64)
    seed = (2**61 + 12345) * one
    tokens, _ = decode_kernels.sample_logits(logits, 1.0, seed, one)
    for first in (1, 7, 39):
        part, _ = decode_kernels.sample_logits(logits[first:], 1.0, seed + (first << 32), one)
        assert torch.equal(part, tokens[first:])
    flat = torch.zeros(40, 50)  # nothing but noise
    rows, steps = (decode_kernels.sample_logits(flat, 1.0, seed, one * step)[0] for step in (1, 2))
    assert (
        not torch.equal(rows[1:], steps[:-1])
        and not torch.equal(rows, steps)
        and len(rows.unique()) > 15
    )


def test_a_rows_sample_is_its_own():

    torch.manual_seed(0)
    model = GPT(GPTConfig(50, 32, 1, 2, 32)).eval()
    prompts, lengths = torch.randint(0, 50, (6, 6)), torch.tensor([6, 1, 4, 6, 2, 3])

    def sampled(rows, first_row):
        generator = torch.Generator().manual_seed(5)
        return generate(
            model,
            prompts[rows],
            lengths[rows],
            4,
            eos=-1,
            pad=0,
            generator=generator,
            first_row=first_row,
        )

    whole = sampled(slice(0, 6), 0)
    for rows in (slice(0, 2), slice(2, 6), slice(5, 6)):
        assert torch.equal(sampled(rows, rows.start).tokens, whole.tokens[rows])
    assert not torch.equal(sampled(slice(0, 6), 1).tokens, whole.tokens)


def test_sampler_over_several_splits_and_greedy():
    torch.manual_seed(0)
    logits = torch.randn(3, 5000)[:, :4999]  # two tiles and a strided row
    one = torch.ones(1, dtype=torch.int64)
    tokens, logprobs = decode_kernels.sample_logits(logits, 0, one, one)
    assert torch.equal(tokens, logits.argmax(1))
    torch.testing.assert_close(
        logprobs, logits.double().log_softmax(1)[torch.arange(3), tokens].float()
    )
    peaked = logits.clone()
    peaked[:, 4500] = 100.0
    assert (decode_kernels.sample_logits(peaked, 1.0, one, one)[0] == 4500).all()


def test_generation_is_a_loop_that_recomputes_everything():
    """The whole decoder by Triton kernels: greedy tokens, and log-probs of sampled ones."""

    torch.manual_seed(0)
    model = GPT(GPTConfig(50, 32, 2, 2, 32)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    prompts, lengths = torch.randint(0, 50, (3, 6)), torch.tensor([6, 1, 4])
    for temperature in (0, 1.0):
        out = generate(model, prompts, lengths, 5, eos=-1, pad=0, temperature=temperature)
        for row, p, logprobs in zip(out.tokens, lengths.tolist(), out.logprobs, strict=True):
            for t in range(5):
                following = model(row[None, : p + t])[0, -1].log_softmax(-1)
                torch.testing.assert_close(logprobs[t], following[row[p + t]], rtol=0, atol=1e-5)
                assert temperature or row[p + t] == following.argmax()


def test_triton_on_demand_is_an_error_without_it(monkeypatch):
    monkeypatch.setattr(kernels, "triton", None)
    with pytest.raises(RuntimeError, match="triton is not installed"):
        kernels.fused(torch.zeros(1))
