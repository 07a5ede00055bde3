# SPDX-License-Identifier: Apache-2.0
"""Defects planted into the graph of an engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx

Defect = Callable[[onnx.ModelProto], None]


def named(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.name == name)


def set_int(node: onnx.NodeProto, name: str, value: int) -> None:
    """Change an attribute that the node has."""
    (attribute,) = [attribute for attribute in node.attribute if attribute.name == name]
    attribute.i = value


def with_defect(engine: Any, defect: Defect | None) -> Any:
    """The same engine over a graph that the defect has changed; None: over one that is sound."""

    def rewrite(model: onnx.ModelProto) -> onnx.ModelProto:
        copy = onnx.ModelProto()
        copy.CopyFrom(model)
        if defect is not None:
            defect(copy)
        return copy

    return engine._variant(rewrite)
