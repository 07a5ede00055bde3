# SPDX-License-Identifier: Apache-2.0
"""Gives the graph 16-bit activations, and keeps in float32 what would lose by them.

Legal cases:
1. Matrices of attention and FFN, embeddings, activations, K/V become `dtype`; 8-bit matrices stay as they are.
2. Norms, predictor, scores, thresholds and densities stay float32, with their weights; so do biases and scales, which
   operators take in float32 and standard nodes cast. (The prefill's softmax is inside `Attention`, which computes it
   in float32.)
3. Where a tensor crosses a border, one Cast is inserted and shared by its readers; logits leave as float32.

TensorRT builds strongly typed: it runs exactly the types that this pass writes. The pass comes after finalise, so
that no Cast stands between a tensor and its public name.
"""

from __future__ import annotations

import ml_dtypes  # noqa: F401 (makes "bfloat16" a numpy type)
import numpy as np
import onnx
import onnx_graphsurgeon as gs

from shadowc.checkpoint.opt import EMBEDDING, POSITIONS
from shadowc.passes.canonicalise import PROJECTIONS
from shadowc.passes.surgery import sort_nodes
from shadowc.spec.errors import InternalError
from shadowc.spec.ops import DOMAIN
from shadowc.spec.program import PassReport, Program

NAME = "keep_fp32_islands"
TYPES = {"float16": onnx.TensorProto.FLOAT16, "bfloat16": onnx.TensorProto.BFLOAT16}
_ROWS = ("ffn_rows", "attention_rows")
_FLOAT32 = np.dtype(np.float32)
_ISLANDS = ("predictor.", "select.", "scores.", "mask_scores.")
_DEQUANTISATION = (".steps", ".scale", ".scale.rows", ".float")
"""What dense_prefill calls the nodes that make floats of 8-bit matrices: a scale may be too small for float16."""
_NARROW_INPUTS = {"SparseAttention": (0, 3, 4, 5, 6, 10, 11), "SparseFFN": (0, 3, 4), "SelectThreshold": ()}
"""Inputs of the operators that have the type of the activations, by position; the rest stays as it is."""
_NARROW_OUTPUTS = {"SparseAttention": (0, 1, 2, 3), "SparseFFN": (0,), "SelectThreshold": ()}


def apply(program: Program, *, dtype: str) -> PassReport:
    """Change types and insert casts, in place.

    Args:
        program: after finalise_tensorrt.
        dtype: "float16" or "bfloat16".
    """
    if program.weights.get(EMBEDDING, None) is not None and program.weights[EMBEDDING].dtype == dtype:
        return PassReport(NAME, {"weights": 0, "tensors": 0, "casts": 0}, ("the graph has 16-bit activations",))
    requires(program)
    counts = {"weights": _narrow_weights(program, dtype), "tensors": _narrow_tensors(program, dtype)}
    counts["casts"] = _insert_casts(program, dtype)
    ensures(program, dtype=dtype)
    return PassReport(NAME, counts)


def requires(program: Program) -> None:
    """Types are known everywhere, and records are split."""
    for node in program.graph.nodes:
        for value in (*node.inputs, *node.outputs):
            if value.dtype is None:
                raise InternalError(f"{NAME}: {value.name} has no element type; finalise_tensorrt comes first")
    if all(recipe.kind not in _ROWS for recipe in program.weights.values()):
        raise InternalError(f"{NAME}: there are no separate matrices; split_records comes first")


def ensures(program: Program, *, dtype: str) -> None:
    """Every float input of a node has the type that the node computes in, and every recipe that of its input."""
    narrow = np.dtype(dtype)
    for node in program.graph.nodes:
        for position, value in enumerate(node.inputs):
            wanted = _wanted(node, position, narrow)
            if wanted is not None and np.dtype(value.dtype) not in (wanted, np.dtype(np.int8)):
                raise InternalError(f"{NAME}: {node.name} reads {value.name} as {value.dtype}, expected {wanted}")
    inputs = {value.name: value for value in program.graph.inputs}
    for name, recipe in program.weights.items():
        if np.dtype(inputs[name].dtype) != np.dtype(recipe.dtype):
            raise InternalError(f"{NAME}: {name} is {inputs[name].dtype}, its recipe says {recipe.dtype}")


