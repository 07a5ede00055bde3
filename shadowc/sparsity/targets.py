# SPDX-License-Identifier: Apache-2.0
"""What networks learn of importances: the targets of each kind of labels.

Letters: M positions, Lp predicted layers, U units of a kind per layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from shadowc.sparsity.criteria import criterion_names, find_criterion
from shadowc.sparsity.expected import Expected, shares_of_mean
from shadowc.sparsity.graded import Grades, grade_bounds, grades_of, offsets_of
from shadowc.sparsity.rank import minmax_rows
from shadowc.sparsity.recall import selected

if TYPE_CHECKING:
    import numpy.typing as npt

    from shadowc.sparsity.linear import Objective
    from shadowc.spec.options import TrainOptions

    Floats = npt.NDArray[np.float32]
    Rows = npt.NDArray[np.intp]


def chosen_labels(options: TrainOptions, criterion: str) -> TrainOptions:
    """Return the options with the labels that suit a criterion, where nobody chose any.

    Grades compare layers by raw scores; where these cannot be compared, style shadow+ learns what is expected.
    """
    if options.style != "shadow+" or options.labels is not None:
        return options
    comparable = criterion not in criterion_names() or find_criterion(criterion).compares_layers
    return options if comparable else options.model_copy(update={"labels": "expected"})


def targets_of(raw_MLU: Floats, options: TrainOptions) -> Floats:
    """Return what the networks learn, [M, Lp, U]; NaN in a layer that says nothing about a position.

    Labels "graded" are 0 to 3, see graded.py; "expected" shares of a layer's mean, see expected.py.
    Labels "top" are 1 for the first units of a layer (ties included), but for those of importance zero.
    """
    if options.learned == "graded":
        return grades_of(raw_MLU, grade_bounds(raw_MLU))
    if options.learned == "expected":
        return shares_of_mean(raw_MLU)
    scaled_MLU = layer_minmax(raw_MLU)
    if options.learned == "scores":
        return scaled_MLU
    for layer in range(raw_MLU.shape[1]):  # one at a time: a copy of all scores may be gigabytes
        finite_M1U = np.nan_to_num(raw_MLU[:, layer : layer + 1])
        top_MU = (selected(finite_M1U, options.top, "local") & (finite_M1U > 0))[:, 0]
        scaled_MLU[:, layer] = np.where(np.isnan(scaled_MLU[:, layer]), np.nan, top_MU)
    return scaled_MLU


def layer_minmax(scores_MLU: Floats) -> Floats:
    """Scale to 0..1 per position and layer.

    A row that is constant or not finite becomes NaN, and its position is dropped from training, as published. A layer
    whose rows are all like that (it never does anything) would drop every position; it becomes zeros instead.
    """
    scaled_MLU = np.empty(scores_MLU.shape, np.float32)
    for layer in range(scores_MLU.shape[1]):
        scaled_MU = minmax_rows(scores_MLU[:, layer])
        never = np.isnan(scaled_MU).any(axis=1).all()
        scaled_MLU[:, layer] = 0 if never else scaled_MU
    return scaled_MLU


def objective_of(targets_MLU: Floats, rows: Rows, options: TrainOptions) -> Objective | None:
    """Return what the linear networks of style shadow+ learn from these positions; None: another style."""
    if options.style != "shadow+":
        return None
    return Expected() if options.learned == "expected" else Grades(offsets_of(targets_MLU, rows))
