# SPDX-License-Identifier: Apache-2.0
"""One operator for each layer's network and selection: the same numbers, a fraction of the nodes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from shadowc.passes import fuse_predictor
from shadowc.sparsity.shares import even_shares
from shadowc.spec import ops
from shadowc.spec.errors import InternalError
from shadowc.spec.program import Program, SparsityPlan
from shadowc.spec.unfold import unfold_norms, unfold_products
from shadowc.trace.program_io import to_model
from tests.passes.test_numbers import decode
from tests.trace import deep

N = deep.FACTS.layers
SHARES = (even_shares(N - 1), even_shares(N - 1))
PLANS = {
    "dejavu": deep.plan(scope="local", style="dejavu", exempt=(0, 9), min_active_heads=1, min_active_neurons=2),
    "shadow+": deep.plan(
        scope="local", style="shadow+", shares=SHARES, width_heads=min(deep.FACTS.heads, 32), exempt=(3,)
    ),
    "dejavu, thresholds": deep.plan(scope="local", style="dejavu", select="calibrated", thresholds=SHARES, exempt=(2,)),
}
BEFORE, AFTER = "cluster_neurons", "fuse_predictor"


def tensors(plan: SparsityPlan) -> deep.Tensors:
    made = deep.Tensors(style=plan.style)
    for kind, table in zip(("heads", "neurons"), SHARES, strict=True):
        made.values |= {f"predictor.shares.{kind}": table, f"predictor.threshold.local.{kind}": table}
    return made


def outcome(plan: SparsityPlan, until: str, density: float) -> list[dict[str, np.ndarray]]:
    program = deep.compiled(plan, until=until)
    _, found = decode(deep.Decoder(deep.filled(program, tensors(plan)), batch=2), **deep.dials(density))
    return found


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("density", [0.0, 0.4, 1.0])
def test_scores_and_selections_stay_what_they_were(name: str, density: float) -> None:
    before, after = (outcome(PLANS[name], until, density) for until in (BEFORE, AFTER))
    for mine, other in zip(after, before, strict=True):
        for tensor in sorted(mine):
            np.testing.assert_allclose(mine[tensor], other[tensor], rtol=0, atol=2e-5, err_msg=tensor)


@pytest.mark.parametrize("name", PLANS)
def test_a_layer_has_one_operator_of_each_kind_and_no_product_or_selection_beside(name: str) -> None:
    program = deep.compiled(PLANS[name])
    made = [node.name for node in program.graph.nodes if node.op == ops.PREDICT_UNITS.name]
    assert sorted(made) == sorted(f"predictor.{kind}.{layer}" for kind in ("heads", "neurons") for layer in range(1, N))
    of_layers = [
        node.name for node in program.graph.nodes if node.name.startswith(("predictor.", "scores.", "active."))
    ]
    assert len(of_layers) == len(made) + 4  # scores and counts of all layers, two each


def test_the_attributes_are_those_of_the_plan() -> None:
    program = deep.compiled(PLANS["dejavu"])
    attributes = {node.name: node.attrs for node in program.graph.nodes if node.op == ops.PREDICT_UNITS.name}
    assert {name for name, found in attributes.items() if found["exempt"]} == {
        f"predictor.{kind}.{layer}" for kind in ("heads", "neurons") for layer in (1, 10)
    }
    assert {found["min_active"] for name, found in attributes.items() if "heads" in name} == {1}
    assert {found["min_active"] for name, found in attributes.items() if "neurons" in name} == {2}
    assert {found["relu"] for found in attributes.values()} == {1}
    assert {found["relu"] for found in _attributes("shadow+")} == {0}
    assert {found["select"] for found in _attributes("dejavu, thresholds")} == {"threshold"}


def _attributes(name: str) -> list[dict[str, object]]:
    return [node.attrs for node in deep.compiled(PLANS[name]).graph.nodes if node.op == ops.PREDICT_UNITS.name]


def test_style_shadow_stays_as_it_is() -> None:
    program = deep.compiled(deep.plan(), until=BEFORE)
    before = to_model(program).SerializeToString(deterministic=True)
    assert fuse_predictor.apply(program).counts == {"operators": 0}
    assert to_model(program).SerializeToString(deterministic=True) == before


def test_narrow_products_are_refused() -> None:
    program = deep.compiled(PLANS["dejavu"], until=BEFORE)
    name = "predictor.heads.3.fc1.weight"
    program.weights[name] = replace(program.weights[name], quantised=True)
    with pytest.raises(InternalError, match="quantise has to run behind it"):
        fuse_predictor.apply(program)


@pytest.mark.parametrize("name", PLANS)
def test_unfolded_again_only_operators_of_every_target_are_left(name: str) -> None:
    graph = to_model(deep.compiled(PLANS[name])).graph
    outputs = [output for node in graph.node for output in node.output if output.startswith(("scores.", "threshold."))]
    unfold_norms(graph)
    unfold_products(graph)
    assert {node.op_type for node in graph.node if node.domain == ops.DOMAIN} <= {spec.name for spec in ops.OPS}
    assert [o for node in graph.node for o in node.output if o in set(outputs)] == outputs


def _bias_of_the_neighbour(program: Program) -> None:
    nodes = {node.name: node for node in program.graph.nodes}
    nodes["predictor.heads.4"].inputs[8] = nodes["predictor.heads.5"].inputs[8]


def _no_norm(program: Program) -> None:
    (node,) = [node for node in program.graph.nodes if node.name == "predictor.heads.4"]
    node.inputs.pop()
    node.inputs.pop()


@pytest.mark.parametrize("defect", [_bias_of_the_neighbour, _no_norm], ids=lambda one: one.__name__.strip("_"))
def test_a_planted_defect_moves_the_scores(defect) -> None:
    plan = PLANS["dejavu"]
    program = deep.compiled(plan)
    defect(program)
    made = tensors(plan)
    rng = np.random.default_rng(0)
    for name in made.names():
        if name.startswith("predictor.") and name.endswith("fc2.bias"):
            made.values[name] = rng.standard_normal(made.tensor(name).shape, dtype=np.float32)
    sound = deep.compiled(plan)
    found = [
        decode(deep.Decoder(deep.filled(one, made), batch=2), **deep.dials(1.0))[1][-1]["scores.heads"]
        for one in (program, sound)
    ]
    assert np.abs(found[0][:, :, 3] - found[1][:, :, 3]).max() > 100 * 2e-5  # what the sound one may differ by
