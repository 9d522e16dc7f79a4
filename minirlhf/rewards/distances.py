"""Distances between two rewards of a small Markov decision process, exact, in NumPy.

Two rewards order all policies alike exactly when they differ by a positive factor, by potential
shaping gamma * phi(s') - phi(s), and by how a mean over s' is spread ("redistribution"). A distance
first makes rewards canonical, so that these differences vanish, then scales, then compares:

    EPIC    forgets shaping; needs no dynamics, so it also reads transitions that cannot happen
    DARD    forgets shaping; takes next states from the dynamics
    STARC   forgets shaping and redistribution; 0 exactly when all policies are ordered alike
    EPIC-like: any canonicalisation x norm x metric

Shapes: R (S, A, S') rewards, T (S, A, S') dynamics, pi (S, A), coverage (S, A, S') or (S, A)
weights of what counts, state_dist (S,), action_dist (A,). Not given means uniform. Every function
raises ValueError for another shape, for what is not finite, and for what is no probability.

Left out: rewards with a fixed horizon, and episodes that end (let an end be a state that stays).
"""

import numpy as np

ROUND_OFF = 1e-10  # a canonical reward this small beside the reward it was made of is zero


# What is given


def checked_reward(R, name="R"):
    """The reward as float64 (S, A, S')."""
    R = np.asarray(R, dtype=np.float64)
    if R.ndim != 3 or R.shape[0] != R.shape[2] or R.size == 0:
        raise ValueError(f"{name} has shape {R.shape}; expected (S, A, S), a reward a transition")
    if not np.isfinite(R).all():
        raise ValueError(f"{name} holds a value that is not finite")
    return R


def checked_probabilities(p, shape, name):
    """p as float64 of that shape, its last axis summing to 1; uniform where p is None."""
    if p is None:
        return np.full(shape, 1 / shape[-1])
    p = np.asarray(p, dtype=np.float64)
    if p.shape != shape:
        raise ValueError(f"{name} has shape {p.shape}; expected {shape}")
    # written so that a NaN fails
    if not ((p >= 0).all() and (np.abs(p.sum(-1) - 1) < 1e-8).all()):
        raise ValueError(f"{name} must be >= 0 and sum to 1 over its last axis")
    return p


def checked_discount(discount, *, one=False):
    """The discount, in [0, 1); 1 too where `one`."""
    if not (0 <= discount < 1 or (one and discount == 1)):
        raise ValueError(f"discount {discount} is not in [0, 1{']' if one else ')'}")
    return discount


def pair_of_rewards(R1, R2):
    R1, R2 = checked_reward(R1, "R1"), checked_reward(R2, "R2")
    if R1.shape != R2.shape:
        raise ValueError(f"R1 and R2 differ in shape: {R1.shape} and {R2.shape}")
    return R1, R2


def checked_weights(weights, shape, name):
    """Weights of that shape, made to sum to 1; uniform where they are None."""
    weights = np.ones(shape) if weights is None else np.asarray(weights, dtype=np.float64)
    if weights.shape != shape:
        raise ValueError(f"{name} has shape {weights.shape}; expected {shape}")
    total = weights.sum()
    if not ((weights >= 0).all() and 0 < total < np.inf):
        raise ValueError(f"{name} must be >= 0, finite, and not all 0")
    return weights / total


def weights_of_transitions(shape, coverage=None, T=None):
    """Coverage as weights over (S, A, S') that sum to 1.

    Coverage (S, A) is spread over s' by the dynamics, w(s, a) T(s'|s, a), or evenly without them.
    """
    if coverage is not None and np.ndim(coverage) == 3:
        return checked_weights(coverage, shape, "coverage")
    pairs = checked_weights(coverage, shape[:2], "coverage")
    return pairs[:, :, None] * checked_probabilities(T, shape, "T")


# Canonical rewards: each is linear in R and gives a reward of the same shape


def epic_canonical(R, *, discount=0.99, state_dist=None, action_dist=None):
    """R + E[gamma R(s', A, S') - R(s, A, S') - gamma R(S, A, S')], S, S' ~ D_S, A ~ D_A.

    Gleave et al. 2021 (EPIC), section 4. Shaping of R changes nothing. -> (S, A, S')
    """
    R = checked_reward(R)
    checked_discount(discount, one=True)
    over_states = checked_probabilities(state_dist, R.shape[:1], "state_dist")
    over_actions = checked_probabilities(action_dist, R.shape[1:2], "action_dist")
    mean_from = np.einsum("sat,a,t->s", R, over_actions, over_states)  # E R(s, A, S')
    constant = discount * (over_states @ mean_from)
    return R + discount * mean_from[None, None, :] - mean_from[:, None, None] - constant


