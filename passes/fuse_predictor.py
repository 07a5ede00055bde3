# SPDX-License-Identifier: Apache-2.0
"""Makes one operator of each layer's network and selection.

Standard nodes for them are ten per kind and layer, each of which takes longer to start than to compute: 465 nodes in
the shape of OPT-1.3B.

Legal cases:
1. A network for each layer, in the form that insert_predictor gives styles dejavu and shadow+, with a selection that
   ranks or with thresholds: scores, threshold and count of its layer, and the last token's scores, come from one
   operator. Names of tensors stay.
2. Style shadow stays: one network for all layers costs a few nodes, and its selection may rank over all of them.

Only for targets that have the operator: the CPU.

Letters: B batch, S new tokens, Z sparse tail, E hidden, P predictor width, L predicted layers, N units of a kind per
layer, K columns of a table.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_graphsurgeon as gs

from shadowc.passes.surgery import Builder, produce, tidy
from shadowc.spec.density import UNIT_KINDS
from shadowc.spec.errors import InternalError
from shadowc.spec.ops import DOMAIN, PREDICT_UNITS, SELECT_THRESHOLD
from shadowc.spec.program import PassReport, Program, WeightRecipe

NAME = "fuse_predictor"


def apply(program: Program) -> PassReport:
    """Fuse every layer's network and selection, in place."""
    requires(program)
    if program.plan is None or program.plan.style == "shadow":
        return PassReport(NAME, {"operators": 0}, ("the graph has no network for each layer",))
    if any(node.op == PREDICT_UNITS.name for node in program.graph.nodes):
        return PassReport(NAME, {"operators": 0}, ("the graph has the operators",))
    builder, fused = Builder(program), 0
    for kind in UNIT_KINDS:
        for layer in range(1, program.facts.layers):
            _fuse(program, builder, kind, layer)
            fused += 1
        _join(program, builder, kind)
    removed = tidy(program)
    ensures(program)
    return PassReport(NAME, {"operators": fused, "removed": removed})


def requires(program: Program) -> None:
    """The predictor is there, and no product has become narrower."""
    if program.plan is None:
        return
    Builder(program).tensor("scores.heads", "insert_predictor")
    narrow = [name for name, recipe in program.weights.items() if _is_predictors(name) and recipe.quantised]
    fused = any(node.op == PREDICT_UNITS.name for node in program.graph.nodes)
    if narrow and not fused and program.plan.style != "shadow":
        raise InternalError(f"{NAME}: {narrow[0]} has become narrower; quantise has to run behind it")


def ensures(program: Program) -> None:
    """No product of a predictor of its own and no selection is left in the graph."""
    for node in program.graph.nodes:
        alone = node.op == "MatMul" and _is_predictors(node.inputs[1].name)
        if alone or (node.domain == DOMAIN and node.op == SELECT_THRESHOLD.name):
            raise InternalError(f"{NAME}: {node.name} was left")


def _is_predictors(name: str) -> bool:
    return name.startswith("predictor.") and name.endswith(".weight")


def _fuse(program: Program, builder: Builder, kind: str, layer: int) -> None:
    """Replace the nodes between what a layer reads and its scores, threshold and count."""
    assert program.plan is not None
    name, of_layer = f"predictor.{kind}.{layer}", f"{kind}.{layer}"
    scores, threshold, active = (_made(builder, f"{part}.{of_layer}") for part in ("scores", "threshold", "active"))
    (product,) = _made(builder, f"{name}.fc1.product").inputs
    (cut,) = product.inputs[0].inputs
    B, _, _, units = scores.shape
    last = builder.variable(f"mask_scores.{of_layer}", np.float32, (B, 1, 1, units))
    given, column = _given(builder, kind, layer, threshold)
    by_rank = program.plan.select == "exact"
    attributes = {
        "column": column,
        "select": "density" if by_rank else "threshold",
        "relu": int(program.plan.style != "shadow+"),
        "exempt": int(by_rank and layer - 1 in program.plan.exempt),
        "min_active": _min_active(program, kind) if by_rank else 0,
    }
    inputs = [cut.inputs[0], _made(builder, "tail"), given, *_network(program, builder, name)]
    node = gs.Node(PREDICT_UNITS.name, name, attributes, inputs, domain=DOMAIN)
    program.graph.nodes.insert(program.graph.nodes.index(scores.inputs[0]), node)
    produce(node, [scores, threshold, active, last])


def _min_active(program: Program, kind: str) -> int:
    assert program.plan is not None
    return program.plan.min_active_heads if kind == "heads" else program.plan.min_active_neurons


def _network(program: Program, builder: Builder, name: str) -> list[gs.Tensor]:
    """Weights as rows [out,in], their factors, and biases, of both products."""
    operands: list[gs.Tensor] = []
    for part in ("fc1", "fc2"):
        weight = _made(builder, f"{name}.{part}.weight")
        recipe = program.weights[weight.name]
        rows = tuple(reversed(recipe.shape))
        program.weights[weight.name] = replace(recipe, kind="network_rows", shape=rows)
        weight.shape = rows
        scales = WeightRecipe("network_scales", recipe.sources, rows[:1])
        operands += [weight, builder.weight(f"{weight.name}.scales", scales), _made(builder, f"{name}.{part}.bias")]
    return operands


def _given(builder: Builder, kind: str, layer: int, threshold: gs.Variable) -> tuple[gs.Tensor, int]:
    """What the layer selects by, [B,K], and the column that is its own."""
    of_layers = [name for part in ("shares", "limits") for name in (f"{part}.{kind}.{layer}",) if name in builder]
    if of_layers:
        (gather,) = _made(builder, of_layers[0]).inputs
        return gather.inputs[0], layer - 1
    (select,) = threshold.inputs
    density, column = select.inputs[1], f"density.{kind}.column"
    if column in builder:
        return builder.tensor(column, NAME), 0
    shape = (*density.shape, 1)
    return builder.node("Unsqueeze", [density, builder.ints(1)], column, np.float32, shape), 0


def _join(program: Program, builder: Builder, kind: str) -> None:
    """Make the scores of all layers, those of the last token too, from what the operators give."""
    for part in ("mask_scores", "scores"):
        whole = _made(builder, f"{part}.{kind}")
        layers = [_made(builder, f"{part}.{kind}.{layer}") for layer in range(1, program.facts.layers)]
        joint = gs.Node("Concat", whole.name, {"axis": 2}, layers)
        program.graph.nodes.append(joint)
        whole.inputs[0].outputs.clear()
        produce(joint, [whole])


def _made(builder: Builder, name: str) -> gs.Tensor:
    return builder.tensor(name, "insert_predictor")
