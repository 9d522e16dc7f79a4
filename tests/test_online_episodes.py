"""online: worlds, the oracle, posterior sampling and duels, on what can be worked out by hand."""

import sys
from functools import partial
from itertools import product

import numpy as np
import pytest

from minirlhf.engine.cli import UserError
from minirlhf.online import command, dps, duels, uniform
from minirlhf.online import environments as worlds
from minirlhf.online.environments import Env, grid, random_mdp, river_swim
from minirlhf.online.oracle import logistic_loss, logistic_map, prefers


def rng_of(seed):
    return np.random.default_rng(seed)


def tiny(seed, horizon=3, states=2, actions=2):
    """A world whose rewards depend on where an action leads."""
    rng = rng_of(seed)
    dynamics = rng.dirichlet(np.ones(states), (states, actions))
    rewards = rng.normal(size=dynamics.shape)
    there = np.ones((horizon, states), bool)
    return Env(dynamics, rewards, rng.dirichlet(np.ones(states)), there)


def expected_by_paths(env, policy):
    """The expected return of a policy (H, S): the sum over all ways an episode can go."""
    total = 0
    for path in product(range(env.states), repeat=env.horizon + 1):
        chance, pay = env.start[path[0]], 0
        for step, (s, after) in enumerate(zip(path, path[1:], strict=False)):
            chance *= env.dynamics[s, policy[step][s], after]
            pay += env.rewards[s, policy[step][s], after]
        total += chance * pay
    return total


# Worlds


def test_planning_finds_the_best_of_all_policies():
    env = tiny(0)
    policies = np.array(list(product(range(2), repeat=6))).reshape(-1, 3, 2)
    values = [expected_by_paths(env, policy) for policy in policies]
    assert np.allclose(worlds.returns_of(env, policies), values)
    assert np.isclose(worlds.best_return(env), max(values))
    best = worlds.plan_alike(env, env.dynamics, worlds.expected_rewards(env))
    assert (best == policies[np.argmax(values)]).all()


def test_river_swim():
    env = river_swim(4, 7)
    left = [[1, 0, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]]
    right = [[0.4, 0.6, 0, 0], [0.05, 0.6, 0.35, 0], [0, 0.05, 0.6, 0.35], [0, 0, 0.4, 0.6]]
    assert np.allclose(env.dynamics[:, 0], left) and np.allclose(env.dynamics[:, 1], right)
    assert env.rewards[0, 0, 0] == 0.005 and env.rewards[3, 1, 3] == 1
    assert np.count_nonzero(env.rewards) == 2
    assert env.horizon == 7 and env.start.tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize("seed", range(3))
def test_grid(seed):
    env = grid(rng_of(seed))
    pays = env.rewards[0, 0].reshape(4, 4)
    assert np.isclose(pays.sum(), 1) and np.count_nonzero(pays) == 3
    assert pays[0, 0] == pays[3, 3] == 0
    best = 0
    for downs in product([0, 1], repeat=6):  # 20 of these have three steps down
        if sum(downs) == 3:
            rows = np.cumsum(downs)
            columns = np.arange(1, 7) - rows
            best = max(best, pays[rows, columns].sum())
    assert np.isclose(best, 2 / 3) and np.isclose(worlds.best_return(env), best)
    states, _ = worlds.roll_out(env, worlds.random_policies(env, rng_of(seed), 50), rng_of(1))
    assert (states[:, -1] == 15).all()
    assert all(env.there[step, states[:, step]].all() for step in range(6))


def test_random_world():
    env = random_mdp(rng_of(0))
    pays = env.rewards[..., 0]
    assert env.states == 20 and env.horizon == 5
    assert pays.min() == 0 and np.isclose(pays.mean(), 1)
    assert np.allclose(env.dynamics.sum(-1), 1)
    for s in range(16):
        step = s // 4 + 1
        assert np.isclose(env.dynamics[s, :, 4 * step : 4 * step + 4].sum(), env.actions)
    assert env.there.sum() == 20 and env.there[2].nonzero()[0].tolist() == [8, 9, 10, 11]
    assert np.isclose(env.start[:4].sum(), 1)


