# SPDX-License-Identifier: Apache-2.0
"""Makes the graph's initialisers from named tensors, as the weight recipes say; pure numpy, one group at a time.

One head and one neuron are one contiguous record each, so that the kernels read exactly what is active.
Letters: E hidden, H heads, D head size, F neurons, R record rows of length E, N rows and K columns of a matrix.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import ml_dtypes  # noqa: F401 (makes "bfloat16" a numpy type)
import numpy as np
import numpy.typing as npt

from shadowc.spec.errors import InputError, InternalError
from shadowc.spec.program import TensorSource, WeightRecipe

if TYPE_CHECKING:
    from shadowc.emit.rows import Overflow

Array = npt.NDArray[np.generic]
Floats = npt.NDArray[np.float32]

INT8_LIMIT = 127
INT4_LIMIT = 7
INT4_ZERO_POINT = 8
_CHUNK_ROWS = 64
"""Rows handled at once: few enough that the temporaries of a 4096-wide model stay in the second-level cache."""

_FAMILY = {
    "attention_records": "attention",
    "attention_scales": "attention",
    "attention_rows": "attention",
    "ffn_records": "ffn",
    "ffn_scales": "ffn",
    "ffn_rows": "ffn",
    "network_rows": "network",
    "network_quads": "network",
    "network_scales": "network",
}


def natural_key(name: str) -> tuple[tuple[int, int, str], ...]:
    """Sort key that puts layers.2 before layers.10."""
    return tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name))


def groups(weights: Mapping[str, WeightRecipe]) -> list[tuple[str, ...]]:
    """Names that are made together (records and their scales), in layer order whatever the mapping's order is."""
    members: dict[object, list[str]] = {}
    for name in sorted(weights, key=natural_key):
        recipe = weights[name]
        family = _FAMILY.get(recipe.kind)
        key = (family, recipe.sources, recipe.order, recipe.block, recipe.quantised) if family else name
        members.setdefault(key, []).append(name)
    return [tuple(names) for names in members.values()]


def materialise(
    recipes: Mapping[str, WeightRecipe],
    source: TensorSource,
    names: Sequence[str],
    overflow: Overflow | None = None,
) -> dict[str, Array]:
    """The arrays of one group, C-contiguous, with the dtypes and shapes that the recipes promise.

    Args:
        recipes: all recipes of the program.
        source: where the tensors that they name are read.
        names: one group as `groups` returns it.
        overflow: counts what float16 cannot hold; None: that is an error at once.

    Raises:
        InputError: a weight that is to be quantised is NaN or infinite.
        InternalError: tensors and recipe do not fit together.
    """
    from shadowc.emit.rows import ROW_KINDS, Overflow, narrow, separate_rows

    first = recipes[names[0]]
    family = _FAMILY.get(first.kind, first.kind)
    counted = Overflow() if overflow is None else overflow
    made: dict[str, Array] = {}
    if any(recipes[name].kind in ROW_KINDS for name in names):
        made = separate_rows(recipes, source, names, counted)
    elif family == "attention":
        records, scales = _attention(recipes, source, names)
        made = {name: records if recipes[name].kind == "attention_records" else scales for name in names}
    elif family == "ffn":
        records, scales = _ffn(recipes, source, names)
        made = {name: records if recipes[name].kind == "ffn_records" else scales for name in names}
    elif family == "network":
        rows, scales = _rows(recipes, source, names)
        made = {name: scales if recipes[name].kind == "network_scales" else rows for name in names}
    else:
        single = {name: _single(recipes[name], source) for name in names}
        made = {name: narrow(array, recipes[name].dtype, counted, name) for name, array in single.items()}
    if overflow is None:
        counted.require_none()
    for name, array in made.items():
        recipe = recipes[name]
        if array.shape != recipe.shape or array.dtype != np.dtype(recipe.dtype):
            raise InternalError(
                f"recipe of {name} promises {recipe.dtype}{list(recipe.shape)}, "
                f"its sources {', '.join(recipe.sources)} make {array.dtype}{list(array.shape)}"
            )
    return made


