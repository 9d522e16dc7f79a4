"""GPT-2 in plain PyTorch, with a language-model head or a scalar one, and its weights in and out.

The architecture is GPT-2's (Radford et al. 2019): pre-norm blocks, learned positions, GELU in its
tanh form, the output head tied to the token embedding. Rows are left-aligned with padding on the
right only, so a causal model needs no attention mask, and a row gives the same numbers alone and in
any batch.

Layers take the `run` they are part of (engine/passes.py). It knows which tokens they see, (B, T, C)
or without padding (N, C) or a new one a row (B, C): `run.idx` are their ids, `run.places` their
positions, `run.attend` lets them attend within their rows. So another norm, activation or position
needs no other file; sampling tries the changed model before it decodes.

Models lie in directories of the Hugging Face layout: transformers' GPT2LMHeadModel and
GPT2ForSequenceClassification load them and give the same numbers.

Left out: other architectures (rotary positions, grouped heads).
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F

from minirlhf.engine import parallel
from minirlhf.engine.cli import UserError
from minirlhf.engine.files import number_of, shown
from minirlhf.engine.passes import Pass, compiled_hidden
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
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, run):
        qkv = self.c_attn(x)  # (..., 3C): query, key and value of each token, side by side
        return self.c_proj(run.attend(qkv, self.n_head))


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

    def forward(self, x, run):
        x = x + run.drop(self.attn(self.ln_1(x), run))
        x = run.wanted(x)
        return x + run.drop(self.mlp(self.ln_2(x)))


class GPT(nn.Module):
    """A GPT-2 language model. `model(idx)` with token ids (B, T) gives logits (B, T, V)."""

    compiled = False  # by engine/passes.py, for --compile

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_ctx, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        for name, p in self.named_parameters():
            if p.dim() == 2:  # GPT-2: smaller by the number of additions to the residual stream
                std = 0.02 / math.sqrt(2 * config.n_layer) if "c_proj" in name else 0.02
                nn.init.normal_(p, std=std)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def trunk(self, run):
        """The final hidden states of what the run sees."""
        x = run.drop(self.wte(run.idx) + self.wpe(run.places))
        for block in self.h:
            x = block(x, run)
        return run.padded(self.ln_f(x))

    def hidden(self, idx, lengths=None, cache=None, at=None):
        """Final hidden states (B, T, C) of token ids (B, T), 0 where `lengths` (B,) of right-padded
        rows left out a sixth or more as padding; or those at one place of each row, `at` (B,), the
        same in less time: (B, C). A `cache` (L, 2, B, H, S, C/H) keeps keys and values in its first
        T slots. Raises ValueError when T exceeds the context."""
        if idx.shape[1] > self.config.n_ctx:
            raise ValueError(f"{idx.shape[1]} tokens exceed the context of {self.config.n_ctx}")
        if self.compiled and cache is None:
            return compiled_hidden(self, idx, at)
        return self.trunk(Pass(self, idx, lengths, cache, at))

    @property
    def lm_head_weight(self):
        """The output head, tied to the token embedding: (V, C)."""
        return self.wte.weight

    def forward(self, idx):
        return F.linear(self.hidden(idx), self.lm_head_weight)

    def save_pretrained(self, directory, tokenizer=None):
        extra = {"architectures": ["GPT2LMHeadModel"], "tie_word_embeddings": True}
        weights = export(self.state_dict(), "transformer.")
        save_directory(directory, self.config, weights, extra, tokenizer)

    @classmethod
    def from_pretrained(cls, directory_or_hub_name, *, dropout=0.0):
        """Reads a Hugging Face GPT-2 directory, or with the `hub` extra a model of that name there.
        Raises FileNotFoundError, or ValueError naming what is missing, too much or misshapen."""
        sizes, weights, _ = read_directory(directory_or_hub_name)
        for name in weights:
            if f"transformer.{name}" in weights:
                what = "weights with and without the prefix transformer."
                raise UserError(f"{directory_or_hub_name}: {what}: {name}")
        weights = {name.removeprefix("transformer."): w for name, w in weights.items()}
        head, tied = weights.pop("lm_head.weight", None), weights.get("wte.weight")
        if head is not None and tied is not None and not torch.equal(head, tied):
            what = "lm_head.weight differs from the token embedding, but here they are tied"
            raise UserError(f"{directory_or_hub_name}: {what}")
        model = cls(GPTConfig(*sizes, dropout=dropout))
        return load_strictly(model, weights, directory_or_hub_name)


class Head(nn.Linear):
    """A linear layer that autocast leaves in fp32: bf16 scores near 2 have steps of 1/64."""

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.to(self.weight.dtype))


class HeadedGPT(nn.Module):
    """A GPT with a linear head without a bias, in the layout of GPT2ForSequenceClassification."""

    def __init__(self, config, outputs, std):
        super().__init__()
        self.config = config
        self.transformer = GPT(config)
        self.score = Head(config.n_embd, outputs, bias=False)
        nn.init.normal_(self.score.weight, std=std)

    @classmethod
    def from_base(cls, base, *, dropout=0.0, layers=0, **options):
        """A fresh head on a copy of a base language model's trunk, or of its lowest layers."""
        layers = min(layers or base.config.n_layer, base.config.n_layer)
        model = cls(replace(base.config, dropout=dropout, n_layer=layers), **options)
        own, weights = model.transformer, base.state_dict()
        own.load_state_dict({name: weights[name] for name in own.state_dict()})
        return model

    def save(self, directory, settings, tokenizer):
        labels = {str(i): f"LABEL_{i}" for i in range(self.score.out_features)}
        extra = {"architectures": ["GPT2ForSequenceClassification"], "num_labels": len(labels)}
        extra |= {"id2label": labels, **settings}
        if tokenizer is not None:  # that class reads the last token before this one: not EOS
            extra["pad_token_id"] = tokenizer.pad
        save_directory(directory, self.config, export(self.state_dict(), ""), extra, tokenizer)


