# SPDX-License-Identifier: Apache-2.0
"""Builds the hosts of examples/ under build/examples, once for all test processes, and runs them."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

ROOT = Path(__file__).parents[2]
CPP = ROOT / "examples" / "cpp"
GENAI = ROOT / "examples" / "genai"
BUILDS = ROOT / "build" / "examples"
GENAI_VERSION = "0.18.0"
"""The newest that was tested; examples/genai/README.md has the others."""
LONGEST = 600
"""Seconds that a command may take."""


def missing_for_cpp() -> str:
    """What a build of examples/cpp lacks here; empty: nothing."""
    if not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        return "no C++ compiler"
    if not shutil.which("cmake"):
        return "no cmake"
    return "" if headers() else "no ONNX Runtime C++ headers"


def headers() -> Path | None:
    """The folder of onnxruntime_cxx_api.h: a system's, or the one that the build of the operators fetched."""
    system = [Path(prefix) / "include" / "onnxruntime" for prefix in ("/usr", "/usr/local")]
    fetched = ROOT.glob("build/*/_deps/onnxruntime_release-src/include")
    places = (place for base in (*system, *fetched) for place in (base, base / "core" / "session"))
    return next((place for place in places if (place / "onnxruntime_cxx_api.h").is_file()), None)


def wheel_library(environment: Path | None = None) -> Path:
    """The libonnxruntime of the package that Python uses here, or in another environment."""
    if environment is not None:
        return next(environment.glob("lib/python*/site-packages/onnxruntime/capi/libonnxruntime.so.*"))
    spec = importlib.util.find_spec("onnxruntime")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return next(Path(spec.submodule_search_locations[0]).glob("capi/libonnxruntime.so.*"))


def build_cpp(name: str, **variables: Path | None) -> Path:
    """Build examples/cpp with CMake; returns the program. A second build with the same sources takes no time."""
    folder = BUILDS / name
    chosen = {"ONNXRUNTIME_INCLUDE": headers(), "ONNXRUNTIME_LIBRARY": wheel_library(), **variables}
    with _alone(name):
        defines = [f"-D{key}={value}" for key, value in chosen.items() if value is not None]
        ran(["cmake", "--fresh", "-S", str(CPP), "-B", str(folder), *defines])
        ran(["cmake", "--build", str(folder)])
    return folder / "shadowc_generate"


def genai_environment() -> Path:
    """A virtual environment with stock onnxruntime-genai and nothing of shadowc; returns its folder."""
    folder = BUILDS / f"genai-{GENAI_VERSION}"
    ready = folder / "ready"
    with _alone(folder.name):
        if not ready.is_file():
            shutil.rmtree(folder, ignore_errors=True)
            ran([sys.executable, "-m", "venv", str(folder)])
            pip = [folder / "bin" / "python", "-m", "pip", "--disable-pip-version-check"]
            ran([*pip, "install", "--quiet", f"onnxruntime-genai=={GENAI_VERSION}"])
            ready.touch()
    return folder


def genai_library(environment: Path) -> Path:
    """The C library of onnxruntime-genai."""
    return next(environment.glob("lib/python*/site-packages/onnxruntime_genai/libonnxruntime-genai.so"))


def ran(command: Sequence[object], **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command that must succeed."""
    result = run(command, **variables)
    assert result.returncode == 0, f"{' '.join(map(str, command))}\n{result.stdout[-2000:]}\n{result.stderr[-2000:]}"
    return result


def run(command: Sequence[object], **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command and keep what it prints."""
    environment = {**os.environ, **variables}
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=False, timeout=LONGEST, env=environment
    )


@contextmanager
def _alone(name: str) -> Iterator[None]:
    BUILDS.mkdir(parents=True, exist_ok=True)
    with FileLock(BUILDS / f"{name}.lock"):
        yield
