# SPDX-License-Identifier: Apache-2.0
"""The weightless trace of transformers' OPT."""

from __future__ import annotations

import dataclasses
import gc
import logging
import os
import subprocess
import sys
from pathlib import Path

import onnx
import pytest

from shadowc.checkpoint.opt import EMBEDDING, OptFacts, parameter_shapes
from shadowc.passes.surgery import scope_of
from shadowc.spec.errors import InternalError
from shadowc.trace import export
from shadowc.trace.export import OPSET, load_program
from shadowc.trace.program_io import to_model, write_model
from tests.trace import deep

BYTES_PER_LAYER = 20_000


@pytest.fixture(scope="module")
def model() -> onnx.ModelProto:
    return onnx.load_from_string(deep._trace_bytes(deep.FACTS))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "trace.onnx").write_bytes(deep._trace_bytes(deep.FACTS))
    return tmp_path / "trace.onnx"


def test_trace_holds_no_weights(model: onnx.ModelProto) -> None:
    assert len(model.SerializeToString()) < BYTES_PER_LAYER * deep.FACTS.layers
    assert max(len(tensor.raw_data) for tensor in model.graph.initializer) <= 64


def test_trace_has_the_opset_of_the_oracles_and_passes_the_checker(model: onnx.ModelProto) -> None:
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", OPSET)]
    onnx.checker.check_model(model)


def test_every_parameter_is_an_input_under_its_own_name(model: onnx.ModelProto) -> None:
    shapes = parameter_shapes(deep.FACTS)
    embedding = shapes.pop(EMBEDDING)
    found = {
        value.name: tuple(axis.dim_value for axis in value.type.tensor_type.shape.dim)
        for value in model.graph.input
        if "weight" in value.name or "bias" in value.name
    }
    assert found.pop(EMBEDDING, embedding) == embedding  # older versions leave the tied two apart
    assert found == {**shapes, "lm_head.weight": embedding}


def test_run_time_inputs_and_outputs_have_their_names_and_free_dimensions(model: onnx.ModelProto) -> None:
    def axes(value: onnx.ValueInfoProto) -> list[str | int]:
        return [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]

    inputs = {value.name: axes(value) for value in model.graph.input}
    assert inputs["input_ids"] == ["B", "S"]
    assert inputs["attention_mask"] == ["B", "P"]
    assert inputs["past_key_values.10.value"] == ["B", 4, "T", 16]
    outputs = [value.name for value in model.graph.output]
    assert outputs[:3] == ["logits", "present.0.key", "present.0.value"]
    assert len(outputs) == 1 + 2 * deep.FACTS.layers


def test_node_names_are_unique_and_start_with_their_module(model: onnx.ModelProto) -> None:
    names = [node.name for node in model.graph.node]
    assert len(set(names)) == len(names)
    assert all("#" in name for name in names)
    program = deep.traced()
    for layer in range(deep.FACTS.layers):
        scope = f"model.decoder.layers.{layer}.self_attn.q_proj"
        (weight,) = [value for value in program.graph.inputs if value.name == f"{scope}.weight"]
        assert {scope_of(reader) for reader in weight.outputs} == {scope}


def test_trace_says_nothing_about_the_machine_it_was_made_on(model: onnx.ModelProto) -> None:
    content = model.SerializeToString()
    assert b"site-packages" not in content
    assert b".py" not in content
    assert not model.graph.metadata_props
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)


@pytest.mark.slow
def test_trace_is_byte_identical_in_another_process_with_another_hash_seed(tmp_path: Path) -> None:
    facts = dataclasses.replace(deep.FACTS, layers=2)
    script = (
        "import sys; from pathlib import Path; from shadowc.checkpoint.opt import OptFacts; "
        "from shadowc.trace.export import trace; "
        f"trace({facts!r}, Path(sys.argv[1]))"
    )
    contents = []
    for seed in ("1", "2"):
        out = tmp_path / f"{seed}.onnx"
        done = subprocess.run(
            [sys.executable, "-c", script, str(out)],
            env={**os.environ, "PYTHONHASHSEED": seed}, cwd=tmp_path, capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert done.stdout == ""
        assert done.stderr == "", "the exporter is chatty"
        contents.append(out.read_bytes())
    assert contents[0] == contents[1]


def test_loaded_program_copies_every_parameter() -> None:
    program = deep.traced()
    assert set(program.weights) - {EMBEDDING} == {*parameter_shapes(deep.FACTS), "lm_head.weight"} - {EMBEDDING}
    assert {recipe.kind for recipe in program.weights.values()} == {"copy"}
    assert all(recipe.sources == (name,) for name, recipe in program.weights.items())


def test_loading_refuses_facts_of_another_shape(file: Path) -> None:
    with pytest.raises(InternalError, match=r"fc1\.bias is \[200\] in the trace, \[256\] in deep"):
        load_program(file, dataclasses.replace(deep.FACTS, ffn=256))


def test_loading_refuses_facts_with_more_layers(file: Path) -> None:
    with pytest.raises(InternalError, match=r"lacks 16 parameters of deep, for example model\.decoder\.layers\.11\."):
        load_program(file, dataclasses.replace(deep.FACTS, layers=12))


def test_loading_refuses_a_trace_without_the_embedding(file: Path) -> None:
    model = onnx.load(file)
    kept = [value for value in model.graph.input if value.name not in (EMBEDDING, "lm_head.weight")]
    del model.graph.input[:]
    model.graph.input.extend(kept)
    onnx.save(model, file)
    with pytest.raises(InternalError, match=r"for example model\.decoder\.embed_tokens\.weight"):
        load_program(file, deep.FACTS)


def test_program_keeps_scopes_and_shapes_through_graphsurgeon(model: onnx.ModelProto, tmp_path: Path) -> None:
    program = deep.traced()
    exported = to_model(program)
    assert [node.name for node in exported.graph.node] == [node.name for node in model.graph.node]
    assert [value.name for value in exported.graph.input] == [value.name for value in model.graph.input]
    write_model(program, tmp_path / "again.onnx")
    assert onnx.load(tmp_path / "again.onnx") == exported


def test_failed_trace_leaves_collector_and_loggers_as_they_were(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(_: OptFacts) -> None:
        assert not gc.isenabled()
        raise RuntimeError("planted")

    level = logging.getLogger("torch.onnx").level
    monkeypatch.setattr(export, "_export", fail)
    with pytest.raises(RuntimeError, match="planted"):
        export.trace(deep.FACTS, tmp_path / "trace.onnx")
    assert gc.isenabled()
    assert logging.getLogger("torch.onnx").level == level
    assert not list(tmp_path.iterdir())
