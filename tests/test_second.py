"""Two published recipes and the pairwise losses, step by step, against second_implementation.py.

Those are plain loops in NumPy, written from the formulas alone by someone who had not read this
package. Their numbers lie in second_implementation.json.
"""

import json
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import second_implementation
import torch

import train_ppo
from minirlhf import dpo, lists, ppo
from minirlhf.engine import cli, optim
from minirlhf.feedback import labelers
from minirlhf.sampling import Rollout, response_mask

SECOND = json.loads(Path(second_implementation.__file__).with_suffix(".json").read_text())
LAUNCH = re.compile(r"^ +python train_ppo.py (--temperature 0.7 .*)$", re.M)
LAUNCHES = LAUNCH.findall(train_ppo.__doc__.replace("\\\n", " "))
RECIPES = dict(zip(("lhp", "sfd"), LAUNCHES, strict=True))


def test_the_numbers_are_those_of_the_second_implementation():
    for recipe in RECIPES:
        rollout = second_implementation.fixed_rollout()
        for key, value in second_implementation.iteration(recipe, rollout).items():
            np.testing.assert_allclose(value, SECOND[recipe][key], rtol=0, atol=0)


def close(actual, key, expected, dtype):
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    expected = torch.tensor(expected[key], dtype=torch.float64)
    actual = torch.as_tensor(actual, dtype=torch.float64)
    near = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(actual, expected, **near, msg=lambda m: f"{key}: {m}")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("recipe", RECIPES)
def test_one_iteration(recipe, dtype, monkeypatch):
    given, expected = SECOND["rollout"], SECOND[recipe]
    flags = [*shlex.split(RECIPES[recipe]), "--batch-size", "6", "--response-length", "5"]
    knobs = cli.parse(train_ppo.Knobs, "", flags)
    knobs.truncate_after = given["truncate_after"] if knobs.truncate else 0
    keys = ("logprobs", "ref_logprobs", "values", "new_logprobs", "new_values", "scores")
    fixed = {key: torch.tensor(given[key], dtype=dtype) for key in keys}
    lengths, prompts = torch.tensor(given["lengths"]), torch.ones(6, dtype=torch.int64)
    tokens = torch.cat([torch.full((6, 1), 9), torch.tensor(given["tokens"])], 1)
    mask = response_mask(lengths, 5)

    # Models that say what the rollout says
    read = []

    def rm(tokens, ends):
        read.append(ends - 1)
        return fixed["scores"]

    rm.level = "response"

    def truncate_token(text):
        return [given["truncate_token"]] if text else []

    def values(tokens, lengths):
        return torch.cat([fixed["values"], torch.full((6, 1), 1e4, dtype=dtype)], 1)

    def sampled(*_, **__):
        return Rollout(tokens, prompts, lengths, fixed["logprobs"])

    made = {model: torch.where(mask, fixed[model], 0) for model in ("logprobs", "ref_logprobs")}

    def logprobs(model, *_, entropy=False, **__):
        return (made[model], mask) if entropy else made[model]

    def at_least_single(self):
        return self if self.is_floating_point() else self.double()

    tokenizer = SimpleNamespace(eos=given["eos_id"], pad=7, encode=truncate_token)
    critic = SimpleNamespace(values=values)
    monkeypatch.setattr(labelers, "load_reward_model", lambda *_: rm)
    monkeypatch.setattr(train_ppo, "generate", sampled)
    monkeypatch.setattr(train_ppo, "response_logprobs", logprobs)
    monkeypatch.setattr(torch.Tensor, "float", at_least_single)
    scorer, _ = train_ppo.make_scorer(knobs, "rm", None, tokenizer, None)
    asked = (tokens[:, :1], prompts)
    episodes, stats = train_ppo.rollout(
        "logprobs", "ref_logprobs", scorer, critic, asked, tokenizer, knobs, knobs.kl_coef
    )

    assert read[0].tolist() == expected["scored_lengths"]
    close(stats["objective/score"], "mean", {"mean": np.mean(expected["scores"])}, dtype)
    scores = torch.tensor(expected["scores"], dtype=dtype)
    kl = ppo.kl_estimate(episodes.logprobs, episodes.ref_logprobs, knobs.kl_kind)
    rewards = train_ppo.token_rewards(scores, kl, mask, knobs, knobs.kl_coef)
    shaped = "whitened_rewards" if knobs.whiten_rewards else "shaped_rewards"
    close(rewards, shaped, expected, dtype)
    close(stats["objective/reward"], "mean", {"mean": rewards.sum(1).mean().item()}, dtype)
    close(episodes.advantages, "whitened_advantages", expected, dtype)
    close(episodes.returns, "returns", expected, dtype)
    close(stats["objective/kl"], "mean_kl", expected, dtype)
    close(stats["objective/entropy"], "entropy", expected, dtype)

    new = (fixed["new_logprobs"], fixed["new_values"])
    mb = episodes._replace(weights=1.0)
    loss, stats = train_ppo.losses(*new, mb, mask, knobs, knobs.kl_coef)
    for name, key in (
        ("ppo/policy/loss", "policy_loss"),
        ("ppo/val/loss", "value_loss"),
        ("ppo/policy/approxkl", "approxkl"),
        ("ppo/policy/clipfrac", "clipfrac"),
        ("ppo/policy/ratio", "mean_ratio"),
    ):
        close(stats[name], key, expected, dtype)
    close(loss, "total_loss", expected, dtype)
    controller = ppo.AdaptiveKL(knobs.kl_coef, knobs.kl_target, knobs.kl_horizon)
    if knobs.kl_target:
        controller.update(expected["mean_kl"], 6)
    close(controller.coef, "kl_coef", expected, torch.float64)


