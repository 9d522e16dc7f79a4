"""PARL: a reward that is judged by the policy it makes.

Chakraborty et al. 2023 (arXiv 2308.02585). The lower problem is RL under the reward r of weights
nu; the upper one is what people say of the policy that comes out. Here the lower one is solved at
once: of K candidates that the reference wrote, the policy that maximises E r - beta KL(pi,
reference) takes one by

    pi_i = exp(r_i / beta) / sum_j exp(r_j / beta).

So the derivative goes through the softmax, where the paper has to invert a Hessian. Of the upper
problem there are four forms, all to be made small:

- utility: - E_pi [win rate against the reference] + kl_weight KL(pi, reference)
- nll: the mean of - log P(what people say) over pairs that the policy drew; its gradient has a
  direct term, as r stands in it, and one of distribution, as pi moves with r
- iterated: the direct term alone, which is RLHF with ever new pairs
- one-shot: the direct term for pairs of the reference, which is RLHF

Left out: noise, as all chances are taken for known and no sample is drawn; A-PARL's steps of a
policy that lags behind. Letters: N runs, B prompts, K candidates, D features, `...` axes in front.
"""

from typing import NamedTuple

import numpy as np

from minirlhf.online.oracle import sigmoid
from minirlhf.online.policies import Record

KL_WEIGHT = 0.05


# The lower problem


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def through_softmax(policy, slope, beta):
    """The gradient in r (..., K) of what has the gradient `slope` in pi."""
    return policy * (slope - (policy * slope).sum(-1, keepdims=True)) / beta


# The upper problem


def utility(policy, wins):
    """E_pi [win rate] - kl_weight KL(pi, reference), (...)."""
    return (policy * (wins - KL_WEIGHT * log_ratios(policy))).sum(-1)


def log_ratios(policy):
    """log pi / reference, where the reference takes each candidate alike."""
    return np.log(policy * policy.shape[-1] + 1e-300)


def utility_gradient(rewards, chances, beta):
    """The gradient of -utility in the rewards (..., K); chances (..., K, K)."""
    policy = softmax(rewards / beta)
    slope = KL_WEIGHT * (log_ratios(policy) + 1) - chances.mean(-1)
    return through_softmax(policy, slope, beta)


def pair_losses(rewards, chances):
    """(..., K, K): - P(i over j) log sigmoid(r_i - r_j) - P(j over i) log sigmoid(r_j - r_i)."""
    gaps = rewards[..., :, None] - rewards[..., None, :]
    return np.logaddexp(0, gaps) - chances * gaps


def nll(rewards, policy, chances):
    """E of pair_losses, both drawn from the policy: (...)."""
    return np.einsum("...i,...ij,...j", policy, pair_losses(rewards, chances), policy)


def direct_term(rewards, policy, chances):
    """nll's gradient in the rewards, the policy held."""
    gaps = rewards[..., :, None] - rewards[..., None, :]
    surprise = (sigmoid(gaps) - chances) @ policy[..., None]
    return 2 * policy * surprise[..., 0]  # i is as often the first of a pair as the second


def distribution_term(rewards, policy, chances, beta):
    """nll's gradient by way of the policy, its losses held."""
    slope = 2 * (pair_losses(rewards, chances) @ policy[..., None])[..., 0]
    return through_softmax(policy, slope, beta)


def nll_gradient(rewards, chances, beta):
    policy = softmax(rewards / beta)
    direct = direct_term(rewards, policy, chances)
    return direct + distribution_term(rewards, policy, chances, beta)


def iterated_gradient(rewards, chances, beta):
    return direct_term(rewards, softmax(rewards / beta), chances)


def one_shot_gradient(rewards, chances, beta):
    return direct_term(rewards, softmax(0 * rewards), chances)


FORMS = {
    "utility": utility_gradient,
    "nll": nll_gradient,
    "iterated": iterated_gradient,
    "one-shot": one_shot_gradient,
}


