"""What a source of feedback will be read as, before any training.

    python -m minirlhf.data my.jsonl                    # forms, splits, lengths, suspicions, rows
    python -m minirlhf.data my.jsonl --init runs/sft --overlong truncate
    python -m minirlhf.data my.jsonl --rows rows.jsonl  # every row, as it will be trained on
    python -m minirlhf.data my.jsonl --json             # the figures, for a program

Without --init, tokens are those of a tokenizer trained on the source, as minirlhf.sft would.
"""

import contextlib
import io
import json
import sys
from dataclasses import dataclass

from minirlhf.data import show
from minirlhf.data.sources import load_feedback
from minirlhf.engine import cli
from minirlhf.engine.cli import knob
from minirlhf.engine.files import expect_new, write_lines
from minirlhf.engine.terminal import as_terminal
from minirlhf.engine.weights import local_directory, model_directory, read_config
from minirlhf.tokenizer import Tokenizer, load_tokenizer


@dataclass(kw_only=True)
class Knobs(cli.Checked):
    data: str = knob("reviews", "reviews, toy, a file, a folder of files, hub:OWNER/NAME/FILE")
    init: str = knob("", "model whose tokenizer and context count: run, directory, hub name")
    n_ctx: int = knob(0, "context in tokens; 0: that of --init, or 64")
    vocab_size: int = knob(12288, "tokens to train without --init, with EOS; toy: 257", least=257)
    overlong: str = knob(
        "truncate", "longer rows than the context: error, or truncate", ("error", "truncate")
    )
    rows: str = knob("", "write every row to this file, an object a line")
    json: bool = knob(False, "print the figures as one JSON object")


def main(knobs):
    said = io.StringIO() if knobs.json else as_terminal(sys.stdout)
    with contextlib.redirect_stdout(said):
        found = look(knobs)
    if knobs.json:
        print(json.dumps(found))


def look(knobs):
    """The figures of a source, and what is suspicious, which are printed, too."""
    if knobs.rows:
        expect_new(knobs.rows, '"prompt_length": ')
    feedback = load_feedback(knobs.data)
    tokenizer, n_ctx = tokens_of(knobs, feedback)
    sides = show.encoded(feedback, tokenizer, n_ctx, knobs.overlong)
    found = show.figures(feedback, sides, tokenizer, n_ctx)
    signs = show.suspicious(feedback, found)
    print(*show.report(feedback, found, signs), "", sep="\n")
    print(*show.tokens_table(feedback.name, sides, tokenizer), sep="\n")
    if knobs.rows:
        lines = show.row_lines(sides)
        write_lines(knobs.rows, lines)
        print(f"{len(lines):,} rows in {knobs.rows}")
    return found | {"suspicious": signs}


def tokens_of(knobs, feedback):
    """(tokenizer, context) of --init, or as a fresh base model of this source would have them."""
    if knobs.init:
        directory = local_directory(model_directory(knobs.init))
        config = read_config(directory)
        return load_tokenizer(directory), knobs.n_ctx or config.get("n_positions", 64)
    if feedback.train.columns is not None:
        texts = feedback.train.prompts
    else:
        texts = [prompt + response for prompt, response, _ in feedback.texts()]
    size = min(knobs.vocab_size, 257) if knobs.data == "toy" else knobs.vocab_size
    return Tokenizer.train(texts, size), knobs.n_ctx or 64


if __name__ == "__main__":
    sys.argv[0] = "python -m minirlhf.data SOURCE"
    if len(sys.argv) > 1 and not sys.argv[1].startswith("-"):
        sys.argv.insert(1, "--data")
    cli.run_script(main, Knobs, __doc__)
