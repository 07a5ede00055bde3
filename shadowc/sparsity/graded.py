# SPDX-License-Identifier: Apache-2.0
"""Graded labels, of style shadow+: in how many of three nested tops a unit is, and what a score says about it.

The tops are of all layers together. One score answers all three questions (ordinal regression): the probability of
being in top k is sigmoid(score - offset k), with offsets that all layers share, so scores of different layers can be
compared.

Letters: M positions, O units, G = 3 grades.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch import Tensor

    Floats = npt.NDArray[np.float32]
    Rows = npt.NDArray[np.intp]

TOPS = (0.15, 0.4, 0.8)
"""Nested tops as shares of the units that mattered at all (importance above zero), the first the most important."""
LEAST_RATE = 1e-3
LEAST_SPREADS = 0.05, 0.3
"""Of a unit's grade: the least that weighs it beside others, and the least that its slope is divided by."""


def grade_bounds(raw_MLU: Floats) -> Floats:
    """Return the importances [G] at which the tops of all layers together begin, the lowest first."""
    finite_M = np.asarray(np.isfinite(raw_MLU).all(axis=(1, 2)))
    positive = raw_MLU[(raw_MLU > 0) & finite_M[:, None, None]]  # the one copy: scores may be gigabytes
    if not len(positive):
        return np.ones(len(TOPS), np.float32)
    bounds = np.quantile(positive, [1 - top for top in sorted(TOPS, reverse=True)], overwrite_input=True)
    return bounds.astype(np.float32)


def grades_of(raw: Floats, bounds_G: Floats) -> Floats:
    """Return how many of the bounds an importance reaches, 0 to G; NaN stays NaN."""
    grades = np.zeros(raw.shape, np.float32)
    for bound in bounds_G:
        grades += raw >= bound
    grades[~np.isfinite(raw)] = np.nan
    return grades


def offsets_of(grades_MLU: Floats, rows: Rows | None = None) -> Floats:
    """Return what scores are compared with, [G], from how often each grade is reached; the middle one is 0.

    `rows` are the positions that count; None: all.
    """
    rows = np.arange(len(grades_MLU)) if rows is None else rows
    layers = range(grades_MLU.shape[1])
    total = len(rows) * grades_MLU[0].size
    counts = [sum(np.count_nonzero(grades_MLU[rows, layer] > grade) for layer in layers) for grade in range(len(TOPS))]
    rates = [count / total for count in counts]
    odds = [np.log(rate / (1 - rate)) for rate in np.clip(rates, LEAST_RATE, 1 - LEAST_RATE)]
    return np.array([odds[len(odds) // 2] - one for one in odds], np.float32)


@dataclass(frozen=True, slots=True)
class Grades:
    """Scores are log odds, see linear.py; targets are grades."""

    offsets_G: Floats  # noqa: N815 - the field carries its shape letter

    def constant(self, targets_MO: Tensor) -> Tensor:
        """Return the odds of the middle top."""
        rate_O = (targets_MO > len(TOPS) // 2).float().mean(0).clamp(LEAST_RATE, 1 - LEAST_RATE)
        return (rate_O / (1 - rate_O)).log()

    def loss(self, scores_MO: Tensor, targets_MO: Tensor) -> Tensor:
        """Return the mean cross entropy in nats over positions, units and grades."""
        from torch.nn import functional as F

        offsets_G = scores_MO.new_tensor(self.offsets_G)
        losses = [
            F.binary_cross_entropy_with_logits(scores_MO - offset, (targets_MO > grade).float())
            for grade, offset in enumerate(offsets_G)
        ]
        return sum(losses) / len(losses)  # type: ignore[return-value]

    def spreads(self, targets_MO: Tensor) -> tuple[Tensor, Tensor]:
        """Return the spread of the grades, twice: divided by both, a slope is divided by the variance.

        A grade's slope becomes one of log odds by the variance of the grade, the first step of a logistic regression.
        """
        weigh, divide = LEAST_SPREADS
        spread_O = targets_MO.double().std(0).clamp_min(weigh)
        return spread_O, spread_O.clamp_min(divide)
