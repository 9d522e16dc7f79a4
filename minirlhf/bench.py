"""How fast: each row beside its peers and its roof.   python -m minirlhf.bench

    python -m minirlhf.bench                                  # CPU, one thread: the tiny model of the default runs
    python -m minirlhf.bench --device cuda                    # GPU: GPT-2 124M in bf16
    python -m minirlhf.bench --rows rollout,dpo --out minirlhf/bench.jsonl

Ours and the peer run in turn in one process, on the same weights' shapes and the same token counts: on a GPU the median of times between
CUDA events, on the CPU the least CPU time of a process with one thread. A peer that is not installed is left out. Roofs come
from this machine's own matrix product and copy, measured first.

Left out: several GPUs, other models.
"""

import json
import statistics
import tempfile
import time
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

from minirlhf import kernels, runtime
from minirlhf.dpo import pair_loss
from minirlhf.gpt import GPT, GPTConfig, RewardModel
from minirlhf.ppo import on_last_token
from minirlhf.reward import bradley_terry_loss
from minirlhf.runtime import knob
from minirlhf.sampling import generate, response_logprobs
from minirlhf.tokenizer import Tokenizer


@dataclass
class Knobs:
    device: str = knob("auto", "auto, cpu or cuda")
    rows: str = knob("", "comma-separated rows (default: all): " + "lm, logprobs, rollout, adamw, reward, dpo, ppo")
    peers: str = knob("hf,trl,liger", "comma-separated peers to run where they are installed")
    out: str = knob("", "JSONL file to append the rows to")


class Bench:
    """What the rows share: device, shapes, the clock and the two ceilings."""

    def __init__(self, knobs):
        self.device = runtime.pick_device(knobs.device)
        self.cuda = self.device.type == "cuda"
        self.peers = [p for p in knobs.peers.split(",") if p and installed(p)]
        self.config = GPTConfig(50304, 1024, 12, 12, 768) if self.cuda else GPTConfig(8192, 64, 4, 4, 128)
        self.dtype = "bfloat16" if self.cuda else "float32"
        self.autocast = runtime.precision(self.device, self.dtype)
        self.out = knobs.out
        n = 8192 if self.cuda else 1024
        a, b = torch.randn(2, n, n, device=self.device, dtype=torch.bfloat16 if self.cuda else torch.float32)
        x = torch.randn(1 << (29 if self.cuda else 25), device=self.device)
        y = torch.empty_like(x)
        self.flops = 2 * n**3 / self.seconds(lambda: a @ b)[0][0]
        self.bandwidth = 8 * x.numel() / self.seconds(lambda: y.copy_(x))[0][0]

    def seconds(self, *functions, n=None):
        """For each function, run in turn with the others: (seconds, spread over the middle half of the runs)."""
        n = n or (30 if self.cuda else 7)
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
        """MiB that a call holds at most beyond what was held before: on a GPU."""
        if not self.cuda:
            return None
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        f()
        torch.cuda.synchronize()
        return round((torch.cuda.max_memory_allocated() - before) / 2**20)

    def row(self, name, shape, unit, amount, ours, peers, *, roof=None, n=None, memory=False):
        """Times ours beside {peer: function}; `amount` of `unit` is what a call does, `roof` the seconds it needs at the ceilings."""
        timed = self.seconds(ours, *peers.values(), n=n)
        rate = [amount / seconds for seconds, _ in timed]
        result = {"row": name, "shape": shape, "dtype": self.dtype, "unit": unit, "ours": rate[0], "spread": timed[0][1] / timed[0][0],
                  "n": n or (30 if self.cuda else 7), "seconds": timed[0][0]}  # fmt: skip
        for peer, peer_rate in zip(peers, rate[1:], strict=True):
            result |= {peer: peer_rate, f"ratio/{peer}": rate[0] / peer_rate}
        if roof:
            result |= {"roof": amount / roof, "share of roof": roof / timed[0][0]}
        if memory and self.cuda:
            result |= {"peak MiB": self.peak(ours)} | {f"peak MiB/{peer}": self.peak(f) for peer, f in peers.items()}
        self.report(result)

    def report(self, result):
        if self.out:
            with open(self.out, "a", encoding="utf-8") as f:
                f.write(json.dumps(result | runtime.versions(self.device)) + "\n")
        text = [f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}" for key, value in result.items() if key != "row"]
        print(f"{result['row']:<28}", ", ".join(text), flush=True)

    def against_trl(self, name, shape, unit, amount, ours, trl):
        """A row whose peer has a loop and a clock of its own: `trl` are the seconds of its steps, or None."""
        n = 10 if self.cuda else 5
        seconds, spread = self.seconds(ours, n=n)[0]
        result = {"row": name, "shape": shape, "dtype": self.dtype, "unit": unit, "ours": amount / seconds, "spread": spread / seconds,
                  "n": n, "seconds": seconds}  # fmt: skip
        if trl is not None:
            theirs = float(np.median(trl) if self.cuda else np.min(trl))
            result |= {"trl": amount / theirs, "ratio/trl": theirs / seconds}
        self.report(result)

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

    def train_flops(self, tokens, T, config=None):
        """6 for each weight of a matrix product and 12 L T C of attention, a token (Chowdhery et al. 2022, appendix B)."""
        c = config or self.config
        return tokens * (6 * (12 * c.n_layer * c.n_embd**2 + c.vocab_size * c.n_embd) + 12 * c.n_layer * T * c.n_embd / 2)


