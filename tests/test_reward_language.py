"""Distances between rewards of text, and the most readable equivalent reward: against loops, small
cases worked by hand, and what must and must not be forgotten."""

import itertools
import math

import numpy as np
import pytest
import torch

from minirlhf.gpt import GPT, GPTConfig, RewardModel
from minirlhf.rewards import language, prfi
from minirlhf.rewards.language import bandit_distance, bandit_spread, tree_distance
from minirlhf.tokenizer import load_tokenizer

# Response level


def pearson(x, y, w):
    """The distance of flat x and y, by its definition in words: half the length of the difference
    of the two centred vectors of length 1."""
    x, y = x - (w * x).sum() / w.sum(), y - (w * y).sum() / w.sum()
    x, y = x / math.sqrt((w * x * x).sum()), y / math.sqrt((w * y * y).sum())
    return math.sqrt((w * (x - y) ** 2).sum()) / 2


def by_loops(r1, r2, w):
    flat = []
    for a, b, c in zip(r1, r2, w, strict=True):
        here = [k for k in range(len(a)) if not math.isnan(a[k]) and not math.isnan(b[k])]
        total = sum(c[k] for k in here)
        means = [sum(c[k] * r[k] for k in here) / total for r in (a, b)]
        flat += [(a[k] - means[0], b[k] - means[1], c[k]) for k in here]
    return pearson(*np.array(flat).T)


def rewards(seed=0):
    rng = np.random.default_rng(seed)
    r1 = rng.normal(size=(7, 5))
    return r1, r1 + rng.normal(size=(7, 5)), rng.uniform(0.2, 1, (7, 5))


def test_bandit_distance_is_that_of_loops():
    r1, r2, w = rewards()
    assert bandit_distance(r1, r2) == pytest.approx(by_loops(r1, r2, np.ones_like(w)), abs=1e-12)
    assert bandit_distance(r1, r2, w) == pytest.approx(by_loops(r1, r2, w), abs=1e-12)
    r1[0, 3] = r2[2, 0] = r2[2, 1] = np.nan
    assert bandit_distance(r1, r2, w) == pytest.approx(by_loops(r1, r2, w), abs=1e-12)


def test_a_shift_of_a_prompt_is_forgotten_and_by_a_naive_pearson_it_is_not():
    r1, _, w = rewards()
    shifted = 3 * r1 + 50 * np.arange(7)[:, None]
    assert bandit_distance(r1, shifted, w) == 0
    assert bandit_distance(r1, -shifted) == pytest.approx(1, abs=1e-12)
    assert pearson(r1.ravel(), shifted.ravel(), w.ravel()) > 0.5


def test_constant_rewards():
    r1, _, _ = rewards()
    constant = np.repeat(np.arange(7)[:, None] / 10 + 0.1, 5, 1)  # in each prompt
    assert bandit_distance(constant, 2 * constant) == 0
    assert bandit_distance(constant, r1) == bandit_distance(r1, constant) == 0.5


def test_the_spread_is_a_jackknife_over_prompts():
    r1, r2, w = rewards()
    without = [by_loops(*(np.delete(x, i, 0) for x in (r1, r2, w))) for i in range(7)]
    error = math.sqrt(6 / 7 * sum((d - sum(without) / 7) ** 2 for d in without))
    assert bandit_spread(r1, r2, w) == pytest.approx((by_loops(r1, r2, w), error), abs=1e-12)
    assert math.isnan(bandit_spread(r1[:1], r2[:1])[1])


def test_the_spread_is_that_of_new_prompts():
    rng = np.random.default_rng(1)
    found = []
    for _ in range(300):
        r1 = rng.normal(size=(40, 4))
        found.append(bandit_spread(r1, r1 + rng.normal(size=(40, 4))))
    distances, errors = np.array(found).T
    assert errors.mean() == pytest.approx(distances.std(), rel=0.15)


