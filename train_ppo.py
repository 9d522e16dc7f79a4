"""Stage 2: PPO against the reward model.   python train_ppo.py

    python train_ppo.py                               # laptop, 2 cores: 2 to 6 minutes
    python train_ppo.py --data toy --out runs/toy/ppo --steps 20      # a toy language: a minute
    python train_ppo.py --reward my_rules.py:score    # any function (prompts, responses) -> floats
    python train_ppo.py --advantage grpo --kl-in loss --kl-kind k3    # no critic: answers compete
    torchrun --nproc-per-node 8 train_ppo.py --shard  # many GPUs; --resume goes on

The policy starts as the base model and learns to write what the reward model scores high, while a
price on the KL from the frozen base model keeps it a language model; of the reviews that price is
steered to 8.3 nats (Ziegler et al. 2019, Stiennon et al. 2020, Ouyang et al. 2022). One iteration:

    1 rollout      the policy answers a batch of prompts, sampled until EOS or --response-length
    2 score        the reward model reads prompt and response: one number a response (or a token)
    3 KL           log-probs under policy and reference; their difference is the KL of each token
    4 reward       -kl_coef * KL at each token, and the score on the last one
    5 values       the critic, its own network that starts as the reward model, values each position
    6 advantages   GAE, whitened over the batch; without a critic, each response against its rivals
    7 update       --ppo-epochs passes of clipped policy and value losses

Every detail on which published code differs is a switch. lm-human-preferences, its style tasks:

    python train_ppo.py --temperature 0.7 --response-length 24 --no-stop-at-eos --truncate . \\
        --truncate-after 16 --missing-eos-score -1 --whiten-rewards --kl-coef 0.15 --kl-target 6 \\
        --critic shared --lam 0.95 --ppo-epochs 4 --minibatches 1 --max-grad-norm 0 --lr 1e-5 \\
        --warmup 0 --batch-size 512 --steps 1953 --letters 0 --kl-horizon 10000

summarize_from_feedback_details (Huang et al. 2024); what it decodes after EOS it drops:

    python train_ppo.py --temperature 0.7 --response-length 53 --missing-eos-score -1 --lam 0.95 \\
        --kl-coef 0.05 --ppo-epochs 4 --minibatches 1 --max-grad-norm 0 --lr 3e-6 --warmup 0 \\
        --batch-size 512 --steps 1953 --letters 0 --kl-target 0

Left out: values of cut responses, length filters, Adam's epsilon as in TensorFlow.
"""

if __name__ == "__main__":  # first, as torch takes a while
    import minirlhf.engine.interrupts  # noqa: F401
import math
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch

import train_rm
from minirlhf import data, ppo, sft
from minirlhf.engine import cli, letters, machine, optim, parallel, rows, stages
from minirlhf.engine.cli import knob
from minirlhf.engine.files import figures_beside
from minirlhf.engine.log import Run
from minirlhf.engine.prepare import prepare
from minirlhf.engine.rows import endless, mean_step, pad_rows, response_mask, rowwise, window
from minirlhf.feedback.checks import check_ppo, kl_target_of
from minirlhf.feedback.groups import learned_from, rivals
from minirlhf.feedback.preferring import content_of
from minirlhf.feedback.scoring import LEVELS, charge_unended, expect_fit, find_function, make_scorer
from minirlhf.gpt import RewardModel
from minirlhf.look.alarms import alarms
from minirlhf.look.answers import answers, compare
from minirlhf.look.episodes import rollout_stats, step_0_check, update_stats
from minirlhf.online.batches import base_of
from minirlhf.rewards.side_by_side import first_of
from minirlhf.sampling import generate, response_logprobs
from minirlhf.tokenizer import load_base


