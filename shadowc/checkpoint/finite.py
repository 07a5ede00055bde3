# SPDX-License-Identifier: Apache-2.0
"""Refuses weights that hold NaN or infinities: one pass over the files, nothing is kept in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from shadowc.checkpoint.weights import SafetensorsWeights, join
from shadowc.spec.errors import InputError

if TYPE_CHECKING:
    from shadowc.checkpoint.resolve import ModelCheckpoint


def check_finite(checkpoint: ModelCheckpoint, advance: Callable[[int, int], None] | None = None) -> None:
    """Read all weights once and refuse NaN and infinities. Dummy weights are finite by construction.

    Args:
        checkpoint: what `resolve` returned.
        advance: called with the number of tensors done and their total.

    Raises:
        InputError: names the tensors that hold such values.
    """
    weights = checkpoint.weights
    if not isinstance(weights, SafetensorsWeights):
        return
    names = weights.parameters
    problems = []
    for done, name in enumerate(names, start=1):
        count = weights.count_nonfinite(name)
        if count:
            problems.append(f"{name} ({count} value{'s' if count > 1 else ''})")
        if advance is not None:
            advance(done, len(names))
    if problems:
        raise InputError(
            f"{checkpoint.folder}: NaN or infinity in {len(problems)} of {len(names)} tensors: {join(problems)}",
            hint="download the checkpoint again; if it was converted to fp16, convert it from fp32 once more",
            problems=problems,
        )