@pytest.mark.parametrize("bad", [
    (np.zeros(3), np.zeros(3)),
    (np.zeros((2, 3)), np.zeros((3, 2))),
    (np.zeros((2, 3)), np.full((2, 3), np.inf)),
    (np.zeros((2, 3)), np.full((2, 3), np.nan)),
    (np.zeros((2, 3)), np.zeros((2, 3)), -np.ones((2, 3))),
])  # fmt: skip
def test_what_is_no_reward_is_refused(bad):
    with pytest.raises(ValueError):
        bandit_distance(*bad)


# Token level: trees

TREE = [node for n in (1, 2, 3) for node in itertools.product("ab", repeat=n)]


def random_tree(seed):
    """(rewards, probs) on the nodes of TREE."""
    rng = np.random.default_rng(seed)
    probs = {}
    for prefix in [(), *TREE[:6]]:
        probs[(*prefix, "a")] = rng.uniform(0.2, 0.8)
        probs[(*prefix, "b")] = 1 - probs[(*prefix, "a")]
    return {node: rng.normal() for node in TREE}, probs


def shaped(rewards, seed=0, ends=0.0):
    rng = np.random.default_rng(seed)
    phi = {node: rng.normal() if len(node) < 3 else ends * rng.normal() for node in [(), *TREE]}
    return {node: r + phi[node] - phi[node[:-1]] for node, r in rewards.items()}


def test_a_tree_by_hand():
    """1 for aaa, on its last token, against 1 for each a; all tokens at chance. The values of the
    first are 1/8 at the prompt, 1/4 after a, 1/2 after aa, so its advantages along the way are 1/8,
    1/4 and 1/2 up or down; those of the second 1/2."""
    probs = dict.fromkeys(TREE, 0.5)
    last = {node: float(node == ("a",) * 3) for node in TREE}
    count = {node: float(node[-1] == "a") for node in TREE}
    advantage, visits = language.tree_advantages(last, probs)
    expected = {"a": 1 / 8, "b": -1 / 8, "aa": 1 / 4, "ab": -1 / 4, "aaa": 1 / 2, "aab": -1 / 2}
    assert advantage == {node: expected.get("".join(node), 0) for node in TREE}
    assert visits == {node: 0.5 ** len(node) for node in TREE}
    # sums weighted by visits: xy = 1/16 + 1/16 + 1/16, xx = 1/64 + 2/64 + 4/64, yy = 3/4
    assert tree_distance(last, count, probs) == pytest.approx(
        math.sqrt((1 - math.sqrt(3 / 7)) / 2), abs=1e-12
    )


def test_advantages_are_those_of_all_texts_listed():
    rewards, probs = random_tree(3)
    advantage, visits = language.tree_advantages(rewards, probs)

    def value(prefix):
        """The mean return of the texts that begin so, from there on."""
        total = 0
        for text in itertools.product("ab", repeat=3):
            if text[: len(prefix)] == prefix:
                way = [text[:n] for n in range(len(prefix) + 1, 4)]
                total += math.prod(probs[n] for n in way) * sum(rewards[n] for n in way)
        return total

    for node in TREE:
        assert advantage[node] == pytest.approx(rewards[node] + value(node) - value(node[:-1]))
        assert visits[node] == pytest.approx(
            math.prod(probs[node[:n]] for n in range(1, len(node) + 1))
        )


def test_shaping_and_scale_are_forgotten_at_token_level():
    rewards, probs = random_tree(4)
    other = {node: 5 * r for node, r in shaped(rewards).items()}
    assert tree_distance(rewards, other, probs) == 0
    assert tree_distance(rewards, {n: -r for n, r in other.items()}, probs) == pytest.approx(1)
    assert tree_distance(rewards, shaped(rewards, ends=1.0), probs) > 0.1  # no shaping
    assert tree_distance(rewards, random_tree(5)[0], probs) > 0.3


def test_where_it_comes_late_is_forgotten():
    """The whole return on the last token is the same reward; a constant of each text is none."""
    rewards, probs = random_tree(6)
    late = {}
    for node in TREE:
        late[node] = sum(rewards[node[:n]] for n in (1, 2, 3)) if len(node) == 3 else 0.0
    assert tree_distance(rewards, late, probs) == 0
    constant = {node: 0.7 * (len(node) == 3) for node in TREE}
    assert tree_distance(constant, constant, probs) == 0
    assert tree_distance(constant, rewards, probs) == 0.5


