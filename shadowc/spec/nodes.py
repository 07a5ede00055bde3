# SPDX-License-Identifier: Apache-2.0
"""Writing ONNX nodes one after the other, by hand.

Rules that come from the runtimes: every node has a name (ORT 1.23 requires it).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import onnx
from onnx import helper, numpy_helper

OPSET = 20

ATTRIBUTE_TYPES = {
    "int": onnx.AttributeProto.INT,
    "ints": onnx.AttributeProto.INTS,
    "string": onnx.AttributeProto.STRING,
}


class Nodes:
    """Collects nodes in order: `nodes.MatMul(a, b)` adds one named node and returns the name of its result.

    `out` names the result, and with it the node; without it, both are numbered.
    """

    def __init__(self) -> None:
        self.protos: list[onnx.NodeProto] = []
        self._known: dict[str, str] = {}

    def __getattr__(self, op_type: str) -> Callable[..., str]:
        if op_type.startswith("_"):
            raise AttributeError(op_type)
        return partial(self.add, op_type)

    def add(self, op_type: str, *inputs: str, out: str = "", ignored: int = 0, **attributes: object) -> str:
        """Append a node; `ignored` counts further outputs that nobody reads."""
        out = out or f"{op_type.lower()}_{len(self.protos)}"
        outputs = [out, *(f"{out}.ignored_{i}" for i in range(ignored))]
        node = helper.make_node(op_type, list(inputs), outputs, name=f"node.{out}")
        node.attribute.extend(helper.make_attribute(name, value) for name, value in attributes.items())
        self.protos.append(node)
        return out

    def constant(self, name: str, value: np.ndarray | np.generic) -> str:
        """A tensor constant; the same name is the same node."""
        if name not in self._known:
            self._known[name] = self.add("Constant", out=name, value=numpy_helper.from_array(np.asarray(value), name))
        return self._known[name]

    def ints(self, *values: int) -> str:
        """An int64 vector."""
        return self.constant("ints_" + "_".join(map(str, values)), np.array(values, np.int64))

    def integer(self, value: int) -> str:
        """An int64 scalar."""
        return self.constant(f"int64_{value}", np.int64(value))

    def float32(self, value: float) -> str:
        """A float32 scalar."""
        return self.constant(f"float32_{value}", np.float32(value))

    def float64(self, value: float) -> str:
        """A float64 scalar."""
        return self.constant(f"float64_{value}", np.float64(value))

    def attribute(self, name: str, kind: str) -> str:
        """The value that the calling node gives to an attribute of the function."""
        if name not in self._known:
            self._known[name] = self.add("Constant", out=f"attribute_{name}")
            reference = self.protos[-1].attribute.add()
            reference.name, reference.ref_attr_name, reference.type = f"value_{kind}", name, ATTRIBUTE_TYPES[kind]
        return self._known[name]

    def sizes(self, tensor: str, start: int, end: int, out: str = "") -> str:
        """The sizes of axes start..end-1, as a vector."""
        return self.Shape(tensor, start=start, end=end, out=out)

    def row(self, tensor: str, index: int, out: str = "") -> str:
        """`tensor[:, index]`."""
        return self.Gather(tensor, self.integer(index), axis=1, out=out)
