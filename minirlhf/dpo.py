"""The maths of stage 2': DPO and its family on pairs, and the axes on which the methods differ.

A pair is four numbers: log-probs of the chosen and the rejected response, summed over their tokens,
under the policy and under the frozen reference. With h = log pi - log pi_ref, DPO's implicit reward
is beta h, and its loss that of Bradley and Terry on it. Whose samples and labels, and which
reference, is the script's affair. Left out: CRINGE, which needs logits.

To add a loss, write a function of (pairs, beta), of label_smoothing=0.0 if it has any, and behind a
star of its options; name it in KINDS, and where it is not like most others in ROWS, NEEDS and
AT_START of feedback/method.py.
"""

import inspect
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.functional import logsigmoid


class Pairs(NamedTuple):
    """What a loss may use, (B,) each; None where it does not."""

    policy_chosen: torch.Tensor  # log-probs, summed over the tokens of a response
    policy_rejected: torch.Tensor
    ref_chosen: torch.Tensor
    ref_rejected: torch.Tensor
    chosen_lengths: torch.Tensor  # numbers of tokens
    rejected_lengths: torch.Tensor
    chosen: torch.Tensor = None  # log-ratios h
    rejected: torch.Tensor = None

    @property
    def margin(self):
        return self.chosen - self.rejected

    @property
    def margin_per_token(self):
        return self.chosen / self.chosen_lengths - self.rejected / self.rejected_lengths


def pair_loss(kind, policy_chosen_logps, policy_rejected_logps, ref_chosen_logps,
              ref_rejected_logps, *, beta=0.1, label_smoothing=0.0, chosen_lengths=None,
              rejected_lengths=None, **options):  # fmt: skip
    """The loss of each pair (B,). Log-probs (B,) are sums over response tokens, lengths (B,) count
    those; None where unused. label_smoothing, a float or (B,), is P(the labels are swapped): 1 -
    P(chosen preferred) of soft labels. ValueError for an unknown kind, or what it cannot use."""
    kind = ALIASES.get(kind, kind)
    if kind not in KINDS:
        raise ValueError(f"loss {kind!r}: expected one of {', '.join([*KINDS, *ALIASES])}")
    nll_weight = options.pop("nll_weight", 0.0)
    divergence = {name: options.pop(name) for name in DIVERGENCE if name in options}
    takes = inspect.signature(KINDS[kind])
    if "label_smoothing" in takes.parameters:
        options["label_smoothing"] = label_smoothing
    elif torch.as_tensor(label_smoothing).any():
        raise ValueError(f"loss {kind} has no label smoothing")
    try:
        takes.bind(None, beta, **options)
    except TypeError as e:  # an option too many or too few
        raise ValueError(f"loss {kind}: {e}") from e
    pairs = Pairs(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps,
                  chosen_lengths, rejected_lengths)  # fmt: skip
    needs = NEEDS.get(kind, LOGPS).split()
    needs += LENGTHS.split() if options.get("length_normalise") else []
    needs += ["policy_chosen", "chosen_lengths"] if nll_weight else []
    missing = [name for name in needs if getattr(pairs, name) is None]
    if missing:
        raise ValueError(f"loss {kind} needs {' and '.join(missing)}")
    if "ref_chosen" in needs:
        pairs = pairs._replace(chosen=policy_chosen_logps - ref_chosen_logps)
    if "ref_rejected" in needs:
        pairs = pairs._replace(rejected=policy_rejected_logps - ref_rejected_logps)
    if divergence:
        pairs = diverge(kind, pairs, **divergence)
    loss = KINDS[kind](pairs, beta, **options)
    return loss - nll_weight * policy_chosen_logps / chosen_lengths if nll_weight else loss


def sigmoid(pairs, beta, label_smoothing=0.0):
    """DPO (Rafailov et al. 2023, eq. 7); with label smoothing, conservative DPO (Mitchell 2023)."""
    logit = beta * (pairs.chosen - pairs.rejected)
    return -(1 - label_smoothing) * logsigmoid(logit) - label_smoothing * logsigmoid(-logit)


def robust(pairs, beta, label_smoothing=0.0):
    """Unbiased when a share < 1/2 of the labels is flipped (Chowdhury et al. 2024)."""
    if not torch.all(torch.as_tensor(label_smoothing) < 0.5):
        raise ValueError("loss robust needs label_smoothing below 1/2")
    logit = beta * pairs.margin
    loss = -(1 - label_smoothing) * logsigmoid(logit) + label_smoothing * logsigmoid(-logit)
    return loss / (1 - 2 * label_smoothing)


