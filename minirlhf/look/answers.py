"""What a policy answers, before and after.

Left out: judges other than a reward and VADER; a test of whether a difference is chance.
"""

import math
from typing import NamedTuple

import numpy as np
import torch

from minirlhf.engine.rows import pad_rows, rowwise
from minirlhf.sampling import generate, response_logprobs


class Answer(NamedTuple):
    prompt: str
    response: str
    tokens: int  # of the response
    kl: float  # sum over the response of log pi - log pi_ref, nats
    score: float  # nan without a scorer


@torch.no_grad()
def answers(policy, reference, scorer, prompts, tokenizer, response_length, temperature, autocast,
            seed):  # fmt: skip
    """One sampled Answer to each prompt, a row of ids.

    scorer: (tokens, prompt_lengths, response_lengths) -> (B,), or None. The noise is the seed's,
    the same before and after training, and what is drawn here moves no other random number.
    """
    generator = torch.Generator().manual_seed(seed)
    options = {"eos": tokenizer.eos, "pad": tokenizer.pad, "temperature": temperature}
    device = policy.lm_head_weight.device

    def kl_and_score(tokens, p, r):
        logprobs = response_logprobs(policy, tokens, p, r, response_length, temperature)
        ref_logprobs = response_logprobs(reference, tokens, p, r, response_length, temperature)
        score = scorer(tokens, p, r) if scorer else torch.full((len(p),), math.nan, device=device)
        return (logprobs - ref_logprobs).sum(1), score

    sampled = []
    for start in range(0, len(prompts), 128):
        tokens, lengths = pad_rows(prompts[start : start + 128], tokenizer.pad, device)
        with autocast:
            rollout = generate(
                policy, tokens, lengths, response_length, generator=generator, **options
            )
            rows = rollout[:3]
            kl, score = rowwise(kl_and_score, 0, *rows)
        for ids, p, r, k, s in zip(*(x.tolist() for x in (*rows, kl, score)), strict=True):
            prompt, response = tokenizer.decode(ids[:p]), tokenizer.decode(ids[p : p + r])
            sampled.append(Answer(prompt, response, r, k, s))
    return sampled


# Figures


def answer_figures(sampled):
    """Means over sampled answers, without what is not known.

    VADER (Hutto and Gilbert 2014), a rule-based rater of sentiment from -1 to 1, is asked where it
    is installed.
    """
    figures = {
        "eval/score": mean([a.score for a in sampled]),
        "eval/kl": mean([a.kl for a in sampled]),
        "eval/response_length": mean([a.tokens for a in sampled]),
        "eval/distinct_bigrams": distinct_bigrams([a.response for a in sampled]),
    }
    known = {key: value for key, value in figures.items() if not math.isnan(value)}
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError:
        return known
    judge = SentimentIntensityAnalyzer()
    texts = [a.prompt + a.response for a in sampled]
    return known | {"eval/vader": mean([judge.polarity_scores(text)["compound"] for text in texts])}


def mean(values):
    return float(np.mean(values))


def distinct_bigrams(texts):
    """Distinct over all pairs of neighbouring words in all texts together.

    It falls when a policy collapses.
    """
    pairs = []
    for text in texts:
        words = text.split()
        pairs += zip(words, words[1:], strict=False)
    return len(set(pairs)) / max(1, len(pairs))


# The end of a run that tuned a policy


def compare(run, before, after, earlier, more=None):
    """Ends a run: answers to the same prompts before and after, side by side, and their figures.

    `earlier` are the summaries of the stages before, for the figures to stand beside, `more` this
    run's own. Returns the summary.
    """
    rows = side_by_side(before, after)
    run.samples(rows)
    old, new = answer_figures(before), answer_figures(after)
    figures = earlier_figures(earlier)
    figures |= {f"{key}_before": value for key, value in old.items()}
    figures |= {f"{key}_after": value for key, value in new.items()}
    summary = run.finish(figures | (more or {}))
    print_answers(rows[:6])
    print_figures(figures, len(rows), old, new)
    print(f"{summary['seconds']:.0f} s; left in {run.out}")
    return summary


def side_by_side(before, after):
    """The lines of samples.jsonl."""
    rows = []
    for b, a in zip(before, after, strict=True):
        texts = {"prompt": b.prompt, "before": b.response, "after": a.response}
        rows.append(texts | {"score_before": b.score, "score_after": a.score})
    return rows


def earlier_figures(summary):
    """What earlier stages measured, without what belongs to another policy."""
    others = ("_before", "_after", "implicit_accuracy")
    figures = {}
    for key, value in summary.items():
        known = type(value) in (int, float)  # null was none; a stranger's may be anything
        if known and key.startswith("eval/") and not key.endswith(others):
            figures[key] = value
    return figures


def print_answers(rows):
    print("\nsix held-out prompts, answered by the base model and by the policy")
    for row in rows:
        print(f"\n  prompt  {row['prompt']!r}")
        for when in ("before", "after"):
            score = row[f"score_{when}"]
            print(f"  {when:<6}  {row[when]!r}{'' if math.isnan(score) else f'  ({score:+.2f})'}")
    print()


def print_figures(figures, n, old, new):
    """Those of all stages, and of n answers before and after."""
    if "eval/perplexity" in figures:
        perplexity = figures["eval/perplexity"]
        print(f"base model     perplexity {perplexity:.1f} on held-out texts")
    if "eval/accuracy" in figures:
        accuracy, person = figures["eval/accuracy"], figures.get("eval/human_ceiling")
        besides = "" if person is None else f"; one person does {person:.3f}"
        print(f"reward model   orders {accuracy:.3f} of the test pairs as people do{besides}")
    print(f"{f'policy, {n} held-out prompts':<40} {'before':>8} {'after':>8}")
    for key in old:
        print(f"  {key.removeprefix('eval/'):<38} {old[key]:>8.3f} {new[key]:>8.3f}")
