# SPDX-License-Identifier: Apache-2.0
"""Gives every operator the matrices of its records one by one, and the LM head the embedding's own weight.

Legal cases:
1. SparseFFN over records [F,2,E] takes w1 and w2t [F,E]: row f is neuron f's half, as in the record.
2. SparseAttention over records [H,4,D,E] takes wq, wk, wv and wot [H*D,E]: row h*D+d is what element d of head h
   needs, or adds.
3. The product of the LM head over a stored transpose becomes one over the transposed embedding, which is the same
   tensor: a GPU's products read it as it is.

An exact rewrite: the same numbers lie elsewhere. TensorRT's products can use such matrices, which is what the prefill
does, and both plans then share one copy. The operators get the signature for TensorRT.

Letters: E hidden, H heads, D head size, F neurons.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_graphsurgeon as gs

from shadowc.checkpoint.opt import EMBEDDING
from shadowc.passes.canonicalise import LM_HEAD
from shadowc.passes.finalise import require_operators
from shadowc.passes.surgery import Builder, Scopes, tidy
from shadowc.spec.errors import InternalError
from shadowc.spec.program import PassReport, Program, RecipeKind

NAME = "split_records"
FFN_ROWS = ("w1", "w2t")
ATTENTION_ROWS = ("wq", "wk", "wv", "wot")
RECORDS_INPUT = 3
"""Position of the records among the inputs of both operators."""


def apply(program: Program) -> PassReport:
    """Rewrite all operators and the LM head, in place."""
    requires(program)
    builder = Builder(program)
    counts = {"matrices": 0, "head": _share_embedding(program, builder)}
    for node in program.graph.nodes:
        if node.op not in ("SparseFFN", "SparseAttention") or f"{node.name}.w" not in program.weights:
            continue
        counts["matrices"] += _split(program, builder, node)
    tidy(program)
    ensures(program)
    return PassReport(NAME, counts)


def requires(program: Program) -> None:
    """Both sparsify passes have run."""
    require_operators(program, NAME)


def ensures(program: Program) -> None:
    """No records are left, and every operator reads its own matrices at their places."""
    left = [name for name, recipe in program.weights.items() if recipe.kind.endswith("_records")]
    if left:
        raise InternalError(f"{NAME}: {left[0]} is still a tensor of records")
    for node in program.graph.nodes:
        if node.op in ("SparseFFN", "SparseAttention"):
            rows = FFN_ROWS if node.op == "SparseFFN" else ATTENTION_ROWS
            found = [value.name for value in node.inputs[RECORDS_INPUT : RECORDS_INPUT + len(rows)]]
            if found != [f"{node.name}.{part}" for part in rows]:
                raise InternalError(f"{NAME}: {node.name} reads {', '.join(found)}")
    if LM_HEAD in program.weights:
        raise InternalError(f"{NAME}: the LM head has a weight of its own")


def _split(program: Program, builder: Builder, node: gs.Node) -> int:
    recipe = program.weights[f"{node.name}.w"]
    rows = FFN_ROWS if node.op == "SparseFFN" else ATTENTION_ROWS
    kind: RecipeKind = "ffn_rows" if node.op == "SparseFFN" else "attention_rows"
    F, E = program.facts.ffn, program.facts.hidden
    shape = (F, E) if kind == "ffn_rows" else (program.facts.heads * program.facts.head_size, E)
    matrices = [
        builder.weight(f"{node.name}.{name}", replace(recipe, kind=kind, shape=shape, part=part))
        for part, name in enumerate(rows)
    ]
    operands = list(node.inputs)
    node.inputs = [*operands[:RECORDS_INPUT], *matrices, *operands[RECORDS_INPUT + 1 :]]
    return len(matrices)


def _share_embedding(program: Program, builder: Builder) -> int:
    product = Scopes(program.graph).one(LM_HEAD, "MatMul")
    if product.inputs[1].name != LM_HEAD:
        return 0
    shape = (program.facts.embedding_width, program.facts.vocab)
    embedding = builder.tensor(EMBEDDING, "canonicalise")
    product.inputs[1] = builder.node("Transpose", [embedding], f"{LM_HEAD}.matrix", np.float32, shape, perm=[1, 0])
    return 1
