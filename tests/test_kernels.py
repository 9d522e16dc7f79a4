"""token_logprobs against log_softmax in float64, finite differences, a count of what it holds."""

import math
import os
import platform
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from minirlhf import kernels, sft
from minirlhf.engine import machine, parallel
from minirlhf.kernels import logprobs, matmul, token_logprobs

N, C = 5, 8
CHUNKS = {  # numbers of a part, by the vocabulary
    "many parts": lambda v: max(1, v * N // 100),  # of 17 tokens one each, of 1,000 ten
    "three parts": lambda v: -(-v * N // 3),
    "one": lambda v: 1 << 23,
}


@pytest.fixture(params=CHUNKS)
def chunked(request, monkeypatch):
    """Sets the chunk for a vocabulary of that size."""
    return lambda vocab: monkeypatch.setitem(kernels.CHUNK, "cpu", CHUNKS[request.param](vocab))


def inputs(vocab, dtype=torch.float32, scale=1.0, n=N, seed=0):
    """hidden (n, C), weight (vocab, C), targets (n,): logits of standard deviation `scale`."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, C, generator=generator, dtype=torch.float64) * scale / math.sqrt(C)
    weight = torch.randn(vocab, C, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, vocab, (n,), generator=generator)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets


def plain(hidden, weight, targets, temperature=1.0):
    """The definition, in float64."""
    logits = hidden.double() @ weight.double().t() / temperature
    return logits.log_softmax(-1)[torch.arange(len(targets)), targets]


def gradients(out, *of, upstream=None):
    """Of a sum weighted by upstream (all 1 where none is given)."""
    upstream = torch.ones(len(out)) if upstream is None else upstream
    return torch.autograd.grad(out, of, upstream.to(out.dtype))


def check(tensor, expected, tolerance=2e-6):
    """Equal, the tolerance relative to the largest entry where that is above 1."""
    scale = max(1.0, expected.abs().max().item())
    torch.testing.assert_close(tensor.double(), expected.double(), rtol=0, atol=tolerance * scale)


def check_all(tensors, expected, tolerance=2e-6):
    for a, b in zip(tensors, expected, strict=True):
        check(a, b, tolerance)


def all_equal(some, others):
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
@pytest.mark.parametrize("vocab", [17, 1000])
def test_values_and_gradients(chunked, vocab, temperature):
    chunked(vocab)
    hidden, weight, targets = inputs(vocab)
    upstream = torch.linspace(-1, 2, N)
    got = token_logprobs(hidden, weight, targets, temperature=temperature)
    expected = plain(hidden, weight, targets, temperature)
    assert got.shape == (N,) and got.dtype == torch.float32
    check(got, expected)
    ours, theirs = (gradients(x, hidden, weight, upstream=upstream) for x in (got, expected))
    assert {x.dtype for x in ours} == {torch.float32}
    check_all(ours, theirs)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_gradient_is_the_finite_difference(chunked, temperature):
    def f(h, w):
        return token_logprobs(h, w, targets, temperature=temperature)

    chunked(17)
    hidden, weight, targets = inputs(17, torch.float64)
    assert f(hidden, weight).dtype == torch.float64
    assert torch.autograd.gradcheck(f, (hidden, weight))


def test_second_backward_is_the_first(chunked):
    """A kept chunk of logits is read, not consumed."""
    chunked(17)
    hidden, weight, targets = inputs(17)
    loss = token_logprobs(hidden, weight, targets).sum()
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    assert all_equal(first, torch.autograd.grad(loss, (hidden, weight)))


def test_tied_embedding(chunked):
    """The weight takes gradient as the head and through the hidden states made from it."""
    chunked(17)
    weight, tokens = inputs(17)[1], torch.tensor([3, 3, 16, 0, 9])
    grads = []
    for f in (token_logprobs, plain):
        hidden = torch.tanh(weight[tokens] * 1.3)
        loss = f(hidden, weight, tokens.roll(-1)).square().sum()
        grads.append(torch.autograd.grad(loss, weight)[0])
    check(*grads)


@pytest.mark.parametrize("which", [0, 1])
def test_only_one_input_needs_gradient(chunked, which):
    chunked(17)
    *tensors, targets = inputs(17)
    expected = gradients(plain(*tensors, targets), tensors[which])
    fixed = [t if i == which else t.detach() for i, t in enumerate(tensors)]
    check_all(gradients(token_logprobs(*fixed, targets), tensors[which]), expected)
    with torch.no_grad():
        assert not token_logprobs(*tensors, targets).requires_grad


@pytest.mark.parametrize("vocab", [17, 1000])
@pytest.mark.parametrize("scale", [30.0, 1000.0])
def test_extreme_logits(chunked, vocab, scale):
    chunked(vocab)
    hidden, weight, targets = inputs(vocab, scale=scale)
    got, expected = token_logprobs(hidden, weight, targets), plain(hidden, weight, targets)
    check(got, expected)
    ours, theirs = (gradients(x, hidden, weight) for x in (got, expected))
    check_all(ours, theirs, 1e-5 * scale)  # logits are rounded in proportion to their size


@pytest.mark.parametrize("vocab", [17, 1000])
def test_equal_logits(chunked, vocab):
    chunked(vocab)
    _, weight, targets = inputs(vocab)
    hidden = torch.zeros(N, C, requires_grad=True)
    got = token_logprobs(hidden, weight, targets)
    check(got, torch.full((N,), -math.log(vocab)))
    check(gradients(got, hidden)[0], weight[targets] - weight.mean(0))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("vocab, scale", [(17, 1.0), (1000, 1.0), (1000, 30.0), (17, 1000.0)])
def test_entropy(chunked, vocab, scale, temperature):
    """In one pass with the log-probs, and where it has a gradient; both by the definition."""
    chunked(vocab)
    hidden, weight, targets = inputs(vocab, scale=scale)

    def both():
        return kernels.token_logprobs_and_entropy(hidden, weight, targets, temperature=temperature)

    logp = (hidden.double() @ weight.double().t() / temperature).log_softmax(1)
    p = logp.exp().detach().numpy()
    expected = torch.tensor([-sum(x * math.log(x) for x in row if x > 0) for row in p])
    with torch.no_grad():
        found, entropy = both()
    check(found, plain(hidden, weight, targets, temperature))
    check(entropy, expected, 1e-5 * max(1, scale / 10))
    assert entropy.shape == (N,) and not entropy.requires_grad
    found, entropy = both()
    check(entropy, expected, 1e-5 * max(1, scale / 10))
    assert entropy.shape == (N,) and entropy.requires_grad and found.requires_grad
    alone = token_logprobs(hidden, weight, targets, temperature=temperature)
    assert all_equal(gradients(found, hidden, weight), gradients(alone, hidden, weight))
    definition = -(logp.exp() * logp).sum(1)
    ours, theirs = (gradients(x, hidden, weight) for x in (entropy, definition))
    check_all(ours, theirs, 1e-5 * max(1, scale / 10))


def test_gradient_of_the_entropy_is_the_finite_difference(chunked):
    def f(h, w):
        return kernels.token_logprobs_and_entropy(h, w, targets, temperature=0.6)[1]

    chunked(17)
    hidden, weight, targets = inputs(17, torch.float64)
    assert torch.autograd.gradcheck(f, (hidden, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprob_from_logits(dtype, temperature):
    def f(z):
        return kernels.logprob_from_logits(z, targets, temperature=temperature)

    torch.manual_seed(0)
    logits = (5 * torch.randn(6, 40)).to(dtype).requires_grad_()
    targets = torch.tensor([0, 39, 3, 3, 17, 8])
    got = f(logits)
    expected = []
    for z, t in zip(logits.detach().double().numpy() / temperature, targets, strict=True):
        z = z - z.max()
        expected.append(z[t] - math.log(sum(math.exp(x) for x in z)))
    check(got, torch.tensor(expected), 1e-6)
    assert got.dtype == torch.promote_types(dtype, torch.float32)
    if dtype == torch.float64:
        assert torch.autograd.gradcheck(f, logits)
    with pytest.raises(ValueError, match="temperature"):
        kernels.logprob_from_logits(logits, targets, temperature=0)


@pytest.mark.parametrize("exact", [True, False])
def test_both_libraries_of_a_cpu_are_exact(monkeypatch, exact):
    """oneDNN where it computes in fp32, and MKL where it would round: the same to rounding.

    The caller's setting stays.
    """
    really = machine.onednn_is_exact()
    monkeypatch.setattr(machine, "onednn_is_exact", lambda: exact and really)
    before = torch.get_float32_matmul_precision()
    hidden, weight, targets = inputs(1000, n=40)
    got, expected = token_logprobs(hidden, weight, targets), plain(hidden, weight, targets)
    check(got, expected)
    check_all(*(gradients(x, hidden, weight) for x in (got, expected)))
    assert torch.get_float32_matmul_precision() == before
    with pytest.raises(RuntimeError, match="shape"):
        token_logprobs(hidden[:, 1:], weight, targets)
    assert torch.get_float32_matmul_precision() == before


@pytest.mark.parametrize("given", [None, "50"])
def test_a_cpu_keeps_the_code_of_few_shapes_unless_said(given):
    name = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
    own = {key: value for key, value in os.environ.items() if key != name}
    told = own | ({name: given} if given else {})
    read = f"import ctypes, minirlhf.engine.machine; get = ctypes.CDLL(None).getenv; \
get.restype = ctypes.c_char_p; print(get(b'{name}').decode())"  # as oneDNN does
    done = subprocess.run([sys.executable, "-c", read], env=told, capture_output=True, text=True)
    assert done.stdout.strip() == (given or "512"), done.stderr


def test_a_library_that_rounds_is_not_taken(monkeypatch):
    exact, product = machine.onednn_is_exact.__wrapped__, torch.Tensor.__matmul__

    def rounding(a, b):
        return product(a.bfloat16().to(a.dtype) if a.dtype == torch.float32 else a, b)

    monkeypatch.setattr(torch.Tensor, "__matmul__", rounding)
    assert not exact()
    monkeypatch.undo()
    machine.precision(torch.device("cpu"), "float32")
    expected = "medium" if machine.onednn_is_exact() else "highest"
    assert torch.get_float32_matmul_precision() == expected
    assert expected == "highest" or machine.cpu_precision(rows=2) == "highest"
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("units", [False, True])
def test_autocast_rounds_no_logprob(chunked, monkeypatch, units):
    """Nor gradients, but on a CPU that multiplies bf16 numbers itself: they differ by rounding."""
    chunked(1000)
    monkeypatch.setattr(matmul, "has_bf16_units", lambda: units)
    hidden, weight, targets = inputs(1000, scale=5.0)
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            got = token_logprobs(hidden, weight, targets)
            assert got.dtype == torch.float32
            results.append([got, *gradients(got, hidden, weight)])
    (exact, *exact_gradients), (rounded, *rounded_gradients) = results
    assert torch.equal(exact, rounded)
    for one, other in zip(exact_gradients, rounded_gradients, strict=True):
        apart = (one - other).norm() / one.norm()
        assert 1e-4 < apart < 2**-7 if units else apart == 0


@pytest.mark.parametrize(
    "name, held, takes",
    [
        ("ONEDNN_MAX_CPU_ISA", "", True),
        ("ONEDNN_MAX_CPU_ISA", "AVX2", False),  # there bf16 takes forty times as long as fp32
        ("DNNL_MAX_CPU_ISA", "avx512_core_vnni", False),  # and here three times
        ("ONEDNN_MAX_CPU_ISA", "avx512_core_bf16", True),
        ("DNNL_MAX_CPU_ISA", "AVX10_1_512_AMX", True),
    ],
)
def test_bf16_is_taken_only_where_onednn_may_use_its_instructions(monkeypatch, name, held, takes):
    for variable in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv(name, held)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    asked = {"_is_avx512_bf16_supported": True, "_is_amx_tile_supported": False}
    for question, answer in asked.items():
        monkeypatch.setattr(torch.cpu, question, lambda answer=answer: answer, raising=False)
    has_bf16_units = matmul.has_bf16_units.__wrapped__  # that of machine.py is tests/conftest.py's
    assert has_bf16_units() == takes
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False, raising=False)
    assert not has_bf16_units()


@pytest.mark.parametrize("units", [False, True])
def test_dtype_auto(monkeypatch, capsys, units):
    """A run is of the type that it took, as its state and what it caches must know."""
    monkeypatch.setattr(machine, "has_bf16_units", lambda: units)
    knobs = sft.Knobs(dtype="auto", device="cpu")
    _, autocast = parallel.start(knobs)
    taken = "bfloat16" if units else "float32"
    assert knobs.dtype == taken and capsys.readouterr().out == f"--dtype auto: {taken}\n"
    with autocast:
        assert torch.is_autocast_enabled("cpu") == units


def test_operator_and_direct_walk_are_one(chunked):
    """What compiled code calls, and what all other code does: the same bits, and no second
    derivative, which neither has."""
    chunked(17)
    hidden, weight, targets = inputs(17)
    found = []
    for walk in (logprobs.Walk.apply, logprobs.token_logprobs_op):
        got, *_ = walk(hidden, weight, targets, 0.7, torch.float32, 1, False)
        slopes = torch.autograd.grad(got.square().sum(), (hidden, weight), create_graph=True)
        found.append([got, *slopes])
        with pytest.raises(RuntimeError, match="once_differentiable|no autograd formula"):
            slopes[0].sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_bfloat16_hidden(chunked):
    """What a bf16 product leaves: log-probs exact for it, and its gradient in its own type."""
    chunked(17)
    hidden, weight, targets = inputs(17)
    hidden = hidden.detach().bfloat16().requires_grad_()
    got, expected = token_logprobs(hidden, weight, targets), plain(hidden, weight, targets)
    assert got.dtype == torch.float32
    check(got, expected)
    ours, theirs = (gradients(x, hidden, weight) for x in (got, expected))
    assert [x.dtype for x in ours] == [x.dtype for x in theirs]
    check(ours[0], theirs[0], 1e-2)
    check(ours[1], theirs[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_temperature_is_not_rounded_into_narrow_inputs(chunked, dtype):
    chunked(1000)
    hidden, weight, targets = inputs(1000, dtype, scale=5.0)
    got = token_logprobs(hidden, weight, targets, temperature=0.7)
    check(got, plain(hidden, weight, targets, 0.7), 1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_narrow_products_as_a_gpu_makes_them(chunked, temperature):
    """The twin's operators told to multiply in bf16.

    Confident tokens keep their gradient, and the temperature is not rounded in.
    """
    chunked(1000)
    hidden, weight, _ = (x.detach().bfloat16() for x in inputs(1000, scale=4.0))
    logits = (hidden.double() @ weight.double().t() / temperature).requires_grad_()
    targets = logits.argmax(1)
    arguments = hidden, weight, targets, temperature, torch.bfloat16
    found, lse, _, kept = logprobs.token_logprobs_op(*arguments, 0, False)
    expected = logits.log_softmax(1)[torch.arange(N), targets]
    check(found, expected, 5e-5)
    d_logits = torch.autograd.grad(expected.sum(), logits)[0] / temperature
    got = logprobs.token_logprobs_backward_op(*arguments, torch.ones(N), lse, kept)
    for a, b in zip(got, (d_logits @ weight.double(), d_logits.t() @ hidden.double()), strict=True):
        assert (a.double() - b).norm() < 1e-2 * b.norm()


def test_a_log_prob_is_never_above_0(chunked):
    """The likeliest token's logit is taken from the product whose sum it is held against."""
    chunked(1000)
    hidden, weight, _ = inputs(1000, scale=1000.0)
    targets = (hidden @ weight.t()).argmax(1)
    got = token_logprobs(hidden, weight, targets)
    assert (got <= 0).all()
    check(got, plain(hidden, weight, targets), 1e-3)


@pytest.mark.parametrize("wrong", [-1, 17])
def test_targets_outside_the_vocabulary_are_errors(wrong):
    hidden, weight, targets = inputs(17)
    targets[2] = wrong
    with pytest.raises(IndexError):
        token_logprobs(hidden, weight, targets)
    with pytest.raises(IndexError):
        kernels.logprob_from_logits(hidden @ weight.t(), targets)


def test_narrow_targets():
    hidden, weight, targets = inputs(17)
    for f in (
        lambda t: token_logprobs(hidden, weight, t),
        lambda t: kernels.logprob_from_logits(hidden @ weight.t(), t),
    ):
        assert torch.equal(f(targets.int()), f(targets))


@pytest.mark.parametrize("temperature", [0, 0.0, -1.0, float("nan")])
def test_temperature_must_be_positive(temperature):
    with pytest.raises(ValueError, match="temperature"):
        token_logprobs(*inputs(17), temperature=temperature)


def test_no_rows(chunked):
    chunked(17)
    hidden, weight, targets = inputs(17, n=0)
    got = token_logprobs(hidden, weight, targets)
    assert got.shape == (0,) and got.dtype == torch.float32
    d_hidden, d_weight = gradients(got, hidden, weight)
    assert d_hidden.shape == (0, C) and torch.equal(d_weight, torch.zeros_like(weight))


def test_the_vocabulary_is_never_held_for_all_rows(monkeypatch):
    rows, vocab, chunk = 64, 1000, 4000

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                self.size = max(self.size, out.numel())
            return out

    monkeypatch.setitem(kernels.CHUNK, "cpu", chunk)
    hidden, weight, targets = inputs(vocab, n=rows)
    with Largest() as largest:
        token_logprobs(hidden, weight, targets).sum().backward()
    assert 0 < largest.size <= max(chunk, vocab * C) < rows * vocab


def test_what_the_room_hands_on():
    """The names that others import, from the module where each is made."""
    names = "CHUNK KEEP aligned fused head_logits logprob_from_logits token_logprobs"
    assert set(kernels.__all__) == {*names.split(), "token_logprobs_and_entropy"}
    assert all(hasattr(kernels, name) for name in kernels.__all__)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="not this C library")
def test_freed_memory_is_kept():
    """Arrays of 40 MB one after the other: the system gives pages for the first few alone."""
    code = """if True:
        import resource, sys, torch
        from minirlhf.engine import machine
        def faults(times):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            for _ in range(times):
                torch.empty(10 << 20).zero_()
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        if sys.argv[1] == "kept":
            machine.keep_freed_memory()
        faults(8)
        print(faults(10))
    """
    found = {}
    for how in ("as it was", "kept"):
        run = [sys.executable, "-c", code, how]
        found[how] = int(subprocess.run(run, capture_output=True, text=True, check=True).stdout)
    assert 4 * found["kept"] < found["as it was"]
