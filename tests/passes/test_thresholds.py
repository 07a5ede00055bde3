# SPDX-License-Identifier: Apache-2.0
"""Calibrated thresholds in the graph: standard operators in place of a ranking, the units that torch chooses.

Letters: B batch, L predicted layers, N units of a kind.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from shadowc.emit.cpu import bytes_per_token
from shadowc.sparsity import thresholds
from shadowc.sparsity.reference import MaskedModel
from shadowc.spec.density import Density
from shadowc.spec.options import Style
from shadowc.spec.program import GRID, Program, SparsityPlan
from shadowc.trace.program_io import to_model
from tests.passes.test_numbers import FP32, IDS, MASK, assert_same_selection, decode, distance, masks_of
from tests.trace import deep

L = deep.FACTS.predicted_layers
STYLES: tuple[Style, ...] = ("shadow", "dejavu", "shadow+")


@cache
def tables(style: Style) -> dict[str, thresholds.Tables]:
    """Calibrated on the scores that the padded batch gets when it is dense."""
    exact = SparsityPlan(0, 0, deep.BLOCK, "local", style=style)
    dense = MaskedModel(deep.model(), exact, deep.predictor(style=style)).logits(
        IDS, MASK, density=Density(), masked_from=0
    )
    heads, neurons = (
        thresholds.calibrate(scores.flatten(0, 1).numpy(), np.abs(scores.flatten(0, 1).numpy()))
        for scores in (dense.scores_heads, dense.scores_neurons)
    )
    return {budget: (heads[budget], neurons[budget]) for budget in thresholds.BUDGETS}


def plan(style: Style = "shadow", budget: str = "global", **changes: object) -> SparsityPlan:
    select = "sensitivity" if budget == "sensitivity" else "calibrated"
    scope = "global" if budget == "global" else "local"
    widths = {"width_heads": min(deep.FACTS.heads, 32)} if style == "shadow+" else {}
    found = tables(style)[budget]
    return deep.plan(scope=scope, style=style, select=select, thresholds=found, **widths, **changes)


@cache
def source(style: Style) -> deep.Tensors:
    made = deep.Tensors(style=style)
    made.values |= {f"predictor.{name}": table for name, table in thresholds.named(tables(style)).items()}
    return made


def runnable(program: Program, style: Style) -> deep.Decoder:
    return deep.Decoder(deep.filled(program, source(style)), batch=2)


def reference(sparsity: SparsityPlan) -> MaskedModel:
    return MaskedModel(deep.model(), sparsity, deep.predictor(style=sparsity.style))


@pytest.mark.parametrize("kept", [(0.5, 0.5), (0.2, 0.123), (0.0, 0.0)])
@pytest.mark.parametrize(
    "sparsity",
    [plan(), plan(budget="sensitivity", exempt=(0, 9)), plan("dejavu"), plan("shadow+", "local", exempt=(3,))],
    ids=["shadow", "sensitivity, exempt", "dejavu, global", "shadow+, local, exempt"],
)
def test_sparse_steps_equal_the_masked_torch_model(sparsity: SparsityPlan, kept: tuple[float, float]) -> None:
    masked = reference(sparsity)
    logits, found = decode(runnable(deep.compiled(sparsity), sparsity.style), **deep.dials(*kept))
    forced = masked.logits(IDS, MASK, density=Density(*kept), masks=masks_of(found))
    assert distance(logits, forced.logits.numpy()) < FP32
    assert_same_selection(found, masked.logits(IDS, MASK, density=Density(*kept), masked_from=7))
    assert distance(logits, deep.torch_logits(IDS, MASK)) > 100 * FP32  # masks do matter


def test_tokens_of_one_text_keep_different_numbers_of_units() -> None:
    _, found = decode(runnable(deep.compiled(plan()), "shadow"), ((0, 10),), **deep.dials(0.5, tail=9))
    totals_BZ = found[0]["active.neurons"].sum(-1)
    assert len(set(totals_BZ.ravel().tolist())) > 5


@pytest.mark.parametrize("style", STYLES)
def test_graph_equals_transformers_when_everything_is_kept(style: Style) -> None:
    logits, _ = decode(runnable(deep.compiled(plan(style)), style), **deep.dials(1.0))
    assert distance(logits, deep.torch_logits(IDS, MASK)) < FP32


@pytest.mark.parametrize("density", [0.0, 0.0024, 0.0026, 0.5, 1.0, 7.0, -3.0, float("nan")])
def test_a_density_takes_the_nearest_row_of_the_table(density: float) -> None:
    _, found = decode(runnable(deep.compiled(plan(budget="local")), "shadow"), **deep.dials(1.0, density))
    row = GRID if not density < 1 else round(max(density, 0.0) * GRID)
    np.testing.assert_array_equal(found[-1]["threshold.neurons"][0, 0], tables("shadow")["local"][1][row])


def test_each_row_has_its_own_density() -> None:
    _, found = decode(runnable(deep.compiled(plan(budget="local")), "shadow"), **deep.dials([0.0, 1.0]))
    active_BL = found[-1]["active.heads"][:, 0]
    assert (active_BL[0] == 0).all()
    assert (active_BL[1] == deep.FACTS.heads).all()


@pytest.mark.parametrize("style", STYLES)
def test_nothing_is_ranked_and_a_token_reads_a_row_of_each_table(style: Style) -> None:
    program = deep.compiled(plan(style))
    assert not [node.name for node in program.graph.nodes if node.op in ("SelectThreshold", "TopK")]
    told = bytes_per_token(to_model(program), program.weights)
    ranked = deep.compiled(deep.plan(style=style, scope="local" if style != "shadow" else "global", **(
        {"width_heads": min(deep.FACTS.heads, 32)} if style == "shadow+" else {}
    )))  # fmt: skip
    beside = bytes_per_token(to_model(ranked), ranked.weights)
    assert told.predictor == beside.predictor
    rows = 2 * 4 * L
    assert told.other - beside.other == (0 if style == "shadow+" else rows)  # that style reads shares otherwise


def test_interface_is_that_of_a_graph_that_ranks() -> None:
    found = []
    for sparsity in (plan(), deep.plan()):
        program = deep.compiled(sparsity, weights="int8")
        values = (*program.graph.inputs, *program.graph.outputs)
        found.append([(v.name, v.dtype, tuple(v.shape)) for v in values if v.name not in program.weights])
    assert found[0] == found[1]


def _column_of_the_neighbour(program: Program) -> None:
    (node,) = [node for node in program.graph.nodes if node.name == "predictor.neurons.4"]
    node.attrs["column"] += 1


def _table_of_the_other_kind(program: Program) -> None:
    tensors = program.graph.tensors()
    for kind, other in (("heads", "neurons"), ("neurons", "heads")):
        (node,) = [node for node in program.graph.nodes if node.name == f"limits.{kind}.of_layers"]
        node.inputs[0] = tensors[f"limits.{other}"]


@pytest.mark.parametrize("defect", [_column_of_the_neighbour, _table_of_the_other_kind], ids=lambda one: one.__name__)
def test_planted_defect_chooses_other_units(defect) -> None:
    sparsity = plan("dejavu", "local")
    program = deep.compiled(sparsity)
    defect(program)
    _, found = decode(runnable(program, "dejavu"), **deep.dials(0.5))
    with pytest.raises(AssertionError):
        assert_same_selection(found, reference(sparsity).logits(IDS, MASK, density=Density(0.5, 0.5), masked_from=7))
