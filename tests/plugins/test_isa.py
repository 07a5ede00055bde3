# SPDX-License-Identifier: Apache-2.0
"""Every SIMD level that this CPU has, in a process of its own: all agree with the best one."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import numpy as np
import pytest

from shadowc.spec.ops import SPARSE_ATTENTION, SPARSE_FFN
from tests.plugins import kernels, test_sparse_attention, test_sparse_ffn

LEVELS = {
    "x86_64": ("sse2", "ssse3", "sse4", "avx2", "avx512", "avx512_zen4"),
    "aarch64": ("neon_without_aes", "neon", "sve", "sve2", "sve_256", "sve2_128"),
}.get(kernels.MACHINE, ())
WIDTHS = (37, 64, 200)
"""Widths with and without a remainder at every vector length."""


def compute() -> dict[str, np.ndarray]:
    """Both matrix operators on fixed inputs: one row, several rows, both weight types."""
    results = {}
    for dtype in ("float32", "int8"):
        for width in WIDTHS:
            for rows in (1, 7):
                rng = np.random.default_rng(width + rows)
                arrays = test_sparse_ffn.operands(rng, B=rows, F=50, E=width, dtype=dtype)
                for skip_zeros in (0, 1):
                    found = kernels.run(SPARSE_FFN, arrays, skip_zeros=skip_zeros)
                    results[f"ffn_{dtype}_{width}_{rows}_{skip_zeros}"] = found["y"]
        for D in (16, 37, 64):
            for S in (1, 7):
                arrays = test_sparse_attention.operands(np.random.default_rng(D + S), S=S, Z=S, D=D, T=20, dtype=dtype)
                found = kernels.run(SPARSE_ATTENTION, arrays)
                results[f"attention_{dtype}_{D}_{S}"] = found["y"]
    return results


def best_is(level: str) -> bool:
    isa = ctypes.CDLL(str(kernels.library())).shadowc_ort_isa
    isa.restype = ctypes.c_char_p
    return isa().decode() == level


@pytest.fixture(scope="module")
def best() -> dict[str, np.ndarray]:
    return compute()


@pytest.mark.parametrize("level", LEVELS)
def test_level_agrees_with_the_best_one(level, best, tmp_path):
    code = (
        "import ctypes, sys, numpy; from tests.plugins import kernels, test_isa;"
        "f = ctypes.CDLL(str(kernels.library())).shadowc_ort_isa; f.restype = ctypes.c_char_p; print(f().decode());"
        "numpy.savez(sys.argv[1], **test_isa.compute()); assert f().decode() == sys.argv[2]"
    )
    path = tmp_path / "results.npz"
    process = subprocess.run(
        [sys.executable, "-c", code, str(path), level],
        env=os.environ | {"SHADOWC_ISA": level, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
    )
    if "which this CPU does not have" in process.stderr or "expected one of" in process.stderr:
        pytest.skip(f"no {level} here")
    assert process.returncode == 0, process.stderr
    assert process.stdout.strip() == level
    with np.load(path) as results:
        assert set(results) == set(best)
        for name, expected in best.items():
            kernels.assert_close(results[name], expected)
        if level == "sse2":  # it really ran: sums over 4 lanes without FMA round otherwise than the best level's
            assert any((results[name] != expected).any() for name, expected in best.items()) or best_is(level)
