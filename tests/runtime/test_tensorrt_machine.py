# SPDX-License-Identifier: Apache-2.0
"""An engine meets a machine: every mismatch in one go, each with built-with, running and the next command."""

from __future__ import annotations

import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest

from shadowc.runtime.load import load, read_manifest, verify
from shadowc.runtime.tensorrt import bindings, cuda, machine
from shadowc.runtime.tensorrt.bindings import Bindings, Messages
from shadowc.runtime.tensorrt.cuda import Gpu
from shadowc.runtime.tensorrt.machine import Machine, Plugin
from shadowc.spec.errors import IncompatibleEngineError, SetupError, ShadowcError, UnsupportedError, VerificationError
from shadowc.spec.manifest import EngineManifest
from tests.runtime.tensorrt_folder import PLUGIN, write_folder

RTX = Bindings(None, "tensorrt_rtx", "rtx1", "1.7.1.116", None)
AMPERE = Gpu("NVIDIA GeForce RTX 3090", (8, 6))
NO_GPU = SetupError("this machine has no NVIDIA driver, and so no usable GPU", hint=cuda.NO_GPU_HINT)
HAS_DRIVER = Path("/dev/nvidia0").exists()


@pytest.fixture(scope="module")
def folder(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only."""
    out = tmp_path_factory.mktemp("machine") / "engine"
    write_folder(folders["fp32"], out)
    return out


@pytest.fixture(scope="module")
def manifest(folder: Path) -> EngineManifest:
    return read_manifest(folder)


def fitting(manifest: EngineManifest) -> Machine:
    return Machine(AMPERE, RTX, Plugin(Path("/site/libshadowc_trt11.so"), manifest.files[PLUGIN].sha256))


def test_a_machine_that_fits_has_no_problems(manifest: EngineManifest) -> None:
    assert machine.problems(manifest, fitting(manifest)) == []


REBUILT = IncompatibleEngineError
MISMATCHES = {
    "version": (
        {"library": replace(RTX, version="1.6.0.1")},
        "built with TensorRT for RTX 1.7.1.116, running TensorRT for RTX 1.6.0.1",
        "--target tensorrt-rtx",
        REBUILT,
    ),
    "family": (
        {"library": replace(RTX, family="trt10", version="10.14.1")},
        "built with TensorRT for RTX 1.7.1.116, running TensorRT 10.14.1",
        "--target tensorrt ",
        REBUILT,
    ),
    "no library": (
        {"library": SetupError("none", hint="")},
        "built with TensorRT for RTX 1.7.1.116, running without TensorRT",
        "pip install 'shadowc[rtx]'",
        SetupError,
    ),
    "between": (
        {"gpu": Gpu("NVIDIA H100", (9, 0))},
        "built for compute capability 8.0, 8.6, 8.9, and from 12.0 on, running NVIDIA H100 (compute capability 9.0)",
        "--target tensorrt ",
        REBUILT,
    ),
    "older": ({"gpu": Gpu("NVIDIA T4", (7, 5))}, "running NVIDIA T4", "--target tensorrt ", REBUILT),
    "oldest": ({"gpu": Gpu("NVIDIA V100", (7, 0))}, "running NVIDIA V100", "--target cpu ", REBUILT),
    "plugin": (
        {"plugin": Plugin(Path("/site/p.so"), "0" * 64)},
        "running /site/p.so (000000000000), another build",
        "SHADOWC_TRT_LIBRARY=FOLDER/libshadowc_trt11.so; or: shadowc compile --model",
        REBUILT,
    ),
    "no plugin": (
        {"plugin": SetupError("the plugin library is not installed", hint="make setup")},
        "the plugin library is not installed",
        "make setup; or, if you trust where the engine came from: SHADOWC_TRT_LIBRARY=FOLDER/libshadowc_trt11.so",
        SetupError,
    ),
}


@pytest.mark.parametrize(("changes", "says", "hint", "kind"), MISMATCHES.values(), ids=MISMATCHES)
def test_each_mismatch_says_built_with_running_and_the_next_command(
    manifest: EngineManifest, changes: dict[str, Any], says: str, hint: str, kind: type[ShadowcError]
) -> None:
    found = machine.problems(manifest, replace(fitting(manifest), **changes))
    with pytest.raises(kind, match=r"^mini cannot run here: ") as caught:
        machine.require_fit(Path("mini"), found)
    assert says in caught.value.message
    assert hint in caught.value.hint


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (12, 0), (12, 1)])
def test_listed_cards_and_those_above_the_portable_line_fit(
    manifest: EngineManifest, capability: tuple[int, int]
) -> None:
    assert machine.problems(manifest, replace(fitting(manifest), gpu=Gpu("card", capability))) == []


def test_all_mismatches_are_told_at_once(manifest: EngineManifest) -> None:
    worst = Machine(Gpu("NVIDIA H100", (9, 0)), replace(RTX, version="1.6"), Plugin(Path("/p.so"), "0" * 64))
    with pytest.raises(IncompatibleEngineError, match="for 3 reasons") as caught:
        machine.require_fit(Path("mini"), machine.problems(manifest, worst))
    assert len(caught.value.problems) == 3
    assert all("; next: shadowc compile" in text for text in caught.value.problems)


def test_without_a_gpu_that_is_the_only_finding(manifest: EngineManifest) -> None:
    worst = Machine(NO_GPU, SetupError("none", hint=""), SetupError("none", hint=""))
    with pytest.raises(SetupError, match="cannot run here: this machine has no NVIDIA driver") as caught:
        machine.require_fit(Path("mini"), machine.problems(manifest, worst))
    assert "--target cpu" in caught.value.hint


def test_the_engines_own_plugin_is_run_when_the_user_says_so_and_not_before(
    manifest: EngineManifest, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = replace(fitting(manifest), plugin=Plugin(Path("/site/p.so"), "0" * 64))
    (problem,) = machine.problems(manifest, other, folder)
    variable, _, value = shlex.split(problem.hint.split(": ", 1)[1].split("; or")[0])[0].partition("=")
    monkeypatch.setenv(variable, value)
    chosen = machine.installed_plugin("rtx1")
    assert chosen.path == folder / PLUGIN
    assert machine.problems(manifest, replace(other, plugin=chosen), folder) == []


def test_the_engines_own_plugin_is_not_offered_where_the_engine_must_be_built_again(manifest: EngineManifest) -> None:
    changed = replace(RTX, version="1.6"), Plugin(Path("/p.so"), "0" * 64)
    found = machine.problems(manifest, Machine(AMPERE, *changed))
    assert not any(machine.PLUGIN_VARIABLE in str(problem) for problem in found)


def test_command_to_build_again_knows_from_the_graph_whether_zeros_are_skipped(
    manifest: EngineManifest, folder: Path, tmp_path: Path
) -> None:
    turing = replace(fitting(manifest), gpu=Gpu("card", (7, 5)))
    (problem,) = machine.problems(manifest, turing, folder)
    assert "--no-skip-zeros" not in problem.hint
    model = onnx.load(folder / "decode.onnx")
    for attribute in (attribute for node in model.graph.node for attribute in node.attribute):
        attribute.i = 0 if attribute.name == "skip_zeros" else attribute.i
    onnx.save(model, tmp_path / "decode.onnx")
    (problem,) = machine.problems(manifest, turing, tmp_path)
    assert "--no-skip-zeros" in problem.hint


@pytest.mark.skipif(HAS_DRIVER, reason="an NVIDIA driver is here; the sentence is for machines without one")
def test_loading_on_a_machine_without_a_gpu_is_one_sentence(folder: Path) -> None:
    with pytest.raises(
        SetupError, match=r"cannot run here: (this machine has no NVIDIA driver|the NVIDIA driver sees no)"
    ):
        load(folder)


@pytest.mark.skipif(HAS_DRIVER, reason="an NVIDIA driver is here; the report is for machines without one")
def test_a_folder_is_verified_without_a_gpu(folder: Path) -> None:
    assert verify(folder).passed


@pytest.mark.parametrize("name", ["decode.plan", "weights.bin", PLUGIN])
def test_a_changed_file_comes_before_everything_else(folder: Path, tmp_path: Path, name: str) -> None:
    import shutil

    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    content = bytearray((copy / name).read_bytes())
    content[0] ^= 1
    (copy / name).write_bytes(content)
    with pytest.raises(VerificationError, match=f"{name} has changed"):
        load(copy)
    assert f"{name} has changed" in str(verify(copy))


@pytest.mark.parametrize("arguments", [{"threads": 2}, {"reference": True}, {"skip_zeros": False}])
def test_arguments_of_cpu_engines_are_refused_by_name(folder: Path, arguments: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedError, match=f"{next(iter(arguments))}: for engines of target cpu"):
        load(folder, **arguments)


def test_the_first_error_is_told_and_the_echo_of_the_missing_driver_is_not() -> None:
    echo = "[checkMacros.cpp::catchCudaError::250] Error Code 1: Cuda Runtime (cudaError 35: driver insufficient)"
    assert Messages(errors=[echo, "Plugin not found", "later"]).first_error() == "Plugin not found"
    assert Messages(errors=[echo]).first_error() == echo
    assert Messages().first_error() == "no reason was logged"


def test_an_unknown_major_version_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bindings.importlib.util, "find_spec", lambda name: object() if name == "tensorrt" else None)
    monkeypatch.setattr(bindings.importlib, "import_module", lambda name: SimpleNamespace(__version__="9.3.0"))
    monkeypatch.setattr(bindings, "installed_bindings", bindings.installed_bindings.__wrapped__)
    with pytest.raises(
        SetupError, match=r"tensorrt: version 9\.3\.0 is not supported; shadowc knows rtx1, trt10, trt11"
    ):
        bindings.find_bindings()


def test_the_wanted_family_is_preferred_over_others(monkeypatch: pytest.MonkeyPatch) -> None:
    both = replace(RTX, name="tensorrt", family="trt11", version="11.4"), RTX
    monkeypatch.setattr(bindings, "installed_bindings", lambda: (both, ()))
    assert bindings.find_bindings("rtx1") is RTX
    assert bindings.find_bindings("trt10").family == "trt11"


def test_the_plugin_variable_must_name_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(machine.PLUGIN_VARIABLE, str(tmp_path / "none.so"))
    with pytest.raises(SetupError, match="which is no file"):
        machine.installed_plugin("rtx1")
    (tmp_path / "none.so").write_bytes(b"x")
    assert machine.installed_plugin("rtx1").path == tmp_path / "none.so"


REFUSED = """
import sys
from pathlib import Path
from types import SimpleNamespace
from shadowc.runtime.tensorrt.bindings import find_bindings
from shadowc.runtime.tensorrt.plans import load_plugin, open_plan
from shadowc.spec.errors import ShadowcError

def attempt(call):
    try:
        call()
    except ShadowcError as error:
        print(type(error).__name__, error.message)

empty = SimpleNamespace(inputs=(), outputs=())
attempt(lambda: open_plan(find_bindings(), None, Path(sys.argv[1]), empty, None))
attempt(lambda: load_plugin(find_bindings(), Path(sys.argv[2]), ["shadowc::SparseFFN::1"]))
"""


@pytest.mark.skipif(HAS_DRIVER, reason="an NVIDIA driver is here, so its absence cannot echo")
def test_what_the_library_refuses_is_told_by_its_first_error(tmp_path: Path) -> None:
    """In a process of its own, since TensorRT may take its process down."""
    if not bindings.installed_bindings()[0]:
        pytest.skip("no TensorRT is installed: pip install 'shadowc[rtx]'")
    (tmp_path / "decode.plan").write_bytes(b"not a plan")
    command = [sys.executable, "-c", REFUSED, str(tmp_path / "decode.plan"), str(tmp_path / "none.so")]
    plan, plugin = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert plan.startswith("IncompatibleEngineError TensorRT for RTX")
    assert "decode.plan" in plan
    assert "readHeader" in plan
    assert "cudaError" not in plan
    assert "does not take the plugin" in plugin
    assert "none.so" in plugin


OPENED = """
import ctypes
from shadowc.runtime.tensorrt.bindings import find_bindings

try:
    ctypes.CDLL("libtensorrt_rtx.so")
    print("found before")
except OSError:
    find_bindings("rtx1")
    print(ctypes.CDLL("libtensorrt_rtx.so").getInferLibVersion())
"""


def test_the_library_finds_itself_by_its_bare_name() -> None:
    """It opens that name for networks with plugins, and ends the process where nothing is called so."""
    from shadowc.plugins import rtx_name_library

    found = [one for one in bindings.installed_bindings()[0] if one.name == "tensorrt_rtx_bindings"]
    if not found or rtx_name_library() is None:
        pytest.skip("needs TensorRT for RTX from PyPI, and the GPU operators built")
    said = subprocess.run([sys.executable, "-c", OPENED], capture_output=True, text=True, check=True).stdout.strip()
    major, minor, patch, _ = found[0].version.split(".")
    assert said == f"{major}{int(minor):02d}{int(patch):02d}"


SCOPE = """
import ctypes
from shadowc.runtime.tensorrt.bindings import find_bindings

find_bindings("rtx1")
print(hasattr(ctypes.CDLL(None), "cudaGetLastError"))
"""


def test_importing_the_bindings_puts_no_cuda_runtime_before_that_of_other_libraries() -> None:
    if not any(one.name == "tensorrt_rtx_bindings" for one in bindings.installed_bindings()[0]):
        pytest.skip("needs TensorRT for RTX from PyPI: make rtx")
    said = subprocess.run([sys.executable, "-c", SCOPE], capture_output=True, text=True, check=True).stdout.strip()
    assert said == "False"