def installed(peer):
    try:
        __import__({"hf": "transformers", "trl": "trl", "liger": "liger_kernel"}[peer])
    except ImportError:
        print(f"{peer} is not installed: left out")
        return False
    return True


def row_lm(bench):
    """A step of next-token training: forward, backward, AdamW."""
    B, T = (32, 1024) if bench.cuda else (32, 64)
    idx = bench.tokens(B, T + 1)
    model = bench.gpt()
    optimizer = runtime.make_optimizer(model, 1e-4)

    def ours():
        with bench.autocast:
            hidden = model.hidden(idx[:, :-1]).flatten(0, 1)
            loss = -kernels.token_logprobs(hidden, model.lm_head_weight, idx[:, 1:].flatten()).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    peers = {}
    if "hf" in bench.peers:
        other = bench.hf()
        other_optimizer = torch.optim.AdamW(other.parameters(), 1e-4, fused=True)

        def hf():
            with bench.autocast:
                logits = other(idx[:, :-1]).logits
                loss = F.cross_entropy(logits.flatten(0, 1).float(), idx[:, 1:].flatten())
            loss.backward()
            other_optimizer.step()
            other_optimizer.zero_grad(set_to_none=True)

        peers["hf"] = hf
    bench.row("language-model step", [B, T], "tokens/s", B * T, ours, peers, roof=bench.train_flops(B * T, T) / bench.flops, memory=True,
              n=10)  # fmt: skip


def row_logprobs(bench):
    """token_logprobs against full logits and, on a GPU, against Liger's fused cross entropy."""
    N, C, V = (16384, 768, 50257) if bench.cuda else (4096, 768, 50257)
    hidden = torch.randn(N, C, device=bench.device, requires_grad=True)
    weight = (0.05 * torch.randn(V, C, device=bench.device)).requires_grad_()
    targets = torch.randint(0, V, (N,), device=bench.device)

    def ours(hidden, weight):
        return kernels.token_logprobs(hidden, weight, targets)

    def plain(hidden, weight):
        return F.linear(hidden, weight).float().log_softmax(-1).gather(1, targets[:, None]).squeeze(1)

    ways = {"ours": ours, "full logits": plain}
    if "liger" in bench.peers and bench.cuda:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        fused = LigerFusedLinearCrossEntropyLoss()
        ways["liger"] = lambda hidden, weight: -fused(weight, hidden, targets)  # a mean; its gradient is made in forward

    def runner(f, backward):
        def run():
            with bench.autocast, torch.set_grad_enabled(backward):
                out = f(hidden, weight)
            if backward:
                torch.autograd.grad(out.sum(), (hidden, weight))

        return run

    gemm = 2 * N * C * V / bench.flops
    for backward in (False, True):
        first, *others = (runner(f, backward) for f in ways.values())
        name = "token log-probs, " + ("forward and backward" if backward else "forward")
        peers = dict(zip(list(ways)[1:], others, strict=True))
        bench.row(name, [N, C, V], "rows/s", N, first, peers, roof=gemm * (4 if backward else 1), memory=True, n=10 if bench.cuda else 2)


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
        bench.row(f"rollout, batch {B}", [B, Q, R], "tokens/s", B * R, ours, peers, roof=R * (weights + cache) / bench.bandwidth, n=5)


def row_adamw(bench):
    model = bench.gpt()
    fused, foreach = runtime.make_optimizer(model, 1e-4), torch.optim.AdamW(model.parameters(), 1e-4, foreach=True)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    size = sum(p.numel() for p in model.parameters())
    bench.row("AdamW step", [size], "parameters/s", size, fused.step, {"foreach": foreach.step}, roof=28 * size / bench.bandwidth)


