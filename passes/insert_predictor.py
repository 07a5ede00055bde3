# SPDX-License-Identifier: Apache-2.0
"""Adds the predictor, from tensors that exist in time to scores and thresholds of all layers but the first.

Legal cases, each for a plan in a graph that has no scores yet:
1. Style shadow: layer 0's attention context, which its out_proj multiplies, makes the scores of all later layers.
2. Style dejavu: what a layer's attention reads (the output of its first norm; the residual where norms come last)
   makes the scores of that layer, and a selection of its own ranks them: what later layers will score is not known
   then, so the scope is local. The graph still puts out scores, thresholds and counts of all layers together.
3. Style shadow+: as 2, but what the layer's FFN reads makes the scores of its neurons, the networks have no ReLU, and
   a table turns the density into a share for each layer.
4. A plan with thresholds, any style: in place of a selection that ranks, a row of a table is the thresholds, and
   standard operators count. Then every scope will do: one threshold for all layers needs no scores of later ones.

The predictor runs on the last max(Z, 1) tokens: at least one, so that `mask_scores`, its last row, always exists;
the operators get the last Z rows. Z is the input `sparse_tail` clamped to S; negative means 1 if S is 1, else 0.

Letters: B batch, S new tokens, Z sparse tail, Y = max(Z, 1), E hidden, P predictor width, L predicted layers,
N units of a kind per layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from shadowc.checkpoint.opt import layer_names
from shadowc.passes.surgery import Builder, Scopes, sort_nodes, units_of
from shadowc.spec.errors import InternalError
from shadowc.spec.ops import DOMAIN, SELECT_THRESHOLD
from shadowc.spec.program import GRID, SMALLEST_SPAN, PassReport, Program, SparsityPlan, WeightRecipe
from shadowc.spec.tensors import TAIL

NAME = "insert_predictor"
CONTEXT = "context.0"


@dataclass(frozen=True, slots=True)
class _Kind:
    """One of the two kinds of units."""

    name: str
    units: int
    width: int
    min_active: int


def apply(program: Program) -> PassReport:
    """Insert the networks and the selections of both kinds, with their inputs, outputs and weights."""
    requires(program)
    if any(value.name == "density_heads" for value in program.graph.inputs):
        return PassReport(NAME, {"networks": 0}, ("the graph has a predictor",))
    plan = _plan(program)
    builder = Builder(program)
    tail = _tail(builder)
    if plan.style == "shadow":
        context = _scaled_context(program, builder)
        for kind in _kinds(program, plan):
            _for_all_layers(program, builder, kind, context, tail)
    else:
        inputs = _layer_inputs(program, builder)
        behind = _layer_inputs(program, builder, ffn=True) if plan.style == "shadow+" else inputs
        for kind, read in zip(_kinds(program, plan), (inputs, behind), strict=True):
            _layer_by_layer(program, builder, kind, read, tail)
    sort_nodes(program.graph)
    ensures(program)
    networks = 2 * (1 if plan.style == "shadow" else program.facts.predicted_layers)
    return PassReport(NAME, {"networks": networks, "selections": networks})


def requires(program: Program) -> None:
    """A plan whose ranking knows all its scores in time, and the canonical form of layer 0."""
    plan = _plan(program)
    if plan.style != "shadow" and plan.scope != "local" and plan.select == "exact":
        raise InternalError(f"{NAME}: style {plan.style} ranks each layer by itself, the plan's scope is {plan.scope}")
    Builder(program).tensor("tokens", "canonicalise")


def ensures(program: Program) -> None:
    """Scores of every unit of every predicted layer reach the graph's outputs."""
    outputs = {value.name: value for value in program.graph.outputs}
    for kind in _kinds(program, _plan(program)):
        shape = tuple(outputs[f"scores.{kind.name}"].shape)[2:]
        if shape != (program.facts.predicted_layers, kind.units):
            raise InternalError(f"{NAME}: scores.{kind.name} has shape {shape}")


def _plan(program: Program) -> SparsityPlan:
    if program.plan is None:
        raise InternalError(f"{NAME} needs a sparsity plan; a dense engine has no predictor")
    return program.plan


def _kinds(program: Program, plan: SparsityPlan) -> tuple[_Kind, _Kind]:
    units = units_of(program)
    return (
        _Kind("heads", units["heads"], plan.width_heads, plan.min_active_heads),
        _Kind("neurons", units["neurons"], plan.width_neurons, plan.min_active_neurons),
    )


@dataclass(frozen=True, slots=True)
class _Tail:
    """Row ranges: of the context that the predictor reads, and of its scores that the operators get."""

    predicted: gs.Variable
    skipped: gs.Variable


