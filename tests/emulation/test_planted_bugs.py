# SPDX-License-Identifier: Apache-2.0
"""Bugs planted in a copy of the kernels' sources: the checks find each of them, and none in the sources as they are."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.emulation import build
from tests.emulation.test_garbage import cases_under_asan, under_asan

BARRIER = re.compile(r"\n *__syncthreads\(\);")
BARRIERS = [
    (source.name, number)
    for source in sorted(build.KERNELS.glob("*.cu*"))
    for number in range(len(BARRIER.findall(source.read_text(encoding="utf-8"))))
]


def test_no_barrier_is_written_in_a_way_that_it_cannot_be_left_out() -> None:
    texts = [source.read_text(encoding="utf-8") for source in build.KERNELS.glob("*.cu*")]
    assert len(BARRIERS) == sum(text.count("__syncthreads();") for text in texts) > 0


PLANTED = {
    "a store behind the last row": (
        "gather_sum.cu", "if (e >= a.width) return;",
        "if (e >= a.width && (e > a.width || row + 1 < a.chunk.rows)) return;", "wrote beyond an allocation",
    ),
    "a key stored one slot too far": (
        "attend.cuh", "return clamp(past[b]) + s;", "return clamp(past[b]) + s + 1;", "Not equal to tolerance",
    ),
    "the mask of another tile's rows": (
        "unit_list.cu", "a.chunk.first + first + threadIdx.x", "a.chunk.first + threadIdx.x", "Mismatched elements",
    ),
    "the mask of another row of the batch": (
        "unit_list.cuh", "mask.batch == 1 ? 0 : row / tokens", "0 * row", "Mismatched elements",
    ),
    "lanes that leave before a shuffle": (
        "gather_dot.cuh", "  float sums[N][R] = {};", "  if (lane >= vectors) return;\n  float sums[N][R] = {};",
        "lanes have left before the exchange",
    ),
    "a sum in the order in which threads come": (
        "gather_sum.cu", "if (e < a.width) out[static_cast<size_t>(r) * a.width + e] = sum;",
        "if (e < a.width) { static int came; out[static_cast<size_t>(r) * a.width + e] = sum + 1e-6f * (++came % 7); }",
        "depends on the order of threads",
    ),
}  # fmt: skip
"""File, text, replacement, and what the checks say."""


def planted(folder: Path, file: str, change) -> Path:
    """The built library of a copy in which `change` was applied to the text of one file."""
    shutil.copytree(build.KERNELS, folder / "cuda")
    path = folder / "cuda" / file
    text = path.read_text(encoding="utf-8")
    changed = change(text)
    assert changed != text, "the planted bug no longer fits the source"
    path.write_text(changed, encoding="utf-8")
    return folder / "cuda"


def checked(library: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.emulation.checks", str(library)],
        env=os.environ | {"PYTHONPATH": str(build.ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False, cwd=build.ROOT,
    )  # fmt: skip


def test_the_kernels_as_they_are_pass_the_checks(kernels):
    result = checked(build.build())
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("bug", PLANTED)
def test_the_checks_find_a_planted_bug(kernels, bug, tmp_path):
    file, text, replacement, says = PLANTED[bug]
    sources = planted(tmp_path, file, lambda source: source.replace(text, replacement))
    result = checked(build.build(kernels=sources))
    assert result.returncode != 0
    assert says in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("file", "number"), BARRIERS)
def test_the_checks_find_every_missing_barrier(kernels, file, number, tmp_path):
    """Results differ, threads wait in vain, or the process dies of a pointer that nobody had written yet."""

    def without(source: str) -> str:
        at = list(BARRIER.finditer(source))[number]
        return source[: at.start()] + source[at.end() :]

    assert checked(build.build(kernels=planted(tmp_path, file, without))).returncode != 0


@pytest.mark.slow
def test_address_sanitizer_finds_a_read_behind_the_cache(kernels, tmp_path):
    """Of a slot that the clamp should have kept out; nothing is written there, so guards could not see it."""
    sources = planted(
        tmp_path,
        "attend.cuh",
        lambda source: source.replace("min(slot(b, s) + 1, capacity)", "min(slot(b, s) + 1, capacity + 1)"),
    )
    result = under_asan(build.build(asan=True, kernels=sources), 12)
    assert result.returncode != 0
    assert "heap-buffer-overflow" in result.stderr


@pytest.mark.slow
def test_address_sanitizer_finds_a_read_behind_the_last_matrix_row(kernels, tmp_path):
    """Of valid operands; what is read is not used, so no result shows it."""
    sources = planted(
        tmp_path, "gather_dot.cuh", lambda source: source.replace("v < vectors ? load_once", "v <= vectors ? load_once")
    )
    result = cases_under_asan(build.build(asan=True, kernels=sources), "-x", "-k", "skip_zeros")
    assert result.returncode != 0
    assert "heap-buffer-overflow" in result.stderr
