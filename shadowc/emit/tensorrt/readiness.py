# SPDX-License-Identifier: Apache-2.0
"""What a TensorRT target can do on this machine, in one line with the next command: for `shadowc doctor`."""

from __future__ import annotations

from dataclasses import dataclass

from shadowc.emit.tensorrt.checks import builder_of, plugin_of
from shadowc.runtime.tensorrt.cuda import open_cuda
from shadowc.spec.errors import SetupError


@dataclass(frozen=True, slots=True)
class Readiness:
    """Whether a target builds and runs here."""

    builds: bool
    runs: bool
    text: str
    hint: str
    """The next command; empty if there is nothing to do."""


def readiness(target: str) -> Readiness:
    """Look for builder, plugin and GPU; a target without its builder is told so and nothing else."""
    try:
        bindings = builder_of(target)
    except SetupError as error:
        return Readiness(False, False, f"cannot build: {error.message}", error.hint)
    try:
        plugin = plugin_of(bindings)
    except SetupError as error:
        return Readiness(False, False, f"{bindings.title} is here, cannot build: {error.message}", error.hint)
    have = f"{bindings.title}, {plugin.name}"
    try:
        gpu = open_cuda().gpu
    except SetupError as error:
        builds = target == "tensorrt-rtx"
        verb = "builds, cannot run" if builds else "cannot build or run"
        return Readiness(builds, False, f"{verb}: {error.message} ({have})", error.hint)
    return Readiness(True, True, f"builds and runs on {gpu} ({have})", "")
