# SPDX-License-Identifier: Apache-2.0
"""The single checks of `shadowc doctor`: each looks at one thing and says what to type if it is not as it must be."""

from __future__ import annotations

import os
import platform
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from shadowc.cli import render

if TYPE_CHECKING:
    from shadowc.runtime.hardware import Hardware
    from shadowc.runtime.library import OpLibrary

State = Literal["ok", "note", "fails"]
LOWEST_PYTHON = (3, 11)
LOWEST = {
    "torch": (2, 10),
    "transformers": (5,),
    "onnx": (1, 19),
    "onnxscript": (0, 5, 7),
    "onnx-graphsurgeon": (0, 5, 8),
    "safetensors": (0, 5),
    "tokenizers": (0, 22, 1),
    "huggingface-hub": (1, 3),
    "numpy": (2,),
}
OPTIONAL = {
    "matplotlib": ("plot", "shadowc bench --plot"),
    "gguf": ("gguf", "--model FILE.gguf of shadowc collect and train"),
    "accelerate": ("gguf", "--model FILE.gguf of shadowc collect and train"),
}
"""Package -> extra that brings it, what it is for."""
TENSORRT_TARGETS = ("tensorrt-rtx", "tensorrt")
STREAM_BYTES = 1 << 28
"""Enough to lie outside every cache, little enough for a second's look."""
SLOW_STREAM = 8e9
"""Bytes per second below which a note is worth it: a desktop of ten years ago reads faster."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at."""

    name: str
    state: State
    found: str
    hint: str = ""


def python() -> Finding:
    """New enough."""
    found = f"{platform.python_version()} at {sys.executable}"
    if sys.version_info < LOWEST_PYTHON:
        return Finding("Python", "fails", found, "install Python 3.11 or newer")
    return Finding("Python", "ok", found)


def packages() -> list[Finding]:
    """All that the package needs, new enough."""
    findings = []
    for name, lowest in LOWEST.items():
        wanted = ".".join(map(str, lowest))
        version = _version(name)
        if version is None:
            findings.append(Finding(name, "fails", "not installed", f"pip install '{name}>={wanted}'"))
        elif _numbers(version) < lowest:
            findings.append(Finding(name, "fails", f"{version}, too old", f"pip install '{name}>={wanted}'"))
        else:
            findings.append(Finding(name, "ok", version))
    return findings


def onnx_runtime() -> Finding:
    """ONNX Runtime: exactly one distribution, new enough, and the files are its own."""
    from shadowc.runtime.ort_package import installed, to_install
    from shadowc.runtime.session import LOWEST_ORT

    found, keep = installed(), to_install()
    text = ", ".join(f"{name} {version}" for name, version in found.items())
    if not found:
        return Finding("ONNX Runtime", "fails", "not installed", f"pip install {keep}")
    module = _module_version()
    repair = f"pip uninstall -y {' '.join(found)} && pip install {keep}"
    if len(found) > 1:
        files = f"; the module says {module}" if module else "; the module cannot be imported"
        return Finding("ONNX Runtime", "fails", f"{text}: they overwrite each other's files{files}", repair)
    version = next(iter(found.values()))
    if module is None:
        return Finding("ONNX Runtime", "fails", f"{text} is installed, but cannot be imported", repair)
    if _numbers(module) != _numbers(version):
        return Finding("ONNX Runtime", "fails", f"{text} is installed, but its files are those of {module}", repair)
    if _numbers(version) < LOWEST_ORT:
        wanted = ".".join(map(str, LOWEST_ORT))
        return Finding("ONNX Runtime", "fails", f"{text}, too old", f"pip install '{keep}>={wanted}'")
    return Finding("ONNX Runtime", "ok", text)


def op_library() -> tuple[Finding, OpLibrary | None]:
    """The compiled operators: there, loadable, of this version, and taken by this ONNX Runtime."""
    from shadowc.runtime.library import REINSTALL, VARIABLE, OpLibrary
    from shadowc.runtime.ort_package import to_install
    from shadowc.spec.errors import ShadowcError

    try:
        library = OpLibrary.installed()
    except ShadowcError as error:
        return Finding("op library", "fails", error.message, error.hint), None
    api, offered, refusal = _api_of(library), _module_version(), _refusal(library)
    text = f"{library.version}, {library.isa}, ONNX Runtime API {api}, {library.path}"
    if os.environ.get(VARIABLE):
        text += f" ({VARIABLE} names it)"
    if offered is not None and api > _numbers(offered)[1]:
        wrong = f"built for API {api} of ONNX Runtime, version {offered} offers {_numbers(offered)[1]}"
        return Finding(
            "op library", "fails", f"{library.path}: {wrong}", f"pip install '{to_install()}>=1.{api}'"
        ), library
    if refusal:
        return Finding("op library", "fails", f"ONNX Runtime does not take it: {refusal}", REINSTALL), library
    return Finding("op library", "ok", text), library


def _api_of(library: OpLibrary) -> int:
    import ctypes

    return int(ctypes.CDLL(str(library.path)).shadowc_ort_api())


