"""How fast: each row beside its peers and its roof.   python -m minirlhf.bench

    python -m minirlhf.bench                                  # CPU, one thread: the tiny model of the default runs
    python -m minirlhf.bench --device cuda                    # GPU: GPT-2 124M in bf16
    python -m minirlhf.bench --rows rollout,dpo --out minirlhf/bench.jsonl

Ours and the peer run in turn in one process, on the same weights' shapes and the same token counts: on a GPU the median of times between
CUDA events, on the CPU the least CPU time of a process with one thread. Peers run at torch's own settings; TRL in fp32 and in bf16, of
which the quicker counts. A peer that is not installed is left out. Roofs come from this machine's own matrix product and copy,
measured first.

Left out: several GPUs, other models.
"""

import importlib.util
import json
import mmap
import statistics
import sys
import threading
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

from minirlhf import batches, kernels, parallel, runtime, trl_driver
from minirlhf.dpo import pair_loss
from minirlhf.gpt import GPT, GPTConfig, RewardModel
from minirlhf.ppo import gae, gae_by_loop, on_last_token
from minirlhf.reward import bradley_terry_loss
from minirlhf.runtime import knob
from minirlhf.sampling import generate

PEERS = {"hf": "transformers", "trl": "trl", "liger": "liger_kernel"}  # and what each imports as


@dataclass
class Knobs:
    device: str = knob("auto", "auto, cpu or cuda")
    dtype: str = knob("", "float32, tf32 or bfloat16 (default: bfloat16 on a GPU, float32 on the CPU)", ("", *runtime.DTYPES))
    rows: str = knob("", "some of lm,logprobs,logits,rollout,gae,adamw,reward,dpo,ppo (default: all)")
    peers: str = knob("", "some of hf,trl,liger, to run where they are installed (default: all)")
    out: str = knob("", "JSONL file to append the rows to")


