"""How often scores order pairs as people do: a reward model, ridge regression and a person."""

import math

import torch

from minirlhf import data
from minirlhf.data import all_logps, stored_logps
from minirlhf.look.ridge import ridge_scores
from minirlhf.reward import pair_accuracy, share_positive

EDGES = (0, 0.5, 1, 2, 3, math.inf)  # of the gaps between two mean ratings


def accuracy_figures(train, test, ahead, pairs, gaps):
    """Figures of the summary, and a printed table of pair accuracy by the gap of the mean ratings.

    ahead (P,): how far the model has the first of each test pair (P, 2) before the second.
    """
    columns = {"reward model": ahead}
    figures = {"eval/accuracy": share_positive(ahead).item(), "eval/pairs": len(pairs)}
    rated = train.ratings is not None
    if rated:
        scores = ridge_scores(train, test)
        columns["ridge"] = scores[pairs[:, 0]] - scores[pairs[:, 1]]
        figures["eval/ridge_accuracy"] = share_positive(columns["ridge"]).item()
    human = data.human_ceiling(test, pairs)
    if not math.isnan(human):
        figures["eval/human_ceiling"] = human
    print_table(columns, human, test, pairs, gaps, EDGES if rated else ())
    return figures


def print_table(columns, human, items, pairs, gaps, edges):
    """A row for the pairs of each range of gaps, and one for all; a column for each of `columns`,
    {name: (P,)}, and one for a person, if their accuracy on all pairs, `human`, is not nan."""
    titles = [f"{'rating gap':>12} {'pairs':>7}"]
    titles += [f"{name:>13}" for name in columns]
    titles.append("" if math.isnan(human) else f"{'one person':>11}")
    print(f"\npair accuracy on {len(pairs):,} test pairs")
    print(*titles)
    for low, high in [*zip(edges, edges[1:], strict=False), (0, math.inf)]:
        inside = (gaps > low) & (gaps <= high)
        if inside.any():
            cells = [f"{range_name(low, high):>12} {inside.sum():>7}"]
            for ahead in columns.values():
                cells.append(f"{share_positive(ahead[inside]).item():>13.3f}")
            person = human if inside.all() else data.human_ceiling(items, pairs[inside])
            cells.append("" if math.isnan(person) else f"{person:>11.3f}")
            print(*cells)
    print()


def range_name(low, high):
    if high < math.inf:
        return f"{low:g} to {high:g}"
    return f"over {low:g}" if low else "all"


def scored_texts(items, scores, n=64):
    """The first n items as samples.jsonl shows them, with their scores, if these are (N,)."""
    texts = []
    for prompt, response, score in zip(items.prompts, items.responses, scores, strict=True):
        known = {"score": score.item()} if scores.dim() == 1 else {}
        texts.append({"prompt": prompt, "response": response} | known)
    return texts[:n]


# Of a policy


def implicit_rewards(logps, ref_logps, lengths, method):
    """Multiples of beta: h of each response, or a token of it; without a reference its log-prob."""
    rewards = logps if ref_logps is None else logps - ref_logps
    return rewards / lengths if method.per_token else rewards


def implicit_accuracy(policy, base, items, rows, method, autocast, knobs):
    """How often the policy's implicit reward orders test pairs as people do; nothing where no two
    responses can be compared."""
    if not items.can_compare(across=False):
        return {}
    pairs, _ = items.comparisons(20_000, seed=1, across=False)
    with autocast:
        logps = all_logps(policy, rows)
    ref_logps = stored_logps(base, rows, autocast, knobs.dtype)
    rewards = implicit_rewards(logps, ref_logps, rows.lengths(), method)
    accuracy = pair_accuracy(rewards, torch.as_tensor(pairs, device=rows.device)).item()
    orders = f"the policy's implicit reward orders {accuracy:.3f} of {len(pairs):,} test pairs"
    print(f"\n{orders} as people do")
    return {"eval/implicit_accuracy": accuracy}