def hinge(pairs, beta):
    """RSO's hinge on the implicit rewards (Liu et al. 2023)."""
    return F.relu(1 - beta * pairs.margin)


def ipo(pairs, beta, *, length_normalise=False):
    """IPO (Azar et al. 2023, eq. 17): pulls the margin, of sums or per token, to 1/(2 beta)."""
    margin = pairs.margin_per_token if length_normalise else pairs.margin
    return (margin - 1 / (2 * beta)) ** 2


def sigmoid_norm(pairs, beta):
    """DPO on log-ratios per token."""
    return -logsigmoid(beta * pairs.margin_per_token)


def exo_pair(pairs, beta, label_smoothing=0.0):
    """EXO (Ji et al. 2024, eq. 16): reverse KL between the two preference distributions."""
    if not torch.all(torch.as_tensor(label_smoothing) > 0):
        raise ValueError("loss exo_pair needs label_smoothing above 0 (1e-3, say)")
    logit = beta * pairs.margin
    e = torch.as_tensor(label_smoothing, dtype=logit.dtype, device=logit.device)
    right = logit.sigmoid() * (logsigmoid(logit) - torch.log(1 - e))
    wrong = (-logit).sigmoid() * (logsigmoid(-logit) - torch.log(e))
    return right + wrong


def nca_pair(pairs, beta):
    """NCA (Chen et al. 2024): each also against noise, so that the chosen's log-prob stays up."""
    chosen = -logsigmoid(beta * pairs.chosen) - 0.5 * logsigmoid(-beta * pairs.chosen)
    return chosen - 0.5 * logsigmoid(-beta * pairs.rejected)


def bco_pair(pairs, beta):
    """BCO (Jung et al. 2024) without its running reward shift."""
    return -logsigmoid(beta * pairs.chosen) - logsigmoid(-beta * pairs.rejected)


def sppo_hard(pairs, beta):
    """SPPO with win probabilities 1 and 0 (Wu et al. 2024), without the paper's factor 1/2."""
    return (pairs.chosen - 0.5 / beta) ** 2 + (pairs.rejected + 0.5 / beta) ** 2


def sppo(pairs, beta, *, chosen_win=None, rejected_win=None):
    """SPPO (Wu et al. 2024): chances, floats or (B,), to beat the reference, the last policy."""
    if chosen_win is None and rejected_win is None:
        return sppo_hard(pairs, beta)
    if chosen_win is None or rejected_win is None:
        raise ValueError("loss sppo needs both chosen_win and rejected_win, or neither")
    chosen = (pairs.chosen - (chosen_win - 0.5) / beta) ** 2
    rejected = (pairs.rejected - (rejected_win - 0.5) / beta) ** 2
    return 0.5 * (chosen + rejected)


def apo_zero(pairs, beta):
    """APO-zero (D'Oosterlinck et al. 2024): chosen up, rejected down."""
    return 1 - (beta * pairs.chosen).sigmoid() + (beta * pairs.rejected).sigmoid()


def apo_down(pairs, beta):
    """APO-down: both down, the rejected further."""
    return (beta * pairs.chosen).sigmoid() + 1 - (beta * pairs.margin).sigmoid()


def aot(pairs, beta, label_smoothing=0.0):
    """AOT (Melnyk et al. 2024): sorted over the batch, so not to be split into micro-batches."""
    policy = (pairs.policy_chosen - pairs.policy_rejected).sort().values
    ref = (pairs.ref_chosen - pairs.ref_rejected).sort().values
    return sigmoid(pairs._replace(chosen=policy, rejected=ref), beta, label_smoothing)


def aot_unpaired(pairs, beta, label_smoothing=0.0):
    """AOT on responses that are not in pairs."""
    chosen = pairs.chosen.sort().values
    rejected = pairs.rejected.sort().values
    return sigmoid(pairs._replace(chosen=chosen, rejected=rejected), beta, label_smoothing)


def discopop(pairs, beta, *, temperature=0.05):
    """DiscoPOP (Lu et al. 2024): logistic and exponential loss, blended by the logit."""
    logit = beta * pairs.margin
    blend = (logit / temperature).sigmoid()
    return -logsigmoid(logit) * (1 - blend) + torch.exp(-logit) * blend


