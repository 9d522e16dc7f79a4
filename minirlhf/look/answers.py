"""What a policy answers, before and after."""

from typing import NamedTuple

import numpy as np
import torch

from minirlhf.engine import parallel
from minirlhf.engine.rows import pad_rows
from minirlhf.sampling import generate, response_logprobs


class Answer(NamedTuple):
    prompt: str
    response: str
    tokens: int  # of the response
    kl: float  # sum over the response of log pi - log pi_ref, nats
    score: float  # nan without a scorer


@torch.no_grad()
def answers(policy, reference, scorer, prompts, tokenizer, response_length, temperature, autocast, seed):
    """One sampled Answer to each prompt (a row of ids); scorer: (tokens, prompt_lengths, response_lengths) -> (B,), or None.

    The noise is the seed's, the same before and after training, and what is drawn here moves no other random number.
    """
    result, generator = [], torch.Generator().manual_seed(seed)
    for start in range(0, len(prompts), 128):
        tokens, lengths = pad_rows(prompts[start : start + 128], tokenizer.pad, policy.wte.weight.device)
        mine, _ = parallel.share(len(tokens))
        with autocast:
            sampled = generate(policy, tokens[mine], lengths[mine], response_length, eos=tokenizer.eos, pad=tokenizer.pad,
                               temperature=temperature, generator=generator, first_row=int(mine[0]))  # fmt: skip
            row = sampled[:3]
            logprobs, ref_logprobs = (response_logprobs(m, *row, response_length, temperature) for m in (policy, reference))
            scores = scorer(*row) if scorer else torch.full_like(logprobs[:, 0], float("nan"))
        kl = (logprobs - ref_logprobs).sum(1)
        for ids, p, r, k, s in zip(*(parallel.gather(x, len(tokens)).tolist() for x in (*row, kl, scores)), strict=True):
            result.append(Answer(tokenizer.decode(ids[:p]), tokenizer.decode(ids[p : p + r]), r, k, s))
    return result


def answer_figures(answers):
    """Means over sampled answers; VADER (Hutto and Gilbert 2014), a rule-based rater of sentiment from -1 to 1, where installed."""
    figures = {
        "eval/score": float(np.mean([a.score for a in answers])), "eval/kl": float(np.mean([a.kl for a in answers])),
        "eval/response_length": float(np.mean([a.tokens for a in answers])),
        "eval/distinct_bigrams": distinct_bigrams([a.response for a in answers]),
    }  # fmt: skip
    figures = {key: value for key, value in figures.items() if value == value}  # without a scorer there is no score
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError:
        return figures
    judge = SentimentIntensityAnalyzer()
    return figures | {"eval/vader": float(np.mean([judge.polarity_scores(a.prompt + a.response)["compound"] for a in answers]))}


def distinct_bigrams(texts):
    """Distinct over all pairs of neighbouring words in all texts together: it falls when a policy collapses."""
    pairs = [pair for text in texts for words in [text.split()] for pair in zip(words, words[1:], strict=False)]
    return len(set(pairs)) / max(1, len(pairs))


def compare(run, before, after, earlier, more=None):
    """Ends a run that tuned a policy: answers to the same prompts before and after, side by side, and their figures.

    `earlier` are the summaries of the stages before, for the figures to stand beside, `more` this run's own. Returns the summary.
    """
    rows = [{"prompt": b.prompt, "before": b.response, "after": a.response, "score_before": b.score, "score_after": a.score}
            for b, a in zip(before, after, strict=True)]  # fmt: skip
    run.samples(rows)
    old, new = answer_figures(before), answer_figures(after)
    figures = {key: value for key, value in earlier.items()
               if key.startswith("eval/") and not key.endswith(("_before", "_after", "implicit_accuracy"))}  # fmt: skip
    figures |= {f"{key}_before": value for key, value in old.items()} | {f"{key}_after": value for key, value in new.items()}
    summary = run.finish(figures | (more or {}) | {"data": run.knobs.data})
    print("\nsix held-out prompts, answered by the base model and by the policy")
    for row in rows[:6]:
        print(f"\n  prompt  {row['prompt']!r}\n  before  {row['before']!r}  ({row['score_before']:+.2f})"
              f"\n  after   {row['after']!r}  ({row['score_after']:+.2f})")  # fmt: skip
    print()
    if "eval/perplexity" in figures:
        print(f"base model     perplexity {figures['eval/perplexity']:.1f} on held-out texts")
    if "eval/accuracy" in figures:
        print(f"reward model   orders {figures['eval/accuracy']:.3f} of the test pairs as people do"
              + (f"; one person does {figures['eval/human_ceiling']:.3f}" if "eval/human_ceiling" in figures else ""))  # fmt: skip
    print(f"{f'policy, {len(rows)} held-out prompts':<40} {'before':>8} {'after':>8}")
    for key in old:
        print(f"  {key.removeprefix('eval/'):<38} {old[key]:>8.3f} {new[key]:>8.3f}")
    print(f"{summary['seconds']:.0f} s; left in {run.out}")
    return summary