@pytest.mark.parametrize("unknown", ["as for the possible one", "as 0"])
def test_epic_of_a_table_of_possible_pairs_tells_a_reward_from_its_shaped_self(unknown):
    """EPIC with states the prefixes, drawn alike: C(s, a, s') = r + E[R(s', A, S) - R(s, A, S) -
    R(S, A, S)]. A table has r of (s, a, s a) alone; for other triples something is assumed."""
    rewards, probs = random_tree(7)
    states = [(), *TREE]

    def epic(r):
        def mean(s):
            """E R(s, A, S)."""
            total = 0
            for a in "ab":
                for to in states:
                    known = unknown == "as for the possible one" or to == (*s, a)
                    total += r.get((*s, a), 0) if known else 0
            return total / (2 * len(states))

        overall = sum(map(mean, states)) / len(states)
        return np.array([r[n] + mean(n) - mean(n[:-1]) - overall for n in TREE])

    other = shaped(rewards)
    assert tree_distance(rewards, other, probs) == 0
    assert pearson(epic(rewards), epic(other), np.ones(len(TREE))) > 0.15


def test_trees_that_are_none_are_refused():
    rewards, probs = random_tree(8)
    with pytest.raises(ValueError, match="same nodes"):
        language.tree_advantages({("a",): 1.0}, probs)
    with pytest.raises(ValueError, match="sum to"):
        language.tree_advantages(rewards, probs | {("a",): 0.99})


# Token level: samples of a model. Three tokens, of which 2 ends; responses of at most 3.

EOS, R = 2, 3
CONFIG = GPTConfig(vocab_size=3, n_ctx=8, n_layer=1, n_head=2, n_embd=16)


@pytest.fixture(scope="module")
def policy():
    torch.manual_seed(0)
    model = GPT(CONFIG)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape))
    return model.eval()


def all_nodes(policy):
    """{node: probability} of the responses to the prompt [EOS, 1], by the model on each prefix."""
    probs, prefixes = {}, [()]
    for prefix in prefixes:
        with torch.no_grad():
            logits = policy(torch.tensor([[EOS, 1, *prefix]]))[0, -1]
        for token, p in enumerate(logits.double().softmax(0).tolist()):
            probs[(*prefix, token)] = p
            if token != EOS and len(prefix) < R - 1:
                prefixes.append((*prefix, token))
    return probs


def as_function(table):
    """The reward of rows that looks up each response token's node."""

    def reward(tokens, p, r):
        found = torch.zeros(len(tokens), R)
        rows = zip(tokens.tolist(), p.tolist(), r.tolist(), strict=True)
        for i, (ids, start, n) in enumerate(rows):
            for t in range(n):
                found[i, t] = table[tuple(ids[start : start + t + 1])]
        return found

    return reward


def sampled(policy, first, second, n=400, m=8):
    prompts = torch.tensor([[EOS, 1]] * n), torch.full((n,), 2)
    options = {"eos": EOS, "pad": 0, "generator": torch.Generator().manual_seed(1)}
    rewards = as_function(first), as_function(second)
    return language.token_distance(*rewards, policy, *prompts, R, continuations=m, **options)


def test_samples_find_the_exact_distance(policy):
    probs = all_nodes(policy)
    rng = np.random.default_rng(0)
    first = {node: rng.normal() for node in probs}
    second = {node: r + 0.5 * rng.normal() for node, r in first.items()}
    exact = tree_distance(first, second, probs)
    distance, error = sampled(policy, first, second)
    assert 0.15 < exact < 0.6 and error < 0.03
    assert abs(distance - exact) < 3 * error


