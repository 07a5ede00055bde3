# SPDX-License-Identifier: Apache-2.0
"""`shadowc doctor`: what this machine has, and what to type for what it lacks."""

from __future__ import annotations

import os
import platform
import sys
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from shadowc._version import __version__
from shadowc.cli import flags, render

State = Literal["ok", "note", "fails"]
LOWEST_PYTHON = (3, 11)
LOWEST = {
    "torch": (2, 9),
    "transformers": (5,),
    "onnx": (1, 18),
    "onnxscript": (0, 5),
    "onnx-graphsurgeon": (0, 5, 8),
    "safetensors": (0, 5),
    "tokenizers": (0, 21),
    "huggingface-hub": (1,),
    "numpy": (2,),
}
ORT_DISTRIBUTIONS = (
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-directml",
    "onnxruntime-openvino",
    "onnxruntime-training",
)
"""All of them install the module `onnxruntime`, over each other."""
TENSORRT_TARGETS = ("tensorrt-rtx", "tensorrt")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at."""

    name: str
    state: State
    found: str
    hint: str = ""


def doctor(json: flags.AsJson = False) -> None:
    """Check Python, packages, the op library, ONNX Runtime, the cache folder, the machine and TensorRT."""
    findings = [
        _python(),
        *_packages(),
        _runtime(),
        _op_library(),
        _cache(),
        _memory(),
        _gpu(),
        *map(_tensorrt, TENSORRT_TARGETS),
    ]
    failed = [finding for finding in findings if finding.state == "fails"]
    if json:
        render.as_json({"shadowc": __version__, "findings": [asdict(finding) for finding in findings]})
    else:
        render.facts({finding.name: finding.found for finding in findings}, title=f"shadowc {__version__}")
    for finding in findings:
        if finding.hint:
            render.say(f"{finding.name}: {finding.hint}")
    if failed:
        from shadowc.spec.errors import SetupError

        raise SetupError(
            f"{len(failed)} of {len(findings)} checks failed",
            hint=failed[0].hint,
            problems=[f"{finding.name}: {finding.found}" for finding in failed],
        )


def _python() -> Finding:
    found = f"{platform.python_version()} at {sys.executable}"
    if sys.version_info < LOWEST_PYTHON:
        return Finding("Python", "fails", found, "install Python 3.11 or newer")
    return Finding("Python", "ok", found)


def _packages() -> list[Finding]:
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


def _runtime() -> Finding:
    """ONNX Runtime: exactly one distribution, new enough."""
    from shadowc.runtime.session import LOWEST_ORT

    found = {name: version for name in ORT_DISTRIBUTIONS if (version := _version(name)) is not None}
    text = ", ".join(f"{name} {version}" for name, version in found.items())
    if not found:
        return Finding("ONNX Runtime", "fails", "not installed", "pip install onnxruntime-gpu")
    if len(found) > 1:
        keep = "onnxruntime-gpu" if "onnxruntime-gpu" in found else next(iter(found))
        return Finding(
            "ONNX Runtime",
            "fails",
            f"{text}: they overwrite each other's files",
            f"pip uninstall -y {' '.join(found)} && pip install {keep}",
        )
    if _numbers(next(iter(found.values()))) < LOWEST_ORT:
        wanted = ".".join(map(str, LOWEST_ORT))
        return Finding("ONNX Runtime", "fails", f"{text}, too old", f"pip install '{next(iter(found))}>={wanted}'")
    return Finding("ONNX Runtime", "ok", text)


def _op_library() -> Finding:
    """The compiled operators: there, loadable, and of this version."""
    import ctypes

    from shadowc.runtime.library import OpLibrary
    from shadowc.spec.errors import ShadowcError

    try:
        library = OpLibrary.installed()
    except ShadowcError as error:
        return Finding("op library", "fails", error.message, error.hint)
    api = int(ctypes.CDLL(str(library.path)).shadowc_ort_api())
    return Finding("op library", "ok", f"{library.version}, {library.isa}, ONNX Runtime API {api}, {library.path}")


def _cache() -> Finding:
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


def _memory() -> Finding:
    from shadowc.runtime.cores import usable_cores

    cores = usable_cores()
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return Finding("machine", "ok", f"{platform.machine()}, {cores} cores")
    return Finding("machine", "ok", f"{platform.machine()}, {cores} cores, {render.size(memory)} memory")


def _gpu() -> Finding:
    if Path("/dev/nvidia0").exists():
        return Finding("GPU", "note", "an NVIDIA GPU is present; the cpu target does not use it")
    return Finding("GPU", "note", "none; the cpu target needs none")


def _tensorrt(target: str) -> Finding:
    """Whether a TensorRT target builds and runs here; lacking one is no failure."""
    from shadowc.emit.tensorrt.readiness import readiness

    found = readiness(target)
    return Finding(target, "ok" if found.builds and found.runs else "note", found.text, found.hint)


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
