"""The Triton kernels in Triton's interpreter, on the CPU, against float64 and their twins.

A program takes the interpreter 10 to 50 ms, so the shapes are the least that reach every branch.
"""

import math

import pytest
import torch

from minirlhf import kernels
from minirlhf.engine.decoding import decode
from minirlhf.gpt import GPT, GPTConfig
from minirlhf.kernels import choice, decoding, fused_logprobs
from minirlhf.kernels.choice import jit, tl, triton
from minirlhf.sampling import generate

pytest.importorskip("triton", reason="the kernels are Triton's: pip install triton")
pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of masked -inf
# dtype, standard deviation of the logits, temperature, tolerance of gradients
PRECISIONS = [
    (torch.float32, 3, 1.0, 1e-5),
    (torch.float32, 30, 0.7, 1e-5),
    (torch.float16, 10, 1.3, 1e-3),
]
ONE = torch.ones(1, dtype=torch.int64)


@jit
def fill(out_ptr, n):
    for i in range(0, n):
        tl.store(out_ptr + i, i)


@pytest.fixture(scope="module")
def interpreter():
    """Triton 3.6's makes a Python number of an array of one, which NumPy 2.5 refuses."""
    try:
        fill[(1,)](torch.zeros(2), 2)
    except triton.runtime.errors.InterpreterError as e:
        pytest.skip(f"this Triton's interpreter does not know this NumPy: {e}")


@pytest.fixture(autouse=True)
def use_triton(interpreter, monkeypatch):
    assert choice.INTERPRETED, "Triton was imported before conftest.py set TRITON_INTERPRET"
    monkeypatch.setenv("MINIRLHF_KERNELS", "triton")


def head(N, C, V, std, dtype=torch.float32, seed=0):
    """hidden, weight, targets with logits of standard deviation std.

    Targets lie in the first and the last tile.
    """
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, C, generator=generator) * std / math.sqrt(C)
    weight = torch.randn(V, C, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(0, V, (N,), generator=generator)
    targets[0], targets[-1] = 0, V - 1
    return hidden.to(dtype).requires_grad_(), weight, targets


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


# Less than a tile; tiles with ragged edges; whole tiles of the vocabulary (64 columns).
@pytest.mark.parametrize("N, C, V", [(5, 64, 17), (33, 96, 300), (20, 40, 320)])
@pytest.mark.parametrize("dtype, std, temperature, grad_tolerance", PRECISIONS)
def test_token_logprobs(N, C, V, dtype, std, temperature, grad_tolerance):
    hidden, weight, targets = head(N, C, V, std, dtype)
    upstream = torch.linspace(-1, 2, N)
    got = kernels.token_logprobs(hidden, weight, targets, temperature=temperature)
    logits = hidden.double() @ weight.double().t() / temperature
    expected = logits.log_softmax(-1)[torch.arange(N), targets]
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=5e-5)
    ours = torch.autograd.grad(got, (hidden, weight), upstream)
    theirs = torch.autograd.grad(expected, (hidden, weight), upstream.double())
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == dtype and relative(a, b) < grad_tolerance


