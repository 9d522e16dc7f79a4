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


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def true_rewards(rows):
    prompts = [row["prompt"] for row in rows]
    return [
        np.mean(data.toy_reward(prompts, [row[when] for row in rows]))
        for when in ("before", "after")
    ]


def test_base_model_knows_the_language(toy):
    summary = json.loads((toy / "sft" / "summary.json").read_text())
    # Words of 4 to 10 uniform letters and an EOS: their entropy a token, by hand, bounds the perplexity from below.
    lengths = np.arange(4, 11)
    bits = (lengths.mean() * np.log(8) + np.log(7)) / (lengths.mean() + 1)
    assert np.exp(bits) * 0.98 < summary["eval/perplexity"] < np.exp(bits) * 1.1


def test_reward_model_finds_the_true_reward(toy, capsys):
    test = data.load_feedback("toy").test
    rm, tokenizer = (
        RewardModel.from_pretrained(toy / "rm" / "model"),
        Tokenizer.load(toy / "rm" / "model"),
    )
    rows, _ = train_rm.encode(test, tokenizer, 64, "error")
    scores = rm.eval()(*pad_rows(rows, tokenizer.pad)).detach().numpy()
    assert np.corrcoef(scores, data.toy_reward(test.prompts, test.responses))[0, 1] > 0.95
    summary = json.loads((toy / "rm" / "summary.json").read_text())
    means = [r.mean() for r in test.ratings]
    pairs, _ = test.comparisons(20_000, seed=1)
    agree = np.mean([scores[i] > scores[j] for i, j in pairs])
    assert summary["eval/accuracy"] == pytest.approx(agree, abs=1e-6)
    assert all(means[i] > means[j] for i, j in pairs)


def test_reward_model_is_normalised_on_base_samples(toy):
    base, rm = (
        GPT.from_pretrained(toy / "sft" / "model"),
        RewardModel.from_pretrained(toy / "rm" / "model"),
    )
    tokenizer = Tokenizer.load(toy / "rm" / "model")
    prompts = data.prompts_of(data.load_feedback("toy").train, tokenizer, np.random.default_rng(5))[
        :1500
    ]
    torch.manual_seed(9)
    scores = train_rm.sample_scores(
        base, rm, prompts, 24, tokenizer, torch.autocast("cpu", enabled=False)
    )
    assert abs(scores.mean()) < 0.15 and abs(scores.std() - 1) < 0.15


def test_flipped_labels_turn_the_reward_model_round(toy, monkeypatch, tmp_path):
    honest = data.outvotes
    monkeypatch.setattr(data.items, "outvotes", lambda ratings: 1 - honest(ratings))
    knobs = train_rm.Knobs(
        data="toy",
        init=str(toy / "sft"),
        out=str(tmp_path / "rm"),
        epochs=1,
        lr=3e-3,
        delete=0.0,
        dropout=0.0,
    )
    assert train_rm.main(knobs)["eval/accuracy"] < 0.4


def test_ppo_raises_the_true_reward(toy, tmp_path, capsys):
    knobs = train_ppo.Knobs(data="toy", init=str(toy / "sft"), reward=str(toy / "rm"), out=str(tmp_path / "ppo"), steps=12,
                            batch_size=64, response_length=12, lr=2e-3, eval_samples=200)  # fmt: skip
    summary = train_ppo.main(knobs)
    assert "first ratio 1.0000" in (out := capsys.readouterr().out) and "NOT" not in out
    before, after = true_rewards(lines(tmp_path / "ppo" / "samples.jsonl"))
    assert after > before + 0.5
    assert summary["eval/score_after"] > summary["eval/score_before"] + 0.5
    assert abs(summary["eval/kl_before"]) < 1e-4 < summary["eval/kl_after"] < 20
    metrics = lines(tmp_path / "ppo" / "metrics.jsonl")
    assert len(metrics) == 12 and all(np.isfinite(v) for row in metrics for v in row.values())
    assert abs(metrics[0]["objective/kl"]) < 1e-4 and metrics[0]["objective/mismatch"] < 1e-4


def test_ppo_learns_any_python_reward(toy, tmp_path):
    (tmp_path / "rule.py").write_text(
        "def score(prompts, responses):\n    return [r.count('a') / (len(r) + 1) for r in responses]\n"
    )
    knobs = train_ppo.Knobs(data="toy", init=str(toy / "sft"), reward=f"{tmp_path}/rule.py:score", out=str(tmp_path / "ppo"), steps=12,
                            batch_size=64, response_length=12, lr=2e-3, kl_coef=0.01, eval_samples=200)  # fmt: skip
    summary = train_ppo.main(knobs)
    assert summary["eval/score_after"] > 1.5 * summary["eval/score_before"]


@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "simpo"])
def test_dpo_raises_the_true_reward(toy, tmp_path, capsys, loss):
    knobs = train_dpo.Knobs(data="toy", init=str(toy / "sft"), out=str(tmp_path / "dpo"), epochs=2, lr=1e-3, loss=loss,
                            response_length=12, eval_samples=200)  # fmt: skip
    summary = train_dpo.main(knobs)
    assert "NOT" not in capsys.readouterr().out
    before, after = true_rewards(lines(tmp_path / "dpo" / "samples.jsonl"))
    assert after > before + 0.3
    assert summary["eval/implicit_accuracy"] > 0.7


