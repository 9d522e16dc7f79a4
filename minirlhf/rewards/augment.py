"""ConvexDA: misspelt copies of responses as further training examples, those that differ most.

Shen et al. 2023 (arXiv 2309.16155): of n noisy copies of a response, embedded and projected on
their two principal axes, the vertices of the convex hull are kept, with the response's own label.
In the authors' release all rows of a pair hold the last vertex, as they share one dict; here each
is another text.

Left out: a pass over all copies, which would make training several times as long. An epoch meets
each response once, in a form that is drawn from the original and its copies, each side of a
comparison by itself; more epochs do what more passes would.
"""

import numpy as np

from minirlhf.rewards.consistency import perturbed
from minirlhf.rewards.embedding import embed_rows


def convex_da(embeddings):
    """Indices, ascending, of the vertices of the convex hull of embeddings (N, C) in the plane of
    their two principal axes.

    Of equal points the first counts, and of points on a line its two ends. The signs of the axes,
    which an SVD leaves open, do not matter.
    """
    embeddings = np.asarray(embeddings, dtype=float)
    centred = embeddings - embeddings.mean(0)
    places, sizes, _ = np.linalg.svd(centred, full_matrices=False)
    rounding = 1e-9 * np.abs(embeddings).max()
    sizes[sizes <= rounding] = 0  # no second dimension
    along_axes = places * sizes
    plane = np.zeros((len(embeddings), 2))
    plane[:, : len(sizes[:2])] = along_axes[:, :2]
    return hull(plane)


def hull(points):
    """Indices, ascending, of the vertices of the convex hull of points (N, 2): the monotone chain
    of Andrew (1979)."""
    tiny = 1e-9 * np.abs(points).max()
    rounded = np.round(points / tiny) if tiny else points
    _, first = np.unique(rounded, axis=0, return_index=True)  # by x, then by y
    if len(first) < 3:
        return sorted(first.tolist())
    lower = chain(points, first, tiny)
    upper = chain(points, first[::-1], tiny)
    return sorted({*lower, *upper})


def chain(points, order, tiny):
    """The half of the hull on which `order` turns left only."""
    kept = []
    for i in order.tolist():
        while len(kept) > 1:
            before, last = points[kept[-2:]]
            if turns_left(before, last, points[i], tiny):
                break
            kept.pop()
        kept.append(i)
    return kept


def turns_left(a, b, c, tiny):
    """Whether the way from a by b to c turns left, b more than `tiny` off the straight one."""
    x, y = b - a
    u, v = c - a
    area = x * v - y * u
    return area > tiny * np.hypot(u, v)


# In training


def augmented(augment, items, rows, plan, base, tokenizer, rng, n=5):
    """(items, rows, plan) with the copies that ConvexDA keeps of `n` of each response; without
    --augment as they are.

    They stand behind the N items and rows, with prompt, ratings and origin of their response. Each
    data.Compared of the plan has a form of each response in its place, drawn with equal chances. A
    copy that is too long for the context loses its end. `base` is the GPT that embeds.
    """
    if not augment:
        return items, rows, plan
    texts, origins = distinct_copies(items.responses, rng, n)
    copies = copied_rows(rows, origins, texts, tokenizer, base.config.n_ctx)
    embeddings = embed_rows(base, copies).numpy()
    kept = vertices(embeddings, origins)
    print(f"ConvexDA: {len(kept):,} misspelt copies of {len(items):,} responses")

    texts = [texts[i] for i in kept]
    copies, origins = copies.take(kept), origins[kept]
    forms = [[i] for i in range(len(items))]
    for place, origin in enumerate(origins, start=len(items)):
        forms[origin].append(place)
    plan = [in_some_form(batch, forms, rng) for batch in plan]
    return with_copies(items, origins, texts), rows.joined(copies), plan


def distinct_copies(texts, rng, n):
    """(the misspelt copies among n of each text that differ, the index (M,) of the text of each,
    ascending)."""
    copies, origins = [], []
    for origin, text in enumerate(texts):
        found = dict.fromkeys(perturbed([text] * n, rng))
        found.pop(text, None)
        copies += found
        origins += [origin] * len(found)
    return copies, np.array(origins, dtype=int)


def copied_rows(rows, origins, texts, tokenizer, n_ctx):
    """Rows of texts in the place of the responses of the rows `origins`, with their prompts."""
    tokens = []
    prompt_lengths = rows.prompt_lengths[origins]
    for origin, p, text in zip(origins, prompt_lengths, texts, strict=True):
        prompt = rows.tokens[origin][:p]
        room = n_ctx - p - 1  # before the EOS
        response = tokenizer.encode(text)[:room]
        row = np.array([*prompt, *response, tokenizer.eos])
        tokens.append(row)
    return rows._replace(tokens=tokens, prompt_lengths=prompt_lengths)


def vertices(embeddings, origins):
    """Indices of the embeddings (M, C) that convex_da keeps among those of one origin."""
    starts = np.flatnonzero(np.diff(origins)) + 1
    groups = np.split(np.arange(len(origins)), starts)
    kept = []
    for group in filter(len, groups):
        own = convex_da(embeddings[group])
        kept += group[own].tolist()
    return kept


def in_some_form(batch, forms, rng):
    """A data.Compared with one of the forms (a list of items each) of its responses."""
    rows = []
    for i in batch.rows:
        which = rng.integers(len(forms[i]))
        rows.append(forms[i][which])
    return batch._replace(rows=np.array(rows))


def with_copies(items, origins, texts):
    """The items, and behind them those of the origins with other texts."""
    n = len(items)
    more = items.take_items([*range(n), *origins], [])
    more.responses[n:] = texts
    return more
