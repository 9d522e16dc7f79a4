"""GPT-2 in plain PyTorch: blocks, KV cache, a language-model head and a scalar head, weights in and out.

The architecture is GPT-2's (Radford et al. 2019): pre-norm blocks, learned positions, GELU in its tanh form, the output
head tied to the token embedding. Rows are left-aligned with padding on the right only, so a causal model needs no
attention mask in training, positions are `arange`, and a row gives the same numbers alone and in any batch.

Both models live in directories of the Hugging Face layout (config.json, model.safetensors, tokenizer.json): transformers'
GPT2LMHeadModel and GPT2ForSequenceClassification load them and give the same numbers.

Left out: other architectures (rotary positions, grouped heads), sharded checkpoints, pickled weights.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from minirlhf.checkpoint import atomic_write
from minirlhf.kernels import decode_attention
from minirlhf.runtime import UserError

# Hugging Face keeps these as Conv1D, whose weight is the transpose of nn.Linear's.
CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


@dataclass(frozen=True)
class GPTConfig:
    vocab_size: int
    n_ctx: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float = 0.0

    def __post_init__(self):
        if self.n_embd % self.n_head:
            raise UserError(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")


class KVCache:
    """Keys and values of every layer, allocated once: (L, 2, B, H, S, C/H)."""

    def __init__(self, config, batch, length, *, device=None, dtype=None):
        shape = (config.n_layer, 2, batch, config.n_head, length, config.n_embd // config.n_head)
        self.kv = torch.zeros(shape, device=device, dtype=dtype)


def attention(q, k, v, dropout=0.0):
    """Causal attention, softmax(q k^T / sqrt(D)) v: (B, H, T, D) of q, k, v (B, H, T, D)."""
    B, H, T, D = q.shape
    if q.is_cuda or T > 256:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
    # Written out, short rows take half the time on a CPU: torch's flash kernel multiplies in small pieces, one head at a time.
    future = torch.full((T, T), -math.inf, dtype=q.dtype, device=q.device).triu(1)
    q, k, v = (x.reshape(B * H, T, D) for x in (q, k, v))
    weights = torch.baddbmm(future, q, k.transpose(1, 2), alpha=D**-0.5).softmax(-1)  # (B H, T, T)
    return torch.bmm(F.dropout(weights, dropout), v).view(B, H, T, D)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, cache=None, layer=0, positions=None, mask=None):
        B, T, C = x.shape
        qkv = self.c_attn(x)  # (B, T, 3C)
        if positions is not None:  # one new token a row
            y = decode_attention(qkv, cache.kv[layer], positions, mask)
        else:
            q, k, v = (t.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for t in qkv.split(C, dim=2))  # (B, H, T, C/H)
            if cache is not None:  # the prompt's keys and values stay for later
                cache.kv[layer, 0, :, :, :T], cache.kv[layer, 1, :, :, :T] = k, v
            y = attention(q, k, v, self.dropout if self.training else 0.0)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)
        self.drop = nn.Dropout(config.dropout) if config.dropout else nn.Identity()

    def forward(self, x, *attention_args):
        x = x + self.drop(self.attn(self.ln_1(x), *attention_args))
        return x + self.drop(self.mlp(self.ln_2(x)))


class GPT(nn.Module):
    """A GPT-2 language model. `model(idx)` with token ids (B, T) gives logits (B, T, V)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_ctx, config.n_embd)
        self.drop = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        for name, p in self.named_parameters():
            if p.dim() == 2:  # GPT-2: 0.02, smaller by the number of additions to the residual stream
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer) if "c_proj" in name else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    @property
    def lm_head_weight(self):
        """The output head, tied to the token embedding: (V, C)."""
        return self.wte.weight

    def hidden(self, idx, cache=None, positions=None):
        """Final hidden states (B, T, C) of token ids (B, T).

        With a `cache`, either a prompt (`positions` None: its keys and values are stored at 0..T-1) or one token a row
        (T = 1, `positions` (B,): the slot of that token, which sees every slot up to its own).
        Raises ValueError when T exceeds the context.
        """
        B, T = idx.shape
        if self.config.n_ctx < T:
            raise ValueError(f"a row of {T} tokens exceeds the context of {self.config.n_ctx}")
        mask = None
        if positions is None:
            where = torch.arange(T, device=idx.device)
        else:
            where = positions[:, None]  # (B, 1)
            mask = (torch.arange(cache.kv.shape[4], device=idx.device) <= where)[:, None, None]  # (B, 1, 1, S)
        x = self.drop(self.wte(idx) + self.wpe(where))
        for layer, block in enumerate(self.h):
            x = block(x, cache, layer, positions, mask)
        return self.ln_f(x)

    def forward(self, idx):
        return F.linear(self.hidden(idx), self.lm_head_weight)

    def save_pretrained(self, directory, tokenizer=None):
        extra = {"architectures": ["GPT2LMHeadModel"], "tie_word_embeddings": True}
        save_directory(directory, self.config, export(self.state_dict(), "transformer."), extra, tokenizer)

    @classmethod
    def from_pretrained(cls, directory_or_hub_name, *, dropout=0.0):
        """Reads a Hugging Face GPT-2 directory, or with the `hub` extra a model of that name on the hub.

        Raises FileNotFoundError, or ValueError naming what is missing, unexpected or of another shape.
        """
        config, weights, _ = read_directory(directory_or_hub_name, dropout)
        weights = {name.removeprefix("transformer."): w for name, w in weights.items()}
        head = weights.pop("lm_head.weight", None)
        if head is not None and "wte.weight" in weights and not torch.equal(head, weights["wte.weight"]):
            raise UserError(f"{directory_or_hub_name}: lm_head.weight differs from the token embedding, but here they are tied")
        return load_strictly(cls(config), weights, directory_or_hub_name)


