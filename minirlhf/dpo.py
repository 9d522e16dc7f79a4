"""The maths of stage 2': DPO and its family, and the axes on which the methods differ. Tensors in, tensors out.

A pair is four numbers: log-probs of the chosen and the rejected response, summed over their tokens, under the policy and under the
frozen reference. With h = log pi - log pi_ref, DPO's implicit reward is beta h, and its loss that of Bradley and Terry on it. Losses
of single responses, ranked lists and games follow, on the same sums. Whose samples and labels, and which reference, is the script's
affair. Left out: CRINGE, which needs logits, and PRO's temperatures.
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

    Log-probs (B,) are sums over response tokens, lengths (B,) count those tokens. `label_smoothing` is the probability that the
    labels are swapped, a float or (B,): with 1 - P(chosen preferred) the sigmoid loss learns from soft labels. Options of a kind
    are the keywords of its function below; `divergence` (reverse_kl, forward_kl, js, alpha; f-DPO, Wang et al. 2023) transforms
    the log-ratios of every kind that uses them; `nll_weight` adds that much of the chosen's next-token loss to any kind.
    Log-probs may be None where unused: the reference's in REFERENCE_FREE, all of the chosen in npo. Raises ValueError for an
    unknown kind, options that it does not have or lacks, a label smoothing that it would ignore, and missing lengths.
    """
    kind = ALIASES.get(kind, kind)
    if kind not in KINDS:
        raise ValueError(f"loss {kind!r}: expected one of {', '.join([*KINDS, *ALIASES])}")
    needs = inspect.signature(KINDS[kind]).parameters
    given = {"beta": beta, "e": label_smoothing, "nc": chosen_lengths, "nr": rejected_lengths, "pc": policy_chosen_logps,
             "pr": policy_rejected_logps, "rc": ref_chosen_logps, "rr": ref_rejected_logps}  # fmt: skip
    divergence = {key: options.pop(key) for key in ("divergence", "alpha_divergence") if key in options}
    nll_weight = options.pop("nll_weight", 0.0)
    if divergence and "r" not in needs:
        raise ValueError(f"loss {kind} does not use the log-ratios, so it has no divergence")
    if "e" not in needs and torch.any(torch.as_tensor(label_smoothing) != 0):
        raise ValueError(f"loss {kind} has no label smoothing")
    if (kind != "ipo" or options.get("length_normalise")) and any(given[name] is None for name in {"nc", "nr"} & needs.keys()):
        raise ValueError(f"loss {kind} needs chosen_lengths and rejected_lengths")
    try:
        for side in {"c", "r"} & needs.keys():
            given[side] = f_divergence(given["p" + side] - given["r" + side], **divergence)
        loss = KINDS[kind](**{name: given[name] for name in needs if name in given}, **options)
        return loss - nll_weight * policy_chosen_logps / chosen_lengths if nll_weight else loss
    except TypeError as e:  # an option too many or too few, None where a tensor is needed
        raise ValueError(f"loss {kind}: {e}") from e


def f_divergence(u, divergence="reverse_kl", alpha_divergence=None):
    """f'(pi/pi_ref) up to a constant, of the log-ratio u (Wang et al. 2023, table 1); alpha is 0.5 unless given, and never 1."""
    a = 0.5 if alpha_divergence is None else alpha_divergence
    forms = {"reverse_kl": lambda: u, "forward_kl": lambda: -torch.exp(-u), "js": lambda: logsigmoid(u),
             "alpha": lambda: torch.exp((a - 1) * u) / (a - 1)}  # fmt: skip
    if divergence not in forms or (alpha_divergence is not None and divergence != "alpha") or a == 1:
        raise ValueError(f"divergence {divergence!r}, alpha {alpha_divergence}: expected {', '.join(forms)}; for that an alpha, not 1")
    return forms[divergence]()


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
    return logit.sigmoid() * (logsigmoid(logit) - torch.log(1 - e)) + (-logit).sigmoid() * (logsigmoid(-logit) - torch.log(e))


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
    """SPPO (Wu et al. 2024), the reference being the last round's policy: chances to beat it, floats or (B,). None: sppo_hard."""
    if chosen_win is None and rejected_win is None:
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
    log_odds = [p - torch.log(-torch.expm1(p.clamp(max=-1e-7))) for p in (pc / nc, pr / nr)]  # clamp: finite at probability 1
    return -pc / nc - lam * logsigmoid(log_odds[0] - log_odds[1])


def cpo(pc, pr, beta, nc):
    """CPO (Xu et al. 2024): DPO with a uniform reference, and the next-token loss of the chosen."""
    return -logsigmoid(beta * (pc - pr)) - pc / nc


