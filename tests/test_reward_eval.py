"""`python -m minirlhf.reward_eval A B`: its figures by loops here, and a page that strangers' texts
cannot harm."""

import itertools
import json
import runpy
import subprocess
import sys
import xml.etree.ElementTree as xml
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from minirlhf import data, reward_eval
from minirlhf.engine.cli import UserError
from minirlhf.feedback.preference_model import PreferenceModel
from minirlhf.gpt import GPT, GPTConfig, RewardModel
from minirlhf.rewards import command, compare, page, pictures, table
from minirlhf.tokenizer import Tokenizer

HOSTILE = "<script>alert(1)</script> \x1b[2J \u202egnp & </svg><img src=x onerror=alert(1)>"
RULES = """
def length(prompts, responses):
    return [len(text) / 4 for text in responses]
def vowels(prompts, responses):
    return [sum(text.count(c) for c in "aeiou") for text in responses]
def shifted(prompts, responses):
    return [7 * len(text) + 100 * len(prompt) for prompt, text in zip(prompts, responses)]
def of_prompt(prompts, responses):
    return [int(prompt.split()[0]) for prompt in prompts]
def shorter(prompts, responses):
    return [-len(text) for text in responses]
def constant(prompts, responses):
    return [1.0] * len(responses)
def nan(prompts, responses):
    return [float("nan")] * len(responses)
def compares(prompts, a, b):
    return [0.5] * len(a)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Rules, pairs with a hostile text in each prompt, and models of fresh weights."""
    folder = tmp_path_factory.mktemp("rewards")
    (folder / "rule.py").write_text(RULES)
    rng = np.random.default_rng(0)
    words = ["good", "nice", "kind", "awful", "weak", "mean", "poor", "fine"]
    lines = []
    for i in range(300):
        chosen, rejected = (" ".join(rng.choice(words, rng.integers(2, 9))) for _ in "ab")
        prompt = f"{i} {HOSTILE}"
        lines.append({"prompt": prompt, "chosen": f"{i} {chosen}", "rejected": f"{i} {rejected} x"})
    (folder / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    tokenizer = Tokenizer.train([], 257)
    config = GPTConfig(vocab_size=257, n_ctx=128, n_layer=1, n_head=1, n_embd=16)
    torch.manual_seed(0)
    kinds = {"base": GPT, "rm": RewardModel, "rm2": RewardModel, "pairwise": PreferenceModel}
    for name, kind in kinds.items():
        made = kind(config, 2) if kind is PreferenceModel else kind(config)
        made.save_pretrained(folder / name)
        tokenizer.save(folder / name)
    return folder


def evaluate(folder, a, b, *argv, source="pairs.jsonl"):
    """The figures of the command, run here with small samples."""
    names = [folder / name if (folder / name.split(":")[0]).exists() else name for name in (a, b)]
    if "--base" not in argv:
        argv = ["--base", "none", *argv]
    where = folder / source if source.endswith("jsonl") else source
    argv = [*names, "--data", where, "--prompts", 6, "--samples", 4, *argv]
    return command.main(command.parse(command.Knobs, command.__doc__, list(map(str, argv))))


# Figures


def test_figures_of_two_rules(folder, capsys):
    found = evaluate(folder, "rule.py:length", "rule.py:vowels")
    items = data.load_feedback(str(folder / "pairs.jsonl")).test
    z = []
    for better, worse in items.groups:
        texts = items.responses[better], items.responses[worse]
        vowels = [sum(c in "aeiou" for c in text) for text in texts]
        z.append((len(texts[0]) / 4 - len(texts[1]) / 4, vowels[0] - vowels[1]))
    z = np.array(z)
    credit = np.where(z > 0, 1, np.where(z == 0, 0.5, 0))
    np.testing.assert_allclose(found["accuracy"], credit.mean(0))
    # two texts to a prompt: each less the mean is half their difference
    x, y = z.T / 2
    rho = (x @ y) / np.sqrt((x @ x) * (y @ y))
    assert found["distance"]["held-out"][0] == pytest.approx(np.sqrt((1 - rho) / 2))
    same = [(1 + np.sign(one) * np.sign(other)) / 2 for one, other in z]
    assert found["alike"]["held-out"] == pytest.approx(np.mean(same))
    only_a = np.mean([one * (1 - other) for one, other in credit])
    assert found["outcomes"]["a"] == pytest.approx(only_a)
    neither = np.mean([(1 - one) * (1 - other) for one, other in credit])
    assert found["outcomes"]["neither"] == pytest.approx(neither)
    shown = capsys.readouterr().out
    assert f"{100 * credit.mean(0)[0]:.1f} +- " in shown
    row = next(line for line in shown.splitlines() if "other is wrong" in line)
    only_b = np.mean([other * (1 - one) for one, other in credit])
    assert row.split()[-4:] == [f"{100 * only_a:.1f}", "%", f"{100 * only_b:.1f}", "%"]
    assert f"{np.sqrt((1 - rho) / 2):.3f} +- " in shown


def test_samples_of_a_base_model(folder, capsys):
    """The scores are those of the sampled texts, each prompt's in a row."""
    base = ["--base", folder / "base", "--response-length", 9]
    found = evaluate(folder, "rm", "rule.py:length", *base)
    assert found["samples"].shape == (2, 6, 4)
    assert (found["samples"][1] <= 9 / 4 * 1).all()  # a byte a token: at most nine characters
    a, b = (some - some.mean(1, keepdims=True) for some in found["samples"])
    rho = (a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum())
    assert found["distance"]["samples"][0] == pytest.approx(np.sqrt((1 - rho) / 2))
    by_prompt = evaluate(folder, "rm", "rule.py:of_prompt", *base)["samples"][1]
    assert (by_prompt == by_prompt[:, :1]).all()
    assert len(set(by_prompt[:, 0])) == 6
    again = evaluate(folder, "rm", "rule.py:length", *base)
    assert (again["samples"] == found["samples"]).all()
    other = evaluate(folder, "rm", "rule.py:length", *base, "--seed", 1)
    assert (other["samples"] != found["samples"]).any()
    assert "6 prompts x 4 of" in capsys.readouterr().out


def test_what_changes_nothing_and_what_turns_all(folder):
    same = evaluate(folder, "rule.py:length", "rule.py:shifted")
    assert same["distance"]["held-out"][0] == 0
    turned = evaluate(folder, "rule.py:length", "rule.py:shorter")
    assert turned["distance"]["held-out"][0] == pytest.approx(1, abs=1e-7)
    assert turned["outcomes"]["a"] + turned["outcomes"]["b"] > 0.8
    still = evaluate(folder, "rule.py:length", "rule.py:constant")
    assert still["distance"]["held-out"][0] == 0.5
    assert still["accuracy"][1] == 0.5


def test_ratings_have_a_ceiling_and_an_error_over_texts(folder, capsys):
    """The toy has one prompt for all: what lies far apart by chance is said all the same."""
    found = evaluate(folder, "rule.py:length", "true", "--pairs", 3000, source="toy")
    distance, error = found["distance"]["held-out"]
    x, y = (some - some.mean() for some in found["scores"])
    rho = (x @ y) / np.sqrt((x @ x) * (y @ y))
    assert distance == pytest.approx(np.sqrt((1 - rho) / 2))
    assert 0.5 * (1 - rho**2) < error * len(x) ** 0.5 * 4 * distance < 2 * (1 - rho**2)  # delta
    assert found["accuracy"][1] > 0.85
    assert "a single rater" in capsys.readouterr().out


def test_the_error_of_an_accuracy(folder):
    """Of pairs that share no text it is that of a share; twice the same pairs tell no more."""
    rng = np.random.default_rng(0)
    right = (rng.random((2, 400)) < [[0.7], [0.6]]).astype(float)
    pairs = np.arange(800).reshape(400, 2)
    units = np.repeat(np.arange(400), 2)
    p = right.mean(1)
    expected = [*np.sqrt(p * (1 - p) / 400), np.std(right[0] - right[1]) / 20]
    errors = compare.accuracy_errors(right, pairs, units, rng)
    np.testing.assert_allclose(errors, expected, rtol=0.15)
    twice = compare.accuracy_errors(np.tile(right, 2), np.tile(pairs, (2, 1)), units, rng)
    np.testing.assert_allclose(twice, expected, rtol=0.15)
    of_all = np.array(list(itertools.combinations(range(30), 2)))
    right = rng.integers(0, 2, (2, len(of_all))).astype(float)
    assert (compare.accuracy_errors(right, of_all, np.arange(30), rng) > 0.01).all()


def test_disagreements_are_the_surest_and_no_text_comes_twice():
    pairs = np.array([[0, 1], [2, 3], [0, 4], [5, 6], [7, 8]])
    z_a = np.array([3.0, 1.0, 2.9, 2.0, 3.0])
    z_b = np.array([-3.0, -1.0, -2.9, -2.5, 3.0])
    assert compare.disagreements(z_a, z_b, pairs, 3) == [0, 3, 1]  # 2 has text 0, 4 is alike
    assert compare.disagreements(z_a, z_b, pairs, 1) == [0]
    assert compare.disagreements(z_a, z_a, pairs, 3) == []


def test_pairs_bound_the_texts(folder):
    found = evaluate(folder, "rule.py:length", "rule.py:vowels", "--pairs", 20)
    assert found["margins"].shape == (2, 20)
    assert found["scores"].shape == (2, 40)


# Who scores, and who is refused


def test_an_ensemble_is_the_mean(folder):
    names = [str(folder / name) for name in ("rm", "rm2")]
    both = evaluate(folder, ",".join(names), "rm", "--pairs", 10)
    other = evaluate(folder, "rm2", "rm", "--pairs", 10)
    expected = (other["scores"][0] + both["scores"][1]) / 2
    np.testing.assert_allclose(both["scores"][0], expected, atol=1e-6)


@pytest.mark.parametrize(
    ("b", "said"),
    [
        ("rule.py:nan", "expected a finite number"),
        ("rule.py:compares", "only compares, and gives no score"),
        ("pairwise", "only compares, and gives no score"),
        ("people:toy", "only compares, and gives no score"),
        ("rule.py:absent", "no function absent"),
        ("rule.py", "which function of it"),
        ("true", "no known true reward"),
        ("base", "expected a reward model"),
    ],
)
def test_refused(folder, b, said):
    with pytest.raises(UserError, match=said) as refused:
        evaluate(folder, "rule.py:length", b)
    assert "\n" not in str(refused.value)


def test_refused_by_the_command(folder, tmp_path, capsys, monkeypatch):
    """One line each, exit code 2; nothing is written over that is not ours."""
    (tmp_path / "mine.html").write_text("mine")
    rule = f"{folder}/rule.py:length"
    cases = {
        "neither A nor B is a run": [rule, rule],
        "another file lies there": [rule, rule, "--html", tmp_path / "mine.html"],
        "required: B": [rule],
        "--samples 1: expected at least 2": [rule, rule, "--samples", 1],
    }
    for said, argv in cases.items():
        monkeypatch.setattr(sys, "argv", ["reward_eval", *map(str, argv)])
        with pytest.raises(SystemExit) as ended, pytest.warns(RuntimeWarning, match="reward_eval"):
            runpy.run_module("minirlhf.reward_eval", run_name="__main__")
        assert ended.value.code == 2
        shown = capsys.readouterr().err.strip()
        assert said in shown
        assert len(shown.splitlines()) == 1
    assert (tmp_path / "mine.html").read_text() == "mine"


def test_the_run_says_which_data_and_base(tmp_path):
    run = tmp_path / "runs" / "rm"
    run.mkdir(parents=True)
    (tmp_path / "own.jsonl").write_text("")
    knobs = {"out": "runs/rm", "seed": 0, "data": "own.jsonl", "init": "", "level": "response"}
    (run / "config.json").write_text(json.dumps(knobs))
    assert command.data_of(["rule.py:f", str(run)]) == str(tmp_path / "own.jsonl")
    (run / "summary.json").write_text(json.dumps({"data": "x", "data_fingerprint": "abc"}))
    (run / "model").mkdir()
    (run / "model" / "model.safetensors").write_text("")
    other = SimpleNamespace(fingerprint=lambda: "def")
    assert "trained on other data" in command.other_data(str(run), other)
    assert command.other_data(str(run), SimpleNamespace(fingerprint=lambda: "abc")) is None


# Print and page


class Strict(HTMLParser):
    """The tags of a page; each must be closed, and none loads or runs anything."""

    def __init__(self, text):
        super().__init__()
        self.open, self.seen, self.text = [], [], ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        assert not {"src", "href", "onerror", "onclick", "onload"} & dict(attrs).keys()
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        self.text += text


def test_a_page_that_texts_cannot_harm(folder, tmp_path, capsys):
    place = tmp_path / "<b>page.html"
    base = ["--base", folder / "base", "--response-length", 9]
    found = evaluate(folder, "rm", "rule.py:vowels", *base, "--html", place, "--show", 2)
    written = place.read_text(encoding="utf-8")
    parsed = Strict(written)
    assert not {"script", "img", "link", "iframe", "b>page.html"} & set(parsed.seen)
    assert "url(" not in written
    assert "@import" not in written
    assert "\x1b" not in written
    assert "\u202e" not in written
    assert "<script>alert(1)</script>" in parsed.text  # as a text that one reads
    assert parsed.seen.count("svg") == 5
    assert f"{found['distance']['held-out'][0]:.3f} ±" in parsed.text
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert "\\x1b[2J" in printed
    assert max(map(len, printed.splitlines())) <= 80
    evaluate(folder, "rm", "rule.py:vowels", *base, "--html", place)  # ours is written over


def test_a_pair_says_who_prefers_which():
    items = SimpleNamespace(prompts=["p", "p"], responses=["one", "two"])
    held = SimpleNamespace(items=items, pairs=np.array([[1, 0]]), labels=[0.75])
    shown = Strict(page.pair(0, {"margins": np.array([[-2.0], [0.5]])}, held)).text
    assert shown.split("\n") == [
        "p",
        "",
        "75% of raters prefer this one; B prefers it, by 0.50two",
        "the other; A prefers it, by 2.00one",
        "",
    ]


def test_a_reward_of_a_hostile_name(folder, tmp_path, capsys):
    name = "<i>\x1b[1m.py"
    (folder / name).write_text(RULES)
    place = tmp_path / "page.html"
    evaluate(folder, f"{name}:length", "rule.py:length", "--html", place)
    written = place.read_text(encoding="utf-8")
    assert "i" not in Strict(written).seen
    assert "\x1b" not in written
    assert "\x1b" not in capsys.readouterr().out


def test_the_points_of_a_picture_lie_where_they_should():
    plot = pictures.Plot((0, 10), (-1, 1))
    drawn = pictures.picture("t < u", "n & m", plot, "x", "y", pictures.dots(plot, [5], [0], "a"))
    circle = xml.fromstring(drawn).find(".//circle")
    assert float(circle.get("cx")) == (pictures.LEFT + pictures.WIDTH - pictures.RIGHT) / 2
    assert float(circle.get("cy")) == (pictures.TOP + pictures.HEIGHT - pictures.BOTTOM) / 2
    assert pictures.ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1]
    assert pictures.ticks(-3.2, 11) == [0, 5, 10]
    assert pictures.ticks(0.031, 0.0325) == [0.031, 0.0315, 0.032, 0.0325]


