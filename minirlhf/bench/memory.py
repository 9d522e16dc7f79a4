"""Bytes on a GPU in the worst moment of a step, by formula: what plan.py's --help says in words.

Letters as there: P parameters, C width, T tokens a row, s bytes of a number that autocast
computes with. What is stored is fp32, 4 bytes. `c` is a GPTConfig, `k` are the planner's knobs.
"""

from typing import NamedTuple

from minirlhf.kernels import CHUNK, KEEP

# Models of a stage, trained and frozen: ppo trains policy and critic.
MODELS = {"sft": (1, 0), "rm": (1, 1), "ppo": (2, 2), "dpo": (1, 1)}
MINIBATCHES = 4  # default of ppo


class Parameters(NamedTuple):
    all: int
    linear: int  # of them in the linear layers of the blocks


def parameters(c):
    """Of a GPT; a reward model has n_embd more."""
    C = c.n_embd
    in_block = 12 * C * C + 9 * C  # q k v, out, the two of the MLP, and their biases
    linear = c.n_layer * in_block
    embeddings = (c.vocab_size + c.n_ctx) * C
    norms = (2 * c.n_layer + 1) * 2 * C  # a weight and a bias each
    return Parameters(linear + embeddings + norms, linear)


class Division(NamedTuple):
    rows: int  # a GPU's share of the batch
    micro: int  # of them in memory at a time
    passes: int  # forward and backward, an optimizer step
    again: bool  # forward is made again in backward


def split(stage, k):
    """How a batch is divided among GPUs, optimizer steps and passes."""
    rows = ceil(k.batch_size, k.gpus)
    in_step = ceil(rows, MINIBATCHES) if stage == "ppo" else rows
    micro = min(k.micro_batch or in_step, in_step)
    passes = ceil(in_step, micro)
    again = stage in ("rm", "dpo") and micro < rows
    return Division(rows, micro, passes, again)


