"""Decoding: one pass over the ragged prompts, then a token a step from the KV cache.

Rows are left-aligned: a prompt of length p ends at slot p-1, and the token of step t goes to slot
p+t of its own row. On a GPU the step is captured once as a CUDA graph and replayed: a few hundred
small kernels for the price of one launch.
"""

import contextlib
import copy
import weakref
from typing import NamedTuple

import torch

from minirlhf import kernels
from minirlhf.engine import machine, parallel, quick
from minirlhf.engine.passes import Step
from minirlhf.engine.rows import response_mask, window
from minirlhf.kernels.decoding import sample, sample_logits


class Rollout(NamedTuple):
    """B prompts with their responses, at most R tokens each."""

    tokens: torch.Tensor  # (B, Q+R) prompt, response and padding, left-aligned
    prompt_lengths: torch.Tensor  # (B,)
    response_lengths: torch.Tensor  # (B,) the closing EOS counted
    logprobs: torch.Tensor  # (B, R) of each response token as sampled, fp32; 0 after the end


@torch.no_grad()
def decode(model, prompts, prompt_lengths, width, generator=None, first_row=0, **options):
    """The Rollout of up to `width` tokens a row; each process decodes its share of the rows, whose
    noise is that of the rows from `first_row` on."""
    B, Q = prompts.shape
    where = generator.device if generator else "cpu"
    seed = torch.randint(2**62, (1,), generator=generator, device=where).item()
    mine, _ = parallel.share(B)
    prompts, prompt_lengths = prompts[mine], prompt_lengths[mine]
    make, every = (on_gpu, 16) if prompts.is_cuda else (Decoder, 4)  # to look makes a GPU wait
    quicker = torch.inference_mode(not prompts.is_cuda)  # a tenth less an operation on a CPU
    exact = contextlib.nullcontext()
    if not prompts.is_cuda:  # which would round all weights again for the few rows of each step
        exact = torch.autocast("cpu", enabled=False)
    with parallel.sampling(model), machine.quick_library(prompts), quicker, exact, torch.no_grad():
        decoder = make(model, len(prompts), Q + width, **options)
        decoder.start(model, prompts, prompt_lengths, seed, first_row + int(mine[0]))
        going = decoder
        for t in range(1, width):
            if t % every == 0:
                if going.ended.all():
                    break
                going = going.without_ended()
            going.advance(model)
        decoder.put_together()
    torch.clear_autocast_cache()  # weights that were cast here have no gradient
    tokens = decoder.tokens[:, : Q + width].to(prompts.dtype, copy=True)
    logprobs = window(decoder.logprobs, prompt_lengths, width)
    lengths = decoder.lengths.clone()
    return Rollout(*parallel.gather([tokens, prompt_lengths, lengths, logprobs], B))


def row_noise(seed, first_row, rows, width):
    """Noise in [0, 1) of rows, (rows, width, 2): row n has the n-th part of one long sequence."""
    generator = torch.Generator().manual_seed(seed)
    size = first_row + rows, width, 2
    return torch.rand(size, dtype=torch.float64, generator=generator)[first_row:]


WRITTEN = "tokens", "logprobs", "lengths"  # what a rollout is made of
OF_ROWS = *WRITTEN, "ended", "token", "slot", "noise"


