"""The scripts' knobs and errors: every flag changes something, and every mistake is one line that
says what and where."""

import dataclasses
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train_dpo
import train_ppo
import train_rm
from minirlhf import data, sft
from minirlhf.engine import optim, passes
from minirlhf.engine.cli import UserError
from minirlhf.engine.files import atomic_write
from minirlhf.engine.log import Run

ROOT = Path(__file__).parent.parent
TOY = {"data": "toy"}
CHEAP = {
    sft: dict(n_layer=1, n_head=2, n_embd=16, epochs=2, batch_size=512, lr=1e-2),
    train_rm: dict(epochs=1, batch_size=256, delete=0.0, delete_eos=0.0, dropout=0.0),
    train_ppo: dict(
        steps=4, batch_size=8, response_length=6, eval_samples=4, lr=1e-2, ppo_epochs=2
    ),
    train_dpo: dict(epochs=1, batch_size=256, response_length=4, eval_samples=4),
}
# Where a changed value must show: in the weights that the run leaves, unless named otherwise.
CHANGES = {
    sft: dict(
        n_layer=2,
        n_head=1,
        n_embd=32,
        epochs=1,
        batch_size=256,
        lr=1e-3,
        embedding_lr=1.0,
        letters=3.0,
        weight_decay=5.0,
        optimizer="adamw",
        seed=1,
        max_grad_norm=0.01,
        dtype="bfloat16",
        n_ctx=32,
    ),
    train_rm: dict(
        share=0.5,
        layers=1,
        members=2,
        epochs=2,
        batch_size=64,
        lr=1e-2,
        embedding_lr=1.0,
        letters=3.0,
        weight_decay=5.0,
        dropout=0.5,
        delete=0.5,
        delete_eos=0.9,
        margin=1.0,
        center=0.5,
        max_grad_norm=0.01,
        normalize=False,
        response_length=6,
        seed=1,
        dtype="bfloat16",
        model="pairwise",
        level="token",
        loss="plackett_luce",
        soft_labels=False,
        augment="convexda",
    ),
    train_ppo: dict(
        missing_eos_penalty=5.0,
        critic_warmup=2,
        clip_high=0.01,
        loss_mean="response",
        entropy_coef=0.5,
        stop_kl=1e-9,
        fuse=5,
        steps=1,
        batch_size=16,
        response_length=4,
        temperature=0.5,
        missing_eos_score=-3.0,
        kl_coef=5.0,
        kl_kind="k3",
        kl_target=0.001,
        whiten_rewards=True,
        gamma=0.5,
        lam=0.0,
        clip=0.01,
        value_clip=0.001,
        vf_coef=1.0,
        ppo_epochs=1,
        minibatches=1,
        lr=1e-3,
        warmup=0.9,
        adam_eps=1e-2,
        letters=3.0,
        max_grad_norm=0.01,
        seed=1,
        dtype="bfloat16",
        top_k=2,
        stop_at_eos=False,
        advantage="rloo",
        critic="shared",
        whiten_advantages=False,
        lr_schedule="cosine",
    ),
    train_dpo: dict(
        delete=0.3,
        letters=3.0,
        ref_every=1,
        loss="ipo",
        beta=0.5,
        label_smoothing=0.3,
        soft_labels=False,
        epochs=2,
        batch_size=64,
        lr=1e-3,
        weight_decay=5.0,
        loss_options="divergence=js",
        rounds=2,
        steps=2,
        max_grad_norm=0.01,
        seed=1,
        dtype="bfloat16",
    ),
}
BESIDE = {"device", "compile", "save_every", "resume", "on_nonfinite", "shard"}
NOT_IN_WEIGHTS = {
    sft: {"data", "init", "out", "overlong", "vocab_size", "micro_batch"} | BESIDE,
    train_rm: {"data", "init", "out", "overlong", "group_size", "micro_batch"}
    | {"kind_weights", "kind_betas"}  # tests/test_people.py
    | {"text_epochs"}  # tests/test_rm_further.py
    | {"beta"}  # tests/test_iterate.py
    | BESIDE,
    train_ppo: {
        "data",
        "init",
        "reference",  # tests/test_iterate.py
        "reward",
        "out",
        "overlong",
        "kl_horizon",
        "micro_batch",
        "eval_samples",
    }
    | BESIDE
    # tests/test_switches.py, tests/test_later_switches.py
    | {"reward_level", "truncate", "truncate_after", "kl_in", "group_size", "skip_flat", "ratio"},
    train_dpo: {
        "data",
        "init",
        "reward",
        "out",
        "overlong",
        "group_size",
        "online",
        "labeler",  # tests/test_judges.py
        "reference",  # tests/test_whole.py
        "ref_mix",  # tests/test_train_dpo.py
        "samples",
        "select",  # tests/test_select.py
        "budget",
        "mixture",
        "micro_batch",
        "response_length",
        "eval_samples",
    }
    | BESIDE,
}


