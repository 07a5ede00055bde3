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
    SparsityPart,
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


def test_manifest_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        manifest().build_key = "3"  # type: ignore[misc]
