# SPDX-License-Identifier: Apache-2.0
"""Runs an engine folder step by step with its inner tensors as outputs: what parity looks at.

Letters: B batch, S new tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from shadowc.runtime.decoder import Decoder, ModelSizes, Outputs
from shadowc.runtime.prompts import Batch
from shadowc.runtime.session import Session
from shadowc.runtime.variants import with_outputs
from shadowc.spec.density import Density

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt
    import onnx


class EngineProbe:
    """Unpadded sequences through an engine, all graph outputs on show; the cache goes on from step to step."""

    def __init__(self, session: Session, model: ModelSizes, *, in_place: bool = True) -> None:
        self._session = session
        self._model = model
        self._in_place = in_place
        self._decoder: Decoder | None = None

    def step(self, ids_BS: npt.NDArray[np.int64], *, density: Density, sparse_tail: int) -> Outputs:
        """Run the next tokens and return every output but the cache, by name."""
        if self._decoder is None:
            batch = Batch(ids_BS, np.zeros(len(ids_BS), np.int64))
            self._decoder = Decoder(self._session, self._model, batch, in_place=self._in_place)
        self._decoder.set_density(density.heads, density.neurons)
        ids = np.ascontiguousarray(ids_BS, np.int64)
        return self._decoder.feed(ids, sparse_tail=sparse_tail, outputs=self._session.outputs)


def residuals(layers: int) -> list[str]:
    """Names of the residual stream in front of every layer and behind the last."""
    return [f"residual.{layer}" for layer in range(layers + 1)]


def probes(
    model_file: Path,
    model: ModelSizes,
    *,
    threads: int,
    library: Path | None,
    rewrite: Callable[[onnx.ModelProto], onnx.ModelProto] | None = None,
) -> Callable[[], EngineProbe]:
    """Returns a function that makes a fresh probe of this engine graph; they share one session.

    Args:
        model_file: the folder's model.onnx, or its reference.onnx.
        model: the model's sizes.
        threads: intra-op threads.
        library: the installed op library; None: the reference graph.
        rewrite: changes the graph before it is loaded (planted defects, other variants).
    """
    import onnx

    graph = with_outputs(onnx.load(model_file, load_external_data=False), residuals(model.layers))
    session = Session(model_file.resolve(), threads, library, rewrite(graph) if rewrite else graph)
    return lambda: EngineProbe(session, model, in_place=library is not None)
