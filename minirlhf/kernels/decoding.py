"""The kernels of a decoding step, each beside its plain PyTorch twin.

They are the sampler, and the attention of one new token over the filled part of the cache.

Left out: top-k in the fused sampler.
"""

import torch
import torch.nn.functional as F

from minirlhf.kernels.choice import fused, jit, tl, triton


def sample_logits(logits, temperature, seed, step):
    """Tokens (B,) sampled from fp32 logits (B, V) at a temperature, and their log-probs (B,).

    Temperature 0 takes the largest. The noise is a function of seed (1,) int64, the row, and step
    (1,) int64: tensors on the device, so that a captured graph can be replayed with others.
    """
    B, V = logits.shape
    block = min(2048, max(16, triton.next_power_of_2(V)))
    splits = triton.cdiv(V, block)
    parts = torch.empty(4, B, splits, device=logits.device)
    candidates = torch.empty(B, splits, dtype=torch.int64, device=logits.device)
    tokens = torch.empty(B, dtype=torch.int64, device=logits.device)
    logprobs = torch.empty(B, device=logits.device)
    size, scale = B * splits, 1 / (temperature or 1)
    sample_kernel[(B, splits)](
        logits, seed, step, parts, candidates, V, logits.stride(0), scale, size,
        NOISE=temperature > 0, BLOCK=block,
    )  # fmt: skip
    sample_combine[(B,)](
        parts, candidates, tokens, logprobs, splits, size,
        SPLITS=triton.next_power_of_2(splits), num_warps=1,
    )  # fmt: skip
    return tokens, logprobs