def weights(script, toy, out, **changes):
    earlier = (
        {}
        if script is sft
        else {"init": str(toy / "sft")}
        | ({"reward": str(toy / "rm")} if script is train_ppo else {})
    )
    script.main(script.Knobs(**TOY, **earlier, out=str(out), **CHEAP[script] | changes))
    return load_file(out / "model" / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(
        a[k].shape == b[k].shape and torch.equal(a[k], b[k]) for k in a
    )


@pytest.fixture(scope="module")
def baselines(toy, tmp_path_factory):
    return {script: weights(script, toy, tmp_path_factory.mktemp("baseline")) for script in CHEAP}


@pytest.mark.parametrize(
    "script,flag", [(script, flag) for script, flags in CHANGES.items() for flag in flags]
)
def test_flag_changes_the_model(script, flag, toy, baselines, tmp_path):
    changed = weights(script, toy, tmp_path, **{flag: CHANGES[script][flag]})
    assert not same(changed, baselines[script])


@pytest.mark.parametrize("script", CHEAP, ids=lambda m: m.__name__)
def test_every_flag_is_accounted_for_and_runs_repeat(script, toy, baselines, tmp_path):
    names = {field.name for field in dataclasses.fields(script.Knobs)}
    told = CHANGES[script].keys() | NOT_IN_WEIGHTS[script]
    assert names == told, (
        f"{sorted(names ^ told)}: give a flag a value that changes the weights, in CHANGES of "
        "tests/test_scripts.py, or name it in NOT_IN_WEIGHTS; take out of both what is gone"
    )
    assert same(weights(script, toy, tmp_path), baselines[script])


@pytest.mark.parametrize("script", CHEAP, ids=lambda m: m.__name__)
def test_states_and_guards_do_not_change_the_model(script, toy, baselines, tmp_path):
    assert same(
        weights(script, toy, tmp_path, save_every=1, on_nonfinite="skip", resume=True),
        baselines[script],
    )
    steps = len((tmp_path / "metrics.jsonl").read_text().splitlines())
    states = sorted(int(path.stem) for path in (tmp_path / "state").glob("*.safetensors"))
    assert states == [steps - 1, steps] and steps > 1


@pytest.mark.parametrize("script", CHEAP, ids=lambda m: m.__name__)
def test_shard_needs_several_processes(script, toy, tmp_path):
    with pytest.raises(UserError, match="--shard: one process.*torchrun"):
        weights(script, toy, tmp_path, shard=True)


@pytest.mark.parametrize(
    "script",
    [sft, train_ppo, *(pytest.param(m, marks=pytest.mark.slow) for m in (train_rm, train_dpo))],
    ids=lambda m: m.__name__,
)
def test_compile_changes_only_the_rounding(script, toy, baselines, tmp_path, monkeypatch):
    import torch._dynamo

    torch._dynamo.reset()
    graphs = []
    monkeypatch.setattr(
        passes,
        "compiled_pass",
        functools.cache(
            lambda: torch.compile(passes.plain_pass, dynamic=True, backend="aot_eager")
        ),
    )
    log, counters = Run.log, torch._dynamo.utils.counters
    monkeypatch.setattr(
        Run,
        "log",
        lambda *args, **more: (
            graphs.append(counters["stats"]["unique_graphs"]) or log(*args, **more)
        ),
    )
    changed = weights(script, toy, tmp_path, compile=True)
    torch._dynamo.reset()
    assert graphs[0] > 0 and graphs[-1] == graphs[1], "compiled again after the second step"
    distance = sum((changed[k] - w).square().sum() for k, w in baselines[script].items()) ** 0.5
    moved = sum(w.square().sum() for w in changed.values()) ** 0.5
    assert distance < 0.02 * moved


def test_kl_horizon_and_eval_samples(toy, tmp_path):
    slow = weights(train_ppo, toy, tmp_path / "a", kl_target=0.001, kl_horizon=10)
    fast = weights(train_ppo, toy, tmp_path / "b", kl_target=0.001, kl_horizon=1000, eval_samples=7)
    assert not same(slow, fast)
    assert len((tmp_path / "b" / "samples.jsonl").read_text().splitlines()) == 7


def test_vocab_size_and_text_that_is_no_response(monkeypatch, tmp_path):
    feedback = data.load_feedback("toy")
    feedback.more_text = ["abc abc abd"] * 100  # for reward models alone
    monkeypatch.setattr(data, "load_feedback", lambda _: feedback)
    knobs = CHEAP[sft] | {"batch_size": 20, "vocab_size": 270}
    sft.main(sft.Knobs(data="words", out=str(tmp_path), **knobs))
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2 * 89  # of 1,776 words
    assert json.loads((tmp_path / "model" / "config.json").read_text())["vocab_size"] == 270


@pytest.mark.parametrize("micro_batch", [0, 2, 3])
def test_micro_batches_do_not_change_the_update(micro_batch, toy, baselines, tmp_path):
    few = {
        "adam_eps": 1e-3,
        "steps": 2,
        "lr": 1e-3,
    }  # over more, rounding grows until another token is sampled
    changed = weights(train_ppo, toy, tmp_path, micro_batch=micro_batch, **few)
    whole = weights(train_ppo, toy, tmp_path, micro_batch=8, **few)
    for name, w in whole.items():
        torch.testing.assert_close(changed[name], w, atol=2e-5, rtol=1e-4)


def run(*command, cwd, **env):
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        capture_output=True,
        text=True,
        env=os.environ
        | {"HF_HUB_OFFLINE": "1"}
        | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        | env,
    )


