# SPDX-License-Identifier: Apache-2.0
"""What can be refused before a builder starts: the machine, the options, the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from shadowc.emit.tensorrt.interface import Sizes
from shadowc.runtime.tensorrt.bindings import EXTRAS, TARGETS, TITLES, Bindings, installed_bindings
from shadowc.runtime.tensorrt.cuda import open_cuda
from shadowc.runtime.tensorrt.machine import installed_plugin
from shadowc.runtime.tensorrt.rebuild import RTX_CAPABILITIES, RTX_HALF_ONLY, RTX_PORTABLE, needs_float32
from shadowc.spec.errors import InputError, SetupError, ShadowcError, UnsupportedError
from shadowc.spec.manifest import TrtFamily

if TYPE_CHECKING:
    from shadowc.checkpoint.opt import OptFacts
    from shadowc.spec.options import CompileOptions

HEAD_SIZES = (32, 64, 80, 96, 128)
"""Those that the attention kernels are written for."""
MOST_LAYERS = 64
"""Predicted layers that one selection ranks together."""
MOST_BATCH = 16
LOWEST: dict[TrtFamily, tuple[int, ...]] = {"rtx1": (1, 7), "trt10": (10, 14), "trt11": (11,)}
"""Of each family, the first version that parses ONNX `Attention` (RTX: the one that was tested)."""


@dataclass(frozen=True, slots=True)
class Tools:
    """What a target builds with on this machine."""

    bindings: Bindings
    plugin: Path
    capabilities: tuple[str, ...]
    """For the builder; empty: its own choice."""
    built_for: tuple[str, ...]
    portable_above: str | None


def builder_of(target: str) -> Bindings:
    """The builder that belongs to a target.

    Raises:
        SetupError: it is not installed; the message says what to install.
    """
    found, problems = installed_bindings()
    family = next(family for family, name in TARGETS.items() if name == target)
    install = f"'shadowc[{EXTRAS[family]}]'"
    for bindings in found:
        if TARGETS[bindings.family] == target:
            lowest = LOWEST[bindings.family]
            if _numbers(bindings.version)[: len(lowest)] < lowest:
                raise SetupError(
                    f"{bindings.title} is too old: its parser knows no Attention; expected "
                    f"{'.'.join(map(str, lowest))} or newer",
                    hint=f"pip install --upgrade {install}",
                )
            return bindings
    others = f"; installed is {', '.join(one.title for one in found)}" if found else ""
    raise SetupError(
        f"the builder of target {target}, {TITLES[family]}, is not installed{others}",
        hint=f"pip install {install}",
        problems=problems,
    )


def plugin_of(bindings: Bindings) -> Path:
    """The plugin library for a builder.

    Raises:
        SetupError: there is none, or the one chosen cannot be for this builder.
    """
    path = installed_plugin(bindings.family).path
    if path.stem.endswith("_auto"):
        raise SetupError(
            f"{path} registers itself when it is loaded (for Triton); a builder needs the one without _auto",
            hint="unset SHADOWC_TRT_LIBRARY",
        )
    from shadowc.plugins import TENSORRT_BUILDS

    built = path.stem.removeprefix("libshadowc_")
    known = {family for builds in TENSORRT_BUILDS.values() for family in builds}
    if built in known and built not in TENSORRT_BUILDS[bindings.family]:
        raise SetupError(
            f"the plugin {path.name} was built for another TensorRT, this builder is {bindings.title}",
            hint="unset SHADOWC_TRT_LIBRARY, or build the plugin with TENSORRT_INCLUDE_DIR set to the right headers",
        )
    return path


def tools_of(options: CompileOptions) -> Tools:
    """Builder, plugin and capabilities of a compile.

    Raises:
        SetupError, InputError: something is missing or does not fit; the first finding of `problems`.
    """
    bindings = builder_of(options.target)
    plugin = plugin_of(bindings)
    chosen = tuple(sorted(set(options.compute_capability), key=_numbers))
    if options.target == "tensorrt-rtx":
        check_capabilities(options)
        return Tools(bindings, plugin, chosen, chosen or RTX_PORTABLE, None if chosen else RTX_PORTABLE[-1])
    major, minor = open_cuda().gpu.capability
    return Tools(bindings, plugin, (), (f"{major}.{minor}",), None)


def check_capabilities(options: CompileOptions) -> None:
    """Refuse compute capabilities that the builder does not have, or that cannot run what is asked for."""
    chosen = options.compute_capability
    if options.target == "tensorrt":
        if chosen:
            raise InputError(
                "--compute-capability has no effect with --target tensorrt: it builds for the GPU of this machine",
                hint="leave it out",
            )
        return
    unknown = [name for name in chosen if name not in RTX_CAPABILITIES]
    if unknown:
        raise UnsupportedError(
            f"TensorRT for RTX does not build for compute capability {', '.join(unknown)}; it has "
            f"{', '.join(RTX_CAPABILITIES)}",
            hint="--target tensorrt on a machine with that GPU" if "9.0" in unknown or "10.0" in unknown else
            "leave --compute-capability out: the plan then runs from 8.0 on",
        )  # fmt: skip
    half_only = [name for name in chosen if name in RTX_HALF_ONLY]
    if half_only and needs_float32(options.weights, options.predictor != "none"):
        raise UnsupportedError(
            f"compute capability {half_only[0]} has no float32 products, which "
            + ("--weights fp32 means" if options.weights == "fp32" else "the predictor needs"),
            hint=f"leave {half_only[0]} out, or compile with --weights fp16 and --predictor none",
        )


def check_prompts(options: CompileOptions) -> None:
    """Refuse a choice that only kernels for CPUs have."""
    if options.exact_prompts:
        raise InputError(
            f"--exact-prompts has no effect with --target {options.target}: its prompts are not rounded more than "
            "tokens",
            hint="leave it out",
        )


def check_sizes(options: CompileOptions) -> None:
    """Refuse limits that no engine has; the model's own context is checked when it is known."""
    if not 1 <= options.max_batch <= MOST_BATCH:
        raise InputError(
            f"--max-batch {options.max_batch} is out of range, expected 1 to {MOST_BATCH}", hint="--max-batch 4"
        )


