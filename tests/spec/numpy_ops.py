# SPDX-License-Identifier: Apache-2.0
"""The operators once more, as plain loops over numpy in float64, written from the text of ops.py only.

Letters as in shadowc/spec/ops.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]


def threshold_of(values: Array, density: np.float32) -> float:
    """The threshold that keeps the wanted share of `values`: the k-th largest, NaN counting as +inf."""
    share = 1.0 if np.isnan(density) else min(max(float(density), 0.0), 1.0)
    wanted = int(np.floor(share * values.size + 0.5))
    if wanted == 0:
        return np.inf
    if wanted == values.size:
        return -np.inf
    return float(np.sort(np.where(np.isnan(values), np.inf, values).ravel())[values.size - wanted])


def select_threshold(
    scores: Array, density: Array, *, scope: str = "local", exempt: Sequence[int] = (), min_active: int = 0
) -> tuple[Array, npt.NDArray[np.int32]]:
    batch, tokens, layers, units = scores.shape
    threshold = np.full((batch, tokens, layers), -np.inf, np.float32)
    ranked = [layer for layer in range(layers) if layer not in exempt]
    for b in range(batch):
        share = density[b if len(density) > 1 else 0]
        for z in range(tokens):
            for layer in ranked:
                pool = scores[b, z, layer] if scope == "local" else scores[b, z, ranked]
                limit = threshold_of(pool, share)
                if min_active > 0:
                    largest = np.sort(np.where(np.isnan(scores[b, z, layer]), np.inf, scores[b, z, layer]))[::-1]
                    limit = min(limit, float(largest[min(min_active, units) - 1]))
                threshold[b, z, layer] = limit
    active = np.logical_not(scores < threshold[..., None]).sum(-1).astype(np.int32)
    return threshold, active


def is_active(scores: Array, threshold: Array, layer: int, tokens: int, b: int, s: int, unit: int) -> bool:
    """Whether a unit is active at new token s of row b: always before the sparse tail."""
    z = s - (tokens - scores.shape[1])
    row = b if len(scores) > 1 else 0
    return z < 0 or not scores[row, z, layer, unit] < threshold[row, z, layer]


def sparse_ffn(
    x: Array, scores: Array, threshold: Array, w: npt.NDArray[np.generic], scales: Array, b1: Array, b2: Array,
    *, layer: int = 0, block: int = 1, skip_zeros: int = 0,
) -> Array:  # fmt: skip
    y = np.empty(x.shape, np.float64)
    records = w.astype(np.float64) * scales[..., None]
    for b, s in np.ndindex(x.shape[:2]):
        y[b, s] = b2
        for neuron in range(len(w)):
            if is_active(scores, threshold, layer, x.shape[1], b, s, neuron // block):
                fired = records[neuron, 0] @ x[b, s].astype(np.float64) + b1[neuron]
                y[b, s] += max(fired, 0.0) * records[neuron, 1]
    return y.astype(np.float32)


def sparse_attention(
    x: Array, scores: Array, threshold: Array, w: npt.NDArray[np.generic], scales: Array, bqkv: Array, bo: Array,
    past_key: Array, past_value: Array, start: npt.NDArray[np.int64], past: npt.NDArray[np.int64],
    *, layer: int = 0, kv: str = "all",
) -> tuple[Array, Array, Array, Array]:  # fmt: skip
    batch, tokens, _ = x.shape
    heads, _, size, _ = w.shape
    records = w.astype(np.float64) * scales[..., None]
    key, value = past_key.astype(np.float64), past_value.astype(np.float64)
    context = np.zeros((batch, tokens, heads, size))
    y = np.zeros(x.shape) + bo

    def project(part: int, b: int, s: int, head: int) -> npt.NDArray[np.float64]:
        return records[head, part] @ x[b, s].astype(np.float64) + bqkv[head, part]

    for b, s, head in np.ndindex(batch, tokens, heads):
        if kv == "all" or is_active(scores, threshold, layer, tokens, b, s, head):
            key[b, head, past[b] + s] = project(1, b, s, head)
            value[b, head, past[b] + s] = project(2, b, s, head)
    for b, s, head in np.ndindex(batch, tokens, heads):
        first, end = start[b], past[b] + s + 1
        if first >= end or not is_active(scores, threshold, layer, tokens, b, s, head):
            continue
        logits = key[b, head, first:end] @ project(0, b, s, head) / np.sqrt(size)
        share = np.exp(logits - logits.max())
        context[b, s, head] = share / share.sum() @ value[b, head, first:end]
        y[b, s] += context[b, s, head] @ records[head, 3]
    arrays = (y, key, value, context.reshape(x.shape))
    return tuple(array.astype(np.float32) for array in arrays)  # type: ignore[return-value]
