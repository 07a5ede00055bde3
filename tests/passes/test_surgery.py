# SPDX-License-Identifier: Apache-2.0
"""Scopes and node order."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shadowc.passes.surgery import is_inside, produce, replace_uses, scope_of, sort_nodes
from shadowc.spec.errors import InternalError


@pytest.mark.parametrize(
    ("scope", "block", "inside"),
    [
        ("layers.1", "layers.1", True),
        ("layers.1.fc1", "layers.1", True),
        ("layers.10", "layers.1", False),
        ("layers.10.fc1", "layers.1", False),
        ("layers.1", "layers.10", False),
        ("", "layers.1", False),
    ],
)
def test_scope_is_inside_a_block_by_whole_names(scope: str, block: str, inside: bool) -> None:
    assert is_inside(scope, block) is inside


def test_added_node_has_no_scope_and_traced_node_has_its_module() -> None:
    assert scope_of(gs.Node("Add", name="past")) == ""
    assert scope_of(gs.Node("Add", name="model.decoder.layers.1.fc1#12.bias")) == "model.decoder.layers.1.fc1"


def graph_of(parents: list[list[int]], order: list[int]) -> gs.Graph:
    """Node i reads the results of its parents; nodes are listed in `order`."""
    values = [gs.Variable(f"v{i}", np.dtype(np.float32)) for i in range(len(parents))]
    nodes = [
        gs.Node("Op", f"n{i}", inputs=[values[parent] for parent in parents[i]], outputs=[values[i]])
        for i in range(len(parents))
    ]
    return gs.Graph(nodes=[nodes[i] for i in order], outputs=values[-1:])


@st.composite
def shuffled_dags(draw: st.DrawFn) -> tuple[list[list[int]], list[int]]:
    count = draw(st.integers(1, 12))
    parents = [draw(st.lists(st.integers(0, i - 1), max_size=3, unique=True)) if i else [] for i in range(count)]
    return parents, draw(st.permutations(range(count)))


@given(shuffled_dags())
def test_sort_puts_every_node_behind_what_it_reads_and_is_stable(dag: tuple[list[list[int]], list[int]]) -> None:
    parents, order = dag
    graph = graph_of(parents, order)
    sort_nodes(graph)
    names = [node.name for node in graph.nodes]
    assert sorted(names) == sorted(f"n{i}" for i in range(len(parents)))
    assert all(names.index(f"n{parent}") < names.index(f"n{i}") for i in range(len(parents)) for parent in parents[i])
    sort_nodes(graph)
    assert [node.name for node in graph.nodes] == names


def test_sort_keeps_an_order_that_is_already_valid() -> None:
    graph = graph_of([[], [], [1], [0]], [1, 0, 3, 2])
    sort_nodes(graph)
    assert [node.name for node in graph.nodes] == ["n1", "n0", "n3", "n2"]


def test_sort_handles_chains_far_deeper_than_the_recursion_limit() -> None:
    count = 5000
    graph = graph_of([[i - 1] if i else [] for i in range(count)], list(reversed(range(count))))
    sort_nodes(graph)
    assert [node.name for node in graph.nodes] == [f"n{i}" for i in range(count)]


def test_sort_names_a_node_of_a_cycle() -> None:
    graph = graph_of([[], [0], [1]], [0, 1, 2])
    graph.nodes[1].inputs.append(graph.nodes[2].outputs[0])
    with pytest.raises(InternalError, match=r"cycle through n[12]"):
        sort_nodes(graph)


def test_replaced_tensor_has_no_reader_even_if_one_node_read_it_twice() -> None:
    graph = graph_of([[], [], [0]], [0, 1, 2])
    graph.nodes[2].inputs.append(graph.nodes[0].outputs[0])
    replace_uses(graph.nodes[0].outputs[0], graph.nodes[1].outputs[0])
    assert [value.name for value in graph.nodes[2].inputs] == ["v1", "v1"]
    assert not graph.nodes[0].outputs[0].outputs


def test_produced_tensor_has_one_producer() -> None:
    graph = graph_of([[], [0]], [0, 1])
    value, new = graph.nodes[0].outputs[0], gs.Node("New", "new")
    produce(new, [value])
    assert [maker.name for maker in value.inputs] == ["new"]
    assert [value.name for value in graph.nodes[1].inputs] == ["v0"]
