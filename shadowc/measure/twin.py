# SPDX-License-Identifier: Apache-2.0
"""A graph for TensorRT as stock ONNX Runtime can run it on the CPU: what compile checks where no GPU is.

The twin has the graph's own nodes and the engine's own weights.bin. Operators run as their ONNX functions; in the
float32 twin every 16-bit activation is float32, so that what is left against torch is the rounding of the weights.

Letters: B batch, S new tokens, Z masked tokens, T cache capacity, H heads, D head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes  # noqa: F401 (makes "bfloat16" a numpy type)
import numpy as np
import onnx
from onnx import TensorProto, helper

from shadowc.measure.overflow import NARROW, narrow_activations
from shadowc.spec.density import Density
from shadowc.spec.oracle_tensorrt import attach_tensorrt

if TYPE_CHECKING:
    import numpy.typing as npt

    from shadowc.runtime.decoder import ModelSizes
    from shadowc.spec.manifest import WeightPart

    Ids = npt.NDArray[np.int64]
    Outputs = dict[str, npt.NDArray[Any]]

_LARGEST = "largest."
_INNER = ("residual.", "scores.", "threshold.")


def mapped_weights(path: Path, table: Iterable[WeightPart]) -> dict[str, npt.NDArray[Any]]:
    """Every tensor of weights.bin as a view of the mapped file."""
    whole = np.memmap(path, np.uint8, mode="r")
    return {
        part.name: whole[part.offset : part.offset + part.bytes].view(np.dtype(part.dtype)).reshape(part.shape)
        for part in table
    }


def float32_twin(model: onnx.ModelProto, weights: Iterable[str]) -> onnx.ModelProto:
    """The graph with float32 activations, operators as functions, and inner tensors as outputs.

    Of every activation that has 16 bits in the graph, the largest absolute value is an output too; see GraphRunner.

    Args:
        model: a graph that compile wrote for TensorRT; weights are inputs.
        weights: names of the weights, which keep their types.
    """
    twin = onnx.ModelProto()
    twin.CopyFrom(model)
    graph, kept = twin.graph, set(weights)
    narrowed = narrow_activations(graph, kept)
    for value in (*graph.input, *graph.output, *graph.value_info):
        if value.name not in kept and value.type.tensor_type.elem_type in NARROW:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i in NARROW:
                attribute.i = TensorProto.FLOAT
    _widen_weights(graph, kept)
    known = {output.name for output in graph.output}
    shapes = {name for node in graph.node for name in node.output if name.startswith(_INNER)}
    for name in sorted(shapes - known):
        if not name.endswith((".float32", ".float16", ".bfloat16")):
            graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    for name in narrowed:
        size, largest = f"{name}.size", f"{_LARGEST}{name}"
        graph.node.append(helper.make_node("Abs", [name], [size], size))
        graph.node.append(helper.make_node("ReduceMax", [size], [largest], largest, keepdims=0))
        graph.output.append(helper.make_tensor_value_info(largest, TensorProto.FLOAT, []))
    return attach_tensorrt(twin)


def _widen_weights(graph: onnx.GraphProto, weights: set[str]) -> None:
    """Let standard nodes read weights as float32, and not before their layer's turn.

    ONNX Runtime runs what depends on inputs alone whenever it likes; all layers' weights would be float32 at once.
    The functions of the operators do both by themselves.
    """
    narrow = {value.name for value in graph.input if value.type.tensor_type.elem_type in NARROW}
    made: dict[str, str] = {}
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        for position, name in enumerate(() if node.domain else node.input):
            if name not in weights:
                continue
            if name not in made:
                made[name] = name
                if name.startswith("layers."):
                    nodes += _after(name, f"residual.{name.split('.')[1]}")
                    made[name] = f"{name}.later"
                if name in narrow and node.op_type != "Cast":
                    cast = f"{name}.wide"
                    nodes.append(helper.make_node("Cast", [made[name]], [cast], cast, to=TensorProto.FLOAT))
                    made[name] = cast
            node.input[position] = made[name]
        nodes.append(node)
    kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(kept)


def _after(weight: str, tensor: str) -> list[onnx.NodeProto]:
    """Nodes that give the weight again, as `.later`, but only when the tensor is there; nothing is copied."""
    zero, sizes = f"{weight}.zero", f"{weight}.sizes"
    nothing = helper.make_tensor(zero, TensorProto.INT64, [1], [0])
    return [
        helper.make_node("Constant", [], [zero], zero, value=nothing),
        helper.make_node("Shape", [tensor], [f"{sizes}.seen"], f"{sizes}.seen", start=0, end=1),
        helper.make_node("Mul", [f"{sizes}.seen", zero], [f"{sizes}.nothing"], f"{sizes}.nothing"),
        helper.make_node("Shape", [weight], [f"{sizes}.own"], f"{sizes}.own"),
        helper.make_node("Add", [f"{sizes}.own", f"{sizes}.nothing"], [sizes], sizes),
        helper.make_node("Reshape", [weight, sizes], [f"{weight}.later"], f"{weight}.later"),
    ]


class GraphRunner:
    """A graph in stock ONNX Runtime whose weights are fed from memory that somebody else holds.

    Args:
        model: the graph; operators as functions.
        weights: name -> array; bfloat16 included.
        threads: threads of ONNX Runtime.
    """

    def __init__(self, model: onnx.ModelProto, weights: Mapping[str, npt.NDArray[Any]], threads: int) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.log_severity_level, options.intra_op_num_threads = 3, threads
        self._session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        self._outputs = [value.name for value in self._session.get_outputs()]
        self.outputs = tuple(name for name in self._outputs if not name.startswith(_LARGEST))
        self.largest: dict[str, float] = {}
        """Largest absolute value that a tensor had in any run, for those that the twin measures, in their order."""
        self._inputs = {value.name for value in self._session.get_inputs()}
        self._weights = {name: _value(array) for name, array in weights.items() if name in self._inputs}
        self._arrays = dict(weights)  # ONNX Runtime borrows their memory

    def run(self, feeds: Mapping[str, npt.NDArray[Any]]) -> Outputs:
        """Run once; 16-bit results come as float32."""
        given = {name: _value(array) for name, array in feeds.items() if name in self._inputs}
        found = self._session.run_with_ort_values(self._outputs, {**self._weights, **given})
        values = {name: value.numpy() for name, value in zip(self._outputs, found, strict=True)}
        for name in self._outputs:
            if name.startswith(_LARGEST):
                tensor = name.removeprefix(_LARGEST)
                self.largest[tensor] = float(np.maximum(self.largest.get(tensor, 0), values[name]))  # a NaN stays
        return {name: values[name] for name in self.outputs}


def _value(array: npt.NDArray[Any]) -> Any:
    import onnxruntime as ort

    if array.dtype == np.dtype("bfloat16"):
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint16), int(TensorProto.BFLOAT16))
    return ort.OrtValue.ortvalue_from_numpy(array)


class DecodeProbe:
    """Unpadded tokens through the twin of a decode graph; the cache goes on from step to step.

    Args:
        runner: the twin.
        model: its sizes.
        dtype: type of the cache.
        capacity: slots of the cache.
    """

    def __init__(self, runner: GraphRunner, model: ModelSizes, *, dtype: str = "float32", capacity: int = 32) -> None:
        self._runner, self._model = runner, model
        self._dtype, self._capacity = np.dtype(dtype), capacity
        self._cache: Outputs = {}
        self._filled = 0

    def step(self, ids_BS: Ids, *, density: Density, sparse_tail: int) -> Outputs:
        """Run the next tokens: those before the sparse tail at density 1, the tail at `density`; see parity.Probe."""
        tokens = ids_BS.shape[1]
        masked = (1 if tokens == 1 else 0) if sparse_tail < 0 else min(sparse_tail, tokens)
        parts = []
        if tokens > masked:
            parts.append(self._run(ids_BS[:, : tokens - masked], Density()))
        if masked:
            parts.append(self._run(ids_BS[:, tokens - masked :], density))
        last = parts[-1]
        per_token = [name for name in last if name.startswith(("residual.", "logits"))]
        return {**last, **{name: np.concatenate([part[name] for part in parts], axis=1) for name in per_token}}

    def _run(self, ids_BS: Ids, density: Density) -> Outputs:
        rows, tokens = ids_BS.shape
        shape = rows, self._model.heads, self._capacity, self._model.head_size
        names = [f"{layer}.{kind}" for layer in range(self._model.layers) for kind in ("key", "value")]
        if not self._cache:
            self._cache = {name: np.zeros(shape, self._dtype) for name in names}
        feeds: dict[str, npt.NDArray[Any]] = {
            "input_ids": np.ascontiguousarray(ids_BS, np.int64),
            "past": np.full(rows, self._filled, np.int64),
            "start": np.zeros(rows, np.int64),
            "density_heads": np.full(rows, density.heads, np.float32),
            "density_neurons": np.full(rows, density.neurons, np.float32),
            **{f"past_key_values.{name}": array for name, array in self._cache.items()},
        }
        found = self._runner.run(feeds)
        self._cache = {name: found[f"present.{name}"] for name in names}
        self._filled += tokens
        return {name: value for name, value in found.items() if not name.startswith("present.")}
