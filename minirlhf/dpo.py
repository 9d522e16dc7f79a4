"""The maths of stage 2': DPO and its family, and the axes on which the methods differ. Tensors in, tensors out.

A pair is four numbers: log-probs of the chosen and the rejected response, summed over their tokens, under the policy and under the
frozen reference. With h = log pi - log pi_ref, DPO's implicit reward is beta h, and its loss that of Bradley and Terry on it.
`pair_loss` has every loss of these four, the lengths and what a kind's options add; after it come losses of single responses, of
ranked lists and of games between policies. What is iterative or online about a method (which samples, who labels, when the
reference moves) is the script's affair.

Left out: CRINGE, which needs the logits; PRO's temperatures.
"""

import inspect
import math

import torch
import torch.nn.functional as F
from torch.nn.functional import logsigmoid

ALIASES = {"dpo": "sigmoid", "exo": "exo_pair", "nca": "nca_pair", "bco": "bco_pair"}


def pair_loss(kind, policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, *, beta=0.1,
              label_smoothing=0.0, chosen_lengths=None, rejected_lengths=None, **options):  # fmt: skip
    """The loss of each pair (B,); the script takes the mean.

    All log-probs (B,) are sums over response tokens; lengths (B,) count those tokens. `label_smoothing` is the probability that
    the labels are swapped, a float or (B,): with 1 - P(chosen preferred) the sigmoid loss learns from soft labels. Options of a
    kind are the keywords of its function below; `divergence` (reverse_kl, forward_kl, js, alpha; f-DPO, Wang et al. 2023)
    transforms the log-ratios of every kind that uses them, `nll_weight` adds that much of the chosen's next-token loss to any kind.
    Reference log-probs may be None for the kinds in REFERENCE_FREE, everything of the chosen response for npo. Raises ValueError
    for an unknown kind, an option that the kind does not have or lacks, a label smoothing that it would ignore, and missing lengths.
    """
    kind = ALIASES.get(kind, kind)
    if kind not in KINDS:
        raise ValueError(f"loss {kind!r}: expected one of {', '.join([*KINDS, *ALIASES])}")
    needs = inspect.signature(KINDS[kind]).parameters
    given = {
        "beta": beta, "e": label_smoothing, "nc": chosen_lengths, "nr": rejected_lengths,
        "pc": policy_chosen_logps, "pr": policy_rejected_logps, "rc": ref_chosen_logps, "rr": ref_rejected_logps,
    }  # fmt: skip
    divergence = {key: options.pop(key) for key in ("divergence", "alpha_divergence") if key in options}
    if divergence and "r" not in needs:
        raise ValueError(f"loss {kind} does not use the log-ratios, so it has no divergence")
    if "c" in needs:
        given["c"] = f_divergence(policy_chosen_logps - ref_chosen_logps, **divergence)
    if "r" in needs:
        given["r"] = f_divergence(policy_rejected_logps - ref_rejected_logps, **divergence)
    nll_weight = options.pop("nll_weight", 0.0)
    keywords = {name: p for name, p in needs.items() if p.kind == p.KEYWORD_ONLY}
    if unknown := options.keys() - keywords.keys():
        raise ValueError(f"loss {kind} has no option {', '.join(sorted(unknown))}")
    if missing := [name for name, p in keywords.items() if p.default is p.empty and name not in options]:
        raise ValueError(f"loss {kind} needs {', '.join(missing)}")
    if "e" not in needs and torch.any(torch.as_tensor(label_smoothing) != 0):
        raise ValueError(f"loss {kind} has no label smoothing")
    uses_lengths = kind != "ipo" or options.get("length_normalise")
    if uses_lengths and any(name in needs and given[name] is None for name in ("nc", "nr")):
        raise ValueError(f"loss {kind} needs chosen_lengths and rejected_lengths")
    loss = KINDS[kind](**{name: given[name] for name in needs if name in given}, **options)
    if nll_weight and (policy_chosen_logps is None or chosen_lengths is None):
        raise ValueError("nll_weight needs policy_chosen_logps and chosen_lengths")
    return loss - nll_weight * policy_chosen_logps / chosen_lengths if nll_weight else loss


