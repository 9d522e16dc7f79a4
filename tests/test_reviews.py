"""The real reviews, where they can be had: counts and figures known from elsewhere.

They come from Hutto and Gilbert 2014 and from a first look.
"""

import numpy as np
import pytest
import torch

from minirlhf import data
from minirlhf.engine.cli import UserError
from minirlhf.look.ridge import ridge_scores
from minirlhf.reward import pair_accuracy


@pytest.fixture(scope="module")
def reviews():
    try:
        return data.load_feedback("reviews")
    except UserError as e:
        pytest.skip(str(e))


def test_counts(reviews):
    train, test = reviews.train, reviews.test
    assert (len(train), len(test), len(reviews.more_text)) == (9545, 1060, 13098)
    ratings = [r for items in (train, test) for r in items.ratings]
    assert {min(map(len, ratings)), max(map(len, ratings))} == {15, 29}
    assert min(r.min() for r in ratings) == -4 and max(r.max() for r in ratings) == 4
    first = train.responses + test.responses
    at = first.index("Effective but too tepid biopic")
    given = [-1, 0, -1, 0, -1, -1, -1, -1, 0, -2, 1, 1, -1, -1, -1]
    assert (train.ratings + test.ratings)[at].tolist() == given


def test_the_split_is_the_documented_one(reviews):
    ids = [int(w.split()[-1]) for w in reviews.train.where + reviews.test.where]
    order = np.random.default_rng(0).permutation(len(ids))
    in_order = sorted(ids)
    assert ids == [in_order[i] for i in order]


def test_reference_accuracies(reviews):
    pairs, gaps = reviews.test.comparisons(20_000, seed=1)
    assert len(pairs) == 20_000 and gaps.min() > 0
    assert data.human_ceiling(reviews.test, pairs) == pytest.approx(0.834, abs=0.004)
    ridge = ridge_scores(reviews.train, reviews.test)
    accuracy = pair_accuracy(ridge, torch.as_tensor(pairs)).item()
    assert accuracy == pytest.approx(0.7534, abs=0.002)  # by a dense solver


def test_vader_accuracy(reviews):
    vader = pytest.importorskip("vaderSentiment.vaderSentiment").SentimentIntensityAnalyzer()
    pairs, _ = reviews.test.comparisons(20_000, seed=1)
    texts = reviews.test.responses
    scores = torch.tensor([vader.polarity_scores(text)["compound"] for text in texts])
    strictly = (scores[pairs[:, 0]] > scores[pairs[:, 1]]).float().mean().item()
    accuracy = pair_accuracy(scores, torch.as_tensor(pairs)).item()
    assert strictly <= accuracy
    assert accuracy == pytest.approx(0.654, abs=0.02)
