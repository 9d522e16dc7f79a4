"""Will it fit, and how long is a step? Estimates by formula, not measurements.

    python -m minirlhf.bench.plan --plan gpt2-xl --gpus 8

Bytes a GPU, of P parameters: width C, L layers, H heads, rows of T tokens. bfloat16 is autocast:
what is stored is fp32.
    trained model   16 P: weight, gradient, two moments (Rajbhandari et al. 2020); a frozen one 4 P
    several GPUs    DDP: all of it on each, and 4 P of buckets. --shard (FSDP2): divided, but a
                    block and the embedding at a time whole, with gradients, and the whole policy
                    while it samples; autocast's copies are not divided
    activations     a token and layer 8 C + 14 C s, s = 2 in bf16, else 4: residual stream, inputs
                    of products, GELU's, q k v (Korthikanti et al. 2022, without their masks);
                    attention written out (CPU, T <= 256) H T s. rm and dpo keep one --micro-batch
                    at a time and make it again; logits exist in parts (kernels/). Autocast: 2 bytes
                    for each weight of a layer while a graph holds it, and while PPO scores for all
                    four models
    rollout         cache 2 L B T C s; on a GPU it and the decoder's copy of the policy stay for
                    the whole run
Seconds: 2 P FLOPs a token forward, 6 P trained (Kaplan et al. 2020), 4 or 12 L T C of attention;
a decoded token reads weights and cache; all-reduce 2 x 4 P a step, sharded 3 x 4 P a pass; no
overlap. Rows are full; PPO's other knobs are its defaults. Measured, GPT-2 124M on one H100: the
sft step as here within 10 %, in bytes and seconds; rm, dpo and ppo took twice the seconds or more.
Launchers: torchrun; torchrun on several nodes with --rdzv-backend c10d --rdzv-endpoint HOST:PORT;
sbatch with `srun torchrun`; Ray Train, TorchTrainer(lambda: train_ppo.main(train_ppo.Knobs(...)),
scaling_config=...), which sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT.

Left out: other cards' defaults, overlap of computing and sending, tensor and pipeline parallelism.
"""

from dataclasses import dataclass, replace

from minirlhf.bench.duration import seconds
from minirlhf.bench.memory import MODELS, ceil, memory, parameters, row_length, split
from minirlhf.engine import cli
from minirlhf.engine.cli import UserError, knob
from minirlhf.gpt import GPTConfig

GIB = 2**30
SIZES = {  # vocabulary, context, layers, heads, width
    "gpt2": GPTConfig(50257, 1024, 12, 12, 768),
    "gpt2-medium": GPTConfig(50257, 1024, 24, 16, 1024),
    "gpt2-large": GPTConfig(50257, 1024, 36, 20, 1280),
    "gpt2-xl": GPTConfig(50257, 1024, 48, 25, 1600),
    "3b": GPTConfig(50257, 2048, 36, 32, 2560),
    "7b": GPTConfig(50257, 2048, 32, 32, 4096),
}


@dataclass
class Knobs(cli.Checked):
    plan: str = knob(
        "gpt2",
        f"{', '.join(SIZES)}; vocabulary,context,layers,heads,width; "
        "or all: a table of all, on 1, 8, 64 GPUs",
    )
    gpus: int = knob(1, "GPUs, in nodes of 8", least=1)
    shard: bool = knob(False, "divide weights, gradients and optimizer states among the GPUs")
    device: str = knob(
        "cuda", "cuda or cpu, where attention and log-probs keep other things", ("cuda", "cpu")
    )
    dtype: str = knob("bfloat16", "float32, or bfloat16 autocast", ("float32", "bfloat16"))
    batch_size: int = knob(128, "rows a step, all GPUs together", least=1)
    micro_batch: int = knob(8, "rows in a GPU's memory at a time; 0: all")
    prompt_length: int = knob(256, "tokens of a prompt", least=1)
    response_length: int = knob(256, "tokens of a response", least=1)
    gpu_memory: float = knob(80, "GiB of a GPU", least=1)
    tflops: float = knob(0, "a GPU's dense peak; 0: an H100's, 990 in bf16 and 67 in fp32")
    mfu: float = knob(0.35, "share of that peak that is reached", least=0.01, most=1)
    bandwidth: float = knob(
        3.35,
        "of a GPU's memory, TB/s, of which decoding reaches 0.4: 0.23 to 0.45 measured",
        least=0.01,
    )
    interconnect: float = knob(0, "GB/s of each GPU; 0: 450 on up to 8 GPUs, 50 between nodes")