def test_episodes_follow_the_dynamics():
    env = tiny(1)
    policy = np.array([[0, 1], [1, 1], [1, 0]])
    states, actions = worlds.roll_out(env, np.broadcast_to(policy, (20000, 3, 2)), rng_of(0))
    assert states.shape == (20000, 4) and actions.shape == (20000, 3)
    assert abs((states[:, 0] == 0).mean() - env.start[0]) < 0.02
    for step, s in product(range(3), range(2)):
        here = states[:, step] == s
        assert (actions[here, step] == policy[step, s]).all()
        share = (states[here, step + 1] == 0).mean()
        assert abs(share - env.dynamics[s, policy[step, s], 0]) < 0.03
    mean = worlds.earned(env, states, actions).mean()
    assert abs(mean - expected_by_paths(env, policy)) < 0.05


def test_what_an_episode_earned_and_visited():
    env = tiny(2)
    states, actions = np.array([[[0, 1, 1, 0]]]), np.array([[[1, 0, 1]]])
    r = env.rewards
    assert np.isclose(worlds.earned(env, states, actions), r[0, 1, 1] + r[1, 0, 1] + r[1, 1, 0])
    assert dps.visits_of(env, states, actions).tolist() == [[[0, 1, 1, 1]]]
    counts = np.zeros((1, 2, 2, 2))
    dps.count(counts, states, actions)
    dps.count(counts, states, actions)
    where = [(0, 0, 1, 1), (0, 1, 0, 1), (0, 1, 1, 0)]
    assert counts.sum() == 6 and all(counts[place] == 2 for place in where)


# The oracle, and what is concluded


def test_the_oracle():
    answers = prefers(np.full(40000, 1.5), 1.0, 2.0, rng_of(0))
    assert set(answers) == {0.0, 1.0}
    assert abs(answers.mean() - 1 / (1 + np.exp(-1))) < 0.01
    assert prefers(np.array([2, 1, 1]), np.array([1, 2, 1]), np.inf, None).tolist() == [1, 0, 0.5]


def test_linear_posterior():
    rng = rng_of(0)
    x, y = rng.integers(-3, 4, (2, 7, 3)).astype(float), rng.integers(0, 2, (2, 7)).astype(float)
    means, covariances = dps.linear_posterior(x, y, sigma=0.5, lam=0.1)
    for run in range(2):  # prior precision 0.1, an answer's precision 1 / 0.25
        precision, weighted = 0.1 * np.eye(3), np.zeros(3)
        for features, answer in zip(x[run], y[run], strict=True):
            precision += np.outer(features, features) / 0.25
            weighted += features * (answer - 0.5) / 0.25
        assert np.allclose(covariances[run], np.linalg.inv(precision))
        assert np.allclose(means[run], np.linalg.solve(precision, weighted))


def central_differences(f, at, by=1e-5):
    steps = by * np.eye(len(at))
    return np.array([(f(at + step) - f(at - step)) / (2 * by) for step in steps])


def test_logistic_map():
    rng = rng_of(0)
    x, y = rng.normal(size=(2, 30, 3)), rng.random((2, 30)).round()
    weights, hessians = logistic_map(x, y, 0.5)
    for run in range(2):

        def loss(w, run=run):
            chances = 1 / (1 + np.exp(-x[run] @ w))
            right = np.where(y[run] == 1, chances, 1 - chances)
            return -np.log(right).sum() + 0.25 * (w**2).sum()

        assert np.isclose(logistic_loss(weights[run], x[run], y[run], 0.5), loss(weights[run]))
        assert np.abs(central_differences(loss, weights[run])).max() < 1e-4
        curved = central_differences(partial(central_differences, loss, by=1e-4), weights[run])
        assert np.allclose(curved, hessians[run], atol=1e-4)


def test_steps_are_damped_where_answers_can_be_separated():
    rng = rng_of(3)
    x = rng.normal(size=(12, 3))
    x *= 10 ** rng.uniform(-2, 2, (12, 1))  # differences of very unlike sizes
    y = (x.sum(-1) > 0).astype(float)

    def chances(w):
        return 1 / (1 + np.exp(-np.clip(x @ w, -500, 500)))

    def slope(w):
        return x.T @ (chances(w) - y) + 0.001 * w

    w = np.zeros(3)
    for _ in range(100):  # Newton's whole steps
        curvature = chances(w) * (1 - chances(w))
        hessian = x.T @ (curvature[:, None] * x) + 0.001 * np.eye(3)
        w = w - np.linalg.solve(hessian, slope(w))
    assert np.abs(slope(w)).max() > 10 and not ((x @ w > 0) == (y == 1)).all()
    weights, _ = logistic_map(x, y, 0.001)
    assert np.abs(slope(weights)).max() < 1e-3
    assert ((x @ weights > 0) == (y == 1)).all()


