"""The planner's formulas against the models themselves: parameters, bytes counted by torch's allocator, FLOPs counted by torch.

Memory is measured in a fresh process as the running total of the CPU allocator's events while a stage's own functions make two steps.
"""

import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from minirlhf import kernels, ppo, reward, sft
from minirlhf.bench import plan
from minirlhf.engine import cli, machine, optim, parallel
from minirlhf.engine.rows import Rows
from minirlhf.gpt import GPT, GPTConfig, RewardModel

ROOT = Path(__file__).parent.parent
WIDE = dict(vocab_size=6000, n_ctx=64, n_layer=3, n_head=4, n_embd=256)  # weights dominate
DEEP = dict(vocab_size=200, n_ctx=128, n_layer=6, n_head=4, n_embd=64)  # activations dominate
LONG = dict(
    vocab_size=200, n_ctx=320, n_layer=3, n_head=4, n_embd=64
)  # rows too long for attention written out
WORDS = dict(vocab_size=20_000, n_ctx=64, n_layer=1, n_head=4, n_embd=128)  # a vocabulary in parts
CASES = [(stage, sizes, flags) for stage in plan.MODELS for sizes, flags in (
    (WIDE, dict(batch_size=4, micro_batch=0, prompt_length=8, response_length=8)),
    (DEEP, dict(batch_size=16, micro_batch=0, prompt_length=72, response_length=24)),
    (DEEP, dict(batch_size=16, micro_batch=4, prompt_length=80, response_length=16)),
)]  # fmt: skip
CASES += [("sft", LONG, dict(batch_size=4, micro_batch=0, prompt_length=160, response_length=160)),
          ("dpo", WIDE, dict(batch_size=64, micro_batch=0, prompt_length=8, response_length=32)),  # a graph a part
          ("sft", WORDS, dict(batch_size=32, micro_batch=0, prompt_length=32, response_length=32)),  # six parts, of which four are kept
          ("sft", DEEP, dict(batch_size=16, micro_batch=0, prompt_length=48, response_length=48, dtype="bfloat16")),
          ("rm", DEEP, dict(batch_size=16, micro_batch=0, prompt_length=48, response_length=48, dtype="bfloat16"))]  # fmt: skip


def knobs(flags):
    return plan.Knobs(device="cpu", **{"dtype": "float32"} | flags)


def peak_of(f):
    """Most bytes that the CPU allocator had given out at once while f ran, what it found at the start left out."""
    gc.collect()  # the case before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        f()
    sizes = [
        event.nbytes()
        for event in profile.profiler.kineto_results.events()
        if event.name() == "[memory]"
    ]
    return max(np.cumsum(sizes)).item()


def two_steps(stage, sizes, flags):
    """Two optimizer steps by the stage's own functions, on rows that are full."""
    import train_dpo
    import train_ppo
    import train_rm

    k, cpu = knobs(flags), torch.device("cpu")
    autocast = machine.precision(cpu, k.dtype)
    config = GPTConfig(**sizes)
    Q, R, pad = k.prompt_length, k.response_length, config.vocab_size - 1
    tokens = list(np.random.default_rng(0).integers(1, pad, (k.batch_size, Q + R)))
    rows, pairs = (
        Rows(tokens, np.full(len(tokens), Q), pad, cpu),
        np.arange(len(tokens)).reshape(-1, 2),
    )
    base = GPT(config)
    model = (
        base
        if stage == "sft"
        else RewardModel.from_base(base, dropout=plan.DROPOUT)
        if stage == "rm"
        else GPT(config)
    )
    rm, critic = (RewardModel(config), RewardModel(config)) if stage == "ppo" else (None, None)
    trained = parallel.Together(model, critic)
    optimizer = optim.make_optimizer(trained, 1e-4)
    ref_logps = torch.zeros(len(tokens))
    for _ in range(2):
        if stage == "sft":
            loss = sft.add_gradient(trained, tokens, k.micro_batch, pad, autocast, cpu)
        elif stage == "rm":
            with autocast:
                scores = train_rm.forward(
                    model, tokens, rows.prompt_lengths, pad, cpu, k.micro_batch
                )
            loss = reward.bradley_terry_loss(*scores[pairs].unbind(1))
            trained.backward(loss)
        elif stage == "dpo":
            with autocast:
                loss, _ = train_dpo.batch_loss(model, base, "sigmoid", {}, train_dpo.Knobs(micro_batch=k.micro_batch), rows, ref_logps,
                                               pairs, np.ones(len(pairs)))  # fmt: skip
            trained.backward(loss)
        else:
            own = train_ppo.Knobs(
                batch_size=k.batch_size,
                micro_batch=k.micro_batch,
                response_length=R,
                stop_at_eos=False,
            )
            prompts = torch.tensor(np.array(tokens)[:, :Q]), torch.full((len(tokens),), Q)

            def scorer(tokens, p, r):
                scores = train_ppo.in_parts(rm, k.micro_batch, tokens, p + r)
                return ppo.on_last_token(
                    scores, torch.ones(len(tokens), R, dtype=torch.bool)
                ), r == R

            with torch.no_grad(), autocast:
                episodes, _ = train_ppo.rollout(
                    model, base, scorer, critic, prompts, SimpleNamespace(eos=0, pad=pad), own, 0.03
                )
            train_ppo.update(trained, optimizer, episodes, own, 0.03, autocast)
        if stage != "ppo":
            optim.optimizer_step(optimizer, 1.0, loss)


