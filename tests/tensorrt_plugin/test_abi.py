# SPDX-License-Identifier: Apache-2.0
"""The guard against a TensorRT that the plugin was not built for, with stand-ins for TensorRT's library that only tell
a version. A wrong table of virtual functions would crash the host; the guard turns it into a sentence."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys

import pytest

from tests.tensorrt_plugin import toolchain

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

STAND_IN = """
#include <cstdint>
extern "C" int32_t getInferLibVersion() { return VERSION; }
extern "C" int32_t creators_of(void* const* (*get)(int32_t&)) { int32_t n = -1; get(n); return n; }
"""
CHILD = """
import ctypes, json, sys
libraries, plugin, through = json.loads(sys.argv[1])
loaded = [ctypes.CDLL(path) for path in libraries]
plugin = ctypes.CDLL(plugin)
count = ctypes.c_int(-1)
if through is None:
    getattr(plugin, "getCreators", lambda n: None)(ctypes.byref(count))
    print(count.value)
else:
    print(loaded[through].creators_of(plugin.getCreators))
"""
NAMES = {"trt10": "TensorRT 10.x", "trt11": "TensorRT 11.x", "rtx1": "TensorRT for RTX 1.x"}
LIBRARIES = {
    "libnvinfer.so.10": 101401,
    "libnvinfer.so.11": 110400,
    "libnvinfer.so.12": 120000,
    "libtensorrt_rtx.so.1": 10701,
}
OWN = {"trt10": "libnvinfer.so.10", "trt11": "libnvinfer.so.11", "rtx1": "libtensorrt_rtx.so.1"}


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tensorrt")
    (folder / "stand_in.cc").write_text(STAND_IN)
    for name, version in LIBRARIES.items():
        toolchain.run(
            "g++", "-shared", "-fPIC", f"-DVERSION={version}", f"-Wl,-soname,{name}", "stand_in.cc", "-o", name,
            cwd=folder,
        )  # fmt: skip
    return folder


def ask(stand_ins, plugin, *names, through=None):
    """(creators given out, what the plugin wrote), with these libraries in the process, called by one of them."""
    arguments = json.dumps([[str(stand_ins / name) for name in names], str(plugin), through])
    done = subprocess.run([sys.executable, "-c", CHILD, arguments], capture_output=True, text=True, check=True)
    return int(done.stdout), done.stderr


def family(plugin) -> str:
    return re.fullmatch(r"libshadowc_(\w+)\.so", plugin.name)[1]


def test_plugin_gives_its_creators_to_the_library_it_was_built_for(stand_ins, plugin):
    assert ask(stand_ins, plugin, OWN[family(plugin)], through=0) == (3, "")


def test_plugin_without_tensorrt_in_the_process_says_so(stand_ins, plugin):
    count, said = ask(stand_ins, plugin)
    assert count == 0
    assert re.fullmatch(
        rf"shadowc: error: this plugin was built for {NAMES[family(plugin)]} \(headers [\d.]+\), and no TensorRT is "
        r"loaded in this process: load TensorRT first\n", said,
    )  # fmt: skip


@pytest.mark.parametrize("other", ["libnvinfer.so.10", "libnvinfer.so.11", "libnvinfer.so.12"])
def test_plugin_refuses_another_major_version_and_names_both(stand_ins, plugin, other):
    if other == OWN[family(plugin)]:
        other = "libtensorrt_rtx.so.1"  # and takes RTX, which has the same plugin interface
        assert ask(stand_ins, plugin, other, through=0) == (3, "")
        return
    count, said = ask(stand_ins, plugin, other, through=0)
    version = LIBRARIES[other]
    assert count == 0
    assert f"built for {NAMES[family(plugin)]}" in said
    assert f"the process runs {version // 10000}.{version // 100 % 100}.{version % 100}" in said
    assert other in said
    assert "use the plugin built for that version, or set TENSORRT_INCLUDE_DIR" in said


def test_the_caller_decides_where_two_versions_are_loaded(stand_ins, plugin):
    own, other = OWN[family(plugin)], "libnvinfer.so.12"
    assert ask(stand_ins, plugin, other, own, through=1)[0] == 3
    assert ask(stand_ins, plugin, other, own, through=0)[0] == 0


def test_twin_without_tensorrt_says_so_and_registers_nothing(stand_ins, plugin):
    _, said = ask(stand_ins, toolchain.twin(plugin))
    assert "no TensorRT is loaded in this process: load TensorRT first" in said


def test_twin_refuses_a_registry_of_another_family(stand_ins, plugin):
    other = "libnvinfer.so.11" if family(plugin) == "trt10" else "libnvinfer.so.10"
    _, said = ask(stand_ins, toolchain.twin(plugin), other)
    assert "shadowc: error: this plugin was built for" in said
    assert other in said


def test_twin_names_a_library_that_has_no_registry(stand_ins, plugin):
    _, said = ask(stand_ins, toolchain.twin(plugin), OWN[family(plugin)])
    assert said == f"shadowc: error: {OWN[family(plugin)]} has no plugin registry\n"
