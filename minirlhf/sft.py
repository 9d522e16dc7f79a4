"""Stage 0: the base language model, trained on the next token.   python -m minirlhf.sft

    python -m minirlhf.sft                       # laptop, 2 cores: the reviews, about 1 1/2 minutes
    python -m minirlhf.sft --data my.jsonl --init gpt2 --overlong truncate --n-ctx 512 --dtype bfloat16 --lr 1e-4   # GPU
    torchrun --nproc-per-node 8 -m minirlhf.sft --shard    # many GPUs; a run that was stopped goes on with --resume

Reads text, learns a tokenizer on it (or takes that of --init), and trains a GPT on rows `[EOS] prompt response EOS`, the prompt
included. The further text of a source takes part in the first --text-epochs. Leaves runs/sft.

Left out: packing rows into one, held-out early stopping.
"""

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from minirlhf import data
from minirlhf.engine import cli, machine, optim, parallel
from minirlhf.engine.cli import UserError, knob
from minirlhf.engine.files import finished
from minirlhf.engine.log import Run
from minirlhf.engine.rows import bucketed, pad_rows
from minirlhf.engine.weights import model_directory
from minirlhf.gpt import GPT, GPTConfig, compile_trunks
from minirlhf.kernels import token_logprobs
from minirlhf.look.answers import answers
from minirlhf.tokenizer import Tokenizer, load_tokenizer

OVERLONG = ("", "error", "truncate")


@dataclass(kw_only=True)
class Knobs(cli.RunKnobs):
    data: str = knob("reviews", "source of text: reviews, toy, a .jsonl[.gz] path, or hub:OWNER/NAME/FILE", free=True)
    init: str = knob("", "model to start from: a run, a model directory or a name on the hub; none: fresh weights", free=True)
    out: str = knob("runs/sft", "run directory", free=True)
    vocab_size: int = knob(8192, "tokens to train when fresh, EOS included; the toy language has 257: the bytes alone", least=1)
    n_ctx: int = knob(64, "context in tokens, when fresh", least=1)
    n_layer: int = knob(4, "blocks, when fresh", least=1)
    n_head: int = knob(4, "attention heads, when fresh", least=1)
    n_embd: int = knob(128, "width, when fresh", least=1)
    overlong: str = knob("", "rows longer than the context: error, or truncate (the default for the reviews)", OVERLONG)
    epochs: int = knob(2, "passes over the responses", least=1)
    text_epochs: int = knob(1, "how many of these passes include the source's further text")
    batch_size: int = knob(32, "rows a step", least=1)
    micro_batch: int = knob(0, "rows in memory at a time, their gradients added up; 0: all", free=True)
    lr: float = knob(1e-3, "peak learning rate: 5 % warm-up, then linear to 0")
    embedding_lr: float = knob(4.0, "learning rate of the token embeddings, as a multiple of --lr", least=1e-6)
    weight_decay: float = knob(0.1, "AdamW decay of matrices")


