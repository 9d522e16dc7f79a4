"""Which flags of the three scripts make no sense together, or have no say beside others, and which
data hold nothing for them. Each raises UserError, a line, before anything is loaded.

What a loss of train_dpo takes is method.py's.
"""

import math

from minirlhf.engine import cli, stages
from minirlhf.engine.cli import UserError
from minirlhf.feedback import labelers, mixture, preferring
from minirlhf.lists import THUMBS


def check_rm(knobs, items, further=()):
    """Refuses knobs of train_rm that say nothing together, and data that say nothing. `further`
    are the ratings of the source's further text."""
    of_kinds = mixture.reads(knobs, items)
    of_pairs = knobs.margin or knobs.center or items.margins or not knobs.soft_labels
    of_scores = knobs.loss != "pairs" or knobs.center or knobs.level != "response"
    if items.ratings is None and not items.groups and not of_kinds:
        raise UserError(f"{knobs.data}: neither comparisons nor ratings to learn from")
    if knobs.loss == "ratings" and items.ratings is None:
        raise UserError(f"--loss ratings: {knobs.data} has comparisons, and no ratings")
    if knobs.loss != "pairs" and of_pairs:
        raise UserError(
            f"--loss {knobs.loss}: margins, --center and --no-soft-labels belong to --loss pairs"
        )
    if knobs.model == "pairwise" and of_scores:
        expected = "expected --loss pairs, --level response and no --center"
        raise UserError(f"--model pairwise has no scores: {expected}")
    ranked = knobs.loss in ("plackett_luce", "best_of_k", "parl")
    cli.refuse_idle(knobs, {
        f"in --loss {knobs.loss}": not ranked and "group_size",
        "but in --loss parl": knobs.loss != "parl" and "beta",
        "in --loss parl of labels, which copies do not have":
            knobs.loss == "parl" and items.labels is not None and "augment",
        "where the records say what was ranked": items.ratings is None and "group_size",
        "without scores": knobs.model == "pairwise" and "members normalize response_length",
        "where no further text is rated": not len(further) and "text_epochs",
        "without --normalize": not knobs.normalize and "response_length",
        "where labels are not read by their kinds": not of_kinds and "kind_weights kind_betas",
        "where labels are read by their kinds": of_kinds and "members",
    })  # fmt: skip
    if of_kinds:
        mixture.check(knobs, items)


def check_ppo(knobs):
    """Refuses train_ppo's switches that make no sense together, and those that have no say beside
    others; says what top-k means."""
    stages.look_ahead(knobs, {False: knobs.reference})
    size, groups = knobs.batch_size, knobs.advantage != "gae"
    last = knobs.response_length if knobs.truncate else 1
    ended = not math.isnan(knobs.missing_eos_score)
    cli.refuse({
        "--kl-in loss with k1: its gradient is 0 on average; take --kl-kind k2 or k3":
            knobs.kl_in == "loss" and knobs.kl_kind == "k1",
        f"--batch-size {size} is not whole groups of {knobs.group_size}":
            groups and size % knobs.group_size,
        f"--whiten-rewards is for gae: {knobs.advantage} has a scale of its own":
            groups and knobs.whiten_rewards,
        f"--minibatches {knobs.minibatches} of --batch-size {size}: some are empty":
            knobs.minibatches > size,
        "--kl-horizon must exceed a fifth of --batch-size":
            kl_target_of(knobs) and 0.2 * size >= knobs.kl_horizon,
        "--truncate needs --missing-eos-score (-1 is usual)": knobs.truncate and not ended,
        "--truncate-after: needs --truncate; 0 to R-1": knobs.truncate_after >= last,
        "--missing-eos-penalty beside --missing-eos-score, which is the whole score: give one":
            knobs.missing_eos_penalty > 0 and ended,
        "--ratio response is for groups, whose tokens share an advantage: it is not for gae":
            knobs.ratio == "response" and not groups,
        f"--critic-warmup {knobs.critic_warmup}: expected less than --steps":
            knobs.critic_warmup >= knobs.steps,
        "--critic-warmup with --critic shared: the policy would move with the critic":
            knobs.critic_warmup and knobs.critic == "shared" and not groups,
    })  # fmt: skip
    refuse_idle_ppo(knobs, groups)


def kl_target_of(knobs):
    """The KL in nats a response that the coefficient is steered to; 0: it stays. One coefficient
    would buy 8 nats by one reward model of the reviews, and 12 by that of another seed."""
    return cli.given_or(knobs.kl_target, knobs.data, reviews=8.3)


def refuse_idle_ppo(knobs, groups):
    one_step = knobs.ppo_epochs * knobs.minibatches == 1
    cli.refuse_idle(knobs, {
        f"with --advantage {knobs.advantage}, which has no critic":
            groups and "gamma lam whiten_advantages critic critic_warmup value_clip vf_coef",
        "with --advantage gae, which takes one answer to a prompt":
            not groups and "group_size skip_flat",
        "without --kl-target": not kl_target_of(knobs) and "kl_horizon",
        "at --kl-coef 0": knobs.kl_coef == 0 and "kl_target kl_kind kl_in",
        "at one optimizer step an iteration, whose ratios are 1":
            one_step and "clip clip_high ratio value_clip",
        "at one pass an iteration": knobs.ppo_epochs == 1 and "stop_kl",
    })  # fmt: skip
    if knobs.top_k:
        print(f"note: --top-k {knobs.top_k} samples from another distribution than the one that is "
              "scored: objective/kl can be negative")  # fmt: skip


def check_dpo(feedback, method, knobs):
    """Refuses data that hold nothing for train_dpo's loss, or no true reward that is asked for, and
    what is wrong with --out or a given model."""
    labelers.given_true(knobs.reward, feedback)
    made = "rm" if knobs.online and not knobs.labeler else ""
    models = {"sft": knobs.init, made: knobs.reward, None: preferring.model_of(knobs.labeler)}
    models[False] = knobs.reference
    stages.look_ahead(knobs, models, "true")
    items = feedback.train
    if knobs.online:
        return
    if items.ratings is None and not items.groups:
        raise UserError(f"{knobs.data}: neither comparisons nor ratings to learn from")
    if items.ratings is not None and method.kind not in THUMBS and not items.contexts(across=False):
        problem = "no two rated responses share a prompt, so DPO has no pairs"
        raise UserError(f"{knobs.data}: {problem}; --loss kto needs none")
