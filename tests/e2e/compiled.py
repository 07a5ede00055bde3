# SPDX-License-Identifier: Apache-2.0
"""Engines of the tiny checkpoint made by the whole pipeline, for end-to-end tests and for those of measure."""

from __future__ import annotations

from pathlib import Path

from shadowc.spec.options import CollectOptions, CompileOptions, TrainOptions

COLLECT = CollectOptions(positions=256, length=32, fill="mean")
TRAIN = TrainOptions(neuron_block=16, width=32, epochs=4, batch=32)


def options(model: Path | str, out: Path, **changes: object) -> CompileOptions:
    """A compile that takes seconds."""
    return CompileOptions.model_validate(
        {"model": str(model), "out": out, "collect": COLLECT, "train": TRAIN, **changes}
    )
