# SPDX-License-Identifier: Apache-2.0
"""Adds the predictor: from layer 0's attention context to scores and thresholds of all later layers.

Legal cases:
1. The plan is present and the graph has no scores yet; the context is what layer 0's out_proj multiplies.

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
from shadowc.spec.program import PassReport, Program, SparsityPlan, WeightRecipe

NAME = "insert_predictor"
CONTEXT = "context.0"
SMALLEST_RANGE = 1e-12
"""Divisor at least this: the context of a token that sees nothing is constant."""


@dataclass(frozen=True, slots=True)
class _Kind:
    """One of the two kinds of units."""

    name: str
    units: int
    width: int
    min_active: int


def apply(program: Program) -> PassReport:
    """Insert both networks and both selections, with their inputs, outputs and weights."""
    requires(program)
    if any(value.name == "density_heads" for value in program.graph.inputs):
        return PassReport(NAME, {"networks": 0}, ("the graph has a predictor",))
    plan = _plan(program)
    builder = Builder(program)
    tail, context = _tail(builder), _scaled_context(program, builder)
    for kind in _kinds(program, plan):
        _network(program, builder, kind, context, tail)
    sort_nodes(program.graph)
    ensures(program)
    return PassReport(NAME, {"networks": 2, "selections": 2})


def requires(program: Program) -> None:
    """A plan, and the canonical form of layer 0."""
    _plan(program)
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
    tail = builder.node("Min", [wanted, tokens], "tail", i64, (1,))
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
    smallest = builder.constant("predictor.smallest", np.array(SMALLEST_RANGE, f32))
    divisor = builder.node("Max", [span, smallest], "predictor.divisor", f32, column)
    shifted = builder.node("Sub", [rows, low], "predictor.shifted", f32, shape)
    return builder.node("Div", [shifted, divisor], "predictor.input", f32, shape)


def _network(program: Program, builder: Builder, kind: _Kind, scaled: gs.Variable, tail: _Tail) -> None:
    """Score by fc2(relu(fc1(input))), cut to the tail, and select."""
    facts, f32, name = program.facts, np.float32, f"predictor.{kind.name}"
    L, N = facts.predicted_layers, kind.units
    hidden = _affine(builder, scaled, f"{name}.fc1", facts.hidden, kind.width)
    hidden = builder.node("Relu", [hidden], f"{name}.hidden", f32, ("B", "Y", kind.width))
    flat = _affine(builder, hidden, f"{name}.fc2", kind.width, L * N)
    scores = builder.node("Reshape", [flat, builder.ints(0, 0, L, N)], f"{name}.scores", f32, ("B", "Y", L, N))
    ints, axis = builder.ints, builder.ints(1)
    last = [scores, ints(-1), ints(np.iinfo(np.int64).max), axis]
    mask_scores = builder.node("Slice", last, f"mask_scores.{kind.name}", f32, ("B", 1, L, N))
    part = [scores, tail.skipped, tail.predicted, axis]
    kept = builder.node("Slice", part, f"scores.{kind.name}", f32, ("B", "Z", L, N))
    density = builder.input(f"density_{kind.name}", f32, (f"B{kind.name[0]}",))  # Bh, Bn: B or 1
    threshold = builder.variable(f"threshold.{kind.name}", f32, ("B", "Z", L))
    active = builder.variable(f"active.{kind.name}", np.int32, ("B", "Z", L))
    plan = _plan(program)
    # -1 stands for none: GraphSurgeon cannot write an empty list, whose type it does not know
    exempt = sorted(plan.exempt) or [-1]
    attributes = {"scope": plan.scope, "exempt": exempt, "min_active": kind.min_active}
    operator = gs.Node(
        SELECT_THRESHOLD.name, f"select.{kind.name}", attributes, [kept, density], [threshold, active], domain=DOMAIN
    )
    program.graph.nodes.append(operator)
    program.graph.outputs.extend([mask_scores, kept, threshold, active])


def _affine(builder: Builder, x: gs.Variable, name: str, fan_in: int, fan_out: int) -> gs.Variable:
    """Return x W + b with W stored as [in, out]."""
    weight = builder.weight(f"{name}.weight", WeightRecipe("transpose", (f"{name}.weight",), (fan_in, fan_out)))
    bias = builder.weight(f"{name}.bias", WeightRecipe("copy", (f"{name}.bias",), (fan_out,)))
    product = builder.node("MatMul", [x, weight], f"{name}.product", np.float32, ("B", "Y", fan_out))
    return builder.node("Add", [product, bias], f"{name}.y", np.float32, ("B", "Y", fan_out))
