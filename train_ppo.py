"""Stage 2: PPO against the reward model.   python train_ppo.py

    python train_ppo.py                                            # laptop, 2 cores, from nothing: under 5 minutes
    python train_ppo.py --data toy --out runs/toy/ppo --steps 20   # a toy language with a known true reward: under a minute
    python train_ppo.py --reward my_rules.py:score                 # any Python function (prompts, responses) -> floats

The policy starts as the base model and learns to write what the reward model scores high, while a penalty on the KL from the frozen
base model keeps it a language model (Ziegler et al. 2019, Stiennon et al. 2020, Ouyang et al. 2022). One iteration:

    1 rollout      the policy answers a batch of prompts, sampled at --temperature until EOS or --response-length
    2 score        the reward model reads prompt and response: one number a response
    3 KL           log-probs of the response under policy and reference; their difference is the KL of each token
    4 reward       -kl_coef * KL at each token, and the score on the last one
    5 values       the critic, its own network that starts as the reward model, values each position
    6 advantages   GAE, then whitened over the batch
    7 update       --ppo-epochs passes of clipped policy and value losses

Left out: entropy bonus, value bootstrapping of cut responses, length filters, a shared trunk for policy and critic.
"""

import importlib.util
import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import train_rm
from minirlhf import data, ppo, runtime, sft
from minirlhf.checkpoint import finished
from minirlhf.gpt import GPT, RewardModel
from minirlhf.log import Run
from minirlhf.runtime import UserError, knob
from minirlhf.sampling import answers, before_response, generate, response_logprobs, response_mask


@dataclass
class Knobs:
    data: str = knob("reviews", "prompts: reviews, toy, a .jsonl[.gz] path, or hub:OWNER/NAME/FILE")
    init: str = knob("", "base model: a run, a model directory or a name on the hub (default: sft beside --out, made if missing)")
    reward: str = knob("", "reward model: a run or a model directory (default: rm beside --out, made if missing), FILE.py:FUNCTION of "
                           "(prompts, responses) -> floats, or true: the toy's own")  # fmt: skip
    out: str = knob("runs/ppo", "run directory")
    overlong: str = knob("", "prompts that leave no room for the response: error (the default), or truncate (at their left end)",
                         sft.OVERLONG)  # fmt: skip
    steps: int = knob(48, "iterations")
    batch_size: int = knob(128, "episodes an iteration")
    response_length: int = knob(24, "most tokens of a response")
    temperature: float = knob(1.0, "of sampling and of every log-prob")
    missing_eos_score: float = knob(math.nan, "score of a response that never ended, instead of the reward model's; nan: off")
    kl_coef: float = knob(0.033, "price of a nat of KL from the base model, in standard deviations of its scores")
    kl_kind: str = knob("k1", "KL estimator in the reward: k1, k2 or k3", ("k1", "k2", "k3"))
    kl_target: float = knob(0.0, "nats a response that kl_coef is steered to; 0: kl_coef stays")
    kl_horizon: int = knob(10000, "episodes over which kl_coef is steered")
    whiten_rewards: bool = knob(False, "shaped rewards get variance 1 over the batch, their mean kept")
    gamma: float = knob(1.0, "discount")
    lam: float = knob(0.8, "GAE's lambda; 0.95 is usual, but a critic that starts as the reward model can be trusted more")
    clip: float = knob(0.2, "the policy's ratio is clipped to 1 +- this")
    value_clip: float = knob(0.2, "the critic is clipped to its old value +- this")
    vf_coef: float = knob(0.1, "weight of the value loss")
    ppo_epochs: int = knob(2, "passes over an iteration's episodes")
    minibatches: int = knob(2, "optimizer steps a pass")
    micro_batch: int = knob(32, "episodes in memory at a time in the update; 0: a whole minibatch")
    lr: float = knob(1e-3, "peak learning rate, linear to 0")
    warmup: float = knob(0.2, "share of the steps over which the learning rate rises: the first updates are the noisiest")
    adam_eps: float = knob(1e-5, "Adam's epsilon")
    max_grad_norm: float = knob(1.0, "gradient norm is clipped to this; 0: off")
    eval_samples: int = knob(512, "held-out prompts answered before and after")
    seed: int = knob(0, "seed of order and samples")
    device: str = knob("auto", "auto, cpu, cuda, cuda:1, ...")
    dtype: str = knob("float32", "float32, or bfloat16 autocast", runtime.DTYPES)


class Episodes(NamedTuple):
    """One iteration's experience: B episodes of at most R response tokens."""

    tokens: torch.Tensor  # (B, Q+R)
    prompt_lengths: torch.Tensor  # (B,)
    response_lengths: torch.Tensor  # (B,)
    logprobs: torch.Tensor  # (B, R) under the policy that sampled, as all below
    values: torch.Tensor  # (B, R)
    advantages: torch.Tensor  # (B, R)
    returns: torch.Tensor  # (B, R)

    def rows(self, index):
        return Episodes(*(x[index] for x in self))