def simpo(pairs, beta, *, gamma=0.5):
    """SimPO (Meng et al. 2024, eq. 6): no reference, means per token, a target margin gamma."""
    chosen = pairs.policy_chosen / pairs.chosen_lengths
    rejected = pairs.policy_rejected / pairs.rejected_lengths
    return -logsigmoid(beta * (chosen - rejected) - gamma)


def orpo(pairs, beta, *, lam=0.1):
    """ORPO (Hong et al. 2024, eq. 6): the chosen's next-token loss, lam x odds ratio; not beta."""
    chosen = log_odds(pairs.policy_chosen / pairs.chosen_lengths)
    rejected = log_odds(pairs.policy_rejected / pairs.rejected_lengths)
    return -pairs.policy_chosen / pairs.chosen_lengths - lam * logsigmoid(chosen - rejected)


def log_odds(logp):
    """log(p / (1 - p)), clamped to be finite at probability 1."""
    return logp - torch.log(-torch.expm1(logp.clamp(max=-1e-7)))


def cpo(pairs, beta):
    """CPO (Xu et al. 2024): DPO with a uniform reference, and the chosen's next-token loss."""
    logit = beta * (pairs.policy_chosen - pairs.policy_rejected)
    return -logsigmoid(logit) - pairs.policy_chosen / pairs.chosen_lengths


def slic(pairs, beta, *, delta=1.0, lam=0.1):
    """SLiC-HF (Zhao et al. 2023): a margin of delta nats; lam x the chosen's loss per token."""
    loss = F.relu(delta - pairs.policy_chosen + pairs.policy_rejected)
    return loss - lam * pairs.policy_chosen / pairs.chosen_lengths


def sft(pairs, beta):
    """The chosen's next-token loss per token, a term of sums above all; not beta."""
    return -pairs.policy_chosen / pairs.chosen_lengths


def r_dpo(pairs, beta, label_smoothing=0.0, *, alpha=0.01):
    """R-DPO (Park et al. 2024): DPO for a reward that charges alpha a token, or below 0 pays it."""
    longer = (pairs.chosen_lengths - pairs.rejected_lengths).to(pairs.chosen)  # tokens
    charged = pairs._replace(chosen=pairs.chosen + alpha / beta * longer)
    return sigmoid(charged, beta, label_smoothing)


def tdpo1(pairs, beta, *, chosen_kl, rejected_kl):
    """TDPO 1 (Zeng et al. 2024). KLs (B,): KL(pi_ref || pi) of next tokens, sums over prefixes."""
    return -logsigmoid(beta * (pairs.margin - (rejected_kl - chosen_kl)))


def tdpo2(pairs, beta, *, chosen_kl, rejected_kl, alpha=0.5):
    """TDPO 2: no gradient through the KL of the chosen, which would be pushed up."""
    excess = rejected_kl - chosen_kl.detach()
    return -logsigmoid(beta * (pairs.margin - alpha * excess))


def npo(pairs, beta):
    """NPO (Zhang et al. 2024): ascent on the rejected alone, fading as its probability does."""
    return -2 / beta * logsigmoid(-beta * pairs.rejected)


def d2o(pairs, beta, *, alpha=0.1):
    """D2O (Duan et al. 2024): chosen, a mean over own samples, as anchor.

    The paper has two references; alpha here is a guess.
    """
    return -logsigmoid(beta * pairs.chosen - alpha * pairs.rejected)


KINDS = {loss.__name__: loss for loss in (
    sigmoid, robust, hinge, ipo, sigmoid_norm, exo_pair, nca_pair, bco_pair, sppo_hard, sppo,
    apo_zero, apo_down, aot, aot_unpaired, discopop, simpo, orpo, cpo, slic, sft, r_dpo, tdpo1,
    tdpo2, npo, d2o)}  # fmt: skip
ALIASES = {"dpo": "sigmoid", "exo": "exo_pair", "nca": "nca_pair", "bco": "bco_pair"}

