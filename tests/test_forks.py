"""What a forker does gives right numbers or an error, never another distribution in silence.

A fork of the model is made here as a forker makes it, only in memory: classes of minirlhf/gpt.py
are changed, and models made after that are of the new kind. Letters: B rows, Q prompt width, R new
tokens, V vocabulary, C width, H heads, D width of a head.
"""

import math
import os
import shutil
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import train_ppo
import train_rm
from minirlhf import gpt, sft
from minirlhf.engine import decoding, quick
from minirlhf.engine.passes import Pass
from minirlhf.sampling import generate, plain_generate, response_logprobs

ROOT = Path(__file__).parent.parent
V, CONTEXT, PAD, EOS, NEVER = 13, 32, 11, 12, -1
B, Q, R = 16, 8, 7
LINE = "sampling: the quick decoding step"


@pytest.fixture(autouse=True)
def no_model_yet(monkeypatch):
    """As in a new process: the line about the quick step is printed once in each."""
    monkeypatch.setattr(quick, "QUICK", weakref.WeakKeyDictionary())


# Forks: each changes classes of gpt.py by change(owner, name, new)


def plain(change):
    pass


def activation_of(function):
    def forward(self, x):
        return self.c_proj(function(self.c_fc(x)))

    return lambda change: change(gpt.MLP, "forward", forward)


def rms_norm(change):
    """A weight and no bias, in place of every LayerNorm."""
    layers = vars(nn) | {"LayerNorm": nn.RMSNorm}
    change(gpt, "nn", SimpleNamespace(**layers))


def rotate(x, places):
    """x (..., H, D) of tokens at places (...,), turned by angles that grow with the place."""
    half = x.shape[-1] // 2
    speeds = 10000 ** (-torch.arange(half) / half)
    angles = places[:, None, None] * speeds  # (..., 1, D/2)
    first, second = x.split(half, -1)
    turned = first * angles.cos() - second * angles.sin()
    return torch.cat([turned, first * angles.sin() + second * angles.cos()], -1)


def rotary(change):
    """Positions as angles between queries and keys, in place of those that are learned."""
    init = gpt.GPT.__init__

    def without_positions(self, config):
        init(self, config)
        del self.wpe

    def attention(self, x, run):
        q, k, v = self.c_attn(x).unflatten(-1, (3, self.n_head, -1)).unbind(-3)
        qkv = torch.stack([rotate(q, run.places), rotate(k, run.places), v], -3)
        return self.c_proj(run.attend(qkv.flatten(-3), self.n_head))

    change(gpt.GPT, "__init__", without_positions)
    change(gpt.GPT, "trunk", lambda self, run: layers_of(self, run, self.wte(run.idx)))
    change(gpt.Attention, "forward", attention)


def layers_of(model, run, x):
    x = run.drop(x)
    for block in model.h:
        x = block(x, run)
    return run.padded(model.ln_f(x))


def rms_norm_and_rotary(change):
    rms_norm(change)
    rotary(change)


def post_norm(change):
    def forward(self, x, run):
        x = self.ln_1(x + run.drop(self.attn(x, run)))
        return self.ln_2(x + run.drop(self.mlp(x)))

    change(gpt.Block, "forward", forward)


def side_by_side(change):
    def forward(self, x, run):
        return x + run.drop(self.attn(self.ln_1(x), run)) + run.drop(self.mlp(self.ln_2(x)))

    change(gpt.Block, "forward", forward)


def scaled_embedding(change):
    def trunk(self, run):
        x = math.sqrt(self.config.n_embd) * self.wte(run.idx)
        return layers_of(self, run, x + self.wpe(run.places))

    change(gpt.GPT, "trunk", trunk)


FORKS = {
    "relu": activation_of(F.relu),
    "exact gelu": activation_of(F.gelu),
    "silu": activation_of(F.silu),
    "rms norm": rms_norm,
    "rotary": rotary,
    "rms norm and rotary": rms_norm_and_rotary,
    "post-norm": post_norm,
    "side by side": side_by_side,
    "scaled embedding": scaled_embedding,
}


@pytest.fixture(params=FORKS)
def fork(request, monkeypatch):
    FORKS[request.param](monkeypatch.setattr)


def fresh(seed=0, model=None):
    """A model as it is made: of weights so small that it has no opinion."""
    torch.manual_seed(seed)
    return (model or gpt.GPT)(gpt.GPTConfig(V, CONTEXT, 2, 2, 16)).eval()


