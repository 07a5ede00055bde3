# SPDX-License-Identifier: Apache-2.0
"""engine.json: what is written is read back, and what is not understood is refused."""

from __future__ import annotations

import json

import pytest
from pydantic import ValidationError

from shadowc.spec.manifest import (
    SCHEMA,
    BytesPart,
    EngineManifest,
    FileEntry,
    ModelPart,
    PlanPart,
    PlanTensor,
    PluginPart,
    SparsityPart,
    TensorRtPart,
    WeightPart,
    needed_files,
)


def manifest(**changes: object) -> EngineManifest:
    sizes = {"layers": 4, "hidden": 64, "heads": 4, "head_size": 16, "ffn": 256, "vocab": 320, "positions": 64}
    parts: dict[str, object] = {
        "producer": {"shadowc": "0.1.0"},
        "target": "cpu",
        "weights": "fp32",
        "ops": {"shadowc": 1},
        "model": ModelPart(name="opt-tiny", source="0" * 64, bos=2, eos=2, pad=1, **sizes),
        "sparsity": SparsityPart(
            mask="token", scope="global", head_density=0.5, neuron_density=0.2, neuron_block=16, exempt=(1,)
        ),
        "bytes_per_token": BytesPart(lm_head=81920, predictor=4096, other=1024, records=786432),
        "parity": {"largest": 1e-6},
        "build_key": "1" * 64,
        "files": {"model.onnx": FileEntry(size=12, sha256="2" * 64)},
    }
    return EngineManifest(**{**parts, **changes})


def test_manifest_survives_json() -> None:
    assert EngineManifest.model_validate_json(manifest().model_dump_json()) == manifest()


def test_manifest_of_a_dense_engine_has_no_sparsity() -> None:
    dense = manifest(sparsity=None)
    assert json.loads(dense.model_dump_json())["sparsity"] is None


def test_manifest_states_its_schema() -> None:
    assert json.loads(manifest().model_dump_json())["schema_version"] == SCHEMA


@pytest.mark.parametrize(
    "changes", [{"surprise": 1}, {"target": "tpu"}, {"weights": "int3"}, {"files": {"a": {"size": 1}}}]
)
def test_manifest_refuses_what_it_does_not_know(changes: dict[str, object]) -> None:
    content = {**json.loads(manifest().model_dump_json()), **changes}
    with pytest.raises(ValidationError):
        EngineManifest.model_validate(content)


def test_manifest_of_an_engine_from_before_a_field_is_read() -> None:
    content = json.loads(manifest().model_dump_json())
    del content["model"]["norm_first"], content["model"]["projected"]
    assert EngineManifest.model_validate(content) == manifest()


def test_manifest_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        manifest().build_key = "3"  # type: ignore[misc]


def tensorrt_part() -> TensorRtPart:
    cache = {"kind": "cache", "dtype": "float16", "shape": (-1, 4, -1, 16)}
    past = PlanTensor(
        name="past_key_values.0.key", smallest=(1, 4, 1, 16), best=(1, 4, 64, 16), largest=(4, 4, 64, 16), **cache
    )
    present = PlanTensor(name="present.0.key", alias_of="past_key_values.0.key", **cache)
    decode = PlanPart(file="decode.plan", onnx="decode.onnx", inputs=(past,), outputs=(present,))
    return TensorRtPart(
        family="rtx1",
        library_version="1.7.1.116",
        activations="float16",
        max_batch=4,
        max_context=64,
        chunk=64,
        compute_capabilities=("8.0", "8.6"),
        portable_above="12.0",
        plans={"decode": decode},
        plugins=(
            PluginPart(file="libshadowc_trtrtx1.so", registers_itself=False, operators=("shadowc::SparseFFN::1",)),
        ),
        weights=(WeightPart(name="layers.0.ffn.w1", dtype="float16", shape=(256, 64), offset=0, bytes=32768),),
    )


def test_manifest_of_a_tensorrt_engine_survives_json_and_names_the_files_it_needs() -> None:
    made = manifest(target="tensorrt-rtx", weights="fp16", tensorrt=tensorrt_part())
    assert EngineManifest.model_validate_json(made.model_dump_json()) == made
    assert needed_files(made) == ("weights.bin", "decode.plan", "decode.onnx", "libshadowc_trtrtx1.so")


def test_manifest_of_a_cpu_engine_names_the_files_it_needs() -> None:
    assert needed_files(manifest()) == ("model.onnx", "reference.onnx", "weights.bin")
