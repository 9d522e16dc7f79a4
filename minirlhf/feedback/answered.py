"""Answers to prompts, out of a run's samples or out of data, for those who label or mend them."""

import argparse
import dataclasses
from pathlib import Path

import numpy as np

from minirlhf import data
from minirlhf.engine import cli
from minirlhf.engine.cli import UserError
from minirlhf.engine.files import read_lines


def parse(knobs, doc, argv=None):
    """The knobs of a command line; the first of them, `source`, is a word without a flag."""
    parser = cli.Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter,
                        allow_abbrev=False)  # fmt: skip
    source, *fields = dataclasses.fields(knobs)
    parser.add_argument("source", metavar="RUN_OR_DATA", help=source.metadata["help"])
    for field in fields:
        cli.add_flag(parser, field)
    return knobs(**vars(parser.parse_args(argv)))


def expect_out(out):
    """Raises UserError where there is no name for a file, or a file lies there already."""
    if not out.endswith(".jsonl"):
        raise UserError(f"--out {out}: expected the name of a file to write, ending in .jsonl")
    if Path(out).exists():
        raise UserError(f"--out {out}: a file lies there already: give another name")


def read_answers(source):
    """{prompt: its answers, each once} of a run's samples.jsonl, or of the training part of data;
    no answers where the data are prompts alone. Raises UserError where there is nothing."""
    samples = Path(source, "samples.jsonl")
    if samples.is_file():
        return read_samples(samples)
    items = data.load_feedback(source).train
    found = {}
    for prompt, response in zip(items.prompts, items.responses, strict=True):
        answers = found.setdefault(prompt, {})
        if items.columns is None:
            answers[response] = None
    return {prompt: list(answers) for prompt, answers in found.items()}


def read_samples(path):
    """The same of a run: of a tuned policy what it answered before and after."""
    found = {}
    for place, row in read_lines(path):
        texts = [row[key] for key in ("before", "after", "response") if key in row]
        if not texts or not all(isinstance(text, str) for text in [row.get("prompt"), *texts]):
            raise UserError(f"{place}: no sample of a policy")
        found.setdefault(row["prompt"], {}).update(dict.fromkeys(texts))
    return {prompt: list(answers) for prompt, answers in found.items()}


def pairs_of(answers, n, seed):
    """At most n pairs (prompt, one, other) of answers to a prompt, at random, each answer in one:
    so pairs can be held out without their texts."""
    rng = np.random.default_rng(seed)
    found = []
    for prompt, some in answers.items():
        order = rng.permutation(len(some))
        found += [(prompt, some[i], some[j]) for i, j in zip(order[::2], order[1::2], strict=False)]
    if not found:
        raise UserError("no prompt has two answers to choose from")
    return [found[i] for i in np.sort(rng.permutation(len(found))[:n])]
