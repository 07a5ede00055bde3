# SPDX-License-Identifier: Apache-2.0
"""Calibrated thresholds: which score a unit needs, so that at a density the calibration text keeps that share of units.

In: scores of calibration tokens, and their importances. Out: tables [GRID + 1, Lp] of thresholds; row i is for density
i / GRID, row 0 keeps nothing and row GRID everything. A token keeps what its scores reach, be it many units or few: the
share is that of all tokens together, and nothing is ranked when the model runs.

Budgets, one table each for heads and for neurons:
- local: every layer meets the density by itself.
- global: one threshold for all layers, which meet it together. It needs scores of all layers on one scale, as
  predictors learn them, but not at one time: layers may be scored one after the other.
- sensitivity: every layer has a share of its own. Shares are dealt out by what was measured on the calibration text: a
  layer goes on getting units as long as its next ones carry more importance (in the criterion's own units, which are
  comparable between layers where it estimates a loss change) than those of other layers.

Letters: M positions, Lp predicted layers, U units of a kind per layer, G = GRID.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from shadowc.spec.density import UNIT_KINDS
from shadowc.spec.errors import InputError
from shadowc.spec.program import GRID

if TYPE_CHECKING:
    import numpy.typing as npt

    from shadowc.spec.options import Budget, Scope, Select

    Floats = npt.NDArray[np.float32]

Tables = tuple["Floats", "Floats"]
"""Of heads and of neurons, [GRID + 1, Lp] each."""
_STEPS = 5 * GRID
"""In which a layer's units are dealt out by sensitivity."""
MET_AT = (0.5, 0.25, 0.1)
"""Densities that are told beside those that held-out text meets."""
BUDGETS: tuple[Budget, ...] = ("local", "global", "sensitivity")


def budget_of(select: Select, scope: Scope) -> Budget:
    """Return which table a selection by thresholds takes."""
    return "sensitivity" if select == "sensitivity" else scope


def calibrate(scores_MLU: Floats, truth_MLU: Floats) -> dict[Budget, Floats]:
    """Return the tables of one kind of unit, by budget.

    Args:
        scores_MLU: the predictor's; NaN ranks as +inf, as it does in a selection.
        truth_MLU: the importances of the same units.
    """
    layers = scores_MLU.shape[1]
    sorted_LN = np.where(np.isnan(scores_MLU), np.inf, scores_MLU).swapaxes(0, 1).reshape(layers, -1)
    gains = []
    for layer, scores_N in enumerate(sorted_LN):
        order_N = np.argsort(scores_N, kind="stable")
        gains.append(_gains(truth_MLU[:, layer].reshape(-1)[order_N[::-1]]))
        scores_N[:] = scores_N[order_N]
    even_GL = np.repeat(np.arange(GRID + 1)[:, None] / GRID, layers, axis=1)
    pool = np.sort(sorted_LN, axis=None)[None]
    return {
        "local": _at_shares(sorted_LN, even_GL),
        "global": np.repeat(_at_shares(pool, even_GL[:, :1]), layers, axis=1),
        "sensitivity": _at_shares(sorted_LN, sensitivity_shares(np.stack(gains))),
    }


