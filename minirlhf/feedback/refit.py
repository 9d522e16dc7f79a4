"""A reward of one's own, from a few labels in a moment: a new head on a base model that stays as
it is.

The score of a response is a sum over its tokens, w . h of each token's hidden state h. So what
every option of a label is worth is linear in w, and the likeliest w under a normal prior
(Jeon et al. 2020 for the likelihood; MacKay 1992, sec. 2, for the prior) is found in a few dozen
steps of L-BFGS, without another pass through the model. What people care for may be a direction in
which texts differ much (length) or little (a word), so of several priors the one is taken under
which labels that were left out are likeliest.

Left out: training of the base model's own weights (train_rm.py --data LABELS does that).
"""

import json
import time
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from minirlhf import data, reward
from minirlhf.data.split import connected
from minirlhf.engine import machine
from minirlhf.engine.cli import UserError
from minirlhf.engine.files import atomic_write
from minirlhf.engine.place import MARK, expect_place
from minirlhf.engine.rows import Rows, pad_rows
from minirlhf.engine.weights import model_directory
from minirlhf.feedback.ground import ground, texts_of
from minirlhf.feedback.mixture import Mixture
from minirlhf.feedback.preferring import texts_of as texts_of_rows
from minirlhf.gpt import RewardModel
from minirlhf.look.policies import prompt_rows
from minirlhf.sampling import generate
from minirlhf.tokenizer import load_base

VARIANCE = 3.0  # of a text's score, as a prior on w expects it
FOLDS = 4  # parts of the labels, each left out once to choose a prior
SIZES = (25, 50, 100, 200, 400, 800, 1600, 3200, 6400)  # labels, of the curve of accuracy
LENGTH = 24  # most tokens of a response


class Fit(NamedTuple):
    accuracy_by_labels: list  # (labels, accuracy on comparisons held out; of them a fifth is)
    disagreements: list  # indices of labels against which the model leans, the strongest first
    seconds: float


