# SPDX-License-Identifier: Apache-2.0
"""What the graphs for TensorRT compute, in stock ONNX Runtime with the operators as ONNX functions, against torch.

Letters: B batch, S tokens, Z masked tokens, L predicted layers, N units of a kind.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import onnx_graphsurgeon as gs
import pytest
import torch

from shadowc.sparsity.reference import MaskedModel
from shadowc.spec.density import Density
from shadowc.spec.program import Program
from tests.passes import tensorrt
from tests.passes.test_numbers import IDS, LIVE, MASK, distance, masks_of
from tests.trace import deep

FP32 = 2e-5
"""Largest difference of logits of size 4 through eleven layers, float32 against float32."""
NARROW = {"fp16": 6e-3, "bf16": 5e-2, "int8": 0.1}
"""The same with weights (and activations, in the graph as it is) rounded: 11, 8 and 7 bits of precision."""
START = 1 - MASK
EXPECTED = deep.torch_logits(IDS, MASK)


def decode(runner, kept: float, dtype: str = "float32", calls=((0, 7), (7, 8), (8, 10))):
    """The padded batch through a decode graph: a dense chunk, then masked ones; logits and every call's results."""
    cache = {
        f"past_key_values.{layer}.{kind}": np.zeros((2, 4, 16, 16), dtype)
        for layer in range(deep.FACTS.layers)
        for kind in ("key", "value")
    }
    found = []
    for first, last in calls:
        density = np.full(2, 1.0 if first == 0 else kept, np.float32)
        feeds = {
            "input_ids": IDS[:, first:last], "past": np.full(2, first), "start": START.sum(1), **cache,
            "density_heads": density, "density_neurons": density,
        }  # fmt: skip
        found.append(runner.run(feeds))
        cache = {name: found[-1][name.replace("past_key_values", "present")] for name in cache}
    return np.concatenate([call["logits"] for call in found], axis=1), found


def test_decode_equals_transformers_when_everything_is_kept() -> None:
    logits, _ = decode(tensorrt.shared_runner("fp32", False, False), 1.0)
    assert distance(logits, EXPECTED) < FP32


@pytest.mark.parametrize("kept", [0.5, 0.2, 0.0])
def test_decode_equals_the_masked_torch_model(kept: float) -> None:
    logits, found = decode(tensorrt.shared_runner("fp32", False, False), kept)
    reference = MaskedModel(deep.model(), deep.plan(), deep.predictor())
    forced = reference.logits(IDS, MASK, density=Density(kept, kept), masks=masks_of(found[1:]))
    assert distance(logits, forced.logits.numpy()) < FP32
    assert distance(logits, EXPECTED) > 100 * FP32  # masks do matter


def test_prefill_equals_transformers_in_logits_keys_and_values() -> None:
    found = tensorrt.shared_runner("fp32", True, False).run({"input_ids": IDS, "attention_mask": MASK})
    assert np.abs(found["logits"][:, 0] - EXPECTED[:, -1]).max() < FP32
    with torch.no_grad():
        out = deep.model()(input_ids=torch.from_numpy(IDS), attention_mask=torch.from_numpy(MASK), use_cache=True)
    for layer, cached in enumerate(out.past_key_values.layers):
        for kind, expected in (("key", cached.keys), ("value", cached.values)):
            mine_BSHD = found[f"present.{layer}.{kind}"].swapaxes(1, 2)
            assert distance(mine_BSHD, expected.numpy().swapaxes(1, 2)) < 10 * FP32


def test_prefill_is_finite_everywhere_also_at_pads_that_see_nothing() -> None:
    for weights, as_is in (("fp32", False), ("fp16", True), ("int8", True)):
        runner = tensorrt.shared_runner(weights, True, as_is)
        found = runner.run({"input_ids": IDS, "attention_mask": MASK})
        assert all(np.isfinite(value).all() for value in found.values())