def config_of(plan):
    """The GPTConfig that --plan names."""
    sizes = plan.split(",")
    if plan in SIZES:
        return SIZES[plan]
    if len(sizes) != 5 or not all(x.isdigit() and int(x) for x in sizes):
        raise UserError(
            f"--plan {plan}: expected all, {', '.join(SIZES)}, "
            "or five numbers: vocabulary,context,layers,heads,width"
        )
    return GPTConfig(*map(int, sizes))


def command(stage, c, k):
    """What starts the stage in that setting."""
    how = split(stage, k)
    start = "python"
    if k.gpus > 1:
        nodes = f"--nnodes {ceil(k.gpus, 8)} --rdzv-backend c10d --rdzv-endpoint $HOST:29500 "
        start = f"torchrun {nodes if k.gpus > 8 else ''}--nproc-per-node {min(k.gpus, 8)}"
    script = "-m minirlhf.sft" if stage == "sft" else f"train_{stage}.py"
    flags = []
    if k.plan.startswith("gpt2"):
        flags += [f"--init {k.plan}"]
    elif stage == "sft":  # the shape of a fresh model
        shape = {name: value for name, value in vars(c).items() if name != "dropout"}
        flags += [f"--{name.replace('_', '-')} {value}" for name, value in shape.items()]
    micro_batch = how.micro if how.micro < how.rows else 0
    flags += [f"--batch-size {k.batch_size} --micro-batch {micro_batch} --dtype {k.dtype}"]
    if stage != "sft":
        flags += [f"--response-length {k.response_length}"]
    if k.shard:
        flags += ["--shard"]
    return " ".join([start, script, *flags])


def main(k):
    if k.plan == "all":
        return print_all(k)
    c, T = config_of(k.plan), row_length(k)
    if c.n_ctx < T:
        raise UserError(
            f"--prompt-length {k.prompt_length} and --response-length {k.response_length}: "
            f"expected at most {c.n_ctx} together"
        )
    print(
        f"{k.plan}: {parameters(c).all:,} parameters, {k.gpus} GPUs of {k.gpu_memory:g} GiB. "
        "Estimates (--help), not measurements."
    )
    print("GiB      trained      frozen activations       cache        peak  ", end="")
    print("s a step    tokens/s  fits")
    for stage in MODELS:
        figures, time = memory(stage, c, k), seconds(stage, c, k)
        gib = " ".join(f"{x / GIB:11.1f}" for x in figures.values())
        fits = "yes"
        if figures["peak"] > k.gpu_memory * GIB:
            shard = "" if k.shard else "--shard, "
            fits = f"no: {shard}--micro-batch, --response-length"
        print(f"{stage:4} {gib} {time:9.3g} {k.batch_size * T / time:11,.0f}  {fits}")
    commands = [f"\n{command(stage, c, k)}" for stage in MODELS]
    print(" ".join(commands))


def print_all(k):
    """The markdown table of all sizes, sharded where they must be."""
    rows = f"{k.batch_size} x ({k.prompt_length} + {k.response_length}) tokens a step"
    title = f"estimates, {rows}, {k.dtype}: peak GiB a GPU, s a step"
    print(f"| {title} | GPUs | {' | '.join(MODELS)} |")
    print(f"|{'---|' * (2 + len(MODELS))}")
    for name, config in SIZES.items():
        for gpus in (1, 8, 64):
            cells = [cell(stage, config, replace(k, gpus=gpus)) for stage in MODELS]
            print(f"| {name} | {gpus} | {' | '.join(cells)} |")


def cell(stage, c, k):
    """Peak GiB and seconds: the whole model on each GPU where that fits, else sharded."""
    k = replace(k, shard=False)
    peak = memory(stage, c, k)["peak"] / GIB
    if peak > k.gpu_memory and k.gpus > 1:
        k = replace(k, shard=True)
        peak = memory(stage, c, k)["peak"] / GIB
    sharded = ", sharded" if k.shard else ""
    return f"{peak:.0f}, {seconds(stage, c, k):.2g}{sharded}"


if __name__ == "__main__":
    cli.run_script(main, Knobs, __doc__)
