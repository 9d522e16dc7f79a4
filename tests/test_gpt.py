"""GPT and RewardModel against transformers' own GPT-2, and the promises a left-aligned,
right-padded batch rests on.

The directories are written to tmp_path from small random configurations; no test needs a network.
"""

import contextlib
import dataclasses
import functools
import json
import math
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from minirlhf.engine import passes, prepare
from minirlhf.engine.passes import Pass
from minirlhf.feedback.preference_model import PreferenceModel
from minirlhf.gpt import GPT, GPTConfig, RewardModel
from minirlhf.kernels import attention as attention_kernels
from minirlhf.kernels.attention import attention, drop_out, noise_of, scramble
from minirlhf.tokenizer import Tokenizer

V, CONTEXT, PAD = 61, 24, 7
CONFIG = GPTConfig(vocab_size=V, n_ctx=CONTEXT, n_layer=3, n_head=4, n_embd=32)
LENGTHS = [5, 11, 1, 8]
TEXT = "hello there, it's the world's  best\n\n film: héllo 日本 " * 3


def roughen(model, seed=0):
    """Every parameter moved, so that no bias is 0 and no gain 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model.eval()


def ragged(pad=PAD, lengths=LENGTHS, vocab=V, seed=0):
    """Rows of random tokens other than `pad`, right-padded with it, and their lengths."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, vocab - 1, (len(lengths), max(lengths)), generator=generator)
    tokens += tokens >= pad
    lengths = torch.tensor(lengths)
    return tokens.where(torch.arange(tokens.shape[1]) < lengths[:, None], pad), lengths


@pytest.fixture
def hf():
    return pytest.importorskip("transformers")


def theirs_of(hf, cls, **options):
    """A random model of a transformers class, of the sizes of CONFIG."""
    sizes = {"vocab_size": V, "n_positions": CONTEXT, "n_embd": 32, "n_layer": 3, "n_head": 4}
    return roughen(cls(hf.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, **options)))


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([TEXT], 290)


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


# The layout of transformers, both ways


def test_language_model_reads_what_transformers_writes(hf, tmp_path):
    theirs = theirs_of(hf, hf.GPT2LMHeadModel)
    theirs.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(tmp_path)
    assert ours.config == CONFIG
    tokens, _ = ragged()
    ours_logits, theirs_logits = ours(tokens), theirs(tokens).logits
    close(ours_logits, theirs_logits)
    for logits in (ours_logits, theirs_logits):
        F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    grads = {name.removeprefix("transformer."): p.grad for name, p in theirs.named_parameters()}
    for name, p in ours.named_parameters():
        matrix = p.dim() == 2 and name.startswith("h.")  # transformers keeps these transposed
        close(p.grad.t() if matrix else p.grad, grads.pop(name))
    assert not grads


def test_language_model_is_read_by_transformers(hf, tmp_path, tokenizer):
    ours = roughen(GPT(GPTConfig(tokenizer.vocab_size, CONTEXT, 3, 4, 32)))
    ours.save_pretrained(tmp_path / "model", tokenizer)
    theirs, report = hf.GPT2LMHeadModel.from_pretrained(
        tmp_path / "model", output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert theirs.config.eos_token_id == theirs.config.bos_token_id == tokenizer.eos
    close(theirs.train()(ragged()[0]).logits, ours(ragged()[0]))  # no dropout
    close(GPT.from_pretrained(str(tmp_path / "model"))(ragged()[0]), ours(ragged()[0]), 0)
    assert {p.name for p in (tmp_path / "model").iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    }


def test_reward_model_reads_what_transformers_writes(hf, tmp_path):
    theirs = theirs_of(hf, hf.GPT2ForSequenceClassification, num_labels=1, pad_token_id=PAD)
    theirs.save_pretrained(tmp_path)
    tokens, lengths = ragged()
    close(RewardModel.from_pretrained(tmp_path)(tokens, lengths), theirs(tokens).logits[:, 0])


def test_reward_model_is_read_by_transformers_after_normalize(hf, tmp_path, tokenizer):
    ours = roughen(RewardModel(GPTConfig(tokenizer.vocab_size, CONTEXT, 3, 4, 32)))
    ours.normalize(3.0, 0.25)
    ours.save_pretrained(tmp_path, tokenizer)
    theirs = hf.GPT2ForSequenceClassification.from_pretrained(tmp_path).eval()
    assert theirs.config.pad_token_id == tokenizer.pad and theirs.config.num_labels == 1
    tokens, lengths = ragged(tokenizer.pad, vocab=tokenizer.vocab_size)
    tokens.scatter_(
        1, lengths[:, None] - 1, tokenizer.eos
    )  # a response ends with EOS, which is no padding
    close(theirs(tokens).logits[:, 0], ours(tokens, lengths))
    close(RewardModel.from_pretrained(tmp_path)(tokens, lengths), ours(tokens, lengths), 0)


SHAPES = [(1, 1, 8, 11), (2, 2, 12, 97), (4, 8, 64, 300), (5, 3, 24, 61), (2, 4, 96, 1000)]


@pytest.mark.parametrize("n_layer, n_head, n_embd, vocab", SHAPES)
def test_all_shapes_both_ways(hf, tmp_path, n_layer, n_head, n_embd, vocab):
    """Ours read by transformers and theirs read here: language model, reward model, preference
    model."""
    config = GPTConfig(vocab, CONTEXT, n_layer, n_head, n_embd)
    sizes = {
        "n_positions": CONTEXT,
        "n_layer": n_layer,
        "n_head": n_head,
        "n_embd": n_embd,
        "vocab_size": vocab,
    }
    tokens, lengths = ragged(vocab=vocab)
    for cls, theirs_cls, outputs in [
        (GPT, hf.GPT2LMHeadModel, 0),
        (RewardModel, hf.GPT2ForSequenceClassification, 1),
        (PreferenceModel, hf.GPT2ForSequenceClassification, 6),
    ]:
        labels = {"num_labels": outputs, "pad_token_id": PAD} if outputs else {}
        ours = roughen(cls(config, **({"dim": 6} if outputs == 6 else {})))
        theirs = roughen(
            theirs_cls(hf.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, **labels))
        )

        def read(model, cls=cls):
            return (
                model(tokens)
                if cls is GPT
                else model(tokens, lengths)
                if cls is RewardModel
                else model.embed(tokens, lengths)
            )

        ours.save_pretrained(tmp_path / f"ours{outputs}")
        extra = {"pad_token_id": PAD} if outputs else {}
        loaded, report = theirs_cls.from_pretrained(
            tmp_path / f"ours{outputs}", output_loading_info=True, **extra
        )
        assert not any(
            report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")
        )
        close(loaded.eval()(tokens).logits.view_as(read(ours)), read(ours), 2e-5)
        theirs.save_pretrained(tmp_path / f"theirs{outputs}")
        loaded = cls.from_pretrained(tmp_path / f"theirs{outputs}")
        close(read(loaded), theirs(tokens).logits.view_as(read(loaded)), 2e-5)