def bad_data(tmp_path, text):
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    return path


GOOD = json.dumps({"prompt": "p", "chosen": "good", "rejected": "bad"}) + "\n"
MISTAKES = {
    "broken line": (GOOD * 2 + '{"prompt": "p"\n', "line 3"),
    "missing key": (GOOD + '{"prompt": "p", "chosen": "x"}\n', "line 2"),
    "empty file": ("", "no records"),
    "too long": (
        "".join(GOOD.replace("good", "word " * 90).replace('"p"', f'"{i}"') for i in range(12)),
        "context of 64",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("script", ["train_rm.py", "train_dpo.py"])
def test_bad_files_are_one_line_and_leave_nothing(script, mistake, toy, tmp_path):
    text, expected = MISTAKES[mistake]
    done = run(
        ROOT / script,
        "--data",
        bad_data(tmp_path, text),
        "--init",
        toy / "sft",
        "--out",
        tmp_path / "out",
        cwd=tmp_path,
    )
    message = done.stderr.strip().splitlines()
    assert (
        done.returncode == 2
        and len(message) == 1
        and message[0].startswith("error: ")
        and expected in message[0]
    ), done.stderr
    assert (
        not (tmp_path / "out" / "model").exists()
        and not (tmp_path / "out" / "summary.json").exists()
    )


@pytest.mark.parametrize(
    "flags,expected",
    [
        (["--no-such-flag", "1"], "--no-such-flag"),
        (["--step", "1"], "--step"),  # no abbreviations
        (["--steps", "many"], "--steps"),
        (["--data", "nowhere"], "--data nowhere"),
        (["--data", "missing.jsonl"], "no such file"),
        (["--response-length", "64"], "context"),
        (["--response-length", "60"], "context"),
        (["--device", "tpu9"], "--device tpu9"),
        (["--dtype", "int3"], "argument --dtype"),
        (["--init", "nowhere/model"], "nowhere/model"),
        (["--reward", "nowhere/model"], "nowhere/model"),
        (["--reward", "nowhere.py:f"], "nowhere.py"),
        (["--reward", "nowhere.rules:f"], "nowhere.rules:f"),
        (["--kl-in", "loss"], "--kl-kind k2 or k3"),
        (["--kl-kind", "k9"], "argument --kl-kind"),
    ],
)
def test_bad_flags(flags, expected, toy, tmp_path):
    base = {
        "--data": "toy",
        "--init": toy / "sft",
        "--reward": toy / "rm",
        "--out": tmp_path / "out",
    }
    given = [x for pair in base.items() if pair[0] not in flags for x in pair]
    done = run(ROOT / "train_ppo.py", *given, *flags, cwd=tmp_path)
    assert done.returncode == 2 and expected in done.stderr and "Traceback" not in done.stderr, (
        done.stderr
    )
    assert not (tmp_path / "out" / "summary.json").exists()


OFFLINE = dict(samples=3, mixture=0.5)
IDLE = [  # (script, what is given, the flag that has no say beside it)
    (sft, {"init": "x", "vocab_size": 300}, "--vocab-size 300"),
    (sft, {"init": "x", "n_ctx": 32}, "--n-ctx 32"),
    (sft, {"init": "x", "n_layer": 3}, "--n-layer 3"),
    (sft, {"init": "x", "n_head": 2}, "--n-head 2"),
    (sft, {"init": "x", "n_embd": 32}, "--n-embd 32"),
    (train_rm, {"group_size": 3}, "--group-size 3"),
    (train_rm, {"loss": "ratings", "group_size": 3}, "--group-size 3"),
    (train_rm, {"model": "pairwise", "normalize": False}, "--no-normalize"),
    (train_rm, {"model": "pairwise", "response_length": 3}, "--response-length 3"),
    (train_rm, {"normalize": False, "response_length": 3}, "--response-length 3"),
    *((train_ppo, {"advantage": "rloo", name: value}, flag) for name, value, flag in (
        ("gamma", 0.5, "--gamma 0.5"), ("lam", 0.7, "--lam 0.7"), ("vf_coef", 0.5, "--vf-coef 0.5"),
        ("whiten_advantages", False, "--no-whiten-advantages"),
        ("critic", "shared", "--critic shared"), ("value_clip", 0.5, "--value-clip 0.5"))),
    (train_ppo, {"group_size": 2}, "--group-size 2"),
    (train_ppo, {"kl_horizon": 99}, "--kl-horizon 99"),
    (train_ppo, {"kl_coef": 0, "kl_target": 3}, "--kl-target 3.0"),
    (train_ppo, {"kl_coef": 0, "kl_kind": "k3"}, "--kl-kind k3"),
    (train_ppo, {"ppo_epochs": 1, "minibatches": 1, "clip": 0.1}, "--clip 0.1"),
    (train_ppo, {"reward_level": "token"}, "--reward-level token"),
    (train_ppo, {"reward_level": "response"}, "--reward-level response"),
    *((train_dpo, {name: value}, f"--{name} {value}") for name, value in OFFLINE.items()),
    (train_dpo, {"online": True, "epochs": 4}, "--epochs 4"),
    (train_dpo, {"online": True, "delete": 0.3}, "--delete 0.3"),
    (train_dpo, {"online": True, "mixture": 0.5}, "--mixture 0.5"),
    (train_dpo, {"online": True, "loss": "nash_md", "samples": 3}, "--samples 3"),
    (train_dpo, {"loss": "kto", "soft_labels": False}, "--no-soft-labels"),
    (train_dpo, {"loss": "ipo", "soft_labels": False}, "--no-soft-labels"),
    (train_dpo, {"loss": "kto", "group_size": 3}, "--group-size 3"),
    (train_dpo, {"loss": "slic", "beta": 0.5}, "--beta 0.5"),
    (train_dpo, {"loss": "pro", "beta": 0.5}, "--beta 0.5"),
]  # fmt: skip


@pytest.mark.parametrize("script, given, flag", IDLE, ids=lambda x: x if type(x) is str else "")
def test_knobs_without_a_say_are_named(script, given, flag, toy, tmp_path):
    models = {} if script is sft else {"init": toy / "sft"}
    models |= {} if script in (sft, train_rm) else {"reward": toy / "rm"}
    knobs = script.Knobs(**TOY | models | given, out=tmp_path / "out")
    with pytest.raises(UserError, match=f"^{flag} has no say .*: leave it out$"):
        script.main(knobs)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options, expected", [
    ("gamma=nan", "a finite one"), ("gamma=inf", "a finite one"), ("gamma=-1e999", "a finite one"),
    ("gamma=true", "NAME=NUMBER"), ("gamma=", "NAME=NUMBER"), ("gamma=1,gamma=1", "gamma twice"),
    ("delta=1", "loss simpo has the options"), ("=1", "has the options"),
    ("nll_weight=nan", "a finite one"), ("gamma=1,,nll_weight=x", "NAME=NUMBER"),
])  # fmt: skip
def test_loss_options_that_are_refused(options, expected):
    with pytest.raises(UserError, match=f"^--loss-options .*{expected}"):
        train_dpo.main(train_dpo.Knobs(loss="simpo", loss_options=options))
    for switch in ("1", "yes", "nan", ""):
        with pytest.raises(UserError, match="length_normalise=true or"):
            train_dpo.main(train_dpo.Knobs(loss="ipo", loss_options=f"length_normalise={switch}"))


