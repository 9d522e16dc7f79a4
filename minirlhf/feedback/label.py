"""Labels by anyone who prefers, as a file to train on.   python -m minirlhf.feedback.label

    python -m minirlhf.feedback.label runs/ppo --out labels.jsonl \\
        --labeler "judge:http://127.0.0.1:8000/v1?model=NAME&budget=2000"    # RLAIF's first step
    python train_rm.py --data labels.jsonl --init runs/sft --out runs/ai/rm  # the second
    python train_ppo.py --reward runs/ai/rm --init runs/sft --out runs/ai/ppo

Takes random pairs of answers to a prompt: of a run what it wrote before and after, of data those of
the training part, each in one pair. Each pair becomes a comparison with its `p`, P(the first of its
responses is better), on which train_rm.py trains; its ranking, for those who take no p, is a tie
where that is within --margin of 1/2. RLAIF: Lee et al. 2023 (arXiv 2309.00267).
"""

from dataclasses import dataclass

from minirlhf.data import load_feedback
from minirlhf.data.labels import Label, as_entry
from minirlhf.engine import cli
from minirlhf.engine.cli import knob
from minirlhf.engine.files import write_lines
from minirlhf.feedback.answered import expect_out, pairs_of, parse, read_answers
from minirlhf.feedback.preferring import load_preferrer


@dataclass(kw_only=True)
class Knobs(cli.Checked):
    source: str = knob("", "a run, or what --data takes")
    labeler: str = knob("", "who prefers: judge:URL?model=NAME, a model, RM,RM,..., people:FILE, "
                            "FILE.py:FUNCTION")  # fmt: skip
    out: str = knob("", "the file to write, ending in .jsonl")
    pairs: int = knob(1000, "pairs at most", least=1)
    margin: float = knob(0.0, "P this near to 1/2 is a tie", most=0.5)
    seed: int = knob(0, "same seed, same pairs")


def main(knobs):
    cli.refuse({"--labeler is missing: who prefers?": not knobs.labeler})
    expect_out(knobs.out)
    pairs = pairs_of(read_answers(knobs.source), knobs.pairs, knobs.seed)
    feedback = load_feedback(knobs.source) if knobs.labeler == "true" else None
    preferrer = load_preferrer(knobs.labeler, feedback)
    chances = preferrer.prefer(*map(list, zip(*pairs, strict=True))).tolist()
    labels = []
    for pair, p in zip(pairs, chances, strict=True):
        labels.append(label_of(*pair, p, knobs.margin, preferrer.name))
    write_lines(knobs.out, map(as_entry, labels))
    ties = sum(label.said["ranking"] == [[0, 1]] for label in labels)
    print(f"{len(labels)} pairs, {ties} of them ties; left in {knobs.out}")
    if preferrer.report:
        print(preferrer.report())


def label_of(prompt, a, b, p, margin, rater):
    """The comparison that P(a over b) says."""
    ranking = [0, 1] if p > 0.5 else [1, 0]
    if abs(p - 0.5) <= margin:
        ranking = [[0, 1]]
    said, meta = {"ranking": ranking}, {"p": p, "rater": rater}
    return Label("", "comparison", prompt, [a, b], said, meta)


if __name__ == "__main__":
    cli.run_script(main, Knobs, __doc__, parse)
