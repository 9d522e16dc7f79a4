"""A run whose last step is done keeps its model, whatever fails or kills what comes after; the same
command with --resume makes up for the rest, bit for bit, without another step."""

import functools
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

import train_dpo
import train_ppo
import train_rm
from minirlhf import data, sft
from minirlhf.engine import cli, curves
from minirlhf.engine.cli import ModelKept, UserError
from minirlhf.engine.files import finished
from minirlhf.engine.log import Run
from minirlhf.look import answers

TINY = dict(vocab_size=257, n_ctx=32, n_layer=1, n_head=1, n_embd=8, epochs=1, batch_size=40)
FEW = dict(response_length=4, eval_samples=4)
STAGES = {
    "sft": (sft, TINY),
    "rm": (train_rm, dict(epochs=1, batch_size=40, response_length=4)),
    "ppo": (train_ppo, dict(steps=2, batch_size=4, **FEW)),
    "dpo": (train_dpo, dict(epochs=1, batch_size=40, **FEW)),
    "simpo": (train_dpo, dict(loss="simpo", epochs=1, batch_size=40, **FEW)),
}
OF_ALL = [(Run, "samples"), (curves, "plot"), (Run, "finish")]
OF_POLICIES = [(answers, "answer_figures"), (answers, "print_answers"), (answers, "print_figures")]
LATER = {  # what comes after the last step
    "sft": [(sft, "evaluate"), (sft, "samples")],
    "rm": [(train_rm, "sample_scores"), (train_rm, "normalize"), (train_rm, "accuracy_figures"),
           (train_rm, "scored_texts")],
    "ppo": [(train_ppo, "answers"), (train_ppo, "figures_beside"), *OF_POLICIES],
    "dpo": [(train_dpo, "answers"), (train_dpo, "implicit_accuracy"),
            (train_dpo, "figures_beside"), *OF_POLICIES],
    "simpo": [(train_dpo, "implicit_accuracy")],
}  # fmt: skip
NOT_FINAL = ("sample_scores", "normalize")
CASES = []
for stage, own in LATER.items():
    common = OF_ALL if stage in ("sft", "ppo") else []
    for i, (place, name) in enumerate(own + common):
        CASES.append(pytest.param(stage, place, name, "fails", id=f"{stage}-{name}-fails"))
        if i == 1:  # a process dies in one way
            CASES.append(pytest.param(stage, place, name, "dies", id=f"{stage}-{name}-dies"))


@pytest.fixture(scope="module")
def needs(tmp_path_factory):
    """A folder with 60 rated words, and a base model and a reward model of them."""
    folder = tmp_path_factory.mktemp("needs")
    rng = np.random.default_rng(0)
    words = []
    for _ in range(60):
        word = "".join(rng.choice(list("abcdefgh"), rng.integers(4, 9)))
        words.append({"prompt": "", "response": word, "rating": word.count("h")})
    (folder / "words.jsonl").write_text("\n".join(map(json.dumps, words)))
    for stage in ("sft", "rm"):
        train(stage, folder, folder / stage)
    return folder


@pytest.fixture(autouse=True)
def no_picture(monkeypatch):
    """Drawing would be most of the time."""
    monkeypatch.setattr(curves, "plot", lambda rows, path: path.touch())


def knobs(stage, needs, out, **changes):
    module, few = STAGES[stage]
    given = {"data": needs / "words.jsonl", "out": out} | few
    if stage != "sft":
        given |= {"init": needs / "sft"}
    if stage in ("ppo", "dpo", "simpo"):
        given |= {"reward": needs / "rm"}
    return module.Knobs(**given | changes)


def train(stage, needs, out, **changes):
    return STAGES[stage][0].main(knobs(stage, needs, out, **changes))


def left(out):
    """All that a run leaves but for its clock and its command."""
    summary = json.loads((out / "summary.json").read_text())
    for name in ("seconds", "command"):
        summary.pop(name)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        for name in curves.CLOCK:
            row.pop(name)
    model = (out / "model" / "model.safetensors").read_bytes()
    return summary, rows, model, (out / "samples.jsonl").read_text()


@pytest.fixture(scope="module")
def whole(needs, tmp_path_factory):
    """What each stage leaves when nothing happens to it."""

    @functools.cache
    def get(stage):
        out = tmp_path_factory.mktemp(stage)
        train(stage, needs, out)
        return left(out)

    return get


