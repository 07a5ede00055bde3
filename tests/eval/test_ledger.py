# SPDX-License-Identifier: Apache-2.0
"""Effective sparsity is the share of a dense token's layer bytes that is not read; a predictor counts as read."""

from __future__ import annotations

from pathlib import Path

import pytest

from shadowc.eval.ledger import Ledger
from shadowc.eval.load import engine_model
from shadowc.eval.request import Setting
from shadowc.eval.run import evaluate, settings_of
from shadowc.eval.texts import corpus_of
from shadowc.eval.torch_model import TorchModel
from shadowc.sparsity.predictor import Predictor
from shadowc.spec.density import Density
from tests.eval.conftest import PROSE

HALF = Density(0.5, 0.5)


def test_torch_counts_the_matrices_of_the_layers(in_torch: TorchModel, predictor_folder: Path) -> None:
    ledger, config = in_torch.ledger, in_torch._model.config
    hidden, ffn = config.hidden_size, config.ffn_dim
    assert ledger.layers == config.num_hidden_layers
    assert (ledger.attention, ledger.neurons) == (4 * 4 * hidden * hidden, 4 * 2 * hidden * ffn)
    assert ledger.own == ledger.attention / 2  # q and out_proj; k and v are read for heads that sleep, too
    assert ledger.predictor == 4 * Predictor.load(predictor_folder).parameters


def test_layer_0_is_dense_and_the_predictor_is_read_per_mask() -> None:
    ledger = Ledger(layers=4, attention=100, own=50, held=100, neurons=200, predictor=30)
    assert ledger.dense == 1200
    assert ledger.read(Setting("static", HALF), 1, 1) == 1200
    assert ledger.read(Setting("static", HALF), 0, 0) == 300 + 3 * 50
    assert ledger.read(Setting("predictor", HALF), 0.5, 0.25) == 300 + 3 * (75 + 50) + 30
    assert ledger.read(Setting("predictor", HALF, "prompt"), 0.5, 0.25) == 300 + 3 * (50 + 50)
    assert ledger.sparsity(Setting("predictor", HALF), 1, 1) == pytest.approx(-30 / 1200)


def test_a_mask_that_is_made_anew_asks_the_predictor_again() -> None:
    ledger = Ledger(layers=2, attention=100, own=50, held=100, neurons=200, predictor=30, refresh=10)
    assert ledger.read(Setting("predictor", HALF, "prompt"), 0.5, 0.5) == 300 + 75 + 100 + 3


@pytest.mark.parametrize("mask", ["token", "sequence"])
def test_an_engine_in_fp32_has_the_sparsity_that_torch_says(
    in_torch: TorchModel, engine_folders: dict[str, Path], mask: str
) -> None:
    engine = engine_model(engine_folders[mask])
    settings = settings_of(["predictor", "static"], [HALF], engine.protocols[:1])
    rows = [
        evaluate(model, [corpus_of(model, "prose", [PROSE], "0", 32)], settings).rows for model in (in_torch, engine)
    ]
    for one, other in zip(*rows, strict=True):
        assert one.sparsity == pytest.approx(other.sparsity, abs=0.01)  # an engine's records have scales
    static = rows[0][2]
    assert static.sparsity == pytest.approx(0.5 * (1 - 1 / in_torch.ledger.layers), abs=0.15)


def test_where_no_token_is_masked_nothing_is_saved_and_no_predictor_is_read(in_torch: TorchModel) -> None:
    pairs = corpus_of(in_torch, "pairs of tokens", [PROSE], "0", 2)  # the first of two is dense, the second predicted
    dense, predicted = evaluate(in_torch, [pairs], settings_of(["predictor"], [HALF], ("decode",))).rows
    assert (predicted.setting.method, predicted.masked_share) == ("predictor", 0)
    assert (predicted.sparsity, predicted.bytes_read) == (0, dense.bytes_read)
