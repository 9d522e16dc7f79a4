"""Text out of a GPT: one pass over the ragged prompts, then a token a step from the KV cache.

Rows are left-aligned: a prompt of length p ends at slot p-1, and the token of step t goes to slot p+t of its own row. So a rollout
has the layout of a training batch, and a row gives the same numbers alone and in any batch.

Left out: top-p and other filters, which make the sampler another distribution than the one that is scored; beam search; so far, CUDA
graphs.
"""

from typing import NamedTuple

import torch

from minirlhf.data import pad_rows
from minirlhf.gpt import KVCache
from minirlhf.kernels import token_logprobs


class Rollout(NamedTuple):
    """B prompts with their responses, at most R tokens each."""

    tokens: torch.Tensor  # (B, Q+R) prompt, response and padding, left-aligned
    prompt_lengths: torch.Tensor  # (B,)
    response_lengths: torch.Tensor  # (B,) the closing EOS counted
    logprobs: torch.Tensor  # (B, R) of each response token as sampled, fp32; 0 after the end


@torch.no_grad()
def generate(model, prompts, prompt_lengths, max_new_tokens, *, eos, pad, temperature=1.0, top_k=None, generator=None):
    """Samples a response to each prompt until EOS or `max_new_tokens`: a Rollout.

    prompts (B, Q) int, right-padded; prompt_lengths (B,). `temperature` 0 takes the likeliest token, whose log-prob is then given at
    temperature 1; `top_k` keeps the k likeliest. Raises ValueError when a row could outgrow the context or an argument makes no sense.
    """
    B, Q = prompts.shape
    longest = int(prompt_lengths.max())
    if longest + max_new_tokens > model.config.n_ctx:
        raise ValueError(f"a prompt of {longest} tokens and a response of up to {max_new_tokens} exceed the context of "
                         f"{model.config.n_ctx}: shorten the prompts, or allow fewer new tokens")  # fmt: skip
    senseless = max_new_tokens < 1 or not temperature >= 0 or (top_k is not None and top_k < 1)
    if senseless or int(prompt_lengths.min()) < 1 or longest > Q:
        raise ValueError(f"max_new_tokens {max_new_tokens}, temperature {temperature}, top_k {top_k}, prompt lengths "
                         f"{int(prompt_lengths.min())}..{longest} of {Q}: each must be positive and fit")  # fmt: skip
    device, training = prompts.device, model.training
    model.eval()
    tokens = torch.full((B, Q + max_new_tokens), pad, device=device, dtype=prompts.dtype)
    prompt_mask = torch.arange(Q, device=device) < prompt_lengths[:, None]
    tokens[:, :Q] = torch.where(prompt_mask, prompts, pad)
    logprobs = torch.zeros(B, max_new_tokens, device=device)
    finished = torch.zeros(B, dtype=torch.bool, device=device)
    response_lengths = torch.zeros_like(prompt_lengths)

    weight = model.lm_head_weight
    cache = KVCache(model.config, B, longest + max_new_tokens, device=device, dtype=cache_dtype(device, weight))
    hidden = model.hidden(tokens[:, :longest], cache)  # (B, Q, C)
    hidden = hidden[torch.arange(B, device=device), prompt_lengths - 1]  # (B, C): what follows the last prompt token
    for t in range(max_new_tokens):
        token, logprob = sample(hidden, weight, temperature, top_k, generator)
        token = torch.where(finished, pad, token)
        logprobs[:, t] = torch.where(finished, 0, logprob)
        tokens.scatter_(1, (prompt_lengths + t)[:, None], token[:, None].to(tokens.dtype))
        response_lengths += ~finished
        finished |= token == eos
        if t + 1 == max_new_tokens or (t % 4 == 3 and finished.all()):
            break
        hidden = model.hidden(token[:, None], cache, prompt_lengths + t)[:, 0]
    model.train(training)
    return Rollout(tokens, prompt_lengths, response_lengths, logprobs)