# Dueling posterior sampling

SMALL = river_swim(5, 20)


@pytest.mark.parametrize("posterior", [dps.linear_posterior, dps.logistic_posterior])
def test_dps_learns_where_uniform_does_not(posterior):
    own = dps.run(SMALL, rng_of(0), 75, 10, posterior=posterior)
    even = uniform.run(SMALL, rng_of(0), 75, 10, posterior=posterior)
    assert own.greedy[:, -1].mean() > 0.9 * own.best
    assert even.greedy[:, -1].mean() < 0.6 * own.best
    assert own.shown[:, -10:].mean() > 0.7 * own.best
    assert even.shown[:, -10:].mean() < 0.05 * own.best


def test_who_is_told_the_reward_loses_least():
    told = dps.run(SMALL, rng_of(0), 75, 10, posterior=dps.true_rewards(SMALL))
    own = dps.run(SMALL, rng_of(0), 75, 10)
    even = uniform.run(SMALL, rng_of(0), 75, 10)
    lost = [record.regret.sum(1).mean() for record in (told, own, even)]
    assert 4 * lost[0] < lost[1] < lost[2] / 1.5


def test_a_tie_tells_nothing():
    seen = []

    def posterior(x, y):
        seen.append(x)
        return dps.linear_posterior(x, y)

    env = river_swim(5, 3)  # too short to get across, and all left is .015
    nothing = env._replace(rewards=np.zeros_like(env.rewards))
    dps.run(nothing, rng_of(0), 6, 2, posterior=posterior, beta=np.inf)
    assert not seen[-1].any()
    dps.run(nothing, rng_of(0), 6, 2, posterior=posterior)  # a coin is an answer
    assert seen[-1].any()


@pytest.mark.slow
@pytest.mark.parametrize("posterior", [dps.linear_posterior, dps.logistic_posterior])
def test_dps_as_published(posterior):
    env = river_swim()
    own = dps.run(env, rng_of(0), 200, 20, posterior=posterior)
    even = uniform.run(env, rng_of(0), 200, 20, posterior=posterior)
    told = dps.run(env, rng_of(0), 200, 20, posterior=dps.true_rewards(env))
    late = [record.shown[:, -20:].mean() / own.best for record in (even, own, told)]
    assert late[0] < 0.02 and late[1] > 0.93 and late[2] > 0.99
    assert own.regret.sum(1).mean() < even.regret.sum(1).mean() / 4


# Duels


def test_radius():
    assert np.isclose(duels.radius(200, 3, 0.01), np.sqrt(np.log(4 * 9 * 40000 / 0.01) / 400))


def test_elimination_drops_who_is_beaten():
    asked = []

    def duel(a, b, n):  # 2 always wins, 0 beats 1 always
        asked.append((a, b))
        return n * (a == 2 or (a == 0 and b == 1))

    assert duels.eliminate(duel, 3, 0.01, 0.1) == 2
    # both go when 1/2 > sqrt(log(360 m^2) / 2m): 0.54 at m = 20 of ten each, 0.48 at 30
    assert asked == 3 * [(0, 1), (0, 2), (1, 2)]


def test_elimination_stops_at_what_does_not_matter():
    def duel(a, b, n):  # 0.6 of the wins go to the later arm
        return 0.4 * n

    asked = []
    winner = duels.eliminate(lambda a, b, n: asked.append(n) or duel(a, b, n), 2, 0.3, 0.1)
    m = 10
    while np.sqrt(np.log(16 * m**2 / 0.1) / (2 * m)) >= 0.3:
        m += 10
    assert winner == 1 and sum(asked) == m
    assert duels.eliminate(duel, 4, 0.3, 0.1) == 3


def test_preferences_in_a_circle():
    def duel(a, b, n):  # rock, paper, scissors
        return n * ((a - b) % 3 == 1)

    assert duels.eliminate(duel, 3, 0.01, 0.1) in range(3)


