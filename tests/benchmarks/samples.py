# SPDX-License-Identifier: Apache-2.0
"""Samples of one setting, made up."""

from __future__ import annotations

from benchmarks.decoding import Sample
from shadowc.measure.rounds import Turn


def sample(ms: float, size: float, *paces: tuple[float, float]) -> Sample:
    """`size` bytes per token in `ms`, a turn for each pair of paces, bytes per second; default: one at 30 GB/s."""
    return Sample(size, tuple(Turn(ms / 1e3, 4, pair) for pair in paces or ((30e9, 30e9),)))