def in_a_child(function, *args):
    """The exit code of a process that does it."""
    child = os.fork()
    if not child:
        try:
            function(*args)
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def lost(*_, **__):
    raise LookupError("lost\nin a step")


def dies(*_, **__):
    os._exit(9)


@pytest.mark.parametrize("stage, place, name, how", CASES)
def test_what_comes_after_the_last_step(
    stage, place, name, how, needs, whole, tmp_path, monkeypatch
):
    expected = whole(stage)
    with monkeypatch.context() as patch:
        patch.setattr(place, name, lost if how == "fails" else dies)
        if how == "dies":
            assert in_a_child(train, stage, needs, tmp_path) == 9
        else:
            with pytest.raises(ModelKept, match="--resume makes up for .*. But lost$") as caught:
                train(stage, needs, tmp_path)
            assert isinstance(caught.value.__cause__, LookupError)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (tmp_path / "model" / "model.safetensors").is_file()
    if name in NOT_FINAL:
        assert finished(tmp_path) is None and summary["model_is_final"] is False
    elif name not in ("print_answers", "print_figures"):
        assert finished(tmp_path) == summary and summary["evaluated"] is False
        assert (tmp_path / "model" / "model.safetensors").read_bytes() == expected[2]
    monkeypatch.setattr(Run, "log", lambda *_, **__: 1 / 0)  # no step is made again
    train(stage, needs, tmp_path, resume=True)
    assert left(tmp_path) == expected


@pytest.mark.parametrize("stage", ["sft", "rm", "ppo", "dpo"])
def test_killed_while_the_model_is_written(stage, needs, whole, tmp_path, monkeypatch):
    """Between the last state and model/, and between model/ and its summary."""
    for i, name in enumerate(["keep", "summary"]):
        with monkeypatch.context() as patch:
            patch.setattr(Run, name, dies)
            assert in_a_child(train, stage, needs, tmp_path / str(i)) == 9
        assert finished(tmp_path / str(i)) is None
        train(stage, needs, tmp_path / str(i), resume=True)
        assert left(tmp_path / str(i)) == whole(stage)


