# SPDX-License-Identifier: Apache-2.0
"""Turns the sparse graph into the dense, past-less graph that reads a prompt, in standard operators only.

Legal cases:
1. SparseFFN over separate matrices becomes two products with ReLU between them.
2. SparseAttention over separate matrices becomes the projections, one `Attention` (opset 23, which TensorRT runs as
   one fused kernel) and the output projection; `present` holds the prompt's own K/V [B,H,S,D]. TensorRT has no such
   kernel in float32: there (`fused=False`) the products and the softmax stay apart.
3. 8-bit matrices are multiplied by their scales before the products.
4. Only the last token goes through the LM head; predictor, selections and everything else that no output needs goes.

The matrices keep their names and recipes, so that this graph and the decode graph share one copy of the weights.
A query sees the real tokens up to itself, and itself in any case: a pad that saw nothing would make NaN of all.

Letters: B batch, S tokens of the prompt, E hidden, H heads, D head size, F neurons, R rows of a matrix.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from shadowc.checkpoint.opt import PROJECT_OUT
from shadowc.passes.canonicalise import LM_HEAD
from shadowc.passes.split_records import ATTENTION_ROWS, FFN_ROWS
from shadowc.passes.surgery import Builder, Scopes, produce, tidy
from shadowc.spec.errors import InternalError
from shadowc.spec.ops import DOMAIN
from shadowc.spec.program import PassReport, Program

NAME = "dense_prefill"
OPSET = 23
"""The first with `Attention`."""
_FLOAT = 1
"""TensorProto.FLOAT."""
_LOWEST = float(np.finfo(np.float32).min)
_F32, _I64, _BOOL = np.float32, np.int64, np.bool_


def apply(program: Program, *, fused: bool = True) -> PassReport:
    """Rewrite all layers, then drop what only the sparse graph needed.

    Args:
        program: changed in place.
        fused: one `Attention` per layer; False: its products and softmax.
    """
    operators = [node for node in program.graph.nodes if node.op in ("SparseAttention", "SparseFFN")]
    if not operators:
        return PassReport(NAME, {"layers": 0}, ("the graph has no sparse operators",))
    requires(program)
    builder = Builder(program)
    seen = _seen(program, builder)
    for node in operators:
        if node.op == "SparseAttention":
            _attention(program, builder, node, seen, fused=fused)
        else:
            _ffn(program, builder, node)
    kept = [value for value in program.graph.outputs if value.name == "logits" or value.name.startswith("present.")]
    program.graph.outputs = kept
    counts = {"layers": len(operators) // 2, "last_token": _last_token(program, builder)}
    program.graph.nodes = [node for node in program.graph.nodes if node not in operators]
    counts["removed"] = tidy(program)
    program.graph.inputs = [v for v in program.graph.inputs if v.outputs or v.name in program.weights]
    program.graph.opset, program.plan = OPSET, None
    ensures(program)
    return PassReport(NAME, counts)


def requires(program: Program) -> None:
    """The pass split_records has run, and positions come from the mask."""
    Builder(program).tensor("start.column", "canonicalise")
    for layer in range(program.facts.layers):
        for part, rows in (("attention", ATTENTION_ROWS), ("ffn", FFN_ROWS)):
            if f"layers.{layer}.{part}.{rows[0]}" not in program.weights:
                raise InternalError(f"{NAME}: layer {layer} has no {rows[0]} of its {part}; split_records comes first")


def ensures(program: Program) -> None:
    """Standard operators only; inputs are the prompt and weights, outputs the last logits and K/V."""
    graph = program.graph
    if special := [node.name for node in graph.nodes if node.domain == DOMAIN]:
        raise InternalError(f"{NAME}: {special[0]} is no standard operator")
    found = sorted(value.name for value in graph.inputs if value.name not in program.weights)
    if found != ["attention_mask", "input_ids"]:
        raise InternalError(f"{NAME}: the inputs are {', '.join(found)}")
    if len(graph.outputs) != 1 + 2 * program.facts.layers:
        raise InternalError(f"{NAME}: the graph has {len(graph.outputs)} outputs")


def _seen(program: Program, builder: Builder) -> gs.Variable:
    """[B,1,S,S] bool: which tokens (last axis) a query sees."""
    order = next(node for node in program.graph.nodes if node.name.endswith("slot.real"))
    index_S, start_B1 = builder.tensor("token_index", "canonicalise"), order.inputs[1]
    order.inputs[0] = index_S  # a prompt starts at slot 0
    query_S1 = builder.node("Unsqueeze", [index_S, builder.ints(1)], "query", _I64, ("S", 1))
    causal_SS = builder.node("LessOrEqual", [index_S, query_S1], "seen.causal", _BOOL, ("S", "S"))
    own_SS = builder.node("Equal", [index_S, query_S1], "seen.own", _BOOL, ("S", "S"))
    real_BS = builder.node("GreaterOrEqual", [index_S, start_B1], "seen.real", _BOOL, ("B", "S"))
    real_B1S = builder.node("Unsqueeze", [real_BS, builder.ints(1)], "seen.real.row", _BOOL, ("B", 1, "S"))
    allowed_BSS = builder.node("Or", [real_B1S, own_SS], "seen.allowed", _BOOL, ("B", "S", "S"))
    seen_BSS = builder.node("And", [allowed_BSS, causal_SS], "seen.tokens", _BOOL, ("B", "S", "S"))
    return builder.node("Unsqueeze", [seen_BSS, builder.ints(1)], "seen", _BOOL, ("B", 1, "S", "S"))


def _ffn(program: Program, builder: Builder, node: gs.Node) -> None:
    E, F, name = program.facts.hidden, program.facts.ffn, node.name
    w1_FE, w2t_FE = (_matrix(program, builder, node, part) for part in FFN_ROWS)
    w1_EF = builder.node("Transpose", [w1_FE], f"{name}.w1.matrix", _F32, (E, F), perm=[1, 0])
    b1, b2 = node.inputs[-2:]
    fc1 = builder.node("MatMul", [node.inputs[0], w1_EF], f"{name}.fc1.product", _F32, ("B", "S", F))
    fc1 = builder.node("Add", [fc1, b1], f"{name}.fc1", _F32, ("B", "S", F))
    fired = builder.node("Relu", [fc1], f"{name}.fired", _F32, ("B", "S", F))
    product = builder.node("MatMul", [fired, w2t_FE], f"{name}.fc2.product", _F32, ("B", "S", E))
    _finish(program, "Add", [product, b2], node.outputs[0])
    node.inputs.clear()


def _attention(program: Program, builder: Builder, node: gs.Node, seen: gs.Variable, *, fused: bool) -> None:
    E, name = program.facts.hidden, node.name
    H, D = program.facts.heads, program.facts.head_size
    bqkv, bo = (builder.tensor(f"{name}.{part}", "sparsify_attention") for part in ("bqkv", "bo"))
    y, *results = list(node.outputs)
    heads = []
    for part in range(3):
        rows = _matrix(program, builder, node, ATTENTION_ROWS[part])
        matrix = builder.node("Transpose", [rows], f"{rows.name}.matrix", _F32, (E, E), perm=[1, 0])
        where = f"{name}.{'qkv'[part]}"
        bias_HD = builder.node("Gather", [bqkv, builder.integer(part)], f"{where}.bias.heads", _F32, (H, D), axis=1)
        bias_E = builder.node("Reshape", [bias_HD, builder.ints(E)], f"{where}.bias", _F32, (E,))
        product = builder.node("MatMul", [node.inputs[0], matrix], f"{where}.product", _F32, ("B", "S", E))
        flat = builder.node("Add", [product, bias_E], where, _F32, ("B", "S", E))
        split = builder.node("Reshape", [flat, builder.ints(0, 0, H, D)], f"{where}.split", _F32, ("B", "S", H, D))
        if part == 0:
            heads.append(
                builder.node("Transpose", [split], f"{where}.heads", _F32, ("B", H, "S", D), perm=[0, 2, 1, 3])
            )
        else:
            present = results[part - 1]
            present.shape = ("B", H, "S", D)
            _finish(program, "Transpose", [split], present, perm=[0, 2, 1, 3])
            heads.append(present)
    if fused:
        mixed = builder.node("Attention", [*heads, seen], f"{name}.mixed", _F32, ("B", H, "S", D))
    else:
        mixed = _unfused(program, builder, name, heads, seen)
    turned = builder.node("Transpose", [mixed], f"{name}.turned", _F32, ("B", "S", H, D), perm=[0, 2, 1, 3])
    context = builder.node("Reshape", [turned, builder.ints(0, 0, E)], f"{name}.joined", _F32, ("B", "S", E))
    out = _matrix(program, builder, node, ATTENTION_ROWS[3])
    product = builder.node("MatMul", [context, out], f"{name}.out.product", _F32, ("B", "S", E))
    _finish(program, "Add", [product, bo], y)
    node.inputs.clear()


def _unfused(program: Program, builder: Builder, name: str, heads: list[gs.Tensor], seen: gs.Variable) -> gs.Variable:
    """Attention from products and a softmax, [B,H,S,D]."""
    H, D = program.facts.heads, program.facts.head_size
    query, key, value = heads
    scale = builder.constant("attention.scale", np.array(D**-0.5, _F32))
    lowest = builder.constant("attention.lowest", np.array(_LOWEST, _F32))
    scaled = builder.node("Mul", [query, scale], f"{name}.q.scaled", _F32, ("B", H, "S", D))
    turned = builder.node("Transpose", [key], f"{name}.k.turned", _F32, ("B", H, D, "S"), perm=[0, 1, 3, 2])
    logits = builder.node("MatMul", [scaled, turned], f"{name}.logits", _F32, ("B", H, "S", "S"))
    masked = builder.node("Where", [seen, logits, lowest], f"{name}.masked", _F32, ("B", H, "S", "S"))
    shares = builder.node("Softmax", [masked], f"{name}.shares", _F32, ("B", H, "S", "S"), axis=-1)
    return builder.node("MatMul", [shares, value], f"{name}.mixed", _F32, ("B", H, "S", D))


def _matrix(program: Program, builder: Builder, node: gs.Node, part: str) -> gs.Tensor:
    """One matrix [R,E] of an operator as floats."""
    weight = builder.tensor(f"{node.name}.{part}", "split_records")
    recipe = program.weights[weight.name]
    if not recipe.quantised:
        return weight
    R = recipe.shape[0]
    scales = builder.tensor(f"{node.name}.scales", "sparsify")
    column = builder.node(
        "Gather", [scales, builder.integer(recipe.part)], f"{weight.name}.scale.rows", _F32,
        (R,) if node.op == "SparseFFN" else (program.facts.heads, program.facts.head_size), axis=1,
    )  # fmt: skip
    scale_R1 = builder.node("Reshape", [column, builder.ints(R, 1)], f"{weight.name}.scale", _F32, (R, 1))
    steps = builder.node("Cast", [weight], f"{weight.name}.steps", _F32, recipe.shape, to=_FLOAT)
    return builder.node("Mul", [steps, scale_R1], f"{weight.name}.float", _F32, recipe.shape)


def _finish(program: Program, op: str, inputs: list[gs.Tensor], result: gs.Tensor, **attributes: object) -> None:
    """Append a node that produces an existing tensor."""
    node = gs.Node(op, result.name, attributes, inputs)
    program.graph.nodes.append(node)
    produce(node, [result])


def _last_token(program: Program, builder: Builder) -> int:
    """Cut the tokens before the last from what the LM head multiplies."""
    scopes = Scopes(program.graph)
    head = scopes.one(LM_HEAD, "MatMul")
    product = scopes.one(PROJECT_OUT.removesuffix(".weight"), "MatMul") if program.facts.projected else head
    every = product.inputs[0]
    tokens = builder.tensor("tokens", "canonicalise")
    last = builder.node("Sub", [tokens, builder.ints(1)], "last_token.index", _I64, (1,))
    shape = ("B", 1, program.facts.hidden)  # a Gather, since TensorRT takes the length of a Slice for unknown
    product.inputs[0] = builder.node("Gather", [every, last], "last_token", _F32, shape, axis=1)
    product.outputs[0].shape = ("B", 1, program.facts.embedding_width)
    head.outputs[0].shape = ("B", 1, program.facts.vocab)
    return 1