@cli.contained
def main(knobs):
    device = parallel.start(knobs.device)
    autocast = machine.precision(device, knobs.dtype)
    feedback = data.load_feedback(knobs.data)
    rng = machine.seed_everything(knobs.seed)

    # Data: rows of token ids; the responses first, then the further text
    texts = feedback.texts()
    n_responses = len(texts) - len(feedback.more_text)
    source = Path(model_directory(knobs.init)) if knobs.init else None
    if source:
        tokenizer, model = load_tokenizer(source), GPT.from_pretrained(source)
    else:
        vocab_size = min(knobs.vocab_size, 257) if knobs.data == "toy" else knobs.vocab_size
        tokenizer = Tokenizer.train((prompt + response for prompt, response, _ in texts), vocab_size)
        model = GPT(GPTConfig(tokenizer.vocab_size, knobs.n_ctx, knobs.n_layer, knobs.n_head, knobs.n_embd))
    model.to(device)
    overlong = overlong_rule(knobs.overlong, knobs.data)
    rows, _ = data.encode(texts, tokenizer, model.config.n_ctx, overlong)
    lengths = np.array([len(row) for row in rows])
    test = feedback.test
    held_out, _ = data.encode(zip(test.prompts, test.responses, test.where, strict=True), tokenizer, model.config.n_ctx, overlong)

    plan = []  # every batch of every epoch, so that the schedule knows the number of steps
    for epoch in range(knobs.epochs):
        part = len(rows) if epoch < knobs.text_epochs else n_responses
        plan += bucketed(lengths[:part], knobs.batch_size, rng)
    n_parameters = sum(p.numel() for p in model.parameters()) / 1e6
    if knobs.compile:
        compile_trunks(model)
    if knobs.shard:
        parallel.shard(model)
    trained = parallel.Together(model)
    optimizer = optim.make_optimizer(trained, knobs.lr, weight_decay=knobs.weight_decay, embedding_lr=knobs.embedding_lr)
    run = Run("sft", knobs, plan, device, tokenizer, {"model": trained, "optimizer": optimizer}, {"data": rows, "init": source})
    run.say(f"base model: {n_parameters:.2f} M parameters, vocabulary {tokenizer.vocab_size}, {lengths.sum():,} tokens of text")

    # Loop
    for step, batch in run.steps():
        optim.set_lr(optimizer, step, len(plan), knobs.lr)
        batch = [rows[i] for i in batch]
        loss = add_gradient(trained, batch, knobs.micro_batch, tokenizer.pad, autocast, device)
        loss, norm = optim.optimizer_step(optimizer, knobs.max_grad_norm, loss, partial(run.nonfinite, step, batch))
        run.log(step, {"loss": loss, "grad_norm": norm}, show=("loss",))

    # Evaluation
    figures = evaluate(model, held_out, tokenizer, autocast, device)
    run.close()
    length = min(24, model.config.n_ctx // 2)
    prompts = data.fit(data.prompts_of(test, tokenizer, rng)[:64], model.config.n_ctx - length, "truncate")
    texts = answers(model, model, None, prompts, tokenizer, length, 1.0, autocast, knobs.seed)
    run.samples([{"prompt": a.prompt, "response": a.response} for a in texts])
    model.save_pretrained(run.out / "model", tokenizer)
    summary = run.finish(figures | {"data": knobs.data})
    print(f"base model: perplexity {figures['eval/perplexity']:.1f} on {len(held_out)} held-out texts, "
          f"{figures['eval/bits_per_byte']:.3f} bits a byte; {summary['seconds']:.0f} s; left in {run.out}")  # fmt: skip
    return summary


def row_logprobs(model, tokens, lengths):
    """Log-probs of every token after the first of right-padded rows (B, T), as one flat vector without padding."""
    real = torch.arange(tokens.shape[1] - 1, device=tokens.device) < lengths[:, None] - 1  # (B, T-1)
    return token_logprobs(model.hidden(tokens[:, :-1], lengths=lengths - 1)[real], model.lm_head_weight, tokens[:, 1:][real])


def add_gradient(trained, rows, micro_batch, pad, autocast, device):
    """The mean loss of all tokens of the rows, after the backward pass of `micro_batch` rows at a time; 0: all."""
    model, n_tokens, loss = trained[0], sum(len(row) - 1 for row in rows), torch.zeros((), device=device)
    mine, counts = parallel.share(len(rows))
    size = micro_batch or len(mine)
    for start in range(0, len(mine), size):
        tokens, lengths = pad_rows([rows[i] for i in mine[start : start + size]], pad, device)
        with autocast:
            logprobs = row_logprobs(model, tokens, lengths)
        real = torch.as_tensor(counts[start : start + size], device=device).repeat_interleave(lengths - 1)
        part = -(logprobs * real).sum() / n_tokens
        trained.backward(part, last=start + size >= len(mine))
        loss += part.detach()
    return parallel.total(loss)


@torch.no_grad()
def evaluate(model, rows, tokenizer, autocast, device):
    """Perplexity a token and bits a byte of text, EOS counted among the tokens."""
    model.eval()
    total, n_tokens = torch.zeros((), device=device, dtype=torch.float64), sum(len(row) - 1 for row in rows)
    mine, counts = parallel.share(len(rows))
    for start in range(0, len(mine), 64):
        tokens, lengths = pad_rows([rows[i] for i in mine[start : start + 64]], tokenizer.pad, device)
        with autocast:
            logprobs = row_logprobs(model, tokens, lengths)
        total -= logprobs[torch.as_tensor(counts[start : start + 64], device=device).repeat_interleave(lengths - 1)].double().sum()
    total = parallel.total(total).item()
    model.train()
    n_bytes = sum(len(tokenizer.decode(row).encode()) for row in rows)
    return {"eval/perplexity": math.exp(total / n_tokens), "eval/bits_per_byte": total / math.log(2) / n_bytes}


def overlong_rule(given, source):
    return given or ("truncate" if source == "reviews" else "error")


def stage_before(name, main, knobs):
    """The model directory that an earlier stage left at knobs.out, made now with its defaults when it is missing.

    Raises UserError when what lies there was made from other data.
    """
    summary = finished(knobs.out)
    if summary is None:
        print(f"no {name} in {knobs.out}: making it now with the defaults of that stage", flush=True)
        summary = main(knobs)
    if summary["data"] != knobs.data:
        raise UserError(f"{knobs.out} was made from --data {summary['data']}, not {knobs.data}: give an --out in another "
                        f"folder (its earlier stages lie beside it), or name the model with a flag")  # fmt: skip
    return Path(knobs.out) / "model", summary


def earlier(knobs):
    """The knobs that a stage made on the way has from the one that needs it."""
    return {key: getattr(knobs, key) for key in ("data", "overlong", "seed", "device", "dtype", "resume", "on_nonfinite", "shard")}


def keep_apart(source, out):
    """Raises UserError where a run would write over what it starts from, or where `out` cannot be a folder."""
    if Path(out).is_file() or Path(source).resolve().is_relative_to(Path(out).resolve()):
        raise UserError(f"--out {out}: {'a file' if Path(out).is_file() else 'what this run starts from lies there'}; give another folder")


def base_model(knobs):
    """The model directory of a script's base model: --init, or else the run `sft` beside --out."""
    keep_apart(knobs.init or Path(knobs.out).parent / "sft", knobs.out)
    if knobs.init:
        return model_directory(knobs.init)
    own = Knobs(out=str(Path(knobs.out).parent / "sft"), **earlier(knobs))
    return stage_before("base model", main, own)[0]


if __name__ == "__main__":
    cli.run_script(main, Knobs, __doc__)
