"""Cached decoding against loops that recompute everything, and what must hold of any rollout.

Letters: B rows, Q prompt width, R new tokens, V vocabulary. A row of a rollout is [prompt,
response, padding].
"""

import contextlib
import itertools

import numpy as np
import pytest
import torch

from minirlhf.engine.decoding import Decoder, decode, row_noise
from minirlhf.engine.passes import Step
from minirlhf.engine.rows import response_mask, window
from minirlhf.gpt import GPT, GPTConfig
from minirlhf.kernels import decoding as decode_kernels
from minirlhf.look import answers as module
from minirlhf.look.answers import answers
from minirlhf.sampling import generate, response_logprobs
from minirlhf.tokenizer import Tokenizer

V, CONTEXT, PAD, EOS, NEVER = 13, 32, 11, 12, -1
LENGTHS = [1, 5, 3, 8]
Q, R = max(LENGTHS), 9


def make(vocab=V, seed=0, sharpness=1.0):
    """A random model of decided opinions, or of vaguer ones."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(vocab, CONTEXT, 2, 2, 16))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.4 * torch.randn_like(p))
        for p in model.ln_f.parameters():
            p.mul_(sharpness)
    return model.eval()


@pytest.fixture(scope="module")
def model():
    return make()


def ragged(lengths=LENGTHS, pad=PAD, seed=0):
    rng = np.random.default_rng(seed)
    prompts = torch.full((len(lengths), max(lengths)), pad)
    for i, n in enumerate(lengths):
        prompts[i, :n] = torch.from_numpy(rng.integers(0, 11, n))
    return prompts, torch.tensor(lengths)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def sampled(model, prompts=None, n=R, **options):
    options = {"eos": EOS, "pad": PAD, "generator": rng()} | options
    return generate(model, *(prompts or ragged()), n, **options)


def some_eos(model, prompts=None, **options):
    """A token that ends some rows early and not all, given those options of `sampled`."""
    for eos in range(PAD):
        lengths = sampled(model, prompts, eos=eos, **options).response_lengths
        if lengths.min() < R - 1 and lengths.max() == R:
            return eos
    raise AssertionError("no such token: choose another seed")


def rows_of(out):
    """Each row as (prompt, response) lists of ids."""
    return [
        (t[:p], t[p : p + r])
        for t, p, r in zip(
            out.tokens.tolist(),
            out.prompt_lengths.tolist(),
            out.response_lengths.tolist(),
            strict=True,
        )
    ]


def next_logprobs(model, ids, temperature):
    """log-probs of the token after `ids`: no cache, no batch."""
    return (model(torch.tensor([ids]))[0, -1] / temperature).log_softmax(-1)


def greedy_loop(model, ids, n, eos):
    response = []
    while len(response) < n and (not response or response[-1] != eos):
        response.append(int(next_logprobs(model, ids + response, 1.0).argmax()))
    return response


def logprobs_loop(model, out, temperature, width=R):
    result = torch.zeros(len(out.tokens), width)
    for i, (prompt, response) in enumerate(rows_of(out)):
        for t, token in enumerate(response):
            result[i, t] = next_logprobs(model, prompt + response[:t], temperature)[token]
    return result


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


# Decoding with the cache is decoding without


@pytest.mark.parametrize("seed, ends", itertools.product(range(4), [True, False]))
def test_greedy_is_full_recomputation(seed, ends):
    model, prompts = make(seed=seed, sharpness=0.5), ragged(seed=seed)
    eos = some_eos(model, prompts, temperature=0) if ends else NEVER
    out = sampled(model, prompts, temperature=0, eos=eos)
    for (prompt, response), row, n in zip(rows_of(out), prompts[0].tolist(), LENGTHS, strict=True):
        assert prompt == row[:n] and response == greedy_loop(model, prompt, R, eos)
    close(out.logprobs, logprobs_loop(model, out, 1.0))


@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize("ends", [True, False])
def test_logprobs_are_full_recomputation(model, temperature, ends):
    eos = some_eos(model, temperature=temperature) if ends else NEVER
    out = sampled(model, temperature=temperature, eos=eos)
    assert out.logprobs.dtype == torch.float32 and out.logprobs.shape == (4, R)
    expected = logprobs_loop(model, out, temperature)
    close(out.logprobs, expected)
    close(response_logprobs(model, *out[:3], R, temperature), expected)


def test_response_logprobs_gradient(model):
    out, weights = sampled(model, eos=some_eos(model)), torch.linspace(-1, 1, 4 * R).view(4, R)
    ours = (response_logprobs(model, *out[:3], R, 0.7) * weights).sum()
    loop = 0
    for i, (prompt, response) in enumerate(rows_of(out)):
        for t, token in enumerate(response):
            loop = loop + weights[i, t] * next_logprobs(model, prompt + response[:t], 0.7)[token]
    parameters = list(model.parameters())
    for a, b in zip(
        torch.autograd.grad(ours, parameters), torch.autograd.grad(loop, parameters), strict=True
    ):
        close(a, b, 1e-5 * max(1.0, b.abs().max().item()))


@torch.no_grad()
def test_what_lies_past_a_row_in_the_cache_changes_nothing(model):
    tokens, lengths = ragged(lengths=[4, 7, 2])
    decoder = Decoder(model, 3, 12, eos=NEVER, pad=PAD, temperature=1.0, top_k=None)
    decoder.start(model, tokens, lengths, 0, 0)
    past = (torch.arange(12) >= lengths[:, None])[None, :, None, :, None]
    for x in (decoder.cache[:, 0], decoder.cache[:, 1]):
        x.masked_fill_(past, 1e4)
    for _ in range(3):
        hidden = model.trunk(Step(decoder.token, decoder.slot, decoder.cache))
        rows = [row[: n + 1].tolist() for row, n in zip(decoder.tokens, decoder.slot, strict=True)]
        close(hidden, torch.stack([model.hidden(torch.tensor([row]))[0, -1] for row in rows]))
        decoder.pick(hidden)


@pytest.mark.parametrize("n", [2, R])
def test_padding_of_the_prompts_changes_nothing(model, n):
    (prompts, lengths), outs = ragged(), []
    for fill in (PAD, 3, EOS):
        other = prompts.where(torch.arange(Q) < lengths[:, None], fill)
        outs.append(sampled(model, (other, lengths), n))
    for a, b in itertools.product(outs[:1], outs[1:]):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_row_alone_is_the_row_in_a_batch(model):
    prompts, lengths = ragged()
    eos = some_eos(model, temperature=0)
    batch = sampled(model, temperature=0, eos=eos)
    for i, n in enumerate(LENGTHS):
        alone = sampled(model, (prompts[i : i + 1, :n], lengths[i : i + 1]), temperature=0, eos=eos)
        assert rows_of(alone)[0] == rows_of(batch)[i]
        close(alone.logprobs[0], batch.logprobs[i])


# The shape of a rollout


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("n", [1, 2, 5, 12])
def test_eos_ends_a_row(n, seed):
    model = make(vocab=5, seed=seed, sharpness=0.2)
    prompts = (
        torch.tensor([[0, 1], [2, 3], [1, 3]]).repeat(10, 1),
        torch.tensor([2, 1, 2]).repeat(10),
    )
    out = sampled(model, prompts, n, eos=4, pad=3, temperature=1.5)
    assert out.tokens.shape == (30, 2 + n) and torch.equal(out.prompt_lengths, prompts[1])
    ended = 0
    for i, (prompt, response) in enumerate(rows_of(out)):
        assert prompt == prompts[0][i, : len(prompt)].tolist()
        assert 1 <= len(response) <= n and 4 not in response[:-1]
        assert response[-1] == 4 or len(response) == n
        assert (out.tokens[i, len(prompt) + len(response) :] == 3).all()
        assert (out.logprobs[i, len(response) :] == 0).all() and (
            out.logprobs[i, : len(response)] < 0
        ).all()
        ended += response[-1] == 4
    assert ended > 0 and (ended < 30 or n == 12)  # both kinds occur
    close(out.logprobs, logprobs_loop(model, out, 1.5, n))


def test_masks_and_shifts_by_loop():
    x, lengths = torch.randn(3, 10, 2), torch.tensor([1, 4, 6])
    for i, p in enumerate(lengths.tolist()):
        for t in range(6):
            assert torch.equal(window(x, lengths - 1, 6)[i, t], x[i, min(p - 1 + t, 9)])
            assert response_mask(lengths, 6)[i, t] == (t < p)


@pytest.mark.parametrize("training", [True, False])
def test_mode_is_restored(model, training):
    dropping = GPT(GPTConfig(V, CONTEXT, 2, 2, 16, dropout=0.5)).train(training)
    dropping.load_state_dict(model.state_dict())
    out = sampled(dropping)
    assert all(m.training == training for m in dropping.modules())
    assert torch.equal(out.tokens, sampled(model).tokens)  # and no token was dropped out
    assert not out.logprobs.requires_grad


# The distribution


def test_seed_decides(model):
    state = torch.get_rng_state()
    outs = [sampled(model, eos=NEVER, generator=rng(seed)) for seed in (0, 0, 1)]
    assert torch.equal(outs[0].tokens, outs[1].tokens) and torch.equal(
        outs[0].logprobs, outs[1].logprobs
    )
    assert not torch.equal(outs[0].tokens, outs[2].tokens)
    assert torch.equal(
        torch.get_rng_state(), state
    )  # a generator of one's own leaves torch's alone


def test_a_rows_noise_is_its_own():
    """Whatever the first row and the number of rows; and 10,000 numbers that are uniform."""
    whole = row_noise(7, 0, 50, 100)
    assert (
        whole.shape == (50, 100, 2)
        and whole.dtype == torch.float64
        and whole.min() >= 0
        and whole.max() < 1
    )
    for first, rows in ((0, 1), (0, 49), (3, 5), (49, 1)):
        assert torch.equal(row_noise(7, first, rows, 100), whole[first : first + rows])
    assert not torch.isin(row_noise(8, 0, 50, 100), whole).any()
    assert len(whole.unique()) == 10_000  # no two places share a number
    sorted_noise = whole.flatten().sort().values.numpy()
    distance = np.abs(
        sorted_noise - (np.arange(10_000) + 0.5) / 10_000
    ).max()  # Kolmogorov-Smirnov; 1.95 / sqrt(n) is one in 1,000
    assert distance < 0.0195


@pytest.mark.parametrize("options", [{}, {"temperature": 2.0, "top_k": 4}])
def test_a_rows_sample_is_its_own(model, options):
    """A part of the rows, told which is its first, gives what the whole batch gives them."""
    options = {"eos": 5, "pad": PAD, "temperature": 1.0, "top_k": None} | options

    def sampled(model, prompts, first_row=0):
        torch.manual_seed(0)
        return decode(model, *prompts, R, first_row=first_row, **options)

    prompts, lengths = ragged(LENGTHS * 3)
    whole = sampled(model, (prompts, lengths))
    assert len({tuple(response) for _, response in rows_of(whole)}) > 9
    for rows in (slice(0, 5), slice(5, 12), slice(11, 12)):
        part = sampled(model, (prompts[rows], lengths[rows]), first_row=rows.start)
        assert torch.equal(part.tokens, whole.tokens[rows]) and torch.equal(
            part.response_lengths, whole.response_lengths[rows]
        )
        close(part.logprobs, whole.logprobs[rows])
    assert not torch.equal(sampled(model, (prompts, lengths), first_row=1).tokens, whole.tokens)


@pytest.mark.parametrize(
    "temperature, top_k", [(1.0, None), (0.7, None), (2.0, None), (1.0, 3), (1.0, 99)]
)
def test_frequencies_are_the_softmax(temperature, top_k):
    model, n = make(vocab=6, sharpness=0.2), 20000
    p = next_logprobs(model, [2, 0], temperature).exp()
    if top_k == 3:
        p = p.where(p >= p.sort(descending=True).values[2], 0)
    p = p / p.sum()
    out = sampled(
        model,
        (torch.tensor([[2, 0]]).expand(n, 2), torch.full((n,), 2)),
        1,
        eos=NEVER,
        pad=5,
        temperature=temperature,
        top_k=top_k,
    )
    counts, expected = out.tokens[:, 2].bincount(minlength=6).float(), n * p
    assert (counts[p == 0] == 0).all() and (expected[p > 0] > 5).all()
    chi_square = ((counts - expected)[p > 0] ** 2 / expected[p > 0]).sum()
    assert chi_square < 30  # 5 degrees of freedom: one fair sampler in 70,000 exceeds it
    close(out.logprobs[:, 0], p.log()[out.tokens[:, 2]])


def test_top_k_keeps_the_likeliest(model):
    out = sampled(model, top_k=2, eos=NEVER, temperature=2.0)
    for prompt, response in rows_of(out):
        for t, token in enumerate(response):
            assert token in next_logprobs(model, prompt + response[:t], 1.0).topk(2).indices
    assert torch.equal(sampled(model, top_k=1).tokens, sampled(model, temperature=0).tokens)


# Precision, errors, and answers


def test_rows_that_have_ended_are_left_out(model, monkeypatch):
    """Each row is what it would be without an end, up to its end; fewer and fewer are decoded."""
    prompts, lengths = ragged(LENGTHS * 30)
    n = CONTEXT - Q
    decoded, advance = [], Decoder.advance

    def counted(self, model):
        decoded.append(len(self.ended))
        advance(self, model)

    monkeypatch.setattr(Decoder, "advance", counted)
    endless = sampled(model, (prompts, lengths), n, eos=NEVER, temperature=2.0)
    assert decoded == [120] * (n - 1)
    decoded.clear()
    out = sampled(model, (prompts, lengths), n, eos=5, temperature=2.0)
    assert len(set(decoded)) > 2 and sorted(decoded, reverse=True) == decoded
    for i, (p, (prompt, response)) in enumerate(zip(lengths, rows_of(endless), strict=True)):
        end = response.index(5) + 1 if 5 in response else n
        row = prompt + response[:end]
        padding = [PAD] * (Q + n - len(row))
        assert out.tokens[i].tolist() == row + padding
        assert out.response_lengths[i] == end and out.prompt_lengths[i] == p
        close(out.logprobs[i, :end], endless.logprobs[i, :end])
        assert not out.logprobs[i, end:].any()


def test_bfloat16_autocast_runs(model):
    with torch.autocast("cpu", torch.bfloat16):
        out = sampled(model, temperature=0.7)
        again = response_logprobs(model, *out[:3], R, 0.7)
    assert out.logprobs.dtype == again.dtype == torch.float32
    assert ((out.tokens >= 0) & (out.tokens < V)).all()
    close(out.logprobs, again, 0.2)
    close(again, logprobs_loop(model, out, 0.7), 0.2)


@pytest.mark.parametrize(
    "options, names",
    [
        ({"n": CONTEXT - Q + 1}, f"{Q}.*{CONTEXT - Q + 1}.*{CONTEXT}"),
        ({"n": 0}, "max_new_tokens 0"),
        ({"temperature": -0.1}, "temperature -0.1"),
        ({"top_k": -1}, "top_k -1"),
        ({"prompts": (torch.zeros(2, 3, dtype=torch.long), torch.tensor([0, 3]))}, "0..3"),
        ({"prompts": (torch.zeros(2, 3, dtype=torch.long), torch.tensor([1, 4]))}, "1..4 of 3"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"top_k": 0}, "top_k 0"),
    ],
)
def test_senseless_arguments(model, options, names):
    with pytest.raises(ValueError, match=names):
        sampled(model, **options)


def test_the_context_can_be_filled(model):
    out = sampled(model, n=CONTEXT - Q, temperature=0, eos=NEVER)
    assert [r for _, r in rows_of(out)] == [
        greedy_loop(model, p, CONTEXT - Q, NEVER) for p, _ in rows_of(out)
    ]


def test_answers(monkeypatch):
    tokenizer = Tokenizer.train(["abab"], 258)
    policy, reference = make(tokenizer.vocab_size), make(tokenizer.vocab_size, seed=1)
    prompts = [np.array([tokenizer.eos, *tokenizer.encode(text)]) for text in ("ab", "b", "abba")]
    kept = []
    monkeypatch.setattr(
        module, "generate", lambda *a, **k: kept.append(generate(*a, **k)) or kept[0]
    )
    torch.manual_seed(0)
    found = answers(
        policy,
        reference,
        lambda t, p, r: r * 2.0,
        prompts,
        tokenizer,
        R,
        0.7,
        contextlib.nullcontext(),
        0,
    )
    kl = (logprobs_loop(policy, kept[0], 0.7) - logprobs_loop(reference, kept[0], 0.7)).sum(1)
    for answer, text, k, (_, response) in zip(
        found, ("ab", "b", "abba"), kl.tolist(), rows_of(kept[0]), strict=True
    ):
        assert answer.prompt == text and answer.response == tokenizer.decode(response)
        assert answer.tokens == len(response) and answer.score == 2.0 * len(response)
        assert answer.kl == pytest.approx(k, abs=1e-3)
    same = answers(policy, policy, None, prompts, tokenizer, R, 1.0, contextlib.nullcontext(), 0)
    assert all(a.kl == 0 and np.isnan(a.score) for a in same)


@pytest.mark.parametrize("vocab", [3, 64, 200])
def test_draws_are_the_distributions(vocab):
    """Chi-square over 40,000 rows of one distribution; tokens of probability 0 never come."""
    n, p = 40_000, torch.rand(vocab, generator=rng(1)) ** 3
    p[vocab // 2] = 0
    noise = torch.rand(n, 2, generator=rng(2), dtype=torch.float64)
    tokens = decode_kernels.draw((p / p.sum()).expand(n, -1), noise)
    counts, expected = torch.bincount(tokens, minlength=vocab), n * (p / p.sum()).double()
    assert counts[vocab // 2] == 0
    often = expected > 5
    chi2, df = ((counts - expected) ** 2 / expected)[often].sum().item(), often.sum().item() - 1
    assert chi2 < df + 5 * (2 * df) ** 0.5
    p[[0, -1]] = 0  # the ends of the noise are the first and the last token that can come
    ends = torch.tensor([[1 - 2.0**-53] * 2, [0.0, 0.0]], dtype=torch.float64)
    possible = p.nonzero().flatten().tolist()
    assert not possible or decode_kernels.draw(p.expand(2, -1), ends).tolist() == [
        possible[0],
        possible[-1],
    ]


def test_draws_from_numbers_that_are_none():
    assert (decode_kernels.draw(torch.full((2, 100), float("nan")), torch.rand(2, 2)) < 100).all()


def test_a_failure_leaves_the_model_in_its_mode(model):
    model.train()
    with pytest.raises(IndexError):
        generate(model, torch.full((2, 3), V), torch.tensor([3, 3]), 4, eos=EOS, pad=PAD)
    assert model.training
    model.eval()


def test_double_models(model):
    model = make().double()
    out = sampled(model)
    close(response_logprobs(model, *out[:3], R).float(), out.logprobs)
