"""How far apart are two rewards of a language model, in the two ways that text is a decision.

Response level: a prompt is the state, a whole response the action, and then all is over. A shift
of all responses to one prompt changes no choice; what is left after the mean of each prompt is
taken off is the advantage, and EPIC (Gleave et al. 2021), DARD (Wulfe et al. 2022) and STARC
(Skalse et al. 2023) become one distance.

Token level: a prefix is the state, a token the action. The canonical reward is the advantage under
one fixed policy (STARC's VAL), r(prefix, token) + V(prefix token) - V(prefix), without a discount
and with V = 0 at the end, weighted by how often that policy comes by. It forgets potential shaping
and scale, and reads possible pairs only.

Both are sqrt((1 - rho) / 2), rho the correlation of two canonical rewards: 0 the same order of all
policies, .71 unrelated, 1 the opposite. EPIC and DARD have no place at token level: they subtract
means over triples of prefix, token and prefix that no text has, for which there is no reward.

Left out: responses without an end; discounts.
"""

from collections import Counter

import numpy as np
import torch
import torch.nn.functional as F

from minirlhf.engine.rows import in_parts, response_mask, window
from minirlhf.gpt import RewardModel
from minirlhf.ppo import on_last_token
from minirlhf.sampling import generate

# Response level


def bandit_distance(r1, r2, weights=None):
    """The distance, in [0, 1], of two rewards of the same responses (prompts, responses).

    NaN in either is no response. `weights` of the same shape are how likely each is; without any,
    all count alike, as samples of the policy do. Two constant rewards are at 0, a constant one and
    another at .5. Raises ValueError for other shapes, infinite rewards, weights below 0 and where
    no response is left.
    """
    return distance_of(prompt_sums(r1, r2, weights).sum(0))


def bandit_spread(r1, r2, weights=None):
    """(bandit_distance, its standard error by the jackknife over prompts; nan of one prompt)."""
    return with_error(prompt_sums(r1, r2, weights))


def prompt_sums(r1, r2, weights=None):
    """Sums of x y, x^2 and y^2 over the responses of each prompt, x and y the rewards less their
    means in the prompt: (prompts, 3)."""
    r1 = np.asarray(r1, float)
    r2 = np.asarray(r2, float)
    weights = np.ones_like(r1) if weights is None else np.asarray(weights, float)
    if r1.ndim != 2 or not r1.shape == r2.shape == weights.shape:
        shapes = f"{r1.shape}, {r2.shape}, weights {weights.shape}"
        raise ValueError(f"rewards {shapes}: expected one shape (prompts, responses)")
    infinite = np.isinf(r1) | np.isinf(r2)
    if infinite.any() or not (weights >= 0).all():
        raise ValueError("expected finite rewards, or NaN, and weights of at least 0")
    missing = np.isnan(r1) | np.isnan(r2)
    weights = np.where(missing, 0, weights)
    if not weights.any():
        raise ValueError("no response has both rewards and a weight")
    x = centred(r1, weights)
    y = centred(r2, weights)
    return products(x, y, weights).sum(1)


def products(x, y, weights=1.0):
    """x y, x^2 and y^2, weighted: (..., 3)."""
    found = [weights * x * y, weights * x * x, weights * y * y]
    return np.stack(found, -1)


def centred(r, weights):
    """Rewards less their weighted mean in each prompt; 0 where only rounding is left."""
    counts = weights > 0
    r = np.where(counts, r, 0)
    total = weights.sum(1, keepdims=True)
    total = np.where(total > 0, total, 1)
    mean = (weights * r).sum(1, keepdims=True) / total
    return without_rounding(np.where(counts, r - mean, 0), r)


def without_rounding(x, r):
    """x, made of rewards r, with 0 in place of what is as small as their rounding."""
    least = 1e-12 * abs(r).max()
    return np.where(abs(x) > least, x, 0)


def distance_of(sums):
    """sqrt((1 - rho) / 2) of the sums (3,) of x y, x^2 and y^2; nan where noise made an estimate of
    x^2 or y^2 negative. The root would make 1e-8 of rounding: below 1e-14 the square is 0."""
    xy, xx, yy = sums
    less, more = sorted((xx, yy))
    if less < 0:
        return float("nan")
    if less == 0:
        return 0.0 if more == 0 else 0.5
    rho = np.clip(xy / np.sqrt(xx) / np.sqrt(yy), -1, 1)
    square = (1 - rho) / 2
    return float(np.sqrt(square)) if square > 1e-14 else 0.0


def with_error(sums):
    """(distance, standard error) of sums (n, 3) of n independent groups: the jackknife leaves out
    one after the other (Efron and Stein 1981). Near 0 and 1, where it is skewed, it says little."""
    n = len(sums)
    total = sums.sum(0)
    distance = distance_of(total)
    if n < 2:
        return distance, float("nan")
    without = [distance_of(total - some) for some in sums]
    variance = (n - 1) * np.var(without)
    return distance, float(np.sqrt(variance))


# Token level, exactly, where all prefixes are known


def tree_advantages(rewards, probs):
    """(advantage, visits) of each node of a tree of prefixes: two dicts.

    A node is a tuple of tokens, at least one: a prefix and the token that is written after it.
    rewards: {node: what that token earns}; probs: {node: the policy's probability of it}. A prefix
    that is no node itself is a prompt and is visited once; a node without another after it is an
    end. Raises ValueError where the nodes differ or the tokens after a prefix do not sum to 1.
    """
    if rewards.keys() != probs.keys():
        raise ValueError("rewards and probs: expected the same nodes")
    nodes = sorted(probs, key=len)
    total, value, visits = Counter(), Counter(), {}
    for node in nodes:
        prefix = node[:-1]
        total[prefix] += probs[node]
        visits[node] = visits.get(prefix, 1) * probs[node]
    for prefix, found in total.items():
        if abs(found - 1) > 1e-6:
            raise ValueError(f"the tokens after {prefix} sum to {found:g}, expected 1")
    for node in reversed(nodes):  # the longest first: V(prefix) = sum_a pi(a) (r(a) + V(prefix a))
        value[node[:-1]] += probs[node] * (rewards[node] + value[node])
    advantage = {}
    for node in nodes:
        advantage[node] = rewards[node] + value[node] - value[node[:-1]]
    return advantage, visits


