# SPDX-License-Identifier: Apache-2.0
"""Compiles plugins/cuda for the GPU as a plain library, with the same C interface as the emulation's.

Run as a program, it prints the path of the library: `python -m tests.gpu.build [sm_86]`.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import filelock

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "plugins" / "cuda"
OURS = (Path(__file__).parent / "device_memory.cu", ROOT / "tests" / "emulation" / "shim" / "layout.cc")
"""Device memory and sizes of structs behind the emulation's interface."""


class UnavailableError(Exception):
    """What this machine lacks to compile for a GPU, as a sentence."""


def nvcc() -> str:
    """The CUDA compiler.

    Raises:
        UnavailableError: there is none.
    """
    found = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if found is None:
        raise UnavailableError("no nvcc (install the CUDA toolkit, or add its bin folder to PATH)")
    return found


def build(architecture: str, *, jobs: int = 2) -> Path:
    """Path of the library for one architecture (such as "sm_86"); compiled only if sources or flags are new.

    Raises:
        UnavailableError: there is no nvcc.
        RuntimeError: the sources do not compile.
    """
    compiler = nvcc()
    flags = [f"-arch={architecture}", "-std=c++17", "-O3", "-lineinfo", "-Xcompiler", "-fPIC", "-cudart", "static"]
    files = sorted(path for path in KERNELS.iterdir() if path.suffix in {".cu", ".cuh", ".h"})
    digest = hashlib.sha256(" ".join([compiler, *flags]).encode())
    for file in (*files, *OURS):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    folder = ROOT / "build" / "gpu" / digest.hexdigest()[:16]
    library = folder / "libshadowc_device.so"
    folder.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder / "lock"):
        if not library.is_file():
            _compile(
                [compiler, *flags], [file for file in (*files, *OURS) if file.suffix in {".cu", ".cc"}], library, jobs
            )
    return library


def _compile(command: list[str], sources: list[Path], library: Path, jobs: int) -> None:
    def to_object(source: Path) -> str:
        target = library.with_name(f"{source.name}.o")
        _run([*command, f"-I{KERNELS}", "-c", str(source), "-o", str(target)])
        return str(target)

    with ThreadPoolExecutor(jobs) as pool:
        objects = list(pool.map(to_object, sources))
    part = library.with_suffix(".part")
    _run([*command, "-shared", *objects, "-o", str(part)])
    part.replace(library)


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{result.stdout}{result.stderr}")


if __name__ == "__main__":
    print(build(sys.argv[1] if len(sys.argv) > 1 else "native"))