def bilevel_loss(rewards, wins, beta, kl_weight=KL_WEIGHT):
    """The utility form as a scalar of torch: its autograd is PARL's gradient.

    rewards (B, K) of candidates that the reference wrote, with a gradient, -inf for missing ones;
    wins (B, K), how often each is preferred to what the reference writes (a mean over all K: to
    itself 1/2); beta > 0, the price of a nat in the policy's RL, in units of the rewards.

    All of the gradient comes by way of the policy: were its softmax detached, as in ordinary
    iterated RLHF, where the reward's own loss on pairs of the policy is what is learned from,
    nothing would be left. The nll form would have both; but in it the policy drifts to pairs that
    are easy to predict, and what people get from it falls below RLHF that was done once: so it is
    not offered here.
    """
    missing = rewards == -np.inf
    candidates = (~missing).sum(-1, keepdim=True)
    logprobs = (rewards / beta).log_softmax(-1)  # gathered over candidates, not tokens
    log_ratios = (logprobs + candidates.log()).masked_fill(missing, 0)
    return (logprobs.exp() * (kl_weight * log_ratios - wins)).sum(-1).mean()


# A problem whose reward is linear, though people's is not


class Candidates(NamedTuple):
    features: np.ndarray  # (N, B, K, D), what the reward sees
    chances: np.ndarray  # (N, B, K, K), P(i over j)

    def part(self, prompts):
        return Candidates(self.features[:, prompts], self.chances[:, prompts])


def candidates(rng, runs=6, prompts=564, k=8, d=4, curve=0.4):
    """Normal features x; people like w . x + curve x' A x, w and A normal, another pair a run."""
    x = rng.standard_normal((runs, prompts, k, d))
    w = rng.standard_normal((runs, 1, d, 1))
    bend = rng.standard_normal((runs, 1, d, d)) / 2
    bent = ((x @ bend) * x).sum(-1, keepdims=True)
    liked = x @ w + curve * bent  # (N, B, K, 1)
    gaps = liked - liked.swapaxes(-1, -2)
    return Candidates(x, sigmoid(gaps))


def rewards_of(features, nu):
    """x . nu, (N, B, K), of nu (N, D)."""
    return (features @ nu[:, None, :, None])[..., 0]


def utility_of(problem, nu, beta):
    """(N,): the mean utility of the policy that nu makes."""
    rewards = rewards_of(problem.features, nu)
    wins = problem.chances.mean(-1)
    return utility(softmax(rewards / beta), wins).mean(1)


def best_utility(problem):
    """(N,): of a policy that knows people: c log mean exp(win rate / c), c the price of a nat."""
    wins = problem.chances.mean(-1)
    return KL_WEIGHT * np.log(np.exp(wins / KL_WEIGHT).mean(-1)).mean(1)


def adam(gradient, start, steps, rate=0.05):
    """Yields the weights after each step of Adam (Kingma and Ba 2015, without their epsilon)."""
    mean, square, weights = np.zeros_like(start), np.zeros_like(start), start
    for t in range(1, steps + 1):
        slope = gradient(weights)
        mean = 0.9 * mean + 0.1 * slope
        square = 0.99 * square + 0.01 * slope**2
        fair_mean = mean / (1 - 0.9**t)
        fair_square = square / (1 - 0.99**t)
        weights = weights - rate * fair_mean / np.sqrt(fair_square + 1e-16)
        yield weights


def learn(problem, steps, form="utility", beta=0.5):
    """The weights nu (steps, N, D) after each step of one of the FORMS, on all of a problem."""
    gradient_in_rewards = FORMS[form]
    features, chances = problem

    def gradient(nu):
        slope = gradient_in_rewards(rewards_of(features, nu), chances, beta)
        return (slope[..., None] * features).sum((1, 2)) / features.shape[1]

    start = np.zeros(features.shape[::3])  # (N, D)
    return np.stack(list(adam(gradient, start, steps)))


def run(problem, queries, form="utility", beta=0.5, learned=64):
    """A Record: regret on the `learned` prompts that are asked of at each query, greedy on others.

    A query is of all pairs of candidates of these prompts, weighted as the form says.
    """
    shown, held = problem.part(slice(learned)), problem.part(slice(learned, None))
    path = learn(shown, queries, form, beta)
    regrets = []
    for part in (shown, held):
        earned = [utility_of(part, nu, beta) for nu in path]
        regrets.append(best_utility(part)[:, None] - np.stack(earned, axis=1))
    return Record(*regrets)
