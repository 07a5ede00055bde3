# SPDX-License-Identifier: Apache-2.0
"""How well scores find the truly important units of held-out text, and how much importance they capture.

In: true importances [M, Lp, U] and scores by method ([M, Lp, U], or [Lp, U] for a context-free ranking). Every
method selects through the same threshold as the engine does. Two numbers per scope and density:

- recall: the share of the truly important units that were selected. Truly important are the units that the same
  selection keeps when it is given the truth; a unit with importance zero, or less, never is.
- mass: the share of the importance that lies in the selected units; less than zero counts as zero.

In local scope both compare units of one layer. In global scope the truth is scaled per layer first (min-max), which
is what the predictor learns and ranks by.

Letters: M positions, Lp predicted layers, U units of a kind per layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from shadowc.sparsity.rank import minmax_rows

if TYPE_CHECKING:
    import numpy.typing as npt

    Floats = npt.NDArray[np.float32]
    Mask = npt.NDArray[np.bool_]

DENSITIES = (0.5, 0.2)
SCOPES: tuple[Literal["local", "global"], ...] = ("local", "global")


def found_report(truth_MLU: Floats, methods: Mapping[str, Floats]) -> dict[str, Any]:
    """Return report[scope][density][method] = {recall, mass, recall_per_layer}."""
    report: dict[str, Any] = {}
    for scope in SCOPES:
        compared_MLU = np.maximum(truth_MLU, 0) if scope == "local" else _comparable(truth_MLU)
        report[scope] = {}
        for density in DENSITIES:
            wanted_MLU = selected(compared_MLU, density, scope) & (compared_MLU > 0)
            report[scope][str(density)] = {
                name: _found(compared_MLU, wanted_MLU, selected(scores, density, scope), scope)
                for name, scores in methods.items()
            }
    return report


def selected(scores: Floats, density: float, scope: Literal["local", "global"]) -> Mask:
    """Return the mask that the engine would use, [M, Lp, U], or [1, Lp, U] for a context-free ranking."""
    import torch

    from shadowc.sparsity.selection import ranked_threshold, unit_mask

    scores_MLU = torch.from_numpy(np.ascontiguousarray(scores if scores.ndim == 3 else scores[None]))
    threshold_BML = ranked_threshold(scores_MLU[None], torch.tensor([density]), scope=scope)
    mask: Mask = unit_mask(scores_MLU, threshold_BML[0]).numpy()
    return mask


def _found(truth_MLU: Floats, wanted_MLU: Mask, chosen_MLU: Mask, scope: str) -> dict[str, Any]:
    both_MLU = wanted_MLU & chosen_MLU
    per_layer = both_MLU.sum(axis=(0, 2)) / np.maximum(wanted_MLU.sum(axis=(0, 2)), 1)
    pool = (2,) if scope == "local" else (1, 2)
    total = truth_MLU.sum(axis=pool)
    kept = np.where(chosen_MLU, truth_MLU, 0).sum(axis=pool)
    return {
        "recall": round(float(both_MLU.sum() / max(wanted_MLU.sum(), 1)), 4),
        "mass": round(float(np.mean(kept[total > 0] / total[total > 0])) if (total > 0).any() else 1.0, 4),
        "recall_per_layer": [round(float(value), 4) for value in per_layer],
    }


def _comparable(truth_MLU: Floats) -> Floats:
    """Scale per position and layer; a row without information counts nothing."""
    return np.nan_to_num(np.stack([minmax_rows(truth_MLU[:, i]) for i in range(truth_MLU.shape[1])], axis=1))
