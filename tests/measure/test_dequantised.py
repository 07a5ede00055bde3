# SPDX-License-Identifier: Apache-2.0
"""The rounding that parity models is the one that ONNX Runtime does."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from shadowc.emit.records import in_quads, quantise_nbits, quantise_rows
from shadowc.measure.dequantised import PRODUCT_BLOCKS, RoundedPredictor
from shadowc.sparsity.networks import LayerNetworks, Network, minmax_scaled
from shadowc.sparsity.predictor import Predictor
from shadowc.spec.ops import PREDICT_UNITS
from tests.plugins import kernels

TOLERANCE = 2e-3
"""Of the spread of the scores: single activations at a rounding tie may fall either way."""
HEADS, UNITS, LAYERS = 4, 12, 3

Floats = npt.NDArray[np.float32]


def products(network: Network, scaled_ME: Floats) -> Floats:
    """The network in ONNX Runtime, both products by MatMulNBits."""
    nodes, values, source = [], [], "scaled"
    for name, weight, bias in (
        ("fc1", network.fc1_weight_PE, network.fc1_bias_P),
        ("fc2", network.fc2_weight_OP, network.fc2_bias_O),
    ):
        N, K = weight.shape
        block = next(length for length in PRODUCT_BLOCKS if K % length == 0)
        packed = (*quantise_nbits(weight, block), bias)
        operands = [f"{name}.{part}" for part in ("values", "scales", "bias")]
        values += [numpy_helper.from_array(array, operand) for array, operand in zip(packed, operands, strict=True)]
        attributes = {"K": K, "N": N, "bits": 8, "block_size": block, "accuracy_level": 4}
        product = [source, *operands[:2]]
        nodes.append(
            helper.make_node("MatMulNBits", product, [f"{name}.product"], domain="com.microsoft", **attributes)
        )
        nodes.append(helper.make_node("Add", [f"{name}.product", operands[2]], [name]))
        if name == "fc1":
            nodes.append(helper.make_node("Relu", ["fc1"], ["hidden"]))
        source = "hidden"
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("scaled", "fc2")]
    graph = helper.make_graph(nodes, "network", ends[:1], ends[1:], values)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found: Floats = session.run(None, {"scaled": scaled_ME})[0]
    return found


@pytest.mark.parametrize(("hidden", "width"), [(64, 32), (256, 224), (768, 1024)])
def test_rounded_predictor_scores_as_matmulnbits_does(hidden: int, width: int) -> None:
    rng = np.random.default_rng(hidden)
    networks = [Network.random(rng, hidden, width, LAYERS * units) for units in (HEADS, UNITS)]
    orders = np.tile(np.arange(UNITS, dtype=np.int32), (LAYERS, 1))
    predictor = Predictor(*networks, layers=LAYERS, block=1, orders_LF=orders)
    context_ME = rng.standard_normal((9, hidden), dtype=np.float32)
    pairs = zip(networks, predictor.scores(context_ME), RoundedPredictor(predictor).scores(context_ME), strict=True)
    for network, unrounded, rounded in pairs:
        assert rounded.shape == unrounded.shape
        found = products(network, minmax_scaled(context_ME)).reshape(rounded.shape)
        difference = np.abs(found - rounded).max() / np.ptp(unrounded)
        assert difference < TOLERANCE
        assert difference < np.abs(found - unrounded).max() / np.ptp(unrounded) / 2


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


def test_a_width_that_no_block_divides_stays_float() -> None:
    rng = np.random.default_rng(0)
    networks = [Network.random(rng, 40, 20, 2 * units) for units in (HEADS, UNITS)]
    predictor = Predictor(*networks, layers=2, block=1, orders_LF=np.zeros((2, UNITS), np.int32))
    context_ME = rng.standard_normal((3, 40), dtype=np.float32)
    for exact, rounded in zip(
        predictor.scores(context_ME), RoundedPredictor(predictor).scores(context_ME), strict=True
    ):
        np.testing.assert_array_equal(exact, rounded)