def sizes_of(options: CompileOptions, facts: OptFacts) -> Sizes:
    """The limits of the engine's profiles.

    Raises:
        InputError: the context is longer than the model's.
        UnsupportedError: the kernels do not handle the model's shape.
    """
    found: list[str] = []
    context = options.max_context or facts.positions
    if context > facts.positions:
        raise InputError(
            f"--max-context {context} is more than {facts.name} has positions for, which is {facts.positions}",
            hint=f"--max-context {facts.positions}",
        )
    if facts.head_size not in HEAD_SIZES:
        found.append(f"its heads are {facts.head_size} wide, expected {', '.join(map(str, HEAD_SIZES))}")
    if facts.predicted_layers > MOST_LAYERS:
        found.append(f"it has {facts.layers} layers, expected at most {MOST_LAYERS + 1}")
    if found:
        raise UnsupportedError(
            f"target {options.target} has no kernels for {facts.name}: {'; '.join(found)}",
            hint="--target cpu",
            problems=found if len(found) > 1 else (),
        )
    return Sizes(options.max_batch, context)


def checks(options: CompileOptions) -> Sequence[Callable[[], object]]:
    """Everything that can be refused before any work."""

    def plugin() -> None:
        try:
            bindings = builder_of(options.target)
        except ShadowcError:
            return  # told by its own check
        plugin_of(bindings)

    def gpu() -> None:
        if options.target == "tensorrt":
            open_cuda()

    return (
        lambda: builder_of(options.target),
        plugin,
        gpu,
        lambda: check_capabilities(options),
        lambda: check_sizes(options),
        lambda: check_prompts(options),
    )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())