def train(model):
    """What stands here for training: weights that make it decided."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.4 * torch.randn_like(p))
    return model


def ragged(seed=0):
    torch.manual_seed(seed)
    lengths = torch.randint(1, Q + 1, (B,))
    lengths[-1] = Q
    prompts = torch.randint(0, PAD, (B, Q))
    return prompts.masked_fill(torch.arange(Q) >= lengths[:, None], PAD), lengths


def close(found, expected, tolerance=1e-5):
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


def sampled(model, temperature=1.0, seed=0, eos=NEVER, by=generate):
    prompts, lengths = ragged(seed)
    torch.manual_seed(seed)
    return by(model, prompts, lengths, R, eos=eos, pad=PAD, temperature=temperature)


def expect_right_samples(model, temperature=1.0, seed=0):
    """Tokens are those of the plain loop, and log-probs those of the model that reads the row:
    where nothing ends a response, and where a token that one of them has does."""
    out = expect_plain_samples(model, temperature, seed, NEVER)
    eos = out.tokens[0, out.prompt_lengths[0] + 3].item()
    out = expect_plain_samples(model, temperature, seed, eos)
    assert out.response_lengths[0] <= 4


def expect_plain_samples(model, temperature, seed, eos):
    out = sampled(model, temperature, seed, eos)
    expected = sampled(model, temperature, seed, eos, by=plain_generate)
    for name in ("tokens", "prompt_lengths", "response_lengths"):
        assert torch.equal(getattr(out, name), getattr(expected, name))
    close(out.logprobs, expected.logprobs)
    close(out.logprobs, response_logprobs(model, *out[:3], R, temperature or 1.0))
    return out


# The forked model


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_a_fork_is_sampled_as_itself(fork, temperature, capsys):
    model = train(fresh())
    expect_right_samples(model, temperature)
    assert capsys.readouterr().out.count(LINE) == 1 and not quick.fits(model)
    other = train(fresh(seed=1))
    expect_plain_samples(other, temperature, seed=1, eos=EOS)
    assert not capsys.readouterr().out and not quick.fits(other)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("temperature", [0, 0.7, 1.0])
def test_the_plain_model_takes_the_quick_step(seed, temperature, capsys):
    model = train(fresh(seed))
    expect_right_samples(model, temperature, seed)
    assert not capsys.readouterr().out and quick.fits(model)


def test_a_forks_packed_rows_are_its_rows(fork):
    model = train(fresh())
    torch.manual_seed(0)
    lengths = torch.tensor([3, 20, 1, 11, 7, 20, 2, 5, 9, 4])
    tokens = torch.randint(0, V, (len(lengths), 20))
    packed, whole = model.hidden(tokens, lengths=lengths), model.hidden(tokens)
    for i, n in enumerate(lengths.tolist()):
        alone = model.hidden(tokens[i : i + 1, :n])[0]
        close(packed[i, :n], whole[i, :n])
        close(packed[i, :n], alone)
        assert not packed[i, n:].any()


@torch.no_grad()
def test_a_forks_scores_are_normalised(fork):
    rm = train(fresh(model=gpt.RewardModel))
    tokens, lengths = ragged()
    before = rm(tokens, lengths)
    rm.normalize(before.mean(), before.std(correction=0))
    after = rm(tokens, lengths)
    close(after, (before - before.mean()) / before.std(correction=0))


# What differs from the quick step only later, or only in some weights


def test_a_fork_that_differs_once_it_is_trained(monkeypatch):
    FORKS["relu"](monkeypatch.setattr)
    model = fresh()
    for block in model.h:
        nn.init.zeros_(block.mlp.c_proj.weight)  # a usual start: the activation changes nothing yet
    expect_right_samples(model)
    assert not quick.fits(model)
    expect_right_samples(train(model))


def test_a_trial_leaves_the_model_as_it_was():
    model = train(fresh()).train()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    state = torch.get_rng_state()
    quick.try_out(model)
    assert model.training and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_a_first_sample_between_forward_and_backward():
    model, twin = fresh(), fresh()
    tokens, lengths = ragged()
    loss, expected = model(tokens).square().mean(), twin(tokens).square().mean()
    sampled(model, 1.0, 0, EOS)
    loss.backward()
    expected.backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_what_is_hung_on_a_model_counts_at_once():
    model, direction = train(fresh()), torch.randn(16)
    expect_right_samples(model)
    hook = model.h[0].register_forward_hook(lambda block, given, x: x + direction)
    expect_right_samples(model)
    hook.remove()
    expect_right_samples(model)
    assert quick.fits(model)
    model.h[1].mlp = nn.Identity()
    expect_right_samples(model)


def test_angles_kept_beside_the_weights_are_in_the_rounded_copy(monkeypatch):
    init = gpt.GPT.__init__

    def with_angles(self, config):
        init(self, config)
        self.register_buffer("angles", torch.arange(config.n_ctx) / 7, persistent=False)

    def trunk(self, run):
        return layers_of(self, run, self.wte(run.idx) + self.angles[run.places, None].sin())

    monkeypatch.setattr(gpt.GPT, "__init__", with_angles)
    monkeypatch.setattr(gpt.GPT, "trunk", trunk)
    model, (tokens, _) = train(fresh()), ragged()
    with torch.no_grad():
        copy = decoding.rounded_copy(model, torch.float32)
        assert torch.equal(copy.hidden(tokens), model.hidden(tokens))


# Forks that cannot be read token by token, or that sampling would not see


class MixesTokens(gpt.Block):
    """Adds to each token the one before it, where a layer sees rows."""

    def forward(self, x, run):
        x = super().forward(x, run)
        return x + F.pad(x, (0, 0, 1, -1))


class MixesRows(gpt.Block):
    def forward(self, x, run):
        x = super().forward(x, run)
        return x - x.mean(0)


class CountsPlaces(gpt.Attention):
    """Takes positions from the shape in place of run.places."""

    def forward(self, x, run):
        places = torch.arange(x.shape[-2])[:, None]
        return super().forward(x + places, run)


class SeesRowsAlone(gpt.Attention):
    """Has an attention of its own, without run.attend."""

    def forward(self, x, run):
        q, k, v = (t.unflatten(-1, (self.n_head, -1)) for t in self.c_attn(x).chunk(3, -1))
        q, k, v = (t.transpose(-2, -3) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(-2, -3).flatten(-2))


class AlwaysDrops(gpt.MLP):
    def forward(self, x):
        return F.dropout(super().forward(x), 0.5)


@pytest.mark.parametrize(
    "name, layer",
    [
        ("Block", MixesTokens),
        ("Block", MixesRows),
        ("Attention", CountsPlaces),
        ("Attention", SeesRowsAlone),
        ("MLP", AlwaysDrops),
    ],
)
def test_layers_that_need_whole_rows_are_an_error(name, layer, monkeypatch):
    monkeypatch.setattr(gpt, name, layer)
    with pytest.raises(ValueError, match="let run.attend alone mix tokens"):
        sampled(train(fresh()))


class GoesPart(gpt.Block):
    """A block of which half counts, which the tokens read for a score alone do not fit."""

    def forward(self, x, run):
        return (x + super().forward(x, run)) / 2


class AttendsTwice(gpt.Block):
    def forward(self, x, run):
        return super().forward(x + self.attn(x, run), run)


@pytest.mark.parametrize("layer", [GoesPart, AttendsTwice])
def test_what_needs_tokens_that_a_score_leaves_out_is_an_error(layer, monkeypatch):
    monkeypatch.setattr(gpt, "Block", layer)
    rm, tokens = train(fresh(model=gpt.RewardModel)), ragged()[0]
    for rows in tokens, tokens[:1], tokens[:Q]:  # of any shape, one that broadcasts, too
        with pytest.raises((ValueError, RuntimeError), match="run.wanted|size of tensor"):
            rm(rows, torch.full((len(rows),), Q))
    monkeypatch.setattr(Pass, "wanted", lambda self, x: x)  # as without its line in Block
    lengths = torch.full((B,), Q)
    close(rm(tokens, lengths), rm.values(tokens)[:, -1])


def test_another_hidden_is_an_error():
    class Halved(gpt.GPT):
        def hidden(self, *args, **options):
            return super().hidden(*args, **options) / 2

    with pytest.raises(ValueError, match="change trunk rather than hidden"):
        sampled(train(fresh(model=Halved)))


def test_other_logits_than_those_of_the_head_are_an_error():
    class Capped(gpt.GPT):
        def forward(self, idx):
            return 3 * torch.tanh(super().forward(idx) / 3)

    with pytest.raises(ValueError, match="change trunk or lm_head_weight rather than forward"):
        sampled(train(fresh(model=Capped)))


def test_a_head_of_its_own_is_sampled():
    class Untied(gpt.GPT):
        def __init__(self, config):
            super().__init__(config)
            self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)

        lm_head_weight = property(lambda self: self.lm_head.weight)

    expect_right_samples(train(fresh(model=Untied)))


# All stages with a forked model


def test_ppo_with_a_forked_model(tmp_path, monkeypatch, capsys):
    rms_norm_and_rotary(monkeypatch.setattr)
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # curves take longer than this training
    folders = {name: str(tmp_path / name) for name in ("sft", "rm", "ppo")}
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 16}
    sft.main(sft.Knobs(data="toy", out=folders["sft"], epochs=1, batch_size=512, **sizes))
    train_rm.main(train_rm.Knobs(data="toy", out=folders["rm"], epochs=1, batch_size=256))
    capsys.readouterr()
    knobs = {"steps": 2, "batch_size": 8, "response_length": 4, "eval_samples": 4}
    summary = train_ppo.main(train_ppo.Knobs(data="toy", out=folders["ppo"], **knobs))
    said = capsys.readouterr().out
    check = next(line for line in said.splitlines() if "step-0 check" in line)
    assert check.endswith(": as they should be")
    assert math.isfinite(summary["eval/score_after"])


# Copies of the scripts, and mistakes in what a forker adds


def in_folder(folder, *command):
    """Python in a folder, with the installed package and nothing else on its path."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, *map(str, command)]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    find = "import importlib.util as u; print(*map(bool, map(u.find_spec, {names})))"
    names = ["minirlhf", "train_rm", "train_ppo", "train_dpo"]
    done = in_folder(tmp_path_factory.mktemp("empty"), "-c", find.format(names=names))
    found = dict(zip(names, done.stdout.split(), strict=True))
    if found["minirlhf"] == "False":
        pytest.skip("minirlhf is on the path only, not installed: pip install -e .")
    assert set(found.values()) == {"True"}, f"pip install -e . once more: {found}"


