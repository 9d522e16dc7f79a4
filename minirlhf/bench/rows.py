"""How fast: each row beside its peers and its roof.

    python -m minirlhf.bench                   # CPU, one thread: a tiny model, 4 blocks of 128
    python -m minirlhf.bench --device cuda     # GPU: GPT-2 124M in bf16
    python -m minirlhf.bench --rows rollout,dpo --out minirlhf/bench/bench.jsonl

Ours and the peer run in turn in one process, on the same weights' shapes and the same token counts:
on a GPU the median of times between CUDA events, on the CPU the least CPU time of a process with
one thread. Peers run at torch's own settings; TRL in fp32 and in bf16, of which the quicker counts.
A peer that is not installed is left out. Roofs come from this machine's own matrix product and
copy, measured first.

Left out: several GPUs, other models.
"""

import importlib
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

from minirlhf import kernels
from minirlhf.bench import peers
from minirlhf.bench.clock import Bench, names
from minirlhf.data import all_logps, total
from minirlhf.dpo import pair_loss
from minirlhf.engine import cli, machine, optim, parallel
from minirlhf.engine.cli import knob
from minirlhf.engine.rows import Rows, mean_step
from minirlhf.gpt import RewardModel
from minirlhf.ppo import fast_gae, gae, on_last_token
from minirlhf.reward import bradley_terry_loss
from minirlhf.sampling import generate


@dataclass
class Knobs:
    device: str = knob("auto", "auto, cpu or cuda")
    dtype: str = knob(
        "",
        "float32, tf32 or bfloat16 (default: bfloat16 on a GPU, float32 on the CPU)",
        ("", *cli.DTYPES),
    )
    rows: str = knob(
        "", "some of lm,logprobs,logits,rollout,gae,adamw,reward,dpo,ppo (default: all)"
    )
    peers: str = knob("", "some of hf,trl,liger, to run where they are installed (default: all)")
    out: str = knob("", "JSONL file to append the rows to")


def row_lm(bench):
    """A step of next-token training: forward, backward, AdamW."""
    B, T = (32, 1024) if bench.cuda else (32, 64)
    idx, model = bench.tokens(B, T + 1), bench.gpt()
    inputs, targets = idx[:, :-1], idx[:, 1:].flatten()

    def step(loss, optimizer):
        def run():
            with bench.autocast:
                value = loss()
            value.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return run

    def our_loss():
        hidden = model.hidden(inputs).flatten(0, 1)  # (B T, C)
        return -kernels.token_logprobs(hidden, model.lm_head_weight, targets).mean()

    ours = step(our_loss, optim.make_optimizer(model, 1e-4))
    theirs = {}
    if "hf" in bench.peers:
        other = bench.hf()

        def their_loss():
            return F.cross_entropy(other(inputs).logits.flatten(0, 1).float(), targets)

        theirs["hf"] = step(their_loss, torch.optim.AdamW(other.parameters(), 1e-4, fused=True))
    roof = bench.train_flops(B * T, T) / bench.flops
    bench.row(
        "language-model step", [B, T], "tokens/s", B * T, ours, theirs,
        roof=roof, memory=True, n=10,
    )  # fmt: skip


def row_logprobs(bench):
    """token_logprobs against full logits and, on a GPU, against Liger's fused cross entropy."""
    N, C, V = (16384, 768, 50257) if bench.cuda else (4096, 768, 50257)
    hidden = torch.randn(N, C, device=bench.device, requires_grad=True)
    weight = (0.05 * torch.randn(V, C, device=bench.device)).requires_grad_()
    targets = torch.randint(0, V, (N,), device=bench.device)

    def full_logits(h, w):
        return F.linear(h, w).float().log_softmax(-1).gather(1, targets[:, None])

    ways = {"ours": lambda h, w: kernels.token_logprobs(h, w, targets), "full logits": full_logits}
    if "liger" in bench.peers and bench.cuda:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        fused = LigerFusedLinearCrossEntropyLoss()
        ways["liger"] = lambda h, w: -fused(w, h, targets)  # a mean; its gradient made in forward

    def runner(f, backward):
        def run():
            with bench.autocast, torch.set_grad_enabled(backward):
                out = f(hidden, weight)
            if backward:
                torch.autograd.grad(out.sum(), (hidden, weight))

        return run

    name = "token log-probs, forward"
    for backward in (False, True):
        theirs = {way: runner(f, backward) for way, f in ways.items()}
        ours = theirs.pop("ours")
        products = 4 if backward else 1  # backward makes the logits again
        bench.row(
            f"{name} and backward" if backward else name, [N, C, V], "rows/s", N, ours, theirs,
            roof=products * 2 * N * C * V / bench.flops, memory=True, n=10 if bench.cuda else 2,
        )  # fmt: skip