def test_without_halves_noise_is_taken_for_a_difference(policy):
    """Two rewards of which the one comes on the first token, the other is the same and noise of
    the last token that the policy cannot foresee: two continuations are mostly that noise."""
    probs = all_nodes(policy)
    rng = np.random.default_rng(0)
    first, second = {}, {}
    for node in probs:
        first[node] = 2.0 * node[0] * (len(node) == 1)
        second[node] = first[node] + rng.normal() * (node[-1] == EOS or len(node) == R)
    exact = tree_distance(first, second, probs)
    n = 1500
    prompts = torch.tensor([[EOS, 1]] * n), torch.full((n,), 2)
    torch.manual_seed(3)
    (xa, xb), (ya, yb) = language.sampled_advantages(
        [as_function(first), as_function(second)], policy, *prompts, R, 2, eos=EOS, pad=0
    )
    x, y = ((xa + xb) / 2).ravel(), ((ya + yb) / 2).ravel()
    naive = math.sqrt((1 - x @ y / math.sqrt(x @ x * (y @ y))) / 2)
    torch.manual_seed(3)
    found, error = sampled(policy, first, second, n, 2)
    assert naive > exact + 0.03
    assert abs(found - exact) < 3 * error < 0.06


def test_samples_forget_shaping_and_scale_exactly(policy):
    """As both rewards see the same continuations."""
    probs = all_nodes(policy)
    rng = np.random.default_rng(2)
    first = {node: rng.normal() for node in probs}
    phi = {node: rng.normal() * (len(node) < R and EOS not in node) for node in [(), *probs]}
    other = {node: 4 * (r + phi[node] - phi[node[:-1]]) for node, r in first.items()}
    assert sampled(policy, first, other, n=50, m=2)[0] < 1e-5  # of float32 rewards
    with pytest.raises(ValueError, match="even"):
        sampled(policy, first, other, m=3)


@pytest.mark.parametrize("level", ["response", "token"])
def test_rewards_of_a_reward_model(level):
    torch.manual_seed(0)
    rm = RewardModel(CONFIG, level=level, shift=0.5).eval()
    tokens = torch.tensor([[2, 1, 0, 1, 2], [2, 0, 1, 0, 0]])
    p, r = torch.tensor([2, 1]), torch.tensor([3, 2])
    with torch.no_grad():
        found = language.token_rewards(rm, tokens, p, r, 4)
        values, scores = rm.values(tokens).numpy(), rm(tokens, p + r, p).numpy()
    np.testing.assert_allclose(found.sum(1), scores, atol=1e-6)
    assert found.shape == (2, 4) and not found[0, 3] and not found[1, 2:].any()
    if level == "token":
        np.testing.assert_allclose(found[0, :2], values[0, 2:4], atol=1e-6)
    else:
        assert not found[0, :2].any() and not found[1, 0]


# The most readable reward

S, GAMMA = 5, 0.9


def chain():
    """(R, possible) of five states in a row, steps to the left and right, the last one the end and
    worth 1."""
    R, possible = np.zeros((S, 2, S)), np.zeros((S, 2, S))
    for s in range(S - 1):
        possible[s, 0, max(s - 1, 0)] = possible[s, 1, s + 1] = 1
    R[S - 2, 1, S - 1] = 1
    return R, possible


def with_potential(R, phi):
    return R + GAMMA * phi - phi[:, None, None]


def least_l1(R, possible):
    """The least mean |r|: a linear program, whose best vertex has as many zeros as free values of
    Phi, four. All of them are tried."""
    s, a, to = np.nonzero(possible)
    slope = np.zeros((len(s), S))
    slope[np.arange(len(s)), to] += GAMMA
    slope[np.arange(len(s)), s] -= 1
    slope, r = slope[:, : S - 1], R[s, a, to]
    found = []
    for rows in map(list, itertools.combinations(range(len(s)), S - 1)):
        if np.linalg.matrix_rank(slope[rows]) == S - 1:
            phi = np.linalg.solve(slope[rows], -r[rows])
            found.append(np.abs(r + slope @ phi).mean())
    return min(found)


