"""Stage 2: PPO against the reward model.   python train_ppo.py

    python train_ppo.py                                            # laptop, 2 cores, from nothing: about 3 minutes
    python train_ppo.py --data toy --out runs/toy/ppo --steps 20   # a toy language with a known true reward: under a minute
    python train_ppo.py --reward my_rules.py:score                 # any Python function (prompts, responses) -> floats; with
        --reward-level token, each response is a list of its tokens' texts, and gets a list of as many floats
    python train_ppo.py --advantage grpo --kl-in loss --kl-kind k3 # answers to one prompt compete: no critic
    torchrun --nproc-per-node 8 train_ppo.py --shard               # many GPUs; a run that was stopped goes on with --resume

The policy starts as the base model and learns to write what the reward model scores high, while a penalty on the KL from the frozen
base model keeps it a language model (Ziegler et al. 2019, Stiennon et al. 2020, Ouyang et al. 2022). One iteration:

    1 rollout      the policy answers a batch of prompts, sampled at --temperature until EOS or --response-length
    2 score        the reward model reads prompt and response: one number a response (or a token)
    3 KL           log-probs of the response under policy and reference; their difference is the KL of each token
    4 reward       -kl_coef * KL at each token, and the score on the last one
    5 values       the critic, its own network that starts as the reward model, values each position
    6 advantages   GAE, then whitened over the batch; or, without a critic, each response against the others to its prompt
    7 update       --ppo-epochs passes of clipped policy and value losses

Every detail on which published code differs is a switch. lm-human-preferences (Ziegler et al. 2019), its style tasks:

    python train_ppo.py --temperature 0.7 --response-length 24 --no-stop-at-eos --truncate . --truncate-after 16 --missing-eos-score -1 \\
        --whiten-rewards --kl-coef 0.15 --kl-target 6 --critic shared --lam 0.95 --ppo-epochs 4 --minibatches 1 --max-grad-norm 0 \\
        --lr 1e-5 --warmup 0 --batch-size 512 --steps 1953

summarize_from_feedback_details (Huang et al. 2024), which decodes on after EOS but drops what follows, so that stopping there is the same:

    python train_ppo.py --temperature 0.7 --response-length 53 --missing-eos-score -1 --kl-coef 0.05 --lam 0.95 --ppo-epochs 4 \\
        --minibatches 1 --max-grad-norm 0 --lr 3e-6 --warmup 0 --batch-size 512 --steps 1953

Left out: entropy bonus, value bootstrapping of cut responses, length filters, Adam's epsilon in its TensorFlow place.
"""

import copy
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import train_rm
from minirlhf import data, ppo, sft
from minirlhf.engine import cli, machine, optim, parallel
from minirlhf.engine.cli import UserError, knob
from minirlhf.engine.files import finished
from minirlhf.engine.log import Run
from minirlhf.engine.rows import endless, pad_rows
from minirlhf.feedback import labelers
from minirlhf.gpt import GPT, RewardModel, compile_trunks
from minirlhf.look.answers import answers, compare
from minirlhf.sampling import before_response, generate, response_logprobs, response_mask
from minirlhf.tokenizer import load_tokenizer


