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
from operator import attrgetter
from pathlib import Path

import filelock

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "plugins" / "cuda"
SHIM = Path(__file__).parent / "shim"
FOLDER = ROOT / "build" / "emulation"
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


def build(*, asan: bool = False, kernels: Path = KERNELS) -> Path:
    """Path of the library; only what is new among sources, flags and compiler is compiled.

    Args:
        asan: with AddressSanitizer, which has to be loaded into the process first (see `asan_environment`).
        kernels: the folder of the .cu files, for tests that change a copy.

    Raises:
        UnavailableError: a compiler or the headers are missing.
        RuntimeError: the sources do not compile; the message is the compiler's.
    """
    cxx, headers, flags = compiler(), cuda_headers(), _flags(asan=asan)
    # By name: the library must not depend on where the folders lie.
    files = sorted(
        (f for folder in (kernels, SHIM) for f in folder.iterdir() if f.suffix in _SUFFIXES), key=attrgetter("name")
    )
    included = [file for file in files if file.suffix in {".cuh", ".h"}]
    shared = _digest(included, cxx, str(headers), *flags, _processor())
    command = [cxx, *flags, "-isystem", str(headers), f"-I{SHIM}", f"-I{kernels}"]

    def to_object(source: Path) -> Path:
        target = FOLDER / f"{source.name}.{_digest([source], shared)}.o"
        return _made(target, [*command, "-x", "c++", "-c", str(source)])

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(to_object, [file for file in files if file.suffix in {".cu", ".cc"}]))
    # -Bsymbolic: a CUDA runtime that the process has loaded must not answer for the emulated one.
    linking = ["-shared", "-Wl,-Bsymbolic"]
    digest = _digest([], *linking, *(file.name for file in objects))
    return _made(FOLDER / f"libshadowc_emulation.{digest}.so", [*command, *linking, *map(str, objects)])


def _digest(files: Sequence[Path], *words: str) -> str:
    digest = hashlib.sha256("\0".join(words).encode())
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def _made(target: Path, command: list[str]) -> Path:
    """The file that the compiler writes, unless it is there already; one process at a time makes it."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(f"{target}.lock"):
        if not target.is_file():
            part = f"{target}.part"
            result = subprocess.run([*command, "-o", part], capture_output=True, text=True, check=False)
            if result.returncode != 0:
                raise RuntimeError(f"{' '.join(command)}\n{result.stderr}")
            Path(part).replace(target)
    return target


@functools.cache
def _processor() -> str:
    """What -march=native depends on."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text(encoding="utf-8").splitlines() if information.is_file() else []
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def asan_environment() -> dict[str, str]:
    """What to add to the environment of a Python that loads the AddressSanitizer build."""
    runtime = subprocess.run(
        [compiler(), "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not Path(runtime).is_absolute():
        raise UnavailableError("the C++ compiler brings no AddressSanitizer (libasan.so)")
    return {
        "LD_PRELOAD": str(Path(runtime).resolve()),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
    }


if __name__ == "__main__":
    print(build(asan="--asan" in sys.argv))