def tree_distance(first, second, probs):
    """The distance of two rewards {node: float} of a tree's tokens, as in tree_advantages."""
    found = []
    for rewards in (first, second):
        advantage, visits = tree_advantages(rewards, probs)
        x = np.array([advantage[node] for node in probs])
        r = np.array([rewards[node] for node in probs])
        found.append(without_rounding(x, r))
    weights = np.array([visits[node] for node in probs])
    return distance_of(products(*found, weights).sum(0))


# Token level, by samples of a model


def token_distance(first, second, policy, prompts, prompt_lengths, response_length, *, eos, pad,
                   continuations=8, temperature=1.0, generator=None):  # fmt: skip
    """(distance, standard error) of two rewards of the tokens that a policy writes.

    A reward is a RewardModel or f(tokens (B, T), prompt_lengths, response_lengths) -> what each
    response token earns, (B, R), a whole response on its last one. One response is sampled to each
    of the prompts (B, Q), and from each of its prefixes so many `continuations`, the same for both
    rewards, whose mean return is V. Half of them make one estimate of an advantage, half another:
    a product of the two has no noise squared in it, which would take the distance elsewhere. nan
    where noise is all there is: more prompts or continuations. The error is the jackknife's over
    responses. Raises ValueError for an odd number of continuations, and as `generate`.
    """
    options = {"eos": eos, "pad": pad, "temperature": temperature, "generator": generator}
    rewards, sizes = [first, second], (response_length, continuations)
    (xa, xb), (ya, yb) = sampled_advantages(
        rewards, policy, prompts, prompt_lengths, *sizes, **options
    )
    across = (xa * yb + xb * ya) / 2  # (B, R)
    sums = np.stack([across, xa * xb, ya * yb], -1).sum(1)
    return with_error(sums)


@torch.no_grad()
def sampled_advantages(rewards, policy, prompts, prompt_lengths, response_length, continuations,
                       **options):  # fmt: skip
    """Two independent estimates of the advantages of the tokens of one sampled response to each
    prompt, by each of the rewards: (rewards, 2, B, R) NumPy, 0 after the end."""
    if continuations < 2 or continuations % 2:
        raise ValueError(f"continuations {continuations}: expected an even number, of two halves")
    R = response_length
    tokens, p, r, _ = generate(policy, prompts, prompt_lengths, R, **options)
    own = np.stack([token_rewards(reward, tokens, p, r, R) for reward in rewards])
    shape = len(rewards), 2, len(tokens), R + 1
    values = np.zeros(shape)  # at the end and behind it V is 0
    for t in range(int(r.max())):
        rows = (r > t).nonzero()[:, 0]
        prefixes = tokens[rows], p[rows]
        found = values_after(t, rewards, policy, *prefixes, R, continuations, **options)
        places = rows.cpu().numpy()
        values[:, :, places, t] = found
    return own[:, None] + values[..., 1:] - values[..., :-1]


def values_after(t, rewards, policy, tokens, prompt_lengths, R, continuations, **options):
    """Two estimates of V after t response tokens: (rewards, 2, rows)."""
    n = len(tokens)
    rows = continued(t, policy, tokens, prompt_lengths, R, continuations, **options)
    returns = []
    for reward in rewards:
        earned = token_rewards(reward, *rows, R)[:, t:]
        halves = earned.sum(1).reshape(n, 2, -1)
        returns.append(halves.mean(2).T)
    return np.stack(returns)


def continued(t, policy, tokens, prompt_lengths, R, continuations, *, pad, **options):
    """The first t response tokens of each row, and behind them samples up to R, so many of each:
    tokens, prompt lengths, response lengths."""
    p = prompt_lengths.repeat_interleave(continuations)
    written = p + t
    longest = int(written.max())
    prefixes = tokens[:, :longest].repeat_interleave(continuations, 0)
    prefixes = prefixes.where(response_mask(written, longest), pad)
    whole, _, more, _ = generate(policy, prefixes, written, R - t, pad=pad, **options)
    return whole, p, t + more


def token_rewards(reward, tokens, prompt_lengths, response_lengths, width):
    """What each response token earns by a RewardModel or a function, as in token_distance: (B,
    width) NumPy, 0 after the end. tokens (B, T)."""
    mask = response_mask(response_lengths, width)  # (B, R)
    rows = tokens, prompt_lengths, response_lengths
    if not isinstance(reward, RewardModel):
        found = reward(*rows)
        found = F.pad(found, (0, width - found.shape[1]))
        return torch.where(mask, found, 0).cpu().double().numpy()

    def by_token(tokens, p, r):
        return window(reward.values(tokens, p + r), p, width)

    def by_response(tokens, p, r):
        return reward(tokens, p + r)

    if reward.level == "token":
        found = in_parts(by_token, 256, *rows)
        shift = torch.full_like(found[:, 0], reward.shift)
        found = torch.where(mask, found, 0) + on_last_token(shift, mask)
    else:
        found = on_last_token(in_parts(by_response, 256, *rows), mask)
    return found.cpu().double().numpy()