def f_divergence(u, divergence="reverse_kl", alpha_divergence=None):
    """f'(pi/pi_ref) up to a constant, of the log-ratio u (Wang et al. 2023, table 1); alpha is 0.5 unless given, and never 1."""
    if (alpha_divergence is not None and divergence != "alpha") or alpha_divergence == 1:
        raise ValueError(f"alpha_divergence {alpha_divergence} with divergence {divergence!r}: expected alpha, and not 1")
    if divergence == "reverse_kl":
        return u
    if divergence == "forward_kl":
        return -torch.exp(-u)
    if divergence == "js":
        return logsigmoid(u)
    if divergence == "alpha":
        a = 0.5 if alpha_divergence is None else alpha_divergence
        return torch.exp((a - 1) * u) / (a - 1)
    raise ValueError(f"divergence {divergence!r}: expected reverse_kl, forward_kl, js or alpha")


# One function a kind. c, r: log-ratios of the chosen and the rejected response; pc, pr, rc, rr: log-probs under policy and
# reference; nc, nr: lengths; e: label smoothing.


def sigmoid(c, r, beta, e):
    """DPO (Rafailov et al. 2023, eq. 7); with e, conservative DPO (Mitchell 2023)."""
    logit = beta * (c - r)
    return -(1 - e) * logsigmoid(logit) - e * logsigmoid(-logit)


def robust(c, r, beta, e):
    """Unbiased when a share e < 1/2 of the labels is flipped (Chowdhury et al. 2024)."""
    if not torch.all(torch.as_tensor(e) < 0.5):
        raise ValueError("loss robust needs label_smoothing below 1/2")
    logit = beta * (c - r)
    return (-(1 - e) * logsigmoid(logit) + e * logsigmoid(-logit)) / (1 - 2 * e)


def hinge(c, r, beta):
    """RSO's hinge on the implicit rewards (Liu et al. 2023)."""
    return F.relu(1 - beta * (c - r))


def ipo(c, r, beta, nc, nr, *, length_normalise=False):
    """IPO (Azar et al. 2023, eq. 17): the margin is pulled to 1/(2 beta), on sums or on means per token."""
    margin = c / nc - r / nr if length_normalise else c - r
    return (margin - 1 / (2 * beta)) ** 2


def sigmoid_norm(c, r, beta, nc, nr):
    """DPO on log-ratios per token."""
    return -logsigmoid(beta * (c / nc - r / nr))


def exo_pair(c, r, beta, e):
    """EXO (Ji et al. 2024, eq. 16): reverse KL between the two preference distributions; needs e > 0."""
    if not torch.all(torch.as_tensor(e) > 0):
        raise ValueError("loss exo_pair needs label_smoothing above 0 (1e-3, say)")
    e, logit = torch.as_tensor(e, dtype=c.dtype, device=c.device), beta * (c - r)
    return (logit.sigmoid() * (logsigmoid(logit) - torch.log(1 - e))
            + (-logit).sigmoid() * (logsigmoid(-logit) - torch.log(e)))  # fmt: skip


def nca_pair(c, r, beta):
    """NCA (Chen et al. 2024): each response also against noise, which keeps the chosen log-prob from falling."""
    return -logsigmoid(beta * c) - 0.5 * logsigmoid(-beta * c) - 0.5 * logsigmoid(-beta * r)


def bco_pair(c, r, beta):
    """BCO (Jung et al. 2024) without its running reward shift."""
    return -logsigmoid(beta * c) - logsigmoid(-beta * r)


def sppo_hard(c, r, beta):
    """SPPO with win probabilities 1 and 0 (Wu et al. 2024), without the paper's factor 1/2."""
    return (c - 0.5 / beta) ** 2 + (r + 0.5 / beta) ** 2