def ragged(bench, rows, prompt, response):
    """Token rows (rows, prompt + response), prompt lengths and response lengths, the latter from a half to the whole as in real text."""
    lengths = np.random.default_rng(0).integers(response // 2, response + 1, rows)
    lengths = torch.as_tensor(lengths, device=bench.device)
    return bench.tokens(rows, prompt + response), torch.full((rows,), prompt, device=bench.device), lengths


def by_length(lengths, parts=4):
    """Indices of rows of like length, as the scripts split a batch."""
    return [torch.as_tensor(part) for part in np.array_split(np.argsort(lengths.cpu()), parts)]


def row_reward(bench):
    """A step of reward-model training on pairs."""
    P, Q, R = (32, 256, 256) if bench.cuda else (32, 8, 40)
    tokens, prompt, response = ragged(bench, 2 * P, Q, R)
    torch.manual_seed(0)
    rm = RewardModel(bench.config).to(bench.device)
    optimizer = runtime.make_optimizer(rm, 1e-4)

    def ours():
        scores = torch.zeros(2 * P, device=bench.device)
        for part in by_length(response):
            end = int((prompt + response)[part].max())
            with bench.autocast:
                scores = scores.index_put((part.to(bench.device),), rm(tokens[part, :end], (prompt + response)[part]).float())
        bradley_terry_loss(scores[:P], scores[P:]).backward()
        runtime.optimizer_step(optimizer, 1.0)

    trl = trl_step(bench, "reward", rm, response, P, Q) if "trl" in bench.peers else None
    bench.against_trl("reward-model step", [P, Q, R], "pairs/s", P, ours, trl)


def row_dpo(bench):
    """A step of DPO, the reference's log-probs included."""
    P, Q, R = (32, 256, 256) if bench.cuda else (32, 8, 40)
    tokens, prompt, response = ragged(bench, 2 * P, Q, R)
    policy, reference = bench.gpt(), bench.gpt()
    optimizer = runtime.make_optimizer(policy, 1e-4)

    def sums(model):
        logps = torch.zeros(2 * P, device=bench.device)
        for part in by_length(response):
            end = int((prompt + response)[part].max())
            with bench.autocast:
                row = response_logprobs(model, tokens[part, :end], prompt[part], response[part], int(response[part].max())).sum(1)
            logps = logps.index_put((part.to(bench.device),), row)
        return logps

    def ours():
        with torch.no_grad():
            ref = sums(reference)
        logps = sums(policy)
        pair_loss("sigmoid", logps[:P], logps[P:], ref[:P], ref[P:]).mean().backward()
        runtime.optimizer_step(optimizer, 1.0)

    trl = trl_step(bench, "dpo", policy, response, P, Q) if "trl" in bench.peers else None
    bench.against_trl("DPO step", [P, Q, R], "pairs/s", P, ours, trl)


def row_ppo(bench):
    """A whole PPO iteration, no EOS, 4 epochs of 4 minibatches, separate networks."""
    import train_ppo  # from the folder of the scripts

    B, Q, R = (128, 128, 128) if bench.cuda else (64, 8, 24)
    knobs = train_ppo.Knobs(batch_size=B, response_length=R, stop_at_eos=False, ppo_epochs=4, minibatches=4, micro_batch=0)
    policy, reference = bench.gpt(), bench.gpt()
    rm, critic = (RewardModel.from_base(policy).to(bench.device) for _ in range(2))
    optimizer = runtime.make_optimizer(torch.nn.ModuleList([policy, critic]), 1e-5)
    prompts = bench.tokens(B, Q), torch.full((B,), Q, device=bench.device)

    def scorer(tokens, p, r):
        return on_last_token(rm(tokens, p + r).float(), torch.ones(B, R, device=bench.device)), torch.zeros(B, device=bench.device).bool()

    def ours():
        with torch.no_grad(), bench.autocast:
            episodes, _ = train_ppo.rollout(policy, reference, scorer, critic, prompts, SimpleNamespace(eos=0, pad=0), knobs, 0.05)
        train_ppo.update(policy, critic, optimizer, episodes, knobs, 0.05, bench.autocast, 0)

    trl = trl_ppo(bench, policy, rm, B, Q, R) if "trl" in bench.peers else None
    bench.against_trl("PPO iteration", [B, Q, R], "episodes/s", B, ours, trl)


def trl_setting(bench, folder, batch, steps):
    """(tokenizer, arguments that all of TRL's configurations share, at their quickest)."""
    from transformers import PreTrainedTokenizerFast

    Tokenizer.train([], 257).save(folder)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=f"{folder}/tokenizer.json", eos_token="<|endoftext|>", pad_token="ÿ")
    return tokenizer, dict(output_dir=f"{folder}/out", per_device_train_batch_size=batch, max_steps=steps, learning_rate=1e-4,
                           gradient_checkpointing=False, bf16=bench.cuda, use_cpu=not bench.cuda, report_to=[], save_strategy="no",
                           disable_tqdm=True)  # fmt: skip


