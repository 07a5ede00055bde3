# SPDX-License-Identifier: Apache-2.0
"""Makes of the predicting graph the one that decodes under a given mask: scores come in, the predictor goes.

Legal cases:
1. The graph has scores and a selection of both kinds: what read the scores reads the inputs `mask_scores.*`, with a
   row for each of the last Z tokens. Density stays a dial, and the selection stays the one of the predicting graph.

`kv` "active": an inactive head writes no K/V, since no later token can ask for it. "all": masks may change.

Letters: B batch, Z sparse tail, L predicted layers, N units of a kind per layer.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from shadowc.passes.finalise import mask_inputs
from shadowc.passes.surgery import Builder, replace_uses, tidy
from shadowc.spec.density import UNIT_KINDS
from shadowc.spec.errors import InternalError
from shadowc.spec.ops import SPARSE_ATTENTION
from shadowc.spec.program import PassReport, Program

NAME = "fix_mask"


def apply(program: Program, *, kv: Literal["active", "all"] = "active") -> PassReport:
    """Turn the scores into inputs and drop the predictor with its weights, in place."""
    if mask_inputs(program):
        return PassReport(NAME, {"inputs": 0}, ("the masks are inputs already",))
    requires(program)
    graph, builder = program.graph, Builder(program)
    predicted = {f"{part}.{kind}" for part in ("mask_scores", "scores") for kind in UNIT_KINDS}
    graph.outputs = [value for value in graph.outputs if value.name not in predicted]
    graph.inputs = [value for value in graph.inputs if value.name != "sparse_tail"]
    for kind in UNIT_KINDS:
        builder.tensor(f"mask_scores.{kind}", "insert_predictor").name += ".predicted"  # goes with the predictor
        scores = builder.tensor(f"scores.{kind}", "insert_predictor")
        replace_uses(scores, builder.input(f"mask_scores.{kind}", np.float32, tuple(scores.shape)))
    attentions = [node for node in graph.nodes if node.op == SPARSE_ATTENTION.name]
    for node in attentions:
        node.attrs["kv"] = kv
    counts = {"inputs": len(UNIT_KINDS), "attentions": len(attentions), "removed": tidy(program)}
    ensures(program)
    return PassReport(NAME, counts)


def requires(program: Program) -> None:
    """The pass insert_predictor and both sparsify passes have run."""
    builder = Builder(program)
    for kind in UNIT_KINDS:
        if not builder.tensor(f"scores.{kind}", "insert_predictor").outputs:
            raise InternalError(f"{NAME}: nothing reads scores.{kind}")


def ensures(program: Program) -> None:
    """Nothing is left of the predictor, and nothing but the selections and the operators reads the masks."""
    left = [name for name in program.weights if name.startswith("predictor.")]
    left += [node.name for node in program.graph.nodes if node.name.startswith("predictor.")]
    if left:
        raise InternalError(f"{NAME}: {left[0]} is still in the graph")
    if len(mask_inputs(program)) != len(UNIT_KINDS):
        raise InternalError(f"{NAME}: the graph takes {mask_inputs(program)}")
