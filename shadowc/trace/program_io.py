# SPDX-License-Identifier: Apache-2.0
"""A program as ONNX, between the passes: weights are graph inputs without values."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

    from shadowc.spec.program import Program

IR_VERSION = 10


def to_model(program: Program) -> onnx.ModelProto:
    """Export the graph as it is; every weight is a graph input under its recipe's name."""
    import onnx_graphsurgeon as gs

    model: onnx.ModelProto = gs.export_onnx(program.graph)
    model.ir_version = IR_VERSION
    model.producer_name, model.producer_version, model.doc_string = "shadowc", "", ""
    return model


def write_model(program: Program, path: Path) -> None:
    """Write the graph as it is; the same program gives the same bytes."""
    path.write_bytes(to_model(program).SerializeToString(deterministic=True))
