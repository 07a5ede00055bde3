# SPDX-License-Identifier: Apache-2.0
"""Style shadow+: neurons are scored by what their own FFN reads, and every layer keeps its share of one budget."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from shadowc.sparsity.reference import MaskedModel
from shadowc.sparsity.shares import even_shares
from shadowc.spec.density import Density
from shadowc.spec.errors import InternalError
from shadowc.spec.program import GRID, Program, SparsityPlan
from tests.passes.test_numbers import FP32, IDS, MASK, assert_same_selection, decode, distance, masks_of
from tests.trace import deep

N = deep.FACTS.layers


def uneven(seed: int) -> np.ndarray:
    """A table whose layers differ, from 0 to 1."""
    powers_L = np.random.default_rng(seed).uniform(0.5, 2.0, N - 1)
    return (even_shares(N - 1) ** powers_L).astype(np.float32)


SHARES = (uneven(1), uneven(2))
PLAN = deep.plan(scope="local", style="shadow+", shares=SHARES, width_heads=min(deep.FACTS.heads, 32))
LEAST = deep.plan(
    scope="local",
    style="shadow+",
    shares=SHARES,
    width_heads=min(deep.FACTS.heads, 32),
    exempt=(0, 9),
    min_active_heads=1,
    min_active_neurons=2,
)
PREDICTOR = deep.predictor(style="shadow+")
HALF = Density(0.5, 0.5)


def tensors() -> deep.Tensors:
    made = deep.Tensors(style="shadow+")
    made.values |= {f"predictor.shares.{kind}": table for kind, table in zip(("heads", "neurons"), SHARES, strict=True)}
    return made


@cache
def sound(plan: SparsityPlan) -> deep.Decoder:
    return deep.Decoder(deep.filled(deep.compiled(plan), tensors()), batch=2)


def node(program: Program, name: str):
    return next(node for node in program.graph.nodes if node.name == name)


def operators_behind(program: Program, tensor: str) -> set[str]:
    """Sparse operators that a tensor depends on."""
    found, open_ = set(), list(program.graph.tensors()[tensor].inputs)
    while open_:
        maker = open_.pop()
        if maker.name not in found:
            found.add(maker.name)
            open_ += [source for value in maker.inputs for source in value.inputs]
    return found & {f"layers.{at}.{part}" for at in range(N) for part in ("attention", "ffn")}


def test_neurons_know_the_attention_of_their_layer_and_heads_do_not() -> None:
    program = deep.compiled(PLAN)
    for layer in range(1, N):
        earlier = {f"layers.{at}.{part}" for at in range(layer) for part in ("attention", "ffn")}
        assert operators_behind(program, f"scores.heads.{layer}") == earlier
        assert operators_behind(program, f"scores.neurons.{layer}") == earlier | {f"layers.{layer}.attention"}


def test_neuron_predictor_and_ffn_read_the_same_tensor() -> None:
    program = deep.compiled(PLAN)
    for layer in range(1, N):
        assert node(program, f"predictor.neurons.{layer}").inputs[0] is node(program, f"layers.{layer}.ffn").inputs[0]


def test_networks_have_no_relu() -> None:
    program = deep.compiled(PLAN, until="insert_predictor")
    assert not [node.name for node in program.graph.nodes if node.op == "Relu" and node.name.startswith("predictor.")]


def test_interface_is_the_same_as_of_style_shadow() -> None:
    found = []
    for plan in (PLAN, deep.plan()):
        program = deep.compiled(plan, weights="int8")
        values = (*program.graph.inputs, *program.graph.outputs)
        found.append([(v.name, v.dtype, tuple(v.shape)) for v in values if v.name not in program.weights])
    assert found[0] == found[1]


def test_graph_equals_transformers_when_everything_is_kept() -> None:
    logits, _ = decode(sound(PLAN), **deep.dials(1.0))
    assert distance(logits, deep.torch_logits(IDS, MASK)) < FP32


@pytest.mark.parametrize("kept", [(0.5, 0.5), (0.2, 0.2), (0.5, 0.123), (0.0, 0.0)])
@pytest.mark.parametrize("plan", [PLAN, LEAST], ids=["plain", "exempt and least"])
def test_sparse_steps_equal_the_masked_torch_model(plan: SparsityPlan, kept: tuple[float, float]) -> None:
    reference = MaskedModel(deep.model(), plan, PREDICTOR)
    logits, found = decode(sound(plan), **deep.dials(*kept))
    forced = reference.logits(IDS, MASK, density=Density(*kept), masks=masks_of(found))
    assert distance(logits, forced.logits.numpy()) < FP32
    assert_same_selection(found, reference.logits(IDS, MASK, density=Density(*kept), masked_from=7))
    assert distance(logits, deep.torch_logits(IDS, MASK)) > 100 * FP32  # masks do matter


@pytest.mark.parametrize("density", [0.0, 0.0024, 0.0026, 0.5, 1.0, 7.0, -3.0, float("nan")])
def test_every_layer_keeps_its_row_of_the_table(density: float) -> None:
    _, found = decode(sound(PLAN), **deep.dials(1.0, density))
    row = GRID if not density < 1 else round(max(density, 0.0) * GRID)
    units = -(-deep.FACTS.ffn // deep.BLOCK)
    wanted = np.floor(SHARES[1][row].astype(np.float64) * units + 0.5)
    np.testing.assert_array_equal(found[-1]["active.neurons"][0, 0], wanted)


def test_a_ranking_over_all_layers_is_not_inserted() -> None:
    with pytest.raises(InternalError, match=r"style shadow\+ ranks each layer by itself, the plan's scope is global"):
        deep.compiled(deep.plan(style="shadow+"))


def test_a_neuron_predictor_that_reads_what_attention_reads_would_be_found() -> None:
    """Planted defect: the input of the other kind, which has the same shape."""
    program = deep.compiled(PLAN)
    mine, other = (node(program, f"predictor.{kind}.3") for kind in ("neurons", "heads"))
    for operand in (0, -2, -1):  # and its norm
        mine.inputs[operand] = other.inputs[operand]
    _, found = decode(deep.Decoder(deep.filled(program, tensors()), batch=2), **deep.dials(0.5))
    with pytest.raises(AssertionError):
        assert_same_selection(
            found, MaskedModel(deep.model(), PLAN, PREDICTOR).logits(IDS, MASK, density=HALF, masked_from=7)
        )


def test_a_layer_with_the_share_of_another_would_be_found() -> None:
    """Planted defect: one layer takes its neighbour's column of the table."""
    program = deep.compiled(PLAN)
    assert node(program, "predictor.neurons.4").attrs["column"] == 3
    node(program, "predictor.neurons.4").attrs["column"] = 4
    _, found = decode(deep.Decoder(deep.filled(program, tensors()), batch=2), **deep.dials(0.5))
    with pytest.raises(AssertionError):
        assert_same_selection(
            found, MaskedModel(deep.model(), PLAN, PREDICTOR).logits(IDS, MASK, density=HALF, masked_from=7)
        )
