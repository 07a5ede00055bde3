# SPDX-License-Identifier: Apache-2.0
"""The tiny checkpoint and opt-mini, compiled once by runs that nobody disturbs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.process import Ended, Place


@pytest.fixture(scope="session")
def whole_tiny(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Its engine, and the cache with all stages. Read only: copy what a test changes."""
    place = Place(tmp_path_factory.mktemp("whole") / "run", str(tiny_checkpoint))
    place.run_here()
    return place


@pytest.fixture(scope="session")
def whole_mini(tmp_path_factory: pytest.TempPathFactory) -> tuple[Place, Ended]:
    """opt-mini compiled by a run that nobody disturbs."""
    place = Place(tmp_path_factory.mktemp("whole") / "run", "opt-mini")
    ended = place.run()
    assert ended.code == 0, ended.errors
    return place, ended
