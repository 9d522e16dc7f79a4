"""A pool of responses whose scores are known: what select.py's methods cost and bring.

Responses have features, people answer by a linear head of them that is not known. Measured is how
good the favourite of the learnt head is for prompts that were never asked about, and how much worse
than the best response to a prompt those are that people had to read.
"""

from typing import NamedTuple

import numpy as np

from minirlhf.online.oracle import prefers
from minirlhf.online.policies import Record
from minirlhf.online.select import NOTHING, Pool, posterior, select


class People(NamedTuple):
    pool: Pool
    scores: np.ndarray  # (B, K)
    held: np.ndarray  # (B', K, D), features of other prompts' responses
    held_scores: np.ndarray  # (B', K)


def people(rng, prompts=64, k=8, d=12, size=10.0, decay=0.7, others=500):
    """Features of mean square length 1, each of less spread than the one before it.

    Scores have a deviation of size / sqrt(d); the head's direction is any.
    """
    spread = decay ** np.arange(d)
    spread /= np.linalg.norm(spread)
    direction = rng.standard_normal(d)
    head = size / np.sqrt(d) * direction / np.linalg.norm(direction * spread)
    features = spread * rng.standard_normal((prompts + others, k, d))
    shown, held = features[:prompts], features[prompts:]
    return People(Pool(shown), shown @ head, held, held @ head)


def regret(scores, learnt):
    """How much worse a prompt's favourite by the learnt scores (B, K) is than its best, a mean."""
    favourite = learnt.argmax(1)[:, None]
    taken = np.take_along_axis(scores, favourite, 1)[:, 0]
    return (scores.max(1) - taken).mean()


def run_one(problem, rng, queries, method, batch):
    """The two lines of a Record, (queries,) each; a batch is chosen by what was known before it."""
    labelled = NOTHING
    shown = np.zeros(queries)
    held = np.zeros(queries)
    best = problem.scores.max(1)
    for t in range(0, queries, batch):
        # 1 what is known, and how good it would be elsewhere
        head, _ = posterior(problem.pool.features, labelled)
        held[t : t + batch] = regret(problem.held_scores, problem.held @ head)
        # 2 what people are shown
        budget = min(batch, queries - t)
        pairs = select(problem.pool, labelled, budget, method, rng)
        prompt, first, second = pairs.T
        a = problem.scores[prompt, first]
        b = problem.scores[prompt, second]
        shown[t : t + len(pairs)] = best[prompt] - (a + b) / 2
        # 3 their answers
        answers = prefers(a, b, 1.0, rng)
        labelled = labelled.and_these(pairs, answers)
    return shown, held


def run(problems, rng, queries, method="lpbrl", batch=8):
    """A Record, a run for each of some People: regret is of the responses shown.

    greedy is of the favourites to prompts that were not asked about. Where a method stops to ask
    before its queries are spent, nothing is shown, and no one regrets it.
    """
    found = [run_one(problem, rng, queries, method, batch) for problem in problems]
    return Record(*np.array(found).swapaxes(0, 1))