def _narrow_weights(program: Program, dtype: str) -> int:
    from dataclasses import replace

    inputs = {value.name: value for value in program.graph.inputs}
    count = 0
    for name, recipe in program.weights.items():
        if recipe.quantised or not (recipe.kind in _ROWS or name in (EMBEDDING, POSITIONS, *PROJECTIONS)):
            continue
        program.weights[name] = replace(recipe, dtype=dtype)  # type: ignore[arg-type]  # one of TYPES
        inputs[name].dtype = np.dtype(dtype)
        count += 1
    return count


def _narrow_tensors(program: Program, dtype: str) -> int:
    """Results of all nodes that are no island, and the cache."""
    count = 0
    cache = [value for value in program.graph.inputs if value.name.startswith("past_key_values.")]
    results = [value for node in program.graph.nodes for value in _narrow_results(node)]
    for value in (*cache, *results):
        value.dtype = np.dtype(dtype)
        count += 1
    for node in program.graph.nodes:
        if node.op == "Cast" and not _is_island(node) and node.attrs["to"] == onnx.TensorProto.FLOAT:
            node.attrs["to"] = TYPES[dtype]
    return count


def _narrow_results(node: gs.Node) -> list[gs.Tensor]:
    if node.domain == DOMAIN:
        return [node.outputs[position] for position in _NARROW_OUTPUTS[node.op]]
    if _is_island(node):
        return []
    return [value for value in node.outputs if value.dtype == _FLOAT32]


def _is_island(node: gs.Node) -> bool:
    if node.op == "LayerNormalization" or node.name.startswith(_ISLANDS):
        return True
    name = str(node.name)
    return name.startswith("layers.") and name.endswith(_DEQUANTISATION)


def _wanted(node: gs.Node, position: int, narrow: np.dtype[np.generic]) -> np.dtype[np.generic] | None:
    """The type in which a node takes an input; None: not a matter of this pass."""
    dtype = node.inputs[position].dtype
    if dtype not in (_FLOAT32, narrow) or node.op == "Cast":
        return None
    if node.domain == DOMAIN:
        return narrow if position in _NARROW_INPUTS[node.op] else _FLOAT32
    return _FLOAT32 if _is_island(node) else narrow


def _insert_casts(program: Program, dtype: str) -> int:
    graph, narrow = program.graph, np.dtype(dtype)
    made: dict[tuple[str, str], gs.Variable] = {}
    for node in list(graph.nodes):
        for position, value in enumerate(node.inputs):
            wanted = _wanted(node, position, narrow)
            if wanted is None or wanted == value.dtype:
                continue
            if isinstance(value, gs.Constant):
                raise InternalError(f"{NAME}: {node.name} reads the constant {value.name} as {wanted}")
            node.inputs[position] = _cast(program, made, value, wanted)
    for position, value in enumerate(graph.outputs):
        if value.name == "logits" and value.dtype == narrow:
            value.name = value.inputs[0].name = "logits.narrow"
            graph.outputs[position] = _cast(program, made, value, _FLOAT32, name="logits")
    sort_nodes(graph)
    return len(made)


def _cast(
    program: Program,
    made: dict[tuple[str, str], gs.Variable],
    value: gs.Tensor,
    dtype: np.dtype[np.generic],
    name: str = "",
) -> gs.Variable:
    """The same tensor in another type; one Cast for all its readers."""
    key = value.name, str(dtype)
    if key not in made:
        name = name or f"{value.name}.{dtype}"
        made[key] = gs.Variable(name, dtype, value.shape)
        to = onnx.helper.np_dtype_to_tensor_dtype(dtype)
        program.graph.nodes.append(gs.Node("Cast", name, {"to": int(to)}, [value], [made[key]]))
    return made[key]
