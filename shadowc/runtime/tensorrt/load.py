# SPDX-License-Identifier: Apache-2.0
"""From a checked folder to an engine on the GPU."""

from __future__ import annotations

from pathlib import Path

from shadowc.runtime.tensorrt import machine
from shadowc.runtime.tensorrt.bindings import find_bindings
from shadowc.runtime.tensorrt.cuda import open_cuda
from shadowc.runtime.tensorrt.engine import TensorRtEngine
from shadowc.runtime.tensorrt.layout import require_consistent
from shadowc.runtime.tensorrt.plans import Scratch, load_plugin, open_plan
from shadowc.spec.errors import InternalError
from shadowc.spec.manifest import MANIFEST_FILE, WEIGHTS_FILE, EngineManifest


def load_tensorrt(folder: Path, manifest: EngineManifest) -> TensorRtEngine:
    """Check this machine against the engine, then load plugin, plans and weights.

    Args:
        folder: its files were compared with engine.json already.
        manifest: its engine.json.

    Raises:
        SetupError: no GPU, no driver, no TensorRT, no plugin, or too little memory.
        IncompatibleEngineError: built for another library, GPU or plugin.
        VerificationError: engine.json contradicts itself or the plans.
    """
    part = manifest.tensorrt
    if part is None:
        raise InternalError(f"{folder} is of target {manifest.target}")
    require_consistent(part, manifest.files[WEIGHTS_FILE].size, str(folder / MANIFEST_FILE))
    machine.require_fit(folder, machine.problems(manifest, machine.here(part.family), folder))
    cuda, library, plugin = open_cuda(), find_bindings(part.family), machine.installed_plugin(part.family)
    operators = sorted({name for one in part.plugins if not one.registers_itself for name in one.operators})
    load_plugin(library, plugin.path, operators)
    scratch = Scratch(cuda)
    plans = {name: open_plan(library, cuda, folder / plan.file, plan, scratch) for name, plan in part.plans.items()}
    return TensorRtEngine(folder, manifest, cuda, plans)