def test_old_checkpoint_loads(tmp_path):
    """No `transformer.` prefix, the causal mask and the tied head among the weights, in half
    precision."""
    model = roughen(GPT(CONFIG))
    model.save_pretrained(tmp_path)
    weights = {
        k.removeprefix("transformer."): w.half()
        for k, w in load_file(tmp_path / "model.safetensors").items()
    }
    weights |= {f"h.{i}.attn.bias": torch.ones(1, 1, CONTEXT, CONTEXT).tril() for i in range(3)}
    weights["lm_head.weight"] = weights["wte.weight"].clone()
    weights |= {f"h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(3)}
    save_file(weights, tmp_path / "model.safetensors")
    loaded = GPT.from_pretrained(tmp_path)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    close(loaded(ragged()[0]), model.half().float()(ragged()[0]))


def edit_config(directory, **changes):
    settings = json.loads((directory / "config.json").read_text()) | changes
    (directory / "config.json").write_text(
        json.dumps({k: v for k, v in settings.items() if v != "gone"})
    )


def edit_weights(directory, name, weight=None):
    weights = load_file(directory / "model.safetensors") | {f"transformer.{name}": weight}
    save_file({k: w for k, w in weights.items() if w is not None}, directory / "model.safetensors")


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    "damage, error, names",
    [
        (lambda d: edit_weights(d, "h.1.ln_2.bias"), ValueError, "h.1.ln_2.bias is missing"),
        (lambda d: edit_weights(d, "extra", torch.zeros(1)), ValueError, "extra is unexpected"),
        (lambda d: edit_weights(d, "ln_f.bias", torch.zeros(31)), ValueError, r"ln_f.bias.*31.*32"),
        (
            lambda d: edit_weights(d, "h.2.ln_1.bias", torch.full((32,), math.nan)),
            ValueError,
            "h.2.ln_1.bias.*not finite",
        ),
        (
            lambda d: edit_weights(d, "wpe.weight", torch.full((CONTEXT, 32), math.inf)),
            ValueError,
            "wpe.weight.*not finite",
        ),
        (lambda d: edit_config(d, model_type="llama"), ValueError, "model_type.*llama"),
        (
            lambda d: edit_config(d, activation_function="relu"),
            ValueError,
            "activation_function.*relu",
        ),
        (
            lambda d: edit_config(d, layer_norm_epsilon=1e-6),
            ValueError,
            "layer_norm_epsilon.*1e-06",
        ),
        (lambda d: edit_config(d, n_inner=100), ValueError, "n_inner.*100"),
        (lambda d: edit_config(d, n_layer=2), ValueError, "h.2.*unexpected"),
        (lambda d: edit_config(d, n_head="gone"), ValueError, "n_head"),
        (lambda d: (d / "config.json").write_text('{"n_layer": '), ValueError, "broken"),
        (lambda d: truncate(d / "model.safetensors"), ValueError, "broken"),
        (lambda d: (d / "config.json").unlink(), FileNotFoundError, "config.json"),
        (shutil.rmtree, FileNotFoundError, "no such directory"),
        pytest.param(
            lambda d: (d / "model.safetensors").unlink(), FileNotFoundError, "model.safetensors"
        ),
        pytest.param(lambda d: (d / "config.json").write_text("[]"), ValueError, "config.json"),
        pytest.param(
            lambda d: edit_config(d, scale_attn_by_inverse_layer_idx=True), ValueError, "scale_attn"
        ),
        pytest.param(lambda d: edit_config(d, tie_word_embeddings=False), ValueError, "tie_word"),
    ],
)
def test_broken_directory(tmp_path, monkeypatch, damage, error, names):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    GPT(CONFIG).save_pretrained(tmp_path / "model")
    damage(tmp_path / "model")
    with pytest.raises(error, match=names) as caught:
        GPT.from_pretrained(tmp_path / "model")
    assert str(tmp_path / "model") in str(caught.value)


