# SPDX-License-Identifier: Apache-2.0
"""TensorRT's Python bindings under whichever name they are installed, and what the library logs.

Three packages offer the same module: `tensorrt` (10.x and 11.x), `tensorrt_rtx`, and `tensorrt_rtx_bindings`, which
comes from PyPI without its shared libraries; those lie in a plugin of ONNX Runtime and are loaded first.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

from shadowc.plugins import rtx_name_library
from shadowc.spec.errors import SetupError
from shadowc.spec.manifest import TrtFamily

FAMILIES: tuple[TrtFamily, ...] = get_args(TrtFamily)
TITLES: dict[TrtFamily, str] = {"rtx1": "TensorRT for RTX", "trt10": "TensorRT", "trt11": "TensorRT"}
EXTRAS: dict[TrtFamily, str] = {"rtx1": "rtx", "trt10": "tensorrt", "trt11": "tensorrt"}
"""Family -> the extra of this package that installs it."""
TARGETS: dict[TrtFamily, str] = {"rtx1": "tensorrt-rtx", "trt10": "tensorrt", "trt11": "tensorrt"}
"""Family -> the word after --target."""
LIBRARIES_PACKAGE = "onnxruntime_ep_nv_tensorrt_rtx"
"""Carries the shared libraries that belong to `tensorrt_rtx_bindings`."""
LIBRARY_PATTERNS = ("libcudart.so.*", "libtensorrt_rtx.so.*", "libtensorrt_onnxparser_rtx.so.*")
"""In the order in which they need each other."""
_MODULES = ("tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings")
_NOISE = "catchCudaError"
"""Without a driver, TensorRT repeats cudaError 35 behind every error of its own, in lines that name this function."""


@dataclass(frozen=True)
class Bindings:
    """A usable TensorRT package."""

    module: Any
    name: str
    """What was imported."""
    family: TrtFamily
    version: str
    folder: Path | None
    """Where the shared libraries lie, if a package carries them; None: the system finds them."""

    @property
    def title(self) -> str:
        """Name and version for people."""
        return f"{TITLES[self.family]} {self.version}"


@dataclass
class Messages:
    """What the library logged."""

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def clear(self) -> None:
        """Forget everything, before a call whose errors are wanted."""
        self.errors.clear()
        self.warnings.clear()

    def first_error(self) -> str:
        """The first error that says something: echoes of the missing driver count only if nothing else was said."""
        telling = [text for text in self.errors if _NOISE not in text]
        return next(iter((*telling, *self.errors)), "no reason was logged")


def find_bindings(family: TrtFamily | None = None) -> Bindings:
    """Import TensorRT's bindings.

    Args:
        family: the wanted one, preferred over others that are installed too; None: the first that works.

    Raises:
        SetupError: none of the packages can be imported.
    """
    found, problems = installed_bindings()
    if not found:
        extra = EXTRAS[family] if family else "rtx"
        raise SetupError(
            f"no TensorRT is installed ({'; '.join(problems)})",
            hint=f"pip install 'shadowc[{extra}]'",
            problems=problems,
        )
    return next((one for one in found if one.family == family), found[0])


@functools.cache
def installed_bindings() -> tuple[tuple[Bindings, ...], tuple[str, ...]]:
    """All packages that can be imported, and for each of the others one sentence why not."""
    found: list[Bindings] = []
    problems: list[str] = []
    for name in _MODULES:
        if name == "tensorrt_rtx_bindings" and any(one.family == "rtx1" for one in found):
            continue
        try:
            found.append(_imported(name))
        except (ImportError, OSError, ValueError) as error:
            problems.append(f"{name}: {str(error).splitlines()[0] if str(error) else type(error).__name__}")
    return tuple(found), tuple(problems)


def libraries_folder() -> Path | None:
    """Folder of the shared libraries for `tensorrt_rtx_bindings`; None: they are not installed."""
    spec = importlib.util.find_spec(LIBRARIES_PACKAGE)  # does not import the package
    return Path(spec.origin).parent if spec is not None and spec.origin else None


@functools.cache
def messages_of(module: ModuleType) -> tuple[Any, Messages]:
    """The one logger of this process for a package, and what it collects: TensorRT ignores every later logger."""
    kept = Messages()
    severity = module.ILogger.Severity
    levels = {severity.INTERNAL_ERROR: kept.errors, severity.ERROR: kept.errors, severity.WARNING: kept.warnings}

    class Collector(module.ILogger):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            module.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            if severity in levels:
                levels[severity].append(" ".join(msg.split()))

    return Collector(), kept


def _imported(name: str) -> Bindings:
    folder = None
    if name == "tensorrt_rtx_bindings":
        if importlib.util.find_spec(name) is None:
            raise ImportError("not installed")
        folder = _preload()
    elif importlib.util.find_spec(name) is None:
        raise ImportError("not installed")
    module = importlib.import_module(name)
    version = str(module.__version__)
    return Bindings(module, name, _family(name, version), version, folder)


def _preload() -> Path:
    """Load the libraries that the bindings ask for by names which no search path has."""
    folder = libraries_folder()
    if folder is None:
        raise ImportError(f"its shared libraries are missing: pip install {LIBRARIES_PACKAGE.replace('_', '-')}-cu13")
    for pattern in LIBRARY_PATTERNS:
        path = next(iter(sorted(folder.glob(pattern))), None)
        if path is None:
            raise ImportError(f"{folder} holds no {pattern}")
        ctypes.CDLL(str(path))  # local: a global libcudart would take the place of other libraries' own
    alias = rtx_name_library()
    if alias is not None:  # the library opens itself by a bare name, and ends the process if nothing has that name
        ctypes.CDLL(str(alias))
    return folder


def _family(name: str, version: str) -> TrtFamily:
    major = version.split(".")[0]
    family = f"rtx{major}" if name.startswith("tensorrt_rtx") else f"trt{major}"
    for known in FAMILIES:
        if family == known:
            return known
    raise ValueError(f"version {version} is not supported; shadowc knows {', '.join(FAMILIES)}")
