# SPDX-License-Identifier: Apache-2.0
"""Target cpu: the files it writes, their bytes, and the dials that stay inputs."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper

from shadowc.emit import cpu
from shadowc.emit.cpu import emit_cpu
from shadowc.emit.target import TARGETS, target
from shadowc.emit.weights import RECORD_ALIGNMENT
from shadowc.runtime.library import library_path
from shadowc.spec.errors import InternalError, UnsupportedError
from shadowc.spec.manifest import MANIFEST_FILE, MODEL_FILE, REFERENCE_FILE, WEIGHTS_FILE
from shadowc.spec.options import WEIGHTS, CompileOptions
from shadowc.spec.program import WeightRecipe
from tests.emit import engines, handmade

if TYPE_CHECKING:
    from transformers import OPTForCausalLM

KINDS = ("heads", "neurons")


def external(tensor: onnx.TensorProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in tensor.external_data}


@pytest.mark.parametrize("weights", engines.KINDS)
def test_two_compiles_give_the_same_bytes(
    tiny_model: OPTForCausalLM, tiny_checkpoint: Path, tmp_path: Path, weights: str
) -> None:
    for name in ("one", "two"):
        engines.write_engine(tmp_path / name, tiny_model, tokenizer=tiny_checkpoint, weights=weights)
    first, second = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert first.keys() >= {
        MODEL_FILE,
        REFERENCE_FILE,
        WEIGHTS_FILE,
        MANIFEST_FILE,
        "tokenizer.json",
        "genai_config.json",
    }
    assert first == second


def test_records_start_at_pages_and_the_rest_at_cache_lines(engine_folder: Path) -> None:
    model = onnx.load(engine_folder / MODEL_FILE, load_external_data=False)
    placed = {tensor.name: external(tensor) for tensor in model.graph.initializer if tensor.external_data}
    assert {entry["location"] for entry in placed.values()} == {WEIGHTS_FILE}
    assert all(int(entry["offset"]) % RECORD_ALIGNMENT == 0 for name, entry in placed.items() if name.endswith(".w"))
    assert all(int(entry["offset"]) % 64 == 0 for entry in placed.values())
    offsets = [int(entry["offset"]) for name, entry in placed.items() if name.startswith("layers.")]
    assert offsets == sorted(offsets)


def test_what_onnx_reads_from_weights_bin_is_the_checkpoint(engine_folder: Path, tiny_model: OPTForCausalLM) -> None:
    model = onnx.load(engine_folder / MODEL_FILE)
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    state = tiny_model.state_dict()
    np.testing.assert_array_equal(tensors["lm_head"], state["lm_head.weight"].numpy().T)
    key = state["model.decoder.layers.2.self_attn.k_proj.weight"].numpy().reshape(4, 16, 64)
    np.testing.assert_array_equal(tensors["layers.2.attention.w"][:, 1], key)


def test_constants_stay_inside_the_graph(engine_folder: Path) -> None:
    model = onnx.load(engine_folder / MODEL_FILE, load_external_data=False)
    inside = {tensor.name for tensor in model.graph.initializer if not tensor.external_data}
    assert {"dense.threshold", "density_heads", "density_neurons", "sparse_tail"} <= inside


def test_only_the_reference_carries_functions(engine_folder: Path) -> None:
    assert not onnx.load(engine_folder / MODEL_FILE, load_external_data=False).functions
    assert len(onnx.load(engine_folder / REFERENCE_FILE, load_external_data=False).functions) == 3


def test_bytes_per_token_count_one_row_of_each_embedding(tiny_model: OPTForCausalLM, tmp_path: Path) -> None:
    facts = engines.tiny_facts()
    emitted = emit_cpu(handmade.build(facts), engines.tensors(tiny_model), tmp_path)
    E, F, n = facts.hidden, facts.ffn, facts.layers
    per_layer = 4 * E * E + 4 * E + F * 2 * E + F * 2  # records and scales
    biases_and_norms = 3 * E + E + F + E + 4 * E
    assert emitted.bytes_per_token.records == 4 * n * per_layer
    assert emitted.bytes_per_token.lm_head == 4 * E * facts.vocab
    assert emitted.bytes_per_token.other == 4 * (n * biases_and_norms + 2 * E + 2 * E)


@pytest.mark.parametrize(("weights", "bits"), [("bf16", 16), ("int8", 8), ("int4", 4)])
def test_bytes_per_token_count_narrow_records_scales_and_cache(
    tiny_model: OPTForCausalLM, tmp_path: Path, weights: str, bits: int
) -> None:
    facts = engines.tiny_facts()
    emitted = emit_cpu(handmade.build(facts, weights=weights), engines.tensors(tiny_model), tmp_path)
    E, F, n = facts.hidden, facts.ffn, facts.layers
    rows = 4 * E + 2 * F
    scales = rows * (E // 64 if weights == "int4" else 1)
    assert emitted.bytes_per_token.records == n * (rows * E * bits // 8 + 4 * scales)
    assert emitted.bytes_per_token.cache == n * 2 * E * 2


def test_int4_is_refused_when_the_hidden_size_does_not_fill_groups() -> None:
    facts = replace(engines.tiny_facts(), hidden=96)
    options = CompileOptions(model="tiny", weights="int4")
    with pytest.raises(UnsupportedError, match=r"groups of 64 .* which is 96 in opt-tiny") as caught:
        target("cpu").check_model(options, facts)
    assert caught.value.hint == "--weights int8"
    target("cpu").check_model(options, engines.tiny_facts())
    target("cpu").check_model(CompileOptions(model="tiny", weights="int8"), facts)


def test_a_recipe_without_a_graph_input_is_an_internal_error(tiny_model: OPTForCausalLM, tmp_path: Path) -> None:
    program = handmade.build(engines.tiny_facts())
    program.weights["layers.9.ffn.b2"] = WeightRecipe("copy", ("model.decoder.layers.0.fc2.bias",), (64,))
    with pytest.raises(InternalError, match=r"layers\.9\.ffn\.b2"):
        emit_cpu(program, engines.tensors(tiny_model), tmp_path)


def test_an_unknown_target_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UnsupportedError, match=r"'gpu'.*cpu"):
        target("gpu")
    assert TARGETS.keys() == set(WEIGHTS) == {"cpu", "tensorrt-rtx", "tensorrt"}
    assert all(made.name == name for name, made in TARGETS.items())


# --- the dials of the emitted file ---------------------------------------------------------------------------


def open_session(model: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.register_custom_ops_library(str(library_path()))
    return ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])


def feeds(tokens: int = 1) -> dict[str, np.ndarray]:
    facts = engines.tiny_facts()
    values: dict[str, np.ndarray] = {
        "input_ids": np.full((1, tokens), 7, np.int64),
        "attention_mask": np.ones((1, tokens), np.int64),
    }
    for layer in range(facts.layers):
        for part in ("key", "value"):
            values[f"past_key_values.{layer}.{part}"] = np.zeros((1, facts.heads, 8, facts.head_size), np.float32)
    return values


def active_by_run(session: ort.InferenceSession, density: float | None, tokens: int = 1, **more: Any) -> list[int]:
    """Active heads and neuron units of all predicted layers; None: the engine's default density."""
    dials = {} if density is None else {f"density_{kind}": np.array([density], np.float32) for kind in KINDS}
    found = session.run([f"active.{kind}" for kind in KINDS], {**feeds(tokens), **dials, **more})
    return [int(counts.sum()) for counts in found]


