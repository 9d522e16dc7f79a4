"""One episode of a PPO run, a token a line: what a rollout makes of it, step by step.

The steps are train_ppo's, by the same functions of ppo.py, with the run's own knobs and with other
episodes around, because advantages are whitened over a rollout or compared within a group. The
policy is the trained one, which here also samples: its old log-probs are its own, so every ratio is
1.

Left out: the clips of the update, which at a ratio of 1 do nothing.
"""

import math
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import torch
from safetensors import safe_open

from minirlhf import ppo
from minirlhf.engine.cli import UserError
from minirlhf.engine.rows import pad_rows, response_mask, rowwise, window
from minirlhf.feedback.checks import kl_target_of
from minirlhf.feedback.groups import learned_from, rivals
from minirlhf.feedback.preferring import find_function
from minirlhf.feedback.scoring import charge_unended, make_scorer
from minirlhf.gpt import RewardModel
from minirlhf.look.policies import feedback_of, held_out, newest_state, prompt_rows, reward_beside
from minirlhf.look.terminal import bytes_of, columns, escaped, number, padded, print_wrapped
from minirlhf.rewards.side_by_side import first_of
from minirlhf.sampling import generate, response_logprobs


class Episodes(NamedTuple):
    """B episodes of at most R response tokens; each (B, R) but the first three."""

    tokens: torch.Tensor  # (B, Q+R)
    prompt_lengths: torch.Tensor  # (B,)
    response_lengths: torch.Tensor  # (B,)
    logprobs: torch.Tensor
    ref_logprobs: torch.Tensor
    kl: torch.Tensor
    scores: torch.Tensor  # what each token earns; of a response, on its last one
    rewards: torch.Tensor
    values: torch.Tensor | None  # None without a critic
    returns: torch.Tensor | None
    advantages: torch.Tensor


