# SPDX-License-Identifier: Apache-2.0
"""The graphs that benchmarks/tensorrt makes compute what their originals do: a refusal is the builder's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from benchmarks.tensorrt.graphs import PROMPT, joined, with_constants
from shadowc.spec.manifest import WEIGHTS_FILE, WeightPart

X, W = np.array([1, 2, 3], np.float32), np.array([4, 5, 6], np.float32)
WEIGHT = WeightPart(name="w", dtype="float32", shape=(3,), offset=256, bytes=W.nbytes)
# The same names inside both: y of the other branch, or its constant, would show.
GRAPHS = {"prefill": ("Mul", 10.0, 10 * (X * W)), "decode": ("Add", 100.0, 100 * (X + W))}


def graph(operator: str, factor: float) -> onnx.ModelProto:
    text = f"""<ir_version: 10, opset_import: ["" : 20]>
    g (float[3] x, float[3] w) => (float[3] y) <float[1] f = {{{factor}}}> {{
      t = {operator} (x, w)
      y = Mul (t, f)
    }}"""
    made: onnx.ModelProto = onnx.parser.parse_model(text)
    for node in made.graph.node:
        node.name = node.output[0]
    return made


def run(model: onnx.ModelProto, folder: Path, **inputs: np.ndarray) -> np.ndarray:
    (folder / WEIGHTS_FILE).write_bytes(bytes(WEIGHT.offset) + W.tobytes())
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    onnx.checker.check_model(folder / "model.onnx")
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    assert {value.name for value in session.get_inputs()} == set(inputs)
    outputs: list[np.ndarray] = session.run(["y"], inputs)
    return outputs[0]


@pytest.mark.parametrize("name", GRAPHS)
def test_weights_as_constants_are_read_from_the_weights_file(name: str, tmp_path: Path) -> None:
    operator, factor, expected = GRAPHS[name]
    assert np.array_equal(run(with_constants(graph(operator, factor), [WEIGHT]), tmp_path, x=X), expected)


@pytest.mark.parametrize("constants", [False, True])
@pytest.mark.parametrize("name", GRAPHS)
def test_the_joined_graph_computes_the_chosen_branch(name: str, constants: bool, tmp_path: Path) -> None:
    both = joined(*(graph(operator, factor) for operator, factor, _ in GRAPHS.values()))
    assert [node.op_type for node in both.graph.node] == ["If"]
    inputs = {"x": X, PROMPT: np.array(name == "prefill")} | ({} if constants else {"w": W})
    model = with_constants(both, [WEIGHT]) if constants else both
    assert np.array_equal(run(model, tmp_path, **inputs), GRAPHS[name][2])
