# SPDX-License-Identifier: Apache-2.0
"""Activations that a 16-bit type cannot hold: looked for where a graph runs in float32 anyway.

Tokens of a real text may reach further than the gate's; what overflows here, overflows there too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np
from onnx import TensorProto

from shadowc.spec.errors import InputError

if TYPE_CHECKING:
    import onnx

NARROW = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
_MOVERS = ("Gather", "Reshape", "Transpose")
"""What they give, something else had before."""
_LAYER = re.compile(r"\blayers\.(\d+)\.")
_TYPES = {"float16": (65504.0, "--weights bf16 or --weights fp32"), "bfloat16": (3.39e38, "--weights fp32")}
"""Narrow type -> about where it ends, and what to compile with instead."""
_SHOWN = 8


def narrow_activations(graph: onnx.GraphProto, weights: Iterable[str]) -> list[str]:
    """Computed tensors of 16 bits, in the order of the graph; what comes from weights alone is left out.

    Args:
        graph: as compile wrote it for TensorRT, with the type of every tensor.
        weights: names of the weights.
    """
    narrow = {value.name for value in (*graph.output, *graph.value_info) if value.type.tensor_type.elem_type in NARROW}
    fixed = {*weights, *(tensor.name for tensor in graph.initializer)}
    found: list[str] = []
    for node in graph.node:
        if fixed.issuperset(filter(None, node.input)):
            fixed.update(node.output)
        elif node.op_type not in _MOVERS:
            found += [name for name in node.output if name in narrow]
    return found


def require_range(graph: onnx.GraphProto, largest: Mapping[str, float], dtype: str) -> float:
    """Refuse a checkpoint whose activations the engine's type cannot hold.

    Args:
        graph: where the tensors are.
        largest: tensor -> largest absolute value seen, in the order of the graph; computed in float32.
        dtype: of the engine's activations.

    Returns:
        The largest of all; 0 if there are none.

    Raises:
        InputError: a value would become infinite; with every such tensor, its layer and its value.
    """
    values = np.array(list(largest.values()), np.float32)
    with np.errstate(over="ignore"):
        held = np.isfinite(values.astype(np.dtype(dtype)))
    beyond = [name for name, fits in zip(largest, held, strict=True) if not fits]
    if not beyond:
        return float(values.max(initial=0))
    layers = _layers(graph)
    found = [f"{layers[name]}{name} reaches {largest[name]:.6g}" for name in beyond]
    more = [f"and {len(found) - _SHOWN} more tensors"] if len(found) > _SHOWN else []
    end, hint = _TYPES[dtype]
    raise InputError(
        f"activations of this checkpoint are beyond {dtype}, which ends at {end:g}: {found[0]}; no engine was written",
        hint=hint,
        problems=[*found[:_SHOWN], *more] if len(found) > 1 else (),
    )


def _layers(graph: onnx.GraphProto) -> dict[str, str]:
    """Tensor -> "layer N: ", told by the names around it; empty outside the layers."""
    found: dict[str, str] = {}
    for node in graph.node:
        near = next(filter(None, map(_LAYER.search, (node.name, *node.input))), None)
        found.update(dict.fromkeys(node.output, f"layer {near[1]}: " if near else ""))
    return found
