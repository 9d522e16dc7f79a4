"""ConvexDA: misspelt copies of responses as further training examples, those that differ most.

Shen et al. 2023: of n noisy copies of a response, embedded and projected on their two principal
axes, the vertices of the convex hull are kept, with the response's own label. In the authors'
release all rows of a pair hold the last vertex, as they share one dict; here each is another text.

Left out: a pass over all copies, which would make training several times as long. An epoch still
meets each response once, in a form that is drawn from the original and its copies, both sides of a
comparison alike: so do more epochs what more passes would.
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
    u, sizes, _ = np.linalg.svd(embeddings - embeddings.mean(0), full_matrices=False)
    sizes[sizes <= 1e-9 * np.abs(embeddings).max()] = 0  # rounding, which is no second dimension
    plane = np.zeros((len(embeddings), 2))
    plane[:, : len(sizes[:2])] = (u * sizes)[:, :2]
    return hull(plane)


def hull(points):
    """Indices, ascending, of the vertices of the convex hull of points (N, 2): the monotone chain
    of Andrew (1979)."""
    tiny = 1e-9 * np.abs(points).max(initial=0)
    rounded = np.round(points / tiny) if tiny else points
    _, first = np.unique(rounded, axis=0, return_index=True)  # by x, then by y
    if len(first) < 3:
        return sorted(first.tolist())
    lower, upper = chain(points, first, tiny), chain(points, first[::-1], tiny)
    return sorted({*lower, *upper})


def chain(points, order, tiny):
    """The half of the hull on which `order` turns left only."""
    kept = []
    for i in order.tolist():
        while len(kept) > 1 and not turns_left(*points[[*kept[-2:], i]], tiny):
            kept.pop()
        kept.append(i)
    return kept


def turns_left(a, b, c, tiny):
    """Whether the way from a by b to c turns left, b more than `tiny` off the straight one."""
    (x, y), (u, v) = b - a, c - a
    return x * v - y * u > tiny * np.hypot(u, v)


def augmented(augment, items, rows, plan, base, tokenizer, rng, n=5):
    """(items, rows, plan) with the copies that ConvexDA keeps of `n` of each response; without
    --augment as they are.

    They stand behind the N items and rows, with prompt, ratings and origin of their response. Each
    data.Compared of the plan has a form of each response in its place, drawn with equal chances. A
    copy that is too long for the context loses its end. `base` is the GPT that embeds.
    """
    if not augment:
        return items, rows, plan
    texts = distinct_copies(items.responses, rng, n)
    origins = np.repeat(np.arange(len(items)), [len(copies) for copies in texts])
    texts = [copy for copies in texts for copy in copies]
    copies = copied_rows(rows, origins, texts, tokenizer, base.config.n_ctx)
    kept = vertices(embed_rows(base, copies).numpy(), origins)
    print(f"ConvexDA: {len(kept):,} misspelt copies of {len(items):,} responses")

    forms = [[i] for i in range(len(items))]
    for place, copy in enumerate(kept, start=len(items)):
        forms[origins[copy]].append(place)
    drawn = []
    for batch in plan:
        chosen = [forms[i][rng.integers(len(forms[i]))] for i in batch.rows]
        drawn.append(batch._replace(rows=np.array(chosen)))
    more = items.take_items([*range(len(items)), *origins[kept]], [])
    more.responses[len(items) :] = [texts[copy] for copy in kept]
    tokens = rows.tokens + [copies.tokens[copy] for copy in kept]
    prompt_lengths = np.append(rows.prompt_lengths, copies.prompt_lengths[kept])
    return more, rows._replace(tokens=tokens, prompt_lengths=prompt_lengths), drawn


def distinct_copies(texts, rng, n):
    """Of each text the misspelt copies among n that differ, a list."""
    noisy = perturbed([text for text in texts for _ in range(n)], rng)
    found = []
    for i, text in enumerate(texts):
        copies = dict.fromkeys(noisy[i * n : (i + 1) * n])
        found.append([copy for copy in copies if copy != text])
    return found


def copied_rows(rows, origins, texts, tokenizer, n_ctx):
    """Rows of texts in the place of the responses of the rows `origins`, with their prompts."""
    tokens, prompt_lengths = [], rows.prompt_lengths[origins]
    for origin, p, text in zip(origins, prompt_lengths, texts, strict=True):
        response = tokenizer.encode(text)[: n_ctx - p - 1]
        tokens.append(np.array([*rows.tokens[origin][:p], *response, tokenizer.eos]))
    return rows._replace(tokens=tokens, prompt_lengths=prompt_lengths)


def vertices(embeddings, origins):
    """Indices of the embeddings (M, C) that convex_da keeps among those of one origin; origins
    (M,) ascend."""
    kept = []
    for own in np.split(np.arange(len(origins)), np.flatnonzero(np.diff(origins)) + 1):
        if len(own):
            kept += own[convex_da(embeddings[own])].tolist()
    return kept
