# SPDX-License-Identifier: Apache-2.0
"""Which nodes of ONNX's own operators can be steps of a chain (plugins/cpu/ort_standard.cc)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

_Attributes = Mapping[str, "onnx.AttributeProto"]
_FLOAT, _INT64 = 1, 7  # as in onnx.TensorProto, which takes long to import


def _no_more(attributes: _Attributes) -> bool:
    return not attributes


def _is(name: str, *usual: int) -> Callable[[_Attributes], bool]:
    """The attribute is not given, or one of these; there are no others."""
    return lambda attributes: set(attributes) <= {name} and all(given.i in usual for given in attributes.values())


def _is_last_norm(attributes: _Attributes) -> bool:
    axis, stash = attributes.get("axis"), attributes.get("stash_type")
    known = set(attributes) <= {"axis", "epsilon", "stash_type"}
    return known and (axis is None or axis.i == -1) and (stash is None or stash.i == 1)


_STEPS: Mapping[str, tuple[tuple[int, ...], tuple[int, ...], Callable[[_Attributes], bool]]] = {
    "Add": ((2,), (_FLOAT, _INT64), _no_more),
    "Concat": (tuple(range(1, 1000)), (_FLOAT, _INT64, 6, 10), lambda attributes: set(attributes) == {"axis"}),
    "Div": ((2,), (_FLOAT,), _no_more),
    "Gather": ((2,), (_FLOAT,), _is("axis", 0)),
    "LayerNormalization": ((3,), (_FLOAT,), _is_last_norm),
    "Max": ((2,), (_FLOAT, _INT64), _no_more),
    "ReduceMax": ((2,), (_FLOAT,), _is("keepdims", 1)),
    "ReduceMin": ((2,), (_FLOAT,), _is("keepdims", 1)),
    "Relu": ((1,), (_FLOAT,), _no_more),
    "Reshape": ((2,), (_FLOAT, _INT64, 6), _is("allowzero", 0)),
    "Shape": ((1,), (_FLOAT, _INT64), lambda attributes: set(attributes) <= {"start", "end"}),
    "Slice": ((4,), (_FLOAT, _INT64), _no_more),
    "Sub": ((2,), (_FLOAT, _INT64), _no_more),
}
"""Operator -> how many inputs, which types of the first, which attributes. A Slice of several axes, and reductions of
others than the last, are refused when they come."""
_READ_NUMBERS = ("Gather", "ReduceMax", "ReduceMin", "Reshape", "Slice")
"""Operators whose other inputs are int64, which ONNX lets be int32 too."""


def is_standard_step(node: onnx.NodeProto, kinds: Mapping[str, int]) -> bool:
    """Whether a chain can have this node; `kinds`: element types of what it reads."""
    if node.domain or node.op_type not in _STEPS or len(node.output) != 1:
        return False
    inputs, types, fits = _STEPS[node.op_type]
    first, *others = [kinds.get(name) for name in node.input] or [None]
    if node.op_type in _READ_NUMBERS and any(kind != _INT64 for kind in others):
        return False
    given = all(node.input) and len(node.input) in inputs
    return given and first in types and fits({one.name: one for one in node.attribute})