def main(knobs):
    device = runtime.pick_device(knobs.device)
    autocast = runtime.precision(device, knobs.dtype)
    feedback = data.load_feedback(knobs.data)

    # Models: what earlier stages should have made and have not is made now
    source = sft.base_model(knobs)
    reward_source, reward_summary = reward_model(knobs)
    rng = runtime.seed_everything(knobs.seed)
    tokenizer = sft.load_tokenizer(source)
    policy, reference = GPT.from_pretrained(source).to(device), GPT.from_pretrained(source).to(device)
    scorer, critic = make_scorer(knobs, reward_source, feedback, tokenizer, reference)
    critic.to(device)
    optimizer = runtime.make_optimizer(torch.nn.ModuleList([policy, critic]), knobs.lr, betas=(0.9, 0.999), eps=knobs.adam_eps)
    controller = ppo.AdaptiveKL(knobs.kl_coef, knobs.kl_target, knobs.kl_horizon)

    # Data: prompts, in an order without end
    room = policy.config.n_ctx - knobs.response_length
    prompts = data.fit(data.prompts_of(feedback.train, tokenizer, rng), room, knobs.overlong)
    held_out = data.fit(data.prompts_of(feedback.test, tokenizer, np.random.default_rng(1)), room, knobs.overlong)[: knobs.eval_samples]
    order = (i for _ in iter(int, 1) for i in rng.permutation(len(prompts)))

    run = Run("ppo", knobs, knobs.steps, device)
    torch.manual_seed(knobs.seed)
    before = answers(policy, reference, scorer, held_out, tokenizer, knobs.response_length, knobs.temperature, autocast)

    for step in range(knobs.steps):
        runtime.set_lr(optimizer, step, knobs.steps, knobs.lr, knobs.warmup)
        batch = data.pad_rows([prompts[next(order)] for _ in range(knobs.batch_size)], tokenizer.pad, device)
        with torch.no_grad(), autocast:
            episodes, stats = rollout(policy, reference, scorer, critic, batch, tokenizer, knobs, controller.coef)
        if knobs.kl_target:
            controller.update(stats["objective/kl"].item(), knobs.batch_size)
        stats |= update(policy, critic, optimizer, episodes, knobs, autocast, step)
        if step == 0:
            run.say(step_0_check(stats))
        run.log(step, stats, show=("objective/score", "objective/kl"))

    torch.manual_seed(knobs.seed)  # the same random numbers as before
    after = answers(policy, reference, scorer, held_out, tokenizer, knobs.response_length, knobs.temperature, autocast)
    run.close()
    policy.save_pretrained(run.out / "model", tokenizer)
    base_summary = finished(Path(source).parent) or {}
    return run.compare(before, after, base_summary | reward_summary)


def rollout(policy, reference, scorer, critic, prompts, tokenizer, knobs, kl_coef):
    """Steps 1 to 6: (Episodes, stats)."""
    # 1 rollout
    sampled = generate(policy, *prompts, knobs.response_length, eos=tokenizer.eos, pad=tokenizer.pad,
                       temperature=knobs.temperature)  # fmt: skip
    row = (sampled.tokens, sampled.prompt_lengths, sampled.response_lengths)
    width = sampled.logprobs.shape[1]
    mask = response_mask(sampled.response_lengths, width)  # (B, R)

    # 2 score
    scores = scorer(*row)  # (B,)
    if not math.isnan(knobs.missing_eos_score):
        scores = torch.where(ended(sampled, tokenizer.eos), scores, knobs.missing_eos_score)

    # 3 log-probs, made anew by the function that the update uses, so that its first ratio is 1; KL from the reference
    logprobs = response_logprobs(policy, *row, width, knobs.temperature)  # (B, R)
    ref_logprobs = response_logprobs(reference, *row, width, knobs.temperature)
    kl = ppo.kl_estimate(logprobs, ref_logprobs, knobs.kl_kind)

    # 4 reward
    rewards = ppo.shaped_rewards(scores, kl, mask, kl_coef)  # (B, R)
    if knobs.whiten_rewards:
        rewards = ppo.whiten(rewards, mask, shift_mean=False)

    # 5 values: of the state before each token, so at the position of the token before it
    values = torch.where(mask, before_response(critic.values(sampled.tokens).float(), sampled.prompt_lengths, width), 0)

    # 6 advantages
    advantages, returns = ppo.gae(rewards, values, mask, knobs.gamma, knobs.lam)
    episodes = Episodes(*row, logprobs, values, ppo.whiten(advantages, mask), returns)
    stats = {
        "objective/score": scores.mean(), "objective/score_std": scores.std(correction=0),
        "objective/kl": (logprobs - ref_logprobs).sum(1).mean(), "objective/kl_coef": torch.tensor(kl_coef),
        "objective/entropy": -logprobs.sum(1).mean(), "objective/reward": rewards.sum(1).mean(),
        "objective/response_length": sampled.response_lengths.float().mean(),
        "objective/ended": ended(sampled, tokenizer.eos).float().mean(),
        "objective/mismatch": (logprobs - sampled.logprobs).abs().sum() / mask.sum(),
        "ppo/returns/mean": ppo.masked_mean(returns, mask),
        "ppo/val/explained_variance": ppo.explained_variance(values, returns, mask),
    }  # fmt: skip
    return episodes, stats


