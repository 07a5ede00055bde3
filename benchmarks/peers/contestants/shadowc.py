# SPDX-License-Identifier: Apache-2.0
"""shadowc: the dense twin and any densities of one engine, `skip_zeros` off (random weights are half zeros)."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import distributions
from pathlib import Path
from time import perf_counter

import numpy as np

import shadowc
from benchmarks.peers.contestants.protocol import Contestant, Generation, main
from shadowc.runtime.engine import Engine
from shadowc.runtime.load import load_cpu

DENSE = "dense"
"""The setting of the twin without predictor and masks."""


class Shadowc(Contestant):
    """Engines of one folder: weights are mapped once, the twin is made when it is asked for."""

    packages = ("shadowc", next(name for name in ("onnxruntime-gpu", "onnxruntime") if list(distributions(name=name))))

    def __init__(self, model: Path, weights: str, threads: int) -> None:
        self._engine = load_cpu(model, threads=threads, skip_zeros=False)
        self._twin: Engine | None = None

    @staticmethod
    def prepare(checkpoint: Path, out: Path, weights: str) -> None:
        """Compile if `out` is not up to date; the checkpoint holds the numbers that `dummy` makes, rounded to fp16."""
        options = {"model": str(checkpoint), "load_format": "dummy", "weights": weights, "out": out, "offline": True}
        shadowc.compile(shadowc.CompileOptions.model_validate(options))

    def generate(self, prompt: Sequence[int], new_tokens: int, setting: str) -> Generation:
        """See Contestant; a setting other than "dense" is HEADS/NEURONS, the shares that are kept."""
        engine, density = self._engine, shadowc.Density()
        if setting == DENSE:
            engine = self._twin = self._twin or self._engine.dense_twin()
        else:
            heads, neurons = (float(share) for share in setting.split("/"))
            density = shadowc.Density(heads, neurons)
        ids = np.array([prompt], np.int64)
        start = perf_counter()
        found = engine.generate(ids, max_new_tokens=new_tokens, min_new_tokens=new_tokens, density=density)
        whole = perf_counter() - start
        stats = engine.last_stats
        return Generation(
            tokens=found[0, len(prompt) :].tolist(),
            first_ms=(whole - stats.seconds) * 1e3,
            rest_ms=stats.seconds * 1e3,
            bytes_per_token=stats.bytes_read if stats.tokens else None,
        )


if __name__ == "__main__":
    main(Shadowc)
