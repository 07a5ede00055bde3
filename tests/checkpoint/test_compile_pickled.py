# SPDX-License-Identifier: Apache-2.0
"""From pytorch_model.bin to an engine: the same bytes as from its safetensors twin."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from shadowc.checkpoint.resolve import resolve
from shadowc.cli.compile import _show
from shadowc.compiler import compile_engine
from tests.checkpoint.handmade import save
from tests.e2e import compiled


def one_file(folder: Path, state: dict[str, object]) -> None:
    """As trl saves a fine-tune: with a head of another kind beside the language model."""
    save(
        folder / "pytorch_model.bin", state | {"v_head.summary.weight": state["model.decoder.final_layer_norm.weight"]}
    )


def bare_shards(folder: Path, state: dict[str, object]) -> None:
    """As the larger models were published: no head, and names that begin with `decoder.`."""
    names = sorted(name.removeprefix("model.") for name in state)
    placed = {name: f"pytorch_model-{1 + i % 2:05}-of-00002.bin" for i, name in enumerate(names)}
    for shard in set(placed.values()):
        save(folder / shard, {name: state[f"model.{name}"] for name in names if placed[name] == shard})
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": placed}))


@pytest.mark.parametrize(
    ("write", "predictor"), [(one_file, "none"), pytest.param(bare_shards, "train", marks=pytest.mark.slow)]
)
def test_engine_of_a_pickle_has_the_bytes_of_its_safetensors_twin(
    write: Callable[[Path, dict[str, object]], None],
    predictor: str,
    tiny_checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pickled = Path(
        shutil.copytree(tiny_checkpoint, tmp_path / tiny_checkpoint.name, ignore=lambda *_: ["model.safetensors"])
    )
    write(pickled, dict(load_file(tiny_checkpoint / "model.safetensors")))
    ours, theirs = (
        compile_engine(compiled.options(model, tmp_path / f"{i}.engine", predictor=predictor, scope="local"))
        for i, model in enumerate((pickled, tiny_checkpoint))
    )
    assert resolve(str(pickled)).identity != resolve(str(tiny_checkpoint)).identity  # nothing came from its cache
    names = sorted(path.name for path in theirs.folder.iterdir())
    assert sorted(path.name for path in ours.folder.iterdir()) == names
    assert "weights.bin" in names
    for name in set(names) - {"engine.json"}:  # which says which files it was compiled from
        assert (ours.folder / name).read_bytes() == (theirs.folder / name).read_bytes(), name
    assert ours.left_out == (("v_head.summary.weight",) if write is one_file else ())
    _show(ours)
    assert ("v_head.summary.weight" in capsys.readouterr().out) == bool(ours.left_out)