def sppo(c, r, beta, *, chosen_win=None, rejected_win=None):
    """SPPO (Wu et al. 2024, eq. 4.5): each log-ratio is pulled to (P - 1/2) / beta, P = P(response beats one of the reference).

    The reference is the policy of the last round; chosen_win, rejected_win: those P, floats or (B,). Without them: sppo_hard.
    """
    if (chosen_win is None) != (rejected_win is None):
        raise ValueError("loss sppo needs both of chosen_win and rejected_win, or neither")
    if chosen_win is None:
        return sppo_hard(c, r, beta)
    return 0.5 * ((c - (chosen_win - 0.5) / beta) ** 2 + (r - (rejected_win - 0.5) / beta) ** 2)


def apo_zero(c, r, beta):
    """APO-zero (D'Oosterlinck et al. 2024): chosen up, rejected down."""
    return 1 - (beta * c).sigmoid() + (beta * r).sigmoid()


def apo_down(c, r, beta):
    """APO-down: both down, the rejected further."""
    return (beta * c).sigmoid() + 1 - (beta * (c - r)).sigmoid()


def aot(pc, pr, rc, rr, beta, e):
    """AOT (Melnyk et al. 2024): sorted over the batch, so not to be split into micro-batches."""
    return sigmoid((pc - pr).sort().values, (rc - rr).sort().values, beta, e)


def aot_unpaired(c, r, beta, e):
    """AOT on responses that are not in pairs."""
    return sigmoid(c.sort().values, r.sort().values, beta, e)


def discopop(c, r, beta, *, temperature=0.05):
    """DiscoPOP (Lu et al. 2024): logistic and exponential loss, blended by the logit."""
    logit = beta * (c - r)
    blend = (logit / temperature).sigmoid()
    return -logsigmoid(logit) * (1 - blend) + torch.exp(-logit) * blend


def simpo(pc, pr, beta, nc, nr, *, gamma=0.5):
    """SimPO (Meng et al. 2024, eq. 6): no reference, log-probs per token, a target margin gamma."""
    return -logsigmoid(beta * (pc / nc - pr / nr) - gamma)


def orpo(pc, pr, nc, nr, *, lam=0.1):
    """ORPO (Hong et al. 2024, eq. 6): next-token loss of the chosen, and the odds ratio weighed by lam; beta is not used."""

    def log_odds(p):  # the clamp keeps a response of probability 1 finite
        return p - torch.log(-torch.expm1(p.clamp(max=-1e-7)))

    return -pc / nc - lam * logsigmoid(log_odds(pc / nc) - log_odds(pr / nr))


def cpo(pc, pr, beta, nc):
    """CPO (Xu et al. 2024): DPO with a uniform reference, and the next-token loss of the chosen."""
    return -logsigmoid(beta * (pc - pr)) - pc / nc


def slic(pc, pr, nc, *, delta=1.0, lam=0.1):
    """SLiC-HF (Zhao et al. 2023): a margin of delta nats, and lam times the chosen's next-token loss, per token here."""
    return F.relu(delta - pc + pr) - lam * pc / nc


def r_dpo(c, r, beta, nc, nr, *, alpha=0.01):
    """R-DPO (Park et al. 2024): DPO for a reward that charges alpha a token."""
    return -logsigmoid(beta * (c - r) + alpha * (nc - nr))


def tdpo1(c, r, beta, *, chosen_kl, rejected_kl):
    """TDPO 1 (Zeng et al. 2024): a margin of token-level rewards. KLs (B,): sum of KL(pi_ref || pi) over the response's prefixes."""
    return -logsigmoid(beta * (c - r - (rejected_kl - chosen_kl)))


def tdpo2(c, r, beta, *, chosen_kl, rejected_kl, alpha=0.5):
    """TDPO 2: the KL of the chosen response is a constant, so that only that of the rejected is pulled down."""
    return -logsigmoid(beta * (c - r - alpha * (rejected_kl - chosen_kl.detach())))


def npo(r, beta):
    """NPO (Zhang et al. 2024, eq. 3), from the rejected alone: gradient ascent as beta -> 0 that fades as pi(rejected) -> 0."""
    return -2 / beta * logsigmoid(-beta * r)


def d2o(c, r, beta, *, alpha=0.1):
    """D2O (Duan et al. 2024): the chosen are means of log-probs over K own samples, anchors against a rejected that people wrote.

    The paper measures the anchors against a harmful reference and the rejected against a helpful one; they may be one model.
    """
    return -logsigmoid(beta * c - alpha * r)


