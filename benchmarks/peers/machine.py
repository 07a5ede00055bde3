# SPDX-License-Identifier: Apache-2.0
"""What the race runs on, and what else keeps it busy."""

from __future__ import annotations

import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")
_MEMINFO = Path("/proc/meminfo")
_BUSY = 0.3
"""Runnable processes beside the race's own, on average over a minute, from which figures are called doubtful."""

_PATIENCE, _PAUSE = 180.0, 2.0
"""Seconds."""


@dataclass(frozen=True, slots=True)
class Machine:
    """Facts for the head of the table."""

    cpu: str
    cores: int
    """Physical, among those that this process may use."""
    memory: int
    """Bytes."""
    system: str


def here() -> Machine:
    """This machine (Linux)."""
    blocks = [_fields(block) for block in _CPUINFO.read_text("utf-8").strip().split("\n\n")]
    return Machine(
        cpu=blocks[0].get("model name", platform.machine()),
        cores=physical_cores(blocks, os.sched_getaffinity(0)),
        memory=_memory("MemTotal"),
        system=f"{platform.system()} {platform.release()}",
    )


def physical_cores(processors: list[dict[str, str]], usable: set[int]) -> int:
    """Cores behind the usable logical processors; where cores have no numbers, each processor counts as one."""
    cores = {
        (fields.get("physical id", "0"), fields.get("core id", fields["processor"]))
        for fields in processors
        if int(fields["processor"]) in usable
    }
    return len(cores)


def available_memory() -> int:
    """Bytes that can be had without swapping."""
    return _memory("MemAvailable")


def noise(cores: int, patience: float = _PATIENCE) -> str:
    """A sentence if others keep this machine busy; else nothing. To be asked before the race starts.

    Waits up to `patience` seconds for the load to fall: making the contestants' models is a load as well.
    """
    deadline = time.monotonic() + patience
    while (load := os.getloadavg()[0]) > _BUSY * cores and time.monotonic() < deadline:
        time.sleep(_PAUSE)
    if load <= _BUSY * cores:
        return ""
    return f"load average {load:.1f} on {cores} cores before the first round: others were running, doubt these figures"


def _memory(name: str) -> int:
    fields = _fields(_MEMINFO.read_text("ascii"))
    return int(fields[name].split()[0]) * 1024


def _fields(text: str) -> dict[str, str]:
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in text.splitlines())}
