# SPDX-License-Identifier: Apache-2.0
"""Where CMake finds TensorRT's headers, what it says when it does not, and that the sources fit the supported ones."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import urllib.request
from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.tensorrt_plugin import toolchain

needs_cmake = pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake")
FILES = (
    "NvInferImpl.h", "NvInferLegacyDims.h", "NvInferPluginBase.h", "NvInferRuntimeBase.h", "NvInferRuntimeCommon.h",
    "NvInferRuntimePlugin.h",
)  # fmt: skip
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
PROJECT = """cmake_minimum_required(VERSION 3.24)
project(search NONE)
include(cmake/tensorrt_headers.cmake)
foreach(family IN LISTS SHADOWC_TENSORRT_HEADERS)
  message(STATUS "found ${family} in ${SHADOWC_TENSORRT_${family}}")
endforeach()
"""


def version_header(version: str) -> str:
    """How the numbers are written in each generation of NvInferVersion.h."""
    kind = {"1": "RTX", "11": "ENTERPRISE"}.get(version.split(".")[0])
    lines = []
    for part, number in zip(("MAJOR", "MINOR", "PATCH"), version.split("."), strict=True):
        if kind is not None:
            lines.append(f"#define TRT_{part}_{kind} {number}")
        lines.append(f"#define NV_TENSORRT_{part} {number if kind is None else f'TRT_{part}_{kind}'} //!< {part}")
    return "\n".join([*lines, ""])


class Search:
    """A project that only looks for headers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "CMakeLists.txt").write_text(PROJECT)
        (folder / "cmake").symlink_to(toolchain.TOP / "cmake")

    def headers(self, name: str, version: str) -> Path:
        """A folder with headers that carry nothing but their version."""
        folder = self.folder / name
        folder.mkdir(parents=True)
        (folder / "NvInferRuntime.h").touch()
        (folder / "NvInferVersion.h").write_text(version_header(version))
        return folder

    def __call__(self, **variables: object) -> tuple[int, str]:
        """Exit status and output of cmake; nothing of this machine is found."""
        absent = {"SHADOWC_SYSTEM_TENSORRT": "", "SHADOWC_TENSORRT_URL": "", "TENSORRT_INCLUDE_DIR": ""} | variables
        done = subprocess.run(
            ["cmake", "-S", ".", "-B", "out", *(f"-D{key}={value}" for key, value in absent.items())],
            cwd=self.folder, capture_output=True, text=True, check=False,
        )  # fmt: skip
        return done.returncode, " ".join((done.stdout + done.stderr).split())


@pytest.fixture
def search(tmp_path):
    return Search(tmp_path)


@needs_cmake
def test_without_headers_one_line_says_what_to_set(search):
    status, said = search()
    assert status == 0
    assert said.count("TensorRT") == 1
    assert (
        "TensorRT plugin: not built; set TENSORRT_INCLUDE_DIR to the folder of NvInferRuntime.h, 10.3 or newer" in said
    )


@needs_cmake
def test_each_generation_of_headers_is_told_by_its_version(search):
    folders = [search.headers(f"h{i}", version) for i, version in enumerate(("10.3.0", "11.1.0", "1.7.1"))]
    status, said = search(TENSORRT_INCLUDE_DIR=":".join(map(str, folders)))
    assert status == 0
    for family, folder in zip(("trt10", "trt11", "rtx1"), folders, strict=True):
        assert f"found {family} in {folder}" in said


@needs_cmake
def test_headers_that_are_too_old_stop_an_explicit_choice(search):
    folder = search.headers("old", "10.2.0")
    status, said = search(TENSORRT_INCLUDE_DIR=folder)
    assert status != 0
    assert f"expected NvInferRuntime.h of TensorRT 10.3 to 11.x in {folder}, found version '10.2.0'" in said


@needs_cmake
def test_headers_of_build_tensorrt_headers_are_the_last_choice(search):
    folder = search.headers("build/tensorrt_headers/10.3", "10.3.0")
    assert f"found trt10 in {folder}" in search()[1]


