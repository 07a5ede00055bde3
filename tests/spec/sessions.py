# SPDX-License-Identifier: Apache-2.0
"""Stock ONNX Runtime sessions for one operator or one graph, by way of the oracle functions."""

from __future__ import annotations

from functools import cache

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnx import TensorProto, helper

from shadowc.spec import oracle
from shadowc.spec.ops import DOMAIN, OPS, VERSION, Operand

IR_VERSION = 10
TYPES = {
    "float32": TensorProto.FLOAT,
    "int8": TensorProto.INT8,
    "int32": TensorProto.INT32,
    "int64": TensorProto.INT64,
}

Attributes = dict[str, int | str | tuple[int, ...]]


def session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def graph_model(graph: onnx.GraphProto) -> onnx.ModelProto:
    """A model of the graph, checked, with the domain of the operators but without the functions."""
    opsets = [helper.make_opsetid("", oracle.OPSET), helper.make_opsetid(DOMAIN, VERSION)]
    return helper.make_model(graph, ir_version=IR_VERSION, opset_imports=opsets)


def op_model(op: str, weights: str = "float32", **attributes: int | str | tuple[int, ...]) -> onnx.ModelProto:
    """A graph of one operator node, its inputs and outputs taken from the table, `read` included."""
    spec = next(spec for spec in OPS if spec.name == op)
    node = helper.make_node(
        op, [i.name for i in spec.inputs], [o.name for o in spec.outputs], name=op, domain=DOMAIN, **attributes
    )

    def value(operand: Operand) -> onnx.ValueInfoProto:
        kind = weights if operand.name == "w" else operand.types[0]
        shape = [int(axis) if axis.isdigit() else f"{operand.name}_{i}" for i, axis in enumerate(operand.shape)]
        return helper.make_tensor_value_info(operand.name, TYPES[kind], shape)

    inputs, outputs = ([value(operand) for operand in operands] for operands in (spec.inputs, spec.outputs))
    return graph_model(helper.make_graph([node], op, inputs, outputs))


@cache
def _op_session(op: str, weights: str, attributes: tuple[tuple[str, int | str | tuple[int, ...]], ...]):
    return session(oracle.attach(op_model(op, weights, **dict(attributes))))


def run_op(op: str, feeds: dict[str, npt.NDArray[np.generic]], **attributes: int | str | tuple[int, ...]):
    """Outputs of one operator, computed by its function."""
    weights = str(feeds["w"].dtype) if "w" in feeds else "float32"
    return _op_session(op, weights, tuple(sorted(attributes.items()))).run(None, feeds)
