"""What only a GPU can show.

bf16, the whole GPT-2 vocabulary, offsets past 2^31, captured graphs, the scripts on it.
"""

import itertools
import json
import math

import pytest
import torch

from minirlhf import kernels
from minirlhf.engine.decoding import GRAPHS
from minirlhf.engine.prepare import compile_models
from minirlhf.gpt import GPT, GPTConfig
from minirlhf.kernels import decoding, fused_logprobs
from minirlhf.sampling import generate, response_logprobs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
SHAPES = [(5, 64, 17), (33, 128, 1000), (130, 128, 2048), (300, 768, 50257), (700, 768, 50257)]
# dtype, standard deviation of the logits, tolerance of log-probs and of gradients
PRECISIONS = [
    (torch.float32, 3, 5e-5, 1e-4),
    (torch.bfloat16, 3, 5e-4, 5e-3),
    (torch.bfloat16, 30, 5e-4, 5e-3),
]


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def randint(high, *shape):
    return torch.randint(0, high, shape, device="cuda")


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("N, C, V", SHAPES)
@pytest.mark.parametrize("dtype, std, tolerance, grad_tolerance", PRECISIONS)
def test_token_logprobs(monkeypatch, backend, N, C, V, dtype, std, tolerance, grad_tolerance):
    monkeypatch.setenv("MINIRLHF_KERNELS", backend)
    torch.manual_seed(N + std)
    hidden = (torch.randn(N, C, device="cuda") * std / math.sqrt(C)).to(dtype).requires_grad_()
    weight = torch.randn(V, C, device="cuda").to(dtype).requires_grad_()
    targets, upstream = randint(V, N), torch.randn(N, device="cuda")
    targets[0], targets[1] = V - 1, 0
    got = kernels.token_logprobs(hidden, weight, targets, temperature=0.7)
    logits = hidden.double() @ weight.double().t() / 0.7
    expected = logits.log_softmax(-1)[torch.arange(N), targets]
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=tolerance)
    ours = torch.autograd.grad(got, (hidden, weight), upstream)
    theirs = torch.autograd.grad(expected, (hidden, weight), upstream.double())
    for a, b in zip(ours, theirs, strict=True):
        assert a.isfinite().all() and relative(a, b) < grad_tolerance


def test_autocast_keeps_fp32_gradients_of_the_weight():
    hidden = torch.randn(600, 768, device="cuda").requires_grad_()
    weight = (0.05 * torch.randn(50257, 768, device="cuda")).requires_grad_()
    targets = randint(50257, 600)
    with torch.autocast("cuda", torch.bfloat16):
        got = kernels.token_logprobs(hidden, weight, targets)
    assert got.dtype == torch.float32
    rounded = [x.detach().bfloat16().double().requires_grad_() for x in (hidden, weight)]
    expected = (rounded[0] @ rounded[1].t()).log_softmax(-1)[torch.arange(600), targets]
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=5e-4)
    ours = torch.autograd.grad(got.sum(), (hidden, weight))
    theirs = torch.autograd.grad(expected.sum(), rounded)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == torch.float32 and relative(a, b) < 5e-3


def test_entropy(monkeypatch):
    torch.manual_seed(0)
    hidden, weight = (
        torch.randn(n, 768, device="cuda", dtype=torch.bfloat16) / 768**0.25 for n in (700, 50257)
    )
    targets = randint(50257, 700)
    p = (hidden.double() @ weight.double().t() / 0.7).softmax(1)
    expected = -(p * p.log()).sum(1)
    for backend in ("triton", "torch"):
        monkeypatch.setenv("MINIRLHF_KERNELS", backend)
        _, entropy = kernels.token_logprobs_and_entropy(hidden, weight, targets, temperature=0.7)
        torch.testing.assert_close(entropy.double(), expected, rtol=0, atol=5e-4)