def sample(hidden, weight, temperature, top_k, generator):
    """The next token (B,) of hidden states (B, C), and its log-prob (B,) in the distribution it was drawn from."""
    with torch.autocast(hidden.device.type, enabled=False):
        logits = hidden.float() @ weight.float().t()  # (B, V)
    logits /= temperature or 1.0
    if top_k:
        floor = logits.topk(min(top_k, logits.shape[1]), dim=1).values[:, -1:]
        logits.masked_fill_(logits < floor, float("-inf"))
    probs = logits.softmax(1)
    if temperature == 0:
        token = probs.argmax(1)
    else:  # inverse transform: the first token at which the cumulated probability reaches a uniform number in (0, 1]
        cumulated = probs.cumsum(1, dtype=torch.float64)  # in fp32 the sum over a large vocabulary would lose rare tokens
        u = 1 - torch.rand(len(probs), 1, dtype=torch.float64, device=probs.device, generator=generator)
        token = torch.searchsorted(cumulated, u * cumulated[:, -1:]).squeeze(1).clamp(max=probs.shape[1] - 1)  # NaN lands past the end
    return token, probs.gather(1, token[:, None]).squeeze(1).log()


def cache_dtype(device, weight):
    on = torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if on else weight.dtype


def response_mask(response_lengths, width):
    """True on real response tokens: (B, R) of lengths (B,)."""
    return torch.arange(width, device=response_lengths.device) < response_lengths[:, None]


def before_response(x, prompt_lengths, width):
    """What stands where each response token is chosen: x (B, T, ...) at positions p-1 .. p+R-2, as (B, R, ...).

    Past the end of x the last position is repeated: outside the mask.
    """
    positions = prompt_lengths[:, None] - 1 + torch.arange(width, device=x.device)  # (B, R)
    return x[torch.arange(len(x), device=x.device)[:, None], positions.clamp(max=x.shape[1] - 1)]


def response_logprobs(model, tokens, prompt_lengths, response_lengths, width, temperature=1.0):
    """log pi of each response token given all before it: (B, R) fp32, 0 outside the mask.

    tokens (B, T): left-aligned rows of prompt and response; R = `width`. The one function for rollout, reference and update; only
    response positions go through the head.
    """
    mask = response_mask(response_lengths, width)
    end = int((prompt_lengths + response_lengths).max())
    hidden = before_response(model.hidden(tokens[:, : end - 1]), prompt_lengths, width)  # (B, R, C)
    targets = before_response(tokens[:, 1:end], prompt_lengths, width)  # (B, R)
    logprobs = torch.zeros(mask.shape, device=tokens.device)
    return logprobs.masked_scatter(mask, token_logprobs(hidden[mask], model.lm_head_weight, targets[mask],
                                                        temperature=temperature))  # fmt: skip


class Answer(NamedTuple):
    prompt: str
    response: str
    tokens: int  # of the response
    kl: float  # sum over the response of log pi - log pi_ref, nats
    score: float  # nan without a scorer


@torch.no_grad()
def answers(policy, reference, scorer, prompts, tokenizer, response_length, temperature, autocast):
    """One sampled Answer to each prompt (a row of ids); scorer: (tokens, prompt_lengths, response_lengths) -> (B,), or None."""
    result = []
    for start in range(0, len(prompts), 128):
        batch = pad_rows(prompts[start : start + 128], tokenizer.pad, policy.wte.weight.device)
        with autocast:
            sampled = generate(policy, *batch, response_length, eos=tokenizer.eos, pad=tokenizer.pad, temperature=temperature)
            row = (sampled.tokens, sampled.prompt_lengths, sampled.response_lengths)
            logprobs, ref_logprobs = (response_logprobs(m, *row, response_length, temperature) for m in (policy, reference))
            scores = scorer(*row) if scorer else torch.full((len(sampled.tokens),), float("nan"))
        kl = (logprobs - ref_logprobs).sum(1)
        for ids, p, r, k, s in zip(*(x.tolist() for x in (*row, kl, scores)), strict=True):
            result.append(Answer(tokenizer.decode(ids[:p]), tokenizer.decode(ids[p : p + r]), r, k, s))
    return result
