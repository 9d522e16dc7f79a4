"""Decoding, fast."""

import weakref
from typing import NamedTuple

import torch
import torch.nn.functional as F

from minirlhf import kernels
from minirlhf.engine.rows import before_response, response_mask
from minirlhf.kernels import decoding as decode_kernels


class Rollout(NamedTuple):
    """B prompts with their responses, at most R tokens each."""

    tokens: torch.Tensor  # (B, Q+R) prompt, response and padding, left-aligned
    prompt_lengths: torch.Tensor  # (B,)
    response_lengths: torch.Tensor  # (B,) the closing EOS counted
    logprobs: torch.Tensor  # (B, R) of each response token as sampled, fp32; 0 after the end


def row_noise(seed, first_row, rows, width):
    """Noise in [0, 1) for the tokens of rows, (rows, width, 2): each row, counted from 0, has its own part of one long sequence."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(first_row + rows, width, 2, dtype=torch.float64, generator=generator)[first_row:]


class Decoder:
    """B rows of S slots: the buffers that a decoding step works on, and the step.

    The step reads and writes these buffers and the weights alone, so on a GPU it is captured once as a CUDA graph and replayed: a few
    hundred small kernels for the price of one launch.
    """

    def __init__(self, model, batch, slots, *, eos, pad, temperature, top_k):
        self.eos, self.pad, self.temperature, self.top_k = eos, pad, temperature, top_k
        weight = model.lm_head_weight
        device = weight.device
        self.rounded = self.graph = None
        dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else weight.dtype
        if dtype != weight.dtype and weight.is_cuda:  # each step would else read fp32 weights to round them
            with torch.device("meta"):  # draws no random numbers
                self.rounded = type(model)(model.config).requires_grad_(False).eval()
            self.rounded.to_empty(device=device)
            torch._foreach_copy_(list(self.rounded.parameters()), list(model.parameters()))
            weight = weight.to(dtype)
            for linear in self.rounded.modules():
                if isinstance(linear, torch.nn.Linear):
                    linear.to(dtype)
        self.vocab, self.weight = len(weight), kernels.aligned(weight.detach())
        source, c = self.rounded or model, model.config
        self.layers = [list(block.parameters()) for block in source.h]
        self.around = source.wte.weight, source.wpe.weight, *source.ln_f.parameters()
        self.cache = torch.zeros(c.n_layer, 2, batch, c.n_head, slots, c.n_embd // c.n_head, device=device, dtype=dtype)
        self.tokens = torch.full((batch, slots), pad, device=device)
        self.logprobs = torch.zeros(batch, slots, device=device)  # of the token in that slot
        self.token, self.slot = (torch.zeros(batch, dtype=torch.int64, device=device) for _ in range(2))  # each row's newest
        self.steps, self.seed = (torch.zeros(1, dtype=torch.int64, device=device) for _ in range(2))  # of the fused sampler's noise
        self.noise = torch.zeros(batch, c.n_ctx, 2, dtype=torch.float64, device=device)  # of its twin

    def start(self, model, prompts, prompt_lengths, seed, first_row):
        """Takes over the weights and the prompts (B, Q), and samples the first token of each response."""
        if self.rounded:
            torch._foreach_copy_(list(self.rounded.parameters()), list(model.parameters()))
        if self.weight.data_ptr() != model.lm_head_weight.data_ptr():
            self.weight[: self.vocab] = model.lm_head_weight
        B, Q = prompts.shape
        self.seed.fill_(seed + (first_row << 32))
        if self.top_k or not kernels.fused(self.weight):
            self.noise.copy_(row_noise(seed, first_row, B, self.noise.shape[1]))
        inside = torch.arange(Q, device=prompts.device) < prompt_lengths[:, None]
        self.tokens.fill_(self.pad)
        self.tokens[:, :Q] = torch.where(inside, prompts, self.pad)
        self.prompt_lengths = prompt_lengths
        self.slot.copy_(prompt_lengths - 1)
        self.steps.zero_()
        hidden = (self.rounded or model).hidden(self.tokens[:, :Q], self.cache)  # (B, Q, C)
        self.pick(hidden[torch.arange(B, device=prompts.device), self.slot])

    def advance(self):
        """One more token a row, also of those that have ended: what follows EOS is thrown away at the end."""
        if self.graph:
            return self.graph.replay()
        self.pick(self.step())

    def step(self):
        """`GPT.hidden` of the newest token alone: (B, C). Written out, as calling a module takes as long as its work on one token."""
        wte, wpe, *ln_f = self.around
        C = wte.shape[1]
        mask = (torch.arange(self.cache.shape[4], device=wte.device) <= self.slot[:, None])[:, None, None]  # (B, 1, 1, S)
        x = F.embedding(self.token, wte) + F.embedding(self.slot, wpe)  # (B, C)
        for layer, cache in zip(self.layers, self.cache, strict=True):
            w_1, b_1, w_qkv, b_qkv, w_out, b_out, w_2, b_2, w_up, b_up, w_down, b_down = layer
            qkv = F.linear(torch.layer_norm(x, (C,), w_1, b_1), w_qkv, b_qkv)
            x = x + F.linear(decode_kernels.decode_attention(qkv, cache, self.slot, mask).view(-1, C), w_out, b_out)
            up = F.linear(torch.layer_norm(x, (C,), w_2, b_2), w_up, b_up)
            x = x + F.linear(F.gelu(up, approximate="tanh"), w_down, b_down)
        return torch.layer_norm(x, (C,), *ln_f)

    def pick(self, hidden):
        """Samples from what follows hidden (B, C), and books it."""
        logits = kernels.head_logits(hidden, self.weight)[:, : self.vocab]
        if kernels.fused(logits) and not self.top_k:
            token, logprob = decode_kernels.sample_logits(logits, self.temperature, self.seed, self.steps)
        else:
            noise = self.noise.index_select(1, self.steps).squeeze(1)
            token, logprob = decode_kernels.sample(logits, self.temperature, self.top_k, noise)
        self.steps += 1
        self.slot += 1
        self.token.copy_(token)
        self.tokens.scatter_(1, self.slot[:, None], token[:, None])
        self.logprobs.scatter_(1, self.slot[:, None], logprob[:, None].to(self.logprobs.dtype))

    def ended(self, width):
        """Where EOS is among the first `width` response tokens: (B, width)."""
        return before_response(self.tokens, self.prompt_lengths + 1, width) == self.eos

    def rollout(self, prompts, width):
        """A Rollout of the first `width` response tokens."""
        slots = torch.arange(self.tokens.shape[1], device=prompts.device)
        ended = self.ended(width)
        lengths = torch.where(ended.any(1), ended.int().argmax(1) + 1, width)
        tokens = self.tokens.masked_fill(slots >= (self.prompt_lengths + lengths)[:, None], self.pad)
        logprobs = before_response(self.logprobs, self.prompt_lengths + 1, width)
        return Rollout(tokens[:, : prompts.shape[1] + width].to(prompts.dtype), self.prompt_lengths, lengths,
                       torch.where(response_mask(lengths, width), logprobs, 0))  # fmt: skip


GRAPHS = weakref.WeakKeyDictionary()  # model -> {what the graph depends on: Decoder}


def captured(model, batch, slots, **options):
    """A Decoder on the GPU with its step captured; the last few of each model are kept, as long as its weights stay where they are."""
    slots = -(-slots // 64) * 64
    where = hash(tuple(p.data_ptr() for p in model.parameters()))
    key = (batch, slots, where, torch.is_autocast_enabled("cuda"), kernels.fused(model.lm_head_weight), *options.values())
    decoders = GRAPHS.setdefault(model, {})
    if key not in decoders:
        while len(decoders) > 3:
            del decoders[next(iter(decoders))]
        decoder = Decoder(model, batch, slots, **options)
        stream = torch.cuda.Stream()  # warm-up: kernels are compiled and workspaces allocated before the capture
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                decoder.advance()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            decoder.advance()
        decoder.graph = graph
        decoders[key] = decoder
    return decoders[key]
