"""The best of n samples of a policy, as a file to learn.   python -m minirlhf.online.best_of RUN

    python -m minirlhf.online.best_of runs/sft --reward runs/rm --n 8 --out best.jsonl
    python -m minirlhf.sft --data best.jsonl --init runs/sft --epochs 1 --lr 3e-4 --out runs/raft

This is rejection sampling (RAFT, Dong et al. 2023; Nakano et al. 2021): RUN answers prompts of its
training data n times each, and the answer that --reward scores highest is written, the first among
equal ones. Prints the gain in score over the mean answer, with its standard error over prompts, and
log n - (n - 1)/n, the KL from RUN of who answers so, in nats (an upper bound where scores are
equal: Beirami et al. 2024). Without --reward all answers are written, for those who label:

    python -m minirlhf.online.best_of runs/ppo --n 2 --out own.jsonl
    python -m minirlhf.feedback.label own.jsonl --labeler judge:URL --out labels.jsonl

An answer that reached --response-length without EOS is no text to learn an end from: it is scored,
but not written where --reward chooses it, and that is counted. Nor are empty answers. Those who
label are shown both: what nobody was asked of, a policy finds out to be well paid.

Left out: thresholds in place of the best, several answers to a prompt by their scores.
"""

import time
from dataclasses import dataclass

import numpy as np

from minirlhf import data
from minirlhf.engine import cli, machine
from minirlhf.engine.cli import UserError, knob
from minirlhf.engine.files import write_lines
from minirlhf.feedback.answered import expect_out, parse
from minirlhf.look import judging, policies, replies
from minirlhf.rewards.overoptimisation import best_of_n_kl, gain


@dataclass(kw_only=True)
class Knobs(cli.Checked):
    source: str = knob("", "the run that answers")
    out: str = knob("", "the file to write, ending in .jsonl")
    reward: str = knob(
        "", "who scores: a reward model's run, RM,RM,..., true, FILE.py:FUNCTION, judge:URL; "
        "none: every answer is written", free=True,
    )  # fmt: skip
    n: int = knob(8, "answers to a prompt", least=1)
    prompts: int = knob(512, "prompts at most, of the training part of RUN's data", least=1)
    data: str = knob("", "whose prompts (default: of the data that RUN was trained on)", free=True)
    response_length: int = knob(24, "most tokens of an answer", least=1)
    temperature: float = knob(1.0, "of sampling", least=1e-6)
    seed: int = knob(0, "same seed, same prompts and answers")
    device: str = knob("auto", "what computes: cpu, cuda, ...; auto: a GPU where there is one")


def main(knobs):
    """Prints the figures, writes --out; the figures."""
    began = time.time()
    expect_out(knobs.out)
    device = machine.pick_device(knobs.device)
    machine.precision(device, "float32")
    policy = policies.open_policy(knobs.source, device, "none")
    judge = judging.load_judge(knobs.reward, policy) if knobs.reward else None
    if judge and not judge.score:
        raise UserError(f"{knobs.reward}: compares two responses, and gives no score of one")
    prompts = training_prompts(policy, knobs)
    settings = replies.Sampling(knobs.response_length, knobs.temperature, 0, knobs.seed, knobs.n)
    found = replies.replies(policy, prompts, settings)
    figures = {"prompts": len(prompts), "n": knobs.n}
    if judge:
        found = judging.scored(judge, policy, found)
        scores = np.array([reply.score for reply in found]).reshape(-1, knobs.n)
        figures |= figures_of(scores)
        found = [found[i] for i in best(scores)]
    kept = [reply for reply in found if not judge or (reply.text and reply.ended)]
    if not kept:
        raise UserError(f"none of {len(found)} answers has ended: give a longer --response-length")
    write_lines(knobs.out, [{"prompt": reply.prompt, "response": reply.text} for reply in kept])
    figures |= {"written": len(kept), "seconds": round(time.time() - began, 1)}
    print(report(figures, len(found), knobs.out))
    return figures


def training_prompts(policy, knobs):
    """Texts of prompts of the training part, at random."""
    if knobs.data:
        feedback = data.load_feedback(knobs.data)
    elif policy.run:
        feedback = policies.feedback_of(policy)
    else:
        raise UserError(f"{policy.name}: a model of no run has no prompts: give --data")
    rng = np.random.default_rng(knobs.seed)
    rows = data.prompts_of(feedback.train, policy.tokenizer, rng)
    texts = list(dict.fromkeys(policy.tokenizer.decode(row) for row in rows))
    chosen = rng.permutation(len(texts))[: knobs.prompts]
    return [texts[i] for i in chosen]


def best(scores):
    """Places in scores (P, n), flat, of the best of each row, the first among equal ones: (P,)."""
    P, n = scores.shape
    return np.arange(P) * n + scores.argmax(1)


def figures_of(scores):
    """What choosing the best of each row of scores (P, n) gains, and at what KL."""
    n = scores.shape[1]
    more, error = gain(scores.max(1) - scores.mean(1))
    tied = (scores == scores.max(1, keepdims=True)).sum(1) > 1
    means = {"mean": float(scores.mean()), "best": float(scores.max(1).mean())}
    prices = {"kl": float(best_of_n_kl(n)), "ties": float(tied.mean())}
    return means | {"gain": more, "gain_error": error} | prices


def report(figures, answers, out):
    lines = []
    if "gain" in figures:
        f = figures
        lines.append(
            f"best of {f['n']}: score {f['mean']:.3f} -> {f['best']:.3f}, a gain of "
            f"{f['gain']:.3f} +- {f['gain_error']:.3f}, at a KL of {f['kl']:.3f} nats "
            f"(an upper bound: the best is tied for {f['ties']:.0%} of the prompts)"
        )
    left_out = answers - figures["written"]
    why = f", {left_out} left out that had no end or no text" if left_out else ""
    lines.append(f"{figures['prompts']} prompts, {figures['written']} answers left in {out}{why}")
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run_script(main, Knobs, __doc__, parse)
