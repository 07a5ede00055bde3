# SPDX-License-Identifier: Apache-2.0
"""The rounding that parity models is the one that engines have."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from shadowc.emit.records import in_quads, quantise_rows
from shadowc.measure.dequantised import RoundedPredictor
from shadowc.sparsity.networks import LayerNetworks, Network, minmax_scaled
from shadowc.sparsity.predictor import Predictor
from shadowc.spec.ops import MATMUL_ROWS, PREDICT_UNITS
from tests.plugins import kernels

HEADS, UNITS, LAYERS = 4, 12, 3

Floats = npt.NDArray[np.float32]


def product(x_ME: Floats, weight_NE: Floats) -> Floats:
    """What an engine makes of both: by rows of int8."""
    rows, scales = quantise_rows(weight_NE)
    found: Floats = kernels.run(MATMUL_ROWS, {"x": x_ME[:, None], "w": rows, "scales": scales})["y"][:, 0]
    return found


@pytest.mark.parametrize(("hidden", "width"), [(64, 32), (250, 21), (768, 1024)])
def test_a_rounded_predictor_of_all_layers_scores_as_its_products_do(hidden: int, width: int) -> None:
    rng = np.random.default_rng(hidden)
    networks = [Network.random(rng, hidden, width, LAYERS * units) for units in (HEADS, UNITS)]
    orders = np.tile(np.arange(UNITS, dtype=np.int32), (LAYERS, 1))
    predictor = Predictor(*networks, layers=LAYERS, block=1, orders_LF=orders)
    context_ME = rng.standard_normal((9, hidden), dtype=np.float32)
    pairs = zip(networks, predictor.scores(context_ME), RoundedPredictor(predictor).scores(context_ME), strict=True)
    for network, unrounded, rounded in pairs:
        hidden_MP = network.activated(product(minmax_scaled(context_ME), network.fc1_weight_PE) + network.fc1_bias_P)
        found = (product(hidden_MP, network.fc2_weight_OP) + network.fc2_bias_O).reshape(rounded.shape)
        np.testing.assert_allclose(found, rounded, rtol=0, atol=2e-5 * np.ptp(unrounded))
        assert np.abs(found - unrounded).max() > 1e-3 * np.ptp(unrounded)


def test_a_rounded_predictor_of_layers_scores_as_the_operator_of_a_layer_does() -> None:
    rng = np.random.default_rng(1)
    kinds = [
        LayerNetworks(tuple(Network.random(rng, 96, 40, units) for _ in range(LAYERS))) for units in (HEADS, UNITS)
    ]
    orders = np.tile(np.arange(UNITS, dtype=np.int32), (LAYERS, 1))
    predictor = Predictor(*kinds, layers=LAYERS, block=1, orders_LF=orders)
    read_MLE = rng.standard_normal((9, LAYERS, 96), dtype=np.float32)
    pairs = zip(kinds, predictor.scores(read_MLE), RoundedPredictor(predictor).scores(read_MLE), strict=True)
    for networks, unrounded, rounded in pairs:
        for layer, network in enumerate(networks.networks):
            operands = {"x": read_MLE[:, None, layer], "tail": np.array([1]), "density": np.ones((1, 1), np.float32)}
            for part, weight, bias in (
                ("1", network.fc1_weight_PE, network.fc1_bias_P),
                ("2", network.fc2_weight_OP, network.fc2_bias_O),
            ):
                rows, scales = quantise_rows(weight)
                rows = in_quads(rows) if part == "2" else rows
                operands |= {f"w{part}": rows, f"scales{part}": scales, f"b{part}": bias}
            found = kernels.run(PREDICT_UNITS, operands, relu=1)["scores"][:, 0, 0]
            np.testing.assert_allclose(found, rounded[:, layer], rtol=0, atol=2e-5)
            assert np.abs(found - unrounded[:, layer]).max() > 1e-3