def quantise_rows(rows_RE: Floats, *, where: str = "weights") -> tuple[npt.NDArray[np.int8], Floats]:
    """Symmetric int8 per row: scale = max|w| / 127 (1 for a row of zeros), ties to even, range -127..127."""
    R, E = rows_RE.shape
    out_RE, scales_R = np.empty((R, E), np.int8), np.empty(R, np.float32)
    _fill(out_RE, scales_R, rows_RE, where=where)
    return out_RE, scales_R


def _attention(recipes: Mapping[str, WeightRecipe], source: TensorSource, names: Sequence[str]) -> tuple[Array, Floats]:
    recipe = recipes[names[0]]
    H, _, D = recipe.shape[:3]
    E = H * D
    records, scales = _room(recipes, names, (H, 4, D), E)
    for part, name in enumerate(recipe.sources):
        weight_EE = _matrix(source, name, (E, E))
        rows_EE = weight_EE.T if part == 3 else weight_EE
        for head in range(H):
            rows_DE = rows_EE[head * D : (head + 1) * D]
            _fill(records[head, part], scales[head, part] if recipe.quantised else None, rows_DE, where=name)
    return records, scales


def _ffn(recipes: Mapping[str, WeightRecipe], source: TensorSource, names: Sequence[str]) -> tuple[Array, Floats]:
    recipe = recipes[names[0]]
    F = recipe.shape[0]
    order = neuron_order(source, recipe, F)
    fc1_FE = source.tensor(recipe.sources[0])
    E = fc1_FE.shape[-1]
    records, scales = _room(recipes, names, (F, 2), E)
    first, second = (scales[:, part] if recipe.quantised else None for part in range(2))
    _fill(records[:, 0], first, _shaped(fc1_FE, recipe.sources[0], (F, E)), order=order, where=recipe.sources[0])
    del fc1_FE  # of the widest models the two matrices are gigabytes
    fc2_EF = _matrix(source, recipe.sources[1], (E, F))
    rows_FE = fc2_EF.T if order is None else transposed(fc2_EF)
    del fc2_EF
    _fill(records[:, 1], second, rows_FE, order=order, where=recipe.sources[1])
    return records, scales


def _rows(recipes: Mapping[str, WeightRecipe], source: TensorSource, names: Sequence[str]) -> tuple[Array, Floats]:
    recipe = recipes[names[0]]
    weight_NK = source.tensor(recipe.sources[0])
    if not recipe.quantised:
        return weight_NK, np.ones(len(weight_NK), np.float32)
    rows_NK, scales = quantise_rows(weight_NK, where=recipe.sources[0])
    if any(recipes[name].kind == "network_quads" for name in names):
        return in_quads(rows_NK), scales
    return rows_NK, scales


