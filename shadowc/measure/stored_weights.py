# SPDX-License-Identifier: Apache-2.0
"""The parameters of a layer as an engine stores them, back in the checkpoint's names, shapes and order.

Written from the operators' description (docs/ops.md), not from the packing code.

Letters: E hidden, H heads, D head size, F neurons.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from shadowc.checkpoint.opt import HEAD, PROJECT_IN, PROJECT_OUT, layer_names
from shadowc.spec.errors import InputError
from shadowc.spec.ops import INT4_GROUP

if TYPE_CHECKING:
    import numpy.typing as npt

    from shadowc.runtime.stored import StoredGraph

    Floats = npt.NDArray[np.float32]

_INT4_ZERO = 8
_TRANSPOSED = {HEAD: "lm_head", PROJECT_IN: "project_in", PROJECT_OUT: "project_out"}
"""Parameter -> matrix that the graph multiplies with, of int8 its rows; the head is tied to the embedding in the
checkpoint only."""


def stored_parameters(graph: StoredGraph, layer: int) -> dict[str, Floats]:
    """Parameter name -> float32 value, for everything that a model layer stores."""
    names, order_F = layer_names(layer), graph.neuron_orders().get(layer)
    attention, ffn = f"layers.{layer}.attention", f"layers.{layer}.ffn"
    records_H4DE, bias_H3D = _records(graph, attention), graph.initialiser(f"{attention}.bqkv")
    H, _, D, E = records_H4DE.shape
    query, key, value, out = (records_H4DE[:, part].reshape(H * D, E) for part in range(4))
    biases = (bias_H3D[:, part].reshape(H * D) for part in range(3))
    records_F2E = _records(graph, ffn)
    at_F = np.arange(len(records_F2E)) if order_F is None else np.argsort(order_F)  # record of a neuron
    found = {
        names.q.weight: query,
        names.k.weight: key,
        names.v.weight: value,
        names.out.weight: np.ascontiguousarray(out.T),
        **dict(zip((names.q.bias, names.k.bias, names.v.bias), biases, strict=True)),
        names.out.bias: graph.initialiser(f"{attention}.bo"),
        names.fc1.weight: records_F2E[at_F, 0],
        names.fc2.weight: np.ascontiguousarray(records_F2E[at_F, 1].T),
        names.fc1.bias: graph.initialiser(f"{ffn}.b1")[at_F],
        names.fc2.bias: graph.initialiser(f"{ffn}.b2"),
    }
    return found | stored_as_they_are(graph, _parts(names.attention_norm, names.ffn_norm))


def stored_as_they_are(graph: StoredGraph, names: tuple[str, ...]) -> dict[str, Floats]:
    """Those of the named parameters that the graph stores under their own names, as floats or as rows of int8."""
    found = {}
    for name in names:
        stored = _TRANSPOSED.get(name, name)
        try:
            value = graph.initialiser(stored)
            scales = graph.initialiser(f"{stored}.scales") if value.dtype == np.int8 else None
        except InputError:
            continue
        if scales is not None:
            found[name] = np.asarray(value.astype(np.float32) * scales[:, None], np.float32)
        elif value.dtype == np.float32:
            found[name] = value.T if name in _TRANSPOSED else value
    return found


def _parts(*affine: Any) -> tuple[str, ...]:
    return tuple(name for one in affine for name in (one.weight, one.bias))


def _records(graph: StoredGraph, operator: str) -> Floats:
    """Records times their scales, [..., E]."""
    records, scales = graph.initialiser(f"{operator}.w"), graph.initialiser(f"{operator}.scales")
    if records.dtype != np.uint8:
        return np.asarray(records.astype(np.float32) * scales[..., None], np.float32)
    pairs = records.reshape(*scales.shape, INT4_GROUP // 2)  # a group's first half in the low halves of its bytes
    steps = np.concatenate([pairs & 15, pairs >> 4], axis=-1).astype(np.float32) - _INT4_ZERO
    return np.asarray((steps * scales[..., None]).reshape(*records.shape[:-1], -1), np.float32)
