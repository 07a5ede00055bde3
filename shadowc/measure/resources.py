# SPDX-License-Identifier: Apache-2.0
"""Seconds and peak memory of one stage."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_CLEAR_PEAK = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


@dataclass(frozen=True, slots=True)
class StageCost:
    """What a stage took. `peak_bytes` is the resident set's peak during the stage (Linux), elsewhere so far."""

    name: str
    seconds: float
    peak_bytes: int
    reused: bool = False


class StageMeter:
    """Collects the costs of the stages in order."""

    def __init__(self) -> None:
        self.costs: list[StageCost] = []

    @contextmanager
    def stage(self, name: str) -> Iterator[_Mark]:
        """Measures the block; set `mark.reused` inside when the result came from the cache."""
        mark = _Mark()
        _reset_peak()
        start = time.perf_counter()
        yield mark
        self.costs.append(StageCost(name, time.perf_counter() - start, _peak_bytes(), mark.reused))


@dataclass(slots=True)
class _Mark:
    reused: bool = False


def _reset_peak() -> None:
    try:
        _CLEAR_PEAK.write_text("5")
    except OSError:  # not Linux, or a sandbox without it: the peak then counts from the start of the process
        return


def _peak_bytes() -> int:
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