KINDS = {GPT: "language model", RewardModel: "reward model", PreferenceModel: "preference model"}


@pytest.mark.parametrize("there", KINDS)
@pytest.mark.parametrize("asked", [RewardModel, PreferenceModel])
def test_another_kind_of_model_is_named(tmp_path, there, asked):
    there(CONFIG).save_pretrained(tmp_path)
    message = f"{tmp_path}: a {KINDS[there]} lies here, expected a {KINDS[asked]}"
    with contextlib.nullcontext() if there is asked else pytest.raises(ValueError, match=message):
        asked.from_pretrained(tmp_path)


# Initial weights


def test_initial_weights():
    model = GPT(GPTConfig(1000, 256, 4, 4, 256))
    for name, p in model.named_parameters():
        if p.dim() == 2:
            expected = 0.02 / math.sqrt(2 * 4) if "c_proj" in name else 0.02
            assert (
                p.std().item() == pytest.approx(expected, rel=0.02)
                and abs(p.mean().item()) < 0.0005
            ), name
        else:
            assert torch.equal(p, torch.zeros_like(p) if "bias" in name else torch.ones_like(p)), (
                name
            )


def test_initial_reward_head():
    heads = []
    for seed in range(20):
        torch.manual_seed(seed)
        heads.append(RewardModel(GPTConfig(10, 4, 1, 1, 256)).score.weight.detach())
    assert torch.cat(heads).std().item() == pytest.approx(1 / math.sqrt(257), rel=0.04)
    assert abs(torch.cat(heads).mean().item()) < 0.004


def test_from_base_copies_the_trunk():
    base = roughen(GPT(CONFIG))
    model = RewardModel.from_base(base, dropout=0.1)
    assert model.config.dropout == 0.1 and model.config.n_layer == 3
    close(model.eval().transformer.hidden(ragged()[0]), base.hidden(ragged()[0]), 0)
    roughen(model)
    assert not torch.equal(model.transformer.wte.weight, base.wte.weight)


# Rows of a batch


def test_head_is_tied():
    model = roughen(GPT(CONFIG))
    assert model.lm_head_weight is model.wte.weight and not any(
        "lm_head" in name for name in model.state_dict()
    )
    close(model(ragged()[0]), model.hidden(ragged()[0]) @ model.wte.weight.t())


@pytest.mark.parametrize("t", [0, 4, 9])
def test_later_tokens_change_nothing_earlier(t):
    model, (tokens, _) = roughen(RewardModel(CONFIG)), ragged(lengths=[10])
    changed = tokens.clone()
    changed[:, t:] = (tokens[:, t:] + 1) % V
    for read in (model.transformer, model.values):
        a, b = read(tokens), read(changed)
        close(a[:, :t], b[:, :t], 0)
        assert not torch.isclose(a[:, t:], b[:, t:]).all(-1).any()


def row_loss(model, tokens, lengths, i):
    """Row i's next-token loss over its own tokens plus its score: of a language model and a reward
    model."""
    n = int(lengths[i])
    lm, reward = model.transformer(tokens), model(tokens, lengths)
    return F.cross_entropy(lm[i, : n - 1], tokens[i, 1:n], reduction="sum") + reward[i]


@pytest.mark.parametrize("i", range(len(LENGTHS)))
def test_row_alone_is_the_row_in_a_batch(i):
    model, (tokens, lengths) = roughen(RewardModel(CONFIG)), ragged()
    alone, n = tokens[i : i + 1, : LENGTHS[i]], LENGTHS[i]
    close(model.transformer(tokens)[i, :n], model.transformer(alone)[0])
    close(model.values(tokens)[i, :n], model.values(alone)[0])
    close(model(tokens, lengths)[i], model.values(alone)[0, -1])
    in_batch = torch.autograd.grad(row_loss(model, tokens, lengths, i), list(model.parameters()))
    by_itself = torch.autograd.grad(
        row_loss(model, alone, lengths[i : i + 1], 0), list(model.parameters())
    )
    scale = max(g.abs().max() for g in by_itself)
    for a, b in zip(in_batch, by_itself, strict=True):
        close(a / scale, b / scale)