@dataclass(kw_only=True)
class Knobs(cli.RunKnobs):
    data: str = knob("reviews", "reviews, toy, a file, a folder, hub:OWNER/NAME/FILE", free=True)
    init: str = knob("", "base model: run, directory, hub name (default: beside --out)", free=True)
    reference: str = knob("", "base that the KL is from, where --init is tuned", free=True)
    reward: str = knob("", "what scores: a run, a directory (default: rm beside --out), true, "
                           "FILE.py:FUNCTION, judge:URL, RM,RM,...", free=True)  # fmt: skip
    reward_level: str = knob("", "what a function rates: a response (default) or a token", LEVELS)
    fuse: int = knob(0, "average a score with those of at most this many like training texts")
    out: str = knob("runs/ppo", "run directory", free=True)
    overlong: str = knob("", "too long a prompt: error, or truncate on the left", sft.OVERLONG)
    steps: int = knob(64, "iterations", least=1)
    batch_size: int = knob(256, "episodes an iteration", least=1)
    response_length: int = knob(24, "most tokens of a response", least=1)
    stop_at_eos: bool = knob(True, "EOS ends a response; else it has all --response-length tokens")
    temperature: float = knob(1.0, "of sampling and of every log-prob", least=1e-6)
    top_k: int = knob(0, "sample from the k likeliest only, which log-probs do not know; 0: off")
    truncate: str = knob("", "a token that ends a response for the scorer, in place of EOS")
    truncate_after: int = knob(0, "first position of the response, from 0, where that token counts")
    missing_eos_score: float = knob(math.nan, "score of the unended; nan: none", least=-math.inf)
    missing_eos_penalty: float = knob(0.0, "taken off the score of the unended")
    kl_coef: float = knob(0.08, "price of a nat of KL, in standard deviations of base scores")
    kl_kind: str = knob("k1", "KL estimator: k1, k2 or k3", ("k1", "k2", "k3"))
    kl_in: str = knob("reward", "where the KL is paid; loss: k2 or k3", ("reward", "loss"))
    kl_target: float = knob(math.nan, "nats it is steered to; 0: it stays; nan: 8.3 of reviews")
    kl_horizon: int = knob(2560, "episodes over which it is steered", least=1)
    whiten_rewards: bool = knob(False, "rewards get variance 1 over the batch, their mean kept")
    advantage: str = knob("gae", "gae; without a critic rloo, grpo, reinforce", ppo.ADVANTAGES)
    group_size: int = knob(4, "answers to each prompt without a critic; gae takes one", least=2)
    skip_flat: bool = knob(False, "leave out groups whose scores are alike (DAPO, eq. 11)")
    gamma: float = knob(1.0, "gae: discount", most=1)
    lam: float = knob(0.5, "gae: lambda; 0.95 is usual, but this critic starts well", most=1)
    whiten_advantages: bool = knob(True, "gae: mean 0 and variance 1 over the batch")
    critic: str = knob("own", "gae: of the reward model; a head on the policy", ("own", "shared"))
    critic_warmup: int = knob(0, "gae: iterations at the start that train the critic alone")
    clip: float = knob(0.2, "the policy's ratio is clipped to 1 +- this")
    clip_high: float = knob(0.0, "what it is clipped to above (DAPO, eq. 8); 0: --clip")
    ratio: str = knob("token", "of a token; of a response (GSPO, eq. 7)", ("token", "response"))
    loss_mean: str = knob("token", "over tokens (DAPO); over responses (GRPO), all as long as "
                                   "--response-length (Dr. GRPO)", ppo.LOSS_MEANS)  # fmt: skip
    entropy_coef: float = knob(0.0, "weight of the mean entropy of next tokens, which it raises")
    stop_kl: float = knob(0.0, "approxkl of a step that ends an iteration's passes; 0: none does")
    value_clip: float = knob(0.2, "gae: the critic is clipped to its old value +- this")
    vf_coef: float = knob(0.1, "gae: weight of the value loss")
    ppo_epochs: int = knob(1, "passes over an iteration's episodes", least=1)
    minibatches: int = knob(4, "optimizer steps a pass", least=1)
    micro_batch: int = knob(64, "episodes in memory at a time, on each process; 0: all", free=True)
    lr: float = knob(1e-3, "peak learning rate")
    lr_schedule: str = knob("linear", "after the warm-up", ("linear", "constant", "cosine"))
    warmup: float = knob(0.2, "share of the steps over which the rate rises", most=1)
    adam_eps: float = knob(1e-5, "Adam's epsilon")
    eval_samples: int = knob(512, "held-out prompts answered before and after", least=1, free=True)
    save_every: int = knob(10, "steps between states to resume from; 0: the last alone", free=True)


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
    weights: torch.Tensor  # (B,) 1 where the policy learns from a response, else 0


