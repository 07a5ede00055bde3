# SPDX-License-Identifier: Apache-2.0
"""Does an engine fit this machine? Library, GPU and plugin against engine.json, all findings at once, before loading.

`here` looks at the machine; everything else is a pure function of what it saw.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeVar

from shadowc.emit.folder import hash_file
from shadowc.runtime.library import REINSTALL
from shadowc.runtime.tensorrt import bindings, rebuild
from shadowc.runtime.tensorrt.bindings import EXTRAS, TITLES, Bindings
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


def problems(manifest: EngineManifest, machine: Machine, folder: Path = Path("FOLDER")) -> list[Problem]:
    """Why the engine cannot run on the machine. Without a GPU that is the only finding: nothing else matters then.

    Args:
        manifest: the engine's.
        machine: what `here` saw.
        folder: the engine's, for the commands.
    """
    part = manifest.tensorrt
    if part is None:
        raise InternalError("an engine of target cpu was asked for its TensorRT part")
    if isinstance(machine.gpu, SetupError):
        hint = machine.gpu.hint.replace("--model NAME", f"--model {shlex.quote(manifest.model.name)}")
        return [Problem(machine.gpu.message, hint, SetupError)]
    family = part.family if isinstance(machine.library, SetupError) else machine.library.family
    capability = _capability(machine.gpu)

    @cache
    def again() -> str:
        skip_zeros = rebuild.skips_zeros(folder / part.plans["decode"].onnx)
        return rebuild.command(manifest, family, capability, skip_zeros=skip_zeros)

    found = [*_library_problems(part, machine.library, again), *_gpu_problems(part, machine.gpu, again)]
    must_build = any(one.kind is IncompatibleEngineError for one in found)
    trusted = "" if must_build else trusting(folder, part)
    return [*found, *_plugin_problems(part, manifest, machine.plugin, again, trusted)]


def trusting(folder: Path, part: TensorRtPart) -> str:
    """What to set so that the engine's own copy of the plugin is loaded: code, so its origin must be trusted."""
    name = next((one.file for one in part.plugins if not one.registers_itself), "")
    return f"if you trust where the engine came from: {PLUGIN_VARIABLE}={shlex.quote(str(folder / name))}"


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


def _library_problems(part: TensorRtPart, library: Bindings | SetupError, again: Callable[[], str]) -> list[Problem]:
    built = f"{TITLES[part.family]} {part.library_version}"
    if isinstance(library, SetupError):
        hint = f"pip install 'shadowc[{EXTRAS[part.family]}]'"
        return [Problem(f"built with {built}, running without TensorRT", hint, SetupError)]
    if (library.family, library.version) == (part.family, part.library_version):
        return []
    return [Problem(f"built with {built}, running {library.title}", again(), IncompatibleEngineError)]


def _gpu_problems(part: TensorRtPart, gpu: Gpu, again: Callable[[], str]) -> list[Problem]:
    if rebuild.covers(part.compute_capabilities, part.portable_above, _capability(gpu)):
        return []
    newer = f", and from {part.portable_above} on" if part.portable_above is not None else ""
    text = f"built for compute capability {', '.join(part.compute_capabilities)}{newer}, running {gpu}"
    return [Problem(text, again(), IncompatibleEngineError)]


def _plugin_problems(
    part: TensorRtPart, manifest: EngineManifest, plugin: Plugin | SetupError, again: Callable[[], str], trusted: str
) -> list[Problem]:
    """Unless told otherwise, only the installed library is loaded: what to type to have that, or to tell otherwise.

    `trusted` is empty if the engine must be built again anyway.
    """
    name = next((one.file for one in part.plugins if not one.registers_itself), None)
    if name is None:
        return [Problem("engine.json names no plugin library", again(), IncompatibleEngineError)]
    if isinstance(plugin, SetupError):
        return [Problem(plugin.message, "; or, ".join(filter(None, (plugin.hint, trusted))), SetupError)]
    built = manifest.files[name].sha256
    if built == plugin.sha256:
        return []
    text = f"built with plugin {name} ({built[:12]}), running {plugin.path} ({plugin.sha256[:12]}), another build"
    return [Problem(text, "; or: ".join(filter(None, (trusted, again()))), IncompatibleEngineError)]


def _capability(gpu: Gpu) -> str:
    return "{}.{}".format(*gpu.capability)


def _seen(look: Callable[[], _Seen]) -> _Seen | SetupError:
    try:
        return look()
    except SetupError as error:
        return error
