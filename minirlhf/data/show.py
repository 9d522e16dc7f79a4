"""What will be read: the figures of a source, what looks suspicious in it, and its rows.

Left out: what a base model reads besides the rows; suspicions that need a model.
"""

import math
import re
import textwrap
from collections import Counter

import numpy as np

from minirlhf.data.rows import encode_items
from minirlhf.data.split import plain, seen_in_training

LARGEST_LIST = 256  # of rated answers to one prompt, for what each is preferred to


def encoded(feedback, tokenizer, n_ctx, overlong):
    """{side: (items, rows of ids, prompt lengths)} as training reads them."""
    sides = {"train": feedback.train, "test": feedback.test}
    return {name: rows_of(items, tokenizer, n_ctx, overlong) for name, items in sides.items()}


def rows_of(items, tokenizer, n_ctx, overlong):
    if items.columns is None:
        return encode_items(items, tokenizer, n_ctx, overlong)
    rows = [np.array([tokenizer.eos, *tokenizer.encode(prompt)]) for prompt in items.prompts]
    return items, rows, np.array([len(row) for row in rows])


# Figures


def figures(feedback, sides, tokenizer, n_ctx):
    """{name: figure} of what was read, merged, split and cut."""
    found = dict(feedback.counts)
    seen, of = seen_in_training(feedback)
    for side, (items, rows, prompt_lengths) in sides.items():
        whole = feedback.train if side == "train" else feedback.test
        lengths = np.array([len(row) for row in rows])
        found[side] = {
            "items": len(whole),
            "units": len(set(whole.units)) if whole.units else len(whole),
            "prompts": len(set(whole.prompts) - {""}),
            "comparisons": comparison_counts(whole),
            "comparisons_after_cut": comparison_counts(items),
            "rows": len(rows),
            "rows_at_the_context": int((lengths == n_ctx).sum()),
            "rows_over_the_context": over(whole, tokenizer, n_ctx),
            "prompts_cut_away": cut_away(items, prompt_lengths),
            "prompt_tokens": spread(prompt_lengths - 1),
            "response_tokens": spread(lengths - prompt_lengths),
        }
    found["test_texts_seen_in_training"] = seen
    found["share_seen"] = seen / max(1, of)
    found["n_ctx"], found["vocabulary"] = n_ctx, tokenizer.vocab_size
    if feedback.train.columns is None:
        texts = feedback.texts()
        found["base_model_texts"] = len(texts)
        found["base_model_tokens"] = sum(len(tokenizer.encode(p + r)) for p, r, _ in texts)
    found["fingerprint"] = feedback.fingerprint()
    return found


def over(items, tokenizer, n_ctx):
    """How many answers are longer, with their prompt and two EOS, than the context."""
    texts = zip(items.prompts, items.responses, strict=True)
    lengths = [len(tokenizer.encode(p)) + len(tokenizer.encode(r)) + 2 for p, r in texts]
    return sum(length > n_ctx for length in lengths)


def cut_away(items, prompt_lengths):
    """How many rows have nothing left of their prompt."""
    pairs = zip(items.prompts, prompt_lengths, strict=True)
    return sum(prompt != "" and int(length) == 1 for prompt, length in pairs)


def comparison_counts(items):
    """{kind of label or of comparison: how many}."""
    labels = Counter(label.kind for label in items.labels or ())
    if items.ratings is None:
        sizes = Counter(map(len, items.groups))
        kinds = dict(sorted(labels.items())) | {"pairs": sizes[2]}
        kinds |= {f"rankings of {n}": sizes[n] for n in sorted(sizes) if n > 2}
        return {kind: n for kind, n in kinds.items() if n}
    shared = [same for same in items.contexts(across=False) if items.prompts[same[0]]]
    without = sum(not prompt for prompt in items.prompts)
    alone = len(items) - without - sum(map(len, shared))
    counts = {"ratings": sum(map(len, items.ratings))}
    if items.thumbs:
        up = int(sum(ratings.sum() for ratings in items.ratings))
        counts = {"thumbs up": up, "thumbs down": counts["ratings"] - up}
    counts |= {
        "rated without prompt": without,
        "alone at their prompt": alone,
        "prompts of several": len(shared),
    }
    return {kind: n for kind, n in counts.items() if n}


def spread(lengths):
    """Least, median, and largest."""
    if not len(lengths):
        return [0, 0, 0]
    return [int(lengths.min()), int(np.median(lengths)), int(lengths.max())]


# What looks suspicious