def test_a_reward_and_its_shaped_self_have_the_same_most_readable_form():
    sparse, possible = chain()
    phi = np.append(np.random.default_rng(0).normal(0, 2, S - 1), 0)
    dense = with_potential(sparse, phi)
    best = least_l1(sparse, possible)
    assert least_l1(dense, possible) == pytest.approx(best)
    assert best < sparse[possible > 0].mean() - 1e-3  # "+1 at the goal" is not it
    options = {"possible": possible, "steps": 500}
    for R in (sparse, dense):
        found, potential = prfi.prfi(R, GAMMA, terminal=[S - 1], **options)
        value = np.abs(found[possible > 0]).mean()
        assert best - 1e-9 < value < best + 1e-2 and potential[S - 1] == 0
        np.testing.assert_allclose(found, with_potential(R, potential), atol=1e-12)


def test_policies_keep_their_order():
    """All policies of one action a state, by walking: returns move by -Phi of the first state."""
    R, possible = chain()
    options = {"possible": possible, "terminal": [S - 1], "steps": 300}
    found, potential = prfi.prfi(R, GAMMA, objective="log", **options)
    for policy in itertools.product((0, 1), repeat=S - 1):
        for first in range(S - 1):
            s, before, after = first, 0, 0
            for t in range(300):
                if s == S - 1:
                    break
                to = s + 1 if policy[s] else max(s - 1, 0)
                before += GAMMA**t * R[s, policy[s], to]
                after += GAMMA**t * found[s, policy[s], to]
                s = to
            assert after - before == pytest.approx(-potential[first], abs=1e-9)


def test_objectives_by_loops():
    start, end = [0, 0, 1, 2], [1, 2, 2, 0]
    r = [1.0, -3.0, 0.5, 2.0]
    pairs = set()
    for i, j in itertools.product(range(4), repeat=2):
        if i != j and start[j] == end[i]:
            pairs.add((i, j))
        if i < j and start[j] == start[i]:
            pairs.add((i, j))
    given = prfi.neighbours(start, end)
    assert set(map(tuple, given.tolist())) == pairs and len(given) == len(pairs)
    steps = [abs(r[i] - r[j]) for i, j in pairs]
    expected = {
        "l1": sum(map(abs, r)) / 4,
        "log": sum(math.log(1 + abs(x)) for x in r) / 4,
        "smooth": sum(steps) / len(pairs),
        "smooth_log": sum(math.log(1 + x) for x in steps) / len(pairs),
    }
    arguments = torch.tensor(r), torch.tensor(given)
    found = {name: f(*arguments).item() for name, f in prfi.OBJECTIVES.items()}
    assert found == pytest.approx(expected)


@pytest.mark.parametrize("objective", prfi.OBJECTIVES)
def test_every_objective_falls(objective):
    R, possible = chain()
    R = with_potential(R, np.append(np.random.default_rng(1).normal(size=S - 1), 0))
    s, _, to = np.nonzero(possible)
    free = np.arange(S) < S - 1
    found = prfi.minimise(objective, R[possible > 0], s, to, free, discount=GAMMA, steps=300)
    assert found[3] < 0.7 * found[2]


def test_what_two_ways_on_have_in_common_moves_to_the_token_before():
    """A token, then one of two, worth 1 and 3: |Phi| + |1 - Phi| + |3 - Phi| is least at 1."""
    r, start, end = [0.0, 1.0, 3.0], [3, 0, 0], [0, 1, 2]
    found, _, before, after = prfi.minimise("l1", r, start, end, [1, 0, 0, 0], steps=500)
    np.testing.assert_allclose(found, [1, 0, 2], atol=1e-2)
    assert (before, after) == pytest.approx((4 / 3, 1), abs=1e-2)


