# SPDX-License-Identifier: Apache-2.0
"""Variants of an engine's two graphs: weights as constants, and both graphs as the branches of one ONNX `If`."""

from __future__ import annotations

from collections.abc import Iterable

import onnx
from onnx import TensorProto, helper

from shadowc.spec.manifest import WEIGHTS_FILE, WeightPart

PROMPT = "prompt"
"""Input of the joined graph, a bool: which branch runs."""
_TYPES = {
    "float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16,
    "int8": TensorProto.INT8,
}  # fmt: skip


def with_constants(model: onnx.ModelProto, weights: Iterable[WeightPart]) -> onnx.ModelProto:
    """The same graph with its weights as initializers, whose bytes stay in weights.bin."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    table = {weight.name: weight for weight in weights}
    inputs = list(made.graph.input)
    del made.graph.input[:]
    for value in inputs:
        if value.name in table:
            made.graph.initializer.append(_in_file(table[value.name]))
        else:
            made.graph.input.append(value)
    return made


def joined(prefill: onnx.ModelProto, decode: onnx.ModelProto) -> onnx.ModelProto:
    """One graph that runs `prefill` where `prompt` is true, else `decode`; it gives what both give."""
    shared = [value.name for value in prefill.graph.output]
    inputs = {value.name: value for model in (prefill, decode) for value in model.graph.input}
    outputs = [value for value in decode.graph.output if value.name in shared]
    choice = helper.make_node(
        "If", [PROMPT], shared, name="either",
        then_branch=_branch("prefill", prefill.graph, shared), else_branch=_branch("decode", decode.graph, shared),
    )  # fmt: skip
    opsets = {entry.domain: entry for model in (decode, prefill) for entry in model.opset_import}  # prefill's is newer
    return helper.make_model(
        helper.make_graph(
            [choice], "either", [helper.make_tensor_value_info(PROMPT, TensorProto.BOOL, []), *inputs.values()], outputs
        ),
        opset_imports=list(opsets.values()), ir_version=prefill.ir_version,
    )  # fmt: skip


def _branch(name: str, graph: onnx.GraphProto, outputs: Iterable[str]) -> onnx.GraphProto:
    """A graph without inputs: it reads them, weights included, from around itself. Its own names get a prefix."""
    own = {value for node in graph.node for value in node.output} | {tensor.name for tensor in graph.initializer}
    new = {value: f"{name}/{value}" for value in own if value}
    made = onnx.GraphProto(name=name)
    for node in graph.node:
        copy = made.node.add()
        copy.CopyFrom(node)
        copy.name = f"{name}/{node.name}"
        copy.input[:] = [new.get(value, value) for value in node.input]
        copy.output[:] = [new.get(value, value) for value in node.output]
    for tensor in graph.initializer:
        made.initializer.add().CopyFrom(tensor)
        made.initializer[-1].name = new[tensor.name]
    types = {value.name: value.type for value in graph.output}
    made.output.extend(helper.make_value_info(new[value], types[value]) for value in outputs)
    return made


def _in_file(weight: WeightPart) -> TensorProto:
    tensor = TensorProto(name=weight.name, data_type=_TYPES[weight.dtype], dims=weight.shape)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", WEIGHTS_FILE), ("offset", weight.offset), ("length", weight.bytes)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor
