# SPDX-License-Identifier: Apache-2.0
"""A tied head in a sharded checkpoint: listed in the index, and held once, twice, elsewhere or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from shadowc.checkpoint.opt import EMBEDDING, HEAD
from shadowc.checkpoint.weights import OpenedWeights, open_weights
from shadowc.spec.errors import InputError, UnsupportedError
from tests.checkpoint.handmade import FACTS, Tensors, as_torch, pack, save, some_tensors
from tests.checkpoint.test_weights import refusal

pytestmark = pytest.mark.usefixtures("no_network")

FIRST, SECOND = "00001-of-00002", "00002-of-00002"
Shards = dict[str, Tensors]
Write = Callable[[Path, Shards, dict[str, str]], dict[str, str]]


def pickled(folder: Path, shards: Shards, placed: dict[str, str]) -> dict[str, str]:
    """Shards of torch.save, equal arrays of one shard in shared memory, and their index; the names of the shards."""
    names = {part: f"pytorch_model-{part}.bin" for part in shards}
    for part, tensors in shards.items():
        memory = {id(array): as_torch(array) for array in tensors.values()}
        save(folder / names[part], {name: memory[id(array)] for name, array in tensors.items()})
    index = {"weight_map": {name: names[part] for name, part in placed.items()}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return names


def plain(folder: Path, shards: Shards, placed: dict[str, str]) -> dict[str, str]:
    """The same as safetensors; every name has numbers of its own."""
    names = {part: f"model-{part}.safetensors" for part in shards}
    for part, tensors in shards.items():
        (folder / names[part]).write_bytes(pack(tensors))
    index = {"weight_map": {name: names[part] for name, part in placed.items()}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return names


def dealt(prefix: str) -> tuple[Shards, dict[str, str], str]:
    """All tensors but the head in two shards, what lies where, and the name of the embedding, which is in the first."""
    tensors = {prefix + name.removeprefix("model."): array for name, array in some_tensors().items()}
    embedding = prefix + EMBEDDING.removeprefix("model.")
    placed = {name: SECOND if i % 2 else FIRST for i, name in enumerate(tensors)} | {embedding: FIRST}
    shards = {part: {name: tensors[name] for name in tensors if placed[name] == part} for part in (FIRST, SECOND)}
    return shards, placed, embedding


def assert_tied(opened: OpenedWeights) -> None:
    tensors = some_tensors()
    assert opened.source.names() == tuple(sorted((*tensors, HEAD)))
    for name, array in (tensors | {HEAD: tensors[EMBEDDING]}).items():
        assert np.array_equal(opened.source.tensor(name), array), name


both_prefixes = pytest.mark.parametrize("prefix", ["model.", ""], ids=["causal", "bare"])
both_formats = pytest.mark.parametrize("write", [pickled, plain])


@both_prefixes
@pytest.mark.parametrize("listed", ["both", "head"])
def test_head_that_shares_memory_with_the_embedding_of_its_shard_is_read_as_the_index_lists_it(
    listed: str, prefix: str, tmp_path: Path
) -> None:
    shards, placed, embedding = dealt(prefix)
    shards[FIRST][HEAD] = shards[FIRST][embedding]
    placed[HEAD] = FIRST
    if listed == "head":
        del placed[embedding]
    names = pickled(tmp_path, shards, placed)
    saved = torch.load(tmp_path / names[FIRST], weights_only=True)
    assert saved[HEAD].data_ptr() == saved[embedding].data_ptr()
    assert_tied(open_weights(tmp_path, FACTS))


@both_formats
@both_prefixes
@pytest.mark.parametrize("shard", [FIRST, SECOND])
def test_head_of_equal_numbers_is_read_in_whichever_shard(
    shard: str, prefix: str, write: Write, tmp_path: Path
) -> None:
    shards, placed, embedding = dealt(prefix)
    shards[shard][HEAD] = shards[FIRST][embedding].copy()
    write(tmp_path, shards, placed | {HEAD: shard})
    assert_tied(open_weights(tmp_path, FACTS))


@both_formats
@both_prefixes
@pytest.mark.parametrize("shard", [FIRST, SECOND])
def test_head_of_other_numbers_is_refused_in_whichever_shard(
    shard: str, prefix: str, write: Write, tmp_path: Path
) -> None:
    shards, placed, embedding = dealt(prefix)
    shards[shard][HEAD] = shards[FIRST][embedding] * 2
    names = write(tmp_path, shards, placed | {HEAD: shard})
    assert f"{HEAD} in {names[shard]} differs from {EMBEDDING}" in refusal(tmp_path, UnsupportedError).message


@both_formats
@both_prefixes
@pytest.mark.parametrize("kept", ["embedding", "head"])
def test_shard_that_holds_one_of_the_pair_which_the_index_places_there_is_read(
    kept: str, prefix: str, write: Write, tmp_path: Path
) -> None:
    shards, placed, embedding = dealt(prefix)
    if kept == "head":
        shards[FIRST][HEAD] = shards[FIRST].pop(embedding)
    write(tmp_path, shards, placed | {HEAD: FIRST})
    assert_tied(open_weights(tmp_path, FACTS))


@both_formats
@both_prefixes
def test_head_that_its_shard_lacks_is_not_taken_from_another(prefix: str, write: Write, tmp_path: Path) -> None:
    shards, placed, _ = dealt(prefix)
    names = write(tmp_path, shards, placed | {HEAD: SECOND})
    message = refusal(tmp_path, InputError).message
    assert f"{names[SECOND]}: lacks {HEAD}, which" in message
    assert "index.json places there" in message


@both_formats
@both_prefixes
def test_head_of_other_numbers_that_the_index_misplaces_is_not_passed_over(
    prefix: str, write: Write, tmp_path: Path
) -> None:
    shards, placed, embedding = dealt(prefix)
    shards[SECOND][HEAD] = shards[FIRST][embedding] * 2
    names = write(tmp_path, shards, placed | {HEAD: FIRST})
    assert f"{names[FIRST]}: lacks {HEAD}, which" in refusal(tmp_path, InputError).message


@both_formats
def test_other_tensor_that_its_shard_lacks_is_missed_beside_a_tied_pair(write: Write, tmp_path: Path) -> None:
    shards, placed, _ = dealt("model.")
    lost = next(name for name in shards[FIRST] if name != EMBEDDING)
    del shards[FIRST][lost]
    names = write(tmp_path, shards, placed | {HEAD: FIRST})
    message = refusal(tmp_path, InputError).message
    assert f"{names[FIRST]}: lacks {lost}, which" in message
    assert HEAD not in message
