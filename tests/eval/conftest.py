# SPDX-License-Identifier: Apache-2.0
"""The tiny checkpoint with a predictor, in torch and as an engine of the same weights in fp32."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from shadowc.eval.torch_model import TorchModel
from tests.e2e.compiled import COLLECT, TRAIN, options
from tests.e2e.conftest import stage_cache
from tests.sparsity.conftest import _one_thread

__all__ = ["_one_thread", "stage_cache"]

PROSE = "One neuron is one record, and a record that is not read costs nothing. A lazy head sleeps through the night. "


@pytest.fixture(scope="session")
def predictor_folder(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the tiny checkpoint: controls of a trace, and networks whose masks differ much from token to token. Read only.

    A trained predictor of so small a random model gives the static ranking.
    """
    from shadowc.checkpoint.resolve import resolve
    from shadowc.sparsity.collect import collect
    from shadowc.sparsity.predictor import Predictor
    from shadowc.sparsity.train import train

    base = tmp_path_factory.mktemp("learned")
    checkpoint = resolve(str(tiny_checkpoint))
    trace = collect(checkpoint, COLLECT, base / "tiny.trace")
    ranking = collect(checkpoint, COLLECT.model_copy(update={"criterion": "magnitude"}), base / "magnitude.trace")
    trained = train(trace, checkpoint.facts, TRAIN, base / "trained.predictor", rankings=[ranking])
    moody = Predictor.dummy(checkpoint.facts, TRAIN.neuron_block, TRAIN.width)
    replace(moody, meta=trained.meta, controls=trained.controls).save(base / "tiny.predictor")
    return base / "tiny.predictor"


@pytest.fixture(scope="session")
def fresh_torch(tiny_checkpoint: Path, predictor_folder: Path) -> Callable[[], TorchModel]:
    """Loads the tiny checkpoint and its predictor."""
    from shadowc.eval.load import torch_model
    from shadowc.sparsity.importance import Origin

    return lambda: torch_model(Origin(str(tiny_checkpoint), "auto", 0), predictor_folder)


@pytest.fixture(scope="session")
def in_torch(fresh_torch: Callable[[], TorchModel]) -> TorchModel:
    return fresh_torch()


@pytest.fixture(scope="session")
def engine_folders(
    tiny_checkpoint: Path, predictor_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Engines of the same predictor: a mask per token, and one per sequence. Read only."""
    import shadowc

    base = tmp_path_factory.mktemp("engines")
    return {
        mask: shadowc.compile(
            options(tiny_checkpoint, base / f"{mask}.engine", mask=mask, predictor=str(predictor_folder))
        )
        for mask in ("token", "sequence")
    }
