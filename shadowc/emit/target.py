# SPDX-License-Identifier: Apache-2.0
"""What a target is, and the table of those that are built."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from shadowc.spec.density import Density
from shadowc.spec.errors import UnsupportedError
from shadowc.spec.progress import Progress

if TYPE_CHECKING:
    from shadowc.spec.manifest import BytesPart, FileEntry
    from shadowc.spec.program import Program, TensorSource

PLANNED = ("tensorrt", "tensorrt-rtx")


@dataclass(frozen=True, slots=True)
class EmitResult:
    """What a target wrote."""

    files: dict[str, FileEntry]
    """Relative name -> size and hash of the files that were hashed while they were written."""
    bytes_per_token: BytesPart
    ops: dict[str, int]
    """Operator domain -> version that the graph needs."""


class Target(Protocol):
    """Turns a transformed program into files of an engine folder."""

    @property
    def name(self) -> str:
        """The word after --target."""

    def emit(
        self,
        program: Program,
        source: TensorSource,
        folder: Path,
        *,
        density: Density,
        progress: Progress | None = None,
    ) -> EmitResult:
        """Write the target's files into `folder`, byte for byte the same whenever it is repeated.

        Args:
            program: the final graph with its recipes.
            source: every tensor that the recipes name.
            folder: an existing, empty staging folder.
            density: what the engine uses when its caller names none.
            progress: told how many bytes of weights are written.
        """


class CpuTarget:
    """ONNX Runtime with shadowc's operator library."""

    name = "cpu"

    def emit(
        self,
        program: Program,
        source: TensorSource,
        folder: Path,
        *,
        density: Density,
        progress: Progress | None = None,
    ) -> EmitResult:
        """See Target.emit: writes weights.bin, model.onnx and reference.onnx."""
        from shadowc.emit.cpu import emit_cpu

        return emit_cpu(program, source, folder, density=density, progress=progress)


TARGETS: dict[str, Target] = {"cpu": CpuTarget()}


def target(name: str) -> Target:
    """The target of this name.

    Raises:
        UnsupportedError: it is unknown, or planned but not built yet.
    """
    if name in TARGETS:
        return TARGETS[name]
    known = ", ".join(sorted(TARGETS))
    if name in PLANNED:
        raise UnsupportedError(f"target {name} is not built yet; this version has: {known}", hint="--target cpu")
    raise UnsupportedError(f"unknown target {name!r}; this version has: {known}", hint="--target cpu")