class HeadedGPT(nn.Module):
    """A GPT with a linear head without a bias, in the layout of GPT2ForSequenceClassification."""

    def __init__(self, config, outputs, std):
        super().__init__()
        self.config = config
        self.transformer = GPT(config)
        self.score = nn.Linear(config.n_embd, outputs, bias=False)
        nn.init.normal_(self.score.weight, std=std)

    @classmethod
    def from_base(cls, base, *, dropout=0.0, **options):
        """A fresh head on a copy of a base language model's trunk."""
        model = cls(GPTConfig(**{**vars(base.config), "dropout": dropout}), **options)
        model.transformer.load_state_dict(base.state_dict())
        return model

    def save(self, directory, settings, tokenizer):
        labels = {str(i): f"LABEL_{i}" for i in range(self.score.out_features)}
        extra = {"architectures": ["GPT2ForSequenceClassification"], "num_labels": len(labels), "id2label": labels} | settings
        if tokenizer is not None:  # that class reads the last token before this one, so it must not be EOS
            extra["pad_token_id"] = tokenizer.pad
        save_directory(directory, self.config, export(self.state_dict(), ""), extra, tokenizer)


class RewardModel(HeadedGPT):
    """A GPT with a scalar head: the reward model, and the critic that starts as its copy.

    The head is a vector without a bias, N(0, 1/sqrt(C+1)) as in Stiennon et al. 2020, so that a fresh score of
    a unit-variance hidden state has a standard deviation near 1. `level` says what the score of a response is: the head at its last
    token ("response"), or the sum of the head over all its tokens ("token"), which is a reward for each of them, and of `shift`,
    a constant that belongs to the last one.
    """

    def __init__(self, config, *, level="response", shift=0.0):
        if level not in ("response", "token"):
            raise ValueError(f"reward level {level!r}: expected response or token")
        super().__init__(config, 1, 1 / math.sqrt(config.n_embd + 1))
        self.level, self.shift = level, shift

    def values(self, idx):
        """The head at every position: (B, T) of token ids (B, T)."""
        return self.score(self.transformer.hidden(idx)).squeeze(-1)

    def forward(self, idx, lengths, prompt_lengths=None):
        """The score (B,) of each row of `lengths` real tokens, of which the first `prompt_lengths` (B,) are no response.

        Raises ValueError when a token-level model is not told where the responses begin.
        """
        values = self.values(idx)
        if self.level == "response":
            return values.gather(1, lengths[:, None] - 1).squeeze(1)
        if prompt_lengths is None:
            raise ValueError("a token-level score is a sum over the response: prompt_lengths is missing")
        where = torch.arange(idx.shape[1], device=idx.device)
        outside = (where < prompt_lengths[:, None]) | (where >= lengths[:, None])  # (B, T)
        return values.masked_fill(outside, 0).sum(1, dtype=torch.promote_types(values.dtype, torch.float32)) + self.shift

    @torch.no_grad()
    def normalize(self, mean, std):
        """Makes scores of that mean and standard deviation have 0 and 1; the ranking stays.

        Folded into the weights, as the layout has no place for it: the gain goes into the score vector w, and the
        shift b into the final LayerNorm's bias as b w / (w.w), because w.(h + b w / (w.w)) = w.h + b. A shift of every token would
        change how responses of unequal length rank, so at token level it is the constant `shift` instead.
        """
        w = self.score.weight.div_(std).squeeze(0)
        if self.level == "token":
            self.shift = (self.shift - mean) / std
        else:
            self.transformer.ln_f.bias.add_(w * (-mean / std) / (w @ w))

    def save_pretrained(self, directory, tokenizer=None):
        self.save(directory, {"reward_level": self.level, "reward_shift": self.shift}, tokenizer)

    @classmethod
    def from_pretrained(cls, directory, *, dropout=0.0):
        """Reads a Hugging Face GPT2ForSequenceClassification directory of one label; errors as in GPT.from_pretrained."""
        config, weights, raw = read_directory(directory, dropout)
        expect_kind("reward model", directory, weights)
        level, shift = raw.get("reward_level", "response"), raw.get("reward_shift", 0.0)
        return load_strictly(cls(config, level=level, shift=shift), weights, directory)


