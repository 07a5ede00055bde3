# SPDX-License-Identifier: Apache-2.0
"""The form of opt-350m through all passes of both kinds of targets: norms behind the blocks, projected embeddings.

Letters: B batch, S new tokens.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from shadowc.sparsity.reference import MaskedModel
from shadowc.spec.density import Density
from shadowc.spec.program import Program
from tests.passes import tensorrt
from tests.passes.test_numbers import FP32, STEPS, assert_same_selection, decode, distance, masks_of
from tests.trace import deep

FACTS = deep.NORMS_LAST
PLANS = {"shadow": deep.plan(), "dejavu": deep.plan(style="dejavu", scope="local")}
IDS, MASK = deep.padded_batch()
INT8, FLOAT16 = 0.2, 0.01
"""Logits of size 2.6 with weights of 8 bits, and with activations of 16."""


@cache
def source(style: str = "shadow") -> deep.Tensors:
    return deep.Tensors(style=style, facts=FACTS)


@cache
def expected() -> np.ndarray:
    return deep.torch_logits(IDS, MASK, FACTS)


def decoder(program: Program, style: str = "shadow") -> deep.Decoder:
    return deep.Decoder(deep.filled(program, source(style)), batch=2)


def names(values) -> list[str]:
    return [value.name for value in values]


def test_the_trace_and_its_canonical_form_compute_what_transformers_computes() -> None:
    for program in (deep.traced(facts=FACTS), deep.compiled(until="canonicalise", facts=FACTS)):
        growing = deep.Decoder(deep.filled(program, source()), batch=2, capacity=0)
        logits = [growing(IDS[:, start:end], MASK[:, :end])["logits"] for start, end in STEPS]
        assert distance(np.concatenate(logits, axis=1), expected()) < FP32


@pytest.mark.parametrize("style", PLANS)
def test_everything_kept_is_transformers_and_masks_are_those_of_the_masked_torch_model(style: str) -> None:
    plan = PLANS[style]
    runner = decoder(deep.compiled(plan, facts=FACTS), style)
    logits, _ = decode(runner, **deep.dials(1.0))
    assert distance(logits, expected()) < FP32
    reference = MaskedModel(deep.model(FACTS), plan, deep.predictor(style=style, facts=FACTS))
    logits, found = decode(runner, **deep.dials(0.5, 0.2))
    forced = reference.logits(IDS, MASK, density=Density(0.5, 0.2), masks=masks_of(found))
    assert distance(logits, forced.logits.numpy()) < FP32
    assert_same_selection(found, reference.logits(IDS, MASK, density=Density(0.5, 0.2), masked_from=7))
    assert distance(logits, expected()) > 100 * FP32  # masks do matter


def test_blocks_read_the_residual_and_norms_make_it() -> None:
    program = deep.compiled(deep.plan(), facts=FACTS)
    nodes = {node.name: node for node in program.graph.nodes}
    for layer in range(FACTS.layers):
        attention, ffn = nodes[f"layers.{layer}.attention"], nodes[f"layers.{layer}.ffn"]
        assert attention.inputs[0].name == f"residual.{layer}"
        assert ffn.inputs[0].name == f"layers.{layer}.middle"
        assert nodes[f"layers.{layer}.middle"].op == nodes[f"residual.{layer + 1}"].op == "LayerNormalization"
        assert set(names(nodes[f"layers.{layer}.attention.sum"].inputs)) == {
            f"residual.{layer}", f"layers.{layer}.attention.y"
        }  # fmt: skip
        assert set(names(nodes[f"layers.{layer}.ffn.sum"].inputs)) == {
            f"layers.{layer}.middle",
            f"layers.{layer}.ffn.y",
        }
    assert "model.decoder.project_in.y" in names(nodes["residual.0"].inputs)
    (out,) = [node for node in program.graph.nodes if "project_out" in names(node.inputs)]
    assert out.inputs[0].name == f"residual.{FACTS.layers}"
    assert sum(node.op == "LayerNormalization" for node in program.graph.nodes) == 2 * FACTS.layers


def test_style_dejavu_reads_the_residual() -> None:
    program = deep.compiled(PLANS["dejavu"], facts=FACTS)
    reads = next(node for node in program.graph.nodes if node.name == "predictor.heads.2")
    assert reads.inputs[0].name == "residual.2"


def test_projections_stay_float32_when_all_other_products_become_int8() -> None:
    program = deep.compiled(deep.plan(), weights="int8", facts=FACTS)
    assert (program.weights["project_in"].shape, program.weights["project_in"].dtype) == ((32, 64), "float32")
    assert (program.weights["project_out"].shape, program.weights["project_out"].dtype) == ((64, 32), "float32")
    assert sorted(node.op for node in program.graph.nodes if node.op.startswith("MatMul")) == [
        "MatMul", "MatMul", "MatMulRows", "MatMulRows", "MatMulRows", "MatMulRows", "MatMulRows"
    ]  # fmt: skip
    logits, _ = decode(decoder(program), **deep.dials(1.0))
    assert FP32 < distance(logits, expected()) < INT8


@pytest.mark.parametrize(("weights", "tolerance"), [("fp32", FP32), ("fp16", FLOAT16), ("int8", INT8)])
def test_prefill_for_tensorrt_computes_the_last_logits(weights: str, tolerance: float) -> None:
    program = tensorrt.compiled(deep.plan(), weights=weights, prefill=True, facts=FACTS)
    runner = tensorrt.runner(program, source=source(), as_is=weights != "fp32")
    found = runner.run({"input_ids": IDS, "attention_mask": MASK})["logits"]
    assert found.shape == (2, 1, FACTS.vocab)
    assert np.abs(found[:, 0] - expected()[:, -1]).max() < tolerance


@pytest.mark.parametrize(("weights", "tolerance"), [("fp32", FP32), ("fp16", FLOAT16)])
def test_decode_for_tensorrt_equals_transformers_when_everything_is_kept(weights: str, tolerance: float) -> None:
    program = tensorrt.compiled(deep.plan(), weights=weights, facts=FACTS)
    runner = tensorrt.runner(program, source=source(), as_is=weights != "fp32")
    dtype = "float32" if weights == "fp32" else "float16"
    cache_ = {
        f"past_key_values.{layer}.{kind}": np.zeros((2, FACTS.heads, 16, FACTS.head_size), dtype)
        for layer in range(FACTS.layers)
        for kind in ("key", "value")
    }
    ones = np.ones(2, np.float32)
    found = runner.run(
        {"input_ids": IDS, "past": np.zeros(2, np.int64), "start": (1 - MASK).sum(1), **cache_,
         "density_heads": ones, "density_neurons": ones}
    )  # fmt: skip
    assert distance(found["logits"], expected()) < tolerance
