# SPDX-License-Identifier: Apache-2.0
"""Spearman's rank correlation with ties, within groups, and its mean over texts with a bootstrap interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    Floats = npt.NDArray[np.float64]

RESAMPLES = 1000
LEVEL = 0.95


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over rankings, and where it lies with a chance of 95 % if other texts had been taken."""

    mean: float
    low: float
    high: float
    rankings: int
    """How many there were."""
    constant: float
    """Share of them in which the scores did not vary at all; they count as 0."""

    @staticmethod
    def none() -> Interval:
        """Return what stands where there is no ranking."""
        return Interval(float("nan"), float("nan"), float("nan"), 0, 0.0)

    @staticmethod
    def of(per_text: Sequence[Sequence[float | None]], seed: int) -> Interval:
        """Return mean and interval of correlations; whole texts are drawn again, with all their rankings.

        Args:
            per_text: correlations; NaN: the scores did not vary; None: the truth did not, left out.
            seed: of the draws.
        """
        texts = [np.array([value for value in text if value is not None]) for text in per_text]
        texts = [text for text in texts if len(text)]
        if not texts:
            return Interval.none()
        constant = float(np.isnan(np.concatenate(texts)).mean())
        sums = np.array([np.nan_to_num(text).sum() for text in texts])
        sizes = np.array([len(text) for text in texts])
        drawn = np.random.default_rng(seed).integers(len(texts), size=(RESAMPLES, len(texts)))
        means = sums[drawn].sum(1) / sizes[drawn].sum(1)
        low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return Interval(float(sums.sum() / sizes.sum()), float(low), float(high), int(sizes.sum()), constant)


def spearman(scores_U: Floats, truth_U: Floats) -> float | None:
    """Return Pearson's correlation of the ranks, ties sharing their mean rank.

    Returns:
        NaN if the scores do not vary, None if the truth does not.
    """
    ranked_scores, ranked_truth = ranks(scores_U), ranks(truth_U)
    if np.ptp(ranked_truth) == 0:
        return None
    if np.ptp(ranked_scores) == 0:
        return float("nan")
    return float(np.corrcoef(ranked_scores, ranked_truth)[0, 1])


def within_groups(scores_U: Floats, truth_U: Floats, group_U: npt.NDArray[np.int64]) -> float | None:
    """Return the mean of the correlations within groups; groups in which the truth does not vary are left out.

    Returns:
        As `spearman`; groups in which only the scores do not vary count as 0.
    """
    found = [spearman(scores_U[group_U == group], truth_U[group_U == group]) for group in np.unique(group_U)]
    known = [value for value in found if value is not None]
    if not known:
        return None
    return float("nan") if np.isnan(known).all() else float(np.nan_to_num(known).mean())


def ranks(values_U: Floats) -> Floats:
    """Return ranks from 0 on; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(values_U, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    mean: Floats = last - (counts + 1) / 2
    return mean[inverse]
