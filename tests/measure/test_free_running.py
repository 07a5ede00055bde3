# SPDX-License-Identifier: Apache-2.0
"""Parity B: engine and masked torch model agree when both run free, and a deaf density dial is noticed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import shadowc
from shadowc.checkpoint.resolve import resolve
from shadowc.measure.free_running import FreeRun, free_run
from shadowc.runtime.engine import Engine
from shadowc.sparsity.predictor import Predictor
from shadowc.sparsity.reference import MaskedOpt, load_torch_model
from shadowc.spec.density import Density
from shadowc.spec.progress import NullProgress
from shadowc.stages import Stages
from tests.e2e import compiled
from tests.measure.test_parity import changed


@pytest.fixture(scope="module")
def masked(tiny_checkpoint: Path, sparse_engine: Path) -> MaskedOpt:
    """The masked torch model of the engine's checkpoint and predictor."""
    checkpoint = resolve(str(tiny_checkpoint))
    predictor = Stages(compiled.options(tiny_checkpoint, sparse_engine), NullProgress()).predictor(checkpoint)
    assert isinstance(predictor, Predictor)
    return MaskedOpt(load_torch_model(checkpoint), predictor.plan("global"), predictor)


def run(engine: Engine, masked: MaskedOpt, density: Density) -> FreeRun:
    prompts = np.random.default_rng(0).integers(4, 320, (6, 8), dtype=np.int64)
    return free_run(engine, masked, prompts, tokens=24, density=density)


@pytest.mark.parametrize("density", [Density(), Density(0.5, 0.5), Density(0.5, 0.2)])
def test_both_generate_the_same_when_free(sparse_engine: Path, masked: MaskedOpt, density: Density) -> None:
    found = run(shadowc.load(sparse_engine), masked, density)
    assert found.masks_wrong == found.tokens_wrong == 0
    assert found.tokens >= 100


def test_masks_differ_when_the_engine_ignores_its_density(sparse_engine: Path, masked: MaskedOpt) -> None:
    def deaf(model: onnx.ModelProto) -> None:
        model.graph.initializer.append(numpy_helper.from_array(np.ones(1, np.float32), "planted"))
        for node in model.graph.node:
            if node.op_type == "SelectThreshold":
                node.input[1] = "planted"

    found = run(changed(sparse_engine, deaf), masked, Density(0.5, 0.5))
    assert found.masks_wrong > 0
    assert not found.passed()