@needs_cmake
def test_headers_from_the_network_that_differ_from_their_hash_are_not_used(search):
    include = search.folder / "mirror" / "v11.1" / "include"
    shutil.copytree(search.headers("planted", "11.1.0"), include)
    for name in FILES:
        (include / name).touch()
    status, said = search(SHADOWC_TENSORRT_URL=(search.folder / "mirror").as_uri(), SHADOWC_PYTHON="/bin/false")
    assert status == 0
    assert "TensorRT headers v11.1 from file:" in said
    assert re.search(r"expected SHA-256 2f706ad9\w{56} over all files, found \w{64}; not used", said)
    assert "TensorRT plugin: not built" in said


OLDEST_AND_NEWEST = {"10.3.0": "v10.3.0", "11.1.0": "v11.1"}


def fetched(search: Search, version: str, url: str) -> Path:
    """The folder of headers that CMake fetches from `url` where TensorRT `version` is installed."""
    python = search.folder / "python"  # stands for one whose packages hold that TensorRT
    python.write_text(f"#!/bin/sh\necho {version}.26\n")
    python.chmod(0o755)
    status, said = search(SHADOWC_TENSORRT_URL=url, SHADOWC_PYTHON=python)
    assert status == 0
    folder = search.folder / "out" / "tensorrt_headers" / OLDEST_AND_NEWEST[version]
    assert f"found trt{version.split('.')[0]} in {folder}" in said
    return folder


@needs_cmake
@pytest.mark.parametrize("version", OLDEST_AND_NEWEST)
def test_headers_of_the_installed_versions_tag_match_their_hash(search, version):
    here = toolchain.header_sets().get(version)
    if here is None:
        pytest.skip(f"needs the headers of TensorRT {version} in TENSORRT_INCLUDE_DIR, to stand for the network")
    shutil.copytree(here, search.folder / "mirror" / OLDEST_AND_NEWEST[version] / "include")
    fetched(search, version, (search.folder / "mirror").as_uri())


@needs_cmake
@needs_compiler
@pytest.mark.network
@pytest.mark.parametrize("version", OLDEST_AND_NEWEST)
def test_sources_compile_against_the_oldest_and_newest_headers_from_the_network(search, version):
    url = "https://raw.githubusercontent.com/NVIDIA/TensorRT"
    try:
        urllib.request.urlopen(f"{url}/v11.1/include/NvInferVersion.h", timeout=10).close()
    except OSError as error:
        pytest.skip(f"{url} does not answer: {error}")
    folder = fetched(search, version, url)
    if toolchain.cuda_include() is None:
        pytest.skip("needs the CUDA toolkit's headers")
    assert complaints(folder, sorted(toolchain.PLUGIN_SOURCES.glob("*.cc"))) == ""


# --- SHADOWC_CUDA ---------------------------------------------------------------------------------------------------


