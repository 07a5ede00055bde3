# SPDX-License-Identifier: Apache-2.0
"""Which goals the measured times meet, each beside the most that the moved bytes allow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tests.gpu.timing import SHAPES, Timed

SPEEDUP, SHARE, MICROSECONDS = 1.7, 0.8, 10.0
"""Of FFN and attention over dense cuBLAS at density 0.5, fp16 and batch 1; of the bandwidth there; of a selection per
layer."""
KV = ("all", "active")
"""New keys and values of all heads (a predicted mask), or of active heads only (a fixed mask)."""


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement."""

    model: str
    kernel: str
    weights: str
    batch: int
    density: float
    timed: Timed
    dense: Timed | None

    @property
    def speedup(self) -> float | None:
        """Over cuBLAS."""
        return None if self.dense is None else self.dense.microseconds / self.timed.microseconds


@dataclass(frozen=True, slots=True)
class Goal:
    """One goal of one model."""

    met: bool
    sentence: str
    """With the number that decides."""


def goals(found: Sequence[Row], bandwidth: float) -> list[Goal]:
    """Every goal that the measurements can decide.

    Args:
        found: the measurements.
        bandwidth: bytes per second that a copy on the device moves.
    """
    judged = []
    for model in dict.fromkeys(row.model for row in found):
        mine = [row for row in found if row.model == model and row.batch == 1]
        for kv in KV:
            judged += _layer(model, kv, mine, bandwidth)
        layers = next((shape.layers - 1 for shape in SHAPES if shape.model == model), 1)
        select = sum(row.timed.microseconds for row in mine if row.kernel.startswith("select")) / layers
        if select:
            judged.append(_goal(model, "selection per layer", select, MICROSECONDS, " us", below=True))
    return judged


def _layer(model: str, kv: str, mine: Sequence[Row], bandwidth: float) -> Iterator[Goal]:
    wanted = ("ffn", f"attention, kv={kv}")
    half = [row for row in mine if row.kernel in wanted and row.density == 0.5 and row.weights == "fp16"]
    if len(half) != len(wanted):
        return
    sparse = _together([row.timed for row in half])
    dense = _together([row.dense for row in half if row.dense is not None])
    where = f"at density 0.5 with kv={kv}"
    if all(row.dense is not None for row in half):
        note = (
            f" (the bytes allow {dense.bytes / sparse.bytes:.2f}x at equal bandwidth; cuBLAS reaches "
            f"{_share(dense, bandwidth):.2f} of it)"
        )
        speedup = dense.microseconds / sparse.microseconds
        yield _goal(model, f"FFN and attention {where} over cuBLAS", speedup, SPEEDUP, "x", note)
    yield _goal(model, f"share of the bandwidth {where}", _share(sparse, bandwidth), SHARE, "")


def _together(timed: Sequence[Timed]) -> Timed:
    return Timed(sum(one.microseconds for one in timed), sum(one.bytes for one in timed))


def _share(timed: Timed, bandwidth: float) -> float:
    return timed.bytes / timed.microseconds * 1e6 / bandwidth


def _goal(
    model: str, what: str, found: float, wanted: float, unit: str, note: str = "", *, below: bool = False
) -> Goal:
    met = found <= wanted if below else found >= wanted
    bound = "at most" if below else "at least"
    verdict = "met" if met else "MISSED"
    return Goal(met, f"{model}: {what} {found:.2f}{unit}, wanted {bound} {wanted:g}{unit}{note}: {verdict}")
