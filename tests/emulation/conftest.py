# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels, compiled for this machine once per session; skipped with the reason where that is not possible."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.emulation import build, library

LIBRARY = "SHADOWC_EMULATION_LIBRARY"
"""A built library to test instead; tests that run others under AddressSanitizer set it."""


@pytest.fixture(scope="session")
def kernels() -> library.Kernels:
    if LIBRARY in os.environ:
        return library.Kernels(Path(os.environ[LIBRARY]))
    try:
        return library.Kernels(build.build())
    except build.UnavailableError as reason:
        pytest.skip(f"the CUDA kernels cannot be compiled for the host: {reason}")