def _tail(builder: Builder) -> _Tail:
    """Compute Z and Y from sparse_tail and the number of new tokens."""
    i64 = np.int64
    tokens = builder.tensor("tokens", "canonicalise")
    wish = builder.input("sparse_tail", i64, (1,))
    is_step = builder.node("Equal", [tokens, builder.ints(1)], "tail.is_step", np.bool_, (1,))
    usual = builder.node("Cast", [is_step], "tail.usual", i64, (1,), to=7)  # TensorProto.INT64
    unset = builder.node("Less", [wish, builder.ints(0)], "tail.unset", np.bool_, (1,))
    wanted = builder.node("Where", [unset, usual, wish], "tail.wanted", i64, (1,))
    tail = builder.node("Min", [wanted, tokens], TAIL, i64, (1,))
    predicted = builder.node("Max", [tail, builder.ints(1)], "tail.predicted", i64, (1,))
    return _Tail(predicted, builder.node("Sub", [predicted, tail], "tail.skipped", i64, (1,)))


def _scaled_context(program: Program, builder: Builder) -> gs.Variable:
    """(a - min) / max(max - min, smallest) of the last Y tokens' context, [B,Y,E]."""
    context = Scopes(program.graph).linear(layer_names(0).out.weight).x
    context.name = CONTEXT
    shape, E = ("B", "Y", program.facts.hidden), program.facts.hidden
    tokens, predicted = builder.tensor("tokens", "canonicalise"), builder.tensor("tail.predicted", NAME)
    first = builder.node("Sub", [tokens, predicted], "predictor.first", np.int64, (1,))
    f32, last_axis, column = np.float32, builder.ints(-1), ("B", "Y", 1)
    rows = builder.node("Slice", [context, first, tokens, builder.ints(1)], "predictor.context", f32, ("B", "Y", E))
    low = builder.node("ReduceMin", [rows, last_axis], "predictor.low", f32, column)
    high = builder.node("ReduceMax", [rows, last_axis], "predictor.high", f32, column)
    span = builder.node("Sub", [high, low], "predictor.span", f32, column)
    smallest = builder.constant("predictor.smallest", np.array(SMALLEST_SPAN, f32))
    divisor = builder.node("Max", [span, smallest], "predictor.divisor", f32, column)
    shifted = builder.node("Sub", [rows, low], "predictor.shifted", f32, shape)
    return builder.node("Div", [shifted, divisor], "predictor.input", f32, shape)


def _layer_inputs(program: Program, builder: Builder, *, ffn: bool = False) -> list[gs.Variable]:
    """What the attention, or the FFN, of each predicted layer reads, of the last Y tokens, [B,Y,E]."""
    scopes, shape = Scopes(program.graph), ("B", "Y", program.facts.hidden)
    tokens, predicted = builder.tensor("tokens", "canonicalise"), builder.tensor("tail.predicted", NAME)
    if "predictor.first" not in builder:
        builder.node("Sub", [tokens, predicted], "predictor.first", np.int64, (1,))
    first = builder.tensor("predictor.first", NAME)
    found = []
    for layer in range(1, program.facts.layers):
        names = layer_names(layer)
        read = scopes.linear((names.fc1 if ffn else names.q).weight).x
        rows = [read, first, tokens, builder.ints(1)]
        found.append(builder.node("Slice", rows, layer_input(layer, ffn=ffn), np.float32, shape))
    return found


def layer_input(layer: int, *, ffn: bool = False) -> str:
    """Return the name of what the predictor of a model layer reads, styles dejavu and shadow+."""
    return f"predictor.{layer}.{'ffn_input' if ffn else 'input'}"


def _for_all_layers(program: Program, builder: Builder, kind: _Kind, scaled: gs.Variable, tail: _Tail) -> None:
    """One network and one selection."""
    L, N, f32 = program.facts.predicted_layers, kind.units, np.float32
    name = f"predictor.{kind.name}"
    flat = _network(program, builder, name, scaled, kind.width, L * N)
    scores = builder.node("Reshape", [flat, builder.ints(0, 0, L, N)], f"{name}.scores", f32, ("B", "Y", L, N))
    kept = _cut(builder, scores, kind, L, tail)
    plan, given = _plan(program), _density(builder, kind)
    if plan.select != "exact":
        given = _thresholds(program, builder, kind, given)
    threshold, active = _select(program, builder, kind, kept, given, sorted(plan.exempt))
    program.graph.outputs.extend([builder.tensor(f"mask_scores.{kind.name}", NAME), kept, threshold, active])


