# SPDX-License-Identifier: Apache-2.0
"""What a chain that runs several times needs: the next token is the largest logit, and what runs leave to the next."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto, helper

from shadowc.runtime import chains
from shadowc.spec.ops import DOMAIN, NEXT_TOKEN
from shadowc.spec.tensors import BANNED, END, RUNS
from tests.runtime.test_chains import WIDTH, model_of, product, session_of, set_attribute


def choosing() -> onnx.ModelProto:
    """NextToken of x, as it is, in a chain."""
    steps = [helper.make_node("Relu", ["x"], ["unread"]), helper.make_node(NEXT_TOKEN, ["x", BANNED], ["ids"], "ids")]
    node = chains._chain("chain", steps, ["unread", "ids"], {}, None)
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, None),
        helper.make_tensor_value_info(BANNED, TensorProto.INT64, None),
    ]
    kinds = {"unread": TensorProto.FLOAT, "ids": TensorProto.INT64}
    outputs = [helper.make_tensor_value_info(name, kind, None) for name, kind in kinds.items()]
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(helper.make_graph([node], "g", inputs, outputs), opset_imports=opsets, ir_version=10)


@pytest.fixture(scope="module")
def chooser() -> onnxruntime.InferenceSession:
    return session_of(choosing())


def chosen(chooser: onnxruntime.InferenceSession, logits_BSV: np.ndarray, banned: int) -> np.ndarray:
    found: np.ndarray = chooser.run(["ids"], {"x": logits_BSV, BANNED: np.array([banned])})[0]
    return found


VALUES = st.sampled_from([0.0, -0.0, 1.0, 1.5, -2.0, float("inf"), float("-inf"), float("nan")]) | st.floats(width=32)
LOGITS = hnp.arrays(np.float32, st.tuples(st.integers(0, 2), st.integers(1, 2), st.integers(1, 70)), elements=VALUES)


@given(LOGITS, st.integers(-1, 80))
def test_the_next_token_is_numpys_argmax(
    chooser: onnxruntime.InferenceSession, logits_BSV: np.ndarray, banned: int
) -> None:
    rest = logits_BSV[:, -1].copy()
    if 0 <= banned < rest.shape[1]:
        rest[:, banned] = -np.inf
    np.testing.assert_array_equal(chosen(chooser, logits_BSV, banned)[:, 0], rest.argmax(axis=1))


@pytest.mark.parametrize("at", [0, 31, 2047, 2048, 4095, 4096, 4999])
@pytest.mark.parametrize("value", [9.0, float("nan")])
def test_the_first_of_the_largest_is_found_in_every_part(
    chooser: onnxruntime.InferenceSession, at: int, value: float
) -> None:
    logits = np.random.default_rng(at).uniform(-1, 1, (1, 1, 5000)).astype(np.float32)
    logits[0, 0, [at, *range(at + 1, 5000, 700)]] = value
    assert chosen(chooser, logits, -1) == [[at]]
    assert chosen(chooser, logits, at) == [
        [logits[0, 0, at + 1 :].argmax() + at + 1 if at < 4999 else logits[0, 0, :at].argmax()]
    ]


@pytest.mark.parametrize(
    ("logits", "banned", "says"),
    [
        ((2, 3), [0], r"NextToken node 'ids': logits must be \[B, S, V\], found \[2, 3\]"),
        ((1, 1, 0), [0], "S and V of logits must be at least 1"),
        ((1, 0, 5), [0], "S and V of logits must be at least 1"),
        ((1, 1, 5), [0, 1], r"banned must be \[1\] = \[1\], found \[2\]"),
    ],
)
def test_what_is_no_logits_is_refused(
    chooser: onnxruntime.InferenceSession, logits: tuple[int, ...], banned: list[int], says: str
) -> None:
    with pytest.raises(Exception, match=says):
        chooser.run(None, {"x": np.zeros(logits, np.float32), BANNED: np.array(banned)})


# ---- what a chain refuses


def looped() -> tuple[onnx.ModelProto, onnx.NodeProto]:
    """A chain that adds a product to a number as often as it is told, and puts out all of them."""
    nodes = [product("x", "y"), helper.make_node("Add", ["count", "one"], ["next"], "next")]
    model = model_of(nodes, ["y"])
    model.graph.input.extend(
        helper.make_tensor_value_info(name, TensorProto.INT64, None) for name in ("count", RUNS, END)
    )
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([1]), "one"))
    model.graph.output.append(helper.make_tensor_value_info("next", TensorProto.INT64, None))
    runs = Counting()
    chain = chains._chain("chain", list(model.graph.node), ["y", "next"], {}, runs)  # type: ignore[arg-type]
    del model.graph.node[:]
    model.graph.node.append(chain)
    return model, model.graph.node[0]


class Counting:
    inputs = (RUNS, END)

    def attributes(self, values: dict[str, int]) -> dict[str, Any]:
        carried = [values["x"], values["y"], values["count"], values["next"]]
        until = [values["next"], values[END]]
        return {"times": values[RUNS], "carried": carried, "each": [values["next"]], "until": until}


def counted(model: onnx.ModelProto, runs: Any = (5, 3), end: Any = (-1,), count: Any = (10,)) -> list[np.ndarray]:
    feeds = {
        "x": np.ones((1, 2, WIDTH), np.float32),
        "count": np.array(count),
        RUNS: np.array(runs),
        END: np.array(end),
    }
    found: list[np.ndarray] = session_of(model).run(None, feeds)
    return found


def test_a_chain_runs_as_often_as_it_is_told_and_puts_out_what_each_run_made() -> None:
    model, _ = looped()
    once = np.ones((1, 2, WIDTH), np.float32)
    for _ in range(3):
        (once, _) = counted_once(model, once)
    y, numbers = counted(model)
    np.testing.assert_array_equal(y, once)
    assert (numbers.shape, numbers[:3].tolist()) == ((5,), [11, 12, 13])
    assert counted(model, end=(12,))[1][:2].tolist() == [11, 12]
    np.testing.assert_array_equal(counted(model, end=(12,))[0], counted(model, runs=(2, 2))[0])


def counted_once(model: onnx.ModelProto, x: np.ndarray) -> list[np.ndarray]:
    feeds = {"x": x, "count": np.array([0]), RUNS: np.array([1, 1]), END: np.array([-1])}
    found: list[np.ndarray] = session_of(model).run(None, feeds)
    return found


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("times", 99, "how often it runs is no input"),
        ("carried", [0], "values and inputs go in pairs"),
        ("carried", [99, 7], "a pair without an input"),
        ("carried", [-1, 7], "a pair without an input"),
        ("carried", [0, 0], "a value that no earlier step makes"),
        ("until", [7, 0, 1], "values and inputs go in pairs"),
        ("until", [7, 99], "a pair without an input"),
        ("each", [99], "a value that no earlier step makes"),
    ],
)
def test_a_chain_whose_runs_are_wrong_is_refused(name: str, value: Any, says: str) -> None:
    model, chain = looped()
    set_attribute(chain, name, value)
    with pytest.raises(Exception, match=says):
        counted(model)


@pytest.mark.parametrize(
    ("of", "says"),
    [
        ({"runs": (3,)}, r"runs must be int64 \[2\]"),
        ({"runs": (3, 4)}, r"runs must be int64 \[2\]"),
        ({"runs": (3, 0)}, r"runs must be int64 \[2\]"),
        ({"runs": (3.0, 1.0)}, "INT64|int64"),
        ({"end": (1, 2)}, "what ends its runs must be one int64"),
        ({"count": 10}, r"input \d would change from run to run to \[1\], int64"),
    ],
)
def test_a_call_that_asks_for_what_cannot_be_is_refused(of: dict[str, Any], says: str) -> None:
    model, _ = looped()
    with pytest.raises(Exception, match=says):
        counted(model, **of)


def test_what_each_run_puts_out_is_a_result() -> None:
    model, chain = looped()
    set_attribute(chain, "results", [7])
    del chain.output[1], model.graph.output[1]
    with pytest.raises(Exception, match="what each run puts out is no result"):
        counted(model)


def test_what_each_run_puts_out_has_an_axis() -> None:
    model, _ = looped()
    model.graph.initializer[-1].CopyFrom(onnx.numpy_helper.from_array(np.array(1), "one"))
    with pytest.raises(Exception, match="output 1 has no axis for its runs"):
        counted(model, count=10)


def test_steps_of_onnx_refuse_what_is_not_given() -> None:
    model, chain = looped()
    set_attribute(chain, "1.inputs", [1, -1])
    with pytest.raises(Exception, match="Add node 'next': input 1 must be of at most 6 axes, found nothing"):
        counted(model)