def ceil(total, size):
    return -(-total // size)


def width(k):
    """Bytes of a number that autocast computes with."""
    return 2 if k.dtype == "bfloat16" else 4


def shards(k):
    """Among how many GPUs weights, gradients and moments are divided."""
    return k.gpus if k.shard else 1


def row_length(k):
    return k.prompt_length + k.response_length


def written_out(k, T):
    """Whether attention weights exist: on a CPU, over short rows."""
    return k.device == "cpu" and T <= 256


def kept(c, k, T, last=False):
    """Bytes a token that the layers keep for backward, the final hidden state included; with `last`
    the last block's MLP sees the last token of each row alone."""
    C, s = c.n_embd, width(k)
    stream = 8 * C  # the residual stream, fp32, before each of the two branches
    products = 14 * C * s  # inputs of the products and of GELU; q, k and v
    attention = 4 * c.n_head  # a log-sum-exp
    if written_out(k, T):
        attention = c.n_head * T * s
    norms = 16  # statistics of two LayerNorms
    a_layer = stream + products + attention + norms
    end = 12 * C + 9 * C * s + norms / 2  # of the last MLP, and of the hidden state
    return c.n_layer * a_layer + 8 * C - last * end * (1 - 1 / T)


class Graph(NamedTuple):
    kept: float  # bytes from forward until backward has used them up
    work: float  # bytes that its backward adds for a while


def head(c, k, n):
    """The Graph of the log-probs of n tokens, whose logits exist in parts (kernels/)."""
    V, C = c.vocab_size, c.n_embd
    s = width(k) if k.device == "cuda" else 4
    parts = max(1, ceil(n * V, CHUNK[k.device]))
    chunk = n * V * s / parts  # the logits of a part
    if k.device == "cpu":
        anew = max(0, parts - KEEP)  # parts that backward makes again
        gradients = 4 * V * C + 12 * n * C + 4 * V * C / parts
        return Graph(min(parts, KEEP) * chunk, gradients + chunk * min(2, anew))
    gradients = (4 + s) * (V + n) * C
    making = min(parts, 2) * chunk  # the last chunk outlives the making of the next
    adding = chunk + 4 * V * C
    return Graph(0, gradients + max(making, adding))


def graphs(stage, c, k):
    """What forward leaves for backward: a Graph a part; in ppo the critic's, then the policy's."""
    T, how = row_length(k), split(stage, k)
    parts = 1
    if k.device == "cpu" and stage in ("rm", "dpo") and not how.again:
        parts = ceil(how.rows * T, 1200)  # Rows.by_parts
    tokens = how.micro * T / parts
    scores = stage == "rm"
    trunk = tokens * kept(c, k, T, last=scores)
    passed = tokens * 24 * c.n_embd  # the gradients that one block hands on
    read = tokens if stage == "sft" else how.micro * k.response_length / parts
    logits = head(c, k, read)
    meeting = embedding(c) + passed - logits.kept  # in the end, the embedding's two gradients
    scored = Graph(trunk, passed)
    if scores and written_out(k, T):  # backward begins at attention: its softmax's two gradients
        scored = Graph(trunk, max(passed, tokens * 2 * c.n_head * T * width(k)))
    language = Graph(trunk + logits.kept, max(logits.work, meeting))
    if stage == "ppo":
        return [scored, language]
    return [scored if scores else language] * parts


def embedding(c):
    return 4 * c.vocab_size * c.n_embd


def casts(c, k):
    """Bytes of autocast's copies of a model's linear weights, while a graph holds them."""
    return 2 * parameters(c).linear if width(k) == 2 else 0


def gathered(c, k):
    """Bytes of what FSDP2 has whole at a time: weights and gradients, a block and the embedding."""
    if shards(k) == 1:
        return 0
    block = 8 * parameters(c).linear / c.n_layer
    return block + 2 * embedding(c)


def gradient(c, k):
    return 4 * parameters(c).all / shards(k)


def training(stage, c, k):
    """Bytes beyond weights and moments in the worst moment of backward, gradients included."""
    left, passes = graphs(stage, c, k), split(stage, k).passes
    trained, _ = MODELS[stage]
    all_gradients = gradient(c, k) * trained
    gradients = all_gradients if passes > 1 else 0
    second = embedding(c) if stage != "rm" or len(left) * passes > 1 else 0
    alive = sum(graph.kept for graph in left)
    most = 0
    for graph in left:  # one after the other is used up, while gradients come to be
        most = max(most, alive + graph.work + gradients)
        alive = alive - graph.kept
        gradients = min(gradients + gradient(c, k), all_gradients)
    most = max(trained * casts(c, k) + most, gradients + second)
    return gathered(c, k) + most


def rollout_cache(c, k):
    """Bytes of keys and values, and on a GPU of the decoder's own copy of the weights."""
    P, linear = parameters(c)
    rows, T = split("ppo", k).rows, row_length(k)
    slots = T if k.device == "cpu" else ceil(T, 64) * 64
    cache = 2 * c.n_layer * rows * slots * c.n_embd * width(k)
    if k.device == "cpu":
        return cache
    if width(k) == 4:
        return cache + embedding(c)  # of the head alone, a multiple of 64 rows
    weights = 4 * P - 2 * linear  # two bytes in linear layers
    return cache + (weights + embedding(c) / 2)


def reading(c, k):
    """Bytes while all four models of ppo read the rows, without graphs."""
    C, s, T = c.n_embd, width(k), row_length(k)
    rows = split("ppo", k).rows
    mlp = 9 * C * s
    attention = (2 * c.n_head * T + 6 * C) * s if written_out(k, T) else 0
    a_token = 8 * C + max(mlp, attention)
    at_a_time = min(k.micro_batch or rows, rows) * T
    return at_a_time * a_token + 4 * casts(c, k) + gathered(c, k)


def memory(stage, c, k):
    """Bytes on a GPU in a step's worst moment: {trained, frozen, activations, cache, peak}."""
    P, share = parameters(c).all, shards(k)
    trained, frozen = MODELS[stage]
    most, cache = training(stage, c, k), 0
    if stage == "ppo":  # samples, reads the samples, trains
        cache = rollout_cache(c, k)
        stays = 0 if k.device == "cpu" else cache
        whole_policy = 4 * P if share > 1 else 0
        sampling = cache + casts(c, k) + whole_policy
        most = max(sampling, stays + most, stays + reading(c, k))
    buckets = 4 * P if k.gpus > share else 0  # DDP's
    weights = (16 * P / share + buckets) * trained
    others = 4 * P * frozen / share
    most = most - gradient(c, k) * trained  # they are among the weights: 16 P counts them
    return {
        "trained": weights,
        "frozen": others,
        "activations": max(0, most - cache),
        "cache": cache,
        "peak": weights + others + most,
    }
