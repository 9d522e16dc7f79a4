"""What to ask next by --ask: a method of minirlhf/online/select.py, for one person at the page.

Texts are known by their features of the run's model, and every comparison in the labels file
counts, whoever made it. Large groups are asked about in parts, as everything in select.py looks at
all pairs of a prompt.

Left out: other kinds than comparisons; features of texts that are written while somebody labels,
which come first.
"""

from itertools import combinations
from pathlib import Path

import numpy as np

from minirlhf.data.labels import parse_label, rankings
from minirlhf.engine.cli import UserError
from minirlhf.feedback.page.pool import Group
from minirlhf.feedback.refit import Learner
from minirlhf.online.hidden import features_of, pool_of
from minirlhf.online.select import NOTHING, select

LARGEST = 6  # responses of a group: of so many `pool.sets` makes all pairs


def parts_of(groups):
    """Groups of LARGEST responses at most, about alike, in their order."""
    found = []
    for prompt, responses, sources in groups:
        count = -(-len(responses) // LARGEST)
        for places in np.array_split(np.arange(len(responses)), count):
            own = [responses[i] for i in places]
            found.append(Group(prompt, own, [sources[i] for i in places]))
    return found


class Asker:
    """groups as in the Session's questions; features(texts) -> (N, C) of (prompt, response)."""

    def __init__(self, session, groups, method, features):
        self.session, self.method = session, method
        groups = [group for group in groups if len(group.responses) > 1]
        self.place = {}  # {(prompt, response): (its group, its place there)}
        for b, group in enumerate(groups):
            for k, response in enumerate(group.responses):
                self.place[group.prompt, response] = b, k
        most = max(len(group.responses) for group in groups)
        shape = len(groups), most
        every = iter(features(list(self.place)))
        rows = []
        for group in groups:
            own = [next(every) for _ in group.responses]
            rows += own + [own[-1]] * (most - len(own))  # the last one again, which nobody asks
        self.features = np.array(rows).reshape(*shape, -1)

    def choose(self, left, rng):
        """A place in `left`, indices of questions; where the method has none, any."""
        B, K, _ = self.features.shape
        of_pair, free = np.full((B, K, K), -1), np.zeros((B, K, K), bool)
        for place, index in enumerate(left):
            where = self.pair(self.session.questions[index])
            if where is None:
                return place
            of_pair[where], free[where] = place, True
        pool = pool_of(self.features, *self.told())
        pairs = select(pool, NOTHING, 1, self.method, rng, free)
        if not len(pairs):
            return int(rng.integers(len(left)))
        prompt, *sides = pairs[0]
        return int(of_pair[prompt, min(sides), max(sides)])

    def pair(self, asked):
        """(group, smaller place, larger place) of a comparison; None where its texts are new."""
        found = [self.place.get((asked.prompt, response)) for response in asked.responses]
        if None in found or len({b for b, _ in found}) > 1:
            return None
        return found[0][0], *sorted(k for _, k in found)

    def told(self):
        """(differences (L, C), outcomes (L,)) of all comparisons of texts that are known here."""
        better, worse, outcomes = [], [], []
        for entry in self.session.labels.entries:
            label = parse_label(entry, self.session.knobs.out)
            own = [self.place.get((label.prompt, response)) for response in label.responses]
            if label.kind != "comparison" or None in own:
                continue
            ordered = rankings(label)
            pairs = [pair for order in ordered for pair in combinations(order, 2)]
            for first, second in pairs or combinations(range(len(own)), 2):  # all are alike
                better.append(self.features[own[first]])
                worse.append(self.features[own[second]])
                outcomes.append(1.0 if pairs else 0.5)
        shape = -1, self.features.shape[-1]
        return np.reshape(better, shape) - np.reshape(worse, shape), np.array(outcomes)


def make_asker(session, groups, knobs):
    """The Asker of a session, by the model of the first run. Raises UserError for a file."""
    if knobs.ask == "uniform":
        return Asker(session, groups, knobs.ask, lambda texts: np.zeros((len(texts), 1)))
    if not Path(knobs.runs[0]).is_dir():
        raise UserError(f"--ask {knobs.ask}: needs a model that reads the texts: expected a run, "
                        f"found {knobs.runs[0]}; --ask uniform needs none")  # fmt: skip
    learner = Learner(knobs.runs[0], device=knobs.device)
    print(f"--ask {knobs.ask}: the model of {knobs.runs[0]} reads the texts", flush=True)

    def features(texts):
        return features_of(learner.policy, learner.rows(texts))

    return Asker(session, groups, knobs.ask, features)
