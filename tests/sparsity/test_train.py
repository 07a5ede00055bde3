# SPDX-License-Identifier: Apache-2.0
"""Training: it learns what the context says, nothing where it says nothing, and the same every time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shadowc.checkpoint.opt import OptFacts
from shadowc.sparsity import fit as fitting
from shadowc.sparsity import train as module
from shadowc.sparsity.fit import Examples, fit
from shadowc.sparsity.importance import ImportanceTrace
from shadowc.sparsity.networks import minmax_scaled
from shadowc.sparsity.predictor import Predictor
from shadowc.sparsity.targets import layer_minmax
from shadowc.sparsity.train import held_out, train
from shadowc.spec.errors import InputError
from shadowc.spec.options import TrainOptions
from shadowc.spec.progress import EventProgress

Plant = Callable[..., ImportanceTrace]
MakeTrace = Callable[..., ImportanceTrace]
OPTIONS = TrainOptions(neuron_block=16, width=32, epochs=15)
CLEAR_GAIN = 0.2
CHANCE = 0.03  # recall over 80 held-out positions
FOLDED = 2e-4


def recalls(predictor: Predictor, kind: str, scope: str = "local", density: str = "0.2") -> dict[str, float]:
    return {name: found["recall"] for name, found in predictor.report["found"][kind][scope][density].items()}


@pytest.fixture(scope="module")
def told(plant: Plant, small_facts: OptFacts) -> Predictor:
    """Trained where the context says which units matter."""
    return train(plant(dependent=True), small_facts, OPTIONS)


@pytest.fixture(scope="module")
def untold(plant: Plant, small_facts: OptFacts) -> Predictor:
    """Trained where the context says nothing."""
    return train(plant(dependent=False), small_facts, OPTIONS)


@pytest.mark.parametrize("scope", ["local", "global"])
@pytest.mark.parametrize("kind", ["heads", "neurons"])
def test_predictor_beats_every_static_ranking_when_the_context_decides(told: Predictor, kind: str, scope: str) -> None:
    found = recalls(told, kind, scope)
    assert set(found) == {"predictor", "static", "normalised", "random"}
    assert found["predictor"] > max(found["static"], found["normalised"], found["random"]) + CLEAR_GAIN
    assert found["predictor"] > 0.85


@pytest.mark.parametrize("kind", ["heads", "neurons"])
def test_predictor_claims_no_gain_when_the_context_says_nothing(untold: Predictor, kind: str) -> None:
    found = recalls(untold, kind)
    assert found["predictor"] < found["normalised"] + CHANCE
    error = untold.report["error"][kind]
    assert 0.98 * error["mean"] < error["predictor"] <= error["mean"]


def test_contexts_of_other_tokens_teach_nothing(plant: Plant, small_facts: OptFacts) -> None:
    """Planted defect: inputs and targets of one trace no longer belong together."""
    trace = plant(dependent=True)
    trace.context_ME[:] = np.roll(trace.context_ME, 1, axis=0)
    found = recalls(train(trace, small_facts, OPTIONS), "neurons")
    assert found["predictor"] < found["normalised"] + CHANCE


def test_training_is_repeatable_and_seeded(plant: Plant, small_facts: OptFacts, tmp_path: Path) -> None:
    trace = plant(dependent=True, rows=160)
    options = OPTIONS.model_copy(update={"epochs": 2})
    for name in ("a", "b"):
        train(trace, small_facts, options, tmp_path / name)
    train(trace, small_facts, options.model_copy(update={"seed": 1}), tmp_path / "c")
    tensors = {name: (tmp_path / name / "predictor.safetensors").read_bytes() for name in "abc"}
    assert tensors["a"] == tensors["b"]
    assert tensors["a"] != tensors["c"]
    assert (tmp_path / "a" / "predictor.json").read_text() == (tmp_path / "b" / "predictor.json").read_text()


def test_a_saved_predictor_knows_its_origin(plant: Plant, small_facts: OptFacts, tmp_path: Path) -> None:
    events: list[Any] = []
    options = OPTIONS.model_copy(update={"epochs": 2})
    train(plant(dependent=True, rows=160), small_facts, options, tmp_path / "p", EventProgress(events.append))
    loaded = Predictor.load(tmp_path / "p", small_facts)
    assert loaded.meta["criterion"] == "plainact"
    assert loaded.meta["text"]["sha256"] == "0" * 64
    assert loaded.meta["width"] == loaded.heads.width == 32
    assert loaded.meta["training"]["epochs"] == 2
    assert set(loaded.controls) == {"static", "normalised"}
    assert loaded.report["positions"]["taught"] + loaded.report["positions"]["held_out"] == 160
    assert [event.stage[-1] for event in events if event.kind == "end"] == [
        "neuron order", "train heads", "train neurons",
    ]  # fmt: skip


def test_a_folder_with_other_things_is_refused_before_training(
    plant: Plant, small_facts: OptFacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    monkeypatch.setattr(module, "fit", None)  # would fail if it were called
    with pytest.raises(InputError, match="is not a predictor"):
        train(plant(dependent=True, rows=160), small_facts, OPTIONS, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_controls_use_the_taught_positions_only(plant: Plant, small_facts: OptFacts) -> None:
    trace = plant(dependent=True, rows=160)
    predictor = train(trace, small_facts, OPTIONS.model_copy(update={"epochs": 1}))
    taught = ~held_out(trace.sequence_M, OPTIONS.validation, OPTIONS.seed)
    np.testing.assert_allclose(predictor.controls["static"][0], trace.heads_MLH[taught, 1:].mean(0), rtol=1e-5)


def examples(seed: int = 0, rows: int = 200) -> Examples:
    rng = np.random.default_rng(seed)
    inputs_ME = minmax_scaled(rng.standard_normal((rows, 16)).astype(np.float32))
    targets_MO = np.tanh(inputs_ME @ rng.standard_normal((16, 6))).astype(np.float32)
    return Examples(inputs_ME[:160], targets_MO[:160], inputs_ME[160:], targets_MO[160:])


def test_folding_the_standardisation_into_the_weights_changes_nothing() -> None:
    rng = np.random.default_rng(0)
    part = examples()
    centre_E, spread_E = fitting.input_spread(part.inputs_ME)
    weights = [rng.standard_normal(shape).astype(np.float32) for shape in ((32, 16), (32,), (6, 32), (6,))]
    mean_O, scale = rng.standard_normal(6).astype(np.float32), 0.3
    network = fitting._folded(weights, centre_E, spread_E, mean_O, scale)
    standard_ME = torch.from_numpy((part.inputs_ME - centre_E) / spread_E)
    expected = fitting._forward([torch.from_numpy(w) for w in weights], standard_ME).numpy() * scale + mean_O
    np.testing.assert_allclose(network(part.inputs_ME), expected, atol=FOLDED, rtol=FOLDED)


def test_the_error_reported_is_the_folded_networks_own() -> None:
    part = examples()
    fitted = fit(part, 32, OPTIONS, seed=0)
    own = float(np.mean((fitted.network(part.held_inputs_ME) - part.held_targets_MO) ** 2))
    assert fitted.error == pytest.approx(own, rel=1e-3)
    assert fitted.error < fitted.mean_error
    assert fitted.epoch > 0
    assert len(fitted.curve) == OPTIONS.epochs + 1
    assert (fitted.curve[0], fitted.curve[fitted.epoch]) == (fitted.mean_error, fitted.error)
    assert fitted.error == min(fitted.curve)


def test_the_mean_is_kept_when_training_only_makes_it_worse() -> None:
    rng = np.random.default_rng(0)
    noise_MO = rng.standard_normal((60, 6)).astype(np.float32)
    part = dataclasses.replace(examples(), targets_MO=noise_MO[:40], held_targets_MO=noise_MO[40:])
    part = dataclasses.replace(part, inputs_ME=part.inputs_ME[:40], held_inputs_ME=part.held_inputs_ME[:20])
    fitted = fit(part, 256, OPTIONS.model_copy(update={"rate": 0.1, "epochs": 5}), seed=0)
    assert fitted.epoch == 0
    np.testing.assert_allclose(fitted.network(part.held_inputs_ME), np.tile(noise_MO[:40].mean(0), (20, 1)), atol=1e-5)


def test_inputs_that_never_vary_do_no_harm() -> None:
    part = examples()
    for inputs_ME in (part.inputs_ME, part.held_inputs_ME):
        inputs_ME[:, 3] = 0.5
    network = fit(part, 32, OPTIONS, seed=0).network
    assert np.isfinite(network.fc1_weight_PE).all()
    assert np.abs(network.fc1_weight_PE).max() < 1000


def test_whole_sequences_are_held_out() -> None:
    sequence_M = np.repeat(np.arange(20, dtype=np.int32), 7)
    held_M = held_out(sequence_M, 0.1, seed=0)
    assert held_M.sum() == 14
    assert not set(sequence_M[held_M]) & set(sequence_M[~held_M])
    assert not np.array_equal(held_M, held_out(sequence_M, 0.1, seed=1))


@pytest.mark.parametrize("share", [0.001, 0.999])
def test_both_parts_have_at_least_one_sequence(share: float) -> None:
    held_M = held_out(np.array([0, 0, 1, 1, 2]), share, seed=0)
    assert held_M.any()
    assert not held_M.all()


def test_one_sequence_cannot_be_split() -> None:
    with pytest.raises(InputError, match="cannot be split"):
        held_out(np.zeros(9, np.int32), 0.5, seed=0)


def test_targets_are_scaled_per_layer_and_a_layer_that_never_acts_becomes_zeros() -> None:
    scores_MLU = np.random.default_rng(0).random((5, 3, 4)).astype(np.float32)
    scores_MLU[:, 1] = 0
    scores_MLU[2, 0] = 7
    targets_MLU = layer_minmax(scores_MLU)
    assert (targets_MLU[:, 1] == 0).all()
    assert np.isnan(targets_MLU[2, 0]).all()
    assert (targets_MLU[0, 0].min(), targets_MLU[0, 0].max()) == (0, 1)


def test_positions_without_information_are_dropped_and_counted(plant: Plant, small_facts: OptFacts) -> None:
    trace = plant(dependent=True, rows=160)
    trace.heads_MLH[5, 1] = 3.0
    trace.heads_MLH[9, 2] = np.nan
    predictor = train(trace, small_facts, OPTIONS.model_copy(update={"epochs": 1}))
    assert predictor.report["positions"]["dropped"] == {"heads": 2, "neurons": 0}
    networks = predictor.heads.tensors("heads") | predictor.neurons.tensors("neurons")
    assert all(np.isfinite(value).all() for value in networks.values())


def test_scores_that_never_vary_together_are_refused(plant: Plant, small_facts: OptFacts) -> None:
    trace = plant(dependent=True, rows=160)
    trace.heads_MLH[::2, 1] = 1.0
    trace.heads_MLH[1::2, 2] = 1.0
    with pytest.raises(InputError, match="nothing to learn"):
        train(trace, small_facts, OPTIONS)


def test_a_trace_of_another_model_is_refused(plant: Plant, small_facts: OptFacts) -> None:
    other = dataclasses.replace(small_facts, name="opt-other", heads=8, ffn=128)
    with pytest.raises(InputError, match="is not of opt-other: heads 4, expected 8; ffn 64, expected 128"):
        train(plant(dependent=True, rows=160), other, OPTIONS)


def test_a_block_as_large_as_a_layer_is_refused(plant: Plant, small_facts: OptFacts) -> None:
    with pytest.raises(InputError, match="leaves one unit"):
        train(plant(dependent=True, rows=160), small_facts, OPTIONS.model_copy(update={"neuron_block": 64}))
