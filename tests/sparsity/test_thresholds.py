# SPDX-License-Identifier: Apache-2.0
"""Calibrated thresholds: the calibration text meets the density in the mean, and each token takes what it needs.

Letters: M positions, L predicted layers, U units of a kind per layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shadowc.checkpoint.opt import OptFacts
from shadowc.cli.recall import met_text
from shadowc.sparsity import thresholds
from shadowc.sparsity.importance import ImportanceTrace
from shadowc.sparsity.predictor import Predictor
from shadowc.sparsity.selection import select_calibrated, unit_mask
from shadowc.sparsity.train import held_out, train
from shadowc.spec.errors import InputError
from shadowc.spec.options import TrainOptions
from shadowc.spec.program import GRID

EXAMPLES = settings(max_examples=40)
OPTIONS = TrainOptions(neuron_block=8, width=32, epochs=15)
Plant = Callable[..., ImportanceTrace]


def scores_of(seed: int, shape: tuple[int, int, int] = (60, 3, 8), *, loud: bool = True) -> np.ndarray:
    """Continuous scores [M,L,U]; loud tokens and layers have larger ones."""
    rng = np.random.default_rng(seed)
    spread = np.exp(rng.standard_normal((shape[0], shape[1], 1))) if loud else 1.0
    return (rng.standard_normal(shape) * spread).astype(np.float32)


def kept(scores_MLU: np.ndarray, table: np.ndarray, density: float) -> np.ndarray:
    """The mask [M,L,U] of a density."""
    scores = torch.from_numpy(scores_MLU)[None]
    threshold, active = select_calibrated(scores, torch.from_numpy(table), torch.tensor([density]))
    mask = unit_mask(scores, threshold)
    assert torch.equal(mask.sum(-1), active)
    return mask[0].numpy()


@EXAMPLES
@given(seed=st.integers(0, 2**32 - 1), row=st.integers(0, GRID))
def test_calibration_text_meets_every_density_in_the_mean(seed: int, row: int) -> None:
    scores = scores_of(seed)
    tables = thresholds.calibrate(scores, np.abs(scores))
    density, (M, L, U) = row / GRID, scores.shape
    local = kept(scores, tables["local"], density).mean(axis=(0, 2))
    assert np.abs(local - density).max() <= 0.5 / (M * U) + 1e-9
    assert abs(kept(scores, tables["global"], density).mean() - density) <= 0.5 / (M * L * U) + 1e-9
    assert len(set(tables["global"][row])) == 1
    assert abs(kept(scores, tables["sensitivity"], density).mean() - density) <= 0.5 / (M * U) + 0.5 / (5 * GRID)


def test_each_token_takes_what_it_needs() -> None:
    scores = scores_of(1)
    counts = kept(scores, thresholds.calibrate(scores, np.abs(scores))["global"], 0.25).sum(axis=(1, 2))
    assert counts.min() < 3 < 9 < counts.max()


@EXAMPLES
@given(
    seed=st.integers(0, 2**32 - 1),
    budget=st.sampled_from(thresholds.BUDGETS),
    less=st.floats(-0.5, 1.5, width=32),
    more=st.floats(-0.5, 1.5, width=32) | st.just(math.nan),
    hole=st.sampled_from([np.nan, np.inf, -np.inf, 0.0]),
)
def test_higher_density_never_switches_a_unit_off_and_nan_is_active(
    seed: int, budget: thresholds.Budget, less: float, more: float, hole: float
) -> None:
    scores = scores_of(seed)
    scores[np.random.default_rng(seed).random(scores.shape) < 0.2] = hole
    table = thresholds.calibrate(scores, np.abs(scores_of(seed + 1)))[budget]
    assert thresholds.problems({budget: (table, table)}, 3) == []
    if more < less:
        less, more = more, less
    few, many = kept(scores, table, less), kept(scores, table, more)
    assert (many | ~few).all()
    assert few[np.isnan(scores)].all()
    if not more < 1:
        assert many.all()
    if less <= 0:
        assert not few[np.isfinite(scores)].any()


def test_exempt_layers_stay_dense_and_rows_have_their_own_density() -> None:
    scores = torch.from_numpy(scores_of(2)).view(3, 20, 3, 8)
    table = torch.from_numpy(thresholds.calibrate(scores_of(2), np.abs(scores_of(2)))["local"])
    before = table.clone()
    _, active = select_calibrated(scores, table, torch.tensor([0.0, 0.3, 1.0]), exempt=(1,))
    assert torch.equal(table, before)
    assert (active[:, :, 1] == 8).all()
    assert (active[0, :, [0, 2]] == 0).all()
    assert (active[2] == 8).all()
    assert 0 < active[1, :, 0].float().mean() < 8


def test_a_layer_whose_importance_lies_in_few_units_gets_a_smaller_share() -> None:
    rng = np.random.default_rng(0)
    importance = rng.random((80, 2, 16)).astype(np.float32) + 0.5
    importance[:, 0, 4:] *= 0.01
    table = thresholds.calibrate(importance, importance)["sensitivity"]
    shares = kept(importance, table, 0.5).mean(axis=(0, 2))
    assert shares[0] < 0.3 < 0.7 < shares[1]


def test_shares_by_sensitivity_beat_equal_ones_where_layers_differ() -> None:
    rng = np.random.default_rng(0)
    importance = (rng.random((80, 3, 16)) ** np.array([1, 4, 12])[:, None]).astype(np.float32)
    importance /= importance.sum(axis=(0, 2), keepdims=True)
    tables = thresholds.calibrate(importance, importance)
    caught = {name: importance[kept(importance, table, 0.3)].sum() for name, table in tables.items()}
    assert caught["sensitivity"] > 1.03 * caught["local"]


# --- of a trained predictor --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trace(plant: Plant) -> ImportanceTrace:
    return plant(dependent=True)


@pytest.fixture(scope="module")
def trained(trace: ImportanceTrace, small_facts: OptFacts) -> Predictor:
    return train(trace, small_facts, OPTIONS)


def test_training_leaves_thresholds_that_its_positions_meet(trained: Predictor, trace: ImportanceTrace) -> None:
    taught = ~held_out(trace.sequence_M, OPTIONS.validation, OPTIONS.seed)
    assert tuple(trained.thresholds) == thresholds.BUDGETS
    for number, scores in enumerate(trained.scores(trace.context_ME[taught])):
        for budget, pair in trained.thresholds.items():
            found = kept(scores, pair[number], 0.3).mean()
            assert found == pytest.approx(0.3, abs=0.005), budget


def test_what_held_out_text_meets_is_told_beside_the_density(trained: Predictor, trace: ImportanceTrace) -> None:
    held = held_out(trace.sequence_M, OPTIONS.validation, OPTIONS.seed)
    neurons = trained.scores(trace.context_ME[held])[1]
    met = trained.report["met"]["neurons"]
    assert met["local"]["0.25"] == pytest.approx(kept(neurons, trained.thresholds["local"][1], 0.25).mean(), abs=1e-4)
    assert all(abs(value - float(density)) < 0.1 for one in met.values() for density, value in one.items())
    told = met_text(trained.report["met"], "local")
    assert f"{met['local']['0.25']:.1%} at 0.25".replace("%", " %") in told
    assert told.endswith("of neurons")


def test_a_predictor_keeps_its_thresholds_on_disk(trained: Predictor, small_facts: OptFacts, tmp_path: Path) -> None:
    trained.save(tmp_path / "p")
    again = Predictor.load(tmp_path / "p", small_facts)
    for budget, pair in trained.thresholds.items():
        for one, other in zip(pair, again.thresholds[budget], strict=True):
            np.testing.assert_array_equal(one, other)
    plan = again.plan("local", select="calibrated")
    assert plan.thresholds is again.thresholds["local"]
    assert again.plan(None, select="sensitivity").thresholds is again.thresholds["sensitivity"]


def test_a_predictor_of_before_there_were_thresholds_still_ranks(
    trained: Predictor, small_facts: OptFacts, tmp_path: Path
) -> None:
    replace(trained, thresholds={}).save(tmp_path / "old")
    old = Predictor.load(tmp_path / "old", small_facts)
    assert old.plan("global").thresholds is None
    with pytest.raises(InputError, match="no calibrated thresholds for budget global"):
        old.plan("global", select="calibrated")


def test_altered_thresholds_are_named(trained: Predictor, tmp_path: Path) -> None:
    """Planted defects: a table upside down, and one of another model."""
    heads, neurons = trained.thresholds["local"]
    for table, message in ((heads[::-1], "does not fall from"), (heads[:, :1], "has shape")):
        replace(trained, thresholds={"local": (table, neurons)}).save(tmp_path / "p")
        with pytest.raises(InputError, match=rf"threshold\.local\.heads {message}"):
            Predictor.load(tmp_path / "p")


def test_layers_that_know_themselves_alone_can_share_one_threshold(
    trace: ImportanceTrace, small_facts: OptFacts
) -> None:
    found = train(trace, small_facts, OPTIONS.model_copy(update={"style": "dejavu", "epochs": 2}))
    with pytest.raises(InputError) as ranked:
        found.plan("global")
    assert "--select calibrated" in str(ranked.value.hint)
    plan = found.plan(None, select="calibrated")
    assert (plan.scope, plan.budget) == ("global", "global")
    assert (np.ptp(found.thresholds["global"][1][1:GRID], axis=1) == 0).all()


def test_what_thresholds_cannot_do_is_refused(trained: Predictor) -> None:
    with pytest.raises(InputError, match="a share of its own, --scope global one threshold"):
        trained.plan("global", select="sensitivity")
    with pytest.raises(InputError, match="to keep 2 at least, those of every token must be ranked"):
        trained.plan("local", select="calibrated", min_active_neurons=2)
