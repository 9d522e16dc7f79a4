"""Rows of token ids out of feedback."""

import numpy as np

from minirlhf.data.items import places
from minirlhf.data.split import connected
from minirlhf.engine.cli import UserError
from minirlhf.engine.rows import cut_left


def encode(texts, tokenizer, n_ctx, overlong="error", together=None):
    """Rows `[EOS] prompt response EOS` of (prompt, response, where).

    Returns a list of int arrays, and the prompts' lengths (N,), the first EOS counted. A row
    longer than n_ctx is an error that names it; with overlong="truncate" its prompt loses its left
    end and then its response the right one, never an EOS, and the number of such rows is printed.
    `together` are lists of rows that answer one prompt and are compared: theirs is cut to what the
    longest of the responses leaves, for all alike.
    """
    encoded = [(tokenizer.encode(p), tokenizer.encode(r), where) for p, r, where in texts]
    room = n_ctx - 2  # between the two EOS
    if room < 1:
        raise UserError(f"a context of {n_ctx} has no room between two EOS: expected 3 or more")
    left = [room - min(len(r), room) for _, r, _ in encoded]  # for the prompt
    for rows in together or ():
        least = min(left[i] for i in rows)
        for i in rows:
            left[i] = least
    rows, prompt_lengths, cut = [], [], []
    for (p, r, where), space in zip(encoded, left, strict=True):
        fits = len(r) <= room and len(p) <= space
        if not fits and overlong == "error":
            raise UserError(
                f"{where}: {len(p)} prompt and {len(r)} response tokens with 2 EOS exceed the "
                f"context of {n_ctx}; use a base model of a longer context (minirlhf.sft "
                "--n-ctx), or --overlong truncate"
            )
        if not fits:
            cut.append(where)
        p, r = p[max(0, len(p) - space) :], r[:room]
        rows.append(np.array([tokenizer.eos, *p, *r, tokenizer.eos]))
        prompt_lengths.append(1 + len(p))
    if cut:
        print(
            f"{len(cut)} of {len(rows)} rows were cut to the context of {n_ctx} tokens, first that "
            f"of {cut[0]}"
        )
    return rows, np.array(prompt_lengths)


def encode_items(items, tokenizer, n_ctx, overlong="error"):
    """(items, rows, prompt lengths): what is compared is cut together.

    Responses that are the same tokens after the cut are one: in a comparison the first alone
    stays, rated ones have the ratings of both. A comparison of which nothing stays is left out,
    and counted; labels of many kinds stay as they are. Raises UserError where no comparison is
    left.
    """
    texts = zip(items.prompts, items.responses, items.where, strict=True)
    sets = compared_sets(items)
    rows, lengths = encode(texts, tokenizer, n_ctx, overlong, sets)
    keys = [(p, tuple(row)) for row, p in zip(rows, lengths.tolist(), strict=True)]
    if len(set(keys)) < len(keys) and items.labels is None:
        items, kept = without_equals(items, keys, sets, n_ctx)
        rows, lengths = [rows[i] for i in kept], lengths[kept]
    return items, rows, lengths


def compared_sets(items):
    """Lists of items that answer one prompt and are compared with each other."""
    if items.groups or items.labels is not None:
        in_groups = {i: set() for i in range(len(items))}
        for g, group in enumerate(items.statements()):
            for i in group:
                in_groups[i].add(g)
        return connected([in_groups[i] or {("alone", i)} for i in range(len(items))])
    return [same for same in places(items.prompts).values() if items.prompts[same[0]]]


def without_equals(items, keys, sets, n_ctx):
    """(the items, and the comparisons of them, that differ in their keys; their old indices)."""
    set_of = {i: number for number, members in enumerate(sets) for i in members}
    owner = {}  # (set, key): the first item of it
    first = [owner.setdefault((set_of.get(i, -1), key), i) for i, key in enumerate(keys)]
    for i, k in enumerate(first):
        if items.responses[i] == items.responses[k]:  # two reviews may be the same words
            first[i] = i
    groups, margins, gone = [], [], 0
    for g, group in enumerate(items.groups):
        group = list(dict.fromkeys(first[i] for i in group))
        gone += len(group) < 2
        if len(group) > 1:
            groups.append(group)
            margins.append(items.margins[g] if items.margins else 0.0)
    if gone:
        print(f"{gone} comparisons are of equal rows in a context of {n_ctx} tokens: left out")
    if items.groups and not groups:
        problem = f"no two responses differ within the context of {n_ctx} tokens"
        raise UserError(f"{items.where[0]} and on: {problem}")
    used = set().union(*groups) if groups else set(first)
    kept = [i for i in range(len(items)) if i in used]
    fewer = items.take_items(kept, groups)
    fewer.margins = margins if items.margins else None
    if items.ratings is not None:
        same = places(first)
        fewer.ratings = [np.concatenate([items.ratings[i] for i in same[k]]) for k in kept]
        merged = len(items) - len(fewer)
        if merged:
            what = "rated responses are the same tokens as another"
            print(f"{merged} {what} in a context of {n_ctx}: merged")
    return fewer, kept


def prompts_of(items, tokenizer, rng):
    """Prompts to continue, as rows of ids with their leading EOS.

    They are the distinct prompts of the items, and of items that have none the first 4 to 8 tokens
    of the response (half of it at most).
    """
    rows = []
    for prompt in dict.fromkeys(prompt for prompt in items.prompts if prompt):
        rows.append(np.array([tokenizer.eos, *tokenizer.encode(prompt)]))
    for prompt, response in zip(items.prompts, items.responses, strict=True):
        ids = tokenizer.encode(response) if not prompt else []
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
            row = np.concatenate([row[:1], cut_left(row[1:], room)])
        fitting.append(row)
    return fitting


def training_prompts(feedback, tokenizer, room, knobs, rng):
    """The prompts that a policy answers while it learns, in the order of the rng."""
    seen = prompts_of(feedback.train, tokenizer, rng)
    return fit(seen, room, knobs.overlong)


def held_out_prompts(feedback, tokenizer, room, knobs):
    """The prompts that a script answers before and after: --eval-samples held-out ones."""
    unseen = prompts_of(feedback.test, tokenizer, np.random.default_rng(1))
    return fit(unseen, room, knobs.overlong)[: knobs.eval_samples]
