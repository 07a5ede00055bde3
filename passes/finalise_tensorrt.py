# SPDX-License-Identifier: Apache-2.0
"""The public face of the graphs for TensorRT: as `finalise`, with required inputs only and no functions.

Legal cases:
1. The decode graph: operators, times and cache as inputs, counts as outputs.
2. The prefill graph: standard operators, the prompt as input, the last logits and fresh K/V as outputs.

GraphSurgeon would turn an initialiser that is also an input into a constant, and TensorRT drops such an input:
densities are plain required inputs, and so are all weights.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from shadowc.passes import finalise
from shadowc.passes.surgery import tidy
from shadowc.spec.errors import InternalError
from shadowc.spec.program import PassReport, Program

NAME = "finalise_tensorrt"


def apply(program: Program) -> PassReport:
    """Rename, collect and order, in place."""
    requires(program)
    counts = {"tensors": finalise.name_tensors(program)}
    if not is_prefill(program):
        counts["read"] = finalise.collect_read(program)
    counts["removed"] = tidy(program)
    counts["nodes"] = finalise.name_nodes(program)
    finalise.order_interface(program, input_names(program), output_names(program))
    for value in program.graph.inputs:
        if value.name == "attention_mask":
            value.shape = ("B", "S")
    ensures(program)
    return PassReport(NAME, counts)


def requires(program: Program) -> None:
    """Either steady_shapes or dense_prefill has run."""
    names = {value.name for value in program.graph.inputs}
    if "start" not in names and not is_prefill(program):
        raise InternalError(f"{NAME}: the graph still derives its times; steady_shapes or dense_prefill comes first")


def ensures(program: Program) -> None:
    """The interface is complete, nothing has a default, and nothing is left of the trace."""
    finalise.check_interface(program, input_names(program), output_names(program))
    if defaults := [value.name for value in program.graph.inputs if isinstance(value, gs.Constant)]:
        raise InternalError(f"{NAME}: {defaults[0]} has a default")
    if functions := [function.name for function in program.graph.functions]:
        raise InternalError(f"{NAME}: the graph carries the function {functions[0]}, which would win over a plugin")


def is_prefill(program: Program) -> bool:
    """Whether this is the past-less graph."""
    return all(not value.name.startswith("past_key_values.") for value in program.graph.inputs)


def input_names(program: Program) -> list[str]:
    """Run-time inputs in graph order."""
    if is_prefill(program):
        return ["input_ids", "attention_mask"]
    dials = ["density_heads", "density_neurons"] if program.plan else []
    return ["input_ids", "past", "start", *finalise.cache_names(program, "past_key_values"), *dials]


def output_names(program: Program) -> list[str]:
    """Graph outputs in order."""
    present = finalise.cache_names(program, "present")
    if is_prefill(program):
        return ["logits", *present]
    return ["logits", *present, *(["active.heads", "active.neurons"] if program.plan else []), "read"]
