# SPDX-License-Identifier: Apache-2.0
"""What the graph looks like after each pass and at the end."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import pytest

from shadowc.passes import finalise
from shadowc.passes.surgery import Scopes, scope_of
from shadowc.pipeline import schedule
from shadowc.spec.ops import CPU_OPS, DOMAIN, MATMUL_ROWS
from shadowc.spec.options import WEIGHTS
from shadowc.spec.program import Program
from shadowc.trace.program_io import to_model
from tests.trace import deep

N = deep.FACTS.layers
ALL_STEPS = schedule(target="cpu", weights="int8", skip_zeros=True, sparse=True)
GOLDEN_SPARSE = {
    "SparseAttention": 11, "SparseFFN": 11, "SelectThreshold": 2, "LayerNormalization": 1, "MatMul": 5, "Gather": 2,
    "Add": 7, "Sub": 7, "Max": 3, "Min": 1, "Div": 1, "ReduceMin": 1, "ReduceMax": 1, "ReduceSum": 1, "Relu": 2,
    "Reshape": 3, "Slice": 5, "Concat": 1, "Shape": 3, "Expand": 1, "Squeeze": 1, "Unsqueeze": 2, "Range": 1,
    "Equal": 1, "Less": 1, "Where": 1, "Cast": 1,
}  # fmt: skip
GOLDEN_DENSE = {
    "SparseAttention": 11, "SparseFFN": 11, "LayerNormalization": 1, "MatMul": 1, "Gather": 2, "Add": 3, "Sub": 3,
    "Max": 1, "ReduceSum": 1, "Reshape": 1, "Concat": 1, "Shape": 3, "Expand": 1, "Squeeze": 1, "Unsqueeze": 2,
    "Range": 1,
}  # fmt: skip


def node(program: Program, name: str):
    return next(node for node in program.graph.nodes if node.name == name)


def names(values) -> list[str]:
    return [value.name for value in values]


@pytest.mark.parametrize(
    ("plan", "golden"), [(deep.plan(), GOLDEN_SPARSE), (None, GOLDEN_DENSE)], ids=["sparse", "dense"]
)
def test_final_graph_has_the_golden_counts_of_operators(plan, golden) -> None:
    assert dict(Counter(node.op for node in deep.compiled(plan).graph.nodes)) == golden


def test_canonical_graph_has_no_gemm_identity_or_flattening() -> None:
    program = deep.compiled(None, until="canonicalise")
    scopes = Scopes(program.graph)
    assert not {"Gemm", "Identity"} & {node.op for node in program.graph.nodes}
    for layer in range(N):
        assert [node.op for node in scopes.nodes(f"model.decoder.layers.{layer}")] == ["Add", "Add"]


def test_positions_depend_on_ids_and_mask_only_after_canonicalise() -> None:
    program = deep.compiled(None, until="canonicalise")
    seen, stack = set(), [program.graph.tensors()["positions"]]
    while stack:
        value = stack.pop()
        seen.add(value.name)
        stack.extend(source for maker in value.inputs for source in maker.inputs)
    assert {name for name in seen if name in names(program.graph.inputs)} == {"input_ids", "attention_mask"}


def test_tied_weight_is_called_by_the_name_of_the_embedding_and_the_head_is_its_own_weight() -> None:
    program = deep.compiled(None, until="canonicalise")
    assert program.weights["model.decoder.embed_tokens.weight"].kind == "copy"
    head = program.weights["lm_head"]
    assert (head.kind, head.sources, head.shape) == ("transpose", ("lm_head.weight",), (64, 96))


def test_sparse_interface_is_the_contract() -> None:
    program = deep.compiled(deep.plan())
    caches = [f"{layer}.{kind}" for layer in range(N) for kind in ("key", "value")]
    run_time = names(program.graph.inputs)[: -len(program.weights)]
    assert run_time == [
        "input_ids", "attention_mask", *(f"past_key_values.{name}" for name in caches),
        "density_heads", "density_neurons", "sparse_tail",
    ]  # fmt: skip
    kinds = [
        f"{part}.{kind}" for part in ("mask_scores", "scores", "threshold", "active") for kind in ("heads", "neurons")
    ]
    assert names(program.graph.outputs) == ["logits", *(f"present.{name}" for name in caches), *kinds, "read"]


def test_dense_interface_has_no_dials() -> None:
    program = deep.compiled(None)
    run_time = names(program.graph.inputs)[: -len(program.weights)]
    assert run_time[:2] == ["input_ids", "attention_mask"]
    assert all(name.startswith("past_key_values.") for name in run_time[2:])
    assert names(program.graph.outputs)[-1] == "read"
    assert not [name for name in names(program.graph.outputs) if "heads" in name]


def test_interface_has_the_promised_types_and_shapes() -> None:
    model = to_model(deep.compiled(deep.plan()))
    found = {
        value.name: (
            onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).name,
            [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim],
        )
        for value in (*model.graph.input, *model.graph.output)
    }
    L, blocks = N - 1, 13
    expected = {
        "input_ids": ("int64", ["B", "S"]), "attention_mask": ("int64", ["B", "P"]),
        "past_key_values.10.key": ("float32", ["B", 4, "T", 16]), "present.0.value": ("float32", ["B", 4, "T", 16]),
        "density_heads": ("float32", ["Bh"]), "density_neurons": ("float32", ["Bn"]), "sparse_tail": ("int64", [1]),
        "logits": ("float32", ["B", "S", 96]), "mask_scores.heads": ("float32", ["B", 1, L, 4]),
        "scores.neurons": ("float32", ["B", "Z", L, blocks]), "threshold.heads": ("float32", ["B", "Z", L]),
        "active.neurons": ("int32", ["B", "Z", L]), "read": ("int64", [N, 2, 2]),
        "layers.10.attention.w": ("float32", [4, 4, 16, 64]), "layers.3.ffn.w": ("float32", [200, 2, 64]),
    }  # fmt: skip
    assert {name: found[name] for name in expected} == expected


def test_every_operator_reads_its_own_layer_when_names_share_a_prefix() -> None:
    program = deep.compiled(deep.plan(), skip_zeros=True)
    for layer in range(N):
        attention, ffn = node(program, f"layers.{layer}.attention"), node(program, f"layers.{layer}.ffn")
        dense = layer == 0
        selected = ["dense.scores.heads", "dense.threshold"] if dense else ["scores.heads", "threshold.heads"]
        assert names(attention.inputs) == [
            f"residual.{layer}", *selected,
            *(f"layers.{layer}.attention.{part}" for part in ("w", "scales", "bqkv", "bo")),
            f"past_key_values.{layer}.key", f"past_key_values.{layer}.value", "start", "past",
            *(f"model.decoder.layers.{layer}.self_attn_layer_norm.{part}" for part in ("weight", "bias")),
        ]  # fmt: skip
        assert names(attention.outputs) == [
            f"layers.{layer}.middle", f"present.{layer}.key", f"present.{layer}.value", f"context.{layer}",
            f"layers.{layer}.attention.read",
        ]  # fmt: skip
        assert attention.attrs == {"layer": max(layer - 1, 0), "kv": "all", "epsilon": pytest.approx(1e-5)}
        assert ffn.attrs == {"layer": max(layer - 1, 0), "block": 16, "skip_zeros": 1, "epsilon": pytest.approx(1e-5)}
        for recipe in (program.weights[f"layers.{layer}.attention.w"], program.weights[f"layers.{layer}.ffn.w"]):
            assert all(source.startswith(f"model.decoder.layers.{layer}.") for source in recipe.sources)


def test_residual_stream_has_a_name_before_and_after_every_layer() -> None:
    program = deep.compiled(deep.plan())
    for layer in range(N):
        attention, ffn = node(program, f"layers.{layer}.attention"), node(program, f"layers.{layer}.ffn")
        assert attention.inputs[0].name == f"residual.{layer}"
        assert attention.outputs[0].name == ffn.inputs[0].name == f"layers.{layer}.middle"
        assert ffn.outputs[0].name == f"residual.{layer + 1}"


def test_predictor_reads_the_context_of_layer_0() -> None:
    program = deep.compiled(deep.plan())
    assert [reader.name for reader in program.graph.tensors()["context.0"].outputs] == ["predictor.context"]


@pytest.mark.parametrize("weights", WEIGHTS["cpu"])
def test_operators_match_their_specification(weights: str) -> None:
    specs = {spec.name: spec for spec in CPU_OPS}
    nodes = deep.compiled(deep.plan(), weights=weights).graph.nodes
    for found in (node for node in nodes if node.domain == "shadowc"):
        spec = specs[found.op]
        inputs = (*spec.inputs, *(spec.norm.inputs if spec.norm else ()))
        attributes = (*spec.attributes, *(spec.norm.attributes if spec.norm else ()))
        assert len(found.inputs) == len(inputs)
        assert len(found.outputs) == len(spec.outputs)
        assert set(found.attrs) == {attribute.name for attribute in attributes}
        for value, operand in zip((*found.inputs, *found.outputs), (*inputs, *spec.outputs), strict=True):
            assert value.dtype.name in operand.types
            packed = weights == "int4" and operand.packed
            assert len(value.shape) == len(operand.packed if packed else operand.shape)


def test_weights_are_inputs_with_recipes_of_the_same_shape_and_type() -> None:
    for weights in WEIGHTS["cpu"]:
        program = deep.compiled(deep.plan(), weights=weights)
        inputs = {value.name: value for value in program.graph.inputs}
        for name, recipe in program.weights.items():
            assert (tuple(inputs[name].shape), inputs[name].dtype) == (recipe.shape, np.dtype(recipe.dtype)), name


def test_every_parameter_of_the_model_is_used_by_exactly_the_recipes_that_need_it() -> None:
    program = deep.compiled(deep.plan())
    used = Counter(source for recipe in program.weights.values() for source in recipe.sources)
    parameters = set(deep.Tensors().values) - {name for name in deep.Tensors().values if "order" in name}
    assert set(used) == parameters
    # records and their scales are made from the same matrices
    assert {name: count for name, count in used.items() if count != 1} == {
        f"model.decoder.layers.{layer}.{module}.weight": 2
        for layer in range(N)
        for module in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "fc1", "fc2")
    }


def test_neuron_orders_are_set_for_predicted_layers_only_when_blocks_have_several_neurons() -> None:
    clustered, single = deep.compiled(deep.plan()), deep.compiled(deep.plan(block=1))
    for layer in range(N):
        order = f"predictor.order.{layer}" if layer else ""
        assert {clustered.weights[f"layers.{layer}.ffn.{part}"].order for part in ("w", "scales", "b1")} == {order}
        assert clustered.weights[f"layers.{layer}.ffn.b2"].order == ""
    assert {recipe.order for recipe in single.weights.values()} == {""}


@pytest.mark.parametrize(
    ("weights", "records", "scales"),
    [
        ("bf16", ("bfloat16", False, 0), ("float32", False, 0)),
        ("int8", ("int8", True, 0), ("float32", True, 0)),
        ("int4", ("uint8", True, 64), ("float32", True, 64)),
    ],
)
def test_records_and_products_become_narrow_and_nothing_else(
    weights: str, records: tuple[str, bool, int], scales: tuple[str, bool, int]
) -> None:
    program = deep.compiled(deep.plan(), weights=weights)
    kinds = {recipe.kind: (recipe.dtype, recipe.quantised, recipe.block) for recipe in program.weights.values()}
    assert kinds.pop("copy") == ("float32", False, 0)
    assert kinds == {
        "attention_records": records, "attention_scales": scales, "ffn_records": records, "ffn_scales": scales,
        "ffn_bias": ("float32", False, 0), "qkv_bias": ("float32", False, 0),
        "network_rows": ("int8", True, 0), "network_scales": ("float32", True, 0),
    }  # fmt: skip
    assert not [node.name for node in program.graph.nodes if node.op == "MatMul"]
    head = node(program, "logits")
    assert (head.op, head.domain, names(head.inputs)[1:]) == (MATMUL_ROWS.name, DOMAIN, ["lm_head", "lm_head.scales"])


def test_a_product_of_any_inner_dimension_becomes_narrow() -> None:
    program = deep.compiled(deep.plan(width_neurons=21), until="cluster_neurons")
    report = next(step for step in ALL_STEPS if step.name == "quantise").apply(program)
    assert not report.refusals
    assert program.weights["predictor.neurons.fc2.weight"].kind == "network_rows"


@pytest.mark.parametrize("step", ALL_STEPS, ids=[step.name for step in ALL_STEPS])
def test_pass_changes_nothing_when_it_runs_again(step) -> None:
    program = deep.compiled(deep.plan(), weights="int8", until=step.name, skip_zeros=True)
    before, recipes = to_model(program).SerializeToString(deterministic=True), dict(program.weights)
    report = step.apply(program)
    assert not any(report.counts.values()), report
    assert to_model(program).SerializeToString(deterministic=True) == before
    assert program.weights == recipes


def test_two_runs_give_the_same_bytes() -> None:
    once, again = (to_model(deep.compiled(deep.plan(), weights="int8")) for _ in range(2))
    assert once.SerializeToString(deterministic=True) == again.SerializeToString(deterministic=True)


def test_final_graph_passes_the_onnx_checker_and_lists_its_domains_in_order() -> None:
    model = to_model(deep.compiled(deep.plan(), weights="int8"))
    onnx.checker.check_model(model)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [
        ("", 20), ("shadowc", 1),
    ]  # fmt: skip
    assert model.ir_version == finalise.IR_VERSION


def test_no_name_of_the_trace_is_left_in_the_final_graph() -> None:
    graph = deep.compiled(deep.plan()).graph
    assert not [node.name for node in graph.nodes if scope_of(node)]
    assert not [name for name in graph.tensors() if name.startswith(("val_", "add_", "linear", "layer_norm", "view"))]