def test_names_of_lines_do_not_lie_on_each_other():
    plot = pictures.Plot((0, 1), (0, 1))
    drawn = pictures.names(plot, [(0, "a", "a"), (0.01, "b", "b"), (0.0, "c", "c")])
    places = [float(line.get("y")) for line in xml.fromstring(f"<g>{drawn}</g>")]
    assert np.diff(places).min() >= pictures.LINE - 0.1
    assert max(places) <= pictures.HEIGHT - pictures.BOTTOM + 4.1


def test_the_scatter_is_of_scores_less_their_prompts_mean():
    values = np.array([[1.0, 3.0, np.nan], [10.0, 20.0, 30.0]])
    left = np.array([-1, 1, -10, 0, 10])
    np.testing.assert_allclose(compare.within(values), left / np.sqrt(np.mean(left**2)))
    assert (compare.within(np.full((2, 2), 0.1)) == 0).all()


def test_short_names():
    def named(*given):
        return table.short_names(given)

    assert named("runs/rm", "rule.py:f") == ["A rm", "B f"]
    assert named("x/a/rm", "x/b/rm") == ["A a", "B b"]
    assert named("rule.py:f", "other.py:f") == ["A rule.py", "B other.py"]
    assert named("true", "true") == ["A true", "B true"]


# The names that other people's code imports


def test_names_are_handed_on_without_torch():
    code = "import sys, minirlhf.reward_eval as r; print('torch' in sys.modules, len(r.__all__))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "13"]
    x, y = np.array([[0.0, 1, 2]]), np.array([[5.0, 3, 1]])
    assert reward_eval.bandit_distance(x, y) == 1
    with pytest.raises(AttributeError, match="no nothing"):
        reward_eval.nothing  # noqa: B018