def row_logits(bench):
    """logprob_from_logits, forward and backward, on logits that are there already."""
    N, V = (16384, 50257) if bench.cuda else (2048, 8192)
    dtype = torch.bfloat16 if bench.dtype == "bfloat16" else torch.float32
    logits = torch.randn(N, V, device=bench.device, dtype=dtype).requires_grad_()
    targets = torch.randint(0, V, (N,), device=bench.device)

    def ours():
        torch.autograd.grad(kernels.logprob_from_logits(logits, targets).sum(), logits)

    def log_softmax():
        out = logits.float().log_softmax(-1).gather(1, targets[:, None])
        torch.autograd.grad(out.sum(), logits)

    roof = 3 * N * V * logits.element_size() / bench.bandwidth  # two reads and a write
    bench.row(
        "log-probs of given logits", [N, V], "rows/s", N, ours, {"log_softmax": log_softmax},
        roof=roof, memory=True,
    )  # fmt: skip


def row_rollout(bench):
    """Sampled tokens a second, no EOS: 128 + 128 on a GPU, 32 + 32 on the CPU."""
    Q = R = 128 if bench.cuda else 32
    size = 2 if bench.cuda else 4  # bytes of a number
    model = bench.gpt().eval()
    weights = sum(p.numel() for p in model.parameters()) * size
    other = None
    if "hf" in bench.peers:
        other = bench.hf().to(torch.bfloat16 if bench.cuda else torch.float32).eval()
    for B in (1, 64, 512) if bench.cuda else (1, 64):
        idx, lengths = bench.tokens(B, Q), torch.full((B,), Q, device=bench.device)

        def ours(idx=idx, lengths=lengths):
            with bench.autocast:
                generate(model, idx, lengths, R, eos=-1, pad=0)

        def hf(idx=idx, **more):
            other.generate(
                idx, attention_mask=torch.ones_like(idx), max_new_tokens=R, min_new_tokens=R,
                do_sample=True, top_k=0, pad_token_id=0, eos_token_id=None, **more,
            )  # fmt: skip

        theirs = {"hf": hf} if other else {}
        if other and bench.cuda and B < 512:
            theirs["hf static"] = lambda: hf(cache_implementation="static")
        slots = Q + R / 2  # filled on average
        cache = 2 * bench.config.n_layer * bench.config.n_embd * B * slots * size
        bench.row(
            f"rollout, batch {B}", [B, Q, R], "tokens/s", B * R, ours, theirs,
            roof=R * (weights + cache) / bench.bandwidth, n=5 if B > 1 else 20,
        )  # fmt: skip


def row_gae(bench):
    """As one product of matrices, beside the recursion."""
    B = R = 512
    rewards, values = torch.randn(2, B, R, device=bench.device)
    mask = torch.rand(B, 1, device=bench.device) * R > torch.arange(R, device=bench.device)
    theirs = {"loop": lambda: gae(rewards, values, mask)}
    bench.row("GAE", [B, R], "rows/s", B, lambda: fast_gae(rewards, values, mask), theirs)


def row_adamw(bench):
    """An optimizer step, fused, beside torch's foreach."""
    model = bench.gpt()
    fused = optim.make_optimizer(model, 1e-4)
    foreach = torch.optim.AdamW(model.parameters(), 1e-4, foreach=True)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    size = sum(p.numel() for p in model.parameters())
    roof = 28 * size / bench.bandwidth  # 4 numbers of 4 bytes are read, 3 written
    theirs = {"foreach": foreach.step}
    bench.row("AdamW step", [size], "parameters/s", size, fused.step, theirs, roof=roof)


