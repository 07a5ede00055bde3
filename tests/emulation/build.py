# SPDX-License-Identifier: Apache-2.0
"""Compiles plugins/cuda for this machine's processor: the kernels' own sources over the shim in tests/emulation/shim.

Run as a program, it prints the path of the library: `python -m tests.emulation.build [--asan]`.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import site
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import filelock

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "plugins" / "cuda"
SHIM = Path(__file__).parent / "shim"
_SUFFIXES = {".cu", ".cuh", ".h", ".cc"}


class UnavailableError(Exception):
    """What this machine lacks to compile the kernels, as a sentence."""


def cuda_headers() -> Path:
    """The folder of cuda_fp16.h: of a toolkit, or of NVIDIA's header packages from PyPI.

    Raises:
        UnavailableError: there is none.
    """
    roots = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    if compiler := shutil.which("nvcc"):
        roots.append(Path(compiler).resolve().parents[1])
    folders = [root / "include" for root in (*roots, Path("/usr/local/cuda"))]
    folders += [found for place in site.getsitepackages() for found in Path(place).glob("nvidia/*/include")]
    for folder in folders:
        if all((folder / name).is_file() for name in ("cuda_runtime_api.h", "cuda_fp16.h", "cuda_bf16.h")):
            return folder
    raise UnavailableError("no CUDA headers (cuda_fp16.h, cuda_bf16.h, cuda_runtime_api.h); set CUDA_HOME")


def compiler() -> str:
    """The C++ compiler.

    Raises:
        UnavailableError: there is none.
    """
    found = shutil.which(os.environ.get("CXX", "g++"))
    if found is None:
        raise UnavailableError("no C++ compiler (g++, or the one that CXX names)")
    return found


def _flags(*, asan: bool) -> list[str]:
    shared = ["-std=c++17", "-march=native", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    return [*shared, *(["-O1", "-g", "-fsanitize=address"] if asan else ["-O2"])]


def _digest(files: Sequence[Path], words: Sequence[str]) -> str:
    digest = hashlib.sha256("\0".join(words).encode())
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def build(*, asan: bool = False, kernels: Path = KERNELS, build_folder: Path | None = None) -> Path:
    """Path of the library; compiled only if sources, flags or compiler are new.

    Args:
        asan: with AddressSanitizer, which has to be loaded into the process first (see `asan_environment`).
        kernels: the folder of the .cu files, for tests that change a copy.
        build_folder: where results are kept; build/emulation of the repository if not given.

    Raises:
        UnavailableError: a compiler or the headers are missing.
        subprocess.CalledProcessError: the sources do not compile.
    """
    cxx, headers, flags = compiler(), cuda_headers(), _flags(asan=asan)
    files = sorted(f for folder in (kernels, SHIM) for f in folder.iterdir() if f.suffix in _SUFFIXES)
    digest = _digest(files, [cxx, str(headers), *flags, _processor()])
    folder = (build_folder or ROOT / "build" / "emulation") / digest
    library = folder / "libshadowc_emulation.so"
    folder.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder / "lock"):
        if not library.is_file():
            _compile([cxx, *flags, "-isystem", str(headers), f"-I{SHIM}", f"-I{kernels}"], files, folder, library)
    return library


@functools.cache
def _processor() -> str:
    """What -march=native depends on."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text(encoding="utf-8").splitlines() if information.is_file() else []
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _compile(command: list[str], files: Sequence[Path], folder: Path, library: Path) -> None:
    sources = [file for file in files if file.suffix in {".cu", ".cc"}]

    def to_object(source: Path) -> str:
        target = str(folder / f"{source.name}.o")
        _run([*command, "-x", "c++", "-c", str(source), "-o", target])
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(to_object, sources))
    part = library.with_suffix(".part")
    _run([*command, "-shared", *objects, "-o", str(part)])
    part.replace(library)


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{result.stderr}")


def asan_environment() -> dict[str, str]:
    """What to add to the environment of a Python that loads the AddressSanitizer build."""
    runtime = subprocess.run(
        [compiler(), "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not Path(runtime).is_absolute():
        raise UnavailableError("the C++ compiler brings no AddressSanitizer (libasan.so)")
    return {"LD_PRELOAD": str(Path(runtime).resolve()), "ASAN_OPTIONS": "detect_leaks=0"}


if __name__ == "__main__":
    print(build(asan="--asan" in sys.argv))
