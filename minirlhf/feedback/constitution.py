"""Constitutional AI's first stage: answers that a model mends by principles, as data for sft.

    python -m minirlhf.feedback.constitution runs/ppo --out mended.jsonl \\
        --judge "judge:http://127.0.0.1:8000/v1?model=NAME"
    python -m minirlhf.sft --data mended.jsonl --init runs/sft --out runs/cai/sft

Draft, critique under a random principle, revision; and again from the revision, --rounds times (Bai
et al. 2022, arXiv 2212.08073, section 3). Drafts are what a run wrote after its training, or the
answers in data; to bare prompts the model behind --judge writes them. The second stage is that of
RLAIF: minirlhf.feedback.label by a judge with `principles=default`, or a file of one's own, which
chooses between (A) and (B) under each and is averaged over them.

Left out: worked examples of critiques, a model's own words about harmless and helpful prompts.
"""

from dataclasses import dataclass

import numpy as np

from minirlhf.engine import cli
from minirlhf.engine.cli import knob
from minirlhf.engine.files import write_lines
from minirlhf.feedback.answered import expect_out, parse, read_answers
from minirlhf.feedback.judge import Judge, read_principles, said


@dataclass(kw_only=True)
class Knobs(cli.Checked):
    source: str = knob("", "a run, or what --data takes")
    judge: str = knob("", "who criticises and revises: judge:URL?model=NAME&principles=FILE")
    out: str = knob("", "the file to write, ending in .jsonl")
    rounds: int = knob(1, "critiques and revisions of each answer", least=1)
    limit: int = knob(1000, "answers at most", least=1)
    seed: int = knob(0, "same seed, same answers and principles")


def main(knobs):
    cli.refuse({"--judge judge:URL is missing": not knobs.judge.startswith("judge:")})
    expect_out(knobs.out)
    judge = Judge(knobs.judge)
    principles = judge.principles or read_principles("default")
    prompts, drafts = drafts_of(knobs, judge)
    rng = np.random.default_rng(knobs.seed)
    texts = drafts
    for _ in range(knobs.rounds):
        chosen = [principles[i] for i in rng.integers(len(principles), size=len(texts))]
        texts = revised(judge.write, prompts, texts, chosen)
    rows = []
    for prompt, draft, text in zip(prompts, drafts, texts, strict=True):
        rows.append({"prompt": prompt, "response": text, "draft": draft})
    write_lines(knobs.out, rows)
    changed = sum(draft != text for draft, text in zip(drafts, texts, strict=True))
    print(f"{changed} of {len(rows)} answers were changed; left in {knobs.out}")
    print(judge.report())


def drafts_of(knobs, judge):
    """(prompts, drafts): of several answers to a prompt the last; the judge's to bare prompts."""
    found = []
    for prompt, answers in read_answers(knobs.source).items():
        found += [(prompt, answer) for answer in (answers if not prompt else answers[-1:])]
        found += [] if answers else [(prompt, None)]
    order = np.random.default_rng(knobs.seed).permutation(len(found))[: knobs.limit]
    prompts, drafts = zip(*(found[i] for i in sorted(order)), strict=True)
    new = [i for i, draft in enumerate(drafts) if draft is None]
    written = judge.write([[said("user", prompts[i])] for i in new])
    drafts = list(drafts)
    for i, text in zip(new, written, strict=True):
        drafts[i] = text
    return list(prompts), drafts


def revised(write, prompts, texts, principles):
    """The texts, revised by write(talks) -> replies; as they were where a revision is empty."""
    talks = []
    for prompt, text, principle in zip(prompts, texts, principles, strict=True):
        ask = f"{principle} How does your last response fall short of that? Be brief."
        opening = prompt or "Write a short text."
        talks.append([said("user", opening), said("assistant", text), said("user", ask)])
    critiques = write(talks)
    for talk, critique in zip(talks, critiques, strict=True):
        ask = "Write the response anew, without that fault. Give the new text alone."
        talk += [said("assistant", critique), said("user", ask)]
    return [new or old for new, old in zip(write(talks), texts, strict=True)]


if __name__ == "__main__":
    cli.run_script(main, Knobs, __doc__, parse)