def test_a_search_costs_no_more_than_it_may():
    env = random_mdp(rng_of(0), 3, 3, 3)
    for queries in (300, 1000, 3000):
        epsilon = duels.affordable(env, queries)
        flat = env._replace(rewards=np.zeros_like(env.rewards))  # nothing to drop
        assert 0.6 * queries < duels.pps(flat, rng_of(0), epsilon).comparisons[-1] <= queries
    assert np.isinf(duels.affordable(env, 269)) and np.isfinite(duels.affordable(env, 270))


def test_pps():
    """Five worlds of four steps, four states and three actions."""
    lost, scattered, best = 0, 0, 0
    for seed in range(5):
        env = random_mdp(rng_of(seed), 4, 4, 3)
        found = duels.pps(env, rng_of(seed + 100), 0.8)
        asked = found.comparisons[-1]
        assert 2000 < asked < 13000 and found.episodes[-1] == 2 * asked
        assert found.regret(int(asked))[-1] == found.gap
        assert found.regret(1)[0] == found.best - found.values[0]
        even = uniform.evenly(env, rng_of(seed + 200), asked, build=False)
        lost, scattered, best = lost + found.gap, scattered + even.gap, best + found.best
    assert lost < 0.02 * best
    assert lost < scattered / 5


def test_peps():
    """Five worlds of three steps, three states and two actions."""
    lost, best, episodes, undirected = 0, 0, 0, 0
    for seed in range(5):
        env = random_mdp(rng_of(seed), 3, 3, 2)
        found = duels.peps(env, rng_of(seed + 100), 0.8)
        lost, best = lost + found.gap, best + found.best
        episodes += found.episodes[-1]
        undirected += duels.peps(env, rng_of(seed + 100), 0.8, directed=False).episodes[-1]
        assert 200 < found.comparisons[-1] < 1500 and found.episodes[-1] < 8000
    assert lost < 0.02 * best
    assert undirected > 1.2 * episodes


def test_peps_skips_what_cannot_be_reached():
    env = random_mdp(rng_of(0), 3, 3, 2)
    dynamics = env.dynamics.copy()
    dynamics[:3, :, 4] = 0  # the first step's states do not lead to the second's middle one
    dynamics /= dynamics.sum(-1, keepdims=True)
    found = duels.peps(env._replace(dynamics=dynamics), rng_of(0), 1.6)
    assert (1, 4) in found.skipped


@pytest.mark.slow
@pytest.mark.parametrize("world, epsilon", [(grid, 0.8), (random_mdp, 1.6)])
def test_duels_as_published(world, epsilon):
    for search in (duels.pps, duels.peps):
        found = [search(world(rng_of(i)), rng_of(i + 100), epsilon) for i in range(5)]
        lost, best = sum(one.gap for one in found), sum(one.best for one in found)
        assert lost < 0.02 * best


# The command


def test_the_command(tmp_path, capsys):
    command.main(command.Knobs())
    listed = capsys.readouterr().out
    assert all(name in listed for name in command.ALGORITHMS)
    for name, queries in {"dps": 5, "peps": 150}.items():
        out = tmp_path / "deep" / f"{name}.png"
        knobs = command.Knobs(algorithm=name, runs=2, queries=queries, out=str(out))
        command.main(knobs)
        said = capsys.readouterr().out
        assert f"after {queries}" in said
        assert ("uniform" if "dps" in name else "evenly") in said
        assert out.read_bytes().startswith(b"\x89PNG")
    for name, queries in {"dps-logistic": 5, "pps": 2000}.items():
        curves = command.ALGORITHMS[name].regrets(rng_of(0), 2, queries)
        assert all(rows.shape == (2, queries) for rows in curves.values())


def test_a_picture_needs_the_extra(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    knobs = command.Knobs(algorithm="dps", runs=2, queries=5, out=str(tmp_path / "a.png"))
    command.main(knobs)
    assert "minirlhf[plot]" in capsys.readouterr().out


def test_what_the_user_can_mend(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="'ppo' is no algorithm: expected one of dps"):
        command.main(command.Knobs(algorithm="ppo"))
    with pytest.raises(UserError, match="--queries 100: peps asks .* expected 150 or more"):
        command.main(command.Knobs(algorithm="peps", queries=100, runs=2))
    with pytest.raises(UserError, match="train.py: expected a name that ends in .png"):
        command.main(command.Knobs(algorithm="dps", out="train.py"))


def test_means_and_their_errors():
    mean, error = command.spread(np.array([[1.0, 2], [3, 2]]))
    assert mean.tolist() == [2, 2] and np.allclose(error, [1, 0])
