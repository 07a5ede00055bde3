# SPDX-License-Identifier: Apache-2.0
"""Graphs that a pass is not written for: it says which layer and which node, and stops."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

import numpy as np
import onnx_graphsurgeon as gs
import pytest

from shadowc.passes import (
    canonicalise,
    cluster_neurons,
    finalise,
    insert_predictor,
    narrow_cache,
    quantise,
    sparsify_attention,
    sparsify_ffn,
)
from shadowc.passes.surgery import scope_of
from shadowc.spec.errors import InternalError
from shadowc.spec.program import Program
from tests.trace import deep

LAYER_1 = "model.decoder.layers.1"


def rename_scope(program: Program, old: str, new: str) -> None:
    for node in program.graph.nodes:
        if scope_of(node) == old:
            node.name = node.name.replace(old, new)


def in_scope(program: Program, scope: str, op: str) -> gs.Node:
    return next(node for node in program.graph.nodes if scope_of(node) == scope and node.op == op)


def canonical() -> Program:
    return deep.compiled(deep.plan(), until="canonicalise")


def predicted() -> Program:
    return deep.compiled(deep.plan(), until="insert_predictor")


@pytest.mark.parametrize("module", ["self_attn.out_proj", "self_attn.k_proj", "fc1", "fc2"])
def test_renamed_scope_is_named_with_its_layer_when_canonicalise_ends(module: str) -> None:
    program = deep.traced(deep.plan())
    rename_scope(program, f"{LAYER_1}.{module}", f"{LAYER_1}.renamed")
    with pytest.raises(InternalError, match=rf"in model\.decoder\.layers\.1\.{module}, found 0; .*no node at all"):
        canonicalise.apply(program)


def test_missing_layer_is_named() -> None:
    program = deep.traced()
    for node in program.graph.nodes:
        node.name = node.name.replace("layers.10", "layers.11")
    with pytest.raises(InternalError, match=r"no node was traced in model\.decoder\.layers\.10"):
        canonicalise.apply(program)


def test_missing_input_is_named() -> None:
    program = deep.traced()
    program.graph.inputs = [value for value in program.graph.inputs if value.name != "attention_mask"]
    with pytest.raises(InternalError, match="no attention_mask"):
        canonicalise.apply(program)


def test_unpaired_reshape_is_refused() -> None:
    program = deep.traced()
    last = [node for node in program.graph.nodes if scope_of(node) == LAYER_1 and node.op == "Reshape"][-1]
    last.op = "Identity"
    with pytest.raises(InternalError, match=r"layers\.1 has reshapes of ranks"):
        canonicalise.apply(program)


def test_gemm_with_a_factor_is_refused() -> None:
    program = deep.traced()
    in_scope(program, f"{LAYER_1}.fc1", "Gemm").attrs["alpha"] = 2.0
    with pytest.raises(InternalError, match=r"layers\.1\.fc1#\d+ is a Gemm with factors \(2\.0, 1\.0\)"):
        canonicalise.apply(program)


def test_missing_out_proj_is_named_with_its_layer() -> None:
    program = predicted()
    rename_scope(program, f"{LAYER_1}.self_attn.out_proj", "elsewhere")
    with pytest.raises(InternalError, match=r"layers\.1\.self_attn\.out_proj"):
        sparsify_attention.apply(program)


def test_projections_of_different_tensors_are_refused() -> None:
    program = predicted()
    key = in_scope(program, f"{LAYER_1}.self_attn.k_proj", "MatMul")
    key.inputs[0] = in_scope(program, f"{LAYER_1}.final_layer_norm", "LayerNormalization").outputs[0]
    with pytest.raises(InternalError, match="layer 1: q, k and v"):
        sparsify_attention.apply(program)


def test_node_left_of_an_old_attention_is_named() -> None:
    program = predicted()
    query = in_scope(program, f"{LAYER_1}.self_attn.q_proj", "Add").outputs[0]
    residual = in_scope(program, f"{LAYER_1}.fc1", "MatMul")
    bypass = gs.Variable("bypass", np.dtype(np.float32), ("B", "S", 64))
    program.graph.nodes.append(gs.Node("Add", "bypass", inputs=[query, residual.inputs[0]], outputs=[bypass]))
    residual.inputs[0] = bypass
    with pytest.raises(InternalError, match=r"layer 1 still has 3 nodes .*layers\.1\.self_attn"):
        sparsify_attention.apply(program)


def test_reader_of_the_cache_is_named_because_a_capacity_is_no_length() -> None:
    program = predicted()
    builder_input = next(value for value in program.graph.inputs if value.name == "past_key_values.10.value")
    size = gs.Variable("capacity", np.dtype(np.int64), (1,))
    program.graph.nodes.append(gs.Node("Shape", "capacity", {"start": 2, "end": 3}, [builder_input], [size]))
    next(node for node in program.graph.nodes if node.name == "tail.predicted").inputs[1] = size
    with pytest.raises(InternalError, match="capacity still reads the cache"):
        sparsify_attention.apply(program)


def test_activation_other_than_relu_is_named_with_its_layer() -> None:
    program = predicted()
    in_scope(program, f"{LAYER_1}.activation_fn", "Relu").op = "Gelu"
    with pytest.raises(InternalError, match="layer 1: expected ReLU between fc1 and fc2, found Gelu"):
        sparsify_ffn.apply(program)


def test_context_without_out_proj_is_refused_by_the_predictor() -> None:
    program = canonical()
    rename_scope(program, "model.decoder.layers.0.self_attn.out_proj", "elsewhere")
    with pytest.raises(InternalError, match=r"layers\.0\.self_attn\.out_proj"):
        insert_predictor.apply(program)


def test_dense_program_has_no_predictor_to_insert() -> None:
    with pytest.raises(InternalError, match="needs a sparsity plan"):
        insert_predictor.apply(deep.compiled(until="canonicalise"))


@pytest.mark.parametrize(
    ("apply", "message"),
    [
        (insert_predictor.apply, "canonicalise has to run first"),
        (sparsify_attention.apply, "canonicalise has to run first"),
        (sparsify_ffn.apply, "insert_predictor has to run first"),
        (cluster_neurons.apply, r"layer 1 .*sparsify_ffn has to run first"),
        (partial(quantise.apply, weights="int8"), r"layer 0 .*sparsify_attention has to run first"),
        (narrow_cache.apply, r"layer 0 .*sparsify_attention has to run first"),
        (finalise.apply, r"layer 0 .*sparsify_attention has to run first"),
    ],
    ids=[
        "insert_predictor",
        "sparsify_attention",
        "sparsify_ffn",
        "cluster_neurons",
        "quantise",
        "narrow_cache",
        "finalise",
    ],
)
def test_pass_names_the_pass_that_has_to_run_first(apply: Callable[[Program], object], message: str) -> None:
    with pytest.raises(InternalError, match=message):
        apply(deep.traced(deep.plan()))


def test_order_on_a_dense_layer_is_refused() -> None:
    program = deep.compiled(deep.plan(), until="cluster_neurons")
    recipe = program.weights["layers.0.ffn.w"]
    program.weights["layers.0.ffn.w"] = dataclasses.replace(recipe, order="predictor.order.1")
    with pytest.raises(InternalError, match=r"layers\.0\.ffn\.w is in order 'predictor\.order\.1', expected ''"):
        cluster_neurons.apply(program)


def test_scales_that_are_not_those_of_their_records_are_refused() -> None:
    program = deep.compiled(deep.plan(), weights="int4", until="quantise")
    recipe = program.weights["layers.7.ffn.scales"]
    program.weights["layers.7.ffn.scales"] = dataclasses.replace(recipe, block=32)
    with pytest.raises(InternalError, match=r"layers\.7\.ffn\.w \(uint8\) and its scales are not narrowed alike"):
        quantise.ensures(program)


def test_int4_is_refused_when_rows_do_not_fill_groups() -> None:
    program = deep.compiled(deep.plan(), until="cluster_neurons")
    program.facts = dataclasses.replace(program.facts, hidden=96)
    with pytest.raises(InternalError, match="96 weights of a row do not fill groups of 64"):
        quantise.apply(program, weights="int4")


def test_cache_that_stayed_wide_is_refused() -> None:
    program = deep.compiled(deep.plan(), weights="int8", until="narrow_cache")
    program.graph.tensors()["present.10.value"].dtype = np.dtype(np.float32)
    with pytest.raises(InternalError, match=r"present\.10\.value is float32"):
        narrow_cache.ensures(program)


def test_recipe_that_disagrees_with_its_tensor_is_refused() -> None:
    program = deep.compiled(deep.plan(), weights="int8", until="quantise")
    recipe = program.weights["layers.7.ffn.w"]
    program.weights["layers.7.ffn.w"] = dataclasses.replace(recipe, dtype="float32")
    with pytest.raises(InternalError, match=r"layers\.7\.ffn\.w is int8\[200, 2, 64\], its recipe says float32"):
        quantise.ensures(program)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda graph: graph.nodes[3].__setattr__("name", graph.nodes[4].name), "several nodes are called"),
        (lambda graph: graph.nodes[3].__setattr__("name", "left#7"), "left#7 kept the name of the trace"),
        (lambda graph: graph.outputs.reverse(), "outputs are"),
        (lambda graph: graph.inputs.pop(0), "inputs differ from the expected"),
        (lambda graph: graph.tensors()["residual.4"].__setattr__("name", "gone"), r"residual\.4 is missing"),
        (lambda graph: graph.tensors()["slot"].__setattr__("dtype", None), "tensor slot has no element type"),
    ],
    ids=["twins", "traced", "outputs", "inputs", "residual", "type"],
)
def test_broken_face_of_the_final_graph_is_refused(break_it: Callable[[gs.Graph], object], message: str) -> None:
    program = deep.compiled(deep.plan())
    break_it(program.graph)
    with pytest.raises(InternalError, match=message):
        finalise.ensures(program)