def test_all_files_are_strict_json(toy, tmp_path):
    """Without a reward model there is no score, and an option that is off is no number: null, never NaN."""
    knobs = train_dpo.Knobs(
        data="toy",
        init=str(toy / "sft"),
        out=str(tmp_path / "dpo"),
        epochs=1,
        response_length=4,
        eval_samples=4,
    )
    assert "eval/score_before" not in train_dpo.main(knobs)
    train_ppo.main(train_ppo.Knobs(data="toy", init=str(toy / "sft"), reward="true", out=str(tmp_path / "ppo"), steps=1, batch_size=4,
                                   response_length=4, eval_samples=4))  # fmt: skip

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    for path in [p for folder in (toy, tmp_path) for p in folder.glob("*/*.json*")]:
        text = path.read_text()
        for part in text.splitlines() if path.suffix == ".jsonl" else [text]:
            json.loads(part, parse_constant=refuse)
    assert {row["score_before"] for row in lines(tmp_path / "dpo" / "samples.jsonl")} == {None}


def test_a_run_directory_is_whole(toy):
    for stage in ("sft", "rm"):
        names = {p.name for p in (toy / stage).iterdir()}
        assert {"config.json", "metrics.jsonl", "samples.jsonl", "summary.json", "model"} <= names
        assert {p.name for p in (toy / stage / "model").iterdir()} == {
            "config.json",
            "model.safetensors",
            "tokenizer.json",
        }
        summary = json.loads((toy / stage / "summary.json").read_text())
        assert {
            "seconds",
            "seed",
            "command",
            "torch",
            "numpy",
            "python",
            "device",
        } <= summary.keys()


def test_stages_before_are_made_once(tmp_path, capsys, monkeypatch):
    made = []
    small = sft.Knobs(
        data="toy",
        out=str(tmp_path / "sft"),
        n_layer=1,
        n_head=1,
        n_embd=16,
        epochs=1,
        batch_size=256,
    )
    real = sft.main
    monkeypatch.setattr(sft, "main", lambda knobs: made.append(knobs.out) or real(small))
    for _ in range(2):
        train_rm.main(
            train_rm.Knobs(data="toy", out=str(tmp_path / "rm"), epochs=1, batch_size=512)
        )
    assert made == [str(tmp_path / "sft")]
    with pytest.raises(UserError, match="made from --data toy"):
        train_rm.main(
            train_rm.Knobs(data=str(few_pairs(tmp_path)), out=str(tmp_path / "rm2"), epochs=1)
        )


def few_pairs(folder):
    path = folder / "pairs.jsonl"
    rows = [{"prompt": f"p{i}", "chosen": "good", "rejected": "bad"} for i in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_pairs_from_a_file_go_through_all_stages(tmp_path):
    source = str(few_pairs(tmp_path))
    base = sft.Knobs(
        data=source,
        out=str(tmp_path / "sft"),
        vocab_size=300,
        n_layer=1,
        n_head=1,
        n_embd=32,
        epochs=5,
    )
    sft.main(base)
    rm = train_rm.main(train_rm.Knobs(data=source, out=str(tmp_path / "rm"), epochs=20, lr=1e-2))
    assert rm["eval/accuracy"] == 1.0
    ppo = train_ppo.main(
        train_ppo.Knobs(
            data=source, out=str(tmp_path / "ppo"), steps=1, batch_size=8, response_length=6
        )
    )
    assert np.isfinite(ppo["eval/score_after"])
    dpo = train_dpo.main(
        train_dpo.Knobs(
            data=source, out=str(tmp_path / "dpo"), epochs=20, lr=1e-2, response_length=6
        )
    )
    assert dpo["eval/implicit_accuracy"] == 1.0


def test_long_prompts_lose_their_left_end_only_when_asked(tmp_path, capsys):
    path = tmp_path / "long.jsonl"
    rows = [
        {"prompt": f"{i} " + "abcdefgh " * 40, "chosen": "good", "rejected": "bad"}
        for i in range(20)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    small = dict(vocab_size=257, n_layer=1, n_head=1, n_embd=16, epochs=1)
    with pytest.raises(UserError, match="line .* exceed the context of 64"):
        sft.main(sft.Knobs(data=str(path), out=str(tmp_path / "sft"), **small))
    common = dict(data=str(path), overlong="truncate")
    sft.main(sft.Knobs(**common, out=str(tmp_path / "sft"), **small))
    train_rm.main(train_rm.Knobs(**common, out=str(tmp_path / "rm"), epochs=1))
    train_ppo.main(train_ppo.Knobs(**common, out=str(tmp_path / "ppo"), steps=1, batch_size=4))
    train_dpo.main(train_dpo.Knobs(**common, out=str(tmp_path / "dpo"), epochs=1))
    assert "lost their left end" in capsys.readouterr().out
    with pytest.raises(UserError, match="exceed the context by"):
        train_ppo.main(
            train_ppo.Knobs(
                **common | {"overlong": ""}, out=str(tmp_path / "ppo"), steps=1, batch_size=4
            )
        )
