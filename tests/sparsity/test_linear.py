# SPDX-License-Identifier: Apache-2.0
"""Linear networks of style shadow+: where their training starts, and what labels "expected" ask for.

Letters: M positions, E inputs, L layers, U units, O outputs.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shadowc.sparsity import linear
from shadowc.sparsity.expected import LEAST, Expected, shares_of_mean
from shadowc.sparsity.fit import Examples
from shadowc.sparsity.graded import Grades
from shadowc.sparsity.linear import fit_linear
from shadowc.sparsity.targets import chosen_labels
from shadowc.spec.options import Labels, Style, TrainOptions

OUTPUTS = 12
EXPECTED = TrainOptions(style="shadow+", labels="expected", epochs=6)


def amounts(rng: np.random.Generator, M: int, E: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs, and amounts whose expectation is exp of a linear form of two of them."""
    x_ME = rng.standard_normal((M, E)).astype(np.float32)
    slopes_2O = rng.standard_normal((2, OUTPUTS))
    y_MO = LEAST + np.exp(x_ME[:, :2] @ slopes_2O) * rng.exponential(size=(M, OUTPUTS))
    return x_ME, y_MO.astype(np.float32)


def examples(x_ME: np.ndarray, y_MO: np.ndarray, held: int) -> Examples:
    return Examples(x_ME[held:], y_MO[held:], x_ME[:held], y_MO[:held])


# --- what labels "expected" are -----------------------------------------------------------------------------


def test_shares_do_not_care_for_the_size_of_a_layers_or_a_tokens_importances() -> None:
    rng = np.random.default_rng(3)
    raw_MLU = rng.random((30, 3, 40), dtype=np.float32)
    shares = shares_of_mean(raw_MLU)
    np.testing.assert_allclose(shares.mean(axis=2), 1, atol=1e-3)
    scaled = raw_MLU * np.exp2(rng.integers(-9, 9, (30, 3, 1))).astype(np.float32)
    np.testing.assert_array_equal(shares_of_mean(scaled), shares)


def test_a_unit_that_never_matters_keeps_a_least_share_and_a_silent_position_says_nothing() -> None:
    raw_MLU = np.ones((4, 2, 3), np.float32)
    raw_MLU[:, 0, 0] = 0
    raw_MLU[1, 0] = 0
    raw_MLU[2, 1, 2] = np.nan
    shares = shares_of_mean(raw_MLU)
    assert shares[0, 0, 0] == np.float32(LEAST)
    silent_ML = [[False, False], [True, False], [False, True], [False, False]]
    np.testing.assert_array_equal(np.isnan(shares).all(axis=2), silent_ML)


def test_a_layer_that_never_does_anything_drops_no_position() -> None:
    raw_MLU = np.ones((4, 2, 3), np.float32)
    raw_MLU[:, 1] = 0
    np.testing.assert_array_equal(shares_of_mean(raw_MLU)[:, 1], np.full((4, 3), LEAST, np.float32))


def test_what_the_loss_falls_without_counts_as_nothing() -> None:
    shares = shares_of_mean(np.array([[[-4, 1, 2]]], np.float32))
    np.testing.assert_allclose(shares[0, 0], [LEAST, 1, 2])


@pytest.mark.parametrize(
    ("criterion", "style", "asked", "found"),
    [
        ("activation", "shadow+", None, "expected"),
        ("l2norm", "shadow+", None, "expected"),
        ("fisher", "shadow+", None, "graded"),
        ("somebodys", "shadow+", None, "graded"),
        ("activation", "shadow+", "graded", "graded"),
        ("activation", "dejavu", None, "top"),
    ],
)
def test_labels_follow_the_criterion_where_nobody_chose(
    criterion: str, style: Style, asked: Labels | None, found: Labels
) -> None:
    assert chosen_labels(TrainOptions(style=style, labels=asked), criterion).learned == found


@given(st.integers(0, 2**32 - 1), st.floats(-2, 2))
@settings(max_examples=40)
def test_no_constant_has_a_smaller_loss_than_the_logarithm_of_the_mean(seed: int, other: float) -> None:
    y_MO = torch.from_numpy(np.random.default_rng(seed).exponential(size=(50, 3)).astype(np.float32) + LEAST)
    objective = Expected()
    best_O = objective.constant(y_MO)
    assert objective.loss(best_O, y_MO) <= objective.loss(best_O + other, y_MO) + 1e-6


def test_scores_rank_by_expectation_where_how_often_a_unit_leads_says_the_opposite() -> None:
    rng = np.random.default_rng(0)
    x_ME = rng.standard_normal((2000, 4)).astype(np.float32)
    rare = np.where(rng.random(2000) < 0.1, 30, 0.1)  # leads in a tenth of the positions, by far; 3.1 in the mean
    y_MO = np.stack([rare, np.full(2000, 1.0)], axis=1).astype(np.float32)
    network = fit_linear(examples(x_ME, y_MO, 200), Expected(), 2, EXPECTED, 0).network
    scores_MO = network(x_ME[:200])
    assert (scores_MO[:, 0] > scores_MO[:, 1]).all()


def test_training_finds_the_expectation() -> None:
    x_ME, y_MO = amounts(np.random.default_rng(1), 4000, 16)
    found = fit_linear(examples(x_ME, y_MO, 500), Expected(), 4, EXPECTED.model_copy(update={"epochs": 20}), 0)
    assert found.error < found.mean_error - 0.3


# --- where training starts ----------------------------------------------------------------------------------


def test_with_more_inputs_than_positions_training_stays_finite_and_is_no_worse_than_the_mean() -> None:
    x_ME, y_MO = amounts(np.random.default_rng(2), 150, 400)
    found = fit_linear(examples(x_ME, y_MO, 50), Expected(), 8, EXPECTED, 0)
    assert all(math.isfinite(error) for error in found.curve)
    assert found.error <= found.mean_error


def test_one_score_far_too_low_neither_overflows_nor_outweighs_a_batch() -> None:
    scores_MO = torch.tensor([[-1000.0], [0.0]], requires_grad=True)
    loss = Expected().loss(scores_MO, torch.tensor([[300.0], [1.0]]))
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.isfinite()
    assert scores_MO.grad is not None
    assert scores_MO.grad.abs().max() <= math.exp(4)


def test_a_start_that_is_too_steep_is_made_flatter(monkeypatch: pytest.MonkeyPatch) -> None:
    data = examples(*amounts(np.random.default_rng(2), 150, 400), 50)
    options = EXPECTED.model_copy(update={"epochs": 1, "rate": 1e-9})
    flatter = fit_linear(data, Expected(), 8, options, 0).curve[1]
    monkeypatch.setattr(linear, "START_FACTORS", (1.0,))
    assert flatter < fit_linear(data, Expected(), 8, options, 0).curve[1]


@pytest.mark.parametrize("objective", [Expected(), Grades(np.array([-1, 0, 1], np.float32))])
def test_both_matrices_start_equally_large_since_adamw_moves_all_numbers_alike(objective: linear.Objective) -> None:
    x_ME, y_MO = amounts(np.random.default_rng(4), 600, 64)
    targets_MO = np.clip(np.round(y_MO), 0, 3) if isinstance(objective, Grades) else y_MO
    fc1_PE, fc2_OP = linear._low_rank(torch.from_numpy(x_ME), torch.from_numpy(targets_MO), objective, 8)
    assert float(fc1_PE.square().mean()) == pytest.approx(float(fc2_OP.square().mean()), rel=1e-4)
