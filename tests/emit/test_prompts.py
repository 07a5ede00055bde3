# SPDX-License-Identifier: Apache-2.0
"""Prompts in a stored graph, whatever program runs it: it may round, and computes the logits that are asked for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from shadowc.emit.cpu import emit_cpu
from shadowc.emit.prompts import FINELY, FREELY, FREELY_IN_PROMPTS, give_prompts_few_digits
from shadowc.passes import fix_mask
from shadowc.spec.manifest import FIXED_FILE, MODEL_FILE, REFERENCE_FILE
from shadowc.spec.ops import DOMAIN, FEW_DIGITS
from shadowc.spec.tensors import LOGITS_FROM
from tests.emit import engines, handmade

if TYPE_CHECKING:
    from transformers import OPTForCausalLM


def graphs(model: OPTForCausalLM, folder: Path, *, exact: bool) -> dict[str, onnx.ModelProto]:
    """Those of an engine with a mask per sequence."""
    program, fixed = (handmade.build(engines.tiny_facts(), weights="int8") for _ in range(2))
    fix_mask.apply(fixed)
    emit_cpu(program, engines.tensors(model), folder, fixed=fixed, exact_prompts=exact)
    return {path.name: onnx.load(path, load_external_data=False) for path in folder.glob("*.onnx")}


def rounding(graph: onnx.ModelProto) -> list[str]:
    return [node.name for node in graph.graph.node if any(one.name == FEW_DIGITS for one in node.attribute)]


def test_prompts_are_rounded_in_all_graphs_but_the_reference_and_where_masks_come_from(
    tiny_model: OPTForCausalLM, tmp_path: Path
) -> None:
    found = graphs(tiny_model, tmp_path, exact=False)
    for name in (MODEL_FILE, FIXED_FILE):
        sparse = [node.name for node in found[name].graph.node if node.op_type in ("SparseAttention", "SparseFFN")]
        assert sparse[0] == "layers.0.attention"
        assert rounding(found[name]) == sparse[1:]
    assert rounding(found[REFERENCE_FILE]) == []


def own_masks(layers: int, weights: type[np.generic]) -> onnx.ModelProto:
    """Sparse operators of a model each of whose layers makes its masks; nothing else of it."""
    make = onnx.helper.make_node
    nodes = [make("Identity", ["x"], ["scores.neurons.1"])]
    for layer in range(layers):
        for kind, name in (("SparseAttention", "attention"), ("SparseFFN", "ffn")):
            nodes.append(make(kind, ["x", "w"], [f"{layer}.{name}"], name=f"layers.{layer}.{name}", domain=DOMAIN))
    held = numpy_helper.from_array(np.zeros(1, weights), "w")
    return onnx.helper.make_model(onnx.helper.make_graph(nodes, "own", [], [], [held]))


@pytest.mark.parametrize(
    ("weights", "ffn", "attention"),
    [(np.int8, 9, 15), (np.float32, 9, 15), (np.uint8, 12, 18)],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_where_every_layer_makes_masks_the_first_round_finely_and_ffns_freely_before_attention(
    weights: type[np.generic], ffn: int, attention: int
) -> None:
    """Later layers decide fewer masks; int4 (stored as uint8) rounds weights beside activations."""
    model = own_masks(24, weights)
    give_prompts_few_digits(model)
    found = {node.name: node.attribute[0].i for node in model.graph.node if node.domain == DOMAIN}
    freely = FREELY_IN_PROMPTS if weights is np.uint8 else FREELY  # masks would follow the tokens of int4
    for layer in range(24):
        assert found[f"layers.{layer}.ffn"] == (freely if layer >= ffn else FINELY)
        assert found[f"layers.{layer}.attention"] == (freely if layer >= attention else FINELY)


@pytest.mark.parametrize("layers", [2, 3, 8])
def test_the_first_layer_rounds_finely_and_the_last_ffn_freely_in_models_of_any_depth(layers: int) -> None:
    model = own_masks(layers, np.int8)
    give_prompts_few_digits(model)
    found = [node.attribute[0].i for node in model.graph.node if node.domain == DOMAIN]
    assert found[:2] == [FINELY, FINELY]
    assert found[-1] == FREELY


def test_an_only_layer_rounds_finely() -> None:
    model = own_masks(1, np.int8)
    give_prompts_few_digits(model)
    assert [node.attribute[0].i for node in model.graph.node if node.domain == DOMAIN] == [FINELY, FINELY]


def test_no_prompt_is_rounded_where_exact_ones_were_asked_for(tiny_model: OPTForCausalLM, tmp_path: Path) -> None:
    assert [rounding(graph) for graph in graphs(tiny_model, tmp_path, exact=True).values()] == [[], [], []]


@pytest.mark.parametrize("exact", [True, False])
def test_logits_start_at_the_first_token_unless_a_host_asks_for_fewer(
    tiny_model: OPTForCausalLM, tmp_path: Path, exact: bool
) -> None:
    for graph in graphs(tiny_model, tmp_path, exact=exact).values():
        defaults = {tensor.name: tensor for tensor in graph.graph.initializer}
        assert LOGITS_FROM in {value.name for value in graph.graph.input}
        np.testing.assert_array_equal(numpy_helper.to_array(defaults[LOGITS_FROM]), [0])
