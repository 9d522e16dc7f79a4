"""Ridge regression on a bag of words: what a reward model has to beat."""

import re
from collections import Counter
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch


def ridge_scores(train, test, strength=10.0, iterations=60):
    """Scores (N,) of the test items, by what words say of the mean ratings of the train items."""
    train_words = [words_of(text) for text in train.responses]
    test_words = [words_of(text) for text in test.responses]
    counts = Counter(chain.from_iterable(train_words))
    known = [word for word, n in counts.items() if n > 1]
    column = {word: i for i, word in enumerate(known)}
    X = Words.of(train_words, column)  # (N, D)
    y = np.array([ratings.mean() for ratings in train.ratings])

    def normal(w):
        """(X'X + strength I) w"""
        return X.back(X.times(w)) + strength * w

    weights = conjugate_gradients(normal, X.back(y - y.mean()), iterations)
    scores = Words.of(test_words, column).times(weights)
    return torch.from_numpy(scores)


def words_of(text):
    """The words and signs of a text, and the pairs of neighbours among them."""
    words = re.findall(r"[a-z0-9']+|[^\sa-z0-9]", text.lower())
    return {*words, *zip(words, words[1:], strict=False)}


class Words(NamedTuple):
    """Which of D words each of N texts has: a matrix of 0 and 1, as the places of its ones."""

    row: np.ndarray
    column: np.ndarray
    shape: tuple

    @classmethod
    def of(cls, texts, column):
        """texts: sets of words; column: {word: its column}, others are left out."""
        places = []
        for row, words in enumerate(texts):
            places += [(row, column[word]) for word in words if word in column]
        places = np.array(places, dtype=int).reshape(-1, 2)
        return cls(places[:, 0], places[:, 1], (len(texts), len(column)))

    def times(self, w):
        """X w, of (D,): (N,)."""
        return np.bincount(self.row, w[self.column], self.shape[0])

    def back(self, v):
        """X' v, of (N,): (D,)."""
        return np.bincount(self.column, v[self.row], self.shape[1])


def conjugate_gradients(matrix, target, iterations):
    """x with matrix(x) = target, of a symmetric positive definite matrix as a function of (D,)."""
    x = np.zeros(len(target))
    residual = target
    direction = residual.copy()
    for _ in range(iterations):
        image = matrix(direction)
        size = residual @ residual
        if size < 1e-12:
            break
        step = size / (direction @ image)
        x = x + step * direction
        residual = residual - step * image
        direction = residual + (residual @ residual) / size * direction
    return x
