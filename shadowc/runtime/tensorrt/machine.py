# SPDX-License-Identifier: Apache-2.0
"""Does an engine fit this machine? Library, GPU and plugin against engine.json, all findings at once, before loading.

`here` looks at the machine; everything else is a pure function of what it saw.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from shadowc.emit.folder import hash_file
from shadowc.runtime.library import REINSTALL
from shadowc.runtime.tensorrt import bindings
from shadowc.runtime.tensorrt.bindings import EXTRAS, TARGETS, TITLES, Bindings
from shadowc.runtime.tensorrt.cuda import Gpu, open_cuda
from shadowc.spec.errors import IncompatibleEngineError, InternalError, SetupError, ShadowcError
from shadowc.spec.manifest import EngineManifest, TensorRtPart, TrtFamily

_Seen = TypeVar("_Seen")

PLUGIN_VARIABLE = "SHADOWC_TRT_LIBRARY"
"""Environment variable with the path of another build of the plugin library."""


@dataclass(frozen=True)
class Plugin:
    """The installed plugin library of a family."""

    path: Path
    sha256: str


@dataclass(frozen=True)
class Machine:
    """What an engine meets; an error in place of what is missing."""

    gpu: Gpu | SetupError
    library: Bindings | SetupError
    plugin: Plugin | SetupError


@dataclass(frozen=True, slots=True)
class Problem:
    """One reason why an engine cannot run here, and the next command."""

    text: str
    hint: str
    kind: type[ShadowcError]

    def __str__(self) -> str:
        return f"{self.text}; next: {self.hint}"


def here(family: TrtFamily) -> Machine:
    """Look at this machine, with the eyes of an engine for a family."""
    return Machine(
        gpu=_seen(lambda: open_cuda().gpu),
        library=_seen(lambda: bindings.find_bindings(family)),
        plugin=_seen(lambda: installed_plugin(family)),
    )


def installed_plugin(family: TrtFamily) -> Plugin:
    """The plugin library that engines of a family are run with; never the copy in an engine folder.

    Raises:
        SetupError: it was not built or not installed.
    """
    from shadowc.plugins import tensorrt_library

    chosen = os.environ.get(PLUGIN_VARIABLE)
    if chosen and not Path(chosen).is_file():
        raise SetupError(f"{PLUGIN_VARIABLE} names {chosen}, which is no file", hint=f"unset {PLUGIN_VARIABLE}")
    try:
        path = Path(chosen) if chosen else tensorrt_library(family)
    except FileNotFoundError as error:
        raise SetupError(
            f"the plugin library for {TITLES[family]} is not installed: it is built where nvcc and the headers are",
            hint=REINSTALL,
        ) from error
    return Plugin(path, hash_file(path).sha256)


def problems(manifest: EngineManifest, machine: Machine) -> list[Problem]:
    """Why the engine cannot run on the machine. Without a GPU that is the only finding: nothing else matters then."""
    part = manifest.tensorrt
    if part is None:
        raise InternalError("an engine of target cpu was asked for its TensorRT part")
    if isinstance(machine.gpu, SetupError):
        hint = machine.gpu.hint.replace("--model NAME", f"--model {shlex.quote(manifest.model.name)}")
        return [Problem(machine.gpu.message, hint, SetupError)]
    found = [
        *_library_problems(part, manifest, machine.library),
        *_gpu_problems(part, manifest, machine.gpu),
        *_plugin_problems(part, manifest, machine.plugin),
    ]
    return [problem for problem in found if problem is not None]


def require_fit(folder: Path, found: Sequence[Problem]) -> None:
    """Raise what `problems` found, if anything.

    Raises:
        SetupError: this machine lacks something.
        IncompatibleEngineError: the engine was built for another library, GPU or plugin.
    """
    if not found:
        return
    first = next((one for one in found if one.kind is IncompatibleEngineError), found[0])
    if len(found) == 1:
        raise first.kind(f"{folder} cannot run here: {first.text}", hint=first.hint)
    raise first.kind(
        f"{folder} cannot run here, for {len(found)} reasons", hint=first.hint, problems=[str(one) for one in found]
    )


def rebuild(manifest: EngineManifest, family: TrtFamily, extra: str = "") -> str:
    """The command that makes the engine again, for the library that is installed."""
    name = shlex.quote(manifest.model.name)
    return f"shadowc compile --model {name} --target {TARGETS[family]} --weights {manifest.weights}{extra} --out FOLDER"


def _library_problems(part: TensorRtPart, manifest: EngineManifest, library: Bindings | SetupError) -> list[Problem]:
    built = f"{TITLES[part.family]} {part.library_version}"
    if isinstance(library, SetupError):
        hint = f"pip install 'shadowc[{EXTRAS[part.family]}]'"
        return [Problem(f"built with {built}, running without TensorRT", hint, SetupError)]
    if (library.family, library.version) == (part.family, part.library_version):
        return []
    text = f"built with {built}, running {library.title}"
    return [Problem(text, rebuild(manifest, library.family), IncompatibleEngineError)]


def _gpu_problems(part: TensorRtPart, manifest: EngineManifest, gpu: Gpu | SetupError) -> list[Problem]:
    if isinstance(gpu, SetupError):
        return [Problem(gpu.message, gpu.hint, SetupError)]
    capability = "{}.{}".format(*gpu.capability)
    if capability in part.compute_capabilities:
        return []
    above = part.portable_above
    if above is not None and gpu.capability >= _numbers(above):
        return []
    newer = f", and from {above} on" if above is not None else ""
    return [
        Problem(
            f"built for compute capability {', '.join(part.compute_capabilities)}{newer}, running {gpu}",
            rebuild(manifest, part.family, f" --compute-capability {capability}"),
            IncompatibleEngineError,
        )
    ]


def _plugin_problems(part: TensorRtPart, manifest: EngineManifest, plugin: Plugin | SetupError) -> list[Problem]:
    if isinstance(plugin, SetupError):
        return [Problem(plugin.message, plugin.hint, SetupError)]
    name = next((one.file for one in part.plugins if not one.registers_itself), None)
    if name is None:
        return [Problem("engine.json names no plugin library", rebuild(manifest, part.family), IncompatibleEngineError)]
    built = manifest.files[name].sha256
    if built == plugin.sha256:
        return []
    text = f"built with plugin {name} ({built[:12]}), running {plugin.path} ({plugin.sha256[:12]}), another build"
    return [Problem(text, rebuild(manifest, part.family), IncompatibleEngineError)]


def _seen(look: Callable[[], _Seen]) -> _Seen | SetupError:
    try:
        return look()
    except SetupError as error:
        return error


def _numbers(capability: str) -> tuple[int, int]:
    major, minor = capability.split(".")
    return int(major), int(minor)
