"""The machinery around a step: seeds, the norm of the gradients, a step that is made or not; the
knobs, and what a program says and leaves when it ends."""

import ast
import contextlib
import dataclasses
import inspect
import io
import math
import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import train_dpo
import train_ppo
import train_rm
from minirlhf import sft
from minirlhf.bench import plan
from minirlhf.engine import cli, optim, terminal
from minirlhf.engine.cli import RunKnobs, UserError, knob
from minirlhf.engine.contain import at_end, caught_signals
from minirlhf.engine.files import FileError, MissingFile, atomic_write, file_errors, read_json
from minirlhf.engine.log import Run
from minirlhf.engine.machine import seed_everything
from minirlhf.engine.optim import gradient_norm, optimizer_step
from minirlhf.engine.weights import local_directory

ROOT = Path(__file__).parent.parent
SCRIPTS = [sft, train_rm, train_ppo, train_dpo, plan]
by_name = dict(ids=lambda module: getattr(module, "__name__", ""))


# Seeds


def draws(seed, step=None):
    """What each generator gives after seeding, the returned one first."""
    rng = seed_everything(seed, step)
    return (
        rng.random(3).tolist(),
        random.random(),
        np.random.random(3).tolist(),
        torch.rand(3).tolist(),
        torch.initial_seed(),
    )


def test_seeds_repeat_and_differ():
    """For a run and for each of its steps, whatever was drawn before."""
    keys = [(0, None), (1, None), *((seed, step) for seed in (0, 1) for step in (0, 1, 2, 1000))]
    found = {key: draws(*key) for key in keys}
    for key in reversed(keys):
        assert draws(*key) == found[key]
    for kind in zip(*found.values(), strict=True):
        assert len({str(value) for value in kind}) == len(keys)


def test_a_steps_seed_is_of_nothing_but_its_number():
    seed_everything(3, 4)
    first = torch.rand(2), np.random.random(2), random.random()
    seed_everything(3)
    torch.rand(100), np.random.random(7), random.random()
    seed_everything(3, 3)
    seed_everything(3, 4)
    assert torch.equal(torch.rand(2), first[0])
    assert np.array_equal(np.random.random(2), first[1])
    assert random.random() == first[2]


# A step


SHAPES = [(7, 5), (5,), (3, 4, 2), (1, 1), (1000, 3)]


def parameters(scale=1.0, seed=0):
    """Parameters with gradients, and one without."""
    generator = torch.Generator().manual_seed(seed)
    found = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    for p in found:
        p.grad = scale * torch.randn(p.shape, generator=generator)
    return [*found, torch.nn.Parameter(torch.randn(2, 2))]


def numpy_norm(found):
    gradients = [p.grad.numpy().astype(np.float64) for p in found if p.grad is not None]
    return math.sqrt(sum((g**2).sum() for g in gradients))


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_gradient_norm_is_that_of_all_numbers(scale):
    found = parameters(scale)
    norm = gradient_norm(found)
    assert norm.shape == ()
    assert norm.item() == pytest.approx(numpy_norm(found), rel=1e-6)


def test_a_large_gradient_does_not_hide_small_ones():
    """As float32 sums would: 4,000 rows of 1e-4 beside one of 1."""
    p = torch.nn.Parameter(torch.zeros(4001, 1))
    p.grad = torch.full((4001, 1), 1e-4)
    p.grad[0] = 1
    assert gradient_norm([p]).item() == pytest.approx(math.sqrt(1 + 4000e-8), abs=6e-8)


@pytest.mark.parametrize("most", [0, 0.5, 1e6])
def test_a_step_by_clipped_gradients(most):
    """Gradient descent with rate 1, against NumPy; returned are the loss and the norm before it."""
    found = parameters()
    norm = numpy_norm(found)
    factor = min(1.0, most / norm) if most else 1.0
    expected = []
    for p in found:
        gradient = 0 if p.grad is None else p.grad.numpy()
        expected.append(p.detach().clone().numpy() - factor * gradient)
    descent = torch.optim.SGD(found, lr=1.0)
    loss, got = optimizer_step(descent, most, torch.tensor(1.25, requires_grad=True))
    assert loss == 1.25 and got == pytest.approx(norm, rel=1e-6)
    assert type(loss) is type(got) is float
    for p, e in zip(found, expected, strict=True):
        np.testing.assert_allclose(p.detach(), e, rtol=1e-5, atol=1e-6)
        assert p.grad is None


