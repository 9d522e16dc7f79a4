"""Stage 0: the base language model, trained on the next token.   python -m minirlhf.sft

    python -m minirlhf.sft                       # laptop, 2 cores: the reviews, in a minute
    python -m minirlhf.sft --data my.jsonl --init gpt2 --overlong truncate --n-ctx 512 \\
        --dtype bfloat16 --lr 1e-4               # GPU
    torchrun --nproc-per-node 8 -m minirlhf.sft --shard   # many GPUs; --resume goes on

Reads text, learns a tokenizer on it (or takes that of --init), and trains a GPT on rows `[EOS]
prompt response EOS`, the prompt included; tokens that share letters learn together, and matrices
by Muon (engine/letters.py and muon.py). Leaves runs/sft.

Left out: packing rows into one, held-out early stopping.
"""

if __name__ == "__main__":  # first, as torch takes a while
    import minirlhf.engine.interrupts  # noqa: F401
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from minirlhf import data
from minirlhf.engine import cli, letters, machine, muon, optim, parallel, stages
from minirlhf.engine.cli import knob
from minirlhf.engine.log import Run
from minirlhf.engine.prepare import prepare
from minirlhf.engine.rows import bucketed, pad_rows
from minirlhf.engine.weights import model_directory
from minirlhf.gpt import GPT, GPTConfig
from minirlhf.kernels import token_logprobs
from minirlhf.look.answers import answers
from minirlhf.tokenizer import Tokenizer, load_base

OVERLONG = ("", "error", "truncate")


@dataclass(kw_only=True)
class Knobs(cli.RunKnobs):
    data: str = knob("reviews", "reviews, toy, a file, a folder, hub:OWNER/NAME/FILE", free=True)
    init: str = knob("", "model to start from: run, directory, hub name; none: fresh", free=True)
    out: str = knob("runs/sft", "run directory", free=True)
    vocab_size: int = knob(12288, "tokens to train when fresh, with EOS; toy: 257", least=1)
    n_ctx: int = knob(64, "context in tokens, when fresh; two are EOS", least=3)
    n_layer: int = knob(2, "blocks, when fresh", least=1)
    n_head: int = knob(4, "attention heads, when fresh", least=1)
    n_embd: int = knob(96, "width, when fresh", least=1)
    overlong: str = knob("", "longer rows than the context: error, or truncate (reviews)", OVERLONG)
    epochs: int = knob(1, "passes over the responses", least=1)
    batch_size: int = knob(32, "rows a step", least=1)
    micro_batch: int = knob(0, "rows in memory at a time; 0: all", free=True)
    lr: float = knob(4e-3, "peak learning rate: 5 % warm-up, then linear to 0")
    embedding_lr: float = knob(4.0, "the token embeddings' rate, as a multiple of --lr", least=1e-6)
    weight_decay: float = knob(0.1, "decay of matrices")
    optimizer: str = knob("", "of the matrices in blocks; if fresh, muon", muon.OPTIMIZERS)


@cli.contained
def main(knobs):
    device, autocast = parallel.start(knobs)
    check(knobs)
    stages.look_ahead(knobs, {"": knobs.init})
    feedback = data.load_feedback(knobs.data)
    rng = machine.seed_everything(knobs.seed)

    # Model, and the tokenizer that belongs to it
    texts = feedback.texts()
    source = model_directory(knobs.init) if knobs.init else None
    if source:
        model, tokenizer = load_base(source)
    else:
        tokenizer, model = fresh_model(knobs, texts)
    model.to(device)

    # Data: rows of token ids, and every batch of every epoch
    overlong = overlong_rule(knobs.overlong, knobs.data)
    unseen = data.worth_writing(feedback.test)
    n_ctx = model.config.n_ctx
    rows, _ = data.encode(texts, tokenizer, n_ctx, overlong)
    held_out, _ = data.encode(unseen, tokenizer, n_ctx, overlong)
    lengths = np.array([len(row) for row in rows])
    plan = []
    for _ in range(knobs.epochs):
        plan += bucketed(lengths, knobs.batch_size, rng)
    n_parameters = sum(p.numel() for p in model.parameters())

    prepare(knobs, model)
    trained = parallel.Together(model)
    optimizer = optim.make_optimizer(trained, knobs.lr, **optim.rates_of(knobs))
    letters.join(knobs, optimizer, model, tokenizer)
    muon.join(knobs, optimizer, trained)
    parts = {"model": trained, "optimizer": optimizer}
    given = {"data": rows, "init": source}
    run = Run("sft", knobs, plan, device, tokenizer, parts, given)
    size = f"{n_parameters / 1e6:.2f} M parameters, vocabulary {tokenizer.vocab_size}"
    run.say(f"base model: {size}, {lengths.sum():,} tokens of text")

    for step, index in run.steps():
        optim.set_lr(optimizer, step, len(plan), knobs.lr)
        batch = [rows[i] for i in index]
        loss = add_gradient(trained, batch, knobs.micro_batch, tokenizer.pad, autocast, device)
        skip = partial(run.nonfinite, step, batch)
        loss, norm = optim.optimizer_step(optimizer, knobs.max_grad_norm, loss, skip)
        stats = {"loss": loss, "grad_norm": norm, "perf/tokens": lengths[index].sum()}
        run.log(step, stats, show=("loss",))

    with run.kept(model, **feedback.facts(knobs.data, tokenizer)):
        figures = evaluate(model, held_out, tokenizer, autocast, device)
        run.samples(samples(model, feedback.test, tokenizer, rng, autocast, knobs.seed))
        summary = run.finish(figures)
        report(figures, held_out, summary, run.out)
        return summary