AHEAD = [  # what can be known before the first stage is made
    (train_ppo, {"reward": "nowhere"}, "nowhere: no such directory"),
    (train_ppo, {"reward": "rules.py:score"}, "no file rules.py"),
    (train_ppo, {"reward": "mine.py:other"}, "no function other in mine.py"),
    (train_ppo, {"reward": "no.such:f"}, "no.such:f"),
    (train_ppo, {"reward": "empty"}, "not a model directory"),
    (train_rm, {"init": "nowhere"}, "nowhere: no such directory"),
    (train_dpo, {"reward": "nowhere"}, "nowhere: no such directory"),
    (train_dpo, {"reward": "true", "data": "words.jsonl"}, "no known true reward"),
    (train_dpo, {"online": True, "reward": "empty"}, "not a model directory"),
    (train_dpo, {"loss": "exo", "label_smoothing": 1.0}, "below 1"),
]  # fmt: skip


@pytest.mark.parametrize("script, given, expected", AHEAD)
def test_what_is_wrong_is_found_before_the_first_stage(
    script, given, expected, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "empty").mkdir()
    (tmp_path / "mine.py").write_text("def score(prompts, responses):\n    pass\n")
    words = [{"prompt": "", "response": "ab" * i, "rating": i} for i in range(1, 40)]
    (tmp_path / "words.jsonl").write_text("\n".join(map(json.dumps, words)))
    with pytest.raises(UserError, match=expected):
        script.main(script.Knobs(**TOY | given))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("given, expected", [
    ({"truncate": "abcdefgh", "missing_eos_score": -1.0}, "tokens of this tokenizer"),
    ({"response_length": 64}, "expected less than the context of the base model"),
])  # fmt: skip
def test_what_the_base_model_shows_is_found_before_a_reward_model_is_made(
    given, expected, toy, tmp_path
):
    with pytest.raises(UserError, match=expected):
        train_ppo.main(train_ppo.Knobs(**TOY, init=toy / "sft", out=tmp_path / "ppo", **given))
    assert not list(tmp_path.iterdir())