@pytest.fixture(scope="module")
def measured():
    """Peak bytes of all cases, in order, from a fresh process."""
    done = subprocess.run(
        [sys.executable, __file__],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "case",
    range(len(CASES)),
    ids=lambda i: "-".join([CASES[i][0], *map(str, CASES[i][2].values())]),
)
def test_peak_is_what_the_allocator_counts(case, measured):
    stage, sizes, flags = CASES[case]
    assert plan.memory(stage, GPTConfig(**sizes), knobs(flags))["peak"] == pytest.approx(
        measured[case], rel=0.04
    )


def test_cases_cover_both_regimes():
    """In the first case of a stage weights are most of the peak, in the second they are the least of it."""
    for stage in plan.MODELS:
        weights = []
        for _, sizes, flags in [case for case in CASES if case[0] == stage][:2]:
            figures = plan.memory(stage, GPTConfig(**sizes), knobs(flags))
            weights.append((figures["trained"] + figures["frozen"]) / figures["peak"])
        assert weights[0] > 0.7 and weights[1] < 0.3


def test_recorded_language_model_step():
    """README, Speed: 32 x 1,024 tokens of GPT-2 in bf16 on an H100: 12,143 MiB beyond weights and moments, 0.082 s."""
    k = plan.Knobs(batch_size=32, micro_batch=0, prompt_length=512, response_length=512)
    held = 12 * 124_439_808
    assert (plan.memory("sft", plan.SIZES["gpt2"], k)["peak"] - held) / 2**20 == pytest.approx(
        12_143, rel=0.1
    )
    assert plan.seconds("sft", plan.SIZES["gpt2"], k) == pytest.approx(0.082, rel=0.15)


def test_parameters():
    published = {
        "gpt2": 124_439_808,
        "gpt2-medium": 354_823_168,
        "gpt2-large": 774_030_080,
        "gpt2-xl": 1_557_611_200,
    }
    assert {name: plan.parameters(plan.SIZES[name])[0] for name in published} == published
    for config in (*plan.SIZES.values(), GPTConfig(**DEEP)):
        with torch.device("meta"):
            model = GPT(config)
        linear = sum(
            p.numel()
            for m in model.modules()
            if isinstance(m, torch.nn.Linear)
            for p in m.parameters()
        )
        assert plan.parameters(config) == (sum(p.numel() for p in model.parameters()), linear)


@pytest.mark.parametrize("micro_batch", [0, 2])
def test_flops_of_the_layers(micro_batch):
    """Counted by torch; a micro-batch in the reward model is made again in backward."""
    import train_rm

    config, B, T = GPTConfig(**DEEP), 4, 48
    model = RewardModel(config)
    with FlopCounterMode(display=False) as counter:
        rows = list(torch.ones(B, T, dtype=torch.int64).numpy())
        train_rm.forward(model, rows, [8] * B, 0, torch.device("cpu"), micro_batch).sum().backward()
    assert plan.flops(config, T, B * T, 0, True, micro_batch > 0) == pytest.approx(
        counter.get_total_flops(), rel=0.01
    )


def test_flops_of_the_head():
    """With the logits made anew, as on a GPU. The operators' own functions: torch does not look into an operator."""
    config, n = GPTConfig(**WIDE), 32
    hidden, weight, targets = (
        torch.randn(n, config.n_embd),
        torch.randn(config.vocab_size, config.n_embd),
        torch.arange(n),
    )
    arguments = (hidden, weight, targets, 1.0, torch.float32)
    machine.onednn_is_exact()  # tries a product, once in a process
    with FlopCounterMode(display=False) as counter:
        _, lse, *_ = kernels.token_logprobs_op._init_fn(*arguments, 0, False)
        assert counter.get_total_flops() == plan.flops(config, 8, 0, n)
        kernels.token_logprobs_backward_op._init_fn(*arguments, torch.ones(n), lse, [])
    assert counter.get_total_flops() == plan.flops(config, 8, 0, n, True)


