"""The maths of stage 2': DPO and its pairwise family, and the axes on which the methods differ. Tensors in, tensors out.

A pair is four numbers: log-probs of the chosen and the rejected response, summed over their tokens, under the policy and under the
frozen reference. With h = log pi - log pi_ref, DPO's implicit reward is beta h, and its loss that of Bradley and Terry on it.

Left out: losses that need more than these four numbers and the lengths (lists, token distributions).
"""

import inspect
import math

import torch
import torch.nn.functional as F
from torch.nn.functional import logsigmoid

ALIASES = {"dpo": "sigmoid", "exo": "exo_pair", "nca": "nca_pair", "bco": "bco_pair", "sppo": "sppo_hard"}


def pair_loss(kind, policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, *, beta=0.1,
              label_smoothing=0.0, chosen_lengths=None, rejected_lengths=None, **options):  # fmt: skip
    """The loss of each pair (B,); the script takes the mean.

    All log-probs (B,) are sums over response tokens; lengths (B,) count those tokens. `label_smoothing` is the probability that
    the labels are swapped, a float or (B,): with 1 - P(chosen preferred) the sigmoid loss learns from soft labels. Options of a
    kind are the keywords of its function below; `divergence` (reverse_kl, forward_kl, js, alpha; f-DPO, Wang et al. 2023)
    transforms the log-ratios of every kind that uses them. Raises ValueError for an unknown kind, an option that the kind does not
    have, a label smoothing that it would ignore, and missing lengths. Reference log-probs may be None for the kinds in REFERENCE_FREE.
    """
    kind = ALIASES.get(kind, kind)
    if kind not in KINDS:
        raise ValueError(f"loss {kind!r}: expected one of {', '.join([*KINDS, *ALIASES])}")
    needs = inspect.signature(KINDS[kind]).parameters
    divergence = {key: options.pop(key) for key in ("divergence", "alpha_divergence") if key in options}
    c = r = None
    if "c" in needs:
        c = f_divergence(policy_chosen_logps - ref_chosen_logps, **divergence)
        r = f_divergence(policy_rejected_logps - ref_rejected_logps, **divergence)
    elif divergence:
        raise ValueError(f"loss {kind} does not use the two log-ratios, so it has no divergence")
    given = {
        "c": c, "r": r, "beta": beta, "e": label_smoothing,
        "pc": policy_chosen_logps, "pr": policy_rejected_logps, "rc": ref_chosen_logps, "rr": ref_rejected_logps,
        "nc": chosen_lengths, "nr": rejected_lengths,
    }  # fmt: skip
    if unknown := options.keys() - {n for n, p in needs.items() if p.kind == p.KEYWORD_ONLY}:
        raise ValueError(f"loss {kind} has no option {', '.join(sorted(unknown))}")
    if "e" not in needs and torch.any(torch.as_tensor(label_smoothing) != 0):
        raise ValueError(f"loss {kind} has no label smoothing")
    uses_lengths = "nc" in needs and (kind != "ipo" or options.get("length_normalise"))
    if uses_lengths and (chosen_lengths is None or rejected_lengths is None):
        raise ValueError(f"loss {kind} needs chosen_lengths and rejected_lengths")
    return KINDS[kind](**{name: given[name] for name in needs if name in given}, **options)


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
    """SLiC-HF (Zhao et al. 2023): a margin of delta nats between the responses, and lam times the chosen's next-token loss."""
    return F.relu(delta - pc + pr) - lam * pc / nc


def r_dpo(c, r, beta, nc, nr, *, alpha=0.01):
    """R-DPO (Park et al. 2024): DPO for a reward that charges alpha a token."""
    return -logsigmoid(beta * (c - r) + alpha * (nc - nr))


KINDS = {f.__name__: f for f in (
    sigmoid, robust, hinge, ipo, sigmoid_norm, exo_pair, nca_pair, bco_pair, sppo_hard, apo_zero, apo_down, aot, aot_unpaired,
    discopop, simpo, orpo, cpo, slic, r_dpo,
)}  # fmt: skip
REFERENCE_FREE = ("simpo", "orpo", "cpo", "slic")


def kto_loss(policy_logps, ref_logps, desirable, kl_logratios, *, beta=0.1):
    """KTO (Ethayarajh et al. 2024, eq. 8) for single responses with a thumb up or down: (B,).

    desirable (B,) bool; kl_logratios (M,): log-ratios of responses matched with other prompts, whose mean, at least 0, is the
    reference point and takes no gradient.
    """
    h = policy_logps - ref_logps
    z = kl_logratios.mean().clamp(min=0).detach()
    return 1 - torch.where(desirable, beta * (h - z), beta * (z - h)).sigmoid()


# Where each method that runs here stands, in the terms of the survey's Table 2 (arXiv 2503.06072): RM1 explicit or implicit reward,
# RM2 point reward or preference probability, RM3 response or token level, RM4 positive pairs or negative responses, F whose
# feedback (in the default data), RL1 with a reference or free of one, RL2 on- or off-policy samples, O labels bought before
# (offline) or during training. The survey's own table differs in places: it has SimPO blank, for one.
OFFLINE = {"RM1": "implicit", "RM2": "point", "RM3": "response", "RM4": "positive", "F": "human", "RL1": "reference",
           "RL2": "off", "O": "offline"}  # fmt: skip
AXES = {
    "ppo": OFFLINE | {"RM1": "explicit", "RL2": "on"},
    **{kind: dict(OFFLINE) for kind in KINDS},
    **{kind: OFFLINE | {"RL1": "free"} for kind in REFERENCE_FREE},
    **{kind: OFFLINE | {"RM2": "preference"} for kind in ("ipo", "sppo_hard")},
}


def log_two(kind):
    """The loss of a policy equal to its reference, where that is log 2 for any pair; else None. For the check at step 0."""
    return math.log(2) if ALIASES.get(kind, kind) in ("sigmoid", "robust", "sigmoid_norm", "aot", "aot_unpaired") else None