@dataclass(kw_only=True)
class Knobs(cli.RunKnobs):
    data: str = knob("reviews", "prompts: reviews, toy, a .jsonl[.gz] path, or hub:OWNER/NAME/FILE", free=True)
    init: str = knob("", "base model: a run, a model directory or a name on the hub (default: sft beside --out, made if missing)", free=True)
    reward: str = knob("", "reward model: a run or a model directory (default: rm beside --out, made if missing), FILE.py:FUNCTION or "
                           "package.module:FUNCTION of (prompts, responses) -> floats, or true: the toy's own", free=True)  # fmt: skip
    reward_level: str = knob("", "what a function rates: response (the default) or token; a reward model knows", ("", "response", "token"))
    out: str = knob("runs/ppo", "run directory", free=True)
    overlong: str = knob("", "prompts that leave no room for the response: error (the default), or truncate on the left", sft.OVERLONG)
    steps: int = knob(48, "iterations", least=1)
    batch_size: int = knob(128, "episodes an iteration", least=1)
    response_length: int = knob(24, "most tokens of a response", least=1)
    stop_at_eos: bool = knob(True, "EOS ends a response; else all --response-length tokens are sampled, and trained on")
    temperature: float = knob(1.0, "of sampling and of every log-prob", least=1e-6)
    top_k: int = knob(0, "sample from the k likeliest tokens only, which the log-probs do not know; 0: off")
    truncate: str = knob("", "a token that ends a response for the scorer, in place of EOS: what follows is hidden from it")
    truncate_after: int = knob(0, "first position of the response, from 0, where that token counts")
    missing_eos_score: float = knob(math.nan, "score of a response that never ended, in place of its own; nan: off", least=-math.inf)
    kl_coef: float = knob(0.033, "price of a nat of KL from the base model, in standard deviations of its scores")
    kl_kind: str = knob("k1", "KL estimator: k1, k2 or k3", ("k1", "k2", "k3"))
    kl_in: str = knob("reward", "where the KL is paid: reward, or loss (k2 or k3)", ("reward", "loss"))
    kl_target: float = knob(0.0, "nats a response that kl_coef is steered to; 0: kl_coef stays")
    kl_horizon: int = knob(10000, "episodes over which it is steered", least=1)
    whiten_rewards: bool = knob(False, "shaped rewards get variance 1 over the batch, their mean kept")
    advantage: str = knob("gae", "gae; or without a critic rloo, grpo, reinforce (baseline: the group's mean)", ppo.ADVANTAGES)
    group_size: int = knob(4, "answers to each prompt for rloo, grpo and reinforce; gae takes one", least=2)
    gamma: float = knob(1.0, "gae: discount", most=1)
    lam: float = knob(0.8, "gae: lambda; 0.95 is usual, but a critic that starts as the reward model can be trusted more", most=1)
    whiten_advantages: bool = knob(True, "gae's advantages get mean 0 and variance 1 over the batch")
    critic: str = knob("own", "gae: own, which starts as the reward model, or shared, a head from 0 on the policy", ("own", "shared"))
    clip: float = knob(0.2, "the policy's ratio is clipped to 1 +- this")
    value_clip: float = knob(0.2, "gae: the critic is clipped to its old value +- this")
    vf_coef: float = knob(0.1, "gae: weight of the value loss")
    ppo_epochs: int = knob(2, "passes over an iteration's episodes", least=1)
    minibatches: int = knob(2, "optimizer steps a pass", least=1)
    micro_batch: int = knob(32, "episodes in memory at a time in the update, on each process; 0: all of a minibatch", free=True)
    lr: float = knob(1e-3, "peak learning rate")
    lr_schedule: str = knob("linear", "after the warm-up: linear to 0, constant, or cosine to 0", ("linear", "constant", "cosine"))
    warmup: float = knob(0.2, "share of the steps over which the learning rate rises: the first updates are the noisiest", most=1)
    adam_eps: float = knob(1e-5, "Adam's epsilon")
    eval_samples: int = knob(512, "held-out prompts answered before and after, to EOS, without --top-k; scores as they are", least=1, free=True)
    save_every: int = knob(10, "steps between states to resume from; the last one is always saved; 0: no others", free=True)


class Episodes(NamedTuple):
    """One iteration's experience: B episodes of at most R response tokens."""

    tokens: torch.Tensor  # (B, Q+R)
    prompt_lengths: torch.Tensor  # (B,)
    response_lengths: torch.Tensor  # (B,)
    logprobs: torch.Tensor  # (B, R) under the policy that sampled, as all below
    ref_logprobs: torch.Tensor  # (B, R)
    advantages: torch.Tensor  # (B, R)
    values: torch.Tensor | None  # (B, R), None without a critic
    returns: torch.Tensor | None  # (B, R), None without a critic

    def rows(self, index):
        return Episodes(*(None if x is None else x[index] for x in self))