@pytest.mark.parametrize("tiles", [1, 3, 5])
def test_a_program_walks_over_many_tiles(tiles):
    """On a GPU a program has several tiles of the vocabulary: all five, three and two, one each."""
    N, C, V, scale = 5, 32, 300, 1 / 0.7
    hidden, weight, targets = (x.detach() for x in head(N, C, V, 5.0))
    splits = -(-5 // tiles)
    m, s, z, t = torch.empty(4, splits, N)
    fused_logprobs.split_logsumexp[(1, splits)](
        hidden, weight, targets, m, s, z, t, N, V, scale,
        C=C, TILES=tiles, BM=16, BN=64, BK=64, ENTROPY=True,
    )  # fmt: skip
    logits = hidden.double() @ weight.double().t() * scale
    lse = torch.logsumexp(m + s.log(), 0)
    torch.testing.assert_close(lse.double(), logits.logsumexp(1), rtol=0, atol=5e-5)
    at_target = logits[torch.arange(N), targets]
    torch.testing.assert_close(z.sum(0).double(), at_target, rtol=0, atol=5e-5)
    mean = (logits.softmax(1) * logits).sum(1)
    torch.testing.assert_close((t * (m - lse).exp()).sum(0).double(), mean, rtol=0, atol=5e-5)


def test_equal_logits_no_rows_and_a_tied_weight():
    hidden, weight, targets = head(7, 32, 100, 1.0)
    same = kernels.token_logprobs(torch.zeros_like(hidden), weight, targets)
    torch.testing.assert_close(same, torch.full((7,), -math.log(100)))
    assert kernels.token_logprobs(hidden[:0], weight, targets[:0]).shape == (0,)
    grads = []
    for way in ("triton", "torch"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MINIRLHF_KERNELS", way)
            tied = torch.tanh(weight[targets] * 1.3)
            loss = kernels.token_logprobs(tied, weight, targets.roll(1)).square().sum()
            grads.append(torch.autograd.grad(loss, weight)[0])
    assert relative(*grads) < 1e-5


def test_chunks_do_not_change_the_gradient(monkeypatch):
    hidden, weight, targets = head(19, 32, 100, 3.0)

    def gradients():
        loss = kernels.token_logprobs(hidden, weight, targets).sum()
        return torch.autograd.grad(loss, (hidden, weight))

    whole = gradients()
    monkeypatch.setitem(kernels.CHUNK, "cpu", 700)  # 7 rows
    for a, b in zip(gradients(), whole, strict=True):
        assert relative(a, b) < 1e-6


@pytest.mark.parametrize("N, C, V, T", [(5, 64, 17, 1.0), (20, 40, 300, 0.7)])
@pytest.mark.filterwarnings(
    "ignore:invalid value:RuntimeWarning"
)  # -inf - -inf, where it is masked
def test_entropy(N, C, V, T):
    hidden, weight, targets = head(N, C, V, 5.0)
    with torch.no_grad():  # with a gradient it is the twin's
        logprobs, entropy = kernels.token_logprobs_and_entropy(
            hidden, weight, targets, temperature=T
        )
    p = (hidden.double() @ weight.double().t() / T).softmax(1)
    torch.testing.assert_close(entropy.double(), -(p * p.log()).sum(1), rtol=0, atol=5e-5)
    assert torch.equal(logprobs, kernels.token_logprobs(hidden, weight, targets, temperature=T))


@pytest.mark.parametrize("V", [17, 1000, 5003])
@pytest.mark.parametrize("dtype, std, temperature, grad_tolerance", PRECISIONS)
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
    expected = kernels.token_logprobs(hidden, weight, targets)
    assert torch.equal(kernels.token_logprobs(hidden, weight, strided), expected)
    logits = hidden @ weight.t()
    expected = kernels.logprob_from_logits(logits, targets)
    assert torch.equal(kernels.logprob_from_logits(logits, strided), expected)


def test_torch_compile_takes_the_operators_whole():
    def whole(f):
        return torch.compile(f, fullgraph=True, backend="aot_eager")

    def doubled(h, w):
        return kernels.token_logprobs(h, w, targets) * 2

    def summed(z):
        return kernels.logprob_from_logits(z, targets).sum()

    hidden, weight, targets = head(6, 32, 50, 1.0)
    torch.testing.assert_close(whole(doubled)(hidden, weight), doubled(hidden, weight))
    given = torch.randn(6, 50, requires_grad=True)
    ours, theirs = (torch.autograd.grad(f(given), given)[0] for f in (whole(summed), summed))
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
    for way in ("triton", "torch"):
        monkeypatch.setenv("MINIRLHF_KERNELS", way)
        own = cache.clone()
        results.append((decoding.decode_attention(qkv, own, positions, mask), own))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=0, atol=tolerance)
    assert torch.equal(results[0][1], results[1][1])


def test_sampler_draws_from_the_softmax():
    """At a temperature that is far from 1: of 60 draws 42, 6, 6 and 6 are expected."""
    n, T, expected = 60, 0.25, torch.tensor([0.7, 0.1, 0.1, 0.1])
    logits = (T * expected.log()).repeat(n, 1)
    tokens, logprobs = decoding.sample_logits(logits, T, ONE * 5, ONE)
    torch.testing.assert_close(logprobs, expected[tokens].log(), rtol=0, atol=1e-5)
    chi2 = ((torch.bincount(tokens, minlength=4) - n * expected) ** 2 / (n * expected)).sum()
    assert chi2 < 21  # 3 degrees of freedom: 1 in 10,000
    again, _ = decoding.sample_logits(logits[:12], T, ONE * 5, ONE)
    other, _ = decoding.sample_logits(logits[:12], T, ONE * 5, ONE * 2)
    assert torch.equal(tokens[:12], again) and not torch.equal(again, other)


def test_sampler_noise_is_the_rows():
    """Rows counted from `first` up, as a seed may say it, are sampled as in the whole batch.

    Steps are no rows.
    """
    n = 8
    torch.manual_seed(0)
    logits, seed = torch.randn(n, 50), (2**61 + 12345) * ONE
    tokens, _ = decoding.sample_logits(logits, 1.0, seed, ONE)
    for first in (1, 5, n - 1):
        part, _ = decoding.sample_logits(logits[first:], 1.0, seed + (first << 32), ONE)
        assert torch.equal(part, tokens[first:])
    flat = torch.zeros(n, 50)  # nothing but noise
    rows, steps = (decoding.sample_logits(flat, 1.0, seed, ONE * step)[0] for step in (1, 2))
    assert not torch.equal(rows[1:], steps[:-1]) and not torch.equal(rows, steps)
    assert len(rows.unique()) > n / 2


def test_a_rows_sample_is_its_own():
    torch.manual_seed(0)
    model = GPT(GPTConfig(50, 32, 1, 1, 32)).eval()
    prompts, lengths = torch.randint(0, 50, (4, 6)), torch.tensor([6, 1, 4, 3])

    options = {"eos": -1, "pad": 0, "temperature": 1.0, "top_k": None}

    def sampled(rows, first_row):
        generator = torch.Generator().manual_seed(5)
        return decode(model, prompts[rows], lengths[rows], 2, generator, first_row, **options)

    whole = sampled(slice(0, 4), 0)
    for rows in (slice(0, 1), slice(1, 4), slice(3, 4)):
        assert torch.equal(sampled(rows, rows.start).tokens, whole.tokens[rows])
    assert not torch.equal(sampled(slice(0, 4), 1).tokens, whole.tokens)


def test_sampler_over_several_splits_and_greedy():
    torch.manual_seed(0)
    logits = torch.randn(3, 5000)[:, :4999]  # tiles of 2,048, and a strided row
    tokens, logprobs = decoding.sample_logits(logits, 0, ONE, ONE)
    assert torch.equal(tokens, logits.argmax(1))
    expected = logits.double().log_softmax(1)[torch.arange(3), tokens]
    torch.testing.assert_close(logprobs, expected.float())
    peaked = logits.clone()
    peaked[:, 4500] = 100.0
    assert (decoding.sample_logits(peaked, 1.0, ONE, ONE)[0] == 4500).all()


def test_generation_is_a_loop_that_recomputes_everything():
    """The whole decoder by Triton kernels: greedy tokens, and log-probs of sampled ones."""
    R = 3
    torch.manual_seed(0)
    model = GPT(GPTConfig(50, 32, 2, 2, 32)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    prompts, lengths = torch.randint(0, 50, (3, 6)), torch.tensor([6, 1, 4])
    for temperature in (0, 1.0):
        out = generate(model, prompts, lengths, R, eos=-1, pad=0, temperature=temperature)
        for row, p, logprobs in zip(out.tokens, lengths.tolist(), out.logprobs, strict=True):
            for t in range(R):
                following = model(row[None, : p + t])[0, -1].log_softmax(-1)
                torch.testing.assert_close(logprobs[t], following[row[p + t]], rtol=0, atol=1e-5)
                assert temperature or row[p + t] == following.argmax()


def test_triton_on_demand_is_an_error_without_it(monkeypatch):
    monkeypatch.setattr(choice, "triton", None)
    with pytest.raises(RuntimeError, match="triton is not installed"):
        kernels.fused(torch.zeros(1))
