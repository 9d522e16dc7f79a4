"""The quick decoding step, and whether a model may take it.

A model itself says how a token goes through it: its trunk, with a passes.Step. `quick_step` is the
same for GPT-2's layers without the calls of modules, which take as long as their work on one token.
Before its first use in a run a model is tried: it must give a token the same numbers however it is
read, and the quick step is taken only where it computes what the model's own definition does.
"""

import contextlib
import weakref

import torch
import torch.nn.functional as F

from minirlhf.engine import parallel
from minirlhf.engine.passes import Pass, Step
from minirlhf.kernels.decoding import decode_attention

QUICK = weakref.WeakKeyDictionary()  # model -> (its code when tried, whether quick_step fits)


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


def parts_of(model):
    """What quick_step takes besides the step: the weights around the layers, and of each layer."""
    around = model.wte.weight, model.wpe.weight, *model.ln_f.parameters()
    return around, [list(block.parameters()) for block in model.h]


def fits(model):
    """Whether quick_step computes what this model does; a model is tried when its code is new."""
    code = [model.trunk]
    for m in model.modules():
        code += [m.forward, *m._forward_pre_hooks.values(), *m._forward_hooks.values()]
    code = [getattr(f, "__func__", f) for f in code]
    if QUICK.get(model, ((), False))[0] != code:
        QUICK[model] = code, try_out(model)
    return QUICK[model][1]


@torch.no_grad()
def try_out(model):
    """Says so where the quick step does not fit; raises ValueError as expect_one_reading does."""
    kind = model.lm_head_weight.device.type
    with parallel.sampling(model), torch.autocast(kind, enabled=False):
        expect_one_reading(model)
        with other_weights(model):
            fit = agrees(model)
    if not fit and all(fitted for _, fitted in QUICK.values()):
        print("sampling: the quick decoding step does not compute what this model does, so the "
              "model's own definition decodes", flush=True)  # fmt: skip
    return fit


def agrees(model):
    """Whether quick_step and the model say the same of two tokens after a cache of random
    numbers."""
    c, head = model.config, model.lm_head_weight
    random = torch.Generator().manual_seed(0)
    slots = min(8, c.n_ctx)
    shape = c.n_layer, 2, 2, c.n_head, slots, c.n_embd // c.n_head
    cache = torch.randn(shape, generator=random).to(head)
    token, slot = torch.tensor([[1, 2], [slots // 2, slots - 1]], device=head.device)
    own = model.trunk(Step(token, slot, cache.clone()))
    try:
        quick = quick_step(Step(token, slot, cache), *parts_of(model))
    except Exception:  # another model, which has other parts
        return False
    if quick.shape != own.shape:
        return False
    return bool((quick - own).abs().max() <= 1e-5 * own.abs().max())


@contextlib.contextmanager
def other_weights(model):
    """Moves all weights for a while: so a layer that starts at 0, and does nothing yet, counts.
    By their data, as a backward pass of before may still need them."""
    kept = [p.clone() for p in model.parameters()]
    noise = 0.1 * torch.randn(4099, generator=torch.Generator().manual_seed(0))
    try:
        for p in model.parameters():
            p.data += noise.repeat(1 + p.numel() // len(noise))[: p.numel()].view_as(p).to(p)
        yield
    finally:
        for p, before in zip(model.parameters(), kept, strict=True):
            p.data.copy_(before)


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
    whole = model.hidden(idx, cache=cache)[newest]  # (2, C)
    packed = model.trunk(Pass(model, idx, last + 1))[newest]
    alone = model.trunk(Step(idx[newest], last, cache))
    for how, found in (("in rows without their padding", packed), ("after a cache", alone)):
        if apart(found, whole):
            raise ValueError(
                f"a token {how} has other hidden states than in a whole row. Layers see (B, T, C), "
                "(N, C) or (B, C): let run.attend alone mix tokens, take positions from "
                "run.places, and change trunk rather than hidden"
            )
    # Its forward would spread a sharded model's weights again.
    logits = None if parallel.sharded(model) else model(idx)
    if torch.is_tensor(logits) and apart(logits[newest], F.linear(whole, head)):
        raise ValueError(
            "model(idx) is not hidden @ lm_head_weight, of which samples and log-probs are made: "
            "change trunk or lm_head_weight rather than forward"
        )


def apart(found, expected):
    """Whether two tensors differ by more than rounding."""
    slack = 0.01 if expected.dtype.itemsize > 2 else 0.1
    return bool((found - expected).abs().max() > slack * expected.abs().max())
