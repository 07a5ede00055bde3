# SPDX-License-Identifier: Apache-2.0
"""Weights as TensorRT takes them: each matrix of a record on its own, rows as in the record, in the type it runs in.

A row of a matrix is one neuron, or one output of a head, as in the records of target cpu; a GPU reads whole rows,
and TensorRT's own products read the matrices as they are.

Letters: E hidden, H heads, D head size, F neurons, R rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import ml_dtypes  # noqa: F401 (makes "bfloat16" a numpy type)
import numpy as np
import numpy.typing as npt

from shadowc.emit.records import neuron_order, quantise_rows, transposed
from shadowc.spec.errors import InputError, InternalError
from shadowc.spec.program import TensorSource, WeightRecipe

Array = npt.NDArray[np.generic]
Floats = npt.NDArray[np.float32]

ROW_KINDS = ("attention_rows", "ffn_rows")
HALF_LIMIT = 65504.0
"""Largest finite float16."""
_CHUNK_ROWS = 64


@dataclass(slots=True)
class Overflow:
    """Weights that a narrower type cannot hold, by source tensor."""

    counts: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, count: int) -> None:
        """Count values of a source tensor that are too large."""
        if count:
            self.counts[name] = self.counts.get(name, 0) + count

    def require_none(self) -> None:
        """Refuse the conversion if anything was too large.

        Raises:
            InputError: with the number of weights, and every tensor with its own number.
        """
        if not self.counts:
            return
        raise InputError(
            f"{sum(self.counts.values())} weights in {len(self.counts)} tensors are beyond float16's largest value "
            f"{HALF_LIMIT:.0f}; nothing was written",
            hint="--weights bf16 or --weights fp32",
            problems=[f"{name}: {count} weights" for name, count in sorted(self.counts.items())],
        )


def narrow(values: Array, dtype: str, overflow: Overflow, where: str) -> Array:
    """Round to a 16-bit type, to nearest even; what float16 cannot hold is counted (and becomes infinite)."""
    if dtype == "float32":
        return values
    out = np.empty(values.shape, np.dtype(dtype))
    rows = values.reshape(len(values), -1)
    flat = out.reshape(len(values), -1)
    for start in range(0, len(rows), _CHUNK_ROWS):
        piece = rows[start : start + _CHUNK_ROWS]
        if dtype == "float16":
            overflow.add(where, int(np.count_nonzero(np.abs(piece) >= HALF_LIMIT + 16)))  # rounds to infinity
        with np.errstate(over="ignore"):
            flat[start : start + _CHUNK_ROWS] = piece.astype(out.dtype)
    return out


def separate_rows(
    recipes: Mapping[str, WeightRecipe], source: TensorSource, names: Sequence[str], overflow: Overflow
) -> dict[str, Array]:
    """The matrices of one attention or FFN [R,E], and their scales ([H,4,D] or [F,2]; ones unless quantised).

    Args:
        recipes: all recipes of the program.
        source: where the tensors that they name are read.
        names: the rows and scales of one block.
        overflow: where values that are too large are counted.
    """
    made: dict[str, Array] = {}
    scales_of: dict[int, Floats] = {}
    for name in names:
        recipe = recipes[name]
        if recipe.kind not in ROW_KINDS:
            continue
        rows_RE = _rows(recipe, source)
        if recipe.quantised:
            made[name], scales_of[recipe.part] = quantise_rows(rows_RE, where=recipe.sources[recipe.part])
        else:
            made[name] = narrow(rows_RE, recipe.dtype, overflow, recipe.sources[recipe.part])
    for name in names:
        if name not in made:
            scales = np.ones(recipes[name].shape, np.float32)
            for part, scales_R in scales_of.items():
                scales[:, part] = scales_R.reshape(scales[:, part].shape)
            made[name] = scales
    return made


def _rows(recipe: WeightRecipe, source: TensorSource) -> Floats:
    """One matrix with a row per neuron or per output of a head, neurons in their order."""
    matrix = source.tensor(recipe.sources[recipe.part])
    columns = recipe.part == (3 if recipe.kind == "attention_rows" else 1)
    rows_RE = transposed(matrix) if columns else matrix
    if rows_RE.shape != recipe.shape:
        raise InternalError(
            f"{recipe.sources[recipe.part]} makes rows {list(rows_RE.shape)}, the recipe needs {list(recipe.shape)}"
        )
    order = neuron_order(source, recipe, len(rows_RE))
    return np.ascontiguousarray(rows_RE if order is None else rows_RE[order])
