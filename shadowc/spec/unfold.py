# SPDX-License-Identifier: Apache-2.0
"""What operators for the CPU do besides, or alone, in standard nodes and the operators that every target has.

In: a graph that uses the operators of ops.CPU_OPS. Out, in place: the same with those of ops.OPS alone, without norms
of their own; names of tensors stay.

Letters as in ops.py: B batch, Z sparse tail, Y tokens that are scored (Z, at least 1), E hidden, P predictor width,
N units of a layer.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx
from onnx import TensorProto, helper

from shadowc.spec.nodes import Nodes
from shadowc.spec.ops import DOMAIN, MATMUL_ROWS, OPS, PREDICT_UNITS, SELECT_THRESHOLD, OpSpec


def unfold_norms(graph: onnx.GraphProto) -> None:
    """Write LayerNormalization in front of each operator that takes its norm itself, and Add behind it, in place."""
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        spec = next((spec for spec in OPS if node.domain == DOMAIN and node.op_type == spec.name), None)
        if spec is None or spec.norm is None or len(node.input) != len(spec.inputs) + len(spec.norm.inputs):
            nodes.append(node)
            continue
        residual, (scale, bias), total = node.input[0], node.input[len(spec.inputs) :], node.output[0]
        epsilon = {part.name: part.f for part in node.attribute}.get("epsilon", spec.norm.attributes[0].default)
        plain = onnx.NodeProto.FromString(node.SerializeToString())
        del plain.input[len(spec.inputs) :]
        plain.input[0], plain.output[0] = f"{node.name}.x", f"{node.name}.y"
        kept = [part for part in plain.attribute if part.name != "epsilon"]
        del plain.attribute[:]
        plain.attribute.extend(kept)
        norm = helper.make_node("LayerNormalization", [residual, scale, bias], [plain.input[0]], plain.input[0])
        norm.attribute.extend(helper.make_attribute(*part) for part in (("axis", -1), ("epsilon", epsilon)))
        nodes += [norm, plain, helper.make_node("Add", [residual, plain.output[0]], [total], total)]
    _replace_nodes(graph, nodes)


def unfold_products(graph: onnx.GraphProto, operators: tuple[OpSpec, ...] = (PREDICT_UNITS, MATMUL_ROWS)) -> None:
    """Write each of these operators as standard nodes, those that select as SelectThreshold behind them, in place."""
    n, names = Nodes(), {spec.name for spec in operators}
    for node in graph.node:
        if node.domain != DOMAIN or node.op_type not in names:
            n.protos.append(node)
        elif node.op_type == PREDICT_UNITS.name:
            _predict(n, node)
        else:
            x, w, scales = node.input
            _product(n, x, w, scales, node.output[0])
    _replace_nodes(graph, n.protos)


def _predict(n: Nodes, node: onnx.NodeProto) -> None:
    name, outputs = node.name, [*node.output, *[""] * 4]
    given = {part.name: helper.get_attribute_value(part) for part in node.attribute}
    x, tail, density, w1, scales1, b1, w2, scales2, b2, *norm = node.input
    predicted = n.Max(tail, n.ints(1), out=f"{name}.predicted")
    tokens = n.sizes(x, 1, 2)
    rows_BYE = n.Slice(x, n.Sub(tokens, predicted), tokens, n.ints(1), out=f"{name}.rows")
    if norm:
        epsilon = given.get("epsilon", 1e-5)
        rows_BYE = n.LayerNormalization(rows_BYE, *norm, axis=-1, epsilon=epsilon, out=f"{name}.x")
    hidden_BYP = n.Add(_product(n, rows_BYE, w1, scales1), b1, out=f"{name}.hidden")
    if given.get("relu", 0):
        hidden_BYP = n.Relu(hidden_BYP)
    flat_BYN = n.Add(_product(n, hidden_BYP, _rows(n, w2, scales2, w1), scales2), b2, out=f"{name}.scores")
    every_BY1N = n.Unsqueeze(flat_BYN, n.ints(2))
    if outputs[3]:
        n.Slice(every_BY1N, n.ints(-1), n.ints(np.iinfo(np.int64).max), n.ints(1), out=outputs[3])
    scores = outputs[0] or f"{name}.kept"
    n.Slice(every_BY1N, n.Sub(predicted, tail), predicted, n.ints(1), out=scores)
    column = given.get("column", 0)
    if given.get("select", b"density") == b"threshold":
        _compare(n, scores, n.Gather(density, n.ints(column), axis=1), outputs)
        return
    selection = helper.make_node(
        SELECT_THRESHOLD.name,
        [scores, n.Gather(density, n.integer(column), axis=1)],
        [outputs[1] or f"{name}.threshold", outputs[2] or f"{name}.active"],
        f"{name}.select",
        domain=DOMAIN,
        scope="local",
        exempt=[0] if given.get("exempt", 0) else [-1],
        min_active=given.get("min_active", 0),
    )
    n.protos.append(selection)


def _rows(n: Nodes, w2: str, scales2: str, w1: str) -> str:
    """w2 [N,P], whether it is stored so or four weights of 16 rows at a time."""
    weights = n.Cast(w2, to=TensorProto.FLOAT)
    # Of rank 2 it is one group of all rows, [1,1,N,P]: what puts 16 rows in order then changes nothing.
    groups = n.Concat(n.ints(1, 1), n.Shape(weights), axis=0)
    last_four = n.Slice(groups, n.ints(-4), n.ints(np.iinfo(np.int64).max), n.ints(0))
    rows_first = n.Transpose(n.Reshape(weights, last_four), perm=[0, 2, 1, 3])
    width = n.Mul(n.sizes(rows_first, 2, 3), n.sizes(rows_first, 3, 4))
    flat = n.Reshape(rows_first, n.Concat(n.ints(-1), width, axis=0))
    ends = n.Concat(n.Shape(scales2), n.sizes(w1, 0, 1), axis=0)
    return n.Slice(flat, n.ints(0, 0), ends, n.ints(0, 1))


def _product(n: Nodes, x: str, w: str, scales: str, out: str = "") -> str:
    """Return x times the rows of w, each with its factor."""
    rows = n.Mul(n.Cast(w, to=TensorProto.FLOAT), n.Unsqueeze(scales, n.ints(1)))
    return n.MatMul(x, n.Transpose(rows, perm=[1, 0]), out=out)


def _compare(n: Nodes, scores: str, limit_B1: str, outputs: list[str]) -> None:
    """Give every token the same threshold, and count the units that are not below it."""
    threshold = n.Expand(n.Unsqueeze(limit_B1, n.ints(1)), n.sizes(scores, 0, 3), out=outputs[1])
    reach = n.Not(n.Less(scores, n.Unsqueeze(threshold, n.ints(3))))
    n.ReduceSum(n.Cast(reach, to=TensorProto.INT32), n.ints(3), keepdims=0, out=outputs[2])


def _replace_nodes(graph: onnx.GraphProto, nodes: Iterable[onnx.NodeProto]) -> None:
    kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(kept)
