# SPDX-License-Identifier: Apache-2.0
"""Records back to matrices: the inverse of the packing, written independently of it.

Letters: E hidden, H heads, D head size, F neurons, N rows and K columns of a matrix.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from shadowc.emit.records import INT4_ZERO_POINT, Array, Floats, quantise_rows


def dequantise(records: Array, scales: Floats) -> Floats:
    """Records times the scales of their rows or groups, float32; exact for float records, whose scales are ones."""
    if records.dtype != np.uint8:
        return np.multiply(records.astype(np.float32), scales[..., None])
    pairs = records.reshape(*scales.shape, -1)
    values = np.concatenate([pairs & 15, pairs >> 4], axis=-1).astype(np.float32) - INT4_ZERO_POINT
    return (values * scales[..., None]).reshape(*records.shape[:-1], -1)


def round_trip(weight_NK: Floats, *, axis: int = -1) -> Floats:
    """What a matrix becomes when its rows (axis -1) or columns (axis 0) are quantised, in its own layout.

    It shares the rounding with the packing, but not the layout, so that a packing error shows in a comparison.
    """
    rows = weight_NK if axis in (-1, 1) else weight_NK.T
    values, scales = quantise_rows(rows)
    back = dequantise(values, scales)
    return back if axis in (-1, 1) else np.ascontiguousarray(back.T)


def unpack_attention(records_HDE: Array, scales: Floats) -> tuple[Floats, Floats, Floats, Floats]:
    """The four projection matrices [E, E] of attention records [H, 4, D, E] (q, k, v, out_proj)."""
    real = dequantise(records_HDE, scales)
    H, _, D, E = real.shape
    query, key, value, out = (np.ascontiguousarray(real[:, part]).reshape(H * D, E) for part in range(4))
    return query, key, value, np.ascontiguousarray(out.T)


def unpack_ffn(records_FE: Array, scales: Floats, order: npt.NDArray[np.int32] | None = None) -> tuple[Floats, Floats]:
    """fc1 [F, E] and fc2 [E, F] in checkpoint order, of records [F, 2, E] that `order` had permuted."""
    real = dequantise(records_FE, scales)
    rows, columns = np.empty_like(real[:, 0]), np.empty_like(real[:, 1])
    target = np.arange(len(real)) if order is None else order
    rows[target], columns[target] = real[:, 0], real[:, 1]
    return rows, np.ascontiguousarray(columns.T)
