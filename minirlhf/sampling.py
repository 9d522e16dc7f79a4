"""Text out of a GPT, and the log-probs of text.

Rows are left-aligned, so a rollout has the layout of a training batch, and a row gives the same
numbers alone and in any batch.

Left out: top-p and other filters, which make the sampler another distribution than the one that is
scored; beam search.
"""

import torch
import torch.nn.functional as F

from minirlhf import kernels
from minirlhf.engine.decoding import Rollout, decode, row_noise
from minirlhf.engine.rows import response_mask, window
from minirlhf.kernels.decoding import draw


@torch.no_grad()
def plain_generate(model, prompts, prompt_lengths, max_new_tokens, *, eos, pad, temperature=1.0):
    """`generate` as one would write it first: the model reads the whole row again for each token.

    The same torch seed gives the same tokens. prompts (B, Q), right-padded; prompt_lengths (B,).
    """
    B = len(prompts)
    R = max_new_tokens
    seed = torch.randint(2**62, (1,)).item()
    noise = row_noise(seed, 0, B, model.config.n_ctx)  # (B, n_ctx, 2), as in `generate`
    tokens = F.pad(prompts, (0, R), value=pad)  # (B, Q+R)
    lengths = prompt_lengths.clone()
    logprobs = torch.zeros(B, R)
    ended = torch.zeros(B, dtype=torch.bool)
    for t in range(R):
        logits = window(model(tokens), lengths - 1, 1)[:, 0]  # (B, V), after each row's last
        logits = logits.float() / (temperature or 1)
        probs = logits.softmax(-1)
        token = draw(probs, noise[:, t]) if temperature else probs.argmax(-1)  # (B,)
        logprob = probs.gather(1, token[:, None]).log()
        logprobs[:, t] = logprob[:, 0].masked_fill(ended, 0)
        written = token.masked_fill(ended, pad)
        place = lengths[:, None]
        tokens.scatter_(1, place, written[:, None])
        lengths += ~ended
        ended |= token == eos
    return Rollout(tokens, prompt_lengths, lengths - prompt_lengths, logprobs)


def generate(model, prompts, prompt_lengths, max_new_tokens, *, eos, pad, temperature=1.0,
             top_k=None, generator=None):  # fmt: skip
    """A Rollout: a response to each prompt, sampled until EOS or `max_new_tokens`.

    prompts (B, Q) int, right-padded; prompt_lengths (B,). At `temperature` 0 the likeliest token,
    with its log-prob at 1; `top_k` keeps the k likeliest. Noise is of the row, the place and one
    seed, by the generator or torch's own. Raises ValueError where a row could outgrow the context
    or an argument makes no sense.
    """
    Q, n_ctx = prompts.shape[1], model.config.n_ctx
    shortest = int(prompt_lengths.min())
    longest = int(prompt_lengths.max())
    if longest + max_new_tokens > n_ctx:
        given = f"a prompt of {longest} tokens and a response of up to {max_new_tokens}"
        raise ValueError(f"{given} exceed the context of {n_ctx}: allow fewer tokens")
    positive = max_new_tokens >= 1 and temperature >= 0 and (top_k is None or top_k >= 1)
    if not positive or not 1 <= shortest <= longest <= Q:
        given = f"max_new_tokens {max_new_tokens}, temperature {temperature}, top_k {top_k}"
        lengths = f"prompt lengths {shortest}..{longest} of {Q}"
        raise ValueError(f"{given}, {lengths}: each must be positive and fit")
    options = {"eos": eos, "pad": pad, "temperature": temperature, "top_k": top_k}
    return decode(model, prompts, prompt_lengths, max_new_tokens, generator, **options)


def response_logprobs(model, tokens, prompt_lengths, response_lengths, width, temperature=1.0,
                      entropy=False):  # fmt: skip
    """log pi of each response token given all before it: (B, R) fp32, 0 outside the mask; with
    `entropy`, also that of each distribution (B, R). tokens (B, T): left-aligned rows of prompt and
    response; R = `width`. The one function for rollout, reference and update."""
    mask = response_mask(response_lengths, width)  # (B, R)
    before = prompt_lengths - 1  # each token is predicted at the place before its own
    lengths = prompt_lengths + response_lengths
    end = int(lengths.max())
    hidden = model.hidden(tokens[:, : end - 1], lengths=lengths - 1)  # (B, T, C)
    hidden = window(hidden, before, width)[mask]  # (N, C)
    targets = window(tokens[:, 1:end], before, width)[mask]  # (N,)
    options = {"temperature": temperature, "entropy": entropy}
    head = model.lm_head_weight
    found = kernels.token_logprobs_and_entropy(hidden, head, targets, **options)
    zeros = found[0].new_zeros(mask.shape)
    logprobs = zeros.masked_scatter(mask, found[0])
    if not entropy:
        return logprobs
    return logprobs, zeros.masked_scatter(mask, found[1])
