# SPDX-License-Identifier: Apache-2.0
"""Runs a command and watches how much memory it and its children hold together (Linux)."""

from __future__ import annotations

import subprocess
import tempfile
import time
from pathlib import Path

INTERVAL = 0.05
"""Seconds between two looks; what lives shorter is missed."""


def run(command: list[str]) -> tuple[str, int]:
    """What the command printed, and the largest sum of resident bytes; pages that two processes share count twice.

    Raises:
        AssertionError: it failed; with what it said.
    """
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=err)
        peak = 0
        try:
            while child.poll() is None:
                peak = max(peak, resident_bytes(child.pid))
                time.sleep(INTERVAL)
        finally:
            child.kill()
            child.wait()
        out.seek(0)
        err.seek(0)
        assert child.returncode == 0, err.read()
        return out.read(), peak


def resident_bytes(pid: int) -> int:
    """Of a process and all below it; 0 if it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        below = [path.read_text().split() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    except (FileNotFoundError, ProcessLookupError):
        return 0
    own = next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmRSS:")), 0)
    return own + sum(resident_bytes(int(one)) for children in below for one in children)
