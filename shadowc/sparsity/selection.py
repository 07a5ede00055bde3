# SPDX-License-Identifier: Apache-2.0
"""From scores and a density to thresholds and masks, in torch: the twin of what selects in an engine.

Exact: the operator SelectThreshold, which ranks. Calibrated: a row of a table, see thresholds.py.

Letters: B batch, Z tokens, L predicted layers, N units of a layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from shadowc.sparsity.shares import layer_density
from shadowc.spec.errors import InputError

if TYPE_CHECKING:
    from shadowc.spec.program import SparsityPlan


def select_threshold(
    scores_BZLN: Tensor,
    density_B: Tensor,
    *,
    scope: Literal["local", "global"],
    exempt: Sequence[int] = (),
    min_active: int = 0,
) -> tuple[Tensor, Tensor]:
    """Return the threshold of every layer and the number of its active units.

    A unit is active unless its score is below the threshold, so ties make more units active and NaN always is.

    Args:
        scores_BZLN: float32; NaN ranks as +inf.
        density_B: share of the units to keep, one per row or a single one; clamped to 0..1, NaN means 1. Of scope
            local also [B,L], a share of its own for every layer.
        scope: rank the units within each layer, or those of all layers that are not exempt together.
        exempt: layers that stay dense; an index that is no layer (-1) exempts nothing.
        min_active: units that every layer keeps at least.

    Returns:
        threshold_BZL (float32; +inf keeps nothing, -inf keeps all) and active_BZL (int32).

    Raises:
        InputError: the scope is neither "local" nor "global".
    """
    threshold_BZL = ranked_threshold(scores_BZLN, density_B, scope=scope, exempt=exempt, min_active=min_active)
    return threshold_BZL, unit_mask(scores_BZLN, threshold_BZL).sum(-1, dtype=torch.int32)


def ranked_threshold(
    scores_BZLN: Tensor,
    density_B: Tensor,
    *,
    scope: Literal["local", "global"],
    exempt: Sequence[int] = (),
    min_active: int = 0,
) -> Tensor:
    """Return the thresholds of `select_threshold` without counting what they keep."""
    if scope not in ("local", "global"):
        raise InputError(f"the scope of a selection is local or global; found {scope!r}", hint="--scope global")
    if density_B.ndim == 2:
        return _layer_by_layer(scores_BZLN, density_B, exempt, min_active)
    batch, _, layers, units = scores_BZLN.shape
    ranked = [layer for layer in range(layers) if layer not in exempt]
    rank_BZRN = scores_BZLN if len(ranked) == layers else scores_BZLN[:, :, ranked]
    missing = rank_BZRN.isnan()
    if bool(missing.any()):
        rank_BZRN = torch.where(missing, math.inf, rank_BZRN)
    pool = rank_BZRN if scope == "local" else rank_BZRN.flatten(2).unsqueeze(2)
    threshold_BZR = _kth_or_bound(pool, wanted_units(density_B, pool.shape[3]).expand(batch))
    if min_active > 0:
        floor_BZR = _kth_largest(rank_BZRN, torch.full((batch,), min(min_active, units)))
        threshold_BZR = torch.minimum(threshold_BZR, floor_BZR)
    threshold_BZL = scores_BZLN.new_full(scores_BZLN.shape[:3], -math.inf)
    threshold_BZL[:, :, ranked] = threshold_BZR
    return threshold_BZL


def _layer_by_layer(scores_BZLN: Tensor, density_BL: Tensor, exempt: Sequence[int], min_active: int) -> Tensor:
    """Return the same where every layer has its own density."""
    parts = [
        ranked_threshold(
            scores_BZLN[:, :, layer : layer + 1],
            density_BL[:, layer],
            scope="local",
            exempt=(0,) if layer in exempt else (),
            min_active=min_active,
        )
        for layer in range(scores_BZLN.shape[2])
    ]
    return torch.cat(parts, dim=2)


def select_calibrated(
    scores_BZLN: Tensor, thresholds_GL: Tensor, density_B: Tensor, *, exempt: Sequence[int] = ()
) -> tuple[Tensor, Tensor]:
    """Return the same from a table of thresholds: no score of another unit matters, and NaN is active here too.

    Args:
        scores_BZLN: float32.
        thresholds_GL: row i is for density i / GRID; the nearest one is taken.
        density_B: as for `select_threshold`.
        exempt: layers that stay dense.
    """
    batch, tail, layers, _ = scores_BZLN.shape
    row_BL = layer_density(thresholds_GL, density_B).clone()
    row_BL[:, [layer for layer in range(layers) if layer in exempt]] = -math.inf
    threshold_BZL = row_BL[:, None].expand(batch, tail, layers)
    return threshold_BZL, unit_mask(scores_BZLN, threshold_BZL).sum(-1, dtype=torch.int32)


class Selection:
    """How a plan selects: by ranks, of all layers together or by each layer's share, or by calibrated thresholds.

    Args:
        plan: scope, exempt layers, and what tables there are.
    """

    def __init__(self, plan: SparsityPlan) -> None:
        self._plan = plan
        self._shares, self._thresholds = (
            None if pair is None else tuple(torch.from_numpy(np.array(table)) for table in pair)
            for pair in (plan.shares, plan.thresholds)
        )

    def threshold(
        self,
        number: int,
        scores_BZLN: Tensor,
        density_B: Tensor,
        *,
        min_active: int = 0,
        layer: int = 0,
        ranked: bool = False,
    ) -> Tensor:
        """Return the thresholds [B,Z,L].

        Args:
            number: 0 for heads, 1 for neurons.
            scores_BZLN: of all predicted layers, or (L = 1) of one.
            density_B: asked for.
            min_active: units that every layer keeps at least.
            layer: the model layer of the scores; 0: they are of all predicted layers.
            ranked: the scores are not the predictor's own, so that no thresholds were calibrated for them.
        """
        exempt = self._plan.exempt if not layer else (0,) if layer - 1 in self._plan.exempt else ()
        if self._thresholds is not None and not ranked:
            table = self._thresholds[number]
            table = table[:, layer - 1 : layer] if layer else table
            return select_calibrated(scores_BZLN, table, density_B, exempt=exempt)[0]
        if self._shares is not None:
            density_B = layer_density(self._shares[number], density_B)
            density_B = density_B[:, layer - 1] if layer else density_B
        return ranked_threshold(scores_BZLN, density_B, scope=self._plan.scope, exempt=exempt, min_active=min_active)


def unit_mask(scores: Tensor, threshold: Tensor) -> Tensor:
    """Return which units are active (bool); `threshold` lacks the last axis of `scores`."""
    return (scores < threshold[..., None]).logical_not_()


def wanted_units(density_B: Tensor, population: int) -> Tensor:
    """Return the number of units that each density keeps of a population (int64).

    Computed in float64 from the float32 density, so that every implementation rounds alike.
    """
    share = torch.nan_to_num(density_B.to(torch.float32).to(torch.float64), nan=1.0).clamp(0.0, 1.0)
    return torch.floor(share * population + 0.5).to(torch.int64)


def _kth_or_bound(pool_BZRM: Tensor, wanted_B: Tensor) -> Tensor:
    """Return the wanted-th largest of each pool, or the infinity that keeps nothing or all of it."""
    population = pool_BZRM.shape[3]
    kth_BZR = _kth_largest(pool_BZRM, wanted_B.clamp(1, max(population, 1)))
    wanted_B11 = wanted_B[:, None, None]
    kth_BZR = torch.where(wanted_B11 <= 0, math.inf, kth_BZR)
    return torch.where(wanted_B11 >= population, -math.inf, kth_BZR)


def _kth_largest(pool_BZRM: Tensor, k_B: Tensor) -> Tensor:
    """Return the k-th largest of the last axis, k counted from 1; the rows of a k together.

    By numpy's partition, which finds the same number in an eighth of the time of torch's kthvalue.
    """
    population = pool_BZRM.shape[3]
    kth_BZR = pool_BZRM.new_full(pool_BZRM.shape[:3], -math.inf)
    if pool_BZRM.numel() == 0:
        return kth_BZR
    for k in sorted(set(k_B.tolist())):
        rows_B, place = k_B == k, population - k
        rows_BZRM = pool_BZRM if bool(rows_B.all()) else pool_BZRM[rows_B]
        kth_BZR[rows_B] = torch.from_numpy(np.partition(rows_BZRM.numpy(), place, axis=3)[..., place])
    return kth_BZR