@pytest.mark.parametrize("most", [0, 1.0])
@pytest.mark.parametrize("broken", ["loss", "gradient"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_no_step_is_made_by_numbers_that_are_none(value, broken, most):
    seen = []
    for nonfinite in (None, lambda *figures: seen.append(figures)):
        found = parameters()
        before = [p.detach().clone() for p in found]
        optimizer = optim.make_optimizer(torch.nn.ParameterList(found), 0.1)
        loss = torch.tensor(2.0)
        if broken == "loss":
            loss = loss * value
        else:
            found[2].grad[1, 1, 1] = value
        if nonfinite is None:
            with pytest.raises(UserError, match="loss.*gradient norm"):
                optimizer_step(optimizer, most, loss)
        else:
            optimizer_step(optimizer, most, loss, nonfinite)
            ((loss, norm),) = seen
            assert math.isfinite(loss) == (broken != "loss")
            assert math.isfinite(norm) == (broken == "loss")
            assert all(p.grad is None for p in found)  # nothing of it comes into the next step
        assert all(torch.equal(p, b) for p, b in zip(found, before, strict=True))
        assert not optimizer.state


def test_adamw_is_the_one_of_torch():
    """To the last bit, with a group that joins later, and after a state has been loaded."""
    results = []
    for kind in (optim.AdamW, torch.optim.AdamW):
        generator = torch.Generator().manual_seed(0)
        weights = [torch.randn(5, 3, generator=generator).requires_grad_() for _ in range(3)]
        optimizer = kind(weights[:2], 0.1, betas=(0.9, 0.95), weight_decay=0.3, fused=True)
        for step in range(6):
            if step == 2:
                optimizer.add_param_group({"params": weights[2:], "weight_decay": 0.0})
            if step == 4:
                state = optimizer.state_dict()
                optimizer = kind([{"params": weights[:2]}, {"params": weights[2:]}], fused=True)
                optimizer.load_state_dict(state)
            for p in weights:
                p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step()
            assert torch.is_grad_enabled()
        optimizer.zero_grad()
        assert all(p.grad is None for p in weights)
        results.append(torch.stack(weights).detach())
    assert torch.equal(*results)


def test_a_step_does_not_load_what_compiles():
    """torch._dynamo takes seconds and 145 MB, and much of torch loads it at the first call."""
    code = """
        import sys, torch
        from minirlhf.engine.optim import make_optimizer, optimizer_step
        from minirlhf.gpt import GPT, GPTConfig
        from minirlhf.kernels import token_logprobs
        model = GPT(GPTConfig(vocab_size=50, n_ctx=8, n_layer=1, n_head=1, n_embd=4))
        optimizer = make_optimizer(model, 0.1)
        tokens = torch.arange(8)[None]
        hidden = model.hidden(tokens)[0, :-1]
        loss = -token_logprobs(hidden, model.lm_head_weight, tokens[0, 1:]).mean()
        loss.backward()
        optimizer_step(optimizer, 1.0, loss)
        print(len(optimizer.state), "torch._dynamo" in sys.modules)
    """
    command = [sys.executable, "-c", inspect.cleandoc(code)]
    said = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    states, loaded = said.split()
    assert int(states) > 5 and loaded == "False"


# Knobs made in Python are checked as flags are


@dataclasses.dataclass(kw_only=True)
class Small(cli.Checked):
    steps: int = knob(3, "a whole number", least=1)
    share: float = knob(1, "a number whose default is whole", most=2)
    score: float = knob(math.nan, "nan is off", least=-math.inf)
    out: str = knob("runs", "a text", free=True)
    soft: bool = knob(True, "yes or no")
    kind: str = knob("a", "one of two", ("a", "b"))
    nothing: str = knob(None, "a text that may be missing")


@pytest.mark.parametrize("name, given, expected", [
    ("steps", 5, 5), ("steps", np.int64(5), 5), ("steps", np.uint8(5), 5), ("steps", 5.0, 5),
    ("steps", np.float32(5), 5), ("share", 2, 2.0), ("share", 1.5, 1.5),
    ("share", np.int32(2), 2.0), ("share", np.float32(0.5), 0.5), ("share", np.float64(0.5), 0.5),
    ("score", -7, -7.0),
    ("out", "x", "x"), ("out", Path("x/y"), str(Path("x/y"))), ("out", np.str_("x"), "x"),
    ("soft", False, False), ("soft", np.bool_(False), False), ("kind", "b", "b"),
    ("nothing", "x", "x"), ("nothing", None, None),
])  # fmt: skip
def test_a_value_is_taken_as_its_knobs_type(name, given, expected):
    found = getattr(Small(**{name: given}), name)
    assert found == expected and type(found) is type(expected)


def test_defaults_have_their_types_too():
    knobs = Small()
    assert type(knobs.share) is float and math.isnan(knobs.score)


@pytest.mark.parametrize("name, given, message", [
    ("steps", True, "--steps True: expected a whole number"),
    ("steps", "3", "--steps '3': expected a whole number"),
    ("steps", None, "--steps None: expected a whole number"),
    ("steps", 2.5, "--steps 2.5: expected a whole number"),
    ("steps", math.nan, "--steps nan: expected a whole number"),
    ("steps", math.inf, "--steps inf: expected a whole number"),
    ("steps", torch.tensor(3), "--steps tensor(3): expected a whole number"),
    ("steps", 0, "--steps 0: expected at least 1"),
    ("steps", 0.0, "--steps 0: expected at least 1"),
    ("share", False, "--share False: expected a number"),
    ("share", np.bool_(True), "True.*: expected a number"),
    ("share", "0.5", "--share '0.5': expected a number"),
    ("share", None, "--share None: expected a number"),
    ("share", 3, "--share 3.0: expected 0 to 2"),
    ("share", -0.1, "--share -0.1: expected 0 to 2"),
    ("share", math.nan, "--share nan: expected 0 to 2"),
    ("out", 3, "--out 3: expected text"),
    ("out", None, "--out None: expected text"),
    ("out", b"runs", "--out b'runs': expected text"),
    ("soft", "yes", "--soft 'yes': expected true or false"),
    ("soft", 1, "--soft 1: expected true or false"),
    ("soft", None, "--soft None: expected true or false"),
    ("kind", "c", "--kind 'c': expected one of 'a', 'b'"),
    ("kind", 1, "--kind 1: expected text"),
    ("nothing", 1, "--nothing 1: expected text"),
])  # fmt: skip
def test_another_type_or_value_is_refused(name, given, message):
    pattern = message if ".*" in message else f"^{re.escape(message)}$"
    with pytest.raises(UserError, match=pattern):
        Small(**{name: given})


@pytest.mark.parametrize("given, said", [
    ({"steps": 4}, "--steps 4 has no say here: leave it out"),
    ({"soft": False}, "--no-soft has no say here"),
    ({"score": -1.0}, "--score -1.0 has no say"), ({"kind": "b"}, "--kind b has no say"),
    ({"nothing": ""}, "--nothing  has no say"),
])  # fmt: skip
def test_a_knob_without_a_say_is_refused(given, said):
    names = "steps soft score kind nothing"
    with pytest.raises(UserError, match=re.escape(said)):
        cli.refuse_idle(Small(**given), {"there": "", "here": names})
    for idle in ({"here": names}, {"here": False}, {"here": 0.0}, {}):
        cli.refuse_idle(Small(), idle)  # to give the default is to say nothing
    cli.refuse_idle(Small(**given), {"here": "out"})


@pytest.mark.parametrize("seed", [-1, 2**64, 10**30, 1.5])
def test_seeds_that_are_refused(seed):
    with pytest.raises(UserError, match=f"--seed {seed}: expected"):
        RunKnobs(seed=seed)


def test_the_largest_seed():
    seed = RunKnobs(seed=2**64 - 1).seed
    assert draws(seed) == draws(seed) != draws(seed - 1)
    assert draws(seed, 3) == draws(seed, 3) != draws(seed, 4)
    torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("script", SCRIPTS, **by_name)
def test_every_knob_is_checked(script):
    """That is: each takes its default, and nothing of another type or beside its choices."""
    defaults = dataclasses.asdict(script.Knobs())
    for field in dataclasses.fields(script.Knobs):
        value = defaults[field.name]
        assert type(value) is field.type
        script.Knobs(**{field.name: field.default})
        flag = "--" + field.name.replace("_", "-")
        wrong = {bool: "yes", int: 2.5, float: "much", str: 7}[field.type]
        with pytest.raises(UserError, match=f"{flag} .*: expected"):
            script.Knobs(**{field.name: wrong})
        if field.metadata["choices"]:
            with pytest.raises(UserError, match=f"{flag} 'neither': expected one of"):
                script.Knobs(**{field.name: "neither"})


@pytest.mark.parametrize("script", SCRIPTS, **by_name)
def test_help_shows_the_scripts_own_knobs_first(script, capsys):
    with pytest.raises(SystemExit) as end:
        cli.parse(script.Knobs, script.__doc__, ["--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out.split("\nknobs of this script:\n")[1]
    own, *rest = shown.split("\nknobs of every run:\n")
    everyone = {field.name for field in dataclasses.fields(RunKnobs)}
    if script is plan:
        everyone = set()
    assert len(rest) == bool(everyone)
    for field in dataclasses.fields(script.Knobs):
        flag = f"  --{field.name.replace('_', '-')}"
        part = rest[0] if field.name in everyone else own
        lines = [line for line in part.splitlines() if line.startswith(flag)]
        assert lines, flag


def test_the_knobs_of_every_run_are_said_in_a_line():
    for field in dataclasses.fields(RunKnobs):
        assert 20 < len(field.metadata["help"]) <= 100, field.name


# What a program says when it ends


def ends(error, capsys):
    """The exit code and the last line of a script whose main function raises this."""

    def main(knobs):
        raise error

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(sys, "argv", ["script.py"])
        cli.run_script(main, Small, "")
    return end.value.code, capsys.readouterr().err.strip()


@pytest.mark.parametrize("error", [UserError("a b\nc"), FileError("a b\nc"), MissingFile("a b c")])
def test_what_the_user_can_mend_is_one_line(error, capsys):
    assert ends(error, capsys) == (2, "error: a b c")


def test_out_of_gpu_memory_names_the_knobs(capsys):
    memory = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
    code, said = ends(memory, capsys)
    assert code == 2
    for word in ("20.00 GiB", "--micro-batch", "--batch-size", "--dtype bfloat16", "--shard"):
        assert word in said


def test_interrupted(capsys):
    assert ends(KeyboardInterrupt(), capsys) == (130, "interrupted")


MISTAKES = [OSError(5, "x"), FileNotFoundError(2, "x", "y"), TypeError("x"), ValueError("x"),
            RuntimeError("x"), BrokenPipeError(32, "x"), MemoryError()]  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda e: type(e).__name__)
def test_a_forks_own_mistake_keeps_its_traceback(mistake, capsys, monkeypatch):
    def own_reward():
        raise mistake

    monkeypatch.setattr(sys, "argv", ["script.py"])
    with pytest.raises(type(mistake)) as caught:
        cli.run_script(lambda knobs: own_reward(), Small, "")
    assert caught.value is mistake and caught.traceback[-1].name == "own_reward"
    assert capsys.readouterr().err == ""


LOOP = """
from minirlhf.engine import cli
def main(knobs):
    while True:
        print("x" * 100, flush=True)
cli.run_script(main, cli.RunKnobs, "")
"""


def test_a_closed_pipe_is_one_line():
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    pipes["env"] = os.environ | {"PYTHONPATH": str(ROOT)}
    program = subprocess.Popen([sys.executable, "-c", LOOP], **pipes)
    program.stdout.readline()
    program.stdout.close()
    said = program.stderr.read()
    assert program.wait(60) == 2 and said.strip() == "error: standard output: Broken pipe"


# What is printed

STRANGE = "a\x1b[31mred\r\x07\x9b2J\u202egnp.exe\u200b\x7f é 日本\u3000😀 \ud83d\tb\nc"
PLAIN = r"a\x1b[31mred\x0d\x07\x9b2J\u202egnp.exe\u200b\x7f é 日本" "\u3000😀 \\ud83d\tb\nc"


def test_what_is_not_printable_is_escaped():
    assert terminal.printable(STRANGE) == PLAIN
    assert terminal.printable(PLAIN) == PLAIN
    plain = "".join(map(chr, range(32, 127))) + "\n\t"
    assert terminal.printable(plain, "ascii") == plain


@pytest.mark.parametrize("encoding, shown", [
    ("utf-8", PLAIN), ("utf-16", PLAIN),
    ("latin-1", PLAIN.replace("日本\u3000😀", r"\u65e5\u672c\u3000\U0001f600")),
    ("ascii", PLAIN.replace("é 日本\u3000😀", r"\xe9 \u65e5\u672c\u3000\U0001f600")),
])  # fmt: skip
def test_any_encoding_takes_any_text(encoding, shown):
    raw = io.BytesIO()
    out = terminal.Terminal(io.TextIOWrapper(raw, encoding=encoding, newline=""))
    print(STRANGE, file=out, flush=True)
    assert raw.getvalue().decode(encoding) == shown + "\n"


SAYS = """
import sys
from minirlhf.engine import cli, terminal
@cli.contained
def main(knobs):
    bar = terminal.progress_bar("sft", 5000, 0)
    for i in range(5000):
        bar.update()
        terminal.say_above(bar, "x\\x1b[31m\\r\\u202e\\u00e9" * 5)
    bar.close()
    print("kept", file=sys.__stderr__)
    raise cli.UserError("\\x1b[31mred\\u202e\\udc80")
cli.run_script(main, cli.RunKnobs, "")
"""


@pytest.mark.parametrize("out", ["read", "closed", "full", "none"])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
def test_output_costs_nothing_but_words(out, encoding):
    """A run goes on to its end, whatever happens to its output; nothing steers the terminal."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    pipes["env"] = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": encoding}
    command = [sys.executable, "-c", SAYS]
    if out == "full":
        pipes["stdout"] = open("/dev/full", "w")  # noqa: SIM115
    elif out == "none":
        command = ["sh", "-c", '"$@" >&-', "sh", *command]
    program = subprocess.Popen(command, **pipes)
    if out == "closed":
        program.stdout.readline()
        program.stdout.close()
        said = program.stderr.read()
    else:
        shown, said = program.communicate()
    said = said.decode(encoding).splitlines()
    assert program.wait(60) == 2 and "kept" in said
    assert said[-1] == r"error: \x1b[31mred\u202e\udc80"
    notes = [line for line in said if line.startswith("note: going on without output: ")]
    assert len(notes) == (out in ("closed", "full")) and len(said) <= 4
    if out == "read":
        shown = shown.decode(encoding)
        assert r"x\x1b[31m\x0d\u202e" in shown and "\x1b" not in shown and "\u202e" not in shown
        assert (r"\xe9" in shown) == (encoding == "ascii")


def test_an_interrupt_while_torch_is_imported_says_nothing():
    code = (
        "import os, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ignored in the background
        "import minirlhf.engine.interrupts\n"
        "assert 'torch' not in sys.modules\n"
        "os.kill(os.getpid(), signal.SIGINT)\n"
        "import torch\n"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


@pytest.mark.parametrize("name", ["train_rm", "train_ppo", "train_dpo", "minirlhf/sft"])
def test_programs_are_ready_for_interrupts_first(name):
    """And those that import them are left alone."""
    tree = ast.parse((ROOT / f"{name}.py").read_text())
    first = tree.body[1]
    assert ast.unparse(first.test) == "__name__ == '__main__'"
    assert ast.unparse(first.body[0]) == "import minirlhf.engine.interrupts"
    assert "minirlhf.engine.interrupts" not in sys.modules


def test_our_own_files_are_the_users_to_mend(tmp_path):
    """A UserError, so one line; and still the OSError that the docstrings promise."""
    with pytest.raises(MissingFile, match=f"^{tmp_path}/no.json: No such file or directory$") as e:
        read_json(tmp_path / "no.json")
    assert isinstance(e.value, (UserError, FileNotFoundError))
    with pytest.raises(FileNotFoundError, match="nowhere: no such directory"):
        local_directory(tmp_path / "nowhere")
    with pytest.raises(FileError, match=f"^{tmp_path}: Is a directory$"):
        read_json(tmp_path)
    with pytest.raises(MissingFile), atomic_write(tmp_path / "no" / "file") as tmp:
        tmp.write_text("x")
    with pytest.raises(FileError, match="^x: full$"), file_errors("x"):
        raise OSError("full")
    with pytest.raises(TypeError), file_errors("x"):
        raise TypeError


# A stage leaves the process as it found it


def surroundings():
    """All that a stage might change of a process."""
    name, keys, *place = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), *place),
        "torch": torch.get_rng_state().tolist(),
        "seed": torch.initial_seed(),
        "precision": precision(),
        "handlers": {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, 1)},
        "stdout": sys.stdout,
        "path": list(sys.path),
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "gradients": torch.is_grad_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "threads": torch.get_num_threads(),
        "type": torch.get_default_dtype(),
    }


def precision():
    """Of torch's fp32 products, by the switches of torch 2.9 and newer where it has them."""
    if not hasattr(torch.backends, "fp32_precision"):
        return torch.get_float32_matmul_precision()
    places = torch.backends, torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    return [place.fp32_precision for place in places]


@pytest.fixture
def guest():
    """A process with settings of its own, which come back afterwards."""
    handler = signal.signal(signal.SIGTERM, lambda *_: None)
    precision, state = torch.get_float32_matmul_precision(), torch.get_rng_state()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(precision)
    torch.set_rng_state(state)
    signal.signal(signal.SIGTERM, handler)


@cli.contained
def changes_all(error=None):
    seed_everything(1234)
    torch.set_float32_matmul_precision("medium")
    sys.stdout = sys.stderr
    with caught_signals():
        if error:
            raise error
        return "done"


@pytest.mark.parametrize("newer", [False, True])
@pytest.mark.parametrize("error", [None, ValueError("x"), KeyboardInterrupt(), SystemExit(3)])
def test_state_is_put_back(error, newer, guest):
    if newer:
        if not hasattr(torch.backends, "fp32_precision"):
            pytest.skip("torch 2.9 or newer")
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    else:
        assert torch.get_float32_matmul_precision() == "high"
    before = surroundings()
    if error is None:
        assert changes_all() == "done"
    else:
        with pytest.raises(type(error)) as caught:
            changes_all(error)
        assert caught.value is error
    assert surroundings() == before
    if not newer:
        assert torch.get_float32_matmul_precision() == "high"


def test_stages_within_stages(guest):
    """Each ends what it began, the inner before the outer, and each last thing first."""
    ended = []

    @cli.contained
    def inner():
        at_end(lambda: ended.append("inner 1"))
        at_end(lambda: ended.append("inner 2"))
        seed_everything(5)
        raise LookupError

    @cli.contained
    def outer():
        at_end(lambda: ended.append("outer"))
        seed_everything(6)
        before = surroundings()
        with pytest.raises(LookupError):
            inner()
        assert surroundings() == before and ended == ["inner 2", "inner 1"]
        return torch.initial_seed()

    before = surroundings()
    assert outer() == 6 and outer.__name__ == "outer"
    assert surroundings() == before and ended[2:] == ["outer"]
    at_end(lambda: ended.append("never"))
    assert len(ended) == 3


def test_an_end_that_fails_stops_no_other(guest):
    before, ended = surroundings(), []

    @cli.contained
    def main():
        seed_everything(5)
        at_end(lambda: ended.append(1))
        at_end(lambda: 1 / 0)

    with pytest.raises(ZeroDivisionError):
        main()
    assert ended == [1] and surroundings() == before


def test_signals_are_caught_for_a_while(guest):
    before = surroundings()
    with caught_signals() as caught:
        os.kill(os.getpid(), signal.SIGTERM)
        assert caught == [signal.SIGTERM]
        os.kill(os.getpid(), signal.SIGHUP)  # a closed terminal sends two
        os.kill(os.getpid(), signal.SIGHUP)
        with pytest.raises(SystemExit) as end:
            os.kill(os.getpid(), signal.SIGINT)
        assert end.value.code == 130
    assert surroundings() == before


def test_a_hang_up_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with caught_signals() as caught:
        os.kill(os.getpid(), signal.SIGHUP)
    assert not caught and signal.signal(signal.SIGHUP, before) == signal.SIG_IGN


TINY = dict(data="toy", n_layer=1, n_head=1, n_embd=8, epochs=1, batch_size=600, save_every=1)


@pytest.mark.parametrize("fails", [False, True])
def test_a_stage_is_a_good_guest(fails, guest, tmp_path, monkeypatch, capsys):
    """And its directory is free again, for this process and for others."""
    before, raised = surroundings(), contextlib.nullcontext()
    if fails:
        monkeypatch.setattr(Run, "log", lambda *_, **__: [][0])
        raised = pytest.raises(IndexError)
    with raised as kept:  # a traceback that holds the run does not hold the lock
        sft.main(sft.Knobs(out=tmp_path, **TINY))
    assert surroundings() == before
    lock = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'a'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    subprocess.run([sys.executable, "-c", lock, tmp_path / "state" / "lock"], check=True)
    monkeypatch.undo()
    sft.main(sft.Knobs(out=tmp_path, **TINY))
    assert fails == (kept is not None) and surroundings() == before
