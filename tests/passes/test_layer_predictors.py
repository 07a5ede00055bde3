# SPDX-License-Identifier: Apache-2.0
"""Style dejavu: every layer asks its own predictor, which sees nothing of that layer or a later one.

Letters: B batch, S new tokens, Z masked tokens, L predicted layers, N units of a kind.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest

from shadowc.pipeline import schedule
from shadowc.sparsity.reference import MaskedModel
from shadowc.spec.density import Density
from shadowc.spec.errors import InternalError
from shadowc.spec.program import Program, SparsityPlan
from shadowc.trace.program_io import to_model
from tests.passes.test_numbers import FP32, IDS, MASK, STEPS, assert_same_selection, decode, distance, masks_of
from tests.trace import deep

PLAN = deep.plan(scope="local", style="dejavu")
UNEVEN = deep.plan(scope="local", style="dejavu", exempt=(0, 9), min_active_heads=1, min_active_neurons=2)
PREDICTOR = deep.predictor(style="dejavu")
HALF = Density(0.5, 0.5)
N = deep.FACTS.layers


def runnable(program: Program) -> deep.Decoder:
    return deep.Decoder(deep.filled(program, deep.Tensors(style="dejavu")), batch=2)


@cache
def sound(plan: SparsityPlan) -> deep.Decoder:
    return runnable(deep.compiled(plan))


def node(program: Program, name: str):
    return next(node for node in program.graph.nodes if node.name == name)


def ancestors(program: Program, tensor: str) -> set[str]:
    """Names of all nodes that a tensor depends on."""
    found, open_ = set(), list(program.graph.tensors()[tensor].inputs)
    while open_:
        maker = open_.pop()
        if maker.name not in found:
            found.add(maker.name)
            open_ += [source for value in maker.inputs for source in value.inputs]
    return found


def interface(program: Program) -> list[tuple[str, object, tuple[object, ...]]]:
    """Names, types and shapes of what is no weight."""
    values = (*program.graph.inputs, *program.graph.outputs)
    return [(value.name, value.dtype, tuple(value.shape)) for value in values if value.name not in program.weights]


@pytest.mark.parametrize("kind", ["heads", "neurons"])
def test_scores_of_a_layer_depend_on_earlier_layers_and_on_no_later_one(kind: str) -> None:
    program = deep.compiled(PLAN)
    for layer in range(1, N):
        seen = ancestors(program, f"scores.{kind}.{layer}")
        operators = {f"layers.{at}.{part}" for at in range(N) for part in ("attention", "ffn")}
        assert seen & operators == {f"layers.{at}.{part}" for at in range(layer) for part in ("attention", "ffn")}


def test_every_operator_obeys_the_predictor_of_its_own_layer() -> None:
    program = deep.compiled(PLAN)
    for part, kind in (("attention", "heads"), ("ffn", "neurons")):
        for layer in range(1, N):
            operator = node(program, f"layers.{layer}.{part}")
            found = [value.name for value in operator.inputs[1:3]]
            assert found == [f"scores.{kind}.{layer}", f"threshold.{kind}.{layer}"]
            assert operator.attrs["layer"] == 0
            assert node(program, f"predictor.{kind}.{layer}").inputs[0].name == f"residual.{layer}"  # and norms it


def test_predictor_of_a_layer_runs_in_front_of_it_and_not_at_the_end() -> None:
    order = [node.name for node in deep.compiled(PLAN).graph.nodes]
    for layer in range(1, N):
        asked = order.index(f"predictor.heads.{layer}")
        assert order.index(f"layers.{layer - 1}.ffn") < asked < order.index(f"layers.{layer}.attention")


@pytest.mark.parametrize("weights", ["fp32", "int8"])
def test_interface_is_the_same_as_of_style_shadow(weights: str) -> None:
    mine, other = (deep.compiled(plan, weights=weights) for plan in (PLAN, deep.plan()))
    assert interface(mine) == interface(other)


def test_all_products_of_the_predictors_become_8_bit() -> None:
    program = deep.compiled(PLAN, weights="int8")
    kinds = {name: r.kind for name, r in program.weights.items() if name.endswith(("fc1.weight", "fc2.weight"))}
    assert len(kinds) == 4 * (N - 1)
    assert {kind for name, kind in kinds.items() if ".fc1." in name} == {"network_rows"}
    assert {kind for name, kind in kinds.items() if ".fc2." in name} == {"network_quads"}
    assert {program.weights[name].dtype for name in kinds} == {"int8"}


def test_graph_equals_transformers_when_everything_is_kept() -> None:
    logits, _ = decode(sound(PLAN), **deep.dials(1.0))
    assert distance(logits, deep.torch_logits(IDS, MASK)) < FP32


@pytest.mark.parametrize("kept", [(0.5, 0.5), (0.2, 0.2), (0.5, 0.2), (0.0, 0.0)])
@pytest.mark.parametrize("plan", [PLAN, UNEVEN], ids=["plain", "exempt and least"])
def test_sparse_steps_equal_the_masked_torch_model(plan: SparsityPlan, kept: tuple[float, float]) -> None:
    reference = MaskedModel(deep.model(), plan, PREDICTOR)
    logits, found = decode(sound(plan), **deep.dials(*kept))
    forced = reference.logits(IDS, MASK, density=Density(*kept), masks=masks_of(found))
    assert distance(logits, forced.logits.numpy()) < FP32
    assert_same_selection(found, reference.logits(IDS, MASK, density=Density(*kept), masked_from=7))
    assert distance(logits, deep.torch_logits(IDS, MASK)) > 100 * FP32  # masks do matter


@pytest.mark.parametrize(
    ("steps", "tail", "first"), [(((0, 10),), 3, 7), (((0, 6), (6, 10)), 99, 0)], ids=["last three", "all"]
)
def test_teacher_forced_text_is_masked_in_the_sparse_tail(steps, tail: int, first: int) -> None:
    reference = MaskedModel(deep.model(), PLAN, PREDICTOR)
    logits, found = decode(sound(PLAN), steps, **deep.dials(0.5, tail=tail))
    free = reference.logits(IDS, MASK, density=HALF, masked_from=first)
    assert_same_selection(found, free)
    assert distance(logits, free.logits.numpy()) < FP32


def test_masks_of_earlier_layers_reach_the_scores_of_later_ones() -> None:
    """What makes this style different: at another density a later layer is scored by other numbers."""
    scores = [decode(sound(PLAN), **deep.dials(kept))[1][-1]["scores.heads"][:, 0] for kept in (1.0, 0.3)]
    np.testing.assert_allclose(scores[0][:, 0], scores[1][:, 0], atol=1e-4)  # layer 1 follows a dense layer
    assert np.abs(scores[0][:, 5] - scores[1][:, 5]).max() > 0.01


def test_a_ranking_over_all_layers_is_not_inserted() -> None:
    with pytest.raises(InternalError, match="ranks each layer by itself, the plan's scope is global"):
        deep.compiled(deep.plan(style="dejavu"))


def test_passes_change_nothing_when_they_run_again_and_two_runs_give_the_same_bytes() -> None:
    once, again = (to_model(deep.compiled(PLAN, weights="int8")) for _ in range(2))
    assert once.SerializeToString(deterministic=True) == again.SerializeToString(deterministic=True)
    for step in schedule(target="cpu", weights="int8", skip_zeros=False, sparse=True):
        program = deep.compiled(PLAN, weights="int8", until=step.name)
        before = to_model(program).SerializeToString(deterministic=True)
        step.apply(program)
        assert to_model(program).SerializeToString(deterministic=True) == before, step.name


def _scores_of_another_layer(program: Program) -> None:
    for operand in (1, 2):
        node(program, "layers.5.ffn").inputs[operand] = node(program, "layers.4.ffn").inputs[operand]


def _input_of_an_earlier_layer(program: Program) -> None:
    for kind in ("heads", "neurons"):
        mine, earlier = (node(program, f"predictor.{kind}.{layer}") for layer in (5, 4))
        for operand in (0, -2, -1):  # and its norm
            mine.inputs[operand] = earlier.inputs[operand]


def _predictor_of_another_layer(program: Program) -> None:
    import dataclasses

    recipe = program.weights["predictor.heads.5.fc2.weight"]
    other = tuple(name.replace(".5.", ".6.") for name in recipe.sources)
    program.weights["predictor.heads.5.fc2.weight"] = dataclasses.replace(recipe, sources=other)


@pytest.mark.parametrize(
    "defect",
    [_scores_of_another_layer, _input_of_an_earlier_layer, _predictor_of_another_layer],
    ids=lambda defect: defect.__name__.strip("_"),
)
def test_planted_defect_moves_the_logits_far_beyond_the_tolerance(defect: Callable[[Program], None]) -> None:
    program = deep.compiled(PLAN)
    defect(program)
    free = MaskedModel(deep.model(), PLAN, PREDICTOR).logits(IDS, MASK, density=HALF, masked_from=7)
    good, _ = decode(sound(PLAN), STEPS, **deep.dials(0.5))
    bad, _ = decode(runnable(program), STEPS, **deep.dials(0.5))
    assert distance(good, free.logits.numpy()) < FP32
    assert distance(bad, free.logits.numpy()) > 100 * FP32
