# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels, compiled for this machine once per session; skipped with the reason where that is not possible."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.emulation import build, library

LIBRARY = "SHADOWC_EMULATION_LIBRARY"
"""A built library to test instead; tests that run others under AddressSanitizer set it."""


OF_THE_CPU = {"dtype": ("bfloat16", "int4"), "cache": ("float16",)}
"""Parameters of the CPU kernels' cases that would repeat another case here, see test_cases_of_cpu_kernels.py."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    def repeats(item: pytest.Item) -> bool:
        if item.path.parent != Path(__file__).parent or not isinstance(item, pytest.Function):
            return False
        given = item.callspec.params if hasattr(item, "callspec") else {}
        return any(given.get(name) in types for name, types in OF_THE_CPU.items())

    gone = [item for item in items if repeats(item)]
    config.hook.pytest_deselected(items=gone)
    items[:] = [item for item in items if item not in gone]


@pytest.fixture(scope="session")
def kernels() -> library.Kernels:
    if LIBRARY in os.environ:
        return library.Kernels(Path(os.environ[LIBRARY]))
    try:
        return library.Kernels(build.build())
    except build.UnavailableError as reason:
        pytest.skip(f"the CUDA kernels cannot be compiled for the host: {reason}")
