# SPDX-License-Identifier: Apache-2.0
"""Replaces fc1, ReLU and fc2 of every layer by one SparseFFN over neuron records.

Legal cases:
1. A predicted layer (1..n-1 with a plan): scores and thresholds come from the predictor.
2. A dense layer (layer 0, or every layer without a plan): constant scores 0 and threshold -inf keep all neurons.

Boundary tensors: in at the norm's output, out at fc2's sum. Between them stands ReLU and nothing else.

Letters: B batch, S new tokens, E hidden, F neurons.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from shadowc.checkpoint.opt import layer_names
from shadowc.passes.sparsify_attention import selection
from shadowc.passes.surgery import Builder, Scopes, produce, tidy
from shadowc.spec.errors import InternalError
from shadowc.spec.ops import DOMAIN, SPARSE_FFN
from shadowc.spec.program import PassReport, Program, WeightRecipe

NAME = "sparsify_ffn"


def apply(program: Program, *, skip_zeros: bool = False) -> PassReport:
    """Rewrite all layers, then drop the old blocks.

    Args:
        program: changed in place.
        skip_zeros: let the kernel skip the second half of neurons whose ReLU output is 0; exact.
    """
    requires(program)
    done = {node.name for node in program.graph.nodes}
    layers = [layer for layer in range(program.facts.layers) if f"layers.{layer}.ffn" not in done]
    builder, scopes = Builder(program), Scopes(program.graph)
    for layer in layers:
        _rewrite(program, builder, scopes, layer, skip_zeros)
    counts = {"layers": len(layers), "removed": tidy(program)}
    ensures(program)
    return PassReport(NAME, counts)


def requires(program: Program) -> None:
    """The pass insert_predictor has run if there is a plan."""
    if program.plan is not None:
        Builder(program).tensor("scores.neurons", "insert_predictor")


def ensures(program: Program) -> None:
    """One operator per layer, and nothing of an old block is left."""
    scopes = Scopes(program.graph)
    for layer in range(program.facts.layers):
        names = layer_names(layer)
        layer_scope = names.fc1.weight.removesuffix(".fc1.weight")
        blocks = [f"{layer_scope}.{part}" for part in ("fc1", "activation_fn", "fc2")]
        left = [node.name for block in blocks for node in scopes.inside(block)]
        if left:
            raise InternalError(f"{NAME}: layer {layer} still has {len(left)} nodes of its FFN, for example {left[0]}")
        if sum(node.name == f"layers.{layer}.ffn" for node in program.graph.nodes) != 1:
            raise InternalError(f"{NAME}: layer {layer} has no {SPARSE_FFN.name} that any output needs")


def _rewrite(program: Program, builder: Builder, scopes: Scopes, layer: int, skip_zeros: bool) -> None:
    facts, name = program.facts, f"layers.{layer}.ffn"
    names = layer_names(layer)
    first, second = scopes.linear(names.fc1.weight), scopes.linear(names.fc2.weight)
    middle = second.x.inputs[0] if second.x.inputs else None
    if middle is None or middle.op != "Relu" or middle.inputs[0] is not first.y:
        found = middle.op if middle is not None else "nothing"
        raise InternalError(f"{NAME}: layer {layer}: expected ReLU between fc1 and fc2, found {found}")
    E, F = facts.hidden, facts.ffn
    matrices = (names.fc1.weight, names.fc2.weight)
    weights = [
        builder.weight(f"{name}.w", WeightRecipe("ffn_records", matrices, (F, 2, E))),
        builder.weight(f"{name}.scales", WeightRecipe("ffn_scales", matrices, (F, 2))),
        builder.weight(f"{name}.b1", WeightRecipe("ffn_bias", (names.fc1.bias,), (F,))),
        builder.weight(f"{name}.b2", WeightRecipe("copy", (names.fc2.bias,), (E,))),
    ]
    chosen, row = selection(program, builder, "neurons", layer)
    block = program.plan.block if program.plan else 1
    operator = gs.Node(
        SPARSE_FFN.name, name, {"layer": row, "block": block, "skip_zeros": int(skip_zeros)},
        inputs=[first.x, *chosen, *weights], domain=DOMAIN,
    )  # fmt: skip
    second.y.shape = ("B", "S", E)
    produce(operator, [second.y, builder.variable(f"{name}.read", np.int64, (2,))])
    program.graph.nodes.append(operator)