class PreferenceModel(HeadedGPT):
    """The general preference model of Zhang et al. 2024 (arXiv 2410.02197): P(a preferred to b) without a score of a or b.

    Each response has an embedding of `dim` = 2k numbers, and logit(a, b) = sum_i a_2i b_2i+1 - a_2i+1 b_2i: k planes, in each of which
    a beats what lies up to half a turn ahead of it. So logit(b, a) = -logit(a, b), and circles of preference can be held. The head's
    standard deviation makes fresh logits of independent unit-variance hidden states have one near 1. Raises ValueError for an odd dim.
    """

    def __init__(self, config, dim=8):
        if dim < 2 or dim % 2:
            raise ValueError(f"dim {dim}: expected an even number, two for each plane")
        super().__init__(config, dim, dim**-0.25 / math.sqrt(config.n_embd + 1))

    def embed(self, idx, lengths):
        """The embedding (B, dim) of each row: the head at its last real token."""
        hidden = self.transformer.hidden(idx)
        return self.score(hidden[torch.arange(len(idx), device=idx.device), lengths - 1])

    def logit(self, a, b):
        """The log-odds that a is preferred to b: (...) of embeddings (..., dim), which broadcast."""
        return (a[..., ::2] * b[..., 1::2] - a[..., 1::2] * b[..., ::2]).sum(-1)

    def save_pretrained(self, directory, tokenizer=None):
        self.save(directory, {}, tokenizer)

    @classmethod
    def from_pretrained(cls, directory, *, dropout=0.0):
        """Reads a directory that save_pretrained wrote; errors as in GPT.from_pretrained."""
        config, weights, _ = read_directory(directory, dropout)
        return load_strictly(cls(config, expect_kind("preference model", directory, weights)), weights, directory)


def export(state, prefix):
    """A state dict in Hugging Face's names and orientation."""
    return {prefix + name: (w.t() if name.endswith(CONV1D) else w).contiguous() for name, w in state.items()}