def test_padding_content_changes_nothing():
    model, (tokens, lengths) = roughen(RewardModel(CONFIG)), ragged()
    real = torch.arange(tokens.shape[1]) < lengths[:, None]
    other = tokens.where(real, torch.randint(0, V, tokens.shape))
    close(model(tokens, lengths), model(other, lengths), 0)
    close(model.transformer(tokens)[real], model.transformer(other)[real], 0)


def test_normalize():
    model, (tokens, lengths) = roughen(RewardModel(CONFIG)), ragged(lengths=[6] * 40)
    with torch.no_grad():
        scores, values = model(tokens, lengths), model.values(tokens)
        model.normalize(scores.mean().item(), scores.std().item())
        after = model(tokens, lengths)
        assert after.mean().item() == pytest.approx(
            0, abs=1e-5
        ) and after.std().item() == pytest.approx(1, abs=1e-5)
        assert torch.equal(after.argsort(), scores.argsort())
        close(model.values(tokens), (values - scores.mean()) / scores.std())


# Token-level rewards


def token_level(**options):
    return roughen(RewardModel(CONFIG, level="token", **options))


def test_autocast_leaves_the_head_in_fp32():
    """A score rounded to bf16 has steps of 2^-8 or more from 1 on, and many pairs of them tie."""
    torch.manual_seed(0)
    model = RewardModel(GPTConfig(50, 16, 1, 2, 32)).eval()
    tokens, lengths = torch.randint(0, 50, (6, 9)), torch.full((6,), 9)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        hidden = model.transformer.hidden(tokens, lengths).double()
        score, values = model(tokens, lengths), model.values(tokens, lengths)
    expected = (hidden * model.score.weight.detach().double()[0]).sum(2)
    assert score.dtype == values.dtype == torch.float32
    close(values, expected.float())
    close(score, expected[:, -1].float())


def test_token_level_score_is_the_sum_over_the_response():
    model, (tokens, lengths) = token_level(), ragged()
    prompt_lengths = torch.tensor([2, 10, 0, 3])
    values = model.values(tokens).detach().double().numpy()
    expected = [
        sum(values[b, t] for t in range(p, n))
        for b, (p, n) in enumerate(zip(prompt_lengths, LENGTHS, strict=True))
    ]
    np.testing.assert_allclose(model(tokens, lengths, prompt_lengths).detach(), expected, atol=1e-5)
    with pytest.raises(ValueError, match="prompt_lengths is missing"):
        model(tokens, lengths)
    with pytest.raises(ValueError, match="'word'.*response or token"):
        RewardModel(CONFIG, level="word")


def test_credit_moved_between_tokens_changes_only_the_token_level(monkeypatch):
    """Three tokens of prompt, four of response: the response level reads the head at the last token
    and nowhere else."""
    values, moved = (
        torch.tensor([[9.0, 9, 9, 1, 2, 3, 4]]),
        torch.tensor([[9.0, 9, 10, 0, 1, 4, 4]]),
    )
    tokens, lengths, prompt_lengths = (
        torch.zeros(1, 7, dtype=torch.long),
        torch.tensor([7]),
        torch.tensor([3]),
    )
    scores = []
    for level in ("response", "token"):
        for v in (values, moved):
            model = RewardModel(CONFIG, level=level)
            model.score = torch.nn.Identity()

            def hidden(idx, lengths, at=None, v=v):
                return v[..., None] if at is None else v[:, at]

            monkeypatch.setattr(model.transformer, "hidden", hidden)
            scores.append(model(tokens, lengths, prompt_lengths).item())
    assert scores == [
        4,
        4,
        10,
        9,
    ]  # one unit went to the prompt; a unit from one response token to another stays in the sum


def test_token_level_is_saved_and_normalised_by_its_sums(hf, tmp_path):
    model, (tokens, lengths) = token_level(), ragged(lengths=[6, 9, 4, 7] * 10)
    prompt_lengths = torch.tensor([1, 2, 3, 5] * 10)
    before = model(tokens, lengths, prompt_lengths).detach().double().numpy()
    mean, std = before.mean(), before.std()
    model.normalize(mean, std)
    model.normalize(0.5, 2.0)  # and once more: the constant is scaled with the rest
    expected = ((before - mean) / std - 0.5) / 2
    np.testing.assert_allclose(model(tokens, lengths, prompt_lengths).detach(), expected, atol=1e-5)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["reward_level"] == "token"
    loaded = RewardModel.from_pretrained(tmp_path)
    assert loaded.level == "token"
    close(loaded(tokens, lengths, prompt_lengths), model(tokens, lengths, prompt_lengths), 0)
    theirs = hf.GPT2ForSequenceClassification.from_pretrained(
        tmp_path, pad_token_id=PAD
    ).eval()  # the head at the last token
    close(theirs(tokens).logits[:, 0], model.values(tokens).gather(1, lengths[:, None] - 1)[:, 0])


# The pairwise preference model


