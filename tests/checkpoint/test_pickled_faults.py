# SPDX-License-Identifier: Apache-2.0
"""Pickled checkpoints that are refused, and those of fine-tunes: what is said, and what is not converted in vain."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from shadowc.checkpoint import digest
from shadowc.checkpoint.finite import check_finite
from shadowc.checkpoint.opt import EMBEDDING
from shadowc.checkpoint.resolve import resolve
from shadowc.spec.errors import InputError, UnsupportedError
from tests.checkpoint.handmade import (
    CONFIG,
    FACTS,
    save,
    some_tensors,
    write_pickled,
    write_pickled_shards,
)
from tests.checkpoint.test_converted import assert_holds, cached, refusal
from tests.checkpoint.test_tokenizer import slow_form

pytestmark = pytest.mark.usefixtures("no_network")

A_WEIGHT = "model.decoder.layers.1.fc1.weight"
SECOND = "pytorch_model-00002-of-00003.bin"


def test_pickle_that_needs_code_is_refused_with_what_it_needs(tmp_path: Path, own_cache: Path) -> None:
    class Planted:
        def __reduce__(self) -> tuple[object, ...]:
            return os.mkdir, (str(tmp_path / "ran"),)

    write_pickled(tmp_path / "m", some_tensors())
    save(tmp_path / "m" / "pytorch_model.bin", {"x": Planted()})
    error = refusal(tmp_path / "m", UnsupportedError)
    assert "posix.mkdir" in error.message
    assert str(tmp_path / "m" / "pytorch_model.bin") in error.message
    assert "model.safetensors" in error.hint
    assert error.exit_code == 3
    assert not (tmp_path / "ran").exists()
    assert cached(own_cache) == []


def test_truncated_pickle_is_refused_by_name(tmp_path: Path) -> None:
    path = write_pickled(tmp_path, some_tensors()) / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:-100])
    error = refusal(tmp_path, InputError)
    assert error.problems[0].startswith("pytorch_model.bin: truncated")
    assert len(error.problems) == 1


def test_faults_of_all_shards_are_found_before_the_first_is_converted(tmp_path: Path, conversions: list[str]) -> None:
    write_pickled_shards(tmp_path, some_tensors(), shards=5)
    names = [f"pytorch_model-0000{i}-of-00005.bin" for i in range(1, 6)]
    (tmp_path / names[1]).unlink()
    (tmp_path / names[2]).write_bytes((tmp_path / names[2]).read_bytes()[:-100])
    (tmp_path / names[4]).unlink()
    problems = refusal(tmp_path, InputError).problems
    assert len(problems) == 2
    assert problems[0].startswith(f"{names[1]}, {names[4]}: are missing")
    assert problems[1].startswith(f"{names[2]}: truncated")
    assert conversions == []


def test_faults_of_config_and_pickles_are_reported_together_without_a_conversion(
    tmp_path: Path, conversions: list[str]
) -> None:
    write_pickled_shards(tmp_path, some_tensors(), config={**CONFIG, "ffn_dim": -1})
    (tmp_path / SECOND).unlink()
    error = refusal(tmp_path, InputError)
    assert len(error.problems) == 2
    assert "ffn_dim is -1" in error.message
    assert SECOND in error.message
    assert conversions == []


def test_wrong_shape_is_named_with_the_users_file(tmp_path: Path) -> None:
    tensors = some_tensors()
    tensors[A_WEIGHT] = tensors[A_WEIGHT].T.copy()
    message = refusal(write_pickled(tmp_path, tensors), InputError).message
    assert f"pytorch_model.bin: {A_WEIGHT} has shape [8, 12], expected [12, 8]" in message


def test_index_that_places_a_tensor_wrongly_is_refused(tmp_path: Path) -> None:
    write_pickled_shards(tmp_path, some_tensors())
    index = tmp_path / "pytorch_model.bin.index.json"
    placed = json.loads(index.read_text())["weight_map"]
    placed[A_WEIGHT] = next(shard for shard in placed.values() if shard != placed[A_WEIGHT])
    index.write_text(json.dumps({"weight_map": placed}))
    error = refusal(tmp_path, InputError)
    assert f"{placed[A_WEIGHT]}: lacks {A_WEIGHT}, which pytorch_model.bin.index.json places there" in error.message


def test_nan_in_a_pickle_is_found(tmp_path: Path) -> None:
    tensors = some_tensors()
    tensors[A_WEIGHT].flat[-1] = np.nan
    with pytest.raises(InputError, match=A_WEIGHT):
        check_finite(resolve(str(write_pickled_shards(tmp_path, tensors))))


def test_vocabulary_is_checked_before_anything_is_converted(tmp_path: Path, conversions: list[str]) -> None:
    folder = slow_form(write_pickled(tmp_path, some_tensors()))
    (folder / "added_tokens.json").write_text(json.dumps({"<new>": FACTS.vocab}))
    assert "resize_token_embeddings" in refusal(folder, InputError).hint
    assert conversions == []


def test_fine_tune_with_added_tokens_and_a_longer_embedding_is_read(tmp_path: Path) -> None:
    tensors = some_tensors()
    tensors[EMBEDDING] = np.concatenate([tensors[EMBEDDING], np.ones((2, FACTS.hidden), "<f4")])
    folder = slow_form(write_pickled(tmp_path, tensors, {**CONFIG, "vocab_size": FACTS.vocab + 2}))
    (folder / "added_tokens.json").write_text(json.dumps({"<new>": FACTS.vocab + 1}))
    checkpoint = resolve(str(folder))
    assert checkpoint.facts.vocab == FACTS.vocab + 2
    assert_holds(checkpoint, tensors)


def test_digest_of_a_settled_pickle_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest, "SETTLED_SECONDS", 0.0)
    hashed, original = [], digest._hash
    monkeypatch.setattr(digest, "_hash", lambda path: hashed.append(path.name) or original(path))
    folder = write_pickled(tmp_path, some_tensors())
    for _ in range(2):
        resolve(str(folder))
    assert hashed == ["pytorch_model.bin"]
