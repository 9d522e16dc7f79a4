"""The planner's formulas against the models themselves.

Parameters, bytes counted by torch's allocator, FLOPs counted by torch. Memory is measured in a
fresh process as the running total of the CPU allocator's events, while a stage's own functions make
a step of a run whose optimizer has its moments.
"""

import gc
import json
import os
import runpy
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from minirlhf import ppo, reward, sft
from minirlhf.bench import duration, memory, plan
from minirlhf.engine import cli, machine, optim, parallel
from minirlhf.engine.rows import Rows, in_parts, mean_step
from minirlhf.feedback.kinds import Batch, Compared
from minirlhf.feedback.method import method_of
from minirlhf.gpt import GPT, GPTConfig, RewardModel
from minirlhf.kernels import logprobs

ROOT = Path(__file__).parent.parent
# Weights dominate; activations dominate; rows too long for attention written out; a vocabulary in
# parts.
WIDE = dict(vocab_size=6000, n_ctx=64, n_layer=3, n_head=4, n_embd=256)
DEEP = dict(vocab_size=200, n_ctx=128, n_layer=4, n_head=4, n_embd=64)
LONG = dict(vocab_size=200, n_ctx=320, n_layer=3, n_head=4, n_embd=64)
WORDS = dict(vocab_size=20_000, n_ctx=64, n_layer=1, n_head=4, n_embd=64)


def case(stage, sizes, batch_size, micro_batch, prompt_length, response_length, dtype="float32"):
    return stage, sizes, dict(
        batch_size=batch_size, micro_batch=micro_batch, prompt_length=prompt_length,
        response_length=response_length, dtype=dtype,
    )  # fmt: skip


CASES = []
for stage in plan.MODELS:
    CASES.append(case(stage, WIDE, 4, 0, 8, 8))
    CASES.append(case(stage, DEEP, 48 if stage == "ppo" else 16, 0, 80, 16))
    CASES.append(case(stage, DEEP, 16, 4, 88, 8))
CASES += [
    case("sft", LONG, 4, 0, 160, 160),
    case("dpo", WIDE, 32, 0, 8, 32),  # two parts, a graph each
    case("sft", WORDS, 32, 0, 32, 32),  # six parts, of which four are kept
    case("sft", DEEP, 8, 0, 48, 48, "bfloat16"),
    case("rm", DEEP, 8, 0, 48, 48, "bfloat16"),
]


def knobs(flags):
    return plan.Knobs(device="cpu", **flags)


def peak_of(f):
    """Most bytes that the CPU allocator had given out at once while f ran.

    What it found at the start is left out.
    """
    gc.collect()  # the case before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        f()
    events = profile.profiler.kineto_results.events()
    sizes = [event.nbytes() for event in events if event.name() == "[memory]"]
    return max(np.cumsum(sizes)).item()


def a_step(stage, sizes, flags):
    """An optimizer step (of PPO an iteration) by the stage's own functions, on rows that are full.

    The optimizer has its moments, as from the second step of a run on.
    """
    k, cpu = knobs(flags), torch.device("cpu")
    autocast = machine.precision(cpu, k.dtype)
    config = GPTConfig(**sizes)
    pad = config.vocab_size - 1
    shape = k.batch_size, k.prompt_length + k.response_length
    tokens = list(np.random.default_rng(0).integers(1, pad, shape))
    rows = Rows(tokens, np.full(len(tokens), k.prompt_length), pad, cpu)
    base = GPT(config)
    model = base
    if stage == "rm":
        model = RewardModel.from_base(base)
    elif stage != "sft":
        model = GPT(config)
    rm, critic = (RewardModel(config) if stage == "ppo" else None for _ in range(2))
    trained = parallel.Together(model, critic)
    optimizer = optim.make_optimizer(trained, 1e-4)
    for p in trained.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if stage == "ppo":
        return ppo_iteration(k, model, base, rm, critic, trained, optimizer, rows, autocast)
    if stage == "sft":
        loss = sft.add_gradient(trained, tokens, k.micro_batch, pad, autocast, cpu)
    else:
        with autocast:
            loss = (rm_loss if stage == "rm" else dpo_loss)(k, model, base, rows)
        trained.backward(loss)
    optim.optimizer_step(optimizer, 1.0, loss)