@pytest.mark.parametrize("dtype, grad_tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 5e-3)])
def test_logprob_from_logits(dtype, grad_tolerance):
    torch.manual_seed(0)
    logits = (10 * torch.randn(300, 50257, device="cuda")).to(dtype).requires_grad_()
    targets, upstream = randint(50257, 300), torch.randn(300, device="cuda")
    got = kernels.logprob_from_logits(logits, targets, temperature=0.7)
    expected = (logits.double() / 0.7).log_softmax(1)[torch.arange(300), targets]
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=5e-5)
    ours, theirs = (
        torch.autograd.grad(x, logits, upstream.to(x.dtype))[0] for x in (got, expected)
    )
    assert ours.dtype == dtype and relative(ours, theirs) < grad_tolerance


def test_given_logits_past_two_to_the_31():
    logits = torch.randn(43_000, 50_257, device="cuda", dtype=torch.bfloat16)  # 2.2e9 of them
    targets = randint(50_257, 43_000)
    got = kernels.logprob_from_logits(logits, targets)[-3:]
    expected = logits[-3:].double().log_softmax(1)[torch.arange(3), targets[-3:]]
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=5e-5)


def test_offsets_past_two_to_the_31():
    rows, C, V = 44_000, 64, 50_304  # 2.2e9 logits
    torch.manual_seed(0)
    hidden, weight = (torch.randn(n, C, device="cuda", dtype=torch.bfloat16) for n in (rows, V))
    targets = randint(V, rows)
    logprobs, lse, _ = fused_logprobs.fused_forward(hidden, weight, targets, 1.0, True)
    one = torch.ones(rows, device="cuda")
    d_logits = fused_logprobs.fused_d_logits(hidden, weight, lse, targets, one, 1.0, V)
    logits = hidden[-3:].double() @ weight.double().t()
    onehot = torch.nn.functional.one_hot(targets[-3:], V)
    assert relative(d_logits[-3:], onehot - logits.softmax(1)) < 5e-3
    expected = logits.log_softmax(1)[torch.arange(3), targets[-3:]]
    torch.testing.assert_close(logprobs[-3:].double(), expected, rtol=0, atol=5e-4)


def test_sampler_draws_from_the_softmax():
    n, V, T = 200_000, 1000, 0.8
    torch.manual_seed(0)
    logits = (2 * torch.randn(1, V, device="cuda")).repeat(n, 1)
    one = torch.ones(1, dtype=torch.int64, device="cuda")
    tokens, logprobs = decoding.sample_logits(logits, T, one * 7, one)
    expected = (logits[0].double() / T).softmax(0)
    torch.testing.assert_close(logprobs.double(), expected[tokens].log(), rtol=0, atol=1e-5)
    common = n * expected > 5
    counts = torch.bincount(tokens, minlength=V)
    chi2 = ((counts - n * expected) ** 2 / (n * expected))[common].sum().item()
    df = common.sum().item()
    assert abs(chi2 - df) < 5 * math.sqrt(2 * df)


@pytest.fixture
def gpt():
    torch.manual_seed(0)
    model = GPT(GPTConfig(5000, 256, 4, 4, 128)).cuda().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


def prompts(B, Q=20):
    lengths = torch.arange(B, device="cuda") % Q + 1
    return torch.randint(1, 5000, (B, Q), device="cuda"), lengths


def seeded(seed):
    return torch.Generator("cuda").manual_seed(seed)


@pytest.mark.parametrize("backend, autocast", itertools.product(["triton", "torch"], [False, True]))
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_replayed_graph_is_the_full_forward(monkeypatch, gpt, backend, autocast, temperature):
    monkeypatch.setenv("MINIRLHF_KERNELS", backend)
    # The second time from the kept graph, with other weights at the same addresses.
    for _ in range(2):
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            out = generate(gpt, *prompts(7), 30, eos=-1, pad=0, temperature=temperature)
            row = out.tokens, out.prompt_lengths, out.response_lengths
            again = response_logprobs(gpt, *row, 30, temperature or 1.0)
        assert (again - out.logprobs).abs().mean() < (1e-2 if autocast else 1e-4)
        if temperature == 0 and not autocast:
            for tokens, p in zip(out.tokens, out.prompt_lengths.tolist(), strict=True):
                logits = gpt(tokens[None, : p + 29])[0, p - 1 :]
                chosen = logits.gather(1, tokens[p : p + 30, None]).squeeze(1)
                assert (chosen >= logits.max(1).values - 1e-3).all()
        with torch.no_grad():
            for p in gpt.parameters():
                p.mul_(1.1)
    assert len(GRAPHS[gpt]) == 1
    GRAPHS.clear()