def test_resuming_a_whole_run_takes_nothing_away(needs, whole, tmp_path, monkeypatch):
    """Not even while it makes the figures again."""
    train("rm", needs, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(train_rm, "sample_scores", lost)
        with pytest.raises(ModelKept, match="the model is in place"):
            train("rm", needs, tmp_path, resume=True)
    assert left(tmp_path) == whole("rm")


def test_a_program_says_it_and_exits_with_3(needs, tmp_path, monkeypatch, capsys):
    flags = ["--data", str(needs / "words.jsonl"), "--out", str(tmp_path / "run")]
    for name, value in TINY.items():
        flags += ["--" + name.replace("_", "-"), str(value)]
    monkeypatch.setattr(sys, "argv", ["sft", *flags])

    def full(*_):
        raise UserError("no room\nfor it")

    for error, expected in ((full, 1), (lost, 5)):
        monkeypatch.setattr(sft, "samples", error)
        with pytest.raises(SystemExit) as end:
            cli.run_script(sft.main, sft.Knobs, "")
        said = capsys.readouterr().err.strip().splitlines()
        assert end.value.code == 3 and said[-1].startswith(f"error: {tmp_path}/run: the model is")
        assert (len(said) == 1) == (expected == 1)  # a mistake keeps its traceback
        assert any("Traceback" in line for line in said) == (expected > 1)


def test_signals_while_figures_are_made(needs, tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(sft, "samples", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train("sft", needs, tmp_path)
    assert f"{tmp_path}: the model is in place" in capsys.readouterr().out
    assert finished(tmp_path)


# Stages that make one another


def test_a_later_stage_uses_a_model_without_figures(needs, tmp_path, monkeypatch, capsys):
    few = {"init": "", "out": tmp_path / "rm"}
    with monkeypatch.context() as patch:
        patch.setattr(sft, "evaluate", lost)
        patch.setattr(sft.Knobs, "__init__", small(sft.Knobs.__init__))
        with pytest.raises(ModelKept, match=f"{tmp_path}/sft: the model is in place"):
            train("rm", needs, **few)
        assert not (tmp_path / "rm").exists()
    before = (tmp_path / "sft" / "model" / "model.safetensors").read_bytes()
    train("rm", needs, **few)
    assert not finished(tmp_path / "sft")["evaluated"]
    train("rm", needs, **few, resume=True)  # made by hand, with other sizes: used as it is
    assert "stays without its figures" in capsys.readouterr().out
    monkeypatch.setattr(sft.Knobs, "__init__", small(sft.Knobs.__init__))
    train("rm", needs, **few, resume=True)
    assert finished(tmp_path / "sft")["evaluated"]
    assert (tmp_path / "sft" / "model" / "model.safetensors").read_bytes() == before


def small(init):
    """Knobs whose defaults are tiny."""
    return lambda self, **given: init(self, **TINY | given)


def test_a_reward_model_that_is_not_normalised_serves_nobody(needs, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(train_rm, "normalize", lost)
        with pytest.raises(ModelKept, match="not yet final"):
            train("rm", needs, tmp_path / "rm")
    for reward in (tmp_path / "rm", tmp_path / "rm" / "model"):
        for stage in ("ppo", "dpo"):
            with pytest.raises(UserError, match="not final yet: the command that made it"):
                train(stage, needs, tmp_path / "out", reward=reward)
    assert not (tmp_path / "out").exists()
    train("rm", needs, tmp_path / "rm", resume=True)
    train("ppo", needs, tmp_path / "out", reward=tmp_path / "rm")


STRANGE = ["", "{", "[]", '{"data": "x", "eval/perplexity": "high", "eval/accuracy": null}', "\0",
           '{"eval/perplexity": 3}']  # fmt: skip


@pytest.mark.parametrize("text", STRANGE)
def test_a_strangers_summary_beside_a_model(text, needs, whole, tmp_path, capsys):
    shutil.copytree(needs / "sft" / "model", tmp_path / "base" / "model")
    (tmp_path / "base" / "summary.json").write_text(text)
    given = {"init": tmp_path / "base" / "model"}
    for stage in ("ppo", "dpo"):
        out = tmp_path / stage
        summary = train(stage, needs, out, **given)
        assert "eval/perplexity" not in summary and summary["evaluated"]
        assert left(out)[1:] == whole(stage)[1:]


def test_no_message_tells_to_delete(needs, tmp_path):
    shutil.copytree(needs / "sft" / "model", tmp_path / "sft" / "model")
    (tmp_path / "sft" / "summary.json").write_text('{"mine": 1}')
    with pytest.raises(UserError) as caught:
        train("rm", needs, tmp_path / "rm", init="")
    assert "delete" not in str(caught.value) and str(tmp_path / "sft") in str(caught.value)
    for path in Path(sft.__file__).parent.rglob("*.py"):
        for line in path.read_text().splitlines():
            assert "; delete" not in line and ": delete" not in line, path


# What each stage says of its speed


@pytest.mark.parametrize("stage, delete", [("sft", 0), ("rm", 0), ("rm", 0.5), ("dpo", 0)])
def test_an_epoch_reads_each_token_once(stage, delete, needs, tmp_path):
    """A token a letter, and EOS at both ends, which are never deleted."""
    words = data.load_feedback(str(needs / "words.jsonl")).train.responses
    letters = sum(map(len, words))
    changes = {"delete": delete, "delete_eos": 0.0} if stage == "rm" else {}
    train(stage, needs, tmp_path, batch_size=16, **changes)
    _, rows, *_ = left(tmp_path)
    found = [row["perf/tokens"] for row in rows]
    assert len(found) == -(-len(words) // 16)
    deviation = (letters * delete * (1 - delete)) ** 0.5
    assert abs(sum(found) - 2 * len(words) - (1 - delete) * letters) <= 3 * deviation


def test_episodes_count_prompt_and_response(needs, tmp_path):
    """EOS and two letters stand before each of four responses, which are read by many passes."""
    texts = [{"prompt": a + b, "response": b} for a in "abcdefgh" for b in "abcdefgh"]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, texts)))
    train("ppo", needs, tmp_path / "run", data=tmp_path / "prompts.jsonl")
    _, rows, *_ = left(tmp_path / "run")
    for row in rows:
        assert row["perf/tokens"] == 4 * (3 + row["objective/response_length"])