def test_group_baselines_controller_and_schedule():
    scores = torch.tensor(SECOND["functions"]["group_scores"], dtype=torch.float64)
    for case in SECOND["functions"]["group_advantages"]:
        close(ppo.group_advantages(scores, case["k"], case["kind"]), "result", case, torch.float64)
    for case in SECOND["functions"]["adaptive_kl"]:
        controller = ppo.AdaptiveKL(case["coef"], case["target"], case["horizon"])
        controller.update(case["kl"], case["n"])
        close(controller.coef, "result", case, torch.float64)
    for case in SECOND["functions"]["learning_rate"]:
        knobs = cli.parse(train_ppo.Knobs, "", shlex.split(RECIPES[case["recipe"]]))
        optimizer = SimpleNamespace(param_groups=[{}])
        optim.set_lr(optimizer, case["u"] - 1, case["N"], knobs.lr, knobs.warmup, knobs.lr_schedule)
        close(optimizer.param_groups[0]["lr"], "result", case, torch.float64)


PAIRS = SECOND["pairs"]["values"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", [name for name in PAIRS if not name.startswith("kto")])
def test_pair_losses(name, dtype):
    given, case = SECOND["pairs"]["inputs"], PAIRS[name]
    inputs = {key: torch.tensor(value, dtype=dtype) for key, value in given.items()}
    options = dict(case["options"])
    for theirs, ours in (("f_divergence", "divergence"), ("alpha", "alpha_divergence")):
        if theirs in options:
            options[ours] = options.pop(theirs)
    if name == "orpo":  # there the weight of the odds ratio goes by the name of beta
        options["lam"] = options["beta"]
    got = dpo.pair_loss(case["kind"], **inputs, **options)
    losses = torch.tensor(case["losses"], dtype=torch.float64)
    if case["kind"].startswith("aot"):  # in the order of the sorted batch
        got, losses = got.sort().values, losses.sort().values
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(got.double(), losses, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["kto", "kto z=0"])
def test_kto(name):
    case, given, double = PAIRS[name], SECOND["pairs"]["inputs"], torch.float64
    mismatched = torch.tensor(case["mismatched_logratios"], dtype=double)
    for side, key in (("chosen", "desirable"), ("rejected", "undesirable")):
        policy = torch.tensor(given[f"policy_{side}_logps"], dtype=double)
        ref = torch.tensor(given[f"ref_{side}_logps"], dtype=double)
        thumbs = torch.full((8,), key == "desirable")
        got = lists.kto_loss(policy, ref, thumbs, mismatched, beta=case["options"]["beta"])
        close(got, key, case, double)
