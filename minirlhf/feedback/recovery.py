"""How well a reward is recovered from each kind of feedback.   python -m minirlhf.feedback.recovery

A toy language of 8 letters, 6 to a text, each letter worth something; a simulated person says so
many things of random texts, all of one kind; a reward that is linear in the letters is fitted to
that. Printed is how far it is from the person's own on other texts: 0 is the same up to scale and
shift, 0.71 chance, 1 the opposite. Mean of six random rewards; a minute at most. Of a trace it is
the feature that is recovered; of similar texts a projection, on which a reward of two features is
then fitted to 20 pairs.

Behind it stands what a mixture of kinds is worth beside pairs alone, at the same human time: each
label takes the assumed SECONDS, and the mixture spends as much time on each of its kinds.
"""

import sys
from functools import partial

import numpy as np
import torch

from minirlhf.feedback import choice
from minirlhf.feedback.ground import Texts, ground
from minirlhf.feedback.mixture import Mixture
from minirlhf.feedback.people import HOW_MANY, Person
from minirlhf.rewards.distances import pearson_distance

LETTERS, LENGTH = "abcdefgh", 6
ROWS = {  # name: the kind, how many responses (0: as many as usual)
    "pair": ("comparison", 2),
    "best of 4": ("comparison", 4),
    "ranking of 4": ("comparison", 4),
    "e-stop": ("estop", 0),
    "e-stop, binary": ("estop", 0),
    "critique": ("critique", 0),
    "social": ("social", 0),
    "inter-temporal": ("intertemporal", 0),
    "sketch hinge": ("intertemporal", 0),
    "improvement": ("improvement", 0),
    "language": ("language", 0),
    "proxy": ("proxy", 0),
    "importance": ("importance", 0),
    "trace": ("trace", 20),
    "similarity": ("similarity", 0),
}

SECONDS = {  # of a person for a label: assumed, not measured
    "pair": 5,
    "ranking of 4": 10,
    "critique": 3,
    "inter-temporal": 8,
    "e-stop": 4,
    "improvement": 20,
    "social": 1,
}
MIXTURES = {
    "pairs": ["pair"],
    "pairs, rankings": ["pair", "ranking of 4"],
    "pairs, rankings, critiques": ["pair", "ranking of 4", "critique"],
    "rankings, curves": ["ranking of 4", "inter-temporal"],
    "all seven": list(SECONDS),
}


def random_texts(n, rng):
    return ["".join(rng.choice(list(LETTERS), LENGTH)) for _ in range(n)]


def letters_of(texts):
    """(N, T) the numbers of letters, all texts of one length."""
    return np.array([[LETTERS.index(c) for c in text] for text in texts])


def linear_reward(worth, prompts, responses):
    of_letter = dict(zip(LETTERS, worth.tolist(), strict=True))
    return [sum(map(of_letter.get, text)) for text in responses]


def linear_person(rng, **traits):
    """(a Person whose reward is the sum of what letters are worth, at random; those (8,))."""
    worth = rng.normal(size=len(LETTERS))
    worth -= worth.mean()
    features = tuple(f"text:{c}" for c in LETTERS)
    traits = {"features": features, "replacements": tuple(LETTERS)} | traits
    return Person(partial(linear_reward, worth), **traits), worth


def labels_of(name, n, person, rng):
    """n Labels, their items being places in a list of all texts: (labels, texts)."""
    kind, k = ROWS[name]
    labels, texts = [], []
    for _ in range(n):
        label = person.ask(kind, "", distinct(k or HOW_MANY[kind], rng), rng)
        if name == "best of 4":
            label = label._replace(said={"best": label.said["ranking"][0]})
        places = range(len(texts), len(texts) + len(label.responses))
        labels.append(label._replace(items=tuple(places)))
        texts += label.responses
    return labels, texts


def distinct(n, rng):
    texts = random_texts(n, rng)
    return texts if len(set(texts)) == n else distinct(n, rng)


def read_texts(texts):
    """ground.Texts whose place k is the prefix of k letters."""
    at = [np.r_[: LENGTH + 1, LENGTH] for _ in texts]
    return Texts(at, [np.arange(1, LENGTH + 1) for _ in texts])


def prefixes_of(worth, letters):
    """(N, T + 1) what prefixes are worth under worth (8,)."""
    sums = worth[letters].cumsum(1)
    return torch.cat([torch.zeros_like(sums[:, :1]), sums], 1)