def suspicious(feedback, found):
    """Sentences on what is likely not meant."""
    train, test = feedback.train, feedback.test
    texts = train.responses if train.columns is None else train.prompts
    signs = []
    if found["test_texts_seen_in_training"]:
        n = found["test_texts_seen_in_training"]
        signs.append(f"{n} of the test texts stand in training too: most of the source shares them")
    long = found["train"]["rows_over_the_context"] + found["test"]["rows_over_the_context"]
    if long:
        signs.append(
            f"{long} rows are longer than the context: training stops there, unless with "
            "--overlong truncate or a model of a longer context (minirlhf.sft --n-ctx)"
        )
    gone = found["train"]["prompts_cut_away"]
    if gone:
        signs.append(f"{gone} prompts are cut away: nothing is left of them beside their answers")
    if train.thumbs and not train.contexts(across=False):
        signs.append("no two answers share a prompt: of train_dpo's losses kto and una take these")
    near = near_duplicates(texts, test.responses if test.columns is None else test.prompts)
    if near:
        signs.append(f"{len(near)} test texts are nearly one in training, as {near[0][:50]!r}")
    first = Counter(text.split()[0] for text in texts if text.split()).most_common(1)
    if first and len(texts) >= 10 and first[0][1] > 0.9 * len(texts):
        signs.append(f"{first[0][1]} of {len(texts)} texts begin alike, with {first[0][0][:30]!r}")
    empty = sum(not text.strip() for text in texts)
    if empty:
        signs.append(f"{empty} of {len(texts)} texts are empty")
    signs += length_signs(train) + chance_signs(train, test)
    tokens = found.get("base_model_tokens", math.inf)
    if tokens < 20 * found["vocabulary"]:
        signs.append(
            f"{tokens:,} tokens of text are little for a vocabulary of {found['vocabulary']:,}: "
            "a base model trained on them alone writes noise; take one with --init"
        )
    return signs


def near_duplicates(train, test, share=0.8):
    """The test texts of which a training text has such a share of the runs of four words.

    Those that are equal are not among them, unless in case and signs.
    """
    where = {}
    for i, text in enumerate(train):
        for run in runs(text):
            where.setdefault(run, []).append(i)
    equal = set(map(plain, train))
    near = []
    for text in test:
        own = runs(text)
        shared = Counter(i for run in own for i in where.get(run, ())[:1000])
        if shared and max(shared.values()) >= share * len(own) and plain(text) not in equal:
            near.append(text)
    return near


def runs(text, n=4):
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


def decided(items, n=20_000):
    """(P, 2) of texts, the preferred first."""
    pairs = items.comparisons(n, seed=0)[0] if items.can_compare() else ()
    return [(items.responses[i], items.responses[j]) for i, j in pairs]


def length_signs(items):
    """Whether the longer answer is preferred much more, or much less, than half of the time."""
    lengths = [len(a) - len(b) for a, b in decided(items) if len(a) != len(b)]
    if len(lengths) < 20:
        return []
    longer = np.mean(np.array(lengths) > 0)
    if abs(longer - 0.5) < 0.2:
        return []
    return [f"the longer of two answers is preferred in {longer:.0%} of {len(lengths)} pairs"]


def chance_signs(train, test):
    """Whether words that win in training lose as often as not in the held-out part."""
    wins = Counter()
    for better, worse in decided(train):
        wins.update(set(better.lower().split()))
        wins.subtract(set(worse.lower().split()))
    votes = []
    for better, worse in decided(test):
        margin = sum(wins[w] for w in set(better.lower().split()))
        margin -= sum(wins[w] for w in set(worse.lower().split()))
        votes.append((np.sign(margin) + 1) / 2)
    if len(votes) < 100 or np.mean(votes) > 0.5 + 1 / math.sqrt(len(votes)):
        return []
    right = f"order {np.mean(votes):.2f} of {len(votes)} test pairs"
    return [f"labels may be chance: words that win in training {right}"]


# Rows


def row_lines(sides):
    """The lines of --rows: a dict of each row; `compared_with` are numbers of lines, from 0."""
    lines = []
    for side, (items, rows, prompt_lengths) in sides.items():
        better = preferred_to(items)
        first = len(lines)
        for i, (row, p) in enumerate(zip(rows, prompt_lengths, strict=True)):
            line = {"split": side, "unit": items.units[i] if items.units else str(i)}
            line |= {"prompt": items.prompts[i], "response": items.responses[i]}
            line |= {"tokens": row.tolist(), "prompt_length": int(p)} | said_of(items, i)
            if better is not None:
                line["compared_with"] = sorted(first + j for j in better[i])
            lines.append(line | {"where": items.where[i]})
    return lines


def said_of(items, i):
    """What people said of an item by itself."""
    if items.columns is not None:
        return {"columns": items.columns[i]}
    if items.ratings is None:
        return {}
    ratings = items.ratings[i].tolist()
    if items.thumbs and len(set(ratings)) == 1:
        return {"label": ratings[0] == 1}
    return {"ratings": ratings}


