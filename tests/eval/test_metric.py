# SPDX-License-Identifier: Apache-2.0
"""Intervals from documents drawn again, and differences between methods on the same documents."""

from __future__ import annotations

import math

import numpy as np
import pytest

from shadowc.eval.metric import Metric, difference, interval


def bits(values: np.ndarray, sizes: np.ndarray | None = None) -> Metric:
    sizes = np.ones(len(values)) if sizes is None else sizes
    return Metric("bits_per_byte", "bits", tuple(values * sizes), tuple(sizes))


def test_a_value_is_the_ratio_of_sums_and_long_documents_count_more() -> None:
    metric = bits(np.array([1.0, 3.0]), np.array([300.0, 100.0]))
    assert metric.value == 1.5
    perplexity = Metric("token_perplexity", "perplexity", (2.0, 4.0), (1.0, 1.0))
    assert perplexity.value == pytest.approx(math.exp(3.0))


def test_the_interval_of_a_mean_is_that_of_the_normal_law() -> None:
    values = np.random.default_rng(0).normal(2.0, 0.5, 400)
    found = interval(bits(values))
    error = values.std(ddof=1) / math.sqrt(400)
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - 1.96 * error, abs=0.2 * error)
    assert found.high == pytest.approx(values.mean() + 1.96 * error, abs=0.2 * error)


def test_a_paired_difference_is_told_apart_where_both_intervals_overlap() -> None:
    rng = np.random.default_rng(1)
    hard = rng.normal(2.0, 0.5, 60)  # documents differ much, methods by a little everywhere
    one, other = bits(hard), bits(hard + rng.normal(0.02, 0.01, 60))
    assert interval(one).high > interval(other).low
    found = difference(other, one)
    assert found.excludes_zero
    assert found.low < 0.02 < found.high
    assert not difference(bits(hard), bits(rng.permutation(hard))).excludes_zero


def test_pairs_that_are_drawn_apart_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from shadowc.eval import metric

    hard = np.random.default_rng(1).normal(2.0, 0.5, 60)
    one, other = bits(hard), bits(hard + 0.02)
    assert difference(other, one).excludes_zero
    seeds = iter(range(100))
    real = metric._drawn
    monkeypatch.setattr(metric, "_drawn", lambda of, seed: real(of, next(seeds)))
    assert not difference(other, one).excludes_zero


def test_equal_seeds_draw_the_same_documents() -> None:
    metric = bits(np.random.default_rng(2).normal(2.0, 0.5, 50))
    assert interval(metric, 3) == interval(metric, 3)
    assert interval(metric, 3) != interval(metric, 4)


def test_one_document_has_no_interval() -> None:
    found = interval(bits(np.array([2.0])))
    assert found.value == 2.0
    assert math.isnan(found.low)
    assert not found.excludes_zero
