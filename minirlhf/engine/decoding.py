"""Decoding: one pass over the ragged prompts, then a token a step from the KV cache.

Rows are left-aligned: a prompt of length p ends at slot p-1, and the token of step t goes to slot
p+t of its own row. On a GPU the step is captured once as a CUDA graph and replayed: a few hundred
small kernels for the price of one launch.

The model itself says how a token goes through it (`trunk` of a passes.Step). `quick_step` is the
same for GPT-2's layers without the calls of modules, which take as long as their work on one token.
Before each decoding the two are compared; where they differ, the model's own definition decodes.
And before a model's first use it must give a token the same numbers however it is read.
"""

import contextlib
import weakref
from typing import NamedTuple

import torch
import torch.nn.functional as F

from minirlhf import kernels
from minirlhf.engine import machine, parallel
from minirlhf.engine.passes import Pass, Step
from minirlhf.engine.rows import response_mask, window
from minirlhf.kernels.decoding import decode_attention, sample, sample_logits


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
    (B, Q), device = prompts.shape, prompts.device
    where = generator.device if generator else "cpu"
    seed = torch.randint(2**62, (1,), generator=generator, device=where).item()
    mine, _ = parallel.share(B)
    prompts, prompt_lengths = prompts[mine], prompt_lengths[mine]
    capture = prompts.is_cuda and not parallel.sharded(model)  # whose weights move
    every = 16 if prompts.is_cuda else 4  # to look whether all have ended makes a GPU wait
    # Inference mode takes a CPU a tenth less an operation.
    quicker = torch.inference_mode() if device.type == "cpu" else contextlib.nullcontext()
    training = model.training
    model.eval()
    try:
        with parallel.whole(model), machine.quick_library(prompts):
            if model not in QUICK:
                expect_one_reading(model)
            with quicker:
                make = captured if capture else Decoder
                decoder = make(model, len(prompts), Q + width, **options)
                decoder.start(model, prompts, prompt_lengths, seed, first_row + int(mine[0]))
                for t in range(1, width):
                    if t % every == 0 and decoder.ended(t).any(1).all():
                        break
                    decoder.advance(model)
    finally:
        model.train(training)
    found = decoder.rollout(prompts.dtype, Q + width, width)
    return Rollout(*(parallel.gather(x, B) for x in found))


def row_noise(seed, first_row, rows, width):
    """Noise in [0, 1) for the tokens of rows, (rows, width, 2): each row, counted from 0, has its
    own part of one long sequence."""
    generator = torch.Generator().manual_seed(seed)
    shape = (first_row + rows, width, 2)
    return torch.rand(shape, dtype=torch.float64, generator=generator)[first_row:]


