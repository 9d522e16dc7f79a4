"""What policies answer now: sampled replies with the numbers of each token.

Left out: beam search; top-p, which sampling.py leaves out.
"""

from typing import NamedTuple

import numpy as np
import torch

from minirlhf.engine.cli import UserError
from minirlhf.engine.rows import pad_rows
from minirlhf.look.answers import distinct_bigrams
from minirlhf.look.policies import prompt_rows
from minirlhf.look.terminal import Piece, pieces_of
from minirlhf.sampling import generate, response_logprobs


class Reply(NamedTuple):
    """A response to a prompt, and what is known of it."""

    prompt: str
    text: str
    prompt_ids: list[int]  # with the leading EOS
    ids: list[int]
    pieces: list[Piece]
    kl: float  # the sum of the log-ratios, nan without a reference
    ended: bool
    score: float = float("nan")


class Sampling(NamedTuple):
    """How to sample; None for what is each run's own."""

    length: int
    temperature: float | None = None
    top_k: int = 0
    seed: int = 0
    n: int = 1  # replies to a prompt

    def of(self, policy):
        """The temperature for a policy."""
        if self.temperature is not None:
            return self.temperature
        return policy.knobs.get("temperature", 1.0)


@torch.no_grad()
def replies(policy, texts, sampling, say=print):
    """n Replies to each prompt, in turn. With a run's own settings they are those of its
    samples.jsonl: the noise is of the seed and of the row."""
    length, pad = sampling.length, policy.tokenizer.pad
    room = policy.model.config.n_ctx - length
    if room < 1:
        problem = f"{policy.name} has a context of {policy.model.config.n_ctx} tokens"
        raise UserError(f"--response-length {length}: {problem}, of which a prompt needs one")
    rows, cuts = prompt_rows(texts, policy.tokenizer, room)
    if cuts:
        count = "the prompt has" if len(texts) == 1 else f"{cuts} of {len(texts)} prompts have"
        say(f"note: {count} lost the left end: the context of {policy.name} holds {room} tokens of "
            f"prompt and {length} of response")  # fmt: skip
    rows = [row for row in rows for _ in range(sampling.n)]
    generator = torch.Generator().manual_seed(sampling.seed)
    device, found = policy.model.lm_head_weight.device, []
    for start in range(0, len(rows), 128):
        batch = pad_rows(rows[start : start + 128], pad, device)
        found += answer(policy, batch, sampling, generator)
    texts = [text for text in texts for _ in range(sampling.n)]
    return [reply._replace(prompt=text) for reply, text in zip(found, texts, strict=True)]


def answer(policy, batch, sampling, generator):
    """Replies to a batch of prompts (B, Q), lengths (B,)."""
    tokenizer, temperature = policy.tokenizer, sampling.of(policy)
    options = {"eos": tokenizer.eos, "pad": tokenizer.pad, "temperature": temperature}
    options |= {"top_k": sampling.top_k or None, "generator": generator}
    tokens, p, r, _ = generate(policy.model, *batch, sampling.length, **options)
    scale = temperature or 1.0  # at 0 the likeliest token is taken, with its log-prob at 1
    read = tokens, p, r, sampling.length, scale
    logprobs = response_logprobs(policy.model, *read)  # (B, R)
    ratios = None
    if policy.reference:
        ratios = (logprobs - response_logprobs(policy.reference, *read)).tolist()
    found = []
    rows = zip(tokens.tolist(), p.tolist(), r.tolist(), logprobs.tolist(), strict=True)
    for i, (ids, start, n, logs) in enumerate(rows):
        own = ids[start : start + n]
        ratio = ratios[i][:n] if ratios else None
        pieces = pieces_of(own, logs[:n], ratio, tokenizer)
        kl = sum(ratio) if ratios else float("nan")
        text, ended = tokenizer.decode(own), own[-1] == tokenizer.eos
        found.append(Reply("", text, ids[:start], own, pieces, kl, ended))
    return found


def figures(found):
    """Means over replies, by name; nan for what is not known."""
    scores = np.array([reply.score for reply in found])
    return {
        "score": mean(scores),
        "+-": standard_error(scores),
        "KL": mean([reply.kl for reply in found]),
        "tokens": mean([len(reply.ids) for reply in found]),
        "ended": mean([reply.ended for reply in found]),
        "bigrams": distinct_bigrams([reply.text for reply in found]),
    }


def mean(values):
    return float(np.mean(values))


def standard_error(values):
    """Of the mean of independent values; nan of a single one."""
    if len(values) < 2:
        return float("nan")
    return float(np.std(values, ddof=1) / len(values) ** 0.5)
