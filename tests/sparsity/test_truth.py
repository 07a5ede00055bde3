# SPDX-License-Identifier: Apache-2.0
"""The change of the loss when a unit is masked, against a whole run with zeros put in by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from shadowc.sparsity.families import decoder_of
from shadowc.sparsity.truth import DenseRun, sampled_units
from tests.sparsity.two_layers import HEAD_SIZE, HEADS, NEURONS, loss_with, model_of, texts

EXACT = 1e-9


@pytest.fixture(scope="module", params=["opt", "llama"])
def model(request: pytest.FixtureRequest) -> Any:
    return model_of(request.param)


def change_by_hand(model: Any, ids_T: Tensor, kind: str, index: int, position: int | None) -> float:
    width = HEAD_SIZE if kind == "heads" else 1

    def zero(values: Tensor) -> Tensor:
        values = values.clone()
        where = slice(None) if position is None else position
        values[:, where, index * width : (index + 1) * width] = 0.0
        return values

    with torch.no_grad():
        place = ("context" if kind == "heads" else "hidden", 1)
        masked, dense = loss_with(model, ids_T[None], {place: zero}), loss_with(model, ids_T[None], {})  # type: ignore[dict-item]
    return float(masked - dense)


@pytest.mark.parametrize("kind", ["heads", "neurons"])
@pytest.mark.parametrize("position", [None, 1, 6])
def test_change_is_that_of_a_whole_run_with_the_unit_zeroed(model: Any, kind: str, position: int | None) -> None:
    ids_T = texts()[0]
    run = DenseRun(decoder_of(model), ids_T)
    units = sampled_units(decoder_of(model), kind, 10, seed=2)
    assert len(units) == (HEADS if kind == "heads" else 10)
    assert set(units.layer_U.tolist()) == {1}  # layer 0 is never masked
    changes_U, _ = run.changes(units, position)
    wanted = [change_by_hand(model, ids_T, kind, int(index), position) for index in units.index_U]
    assert max(map(abs, wanted)) > 1e-3
    np.testing.assert_allclose(changes_U.numpy(), wanted, rtol=EXACT, atol=EXACT)


def test_a_mask_at_the_wrong_token_is_caught(model: Any) -> None:
    """Planted defect: one token late."""
    ids_T = texts()[0]
    units = sampled_units(decoder_of(model), "heads", 2, seed=0)
    late_U, _ = DenseRun(decoder_of(model), ids_T).changes(units, 5)
    wanted = [change_by_hand(model, ids_T, "heads", int(index), 4) for index in units.index_U]
    assert np.abs(late_U.numpy() - wanted).max() > 1e-3


def test_a_neuron_that_says_nothing_is_not_run_and_changes_nothing() -> None:
    model = model_of("opt")
    ids_T = texts()[1]
    run = DenseRun(decoder_of(model), ids_T)
    units = sampled_units(decoder_of(model), "neurons", NEURONS, seed=0)
    changes_U, runs = run.changes(units, 3)
    assert 0 < runs < NEURONS
    assert int((changes_U == 0).sum()) >= NEURONS - runs
    assert [change_by_hand(model, ids_T, "neurons", n, 3) for n in np.flatnonzero(changes_U == 0)] == pytest.approx(
        [0.0] * int((changes_U == 0).sum()), abs=EXACT
    )


def test_units_are_spread_over_the_predicted_layers_and_drawn_by_seed(tiny_model: Any) -> None:
    decoder = decoder_of(tiny_model)
    units = sampled_units(decoder, "neurons", 10, seed=1)
    assert np.bincount(units.layer_U).tolist() == [0, 3, 3, 4]
    again = sampled_units(decoder, "neurons", 10, seed=1)
    np.testing.assert_array_equal(units.index_U, again.index_U)
    assert not np.array_equal(units.index_U, sampled_units(decoder, "neurons", 10, seed=2).index_U)
    assert len(set(zip(units.layer_U.tolist(), units.index_U.tolist(), strict=True))) == 10