def rm_loss(k, model, base, rows):
    import train_rm

    scores = train_rm.forward(model, rows, k.micro_batch)
    return reward.bradley_terry_loss(scores[::2], scores[1::2])


def dpo_loss(k, model, base, rows):
    import train_dpo

    index = np.arange(len(rows.tokens))
    said = Compared(index, index.reshape(-1, 2), np.ones(len(index) // 2))
    batch = Batch(rows, torch.zeros(len(index)), said)
    own = train_dpo.Knobs(micro_batch=k.micro_batch, beta=0.1)
    loss, _ = train_dpo.batch_loss(model, base, batch, method_of(own), own)
    return loss


def ppo_iteration(k, policy, base, rm, critic, trained, optimizer, rows, autocast):
    import train_ppo

    R = k.response_length
    own = train_ppo.Knobs(
        batch_size=k.batch_size, micro_batch=k.micro_batch, response_length=R, stop_at_eos=False,
        ppo_epochs=1,
    )  # fmt: skip
    tokens = torch.tensor(np.array(rows.tokens)[:, : k.prompt_length])
    prompts = tokens, torch.full((len(tokens),), k.prompt_length)
    everywhere = torch.ones(len(tokens), R, dtype=torch.bool)

    def scorer(tokens, p, r):
        scores = in_parts(rm, k.micro_batch, tokens, p + r)
        return ppo.on_last_token(scores, everywhere), r == R

    tokenizer = SimpleNamespace(eos=0, pad=rows.pad)
    with torch.no_grad(), autocast:
        episodes, _ = train_ppo.rollout(policy, base, scorer, critic, prompts, tokenizer, own, 0.03)
    take_step = partial(mean_step, trained, optimizer, own, autocast, None)
    train_ppo.update(policy, critic, episodes, take_step, own, 0.03)


@pytest.fixture(scope="module")
def measured():
    """Peak bytes of all cases, in order, from a fresh process."""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, __file__], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def name_of(i):
    stage, _, flags = CASES[i]
    return "-".join([stage, *map(str, flags.values())])


@pytest.mark.parametrize("case", range(len(CASES)), ids=name_of)
def test_peak_is_what_the_allocator_counts(case, measured):
    stage, sizes, flags = CASES[case]
    figures = plan.memory(stage, GPTConfig(**sizes), knobs(flags))
    assert figures["peak"] == pytest.approx(measured[case], rel=0.04)


def test_cases_cover_both_regimes():
    """Weights are most of the peak in a stage's first case, the least of it in the second."""
    for stage in plan.MODELS:
        weights = []
        for _, sizes, flags in [case for case in CASES if case[0] == stage][:2]:
            figures = plan.memory(stage, GPTConfig(**sizes), knobs(flags))
            weights.append((figures["trained"] + figures["frozen"]) / figures["peak"])
        assert weights[0] > 0.7 and weights[1] < 0.3


def test_it_plans_for_the_defaults_of_the_scripts():
    import train_ppo

    own = train_ppo.Knobs()
    assert own.ppo_epochs == duration.EPOCHS and own.minibatches == memory.MINIBATCHES


def test_recorded_language_model_step():
    """bench/README.md: 32 x 1,024 tokens of GPT-2 in bf16 on an H100, 12,143 MiB and 0.082 s.

    The bytes are those beyond weights and moments.
    """
    k = plan.Knobs(batch_size=32, micro_batch=0, prompt_length=512, response_length=512)
    peak, held = plan.memory("sft", plan.SIZES["gpt2"], k)["peak"], 12 * 124_439_808
    assert (peak - held) / 2**20 == pytest.approx(12_143, rel=0.1)
    assert plan.seconds("sft", plan.SIZES["gpt2"], k) == pytest.approx(0.082, rel=0.15)


PUBLISHED = {
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
}


def test_parameters(monkeypatch):
    assert {name: plan.parameters(plan.SIZES[name]).all for name in PUBLISHED} == PUBLISHED
    monkeypatch.setattr(torch.nn.init, "normal_", lambda w, *_, **__: w)  # slow on "meta"
    for config in (*plan.SIZES.values(), GPTConfig(**DEEP)):
        with torch.device("meta"):
            model = GPT(config)
        linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
        sizes = [sum(p.numel() for p in m.parameters()) for m in linear]
        assert plan.parameters(config) == (sum(p.numel() for p in model.parameters()), sum(sizes))


@pytest.mark.parametrize("micro_batch", [0, 2])
def test_flops_of_the_layers(micro_batch):
    """Counted by torch; a micro-batch in the reward model is made again in backward."""
    import train_rm

    config, B, T = GPTConfig(**DEEP), 4, 48
    model = RewardModel(config)
    tokens = list(torch.ones(B, T, dtype=torch.int64).numpy())
    rows = Rows(tokens, np.full(B, 8), 0, torch.device("cpu"))
    with FlopCounterMode(display=False) as counter:
        train_rm.forward(model, rows, micro_batch).sum().backward()
    expected = duration.flops(config, T, B * T, 0, True, micro_batch > 0, last=True)
    assert expected == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_flops_of_the_head():
    """With the logits made anew, as on a GPU.

    The operators' own functions: torch does not look into an operator.
    """
    config, n = GPTConfig(**WIDE), 32
    hidden, weight = (torch.randn(m, config.n_embd) for m in (n, config.vocab_size))
    arguments = (hidden, weight, torch.arange(n), 1.0, torch.float32)
    machine.onednn_is_exact()  # tries a product, once in a process
    with FlopCounterMode(display=False) as counter:
        _, lse, *_ = logprobs.walk_vocabulary(*arguments, 0, False)
        assert counter.get_total_flops() == duration.flops(config, 8, 0, n)
        logprobs.walk_back(*arguments, torch.ones(n), lse, [])
    assert counter.get_total_flops() == duration.flops(config, 8, 0, n, True)


def test_seconds_by_hand():
    """GPT-2 where products cost nothing: communication, then the decoding of 256 x 128 tokens."""
    gpt2, gradients = plan.SIZES["gpt2"], 4 * 124_439_808
    ddp = plan.Knobs(gpus=8, tflops=1e15)
    sharded = plan.Knobs(gpus=64, shard=True, tflops=1e15)  # two gathers and a scatter
    expected = 2 * gradients * 7 / 8 / 450e9
    assert plan.seconds("sft", gpt2, ddp) == pytest.approx(expected)
    expected = 3 * gradients * 63 / 64 / 50e9
    assert plan.seconds("sft", gpt2, sharded) == pytest.approx(expected)
    cache = 2 * 12 * 768 * 128 * (256 + 128)  # numbers in the middle of the response
    expected = 256 * 2 * (124_439_808 + cache) / (0.4 * 3.35e12)
    alone = plan.Knobs(plan="gpt2", tflops=1e15)
    assert plan.seconds("ppo", gpt2, alone) == pytest.approx(expected, rel=1e-3)


def test_several_gpus_by_hand():
    """DDP adds 4 bytes a parameter; sharding divides; a rollout gathers the policy on each."""
    P, config = 1_557_611_200, plan.SIZES["gpt2-xl"]
    settings = [
        plan.Knobs(gpus=gpus, shard=shard) for gpus, shard in ((1, False), (8, False), (8, True))
    ]
    one, ddp, sharded = (plan.memory("ppo", config, k) for k in settings)
    assert (one["trained"], ddp["trained"], sharded["trained"]) == (32 * P, 40 * P, 4 * P)
    assert (one["frozen"], ddp["frozen"], sharded["frozen"]) == (8 * P, 8 * P, P)
    assert sharded["peak"] > sharded["trained"] - P + sharded["frozen"] + sharded["cache"] + 4 * P


@pytest.mark.parametrize("name", ["gpt2", "300,64,2,2,32"])
def test_commands_are_understood(name, capsys):
    import train_dpo
    import train_ppo
    import train_rm

    start = "torchrun --nnodes 8 --rdzv-backend c10d --rdzv-endpoint $HOST:29500 --nproc-per-node 8"
    plan.main(plan.Knobs(plan=name, gpus=64, shard=True, prompt_length=8, response_length=24))
    commands = capsys.readouterr().out.strip().splitlines()[-4:]
    for line, script in zip(commands, (sft, train_rm, train_ppo, train_dpo), strict=True):
        assert line.startswith(start + " ")
        fresh = "--vocab-size" if script is sft else "--batch-size"
        flags = line[line.index("--init" if name == "gpt2" else fresh) :].split()
        known = cli.parse(script.Knobs, "", [flag for flag in flags if flag != "--shard"])
        assert flags[-1] == "--shard" and known.batch_size == 128 and known.dtype == "bfloat16"
        if script is not sft:
            assert known.response_length == 24
        elif name != "gpt2":
            assert (known.n_layer, known.n_head, known.n_embd) == (2, 2, 32)


def test_what_fits_and_what_does_not(capsys):
    plan.main(plan.Knobs(plan="gpt2-xl", gpus=8))
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line}
    assert rows["sft"].endswith("yes")
    assert rows["ppo"].endswith("no: --shard, --micro-batch, --response-length")
    plan.main(plan.Knobs(plan="all"))
    lines = capsys.readouterr().out.splitlines()
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert len(table) == 20 and {len(row) for row in table} == {6} and "estimates" in table[0][0]
    sharded = {(row[0], row[1]) for row in table if "sharded" in row[4]}
    assert ("gpt2-xl", "8") in sharded and ("7b", "64") in sharded and ("gpt2", "64") not in sharded


