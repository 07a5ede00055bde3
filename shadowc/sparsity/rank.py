# SPDX-License-Identifier: Apache-2.0
"""Rankings that know no context: the controls that a learned predictor has to beat.

In: importances of one kind of unit at many positions. Out: one score a unit, the same for every token, used as
constant scores through the same SelectThreshold as the predictor's.

Letters: M positions, Lp predicted layers, H heads, F neurons, N blocks of neurons, U units of either kind per layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from shadowc.sparsity.cluster import block_sums
from shadowc.spec.density import UNIT_KINDS

if TYPE_CHECKING:
    import numpy.typing as npt

    from shadowc.sparsity.importance import ImportanceTrace

    Floats = npt.NDArray[np.float32]


def static_scores(scores_MLU: Floats) -> Floats:
    """Return the mean importance [Lp, U]: the published static ranking, here of both kinds of unit."""
    mean_LU: Floats = scores_MLU.mean(axis=0)
    return mean_LU


def normalised_static_scores(scores_MLU: Floats) -> Floats:
    """Return the mean of the scores after min-max per layer and position, the form in which a predictor learns them.

    Ranked over all layers (global scope), raw means compare layers of different scale; this control separates what
    the normalisation gives from what the context gives.
    """
    return np.stack([mean_of_valid(minmax_rows(scores_MLU[:, layer])) for layer in range(scores_MLU.shape[1])])


def ranking_of(
    trace: ImportanceTrace, orders_LF: npt.NDArray[np.int32], block: int, rest: tuple[Floats, Floats]
) -> tuple[Floats, Floats]:
    """Return the static ranking of a trace of any criterion: heads [Lp, H] and neuron blocks [Lp, N].

    Args:
        trace: many positions, or the single row of a criterion that ranks the units of a whole text.
        orders_LF: which neuron became which, by predicted layer.
        block: neurons per block.
        rest: takes the place of a kind that the criterion has no formula for.
    """
    kinds = trace.meta.get("kinds", UNIT_KINDS)
    pair = zip(UNIT_KINDS, predicted_scores(trace, orders_LF, block), rest, strict=True)
    heads, neurons = (static_scores(scores) if kind in kinds else other for kind, scores, other in pair)
    return heads, neurons


def random_scores(seed: int, heads: tuple[int, int], neurons: tuple[int, int]) -> tuple[Floats, Floats]:
    """Return uniform scores of the shapes [Lp, H] and [Lp, N]."""
    generator = np.random.default_rng(seed)
    return generator.random(heads, dtype=np.float32), generator.random(neurons, dtype=np.float32)


def predicted_scores(trace: ImportanceTrace, orders_LF: npt.NDArray[np.int32], block: int) -> tuple[Floats, Floats]:
    """Return the importances of the predicted layers: heads [M, Lp, H] and sums over neuron blocks [M, Lp, N]."""
    blocks = [block_sums(trace.neurons_MF(layer), orders_LF[layer - 1], block) for layer in range(1, trace.layers)]
    return trace.heads_MLH[:, 1:], np.stack(blocks, axis=1)


def minmax_rows(scores_MN: Floats) -> Floats:
    """Scale each row to 0..1; a row that is constant or not finite becomes NaN, as in the published method."""
    low_M1, high_M1 = scores_MN.min(axis=1, keepdims=True), scores_MN.max(axis=1, keepdims=True)
    usable_M1 = np.isfinite(low_M1) & np.isfinite(high_M1) & (high_M1 > low_M1)
    span_M1 = np.where(usable_M1, high_M1, np.nan) - np.where(usable_M1, low_M1, 0)
    scaled: Floats = ((np.where(usable_M1, scores_MN, 0) - np.where(usable_M1, low_M1, 0)) / span_M1).astype(np.float32)
    return scaled


def mean_of_valid(scores_MN: Floats) -> Floats:
    """Return the mean over the rows without NaN; zeros if there are none."""
    valid_MN = scores_MN[np.isfinite(scores_MN).all(axis=1)]
    mean: Floats = valid_MN.mean(axis=0) if len(valid_MN) else np.zeros(scores_MN.shape[1], np.float32)
    return mean