def test_preference_logit_is_the_skew_form():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(5, 6)), rng.normal(size=(5, 6))
    R = np.kron(np.eye(3), np.array([[0, 1], [-1, 0]]))
    model = PreferenceModel(CONFIG, dim=6)
    logit = model.logit(torch.from_numpy(a), torch.from_numpy(b))
    np.testing.assert_allclose(logit, [x @ R @ y for x, y in zip(a, b, strict=True)], atol=1e-12)
    np.testing.assert_array_equal(model.logit(torch.from_numpy(b), torch.from_numpy(a)), -logit)
    every = model.logit(torch.from_numpy(a)[:, None], torch.from_numpy(b))  # (5, 5)
    np.testing.assert_allclose(every, a @ R @ b.T, atol=1e-12)
    for dim in (0, 3):
        with pytest.raises(ValueError, match=f"dim {dim}.*even"):
            PreferenceModel(CONFIG, dim)


def test_preference_embedding_reads_the_last_token(tmp_path):
    model, (tokens, lengths) = roughen(PreferenceModel(CONFIG, dim=6)), ragged()
    hidden = model.transformer.hidden(tokens)
    for b, n in enumerate(LENGTHS):
        close(model.embed(tokens, lengths)[b], model.score.weight @ hidden[b, n - 1])
    model.save_pretrained(tmp_path)
    close(
        PreferenceModel.from_pretrained(tmp_path).embed(tokens, lengths),
        model.embed(tokens, lengths),
        0,
    )


@pytest.mark.parametrize("dim", [2, 8, 32])
def test_fresh_preference_logits_are_of_order_one(dim):
    torch.manual_seed(0)
    model = PreferenceModel(GPTConfig(10, 4, 1, 1, 256), dim)
    a, b = model.score(torch.randn(2, 2000, 256))
    assert 0.5 < model.logit(a, b).std().item() < 2
    with torch.no_grad():
        heads = torch.stack(
            [PreferenceModel(GPTConfig(10, 4, 1, 1, 256), dim).score.weight for _ in range(20)]
        )
    assert heads.std().item() == pytest.approx(dim**-0.25 / math.sqrt(257), rel=0.04)


def test_rock_paper_scissors():
    """Each beats the next with p = .9. No scores do better than equal ones, log 2; three embeddings
    reach the entropy of .9."""
    pairs, q = torch.tensor([[0, 1], [1, 2], [2, 0]]), 0.9
    scores, embeddings = torch.randn(3, dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64)
    model = PreferenceModel(CONFIG, dim=2)

    def fit(x, logit):
        x = x.clone().requires_grad_()
        optimizer = torch.optim.LBFGS(
            [x], max_iter=200, tolerance_grad=1e-12, line_search_fn="strong_wolfe"
        )

        def closure():
            optimizer.zero_grad()
            p = 1 / (1 + torch.exp(-logit(*x[pairs].unbind(1))))
            loss = -(q * p.log() + (1 - q) * (1 - p).log()).mean()
            loss.backward()
            return loss

        optimizer.step(closure)
        return closure().item(), x.detach()

    loss, scores = fit(scores, lambda a, b: a - b)
    assert loss == pytest.approx(0.6931471805599453, abs=1e-9) and scores.std() < 1e-4
    loss, _ = fit(embeddings, model.logit)
    assert loss == pytest.approx(-0.9 * math.log(0.9) - 0.1 * math.log(0.1), abs=1e-9)
    assert loss == pytest.approx(0.3251, abs=1e-4)


@pytest.mark.parametrize("cls", [GPT, RewardModel])
def test_row_longer_than_the_context(cls):
    model = cls(CONFIG)
    read = model if cls is GPT else model.values
    assert read(torch.zeros(1, CONTEXT, dtype=torch.long)).shape[1] == CONTEXT
    with pytest.raises(ValueError, match=f"{CONTEXT + 1}.*{CONTEXT}"):
        read(torch.zeros(1, CONTEXT + 1, dtype=torch.long))


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="33.*4"):
        GPTConfig(V, CONTEXT, 1, 4, 33)


def test_dropout_is_off_by_default_and_in_eval(tmp_path):
    model, (tokens, _) = roughen(GPT(CONFIG)), ragged()
    assert CONFIG.dropout == 0.0
    close(model.train()(tokens), model.eval()(tokens), 0)
    model.save_pretrained(tmp_path)
    dropped = GPT.from_pretrained(tmp_path, dropout=0.3)
    close(dropped.eval()(tokens), model(tokens), 0)
    draws = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        draws.append(dropped.train()(tokens))
    for a, b in ((draws[0], draws[1]), (draws[0], model(tokens))):
        assert not torch.allclose(a, b, atol=1e-2)


def layered(dropout=0.0):
    return roughen(GPT(GPTConfig(61, 80, 2, 2, 32, dropout=dropout)))