def update(policy, critic, optimizer, episodes, knobs, autocast, step):
    """Step 7: the mean of each statistic over the optimizer steps, and the first ratio."""
    B, R = episodes.logprobs.shape
    history = []
    for _ in range(knobs.ppo_epochs):
        for index in torch.randperm(B).tensor_split(knobs.minibatches):
            minibatch = episodes.rows(index.to(episodes.tokens.device))
            n_tokens = minibatch.response_lengths.sum()
            totals = {}
            by_length = (minibatch.prompt_lengths + minibatch.response_lengths).argsort()  # like with like: less padding
            for micro in by_length.split(knobs.micro_batch or B):
                mb = minibatch.rows(micro)
                mb = mb._replace(tokens=mb.tokens[:, : int((mb.prompt_lengths + mb.response_lengths).max())])
                row = (mb.tokens, mb.prompt_lengths, mb.response_lengths)
                mask = response_mask(mb.response_lengths, R)
                with autocast:
                    logprobs = response_logprobs(policy, *row, R, knobs.temperature)  # (b, R)
                    values = before_response(critic.values(mb.tokens).float(), mb.prompt_lengths, R)
                pg_loss, pg_stats = ppo.policy_loss(logprobs, mb.logprobs, mb.advantages, mask, knobs.clip)
                vf_loss, vf_stats = ppo.value_loss(values, mb.values, mb.returns, mask, knobs.value_clip)
                share = mask.sum() / n_tokens  # a mean is over the tokens of the whole minibatch
                ((pg_loss + knobs.vf_coef * vf_loss) * share).backward()
                for key, value in (pg_stats | vf_stats | {"ppo/policy/loss": pg_loss, "ppo/val/loss": vf_loss}).items():
                    totals[key] = totals.get(key, 0) + value.detach() * share
            runtime.finite(totals["ppo/policy/loss"] + totals["ppo/val/loss"], f"ppo step {step}: loss")
            totals["ppo/grad_norm"] = runtime.optimizer_step(optimizer, knobs.max_grad_norm)
            history.append(totals)
    stats = {key: torch.stack([torch.as_tensor(h[key]) for h in history]).mean() for key in history[0]}
    return stats | {"ppo/policy/first_ratio": history[0]["ppo/policy/ratio"]}


def step_0_check(stats):
    """Before any update, policy and reference are one: the KL is 0, and so is the first log-ratio."""
    ratio, kl = stats["ppo/policy/first_ratio"].item(), stats["objective/kl"].item()
    verdict = "as they should be" if abs(ratio - 1) < 1e-4 and abs(kl) < 1e-4 else "NOT as they should be: 1 and 0"
    return f"step-0 check: first ratio {ratio:.6f}, KL {kl:.6f} nats: {verdict}"


def ended(sampled, eos):
    """Whether each response closed with EOS: (B,)."""
    last = sampled.prompt_lengths + sampled.response_lengths - 1
    return sampled.tokens.gather(1, last[:, None]).squeeze(1) == eos


def reward_model(knobs):
    """(where the reward model lies or what function it is, the summary of its training when it is ours)."""
    if knobs.reward:
        return knobs.reward, {}
    own = train_rm.Knobs(data=knobs.data, init=knobs.init, out=str(Path(knobs.out).parent / "rm"), seed=knobs.seed,
                         overlong=knobs.overlong, device=knobs.device, dtype=knobs.dtype)  # fmt: skip
    return sft.stage_before("reward model", train_rm.main, own)


def make_scorer(knobs, source, feedback, tokenizer, reference):
    """(scorer of token rows -> (B,), critic). A Python function scores text, and its critic is the base with a fresh head."""
    file, _, name = str(source).rpartition(":")
    if source == "true" or file.endswith(".py"):
        function = feedback.true_reward if source == "true" else load_function(file, name)
        if function is None:
            raise UserError(f"--reward true: {knobs.data} has no known true reward (toy has)")

        def score_text(tokens, prompt_lengths, response_lengths):
            rows = zip(tokens.tolist(), prompt_lengths.tolist(), response_lengths.tolist(), strict=True)
            texts = [(tokenizer.decode(row[:p]), tokenizer.decode(row[p : p + r])) for row, p, r in rows]
            scores = torch.tensor([float(s) for s in function(*map(list, zip(*texts, strict=True)))], device=tokens.device)
            if len(scores) != len(tokens) or not scores.isfinite().all():
                raise UserError(f"--reward {source}: expected {len(tokens)} finite scores")
            return scores

        critic = RewardModel.from_base(reference)
        torch.nn.init.zeros_(critic.score.weight)
        return score_text, critic
    rm, critic = (sft.load_reward_model(source, tokenizer, reference) for _ in range(2))
    return lambda tokens, p, r: rm(tokens, p + r).float(), critic


def load_function(file, name):
    spec = importlib.util.spec_from_file_location("reward_function", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not callable(getattr(module, name, None)):
        raise UserError(f"--reward {file}:{name}: no function {name} in {file}")
    return getattr(module, name)


if __name__ == "__main__":
    runtime.run_script(main, Knobs, __doc__)
