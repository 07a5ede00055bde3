# SPDX-License-Identifier: Apache-2.0
"""Figures of merit as ratios of sums over documents, so that documents can be drawn again: bootstrap intervals.

Letters: D documents (examples of a task, windows of a single text), R draws.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
DRAWS = 2000
PERCENT = 95
LOWER_IS_BETTER = ("bits", "perplexity")
_DRAWS_AT_ONCE = 100
_NEXT_PAIR = 1 << 32
"""Between the seeds of two pairs: no seed that is typed lands on another's."""


@dataclass(frozen=True, slots=True)
class Metric:
    """One figure over a corpus."""

    name: str
    kind: Literal["bits", "perplexity", "share"]
    """bits: the ratio of both sums; perplexity: its exponential; share: a mean of zeros and ones."""
    numerator: tuple[float, ...]
    """Of every document: bits, nats, or 1 where the answer is right."""
    denominator: tuple[float, ...]
    """Of every document: bytes, tokens or words, or 1."""

    @property
    def value(self) -> float:
        """Over all documents."""
        ratio = math.fsum(self.numerator) / math.fsum(self.denominator)
        return _exp(ratio) if self.kind == "perplexity" else ratio

    @property
    def standard_error(self) -> float:
        """Of a mean of zeros and ones as lm-eval has it (sample deviation over the root of n); else NaN."""
        count = len(self.numerator)
        if self.kind != "share" or count < 2:
            return math.nan
        mean = sum(self.numerator) / count
        deviation = math.sqrt(sum((value - mean) ** 2 for value in self.numerator) / (count - 1))
        return deviation / math.sqrt(count)


@dataclass(frozen=True, slots=True)
class Interval:
    """A value with what 95 % of the draws lie between; NaN where there is one document only."""

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether a difference is told apart from none."""
        return self.low > 0 or self.high < 0


def interval(metric: Metric, seed: int = 0) -> Interval:
    """Return a metric with its bootstrap interval over documents."""
    if len(metric.numerator) < 2:
        return Interval(metric.value, math.nan, math.nan)
    drawn_R = _drawn(metric, seed)
    return Interval(metric.value, *_middle(drawn_R))


def difference(one: Metric, other: Metric, seed: int = 0) -> Interval:
    """Return how far `one` lies above `other`; both are drawn from the same documents in every draw (paired)."""
    value = one.value - other.value
    if len(one.numerator) < 2:
        return Interval(value, math.nan, math.nan)
    return Interval(value, *_middle(_drawn(one, seed) - _drawn(other, seed)))


def mean_difference(ones: Sequence[Metric], others: Sequence[Metric], seed: int = 0) -> Interval:
    """Return how far the mean of `ones` lies above that of `others`, pair by pair from the same documents.

    Pairs have documents of their own and are drawn apart from each other.
    """
    pairs = list(zip(ones, others, strict=True))
    value = math.fsum(one.value - other.value for one, other in pairs) / len(pairs)
    if min(len(one.numerator) for one in ones) < 2:
        return Interval(value, math.nan, math.nan)
    drawn_PR = [
        _drawn(one, seed + _NEXT_PAIR * at) - _drawn(other, seed + _NEXT_PAIR * at)
        for at, (one, other) in enumerate(pairs)
    ]
    return Interval(value, *_middle(np.mean(drawn_PR, axis=0)))


def _drawn(metric: Metric, seed: int) -> Floats:
    """Return the metric over R draws of as many documents, with repeats, [R]; equal seeds draw the same ones."""
    sums_D2 = np.array([metric.numerator, metric.denominator]).T
    times_RD = _times(len(sums_D2), seed)
    parts = [times_RD[at : at + _DRAWS_AT_ONCE] @ sums_D2 for at in range(0, DRAWS, _DRAWS_AT_ONCE)]
    numerator_R, denominator_R = np.concatenate(parts).T
    ratio_R: Floats = numerator_R / denominator_R
    return np.exp(ratio_R) if metric.kind == "perplexity" else ratio_R


@lru_cache(maxsize=2)
def _times(count: int, seed: int) -> npt.NDArray[np.uint16]:
    """Return how often each draw has each of `count` documents, [R,D]."""
    generator = np.random.default_rng([seed, count])
    return np.stack([np.bincount(generator.integers(count, size=count), minlength=count) for _ in range(DRAWS)]).astype(
        np.uint16
    )


def _middle(drawn_R: Floats) -> tuple[float, float]:
    tail = (100 - PERCENT) / 2
    low, high = np.percentile(drawn_R, [tail, 100 - tail])
    return float(low), float(high)


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