class Bench:
    """What the rows share: device, shapes, the clock and the two ceilings."""

    def __init__(self, knobs):
        self.device = runtime.pick_device(knobs.device)
        self.cuda = self.device.type == "cuda"
        self.peers = [peer for peer in names(knobs.peers, PEERS, "--peers") if importlib.util.find_spec(PEERS[peer])]
        self.config = GPTConfig(50304, 1024, 12, 12, 768) if self.cuda else GPTConfig(8192, 64, 4, 4, 128)
        self.dtype = knobs.dtype or ("bfloat16" if self.cuda else "float32")
        self.autocast = runtime.precision(self.device, self.dtype)
        self.out, self.n = knobs.out, 30 if self.cuda else 7
        n = 8192 if self.cuda else 1024
        a, b = torch.randn(2, n, n, device=self.device, dtype=torch.bfloat16 if self.cuda else torch.float32)
        x = torch.randn(1 << (29 if self.cuda else 25), device=self.device)
        y = torch.empty_like(x)
        self.flops = 2 * n**3 / self.seconds(lambda: a @ b)[0][0]
        self.bandwidth = 8 * x.numel() / self.seconds(lambda: y.copy_(x))[0][0]

    def seconds(self, *functions, n=None):
        """For each function, run in turn with the others: (seconds, spread over the middle half of the runs)."""
        n = n or self.n
        times = [[] for _ in functions]
        for _ in range(5 if self.cuda else 2):
            for f in functions:
                f()
        for _ in range(n):
            for f, kept in zip(functions, times, strict=True):
                kept.append(self.clock(f))
        return [(statistics.median(t) if self.cuda else min(t), np.subtract(*np.percentile(t, [75, 25]))) for t in times]

    def clock(self, f):
        if not self.cuda:
            start = time.process_time()
            f()
            return time.process_time() - start
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        f()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3

    def peak(self, f):
        """MiB that a call holds at most beyond what was held before; on the CPU as Linux counts a process's pages every millisecond."""
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            f()
            torch.cuda.synchronize()
            return round((torch.cuda.max_memory_allocated() - before) / 2**20)
        seen, done = [resident()], threading.Event()
        watch = threading.Thread(target=lambda: [seen.append(resident()) for _ in iter(partial(done.wait, 0.001), True)])
        watch.start()
        f()
        done.set()
        watch.join()
        return round((max(seen) - seen[0]) / 2**20)

    def row(self, name, shape, unit, amount, ours, peers, *, roof=None, n=None, memory=False):
        """Times ours beside {peer: function}; `amount` of `unit` is what a call does, `roof` the seconds it needs at the ceilings."""
        peers = {peer: self.with_torchs_settings(f) for peer, f in peers.items()}
        (seconds, spread), *others = self.seconds(ours, *peers.values(), n=n)
        result = {"row": name, "shape": shape, "dtype": self.dtype, "unit": unit, "ours": amount / seconds, "spread": spread / seconds}
        for peer, (theirs, _) in zip(peers, others, strict=True):
            result |= {peer: amount / theirs, f"ratio/{peer}": theirs / seconds}
        if roof:
            result |= {"roof": amount / roof, "share of roof": roof / seconds}
        if memory and (self.cuda or sys.platform == "linux"):
            result |= {"peak MiB": self.peak(ours)} | {f"peak MiB/{peer}": self.peak(f) for peer, f in peers.items()}
        self.report(result | {"n": n or self.n})

    def with_torchs_settings(self, f):
        def run():
            with runtime.matmul_precision("highest"):
                return f()

        return run

    def against_trl(self, name, shape, unit, amount, ours, trl, *args):
        """A row whose peer has a loop and a clock of its own: trl(bench, bf16, *args) -> the seconds of its steps, or None."""
        seconds, spread = self.seconds(ours, n=10)[0]
        result = {"row": name, "shape": shape, "dtype": self.dtype, "unit": unit, "ours": amount / seconds, "spread": spread / seconds}
        for bf16 in ([True] if self.cuda else [False, True]) if "trl" in self.peers else []:
            times = self.with_torchs_settings(partial(trl, self, bf16, *args))()
            if times is not None:
                theirs = float(np.median(times) if self.cuda else np.min(times))
                if amount / theirs > result.get("trl", 0):
                    result |= {"trl": amount / theirs, "ratio/trl": theirs / seconds, "trl dtype": "bfloat16" if bf16 else "float32"}
        self.report(result | {"n": 10})

    def report(self, result):
        if self.out:
            with open(self.out, "a", encoding="utf-8") as f:
                f.write(json.dumps(result | runtime.versions(self.device)) + "\n")
        text = [f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}" for key, value in result.items() if key != "row"]
        print(f"{result['row']:<28}", ", ".join(text), flush=True)

    def gpt(self):
        torch.manual_seed(0)
        return GPT(self.config).to(self.device)

    def hf(self):
        from transformers import GPT2Config, GPT2LMHeadModel

        c = self.config
        config = GPT2Config(vocab_size=c.vocab_size, n_positions=c.n_ctx, n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head,
                            resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)  # fmt: skip
        return GPT2LMHeadModel(config).to(self.device)

    def tokens(self, *shape):
        return torch.randint(1, min(8000, self.config.vocab_size), shape, device=self.device)

    def train_flops(self, tokens, T):
        """6 for each weight of a matrix product and 6 L T C of causal attention, a token (Chowdhery et al. 2022, appendix B)."""
        c = self.config
        return tokens * (6 * (12 * c.n_layer * c.n_embd**2 + c.vocab_size * c.n_embd) + 6 * c.n_layer * T * c.n_embd)


def row_lm(bench):
    """A step of next-token training: forward, backward, AdamW."""
    B, T = (32, 1024) if bench.cuda else (32, 64)
    idx, model = bench.tokens(B, T + 1), bench.gpt()
    inputs, targets = idx[:, :-1], idx[:, 1:].flatten()

    def train(loss, optimizer):
        def step():
            with bench.autocast:
                value = loss()
            value.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step

    def ours():
        return -kernels.token_logprobs(model.hidden(inputs).flatten(0, 1), model.lm_head_weight, targets).mean()

    def theirs():
        return F.cross_entropy(other(inputs).logits.flatten(0, 1).float(), targets)

    other = bench.hf() if "hf" in bench.peers else None
    peers = {"hf": train(theirs, torch.optim.AdamW(other.parameters(), 1e-4, fused=True))} if other else {}
    bench.row("language-model step", [B, T], "tokens/s", B * T, train(ours, runtime.make_optimizer(model, 1e-4)), peers,
              roof=bench.train_flops(B * T, T) / bench.flops, memory=True, n=10)  # fmt: skip


