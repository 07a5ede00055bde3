# SPDX-License-Identifier: Apache-2.0
"""Lets the operators take the layer norm in front of them and the residual around both.

Each of these nodes costs two to four microseconds of a token whatever it computes, and while it runs nobody asks for
the operator's first records. In machine code every thread normalises for itself while they are on their way.

Legal cases:
1. An operator reads a LayerNormalization over the last axis that nothing else reads, and the one node that reads its
   result adds what the norm reads: the operator takes scale, bias and epsilon, and gives the sum. Names stay.
2. As 1, and operators that predict read the norm too: they take scale, bias and epsilon as well.
3. Anything else stays: norms behind the blocks (opt-350m).

Only for targets whose operators can do it: the CPU. A host's node of its own would do the same, slower.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from shadowc.passes.finalise import require_operators
from shadowc.passes.surgery import produce, tidy
from shadowc.spec.errors import InternalError
from shadowc.spec.ops import DOMAIN, OPS, PREDICT_UNITS, OpSpec
from shadowc.spec.program import PassReport, Program

NAME = "fold_norms"


def apply(program: Program) -> PassReport:
    """Fold what can be, in place."""
    requires(program)
    folded = 0
    for node, spec in _operators(program):
        if len(node.inputs) == len(spec.inputs) and (around := _around(node)) is not None:
            _fold(node, *around)
            folded += 1
    removed = tidy(program)
    ensures(program)
    return PassReport(NAME, {"operators": folded, "removed": removed})


def requires(program: Program) -> None:
    """Both sparsify passes have run."""
    require_operators(program, NAME)


def ensures(program: Program) -> None:
    """An operator has all of a norm's operands or none, and no norm that it alone reads is left in front of it."""
    for node, spec in _operators(program):
        assert spec.norm is not None
        extra = len(node.inputs) - len(spec.inputs)
        if extra not in (0, len(spec.norm.inputs)) or (extra != 0) != ("epsilon" in node.attrs):
            raise InternalError(f"{NAME}: {node.name} has {extra} operands of a norm")
        if extra == 0 and _around(node) is not None:
            raise InternalError(f"{NAME}: {node.name} still has its norm in front of it")


def _operators(program: Program) -> list[tuple[gs.Node, OpSpec]]:
    specs = {spec.name: spec for spec in OPS if spec.norm is not None}
    return [(node, specs[node.op]) for node in program.graph.nodes if node.domain == DOMAIN and node.op in specs]


def _around(node: gs.Node) -> tuple[gs.Node, gs.Node] | None:
    """The norm in front of an operator and the sum behind it, if it is case 1."""
    x, y = node.inputs[0], node.outputs[0]
    norm = x.inputs[0] if len(x.inputs) == 1 else None
    if norm is None or norm.op != "LayerNormalization" or norm.attrs.get("axis", -1) != -1 or len(norm.inputs) != 3:
        return None
    if len(y.outputs) != 1 or y.outputs[0].op != "Add":
        return None
    if not all(reader is node or _predicts_from(reader, x) for reader in x.outputs):
        return None
    total = y.outputs[0]
    return (norm, total) if any(value is norm.inputs[0] for value in total.inputs) else None


def _predicts_from(node: gs.Node, x: gs.Tensor) -> bool:
    """Whether an operator that predicts reads x as what its network reads, and has no norm yet."""
    return bool(node.op == PREDICT_UNITS.name and node.inputs[0] is x and len(node.inputs) == len(PREDICT_UNITS.inputs))


def _fold(node: gs.Node, norm: gs.Node, total: gs.Node) -> None:
    residual, scale, bias = norm.inputs
    result = total.outputs[0]
    for reader in list(node.inputs[0].outputs):
        reader.inputs[0] = residual
        reader.inputs.extend([scale, bias])
        reader.attrs["epsilon"] = float(norm.attrs.get("epsilon", 1e-5))
    total.inputs.clear()
    total.outputs.clear()
    norm.inputs.clear()
    produce(node, [result, *list(node.outputs)[1:]])