# Where each method that runs here stands, in the terms of the survey's Table 2 (arXiv 2503.06072):
# RM1 explicit or implicit reward, RM2 point reward or preference probability, RM3 response or token
# level, RM4 positive pairs or negative responses, F whose feedback (in the default data), RL1 with
# a reference or free of one, RL2 on- or off-policy samples, O labels bought before (offline) or
# during training (as PPO's may be too). A later row overrides. The survey differs from the papers:
# RLOO off-policy and offline, GRPO implicit, SimPO and RRHF blank.
COLUMNS = "RM1 RM2 RM3 RM4 F RL1 RL2 O"
ROWS = {
    " ".join(["dpo", "cdpo", *KINDS, "kto", "una", "lipo"]):
        "implicit point response positive human reference off offline",
    "simpo orpo cpo slic sft rrhf pro rwr":
        "implicit point response positive human free off offline",
    "ipo sppo_hard": "implicit preference response positive human reference off offline",
    "tdpo tdpo1 tdpo2 dpo_as_q": "implicit point token positive human reference off offline",
    "npo d2o": "implicit point response negative human reference off offline",
    "ppo rloo grpo reinforce": "explicit point response positive human reference on offline",
    "iterative_dpo oaif xpo hybrid": "implicit point response positive AI reference on online",
    "sppo dno": "implicit preference response positive AI reference on online",
    "nash_md": "explicit preference response positive AI reference on online",
    "best_of_n raft": "explicit point response positive human free on offline",
    "iterated_rlhf": "explicit point response positive human reference on online",
    "rlaif cai": "explicit point response positive AI reference on offline",
    "direct_rlaif": "explicit point response positive AI reference on online",
}  # fmt: skip
AXES = {}
for methods, row in ROWS.items():
    for method in methods.split():
        AXES[method] = dict(zip(COLUMNS.split(), row.split(), strict=True))

REFERENCE_FREE = tuple(kind for kind in KINDS if AXES[kind]["RL1"] == "free")
WITHOUT_RATIOS = (*REFERENCE_FREE, "aot")
DIVERGENCE = ("divergence", "alpha_divergence")

# What a kind needs of Pairs, if not just the four log-probs
LOGPS = "policy_chosen policy_rejected ref_chosen ref_rejected"
LENGTHS = "chosen_lengths rejected_lengths"
NEEDS = {
    "sigmoid_norm": f"{LOGPS} {LENGTHS}",
    "r_dpo": f"{LOGPS} {LENGTHS}",
    "simpo": "policy_chosen policy_rejected chosen_lengths rejected_lengths",
    "orpo": "policy_chosen policy_rejected chosen_lengths rejected_lengths",
    "cpo": "policy_chosen policy_rejected chosen_lengths",
    "slic": "policy_chosen policy_rejected chosen_lengths",
    "sft": "policy_chosen chosen_lengths",
    "npo": "policy_rejected ref_rejected",
}


def options_of(kind):
    """Names of the options that a command line may set: numbers, switches, and a divergence's name.

    `divergence` (reverse_kl, forward_kl, js, alpha; f-DPO) transforms the log-ratios of every kind
    that uses them; `nll_weight` adds that much of the chosen's next-token loss to any kind.
    """
    parameters = inspect.signature(KINDS[kind]).parameters.values()
    keywords = [p for p in parameters if p.kind == p.KEYWORD_ONLY]
    names = [p.name for p in keywords if type(p.default) in (bool, float)]
    names.append("nll_weight")
    if kind not in WITHOUT_RATIOS:
        names += DIVERGENCE
    return names


def diverge(kind, pairs, **divergence):
    """The pairs with f' of the divergence in place of their log-ratios."""
    if kind in WITHOUT_RATIOS:
        raise ValueError(f"loss {kind} does not use the log-ratios, so it has no divergence")
    chosen = None if pairs.chosen is None else f_divergence(pairs.chosen, **divergence)
    return pairs._replace(chosen=chosen, rejected=f_divergence(pairs.rejected, **divergence))


def f_divergence(u, divergence="reverse_kl", alpha_divergence=None):
    """f'(pi / pi_ref) up to a constant, of the log-ratio u (Wang et al. 2023, table 1): with alpha
    from that of the reverse KL, at 0, to that of the forward KL, at 1."""
    a = 0.5 if alpha_divergence is None else alpha_divergence  # never 0
    forms = {
        "reverse_kl": lambda: u,
        "forward_kl": lambda: -torch.exp(-u),
        "js": lambda: logsigmoid(u),
        "alpha": lambda: -torch.exp(-a * u) / a,
    }
    stray_alpha = alpha_divergence is not None and divergence != "alpha"
    if divergence not in forms or stray_alpha or a == 0:
        given = f"divergence {divergence!r}, alpha {alpha_divergence}"
        raise ValueError(f"{given}: expected {', '.join(forms)}; for that an alpha, not 0")
    return forms[divergence]()


def token_rewards(logprobs, ref_logprobs, *, beta=0.1):
    """DPO as Q (Rafailov et al. 2024): rewards of tokens (B, R), whose sum over R is beta h."""
    return beta * (logprobs - ref_logprobs)
