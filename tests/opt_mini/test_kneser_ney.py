# SPDX-License-Identifier: Apache-2.0
"""Kneser-Ney: a distribution in every context, equal to the textbook formula, better than unigrams."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray

from kneser_ney import KneserNey

VOCAB = 10


def _stream() -> NDArray[np.int64]:
    rng = np.random.default_rng(0)
    ids = [2]
    for _ in range(80):
        walk = [int(rng.integers(3, 9))]
        while len(walk) < rng.integers(4, 20):
            walk.append(3 + (walk[-1] - 3 + int(rng.integers(0, 3))) % 6)
        ids += [*walk, 2]
    return np.array(ids)


@pytest.mark.parametrize("order", [1, 2, 3, 5])
@pytest.mark.parametrize("context", [[2], [2, 5], [5, 6, 7], [5, 6, 7, 8], [9, 9, 9, 9], [4, 9, 4, 4], "tail"])
def test_probabilities_sum_to_one(order: int, context: list[int] | str) -> None:
    stream = _stream()
    model = KneserNey(stream, VOCAB, order)
    ids = [int(i) for i in stream[-4:]] if context == "tail" else [int(i) for i in context]
    given = [float(model.probabilities(np.array([*ids, last]))[-1]) for last in range(VOCAB)]
    assert min(given) > 0
    assert abs(sum(given) - 1) < 1e-12


def test_bigram_equals_the_formula_counted_by_hand() -> None:
    stream = [int(i) for i in _stream()]
    model = KneserNey(np.array(stream), VOCAB, order=2)
    one, two = (level.discounts for level in model.levels)
    pairs = Counter(pairwise(stream))
    left = Counter(last for _, last in pairs)
    for context in range(3, 9):
        after = {last: count for (first, last), count in pairs.items() if first == context}
        for token in range(VOCAB):
            rest = sum(one[min(c, 3)] for c in left.values()) / sum(left.values())
            unigram = (left[token] - one[min(left[token], 3)]) / sum(left.values()) + rest / VOCAB
            count = after.get(token, 0)
            kept = sum(two[min(c, 3)] for c in after.values()) / sum(after.values())
            expected = (count - two[min(count, 3)]) / sum(after.values()) + kept * unigram
            assert model.probabilities(np.array([context, token]))[0] == pytest.approx(expected, abs=1e-12)


def test_five_grams_beat_unigrams_on_text_not_seen() -> None:
    stream = _stream()
    train, other = stream[: len(stream) * 3 // 4], stream[len(stream) * 3 // 4 :]
    bits = {order: -np.log2(KneserNey(train, VOCAB, order).probabilities(other)).mean() for order in (1, 5)}
    assert bits[5] < bits[1] - 0.3
