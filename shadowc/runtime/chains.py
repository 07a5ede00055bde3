# SPDX-License-Identifier: Apache-2.0
"""Operators of shadowc one behind the other as one node: what ONNX Runtime runs on the CPU in place of a stored graph.

A Chain (plugins/cpu/ort_chain.cc) computes what its steps compute, to the bit. ONNX Runtime takes some 10 us from node
to node, because behind megabytes of weights nothing that it needs is in the caches. And it takes and gives back every
initialiser in every call, which are hundreds: of what lies in a file a chain gets all as one, and finds the weights of
its steps in there. No stored graph has a chain: other hosts need not know the operator.

ONNX's own operators (`runtime/standard_steps.py`) are steps where they read what steps have made. A graph all of whose
nodes can be steps is one chain; if it makes text, one call of it may compute several tokens, each from the id that the
one before has chosen (`runtime/token_runs.py`). In such a graph norms that are no part of an operator are steps too:
the last one or, where they come last in a layer, all. They differ from ONNX Runtime's in the last bits.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from shadowc.runtime.standard_steps import is_standard_step
from shadowc.runtime.token_runs import TokenRuns, add_token_runs
from shadowc.runtime.variants import inputs_of
from shadowc.runtime.weights_memory import place_of
from shadowc.spec.errors import InternalError
from shadowc.spec.ops import CHAIN, CPU_OPS, DOMAIN

if TYPE_CHECKING:
    import onnx

_STEPS = {spec.name: spec for spec in CPU_OPS}
_NONE = -1
_NORM = "LayerNormalization"
_STORED = "chain.weights"
"""The initialiser that is a whole file of weights."""
_ByLevel = dict[int, "list[onnx.NodeProto]"]


def chained(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph whose operators of shadowc are steps of chains, of as few as there can be.

    What the graph puts out, or other nodes read, comes out of a chain under its name.
    """
    copy = type(model)()
    copy.CopyFrom(model)
    graph = copy.graph
    kinds, stored = _kinds(graph), _stored(graph)
    whole = all(_is_operator(node) or is_standard_step(node, kinds) for node in graph.node)
    runs = add_token_runs(graph) if whole else None
    steps, others = _levels(graph.node, kinds, whole=whole)
    nodes: list[onnx.NodeProto] = []
    for level in range(max((*steps, *others), default=-1) + 1):
        nodes += others[level]
        chain = steps[level]
        elsewhere = (node for part in (steps, others) for at in part if part[at] is not chain for node in part[at])
        wanted = {name for node in elsewhere for name in inputs_of(node)} | {value.name for value in graph.output}
        results = [name for node in chain for name in node.output if name and name in wanted]
        if len(chain) > 1 and results:
            _say_types(graph, results, kinds)
            nodes.append(_chain(f"chain.{level}", chain, results, stored, runs))
        else:
            nodes += chain
    rest = [type(node).FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(rest)
    _keep_whole(graph, stored)
    return copy


def _stored(graph: onnx.GraphProto) -> dict[str, onnx.TensorProto]:
    """Those initialisers that lie in one file."""
    import onnx

    known = {value.name for value in graph.input}  # a caller may give others
    found = {
        tensor.name: tensor
        for tensor in graph.initializer
        if tensor.data_location == onnx.TensorProto.EXTERNAL and tensor.name not in known
    }
    return found if len({place_of(tensor)[0] for tensor in found.values()}) == 1 else {}


def _keep_whole(graph: onnx.GraphProto, stored: Mapping[str, onnx.TensorProto]) -> None:
    """Let the file be an initialiser, if chains read it, and drop what only they read of it."""
    import onnx

    read = {name for node in graph.node for name in inputs_of(node)} | {value.name for value in graph.output}
    if _STORED not in read:
        return
    places = [place_of(tensor) for tensor in stored.values()]
    size = max(end for _, _, end in places)
    kept = [tensor for tensor in graph.initializer if tensor.name in read or tensor.name not in stored]
    whole = onnx.TensorProto(
        name=_STORED, data_type=onnx.TensorProto.UINT8, dims=[size], data_location=onnx.TensorProto.EXTERNAL
    )
    for key, value in (("location", places[0][0]), ("offset", "0"), ("length", str(size))):
        whole.external_data.add(key=key, value=value)
    del graph.initializer[:]
    graph.initializer.extend([*kept, whole])


def _levels(nodes: Iterable[onnx.NodeProto], kinds: Mapping[str, int], *, whole: bool) -> tuple[_ByLevel, _ByLevel]:
    """Steps and other nodes by level: no step needs an other node that needs a step of its level.

    ONNX's own operators are steps where they read what steps have made, and if all nodes can be steps (`whole`).
    """
    steps: _ByLevel = defaultdict(list)
    others: _ByLevel = defaultdict(list)
    level_of: dict[str, tuple[int, bool]] = {}
    for node in nodes:
        found = [level_of[name] for name in inputs_of(node) if name in level_of]
        of_steps = bool(found) and all(of_step for _, of_step in found) and is_standard_step(node, kinds)
        of_steps = of_steps and node.op_type != _NORM
        is_step = whole or of_steps or _is_operator(node)
        level = max((at + (of_step and not is_step) for at, of_step in found), default=0)
        (steps if is_step else others)[level].append(node)
        level_of.update(dict.fromkeys(filter(None, node.output), (level, is_step)))
    return steps, others


def _chain(
    name: str,
    steps: Sequence[onnx.NodeProto],
    results: Sequence[str],
    stored: Mapping[str, onnx.TensorProto],
    runs: TokenRuns | None,
) -> onnx.NodeProto:
    """The node of these steps that puts out `results`, whose weights may lie in `_STORED`; `runs`: many times."""
    import onnx

    made = {output for step in steps for output in step.output}
    asked = [name for step in steps for name in step.input if name and name not in made]
    read = list(dict.fromkeys([*asked, *(runs.inputs if runs else ())]))
    weights = [name for name in read if name in stored]
    given = [name for name in read if name not in stored] + [_STORED] * bool(weights)
    values = {name: number for number, name in enumerate([*given, *weights])}
    attributes: dict[str, str | int | list[int]] = {
        "operators": "\n".join(step.op_type for step in steps),
        "names": "\n".join(step.name or step.output[0] for step in steps),
        "stored": values.get(_STORED, _NONE),
    }
    for number, tensor in enumerate(stored[name] for name in weights):
        attributes[f"stored.{number}"] = [tensor.data_type, place_of(tensor)[1], *tensor.dims]
    for number, step in enumerate(steps):
        attributes[f"{number}.inputs"] = [values[name] if name else _NONE for name in step.input]
        for output in filter(None, step.output):
            values[output] = len(values)
        attributes[f"{number}.outputs"] = [values[name] if name else _NONE for name in step.output]
    attributes["results"] = [values[name] for name in results]
    if runs is not None:
        attributes |= runs.attributes(values)
    chain = onnx.helper.make_node(CHAIN, given, results, name, domain=DOMAIN)
    chain.attribute.extend(onnx.helper.make_attribute(key, value) for key, value in attributes.items())
    for number, step in enumerate(steps):
        for attribute in step.attribute:
            chain.attribute.add().CopyFrom(attribute)
            chain.attribute[-1].name = f"{number}.{attribute.name}"
    return chain


def _kinds(graph: onnx.GraphProto) -> dict[str, int]:
    """Element types: those that the graph says, and of steps those that ONNX Runtime derives."""
    kinds = {tensor.name: tensor.data_type for tensor in graph.initializer} | _said(graph)
    for node in graph.node:
        if is_standard_step(node, kinds) or _is_operator(node):
            for name, kind in zip(node.output, _kinds_of(node, kinds), strict=False):
                if name and kind is not None:
                    kinds.setdefault(name, kind)
    return kinds


def _said(graph: onnx.GraphProto) -> dict[str, int]:
    said = (*graph.input, *graph.output, *graph.value_info)
    return {value.name: kind for value in said if (kind := value.type.tensor_type.elem_type)}


def _kinds_of(step: onnx.NodeProto, known: Mapping[str, int]) -> Iterator[int | None]:
    """Of the outputs of a step; `known` may have the types of those inputs that they follow."""
    import onnx

    if step.domain == "":
        yield onnx.TensorProto.INT64 if step.op_type == "Shape" else known.get(step.input[0])
        return
    spec = _STEPS[step.op_type]
    for operand in spec.outputs:
        if len(operand.types) > 1:  # that of the past that it continues
            inputs = zip(spec.inputs, step.input, strict=False)
            yield next((known.get(other) for like, other in inputs if like.types == operand.types), None)
        else:
            yield onnx.helper.np_dtype_to_tensor_dtype(np.dtype(operand.types[0]))


def _say_types(graph: onnx.GraphProto, results: Iterable[str], kinds: Mapping[str, int]) -> None:
    """Write down what ONNX Runtime derives for steps, and cannot for a chain."""
    import onnx

    said = _said(graph)
    for name in results:
        if name in said:
            continue
        if name not in kinds:
            raise InternalError(f"a chain puts out {name}, whose type nothing in the graph says")
        graph.value_info.append(onnx.helper.make_tensor_value_info(name, kinds[name], None))


def _is_operator(node: onnx.NodeProto) -> bool:
    return node.domain == DOMAIN and node.op_type in _STEPS