def dard_canonical(R, T, *, discount=0.99, action_dist=None):
    """R + E[gamma R(s', A, S'') - R(s, A, S') - gamma R(S', A, S'')].

    A ~ D_A, S' ~ T(s, A), S'' ~ T(s', A), with the same A; in the last term S' comes from s and
    S'' from s', so (S', A, S'') need not be possible. Wulfe et al. 2022 (DARD). -> (S, A, S')
    """
    R = checked_reward(R)
    checked_discount(discount, one=True)
    T = checked_probabilities(T, R.shape, "T")
    over_actions = checked_probabilities(action_dist, R.shape[1:2], "action_dist")
    mean_from = np.einsum("a,sat,sat->s", over_actions, T, R)  # E R(s, A, S')
    # last[s, s'] = E_A sum over u ~ T(s, A), v ~ T(s', A) of R(u, A, v)
    last = np.zeros(R.shape[::2])
    for a, probability in enumerate(over_actions):
        last += probability * (T[:, a] @ R[:, a] @ T[:, a].T)
    by_states = discount * mean_from[None, :] - mean_from[:, None] - discount * last
    return R + by_states[:, None, :]


def without_span(values, columns, weights):
    """What is left of values (N,) when the columns (N, K) are fitted by weighted least squares."""
    root = np.sqrt(weights)
    fit = np.linalg.lstsq(columns * root[:, None], values * root, rcond=None)[0]
    return values - columns @ fit


def minimal_canonical(R, *, discount=0.99, coverage=None, T=None):
    """R + gamma phi(s') - phi(s) for the phi that makes its weighted L2 norm least.

    Jenner, Skalse, Gleave 2022. Where the coverage is 0, phi still applies. -> (S, A, S')
    """
    R = checked_reward(R)
    checked_discount(discount, one=True)
    weights = weights_of_transitions(R.shape, coverage, T)
    unit = np.eye(R.shape[0])
    shaping = discount * unit[None, None, :, :] - unit[:, None, None, :]
    shaping = np.broadcast_to(shaping, (*R.shape, len(unit))).reshape(-1, len(unit))
    return without_span(R.ravel(), shaping, weights.ravel()).reshape(R.shape)


def mean_reward(R, T):
    """E R(s, a, S') under S' ~ T(s, a). -> (S, A)"""
    return np.einsum("sat,sat->sa", T, R)


def over_next_states(by_pair, R):
    """(S, A) as a reward (S, A, S') that does not depend on s'."""
    return np.repeat(by_pair[:, :, None], R.shape[2], axis=2)


def val_canonical(R, T, *, discount=0.99, pi=None):
    """E[R(s, a, S') + gamma V(S')] - V(s), V the values of one fixed policy: its advantage Q - V.

    Skalse et al. 2024 (STARC), "value-adjusted levelling". Any policy will do. -> (S, A, S')
    """
    R = checked_reward(R)
    checked_discount(discount)
    T = checked_probabilities(T, R.shape, "T")
    pi = checked_probabilities(pi, R.shape[:2], "pi")
    reward = mean_reward(R, T)
    steps = np.einsum("sa,sat->st", pi, T)
    values = np.linalg.solve(np.eye(len(R)) - discount * steps, (pi * reward).sum(1))
    return over_next_states(reward + discount * T @ values - values[:, None], R)


def starc_minimal_canonical(R, T, *, discount=0.99, coverage=None):
    """E R(s, a, S') + gamma E phi(S') - phi(s) for the phi that makes its weighted L2 norm least.

    Skalse et al. 2024, the minimal canonicalisation; coverage over (S, A), or (S, A, S') summed
    over s'. -> (S, A, S')
    """
    R = checked_reward(R)
    checked_discount(discount)
    T = checked_probabilities(T, R.shape, "T")
    weights = weights_of_transitions(R.shape, coverage, T).sum(2)
    shaping = discount * T - np.eye(len(R))[:, None, :]  # (S, A, phi)
    left = without_span(mean_reward(R, T).ravel(), shaping.reshape(-1, len(R)), weights.ravel())
    return over_next_states(left.reshape(R.shape[:2]), R)