def test_a_rule_is_run_once(toy, tmp_path):
    (tmp_path / "rule.py").write_text(
        f"open({str(tmp_path / 'runs')!r}, 'a').write('x')\n"
        "def score(prompts, responses):\n    return [0.0] * len(responses)\n"
    )
    given = TOY | CHEAP[train_ppo] | {"steps": 1, "reward": f"{tmp_path}/rule.py:score"}
    train_ppo.main(train_ppo.Knobs(**given, init=toy / "sft", out=tmp_path / "out"))
    assert (tmp_path / "runs").read_text() == "x"


EXTREMES = [
    (sft, {"n_ctx": 3, "overlong": "truncate"}, None), (sft, {"n_ctx": 2}, "at least 3"),
    (sft, {"n_ctx": 1}, "at least 3"), (sft, {"n_ctx": 4}, "exceed the context of 4"),
    (sft, {"micro_batch": 10**6}, None), (sft, {"lr": 0.0}, None),
    (sft, {"vocab_size": 1}, "at least 257"),
    (sft, {"seed": 2**64 - 1}, None), (sft, {"lr": 1e30}, "not finite|lower --lr|^$"),
    (train_rm, {"micro_batch": 10**6}, None), (train_rm, {"seed": 2**64 - 1}, None),
    (train_rm, {"delete": 0.99, "dropout": 0.99}, None),
    (train_ppo, {"batch_size": 1, "minibatches": 1}, None), (train_ppo, {"batch_size": 4}, None),
    (train_ppo, {"batch_size": 1}, "--minibatches 4 of --batch-size 1"),
    (train_ppo, {"response_length": 1}, None), (train_ppo, {"micro_batch": 10**6}, None),
    (train_ppo, {"seed": 2**64 - 1, "warmup": 1.0}, None), (train_ppo, {"kl_coef": 0.0}, None),
    (train_ppo, {"steps": 0}, "--steps 0: expected at least 1"),
    (train_ppo, {"response_length": 10**9}, "context"), (train_ppo, {"top_k": 10**6}, None),
    (train_ppo, {"temperature": 1e-6}, None), (train_ppo, {"eval_samples": 1}, None),
    (train_dpo, {"steps": 1, "micro_batch": 10**6}, None), (train_dpo, {"steps": 10**9}, None),
    (train_dpo, {"batch_size": 1, "steps": 2}, "expected at least 2 responses"),
    (train_dpo, {"batch_size": 2, "steps": 2}, None),
    (train_dpo, {"rounds": 10**6}, "--rounds 1000000: more than the"),
    (train_dpo, {"rounds": 3, "steps": 2}, "--rounds 3: more than the 2 steps"),
    (train_dpo, {"online": True, "epochs": 0, "batch_size": 2, "steps": 1}, None),
    (train_dpo, {"online": True, "batch_size": 1}, "at least 2 responses"),
    (train_dpo, {"response_length": 64}, "exceed the context"),
    (train_dpo, {"seed": 2**64 - 1, "eval_samples": 1, "steps": 1}, None),
]  # fmt: skip


