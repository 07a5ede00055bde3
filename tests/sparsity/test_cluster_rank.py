# SPDX-License-Identifier: Apache-2.0
"""Neuron orders and context-free rankings."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shadowc.sparsity import cluster
from shadowc.sparsity.cluster import block_sums, layer_order, neuron_orders
from shadowc.sparsity.importance import ImportanceTrace
from shadowc.sparsity.rank import (
    minmax_rows,
    normalised_static_scores,
    predicted_scores,
    random_scores,
    static_scores,
)
from shadowc.sparsity.recall import found_report, selected

SUM = 1e-5
Plant = Callable[..., ImportanceTrace]


def captured(neurons_MF: Any, order_F: Any, block: int, density: float) -> float:
    """Share of the importance in the best blocks of each position: what a perfect predictor could keep."""
    sums_MN = block_sums(neurons_MF, order_F, block)
    keep = max(round(density * sums_MN.shape[1]), 1)
    return float((np.sort(sums_MN, axis=1)[:, -keep:].sum(1) / sums_MN.sum(1)).mean())


def grouped(rows: int, seed: int, neurons: int = 96, groups: int = 6) -> tuple[Any, Any]:
    """Neurons in shuffled groups that fire by turns, and the group of each."""
    rng = np.random.default_rng(seed)
    group_F = np.random.default_rng(0).permutation(neurons) % groups
    turn_M = rng.integers(groups, size=rows)
    fires_MF = np.where(group_F == turn_M[:, None], 5.0, 0.3)
    return (fires_MF * rng.gamma(1.0, size=(rows, neurons))).astype(np.float32), group_F


def test_planted_groups_are_recovered() -> None:
    neurons_MF, group_F = grouped(600, seed=1)
    blocks_NG = group_F[layer_order(neurons_MF, 16)].reshape(6, 16)
    assert (blocks_NG == blocks_NG[:, :1]).all()


@pytest.mark.parametrize("density", [0.5, 0.2])
def test_clustered_blocks_capture_more_than_unordered_ones_on_other_text(density: float) -> None:
    neurons_MF, _ = grouped(600, seed=1)
    unseen_MF, _ = grouped(400, seed=2)
    clustered = captured(unseen_MF, layer_order(neurons_MF, 8), 8, density)
    identity = captured(unseen_MF, np.arange(96), 8, density)
    shuffled = captured(unseen_MF, np.random.default_rng(3).permutation(96), 8, density)
    assert clustered > identity + 0.05
    assert clustered > shuffled + 0.05


@settings(max_examples=25)
@given(st.integers(1, 70), st.integers(1, 20), st.integers(2, 40), st.integers(0, 3))
def test_every_order_is_a_permutation_whatever_the_shape(neurons: int, block: int, rows: int, seed: int) -> None:
    neurons_MF = np.random.default_rng(seed).random((rows, neurons), dtype=np.float32)
    order_F = layer_order(neurons_MF, block)
    assert order_F.dtype == np.int32
    assert np.array_equal(np.sort(order_F), np.arange(neurons))


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_what_lies_on_the_stack_raises_no_warning_in_an_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenBLAS 0.3.31's AVX-512 product [k, 5] x [5] reads lanes it never filled: a signalling NaN there warns."""
    (tmp_path / "fill.c").write_text(
        "void fill(void) { volatile unsigned words[65536]; for (int i = 0; i < 65536; ++i) words[i] = 0x7f800001u; }"
    )
    subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", tmp_path / "fill.so", tmp_path / "fill.c"], check=True)
    fill = ctypes.CDLL(str(tmp_path / "fill.so")).fill
    ranked = cluster._ranked_along
    monkeypatch.setattr(cluster, "_ranked_along", lambda *points: (fill(), ranked(*points))[1])
    neurons_MF = np.random.default_rng(0).random((5, 54), dtype=np.float32)
    order_F = layer_order(neurons_MF, 6)
    assert np.array_equal(np.sort(order_F), np.arange(54))


def test_silent_neurons_and_rows_do_no_harm() -> None:
    order_F = layer_order(np.zeros((8, 40), np.float32), 16)
    assert np.array_equal(np.sort(order_F), np.arange(40))


def test_the_same_input_gives_the_same_order() -> None:
    neurons_MF, _ = grouped(300, seed=4)
    assert np.array_equal(layer_order(neurons_MF, 8), layer_order(neurons_MF.copy(), 8))