class Decoder:
    """B rows of S slots: the buffers that a step works on, and the step, which reads and writes
    these buffers and the weights alone."""

    def __init__(self, model, batch, slots, *, eos, pad, temperature, top_k):
        self.eos, self.pad, self.temperature, self.top_k = eos, pad, temperature, top_k
        self.rounded = self.graph = self.quick = None
        c, weight = model.config, model.lm_head_weight
        device, dtype = weight.device, weight.dtype
        self.vocab = len(weight)
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        if dtype != weight.dtype and weight.is_cuda:
            self.rounded = rounded_copy(model, dtype)
            weight = weight.to(dtype)
        self.weight = kernels.aligned(weight.detach())
        shape = (c.n_layer, 2, batch, c.n_head, slots, c.n_embd // c.n_head)
        self.cache = torch.zeros(shape, device=device, dtype=dtype)
        self.tokens = torch.full((batch, slots), pad, device=device)
        self.logprobs = torch.zeros(batch, slots, device=device)  # of the token in that slot
        row = torch.zeros(batch, dtype=torch.int64, device=device)
        self.token, self.slot = row.clone(), row.clone()  # each row's newest
        self.steps = row[:1].clone()
        self.seed = row[:1].clone()  # of the fused sampler's noise
        shape = (batch, c.n_ctx, 2)  # of its twin's noise
        self.noise = torch.zeros(shape, dtype=torch.float64, device=device)

    def take_weights(self, model):
        """Takes over the weights as they are now, and whether the quick step fits them."""
        if self.rounded:
            copy_state(self.rounded, model)
        if self.weight.data_ptr() != model.lm_head_weight.data_ptr():
            self.weight[: self.vocab] = model.lm_head_weight
        before, self.quick = self.quick, quick_parts(model, self.rounded, self.cache)
        if (before is None) != (self.quick is None):
            self.graph = None  # of another step

    def start(self, model, prompts, prompt_lengths, seed, first_row):
        """Takes over the weights and the prompts (B, Q), and samples each response's first
        token."""
        self.take_weights(model)
        B, Q = len(prompts), int(prompt_lengths.max())
        self.seed.fill_(seed + (first_row << 32))
        if self.top_k or not kernels.fused(self.weight):
            self.noise.copy_(row_noise(seed, first_row, B, self.noise.shape[1]))
        self.tokens.fill_(self.pad)
        inside = response_mask(prompt_lengths, Q)
        self.tokens[:, :Q] = torch.where(inside, prompts[:, :Q], self.pad)
        self.prompt_lengths = prompt_lengths
        self.slot.copy_(prompt_lengths - 1)
        self.steps.zero_()
        hidden = (self.rounded or model).hidden(self.tokens[:, :Q], cache=self.cache)  # (B, Q, C)
        self.pick(hidden[torch.arange(B, device=prompts.device), self.slot])

    def advance(self, model):
        """One more token a row, also of those that have ended: what follows EOS is thrown away."""
        if self.graph:
            return self.graph.replay()
        step = Step(self.token, self.slot, self.cache)
        own = self.rounded or model
        self.pick(quick_step(step, *self.quick) if self.quick else own.trunk(step))

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
        self.token.copy_(token)
        self.tokens.scatter_(1, self.slot[:, None], token[:, None])
        self.logprobs.scatter_(1, self.slot[:, None], logprob[:, None].to(self.logprobs.dtype))

    def ended(self, width):
        """Where EOS is among the first `width` response tokens: (B, width)."""
        return window(self.tokens, self.prompt_lengths, width) == self.eos

    def rollout(self, dtype, slots, width):
        """A Rollout of the first `width` response tokens, in rows of so many slots."""
        ended, p = self.ended(width), self.prompt_lengths
        first = ended.int().argmax(1)
        lengths = torch.where(ended.any(1), first + 1, width)
        inside = response_mask(p + lengths, slots)
        tokens = self.tokens[:, :slots].masked_fill(~inside, self.pad).to(dtype)
        logprobs = window(self.logprobs, p, width)
        return Rollout(tokens, p, lengths, logprobs.where(response_mask(lengths, width), 0))


def rounded_copy(model, dtype):
    """A copy whose matrix products have weights of that type: else each step would read fp32
    weights to round them."""
    with torch.device("meta"):  # draws no random numbers
        copy = type(model)(model.config).requires_grad_(False).eval()
    copy.to_empty(device=model.lm_head_weight.device)
    copy_state(copy, model)
    for linear in copy.modules():
        if isinstance(linear, torch.nn.Linear):
            linear.to(dtype)
    return copy


def copy_state(copy, model):
    """Weights, and what else a changed model keeps of numbers, as the angles of its positions."""
    own = [*copy.parameters(), *copy.buffers()]
    torch._foreach_copy_(own, [*model.parameters(), *model.buffers()])


# The quick step, and whether it may be taken

QUICK = weakref.WeakKeyDictionary()  # model -> whether quick_step does what it does
GRAPHS = weakref.WeakKeyDictionary()  # model -> {what the graph depends on: Decoder}


def quick_parts(model, rounded, cache):
    """What quick_step takes besides the step, or None where the model decodes by itself."""
    own = rounded or model
    try:
        around = own.wte.weight, own.wpe.weight, *own.ln_f.parameters()
        layers = [list(block.parameters()) for block in own.h]
        parts = around, layers
    except AttributeError:  # another model, which has other parts
        parts = None
    quick = agrees(own, parts, cache)
    if not quick and all(QUICK.values()):
        print("sampling: the quick decoding step does not compute what this model does, so the "
              "model's own definition decodes", flush=True)  # fmt: skip
    QUICK[model] = quick
    return parts if quick else None


def agrees(model, parts, cache):
    """Whether quick_step and the model say the same of two tokens after a cache of random
    numbers."""
    random = torch.Generator().manual_seed(0)
    slots = min(8, model.config.n_ctx)
    L, two, _, H, _, D = cache.shape
    tried = torch.randn(L, two, 2, H, slots, D, generator=random)
    token, slot = torch.tensor([[1, 2], [slots // 2, slots - 1]], device=cache.device)
    first, second = (Step(token, slot, tried.to(cache)) for _ in range(2))
    own = model.trunk(first)
    try:
        quick = quick_step(second, *parts)
    except Exception:  # whatever does not fit it
        return False
    if quick.shape != own.shape:
        return False
    return bool((quick - own).abs().max() <= 1e-5 * own.abs().max())


def expect_one_reading(model):
    """Raises ValueError where the model gives a token other numbers in a whole row, in rows without
    their padding, and alone before a cache; or has other logits than those of its head."""
    c, head = model.config, model.lm_head_weight
    T, device = min(8, c.n_ctx), head.device
    random = torch.Generator().manual_seed(0)
    idx = torch.randint(c.vocab_size, (2, T), generator=random).to(device)
    last = torch.tensor([T - 1, (T - 1) // 2], device=device)
    newest = torch.arange(2, device=device), last
    shape = (c.n_layer, 2, 2, c.n_head, T, c.n_embd // c.n_head)
    cache = torch.zeros(shape, device=device, dtype=head.dtype)
    with torch.autocast(device.type, enabled=False):
        whole = model.hidden(idx, cache=cache)[newest]  # (2, C)
        packed = model.trunk(Pass(model, idx, last + 1))[newest]
        alone = model.trunk(Step(idx[newest], last, cache))
        by_head = F.linear(whole, head)
        # Its forward would spread a sharded model's weights again.
        logits = None if parallel.sharded(model) else model(idx)
    for how, found in (("in rows without their padding", packed), ("after a cache", alone)):
        if apart(found, whole):
            raise ValueError(
                f"a token {how} has other hidden states than in a whole row. Layers see (B, T, C), "
                "(N, C) or (B, C): let run.attend alone mix tokens, take positions from "
                "run.places, and change trunk rather than hidden"
            )
    if torch.is_tensor(logits) and apart(logits[newest], by_head):
        raise ValueError(
            "model(idx) is not hidden @ lm_head_weight, of which samples and log-probs are made: "
            "change trunk or lm_head_weight rather than forward"
        )


def apart(found, expected):
    """Whether two tensors differ by more than rounding."""
    slack = 0.01 if expected.dtype.itemsize > 2 else 0.1
    return bool((found - expected).abs().max() > slack * expected.abs().max())


def quick_step(step, around, layers):
    """GPT-2's trunk (minirlhf/gpt.py) for the newest token of each row: (B, C)."""
    wte, wpe, *ln_f = around
    C = wte.shape[1]
    x = F.embedding(step.idx, wte) + F.embedding(step.places, wpe)  # (B, C)
    for layer, cache in zip(layers, step.cache, strict=True):
        w_1, b_1, w_qkv, b_qkv, w_out, b_out, w_2, b_2, w_up, b_up, w_down, b_down = layer
        qkv = F.linear(torch.layer_norm(x, (C,), w_1, b_1), w_qkv, b_qkv)
        y = decode_attention(qkv, cache, step.places, step.mask).view(-1, C)
        x = x + F.linear(y, w_out, b_out)
        up = F.linear(torch.layer_norm(x, (C,), w_2, b_2), w_up, b_up)
        x = x + F.linear(F.gelu(up, approximate="tanh"), w_down, b_down)
    return torch.layer_norm(x, (C,), *ln_f)


def captured(model, batch, slots, **options):
    """A Decoder on the GPU with its step captured; the last few of each model are kept, as long as
    its weights stay where they are."""
    slots = -(-slots // 64) * 64
    where = hash(tuple(p.data_ptr() for p in model.parameters()))
    autocast, fused = torch.is_autocast_enabled("cuda"), kernels.fused(model.lm_head_weight)
    key = (batch, slots, where, autocast, fused, *options.values())
    decoders = GRAPHS.setdefault(model, {})
    if key not in decoders:
        while len(decoders) > 3:
            del decoders[next(iter(decoders))]
        decoder = Decoder(model, batch, slots, **options)
        decoder.take_weights(model)
        stream = torch.cuda.Stream()  # warm-up: kernels are compiled, workspaces allocated before
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                decoder.advance(model)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            decoder.advance(model)
        decoder.graph = graph
        decoders[key] = decoder
    return decoders[key]