def _layer_by_layer(program: Program, builder: Builder, kind: _Kind, inputs: list[gs.Variable], tail: _Tail) -> None:
    """A network and a selection for every layer, and their results joined for the graph's outputs."""
    L, N, f32 = program.facts.predicted_layers, kind.units, np.float32
    densities, axis = _densities(program, builder, kind), builder.ints(2)
    every, thresholds, actives = [], [], []
    for layer, x in enumerate(inputs, start=1):
        name = f"predictor.{kind.name}.{layer}"
        flat = _network(program, builder, name, x, kind.width, N)
        scores = builder.node("Unsqueeze", [flat, axis], f"{name}.scores", f32, ("B", "Y", 1, N))
        part = [scores, tail.skipped, tail.predicted, builder.ints(1)]
        kept = builder.node("Slice", part, f"scores.{kind.name}.{layer}", f32, ("B", "Z", 1, N))
        exempt = [0] if layer - 1 in _plan(program).exempt else []
        threshold, active = _select(program, builder, kind, kept, densities[layer - 1], exempt)
        every.append(scores)
        thresholds.append(threshold)
        actives.append(active)
    joined = builder.node("Concat", every, f"predictor.{kind.name}.scores", f32, ("B", "Y", L, N), axis=2)
    kept = _cut(builder, joined, kind, L, tail)
    threshold = builder.node("Concat", thresholds, f"threshold.{kind.name}", f32, ("B", "Z", L), axis=2)
    active = builder.node("Concat", actives, f"active.{kind.name}", np.int32, ("B", "Z", L), axis=2)
    program.graph.outputs.extend([builder.tensor(f"mask_scores.{kind.name}", NAME), kept, threshold, active])


def _network(program: Program, builder: Builder, name: str, x: gs.Variable, width: int, outputs: int) -> gs.Variable:
    """Score by fc2(relu(fc1(x))), style shadow+ without the ReLU, [B,Y,outputs]."""
    hidden = _affine(builder, x, f"{name}.fc1", program.facts.hidden, width)
    if _plan(program).style != "shadow+":
        hidden = builder.node("Relu", [hidden], f"{name}.hidden", np.float32, ("B", "Y", width))
    return _affine(builder, hidden, f"{name}.fc2", width, outputs)


def _cut(builder: Builder, scores: gs.Variable, kind: _Kind, layers: int, tail: _Tail) -> gs.Variable:
    """Make `mask_scores`, the last row, and return the last Z rows, both of all layers."""
    ints, axis = builder.ints, builder.ints(1)
    last = [scores, ints(-1), ints(np.iinfo(np.int64).max), axis]
    builder.node("Slice", last, f"mask_scores.{kind.name}", np.float32, ("B", 1, layers, kind.units))
    part = [scores, tail.skipped, tail.predicted, axis]
    return builder.node("Slice", part, f"scores.{kind.name}", np.float32, ("B", "Z", layers, kind.units))


def _density(builder: Builder, kind: _Kind) -> gs.Variable:
    return builder.input(f"density_{kind.name}", np.float32, (f"B{kind.name[0]}",))  # Bh, Bn: B or 1


def _densities(program: Program, builder: Builder, kind: _Kind) -> list[gs.Variable]:
    """What each predicted layer selects by: the density asked for, of style shadow+ the layer's share of it, [B].

    Of a plan with thresholds the layer's threshold, [B,1].
    """
    density, L, f32 = _density(builder, kind), program.facts.predicted_layers, np.float32
    calibrated = _plan(program).select != "exact"
    if not calibrated and _plan(program).style != "shadow+":
        return [density] * L
    name = f"limits.{kind.name}" if calibrated else f"shares.{kind.name}"
    rows = _thresholds(program, builder, kind, density) if calibrated else _row(program, builder, name, name, density)
    numbers = [builder.ints(layer) if calibrated else builder.integer(layer) for layer in range(L)]
    shape = (*density.shape, 1) if calibrated else density.shape
    return [
        builder.node("Gather", [rows, number], f"{name}.{layer}", f32, shape, axis=1)
        for layer, number in enumerate(numbers, start=1)
    ]