def sensitivity_shares(gains_LS: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the share of each layer at every density, [G+1, Lp], whose mean over the layers is the density.

    Args:
        gains_LS: what each of S equal steps from none of a layer's units to all of them adds; no step adds more than
            the one before.
    """
    layers, steps = gains_LS.shape
    taken = np.argsort(-gains_LS, axis=None, kind="stable") // steps
    kept_LS = np.cumsum(np.arange(layers)[:, None] == taken[None], axis=1)
    table = np.zeros((GRID + 1, layers))
    for row in range(1, GRID + 1):
        table[row] = kept_LS[:, max(round(row / GRID * layers * steps), 1) - 1] / steps
    return table


def _gains(truth_N: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """Return the importance that each step adds when units come in this order."""
    finite_N = np.nan_to_num(truth_N.astype(np.float64), posinf=0.0, neginf=0.0)
    edges = np.round(np.linspace(0, len(finite_N), _STEPS + 1)).astype(int)
    sums = np.concatenate([[0.0], np.cumsum(finite_N)])
    return _falling(np.diff(sums[edges]))


def _falling(gains: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the slopes of the least concave curve above the sums: pooled, so that none is larger than one before."""
    means: list[float] = []
    lengths: list[int] = []
    for gain in gains.tolist():
        mean, length = gain, 1
        while means and means[-1] <= mean:
            mean = (mean * length + means[-1] * lengths[-1]) / (length + lengths[-1])
            length += lengths.pop()
            means.pop()
        means.append(mean)
        lengths.append(length)
    return np.repeat(means, lengths)


def _at_shares(sorted_LN: Floats, shares_GL: npt.NDArray[np.floating]) -> Floats:
    """Return the score [G+1, L] that a share of each layer's scores reaches; the scores grow along their row."""
    count = sorted_LN.shape[1]
    kept_GL = np.floor(shares_GL * count + 0.5).astype(int)
    rows = np.arange(len(sorted_LN))
    table = sorted_LN[rows, np.clip(count - kept_GL, 0, count - 1)].astype(np.float32)
    table[kept_GL <= 0], table[kept_GL >= count] = np.inf, -np.inf
    table[0], table[GRID] = np.inf, -np.inf
    falling: Floats = np.minimum.accumulate(table, axis=0)
    return falling


def met_report(tables: Mapping[str, Tables], scores: Mapping[str, Floats]) -> dict[str, Any]:
    """Return report[kind][budget][density]: the mean share of units that other text keeps where a density is asked for.

    Args:
        tables: of a predictor.
        scores: its scores [M, Lp, U] of that text, by kind.
    """
    return {
        kind: {
            budget: {
                str(density): round(float(np.mean(~(scores[kind] < pair[number][round(density * GRID), :, None]))), 4)
                for density in MET_AT
            }
            for budget, pair in tables.items()
        }
        for number, kind in enumerate(UNIT_KINDS)
    }


def problems(tables: Mapping[str, Tables], layers: int) -> list[str]:
    """Return what is wrong with the tables of a predictor."""
    found = []
    for budget, pair in tables.items():
        for kind, table in zip(UNIT_KINDS, pair, strict=True):
            name = f"threshold.{budget}.{kind}"
            if table.shape != (GRID + 1, layers):
                found.append(f"{name} has shape {list(table.shape)}, expected {[GRID + 1, layers]}")
            elif bool((table[0] != np.inf).any() or (table[GRID] != -np.inf).any()) or not _falls(table):
                found.append(f"{name} does not fall from +inf to -inf in every layer")
    return found


def _falls(table: Floats) -> bool:
    return bool((table[1:] <= table[:-1]).all())


def named(tables: Mapping[str, Tables]) -> dict[str, Floats]:
    """Return the tables as the tensors of a predictor."""
    return {
        f"threshold.{budget}.{kind}": table
        for budget, pair in tables.items()
        for kind, table in zip(UNIT_KINDS, pair, strict=True)
    }


def read(tensors: Mapping[str, npt.NDArray[Any]]) -> dict[str, Tables]:
    """Return the tables that tensors hold; predictors of before there were any have none.

    Raises:
        KeyError: those of one kind are missing.
    """
    names = [f"threshold.{budget}" for budget in BUDGETS]
    found = [name for name in names if any(other.startswith(f"{name}.") for other in tensors)]
    return {name.partition(".")[2]: (tensors[f"{name}.heads"], tensors[f"{name}.neurons"]) for name in found}


def of_budget(tables: Mapping[str, Tables], budget: Budget) -> Tables:
    """Return the tables of a budget.

    Raises:
        InputError: there are none.
    """
    if budget not in tables:
        has = f"; it has those of {', '.join(tables)}" if tables else ""
        raise InputError(
            f"the predictor has no calibrated thresholds for budget {budget}{has}: random predictors have none, nor "
            "have those that were trained before there were any",
            hint="--select exact, or train it again: shadowc train",
        )
    return tables[budget]


def refuse_least(least: int) -> None:
    """Refuse to keep a least number of units.

    Raises:
        InputError: it is more than none.
    """
    if least > 0:
        raise InputError(
            f"thresholds keep the units that reach them; to keep {least} at least, those of every token must be ranked",
            hint="compile --select exact, eval --methods predictor",
        )
