# SPDX-License-Identifier: Apache-2.0
"""Operators of shadowc one behind the other as one node: what ONNX Runtime runs on the CPU in place of a stored graph.

A Chain (plugins/cpu/ort_chain.cc) computes what its steps compute, to the bit. ONNX Runtime takes some 10 us from node
to node, because behind megabytes of weights nothing that it needs is in the caches, and more to hand each parallel
section to its threads. No stored graph has one: other hosts need not know the operator.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from shadowc.runtime.variants import inputs_of
from shadowc.spec.ops import CPU_OPS, DOMAIN, Operand

if TYPE_CHECKING:
    import onnx

CHAIN = "Chain"
_STEPS = {spec.name: spec for spec in CPU_OPS}


def chained(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph whose operators of shadowc are steps of chains, of as few as there can be.

    What the graph puts out, or other nodes read, comes out of a chain under its name.
    """
    copy = type(model)()
    copy.CopyFrom(model)
    graph = copy.graph
    types = {value.name: value.type.tensor_type.elem_type for value in graph.input}
    steps, others = _levels(graph.node)
    nodes: list[onnx.NodeProto] = []
    for level in range(max((*steps, *others), default=-1) + 1):
        nodes += others[level]
        chain = steps[level]
        if len(chain) < 2:
            nodes += chain
            continue
        elsewhere = (node for part in (steps, others) for at in part for node in part[at] if part[at] is not chain)
        wanted = {name for node in elsewhere for name in inputs_of(node)} | {value.name for value in graph.output}
        nodes.append(_chain(f"chain.{level}", chain, wanted, types))
    rest = [type(node).FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(rest)
    return copy


_ByLevel = dict[int, "list[onnx.NodeProto]"]


def _levels(nodes: Iterable[onnx.NodeProto]) -> tuple[_ByLevel, _ByLevel]:
    """Steps and other nodes by level: no step needs an other node that needs a step of its level."""
    steps: _ByLevel = defaultdict(list)
    others: _ByLevel = defaultdict(list)
    level_of: dict[str, tuple[int, bool]] = {}
    for node in nodes:
        is_step = node.domain == DOMAIN and node.op_type in _STEPS
        found = [level_of[name] for name in inputs_of(node) if name in level_of]
        level = max((at + (of_step and not is_step) for at, of_step in found), default=0)
        (steps if is_step else others)[level].append(node)
        level_of.update(dict.fromkeys(node.output, (level, is_step)))
    return steps, others


def _chain(
    name: str, steps: Sequence[onnx.NodeProto], wanted: set[str], types: Mapping[str, int]
) -> onnx.NodeProto:
    """The node of these steps; `types` are those of the graph's inputs."""
    import onnx

    made = {output for step in steps for output in step.output}
    read = {name for step in steps for name in step.input}
    given = list(dict.fromkeys(name for step in steps for name in step.input if name and name not in made))
    values = {name: number for number, name in enumerate(given)}
    results: dict[str, tuple[int, int]] = {}
    attributes: dict[str, str | list[int]] = {
        "operators": "\n".join(step.op_type for step in steps),
        "names": "\n".join(step.name for step in steps),
    }
    for number, step in enumerate(steps):
        attributes[f"{number}.inputs"] = [values.get(name, -1) for name in step.input]
        for operand, output in zip(_STEPS[step.op_type].outputs, step.output, strict=False):
            if output in read | wanted:
                values[output] = len(values)
            if output in wanted:
                results[output] = _type_of(operand, step, types), len(operand.shape)
        attributes[f"{number}.outputs"] = [values.get(name, -1) for name in step.output]
    attributes["results"] = [values[name] for name in results]
    attributes["types"], attributes["ranks"] = ([kind[i] for kind in results.values()] for i in (0, 1))
    chain = onnx.helper.make_node(CHAIN, given, list(results), name, domain=DOMAIN, **attributes)
    for number, step in enumerate(steps):
        for attribute in step.attribute:
            chain.attribute.add().CopyFrom(attribute)
            chain.attribute[-1].name = f"{number}.{attribute.name}"
    return chain


def _type_of(operand: Operand, step: onnx.NodeProto, types: Mapping[str, int]) -> int:
    """ONNX's number of an output's type; one that may have several has that of an input, the cache."""
    import onnx

    if len(operand.types) == 1:
        return int(onnx.helper.np_dtype_to_tensor_dtype(np.dtype(operand.types[0])))
    inputs = _STEPS[step.op_type].inputs
    return types[next(name for name, like in zip(step.input, inputs, strict=False) if like.types == operand.types)]
