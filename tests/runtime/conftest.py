# SPDX-License-Identifier: Apache-2.0
"""Engines of the tiny model, made once; copies where a test changes files."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from shadowc.runtime.engine import Engine
from shadowc.runtime.load import load
from shadowc.runtime.tensorrt.engine import TensorRtEngine
from tests.emit import engines
from tests.runtime.host_engine import on_host
from tests.runtime.tensorrt_folder import write_folder

if TYPE_CHECKING:
    from transformers import OPTForCausalLM

THREADS = 2


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Remembered hashes go to a folder of the test run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHADOWC_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def folders(
    tiny_model: OPTForCausalLM, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """One of every type of weights, and dense. Read only."""
    return engines.write_kinds(tmp_path_factory.mktemp("engines"), tiny_model, tiny_checkpoint)


@pytest.fixture(scope="session")
def engine(folders: dict[str, Path]) -> Engine:
    return load(folders["fp32"], threads=THREADS)


@pytest.fixture(scope="session")
def reference(folders: dict[str, Path]) -> Engine:
    return load(folders["fp32"], threads=THREADS, reference=True)


@pytest.fixture
def copied(folders: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of an engine that the test may damage."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(folders[name], tmp_path / f"{name}.engine"))

    return copy


@pytest.fixture(scope="session")
def trt_folders(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Read only."""
    parent = tmp_path_factory.mktemp("tensorrt")
    for name in ("fp32", "dense"):
        write_folder(folders[name], parent / name)
    return {name: parent / name for name in ("fp32", "dense")}


@pytest.fixture(scope="module")
def host(trt_folders: dict[str, Path]) -> TensorRtEngine:
    return on_host(trt_folders["fp32"])
