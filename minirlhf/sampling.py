"""Text out of a GPT: one pass over the ragged prompts, then a token a step from the KV cache.

Rows are left-aligned: a prompt of length p ends at slot p-1, and the token of step t goes to slot p+t of its own row. So a rollout
has the layout of a training batch, and a row gives the same numbers alone and in any batch.

Left out: top-p and other filters, which make the sampler another distribution than the one that is scored; beam search.
"""

import contextlib

import torch

from minirlhf import kernels
from minirlhf.engine import machine, parallel
from minirlhf.engine.decoding import Decoder, Rollout, captured
from minirlhf.engine.rows import before_response, response_mask


@torch.no_grad()
def generate(model, prompts, prompt_lengths, max_new_tokens, *, eos, pad, temperature=1.0, top_k=None, generator=None, first_row=0):
    """Samples a response to each prompt until EOS or `max_new_tokens`: a Rollout.

    prompts (B, Q) int, right-padded; prompt_lengths (B,). `temperature` 0 takes the likeliest token, whose log-prob is then given at
    temperature 1; `top_k` keeps the k likeliest. The generator, or torch's own, gives one seed; the noise of a token depends on that seed,
    on its row, counted from `first_row`, and on its place in the response. Raises ValueError when a row could outgrow the context or an
    argument makes no sense.
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
    training = model.training
    model.eval()
    options = {"eos": eos, "pad": pad, "temperature": temperature, "top_k": top_k}
    capture = prompts.is_cuda and not parallel.sharded(model)  # whose weights move
    seed = torch.randint(2**62, (1,), generator=generator, device=generator.device if generator else "cpu").item()
    every = 16 if prompts.is_cuda else 4  # to look whether all have ended makes a GPU wait
    quicker = torch.inference_mode() if prompts.device.type == "cpu" else contextlib.nullcontext()  # a tenth less to do an operation
    try:
        with parallel.whole(model), machine.quick_library(prompts), quicker:
            decoder = (captured if capture else Decoder)(model, B, Q + max_new_tokens, **options)
            decoder.start(model, prompts[:, :longest], prompt_lengths, seed, first_row)
            for t in range(1, max_new_tokens):
                if t % every == 0 and decoder.ended(t).any(1).all():
                    break
                decoder.advance()
    finally:
        model.train(training)
    return decoder.rollout(prompts, max_new_tokens)


def generate_all(model, prompts, prompt_lengths, *args, **options):
    """`generate`, each process its share of the rows: the Rollout of all of them on every process."""
    mine, _ = parallel.share(len(prompts))
    sampled = generate(model, prompts[mine], prompt_lengths[mine], *args, first_row=int(mine[0]), **options)
    return Rollout(*(parallel.gather(x, len(prompts)) for x in sampled))


def response_logprobs(model, tokens, prompt_lengths, response_lengths, width, temperature=1.0, entropy=False):
    """log pi of each response token given all before it: (B, R) fp32, 0 outside the mask; with `entropy`, also that of each distribution.

    tokens (B, T): left-aligned rows of prompt and response; R = `width`. The one function for rollout, reference and update; only
    response positions go through the head.
    """
    mask = response_mask(response_lengths, width)
    end = int((prompt_lengths + response_lengths).max())
    before_last = model.hidden(tokens[:, : end - 1], lengths=prompt_lengths + response_lengths - 1)  # (B, T, C)
    hidden = before_response(before_last, prompt_lengths, width)  # (B, R, C)
    targets = before_response(tokens[:, 1:end], prompt_lengths, width)  # (B, R)
    found = kernels.token_logprobs_and_entropy(hidden[mask], model.lm_head_weight, targets[mask], temperature=temperature, entropy=entropy)
    logprobs, *entropies = (torch.zeros(mask.shape, dtype=x.dtype, device=x.device).masked_scatter(mask, x) for x in found[: 1 + entropy])
    return (logprobs, *entropies) if entropy else logprobs