def slic(pc, pr, nc, *, delta=1.0, lam=0.1):
    """SLiC-HF (Zhao et al. 2023): a margin of delta nats, and lam times the chosen's next-token loss, per token here."""
    return F.relu(delta - pc + pr) - lam * pc / nc


def r_dpo(c, r, beta, nc, nr, *, alpha=0.01):
    """R-DPO (Park et al. 2024): DPO for a reward that charges alpha a token."""
    return -logsigmoid(beta * (c - r) + alpha * (nc - nr).to(c))


def tdpo1(c, r, beta, *, chosen_kl, rejected_kl):
    """TDPO 1 (Zeng et al. 2024), DPO by tokens; KLs (B,): KL(pi_ref || pi) of the next token, summed over the response's prefixes."""
    return -logsigmoid(beta * (c - r - (rejected_kl - chosen_kl)))


def tdpo2(c, r, beta, *, chosen_kl, rejected_kl, alpha=0.5):
    """TDPO 2: no gradient through the KL of the chosen, which would be pushed up."""
    return -logsigmoid(beta * (c - r - alpha * (rejected_kl - chosen_kl.detach())))


def npo(r, beta):
    """NPO (Zhang et al. 2024), from the rejected alone: gradient ascent as beta -> 0, but fading as pi(rejected) -> 0."""
    return -2 / beta * logsigmoid(-beta * r)


def d2o(c, r, beta, *, alpha=0.1):
    """D2O (Duan et al. 2024): c, a mean over K own samples, anchors a rejected r. The paper has two references; alpha here is a guess."""
    return -logsigmoid(beta * c - alpha * r)


KINDS = {f.__name__: f for f in (
    sigmoid, robust, hinge, ipo, sigmoid_norm, exo_pair, nca_pair, bco_pair, sppo_hard, sppo, apo_zero, apo_down, aot, aot_unpaired,
    discopop, simpo, orpo, cpo, slic, r_dpo, tdpo1, tdpo2, npo, d2o)}  # fmt: skip


REFERENCE_FREE = ("simpo", "orpo", "cpo", "slic")


def loss_at_start(kind, beta):
    """The loss while the policy is the reference, if it is one number for all pairs and settings but divergence and nll_weight."""
    log2 = math.log(2)
    logistic = ("sigmoid", "robust", "sigmoid_norm", "aot", "aot_unpaired", "tdpo1", "tdpo2", "d2o")
    return {**dict.fromkeys(logistic, log2), "nca_pair": 2 * log2, "bco_pair": 2 * log2, "npo": 2 / beta * log2, "hinge": 1.0,
            "apo_zero": 1.0, "apo_down": 1.0, "discopop": (log2 + 1) / 2, "ipo": 0.25 / beta**2, "sppo_hard": 0.5 / beta**2,
            }.get(ALIASES.get(kind, kind))  # fmt: skip


def kto_loss(policy_logps, ref_logps, desirable, kl_logratios, *, beta=0.1, desirable_weight=1.0, undesirable_weight=1.0):
    """KTO (Ethayarajh et al. 2024, eq. 8) for single responses with a thumb up or down: (B,).

    1 - sigmoid(beta (h - z)) for a thumb up, 1 - sigmoid(beta (z - h)) for one down. desirable (B,) bool; kl_logratios (M,): h of
    responses matched with other prompts; z, the reference point, is their mean, at least 0, and takes no gradient. The weights make
    up for unequal numbers of thumbs.
    """
    h, z = policy_logps - ref_logps, kl_logratios.mean().clamp(min=0).detach()
    return torch.where(desirable, desirable_weight * (beta * (z - h)).sigmoid(), undesirable_weight * (beta * (h - z)).sigmoid())


def una_loss(policy_logps, ref_logps, scores, *, beta=0.1):
    """UNA (Wang et al. 2024), (B,): beta h fitted to scores (B,), numbers (squared error) or bool (cross entropy); on pairs it is DPO."""
    reward = beta * (policy_logps - ref_logps)
    return -logsigmoid(torch.where(scores, reward, -reward)) if scores.dtype == torch.bool else (reward - scores) ** 2


def rrhf_loss(logps, lengths, rewards, mask=None):
    """RRHF (Yuan et al. 2023): sum over r_i > r_j of max(0, s_j - s_i), plus the next-token loss -s of the best: (B,).

    logps, lengths, rewards (B, K); mask (B, K) bool: which of the K responses exist; s: log-prob per token, no reference.
    """
    s, better, best = ranked(logps / lengths.clamp(min=1), rewards, mask)
    return (F.relu(s[:, None, :] - s[:, :, None]) * better).sum((1, 2)) - best