def row_logprobs(bench):
    """token_logprobs against full logits and, on a GPU, against Liger's fused cross entropy."""
    N, C, V = (16384, 768, 50257) if bench.cuda else (4096, 768, 50257)
    hidden = torch.randn(N, C, device=bench.device, requires_grad=True)
    weight = (0.05 * torch.randn(V, C, device=bench.device)).requires_grad_()
    targets = torch.randint(0, V, (N,), device=bench.device)

    ways = {"ours": lambda h, w: kernels.token_logprobs(h, w, targets),
            "full logits": lambda h, w: F.linear(h, w).float().log_softmax(-1).gather(1, targets[:, None])}  # fmt: skip
    if "liger" in bench.peers and bench.cuda:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        fused = LigerFusedLinearCrossEntropyLoss()
        ways["liger"] = lambda h, w: -fused(w, h, targets)  # a mean; its gradient is made in forward

    def runner(f, backward):
        def run():
            with bench.autocast, torch.set_grad_enabled(backward):
                out = f(hidden, weight)
            if backward:
                torch.autograd.grad(out.sum(), (hidden, weight))

        return run

    for backward, products in ((False, 1), (True, 4)):  # backward makes the logits again
        peers = {name: runner(f, backward) for name, f in ways.items()}
        bench.row("token log-probs, forward" + " and backward" * backward, [N, C, V], "rows/s", N, peers.pop("ours"), peers,
                  roof=products * 2 * N * C * V / bench.flops, memory=True, n=10 if bench.cuda else 2)  # fmt: skip


def row_logits(bench):
    """logprob_from_logits, forward and backward, on logits that are there already."""
    N, V = (16384, 50257) if bench.cuda else (2048, 8192)
    dtype = torch.bfloat16 if bench.dtype == "bfloat16" else torch.float32
    logits = torch.randn(N, V, device=bench.device, dtype=dtype).requires_grad_()
    targets = torch.randint(0, V, (N,), device=bench.device)

    def runner(f):
        return lambda: torch.autograd.grad(f().sum(), logits)

    ours = runner(lambda: kernels.logprob_from_logits(logits, targets))
    peers = {"log_softmax": runner(lambda: logits.float().log_softmax(-1).gather(1, targets[:, None]))}
    roof = 3 * N * V * logits.element_size() / bench.bandwidth  # two reads and a write
    bench.row("log-probs of given logits", [N, V], "rows/s", N, ours, peers, roof=roof, memory=True)


def row_rollout(bench):
    """Sampled tokens a second, no EOS: 128 + 128 on a GPU, 32 + 32 on the CPU."""
    Q = R = 128 if bench.cuda else 32
    model = bench.gpt().eval()
    weights = sum(p.numel() for p in model.parameters()) * (2 if bench.cuda else 4)
    other = bench.hf().to(torch.bfloat16 if bench.cuda else torch.float32).eval() if "hf" in bench.peers else None
    for B in (1, 64, 512) if bench.cuda else (1, 64):
        idx, lengths = bench.tokens(B, Q), torch.full((B,), Q, device=bench.device)

        def ours(idx=idx, lengths=lengths):
            with bench.autocast:
                generate(model, idx, lengths, R, eos=-1, pad=0)

        def hf(idx=idx, **more):
            other.generate(idx, attention_mask=torch.ones_like(idx), max_new_tokens=R, min_new_tokens=R, do_sample=True, top_k=0,
                           pad_token_id=0, eos_token_id=None, **more)  # fmt: skip

        cache = 2 * bench.config.n_layer * bench.config.n_embd * B * (Q + R / 2) * (2 if bench.cuda else 4)
        peers = {"hf": hf} if other else {}
        if other and bench.cuda and B < 512:
            peers["hf static"] = lambda: hf(cache_implementation="static")
        bench.row(f"rollout, batch {B}", [B, Q, R], "tokens/s", B * R, ours, peers, roof=R * (weights + cache) / bench.bandwidth,
                  n=5 if B > 1 else 20)  # fmt: skip


def row_gae(bench):
    B = R = 512
    rewards, values = torch.randn(2, B, R, device=bench.device)
    mask = torch.rand(B, 1, device=bench.device) * R > torch.arange(R, device=bench.device)
    peers = {"loop": lambda: gae_by_loop(rewards, values, mask)}
    bench.row("GAE", [B, R], "rows/s", B, lambda: gae(rewards, values, mask), peers)


def row_adamw(bench):
    model = bench.gpt()
    fused, foreach = runtime.make_optimizer(model, 1e-4), torch.optim.AdamW(model.parameters(), 1e-4, foreach=True)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    size = sum(p.numel() for p in model.parameters())
    bench.row("AdamW step", [size], "parameters/s", size, fused.step, {"foreach": foreach.step}, roof=28 * size / bench.bandwidth)


