# SPDX-License-Identifier: Apache-2.0
"""Builds kernel_driver: for 64-bit Arm with a cross compiler, and for this machine under sanitizers."""

from __future__ import annotations

import functools
import shutil
import subprocess
from pathlib import Path

import filelock

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "build" / "native"
PACKAGES = ROOT / "build" / "aarch64" / "root"
FLAGS = {
    "aarch64": ("-DCMAKE_TOOLCHAIN_FILE=cmake/aarch64.cmake", "-DCMAKE_BUILD_TYPE=Release"),
    # The best level of this machine alone: threads share the work in the same way at all of them, and all of them under
    # the sanitizer take minutes to compile.
    "tsan": (
        "-DCMAKE_BUILD_TYPE=RelWithDebInfo",
        "-DCMAKE_CXX_FLAGS=-fsanitize=thread -O1 -g1 -march=native -DHWY_COMPILE_ONLY_STATIC",
    ),
    "asan": (
        "-DCMAKE_BUILD_TYPE=RelWithDebInfo",
        "-DSHADOWC_WERROR=OFF",  # both together make GCC see uninitialised values that there are not
        "-DCMAKE_CXX_FLAGS=-fsanitize=address,undefined -fno-sanitize-recover=all -O1 -g1 -march=native "
        "-DHWY_COMPILE_ONLY_STATIC",
    ),
}


class UnavailableError(Exception):
    """What this machine lacks, as a sentence."""


def need(*programs: str) -> None:
    """Raises UnavailableError unless all programs are found."""
    missing = [program for program in programs if shutil.which(program) is None]
    if missing:
        raise UnavailableError(f"no {' and no '.join(missing)} here; see scripts/aarch64.sh for what apt has")


@functools.cache
def driver(kind: str) -> Path:
    """The built program; Ninja compiles what has changed.

    Args:
        kind: a key of FLAGS.

    Raises:
        UnavailableError: no compiler for it.
        RuntimeError: it does not build; the message is the end of the compiler's.
    """
    need("cmake", "ninja", "aarch64-linux-gnu-g++" if kind == "aarch64" else "g++")
    if kind == "aarch64" and not PACKAGES.is_dir():  # CMake would look for them on the network
        raise UnavailableError(f"no headers for 64-bit Arm in {PACKAGES.relative_to(ROOT)}: bash scripts/aarch64.sh")
    folder = FOLDER / kind
    folder.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(FOLDER / f"{kind}.lock"):
        switches = ("-DSHADOWC_KERNEL_DRIVER=ON", "-DSHADOWC_WERROR=ON", "-DSHADOWC_CUDA=OFF")
        _run("cmake", "-S", ".", "-B", str(folder), "-G", "Ninja", *switches, *FLAGS[kind])
        _run("cmake", "--build", str(folder), *(() if kind == "aarch64" else ("--target", "kernel_driver")))
    return folder / "tests" / "plugins" / "native" / "kernel_driver"


def _run(*command: str) -> None:
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{(result.stdout + result.stderr)[-4000:]}")
