"""Rows of token ids out of feedback."""


import numpy as np

from minirlhf.engine.cli import UserError


def encode(texts, tokenizer, n_ctx, overlong="error"):
    """Rows `[EOS] prompt response EOS` of (prompt, response, where): a list of int arrays, and prompt lengths (N,), EOS counted.

    A row longer than n_ctx is an error that names it; with overlong="truncate" its prompt loses its left end and then its response the
    right one, never an EOS, and the number of such rows is printed.
    """
    rows, prompt_lengths, cut = [], [], 0
    for prompt, response, where in texts:
        p, r = tokenizer.encode(prompt), tokenizer.encode(response)
        if len(p) + len(r) + 2 > n_ctx:
            if overlong == "error":
                raise UserError(f"{where}: {len(p)} prompt and {len(r)} response tokens with 2 EOS exceed the context of {n_ctx}; "
                                "use a base model of a longer context (minirlhf.sft --n-ctx), or --overlong truncate")  # fmt: skip
            cut, r = cut + 1, r[: n_ctx - 2]
            p = p[len(p) - (n_ctx - 2 - len(r)) :]
        rows.append(np.array([tokenizer.eos, *p, *r, tokenizer.eos]))
        prompt_lengths.append(1 + len(p))
    if cut:
        print(f"{cut} of {len(rows)} rows were cut to the context of {n_ctx} tokens")
    return rows, np.array(prompt_lengths)


def prompts_of(items, tokenizer, rng):
    """Prompts to continue, as rows of ids with their leading EOS: the distinct prompts of the items, or, where they have none, the
    first 4 to 8 tokens of each response (half of it at most)."""
    distinct = list(dict.fromkeys(p for p in items.prompts if p))
    if distinct:
        return [np.array([tokenizer.eos, *tokenizer.encode(prompt)]) for prompt in distinct]
    rows = (tokenizer.encode(text) for text in items.responses)
    return [np.array([tokenizer.eos, *row[: min(rng.integers(4, 9), max(1, len(row) // 2))]]) for row in rows if row]


def fit(prompts, room, overlong):
    """Prompts that leave room for the response; a longer one is an error, or loses its left end but for the EOS."""
    if room < 1:
        raise UserError(f"--response-length: prompt and response exceed the context by {1 - room} tokens or more")
    if not prompts:
        raise UserError("the data hold no text to take prompts from")
    long = [row for row in prompts if len(row) > room]
    if long and overlong != "truncate":
        raise UserError(f"a prompt of {len(long[0])} tokens and a response of --response-length exceed the context by "
                        f"{len(long[0]) - room} tokens: shorten the responses, or use --overlong truncate")  # fmt: skip
    if long:
        print(f"{len(long)} of {len(prompts)} prompts lost their left end to leave room for the response")
    return [row if len(row) <= room else np.concatenate([row[:1], row[len(row) - room + 1 :]]) for row in prompts]