class Learner:
    """The reward of a person, learned from labels of texts that a run's model writes.

    run: a run, a directory or a hub name. Raises UserError where there is no language model.
    """

    def __init__(self, run, device="cpu"):
        device = machine.pick_device(device)
        self.policy, self.tokenizer = load_base(model_directory(run), device)
        self.policy.eval()
        self.run, self.device = str(run), device
        self.model = RewardModel.from_base(self.policy, level="token").to(device).eval()
        torch.nn.init.zeros_(self.model.score.weight)
        torch.optim.LBFGS([torch.zeros(1, requires_grad=True)])  # the first one imports for seconds
        self.labels = 0
        self.read = {}  # (prompt, response): sums of its hidden states
        self.written = {}  # prompts: samples to scale scores by

    def fit(self, labels, progress=None):
        """Makes the model the likeliest one under the labels, scaled to mean 0 and standard
        deviation 1 on samples of the policy: a Fit. progress(done, total) is told how far it is.

        Raises UserError where no label says anything of the reward.
        """
        began = time.perf_counter()
        report = progress or (lambda done, total: None)
        told = [n for n, label in enumerate(labels) if label.kind not in ("trace", "similarity")]
        if not told:
            raise UserError("no label yet that says which text is better")
        texts = [set(zip(repeat(labels[n].prompt), labels[n].responses)) for n in told]
        units = connected(texts)  # labels that share a text stay together
        held = [told[k] for unit in units[4::5] for k in unit]
        learned = [n for n in told if n not in set(held)]
        sizes = [size for size in SIZES if size < len(learned)] + [len(learned)]
        examples = self.examples([labels[n] for n in told])
        place = {n: k for k, n in enumerate(told)}
        learned, held = ([place[n] for n in some] for some in (learned, held))
        total = len(examples.priors) + len(sizes) + 1
        tell = partial(report, total=total)
        prior = likeliest_prior(examples, learned, tell)
        curve = []
        for step, size in enumerate(sizes):
            w = likeliest(examples, learned[:size], prior)
            right = agreement(examples, w, held)
            if len(right):
                curve.append((size, reward.share_positive(right).item()))
            tell(len(examples.priors) + step + 1)
        w = likeliest(examples, range(len(told)), prior)
        self.take(w, [labels[n].prompt for n in told])
        self.labels = len(labels)
        against = []
        for n in told:
            margins = agreement(examples, w, [place[n]])
            if len(margins) and margins.min() < 0:
                against.append((margins.min().item(), n))
        report(total, total)
        return Fit(curve, [n for _, n in sorted(against)], time.perf_counter() - began)

    @torch.no_grad()
    def examples(self, labels):
        """The Examples of labels."""
        texts, where = {}, []
        for label in labels:
            for response in label.responses:
                texts.setdefault((label.prompt, response), len(texts))
            where.append([texts[label.prompt, response] for response in label.responses])
        rows, sums = self.rows(list(texts)), self.sums(list(texts))
        whole = sums[:, -1]
        placed = [
            label._replace(items=tuple(own)) for label, own in zip(labels, where, strict=True)
        ]
        priors = priors_of(sums, whole)
        return Examples(placed, texts_of(rows, self.tokenizer), sums, priors)

    def rows(self, texts):
        """Rows of (prompt, response); too long ones lose a prompt's left end, then text."""
        given = [(prompt, response, f"text {n}") for n, (prompt, response) in enumerate(texts)]
        n_ctx = self.model.config.n_ctx
        return Rows(*data.encode(given, self.tokenizer, n_ctx, "truncate"), self.tokenizer.pad,
                    self.device)  # fmt: skip

    @torch.no_grad()
    def sums(self, texts):
        """(N, T, C): at each place of a text's row the sum of the hidden states of the response up
        to there, behind the row's end that of all of it. Each text is read but once."""
        new = [text for text in texts if text not in self.read]
        for start in range(0, len(new), 64):
            some = new[start : start + 64]
            rows = self.rows(some)
            tokens, lengths = pad_rows(rows.tokens, self.tokenizer.pad, self.device)
            hidden = self.model.transformer.hidden(tokens, lengths=lengths).float()
            place = torch.arange(tokens.shape[1], device=self.device)
            p = torch.as_tensor(rows.prompt_lengths, device=self.device)
            inside = (place >= p[:, None]) & (place < lengths[:, None])
            summed = (hidden * inside[..., None]).cumsum(1)
            for text, own, length in zip(some, summed, lengths.tolist(), strict=True):
                self.read[text] = own[:length].clone()
        found = [self.read[text] for text in texts]
        whole = pad_sequence(found, batch_first=True)
        for row, own in zip(whole, found, strict=True):
            row[len(own) :] = own[-1]
        return whole

    @torch.no_grad()
    def take(self, w, prompts):
        """Gives the model the head w, normalised."""
        self.model.score.weight.copy_(w[None])
        self.model.shift = 0.0
        few = sorted(set(prompts))[:256]
        few *= -(-256 // len(few))
        if tuple(few) not in self.written:
            texts = list(zip(few, self.sample(few, seed=1), strict=True))
            self.written = {tuple(few): self.sums(texts)[:, -1]}
        mean, std = reward.normalization(self.written[tuple(few)] @ w)
        if std:
            self.model.normalize(mean, std)

    @torch.no_grad()
    def score(self, prompts, responses):
        """What the model thinks of responses to prompts: floats."""
        if not len(prompts):
            return []
        rows = self.rows(list(zip(prompts, responses, strict=True)))
        scores = rows.by_parts(lambda tokens, p, r: self.model(tokens, p + r, p).float(), 128)
        return scores.tolist()

    @torch.no_grad()
    def sample(self, prompts, seed=0):
        """A response of the policy to each prompt."""
        eos, pad = self.tokenizer.eos, self.tokenizer.pad
        asked, _ = prompt_rows(prompts, self.tokenizer, self.policy.config.n_ctx - LENGTH)
        ends = {"eos": eos, "pad": pad, "generator": torch.Generator().manual_seed(seed)}
        found = []
        for start in range(0, len(asked), 256):
            batch = pad_rows(asked[start : start + 256], pad, self.device)
            tokens, p, r, _ = generate(self.policy, *batch, LENGTH, **ends)
            found += texts_of_rows(self.tokenizer, tokens, p, r)[1]
        return found

    def write(self, prompts, n=16, progress=None, seed=0):
        """The best of n responses of the policy to each prompt, by what the model thinks now."""
        best = list(self.sample(prompts, seed))
        top = self.score(prompts, best)
        for k in range(1, n):
            more = self.sample(prompts, seed + k)
            for i, value in enumerate(self.score(prompts, more)):
                if value > top[i]:
                    best[i], top[i] = more[i], value
            if progress:
                progress(k + 1, n)
        return best

    def save(self, out):
        """Leaves a run with the reward model in `out`, for train_ppo.py --reward. Raises UserError
        where something else lies there."""
        expect_place(out)
        out = Path(out)
        self.model.save_pretrained(out / "model", self.tokenizer)
        about = {MARK: "rm", "out": str(out), "seed": 0, "data": "labels", "level": "token"}
        about |= {"labels": self.labels, "base": self.run}
        with atomic_write(out / "config.json") as tmp:
            Path(tmp).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


class Examples(NamedTuple):
    """Labels, and the sums of hidden states of the texts that they speak of."""

    labels: list
    texts: object
    sums: torch.Tensor  # (N, T, C)
    priors: list  # factors L (C, C) of covariances L L' that w may have

    def of(self, chosen):
        """(labels, {item: row}, Texts, sums (n, T, C)) of some labels."""
        labels = [self.labels[n] for n in chosen]
        index = list(dict.fromkeys(i for label in labels for i in label.items))
        row_of = {item: row for row, item in enumerate(index)}
        return labels, row_of, self.texts.take(index), self.sums[index]


def priors_of(sums, whole):
    """Factors of covariances of w, each scaled to a VARIANCE of w . whole.

    The first knows no direction; under the others w . h varies alike in all directions in which
    tokens differ, or texts. sums (N, T, C); whole (N, C).
    """
    steps = sums.diff(dim=1).flatten(0, 1)
    tokens = steps[steps.square().sum(1) > 0]
    shapes = [torch.eye(whole.shape[1], device=whole.device, dtype=torch.float64)]
    for sample in (tokens, whole):
        spread = covariance(sample)
        shapes.append(torch.linalg.inv(spread + 1e-3 * spread.diagonal().mean() * shapes[0]))
    factors, about = [], covariance(whole)
    for shape in shapes:
        expected = (shape * about).sum().clamp_min(1e-12)  # of w . whole under that covariance
        factors.append(torch.linalg.cholesky(shape * VARIANCE / expected).to(whole))
    return factors


def covariance(x):
    x = x.double() - x.double().mean(0)
    return x.T @ x / len(x)


def likeliest_prior(examples, chosen, tell):
    """The factor under which the chosen labels are likeliest, each learned from those of other
    folds."""
    losses = np.zeros(len(examples.priors))
    for k, prior in enumerate(examples.priors):
        for fold in range(FOLDS if len(chosen) >= FOLDS else 0):
            rest = [n for i, n in enumerate(chosen) if i % FOLDS != fold]
            w = likeliest(examples, rest, prior)
            losses[k] += float(unlikelihood(examples, chosen[fold::FOLDS], w))
        tell(k + 1)
    return examples.priors[int(losses.argmin())]


def likeliest(examples, chosen, prior):
    """(C,): w = L v of the largest posterior under the chosen labels, v standard normal; 0 without
    any."""
    v = torch.zeros(len(prior), requires_grad=True, device=prior.device)
    if not len(chosen):
        return v.detach()
    nll, mixture = nll_of(examples, chosen)
    parameters = [v, *mixture.parameters()]
    optimizer = torch.optim.LBFGS(parameters, max_iter=50, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        total = nll(prior @ v) + v.square().sum() / 2
        total.backward()
        return total

    optimizer.step(loss)
    return (prior @ v).detach()


def nll_of(examples, chosen):
    """(w -> the sum of -log P of the chosen labels; what they are read with, to be learned)."""
    labels, row_of, texts, sums = examples.of(chosen)
    mixture = Mixture(labels, sums.shape[-1]).to(sums.device)
    groups = ground(labels, row_of, texts, sums.device)

    def nll(w):
        said = mixture.nll(groups, sums @ w, sums[:, -1])
        return sum(losses.sum() for losses in said.values())

    return nll, mixture


@torch.no_grad()
def unlikelihood(examples, chosen, w):
    return nll_of(examples, chosen)[0](w)


@torch.no_grad()
def agreement(examples, w, chosen):
    """(P,): by how much w prefers what the chosen labels prefer, for each pair that they order."""
    if not len(chosen):
        return torch.zeros(0)
    labels, row_of, _, sums = examples.of(chosen)
    scores = sums[:, -1] @ w
    found = []
    for label in labels:
        for order in data.rankings(label):
            rows = [row_of[label.items[i]] for i in order]
            pairs = [(a, b) for k, a in enumerate(rows) for b in rows[k + 1 :]]
            found += [scores[a] - scores[b] for a, b in pairs]
    rated = [label for label in labels if "level" in label.said]
    for k, one in enumerate(rated):
        for other in rated[k + 1 :]:
            ahead = np.sign(one.said["level"] - other.said["level"])
            if ahead and one.said["of"] == other.said["of"]:
                gap = scores[row_of[one.items[0]]] - scores[row_of[other.items[0]]]
                found.append(float(ahead) * gap)
    return torch.stack(found) if found else torch.zeros(0)