def _refusal(library: OpLibrary) -> str:
    """Why ONNX Runtime does not register the operators; empty if it does, or is missing (another check's matter)."""
    try:
        import onnxruntime
    except ImportError:
        return ""
    try:
        onnxruntime.SessionOptions().register_custom_ops_library(str(library.path))
    except Exception as error:
        return str(error).strip().partition("\n")[0] or type(error).__name__
    return ""


def optional() -> list[Finding]:
    """What some flags need."""
    findings = []
    for name, (extra, purpose) in OPTIONAL.items():
        version = _version(name)
        hint = "" if version else f"pip install 'shadowc[{extra}]'"
        findings.append(Finding(name, "note", version or f"not installed; {purpose} needs it", hint))
    return findings


def cpu_target(needed: list[Finding]) -> Finding:
    """Whether the default target builds and runs here."""
    lacking = [finding.name for finding in needed if finding.state == "fails"]
    if lacking:
        return Finding("cpu", "note", f"cannot build or run: see {', '.join(lacking)}")
    return Finding("cpu", "ok", "builds and runs here")


def processor(machine: Hardware, library: OpLibrary | None) -> Finding:
    """The processor, and the code that the operators chose for it."""
    extensions = ", ".join(machine.extensions) or "no extension that the operators use"
    level = f"; operators run as {library.isa}" if library else ""
    cores = f"{machine.cores} of {machine.all_cores} cores"
    limit = f" (a container grants {machine.quota:g})" if machine.quota is not None else ""
    return Finding("processor", "ok", f"{machine.processor}, {cores}{limit}, {extensions}{level}")


def stream(machine: Hardware, library: OpLibrary | None) -> tuple[Finding, float | None]:
    """How fast memory is read, which bounds a token's time; bytes per second."""
    from shadowc.spec.errors import SetupError

    if library is None:
        return Finding("bandwidth", "note", "not measured: that takes the op library"), None
    try:
        speed = library.stream_read(STREAM_BYTES, machine.cores, 3)
    except SetupError as error:
        return Finding("bandwidth", "note", error.message, error.hint), None
    threads = "one thread" if machine.cores == 1 else f"{machine.cores} threads"
    found = f"{speed / 1e9:.1f} GB/s read by {threads}: {1e12 / speed:.0f} ms for every GB that a token reads"
    if speed < SLOW_STREAM:
        hint = "slow for any machine: others may be using its memory; shadowc bench tells"
        return Finding("bandwidth", "note", found, hint), speed
    return Finding("bandwidth", "ok", found), speed


def cache() -> Finding:
    """The cache folder can be written."""
    import tempfile

    from shadowc.runtime.file_system import file_system
    from shadowc.spec.errors import SetupError
    from shadowc.stage_cache import ROOT_VARIABLE, default_root

    try:
        folder = default_root()
    except SetupError as error:
        return Finding("cache", "fails", error.message, error.hint)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
    except OSError as error:
        return Finding(
            "cache", "fails", f"{folder}: {error.strerror}", f"set {ROOT_VARIABLE} to a folder that you may write to"
        )
    place = file_system(folder)
    if place is not None and place.is_remote:
        hint = f"set {ROOT_VARIABLE} to a folder on a local disk: it is written to often, and needs locks"
        return Finding("cache", "note", f"{folder}, on a network file system ({place})", hint)
    return Finding("cache", "ok", str(folder))


def memory(machine: Hardware) -> Finding:
    """Memory, and whether weights can lie in large pages."""
    if machine.memory is None:
        return Finding("memory", "ok", "the system does not tell")
    free = f", {render.size(machine.available)} of it free" if machine.available is not None else ""
    text = f"{render.size(machine.memory)}{free}"
    if machine.large_pages is None:
        return Finding("memory", "ok", text)
    if machine.large_pages == "never":
        hint = (
            "large pages speed up --memory private: echo madvise > /sys/kernel/mm/transparent_hugepage/enabled, as root"
        )
        return Finding("memory", "note", f"{text}; large pages are off", hint)
    return Finding("memory", "ok", f"{text}; large pages: {machine.large_pages}")


def gpu() -> Finding:
    """Whether there is an NVIDIA GPU."""
    if Path("/dev/nvidia0").exists():
        return Finding("GPU", "note", "an NVIDIA GPU is present; the cpu target does not use it")
    return Finding("GPU", "note", "none; the cpu target needs none")


def tensorrt(target: str) -> Finding:
    """Whether a TensorRT target builds and runs here; lacking one is no failure."""
    from shadowc.emit.tensorrt.readiness import readiness

    found = readiness(target)
    return Finding(target, "ok" if found.builds and found.runs else "note", found.text, found.hint)


def _module_version() -> str | None:
    """What the module `onnxruntime` says of itself, whichever distribution its files are of; None: no module."""
    try:
        import onnxruntime
    except Exception:  # files of two distributions can fail in any way
        return None
    return str(onnxruntime.__version__)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    """Return the leading numbers of a version: 2.13.0+cpu is (2, 13, 0)."""
    numbers = []
    for part in version.split("+")[0].split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)
