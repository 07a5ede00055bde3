# SPDX-License-Identifier: Apache-2.0
"""The operators with their signature for TensorRT, as ONNX functions: the meaning of `oracle.py` over split records.

In: a graph for TensorRT, any type of activations. Out: the same graph with functions, for stock ONNX Runtime. Each
function joins the matrices to records again, computes in float32, and rounds its results to the type it was given.
"""

from __future__ import annotations

import onnx
from onnx import TensorProto, helper

from shadowc.spec.nodes import OPSET, Nodes
from shadowc.spec.ops import DOMAIN, SELECT_THRESHOLD, SPARSE_ATTENTION, SPARSE_FFN, OpSpec, tensorrt_inputs
from shadowc.spec.oracle import (
    attach,
    functions,
    sparse_attention_body,
    sparse_ffn_body,
)

_KINDS = {"int": onnx.AttributeProto.INT, "ints": onnx.AttributeProto.INTS, "string": onnx.AttributeProto.STRING}
_GIVEN = "given"
"""Name of the input `x` as it comes; the body computes with its float32 copy."""


def attach_tensorrt(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy of a graph for TensorRT that stock ONNX Runtime executes; what kernels count is dropped.

    Raises:
        InternalError: no output of the graph is left.
    """
    selection = [function for function in functions() if function.name == SELECT_THRESHOLD.name]
    return attach(model, [*selection, _attention(), _ffn()])


def _ffn() -> onnx.FunctionProto:
    n = Nodes()
    n.Cast(_GIVEN, to=TensorProto.FLOAT, out="x")
    halves = (n.Unsqueeze(_weight(n, name), n.ints(1)) for name in ("w1", "w2t"))
    n.Concat(*halves, axis=1, out="w")
    sparse_ffn_body(n, int4=False)
    n.CastLike("y", _GIVEN, out="result.y")
    return _function(SPARSE_FFN, n, ["result.y"])


def _attention() -> onnx.FunctionProto:
    n = Nodes()
    n.Cast(_GIVEN, to=TensorProto.FLOAT, out="x")
    heads, size = n.sizes("scales", 0, 1), n.sizes("scales", 2, 3)
    shape = n.Concat(heads, n.ints(1), size, n.ints(-1), axis=0)
    parts = (n.Reshape(_weight(n, name), shape) for name in ("wq", "wk", "wv", "wot"))
    n.Concat(*parts, axis=1, out="w")
    sparse_attention_body(n, int4=False)
    n.CastLike("y", _GIVEN, out="result.y")
    n.CastLike("context", _GIVEN, out="result.context")
    return _function(SPARSE_ATTENTION, n, ["result.y", "present_key", "present_value", "result.context"])


def _weight(n: Nodes, name: str) -> str:
    """A matrix as float32, made when x is there: a runtime would convert the weights of all layers at the start."""
    nothing = n.Mul(n.sizes("x", 0, 1), n.ints(0))
    return n.Cast(n.Reshape(name, n.Add(n.Shape(name), nothing)), to=TensorProto.FLOAT)


def _function(spec: OpSpec, nodes: Nodes, outputs: list[str]) -> onnx.FunctionProto:
    inputs = [_GIVEN if operand.name == "x" else operand.name for operand in tensorrt_inputs(spec)]
    attributes = [
        helper.make_attribute(attribute.name, attribute.default, attr_type=_KINDS[attribute.kind])
        for attribute in spec.attributes
    ]
    return helper.make_function(
        DOMAIN, spec.name, inputs, outputs, nodes.protos, [helper.make_opsetid("", OPSET)],
        attribute_protos=attributes, doc_string=spec.promise,
    )  # fmt: skip
