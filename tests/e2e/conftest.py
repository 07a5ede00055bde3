# SPDX-License-Identifier: Apache-2.0
"""One compile of the tiny checkpoint per kind, shared by all tests; stages are cached across test processes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.compiled import options


@pytest.fixture(scope="session", autouse=True)
def stage_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A stage cache of this test run, used by all of its processes."""
    base = tmp_path_factory.getbasetemp()
    root = (base.parent if base.name.startswith("popen-") else base) / "stage-cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHADOWC_CACHE", str(root))
        yield root


@pytest.fixture(scope="session")
def sparse_engine(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """fp32, trained predictor, global scope. Read only."""
    import shadowc

    return shadowc.compile(options(tiny_checkpoint, tmp_path_factory.mktemp("sparse") / "tiny.engine"))


@pytest.fixture(scope="session")
def sequence_engine(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As sparse_engine, with a mask per sequence. Read only."""
    import shadowc

    out = tmp_path_factory.mktemp("sequence") / "tiny.engine"
    return shadowc.compile(options(tiny_checkpoint, out, mask="sequence"))


@pytest.fixture(scope="session")
def int8_engine(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in int8, ranked within layers. Read only."""
    import shadowc

    out = tmp_path_factory.mktemp("int8") / "tiny.engine"
    return shadowc.compile(options(tiny_checkpoint, out, weights="int8", scope="local"))