def test_graph_sees_weights_eos_and_seeds(gpt):
    first = generate(gpt, *prompts(64), 40, eos=7, pad=0, generator=seeded(1))
    with torch.no_grad():
        gpt.wte.weight[7] += 5 * gpt.ln_f.weight
        gpt.ln_f.bias += 0.5
    second = generate(gpt, *prompts(64), 40, eos=7, pad=0, generator=seeded(1))
    assert second.response_lengths.sum() < first.response_lengths.sum()
    lengths = second.prompt_lengths.tolist(), second.response_lengths.tolist()
    for row, p, r in zip(second.tokens, *lengths, strict=True):
        assert (row[p : p + r - 1] != 7).all() and (row[p + r :] == 0).all()


def test_noise_is_the_seeds(gpt):
    rows = prompts(8)
    first, same, other = (
        generate(gpt, *rows, 40, eos=-1, pad=0, generator=seeded(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first.tokens, same.tokens) and not torch.equal(first.tokens, other.tokens)


@pytest.mark.parametrize("autocast", [False, True])
def test_padding_is_not_computed(gpt, autocast):
    tokens, lengths = randint(5000, 20, 250), torch.arange(5, 245, 12, device="cuda")
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        packed, plain = gpt.hidden(tokens, lengths=lengths).float(), gpt.hidden(tokens).float()
    real = torch.arange(250, device="cuda") < lengths[:, None]
    assert relative(packed[real], plain[real]) < (2e-2 if autocast else 1e-5)
    assert (packed[~real] == 0).all()


def test_nothing_is_compiled_again(gpt):
    import torch._dynamo

    torch._dynamo.reset()
    compile_models(gpt)
    assert gpt.compiled

    def run(B, T):
        tokens = randint(5000, B, T)
        with torch.autocast("cuda", torch.bfloat16):
            out = gpt.hidden(tokens)
            gpt.compiled = False
            assert relative(out, gpt.hidden(tokens)) < 2e-2
            gpt.compiled = True
            with torch.no_grad():
                gpt.hidden(tokens)
        out.float().square().mean().backward()

    run(8, 100)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for B, T in ((8, 101), (3, 256), (1, 7), (32, 64), (1, 1), (5, 130)):
        run(B, T)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before
    torch._dynamo.reset()


def test_a_model_can_be_forgotten():
    import gc
    import weakref

    tokens = torch.ones(2, 3, dtype=torch.int64, device="cuda")
    lengths = torch.tensor([3, 2], device="cuda")
    for autocast in (False, True):
        model = GPT(GPTConfig(100, 64, 1, 2, 32)).cuda()
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            generate(model, tokens, lengths, 4, eos=-1, pad=0)
        gone = weakref.ref(model)
        del model
        gc.collect()
        assert gone() is None and not len(GRAPHS)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_stages_run_and_learn(tmp_path, dtype):
    import train_dpo
    import train_ppo

    common = {"data": "toy", "device": "cuda", "dtype": dtype, "eval_samples": 64}
    train_ppo.main(train_ppo.Knobs(**common, out=str(tmp_path / "ppo"), steps=20))
    first = json.loads((tmp_path / "ppo" / "metrics.jsonl").read_text().splitlines()[0])
    summary = json.loads((tmp_path / "ppo" / "summary.json").read_text())
    assert abs(first["ppo/policy/first_ratio"] - 1) < 1e-4 and abs(first["objective/kl"]) < 1e-4
    assert first["objective/mismatch"] < (1e-4 if dtype == "float32" else 1e-2)
    assert summary["eval/score_after"] > summary["eval/score_before"] + 0.5
    train_dpo.main(train_dpo.Knobs(**common, out=str(tmp_path / "dpo")))
    summary = json.loads((tmp_path / "dpo" / "summary.json").read_text())
    assert summary["eval/score_after"] > summary["eval/score_before"]
