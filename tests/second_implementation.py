"""One PPO iteration and the pairwise losses once more, in float64 and plain loops.

It shares no code with the package. Run as a script it checks itself on numbers worked out by hand,
then writes second_implementation.json, for other tests to compare with. In the PPO part every array
is (rows, tokens), `mask` is True on response tokens, and results are 0 elsewhere.
"""

import json
from math import exp, log, log1p, sqrt
from pathlib import Path

import numpy as np

GROUP_KINDS = ("rloo", "grpo", "reinforce")
GAMMA, LAM, CLIP, VALUE_CLIP, VF_COEF, MISSING = 1.0, 0.95, 0.2, 0.2, 0.1, -1.0
RECIPES = {
    "lhp": {"kl_coef": 0.15, "kl_target": 6.0, "kl_horizon": 10000, "whiten_rewards": True,
            "truncate": True, "lr": 1e-5},
    "sfd": {"kl_coef": 0.05, "kl_target": None, "kl_horizon": None, "whiten_rewards": False,
            "truncate": False, "lr": 3e-6},
}  # fmt: skip


def real(mask):
    """The (row, token) positions of the real tokens, row by row."""
    return [(b, t) for b in range(len(mask)) for t in range(len(mask[b])) if mask[b][t]]


def mean(x, mask, count=None):
    """Mean over all real tokens of the batch; with `count`, their sum divided by it."""
    return float(sum(x[b][t] for b, t in real(mask)) / (count or len(real(mask))))


def whiten(x, mask, shift_mean=True):
    mu, out = mean(x, mask), np.zeros(np.shape(mask))
    var = sum((x[b][t] - mu) ** 2 for b, t in real(mask)) / len(real(mask))
    for b, t in real(mask):
        out[b, t] = (x[b][t] - mu) / sqrt(var + 1e-8) + (0.0 if shift_mean else mu)
    return out


def gae(rewards, values, mask, gamma, lam):
    """Advantages and returns; the value after the last real token is 0."""
    advantages, returns = np.zeros((2, *np.shape(mask)))
    for b in range(len(mask)):
        next_value = next_advantage = 0.0
        for t in reversed(range(len(mask[b]))):
            if mask[b][t]:
                delta = rewards[b][t] + gamma * next_value - values[b][t]
                advantages[b, t] = delta + gamma * lam * next_advantage
                returns[b, t] = advantages[b, t] + values[b][t]
                next_value, next_advantage = values[b][t], advantages[b, t]
    return advantages, returns


def shaped_rewards(scores, kl, mask, kl_coef):
    """The KL penalty on every real token, the score on the last one."""
    out = np.zeros(np.shape(mask))
    for b, t in real(mask):
        out[b, t] = -kl_coef * kl[b][t] + (scores[b] if t == sum(mask[b]) - 1 else 0.0)
    return out


def adaptive_kl(coef, kl, target, n, horizon):
    return float(coef * (1.0 + np.clip(kl / target - 1.0, -0.2, 0.2) * n / horizon))


def learning_rate(recipe, update, total):
    return RECIPES[recipe]["lr"] * (1.0 - (update - 1) / total)  # the first update is number 1


