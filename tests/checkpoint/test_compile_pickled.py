# SPDX-License-Identifier: Apache-2.0
"""From pytorch_model.bin to an engine: the same bytes as from its safetensors twin."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

import shadowc
from shadowc.checkpoint.resolve import resolve
from tests.checkpoint.handmade import save
from tests.e2e import compiled


def one_file(folder: Path, state: dict[str, object]) -> None:
    save(folder / "pytorch_model.bin", state)


def bare_shards(folder: Path, state: dict[str, object]) -> None:
    """As the larger models were published: no head, and names that begin with `decoder.`."""
    names = sorted(name.removeprefix("model.") for name in state)
    placed = {name: f"pytorch_model-{1 + i % 2:05}-of-00002.bin" for i, name in enumerate(names)}
    for shard in set(placed.values()):
        save(folder / shard, {name: state[f"model.{name}"] for name in names if placed[name] == shard})
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": placed}))


def engine(model: Path, out: Path, predictor: str) -> Path:
    return shadowc.compile(compiled.options(model, out, predictor=predictor, scope="local"))


@pytest.mark.parametrize(("write", "predictor"), [(one_file, "train"), (bare_shards, "none")])
def test_engine_of_a_pickle_has_the_bytes_of_its_safetensors_twin(
    write: Callable[[Path, dict[str, object]], None], predictor: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    pickled = Path(
        shutil.copytree(tiny_checkpoint, tmp_path / tiny_checkpoint.name, ignore=lambda *_: ["model.safetensors"])
    )
    write(pickled, dict(load_file(tiny_checkpoint / "model.safetensors")))
    ours = engine(pickled, tmp_path / "pickled.engine", predictor)
    theirs = engine(tiny_checkpoint, tmp_path / "safetensors.engine", predictor)
    assert resolve(str(pickled)).identity != resolve(str(tiny_checkpoint)).identity  # nothing came from its cache
    names = sorted(path.name for path in theirs.iterdir())
    assert sorted(path.name for path in ours.iterdir()) == names
    assert "weights.bin" in names
    for name in set(names) - {"engine.json"}:  # which says which files it was compiled from
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name