class RewardModel(HeadedGPT):
    """A GPT with a scalar head: the reward model, and the critic that starts as its copy.

    The head is N(0, 1/sqrt(C+1)) as in Stiennon et al. 2020, so that a fresh score has a standard
    deviation near 1. The score of a response is by `level` the head at its last token ("response")
    or the sum of the head over all its tokens ("token"), and `shift`, which is the last token's.
    """

    def __init__(self, config, *, level="response", shift=0.0):
        if level not in ("response", "token"):
            raise ValueError(f"reward level {level!r}: expected response or token")
        super().__init__(config, 1, 1 / math.sqrt(config.n_embd + 1))
        self.level, self.shift = level, shift

    def values(self, idx, lengths=None):
        """The head at every position: (B, T); idx (B, T) and `lengths` (B,) as in GPT.hidden."""
        return self.score(self.transformer.hidden(idx, lengths=lengths)).squeeze(-1)

    def forward(self, idx, lengths, prompt_lengths=None):
        """The score (B,) of rows of `lengths` tokens; at token level of those after the prompt."""
        if self.level == "token":
            values = self.values(idx, lengths)
            return self.sum_of_response(values, lengths, prompt_lengths) + self.shift
        last = self.transformer.hidden(idx, lengths=lengths, at=lengths - 1)  # (B, C)
        return self.score(last).squeeze(-1) + self.shift

    def sum_of_response(self, values, lengths, prompt_lengths):
        """The sum (B,) of the values (B, T) of each row's response tokens."""
        if prompt_lengths is None:
            raise ValueError("a token-level score sums the response: prompt_lengths is missing")
        where = torch.arange(values.shape[1], device=values.device)
        outside = (where < prompt_lengths[:, None]) | (where >= lengths[:, None])  # (B, T)
        exact = torch.promote_types(values.dtype, torch.float32)
        return values.masked_fill(outside, 0).sum(1, dtype=exact)

    @torch.no_grad()
    def normalize(self, mean, std):
        """Makes scores of that mean and standard deviation have 0 and 1; the ranking stays.

        Folded into the weights, as the layout has no place for it: the gain goes into the score
        vector w, the shift b into the final LayerNorm's bias as b w / (w.w), because w.(h + b w /
        (w.w)) = w.h + b. A shift of every token would change how responses of unequal length rank,
        so at token level, or where the norm has no bias, it is the constant `shift`.
        """
        parallel.reshard(self)
        w = parallel.full(self.score.weight.div_(std)).squeeze(0)
        bias = getattr(self.transformer.ln_f, "bias", None)
        if self.level == "token" or bias is None:
            self.shift = (self.shift - mean) / std
        else:
            parallel.copy_into(bias, parallel.full(bias) + w * (-mean / std) / (w @ w))

    def save_pretrained(self, directory, tokenizer=None):
        settings = {"reward_level": self.level, "reward_shift": self.shift}
        self.save(directory, settings, tokenizer)

    @classmethod
    def from_pretrained(cls, directory, *, dropout=0.0):
        """Reads a directory of GPT2ForSequenceClassification, one label; errors as GPT's."""
        sizes, weights, raw = read_directory(directory)
        expect_kind("reward model", directory, weights)
        where, level = f"{directory}/config.json", raw.get("reward_level", "response")
        if level not in ("response", "token"):
            what = f"reward_level: expected response or token, found {shown(level)}"
            raise UserError(f"{where}: {what}")
        shift = number_of(raw.get("reward_shift", 0.0), where, "reward_shift")
        model = cls(GPTConfig(*sizes, dropout=dropout), level=level, shift=shift)
        return load_strictly(model, weights, directory)
