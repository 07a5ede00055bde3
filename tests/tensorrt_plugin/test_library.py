# SPDX-License-Identifier: Apache-2.0
"""The built plugin files: symbols, dependencies, GPU code. Nothing is loaded."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from tests.tensorrt_plugin import checks, toolchain

pytestmark = pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf and nm (binutils)")
needs_cuobjdump = pytest.mark.skipif(
    toolchain.cuobjdump_path() is None, reason="no cuobjdump: make rtx, or a full CUDA toolkit"
)
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
needs_nvcc = pytest.mark.skipif(toolchain.nvcc_path() is None, reason="needs nvcc")


def test_plugin_exports_its_two_symbols_and_its_twin_none(plugin):
    assert checks.exports(plugin) == []
    assert checks.exports(toolchain.twin(plugin), frozenset()) == []


def test_plugin_needs_neither_tensorrt_nor_the_driver_nor_a_shared_cuda_runtime(plugin):
    assert checks.needs(plugin) == []
    assert checks.needs(toolchain.twin(plugin)) == []


@needs_cuobjdump
def test_plugin_holds_code_for_every_architecture_and_ptx_for_the_last(plugin):
    assert checks.architectures(plugin) == []
    assert checks.architectures(toolchain.twin(plugin)) == []


def test_kernels_and_glue_call_no_cuda_function_that_allocates_or_waits():
    if not toolchain.objects():
        pytest.skip("no build folder here (an installed wheel): " + toolchain.NO_PLUGIN)
    assert checks.cuda_calls(toolchain.objects()) == []


def test_name_library_has_the_name_that_rtx_opens_and_needs_nothing_but_the_real_one(plugin):
    dynamic = toolchain.run("readelf", "--wide", "--dynamic", plugin.with_name("libshadowc_rtx_name.so"))
    assert re.findall(r"\((?:SONAME|NEEDED|RUNPATH|RPATH)\).*\[(.+)\]", dynamic) == [
        "libtensorrt_rtx.so.1",
        "libtensorrt_rtx.so",
    ]


# --- planted defects ------------------------------------------------------------------------------------------------


def compiled(folder: Path, source: str, *flags: str, name: str = "planted.so") -> Path:
    (folder / "planted.cc").write_text(source)
    toolchain.run("g++", "-shared", "-fPIC", folder / "planted.cc", *flags, "-o", folder / name, cwd=folder)
    return folder / name


TWO = 'extern "C" void getCreators() {} extern "C" void setLoggerFinder() {}'


@needs_compiler
def test_a_third_symbol_is_noticed(tmp_path):
    assert checks.exports(compiled(tmp_path, TWO)) == []
    assert checks.exports(compiled(tmp_path, TWO + " int leaked;")) == ["leaked is exported"]


@needs_compiler
def test_a_missing_symbol_is_noticed(tmp_path):
    assert checks.exports(compiled(tmp_path, "int x;"), checks.EXPORTS | {"x"}) == [
        "getCreators is not exported",
        "setLoggerFinder is not exported",
    ]


@needs_compiler
def test_a_link_to_the_driver_is_noticed(tmp_path):
    compiled(tmp_path, 'extern "C" int cuInit() { return 0; }', "-Wl,-soname,libcuda.so.1", name="libcuda.so.1")
    source = 'extern "C" int cuInit(); extern "C" int call() { return cuInit(); }'
    assert checks.needs(compiled(tmp_path, source, "-L.", "-l:libcuda.so.1")) == ["libcuda.so.1 is needed"]


@needs_compiler
@pytest.mark.parametrize("call", ["cudaMalloc", "cudaStreamSynchronize", "cuCtxSynchronize", "cudaMemcpy"])
def test_a_call_that_allocates_or_waits_is_noticed(tmp_path, call):
    source = f'extern "C" int {call}(...); extern "C" int cudaLaunchKernel(...);'
    use = f"int launch() {{ return {call}() + cudaLaunchKernel(); }}"
    found = compiled(tmp_path, source + use, "-c", name="planted.o")
    assert checks.cuda_calls([found]) == [f"planted.o calls {call}"]


@needs_cuobjdump
@needs_nvcc
def test_a_missing_architecture_and_ptx_of_another_are_noticed(tmp_path):
    (tmp_path / "planted.cu").write_text("__global__ void f(float* x) { x[threadIdx.x] = 1; }")
    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in toolchain.architectures() if a != "89"]
    nvcc = toolchain.nvcc_path()
    toolchain.run(nvcc, *codes, "-gencode=arch=compute_75,code=compute_75", "-c", "planted.cu", cwd=tmp_path)
    assert checks.architectures(tmp_path / "planted.o") == ["no code for sm_89", "PTX for ['75'], expected 120"]
