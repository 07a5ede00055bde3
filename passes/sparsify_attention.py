# SPDX-License-Identifier: Apache-2.0
"""Replaces the self-attention of every layer by one SparseAttention over head records.

Legal cases:
1. A predicted layer (1..n-1 with a plan): scores and thresholds come from the predictor.
2. A dense layer (layer 0, or every layer without a plan): constant scores 0 and threshold -inf keep all heads.

The cut runs through tensors, since a cut by scope is not closed (layer 0's mask and shapes feed every layer): in at
the norm's output and the cache, out at out_proj's sum, its input (the context) and the cache. What is then dead goes,
and no node of an old block may be left.

Letters: B batch, S new tokens, T cache capacity, E hidden, H heads, D head size.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from shadowc.checkpoint.opt import layer_names
from shadowc.passes.surgery import Builder, Scopes, produce, tidy, units_of
from shadowc.spec.errors import InternalError
from shadowc.spec.ops import DOMAIN, SPARSE_ATTENTION
from shadowc.spec.program import PassReport, Program, WeightRecipe

NAME = "sparsify_attention"


def apply(program: Program) -> PassReport:
    """Rewrite all layers, then drop the old blocks."""
    requires(program)
    done = {node.name for node in program.graph.nodes}
    layers = [layer for layer in range(program.facts.layers) if f"layers.{layer}.attention" not in done]
    builder, scopes = Builder(program), Scopes(program.graph)
    for layer in layers:
        _rewrite(program, builder, scopes, layer)
    counts = {"layers": len(layers), "removed": tidy(program)}
    ensures(program)
    return PassReport(NAME, counts)


def requires(program: Program) -> None:
    """The pass canonicalise has run, and insert_predictor if there is a plan."""
    builder = Builder(program)
    for name in ("past", "start"):
        builder.tensor(name, "canonicalise")
    if program.plan is not None:
        builder.tensor("scores.heads", "insert_predictor")


def ensures(program: Program) -> None:
    """One operator per layer; nothing of an old block is left; only operators read the cache."""
    graph = program.graph
    scopes = Scopes(graph)
    for layer in range(program.facts.layers):
        block = layer_names(layer).q.weight.removesuffix(".q_proj.weight")
        left = [node.name for node in scopes.inside(block)]
        if left:
            raise InternalError(f"{NAME}: layer {layer} still has {len(left)} nodes in {block}, for example {left[0]}")
        if sum(node.name == f"layers.{layer}.attention" for node in graph.nodes) != 1:
            raise InternalError(f"{NAME}: layer {layer} has no {SPARSE_ATTENTION.name} that any output needs")
    for node in graph.nodes:
        if node.domain != DOMAIN and any(value.name.startswith("past_key_values.") for value in node.inputs):
            raise InternalError(f"{NAME}: {node.name} still reads the cache; its size is a capacity, not a length")


def selection(program: Program, builder: Builder, kind: str, layer: int) -> tuple[list[gs.Tensor], int]:
    """Scores and threshold that a layer obeys, and its index into them."""
    if program.plan is not None and program.plan.style != "shadow" and layer > 0:
        return [builder.tensor(f"{part}.{kind}.{layer}", "insert_predictor") for part in ("scores", "threshold")], 0
    if program.plan is not None and layer > 0:
        return [builder.tensor(f"{part}.{kind}", "insert_predictor") for part in ("scores", "threshold")], layer - 1
    zeros = np.zeros((1, 1, 1, units_of(program)[kind]), np.float32)
    all_active = np.full((1, 1, 1), -np.inf, np.float32)
    return [builder.constant(f"dense.scores.{kind}", zeros), builder.constant("dense.threshold", all_active)], 0


def _rewrite(program: Program, builder: Builder, scopes: Scopes, layer: int) -> None:
    facts, name = program.facts, f"layers.{layer}.attention"
    names = layer_names(layer)
    query, key, value, out = (scopes.linear(affine.weight) for affine in (names.q, names.k, names.v, names.out))
    if not query.x is key.x is value.x:
        raise InternalError(f"{NAME}: layer {layer}: q, k and v of {name} do not project the same tensor")
    H, D, E = facts.heads, facts.head_size, facts.hidden
    cache = [builder.tensor(f"{side}.{layer}.{kind}", "trace") for side in ("past_key_values", "present")
             for kind in ("key", "value")]  # fmt: skip
    for tensor in cache:
        tensor.shape = ("B", H, "T", D)
    projections = (names.q.weight, names.k.weight, names.v.weight, names.out.weight)
    weights = [
        builder.weight(f"{name}.w", WeightRecipe("attention_records", projections, (H, 4, D, E))),
        builder.weight(f"{name}.scales", WeightRecipe("attention_scales", projections, (H, 4, D))),
        builder.weight(f"{name}.bqkv", WeightRecipe("qkv_bias", (names.q.bias, names.k.bias, names.v.bias), (H, 3, D))),
        builder.weight(f"{name}.bo", WeightRecipe("copy", (names.out.bias,), (E,))),
    ]
    chosen, row = selection(program, builder, "heads", layer)
    times = [builder.tensor("start", "canonicalise"), builder.tensor("past", "canonicalise")]
    context, y = out.x, out.y
    context.name, context.shape, y.shape = f"context.{layer}", ("B", "S", E), ("B", "S", E)
    operator = gs.Node(
        SPARSE_ATTENTION.name, name, {"layer": row, "kv": "all"},
        inputs=[query.x, *chosen, *weights, *cache[:2], *times], domain=DOMAIN,
    )  # fmt: skip
    read = builder.variable(f"{name}.read", np.int64, (2,))
    produce(operator, [y, *cache[2:], context, read])
    program.graph.nodes.append(operator)