def _row(program: Program, builder: Builder, name: str, source: str, density: gs.Variable) -> gs.Variable:
    """Look a density up in a table of the predictor, [B,L].

    As shares.layer_density: the nearest row, which has all rounding behind it; not a number means 1.
    """
    f32, shape, L = np.float32, density.shape, program.facts.predicted_layers
    zero, one, grid = (builder.constant(f"shares.{value}", np.array(value, f32)) for value in (0, 1, GRID))
    less = builder.node("Less", [density, one], f"{name}.less", np.bool_, shape)
    most = builder.node("Where", [less, density, one], f"{name}.most", f32, shape)
    clamped = builder.node("Max", [most, zero], f"{name}.clamped", f32, shape)
    scaled = builder.node("Mul", [clamped, grid], f"{name}.scaled", f32, shape)
    rounded = builder.node("Round", [scaled], f"{name}.rounded", f32, shape)
    row = builder.node("Cast", [rounded], f"{name}.row", np.int64, shape, to=7)  # TensorProto.INT64
    table = builder.weight(name, WeightRecipe("copy", (f"predictor.{source}",), (GRID + 1, L)))
    return builder.node("Gather", [table, row], f"{name}.of_layers", f32, (*shape, L), axis=0)


def _thresholds(program: Program, builder: Builder, kind: _Kind, density: gs.Variable) -> gs.Variable:
    """Look up the thresholds of all layers, [B,L]; none for those that are exempt."""
    plan, name, L = _plan(program), f"limits.{kind.name}", program.facts.predicted_layers
    rows = _row(program, builder, name, f"threshold.{plan.budget}.{kind.name}", density)
    if not plan.exempt:
        return rows
    dense = builder.constant("limits.dense", np.isin(np.arange(L), plan.exempt))
    least = builder.constant("limits.least", np.array(-np.inf, np.float32))
    return builder.node("Where", [dense, least, rows], f"{name}.obeyed", np.float32, rows.shape)


def _select(
    program: Program, builder: Builder, kind: _Kind, scores: gs.Variable, given: gs.Variable, exempt: list[int]
) -> tuple[gs.Variable, gs.Variable]:
    """Threshold and number of active units of the layers that the scores have, by a density or by thresholds [B,L]."""
    name, layers = scores.name.removeprefix("scores."), scores.shape[2]
    if _plan(program).select != "exact":
        return _compare(builder, name, scores, given)
    threshold = builder.variable(f"threshold.{name}", np.float32, ("B", "Z", layers))
    active = builder.variable(f"active.{name}", np.int32, ("B", "Z", layers))
    # -1 stands for none: GraphSurgeon cannot write an empty list, whose type it does not know
    attributes = {"scope": _plan(program).scope, "exempt": exempt or [-1], "min_active": kind.min_active}
    operator = gs.Node(
        SELECT_THRESHOLD.name, f"select.{name}", attributes, [scores, given], [threshold, active], domain=DOMAIN
    )
    program.graph.nodes.append(operator)
    return threshold, active


def _compare(builder: Builder, name: str, scores: gs.Variable, limits: gs.Variable) -> tuple[gs.Variable, gs.Variable]:
    """Give every token the same thresholds, and count the units whose score is not below them."""
    layers, units = scores.shape[2:]
    shape, every = ("B", "Z", layers), ("B", "Z", layers, units)
    sizes = builder.node("Shape", [scores], f"threshold.{name}.sizes", np.int64, (3,), start=0, end=3)
    one_token = builder.node(
        "Unsqueeze", [limits, builder.ints(1)], f"threshold.{name}.row", np.float32, (limits.shape[0], 1, layers)
    )
    threshold = builder.node("Expand", [one_token, sizes], f"threshold.{name}", np.float32, shape)
    column = builder.node(
        "Unsqueeze", [threshold, builder.ints(3)], f"threshold.{name}.column", np.float32, (*shape, 1)
    )
    below = builder.node("Less", [scores, column], f"active.{name}.below", np.bool_, every)
    reach = builder.node("Not", [below], f"active.{name}.units", np.bool_, every)
    ones = builder.node("Cast", [reach], f"active.{name}.ones", np.int32, every, to=6)  # TensorProto.INT32
    last = builder.ints(3)
    return threshold, builder.node("ReduceSum", [ones, last], f"active.{name}", np.int32, shape, keepdims=0)


def _affine(builder: Builder, x: gs.Variable, name: str, fan_in: int, fan_out: int) -> gs.Variable:
    """Return x W + b with W stored as [in, out]."""
    weight = builder.weight(f"{name}.weight", WeightRecipe("transpose", (f"{name}.weight",), (fan_in, fan_out)))
    bias = builder.weight(f"{name}.bias", WeightRecipe("copy", (f"{name}.bias",), (fan_out,)))
    product = builder.node("MatMul", [x, weight], f"{name}.product", np.float32, ("B", "Y", fan_out))
    return builder.node("Add", [product, bias], f"{name}.y", np.float32, ("B", "Y", fan_out))
