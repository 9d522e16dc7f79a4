"""The clock of the bench."""

import importlib
import importlib.util
import json
import mmap
import statistics
import sys
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

from minirlhf.engine import machine
from minirlhf.engine.cli import UserError
from minirlhf.gpt import GPT, GPTConfig

PEERS = {"hf": "transformers", "trl": "trl", "liger": "liger_kernel"}  # and what each imports as


class Bench:
    """What the rows share: device, shapes, the clock and the two ceilings."""

    def __init__(self, knobs):
        self.device = machine.pick_device(knobs.device)
        self.cuda = self.device.type == "cuda"
        self.peers = [peer for peer in names(knobs.peers, PEERS, "--peers") if importlib.util.find_spec(PEERS[peer])]
        self.config = GPTConfig(50304, 1024, 12, 12, 768) if self.cuda else GPTConfig(8192, 64, 4, 4, 128)
        self.dtype = knobs.dtype or ("bfloat16" if self.cuda else "float32")
        self.autocast = machine.precision(self.device, self.dtype)
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
            with machine.matmul_precision("highest"):
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
                f.write(json.dumps(result | machine.versions(self.device)) + "\n")
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


def resident():
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def names(given, known, flag):
    chosen = [name for name in given.split(",") if name]
    if set(chosen) - known.keys():
        raise UserError(f"{flag} {given}: expected some of {','.join(known)}")
    return chosen or list(known)
