# SPDX-License-Identifier: Apache-2.0
"""NVIDIA's compute-sanitizer over the kernels: memory, races in shared memory, barriers, uninitialised reads."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu.conftest import DeviceKernels, require_gpu

pytestmark = [pytest.mark.gpu, pytest.mark.slow]
require_gpu()
ROOT = Path(__file__).parents[2]
FOUND = 44
"""Exit code for findings."""


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck", "initcheck"])
def test_the_sanitizer_finds_nothing(kernels: DeviceKernels, tool: str) -> None:
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed (it comes with the CUDA toolkit)")
    tests = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:xdist", "-p", "no:cacheprovider"]
    command = [sanitizer, "--tool", tool, "--error-exitcode", str(FOUND), "--target-processes", "all", *tests]
    result = subprocess.run(
        [*command, "tests/gpu/test_kernels.py", "-k", "float16"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    said = result.stdout + result.stderr
    assert result.returncode == 0, "\n".join(said.splitlines()[-60:])
    assert "passed" in said, said
    assert "skipped" not in said, said