@jit
def sample_kernel(
    z_ptr, seed_ptr, step_ptr, parts_ptr, candidate_ptr, V, stride, scale, size,
    NOISE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    z = tl.load(z_ptr + row * stride + cols, mask=cols < V, other=float("-inf")) * scale
    m = tl.max(z, 0)
    noisy = z
    if NOISE:
        key = tl.load(seed_ptr) + (row << 32) + tl.load(step_ptr)
        # what one call of Philox gives
        four = tl.rand4x(key, tl.program_id(1) * (BLOCK // 4) + tl.arange(0, BLOCK // 4))
        u = tl.reshape(tl.join(tl.join(four[0], four[1]), tl.join(four[2], four[3])), [BLOCK])
        noisy = tl.where(cols < V, z - tl.log(-tl.log(u)), float("-inf"))
    best = tl.argmax(noisy, 0)
    out = row * tl.num_programs(1) + tl.program_id(1)
    tl.store(parts_ptr + out, tl.max(noisy, 0))
    tl.store(parts_ptr + size + out, tl.sum(tl.where(tl.arange(0, BLOCK) == best, z, 0.0), 0))
    tl.store(parts_ptr + 2 * size + out, m)
    tl.store(parts_ptr + 3 * size + out, tl.sum(tl.exp(z - m), 0))
    tl.store(candidate_ptr + out, tl.program_id(1) * BLOCK + best)


@jit
def sample_combine(
    parts_ptr, candidate_ptr, token_ptr, logprob_ptr, splits, size, SPLITS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, SPLITS)
    ptr = parts_ptr + row * splits + at
    noisy = tl.load(ptr, mask=at < splits, other=float("-inf"))
    z = tl.load(ptr + size, mask=at < splits, other=0.0)
    m = tl.load(ptr + 2 * size, mask=at < splits, other=float("-inf"))
    s = tl.load(ptr + 3 * size, mask=at < splits, other=0.0)
    best = tl.argmax(noisy, 0)
    largest = tl.max(m, 0)
    lse = largest + tl.log(tl.sum(s * tl.exp(m - largest), 0))
    tl.store(token_ptr + row, tl.load(candidate_ptr + row * splits + best))
    tl.store(logprob_ptr + row, tl.sum(tl.where(at == best, z, 0.0), 0) - lse)


def sample(logits, temperature, top_k, noise):
    """A token (B,) of logits (B, V) by noise (B, 2) in [0, 1), and its log-prob (B,) as drawn."""
    logits = logits if temperature in (0, 1) else logits / temperature
    if top_k:
        floor = logits.topk(min(top_k, logits.shape[1]), dim=1).values[:, -1:]
        logits = logits.masked_fill(logits < floor, float("-inf"))
    probs = logits.softmax(1)
    token = draw(probs, noise) if temperature else probs.argmax(1)
    return token, probs.gather(1, token[:, None]).squeeze(1).log()


def draw(probs, noise, block=64):
    """A token of each row of probs (B, V) by noise (B, 2): its block, then its place in that."""
    B, V = probs.shape
    blocks = (F.pad(probs, (0, -V % block)) if V % block else probs).view(B, -1, block)
    u = 1 - noise.double()  # in (0, 1]
    chosen = inverse_transform(blocks.sum(2), u[:, :1])
    chosen = chosen.clamp(max=blocks.shape[1] - 1)  # NaN lands past the end
    within = blocks[torch.arange(B, device=probs.device), chosen]
    place = inverse_transform(within, u[:, 1:])
    return (chosen * block + place).clamp(max=V - 1)


def inverse_transform(weights, u):
    """The first place (B,) at which the cumulated weights (B, n) reach the share u (B, 1)."""
    cumulated = weights.cumsum(1, dtype=torch.float64)
    return torch.searchsorted(cumulated, u * cumulated[:, -1:]).squeeze(1)


def decode_attention(qkv, cache, positions, mask):
    """(B, H, 1, D) of a token's qkv (B, 3 H D): its key and value go to the row's slot, positions
    (B,), of the cache (2, B, H, S, D); it attends to those up to it, as the mask (B, 1, 1, S)."""
    _, B, H, S, D = cache.shape
    qkv = qkv.view(B, 3, H, 1, D).transpose(0, 1)
    if not fused(qkv):
        slots = positions.view(-1, 1, 1, 1).expand(2, B, H, 1, D)
        cache.scatter_(3, slots, qkv[1:])
        return F.scaled_dot_product_attention(qkv[0], cache[0], cache[1], attn_mask=mask)
    return fused_decode_attention(*qkv, cache, positions)


def fused_decode_attention(q, k, v, cache, positions):
    """The same of q, k, v (B, H, 1, D), by the kernel."""
    _, B, H, S, D = cache.shape
    out = torch.empty(B, H, 1, D, dtype=q.dtype, device=q.device)
    decode_attention_kernel[(B * H,)](
        q, k, v, cache[0], cache[1], positions, out, q.stride(0), q.stride(1), H, S,
        D=D, BD=triton.next_power_of_2(D), BLOCK=64, num_warps=2,
    )  # fmt: skip
    return out


@jit
def decode_attention_kernel(
    q_ptr, k_ptr, v_ptr, k_cache, v_cache, position_ptr, out_ptr, stride_row, stride_head, H, S,
    D: tl.constexpr, BD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BD)
    new = (program // H) * stride_row + (program % H) * stride_head + d
    q = tl.load(q_ptr + new, mask=d < D, other=0.0).to(tl.float32) / D**0.5
    k = tl.load(k_ptr + new, mask=d < D, other=0.0)
    v = tl.load(v_ptr + new, mask=d < D, other=0.0)
    p = tl.load(position_ptr + program // H)
    cache = program * S * D
    tl.store(k_cache + cache + p * D + d, k, mask=d < D)
    tl.store(v_cache + cache + p * D + d, v, mask=d < D)
    m = tl.sum(q * k.to(tl.float32), 0)
    s = m * 0.0 + 1.0
    acc = v.to(tl.float32)
    for start in range(0, p, BLOCK):
        slots = start + tl.arange(0, BLOCK)
        inside = (slots < p)[:, None] & (d < D)[None]
        at = cache + slots[:, None] * D + d[None]
        keys = tl.load(k_cache + at, mask=inside, other=0.0).to(tl.float32)
        values = tl.load(v_cache + at, mask=inside, other=0.0).to(tl.float32)
        z = tl.where(slots < p, tl.sum(keys * q[None], 1), float("-inf"))
        larger = tl.maximum(m, tl.max(z, 0))
        weight = tl.exp(z - larger)
        shrink = tl.exp(m - larger)
        s = s * shrink + tl.sum(weight, 0)
        acc = acc * shrink + tl.sum(weight[:, None] * values, 0)
        m = larger
    tl.store(out_ptr + program * D + d, (acc / s).to(out_ptr.dtype.element_ty), mask=d < D)