@pytest.mark.parametrize("script, given, expected", EXTREMES)
def test_extremes_end_in_numbers_or_a_line(script, given, expected, toy, tmp_path):
    more = {"reward": toy / "rm"} if script is train_dpo else {}
    if script is train_ppo:
        given = {"steps": 1} | given
    if expected:
        with pytest.raises(UserError, match=expected) as caught:
            weights(script, toy, tmp_path / "out", **more | given)
        assert "\n" not in str(caught.value)
        return
    found = weights(script, toy, tmp_path / "out", **more | given)
    assert all(w.isfinite().all() for w in found.values())
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert all(value is not None for value in summary.values())


def test_no_network_and_an_empty_cache(tmp_path):
    done = run(
        ROOT / "train_ppo.py",
        cwd=tmp_path,
        MINIRLHF_CACHE=str(tmp_path / "cache"),
        PIP_NO_INDEX="1",
        PIP_FIND_LINKS="",
    )
    assert (
        done.returncode == 2
        and "could not fetch vaderSentiment" in done.stderr
        and len(done.stderr.strip().splitlines()) == 1
    )
    assert list((tmp_path / "cache").iterdir()) == [] and not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "script", ["train_rm.py", "train_ppo.py", "train_dpo.py", "-m minirlhf.sft"]
)
def test_help_shows_every_default(script, tmp_path):
    done = run(
        *([ROOT / script] if script.endswith("py") else script.split()), "--help", cwd=tmp_path
    )
    module = {"train_rm.py": train_rm, "train_ppo.py": train_ppo, "train_dpo.py": train_dpo}.get(
        script, sft
    )
    text = " ".join(done.stdout.split())
    for field in dataclasses.fields(module.Knobs):
        assert "--" + field.name.replace("_", "-") in text
        assert field.default == "" or f"(default: {field.default})" in text, field.name


def test_atomic_write_is_all_or_nothing(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_write(path) as tmp:
        tmp.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_schedule():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    rates = []
    for step in range(10):
        optim.set_lr(optimizer, step, 10, 2.0, warmup=0.2)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([1.0, 2.0, 2.0, 1.75, 1.5, 1.25, 1.0, 0.75, 0.5, 0.25])