def print_episode(policy, index, seed, reward, episodes):
    """The table of the episode that answers held-out prompt `index`, and where all comes from."""
    knobs = knobs_of(policy)
    reward = reward or reward_beside(policy)
    if not reward:
        problem = "no reward model lies beside it"
        raise UserError(f"{policy.name}: {problem}: name what scored it with --reward")
    if not policy.reference:
        problem = "its base model is not there any more"
        raise UserError(f"{policy.name}: {problem}: name one with --reference")
    group = rivals(knobs)
    some = held_out([policy], knobs.batch_size // group)
    if not 0 <= index < len(some):
        raise UserError(f"--index {index}: expected 0 to {len(some) - 1}, of a rollout's prompts")
    if episodes:
        some = some[: max(1, episodes // group, index + 1)]
    room = policy.model.config.n_ctx - knobs.response_length
    rows, _ = prompt_rows([text for text in some for _ in range(group)], policy.tokenizer, room)
    batch = pad_rows(rows, policy.tokenizer.pad, policy.model.lm_head_weight.device)
    data = feedback_of(policy) if reward == "true" else None
    function = find_function(reward, data)
    if function and not data:  # it may take columns
        data = feedback_of(policy)
    scorer, rm = make_scorer(knobs, reward, function, policy.tokenizer, policy.model, data)
    critic, whose = critic_of(policy, knobs, rm)
    kl_coef, since = coefficient(policy, knobs)
    torch.manual_seed(seed)
    found = rollout(policy.model, policy.reference, scorer, critic, batch, policy.tokenizer, knobs,
                    kl_coef)  # fmt: skip
    facts = {"reward": reward, "whose": whose, "kl_coef": f"{kl_coef:.4g}{since}"}
    print_facts(policy, knobs, found, facts)
    print_table(policy, knobs, found, index * group, kl_coef)


def knobs_of(policy):
    """The run's knobs, as train_ppo has them."""
    knobs = BEFORE | policy.knobs
    for name in ("missing_eos_score", "kl_target"):
        if knobs[name] is None:  # NaN is no JSON
            knobs[name] = math.nan
    missing = [name for name in NEEDED if name not in knobs]
    if missing:
        raise UserError(f"{policy.run}/config.json: {missing[0]} is missing: of another version?")
    if knobs["missing_eos_penalty"] is None:  # of runs whose default it was for unended reviews
        plain = math.isnan(knobs["missing_eos_score"]) and knobs["stop_at_eos"]
        knobs["missing_eos_penalty"] = 0.5 if plain and knobs["data"] == "reviews" else 0.0
    return SimpleNamespace(**knobs)


BEFORE = {  # of runs that are older than these knobs
    "fuse": 0, "missing_eos_score": None, "missing_eos_penalty": 0.0, "loss_mean": "token",
    "skip_flat": False, "entropy_coef": 0.0,
}  # fmt: skip
NEEDED = (
    "advantage", "batch_size", "critic", "gamma", "group_size", "kl_coef", "kl_in", "kl_kind",
    "lam", "micro_batch", "response_length", "reward_level", "stop_at_eos", "temperature", "top_k",
    "truncate", "truncate_after", "vf_coef", "whiten_advantages", "whiten_rewards",
)  # fmt: skip


def critic_of(policy, knobs, rm):
    """(the critic, where it comes from): a run saves it in its states alone."""
    if knobs.advantage != "gae":
        return None, f"none: {knobs.advantage} compares the {knobs.group_size} answers to a prompt"
    shared = knobs.critic == "shared"
    base = policy.model if shared else policy.reference
    critic = first_of(rm) if rm and not shared else RewardModel.from_base(base)
    critic = critic.to(policy.model.lm_head_weight.device).eval()
    if shared:
        critic.transformer = policy.model
    path, facts = newest_state(policy.run)
    if path and facts.get("stage") == "ppo":
        load_critic(critic, path)
        return critic, f"the critic after step {facts['step']}, from {path}"
    if rm and not shared and rm.level != "token":
        return critic, f"no state in {policy.run}: of the critic as it began, the reward model"
    torch.nn.init.zeros_(critic.score.weight)
    return critic, f"no state in {policy.run}: of the critic as it began, a head of zeros"


def load_critic(critic, path):
    """Puts in the weights of the critic, the second of the models in a state of train_ppo."""
    prefix = "models/1."
    with safe_open(path, "pt") as file:
        names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118
        weights = {name.removeprefix(prefix): file.get_tensor(name) for name in names}
    own = dict(critic.named_parameters())
    wrong = [name for name, w in weights.items() if name not in own or own[name].shape != w.shape]
    if wrong or "score.weight" not in weights:
        raise UserError(f"{path}: no critic of this reward model: another run's state?")
    with torch.no_grad():
        for name, w in weights.items():
            own[name].copy_(w)


def coefficient(policy, knobs):
    """(the price of a nat of KL, where it comes from), which --kl-target moves."""
    coef = newest_state(policy.run)[1].get("numbers", {}).get("kl", {}).get("coef")
    if not kl_target_of(knobs) or coef is None:
        return knobs.kl_coef, ""
    return coef, " at the end, steered from " + f"{knobs.kl_coef:g}"


@torch.no_grad()
def rollout(policy, reference, scorer, critic, prompts, tokenizer, knobs, kl_coef):
    """Steps 1 to 6 of train_ppo, by the same functions: Episodes."""
    R, size = knobs.response_length, knobs.micro_batch
    eos = tokenizer.eos if knobs.stop_at_eos else -1
    options = {"eos": eos, "pad": tokenizer.pad, "temperature": knobs.temperature}
    tokens, p, r, _ = generate(policy, *prompts, R, top_k=knobs.top_k or None, **options)  # 1
    mask, row = response_mask(r, R), (tokens, p, r)
    scores, ended = rowwise(scorer, 0, *row)  # 2
    scores = charge_unended(scores, ended, mask, knobs)
    read = partial(response_logprobs, width=R, temperature=knobs.temperature)  # 3
    logprobs = rowwise(partial(read, policy), size, *row)
    ref_logprobs = rowwise(partial(read, reference), size, *row)
    kl = ppo.kl_estimate(logprobs, ref_logprobs, knobs.kl_kind)
    price = kl_coef if knobs.kl_in == "reward" else 0.0  # 4
    rewards = ppo.shaped_rewards(scores, kl, mask, price)
    if knobs.whiten_rewards:
        rewards = ppo.whiten(rewards, mask, shift_mean=False)
    found = Episodes(tokens, p, r, logprobs, ref_logprobs, kl, scores, rewards, None, None, None)
    if not critic:  # 6, without 5
        advantages = ppo.group_advantages(rewards.sum(1), knobs.group_size, knobs.advantage)
        return found._replace(advantages=advantages[:, None] * mask)

    def state_values(tokens, p, r):
        """Of the state before each response token."""
        return window(critic.values(tokens, p + r).float(), p - 1, R)

    values = torch.where(mask, rowwise(state_values, size, *row), 0)  # 5
    advantages, returns = ppo.fast_gae(rewards, values, mask, knobs.gamma, knobs.lam)  # 6
    if knobs.whiten_advantages:
        advantages = ppo.whiten(advantages, mask)
    return found._replace(values=values, returns=returns, advantages=advantages)


def loss_terms(episodes, row, kl_coef, knobs):
    """What each token of a row adds to the loss, whose mean over all tokens is the loss, without
    an entropy bonus: (r,)."""
    terms, weight = [], loss_weights(episodes, knobs)[row]
    for t in range(int(episodes.response_lengths[row])):
        here = slice(row, row + 1), slice(t, t + 1)
        logprobs = episodes.logprobs[here]
        mask = torch.ones_like(logprobs)
        advantages = episodes.advantages[here]
        loss, _ = ppo.policy_loss(logprobs, logprobs, advantages, mask, weights=weight)
        if knobs.kl_in == "loss":
            ref_logprobs = episodes.ref_logprobs[here]
            kl = ppo.kl_loss(logprobs, ref_logprobs, mask, knobs.kl_kind, weight)
            loss = loss + kl_coef * kl
        if episodes.values is not None:
            values, returns = episodes.values[here], episodes.returns[here]
            loss = loss + knobs.vf_coef * ppo.value_loss(values, values, returns, mask)[0]
        terms.append(loss)
    return torch.stack(terms)


def loss_weights(episodes, knobs):
    """What a token of each response counts, (B, 1), were the rollout one minibatch."""
    _, counts = learned_from(episodes.scores, knobs)
    width = knobs.response_length
    return ppo.token_weights(episodes.response_lengths, width, knobs.loss_mean, counts)


# On paper


def print_facts(policy, knobs, episodes, facts):
    """Where each column comes from."""
    total = int(episodes.response_lengths.sum())
    white = knobs.advantage == "gae" and knobs.whiten_advantages
    gae = f"GAE, gamma {knobs.gamma:g}, lambda {knobs.lam:g}"
    how = gae if knobs.advantage == "gae" else f"{knobs.advantage}, of the sum of the rewards"
    how += f", whitened over the {total:,} tokens of the rollout" if white else ""
    scale = ", scaled to variance 1 over the rollout" if knobs.whiten_rewards else ""
    loss = "-advantage"
    loss += " + KL price" if knobs.kl_in == "loss" else ""
    mean = knobs.loss_mean
    loss = f"({loss}) x what a token counts in a mean by {mean}" if mean != "token" else loss
    loss += f" - {knobs.entropy_coef:g} entropy, not shown" if knobs.entropy_coef else ""
    loss += f" + {knobs.vf_coef:g} (value - return)^2 / 2" if episodes.values is not None else ""
    n = len(episodes.tokens)
    lines = {
        "episode": f"one of a rollout of {n} ({knobs.batch_size} in training), with the knobs of "
                   f"{policy.name}",
        "logp": "by the trained policy, which sampled: old log-probs are its own, each ratio is 1",
        "ref": f"by {policy.base}",
        "KL": f"{knobs.kl_kind}, of logp - ref; a nat costs {facts['kl_coef']}, in the "
              f"{knobs.kl_in}",
        "reward": f"the score, by {facts['reward']}, less the price of the KL where the reward "
                  f"pays it{scale}",
        "value": facts["whose"],
        "adv": how,
        "loss": f"{loss}; the loss is the mean over those tokens",
    }  # fmt: skip
    for name, text in lines.items():
        print_wrapped(name, text)


def print_table(policy, knobs, episodes, row, kl_coef):
    """The table, a token a line, and its sums."""
    p, r = int(episodes.prompt_lengths[row]), int(episodes.response_lengths[row])
    ids = episodes.tokens[row, p : p + r].tolist()
    print()
    print_wrapped("prompt", repr(policy.tokenizer.decode(episodes.tokens[row, :p].tolist())))
    names = "logprobs", "ref_logprobs", "kl", "rewards", "values", "returns", "advantages"
    found = [getattr(episodes, name) for name in names]
    series = [[None] * r if x is None else x[row, :r].tolist() for x in found]
    series.append(loss_terms(episodes, row, kl_coef, knobs).tolist())
    room = max(8, columns() - 67)
    titles = "logp", "ref", "KL", "reward", "value", "return", "adv", "loss"
    print(f"\n{'':>3} {'id':>6} {padded('token', room)}" + "".join(f"{t:>7}" for t in titles))
    for t, token in enumerate(ids):
        cells = "".join(f" {number(x[t], 6)}" for x in series)
        print(f"{t + 1:>3} {token:>6} {padded(token_text(token, policy.tokenizer), room)}{cells}")
    sums = "".join(f" {number(sum(x), 6)}" for x in series[:4])
    print(f"{'':>3} {'':>6} {padded('sum', room)}{sums}")
    score = episodes.scores[row].sum().item()
    print(f"\nscore of the response {score:.3f}")


def token_text(token, tokenizer):
    """A token in quotes; bytes that are no whole character as they are, and EOS."""
    if token == tokenizer.eos:
        return "[EOS]"
    text = bytes_of(token, tokenizer).decode("utf-8", "backslashreplace")
    return f"'{escaped(text)}'"