def report(figures, held_out, summary, out):
    perplexity = figures["eval/perplexity"]
    bits = figures["eval/bits_per_byte"]
    print(
        f"base model: perplexity {perplexity:.1f} on {len(held_out)} held-out texts, {bits:.3f} "
        f"bits a byte; {summary['seconds']:.0f} s; left in {out}"
    )


def check(knobs):
    """Refuses knobs that have no say beside others."""
    idle = {"beside --init, which has it": knobs.init and "vocab_size n_ctx n_layer n_head n_embd"}
    cli.refuse_idle(knobs, idle)


def fresh_model(knobs, texts):
    """A tokenizer of the texts, and a model of fresh weights."""
    vocab_size = min(knobs.vocab_size, 257) if knobs.data == "toy" else knobs.vocab_size
    whole = [prompt + response for prompt, response, _ in texts]
    tokenizer = Tokenizer.train(whole, vocab_size)
    sizes = knobs.n_ctx, knobs.n_layer, knobs.n_head, knobs.n_embd
    return tokenizer, GPT(GPTConfig(tokenizer.vocab_size, *sizes))


def row_logprobs(model, tokens, lengths):
    """Log-probs of every token after the first of right-padded rows (B, T), flat, without
    padding."""
    T = tokens.shape[1]
    places = torch.arange(T - 1, device=tokens.device)
    real = places < lengths[:, None] - 1  # (B, T-1)
    hidden = model.hidden(tokens[:, :-1], lengths=lengths - 1)
    targets = tokens[:, 1:][real]
    return token_logprobs(hidden[real], model.lm_head_weight, targets)


def parts_of(rows, size, pad, device):
    """This process's share of the rows, `size` at a time (0: all): tokens (b, T), lengths (b,),
    which of the tokens after the first count, flat, and whether it is the last part."""
    mine, counts = parallel.share(len(rows))
    size = size or len(mine)
    for start in range(0, len(mine), size):
        part = slice(start, start + size)
        some = [rows[i] for i in mine[part]]
        tokens, lengths = pad_rows(some, pad, device)
        real = torch.as_tensor(counts[part], device=device)
        real = real.repeat_interleave(lengths - 1)
        yield tokens, lengths, real, part.stop >= len(mine)


def add_gradient(trained, rows, micro_batch, pad, autocast, device):
    """The mean loss of all tokens of the rows, after the backward pass."""
    n_tokens = sum(len(row) - 1 for row in rows)
    loss = torch.zeros((), device=device)
    for tokens, lengths, real, last in parts_of(rows, micro_batch, pad, device):
        with autocast:
            logprobs = row_logprobs(trained[0], tokens, lengths)
        part = -(logprobs * real).sum() / n_tokens
        trained.backward(part, last)
        loss += part.detach()
    return parallel.total(loss)


@torch.no_grad()
def evaluate(model, rows, tokenizer, autocast, device):
    """Perplexity a token and bits a byte of text, EOS counted among the tokens."""
    model.eval()
    total = torch.zeros((), device=device, dtype=torch.float64)
    for tokens, lengths, real, _ in parts_of(rows, 64, tokenizer.pad, device):
        with autocast:
            logprobs = row_logprobs(model, tokens, lengths)
        total -= logprobs[real].double().sum()
    model.train()
    nats = parallel.total(total).item()
    n_tokens = sum(len(row) - 1 for row in rows)
    n_bytes = sum(len(tokenizer.decode_bytes(row)) for row in rows)
    perplexity = math.exp(min(nats / n_tokens, 700))  # more is no float
    bits = nats / math.log(2)
    return {"eval/perplexity": perplexity, "eval/bits_per_byte": bits / max(1, n_bytes)}


def samples(model, test, tokenizer, rng, autocast, seed):
    """What the model writes after 64 held-out prompts."""
    width = min(24, model.config.n_ctx // 2)
    prompts = data.prompts_of(test, tokenizer, rng)[:64]
    prompts = data.fit(prompts, model.config.n_ctx - width, "truncate")
    texts = answers(model, model, None, prompts, tokenizer, width, 1.0, autocast, seed)
    return [{"prompt": a.prompt, "response": a.response} for a in texts]


# For the scripts: where the base model is, and how to get what an earlier stage should have made


def overlong_rule(given, source):
    return given or ("truncate" if source == "reviews" else "error")


def base_model(knobs, feedback):
    """The model directory of a script's base model: --init, or else the run `sft` beside --out."""
    if knobs.init:
        stages.note_other_data(knobs.init, knobs, feedback)
        return model_directory(knobs.init)
    beside = Path(knobs.out).parent / "sft"
    own = Knobs(out=beside, **stages.earlier(knobs))
    model, _ = stages.stage_before("base model", main, own, feedback)
    return model


def stage_beside(name, folder, stage, knobs, feedback):
    """(a model or what stands for it, its training's summary when it is ours): --reward, or the run
    of that stage in a folder beside --out."""
    if knobs.reward:
        stages.note_other_data(knobs.reward, knobs, feedback)
        return knobs.reward, {}
    beside = Path(knobs.out).parent / folder
    base = knobs.reference or knobs.init
    own = stage.Knobs(init=base, out=beside, **stages.earlier(knobs))
    return stages.stage_before(name, stage.main, own, feedback)


if __name__ == "__main__":
    cli.run_script(main, Knobs, __doc__)
