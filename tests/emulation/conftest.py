# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels, compiled for this machine once per session; skipped with the reason where that is not possible."""

from __future__ import annotations

import pytest

from tests.emulation import build, library


@pytest.fixture(scope="session")
def kernels() -> library.Kernels:
    try:
        return library.Kernels(build.build())
    except build.UnavailableError as reason:
        pytest.skip(f"the CUDA kernels cannot be compiled for the host: {reason}")