def pro_loss(logps, lengths, rewards, mask=None, *, lam=1.0):
    """PRO (Song et al. 2023): Plackett-Luce on the s of rrhf_loss, plus lam times the next-token loss of the best: (B,).

    Equal rewards do not compete. The authors' last term is a sum over tokens with lam = 0.05 (K - 1)^2.
    """
    s, better, best = ranked(logps / lengths.clamp(min=1), rewards, mask)
    rivals = better | torch.eye(s.shape[1], dtype=torch.bool, device=s.device)  # [i, j]: i competes with itself and with the worse
    return (s[:, None, :].masked_fill(~rivals, -torch.inf).logsumexp(2) - s).sum(1) - lam * best


def lipo_loss(policy_logps, ref_logps, rewards, mask=None, *, beta=0.1):
    """LiPO-lambda (Liu et al. 2024): DPO on all pairs of a list, each weighted by what swapping the two would change in DCG: (B,).

    Sum over r_i > r_j of |2^r_i - 2^r_j| |1/log(1 + rank_i) - 1/log(1 + rank_j)| (-log sigmoid(s_i - s_j)), s = beta h, ranks by s from
    1, different for equal s, else nothing would weigh anything at the start. All (B, K), mask as in rrhf_loss.
    """
    mask = torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask
    s, better, _ = ranked(beta * (policy_logps - ref_logps), rewards, mask)
    rank = 1 + s.masked_fill(~mask, -torch.inf).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    gain, discount = 2.0 ** rewards.masked_fill(~mask, 0), 1 / torch.log(1 + rank.to(s))
    weight = (gain[:, :, None] - gain[:, None, :]) * (discount[:, :, None] - discount[:, None, :])
    return -(better * weight.abs() * logsigmoid(s[:, :, None] - s[:, None, :])).sum((1, 2))


def ranked(s, rewards, mask):
    """s with 0 outside the mask (B, K); [i, j]: is i's reward higher than j's (B, K, K); s of the highest reward (B,)."""
    mask = torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask
    s, rewards = s.masked_fill(~mask, 0), rewards.to(s).masked_fill(~mask, -torch.inf)
    better = (rewards[:, :, None] > rewards[:, None, :]) & mask[:, None, :]
    return s, better, s.gather(1, rewards.argmax(1, keepdim=True)).squeeze(1)


def nash_md_loss(policy_logps, ref_logps, win, *, beta=0.1):
    """Nash-MD (Munos et al. 2023), sampled: a loss (B,) whose mean has the gradient of -E[P] + beta KL(pi || pi_ref).

    Responses are pi's samples; win (B,): P(preferred to a sample of the normalised pi_ref^mu pi^(1 - mu)). The log-ratio is the whole
    response's, and a constant: an early token answers for the KL of all later ones. The value means nothing.
    """
    return (beta * (policy_logps - ref_logps).detach() - (win - 0.5)) * policy_logps


def token_rewards(logprobs, ref_logprobs, *, beta=0.1):
    """DPO as Q (Rafailov et al. 2024): the reward of each token (B, R), which sums to the implicit reward beta h of the response."""
    return beta * (logprobs - ref_logprobs)


# Where each method that runs here stands, in the terms of the survey's Table 2 (arXiv 2503.06072): RM1 explicit or implicit reward,
# RM2 point reward or preference probability, RM3 response or token level, RM4 positive pairs or negative responses, F whose feedback
# (in the default data), RL1 with a reference or free of one, RL2 on- or off-policy samples, O labels bought before (offline) or during
# training (as PPO's may be too). The survey differs from the papers: RLOO off-policy and offline, GRPO implicit, SimPO and RRHF blank.
PAIRS = {"RM1": "implicit", "RM2": "point", "RM3": "response", "RM4": "positive", "F": "human",
         "RL1": "reference", "RL2": "off", "O": "offline"}  # fmt: skip


ONLINE = {"F": "AI", "RL2": "on", "O": "online"}


AXES = {name: PAIRS | differs for names, differs in (
    (("dpo", "cdpo", *KINDS, "kto", "una", "lipo"), {}), ((*REFERENCE_FREE, "rrhf", "pro"), {"RL1": "free"}),
    (("ipo", "sppo_hard"), {"RM2": "preference"}), (("tdpo", "tdpo1", "tdpo2", "dpo_as_q"), {"RM3": "token"}),
    (("npo", "d2o"), {"RM4": "negative"}), (("ppo", "rloo", "grpo", "reinforce"), {"RM1": "explicit", "RL2": "on"}),
    (("iterative_dpo", "oaif"), ONLINE), (("sppo", "dno"), ONLINE | {"RM2": "preference"}),
    (("nash_md",), ONLINE | {"RM1": "explicit", "RM2": "preference"}),
) for name in names}  # fmt: skip