def test_bad_rewards_are_refused():
    R, possible = chain()
    with pytest.raises(ValueError, match="expected one of l1"):
        prfi.prfi(R, objective="l2")
    with pytest.raises(ValueError, match="expected \\(S, A, S\\)"):
        prfi.prfi(R[:, 0])
    with pytest.raises(ValueError, match="possible"):
        prfi.prfi(R, possible=0 * possible)
    with pytest.raises(ValueError, match="neighbour"):
        prfi.minimise("smooth", [1.0], [0], [1], [1, 0])


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("level", ["response", "token"])
def test_readable_tokens_keep_every_score(policy, level, linear):
    torch.manual_seed(0)
    rm = RewardModel(CONFIG, level=level, shift=0.5).eval()
    prompts = torch.tensor([[EOS, 1, 0], [EOS, 0, 0]]), torch.tensor([2, 3])
    tokens, p, r = prfi.branching(policy, *prompts, R, 4, eos=EOS, pad=0)
    told = prfi.readable_tokens(rm, tokens, p, r, linear=linear, steps=200)
    with torch.no_grad():
        scores, ends = rm(tokens, p + r, p).numpy(), rm.values(tokens, p + r).numpy()
    assert told.objective[1] < told.objective[0]
    for i in range(len(tokens)):
        ids = tokens[i, p[i] : p[i] + r[i]].tolist()
        assert told.responses[i] == ids and len(told.after[i]) == len(ids)
        for rewards in (told.before[i], told.after[i]):
            assert told.base[i] + rewards.sum() == pytest.approx(scores[i], abs=1e-5)
        if level == "response":
            assert told.base[i] == pytest.approx(ends[i, p[i] - 1] + 0.5, abs=1e-5)
    distinct = {(*tokens[i, :n].tolist(), n) for i in range(len(tokens))
                for n in range(p[i] + 1, p[i] + r[i] + 1)}  # fmt: skip
    rewards = {}
    for i, row in enumerate(tokens.tolist()):
        for t in range(len(told.after[i])):
            rewards.setdefault(tuple(row[: p[i] + t + 1]), told.after[i][t])
    assert len(rewards) == len(distinct)
    assert np.abs(list(rewards.values())).mean() == pytest.approx(told.objective[1])


def test_branches_leave_at_each_token(policy):
    prompts = torch.tensor([[EOS, 1]] * 2), torch.tensor([2, 2])
    torch.manual_seed(0)
    tokens, p, r = prfi.branching(policy, *prompts, R, 4, eos=EOS, pad=0)
    assert len(tokens) == 2 + 4 * int(r[:2].sum())
    n = 2 + 8  # those that leave at the first token come first
    for t in range(1, int(r[:2].max())):
        for i in (0, 1):
            if r[i] > t:
                assert (tokens[n : n + 4, : 2 + t] == tokens[i, : 2 + t]).all()
                n += 4


def test_the_command(toy, tmp_path, capsys):
    out = tmp_path / "prfi.png"
    knobs = {"prompts": 2, "branches": 2, "steps": 50, "response_length": 8, "device": "cpu"}
    prfi.main(prfi.Knobs(rm=str(toy / "rm"), run=str(toy / "sft"), out=str(out), **knobs))
    said = capsys.readouterr().out
    for word in ("prompt", "score", "before", "after", "mean |r|", str(out)):
        assert word in said
    assert out.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(prfi.UserError, match="a model of no run"):
        prfi.main(prfi.Knobs(rm=str(toy / "rm"), run=str(toy / "sft" / "model"), **knobs))
    with pytest.raises(prfi.UserError, match="--response-length"):
        long = knobs | {"response_length": 4000}
        prfi.main(prfi.Knobs(rm=str(toy / "rm"), run=str(toy / "sft"), **long))


def test_hostile_texts_are_shown_as_escapes(toy, tmp_path, capsys):
    tokenizer = load_tokenizer(toy / "sft" / "model")
    text = "$\\frac{$\x1b[31m"
    ids = tokenizer.encode(text)
    some = np.ones(len(ids))
    told = prfi.Told([ids], [0.0], [some], [-some], (1.0, 1.0))
    prfi.print_told(told, [text], tokenizer)
    prfi.plot(told, [text], tokenizer, tmp_path / "a.png")
    assert "\x1b" not in capsys.readouterr().out
    assert (tmp_path / "a.png").is_file()