def test_the_readme_has_the_table(capsys):
    """bench/README.md, to the digit."""
    plan.main(plan.Knobs(plan="all"))
    printed = capsys.readouterr().out.splitlines()[2:]
    readme = (ROOT / "minirlhf" / "bench" / "README.md").read_text().splitlines()
    assert len(printed) == 18 and not set(printed) - set(readme)


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--plan", "gpt5"], "expected all, gpt2"),
        (["--plan", "300,64,2,2"], "five numbers"),
        (["--prompt-length", "1000"], "at most 1024 together"),
        (["--gpu", "8"], "unrecognized"),
    ],
)
def test_mistakes_are_one_line(flags, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["runtime.py", *flags])
    with pytest.raises(SystemExit):
        cli.run_script(plan.main, plan.Knobs, plan.__doc__)
    message = capsys.readouterr().err.strip()
    assert said in message and "\n" not in message


@pytest.mark.parametrize("module", ["minirlhf.bench.plan", "minirlhf.runtime"])
@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_start(module, monkeypatch, capsys):
    """python -m, as the README says; the second is the old name."""
    monkeypatch.setattr(sys, "argv", ["python", "--plan", "gpt2-xl", "--gpus", "8"])
    runpy.run_module(module, run_name="__main__")
    said = capsys.readouterr().out
    assert "1,557,611,200 parameters, 8 GPUs" in said and "not measurements" in said


if __name__ == "__main__":
    torch.set_num_threads(1)
    gc.freeze()  # what the imports made need not be searched before each case
    print(json.dumps([peak_of(lambda case=case: a_step(*case)) for case in CASES]))