@needs_cmake
@needs_compiler
@pytest.mark.parametrize(
    ("choice", "status", "sentence"),
    [
        ("AUTO", 0, "GPU operators: not built (/bin/false does not work)"),
        ("ON", 1, "SHADOWC_CUDA=ON: expected a working nvcc, found: /bin/false does not work. Install the CUDA"),
        ("OFF", 0, "GPU operators: not built (SHADOWC_CUDA=OFF)"),
        ("MAYBE", 1, "SHADOWC_CUDA: expected AUTO, ON or OFF, found 'MAYBE'"),
    ],
)
def test_gpu_part_is_left_out_where_nvcc_does_not_work_unless_it_was_asked_for(tmp_path, choice, status, sentence):
    (tmp_path / "cmake").symlink_to(toolchain.TOP / "cmake")
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.24)\nproject(choice LANGUAGES CXX)\ninclude(cmake/cuda.cmake)\n"
    )
    done = subprocess.run(
        ["cmake", "-S", ".", "-B", "out", "-DSHADOWC_NVCC=/bin/false", f"-DSHADOWC_CUDA={choice}"],
        cwd=tmp_path, env={"PATH": os.environ["PATH"]}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == status
    assert sentence in " ".join((done.stdout + done.stderr).split())


# --- the script that fetches a set from PyPI ------------------------------------------------------------------------


def fetch(folder: Path, python: str, **environment: str) -> subprocess.CompletedProcess[str]:
    (folder / "scripts").mkdir()
    shutil.copy(toolchain.TOP / "scripts" / "tensorrt_headers.sh", folder / "scripts")
    (folder / "python").write_text(f"#!/bin/sh\n{python}\n")
    (folder / "python").chmod(0o755)
    command = ["bash", str(folder / "scripts" / "tensorrt_headers.sh"), str(folder / "python")]
    return subprocess.run(
        command, env={"PATH": "/usr/bin:/bin"} | environment, capture_output=True, text=True, check=True
    )


@pytest.mark.skipif(toolchain.nvcc_path() is None, reason="needs nvcc")
def test_a_failed_download_of_headers_is_one_line_and_no_error(tmp_path):
    nvcc = Path(toolchain.nvcc_path() or "").parent
    done = fetch(tmp_path, "echo the index does not answer >&2; exit 1", PATH=f"{nvcc}:/usr/bin:/bin")
    assert done.stdout == (
        "no TensorRT headers: kernel-lens==2.0.1 could not be had (the index does not answer); "
        "its plugin is not built\n"
    )


def test_headers_that_are_there_already_are_not_fetched(tmp_path):
    done = fetch(tmp_path, "echo called >&2; exit 1", TENSORRT_INCLUDE_DIR="/somewhere")
    assert (done.stdout, done.stderr) == ("", "")


# --- the sources against headers ------------------------------------------------------------------------------------


def complaints(headers: Path, sources: Iterable[Path]) -> str:
    """What the compiler says about sources of the plugin."""
    system = [str(part) for path in (headers, toolchain.cuda_include()) for part in ("-isystem", path)]
    command = ["g++", "-std=c++20", "-fsyntax-only", "-Wall", "-Wextra", f"-I{toolchain.KERNEL_SOURCES}", *system]
    return subprocess.run([*command, *map(str, sources)], capture_output=True, text=True, check=False).stderr


@needs_compiler
@pytest.mark.parametrize("version", list(toolchain.header_sets()) or ["none"])
def test_sources_compile_against_the_headers_that_are_here(version):
    sets = toolchain.header_sets()
    if version not in sets or toolchain.cuda_include() is None:
        pytest.skip("no TensorRT headers here: set TENSORRT_INCLUDE_DIR")
    if version.startswith(("10.0.", "10.1.", "10.2.")):
        assert "expected 10.3 or newer" in complaints(sets[version], [toolchain.PLUGIN_SOURCES / "host.cc"])
    else:
        assert complaints(sets[version], sorted(toolchain.PLUGIN_SOURCES.glob("*.cc"))) == ""


@needs_compiler
@pytest.mark.parametrize(
    ("major", "minor", "sentence"), [(10, 2, "expected 10.3 or newer"), (12, 0, "found another major version")]
)
def test_headers_out_of_range_are_refused_by_one_sentence_of_the_compiler(headers, tmp_path, major, minor, sentence):
    shutil.copytree(headers, tmp_path / "include")
    with (tmp_path / "include" / "NvInferVersion.h").open("a") as version:
        version.write("#undef NV_TENSORRT_MAJOR\n#undef NV_TENSORRT_MINOR\n")
        version.write(f"#define NV_TENSORRT_MAJOR {major}\n#define NV_TENSORRT_MINOR {minor}\n")
    said = complaints(tmp_path / "include", [toolchain.PLUGIN_SOURCES / "host.cc"])
    assert "#error" in said
    assert sentence in said