CANONICALISATIONS = ("none", "epic", "dard", "minimal", "val", "starc_minimal")


def canonical(
    R,
    kind,
    *,
    discount=0.99,
    T=None,
    pi=None,
    coverage=None,
    state_dist=None,
    action_dist=None,
):
    """The canonical reward of one of CANONICALISATIONS; exactly 0 where only round-off is left."""
    R = checked_reward(R)
    if kind in ("dard", "val", "starc_minimal") and T is None:
        raise ValueError(f"canonicalisation {kind!r} needs the dynamics T")
    if kind == "none":
        return R
    if kind == "epic":
        made = epic_canonical(R, discount=discount, state_dist=state_dist, action_dist=action_dist)
    elif kind == "dard":
        made = dard_canonical(R, T, discount=discount, action_dist=action_dist)
    elif kind == "minimal":
        made = minimal_canonical(R, discount=discount, coverage=coverage, T=T)
    elif kind == "val":
        made = val_canonical(R, T, discount=discount, pi=pi)
    elif kind == "starc_minimal":
        made = starc_minimal_canonical(R, T, discount=discount, coverage=coverage)
    else:
        known = ", ".join(CANONICALISATIONS)
        raise ValueError(f"canonicalisation {kind!r} is not known; expected one of {known}")
    # a reward that is all shaping would be scaled up to a random direction
    return np.where(np.abs(made).max() <= ROUND_OFF * np.abs(R).max(), 0.0, made)


# Norms, and the distances


def norm_of(x, weights, kind="L2"):
    """sum w |x|, sqrt(sum w x^2), or the largest |x| where w > 0: "L1", "L2", "Linf"."""
    if kind == "L1":
        return np.sum(weights * np.abs(x))
    if kind == "L2":
        return np.sqrt(np.sum(weights * x**2))
    if kind == "Linf":
        return np.abs(x[weights > 0]).max()
    raise ValueError(f"norm {kind!r} is not known; expected L1, L2 or Linf")


def scaled_distance(x, y, weights, norm="L2", metric="L2"):
    """½ m(x / n(x), y / n(y)); what has norm 0 stays 0, so one such gives ½ and two give 0."""
    size_x, size_y = norm_of(x, weights, norm), norm_of(y, weights, norm)
    x = x / size_x if size_x > 0 else 0 * x
    y = y / size_y if size_y > 0 else 0 * y
    half = norm_of(x - y, weights, metric) / 2
    return float(min(half, 1.0)) if norm == metric else float(half)


def centred(x, weights):
    """x less its weighted mean; exactly 0 where x is constant up to round-off."""
    less = x - np.sum(weights * x)
    spread, size = np.abs(less[weights > 0]).max(), np.abs(x[weights > 0]).max()
    return less if spread > 1e-12 * size else np.zeros_like(x)


def pearson_distance(x, y, weights=None):
    """sqrt((1 - rho) / 2) of two arrays of one shape, rho their weighted correlation; in [0, 1].

    Gleave et al. 2021, section 4. Taken as ½ ||u - v||_2 of the centred arrays scaled to
    length 1, which is the same and keeps a distance of 0 at 1e-16, where the root of 1 - rho makes
    1e-8 of round-off. Convention: both constant 0, one constant ½.
    """
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if x.shape != y.shape or x.size == 0:
        raise ValueError(f"x and y must have one shape, not empty: {x.shape} and {y.shape}")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("x or y holds a value that is not finite")
    weights = checked_weights(weights, x.shape, "weights")
    return scaled_distance(centred(x, weights), centred(y, weights), weights)


def epic_distance(
    R1, R2, *, discount=0.99, coverage=None, T=None, state_dist=None, action_dist=None
):
    """EPIC (Gleave et al. 2021, section 4): Pearson distance of the canonical rewards.

    In [0, 1]. T is read only to spread a coverage over (S, A) to next states; not needed.
    """
    R1, R2 = pair_of_rewards(R1, R2)
    how = dict(discount=discount, state_dist=state_dist, action_dist=action_dist)
    C1, C2 = canonical(R1, "epic", **how), canonical(R2, "epic", **how)
    return pearson_distance(C1, C2, weights_of_transitions(R1.shape, coverage, T))