def pairs(bench):
    """(P, Q, R), and 2 P Rows of prompts of Q and responses of R/2 to R tokens, as in real text: the chosen, then the rejected."""
    P, Q, R = (32, 256, 256) if bench.cuda else (32, 8, 40)
    lengths = torch.as_tensor(np.random.default_rng(0).integers(R // 2, R + 1, 2 * P), device=bench.device)
    rows = batches.Rows.sampled(bench.tokens(2 * P, Q + R), torch.full((2 * P,), Q, device=bench.device), lengths, 0)
    return [P, Q, R], rows


def row_reward(bench):
    """A step of reward-model training on pairs."""
    shape, rows = pairs(bench)
    torch.manual_seed(0)
    rm = RewardModel(bench.config).to(bench.device)
    optimizer = runtime.make_optimizer(rm, 1e-4)

    def ours():
        with bench.autocast:
            scores = rows.by_parts(lambda tokens, p, r: rm(tokens, p + r).float())
        loss = bradley_terry_loss(*scores.chunk(2))
        loss.backward()
        runtime.optimizer_step(optimizer, 1.0, loss)

    bench.against_trl("reward-model step", shape, "pairs/s", shape[0], ours, trl_driver.pair_steps, rm, rows, shape)


def row_dpo(bench):
    """A step of DPO, the reference's log-probs included."""
    shape, rows = pairs(bench)
    policy, reference = bench.gpt(), bench.gpt()
    optimizer = runtime.make_optimizer(policy, 1e-4)

    def ours():
        with bench.autocast:
            ref = batches.all_logps(reference, rows)
        with bench.autocast:
            logps = rows.by_parts(batches.total(policy))
        loss = pair_loss("sigmoid", *logps.chunk(2), *ref.chunk(2)).mean()
        loss.backward()
        runtime.optimizer_step(optimizer, 1.0, loss)

    bench.against_trl("DPO step", shape, "pairs/s", shape[0], ours, trl_driver.pair_steps, policy, rows, shape)


def row_ppo(bench):
    """A whole PPO iteration, no EOS, 4 epochs of 4 minibatches, separate networks."""
    import train_ppo  # from the folder of the scripts

    B, Q, R = (128, 128, 128) if bench.cuda else (64, 8, 24)
    knobs = train_ppo.Knobs(batch_size=B, response_length=R, stop_at_eos=False, ppo_epochs=4, minibatches=4, micro_batch=0)
    policy, reference = bench.gpt(), bench.gpt()
    rm, critic = (RewardModel.from_base(policy).to(bench.device) for _ in range(2))
    trained = parallel.Together(policy, critic)
    optimizer = runtime.make_optimizer(trained, 1e-5)
    prompts = bench.tokens(B, Q), torch.full((B,), Q, device=bench.device)

    def scorer(tokens, p, r):
        return on_last_token(rm(tokens, p + r).float(), torch.ones(B, R, device=bench.device)), torch.zeros(B, device=bench.device).bool()

    def ours():
        with torch.no_grad(), bench.autocast:
            episodes, _ = train_ppo.rollout(policy, reference, scorer, critic, prompts, SimpleNamespace(eos=0, pad=0), knobs, 0.05)
        train_ppo.update(trained, optimizer, episodes, knobs, 0.05, bench.autocast)

    bench.against_trl("PPO iteration", [B, Q, R], "episodes/s", B, ours, trl_driver.ppo_iterations, policy, rm, B, Q, R)


ROWS = {f.__name__[4:]: f for f in (row_lm, row_logprobs, row_logits, row_rollout, row_gae, row_adamw, row_reward, row_dpo, row_ppo)}


def resident():
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def names(given, known, flag):
    chosen = [name for name in given.split(",") if name]
    if set(chosen) - known.keys():
        raise runtime.UserError(f"{flag} {given}: expected some of {','.join(known)}")
    return chosen or list(known)


def main(knobs):
    rows = names(knobs.rows, ROWS, "--rows")
    if runtime.pick_device(knobs.device).type == "cpu":
        torch.set_num_threads(1)
    bench = Bench(knobs)
    print(f"{runtime.versions(bench.device)}\nmatrix product {bench.flops / 1e12:.3g} TFLOP/s, copy {bench.bandwidth / 1e9:.4g} GB/s\n"
          f"peers: {', '.join(bench.peers) or 'none is installed'}")  # fmt: skip
    for name in rows:
        ROWS[name](bench)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    runtime.run_script(main, Knobs, __doc__)
