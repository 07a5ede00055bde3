# SPDX-License-Identifier: Apache-2.0
"""Threads of an engine that has nothing to do leave their cores to others."""

from __future__ import annotations

from pathlib import Path
from time import process_time, sleep

import numpy as np
import pytest

from shadowc.runtime import session
from shadowc.runtime.load import load

SILENCE = 0.2


def processor_seconds_behind_a_run(folder: Path) -> float:
    """Of this process in the SILENCE behind a text, the least of three times."""
    engine, found = load(folder, threads=2), []
    for _ in range(3):
        engine.generate(np.array([[2, 44, 101, 7]], np.int64), max_new_tokens=4)
        began = process_time()
        sleep(SILENCE)
        found.append(process_time() - began)
    return min(found)


def test_threads_sleep_soon_behind_a_run(folders: dict[str, Path]) -> None:
    assert processor_seconds_behind_a_run(folders["fp32"]) < 0.02


def test_threads_that_wait_for_long_would_be_noticed(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "_SPIN_MICROSECONDS", "1000000")
    assert processor_seconds_behind_a_run(folders["fp32"]) > 0.02
