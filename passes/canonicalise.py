# SPDX-License-Identifier: Apache-2.0
"""Brings the trace into the one form that the other passes are written for; computes the same numbers.

Legal cases:
1. `Identity` is bypassed.
2. The flattening around the FFN, [B,S,E] -> [B*S,E] and back, is removed: its two reshapes in the scope of a layer.
3. `Gemm(x, W, b)` with transposed W and unit factors becomes `Add(MatMul(x, Transpose(W)), b)`, which takes [B,S,E].
4. The reshape of input_ids to its own shape is bypassed.
5. Positions come from attention_mask and input_ids. The trace takes them from the size of the last layer's cache,
   which is a capacity here and says nothing about how much of it is filled.
6. The tied weight, which the trace calls lm_head.weight, is called embed_tokens.weight where tokens are embedded.
7. `Transpose` of that weight before the last product becomes a weight of its own, lm_head [W,V]; so do those of the
   projections between narrower embeddings and hidden states, project_in [W,E] and project_out [E,W].

Letters: B batch, S new tokens, P mask length, E hidden, W width of the token embeddings (E unless they are projected),
V vocabulary.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from shadowc.checkpoint.opt import EMBEDDING, FINAL_NORM, HEAD, POSITIONS, PROJECT_IN, PROJECT_OUT, layer_names
from shadowc.passes.surgery import Builder, Scopes, replace_uses, scope_of, tidy
from shadowc.spec.errors import InternalError
from shadowc.spec.program import PassReport, Program, WeightRecipe
from shadowc.spec.tensors import MASK, PAST, START, TOKEN

NAME = "canonicalise"
LM_HEAD = "lm_head"
PROJECTIONS = {"project_in": PROJECT_IN, "project_out": PROJECT_OUT}
"""Stored transpose -> parameter."""


def apply(program: Program) -> PassReport:
    """Rewrite the graph in place."""
    requires(program)
    counts = {
        "identities": _bypass_identities(program),
        "reshapes": _remove_flattening(program),
        "gemms": _split_gemms(program),
        "views": _bypass_views(program),
        "positions": _derive_positions(program),
        "tied": _rename_tied(program),
        "products": _store_transposes(program),
    }
    counts["removed"] = tidy(program)
    ensures(program)
    return PassReport(NAME, counts)


def requires(program: Program) -> None:
    """The graph takes ids and a mask, gives logits, and has nodes in the scope of every layer."""
    graph = program.graph
    names = {value.name for value in (*graph.inputs, *graph.outputs)}
    missing = sorted({"input_ids", "attention_mask", "logits"} - names)
    if missing:
        raise InternalError(f"{NAME}: the trace has no {' and no '.join(missing)}")
    scopes = {scope_of(node) for node in graph.nodes}
    for layer in range(program.facts.layers):
        if (scope := _layer_scope(layer)) not in scopes:
            raise InternalError(f"{NAME}: no node was traced in {scope}")


def ensures(program: Program) -> None:
    """Every norm is one LayerNormalization and every projection MatMul and Add; the FFN takes [B,S,E]."""
    scopes = Scopes(program.graph)
    for layer in range(program.facts.layers):
        names = layer_names(layer)
        for norm in (names.attention_norm, names.ffn_norm):
            scopes.one(norm.weight.removesuffix(".weight"), "LayerNormalization")
        for affine in (names.q, names.k, names.v, names.out, names.fc1, names.fc2):
            linear = scopes.linear(affine.weight)
            if linear.x.shape is None or len(linear.x.shape) != 3:
                raise InternalError(f"{NAME}: {affine.weight} is applied to {linear.x.shape}, expected [B, S, ...]")
    if program.facts.final_norm:
        scopes.one(FINAL_NORM, "LayerNormalization")
    for scope in _products(program):
        scopes.one(scope, "MatMul")


def _layer_scope(layer: int) -> str:
    return layer_names(layer).fc1.weight.removesuffix(".fc1.weight")


def _bypass_identities(program: Program) -> int:
    found = [node for node in program.graph.nodes if node.op == "Identity"]
    outputs = {value.name for value in program.graph.outputs}
    count = 0
    for node in found:
        if node.outputs[0].name in outputs:
            continue
        replace_uses(node.outputs[0], node.inputs[0])
        count += 1
    return count


def _remove_flattening(program: Program) -> int:
    scopes, hidden = Scopes(program.graph), program.facts.hidden
    count = 0
    for layer in range(program.facts.layers):
        reshapes = [node for node in scopes.nodes(_layer_scope(layer)) if node.op == "Reshape"]
        ranks = [(len(node.inputs[0].shape), len(node.outputs[0].shape)) for node in reshapes]
        widths = {value.shape[-1] for node in reshapes for value in (node.inputs[0], node.outputs[0])}
        if not reshapes:
            continue
        if ranks != [(3, 2), (2, 3)] or widths != {hidden}:
            raise InternalError(
                f"{NAME}: {_layer_scope(layer)} has reshapes of ranks {ranks} and widths {sorted(map(str, widths))}, "
                f"expected one pair [B,S,{hidden}] -> [B*S,{hidden}] and back"
            )
        for node in reshapes:
            replace_uses(node.outputs[0], node.inputs[0])
        for node in (*scopes.nodes(_layer_scope(layer)), *_ffn_nodes(scopes, layer)):
            for value in node.outputs:
                if node not in reshapes and value.shape is not None and len(value.shape) == 2:
                    value.shape = ("B", "S", value.shape[-1])
        count += len(reshapes)
    return count


def _ffn_nodes(scopes: Scopes, layer: int) -> list[gs.Node]:
    names = layer_names(layer)
    members = (names.ffn_norm.weight, names.fc1.weight, names.fc2.weight)
    blocks = [*(name.removesuffix(".weight") for name in members), f"{_layer_scope(layer)}.activation_fn"]
    return [node for block in blocks for node in scopes.nodes(block)]


def _split_gemms(program: Program) -> int:
    graph = program.graph
    gemms = [node for node in graph.nodes if node.op == "Gemm"]
    for gemm in gemms:
        factors = (gemm.attrs.get("alpha", 1.0), gemm.attrs.get("beta", 1.0))
        turned = (gemm.attrs.get("transA", 0), gemm.attrs.get("transB", 0))
        if factors != (1.0, 1.0) or turned != (0, 1) or len(gemm.inputs) != 3:
            raise InternalError(f"{NAME}: {gemm.name} is a Gemm with factors {factors} and transposes {turned}")
        x, weight, bias = gemm.inputs
        y = gemm.outputs[0]
        gemm.outputs.clear()
        shape = tuple(reversed(weight.shape))
        weight_T = gs.Variable(f"{y.name}.weight", weight.dtype, shape)
        product = gs.Variable(f"{y.name}.product", y.dtype, y.shape)
        place = graph.nodes.index(gemm)
        graph.nodes[place : place + 1] = [
            gs.Node("Transpose", f"{gemm.name}.transpose", {"perm": [1, 0]}, [weight], [weight_T]),
            gs.Node("MatMul", f"{gemm.name}.product", {}, [x, weight_T], [product]),
            gs.Node("Add", f"{gemm.name}.bias", {}, [product, bias], [y]),
        ]
        gemm.inputs.clear()
    return len(gemms)


def _bypass_views(program: Program) -> int:
    ids = next(value for value in program.graph.inputs if value.name == "input_ids")
    views = [node for node in ids.outputs if node.op == "Reshape" and len(node.outputs[0].shape or ()) == 2]
    for node in views:
        replace_uses(node.outputs[0], ids)
    return len(views)


def _derive_positions(program: Program) -> int:
    builder = Builder(program)
    table = builder.tensor(POSITIONS, "trace")
    lookups = [node for node in table.outputs if node.op == "Gather"]
    if len(lookups) != 1 or len(table.outputs) != 1:
        raise InternalError(f"{NAME}: {POSITIONS} has {len(table.outputs)} readers, expected one Gather")
    if "positions" in builder:
        return 0
    ids, mask = builder.tensor("input_ids", "trace"), builder.tensor(MASK, "trace")
    i64 = np.int64
    rows = builder.node("Shape", [ids], "rows", i64, (1,), start=0, end=1)
    tokens = builder.node("Shape", [ids], "tokens", i64, (1,), start=1, end=2)
    length = builder.node("Shape", [mask], "mask_length", i64, (1,), start=1, end=2)
    filled = builder.node("Sub", [length, tokens], "mask_length.past", i64, (1,))
    past_B = builder.node("Expand", [filled, rows], PAST, i64, ("B",))
    real_B = builder.node("ReduceSum", [mask, builder.ints(1)], "mask_length.real", i64, ("B",), keepdims=0)
    start_B = builder.node("Sub", [length, real_B], START, i64, ("B",))
    count = builder.node("Squeeze", [tokens], "tokens.count", i64, ())
    index_S = builder.node("Range", [builder.integer(0), count, builder.integer(1)], "token_index", i64, ("S",))
    past_B1 = builder.node("Unsqueeze", [past_B, builder.ints(1)], "past.column", i64, ("B", 1))
    start_B1 = builder.node("Unsqueeze", [start_B, builder.ints(1)], "start.column", i64, ("B", 1))
    slot_BS = builder.node("Add", [past_B1, index_S], "slot", i64, ("B", "S"))
    order_BS = builder.node("Sub", [slot_BS, start_B1], "slot.real", i64, ("B", "S"))
    clipped_BS = builder.node("Max", [order_BS, builder.integer(-1)], TOKEN, i64, ("B", "S"))  # -1: padding
    offset = builder.integer(program.facts.position_offset)
    lookups[0].inputs[1] = builder.node("Add", [clipped_BS, offset], "positions", i64, ("B", "S"))
    return 1


def _rename_tied(program: Program) -> int:
    if HEAD not in program.weights or EMBEDDING in program.weights:
        return 0
    next(value for value in program.graph.inputs if value.name == HEAD).name = EMBEDDING
    recipe = program.weights.pop(HEAD)
    program.weights[EMBEDDING] = WeightRecipe("copy", (EMBEDDING,), recipe.shape)
    return 1


def _products(program: Program) -> dict[str, str]:
    """Scope -> name of the stored transpose, of every product without bias."""
    projections = {weight.removesuffix(".weight"): name for name, weight in PROJECTIONS.items()}
    return {LM_HEAD: LM_HEAD, **(projections if program.facts.projected else {})}


def _store_transposes(program: Program) -> int:
    scopes, builder = Scopes(program.graph), Builder(program)
    count = 0
    for scope, name in _products(program).items():
        product = scopes.one(scope, "MatMul")
        if product.inputs[1].name == name:
            continue
        turn = product.inputs[1].inputs[0] if product.inputs[1].inputs else None
        expected = (HEAD, EMBEDDING) if name == LM_HEAD else (PROJECTIONS[name],)
        if turn is None or turn.op != "Transpose" or turn.inputs[0].name not in expected:
            raise InternalError(f"{NAME}: {product.name} does not multiply with the transpose of {expected[0]}")
        rows, columns = turn.inputs[0].shape
        product.inputs[1] = builder.weight(name, WeightRecipe("transpose", expected[:1], (columns, rows)))
        count += 1
    return count
