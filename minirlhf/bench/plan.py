"""Will it fit, and how long is a step? Estimates by formula, not measurements.   python -m minirlhf.runtime --plan gpt2-xl --gpus 8

Bytes a GPU, of P parameters: width C, L layers, H heads, rows of T tokens. bfloat16 is autocast: what is stored is fp32.
    trained model   16 P: weight, gradient, two moments (Rajbhandari et al. 2020); a frozen one 4 P
    several GPUs    DDP: all of it on each, and 4 P of buckets. --shard (FSDP2): divided, but a block and the embedding at a time whole,
                    with gradients, and the whole policy while it samples; autocast's copies are not divided
    activations     a token and layer 8 C + 14 C s, s = 2 in bf16, else 4: residual stream, inputs of products, GELU's, q k v (Korthikanti
                    et al. 2022, less their masks); dropout 2 masks of C; attention written out (CPU, T <= 256) H T s, dropped out 3 H T s.
                    rm and dpo keep one --micro-batch at a time and make it again; logits exist in parts (kernels.py). Autocast: 2 bytes
                    for each weight of a layer while a graph holds it, and while PPO scores for all four models
    rollout         cache 2 L B T C s; on a GPU it and the decoder's copy of the policy stay for the whole run
Seconds: 2 P FLOPs a token forward, 6 P trained (Kaplan et al. 2020), 4 or 12 L T C of attention; a decoded token reads weights and cache;
all-reduce 2 x 4 P a step, sharded 3 x 4 P a pass; no overlap. Rows are full; PPO's other knobs are its defaults. Measured, GPT-2 124M on
one H100: the sft step as here within 10 %, in bytes and seconds; rm, dpo and ppo took twice the seconds or more.
Launchers: torchrun; torchrun on several nodes with --rdzv-backend c10d --rdzv-endpoint HOST:PORT; sbatch with `srun torchrun`; Ray Train,
TorchTrainer(lambda: train_ppo.main(train_ppo.Knobs(...)), scaling_config=...), which sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, _PORT.
"""

from dataclasses import dataclass, replace

from minirlhf import kernels
from minirlhf.engine import cli
from minirlhf.engine.cli import UserError, knob
from minirlhf.gpt import GPTConfig

SIZES = {name: GPTConfig(50257, *sizes) for name, *sizes in (  # context, layers, heads, width
    ("gpt2", 1024, 12, 12, 768), ("gpt2-medium", 1024, 24, 16, 1024), ("gpt2-large", 1024, 36, 20, 1280),
    ("gpt2-xl", 1024, 48, 25, 1600), ("3b", 2048, 36, 32, 2560), ("7b", 2048, 32, 32, 4096))}  # fmt: skip


MODELS = {"sft": (1, 0), "rm": (1, 1), "ppo": (2, 2), "dpo": (1, 1)}  # trained and frozen: ppo trains policy and critic


EPOCHS, MINIBATCHES, DROPOUT, GIB = 2, 2, 0.2, 2**30  # defaults of ppo, ppo and rm


@dataclass
class Knobs(cli.Checked):
    plan: str = knob("gpt2", f"{', '.join(SIZES)}; vocabulary,context,layers,heads,width; or all: a table of all, on 1, 8, 64 GPUs")
    gpus: int = knob(1, "GPUs, in nodes of 8", least=1)
    shard: bool = knob(False, "divide weights, gradients and optimizer states among the GPUs")
    device: str = knob("cuda", "cuda or cpu, where attention and log-probs keep other things", ("cuda", "cpu"))
    dtype: str = knob("bfloat16", "float32, or bfloat16 autocast", ("float32", "bfloat16"))
    batch_size: int = knob(128, "rows a step, all GPUs together", least=1)
    micro_batch: int = knob(8, "rows in a GPU's memory at a time; 0: all")
    prompt_length: int = knob(256, "tokens of a prompt", least=1)
    response_length: int = knob(256, "tokens of a response", least=1)
    gpu_memory: float = knob(80, "GiB of a GPU", least=1)
    tflops: float = knob(0, "a GPU's dense peak; 0: an H100's, 990 in bf16 and 67 in fp32")
    mfu: float = knob(0.35, "share of that peak that is reached", least=0.01, most=1)
    bandwidth: float = knob(3.35, "of a GPU's memory, TB/s, of which decoding reaches 0.4: 0.23 to 0.45 measured", least=0.01)
    interconnect: float = knob(0, "GB/s of each GPU; 0: 450 on up to 8 GPUs, 50 between nodes")


def parameters(c):
    """Of a GPT (a reward model has n_embd more), and how many of them are in the linear layers of its blocks."""
    linear = c.n_layer * (12 * c.n_embd + 9) * c.n_embd
    return linear + (c.vocab_size + c.n_ctx + 4 * c.n_layer + 2) * c.n_embd, linear


