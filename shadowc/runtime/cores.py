# SPDX-License-Identifier: Apache-2.0
"""How many cores this process may use: affinity, narrowed by the CPU quota of a container."""

from __future__ import annotations

import os
from pathlib import Path

MOST_THREADS = 1024
"""More are refused: each takes memory of its own as soon as it starts."""
_V2 = Path("/sys/fs/cgroup/cpu.max")
_V1_QUOTA = Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us")
_V1_PERIOD = Path("/sys/fs/cgroup/cpu/cpu.cfs_period_us")


def usable_cores() -> int:
    """Cores that this process may run on, at least 1; CPU sets and a container's quota narrow them."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota()
    return allowed if quota is None else max(1, min(allowed, round(quota)))


def cpu_quota() -> float | None:
    """Cores' worth of time that the control group grants (`docker run --cpus 1.5`: 1.5); None without a limit."""
    try:
        if _V2.is_file():
            quota, period = _V2.read_text("ascii").split()
        else:
            quota, period = _V1_QUOTA.read_text("ascii").strip(), _V1_PERIOD.read_text("ascii").strip()
        if quota in ("max", "-1"):
            return None
        return int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None