def dard_distance(R1, R2, T, *, discount=0.99, coverage=None, action_dist=None):
    """DARD (Wulfe et al. 2022): Pearson distance of its canonical rewards; in [0, 1].

    Coverage over (S, A), or none, counts possible transitions alone: w(s, a) T(s'|s, a).
    """
    R1, R2 = pair_of_rewards(R1, R2)
    how = dict(discount=discount, T=T, action_dist=action_dist)
    C1, C2 = canonical(R1, "dard", **how), canonical(R2, "dard", **how)
    return pearson_distance(C1, C2, weights_of_transitions(R1.shape, coverage, T))


def epic_like_distance(
    R1,
    R2,
    *,
    canonicalisation="epic",
    norm="L2",
    metric="L2",
    discount=0.99,
    T=None,
    pi=None,
    coverage=None,
    state_dist=None,
    action_dist=None,
):
    """½ m(c(R1) / n(c(R1)), c(R2) / n(c(R2))), Jenner, Skalse, Gleave 2022.

    canonicalisation c of CANONICALISATIONS; norm n and metric m each "L1", "L2" or "Linf". In
    [0, 1] where norm and metric are the same; mixed ones can exceed 1, or not reach it.
    """
    R1, R2 = pair_of_rewards(R1, R2)
    how = dict(
        discount=discount,
        T=T,
        pi=pi,
        coverage=coverage,
        state_dist=state_dist,
        action_dist=action_dist,
    )
    C1, C2 = canonical(R1, canonicalisation, **how), canonical(R2, canonicalisation, **how)
    return scaled_distance(C1, C2, weights_of_transitions(R1.shape, coverage, T), norm, metric)


def starc_distance(
    R1,
    R2,
    T,
    *,
    canonicalisation="val",
    norm="L2",
    metric="L2",
    discount=0.99,
    pi=None,
    coverage=None,
):
    """STARC (Skalse et al. 2024): ½ ||s(R1) - s(R2)||, s(R) = c(R) / ||c(R)||, weights w T.

    canonicalisation "val" or "minimal". 0 exactly for rewards that order all policies alike, 1 for
    opposite ones (norm and metric the same), where every (s, a) has a positive weight.
    """
    kinds = {"val": "val", "minimal": "starc_minimal"}
    if canonicalisation not in kinds:
        raise ValueError(f"canonicalisation {canonicalisation!r}: expected val or minimal")
    return epic_like_distance(
        R1,
        R2,
        canonicalisation=kinds[canonicalisation],
        norm=norm,
        metric=metric,
        discount=discount,
        T=T,
        pi=pi,
        coverage=coverage,
    )


def mean_from_states(reward, states, actions, next_states):
    """Mean over the batch of (A, S') of reward(s, A, S'), for each s of states. -> (N,)"""
    total = np.zeros(len(states))
    for action, following in zip(actions, next_states, strict=True):
        many = [np.broadcast_to(x, (len(states), *np.shape(x))) for x in (action, following)]
        total += np.asarray(reward(states, *many), dtype=np.float64)
    return total / len(actions)


def epic_sample(reward1, reward2, transitions, samples, *, discount=0.99, weights=None):
    """EPIC from a batch, for rewards that are functions: reward(s, a, s') -> (N,) of arrays.

    transitions: (s, a, s'), three arrays of N, what is compared; samples: (A, S'), two arrays of M,
    over which every mean is taken. The last term of the canonical reward takes its S from the same
    S', so shaping cancels exactly for any batch (Gleave et al. 2021; the batch is shared
    throughout). On all transitions and all (A, S') it is the tabular value. M * (2 N + M) calls'
    worth of rewards a reward.
    """
    checked_discount(discount, one=True)
    states, actions, next_states = (np.asarray(x) for x in transitions)
    some_actions, some_states = (np.asarray(x) for x in samples)
    if not (len(states) == len(actions) == len(next_states) > 0):
        raise ValueError("transitions: three arrays (s, a, s') of one length, not empty, expected")
    if not len(some_actions) == len(some_states) > 0:
        raise ValueError("samples: two arrays (A, S') of one length, not empty, expected")

    def made_canonical(reward):
        R = np.asarray(reward(states, actions, next_states), dtype=np.float64)
        batch = (some_actions, some_states)
        here = mean_from_states(reward, states, *batch)
        following = mean_from_states(reward, next_states, *batch)
        anywhere = mean_from_states(reward, some_states, *batch).mean()
        made = R + discount * following - here - discount * anywhere
        return np.where(np.abs(made).max() <= ROUND_OFF * np.abs(R).max(), 0.0, made)

    return pearson_distance(made_canonical(reward1), made_canonical(reward2), weights)
