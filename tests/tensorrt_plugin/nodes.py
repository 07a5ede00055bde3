# SPDX-License-Identifier: Apache-2.0
"""One-node ONNX models of the shadowc operators as TensorRT gets them: GPU weight layout, weights as constants."""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

ONNX_TYPES = {
    "f32": TensorProto.FLOAT,
    "f16": TensorProto.FLOAT16,
    "bf16": TensorProto.BFLOAT16,
    "i8": TensorProto.INT8,
    "i32": TensorProto.INT32,
    "i64": TensorProto.INT64,
}


@dataclass(frozen=True)
class Shapes:
    """Sizes of the toy node; Z and T are dynamic like B and S where a profile says so."""

    heads: int = 2
    head_size: int = 64
    hidden: int = 128
    neurons: int = 96
    block: int = 16
    layers: int = 3
    capacity: int = 256


@dataclass(frozen=True)
class Node:
    """One operator: inputs and outputs as (name, type, shape); dynamic axes are strings, weights have no profile."""

    op: str
    inputs: tuple[tuple[str, str, tuple[int | str, ...]], ...]
    outputs: tuple[tuple[str, str, tuple[int | str, ...]], ...]
    attributes: dict[str, Any]
    constants: frozenset[str] = frozenset()
    ranges: dict[str, tuple[int, int, int]] = field(
        default_factory=lambda: {"B": (1, 1, 4), "S": (1, 1, 8), "T": (128, 256, 512)}
    )

    def with_input(self, name: str, *, type: str | None = None, shape: tuple[int | str, ...] | None = None) -> "Node":
        """The same node with another type or shape of one input."""
        inputs = tuple((n, type or t, shape or s) if n == name else (n, t, s) for n, t, s in self.inputs)
        return replace(self, inputs=inputs)

    def with_attributes(self, **changes: Any) -> "Node":
        """The same node with other attributes; None removes one."""
        merged = self.attributes | changes
        return replace(self, attributes={k: v for k, v in merged.items() if v is not None})

    def profile(self) -> dict[str, list[list[int]]]:
        """Smallest, usual and largest shape of each input that has a dynamic axis."""
        found = {}
        for name, _, shape in self.inputs:
            if name not in self.constants and any(isinstance(axis, str) for axis in shape):
                rows = [[self.ranges[a][k] if isinstance(a, str) else a for a in shape] for k in range(3)]
                found[name] = rows
        return found

    def model(self) -> bytes:
        """The ONNX file."""
        rng = np.random.default_rng(7)
        tensors = [_constant(n, t, s, rng) for n, t, s in self.inputs if n in self.constants]  # type: ignore[arg-type]
        graph = helper.make_graph(
            [
                helper.make_node(
                    self.op,
                    [n for n, _, _ in self.inputs],
                    [n for n, _, _ in self.outputs],
                    name="the_node",
                    domain="shadowc",
                    **self.attributes,
                )
            ],
            "g",
            [helper.make_tensor_value_info(n, ONNX_TYPES[t], s) for n, t, s in self.inputs if n not in self.constants],
            [helper.make_tensor_value_info(n, ONNX_TYPES[t], s) for n, t, s in self.outputs],
            tensors,
        )
        opsets = [helper.make_opsetid("", 20), helper.make_opsetid("shadowc", 1)]
        return bytes(helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString())


def _constant(name: str, kind: str, shape: tuple[int, ...], rng: np.random.Generator) -> onnx.TensorProto:
    if kind == "i8":
        return onnx.numpy_helper.from_array(rng.integers(-99, 99, shape, dtype=np.int8), name)
    values = rng.standard_normal(shape).astype(np.float32)
    if kind == "bf16":
        bits = (values.view(np.uint32) >> 16).astype(np.uint16)
        return helper.make_tensor(name, TensorProto.BFLOAT16, shape, bits.tobytes(), raw=True)
    return onnx.numpy_helper.from_array(values.astype({"f32": np.float32, "f16": np.float16}[kind]), name)


def select_threshold(sizes: Shapes = Shapes()) -> Node:
    """SelectThreshold over the heads of all layers."""
    return Node(
        "SelectThreshold",
        (("scores", "f32", ("B", "S", sizes.layers, sizes.heads)), ("density", "f32", ("B",))),
        (("threshold", "f32", ("B", "S", sizes.layers)), ("active", "i32", ("B", "S", sizes.layers))),
        {"scope": "global", "exempt": [0, 2], "min_active": 1},
    )


def sparse_ffn(act: str = "f16", weight: str | None = None, sizes: Shapes = Shapes()) -> Node:
    """SparseFFN with a mask per row, all S tokens masked."""
    w, units = weight or act, -(-sizes.neurons // sizes.block)
    e, f = sizes.hidden, sizes.neurons
    return Node(
        "SparseFFN",
        (
            ("x", act, ("B", "S", e)),
            ("scores", "f32", ("B", "S", sizes.layers, units)),
            ("threshold", "f32", ("B", "S", sizes.layers)),
            ("w1", w, (f, e)), ("w2t", w, (f, e)), ("scales", "f32", (f, 2)), ("b1", "f32", (f,)), ("b2", "f32", (e,)),
        ),
        (("y", act, ("B", "S", e)), ("read", "i64", (2,))),
        {"layer": 1, "block": sizes.block, "skip_zeros": 1},
        frozenset({"w1", "w2t", "scales", "b1", "b2"}),
    )  # fmt: skip


def sparse_attention(act: str = "f16", weight: str | None = None, sizes: Shapes = Shapes()) -> Node:
    """SparseAttention over a cache that is updated in place."""
    w, h, d, e = weight or act, sizes.heads, sizes.head_size, sizes.hidden
    rows = h * d
    return Node(
        "SparseAttention",
        (
            ("x", act, ("B", "S", e)),
            ("scores", "f32", ("B", "S", sizes.layers, h)),
            ("threshold", "f32", ("B", "S", sizes.layers)),
            ("wq", w, (rows, e)), ("wk", w, (rows, e)), ("wv", w, (rows, e)), ("wot", w, (rows, e)),
            ("scales", "f32", (h, 4, d)), ("bqkv", "f32", (h, 3, d)), ("bo", "f32", (e,)),
            ("past_key", act, ("B", h, "T", d)), ("past_value", act, ("B", h, "T", d)),
            ("start", "i64", ("B",)), ("past", "i64", ("B",)),
        ),
        (
            ("y", act, ("B", "S", e)),
            ("present_key", act, ("B", h, "T", d)), ("present_value", act, ("B", h, "T", d)),
            ("context", act, ("B", "S", e)), ("read", "i64", (2,)),
        ),
        {"layer": 2, "kv": "active"},
        frozenset({"wq", "wk", "wv", "wot", "scales", "bqkv", "bo"}),
    )  # fmt: skip
