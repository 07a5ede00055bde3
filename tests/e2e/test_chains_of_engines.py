# SPDX-License-Identifier: Apache-2.0
"""Compiled engines run as chains of operators, and give what they give operator by operator."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from shadowc.runtime import session as sessions
from shadowc.runtime import standard_steps
from shadowc.runtime.chains import chained
from shadowc.runtime.load import load, load_cpu
from shadowc.spec.ops import CHAIN, DOMAIN, SPARSE_FFN
from tests.runtime.test_chains import step_names
from tests.runtime.test_told import results

LAST_NORM = 1e-5
"""Of logits, whose norm is ONNX Runtime's or a step; ids and counts are whole numbers."""
ENGINES = ("sparse_engine", "sequence_engine", "int8_engine")


@pytest.mark.parametrize("name", ENGINES)
def test_engines_give_the_same_bits_with_chains_and_without(
    name: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder: Path = request.getfixturevalue(name)
    with_chains = results(folder)
    monkeypatch.delitem(standard_steps._STEPS, "LayerNormalization")  # whose last bits differ
    but_for_the_norm = results(folder)
    monkeypatch.setattr(sessions, "chained", lambda model: model)
    for found, wanted in zip(but_for_the_norm, results(folder), strict=True):
        np.testing.assert_array_equal(found, wanted)
    for found, wanted in zip(with_chains, but_for_the_norm, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=LAST_NORM)


def test_a_chain_one_of_whose_steps_reads_what_another_has_to_read_gives_other_logits(
    int8_engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def miswired(model: onnx.ModelProto) -> onnx.ModelProto:
        made = chained(model)
        for chain in (node for node in made.graph.node if node.op_type == CHAIN):
            wiring = {attribute.name: attribute for attribute in chain.attribute}
            operators = wiring["operators"].s.decode().split("\n")
            ffns = [number for number, name in enumerate(operators) if name == SPARSE_FFN.name]
            if len(ffns) > 1:
                wiring[f"{ffns[1]}.inputs"].ints[0] = wiring[f"{ffns[0]}.inputs"].ints[0]
        return made

    ids = np.arange(4, 24)[None]
    wanted = load(int8_engine).logits(ids, 0.5)
    monkeypatch.setattr(sessions, "chained", miswired)
    assert np.abs(load(int8_engine).logits(ids, 0.5) - wanted).max() > 1e-3


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_the_threads_of_a_session_do_not_change_what_a_chain_gives(int8_engine: Path, threads: int) -> None:
    ids = np.arange(4, 24)[None]
    wanted = load(int8_engine, threads=3).logits(ids, 0.5)
    np.testing.assert_array_equal(load(int8_engine, threads=threads).logits(ids, 0.5), wanted)


def test_a_graph_that_makes_text_is_one_chain(int8_engine: Path) -> None:
    engine = load_cpu(int8_engine)
    for runs in (engine, engine.dense_twin()):
        model = runs._generating.load_model()
        (chain,) = chained(model).graph.node
        chosen = ["next_ids", "past.next", "slot.clipped.next"]
        assert step_names(chain) == [*(node.name or node.output[0] for node in model.graph.node), *chosen]


def test_a_chain_reads_all_its_weights_as_one_input(int8_engine: Path) -> None:
    engine = load_cpu(int8_engine)
    for runs in (engine, engine.dense_twin()):
        graph = chained(runs._generating.load_model()).graph
        stored = {tensor.name for tensor in graph.initializer if tensor.external_data}
        chains = [node for node in graph.node if node.op_type == CHAIN]
        assert all(stored & set(node.input) == {"chain.weights"} for node in chains)
        assert stored <= {name for node in graph.node for name in node.input}


def test_a_profile_tells_of_every_operator(int8_engine: Path, tmp_path: Path) -> None:
    engine = load_cpu(int8_engine).profiled(tmp_path)
    engine.generate(np.arange(4, 9)[None], max_new_tokens=2, min_new_tokens=2)
    ((*_, step),) = engine.recordings()
    operators = {node.operator for node in step.nodes}
    assert {"SparseAttention", "SparseFFN"} <= operators
    assert CHAIN not in operators


def test_no_stored_graph_has_a_chain(int8_engine: Path, sequence_engine: Path) -> None:
    for folder in (int8_engine, sequence_engine):
        for path in folder.glob("*.onnx"):
            nodes = onnx.load(path, load_external_data=False).graph.node
            assert CHAIN not in {node.op_type for node in nodes if node.domain == DOMAIN}