def test_seconds_by_hand():
    """GPT-2 where products cost nothing: communication of a step, then the decoding of 256 tokens for 128 rows."""
    k, gradients = plan.Knobs(plan="gpt2", tflops=1e15), 4 * 124_439_808
    assert plan.seconds(
        "sft", plan.SIZES["gpt2"], plan.Knobs(gpus=8, tflops=1e15)
    ) == pytest.approx(2 * gradients * 7 / 8 / 450e9)
    sharded = plan.Knobs(gpus=64, shard=True, tflops=1e15)  # two gathers and a scatter
    assert plan.seconds("sft", plan.SIZES["gpt2"], sharded) == pytest.approx(
        3 * gradients * 63 / 64 / 50e9
    )
    cache = 2 * 12 * 768 * 128 * (256 + 128)  # numbers in the middle of the response
    assert plan.seconds("ppo", plan.SIZES["gpt2"], k) == pytest.approx(
        256 * 2 * (124_439_808 + cache) / (0.4 * 3.35e12), rel=1e-3
    )


def test_several_gpus_by_hand():
    """DDP adds 4 bytes a parameter; sharding divides; a rollout gathers the policy on each."""
    P, config = 1_557_611_200, plan.SIZES["gpt2-xl"]
    one, ddp, sharded = (
        plan.memory("ppo", config, plan.Knobs(gpus=gpus, shard=shard))
        for gpus, shard in ((1, 0), (8, 0), (8, 1))
    )
    assert (one["trained"], ddp["trained"], sharded["trained"]) == (32 * P, 40 * P, 4 * P)
    assert (one["frozen"], ddp["frozen"], sharded["frozen"]) == (8 * P, 8 * P, P)
    assert sharded["peak"] > sharded["trained"] - P + sharded["frozen"] + sharded["cache"] + 4 * P


@pytest.mark.parametrize("name", ["gpt2", "300,64,2,2,32"])
def test_commands_are_understood(name, capsys):
    import train_dpo
    import train_ppo
    import train_rm

    plan.main(plan.Knobs(plan=name, gpus=64, shard=True, prompt_length=8, response_length=24))
    commands = capsys.readouterr().out.strip().splitlines()[-4:]
    for line, script in zip(commands, (sft, train_rm, train_ppo, train_dpo), strict=True):
        assert line.startswith(
            "torchrun --nnodes 8 --rdzv-backend c10d --rdzv-endpoint $HOST:29500 --nproc-per-node 8 "
        )
        flags = line[
            line.index(
                "--init" if name == "gpt2" else "--vocab-size" if script is sft else "--batch-size"
            ) :
        ].split()
        known = cli.parse(script.Knobs, "", [flag for flag in flags if flag != "--shard"])
        assert flags[-1] == "--shard" and known.batch_size == 128 and known.dtype == "bfloat16"
        assert script is sft or known.response_length == 24
        assert (
            script is not sft
            or name == "gpt2"
            or (known.n_layer, known.n_head, known.n_embd) == (2, 2, 32)
        )


def test_what_fits_and_what_does_not(capsys):
    plan.main(plan.Knobs(plan="gpt2-xl", gpus=8))
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line}
    assert rows["sft"].endswith("yes") and rows["ppo"].endswith(
        "no: --shard, --micro-batch, --response-length"
    )
    plan.main(plan.Knobs(plan="all"))
    table = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in capsys.readouterr().out.splitlines()
    ]
    assert len(table) == 20 and {len(row) for row in table} == {6} and "estimates" in table[0][0]
    sharded = {(row[0], row[1]) for row in table if "sharded" in row[4]}
    assert ("gpt2-xl", "8") in sharded and ("7b", "64") in sharded and ("gpt2", "64") not in sharded


@pytest.mark.parametrize("flags, said", [
    (["--plan", "gpt5"], "expected all, gpt2"), (["--plan", "300,64,2,2"], "five numbers"),
    (["--prompt-length", "1000"], "at most 1024 together"), (["--gpu", "8"], "unrecognized")])  # fmt: skip
def test_mistakes_are_one_line(flags, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["runtime.py", *flags])
    with pytest.raises(SystemExit):
        cli.run_script(plan.main, plan.Knobs, plan.__doc__)
    message = capsys.readouterr().err.strip()
    assert said in message and "\n" not in message


def test_start():
    """python -m minirlhf.runtime, as the README says."""
    argv = [sys.executable, "-m", "minirlhf.runtime", "--plan", "gpt2-xl", "--gpus", "8"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert (
        done.returncode == 0
        and "1,557,611,200 parameters, 8 GPUs" in done.stdout
        and "not measurements" in done.stdout
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps([peak_of(lambda case=case: two_steps(*case)) for case in CASES]))
