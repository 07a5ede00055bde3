# SPDX-License-Identifier: Apache-2.0
"""Norms and residuals go into the operators where nothing else needs them, and nowhere else."""

from __future__ import annotations

import onnx
import onnx_graphsurgeon as gs
import pytest

from shadowc.passes import fold_norms
from shadowc.spec.errors import InternalError
from shadowc.spec.program import Program
from shadowc.spec.unfold import unfold_norms
from shadowc.trace.program_io import to_model
from tests.trace import deep

N = deep.FACTS.layers


def finished() -> Program:
    """A graph as `finalise` leaves it."""
    return deep.compiled(deep.plan(), until="finalise")


def node(program: Program, name: str) -> gs.Node:
    return next(node for node in program.graph.nodes if node.name == name)


def test_every_norm_but_the_last_is_folded_once() -> None:
    program = finished()
    report = fold_norms.apply(program)
    assert report.counts == {"operators": 2 * N, "removed": 4 * N}
    norms = [node.name for node in program.graph.nodes if node.op == "LayerNormalization"]
    assert norms == ["model.decoder.final_layer_norm.y"]
    assert fold_norms.apply(program).counts == {"operators": 0, "removed": 0}


def test_unfolded_again_it_is_the_graph_that_it_was_made_of() -> None:
    before, program = finished(), finished()
    fold_norms.apply(program)
    graph = to_model(program).graph
    unfold_norms(graph)

    def described(node: onnx.NodeProto) -> tuple[object, ...]:
        attributes = sorted((one.name, onnx.helper.get_attribute_value(one)) for one in node.attribute)
        kept = [one for one in attributes if one[0] != "stash_type"]
        return node.op_type, frozenset(node.input), tuple(node.output), str(kept)

    assert {described(node) for node in graph.node} == {described(node) for node in to_model(before).graph.node}


@pytest.mark.parametrize("part", ["attention", "ffn"])
def test_a_norm_that_something_else_reads_stays(part: str) -> None:
    program = finished()
    x = node(program, f"layers.3.{part}").inputs[0]
    program.graph.nodes.append(
        gs.Node("Identity", "watcher", inputs=[x], outputs=[watched := gs.Variable("watched", x.dtype)])
    )
    program.graph.outputs.append(watched)
    assert fold_norms.apply(program).counts["operators"] == 2 * N - 1
    assert node(program, f"layers.3.{part}").inputs[0].name == f"layers.3.{part}.x"


@pytest.mark.parametrize("part", ["attention", "ffn"])
def test_a_sum_with_something_else_than_what_the_norm_reads_stays(part: str) -> None:
    program = finished()
    total = node(program, f"layers.3.{part}").outputs[0].outputs[0]
    total.inputs[[value.name for value in total.inputs].index(f"layers.3.{part}.y") - 1] = program.graph.tensors()[
        "residual.1"
    ]
    assert fold_norms.apply(program).counts["operators"] == 2 * N - 1
    assert node(program, f"layers.3.{part}").outputs[0].name == f"layers.3.{part}.y"


def test_norms_behind_the_blocks_stay() -> None:
    from tests.passes.test_norms_last import FACTS

    program = deep.compiled(None, facts=FACTS)
    assert sum(node.op == "LayerNormalization" for node in program.graph.nodes) == 2 * FACTS.layers
    assert all("epsilon" not in node.attrs for node in program.graph.nodes if node.domain == "shadowc")


def test_half_of_a_norms_operands_is_refused() -> None:
    program = finished()
    fold_norms.apply(program)
    node(program, "layers.2.ffn").inputs.pop()
    with pytest.raises(InternalError, match=r"layers\.2\.ffn has 1 operands of a norm"):
        fold_norms.apply(program)


def test_a_norm_left_in_front_of_an_operator_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    fold = fold_norms._fold
    monkeypatch.setattr(
        fold_norms, "_fold", lambda node, *around: None if node.name == "layers.4.ffn" else fold(node, *around)
    )
    with pytest.raises(InternalError, match=r"layers\.4\.ffn still has its norm"):
        fold_norms.apply(finished())
