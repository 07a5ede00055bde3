# SPDX-License-Identifier: Apache-2.0
"""Rankings that know no context: the controls that a learned predictor has to beat.

In: an importance trace. Out: head scores [Lp, H] and neuron scores [Lp, N], the same for every token, used as
constant scores through the same SelectThreshold as the predictor's.

Letters: M positions, Lp predicted layers, H heads, F neurons, N blocks of neurons.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from shadowc.sparsity.cluster import block_sums

if TYPE_CHECKING:
    import numpy.typing as npt

    from shadowc.sparsity.importance import ImportanceTrace

    Floats = npt.NDArray[np.float32]

CONTROLS = ("static", "normalised", "random")
"""Raw mean; mean of per-layer min-max scores; chance."""


def static_scores(
    trace: ImportanceTrace,
    orders: npt.NDArray[np.int32] | None = None,
    block: int = 1,
    rows: npt.NDArray[np.intp] | None = None,
) -> tuple[Floats, Floats]:
    """Return the mean importance: the published static ranking, here of both kinds of unit.

    Args:
        trace: the importances.
        orders: neuron orders [Lp, F] of the predictor to compare with; None: as in the checkpoint.
        block: neurons per block.
        rows: positions to average; None: all.
    """
    heads_MLH, neurons = predicted_scores(trace, orders, block, rows)
    return heads_MLH.mean(axis=0), np.stack([layer_MN.mean(axis=0) for layer_MN in neurons])


def normalised_static_scores(
    trace: ImportanceTrace,
    orders: npt.NDArray[np.int32] | None = None,
    block: int = 1,
    rows: npt.NDArray[np.intp] | None = None,
) -> tuple[Floats, Floats]:
    """Return the mean of the scores after min-max per layer and position, the form in which a predictor learns them.

    Ranked over all layers (global scope), raw means compare layers of different scale; this control separates what
    the normalisation gives from what the context gives.
    """
    heads_MLH, neurons = predicted_scores(trace, orders, block, rows)
    heads_LH = np.stack([mean_of_valid(minmax_rows(heads_MLH[:, layer])) for layer in range(heads_MLH.shape[1])])
    return heads_LH, np.stack([mean_of_valid(minmax_rows(layer_MN)) for layer_MN in neurons])


def random_scores(seed: int, heads: tuple[int, int], neurons: tuple[int, int]) -> tuple[Floats, Floats]:
    """Return uniform scores of the shapes [Lp, H] and [Lp, N]."""
    generator = np.random.default_rng(seed)
    return generator.random(heads, dtype=np.float32), generator.random(neurons, dtype=np.float32)


def predicted_scores(
    trace: ImportanceTrace,
    orders: npt.NDArray[np.int32] | None,
    block: int,
    rows: npt.NDArray[np.intp] | None = None,
) -> tuple[Floats, list[Floats]]:
    """Return the importances of the predicted layers: heads [M, Lp, H], and block sums [M, N] per layer."""
    chosen = np.arange(len(trace.heads_MLH)) if rows is None else rows
    if orders is None:
        orders = np.tile(np.arange(trace.neurons, dtype=np.int32), (trace.layers - 1, 1))
    neurons = [
        block_sums(trace.neurons_MF(layer)[chosen], orders[layer - 1], block) for layer in range(1, trace.layers)
    ]
    return trace.heads_MLH[chosen, 1:], neurons


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