def split(stage, k):
    """(rows on a GPU, of them in memory at a time, passes an optimizer step, whether each pass is made again in backward)."""
    rows = -(-k.batch_size // k.gpus)
    step = -(-rows // MINIBATCHES) if stage == "ppo" else rows
    micro = min(k.micro_batch or step, step)
    return rows, micro, -(-step // micro), stage in ("rm", "dpo") and micro < rows


def kept(c, k, T, dropout=0.0):
    """Bytes a token that the layers keep for backward, the final hidden state included."""
    C, s, cpu = c.n_embd, 2 if k.dtype == "bfloat16" else 4, k.device == "cpu"
    weights = c.n_head * T * s * (3 if dropout else 1) if cpu and T <= 256 else 4 * c.n_head  # or a log-sum-exp
    return c.n_layer * (8 * C + 14 * C * s + weights + 2 * C * (s if cpu else 1) * (dropout > 0) + 16) + 8 * C  # 16: LayerNorms' statistics


def head(c, k, n):
    """Bytes that the log-probs of n tokens keep for backward, and those that backward adds for a while (kernels.py)."""
    V, C, s = c.vocab_size, c.n_embd, 2 if (k.dtype, k.device) == ("bfloat16", "cuda") else 4
    chunk = n * V * s / (parts := max(1, -(-n * V // kernels.CHUNK[k.device])))
    if k.device == "cpu":
        return min(parts, kernels.KEEP) * chunk, 4 * (V * C + 3 * n * C + V * C / parts) + chunk * min(2, max(0, parts - kernels.KEEP))
    return 0, (4 + s) * (V + n) * C + max(min(parts, 2) * chunk, chunk + 4 * V * C)  # the last chunk outlives the making of the next


def memory(stage, c, k):
    """Bytes on a GPU in the worst moment of a step: {trained, frozen, activations, cache, peak}."""
    (trained, frozen), (rows, micro, passes, again), C, (P, linear) = MODELS[stage], split(stage, k), c.n_embd, parameters(c)
    T, s, share, cpu = k.prompt_length + k.response_length, 2 if k.dtype == "bfloat16" else 4, k.gpus if k.shard else 1, k.device == "cpu"
    casts, embedding, gradient, ddp = 2 * linear * (s == 2), 4 * c.vocab_size * C, 4 * P / share, 4 * P * (k.gpus > share)
    whole = 8 * linear / c.n_layer + 2 * embedding if share > 1 else 0  # weights and gradients
    # Backward: one graph after the other is used up, while gradients come to be; at the end the embedding's two gradients meet
    parts = -(-rows * T // 1200) if stage in ("rm", "dpo") and cpu and not again else 1  # batches.Rows.by_parts
    tokens = micro * T / parts
    trunk, passed = tokens * kept(c, k, T, DROPOUT if stage == "rm" else 0), tokens * 24 * C  # the gradients that one block hands on
    logits, work = head(c, k, tokens if stage == "sft" else micro * k.response_length / parts)
    scored, language = (trunk, passed), (trunk + logits, max(work, embedding + passed - logits))
    graphs = [scored, language] if stage == "ppo" else [scored if stage == "rm" else language] * parts
    most, alive, gradients = 0, sum(graph for graph, _ in graphs), gradient * trained * (passes > 1)
    for graph, workspace in graphs:
        most = max(most, alive + workspace + gradients)
        alive, gradients = alive - graph, min(gradients + gradient, gradient * trained)
    most = whole + max(trained * casts + most, gradients + embedding * (stage != "rm" or parts * passes > 1))
    cache = 0
    if stage == "ppo":  # sampling, by weights of the decoder's own on a GPU; then all four models read the rows
        cache = 2 * c.n_layer * rows * (T if cpu else -(-T // 64) * 64) * C * s
        cache += 0 if cpu else embedding if s == 4 else 4 * P - 2 * linear + embedding / 2
        reading = 8 * C + max(9 * C * s, (2 * c.n_head * T + 6 * C) * s if cpu and T <= 256 else 0)  # a token
        sampling, stays = cache + casts + (4 * P if share > 1 else 0), 0 if cpu else cache
        most = max(sampling, stays + most, stays + min(k.micro_batch or rows, rows) * T * reading + 4 * casts + whole)
    weights, others, most = (16 * P / share + ddp) * trained, 4 * P * frozen / share, most - gradient * trained  # no gradient counts twice
    return {"trained": weights, "frozen": others, "activations": max(0, most - cache), "cache": cache, "peak": weights + others + most}


def flops(c, T, tokens, read=0, train=False, again=False):
    """Of `tokens` in rows of T through the layers, and `read` of them through the head, whose logits a GPU's backward makes anew."""
    layers, logits = tokens * c.n_layer * c.n_embd * (24 * c.n_embd + 4 * T), 2 * read * c.vocab_size * c.n_embd
    return layers * (3 + again) + logits * (4 + again) if train else layers + logits


def seconds(stage, c, k):
    """Of a step on each GPU: matrix products, decoding and communication, one after the other."""
    (trained, _), (rows, _, passes, again), (P, _) = MODELS[stage], split(stage, k), parameters(c)
    Q, R, T, s = k.prompt_length, k.response_length, k.prompt_length + k.response_length, 2 if k.dtype == "bfloat16" else 4
    rate = (k.tflops or (990 if s == 2 else 67)) * 1e12 * k.mfu
    read = {"sft": T, "rm": 0}.get(stage, R) * rows
    work, decoding, steps, gathers = flops(c, T, rows * T, read, True, again), 0, 1, 0
    if stage == "ppo":
        scoring = 2 * flops(c, T, rows * T, read) + 2 * flops(c, T, rows * T) + flops(c, Q, rows * Q)
        work, steps = scoring + EPOCHS * (work + flops(c, T, rows * T, 0, True)), EPOCHS * MINIBATCHES
        moved = s * (P + 2 * c.n_layer * rows * (Q + R / 2) * c.n_embd)  # weights and cache, for a token a row
        decoding, gathers = R * max(moved / (k.bandwidth * 0.4e12), flops(c, T, rows, rows) / rate), 5  # the policy twice
    sent = (trained * steps * passes * (3 + again) + gathers if k.shard else trained * steps * 2) * 4 * P * (k.gpus - 1) / k.gpus
    return work / rate + decoding + sent / (k.interconnect or (450 if k.gpus <= 8 else 50)) / 1e9


def command(stage, c, k):
    """What starts the stage in that setting."""
    rows, micro, *_ = split(stage, k)
    fresh = "".join(f"--{name.replace('_', '-')} {value} " for name, value in vars(c).items() if name != "dropout")
    flags = f"--init {k.plan} " if k.plan.startswith("gpt2") else fresh * (stage == "sft")
    flags += f"--batch-size {k.batch_size} --micro-batch {micro if micro < rows else 0} --dtype {k.dtype}"
    flags += f" --response-length {k.response_length}" * (stage != "sft") + " --shard" * k.shard
    nodes = f"--nnodes {-(-k.gpus // 8)} --rdzv-backend c10d --rdzv-endpoint $HOST:29500 " * (k.gpus > 8)
    start = f"torchrun {nodes}--nproc-per-node {min(k.gpus, 8)}" if k.gpus > 1 else "python"
    return f"{start} {'-m minirlhf.sft' if stage == 'sft' else f'train_{stage}.py'} {flags}"


def main(k):
    if k.plan == "all":
        return print_all(k)
    sizes, T = k.plan.split(","), k.prompt_length + k.response_length
    if k.plan not in SIZES and (len(sizes) != 5 or not all(x.isdigit() and int(x) for x in sizes)):
        raise UserError(f"--plan {k.plan}: expected all, {', '.join(SIZES)}, or five numbers: vocabulary,context,layers,heads,width")
    if (c := SIZES.get(k.plan) or GPTConfig(*map(int, sizes))).n_ctx < T:
        raise UserError(f"--prompt-length {k.prompt_length} and --response-length {k.response_length}: expected at most {c.n_ctx} together")
    print(f"{k.plan}: {parameters(c)[0]:,} parameters, {k.gpus} GPUs of {k.gpu_memory:g} GiB. Estimates (--help), not measurements.\n"
          "GiB      trained      frozen activations       cache        peak  s a step    tokens/s  fits")  # fmt: skip
    for stage in MODELS:
        figures, time = memory(stage, c, k), seconds(stage, c, k)
        fits = "yes" if figures["peak"] <= k.gpu_memory * GIB else "no: " + "--shard, " * (not k.shard) + "--micro-batch, --response-length"
        print(f"{stage:4}", *(f"{x / GIB:11.1f}" for x in figures.values()), f"{time:9.3g} {k.batch_size * T / time:11,.0f} ", fits)
    print(*("\n" + command(stage, c, k) for stage in MODELS))


def print_all(k):
    """The markdown table of all sizes, sharded where they must be."""
    rows = f"{k.batch_size} x ({k.prompt_length} + {k.response_length}) tokens a step"
    print(f"| estimates, {rows}, {k.dtype}: peak GiB a GPU, s a step | GPUs | {' | '.join(MODELS)} |\n|{'---|' * (2 + len(MODELS))}")
    for name, gpus in ((name, gpus) for name in SIZES for gpus in (1, 8, 64)):
        cells, tries = [], [replace(k, gpus=gpus, shard=shard) for shard in sorted({False, gpus > 1})]
        for stage in MODELS:
            peaks = [memory(stage, SIZES[name], t)["peak"] / GIB for t in tries]
            peak, tried = next((x for x in zip(peaks, tries, strict=True) if x[0] <= k.gpu_memory), (peaks[-1], tries[-1]))
            cells.append(f"{peak:.0f}, {seconds(stage, SIZES[name], tried):.2g}" + ", sharded" * tried.shard)
        print(f"| {name} | {gpus} | {' | '.join(cells)} |")