@cli.contained
def main(knobs):
    check_ppo(knobs)
    device, autocast = parallel.start(knobs)
    feedback = data.load_feedback(knobs.data)
    function = find_function(knobs, feedback)
    stages.look_ahead(knobs, {"sft": knobs.init, "rm": knobs.reward}, function and knobs.reward)

    # Models: what earlier stages should have made and have not is made now
    source = sft.base_model(knobs, feedback)
    expect_fit(knobs, source)
    reward, earlier = sft.stage_beside("reward model", "rm", train_rm, knobs, feedback)
    rng = machine.seed_everything(knobs.seed)
    policy, tokenizer = load_base(source, device)
    reference = base_of(knobs, policy, tokenizer)
    scorer, rm = make_scorer(knobs, reward, function, tokenizer, policy, feedback)
    critic = make_critic(knobs, policy, reference, rm)
    prepare(knobs, policy, reference, rm, critic)
    trained = parallel.Together(policy, critic)
    optimizer = optim.make_optimizer(trained, knobs.lr, betas=(0.9, 0.999), eps=knobs.adam_eps)
    letters.join(knobs, optimizer, policy, tokenizer)
    target = kl_target_of(knobs)
    controller = ppo.AdaptiveKL(knobs.kl_coef, target, knobs.kl_horizon)

    # Data: prompts, and which of them each step takes
    room = policy.config.n_ctx - knobs.response_length
    prompts = data.training_prompts(feedback, tokenizer, room, knobs, rng)
    held_out = data.held_out_prompts(feedback, tokenizer, room, knobs)
    group = rivals(knobs)
    plan = endless(len(prompts), knobs.batch_size // group, knobs.steps, rng)

    def score(*rows):
        return scorer(*rows)[0].sum(1)

    def ask(model):
        return answers(model, reference, score, held_out, tokenizer, knobs.response_length,
                       knobs.temperature, autocast, knobs.seed)  # fmt: skip

    parts = {"models": trained, "optimizer": optimizer, "kl": controller}
    given = {"data": prompts, "base model": knobs.reference or source, "reward": content_of(reward)}
    run = Run("ppo", knobs, plan, device, tokenizer, parts, given, watch=alarms)
    for step, chosen in run.steps():
        optim.set_lr(optimizer, step, knobs.steps, knobs.lr, knobs.warmup, knobs.lr_schedule)
        skip = partial(run.nonfinite, step)
        take_step = partial(mean_step, trained, optimizer, knobs, autocast, skip)
        asked = [prompts[i] for i in chosen.repeat(group)]
        batch = pad_rows(asked, tokenizer.pad, device)
        with torch.no_grad(), autocast:
            episodes, stats = rollout(policy, reference, scorer, critic, batch, tokenizer, knobs,
                                      controller.coef)  # fmt: skip
        stats |= update(policy, critic, episodes, take_step, knobs, controller.coef, step)
        controller.update(stats["objective/kl"].item(), knobs.batch_size)
        if step == 0 and not knobs.reference:
            run.say(step_0_check(stats))
        run.log(step, stats, show=("objective/score", "objective/kl"))

    with run.kept(policy, **feedback.facts(knobs.data, tokenizer)):
        before, after = ask(reference), ask(policy)
        return compare(run, before, after, earlier | figures_beside(source))


def rollout(policy, reference, scorer, critic, prompts, tokenizer, knobs, kl_coef):
    """Steps 1 to 6: (Episodes, stats)."""
    R = knobs.response_length

    # 1 rollout: tokens (B, Q+R), lengths p and r (B,), log-probs of the sampler
    options = {
        "eos": tokenizer.eos if knobs.stop_at_eos else -1,
        "pad": tokenizer.pad,
        "temperature": knobs.temperature,
        "top_k": knobs.top_k or None,
    }
    tokens, p, r, sampled_logprobs = generate(policy, *prompts, R, **options)
    mask = response_mask(r, R)  # (B, R)

    # 2 score: (B, R) what each token earns, a whole response on its last one; (B,) whether it ended
    scores, ended = rowwise(scorer, 0, tokens, p, r)
    scores = charge_unended(scores, ended, mask, knobs)

    # 3 log-probs, by the function of the update, so that its first ratio is 1; and each token's KL
    size = knobs.micro_batch
    row = tokens, p, r
    read = partial(response_logprobs, width=R, temperature=knobs.temperature)
    read_policy = partial(read, policy, entropy=True)
    logprobs, entropy = rowwise(read_policy, size, *row)  # (B, R)
    read_reference = partial(read, reference)
    ref_logprobs = rowwise(read_reference, size, *row)
    kl = ppo.kl_estimate(logprobs, ref_logprobs, knobs.kl_kind)

    # 4 reward
    rewards = token_rewards(scores, kl, mask, knobs, kl_coef)

    # 5 values
    values = None
    if critic:
        value = partial(state_values, critic, width=R)
        values = rowwise(value, size, *row)
        values = torch.where(mask, values, 0)

    # 6 advantages
    advantages, returns = token_advantages(rewards, values, mask, knobs)
    flat, weights = learned_from(scores, knobs)  # (B,) each
    episodes = Episodes(tokens, p, r, logprobs, ref_logprobs, advantages, values, returns, weights)
    earned = scores, rewards, ended, flat
    stats = rollout_stats(episodes, mask, earned, entropy, sampled_logprobs, kl_coef)
    return episodes, stats


def token_rewards(scores, kl, mask, knobs, kl_coef):
    """Step 4: (B, R), the scores less the price of the KL, where the reward pays it."""
    price = kl_coef if knobs.kl_in == "reward" else 0.0
    rewards = ppo.shaped_rewards(scores, kl, mask, price)
    if knobs.whiten_rewards:
        rewards = ppo.whiten(rewards, mask, shift_mean=False)
    return rewards


def state_values(critic, tokens, prompt_lengths, response_lengths, width):
    """Step 5: the value (B, R) of the state before each response token, so at the token before
    it."""
    values = critic.values(tokens, prompt_lengths + response_lengths).float()  # (B, T)
    return window(values, prompt_lengths - 1, width)


def token_advantages(rewards, values, mask, knobs):
    """Step 6: (advantages, returns), (B, R) each; without a critic a response's advantage, by the
    sum of its rewards, is that of each of its tokens, and there are no returns."""
    if knobs.advantage != "gae":
        scores = rewards.sum(1)
        advantages = ppo.group_advantages(scores, knobs.group_size, knobs.advantage)  # (B,)
        return advantages[:, None] * mask, None
    advantages, returns = ppo.fast_gae(rewards, values, mask, knobs.gamma, knobs.lam)
    if knobs.whiten_advantages:
        advantages = ppo.whiten(advantages, mask)
    return advantages, returns


def update(policy, critic, episodes, take_step, knobs, kl_coef, step=0):
    """Step 7: statistics over the optimizer steps. take_step(minibatch, loss_of) makes one of
    loss_of(minibatch) -> (loss, stats)."""
    history = []
    loss_of = partial(ppo_loss, policy, critic, knobs, kl_coef)
    for _ in range(knobs.ppo_epochs):
        order = torch.randperm(len(episodes.tokens))
        for index in order.tensor_split(knobs.minibatches):
            mb = minibatch(episodes, index, knobs, step)
            stats, norm = take_step(mb, loss_of)
            stats["ppo/grad_norm"] = norm
            history.append(stats)
        moved = history[-1]["ppo/policy/approxkl"]
        if knobs.stop_kl and moved > knobs.stop_kl:
            break
    return update_stats(history)


def minibatch(episodes, index, knobs, step):
    """Some episodes; their weights become those of each token in the policy's loss, (b, 1)."""
    mb = rows.some(episodes, index)
    counts = mb.weights * (step >= knobs.critic_warmup)
    weights = ppo.token_weights(mb.response_lengths, knobs.response_length, knobs.loss_mean, counts)
    return mb._replace(weights=weights)


def ppo_loss(policy, critic, knobs, kl_coef, mb):
    """(loss, stats) of a minibatch: its log-probs and values now, against those of the rollout."""
    R = knobs.response_length
    row = mb.tokens, mb.prompt_lengths, mb.response_lengths
    mask = response_mask(mb.response_lengths, R)
    options = {"temperature": knobs.temperature, "entropy": knobs.entropy_coef != 0}
    found = response_logprobs(policy, *row, R, **options)
    logprobs, entropy = found if knobs.entropy_coef else (found, None)  # (b, R)
    values = state_values(critic, *row, R) if critic else None
    return losses(logprobs, values, mb, mask, knobs, kl_coef, entropy)


def losses(logprobs, values, mb, mask, knobs, kl_coef, entropy=None):
    """(policy loss + vf_coef * value loss, stats), means over the mask; no values, no value
    loss."""
    options = {"level": knobs.ratio, "weights": mb.weights}
    options |= {"clip": knobs.clip, "clip_high": knobs.clip_high or None}
    loss, stats = ppo.policy_loss(logprobs, mb.logprobs, mb.advantages, mask, **options)
    if knobs.kl_in == "loss":
        kl = ppo.kl_loss(logprobs, mb.ref_logprobs, mask, knobs.kl_kind, mb.weights)
        loss = loss + kl_coef * kl
    if entropy is not None:  # Williams and Peng 1991
        counted = entropy * (mb.weights > 0)
        loss = loss - knobs.entropy_coef * ppo.masked_mean(counted, mask)
    stats["ppo/policy/loss"] = loss
    if values is None:
        return loss, stats
    vf_loss, vf_stats = ppo.value_loss(values, mb.values, mb.returns, mask, knobs.value_clip)
    stats |= vf_stats
    stats["ppo/val/loss"] = vf_loss
    return loss + knobs.vf_coef * vf_loss, stats


def make_critic(knobs, policy, reference, rm):
    """The value function: the reward model, or its first member; or a fresh one of zeros."""
    if knobs.advantage != "gae":
        return None
    own = rm and knobs.critic == "own"
    base = policy if knobs.critic == "shared" else reference
    critic = first_of(rm) if own else RewardModel.from_base(base)
    critic.to(base.wte.weight.device)
    if base is policy:
        critic.transformer = policy
    if not own or rm.level == "token":  # a token's reward is not the sum of those to come
        torch.nn.init.zeros_(critic.score.weight)
    return critic


if __name__ == "__main__":
    cli.run_script(main, Knobs, __doc__)
