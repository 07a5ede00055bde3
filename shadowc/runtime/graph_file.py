# SPDX-License-Identifier: Apache-2.0
"""Reads a graph of an engine folder; its weights stay where they are."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from shadowc.runtime.verification import RECOMPILE
from shadowc.spec.errors import VerificationError

if TYPE_CHECKING:
    import onnx


def read_graph(path: Path) -> onnx.ModelProto:
    """The graph in an ONNX file, without the weights that lie beside it.

    Raises:
        VerificationError: the file cannot be read, or holds no graph.
    """
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        model = onnx.load(path, load_external_data=False)
    except DecodeError as error:
        raise VerificationError(f"{path} is damaged: it is no ONNX file", hint=RECOMPILE) from error
    except OSError as error:
        raise VerificationError(f"{path} cannot be read: {error.strerror or error}", hint=RECOMPILE) from error
    if not model.HasField("graph"):  # an empty file is a valid message
        raise VerificationError(f"{path} is damaged: it holds no graph", hint=RECOMPILE)
    return model