class WithoutWanted(passes.Pass):
    """The pass of a fork whose blocks always go on with all tokens."""

    def wanted(self, x):
        return x


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("lengths", [[5, 11, 1, 8], [9, 9, 9], [24, 1, 1, 1, 2]])
def test_the_last_block_of_one_place_alone(lengths, dropout, monkeypatch):
    """The same score and gradients as from all hidden states, in rows with and without padding."""
    model = roughen(RewardModel(dataclasses.replace(CONFIG, dropout=dropout))).train()
    tokens, n = ragged(lengths=lengths)
    weight = torch.linspace(-1, 2, len(n))

    def score_and_gradients(score):
        model.zero_grad()
        (score * weight).sum().backward()
        return [score.detach(), *(p.grad.clone() for p in model.parameters())]

    torch.manual_seed(3)
    rows = torch.arange(len(n))
    every = score_and_gradients(model.values(tokens, n)[rows, n - 1])
    widths = []
    gelu = F.gelu
    monkeypatch.setattr(F, "gelu", lambda x, **k: widths.append(x[..., 0].numel()) or gelu(x, **k))
    one = score_and_gradients(model(tokens, n))
    assert widths[0] >= n.sum() and widths[-1] == len(n)
    monkeypatch.setattr("minirlhf.gpt.Pass", WithoutWanted)
    fork = score_and_gradients(model(tokens, n))
    for found in (one, fork):
        for a, b in zip(found, every, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


SEEN = [([3, 70, 1, 9, 20] * 5, 576), ([5], 8), ([70, 2], 72), ([1] * 9 + [40], 56)]
SEEN += [([0] * 9 + [30], 32)]


@pytest.mark.parametrize("lengths, seen", SEEN)
def test_padding_is_neither_computed_nor_changes_anything(lengths, seen):
    """Rows by their lengths against each row alone: hidden states and gradients; layers see real
    tokens, up to a multiple of 8 or 64."""
    model, lengths = layered(), torch.tensor(lengths)
    T = int(lengths.max()) + 4
    tokens = torch.randint(0, 61, (len(lengths), T))
    computed = []
    handle = model.h[1].mlp.register_forward_hook(
        lambda module, args, out: computed.append(args[0].shape[:-1].numel())
    )
    out = model.hidden(tokens, lengths=lengths)
    handle.remove()
    assert out.shape == (len(lengths), T, 32) and computed == [seen]
    upstream = torch.randn(len(lengths), T, 32)
    total = 0
    for i, n in enumerate(lengths.tolist()):
        if n == 0:
            continue
        alone = model.hidden(tokens[i : i + 1, :n])[0]
        close(out[i, :n], alone)
        assert (out[i, n:] == 0).all() or len(lengths) * T * 0.85 <= lengths.sum()
        total = total + (alone * upstream[i, :n]).sum()
    ours = (torch.where((torch.arange(T) < lengths[:, None])[..., None], out, 0) * upstream).sum()
    parameters = list(model.parameters())
    for a, b in zip(
        torch.autograd.grad(ours, parameters), torch.autograd.grad(total, parameters), strict=True
    ):
        close(a, b, 1e-4 * max(1.0, b.abs().max().item()))


@pytest.mark.parametrize("T", [1, 7, 256, 300])
def test_attention_is_torchs(T):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, T, 8, requires_grad=True) for _ in range(3))
    side_by_side = torch.cat([x.transpose(1, 2).flatten(2) for x in (q, k, v)], 2)  # (B, T, 3C)
    ours = attention(side_by_side, 3).unflatten(2, (3, 8)).transpose(1, 2)
    theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    close(ours, theirs)
    upstream = torch.randn_like(theirs)
    for a, b in zip(
        *(torch.autograd.grad(x, (q, k, v), upstream) for x in (ours, theirs)), strict=True
    ):
        close(a, b, 1e-5)


def test_dropout_keeps_the_mean_and_its_share():
    torch.manual_seed(0)
    x = torch.ones(300, 1001, requires_grad=True)
    for p in (0.1, 0.35, 0.9):
        out = drop_out(x, p)
        assert (out == 0).float().mean().item() == pytest.approx(p, abs=0.005)
        assert out.mean().item() == pytest.approx(1, abs=0.02) and len(out.unique()) == 2
        close(torch.autograd.grad(out.sum(), x)[0], out.detach(), 0)
    assert drop_out(x, 0) is x
    assert not torch.equal(drop_out(x, 0.5), drop_out(x, 0.5))


# Dropout by noise


def splitmix64(z):
    """The finalizer of Steele et al. 2014 as published, on uint64."""
    z = np.asarray(z, dtype=np.uint64)
    with np.errstate(over="ignore"):
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def test_scramble_is_splitmix64():
    gamma, mask = 0x9E3779B97F4A7C15, 2**64 - 1
    states = np.array([(1234567 + i * gamma) & mask for i in range(1, 6)], dtype=np.uint64)
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert splitmix64(states).tolist() == published  # of the generator with seed 1234567
    more = np.random.default_rng(0).integers(0, 2**64, 1000, dtype=np.uint64)
    numbers = np.concatenate(
        [states, more, np.array([0, 1, 2**63 - 1, 2**63, mask], dtype=np.uint64)]
    )
    ours = scramble(torch.from_numpy(numbers.view(np.int64).copy()))
    np.testing.assert_array_equal(ours.numpy().view(np.uint64), splitmix64(numbers))


