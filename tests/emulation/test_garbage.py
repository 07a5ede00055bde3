# SPDX-License-Identifier: Apache-2.0
"""Random bits in every operand: the kernels stay inside them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.emulation import build, garbage
from tests.emulation.conftest import LIBRARY


def under_asan(library: Path, seeds: int) -> subprocess.CompletedProcess[str]:
    """The result of garbage.py with AddressSanitizer."""
    environment = os.environ | build.asan_environment() | {"PYTHONPATH": str(build.ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.emulation.garbage", str(library), str(seeds)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=build.ROOT)


def cases_under_asan(library: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """The CPU kernels' cases on these kernels with AddressSanitizer, which sees reads that guards cannot."""
    environment = os.environ | build.asan_environment() | {LIBRARY: str(library), "OMP_NUM_THREADS": "1"}
    cases = [
        "tests/emulation/test_cases_of_cpu_kernels.py",
        "-m",
        "not slow",
        "-p",
        "no:cacheprovider",
        "-q",
        "-s",
        *more,
    ]
    return subprocess.run(
        [sys.executable, "-m", "pytest", *cases],
        env=environment, capture_output=True, text=True, check=False, cwd=build.ROOT,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(1800)  # a compiler, then a suite of its own under AddressSanitizer: two to nine minutes of a core
def test_cases_read_nothing_outside_the_operands(kernels):
    result = cases_under_asan(build.build(asan=True))
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout


def test_random_bits_write_nothing_outside_the_operands(kernels):
    garbage.run(kernels, range(3))


@pytest.mark.slow
def test_random_bits_read_nothing_outside_the_operands(kernels):
    result = under_asan(build.build(asan=True), 6)
    assert result.returncode == 0, result.stderr
    assert "nothing was touched" in result.stdout