def preferred_to(items):
    """[the items that each is preferred to]; None where nothing is compared."""
    better = [set() for _ in range(len(items))]
    for group in items.groups:
        for k, i in enumerate(group):
            better[i].update(group[k + 1 :])
    if items.ratings is None:
        return better if items.groups else None
    means = items.means()
    for same in items.contexts(across=False):
        if items.prompts[same[0]] and len(same) <= LARGEST_LIST:
            for i in same:
                better[i].update(j for j in same if means[j] < means[i])
    return better if any(better) else None


# For people


def report(feedback, found, signs):
    """The figures as lines of at most 80 columns."""
    records = found.get("records", len(feedback.train) + len(feedback.test))
    lines = [f"{feedback.name}: {records:,} records"]
    for name in ("form", "kind", "keys", "unused", "merged"):
        if found.get(name):
            value = ", ".join(found[name]) if isinstance(found[name], list) else found[name]
            lines.append(f"  {TITLES[name]:<22} {value}")
    lines.append(f"  {'':<22} {'training':>16} {'held out':>16}")
    train, test = found["train"], found["test"]
    for key in ("items", "units", "prompts", "rows", "rows_at_the_context"):
        lines.append(f"  {TITLES[key]:<22} {train[key]:>16,} {test[key]:>16,}")
    for kind in {**train["comparisons"], **test["comparisons"]}:
        both = [side["comparisons"].get(kind, 0) for side in (train, test)]
        lines.append(f"  {kind:<22} {both[0]:>16,} {both[1]:>16,}")
        cut = [side["comparisons_after_cut"].get(kind, 0) for side in (train, test)]
        if cut != both:
            lines.append(f"  {'  after the cut':<22} {cut[0]:>16,} {cut[1]:>16,}")
    for key in ("prompt_tokens", "response_tokens"):
        cells = ["/".join(map(str, side[key])) for side in (train, test)]
        if cells[0] == "0/0/0":
            continue
        lines.append(f"  {TITLES[key]:<22} {cells[0]:>16} {cells[1]:>16}")
    seen = f"{found['test_texts_seen_in_training']} ({found['share_seen']:.1%})"
    lines.append(f"  {'test text in training':<22} {'':>16} {seen:>16}")
    if "base_model_texts" in found:
        read = f"{found['base_model_texts']:,} texts, {found['base_model_tokens']:,} tokens"
        lines.append(f"  {'a base model reads':<22} {read}")
    size = f"vocabulary {found['vocabulary']:,}, context {found['n_ctx']}"
    lines.append(f"  {'tokens':<22} {size}")
    for sign in signs:
        lines += textwrap.wrap(f"! {sign}", 78, initial_indent="  ", subsequent_indent="    ")
    return lines


TITLES = {
    "form": "form", "kind": "kind of record", "keys": "keys used", "unused": "keys not used",
    "merged": "said again, merged", "items": "answers", "units": "units of the split",
    "prompts": "prompts", "rows": "rows", "rows_at_the_context": "as long as the context",
    "prompt_tokens": "prompt: least/mid/most", "response_tokens": "answer: least/mid/most",
}  # fmt: skip


def tokens_table(name, sides, tokenizer, n=3, width=80):
    """The first rows of a source's training, token by token, at most `width` columns wide."""
    items, rows, prompt_lengths = sides["train"]
    better = preferred_to(items)
    lines = ["first rows; a bar ends a token, what a policy is trained on is marked >"]
    for i in range(min(n, len(rows))):
        said = said_of(items, i)
        place = items.where[i].removeprefix(f"{name}, ")
        notes = [place, *(f"{key} {value}" for key, value in said.items())]
        if better and better[i]:
            notes.append(f"preferred to {', '.join(f'#{j}' for j in sorted(better[i])[:6])}")
        lines.append(f"#{i}: " + "; ".join(notes)[: width - 10])
        p = prompt_lengths[i]
        lines += wrapped(rows[i][:p], tokenizer, "  prompt | ", width)
        lines += wrapped(rows[i][p:], tokenizer, "> answer | ", width)
    return lines


def wrapped(ids, tokenizer, margin, width):
    """Tokens with a bar behind each, over as many lines as they take."""
    lines, line = [], ""
    for i in ids.tolist():
        text = "<EOS>" if i == tokenizer.eos else repr(tokenizer.decode([i]))[1:-1]
        if line and len(margin) + len(line) + len(text) + 1 > width:
            lines.append(margin + line)
            line = ""
        line += text + "|"
    return [*lines, margin + line] if line else lines
