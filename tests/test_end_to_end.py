"""Each stage on the toy language, where the true reward is known; and what a run leaves behind."""

import json

import numpy as np
import pytest
import torch

import train_dpo
import train_ppo
import train_rm
from minirlhf import data, sft
from minirlhf.engine.cli import UserError
from minirlhf.engine.rows import pad_rows
from minirlhf.gpt import GPT, RewardModel
from minirlhf.tokenizer import Tokenizer

TINY = dict(n_layer=1, n_head=1, n_embd=16, epochs=1)  # a base model


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def true_rewards(out):
    """Of the samples of a run, before and after."""
    rows = lines(out / "samples.jsonl")
    prompts = [row["prompt"] for row in rows]
    both = ([row[when] for row in rows] for when in ("before", "after"))
    return [np.mean(data.toy_reward(prompts, responses)) for responses in both]


def test_base_model_knows_the_language(toy):
    summary = json.loads((toy / "sft" / "summary.json").read_text())
    # Words of 4 to 10 uniform letters and an EOS: their entropy a token, by hand, bounds the
    # perplexity from below.
    lengths = np.arange(4, 11)
    bits = (lengths.mean() * np.log(8) + np.log(7)) / (lengths.mean() + 1)
    assert np.exp(bits) * 0.98 < summary["eval/perplexity"] < np.exp(bits) * 1.1


def test_reward_model_finds_the_true_reward(toy, capsys):
    test, model = data.load_feedback("toy").test, toy / "rm" / "model"
    rm, tokenizer = RewardModel.from_pretrained(model), Tokenizer.load(model)
    texts = zip(test.prompts, test.responses, test.where, strict=True)
    rows, _ = data.encode(texts, tokenizer, 64, "error")
    scores = rm.eval()(*pad_rows(rows, tokenizer.pad)).detach().numpy()
    assert np.corrcoef(scores, data.toy_reward(test.prompts, test.responses))[0, 1] > 0.95
    summary = json.loads((toy / "rm" / "summary.json").read_text())
    means = [r.mean() for r in test.ratings]
    pairs, _ = test.comparisons(20_000, seed=1)
    agree = np.mean([scores[i] > scores[j] for i, j in pairs])
    assert summary["eval/accuracy"] == pytest.approx(agree, abs=1e-6)
    assert all(means[i] > means[j] for i, j in pairs)


def test_reward_model_is_normalised_on_base_samples(toy):
    base = GPT.from_pretrained(toy / "sft" / "model")
    rm = RewardModel.from_pretrained(toy / "rm" / "model")
    tokenizer = Tokenizer.load(toy / "rm" / "model")
    items = data.load_feedback("toy").train
    prompts = data.prompts_of(items, tokenizer, np.random.default_rng(5))[:1500]
    torch.manual_seed(9)
    off = torch.autocast("cpu", enabled=False)
    scores = train_rm.sample_scores(base, rm, prompts, 24, tokenizer, off)
    assert abs(scores.mean()) < 0.15 and abs(scores.std() - 1) < 0.15


def test_flipped_labels_turn_the_reward_model_round(toy, monkeypatch, tmp_path):
    honest = data.outvotes
    monkeypatch.setattr(data.items, "outvotes", lambda ratings: 1 - honest(ratings))
    knobs = dict(data="toy", init=str(toy / "sft"), out=str(tmp_path / "rm"), epochs=1, lr=3e-3)
    summary = train_rm.main(train_rm.Knobs(**knobs, delete=0.0, dropout=0.0))
    assert summary["eval/accuracy"] < 0.4


def ppo(toy, out, **changes):
    given = dict(data="toy", init=str(toy / "sft"), out=str(out), steps=12, batch_size=64)
    given |= dict(response_length=12, lr=2e-3, eval_samples=200)
    return train_ppo.main(train_ppo.Knobs(**given | changes))


def test_ppo_raises_the_true_reward(toy, tmp_path, capsys):
    out = tmp_path / "ppo"
    summary = ppo(toy, out, reward=str(toy / "rm"))
    printed = capsys.readouterr().out
    assert "first ratio 1.0000" in printed and "NOT" not in printed
    before, after = true_rewards(out)
    assert after > before + 0.5
    assert summary["eval/score_after"] > summary["eval/score_before"] + 0.5
    assert abs(summary["eval/kl_before"]) < 1e-4 < summary["eval/kl_after"] < 20
    metrics = lines(out / "metrics.jsonl")
    assert len(metrics) == 12 and all(np.isfinite(v) for row in metrics for v in row.values())
    assert abs(metrics[0]["objective/kl"]) < 1e-4 and metrics[0]["objective/mismatch"] < 1e-4


def test_ppo_learns_any_python_reward(toy, tmp_path):
    rule = tmp_path / "rule.py"
    rule.write_text("def score(prompts, responses):\n"
                    "    return [r.count('a') / (len(r) + 1) for r in responses]\n")  # fmt: skip
    summary = ppo(toy, tmp_path / "ppo", reward=f"{rule}:score", kl_coef=0.01)
    assert summary["eval/score_after"] > 1.5 * summary["eval/score_before"]


