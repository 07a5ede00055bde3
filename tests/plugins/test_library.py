# SPDX-License-Identifier: Apache-2.0
"""The shared library itself: what it needs, what it exports, what it says about itself."""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

import shadowc
from shadowc import plugins
from shadowc.runtime.library import OpLibrary
from tests.plugins import kernels
from tests.plugins.levels import HERE

EXPORTS = {
    "RegisterCustomOps", "shadowc_ort_api", "shadowc_ort_isa", "shadowc_ort_version", "shadowc_round_trip",
    "shadowc_stream_over", "shadowc_stream_read",
}  # fmt: skip
SYSTEM = re.compile(r"lib(c|m|stdc\+\+|gcc_s)\.so\.\d+|ld-linux.*\.so\.\d+")

readelf = pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf (binutils)")


@pytest.fixture(scope="module")
def loaded() -> ctypes.CDLL:
    library = ctypes.CDLL(str(kernels.library()))
    library.shadowc_ort_version.restype = ctypes.c_char_p
    library.shadowc_ort_isa.restype = ctypes.c_char_p
    library.shadowc_stream_read.restype = ctypes.c_double
    library.shadowc_stream_read.argtypes = [ctypes.c_size_t, ctypes.c_int, ctypes.c_int]
    return library


def elf(*flags: str) -> str:
    return subprocess.run(
        ["readelf", "--wide", *flags, str(kernels.library())], check=True, capture_output=True, text=True
    ).stdout


@readelf
def test_library_needs_only_the_system_and_what_lies_beside_it():
    dynamic = elf("--dynamic")
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic)
    elsewhere = [name for name in needed if not SYSTEM.fullmatch(name)]
    assert all((kernels.library().parent / name).is_file() for name in elsewhere), elsewhere
    if elsewhere:
        assert re.search(r"\((RUNPATH|RPATH)\).*\[\$ORIGIN\]", dynamic)


@readelf
def test_library_exports_its_functions_and_nothing_else():
    lines = [line.split() for line in elf("--dyn-syms").splitlines()]
    defined = {
        fields[7].split("@")[0]
        for fields in lines
        if len(fields) >= 8 and fields[4] in ("GLOBAL", "WEAK") and fields[6] != "UND"
    }
    assert defined == EXPORTS


@readelf
def test_library_links_no_symbol_of_the_host():
    undefined = [line for line in elf("--dyn-syms").splitlines() if " UND " in line]
    assert not [line for line in undefined if re.search(r"\b(Ort\w*|OrtGetApiBase)\b", line)]


def test_library_reports_the_version_of_the_package(loaded):
    assert loaded.shadowc_ort_version().decode() == shadowc.__version__


def test_library_is_built_against_api_21(loaded):
    assert loaded.shadowc_ort_api() == 21


def test_stream_read_reports_a_bandwidth_of_this_planet(loaded):
    assert 1e8 < loaded.shadowc_stream_read(32 << 20, 1, 3) < 1e13


@pytest.mark.parametrize("arguments", [(0, 1, 1), (1 << 20, 0, 1), (1 << 20, 1, 0), (1 << 20, -1, 1)])
def test_stream_read_returns_zero_when_there_is_nothing_to_read(loaded, arguments):
    assert loaded.shadowc_stream_read(*arguments) == 0


def test_two_threads_are_told_to_be_as_far_apart_as_cores_can_be():
    apart = OpLibrary.at(kernels.library()).round_trip()
    if len(os.sched_getaffinity(0)) < 2:
        assert apart is None
    else:
        assert apart is not None
        assert 10 < apart < 1e6


def test_threads_on_one_core_and_no_series_are_no_measurement(loaded):
    loaded.shadowc_round_trip.restype = ctypes.c_double
    assert loaded.shadowc_round_trip(ctypes.c_int(0)) == 0
    held = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(held)})
        assert OpLibrary.at(kernels.library()).round_trip() is None
    finally:
        os.sched_setaffinity(0, held)


def test_memory_that_is_there_already_is_read_whole_pages_only(loaded):
    over = OpLibrary.at(kernels.library()).stream_over
    memory = mmap.mmap(-1, 32 << 20)
    pages = np.frombuffer(memory, np.uint8)
    assert 1e8 < over(pages, 1, 3) < 1e13
    assert over(pages[: 2 * 4096 + 100], 2, 1) > 0
    assert over(pages[:4095], 1, 1) == over(pages[: 2 * 4096 - 1], 2, 1) == 0
    assert over(pages[64:], 1, 1) == over(pages, 0, 1) == over(pages, 1, 0) == 0


def register(level: str) -> subprocess.CompletedProcess:
    code = (
        "import onnxruntime, sys; o = onnxruntime.SessionOptions(); o.register_custom_ops_library(sys.argv[1]);"
        "import ctypes; f = ctypes.CDLL(sys.argv[1]).shadowc_ort_isa; f.restype = ctypes.c_char_p; print(f().decode())"
    )
    return subprocess.run(
        [sys.executable, "-c", code, str(kernels.library())],
        env=os.environ | {"SHADOWC_ISA": level},
        capture_output=True,
        text=True,
    )


def test_registration_names_the_valid_levels_when_shadowc_isa_is_unknown():
    result = register("avx9000")
    assert result.returncode != 0
    assert "SHADOWC_ISA is 'avx9000'; expected one of " in result.stderr
    named = re.split(r", |\.", result.stderr.split("expected one of ")[1].splitlines()[0])
    # Another name would make tests of that level pass as if the CPU lacked it.
    assert [name for name in named if name] == [*HERE, "native"]


@pytest.mark.skipif(kernels.MACHINE != "x86_64", reason="names of x86 levels")
def test_registration_takes_the_lowest_level_when_shadowc_isa_names_it():
    result = register("sse2")
    assert (result.returncode, result.stdout.strip()) == (0, "sse2")


def test_cpu_library_says_how_to_get_it_when_it_is_missing(monkeypatch, tmp_path):
    monkeypatch.setattr(plugins, "__path__", [str(tmp_path)])
    with pytest.raises(FileNotFoundError, match="pip install"):
        plugins.cpu_library()


def test_cpu_library_finds_the_file_beside_the_package(monkeypatch, tmp_path):
    (tmp_path / plugins.LIBRARY_NAME).touch()
    monkeypatch.setattr(plugins, "__path__", ["/nowhere", str(tmp_path)])
    assert plugins.cpu_library() == tmp_path / plugins.LIBRARY_NAME