class Decoder:
    """B rows of S slots: the buffers that a step works on, and the step, which reads and writes
    these buffers and the weights alone."""

    def __init__(self, model, batch, slots, *, eos, pad, temperature, top_k):
        self.eos, self.pad, self.temperature, self.top_k = eos, pad, temperature, top_k
        self.rounded = self.graph = None  # by on_gpu
        self.going = self.rest = None  # by without_ended
        self.parts = quick.parts_of(model) if quick.fits(model) else None
        c, self.weight = model.config, model.lm_head_weight.detach()
        self.vocab = len(self.weight)
        device, dtype = self.weight.device, self.weight.dtype
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        shape = (c.n_layer, 2, batch, c.n_head, slots, c.n_embd // c.n_head)
        self.cache = torch.zeros(shape, device=device, dtype=dtype)
        self.tokens = torch.full((batch, slots), pad, device=device)
        self.logprobs = torch.zeros(batch, slots, device=device)  # of the token in that slot
        row = torch.zeros(batch, dtype=torch.int64, device=device)
        self.lengths, self.ended = row.clone(), row.bool()  # of responses
        self.token, self.slot = row.clone(), row.clone()  # each row's newest
        self.steps = row[:1].clone()
        self.seed = row[:1].clone()
        self.noise = torch.zeros(batch, c.n_ctx, 2, dtype=torch.float64, device=device)

    def start(self, model, prompts, prompt_lengths, seed, first_row):
        """Takes over the prompts (B, Q), and samples each response's first token."""
        B, Q = len(prompts), int(prompt_lengths.max())
        self.seed.fill_(seed + (first_row << 32))
        if self.top_k or not kernels.fused(self.weight):
            self.noise.copy_(row_noise(seed, first_row, B, self.noise.shape[1]))
        self.tokens.fill_(self.pad)
        self.tokens[:, :Q] = prompts[:, :Q].masked_fill(~response_mask(prompt_lengths, Q), self.pad)
        self.slot.copy_(prompt_lengths - 1)
        torch._foreach_zero_([self.logprobs, self.lengths, self.ended, self.steps])
        hidden = (self.rounded or model).hidden(self.tokens[:, :Q], cache=self.cache)  # (B, Q, C)
        self.pick(hidden[torch.arange(B, device=prompts.device), self.slot])

    def without_ended(self):
        """A decoder of the rows that go on, and of some that do not up to a multiple of 16, where
        those are three quarters or less; or this one, as always on a GPU, whose graph has the rows
        it has."""
        n = -(-int((~self.ended).sum()) // 16) * 16  # products of few sizes, as in few_sizes
        if self.cache.is_cuda or 4 * n > 3 * len(self.ended):
            return self
        going = self.ended.sort(stable=True).indices[:n]
        rest = copy.copy(self)
        for name in OF_ROWS:
            setattr(rest, name, getattr(self, name)[going])
        rest.cache = self.cache[:, :, going]
        self.going, self.rest = going, rest
        return rest

    def put_together(self):
        """Takes what the decoder of the rows that went on has written since."""
        if self.rest:
            self.rest.put_together()
            for name in WRITTEN:
                getattr(self, name)[self.going] = getattr(self.rest, name)

    def advance(self, model):
        """One more token a row, also of those that have ended, where it is padding."""
        if self.graph:
            return self.graph.replay()
        step = Step(self.token, self.slot, self.cache)
        own = self.rounded or model
        self.pick(quick.quick_step(step, *self.parts) if self.parts else own.trunk(step))

    def pick(self, hidden):
        """Samples from what follows hidden (B, C), and books it."""
        logits = kernels.head_logits(hidden, self.weight)[:, : self.vocab]
        if kernels.fused(logits) and not self.top_k:
            token, logprob = sample_logits(logits, self.temperature, self.seed, self.steps)
        else:
            noise = self.noise.index_select(1, self.steps).squeeze(1)
            token, logprob = sample(logits, self.temperature, self.top_k, noise)
        self.steps += 1
        self.slot += 1
        self.token.copy_(token.masked_fill(self.ended, self.pad))
        logprob = logprob.masked_fill(self.ended, 0).to(self.logprobs.dtype)
        self.tokens.scatter_(1, self.slot[:, None], self.token[:, None])
        self.logprobs.scatter_(1, self.slot[:, None], logprob[:, None])
        self.lengths += ~self.ended
        self.ended |= self.token == self.eos


# On a GPU

GRAPHS = weakref.WeakKeyDictionary()  # model -> {what the graph depends on: Decoder}


def on_gpu(model, batch, slots, **options):
    """A Decoder with the weights as they are now, and its step captured. The last few of each model
    are kept, as long as its weights stay where they are."""
    if parallel.sharded(model):  # whose weights move
        return with_rounded_weights(Decoder(model, batch, slots, **options), model)
    slots = -(-slots // 64) * 64
    where = hash(tuple(p.data_ptr() for p in model.parameters()))
    autocast, fused = torch.is_autocast_enabled("cuda"), kernels.fused(model.lm_head_weight)
    key = (batch, slots, where, autocast, fused, quick.fits(model), *options.values())
    decoders = GRAPHS.setdefault(model, {})
    if key not in decoders:
        while len(decoders) > 3:
            del decoders[next(iter(decoders))]
        decoder = with_rounded_weights(Decoder(model, batch, slots, **options), model)
        decoder.graph = captured(decoder, model)
        decoders[key] = decoder
    decoder = decoders[key]
    if decoder.rounded:
        copy_state(decoder.rounded, model)
    if decoder.weight.data_ptr() != model.lm_head_weight.data_ptr():
        decoder.weight[: decoder.vocab] = model.lm_head_weight
    return decoder


def captured(decoder, model):
    """The graph of a step."""
    stream = torch.cuda.Stream()  # warm-up: kernels are compiled, workspaces allocated before
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            decoder.advance(model)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decoder.advance(model)
    return graph


def with_rounded_weights(decoder, model):
    """The decoder with weights in the type of its cache: else each step would read fp32 weights to
    round them."""
    weight = model.lm_head_weight.detach()
    dtype = decoder.cache.dtype
    if dtype != weight.dtype:
        decoder.rounded = rounded_copy(model, dtype)
        if decoder.parts:
            decoder.parts = quick.parts_of(decoder.rounded)
    decoder.weight = kernels.aligned(weight.to(dtype))
    return decoder


def rounded_copy(model, dtype):
    """A copy whose matrix products have weights of that type."""
    with torch.device("meta"):  # draws no random numbers
        rounded = type(model)(model.config).requires_grad_(False).eval()
    rounded.to_empty(device=model.lm_head_weight.device)
    copy_state(rounded, model)
    for linear in rounded.modules():
        if isinstance(linear, torch.nn.Linear):
            linear.to(dtype)
    return rounded


def copy_state(rounded, model):
    """Weights, and what else a changed model keeps of numbers, as the angles of its positions."""
    own = [*rounded.parameters(), *rounded.buffers()]
    theirs = [*model.parameters(), *model.buffers()]
    torch._foreach_copy_(own, theirs)
