# SPDX-License-Identifier: Apache-2.0
"""Style shadow+: what it costs, what its networks learn and from which input, and how layers share one budget.

Letters: M positions, E hidden, L predicted layers, U units of a kind per layer.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from shadowc.checkpoint.opt import OptFacts, published_config
from shadowc.sparsity.graded import grade_bounds, grades_of, offsets_of
from shadowc.sparsity.importance import ImportanceTrace
from shadowc.sparsity.networks import BUDGET, byte_share, cost_share, default_width
from shadowc.sparsity.predictor import Predictor, style_in
from shadowc.sparsity.selection import select_threshold
from shadowc.sparsity.shares import even_shares, layer_density, problems, shares_of
from shadowc.sparsity.train import train
from shadowc.spec.errors import InputError
from shadowc.spec.options import TrainOptions
from shadowc.spec.program import GRID

PLUS = TrainOptions(style="shadow+", width=16, epochs=15)
PUBLISHED = ("125m", "350m", "1.3b", "2.7b", "6.7b", "13b", "30b", "66b")
Plant = Callable[..., ImportanceTrace]


# --- cost --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", PUBLISHED)
def test_it_keeps_to_the_budget_in_every_published_size(size: str) -> None:
    facts = OptFacts.from_config(published_config(f"opt-{size}"), f"opt-{size}")
    width = default_width(facts, 1, "shadow+")
    assert cost_share(facts, 1, width, "shadow+") <= BUDGET
    assert byte_share(facts, 1, width) <= BUDGET
    larger = width + (32 if width >= 128 else 8)
    assert width % (32 if width >= 128 else 8) == 0
    assert width == 1024 or max(cost_share(facts, 1, larger, "shadow+"), byte_share(facts, 1, larger)) > BUDGET


def test_a_model_too_small_for_blocks_of_32_gets_what_its_parameters_allow(small_facts: OptFacts) -> None:
    mini = OptFacts.from_config(published_config("opt-125m") | {
        "num_hidden_layers": 8, "hidden_size": 256, "ffn_dim": 1024, "num_attention_heads": 8, "vocab_size": 8192,
        "word_embed_proj_dim": 256,
    }, "mini")  # fmt: skip
    assert default_width(mini, 1, "shadow+") == 24
    assert default_width(small_facts, 1, "shadow+") == 8


def test_cost_share_counts_what_the_tensors_hold(small_facts: OptFacts) -> None:
    made = Predictor.dummy(small_facts, 1, 16, style="shadow+")
    assert cost_share(small_facts, 1, 16, "shadow+") == pytest.approx(made.parameters / small_facts.token_parameters)


# --- options and files -------------------------------------------------------------------------------------


def test_it_scores_single_neurons_unless_told_otherwise() -> None:
    assert (TrainOptions(style="shadow+").neuron_block, TrainOptions().neuron_block) == (1, 16)
    assert TrainOptions(style="shadow+", neuron_block=4).neuron_block == 4


@pytest.mark.parametrize(("style", "labels"), [("shadow+", "top"), ("shadow", "graded"), ("dejavu", "expected")])
def test_labels_of_another_style_are_refused(style: Any, labels: Any) -> None:
    with pytest.raises(ValidationError, match="graded and expected are for style shadow"):
        TrainOptions(style=style, labels=labels)


def test_files_keep_style_networks_and_shares(small_facts: OptFacts, tmp_path: Path) -> None:
    dummy = Predictor.dummy(small_facts, 1, 16, style="shadow+")
    dummy.save(tmp_path)
    loaded = Predictor.load(tmp_path, small_facts)
    assert loaded.style == style_in(tmp_path) == "shadow+"
    inputs = np.random.default_rng(0).standard_normal((5, 2, 2, 16)).astype(np.float32)
    for mine, other in zip(loaded.scores(inputs), dummy.scores(inputs), strict=True):
        np.testing.assert_array_equal(mine, other)
    assert loaded.shares is not None
    np.testing.assert_array_equal(loaded.shares[1], even_shares(2))


def test_a_table_that_falls_is_named(small_facts: OptFacts, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    Predictor.dummy(small_facts, 1, 16, style="shadow+").save(tmp_path)
    tensors = load_file(tmp_path / "predictor.safetensors")
    tensors["shares.heads"][50, 1] = 0.9
    save_file(tensors, tmp_path / "predictor.safetensors")
    with pytest.raises(InputError, match=r"shares\.heads does not grow from 0 to 1 in every layer"):
        Predictor.load(tmp_path)


def test_heads_do_not_see_what_the_ffn_reads_and_neurons_see_nothing_else(small_facts: OptFacts) -> None:
    dummy = Predictor.dummy(small_facts, 1, 16, style="shadow+")
    inputs = np.random.default_rng(0).standard_normal((5, 2, 2, 16)).astype(np.float32)
    moved = inputs.copy()
    moved[:, 1] += 1
    (heads, neurons), (same, other) = dummy.scores(inputs), dummy.scores(moved)
    np.testing.assert_array_equal(heads, same)
    assert (neurons != other).any(axis=(0, 2)).all()


# --- shares ------------------------------------------------------------------------------------------------


def test_shares_are_those_of_a_ranking_over_all_layers() -> None:
    scores = np.random.default_rng(2).standard_normal((300, 3, 20)).astype(np.float32)
    scores[:, 1] += 1
    table = shares_of(scores)
    assert not problems("shares", table, 3)
    for density in (0.1, 0.5, 0.9):
        threshold = np.quantile(scores, 1 - density)
        np.testing.assert_allclose(table[round(density * GRID)], (scores >= threshold).mean(axis=(0, 2)), atol=2e-3)
    np.testing.assert_allclose(table.mean(axis=1), np.arange(GRID + 1) / GRID, atol=1e-3)


@pytest.mark.parametrize(
    ("density", "row"), [(0.5, 100), (0.3, 60), (0.0, 0), (1.0, 200), (2.0, 200), (-1.0, 0), (float("nan"), 200)]
)
def test_a_density_takes_the_nearest_row(density: float, row: int) -> None:
    table = torch.from_numpy(shares_of(np.random.default_rng(2).standard_normal((50, 3, 20)).astype(np.float32)))
    assert torch.equal(layer_density(table, torch.tensor([density]))[0], table[row])


def test_layers_are_selected_at_their_own_densities() -> None:
    scores = torch.randn(2, 3, 2, 10, generator=torch.Generator().manual_seed(0))
    density_BL = torch.tensor([[0.2, 0.5], [1.0, 0.0]])
    threshold, active = select_threshold(scores, density_BL, scope="local", exempt=(), min_active=0)
    assert active[0, 0].tolist() == [2, 5]
    assert active[1, 2].tolist() == [10, 0]
    alone, _ = select_threshold(scores[:, :, 1:], density_BL[:, 1], scope="local")
    assert torch.equal(threshold[:, :, 1:], alone)
    _, kept = select_threshold(scores, density_BL, scope="local", exempt=(1,), min_active=3)
    assert kept[0, 0].tolist() == [3, 10]


# --- training ----------------------------------------------------------------------------------------------


def test_grades_count_the_tops_of_all_layers_together() -> None:
    raw = np.arange(1, 101, dtype=np.float32).reshape(5, 2, 10)
    raw[0, 0, 0] = 0  # a unit that did not matter counts for no top
    bounds = grade_bounds(raw)
    grades = grades_of(raw, bounds)
    shares = [(grades > grade).mean() for grade in range(3)]
    np.testing.assert_allclose(shares, [0.8, 0.4, 0.15], atol=0.015)
    assert grades[0, 0, 0] == 0
    assert grades[4, 1, 9] == 3
    assert offsets_of(grades)[1] == 0
    assert (np.diff(offsets_of(grades)) > 0).all()
    assert np.isnan(grades_of(np.array([np.nan], np.float32), bounds)).all()


def test_offsets_of_some_positions_are_those_of_a_trace_of_these_alone() -> None:
    grades = np.random.default_rng(4).integers(0, 4, (60, 3, 20)).astype(np.float32)
    rows = np.arange(0, 60, 7)
    np.testing.assert_array_equal(offsets_of(grades, rows), offsets_of(grades[rows]))
    assert (offsets_of(grades, rows) != offsets_of(grades)).any()


@pytest.fixture(scope="module")
def turns(make_trace: Plant) -> Plant:
    """Return traces whose named input tells which of four groups of units matters; other inputs are noise.

    Units of layer 2 matter ten times as much as those of layer 1.
    """

    def make(told: str, rows: int = 800) -> ImportanceTrace:
        rng = np.random.default_rng(5)
        turn_ML = rng.integers(4, size=(rows, 3))

        def importance(units: int) -> Any:
            mine_MLU = np.arange(units)[None, None] % 4 == turn_ML[..., None]
            strength = np.array([1, 1, 10])[None, :, None]
            return (strength * np.where(mine_MLU, 10, 1) * (rng.random((rows, 3, units)) + 0.5)).astype(np.float32)

        context_ME = rng.standard_normal((rows, 16)).astype(np.float32)
        heads_MLH, neurons_LMF = importance(4), importance(64).transpose(1, 0, 2)
        inputs = {}
        for layer in (1, 2):
            for name in ("input", "ffn_input"):
                input_ME = rng.standard_normal((rows, 16)).astype(np.float32)
                if name == told:
                    input_ME[np.arange(rows), turn_ML[:, layer]] += 4
                inputs[f"{name}.{layer}"] = input_ME
        return make_trace(context_ME, heads_MLH, neurons_LMF, np.arange(rows, dtype=np.int32) // 40, inputs)

    return make


def recall(predictor: Predictor, kind: str, method: str = "predictor") -> float:
    found: float = predictor.report["found"][kind]["local"]["0.2"][method]["recall"]
    return found


@pytest.mark.parametrize(
    ("told", "taught", "other"), [("input", "heads", "neurons"), ("ffn_input", "neurons", "heads")]
)
def test_each_kind_learns_from_its_own_input_alone(
    turns: Plant, small_facts: OptFacts, told: str, taught: str, other: str
) -> None:
    predictor = train(turns(told), small_facts, PLUS)
    assert recall(predictor, taught) > recall(predictor, taught, "normalised") + 0.2
    assert recall(predictor, other) < recall(predictor, other, "normalised") + 0.1
    error = predictor.report["error"]
    assert error[taught]["predictor"] < 0.85 * error[taught]["mean"]
    assert error[other]["predictor"] > 0.97 * error[other]["mean"]
    curve = predictor.report["curve"][taught]
    assert len(curve) == PLUS.epochs + 1
    assert curve[0] == pytest.approx(error[taught]["mean"])
    assert min(curve) == pytest.approx(error[taught]["predictor"], rel=0.02)


def test_the_layer_that_matters_more_gets_more_of_the_budget(turns: Plant, small_facts: OptFacts) -> None:
    predictor = train(turns("ffn_input"), small_facts, PLUS)
    assert predictor.shares is not None
    share_L = predictor.shares[1][GRID // 4]
    assert share_L[1] > 2 * share_L[0]
    assert share_L.mean() == pytest.approx(0.25, abs=0.01)


def test_by_expected_labels_layers_share_the_budget_alike(turns: Plant, small_facts: OptFacts) -> None:
    predictor = train(turns("ffn_input"), small_facts, PLUS.model_copy(update={"labels": "expected"}))
    assert predictor.shares is not None
    np.testing.assert_allclose(predictor.shares[1][GRID // 4], 0.25, atol=0.05)
    assert recall(predictor, "neurons") > recall(predictor, "neurons", "normalised") + 0.2
    assert predictor.meta["labels"] == "expected"


def test_training_again_gives_the_same_weights(turns: Plant, small_facts: OptFacts) -> None:
    options = PLUS.model_copy(update={"epochs": 3})
    one, other = (train(turns("ffn_input"), small_facts, options).tensors() for _ in range(2))
    assert one.keys() == other.keys()
    for name, value in one.items():
        np.testing.assert_array_equal(value, other[name])
