# SPDX-License-Identifier: Apache-2.0
"""What the graphs for TensorRT look like."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import pytest

from shadowc.checkpoint.opt import EMBEDDING
from shadowc.emit.tensorrt.emit import shared_recipes
from shadowc.passes import dense_prefill, finalise_tensorrt, keep_fp32_islands, split_records, steady_shapes
from shadowc.spec.errors import InternalError
from shadowc.spec.ops import OPS, tensorrt_inputs
from shadowc.trace.program_io import to_model
from tests.passes import tensorrt
from tests.trace import deep

N = deep.FACTS.layers
ALL = [(step.name, prefill) for prefill in (False, True) for step in tensorrt.steps("int8", prefill=prefill)]
GOLDEN_DECODE = {
    "SparseAttention": 11, "SparseFFN": 11, "SelectThreshold": 2, "LayerNormalization": 23, "Cast": 48, "Add": 29,
    "MatMul": 5, "Sub": 3, "Reshape": 3, "Gather": 2, "Unsqueeze": 2, "Max": 2, "Relu": 2, "Shape": 1, "Squeeze": 1,
    "Range": 1, "ReduceMin": 1, "ReduceMax": 1, "Div": 1, "Transpose": 1, "Concat": 1,
}  # fmt: skip
GOLDEN_PREFILL = {
    "Attention": 11, "LayerNormalization": 23, "Cast": 91, "Add": 90, "Transpose": 89, "Reshape": 77, "MatMul": 67,
    "Gather": 36, "Relu": 11, "Unsqueeze": 4, "Shape": 2, "Sub": 3, "Squeeze": 1, "Range": 1, "ReduceSum": 1,
    "Max": 1, "GreaterOrEqual": 1, "Equal": 1, "Or": 1, "LessOrEqual": 1, "And": 1,
}  # fmt: skip


def names(values) -> list[str]:
    return [value.name for value in values]


def inputs(program) -> list[str]:
    return [name for name in names(program.graph.inputs) if name not in program.weights]


@pytest.mark.parametrize(("prefill", "golden"), [(False, GOLDEN_DECODE), (True, GOLDEN_PREFILL)])
def test_final_graphs_have_the_golden_counts_of_operators(prefill: bool, golden: dict[str, int]) -> None:
    graph = tensorrt.compiled(deep.plan(), prefill=prefill).graph
    assert dict(Counter(node.op for node in graph.nodes)) == golden


def test_decode_takes_times_as_inputs_and_no_size_that_grows() -> None:
    program = tensorrt.compiled(deep.plan())
    caches = [f"{layer}.{kind}" for layer in range(N) for kind in ("key", "value")]
    assert inputs(program) == [
        "input_ids", "past", "start", *(f"past_key_values.{name}" for name in caches),
        "density_heads", "density_neurons",
    ]  # fmt: skip
    assert names(program.graph.outputs) == [
        "logits", *(f"present.{name}" for name in caches), "active.heads", "active.neurons", "read",
    ]  # fmt: skip
    letters = {str(size)[0] for value in program.graph.inputs for size in value.shape if not isinstance(size, int)}
    assert letters == {"B", "S", "T"}


def test_prefill_takes_the_prompt_and_gives_the_last_logits_and_fresh_keys_and_values() -> None:
    program = tensorrt.compiled(deep.plan(), prefill=True)
    assert inputs(program) == ["input_ids", "attention_mask"]
    shapes = {value.name: tuple(value.shape) for value in program.graph.outputs}
    assert shapes.pop("logits") == ("B", 1, 96)
    assert set(shapes.values()) == {("B", 4, "S", 16)}
    assert not [node.name for node in program.graph.nodes if node.domain]


def test_dense_engines_have_no_densities_and_no_counts_of_units() -> None:
    program = tensorrt.compiled(None)
    assert "density_heads" not in inputs(program)
    assert names(program.graph.outputs)[-1] == "read"
    assert "active.heads" not in names(program.graph.outputs)


@pytest.mark.parametrize("weights", ["fp16", "bf16", "fp32", "int8"])
@pytest.mark.parametrize("prefill", [False, True])
def test_graphs_pass_the_onnx_checker_and_carry_no_function_and_no_default(weights: str, prefill: bool) -> None:
    model = to_model(tensorrt.compiled(deep.plan(), weights=weights, prefill=prefill))
    onnx.checker.check_model(model)
    assert not model.functions
    assert not {value.name for value in model.graph.input} & {tensor.name for tensor in model.graph.initializer}
    versions = {entry.domain: entry.version for entry in model.opset_import}
    assert versions == ({"": 23} if prefill else {"": 20, "shadowc": 1})


@pytest.mark.parametrize("weights", ["fp16", "bf16", "fp32", "int8"])
def test_operators_match_their_specification_for_tensorrt(weights: str) -> None:
    specs = {spec.name: spec for spec in OPS}
    for found in tensorrt.compiled(deep.plan(), weights=weights).graph.nodes:
        if found.domain != "shadowc":
            continue
        spec = specs[found.op]
        assert set(found.attrs) == {attribute.name for attribute in spec.attributes}
        for value, operand in zip(found.inputs, tensorrt_inputs(spec), strict=True):
            assert np.dtype(value.dtype).name in operand.types, (found.name, value.name)
            assert len(value.shape) == len(operand.shape)


def test_every_operator_reads_the_matrices_of_its_own_layer_in_the_promised_order() -> None:
    program = tensorrt.compiled(deep.plan(), weights="fp32")
    nodes = {node.name: node for node in program.graph.nodes}
    for layer in range(N):
        attention, ffn = nodes[f"layers.{layer}.attention"], nodes[f"layers.{layer}.ffn"]
        parts = ("wq", "wk", "wv", "wot", "scales", "bqkv", "bo")
        assert names(attention.inputs)[3:] == [
            *(f"layers.{layer}.attention.{part}" for part in parts),
            f"past_key_values.{layer}.key", f"past_key_values.{layer}.value", "start", "past",
        ]  # fmt: skip
        assert names(ffn.inputs)[3:] == [f"layers.{layer}.ffn.{part}" for part in ("w1", "w2t", "scales", "b1", "b2")]


@pytest.mark.parametrize("weights", ["fp16", "bf16", "fp32", "int8"])
def test_both_graphs_share_every_weight_that_both_need(weights: str) -> None:
    decode, prefill = (tensorrt.compiled(deep.plan(), weights=weights, prefill=flag) for flag in (False, True))
    recipes = shared_recipes({"decode": decode, "prefill": prefill})
    assert recipes.keys() == decode.weights.keys()
    only_decode = {name for name in decode.weights if name not in prefill.weights}
    scales = () if weights == "int8" else (".scales",)
    assert all(name.startswith("predictor.") or name.endswith(scales) for name in only_decode)
    assert "lm_head" not in recipes  # the embedding serves as the head


def test_graphs_that_want_a_weight_in_two_ways_are_refused() -> None:
    import dataclasses

    decode, prefill = (tensorrt.compiled(deep.plan(), prefill=flag) for flag in (False, True))
    name = "layers.5.ffn.w1"
    prefill.weights[name] = dataclasses.replace(prefill.weights[name], order="")
    with pytest.raises(InternalError, match=r"the graphs want layers\.5\.ffn\.w1 as .* and as "):
        shared_recipes({"decode": decode, "prefill": prefill})


@pytest.mark.parametrize(("weights", "narrow"), [("fp16", "float16"), ("bf16", "bfloat16"), ("int8", "float16")])
def test_islands_stay_float32_and_the_rest_is_narrow(weights: str, narrow: str) -> None:
    program = tensorrt.compiled(deep.plan(), weights=weights)
    types = {name: np.dtype(value.dtype).name for name, value in program.graph.tensors().items()}
    types |= {value.name: np.dtype(value.dtype).name for value in program.graph.inputs}
    rows = "int8" if weights == "int8" else narrow
    expected = {
        "residual.3": narrow, "layers.3.attention.x": "float32", f"layers.3.attention.x.{narrow}": narrow,
        "past_key_values.3.key": narrow, "present.3.value": narrow, "context.0": narrow, "layers.3.ffn.y": narrow,
        "predictor.input": "float32", "predictor.heads.fc1.weight": "float32", "scores.neurons": "float32",
        "threshold.heads": "float32", "density_heads": "float32", "logits": "float32", EMBEDDING: narrow,
        "layers.3.ffn.w2t": rows, "layers.3.attention.wot": rows, "layers.3.ffn.b1": "float32",
        "layers.3.ffn.scales": "float32", "layers.3.attention.bqkv": "float32",
    }  # fmt: skip
    assert {name: types[name] for name in expected} == expected


def test_float32_graphs_have_no_cast_and_no_fused_attention() -> None:
    decode, prefill = (tensorrt.compiled(deep.plan(), weights="fp32", prefill=flag) for flag in (False, True))
    kinds = [Counter(node.op for node in program.graph.nodes) for program in (decode, prefill)]
    assert kinds[0]["Cast"] == kinds[1]["Cast"] == kinds[1]["Attention"] == 0
    assert kinds[1]["Softmax"] == N


def test_8_bit_prefill_multiplies_by_scales_in_float32_since_they_may_be_tiny() -> None:
    program = tensorrt.compiled(deep.plan(), weights="int8", prefill=True)
    tensors = program.graph.tensors()
    for name in ("layers.3.ffn.w1.scale", "layers.3.ffn.w1.steps", "layers.3.ffn.w1.float"):
        assert np.dtype(tensors[name].dtype).name == "float32"
    assert np.dtype(tensors["layers.3.ffn.w1.float.float16"].dtype).name == "float16"


@pytest.mark.parametrize(("name", "prefill"), ALL)
def test_pass_changes_nothing_when_it_runs_again(name: str, prefill: bool) -> None:
    program = tensorrt.compiled(deep.plan(), weights="int8", prefill=prefill, until=name)
    before, recipes = to_model(program).SerializeToString(deterministic=True), dict(program.weights)
    report = next(step for step in tensorrt.steps("int8", prefill=prefill) if step.name == name).apply(program)
    assert not any(report.counts.values()), report
    assert to_model(program).SerializeToString(deterministic=True) == before
    assert program.weights == recipes


def test_two_runs_give_the_same_bytes() -> None:
    for prefill in (False, True):
        once, again = (to_model(tensorrt.compiled(deep.plan(), prefill=prefill)) for _ in range(2))
        assert once.SerializeToString(deterministic=True) == again.SerializeToString(deterministic=True)


# --- refusals: each pass says what has to come first, or what it met


def test_split_records_refuses_a_graph_without_operators() -> None:
    with pytest.raises(InternalError, match=r"layer 0 has no attention operator; sparsify_attention has to run first"):
        split_records.apply(tensorrt.compiled(deep.plan(), until="insert_predictor"))


def test_steady_shapes_refuses_a_graph_that_still_attends_over_the_mask() -> None:
    with pytest.raises(InternalError, match="sparsify_attention has to run first"):
        steady_shapes.apply(tensorrt.compiled(deep.plan(), until="insert_predictor"))


def test_steady_shapes_refuses_a_reader_of_the_mask() -> None:
    import onnx_graphsurgeon as gs

    program = tensorrt.compiled(deep.plan(), until="split_records")
    mask = next(value for value in program.graph.inputs if value.name == "attention_mask")
    spy = gs.Variable("spy", np.dtype(np.int64), ("B", "P"))
    program.graph.nodes.append(gs.Node("Abs", "spy", {}, [mask], [spy]))
    program.graph.outputs.append(spy)
    with pytest.raises(InternalError, match="spy still reads attention_mask"):
        steady_shapes.apply(program)


def test_dense_prefill_refuses_records() -> None:
    with pytest.raises(InternalError, match=r"layer 0 has no wq of its attention; split_records comes first"):
        dense_prefill.apply(tensorrt.compiled(deep.plan(), until="cluster_neurons"))


def test_finalise_refuses_a_graph_that_derives_its_times() -> None:
    with pytest.raises(InternalError, match="steady_shapes or dense_prefill comes first"):
        finalise_tensorrt.apply(tensorrt.compiled(deep.plan(), until="split_records"))


def test_finalise_refuses_a_function_since_it_would_win_over_the_plugin() -> None:
    import onnx_graphsurgeon as gs

    program = tensorrt.compiled(deep.plan(), until="steady_shapes")
    program.graph.functions.append(gs.Function("SparseFFN", domain="shadowc"))
    with pytest.raises(InternalError, match="the graph carries the function SparseFFN"):
        finalise_tensorrt.apply(program)


def test_islands_refuse_records_and_tensors_without_a_type() -> None:
    program = tensorrt.compiled(deep.plan(), until="finalise_tensorrt")
    program.graph.tensors()["residual.3"].dtype = None
    with pytest.raises(InternalError, match=r"residual\.3 has no element type"):
        keep_fp32_islands.apply(program, dtype="float16")
    with pytest.raises(InternalError, match="split_records comes first"):
        keep_fp32_islands.apply(deep.compiled(deep.plan()), dtype="float16")
