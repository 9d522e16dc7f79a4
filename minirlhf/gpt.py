"""GPT-2 in plain PyTorch: blocks, KV cache, a language-model head and a scalar head, weights in and out.

The architecture is GPT-2's (Radford et al. 2019): pre-norm blocks, learned positions, GELU in its tanh form, the output
head tied to the token embedding. Rows are left-aligned with padding on the right only, so a causal model needs no
attention mask in training, positions are `arange`, and a row gives the same numbers alone and in any batch.

Both models live in directories of the Hugging Face layout (config.json, model.safetensors, tokenizer.json): transformers'
GPT2LMHeadModel and GPT2ForSequenceClassification load them and give the same numbers.

Left out: other architectures (rotary positions, grouped heads).
"""

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from minirlhf.engine import parallel
from minirlhf.engine.cli import UserError
from minirlhf.engine.files import number_of, shown
from minirlhf.engine.passes import Layout, attention, drop_out, heads, noise_of
from minirlhf.engine.weights import (
    expect_kind,
    export,
    load_strictly,
    read_directory,
    save_directory,
)


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


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, cache=None, layout=None, noise=None):
        qkv = self.c_attn(x)  # (B, T, 3C), or (N, 3C) with a layout
        dropout = self.dropout if self.training else 0.0
        if layout is not None:
            return self.c_proj(layout.attention(qkv, self.n_head, dropout, noise))
        q, k, v = heads(qkv, self.n_head)
        if cache is not None:  # the prompt's keys and values stay for later
            cache[0, :, :, : x.shape[1]], cache[1, :, :, : x.shape[1]] = k, v
        return self.c_proj(attention(q, k, v, dropout, noise).transpose(1, 2).reshape(x.shape))


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
        self.dropout = config.dropout

    def forward(self, x, cache=None, layout=None, noise=None):
        p, more_noise = self.dropout if self.training else 0.0, None if noise is None else noise + 1
        x = x + drop_out(self.attn(self.ln_1(x), cache, layout, noise), p, noise)
        return x + drop_out(self.mlp(self.ln_2(x)), p, more_noise)


class GPT(nn.Module):
    """A GPT-2 language model. `model(idx)` with token ids (B, T) gives logits (B, T, V)."""

    compiled = False  # by `compile_trunks`

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_ctx, config.n_embd)
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

    def hidden(self, idx, cache=None, lengths=None):
        """Final hidden states (B, T, C) of token ids (B, T), whose keys and values go into the first T slots of a `cache`,
        (L, 2, B, H, S, C/H), if there is one.

        With the `lengths` (B,) of right-padded rows nothing is computed for the padding, where the result is 0, if it is a sixth or more.
        Raises ValueError when T exceeds the context.
        """
        B, T = idx.shape
        if self.config.n_ctx < T:
            raise ValueError(f"a row of {T} tokens exceeds the context of {self.config.n_ctx}")
        if self.compiled and cache is None:  # one row, or one token, would be compiled for itself
            padded = F.pad(idx, (0, min(-T % 8, self.config.n_ctx - T), 0, int(B == 1)))
            return compiled_trunk()(self, padded)[:B, :T]
        noise = noise_of(idx, lengths) if self.training and self.config.dropout and idx.device.type == "cpu" else None
        if lengths is not None and lengths.sum() < 0.85 * B * T:
            return self.trunk(idx, layout=Layout(lengths, T), noise=noise)
        return self.trunk(idx, cache, noise=noise)

    def trunk(self, idx, cache=None, layout=None, noise=None):
        """`hidden` without its checks: what --compile compiles."""
        p = self.config.dropout if self.training else 0.0
        places = torch.arange(idx.shape[1], device=idx.device)
        if layout is not None:
            noise = None if noise is None else noise.flatten()[layout.where]  # (N,)
            idx, places = idx.flatten()[layout.where], layout.where % idx.shape[1]  # (N,)
        x = drop_out(self.wte(idx) + self.wpe(places), p, noise)  # (B, T, C), or (N, C) with a layout
        for layer, block in enumerate(self.h):
            noise = None if noise is None else noise + 4096  # each block has numbers of its own, and in it each head
            x = block(x, None if cache is None else cache[layer], layout, noise)
        x = self.ln_f(x)
        return x if layout is None else layout.padded(x)

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
        sizes, weights, _ = read_directory(directory_or_hub_name)
        twice = [name for name in weights if f"transformer.{name}" in weights]
        if twice:
            raise UserError(f"{directory_or_hub_name}: weights with and without the prefix transformer.: {twice[0]}")
        weights = {name.removeprefix("transformer."): w for name, w in weights.items()}
        head = weights.pop("lm_head.weight", None)
        if head is not None and "wte.weight" in weights and not torch.equal(head, weights["wte.weight"]):
            raise UserError(f"{directory_or_hub_name}: lm_head.weight differs from the token embedding, but here they are tied")
        return load_strictly(cls(GPTConfig(*sizes, dropout=dropout)), weights, directory_or_hub_name)


@functools.cache
def compiled_trunk():
    return torch.compile(GPT.trunk, dynamic=True)  # for all shapes and models at once, so that nothing is compiled again in a run


def compile_trunks(*models):
    """Compiles the layers of all GPTs in the models (their heads are kernels of their own; None is no model), or prints why not."""
    for gpt in (part for model in filter(None, models) for part in model.modules() if isinstance(part, GPT)):
        gpt.compiled = True
        try:
            gpt.hidden(torch.zeros(2, 8, dtype=torch.int64, device=gpt.wte.weight.device))
        except Exception as e:  # no compiler, no Triton, a Python that is too new
            gpt.compiled = False
            return print(f"--compile: not possible here, going on without: {str(e).strip().splitlines()[0]}", flush=True)


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

    def values(self, idx, lengths=None):
        """The head at every position: (B, T) of token ids (B, T); with the `lengths` (B,) of the rows as in GPT.hidden."""
        return self.score(self.transformer.hidden(idx, lengths=lengths)).squeeze(-1)

    def forward(self, idx, lengths, prompt_lengths=None):
        """The score (B,) of each row of `lengths` real tokens, of which the first `prompt_lengths` (B,) are no response.

        Raises ValueError when a token-level model is not told where the responses begin.
        """
        values = self.values(idx, lengths)
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
        parallel.reshard(self)
        w = parallel.full(self.score.weight.div_(std)).squeeze(0)
        if self.level == "token":
            self.shift = (self.shift - mean) / std
        else:
            bias = self.transformer.ln_f.bias
            parallel.copy_into(bias, parallel.full(bias) + w * (-mean / std) / (w @ w))

    def save_pretrained(self, directory, tokenizer=None):
        self.save(directory, {"reward_level": self.level, "reward_shift": self.shift}, tokenizer)

    @classmethod
    def from_pretrained(cls, directory, *, dropout=0.0):
        """Reads a Hugging Face GPT2ForSequenceClassification directory of one label; errors as in GPT.from_pretrained."""
        sizes, weights, raw = read_directory(directory)
        expect_kind("reward model", directory, weights)
        level, shift = raw.get("reward_level", "response"), raw.get("reward_shift", 0.0)
        if level not in ("response", "token"):
            raise UserError(f"{directory}/config.json: reward_level: expected response or token, found {shown(level)}")
        shift = number_of(shift, f"{directory}/config.json", "reward_shift")
        return load_strictly(cls(GPTConfig(*sizes, dropout=dropout), level=level, shift=shift), weights, directory)