def test_orders_cover_the_predicted_layers_and_are_the_identity_for_block_one(plant: Plant) -> None:
    trace = plant(dependent=True, rows=120)
    assert np.array_equal(neuron_orders(trace, 1), np.tile(np.arange(64), (2, 1)))
    orders_LF = neuron_orders(trace, 16)
    assert orders_LF.shape == (2, 64)
    groups = orders_LF % 4
    assert (groups.reshape(2, 4, 16) == groups.reshape(2, 4, 16)[:, :, :1]).all()


def test_orders_use_the_given_rows_only(plant: Plant) -> None:
    trace = plant(dependent=True, rows=120)
    rows = np.arange(60)
    assert np.array_equal(neuron_orders(trace, 16, rows)[0], layer_order(trace.neurons_MF(1)[rows], 16))


def test_block_sums_add_neurons_in_order_and_the_last_block_may_be_short() -> None:
    neurons_MF = np.arange(10, dtype=np.float32)[None]
    sums_MN = block_sums(neurons_MF, np.arange(9, -1, -1, dtype=np.int32), 4)
    assert sums_MN.tolist() == [[9 + 8 + 7 + 6, 5 + 4 + 3 + 2, 1 + 0]]


def test_static_scores_are_means_of_the_predicted_layers(plant: Plant) -> None:
    trace = plant(dependent=True, rows=120)
    orders_LF = neuron_orders(trace, 16)
    heads_MLH, neurons_MLN = predicted_scores(trace, orders_LF, 16)
    np.testing.assert_allclose(static_scores(heads_MLH), trace.heads_MLH[:, 1:].mean(0), rtol=SUM)
    mean_F = trace.neurons_MF(2).mean(0)
    np.testing.assert_allclose(static_scores(neurons_MLN)[1], mean_F[orders_LF[1]].reshape(4, 16).sum(1), rtol=SUM)


def test_normalised_scores_do_not_change_when_a_layer_is_scaled() -> None:
    scores_MLU = np.random.default_rng(0).random((120, 2, 9), dtype=np.float32)
    before = normalised_static_scores(scores_MLU)
    np.testing.assert_allclose(normalised_static_scores(scores_MLU * [[[1], [1000]]]), before, rtol=1e-4)
    assert before.shape == (2, 9)
    assert (before >= 0).all()
    assert (before <= 1).all()


def test_minmax_gives_nan_for_a_row_without_information() -> None:
    rows = np.array([[1, 3, 2], [5, 5, 5], [0, np.nan, 1], [0, np.inf, 1]], np.float32)
    scaled = minmax_rows(rows)
    assert scaled[0].tolist() == [0, 1, 0.5]
    assert np.isnan(scaled[1:]).any(axis=1).all()


def test_random_scores_are_seeded() -> None:
    first, again, other = (random_scores(seed, (2, 4), (2, 8)) for seed in (1, 1, 2))
    assert np.array_equal(first[1], again[1])
    assert not np.array_equal(first[1], other[1])
    assert (first[0].shape, first[1].shape) == ((2, 4), (2, 8))


def test_the_truth_finds_everything_and_its_opposite_little() -> None:
    truth_MLU = np.random.default_rng(0).random((30, 2, 20), dtype=np.float32)
    truth_MLU = (truth_MLU - truth_MLU.min(2, keepdims=True)) / np.ptp(truth_MLU, axis=2, keepdims=True)
    report = found_report(truth_MLU, {"truth": truth_MLU, "opposite": -truth_MLU})
    for scope in ("local", "global"):
        assert report[scope]["0.2"]["truth"]["recall"] == 1.0
        assert report[scope]["0.2"]["opposite"]["recall"] == 0.0
        assert report[scope]["0.5"]["truth"]["mass"] > 0.7 > report[scope]["0.5"]["opposite"]["mass"]
        assert report[scope]["0.5"]["truth"]["recall_per_layer"] == [1.0, 1.0]


def test_a_unit_without_importance_is_never_truly_important() -> None:
    truth_MLU = np.zeros((1, 1, 10), np.float32)
    truth_MLU[..., 3] = 1
    only_it = found_report(truth_MLU, {"it": truth_MLU})["local"]["0.5"]["it"]
    assert (only_it["recall"], only_it["mass"]) == (1.0, 1.0)


def test_selection_keeps_the_share_asked_for() -> None:
    scores_MLU = np.random.default_rng(0).random((5, 3, 10), dtype=np.float32)
    assert (selected(scores_MLU, 0.2, "local").sum(2) == 2).all()
    assert (selected(scores_MLU, 0.2, "global").sum((1, 2)) == 6).all()
    assert selected(scores_MLU[0], 0.2, "local").shape == (1, 3, 10)