@pytest.mark.parametrize("weights", ["fp16", "bf16", "int8"])
@pytest.mark.parametrize("prefill", [False, True])
def test_narrow_weights_stay_within_their_rounding(weights: str, prefill: bool) -> None:
    assert_within(tensorrt.shared_runner(weights, prefill, False), prefill, NARROW[weights])


@pytest.mark.parametrize("weights", ["fp16", "int8"])
@pytest.mark.parametrize("prefill", [False, True])
def test_graph_as_it_is_stays_within_the_rounding_of_its_activations(weights: str, prefill: bool) -> None:
    """ONNX Runtime rounds at every node's border as TensorRT does; it has no bfloat16 on the CPU."""
    assert_within(tensorrt.shared_runner(weights, prefill, True), prefill, NARROW[weights], "float16")


def assert_within(runner, prefill: bool, tolerance: float, dtype: str = "float32") -> None:
    if prefill:
        logits = runner.run({"input_ids": IDS, "attention_mask": MASK})["logits"]
        assert logits.dtype == np.float32
        assert FP32 < np.abs(logits[:, 0] - EXPECTED[:, -1]).max() < tolerance
    else:
        assert FP32 < distance(decode(runner, 1.0, dtype)[0], EXPECTED) < tolerance


def test_prefill_and_decode_agree_about_the_cache() -> None:
    """What prefill writes, decode can go on from."""
    weights = "int8"
    prefill = tensorrt.shared_runner(weights, True, False).run({"input_ids": IDS, "attention_mask": MASK})
    _, found = decode(tensorrt.shared_runner(weights, False, False), 1.0, calls=((0, 10),))
    for name in (name for name in prefill if name.startswith("present.")):
        mine, other = prefill[name].swapaxes(1, 2)[LIVE], found[0][name].swapaxes(1, 2)[:, :10][LIVE]
        assert np.abs(mine - other).max() < 10 * FP32, name


def _swap(program: Program, name: str, other: str) -> None:
    recipe = program.weights[name]
    program.weights[name] = dataclasses.replace(recipe, part=program.weights[other].part)
    program.weights[other] = dataclasses.replace(program.weights[other], part=recipe.part)


def _w1_and_w2t_swapped(program: Program) -> None:
    _swap(program, "layers.5.ffn.w1", "layers.5.ffn.w2t")


def _query_and_key_swapped(program: Program) -> None:
    _swap(program, "layers.10.attention.wq", "layers.10.attention.wk")


def _matrix_of_another_layer(program: Program) -> None:
    source = program.weights["layers.1.ffn.w1"]
    program.weights["layers.10.ffn.w1"] = dataclasses.replace(source)


def _positions_off_by_one(program: Program) -> None:
    node = next(node for node in program.graph.nodes if node.name == "positions")
    node.inputs[1] = gs.Constant("three", np.asarray(node.inputs[1].values + 1))


def _neurons_in_another_order(program: Program) -> None:
    program.weights["layers.5.ffn.w1"] = dataclasses.replace(program.weights["layers.5.ffn.w1"], order="")


@pytest.mark.parametrize(
    "defect",
    [_w1_and_w2t_swapped, _query_and_key_swapped, _matrix_of_another_layer, _positions_off_by_one,
     _neurons_in_another_order],
    ids=lambda defect: defect.__name__.strip("_"),
)  # fmt: skip
@pytest.mark.parametrize("prefill", [False, True])
def test_planted_defect_moves_the_logits_far_beyond_the_tolerance(
    defect: Callable[[Program], None], prefill: bool
) -> None:
    program = tensorrt.compiled(deep.plan(), weights="fp32", prefill=prefill)
    defect(program)
    runner = tensorrt.runner(program)
    if prefill:
        found = runner.run({"input_ids": IDS, "attention_mask": MASK})["logits"][:, 0]
        assert np.abs(found - EXPECTED[:, -1]).max() > 100 * FP32
    else:
        assert distance(decode(runner, 1.0)[0], EXPECTED) > 100 * FP32
