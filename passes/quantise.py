# SPDX-License-Identifier: Apache-2.0
"""Turns weights into narrower types.

Legal cases:
1. Records of attention and FFN become bfloat16, whose scales stay ones; or int8, their scales max|w| / 127 of each
   record row; or pairs of int4, their scales max|w| / 7 of each group of a row.
2. Whichever it is, a MatMul with a weight (LM head, predictor of all layers) becomes MatMulRows: the matrix as int8
   rows, with one scale max|w| / 127 for each.
3. Then a network of one layer becomes int8 in the same way.

Refused: the two projections of narrower embeddings, 1 % of the bytes, whose rounding would reach every layer and every
mask. Norms, biases and embeddings are read by the row or are tiny, and stay float32.

Letters: K inner dimension, N columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Literal

import ml_dtypes  # noqa: F401 (makes "bfloat16" a numpy type)
import numpy as np
import onnx_graphsurgeon as gs

from shadowc.passes.canonicalise import PROJECTIONS
from shadowc.passes.surgery import Builder, tidy
from shadowc.spec.errors import InternalError
from shadowc.spec.ops import DOMAIN, INT4_GROUP, MATMUL_ROWS
from shadowc.spec.program import PassReport, Program, WeightRecipe

NAME = "quantise"
WEIGHTS = ("bf16", "int8", "int4")
"""What records can become."""
RecordType = Literal["bfloat16", "int8", "uint8"]
_RECORDS = ("attention_records", "ffn_records")
_SCALES = ("attention_scales", "ffn_scales")
_NETWORKS = ("network_rows", "network_scales")
_TYPES: Mapping[str, RecordType] = MappingProxyType({"bf16": "bfloat16", "int8": "int8", "int4": "uint8"})


def apply(program: Program, *, weights: str, products: bool = True) -> PassReport:
    """Change recipes and replace products, in place.

    Args:
        program: changed.
        weights: one of WEIGHTS, the type of the records.
        products: also MatMul with a weight; False: for targets without MatMulRows.
    """
    requires(program)
    builder = Builder(program)
    refusals: list[str] = []
    counts = {"records": _narrow_records(program, builder, weights), "products": 0}
    counts["networks"] = _narrow_networks(program, builder)
    for node in [node for node in program.graph.nodes if products and node.op == "MatMul"]:
        recipe = program.weights.get(node.inputs[1].name)
        if recipe is None or recipe.kind != "transpose":
            refusals.append(f"{node.name}: {node.inputs[1].name} is no weight that was stored for a product")
            continue
        if node.inputs[1].name in PROJECTIONS:
            refusals.append(f"{node.inputs[1].name} stays float32: every layer and every mask depends on it")
            continue
        _replace_product(program, builder, node)
        counts["products"] += 1
    tidy(program)
    ensures(program)
    return PassReport(NAME, counts, tuple(refusals))


def requires(program: Program) -> None:
    """Both sparsify passes have run, and every layer has its records."""
    for layer in range(program.facts.layers):
        for part in ("attention", "ffn"):
            if f"layers.{layer}.{part}.w" not in program.weights:
                raise InternalError(f"{NAME}: layer {layer} has no {part} records; sparsify_{part} has to run first")


def ensures(program: Program) -> None:
    """Records are narrow, their scales agree, and graph and recipes agree on shape and element type."""
    tensors = {value.name: value for value in program.graph.inputs}
    for name, recipe in program.weights.items():
        if tensors[name].dtype != np.dtype(recipe.dtype) or tuple(tensors[name].shape) != recipe.shape:
            raise InternalError(f"{NAME}: {name} is {tensors[name].dtype}{list(tensors[name].shape)}, its recipe says "
                                f"{recipe.dtype}{list(recipe.shape)}")  # fmt: skip
        if recipe.kind not in _RECORDS:
            continue
        scales = program.weights[f"{name.removesuffix('.w')}.scales"]
        if recipe.dtype == "float32" or (recipe.quantised, recipe.block) != (scales.quantised, scales.block):
            raise InternalError(f"{NAME}: {name} ({recipe.dtype}) and its scales are not narrowed alike")


def _narrow_records(program: Program, builder: Builder, weights: str) -> int:
    """Change the recipes of records and scales; returns how many records were changed."""
    block = INT4_GROUP if weights == "int4" else 0
    if block and program.facts.hidden % block:
        raise InternalError(f"{NAME}: {program.facts.hidden} weights of a row do not fill groups of {block}")
    count = 0
    for name, recipe in program.weights.items():
        done = recipe.quantised or recipe.dtype != "float32"
        if done or recipe.kind not in (*_RECORDS, *_SCALES):
            continue
        changed = replace(recipe, quantised=weights != "bf16", block=block)
        if recipe.kind in _RECORDS:
            rows, width = recipe.shape[:-1], recipe.shape[-1]
            changed = replace(changed, dtype=_TYPES[weights], shape=(*rows, width // 2) if block else recipe.shape)
            count += 1
        elif block:
            changed = replace(changed, shape=(*recipe.shape, program.facts.hidden // block))
        program.weights[name] = changed
        tensor = builder.tensor(name, "sparsify")
        tensor.dtype, tensor.shape = np.dtype(changed.dtype), changed.shape
    return count


def _narrow_networks(program: Program, builder: Builder) -> int:
    """Change the recipes of networks that one operator computes; returns how many matrices were changed."""
    count = 0
    for name, recipe in program.weights.items():
        if recipe.kind not in _NETWORKS or recipe.quantised:
            continue
        changed = replace(recipe, quantised=True)
        if recipe.kind == "network_rows":
            changed = replace(changed, dtype="int8")
            count += 1
            if name.endswith(".fc2.weight"):
                N, K = recipe.shape
                changed = replace(changed, kind="network_quads", shape=(-(-N // 16), -(-K // 4), 16, 4))
        program.weights[name] = changed
        tensor = builder.tensor(name, "fuse_predictor")
        tensor.dtype, tensor.shape = np.dtype(changed.dtype), changed.shape
    return count


def _replace_product(program: Program, builder: Builder, node: gs.Node) -> None:
    """MatMul(x, W [K,N]) -> MatMulRows(x, rows [N,K], scales [N])."""
    weight = node.inputs[1]
    recipe = program.weights.pop(weight.name)
    K, N = recipe.shape
    weight.shape, weight.dtype = (N, K), np.dtype(np.int8)
    program.weights[weight.name] = WeightRecipe("network_rows", recipe.sources, (N, K), "int8", quantised=True)
    scales = WeightRecipe("network_scales", recipe.sources, (N,), quantised=True)
    node.op, node.domain, node.attrs = MATMUL_ROWS.name, DOMAIN, {}
    node.inputs.append(builder.weight(f"{weight.name}.scales", scales))