@pytest.mark.parametrize("name", ["train_rm.py", "train_ppo.py", "train_dpo.py"])
def test_a_copy_alone_in_a_folder(installed, name, tmp_path):
    shutil.copy(ROOT / name, tmp_path)
    done = in_folder(tmp_path, name, "--help")
    assert done.returncode == 0 and "--batch-size" in done.stdout and not done.stderr


def test_a_copy_alone_trains(installed, toy, tmp_path):
    shutil.copy(ROOT / "train_dpo.py", tmp_path)
    knobs = ["--data", "toy", "--init", toy / "sft", "--steps", 1, "--eval-samples", 4]
    done = in_folder(tmp_path, "train_dpo.py", *knobs)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "dpo" / "model" / "model.safetensors").is_file()


def expect_traceback(done, *lines):
    assert done.returncode == 1
    assert "Traceback (most recent call last)" in done.stderr
    for line in lines:
        assert line in done.stderr
    assert not [line for line in done.stderr.splitlines() if line.startswith("error:")]


def test_a_type_error_in_an_own_loss_keeps_its_traceback(installed, toy, tmp_path):
    (tmp_path / "fork.py").write_text(
        "from minirlhf import dpo\n"
        "def sigmoid(pairs, beta, label_smoothing=0.0):\n"
        "    return len(beta)\n"
        "dpo.KINDS['sigmoid'] = sigmoid\n"
        "import train_dpo\n"
        "from minirlhf.engine import cli\n"
        "cli.run_script(train_dpo.main, train_dpo.Knobs, train_dpo.__doc__)\n"
    )
    knobs = ["--data", "toy", "--init", toy / "sft", "--steps", 1, "--eval-samples", 4]
    done = in_folder(tmp_path, "fork.py", *knobs)
    expect_traceback(done, "return len(beta)", "TypeError: object of type 'float' has no len()")


def test_an_os_error_in_an_own_reward_keeps_its_traceback(installed, toy, tmp_path):
    (tmp_path / "own.py").write_text(
        "def score(prompts, responses):\n    return open('no such list of words').read()\n"
    )
    knobs = ["--data", "toy", "--init", toy / "sft", "--reward", "own.py:score", "--steps", 1]
    small = ["--batch-size", 8, "--response-length", 4, "--eval-samples", 4]
    done = in_folder(tmp_path, ROOT / "train_ppo.py", *knobs, *small)
    expect_traceback(done, "in score", "No such file or directory: 'no such list of words'")
