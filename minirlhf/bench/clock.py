"""The clock of the bench: ours and the peers in turn, on shapes of one device, beside its roofs."""

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
        chosen = names(knobs.peers, PEERS, "--peers")
        self.peers = [peer for peer in chosen if importlib.util.find_spec(PEERS[peer])]
        gpt2, tiny = (50304, 1024, 12, 12, 768), (8192, 64, 4, 4, 128)
        self.config = GPTConfig(*(gpt2 if self.cuda else tiny))
        given = knobs.dtype or ("bfloat16" if self.cuda else "float32")
        self.dtype = machine.pick_dtype(given, self.device)
        self.autocast = machine.precision(self.device, self.dtype)
        self.out = knobs.out
        self.n = 30 if self.cuda else 7  # runs of a function
        self.flops = self.matrix_product()
        self.bandwidth = self.copy()

    def matrix_product(self):
        """FLOPs a second of a square product."""
        n = 8192 if self.cuda else 1024
        dtype = torch.bfloat16 if self.cuda else torch.float32
        a, b = torch.randn(2, n, n, device=self.device, dtype=dtype)
        (seconds, _), *_ = self.seconds(lambda: a @ b)
        return 2 * n**3 / seconds

    def copy(self):
        """Bytes a second of a copy, read and written, 4 each a number."""
        x = torch.randn(1 << (29 if self.cuda else 25), device=self.device)
        y = torch.empty_like(x)
        (seconds, _), *_ = self.seconds(lambda: y.copy_(x))
        return 8 * x.numel() / seconds

    def seconds(self, *functions, n=None):
        """For each function, run in turn with the others: (seconds, spread over the middle half).

        On a GPU the median of n runs; on the CPU the least, as whatever disturbs only adds.
        """
        times = [[] for _ in functions]
        for _ in range(5 if self.cuda else 2):
            for f in functions:
                f()
        for _ in range(n or self.n):
            for f, kept in zip(functions, times, strict=True):
                kept.append(self.clock(f))
        middle = statistics.median if self.cuda else min
        return [(middle(t), np.subtract(*np.percentile(t, [75, 25]))) for t in times]

    def clock(self, f):
        """Seconds of a call: between events on a GPU, CPU time of the process elsewhere."""
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
        """MiB that a call holds at most beyond what was held before.

        On the CPU as Linux counts a process's pages every millisecond.
        """
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            f()
            torch.cuda.synchronize()
            return round((torch.cuda.max_memory_allocated() - before) / 2**20)
        before = resident()
        seen, done = [before], threading.Event()

        def look():
            while not done.wait(0.001):
                seen.append(resident())

        watch = threading.Thread(target=look)
        watch.start()
        f()
        done.set()
        watch.join()
        return round((max(seen) - before) / 2**20)

    def row(self, name, shape, unit, amount, ours, peers, *, roof=None, n=None, memory=False):
        """Times ours beside {peer: function}.

        `amount` of `unit` is what a call does, `roof` the seconds it needs at the ceilings.
        """
        peers = {peer: self.with_torchs_settings(f) for peer, f in peers.items()}
        (seconds, spread), *others = self.seconds(ours, *peers.values(), n=n)
        result = self.result(name, shape, unit, amount, seconds, spread)
        for peer, (theirs, _) in zip(peers, others, strict=True):
            result |= {peer: amount / theirs, f"ratio/{peer}": theirs / seconds}
        if roof:
            result |= {"roof": amount / roof, "share of roof": roof / seconds}
        if memory and (self.cuda or sys.platform == "linux"):
            result["peak MiB"] = self.peak(ours)
            for peer, f in peers.items():
                result[f"peak MiB/{peer}"] = self.peak(f)
        self.report(result | {"n": n or self.n})

    def result(self, name, shape, unit, amount, seconds, spread):
        about = {"row": name, "shape": shape, "dtype": self.dtype, "unit": unit}
        return about | {"ours": amount / seconds, "spread": spread / seconds}

    def with_torchs_settings(self, f):
        def run():
            with machine.matmul_precision("highest"):
                return f()

        return run

    def against_trl(self, name, shape, unit, amount, ours, trl, *args):
        """A row whose peer has a loop and a clock of its own, in fp32 and bf16, the quicker counts.

        trl(bench, bf16, *args) -> the seconds of its steps, or None.
        """
        seconds, spread = self.seconds(ours, n=10)[0]
        result = self.result(name, shape, unit, amount, seconds, spread)
        dtypes = ("bfloat16",) if self.cuda else ("float32", "bfloat16")
        for dtype in dtypes if "trl" in self.peers else ():
            run = partial(trl, self, dtype == "bfloat16", *args)
            times = self.with_torchs_settings(run)()
            if times is None:
                continue
            theirs = float(np.median(times) if self.cuda else np.min(times))
            if amount / theirs > result.get("trl", 0):
                result |= {"trl": amount / theirs, "ratio/trl": theirs / seconds}
                result["trl dtype"] = dtype
        self.report(result | {"n": 10})

    def report(self, result):
        """A line on the console, and one of the JSONL file with the machine's versions."""
        if self.out:
            with open(self.out, "a", encoding="utf-8") as f:
                f.write(json.dumps(result | machine.versions(self.device)) + "\n")
        text = []
        for key, value in result.items():
            if key != "row":
                text.append(f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}")
        print(f"{result['row']:<28}", ", ".join(text), flush=True)

    def gpt(self):
        torch.manual_seed(0)
        return GPT(self.config).to(self.device)

    def hf(self):
        """transformers' model of the same shape."""
        from transformers import GPT2Config, GPT2LMHeadModel

        c = self.config
        config = GPT2Config(
            vocab_size=c.vocab_size,
            n_positions=c.n_ctx,
            n_embd=c.n_embd,
            n_layer=c.n_layer,
            n_head=c.n_head,
            resid_pdrop=0,
            embd_pdrop=0,
            attn_pdrop=0,
        )
        return GPT2LMHeadModel(config).to(self.device)

    def tokens(self, *shape):
        return torch.randint(1, min(8000, self.config.vocab_size), shape, device=self.device)

    def train_flops(self, tokens, T):
        """6 for each weight of a matrix product and 6 L T C of causal attention, a token.

        Chowdhery et al. 2022, appendix B.
        """
        L, C, V = self.config.n_layer, self.config.n_embd, self.config.vocab_size
        weights = 12 * L * C**2 + V * C
        attention = 6 * L * T * C
        return tokens * (6 * weights + attention)


def resident():
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def names(given, known, flag):
    """The names in a comma-separated flag, each of which must be known; all where it is empty."""
    chosen = [name for name in given.split(",") if name]
    if set(chosen) - known.keys():
        raise UserError(f"{flag} {given}: expected some of {','.join(known)}")
    return chosen or list(known)
