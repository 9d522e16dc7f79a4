"""Rated text of other kinds, read before what is tested on: its words have a meaning from there.

The reviews are snippets, and come with 13,098 sentences of three other kinds, which the same people
rated and on which nothing is tested.
"""

from minirlhf import data
from minirlhf.engine.rows import Rows


def further_first(knobs, feedback, base, tokenizer, rng, items, rows, plan):
    """(items, rows, first, plan): the source's further rated text stands behind the items, and
    `first` are --text-epochs passes over it, in which it is compared with itself alone."""
    if not knobs.text_epochs or not feedback.more_ratings:
        return items, rows, [], plan
    n = len(items)
    more = feedback.further().some(knobs.share, knobs.seed)
    more, *encoded = data.encode_items(more, tokenizer, base.config.n_ctx, "truncate")
    first = []
    for _ in range(knobs.text_epochs):
        for batch in more.epoch(knobs.batch_size, rng):
            first.append(batch._replace(rows=n + batch.rows))
    both = data.Items(
        prompts=items.prompts + more.prompts,
        responses=items.responses + more.responses,
        where=items.where + more.where,
        ratings=items.ratings + more.ratings,
    )
    return both, rows.joined(Rows(*encoded, rows.pad, rows.device)), first, plan
