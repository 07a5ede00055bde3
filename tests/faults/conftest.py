# SPDX-License-Identifier: Apache-2.0
"""The tiny checkpoint compiled once, by a run that nobody disturbs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.process import Place


@pytest.fixture(scope="session")
def whole_tiny(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Its engine, and the cache with all stages. Read only: copy what a test changes."""
    place = Place(tmp_path_factory.mktemp("whole") / "run", str(tiny_checkpoint))
    place.run_here()
    return place
