# SPDX-License-Identifier: Apache-2.0
"""Runs an engine folder step by step with its inner tensors as outputs: what parity looks at.

Letters: B batch, S new tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from shadowc.runtime.cache import KvCache
from shadowc.runtime.session import Session
from shadowc.runtime.variants import with_outputs
from shadowc.spec.density import Density

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import numpy.typing as npt
    import onnx

    from shadowc.checkpoint.opt import OptFacts


class EngineProbe:
    """One text through an engine whose graph also puts out `residual.{l}`; the cache goes on from step to step."""

    def __init__(self, session: Session, facts: OptFacts) -> None:
        self._session = session
        self._cache = KvCache(facts.layers, (1, facts.heads, facts.head_size), facts.positions)

    def step(
        self, ids_BS: npt.NDArray[np.int64], *, density: Density, sparse_tail: int
    ) -> Mapping[str, npt.NDArray[np.float32]]:
        """Run the next tokens of a batch of one and return every output but the cache, by name."""
        import onnxruntime as ort

        total = self._cache.filled + ids_BS.shape[1]
        binding = self._session.ort.io_binding()
        dials = {
            "density_heads": np.array([density.heads], np.float32),
            "density_neurons": np.array([density.neurons], np.float32),
            "sparse_tail": np.array([sparse_tail], np.int64),
        }
        feeds = {"input_ids": ids_BS, "attention_mask": np.ones((1, total), np.int64), **dials}
        for name, value in feeds.items():
            if name in self._session.inputs:
                binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value)))
        self._cache.reserve(total)
        self._cache.bind(binding)
        for name in self._session.outputs:
            binding.bind_output(name)
        self._session.ort.run_with_iobinding(binding)
        self._cache.advance(ids_BS.shape[1])
        values = (value for value in binding.get_outputs()[-len(self._session.outputs) :])
        return {name: value.numpy() for name, value in zip(self._session.outputs, values, strict=True)}


def probes(
    model_file: Path,
    facts: OptFacts,
    *,
    threads: int,
    library: Path,
    rewrite: Callable[[onnx.ModelProto], onnx.ModelProto] | None = None,
) -> Callable[[], EngineProbe]:
    """Returns a function that makes a fresh probe of this engine graph; they share one session.

    Args:
        model_file: the folder's model.onnx.
        facts: the model's sizes.
        threads: intra-op threads.
        library: the installed op library.
        rewrite: changes the graph before it is loaded (planted defects, other variants).
    """
    import onnx

    model = onnx.load(model_file, load_external_data=False)
    model = with_outputs(model, [f"residual.{layer}" for layer in range(facts.layers + 1)])
    session = Session(model_file, threads, library, rewrite(model) if rewrite else model)
    return lambda: EngineProbe(session, facts)
