# SPDX-License-Identifier: Apache-2.0
"""ONNX's own operators are steps of a chain as far as chains compute what ONNX Runtime does."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from shadowc.runtime.chains import chained
from shadowc.runtime.standard_steps import is_standard_step
from shadowc.spec.ops import CHAIN
from tests.runtime.test_chains import WIDTH, model_of, product, session_of

NORM = 1e-6
"""What a norm may differ by, of values of about 1: its sums are in another order than ONNX Runtime's."""


@pytest.mark.parametrize(
    "node",
    [
        helper.make_node("LayerNormalization", ["a", "row", "row"], ["b"], axis=1),
        helper.make_node("LayerNormalization", ["a", "row"], ["b"]),
        helper.make_node("LayerNormalization", ["a", "row", "row"], ["b", "mean"]),
        helper.make_node("ReduceMax", ["a", "i-1"], ["b"], keepdims=0),
        helper.make_node("ReduceMax", ["a"], ["b"]),
        helper.make_node("Slice", ["a", "i0", "i5", "i1", "i1"], ["b"]),
        helper.make_node("Max", ["a", "row", "row"], ["b"]),
        helper.make_node("Reshape", ["a", "i-1"], ["b"], allowzero=1),
        helper.make_node("Gather", ["a", "i0"], ["b"], axis=1),
        helper.make_node("Cast", ["a"], ["b"], to=TensorProto.FLOAT16),
    ],
    ids=lambda node: f"{node.op_type}-{len(node.input)}-{len(node.output)}",
)
def test_what_steps_cannot_do_stays_a_node(node: onnx.NodeProto) -> None:
    kinds = {"a": TensorProto.FLOAT, "row": TensorProto.FLOAT}
    assert not is_standard_step(node, kinds | dict.fromkeys(("i-1", "i0", "i1", "i5"), TensorProto.INT64))


def test_doubles_are_no_steps() -> None:
    assert is_standard_step(helper.make_node("Relu", ["a"], ["b"]), {"a": TensorProto.FLOAT})
    assert not is_standard_step(helper.make_node("Relu", ["a"], ["b"]), {"a": TensorProto.DOUBLE})
    assert not is_standard_step(helper.make_node("Relu", ["a"], ["b"]), {})


@pytest.mark.parametrize("kind", [TensorProto.INT64, TensorProto.INT32])
def test_steps_take_indices_of_int64(kind: int) -> None:
    kinds = {"a": TensorProto.FLOAT, "i": kind}
    for node in (
        helper.make_node("Gather", ["a", "i"], ["b"]),
        helper.make_node("Slice", ["a", "i", "i", "i"], ["b"]),
    ):
        assert is_standard_step(node, kinds) == (kind == TensorProto.INT64)


def test_rows_of_a_table_and_a_norm_are_those_of_onnx_runtime() -> None:
    rng = np.random.default_rng(4)
    table = onnx.numpy_helper.from_array(rng.standard_normal((5, WIDTH), np.float32), "table")
    gather = helper.make_node("Gather", ["table", "ids"], ["rows"])
    norm = helper.make_node("LayerNormalization", ["rows", "row", "bias"], ["normal"], epsilon=0.1)
    model = model_of([gather, norm, product("normal", "y")], ["rows", "normal", "y"])
    model.graph.initializer.append(table)
    for name in ("row", "bias"):
        model.graph.initializer.append(onnx.numpy_helper.from_array(rng.standard_normal(WIDTH, np.float32), name))
    del model.graph.input[:]
    model.graph.input.append(helper.make_tensor_value_info("ids", TensorProto.INT64, ["B", "S"]))
    (chain,) = chained(model).graph.node
    assert chain.op_type == CHAIN
    ids = np.array([[0, 4, -1], [-5, 2, 2]])
    found, wanted = (session_of(one).run(None, {"ids": ids}) for one in (chained(model), model))
    np.testing.assert_array_equal(found[0], wanted[0])
    for one, other in zip(found[1:], wanted[1:], strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=NORM)
    with pytest.raises(Exception, match=r"Gather node '.*': indices must be within 5 rows, found 5"):
        session_of(chained(model)).run(None, {"ids": ids + 1})