KINDS = {f.__name__: f for f in (
    sigmoid, robust, hinge, ipo, sigmoid_norm, exo_pair, nca_pair, bco_pair, sppo_hard, sppo, apo_zero, apo_down, aot,
    aot_unpaired, discopop, simpo, orpo, cpo, slic, r_dpo, tdpo1, tdpo2, npo, d2o,
)}  # fmt: skip
REFERENCE_FREE = ("simpo", "orpo", "cpo", "slic")


def loss_at_start(kind, beta):
    """The loss of any pair while the policy is the reference, where that is one number whatever pair and options; else None."""
    two = math.log(2)
    return {
        **dict.fromkeys(("sigmoid", "robust", "sigmoid_norm", "aot", "aot_unpaired", "tdpo1", "tdpo2", "d2o"), two),
        **dict.fromkeys(("nca_pair", "bco_pair"), 2 * two), **dict.fromkeys(("hinge", "apo_zero", "apo_down"), 1.0),
        "ipo": 1 / (4 * beta**2), "sppo_hard": 1 / (2 * beta**2), "discopop": (two + 1) / 2, "npo": 2 / beta * two,
    }.get(ALIASES.get(kind, kind))  # fmt: skip


# Single responses and lists. logps (B,) or (B, K): sums over response tokens, as above.


def kto_loss(policy_logps, ref_logps, desirable, kl_logratios, *, beta=0.1, desirable_weight=1.0, undesirable_weight=1.0):
    """KTO (Ethayarajh et al. 2024, eq. 8) for single responses with a thumb up or down: (B,).

    desirable (B,) bool; kl_logratios (M,): log-ratios of responses matched with other prompts, whose mean, at least 0, is the
    reference point and takes no gradient. The weights make up for unequal numbers of thumbs.
    """
    h = policy_logps - ref_logps
    z = kl_logratios.mean().clamp(min=0).detach()
    loss = 1 - torch.where(desirable, beta * (h - z), beta * (z - h)).sigmoid()
    return torch.where(desirable, desirable_weight, undesirable_weight) * loss


def una_loss(policy_logps, ref_logps, scores, *, beta=0.1):
    """UNA (Wang et al. 2024): the implicit reward beta h is fitted to whatever feedback there is, (B,).

    scores (B,): to numbers by squared error, to thumbs (bool) by cross entropy; for pairs it is `pair_loss("dpo", ...)`.
    """
    reward = beta * (policy_logps - ref_logps)
    if scores.dtype == torch.bool:
        return -logsigmoid(torch.where(scores, reward, -reward))
    return (reward - scores) ** 2


def rrhf_loss(logps, lengths, rewards, mask=None):
    """RRHF (Yuan et al. 2023): sum over r_i < r_j of max(0, s_i - s_j), plus the next-token loss -s of the best: (B,).

    logps, lengths, rewards (B, K); mask (B, K) bool: which of the K responses exist; s: log-prob per token, no reference.
    """
    s, better, best = ranked(logps / lengths.clamp(min=1), rewards, mask)
    return (F.relu(s[:, None, :] - s[:, :, None]) * better).sum((1, 2)) - best


def pro_loss(logps, lengths, rewards, mask=None, *, lam=0.05):
    """PRO (Song et al. 2023): Plackett-Luce on s of rrhf_loss, plus lam times the next-token loss of the best: (B,).

    Each response against itself and all that are worse; equal rewards do not compete. Shapes as in rrhf_loss.
    """
    s, better, best = ranked(logps / lengths.clamp(min=1), rewards, mask)
    rivals = better | torch.eye(s.shape[1], dtype=torch.bool, device=s.device)
    choice = s[:, None, :].masked_fill(~rivals, -torch.inf).logsumexp(2) - s  # (B, K), 0 where there is no rival
    return choice.sum(1) - lam * best


