"""Rows of token ids out of feedback."""

import numpy as np

from minirlhf.engine.cli import UserError


def encode(texts, tokenizer, n_ctx, overlong="error"):
    """Rows `[EOS] prompt response EOS` of (prompt, response, where).

    Returns a list of int arrays, and the prompts' lengths (N,), the first EOS counted. A row
    longer than n_ctx is an error that names it; with overlong="truncate" its prompt loses its left
    end and then its response the right one, never an EOS, and the number of such rows is printed.
    """
    rows, prompt_lengths = [], []
    room = n_ctx - 2  # between the two EOS
    cut = 0
    for prompt, response, where in texts:
        p = tokenizer.encode(prompt)
        r = tokenizer.encode(response)
        if len(p) + len(r) > room:
            if overlong == "error":
                raise UserError(
                    f"{where}: {len(p)} prompt and {len(r)} response tokens with 2 EOS exceed the "
                    f"context of {n_ctx}; use a base model of a longer context (minirlhf.sft "
                    "--n-ctx), or --overlong truncate"
                )
            cut += 1
            r = r[:room]
            p = p[len(p) - (room - len(r)) :]
        rows.append(np.array([tokenizer.eos, *p, *r, tokenizer.eos]))
        prompt_lengths.append(1 + len(p))
    if cut:
        print(f"{cut} of {len(rows)} rows were cut to the context of {n_ctx} tokens")
    return rows, np.array(prompt_lengths)


def prompts_of(items, tokenizer, rng):
    """Prompts to continue, as rows of ids with their leading EOS.

    They are the distinct prompts of the items, or, where they have none, the first 4 to 8 tokens
    of each response (half of it at most).
    """
    rows = []
    distinct = dict.fromkeys(prompt for prompt in items.prompts if prompt)
    for prompt in distinct:
        rows.append(np.array([tokenizer.eos, *tokenizer.encode(prompt)]))
    if rows:
        return rows
    for response in items.responses:
        ids = tokenizer.encode(response)
        if ids:
            n = min(rng.integers(4, 9), max(1, len(ids) // 2))
            rows.append(np.array([tokenizer.eos, *ids[:n]]))
    return rows


def fit(prompts, room, overlong):
    """Prompts that leave room for the response.

    A longer one is an error, or with overlong="truncate" loses its left end but for the EOS.
    """
    if room < 1:
        excess = f"{1 - room} tokens or more"
        raise UserError(f"--response-length: prompt and response exceed the context by {excess}")
    if not prompts:
        raise UserError("the data hold no text to take prompts from")
    long = [row for row in prompts if len(row) > room]
    if not long:
        return list(prompts)
    if overlong != "truncate":
        n = len(long[0])
        raise UserError(
            f"a prompt of {n} tokens and a response of --response-length exceed the context by "
            f"{n - room} tokens: shorten the responses, or use --overlong truncate"
        )
    print(
        f"{len(long)} of {len(prompts)} prompts lost their left end to leave room for the response"
    )
    fitting = []
    for row in prompts:
        if len(row) > room:
            row = np.concatenate([row[:1], row[len(row) - room + 1 :]])
        fitting.append(row)
    return fitting
