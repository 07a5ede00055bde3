# SPDX-License-Identifier: Apache-2.0
"""Parity B: engine and masked torch model agree when both run free, and a deaf density dial is noticed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import shadowc
from shadowc.checkpoint.resolve import resolve
from shadowc.measure.free_running import EXCUSED_LIMIT, FreeRun, _Row, free_run, near_threshold
from shadowc.runtime.engine import Engine
from shadowc.sparsity.predictor import Predictor
from shadowc.sparsity.reference import MaskedModel, load_torch_model
from shadowc.spec.density import Density
from shadowc.spec.errors import InputError
from shadowc.spec.options import Style
from shadowc.spec.progress import NullProgress
from shadowc.stages import Stages
from tests.e2e import compiled
from tests.measure.test_parity import changed, ignore_density


@pytest.fixture(scope="module")
def masked(tiny_checkpoint: Path, sparse_engine: Path) -> MaskedModel:
    """The masked torch model of the engine's checkpoint and predictor."""
    checkpoint = resolve(str(tiny_checkpoint))
    predictor = Stages(compiled.options(tiny_checkpoint, sparse_engine), NullProgress()).predictor(checkpoint)
    assert isinstance(predictor, Predictor)
    return MaskedModel(load_torch_model(checkpoint), predictor.plan("global"), predictor)


def run(engine: Engine, masked: MaskedModel, density: Density) -> FreeRun:
    prompts = np.random.default_rng(0).integers(4, 320, (6, 8), dtype=np.int64)
    return free_run(engine, masked, prompts, tokens=24, density=density)


@pytest.mark.parametrize("density", [Density(), Density(0.5, 0.5), Density(0.5, 0.2)])
def test_both_generate_the_same_when_free(sparse_engine: Path, masked: MaskedModel, density: Density) -> None:
    found = run(shadowc.load(sparse_engine), masked, density)
    assert found.passed()
    assert found.masks_after == 0
    assert found.tokens >= 100


def test_masks_differ_when_the_engine_ignores_its_density(sparse_engine: Path, masked: MaskedModel) -> None:
    found = run(changed(sparse_engine, ignore_density), masked, Density(0.5, 0.5))
    assert found.masks_wrong > 0
    assert not found.passed()


COUNTS = FreeRun(Density(), "global", 1000, 0, 0, 0, 0, 0, 0, 0)


@pytest.mark.parametrize("part", ["masks_excused", "masks_after", "tokens_excused"])
def test_few_excused_differences_pass_and_more_do_not(part: str) -> None:
    limit = int(EXCUSED_LIMIT * COUNTS.tokens)
    assert limit == 5
    assert replace(COUNTS, **{part: limit}).passed()  # type: ignore[arg-type]
    assert not replace(COUNTS, **{part: limit + 1}).passed()  # type: ignore[arg-type]


@pytest.mark.parametrize("part", ["masks_wrong", "tokens_wrong"])
def test_one_difference_without_an_excuse_fails(part: str) -> None:
    assert not replace(COUNTS, **{part: 1}).passed()  # type: ignore[arg-type]


def test_nearness_follows_the_spread_of_the_units_that_are_ranked_together() -> None:
    scores = np.array([[[0.0, 1.0, 1.00005], [0.0, 100.0, 50.0], [0.0, 1e9, 5e8]]], np.float32)
    threshold = np.array([[1.00005, 50.0, -np.inf]], np.float32)
    local = near_threshold(scores, threshold, scope="local", exempt=(2,))
    assert local[0].tolist() == [[False, False, True], [False, False, True], [False] * 3]
    together = near_threshold(scores, threshold, scope="global", exempt=(2,))
    assert together[0].tolist() == [[False, True, True], [False, False, True], [False] * 3]


@pytest.mark.parametrize("wild", [np.inf, np.nan])
def test_no_unit_is_near_when_the_spread_is_not_finite(wild: float) -> None:
    scores = np.array([[[0.0, 1.0, wild]]], np.float32)
    for scope in ("local", "global"):
        assert not near_threshold(scores, np.array([[1.0]], np.float32), scope=scope, exempt=()).any()


def test_a_dense_engine_has_no_free_run(sparse_engine: Path, masked: MaskedModel) -> None:
    with pytest.raises(InputError, match="dense engine"):
        run(shadowc.load(sparse_engine).dense_twin(), masked, Density())


def _step(heads: list[float], neurons: list[float]) -> dict[str, np.ndarray]:
    """One token of two layers with two heads and two neurons each; thresholds are 0, the spread of scores is 2."""
    parts = {"heads": heads, "neurons": neurons}
    found = {f"scores.{kind}": np.array(values, np.float32).reshape(1, 2, 2) for kind, values in parts.items()}
    return found | {f"threshold.{kind}": np.zeros((1, 2), np.float32) for kind in parts}


NEAR, FAR = 1e-6, 0.5
AT_A_HEAD = _step([1, -NEAR, 1, -1], [1, -1, 1, -1])


@pytest.mark.parametrize("style", ["shadow", "dejavu", "shadow+"])
def test_a_unit_at_the_threshold_excuses_what_is_scored_after_it(style: Style) -> None:
    """A head of layer 1 falls the other way. What then differs clearly, and is it behind it?"""
    places = {
        "neurons of the same layer": ([1, NEAR, 1, -1], [-FAR, -1, 1, -1], {"shadow+"}),
        "heads of the next layer": ([1, NEAR, -FAR, -1], [1, -1, 1, -1], {"dejavu", "shadow+"}),
        "another head of the same layer": ([-FAR, NEAR, 1, -1], [1, -1, 1, -1], set()),
    }
    for place, (heads, neurons, excused_in) in places.items():
        row = _Row("local", (), style)
        row.masks(_step(heads, neurons), AT_A_HEAD)
        assert (row.masks_after, row.masks_wrong) == ((1, 0) if style in excused_in else (0, 1)), place


@pytest.mark.parametrize("style", ["shadow", "dejavu", "shadow+"])
def test_a_clear_difference_that_comes_first_is_wrong_in_every_style(style: Style) -> None:
    row = _Row("local", (), style)
    row.masks(_step([FAR, FAR, 1, -1], [1, NEAR, 1, -1]), _step([1, -1, 1, -1], [1, -NEAR, 1, -1]))
    assert (row.masks_excused, row.masks_after, row.masks_wrong) == (0, 0, 1)