def pairs(bench):
    """(P, Q, R), and 2 P Rows, the chosen, then the rejected.

    Prompts have Q tokens, responses R/2 to R, as in real text.
    """
    P, Q, R = (32, 256, 256) if bench.cuda else (32, 8, 40)
    lengths = np.random.default_rng(0).integers(R // 2, R + 1, 2 * P)
    tokens = bench.tokens(2 * P, Q + R)
    prompt_lengths = torch.full((2 * P,), Q, device=bench.device)
    response_lengths = torch.as_tensor(lengths, device=bench.device)
    return [P, Q, R], Rows.sampled(tokens, prompt_lengths, response_lengths, 0)


def row_reward(bench):
    """A step of reward-model training on pairs."""
    shape, rows = pairs(bench)
    torch.manual_seed(0)
    rm = RewardModel(bench.config).to(bench.device)
    optimizer = optim.make_optimizer(rm, 1e-4)

    def score(tokens, p, r):
        return rm(tokens, p + r).float()

    def ours():
        with bench.autocast:
            scores = rows.by_parts(score)
        loss = bradley_terry_loss(*scores.chunk(2))
        loss.backward()
        optim.optimizer_step(optimizer, 1.0, loss)

    bench.against_trl(
        "reward-model step", shape, "pairs/s", shape[0], ours, peers.pair_steps, rm, rows, shape
    )


def row_dpo(bench):
    """A step of DPO, the reference's log-probs included."""
    shape, rows = pairs(bench)
    policy, reference = bench.gpt(), bench.gpt()
    optimizer = optim.make_optimizer(policy, 1e-4)

    def ours():
        with bench.autocast:
            ref = all_logps(reference, rows)
        with bench.autocast:
            logps = rows.by_parts(total(policy))
        loss = pair_loss("sigmoid", *logps.chunk(2), *ref.chunk(2)).mean()
        loss.backward()
        optim.optimizer_step(optimizer, 1.0, loss)

    bench.against_trl(
        "DPO step", shape, "pairs/s", shape[0], ours, peers.pair_steps, policy, rows, shape
    )


def row_ppo(bench):
    """A whole PPO iteration, no EOS, 4 epochs of 4 minibatches, separate networks."""
    # The script's own loop is what is timed, and it stands beside the package, not in it: a command
    # may load a script by name, a module may not import one.
    train_ppo = importlib.import_module("train_ppo")
    B, Q, R = (128, 128, 128) if bench.cuda else (64, 8, 24)
    knobs = train_ppo.Knobs(
        batch_size=B, response_length=R, stop_at_eos=False, ppo_epochs=4, minibatches=4,
        micro_batch=0,
    )  # fmt: skip
    policy, reference = bench.gpt(), bench.gpt()
    rm, critic = (RewardModel.from_base(policy).to(bench.device) for _ in range(2))
    trained = parallel.Together(policy, critic)
    optimizer = optim.make_optimizer(trained, 1e-5)
    take_step = partial(mean_step, trained, optimizer, knobs, bench.autocast, None)
    prompts = bench.tokens(B, Q), torch.full((B,), Q, device=bench.device)
    tokenizer = SimpleNamespace(eos=0, pad=0)
    everywhere = torch.ones(B, R, device=bench.device)
    ended = torch.zeros(B, device=bench.device).bool()

    def scorer(tokens, p, r):
        return on_last_token(rm(tokens, p + r).float(), everywhere), ended

    def ours():
        with torch.no_grad(), bench.autocast:
            episodes, _ = train_ppo.rollout(
                policy, reference, scorer, critic, prompts, tokenizer, knobs, 0.05
            )
        train_ppo.update(policy, critic, episodes, take_step, knobs, 0.05)

    bench.against_trl(
        "PPO iteration", [B, Q, R], "episodes/s", B, ours, peers.ppo_iterations, policy, rm, B, Q, R
    )


ROWS = {
    "lm": row_lm,
    "logprobs": row_logprobs,
    "logits": row_logits,
    "rollout": row_rollout,
    "gae": row_gae,
    "adamw": row_adamw,
    "reward": row_reward,
    "dpo": row_dpo,
    "ppo": row_ppo,
}


def main(knobs):
    rows = names(knobs.rows, ROWS, "--rows")
    if machine.pick_device(knobs.device).type == "cpu":
        torch.set_num_threads(1)
    bench = Bench(knobs)
    product, copy = f"{bench.flops / 1e12:.3g} TFLOP/s", f"{bench.bandwidth / 1e9:.4g} GB/s"
    print(machine.versions(bench.device))
    print(f"matrix product {product}, copy {copy}")
    print(f"peers: {', '.join(bench.peers) or 'none is installed'}")
    for name in rows:
        ROWS[name](bench)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    cli.run_script(main, Knobs, __doc__)