def fit(nll, parameters, n, steps=60):
    """Minimises nll() (sum over n labels) with a standard normal prior on the first parameter."""
    optimizer = torch.optim.LBFGS(parameters, max_iter=steps, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = (nll() + 0.5 * parameters[0].square().sum()) / n
        loss.backward()
        return loss

    optimizer.step(closure)


def recovered(name, n, seed):
    """The distance to a person's reward of what is fitted to n labels."""
    return recovered_from({name: n}, seed)


def recovered_from(counts, seed):
    """The same of so many labels of each kind, {name: how many}."""
    rng = np.random.default_rng(seed)
    person, gold = linear_person(rng)
    labels, texts = [], []
    for name, n in counts.items():
        more, own = labels_of(name, n, person, rng)
        for label in more:
            places = tuple(len(texts) + i for i in label.items)
            labels.append(label._replace(items=places))
        texts += own
    letters = torch.tensor(letters_of(texts))
    worth = torch.zeros(len(LETTERS), dtype=torch.float64, requires_grad=True)
    mixture = Mixture(labels, 1).double()
    groups = ground(labels, range(len(texts)), read_texts(texts))
    nll = partial(usual_nll, mixture, groups, worth, letters)
    if "e-stop, binary" in counts:
        moments = torch.tensor(rng.integers(0, LENGTH, n))
        rest = rest_of(torch.tensor(gold), letters, moments)
        stopped = torch.rand(n, generator=torch.manual_seed(seed)) < torch.sigmoid(-rest)
        nll = partial(binary_nll, worth, letters, moments, stopped)
    elif "sketch hinge" in counts:
        nll = partial(hinge_nll, groups[0], worth, letters)
    fit(nll, [worth, *mixture.parameters()], len(labels))
    others = letters_of(random_texts(1000, rng))
    return pearson_distance(worth.detach().numpy()[others].sum(1), gold[others].sum(1))


def in_time(names, seconds):
    """{name: how many labels}, as much time for each of the names."""
    return {name: round(seconds / len(names) / SECONDS[name]) for name in names}


def counts_of(texts):
    """(N, 8) how often each letter stands in a text."""
    counts = [[text.count(c) for c in LETTERS] for text in texts]
    return torch.tensor(counts, dtype=torch.float64)


def recovered_feature(n, seed):
    """The distance to a feature of a head that is linear in letter counts, fitted to n traces."""
    rng = np.random.default_rng(seed)
    person, _ = linear_person(rng, features=("text:a",))
    labels, texts = labels_of("trace", n, person, rng)
    torch.manual_seed(seed)
    mixture = Mixture(labels, len(LETTERS)).double()
    fit_representation(mixture, labels, texts, mixture.psi)
    others = counts_of(random_texts(1000, rng))
    return pearson_distance((others @ mixture.psi.detach())[:, 0].numpy(), others[:, 0].numpy())


def fit_representation(mixture, labels, texts, parameter):
    last = counts_of(texts)
    groups = ground(labels, range(len(texts)), read_texts(texts))
    fit(partial(nll_of, mixture, groups, None, last), [parameter], len(labels))


def recovered_from_similar(n, seed):
    """The distance to a reward of two features, fitted to 20 pairs on a projection.

    The projection is what n queries of similarity in these features made it; n = 0: a random one.
    """
    rng = np.random.default_rng(seed)
    person, _ = linear_person(rng, features=("text:a", "text:b"))
    gold = np.array([2.0, -2, 0, 0, 0, 0, 0, 0])  # as spread as that of eight letters
    labels, texts = labels_of("similarity", max(n, 1), person, rng)
    torch.manual_seed(seed)
    mixture = Mixture(labels, len(LETTERS)).double()
    if n:
        fit_representation(mixture, labels, texts, mixture.phi)
    pairs = counts_of(random_texts(40, rng))
    better = pairs.numpy() @ gold + rng.gumbel(size=40)
    order = torch.tensor(better.reshape(20, 2).argsort(1)[:, ::-1].copy())
    embedded = (pairs @ mixture.phi.detach()).view(20, 2, -1)
    embedded = embedded / embedded.flatten(0, 1).std()
    head = torch.zeros(embedded.shape[2], dtype=torch.float64, requires_grad=True)
    fit(lambda: choice.ranking_nll((embedded @ head).gather(1, order)).sum(), [head], 20)
    others = counts_of(random_texts(1000, rng))
    found = others @ mixture.phi.detach() @ head.detach()
    return pearson_distance(found.numpy(), others.numpy() @ gold)


def nll_of(mixture, groups, prefixes, last=None):
    return sum(nll.sum() for nll in mixture.nll(groups, prefixes, last).values())


def usual_nll(mixture, groups, worth, letters):
    return nll_of(mixture, groups, prefixes_of(worth, letters))


def rest_of(worth, letters, moments):
    prefixes = prefixes_of(worth, letters)
    return prefixes[:, -1] - prefixes.gather(1, moments[:, None]).squeeze(1)


def binary_nll(worth, letters, moments, stopped):
    return choice.estop_binary_nll(rest_of(worth, letters, moments), stopped).sum()


def hinge_nll(group, worth, letters):
    values = group.options.values(prefixes_of(worth, letters))
    return choice.sketch_hinge(values, group.said).sum()


def main(seeds=6, budgets=(150, 300, 600, 1200)):
    print(f"{'distance to gold after':<28} {'30 labels':>14} {'400 labels':>14}")
    of_others = {"trace": recovered_feature, "similarity": recovered_from_similar}
    for name in ROWS:
        recover = of_others.get(name, partial(recovered, name))
        cells = []
        for n in (30, 400):
            found = [recover(n, seed) for seed in range(seeds)]
            cells.append(f"{np.mean(found):>14.3f}")
        print(f"{name:<28}", *cells, flush=True)
    print(f"\n{'at equal time, +- deviation':<28}", *(f"{s:>12} s" for s in budgets))
    for title, names in MIXTURES.items():
        cells = []
        for seconds in budgets:
            counts = in_time(names, seconds)
            found = [recovered_from(counts, seed) for seed in range(5)]
            cells.append(f"{np.mean(found):>6.3f} +- {np.std(found, ddof=1):.3f}")
        print(f"{title:<28}", *cells, flush=True)


if __name__ == "__main__":
    sys.exit(main())