def save_directory(directory, config, weights, extra, tokenizer):
    """config.json, tokenizer.json and model.safetensors, the weights last and each file whole or not at all."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    settings = {
        "model_type": "gpt2", "vocab_size": config.vocab_size, "n_positions": config.n_ctx, "n_ctx": config.n_ctx,
        "n_embd": config.n_embd, "n_layer": config.n_layer, "n_head": config.n_head,
        "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
        "embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0,
    }  # fmt: skip
    if tokenizer is not None:
        settings |= {"bos_token_id": tokenizer.eos, "eos_token_id": tokenizer.eos}
        tokenizer.save(directory)
    with atomic_write(directory / "config.json") as tmp:
        tmp.write_text(json.dumps(settings | extra, indent=2) + "\n")
    with atomic_write(directory / "model.safetensors") as tmp:
        save_file(weights, tmp, metadata={"format": "pt"})


FIXED = {"model_type": "gpt2", "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "scale_attn_weights": True,
         "scale_attn_by_inverse_layer_idx": False, "tie_word_embeddings": True}  # fmt: skip


def read_directory(source, dropout):
    """GPTConfig, weights in our orientation, and config.json as it is, of a directory or of a model on the hub."""
    directory = local_directory(source)
    for name in ("config.json", "model.safetensors"):
        if not (directory / name).is_file():
            raise FileNotFoundError(f"{directory}: not a model directory, {name} is missing")
    try:
        raw = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        weights = load_file(directory / "model.safetensors")
    except (ValueError, SafetensorError) as e:
        raise UserError(f"{directory}: broken config.json or model.safetensors: {e}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{directory}/config.json: expected an object")
    sizes = [raw.get(key) for key in ("vocab_size", "n_positions", "n_layer", "n_head", "n_embd")]
    if not all(type(n) is int and n > 0 for n in sizes):
        raise UserError(f"{directory}/config.json: expected positive vocab_size, n_positions, n_layer, n_head, n_embd; found {sizes}")
    for key, expected in [*FIXED.items(), ("n_inner", 4 * raw["n_embd"])]:
        if raw.get(key, expected) not in (expected, *([None] if key == "n_inner" else [])):
            raise UserError(f"{directory}/config.json: {key} is {raw[key]!r}, but this GPT-2 has {expected!r}")
    weights = {
        name: w.t().contiguous() if name.endswith(CONV1D) else w
        for name, w in weights.items()
        if not name.endswith((".attn.bias", ".attn.masked_bias"))  # old checkpoints store the causal mask
    }
    return GPTConfig(*sizes, dropout=dropout), weights, raw


def local_directory(name):
    """A Path: the directory of that name, or else the model of that name fetched from the hub. Raises FileNotFoundError."""
    if Path(name).is_dir():
        return Path(name)
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise FileNotFoundError(f"{name}: no such directory (for a model on the hub: pip install 'minirlhf[hub]')") from None
    try:
        return Path(snapshot_download(str(name), allow_patterns=["config.json", "model.safetensors", "tokenizer.json"]))
    except Exception as e:
        raise FileNotFoundError(f"{name}: no such directory, and the hub gave no such model: {e}") from None


def expect_kind(expected, source, weights):
    """The number of outputs of the head. Raises UserError when another kind of model lies there."""
    outputs = weights["score.weight"].shape[:1].numel() if "score.weight" in weights else 0
    found = ("language model", "reward model", "preference model")[min(outputs, 2)]
    if found != expected:
        raise UserError(f"{source}: a {found} lies here, expected a {expected}")
    return outputs


def load_strictly(model, weights, source):
    expected = model.state_dict()
    wrong = [f"{n} is missing" for n in expected.keys() - weights.keys()]
    wrong += [f"{n} is unexpected" for n in weights.keys() - expected.keys()]
    wrong += [f"{n} has shape {tuple(weights[n].shape)}, expected {tuple(w.shape)}"
              for n, w in expected.items() if n in weights and weights[n].shape != w.shape]  # fmt: skip
    wrong += [f"{n} has numbers that are not finite" for n, w in weights.items() if not w.isfinite().all()]
    if wrong:
        raise UserError(f"{source}: weights do not fit: {sorted(wrong)[0]} ({len(wrong)} such problems)")
    model.load_state_dict(weights)
    return model