def active_by_binding(session: ort.InferenceSession, density: float) -> list[int]:
    binding = session.io_binding()
    held = {name: ort.OrtValue.ortvalue_from_numpy(value) for name, value in feeds().items()}
    for kind in KINDS:
        held[f"density_{kind}"] = ort.OrtValue.ortvalue_from_numpy(np.array([density], np.float32))
    for name, value in held.items():
        binding.bind_ortvalue_input(name, value)
    for kind in KINDS:
        binding.bind_output(f"active.{kind}")
    session.run_with_iobinding(binding)
    return [int(value.numpy().sum()) for value in binding.get_outputs()]


HEADS, UNITS = 12, 48
"""Of the three predicted layers of the tiny model, in blocks of 16 neurons."""


def density_is_obeyed(session: ort.InferenceSession) -> bool:
    wanted = {density: [round(HEADS * density), round(UNITS * density)] for density in (0.25, 1.0)}
    return all(
        active_by_run(session, density) == counts == active_by_binding(session, density)
        for density, counts in wanted.items()
    )


def test_density_overrides_the_default_by_run_and_by_binding(engine_folder: Path) -> None:
    session = open_session(engine_folder / MODEL_FILE)
    assert active_by_run(session, None) == [HEADS // 2, UNITS // 2]
    assert density_is_obeyed(session)


def test_a_graph_that_ignores_the_density_is_caught(engine_folder: Path, tmp_path: Path) -> None:
    shutil.copyfile(engine_folder / WEIGHTS_FILE, tmp_path / WEIGHTS_FILE)
    model = onnx.load(engine_folder / MODEL_FILE, load_external_data=False)
    model.graph.initializer.append(numpy_helper.from_array(np.array([0.5], np.float32), "planted"))
    for node in model.graph.node:
        if node.op_type == "SelectThreshold":
            node.input[1] = "planted"
    onnx.save(model, tmp_path / MODEL_FILE)
    assert not density_is_obeyed(open_session(tmp_path / MODEL_FILE))


def test_a_prefill_is_dense_unless_sparse_tail_says_otherwise(engine_folder: Path) -> None:
    session = open_session(engine_folder / MODEL_FILE)
    assert active_by_run(session, 0.5, tokens=4) == [0, 0]  # no masked token, so none is counted
    tail = np.array([3], np.int64)
    assert active_by_run(session, 0.5, tokens=4, sparse_tail=tail) == [3 * HEADS // 2, 3 * UNITS // 2]


def test_what_was_written_is_left_in_large_pages(
    tiny_model: OPTForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is complete when its pages are renewed."""
    calls: list[tuple[str, int]] = []
    monkeypatch.setattr(cpu, "renew_pages", lambda path: calls.append((path.name, path.stat().st_size)))
    emitted = emit_cpu(handmade.build(engines.tiny_facts()), engines.tensors(tiny_model), tmp_path)
    assert calls == [(WEIGHTS_FILE, emitted.files[WEIGHTS_FILE].size)]