@cli.contained
def main(knobs):
    check(knobs)
    device = parallel.start(knobs.device)
    autocast = machine.precision(device, knobs.dtype)
    feedback = data.load_feedback(knobs.data)

    # Models: what earlier stages should have made and have not is made now
    source = sft.base_model(knobs)
    reward_source, reward_summary = reward_model(knobs)
    rng = machine.seed_everything(knobs.seed)
    tokenizer = load_tokenizer(source)
    policy, reference = GPT.from_pretrained(source).to(device), GPT.from_pretrained(source).to(device)
    scorer, rm = make_scorer(knobs, reward_source, feedback, tokenizer, reference)
    critic = make_critic(knobs, policy, reference, rm)
    if knobs.compile:
        compile_trunks(policy, reference, rm, critic)
    if knobs.shard:
        parallel.shard(policy, reference, rm, critic)
    trained = parallel.Together(policy, critic)
    optimizer = optim.make_optimizer(trained, knobs.lr, betas=(0.9, 0.999), eps=knobs.adam_eps)
    controller = ppo.AdaptiveKL(knobs.kl_coef, knobs.kl_target, knobs.kl_horizon)

    # Data: prompts, and which of them each step takes
    room = policy.config.n_ctx - knobs.response_length
    prompts = data.fit(data.prompts_of(feedback.train, tokenizer, rng), room, knobs.overlong)
    held_out = data.fit(data.prompts_of(feedback.test, tokenizer, np.random.default_rng(1)), room, knobs.overlong)[: knobs.eval_samples]
    group = 1 if knobs.advantage == "gae" else knobs.group_size
    plan = endless(len(prompts), knobs.batch_size // group, knobs.steps, rng)

    def sample(model):
        return answers(model, reference, lambda *row: scorer(*row)[0].sum(1), held_out, tokenizer, knobs.response_length,
                       knobs.temperature, autocast, knobs.seed)  # fmt: skip

    parts = {"models": trained, "optimizer": optimizer, "kl": controller}
    run = Run("ppo", knobs, plan, device, tokenizer, parts, {"data": prompts, "base model": source, "reward": reward_source})
    told = {alarm for n in range(run.first) for alarm in ppo.alarms(run.rows[: n + 1])}
    if knobs.top_k:
        run.say(f"note: --top-k {knobs.top_k} samples from another distribution than the one scored: objective/kl can be negative")

    for step, batch in run.steps():
        optim.set_lr(optimizer, step, knobs.steps, knobs.lr, knobs.warmup, knobs.lr_schedule)
        batch = pad_rows([prompts[i] for i in batch.repeat(group)], tokenizer.pad, device)
        with torch.no_grad(), autocast:
            episodes, stats = rollout(policy, reference, scorer, critic, batch, tokenizer, knobs, controller.coef)
        stats |= update(trained, optimizer, episodes, knobs, controller.coef, autocast, partial(run.nonfinite, step))
        if knobs.kl_target:
            controller.update(stats["objective/kl"].item(), knobs.batch_size)
        if step == 0:
            run.say(step_0_check(stats))
        run.log(step, stats, show=("objective/score", "objective/kl"))
        for alarm in sorted(set(ppo.alarms(run.rows)) - told):
            told.add(alarm)
            run.say(f"alarm at step {step}: {alarm}")

    before, after = sample(reference), sample(policy)  # the reference is what the policy was before
    run.close()
    policy.save_pretrained(run.out / "model", tokenizer)
    return compare(run, before, after, (finished(Path(source).parent) or {}) | reward_summary)


def check(knobs):
    """Refuses switches that make no sense together."""
    group = knobs.advantage != "gae"
    for wrong, message in (
        (knobs.kl_in == "loss" and knobs.kl_kind == "k1", "--kl-in loss with k1: its gradient is 0 on average; take --kl-kind k2 or k3"),
        (group and knobs.batch_size % knobs.group_size, f"--batch-size {knobs.batch_size} is not whole groups of {knobs.group_size}"),
        (group and knobs.whiten_rewards, f"--whiten-rewards is for gae: {knobs.advantage} has a scale of its own"),
        (knobs.truncate and math.isnan(knobs.missing_eos_score), "--truncate needs --missing-eos-score (-1 is usual)"),
        (knobs.truncate_after >= (knobs.response_length if knobs.truncate else 1), "--truncate-after: needs --truncate; 0 to R-1"),
        (knobs.minibatches > knobs.batch_size, f"--minibatches {knobs.minibatches} of --batch-size {knobs.batch_size}: some are empty"),
        (knobs.kl_target and 0.2 * knobs.batch_size >= knobs.kl_horizon, "--kl-horizon must exceed a fifth of --batch-size"),
    ):  # fmt: skip
        if wrong:
            raise UserError(message)


def rollout(policy, reference, scorer, critic, prompts, tokenizer, knobs, kl_coef):
    """Steps 1 to 6: (Episodes, stats)."""
    # 1 rollout; each process makes its share of the episodes, up to step 5
    mine, _ = parallel.share(len(prompts[0]))
    sampled = generate(policy, *(x[mine] for x in prompts), knobs.response_length, eos=tokenizer.eos if knobs.stop_at_eos else -1,
                       pad=tokenizer.pad, temperature=knobs.temperature, top_k=knobs.top_k or None, first_row=int(mine[0]))  # fmt: skip
    row, width = sampled[:3], knobs.response_length
    mask = response_mask(sampled.response_lengths, width)  # (B, R)

    # 2 score
    scores, ended = scorer(*row)  # (B, R) what each token earns, a whole response on its last one; (B,)
    if not math.isnan(knobs.missing_eos_score):
        missing = ppo.on_last_token(torch.full_like(scores[:, 0], knobs.missing_eos_score), mask)
        scores = torch.where(ended[:, None], scores, missing)

    # 3 log-probs, made anew by the function that the update uses, so that its first ratio is 1
    options = {"width": width, "temperature": knobs.temperature}
    logprobs, entropy = in_parts(partial(response_logprobs, policy, entropy=True, **options), knobs.micro_batch, *row)  # (B, R)
    ref_logprobs = in_parts(partial(response_logprobs, reference, **options), knobs.micro_batch, *row)

    # 5 values: of the state before each token, so at the position of the token before it
    values = None
    if critic:
        values = in_parts(critic.values, knobs.micro_batch, sampled.tokens, row[1] + row[2]).float()  # (B, Q+R)
        values = torch.where(mask, before_response(values, sampled.prompt_lengths, width), 0)

    # 4 and 6, of all episodes at once
    found = (*sampled, mask, scores, ended, logprobs, entropy, ref_logprobs, values)
    *row, sampled_logprobs, mask, scores, ended, logprobs, entropy, ref_logprobs, values = (
        parallel.gather(x, len(prompts[0])) for x in found)  # fmt: skip
    rewards, advantages, returns = ppo.experience(scores, logprobs, ref_logprobs, values, mask, knobs, kl_coef)
    scores = scores.sum(1)
    stats = {
        "objective/score": scores.mean(), "objective/score_std": scores.std(correction=0),
        "objective/kl": (logprobs - ref_logprobs).sum(1).mean(), "objective/kl_coef": torch.tensor(kl_coef),
        "objective/entropy": -logprobs.sum(1).mean(), "ppo/policy/entropy": ppo.masked_mean(entropy, mask),
        "objective/reward": rewards.sum(1).mean(),
        "objective/response_length": mask.sum(1).float().mean(), "objective/ended": ended.float().mean(),
        "objective/mismatch": (logprobs - sampled_logprobs).abs().sum() / mask.sum(),
    }  # fmt: skip
    if critic:
        stats |= {"ppo/returns/mean": ppo.masked_mean(returns, mask),
                  "ppo/val/explained_variance": ppo.explained_variance(values, returns, mask)}  # fmt: skip
    return Episodes(*row, logprobs, ref_logprobs, advantages, values, returns), stats


def in_parts(f, size, *rows):
    """f(*rows), a tensor (B, ...) or several, of at most `size` rows at a time; 0: all."""
    found = [f(*part) for part in zip(*(x.split(size or len(x)) for x in rows), strict=True)]
    return torch.cat(found) if torch.is_tensor(found[0]) else [torch.cat(x) for x in zip(*found, strict=True)]


def update(trained, optimizer, episodes, knobs, kl_coef, autocast, nonfinite=None):
    """Step 7: the mean of each statistic over the optimizer steps, and those of the first one, before anything has moved."""
    history = []
    for _ in range(knobs.ppo_epochs):
        for index in torch.randperm(len(episodes.tokens)).tensor_split(knobs.minibatches):
            minibatch = episodes.rows(index.to(episodes.tokens.device))
            means = add_gradient(trained, minibatch, knobs, kl_coef, autocast)
            loss = means["ppo/policy/loss"] + means.get("ppo/val/loss", 0)
            skip = nonfinite and partial(nonfinite, minibatch.tokens)
            _, means["ppo/grad_norm"] = optim.optimizer_step(optimizer, knobs.max_grad_norm, loss, skip)
            history.append(means)
    stats = {key: torch.stack([torch.as_tensor(h[key]) for h in history]).mean() for key in history[0]}
    return stats | {f"ppo/policy/first_{key}": history[0][f"ppo/policy/{key}"] for key in ("ratio", "approxkl")}


def add_gradient(trained, minibatch, knobs, kl_coef, autocast):
    """The statistics of a minibatch, after the backward pass of --micro-batch episodes at a time; each process takes its share of them."""
    policy, critic = (*trained, None)[:2]
    n_tokens, R = minibatch.response_lengths.sum(), minibatch.logprobs.shape[1]
    mine, counts = (torch.as_tensor(x, device=n_tokens.device) for x in parallel.share(len(minibatch.tokens)))
    size, means = knobs.micro_batch or len(mine), {}
    for start in range(0, len(mine), size):
        micro = slice(start, start + size)
        mb = minibatch.rows(mine[micro])
        mb = mb._replace(tokens=mb.tokens[:, : int((mb.prompt_lengths + mb.response_lengths).max())])
        row = (mb.tokens, mb.prompt_lengths, mb.response_lengths)
        mask = response_mask(mb.response_lengths, R) & counts[micro][:, None]
        with autocast:
            logprobs = response_logprobs(policy, *row, R, knobs.temperature)  # (b, R)
            values = before_response(critic.values(mb.tokens, row[1] + row[2]).float(), mb.prompt_lengths, R) if critic else None
        loss, stats = ppo.losses(logprobs, values, mb, mask, knobs, kl_coef)
        share = mask.sum() / n_tokens  # a mean is over the tokens of the whole minibatch
        trained.backward(loss * share, last=start + size >= len(mine))
        for key, value in stats.items():
            means[key] = means.get(key, 0) + value.detach() * share
    return dict(zip(means, parallel.total(torch.stack(list(means.values()))), strict=True))


def step_0_check(stats):
    """Before any update, policy and reference are one: the KL is 0, and so is the first log-ratio."""
    ratio, kl = stats["ppo/policy/first_ratio"].item(), stats["objective/kl"].item()
    right = abs(ratio - 1) < 1e-4 and abs(kl) < 1e-4
    return f"step-0 check: first ratio {ratio:.6f}, KL {kl:.6f} nats: {'' if right else 'NOT '}as they should be"


def reward_model(knobs):
    """(where the reward model lies or what function it is, the summary of its training when it is ours)."""
    sft.keep_apart(knobs.reward or Path(knobs.out).parent / "rm", knobs.out)
    if knobs.reward:
        return knobs.reward, {}
    own = train_rm.Knobs(init=knobs.init, out=str(Path(knobs.out).parent / "rm"), **sft.earlier(knobs))
    return sft.stage_before("reward model", train_rm.main, own)


def make_scorer(knobs, source, feedback, tokenizer, reference):
    """(scorer, its reward model or None). Of token rows it says what each response token earns (B, R), and which ones ended (B,)."""
    R, stop = knobs.response_length, tokenizer.encode(knobs.truncate) or [tokenizer.eos]
    if len(stop) > 1:
        raise UserError(f"--truncate {knobs.truncate!r}: {len(stop)} tokens of this tokenizer; expected a text of one")
    rm, level, (file, _, name) = None, knobs.reward_level or "response", str(source).rpartition(":")
    if source == "true" or file.endswith(".py") or (name.isidentifier() and file.replace(".", "").isidentifier()):
        function = labelers.true_reward(feedback) if source == "true" else labelers.load_function(file, name)
        ask = partial(labelers.ask, function, source, level, tokenizer)
    else:
        rm = labelers.load_reward_model(source, tokenizer, reference)
        if knobs.reward_level not in ("", level := rm.level):
            raise UserError(f"--reward-level {knobs.reward_level}: the reward model {source} scores by the {level}")

    def scorer(tokens, p, r):
        hit = (before_response(tokens[:, 1:], p, R) == stop[0]) & response_mask(r, R)  # (B, R)
        hit[:, : knobs.truncate_after] = False
        ended = hit.any(1)
        seen = torch.where(ended, hit.int().argmax(1) + 1, r)  # up to the first one
        if level == "response":
            scores = in_parts(rm, knobs.micro_batch, tokens, p + seen).float() if rm else ask(tokens, p, seen)[:, 0]
            return ppo.on_last_token(scores, response_mask(r, R)), ended
        values = in_parts(rm.values, knobs.micro_batch, tokens, p + r).float() if rm else ask(tokens, p, seen)
        values = before_response(values, p + 1, R) if rm else values
        values = torch.where(response_mask(seen, R), torch.nn.functional.pad(values, (0, R - values.shape[1])), 0)
        shift = rm.shift if rm else 0.0  # of the whole response
        return values + shift * ppo.on_last_token(torch.ones_like(values[:, 0]), response_mask(r, R)), ended

    return scorer, rm


def make_critic(knobs, policy, reference, rm):
    """The value function: a copy of the reward model, or a head of zeros: on the policy, or on the base where a function scores."""
    if knobs.advantage != "gae":
        return None
    own = rm and knobs.critic == "own"
    critic = copy.deepcopy(rm) if own else RewardModel.from_base(reference).to(policy.wte.weight.device)
    if knobs.critic == "shared":
        critic.transformer = policy
    if not own or rm.level == "token":  # a token's reward is not the sum of those to come
        torch.nn.init.zeros_(critic.score.weight)
    return critic


if __name__ == "__main__":
    cli.run_script(main, Knobs, __doc__)
