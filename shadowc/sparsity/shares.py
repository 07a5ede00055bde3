# SPDX-License-Identifier: Apache-2.0
"""Shares of one budget: which share of each layer's units is kept when a share of all layers' units is asked for.

In: scores of calibration tokens that can be compared between layers. Out: a table [GRID + 1, Lp]: row i is for density
i / GRID. A predictor that knows one layer at a time cannot rank all layers together; with the table every layer ranks
its own units and keeps as many as it had on average when all were ranked together on the calibration text.

Letters: M positions, Lp predicted layers, U units of a kind per layer, B rows of a batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from shadowc.spec.program import GRID

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch import Tensor

    Floats = npt.NDArray[np.float32]


def shares_of(scores_MLU: Floats) -> Floats:
    """Return the table [GRID + 1, Lp] by the scores of all layers together; its rows grow, from zeros to ones."""
    flat_LN = np.sort(scores_MLU.swapaxes(0, 1).reshape(scores_MLU.shape[1], -1), axis=1)
    pool = np.sort(flat_LN, axis=None)
    table = np.empty((GRID + 1, len(flat_LN)), np.float32)
    for step in range(1, GRID):
        threshold = pool[round(len(pool) * (1 - step / GRID))]
        below_L = [np.searchsorted(layer_N, threshold, side="left") for layer_N in flat_LN]
        table[step] = 1 - np.array(below_L) / flat_LN.shape[1]
    table[0], table[GRID] = 0, 1
    return table


def even_shares(layers: int) -> Floats:
    """Return the table that gives every layer what is asked for."""
    return np.repeat(np.arange(GRID + 1, dtype=np.float32)[:, None] / np.float32(GRID), layers, axis=1)


def problems(name: str, table: Floats, layers: int) -> list[str]:
    """Return what is wrong with a table."""
    if table.shape != (GRID + 1, layers):
        return [f"{name} has shape {list(table.shape)}, expected {[GRID + 1, layers]}"]
    grows = bool((np.diff(table, axis=0) >= 0).all())
    if not (grows and bool((table[0] == 0).all()) and bool((table[GRID] == 1).all())):
        return [f"{name} does not grow from 0 to 1 in every layer"]
    return []


def layer_density(table: Tensor, density_B: Tensor) -> Tensor:
    """Return the shares [B, Lp] of the layers, exactly as the engine takes them; NaN and more than 1 mean 1."""
    import torch

    row_B = torch.where(density_B < 1, density_B, 1.0).clamp_min(0) * GRID
    return table[row_B.round().to(torch.int64)]