def trl_clock(bench):
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self):
            self.times = []

        def on_step_end(self, args, state, control, **_):
            if bench.cuda:
                torch.cuda.synchronize()
            self.times.append(time.perf_counter() if bench.cuda else time.process_time())

    return Clock()


def trl_model(folder, model, kind):
    """What transformers reads of one of our models."""
    import transformers

    model.save_pretrained(f"{folder}/{kind}", Tokenizer.train([], 257))
    return getattr(transformers, kind).from_pretrained(f"{folder}/{kind}")


def trl_step(bench, stage, model, lengths, P, Q):
    """Seconds between the ends of TRL's training steps on pairs of the same lengths."""
    import trl
    from datasets import Dataset

    text = ["a" * (int(n) - 1) for n in lengths]  # the tokenizer knows bytes, and adds EOS
    rows = [{"prompt": "<|endoftext|>" + "b" * (Q - 1), "chosen": text[i], "rejected": text[P + i][:-1] + "c"} for i in range(P)]
    steps, clock = (14 if bench.cuda else 7), trl_clock(bench)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer, common = trl_setting(bench, folder, P, steps)
        shared = {"train_dataset": Dataset.from_list(rows * 2), "processing_class": tokenizer, "callbacks": [clock]}
        if stage == "reward":
            model = trl_model(folder, model, "GPT2ForSequenceClassification")
            trainer = trl.RewardTrainer(model=model, args=trl.RewardConfig(**common, logging_strategy="no"), **shared)
        else:
            model, reference = (trl_model(folder, model, "GPT2LMHeadModel") for _ in range(2))
            trainer = trl.DPOTrainer(model=model, ref_model=reference, args=trl.DPOConfig(**common, logging_strategy="no"), **shared)
        trainer.train()
    return np.diff(clock.times)[2:]


def trl_ppo(bench, policy, rm, B, Q, R):
    """Seconds between the ends of TRL's PPO iterations; it exists in trl 1.12 at the latest."""
    try:
        from trl.experimental.ppo import PPOConfig, PPOTrainer
    except ImportError:
        print("this trl has no PPO (1.12 was the last): left out")
        return None
    from datasets import Dataset

    steps, clock = 4, trl_clock(bench)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer, common = trl_setting(bench, folder, B, -1)
        tokenizer.padding_side = "left"
        args = PPOConfig(**common, num_mini_batches=4, num_ppo_epochs=4, total_episodes=B * steps, response_length=R, temperature=1.0,
                         local_rollout_forward_batch_size=B, num_sample_generations=0, stop_token=None)  # fmt: skip
        models = [trl_model(folder, policy, "GPT2LMHeadModel") for _ in range(2)]
        models += [trl_model(folder, rm, "GPT2ForSequenceClassification") for _ in range(2)]
        dataset = Dataset.from_list([{"input_ids": row} for row in torch.randint(1, 250, (B * steps, Q)).tolist()])
        PPOTrainer(args, tokenizer, *models[:3], train_dataset=dataset, value_model=models[3], callbacks=[clock]).train()
    return np.diff(clock.times)[1:]


ROWS = {"lm": row_lm, "logprobs": row_logprobs, "rollout": row_rollout, "adamw": row_adamw, "reward": row_reward, "dpo": row_dpo,
        "ppo": row_ppo}  # fmt: skip


def main(knobs):
    unknown = {r for r in knobs.rows.split(",") if r} - ROWS.keys()
    if unknown:
        raise runtime.UserError(f"--rows {', '.join(sorted(unknown))}: expected some of {', '.join(ROWS)}")
    if runtime.pick_device(knobs.device).type == "cpu":
        torch.set_num_threads(1)
    bench = Bench(knobs)
    print(f"{runtime.versions(bench.device)}\nmatrix product {bench.flops / 1e12:.3g} TFLOP/s, copy {bench.bandwidth / 1e9:.4g} GB/s")
    for name, row in ROWS.items():
        if not knobs.rows or name in knobs.rows.split(","):
            row(bench)
            if bench.cuda:
                torch.cuda.empty_cache()


if __name__ == "__main__":
    runtime.run_script(main, Knobs, __doc__)
