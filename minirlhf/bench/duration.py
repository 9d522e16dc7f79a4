"""Seconds of a step, by formula: what plan.py's --help says in words. Letters as in memory.py."""

from minirlhf.bench.memory import MINIBATCHES, MODELS, parameters, row_length, split, width

EPOCHS = 1  # default of ppo
DECODING = 0.4  # share of the memory's bandwidth that decoding reaches


def flops(c, T, tokens, read=0, train=False, again=False, last=False):
    """Of `tokens` in rows of T through the layers, and of `read` of them through the head; with
    `last` the last block's MLP sees the last token of each row alone.

    Backward is two forwards, `again` one more; a GPU's backward makes the head's logits anew.
    """
    products, attention = 24 * c.n_embd, 4 * T  # for each of a layer's C columns
    layers = tokens * c.n_layer * c.n_embd * (products + attention)
    if last:
        layers -= (tokens - tokens // T) * 16 * c.n_embd**2
    logits = 2 * read * c.vocab_size * c.n_embd
    if not train:
        return layers + logits
    return layers * (3 + again) + logits * (4 + again)


def rate(k):
    """FLOPs a second that a GPU reaches."""
    h100 = 990 if width(k) == 2 else 67
    return (k.tflops or h100) * 1e12 * k.mfu


def work(stage, c, k):
    """FLOPs of a step on a GPU, decoding left out."""
    rows, T, again = split(stage, k).rows, row_length(k), split(stage, k).again
    answers = rows * k.response_length
    read = {"sft": rows * T, "rm": 0}.get(stage, answers)
    trained = flops(c, T, rows * T, read, True, again, last=stage == "rm")
    if stage != "ppo":
        return trained
    language = flops(c, T, rows * T, read)  # log-probs, by policy and reference
    scored = flops(c, T, rows * T, last=True)
    valued = flops(c, T, rows * T)
    Q = k.prompt_length
    prompts = flops(c, Q, rows * Q)
    critic = flops(c, T, rows * T, 0, True)
    scoring = 2 * language + scored + valued + prompts
    return scoring + EPOCHS * (trained + critic)


def decoding(c, k):
    """Seconds of sampling: a token reads the weights and half a response's cache, or computes."""
    rows, T = split("ppo", k).rows, row_length(k)
    slots = k.prompt_length + k.response_length / 2
    cache = 2 * c.n_layer * rows * slots * c.n_embd
    moved = width(k) * (parameters(c).all + cache)
    moving = moved / (k.bandwidth * (DECODING * 1e12))
    computing = flops(c, T, rows, rows) / rate(k)
    return k.response_length * max(moving, computing)


def sent(stage, c, k):
    """Bytes that a GPU sends a step: a weight or gradient of each parameter, so many times."""
    how, (trained, _) = split(stage, k), MODELS[stage]
    steps = EPOCHS * MINIBATCHES if stage == "ppo" else 1
    if k.shard:  # weights forward, weights and gradients backward
        times = trained * steps * how.passes * (3 + how.again)
        times += 5 if stage == "ppo" else 0  # scoring by four models, and sampling
    else:
        times = trained * steps * 2  # a ring sends all gradients twice
    return times * 4 * parameters(c).all * (k.gpus - 1) / k.gpus


def seconds(stage, c, k):
    """Of a step: matrix products, decoding and communication, one after the other."""
    computing = work(stage, c, k) / rate(k)
    sampling = decoding(c, k) if stage == "ppo" else 0
    h100 = 450 if k.gpus <= 8 else 50
    sending = sent(stage, c, k) / (k.interconnect or h100) / 1e9
    return computing + sampling + sending