def group_advantages(scores, k, kind):
    """The k scores of a prompt are consecutive."""
    if kind not in GROUP_KINDS or len(scores) % k or (k == 1 and kind != "reinforce"):
        raise ValueError((kind, k))
    out = np.zeros(len(scores))
    for i in range(len(scores)):
        group = [float(s) for s in scores[i // k * k : i // k * k + k]]
        out[i] = scores[i] - sum(group) / k
        if kind == "rloo":
            out[i] = scores[i] - (sum(group) - scores[i]) / (k - 1)
        elif kind == "grpo":
            out[i] /= sqrt(sum((s - sum(group) / k) ** 2 for s in group) / (k - 1)) + 1e-4
    return out


def final_scores(recipe, rollout):
    """Scores after replacement, and how many response tokens the scorer reads."""
    scores, seen, truncate = np.zeros(len(rollout["lengths"])), [], RECIPES[recipe]["truncate"]
    for b, length in enumerate(rollout["lengths"]):
        tokens, places = rollout["tokens"][b], range(rollout["truncate_after"], length)
        hits = [t for t in places if truncate and tokens[t] == rollout["truncate_token"]]
        finished = bool(hits) if truncate else tokens[length - 1] == rollout["eos_id"]
        scores[b] = rollout["scores"][b] if finished else MISSING
        seen.append(hits[0] + 1 if hits else length)
    return scores, seen


def iteration(recipe, rollout):
    """One PPO iteration's numbers, in the order in which they are made."""
    cfg, mask, out = RECIPES[recipe], rollout["mask"], {}
    lp0, v0 = rollout["logprobs"], rollout["values"]
    kl, surprise, ratio = (np.zeros(np.shape(mask)) for _ in range(3))
    policy, value, approx, clipped = (np.zeros(np.shape(mask)) for _ in range(4))
    out["scores"], out["scored_lengths"] = final_scores(recipe, rollout)
    for b, t in real(mask):
        kl[b, t], surprise[b, t] = lp0[b][t] - rollout["ref_logprobs"][b][t], -lp0[b][t]
    out["kl"], out["ratio"] = kl, ratio
    rewards = out["shaped_rewards"] = shaped_rewards(out["scores"], kl, mask, cfg["kl_coef"])
    if cfg["whiten_rewards"]:
        rewards = out["whitened_rewards"] = whiten(rewards, mask, shift_mean=False)
    out["advantages"], out["returns"] = _, returns = gae(rewards, v0, mask, GAMMA, LAM)
    whitened = out["whitened_advantages"] = whiten(out["advantages"], mask)
    for b, t in real(mask):
        change = rollout["new_logprobs"][b][t] - lp0[b][t]
        ratio[b, t] = exp(change)
        free = -whitened[b, t] * ratio[b, t]
        bound = -whitened[b, t] * np.clip(ratio[b, t], 1 - CLIP, 1 + CLIP)
        policy[b, t], clipped[b, t], approx[b, t] = max(free, bound), bound > free, 0.5 * change**2
        v = rollout["new_values"][b][t]
        near = np.clip(v, v0[b][t] - VALUE_CLIP, v0[b][t] + VALUE_CLIP)
        value[b, t] = 0.5 * max((v - returns[b, t]) ** 2, (near - returns[b, t]) ** 2)
    out["policy_loss"], out["value_loss"] = mean(policy, mask), mean(value, mask)
    out["total_loss"] = out["policy_loss"] + VF_COEF * out["value_loss"]
    out["mean_ratio"], out["approxkl"] = mean(ratio, mask), mean(approx, mask)
    out["clipfrac"] = mean(clipped, mask)
    out["mean_kl"], out["entropy"] = mean(kl, mask, len(mask)), mean(surprise, mask, len(mask))
    out["kl_coef"], target, horizon = cfg["kl_coef"], cfg["kl_target"], cfg["kl_horizon"]
    if target:
        out["kl_coef"] = adaptive_kl(cfg["kl_coef"], out["mean_kl"], target, len(mask), horizon)
    return out


def fixed_rollout(seed=20):
    """Six rows of up to five tokens.

    The slots after a response hold junk, stray EOS and truncate tokens included.
    """
    tokens = [
        [5, 7, 3, 4, 0],  # EOS; truncate token exactly at position N
        [3, 3, 0, 3, 3],  # EOS; truncate token before N only (those in the padding do not count)
        [8, 4, 6, 2, 9],  # no EOS; never
        [0, 6, 3, 3, 0],  # one token, the EOS; never
        [6, 3, 5, 3, 3],  # no EOS; before N, and twice after it
        [7, 3, 3, 0, 3],  # EOS; before N and at N
    ]
    rng, lengths, shape = np.random.default_rng(seed), [5, 3, 5, 1, 5, 4], (6, 5)
    mask = np.array([[t < n for t in range(5)] for n in lengths])
    logprobs, values = rng.uniform(-3.0, -1.0, shape), rng.normal(0.0, 0.8, shape)
    arrays = {"logprobs": logprobs, "ref_logprobs": logprobs - rng.normal(1.9, 1.2, shape)}
    arrays["values"] = values
    arrays["new_logprobs"] = logprobs + rng.normal(0.0, 0.3, shape)
    arrays["new_values"] = values + rng.normal(0.0, 0.3, shape)
    for x in arrays.values():
        x[~mask] = rng.choice([-1.0, 1.0], (~mask).sum()) * rng.uniform(1e3, 1e4, (~mask).sum())
    arrays |= {"eos_id": 0, "truncate_token": 3, "truncate_after": 2}
    arrays["scores"] = rng.normal(0.5, 1.5, 6)
    return {"tokens": tokens, "lengths": lengths, "mask": mask, **arrays}


def sg(z):
    return 1.0 / (1.0 + exp(-z))


def ls(z):
    return min(z, 0.0) - log1p(exp(-abs(z)))  # log sigmoid


def smoothed(z, e):
    return -(1 - e) * ls(z) - e * ls(-z)


def one_pair(kind, c, r, nc, nr, pc=-1.0, pr=-1.0, beta=0.1, label_smoothing=0.0,
             length_normalise=False, gamma=0.5, tau=0.05):  # fmt: skip
    """Loss of one pair.

    c, r: policy minus reference log-probs of chosen and rejected; nc, nr: token counts; pc, pr: the
    policy's log-probs alone.
    """
    b, e, d, by_length = beta, label_smoothing, c - r, c / nc - r / nr
    m, p, q = sg(b * d / tau), pc / nc, pr / nr
    return {
        "sigmoid": lambda: smoothed(b * d, e),
        "robust": lambda: (-(1 - e) * ls(b * d) + e * ls(-b * d)) / (1 - 2 * e),
        "hinge": lambda: max(0.0, 1 - b * d),
        "ipo": lambda: ((by_length if length_normalise else d) - 1 / (2 * b)) ** 2,
        "sigmoid_norm": lambda: -ls(b * by_length),
        "exo_pair": lambda: (
            sg(b * d) * (ls(b * d) - log(1 - e)) + sg(-b * d) * (ls(-b * d) - log(e))
        ),
        "nca_pair": lambda: -ls(b * c) - 0.5 * ls(-b * c) - 0.5 * ls(-b * r),
        "bco_pair": lambda: -ls(b * c) - ls(-b * r),
        "sppo_hard": lambda: (c - 0.5 / b) ** 2 + (r + 0.5 / b) ** 2,
        "apo_zero": lambda: 1 - sg(b * c) + sg(b * r),
        "apo_down": lambda: sg(b * c) + 1 - sg(b * d),
        "discopop": lambda: -ls(b * d) * (1 - m) + exp(-b * d) * m,
        "simpo": lambda: -ls(b * (p - q) - gamma),
        # b weighs the odds term
        "orpo": lambda: -p - b * ls(p - log1p(-exp(p)) - q + log1p(-exp(q))),
    }[kind]()


def pair_losses(kind, x, f_divergence=None, alpha=None, **options):
    """One loss a pair for a batch `x` of summed log-probs and token counts.

    For aot and aot_unpaired they are in ascending order.
    """
    a1 = (alpha or 0) - 1
    f = {None: lambda v: v, "forward_kl": lambda v: -exp(-v), "js": ls,
         "alpha": lambda v: exp(a1 * v) / a1}[f_divergence]  # fmt: skip
    rows = list(zip(*(x[name] for name in INPUTS), strict=True))
    c, r = [f(pc - rc) for pc, _, rc, *_ in rows], [f(pr - rr) for _, pr, _, rr, *_ in rows]
    if kind not in ("aot", "aot_unpaired"):
        return [
            one_pair(kind, c[i], r[i], nc, nr, pc, pr, **options)
            for i, (pc, pr, _, _, nc, nr) in enumerate(rows)
        ]
    if kind == "aot":
        c, r = [pc - pr for pc, pr, *_ in rows], [rc - rr for _, _, rc, rr, *_ in rows]
    logits = [options["beta"] * (u - v) for u, v in zip(sorted(c), sorted(r), strict=True)]
    return [smoothed(z, options["label_smoothing"]) for z in logits]


def kto(c, r, mismatched, b=0.1):
    """z, and the losses of desirable and undesirable responses with log-ratios c and r.

    mismatched: log-ratios of responses paired with a wrong prompt.
    """
    z = max(0.0, sum(mismatched) / len(mismatched))
    desirable = [1 - sg(b * (v - z)) for v in c]
    undesirable = [1 - sg(b * (z - v)) for v in r]
    return {"z": z, "desirable": desirable, "undesirable": undesirable}


INPUTS = ("policy_chosen_logps", "policy_rejected_logps", "ref_chosen_logps", "ref_rejected_logps",
          "chosen_lengths", "rejected_lengths")  # fmt: skip
KINDS = """sigmoid robust hinge ipo sigmoid_norm exo_pair nca_pair bco_pair sppo_hard apo_zero
           apo_down aot aot_unpaired discopop simpo orpo"""
SMOOTHED = ("sigmoid", "robust", "exo_pair", "aot", "aot_unpaired")


def pairs_section(seed=21):
    rng = np.random.default_rng(seed)
    nc, nr = rng.integers(1, 9, (2, 8))
    ref_c, ref_r = -nc * rng.uniform(0.5, 2.5, 8), -nr * rng.uniform(0.5, 2.5, 8)
    pol_c = np.minimum(ref_c + rng.normal(0.6, 2, 8), -0.1 * nc)
    pol_r = np.minimum(ref_r + rng.normal(-0.4, 2, 8), -0.1 * nr)
    x = dict(zip(INPUTS, (pol_c, pol_r, ref_c, ref_r, nc, nr), strict=True))
    cases = [(k, k, {"label_smoothing": 0.1} if k in SMOOTHED else {}) for k in KINDS.split()]
    cases += [(f"{k} e=0", k, {}) for k in SMOOTHED if k not in ("robust", "exo_pair")]
    cases += [
        ("exo_pair e=0.001", "exo_pair", {"label_smoothing": 1e-3}),
        ("ipo averaged", "ipo", {"length_normalise": True}),
        ("hinge beta=1", "hinge", {"beta": 1.0}),
        ("simpo gamma=0", "simpo", {"gamma": 0.0}),
    ]
    for f, more in (("forward_kl", {}), ("js", {}), ("alpha", {"alpha": 0.5})):
        for k in ("sigmoid", "ipo", "bco_pair", "sppo_hard"):
            cases.append((f"{k} {f}", k, {"f_divergence": f, **more}))
    values, c, r = {}, list(pol_c - ref_c), list(pol_r - ref_r)
    for name, kind, changed in cases:
        options = {"beta": 0.1, "label_smoothing": 0.0}
        options |= ({"gamma": 0.5} if kind == "simpo" else {}) | changed
        values[name] = {"kind": kind, "options": options, "losses": pair_losses(kind, x, **options)}
    for name, shift in (("kto", 0.7), ("kto z=0", -2.0)):
        other = list(rng.normal(shift, 1.0, 8))
        values[name] = {"kind": "kto", "options": {"beta": 0.1}, "mismatched_logratios": other}
        values[name] |= kto(c, r, other)
    return {"inputs": x, "chosen_logratios": c, "rejected_logratios": r, "values": values}


def functions_section():
    scores = [1.0, 2.0, 4.0, -1.0, -1.0, -1.0, 0.5, -2.5, 3.0, 0.25, 0.75, 0.0]
    controllers = [
        {"coef": 0.15, "kl": kl, "target": 6.0, "n": 512, "horizon": 10000}
        for kl in (0.0, 5.4, 6.0, 6.6, 30.0)
    ]
    groups = [(q, k) for q in GROUP_KINDS for k in (2, 3, 4)]
    updates = [(q, u) for q in RECIPES for u in (1, 4, 8)]
    return {
        "group_scores": scores,
        "group_advantages": [
            {"kind": q, "k": k, "result": group_advantages(scores, k, q)} for q, k in groups
        ],
        "adaptive_kl": [{**x, "result": adaptive_kl(**x)} for x in controllers],
        "learning_rate": [
            {"recipe": q, "u": u, "N": 8, "result": learning_rate(q, u, 8)} for q, u in updates
        ],
    }


def self_check():
    """Numbers worked out on paper; raises on a difference."""
    mask, values = [[True, True, False], [True, True, True]], [[1, 2, 9], [0, 1, 1]]
    rewards = shaped_rewards([3, -1], [[1, -1, 7], [0, 2, 1]], mask, 0.1)
    got = [rewards, gae(rewards, values, mask, 1.0, 0.0)[0], *gae(rewards, values, mask, 1.0, 0.5)]
    wanted = [
        [[-0.1, 3.1, 0], [0, -0.2, -1.1]],  # rewards
        [[0.9, 1.1, 0], [1, -0.2, -2.1]],  # deltas
        [[1.45, 1.1, 0], [0.375, -1.25, -2.1]],  # advantages
        [[2.45, 3.1, 0], [0.375, -0.25, -1.1]],  # returns
    ]
    np.testing.assert_allclose(got, wanted, atol=1e-12)
    table = [
        ("sigmoid", {}, 0.593650), ("hinge", {}, 0.79), ("ipo", {}, 8.41),
        ("sigmoid_norm", {}, 0.670900), ("nca_pair", {}, 1.338234), ("bco_pair", {}, 1.284554),
        ("sppo_hard", {}, 31.61), ("apo_zero", {}, 0.947575), ("apo_down", {}, 0.985122),
        ("discopop", {}, 0.807379), ("ipo", {"length_normalise": True}, 20.7025),
        ("sigmoid", {"label_smoothing": 0.1}, 0.614650),
        ("robust", {"label_smoothing": 0.1}, 0.567400),
        ("exo_pair", {"label_smoothing": 1e-3}, 2.405435),
    ]  # fmt: skip
    for kind, options, value in table:
        got = one_pair(kind, 1.5, -0.6, 5, 4, **options)
        np.testing.assert_allclose(got, value, rtol=0, atol=6e-7)
    kinds = [k for k in KINDS.split()[:11] if k != "exo_pair"]
    flat = [one_pair(k, 0, 0, 5, 4, label_smoothing=0.1) for k in kinds]
    wanted = [log(2), log(2), 1, 25, log(2), 2 * log(2), 2 * log(2), 50, 1, 1]
    np.testing.assert_allclose(flat, wanted, atol=1e-12)


if __name__ == "__main__":
    self_check()
    rollout = fixed_rollout()
    result = {"rollout": rollout, **{q: iteration(q, rollout) for q in RECIPES}}
    result |= {"functions": functions_section(), "pairs": pairs_section()}
    text = json.dumps(result, indent=1, default=lambda a: a.tolist())
    Path(__file__).with_suffix(".json").write_text(text + "\n", encoding="utf-8")
