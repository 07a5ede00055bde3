# SPDX-License-Identifier: Apache-2.0
"""What a target is, and the table of those that are built."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from shadowc.spec.errors import InputError, UnsupportedError
from shadowc.spec.ops import INT4_GROUP
from shadowc.spec.progress import Progress

if TYPE_CHECKING:
    from shadowc.checkpoint.opt import OptFacts
    from shadowc.emit.tensorrt.builder import BuildResult
    from shadowc.spec.manifest import BytesPart, FileEntry, TensorRtPart
    from shadowc.spec.options import CompileOptions
    from shadowc.spec.program import Program, TensorSource


FIXED = "decode_fixed"
"""What the program is called whose masks are inputs."""


@dataclass(frozen=True, slots=True)
class EmitResult:
    """What a target wrote."""

    files: dict[str, FileEntry]
    """Relative name -> size and hash of the files that were hashed while they were written."""
    bytes_per_token: BytesPart
    ops: dict[str, int]
    """Operator domain -> version that the graph needs."""
    tensorrt: TensorRtPart | None = None
    build: Mapping[str, BuildResult] = field(default_factory=dict)
    """Plan -> what its builder took."""


class Target(Protocol):
    """Turns transformed programs into files of an engine folder."""

    @property
    def name(self) -> str:
        """The word after --target."""

    def graphs(self, options: CompileOptions) -> tuple[str, ...]:
        """What the programs are called that `emit` takes."""

    def checks(self, options: CompileOptions) -> Sequence[Callable[[], object]]:
        """What can be refused before any work; each raises a ShadowcError."""

    def check_model(self, options: CompileOptions, facts: OptFacts) -> None:
        """Refuse a model that the target cannot run.

        Raises:
            UnsupportedError: its kernels do not handle the shape.
            InputError: an option does not fit the model.
        """

    def libraries(self, options: CompileOptions) -> Mapping[str, str]:
        """What besides Python code decides the bytes: name -> version or hash."""

    def emit(
        self,
        programs: Mapping[str, Program],
        source: TensorSource,
        folder: Path,
        *,
        options: CompileOptions,
        progress: Progress | None = None,
    ) -> EmitResult:
        """Write the target's files into `folder`.

        Args:
            programs: the final graphs with their recipes, by the names of `graphs`.
            source: every tensor that the recipes name.
            folder: an existing, empty staging folder.
            options: what the engine is to be.
            progress: told what is written and built.
        """


class CpuTarget:
    """ONNX Runtime with shadowc's operator library."""

    name = "cpu"

    def graphs(self, options: CompileOptions) -> tuple[str, ...]:
        """See Target.graphs."""
        return ("model", FIXED) if options.mask == "sequence" and options.predictor != "none" else ("model",)

    def checks(self, options: CompileOptions) -> Sequence[Callable[[], object]]:
        """See Target.checks."""
        from shadowc.runtime.library import OpLibrary

        def limits() -> None:
            given = {
                "--max-batch": options.max_batch != default_of("max_batch"),
                "--max-context": options.max_context != default_of("max_context"),
                "--compute-capability": bool(options.compute_capability),
            }
            if unused := [flag for flag, typed in given.items() if typed]:
                raise InputError(
                    f"{', '.join(unused)} {'has' if len(unused) == 1 else 'have'} no effect with --target cpu: "
                    "an engine takes any batch and the model's whole context",
                    hint="leave it out" if len(unused) == 1 else "leave them out",
                )

        return OpLibrary.installed, limits

    def check_model(self, options: CompileOptions, facts: OptFacts) -> None:
        """See Target.check_model: every OPT runs, in int4 every one whose hidden size fills groups."""
        if options.weights == "int4" and facts.hidden % INT4_GROUP:
            raise UnsupportedError(
                f"int4 weights share a scale in groups of {INT4_GROUP} along the hidden size, which is {facts.hidden} "
                f"in {facts.name}: no multiple of {INT4_GROUP}",
                hint="--weights int8",
            )

    def libraries(self, options: CompileOptions) -> Mapping[str, str]:
        """See Target.libraries: the op library, and what it needs beside it."""
        from shadowc.emit.folder import hash_file, op_library_files

        return {f"library {path.name}": hash_file(path).sha256 for path in op_library_files()}

    def emit(
        self,
        programs: Mapping[str, Program],
        source: TensorSource,
        folder: Path,
        *,
        options: CompileOptions,
        progress: Progress | None = None,
    ) -> EmitResult:
        """See Target.emit: writes weights.bin and the graphs over it; repeated, the same bytes."""
        from shadowc.emit.cpu import emit_cpu

        return emit_cpu(
            programs["model"], source, folder, fixed=programs.get(FIXED), density=options.density,
            exact_prompts=options.exact_prompts, progress=progress,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorRtTarget:
    """TensorRT for RTX, or TensorRT, with shadowc's plugin."""

    name: str

    def graphs(self, options: CompileOptions) -> tuple[str, ...]:
        """See Target.graphs."""
        return "decode", "prefill"

    def checks(self, options: CompileOptions) -> Sequence[Callable[[], object]]:
        """See Target.checks: builder, plugin, compute capabilities, limits."""
        from shadowc.emit.tensorrt.checks import checks

        return checks(options)

    def check_model(self, options: CompileOptions, facts: OptFacts) -> None:
        """See Target.check_model: head size, layers, context."""
        from shadowc.emit.tensorrt.checks import sizes_of

        sizes_of(options, facts)

    def libraries(self, options: CompileOptions) -> Mapping[str, str]:
        """See Target.libraries: builder and plugin."""
        from shadowc.emit.folder import hash_file
        from shadowc.emit.tensorrt.checks import tools_of
        from shadowc.emit.tensorrt.emit import plugin_files

        tools = tools_of(options)
        return {
            "builder": tools.bindings.title,
            **{f"plugin {path.name}": hash_file(path).sha256 for path in plugin_files(tools.plugin)},
            "built_for": " ".join(tools.built_for),
        }

    def emit(
        self,
        programs: Mapping[str, Program],
        source: TensorSource,
        folder: Path,
        *,
        options: CompileOptions,
        progress: Progress | None = None,
    ) -> EmitResult:
        """See Target.emit: writes weights.bin, graphs, plans and plugins; plans differ from build to build."""
        from shadowc.emit.tensorrt.emit import emit_tensorrt

        return emit_tensorrt(programs, source, folder, options=options, progress=progress)


TARGETS: dict[str, Target] = {
    "cpu": CpuTarget(),
    "tensorrt-rtx": TensorRtTarget("tensorrt-rtx"),
    "tensorrt": TensorRtTarget("tensorrt"),
}


def default_of(name: str) -> object:
    """What an option is when nobody gives it."""
    from shadowc.spec.options import CompileOptions

    return CompileOptions.model_fields[name].default


def target(name: str) -> Target:
    """The target of this name.

    Raises:
        UnsupportedError: it is unknown.
    """
    if name in TARGETS:
        return TARGETS[name]
    raise UnsupportedError(f"unknown target {name!r}; this version has: {', '.join(TARGETS)}", hint="--target cpu")