def in_quads(rows_NK: npt.NDArray[np.int8]) -> npt.NDArray[np.int8]:
    """Four weights of 16 rows at a time, [ceil(N/16), ceil(K/4), 16, 4], filled up with zeros."""
    N, K = rows_NK.shape
    padded = np.zeros((-(-N // 16) * 16, -(-K // 4) * 4), np.int8)
    padded[:N, :K] = rows_NK
    return np.ascontiguousarray(padded.reshape(-1, 16, padded.shape[1] // 4, 4).transpose(0, 2, 1, 3))


def _room(
    recipes: Mapping[str, WeightRecipe], names: Sequence[str], rows: tuple[int, ...], E: int
) -> tuple[Array, Floats]:
    """Records to be filled, and scales that are ones."""
    block = recipes[names[0]].block
    dtype = next((recipes[name].dtype for name in names if recipes[name].kind.endswith("records")), "float32")
    records = np.empty((*rows, E // 2 if block else E), np.dtype(dtype))
    return records, np.ones((*rows, E // block) if block else rows, np.float32)


def _single(recipe: WeightRecipe, source: TensorSource) -> Array:
    if recipe.kind == "copy":
        return np.ascontiguousarray(source.tensor(recipe.sources[0]))
    if recipe.kind == "transpose":
        return transposed(source.tensor(recipe.sources[0]))
    if recipe.kind == "ffn_bias":
        bias_F = source.tensor(recipe.sources[0])
        order = neuron_order(source, recipe, len(bias_F))
        return np.ascontiguousarray(bias_F if order is None else bias_F[order])
    if recipe.kind == "qkv_bias":
        H, _, D = recipe.shape
        return np.stack([source.tensor(name).reshape(H, D) for name in recipe.sources], axis=1)
    if recipe.kind == "centred_qkv_bias":
        H, _, D = recipe.shape
        *biases, means_HD = (source.tensor(name).reshape(H, D) for name in recipe.sources)
        biases[2] = biases[2] - means_HD
        return np.stack(biases, axis=1)
    if recipe.kind == "filled_bias":
        bias_E, weight_EK, means_HD = (source.tensor(name) for name in recipe.sources)
        means_K = means_HD.reshape(-1).astype(np.float64)
        made = [weight_EK[rows] @ means_K for rows in _chunks(len(weight_EK))]  # in pieces: they become float64
        return (bias_E + np.concatenate(made)).astype(np.float32)
    raise InternalError(f"unknown weight recipe {recipe.kind!r}")


def neuron_order(source: TensorSource, recipe: WeightRecipe, F: int) -> npt.NDArray[np.int32] | None:
    """The permutation that a recipe names, checked; None: neurons stay as in the checkpoint."""
    if not recipe.order:
        return None
    order = np.asarray(source.tensor(recipe.order)).astype(np.int32)
    if order.shape != (F,) or not np.array_equal(np.sort(order), np.arange(F)):
        raise InputError(
            f"neuron order {recipe.order} is not a permutation of 0..{F - 1}", hint="train the predictor again"
        )
    return order


def _matrix(source: TensorSource, name: str, shape: tuple[int, int]) -> Floats:
    return _shaped(source.tensor(name), name, shape)


def _shaped(tensor: Floats, name: str, shape: tuple[int, int]) -> Floats:
    if tensor.shape != shape:
        raise InternalError(f"{name} is {list(tensor.shape)}, the recipe needs {list(shape)}")
    return tensor


def transposed(weight_NK: Floats) -> Floats:
    """Return a contiguous transpose, made in blocks of columns: several times faster than one strided copy."""
    N, K = weight_NK.shape
    out_KN = np.empty((K, N), weight_NK.dtype)
    for columns in _chunks(K):
        out_KN[columns] = weight_NK[:, columns].T
    return out_KN


def _chunks(length: int) -> Iterator[slice]:
    return (slice(start, min(start + _CHUNK_ROWS, length)) for start in range(0, length, _CHUNK_ROWS))


def _fill(
    out: Array,
    scales: Floats | None,
    rows_RE: Floats,
    *,
    order: npt.NDArray[np.int32] | None = None,
    where: str,
) -> None:
    """Write rows (permuted by `order`) to `out`; quantised if there is room for scales, in groups if for several."""
    for rows in _chunks(len(out)):
        values = rows_RE[rows] if order is None else rows_RE[order[rows]]
        if scales is None:
            out[rows] = values
        elif scales.ndim == 1:
            out[rows], scales[rows] = _rounded(values, INT8_LIMIT, where)
        else:
            grouped = values.reshape(*scales[rows].shape, -1)
            steps, scales[rows] = _rounded(grouped, INT4_LIMIT, where)
            out[rows] = _paired(steps).reshape(out[rows].shape)


def _rounded(values: Floats, limit: int, where: str) -> tuple[Floats, Floats]:
    """Whole steps within the limit, and the step along the last axis: max|w| / limit, 1 where all are zero."""
    steps = np.array(values, order="C")
    peak = np.maximum(steps.max(axis=-1), -steps.min(axis=-1))
    if not np.isfinite(peak).all():
        raise InputError(f"{where} holds NaN or infinite values and cannot be quantised", hint="check the checkpoint")
    scale = peak / np.float32(limit)
    scale[scale == 0] = 1
    np.divide(steps, scale[..., None], out=steps)
    np.rint(steps, out=steps)
    np.clip(steps, -limit, limit, out=steps)
    return steps, scale


def _paired(steps: Floats) -> npt.NDArray[np.uint8]:
    """Groups of int4, two to a byte: the first half of a group in the low halves."""
    low, high = np.split((steps + INT4_ZERO_POINT).astype(np.uint8), 2, axis=-1)
    paired: npt.NDArray[np.uint8] = low | high << np.uint8(4)
    return paired
