# SPDX-License-Identifier: Apache-2.0
"""Which files of a folder are its weights: indexes, precedence, and other formats."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from shadowc.checkpoint.weights import open_weights
from shadowc.spec.errors import InputError, UnsupportedError
from tests.checkpoint.handmade import (
    FACTS,
    some_tensors,
    write_pickled,
    write_pickled_shards,
    write_shards,
    write_single,
)
from tests.checkpoint.test_weights import A_WEIGHT, LAST_SHARD, refusal


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', '{"weight_map": 3}']
)
def test_damaged_index_is_refused_by_name(text: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    assert "model.safetensors.index.json" in refusal(tmp_path, InputError).message


def test_index_that_places_a_tensor_wrongly_is_refused(tmp_path: Path) -> None:
    tensors = some_tensors()
    write_shards(tmp_path, tensors)
    index = tmp_path / "model.safetensors.index.json"
    placed = json.loads(index.read_text())["weight_map"]
    placed[A_WEIGHT] = next(shard for shard in placed.values() if shard != placed[A_WEIGHT])
    index.write_text(json.dumps({"weight_map": placed}))
    assert f"{placed[A_WEIGHT]}: lacks {A_WEIGHT}" in refusal(tmp_path, InputError).message


def test_index_cannot_point_outside_the_folder(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "model", some_tensors())
    (folder / LAST_SHARD).rename(tmp_path / "outside.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace(LAST_SHARD, "../outside.safetensors"))
    assert "expected a file beside it" in refusal(folder, InputError).message


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("tf_model.h5", "from_tf=True"),
        ("flax_model.msgpack", "from_flax=True"),
        ("pytorch_model-00001-of-00002.bin", "copy the index"),
        ("model-00001-of-00002.safetensors", "copy the index"),
        ("model.pt", "copy it as pytorch_model.bin"),
        ("model.gguf", "the checkpoint that it was made from"),
        ("adapter_model.safetensors", "merge_and_unload"),
        ("adapter_model.bin", "merge_and_unload"),
    ],
)
def test_other_format_is_refused_with_the_way_from_it(name: str, way: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"weights")
    error = refusal(tmp_path, UnsupportedError)
    assert name in error.message
    assert way in error.hint
    assert error.exit_code == 3


@pytest.mark.parametrize("name", ["training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_what_training_leaves_is_not_taken_for_weights(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"no weights")
    assert "holds no weights" in refusal(tmp_path, InputError).message


def test_folder_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert "holds no weights" in refusal(tmp_path, InputError).message


@pytest.mark.parametrize("pickled", [write_pickled, write_pickled_shards])
@pytest.mark.parametrize("write", [write_single, write_shards])
def test_safetensors_win_over_pickles(write, pickled, tmp_path: Path) -> None:
    pickled(tmp_path, some_tensors(seed=1))
    write(tmp_path, some_tensors(seed=2))
    found = open_weights(tmp_path, FACTS)
    assert {file.suffix for file in found.files} == {".safetensors"}
    assert np.array_equal(found.source.tensor(A_WEIGHT), some_tensors(seed=2)[A_WEIGHT])


def test_one_file_wins_over_an_index_as_in_transformers(tmp_path: Path) -> None:
    write_shards(tmp_path, some_tensors(seed=1))
    write_single(tmp_path, some_tensors(seed=2))
    files = open_weights(tmp_path, FACTS).files
    assert [file.name for file in files] == ["model.safetensors"]