def lipo_loss(policy_logps, ref_logps, rewards, mask=None, *, beta=0.1):
    """LiPO-lambda (Liu et al. 2024): DPO on all pairs of a list, weighted by what swapping the two would change in DCG: (B,).

    Sum over r_i > r_j of |2^r_i - 2^r_j| |1/log(1 + rank_i) - 1/log(1 + rank_j)| (-S(s_i - s_j)), s = beta h, ranks by s from 1.
    All (B, K); mask as in rrhf_loss.
    """
    s, better, _ = ranked(beta * (policy_logps - ref_logps), rewards, mask)
    order = s if mask is None else s.masked_fill(~mask, -torch.inf)
    # Equal s take different ranks: else all weights would be 0 at the start, where s = 0.
    discount = 1 / torch.log(2.0 + order.argsort(dim=1, descending=True, stable=True).argsort(dim=1))
    gain = 2.0 ** (rewards if mask is None else rewards.masked_fill(~mask, 0))
    weight = (gain[:, :, None] - gain[:, None, :]).abs() * (discount[:, :, None] - discount[:, None, :]).abs()
    return -(better * weight * logsigmoid(s[:, :, None] - s[:, None, :])).sum((1, 2))


def ranked(s, rewards, mask):
    """s with 0 outside the mask (B, K); whether i has a higher reward than j (B, K, K); s of the highest reward (B,)."""
    mask = torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask
    s = s.masked_fill(~mask, 0)
    better = (rewards[:, :, None] > rewards[:, None, :]) & mask[:, :, None] & mask[:, None, :]
    best = s.gather(1, rewards.masked_fill(~mask, -torch.inf).argmax(1, keepdim=True)).squeeze(1)
    return s, better, best


def nash_md_loss(policy_logps, ref_logps, win, *, beta=0.1):
    """Nash-MD (Munos et al. 2023), sampled: its mean gradient is that of -E[P] + beta KL(pi || pi_ref), (B,).

    Responses are samples of the policy pi; win (B,): P(preferred to a sample of pi_ref^mu pi^(1 - mu), normalised). The log-ratio
    is that of the whole response and a constant: an early token answers for the KL of all later ones. The value means nothing.
    """
    return (beta * (policy_logps - ref_logps).detach() - (win - 0.5)) * policy_logps


def token_rewards(logprobs, ref_logprobs, *, beta=0.1):
    """DPO as Q (Rafailov et al. 2024): the reward of each token (B, R), which sums to the implicit reward beta h of the response."""
    return beta * (logprobs - ref_logprobs)


# Where each method that runs here stands, in the terms of the survey's Table 2 (arXiv 2503.06072): RM1 explicit or implicit reward,
# RM2 point reward or preference probability, RM3 response or token level, RM4 positive pairs or negative responses, F whose
# feedback (in the default data), RL1 with a reference or free of one, RL2 on- or off-policy samples, O labels bought before
# (offline) or during training. The survey's own table differs from the papers in places: it has RLOO as off-policy and offline, GRPO
# as implicit, SimPO and RRHF blank. The rows of reinforcement learning become online when pairs are bought between rounds.
DPO_AXES = {"RM1": "implicit", "RM2": "point", "RM3": "response", "RM4": "positive", "F": "human", "RL1": "reference",
            "RL2": "off", "O": "offline"}  # fmt: skip
ONLINE = {"F": "AI", "RL2": "on", "O": "online"}
AXES = {name: DPO_AXES | differs for names, differs in (
    (("dpo", "cdpo", *KINDS, "kto", "una", "lipo"), {}),
    ((*REFERENCE_FREE, "rrhf", "pro"), {"RL1": "free"}),
    (("ipo", "sppo_hard"), {"RM2": "preference"}),
    (("tdpo", "tdpo1", "tdpo2", "dpo_as_q"), {"RM3": "token"}),
    (("npo", "d2o"), {"RM4": "negative"}),
    (("ppo", "rloo", "grpo", "reinforce"), {"RM1": "explicit", "RL2": "on"}),
    (("iterative_dpo", "oaif"), ONLINE),
    (("sppo", "dno"), ONLINE | {"RM2": "preference"}),
    (("nash_md",), ONLINE | {"RM2": "preference", "RM1": "explicit"}),
) for name in names}  # fmt: skip