def dpo(toy, out, **changes):
    given = dict(data="toy", init=str(toy / "sft"), out=str(out))
    return train_dpo.main(train_dpo.Knobs(**given | changes))


SLOW = pytest.mark.slow  # test_axes.py runs all of them


@pytest.mark.parametrize(
    "loss", ["sigmoid", pytest.param("ipo", marks=SLOW), pytest.param("simpo", marks=SLOW)]
)
def test_dpo_raises_the_true_reward(toy, tmp_path, capsys, loss):
    short = dict(epochs=2, lr=1e-3, response_length=12, eval_samples=200)
    summary = dpo(toy, tmp_path / "dpo", loss=loss, **short)
    assert "NOT" not in capsys.readouterr().out
    before, after = true_rewards(tmp_path / "dpo")
    assert after > before + 0.3
    assert summary["eval/implicit_accuracy"] > 0.7


def test_all_files_are_strict_json(toy, tmp_path):
    """Without a reward model there is no score, and an option that is off is no number.

    That is null, never NaN.
    """
    short = dict(response_length=4, eval_samples=4)
    alone = tmp_path / "alone" / "dpo"
    assert "eval/score_before" not in dpo(toy, alone, steps=1, **short)
    ppo(toy, tmp_path / "alone" / "ppo", reward="true", steps=1, batch_size=4, **short)

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    files = [path for folder in (toy, tmp_path) for path in folder.glob("**/*.json*")]
    assert len(files) > 10
    for path in files:
        text = path.read_text()
        for part in text.splitlines() if path.suffix == ".jsonl" else [text]:
            json.loads(part, parse_constant=refuse)
    assert {row["score_before"] for row in lines(alone / "samples.jsonl")} == {None}


def test_a_run_directory_is_whole(toy):
    for stage in ("sft", "rm"):
        names = {p.name for p in (toy / stage).iterdir()}
        assert {"config.json", "metrics.jsonl", "samples.jsonl", "summary.json", "model"} <= names
        model = {p.name for p in (toy / stage / "model").iterdir()}
        assert model == {"config.json", "model.safetensors", "tokenizer.json"}
        summary = json.loads((toy / stage / "summary.json").read_text())
        said = {"seconds", "seed", "command", "torch", "numpy", "python", "device"}
        assert said <= summary.keys()


def few_pairs(folder, prompt="p{}"):
    pair = {"chosen": "good", "rejected": "bad"}
    return write(folder / "pairs.jsonl", [{"prompt": prompt.format(i)} | pair for i in range(20)])


def test_stages_before_are_made_once(tmp_path, capsys, monkeypatch):
    made, real = [], sft.main
    small = sft.Knobs(data="toy", out=str(tmp_path / "sft"), **TINY, batch_size=256)
    monkeypatch.setattr(sft, "main", lambda knobs: made.append(knobs.out) or real(small))

    def reward_model(source, name):
        given = dict(data=source, out=str(tmp_path / name), epochs=1, batch_size=512)
        train_rm.main(train_rm.Knobs(**given, response_length=2))

    for _ in range(2):
        reward_model("toy", "rm")
    assert made == [str(tmp_path / "sft")]
    with pytest.raises(UserError, match="made from --data toy"):
        reward_model(few_pairs(tmp_path), "rm2")


def test_pairs_from_a_file_go_through_all_stages(tmp_path):
    source = few_pairs(tmp_path)

    def stage(script, name, **changes):
        return script.main(script.Knobs(data=source, out=str(tmp_path / name), **changes))

    stage(sft, "sft", vocab_size=300, n_layer=1, n_head=1, n_embd=32, epochs=5, lr=2e-3)
    rm = stage(train_rm, "rm", epochs=20, lr=1e-2)
    assert rm["eval/accuracy"] == 1.0
    policy = stage(train_ppo, "ppo", steps=1, batch_size=8, response_length=6)
    assert np.isfinite(policy["eval/score_after"])
    policy = stage(train_dpo, "dpo", epochs=20, lr=1e-2, response_length=6)
    assert policy["eval/implicit_accuracy"] == 1.0


def test_long_prompts_lose_their_left_end_only_when_asked(tmp_path, capsys):
    source = few_pairs(tmp_path, prompt="{} " + "abcdefgh " * 40)

    def stage(script, name, **changes):
        given = dict(data=source, overlong="truncate", out=str(tmp_path / name))
        script.main(script.Knobs(**given | changes))

    small = dict(TINY, vocab_size=257)
    with pytest.raises(UserError, match="line .* exceed the context of 64"):
        stage(sft, "sft", **small, overlong="")
    stage(sft, "sft", **small)
    stage(train_rm, "rm", epochs=1)
    stage(train_ppo, "ppo", steps=1, batch_size=4)
    stage(train_dpo, "dpo", epochs=1)
    assert "lost their left end" in capsys.readouterr().out
    with pytest.raises(UserError, match="exceed the context by"):
        stage(train_ppo, "ppo", steps=1, batch_size=4, overlong="")