@pytest.mark.parametrize("seed", [0, 7, 2**62 + 7, 2**63 - 1])
def test_noise_of_rows_is_the_loop(seed):
    rows, mask = (
        torch.randint(0, 50257, (5, 30), generator=torch.Generator().manual_seed(1)),
        2**64 - 1,
    )
    torch.manual_seed(seed)
    lengths = [30, 1, 17, 29, 2]
    noise = noise_of(rows, torch.tensor(lengths)).numpy().view(np.uint64)
    for b, row in enumerate(rows.tolist()):
        total = seed % 2**62 + sum(
            int(splitmix64((token + 0x632BE59BD9B4E019 * t) & mask))
            for t, token in enumerate(row[: lengths[b]])
        )
        for t in range(30):
            assert noise[b, t] == splitmix64((total + 0x4F1BBCDCBFA53E0B * t) & mask)


@pytest.mark.parametrize("p", [0.1, 0.2, 0.5, 0.999])
def test_dropout_by_noise_is_that_of_the_bytes(p):
    """Each number by one byte of splitmix64: dropped where the byte is below 256 p, rounded, of
    which there are at most 255."""
    noise = noise_of(torch.randint(0, 300, (3, 4), generator=torch.Generator().manual_seed(2)))
    x = torch.randn(3, 4, 21, requires_grad=True)
    out, below = drop_out(x, p, noise), {0.1: 26, 0.2: 51, 0.5: 128, 0.999: 255}[p]
    for where, number in np.ndenumerate(noise.numpy().view(np.uint64)):
        eights = [
            int(splitmix64((int(number) + 0x1E3779B97F4A7C15 * k) & (2**64 - 1))) for k in (1, 2, 3)
        ]
        bits = b"".join(eight.to_bytes(8, "little") for eight in eights)[:21]
        factor = torch.tensor([0.0 if byte < below else 256 / (256 - below) for byte in bits])
        close(out[where], x[where] * factor, 0)
    close(torch.autograd.grad(out.sum(), x)[0] * x, out, 1e-6)


@pytest.mark.parametrize("p", [0.1, 0.35, 0.9])
@pytest.mark.parametrize("rows", ["random", "alike"])
def test_dropout_by_noise_keeps_its_share_everywhere(p, rows):
    """In every row, in every column, and of what is kept the scale; rows of one token repeated are
    no exception."""
    generator = torch.Generator().manual_seed(3)
    idx = (
        torch.randint(0, 300, (40, 25), generator=generator)
        if rows == "random"
        else torch.arange(40)[:, None].repeat(1, 25)
    )
    torch.manual_seed(0)
    out = drop_out(torch.ones(40, 25, 1001), p, noise_of(idx))
    share = round(256 * p) / 256
    assert sorted(out.unique().tolist()) == pytest.approx([0, 1 / (1 - share)])
    kept = (out > 0).flatten(0, 1).double()  # (1000, 1001)
    for dim in (0, 1):  # six standard deviations: one of 1,001 is further away in one of 500,000
        assert (kept.mean(dim) - (1 - share)).abs().max() < 6 * (share * (1 - share) / 1000) ** 0.5
    assert kept.mean().item() == pytest.approx(
        1 - share, abs=4 * (share * (1 - share) / 1e6) ** 0.5
    )


def test_dropout_by_noise_is_independent():
    """Between rows, places, columns, layers, heads and seeds: correlations as of that many
    coins."""
    V, config = 300, GPTConfig(300, 64, 3, 2, 16)

    def kept(idx, offset=0, seed=0):
        torch.manual_seed(seed)
        return (
            2 * (drop_out(torch.ones(*idx.shape, 512), 0.5, noise_of(idx) + offset) > 0).double()
            - 1
        )

    idx = torch.randint(0, V, (4, 50), generator=torch.Generator().manual_seed(4))
    x = kept(idx).view(200, 512)
    for coins in (x, x.t()):  # rows and places, then columns
        correlation = (coins @ coins.t() / coins.shape[1]).fill_diagonal_(0)
        assert correlation.abs().max() < 6.5 / coins.shape[1] ** 0.5
    used = []  # which noise each dropout of a model has, as an offset
    with pytest.MonkeyPatch.context() as patch:
        real = drop_out

        def recorded(x, p, noise):
            used.append(noise.flatten())
            return real(x, p, noise)

        for module in (passes, attention_kernels):
            patch.setattr(module, "drop_out", recorded)
        torch.manual_seed(0)
        GPT(GPTConfig(**{**vars(config), "dropout": 0.5})).train().hidden(idx[:1])
    first = noise_of(idx[:1])[0]
    offsets = {int(d) for noise in used for d in (noise.view(-1, 50) - first).flatten().unique()}
    assert len(used) == 1 + 3 * 3 and len(offsets) == 1 + 3 * (
        2 + 2
    )  # embedding; attention of two heads, its output, MLP
    flat = torch.stack(
        [kept(idx, offset).flatten() for offset in offsets]
        + [kept(idx, 0, seed).flatten() for seed in (1, 2)]
    )
    correlation = (flat @ flat.t() / flat.shape[1]).fill_diagonal_(0)
    assert correlation.abs().max() < 5 / flat.shape[1] ** 0.5


