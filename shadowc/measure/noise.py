# SPDX-License-Identifier: Apache-2.0
"""How quiet the machine was while something was measured, and one line for the reader where it was not."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

_STAT = Path("/proc/stat")
_BUSY = (0, 1, 2, 5, 6)
"""Columns of /proc/stat: user, nice, system, irq, softirq. Guests are in user."""
_STEAL = 7

SPREAD = 0.15
"""Of the rounds of one setting, or of the stream: highest minus lowest over the median."""
APART = 1.5
"""Of two threads in different rounds, longest over shortest round trip: their cores were other ones."""
OTHERS = 0.05
"""Of all CPUs, taken by other processes."""
STEAL = 0.02
"""Of all CPUs, taken by other machines on the same host."""
LOAD = 0.25
"""Load average over CPUs before the measurement, where nothing tells who takes CPU during it."""


@dataclass(frozen=True, slots=True)
class Reading:
    """Counters at one moment, in seconds."""

    clock: float
    cpus: int
    own: float
    """CPU time of this process, all threads."""
    busy: float | None
    """CPU time of all processes; None where the system does not tell."""
    steal: float | None
    load: float | None
    """Load average over one minute."""

    @classmethod
    def now(cls, stat: Path = _STAT) -> Reading:
        """Read the counters."""
        busy, steal, cpus = _cpu_seconds(stat)
        load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
        return cls(time.perf_counter(), cpus or os.cpu_count() or 1, time.process_time(), busy, steal, load)


@dataclass(frozen=True, slots=True)
class Noise:
    """What was seen between two readings; shares are of all CPUs."""

    spread: float
    """Of the rounds of the setting where they differ most."""
    spread_of: str
    """That setting."""
    stream_spread: float
    other_processes: float | None
    """None where the system does not tell."""
    steal: float | None
    load_before: float | None
    warning: str | None
    """One line: what was seen, and what to do; None on a quiet machine."""


def noise(
    before: Reading,
    after: Reading,
    times: Mapping[str, Sequence[float]],
    stream: Sequence[float],
    round_trips: Sequence[float] = (),
) -> Noise:
    """Judge one measurement.

    Args:
        before: in front of its first round.
        after: behind its last one.
        times: setting -> what each round took, in any unit.
        stream: bandwidth of each round, in any unit.
        round_trips: between two threads in each round, nanoseconds; empty: not known.
    """
    spreads = {label: _spread(rounds) for label, rounds in times.items()}
    worst = max(spreads, key=lambda label: spreads[label])
    others, steal = _shares(before, after)
    seen = []
    if spreads[worst] >= SPREAD:
        seen.append(f"rounds of '{worst}' differ by {spreads[worst]:.0%}")
    if _spread(stream) >= SPREAD:
        seen.append(f"the stream's rounds differ by {_spread(stream):.0%}")
    if round_trips and max(round_trips) >= APART * min(round_trips):
        seen.append(f"two threads were {min(round_trips):.0f} to {max(round_trips):.0f} ns apart: their cores changed")
    if others is not None and others >= OTHERS:
        seen.append(f"other processes took {others:.0%} of the CPUs")
    if steal is not None and steal >= STEAL:
        seen.append(f"the host took {steal:.0%} of the CPUs away")
    if others is None and before.load is not None and before.load >= LOAD * before.cpus:
        seen.append(f"the load average was {before.load:.1f} on {before.cpus} CPUs before")
    return Noise(
        spread=spreads[worst],
        spread_of=worst,
        stream_spread=_spread(stream),
        other_processes=others,
        steal=steal,
        load_before=before.load,
        warning=f"not quiet: {', '.join(seen)}; {_advice(others, steal)}, and quote ratios only" if seen else None,
    )


def _advice(others: float | None, steal: float | None) -> str:
    if others is None or others >= OTHERS:
        return "end what else runs here and measure again"
    if steal is not None and steal >= STEAL:
        return "measure again when the host's other machines are idle"
    return "measure again with more --rounds"


def _spread(rounds: Sequence[float]) -> float:
    return (max(rounds) - min(rounds)) / median(rounds)


def _shares(before: Reading, after: Reading) -> tuple[float | None, float | None]:
    """What other processes took, and other machines."""
    whole = (after.clock - before.clock) * after.cpus
    if before.busy is None or after.busy is None or before.steal is None or after.steal is None or whole <= 0:
        return None, None
    others = after.busy - before.busy - (after.own - before.own)
    # The system counts in ticks, the process in nanoseconds: a little below zero means none.
    return max(others, 0.0) / whole, max(after.steal - before.steal, 0.0) / whole


def _cpu_seconds(stat: Path) -> tuple[float | None, float | None, int]:
    """CPU time of all processes, time stolen by the host, and the CPUs that are counted."""
    try:
        lines = stat.read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return None, None, 0
    whole = next((line.split()[1:] for line in lines if line.startswith("cpu ")), [])
    if len(whole) <= _STEAL:
        return None, None, 0
    tick = 1 / os.sysconf("SC_CLK_TCK")
    cpus = sum(line.startswith("cpu") and line[3:4].isdigit() for line in lines)
    return sum(int(whole[at]) for at in _BUSY) * tick, int(whole[_STEAL]) * tick, cpus