def test_noise_is_of_all_real_tokens_of_a_row():
    a = torch.randint(0, 300, (1, 30), generator=torch.Generator().manual_seed(5))
    other, swapped, padded = a.clone(), a.clone(), a.clone()
    other[0, 10] += 1
    swapped[0, [3, 4]] = a[0, [4, 3]]
    padded[0, 25:] += 1
    assert a[0, 3] != a[0, 4] and not any(
        (noise_of(x) == noise_of(a)).any() for x in (other, swapped, padded)
    )
    lengths = torch.tensor([25])
    assert torch.equal(noise_of(a, lengths), noise_of(padded, lengths))


@pytest.mark.parametrize("lengths", [[3, 70, 1, 9, 20] * 5, [70, 66, 70], [2] * 9 + [40]])
def test_a_rows_dropout_is_its_own(lengths):
    """Alone, in a batch, padded further and packed: hidden states and gradients, which without
    dropout are others."""
    torch.manual_seed(0)
    model, T = layered(0.4).train(), max(lengths) + 6
    tokens = torch.randint(0, 61, (len(lengths), T), generator=torch.Generator().manual_seed(6))
    upstream = torch.randn(len(lengths), T, 32, generator=torch.Generator().manual_seed(7))
    real, parameters = torch.arange(T) < torch.tensor(lengths)[:, None], list(model.parameters())

    def read(hidden):
        torch.manual_seed(11)
        out = torch.where(real[..., None], hidden(tokens), 0)
        return out, torch.autograd.grad((out * upstream).sum(), parameters)

    def plain(idx, ends):
        """A pass that computes the padding, too."""
        run = Pass(model, idx)
        run.noise = noise_of(idx, ends)
        return run

    total, alone = 0, []
    for i, n in enumerate(lengths):
        torch.manual_seed(11)
        torch.rand(i)  # only the seed counts, not what was drawn since
        alone.append(model.hidden(tokens[i : i + 1, :n])[0])
        total = total + (alone[-1] * upstream[i, :n]).sum()
    gradients = torch.autograd.grad(total, parameters)
    packed = []
    with pytest.MonkeyPatch.context() as patch:
        pack = Pass.pack
        patch.setattr(Pass, "pack", lambda *args: packed.append(args) or pack(*args))
        ends = torch.tensor(lengths)
        results = [
            read(lambda x: model.trunk(plain(x, ends))),
            read(lambda x: model.hidden(x, lengths=ends)),
        ]
    assert len(packed) == (sum(lengths) < 0.85 * len(lengths) * T)
    for out, found in results:
        for i, n in enumerate(lengths):
            close(out[i, :n], alone[i], 2e-5)
        for a, b in zip(found, gradients, strict=True):
            close(a, b, 1e-4 * max(1.0, b.abs().max().item()))
    dropped, model = results[0][0], model.eval()
    assert not torch.isclose(read(model.hidden)[0][real], dropped[real], atol=1e-2).all(1).any()


@pytest.fixture
def tracing(monkeypatch):
    """--compile without a compiler: graphs are made, and run by PyTorch. Gives the number of graphs
    so far."""
    import torch._dynamo

    torch._dynamo.reset()
    monkeypatch.setattr(
        passes,
        "compiled_pass",
        functools.cache(
            lambda: torch.compile(passes.plain_pass, dynamic=True, backend="aot_eager")
        ),
    )
    yield lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


def test_compiled_trunk_is_the_eager_one_for_every_shape(tracing):
    model, before = layered(), tracing()
    expected = {}
    for B, T in ((4, 13), (1, 80), (3, 1), (1, 1), (7, 64), (2, 79)):
        tokens = torch.randint(0, 61, (B, T))
        out = model.hidden(tokens)
        expected[tokens] = (
            out.detach(),
            torch.autograd.grad(out.square().sum(), model.wpe.weight)[0],
        )
    prepare.compile_models(model)
    for tokens, (out, gradient) in expected.items():
        got = model.hidden(tokens, lengths=torch.ones(len(tokens), dtype=torch.long))
        close(got, out)
        close(torch.autograd.grad(got.square().sum(), model.wpe.weight)[0], gradient, 1e-4)
    assert tracing() == before + 1


def test_compile_says_why_not(monkeypatch, capsys):
    def broken():
        raise RuntimeError("no compiler here\nand a long story")

    monkeypatch.setattr(passes, "compiled_pass", broken)
    model = layered()
    prepare.compile_models(model)
    assert (
        capsys.readouterr().out
        == "--compile: not possible here, going on without: no compiler here\n"
    )
    assert not model.compiled and model.hidden(torch.zeros(1, 3, dtype=torch.long)).shape == (
        1,
        3,
        32,
    )
