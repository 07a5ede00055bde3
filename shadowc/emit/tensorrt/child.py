# SPDX-License-Identifier: Apache-2.0
"""The builder's process: reads a request, tells what it does as JSON lines, and may die without harming anybody.

Started by `builder.py` as `python -m shadowc.emit.tensorrt.child REQUEST EVENTS`, where REQUEST is a JSON file and
EVENTS the number of an open file descriptor. TensorRT can end a process from inside; so every line that it logs goes
out at once.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from shadowc.emit.tensorrt.messages import NO_LAYERS
from shadowc.runtime.tensorrt.bindings import Bindings, find_bindings
from shadowc.spec.errors import ShadowcError
from shadowc.spec.ops import DOMAIN

Send = Callable[..., None]


class RefusedError(Exception):
    """The builder said no; the errors that it logged say why."""

    def __init__(self, step: str, **facts: object) -> None:
        super().__init__(step)
        self.step = step
        self.facts = facts


def main(arguments: list[str]) -> int:
    """Build one plan; the exit code is 0 if it was built."""
    request = json.loads(Path(arguments[0]).read_text("utf-8"))
    with os.fdopen(int(arguments[1]), "w", buffering=1, encoding="utf-8") as events:

        def send(kind: str, **fields: object) -> None:
            events.write(json.dumps({"kind": kind, **fields}) + "\n")

        try:
            send("done", **_build(find_bindings(request["family"]), request, send))
        except RefusedError as refusal:
            send("refused", step=refusal.step, **refusal.facts)
            return 1
        except ShadowcError as error:
            send("error", text=error.message)
            return 1
    return 0


def _build(bindings: Bindings, request: dict[str, Any], send: Send) -> dict[str, object]:
    started = time.monotonic()
    trt = bindings.module
    logger = _logger(trt, send)
    builder = trt.Builder(logger)  # before the plugin is loaded: its errors would go nowhere
    registered = _load_plugin(trt, request["plugin"])
    network = _parse(trt, builder, logger, request["onnx"], registered)
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)  # on by default: scores with 10-bit mantissas choose other masks
    config.set_preview_feature(trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)
    if hasattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION"):  # what TensorRT for RTX asks for where steps are recorded
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    if config.add_optimization_profile(_profile(builder, request["inputs"])) < 0:  # it does not raise
        raise RefusedError("profile")
    if request["capabilities"]:
        config.num_compute_capabilities = len(request["capabilities"])
        for index, name in enumerate(request["capabilities"]):
            config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{name.replace('.', '')}"), index)
    cache = Path(request["timing_cache"]) if request["timing_cache"] else None
    if cache is not None:
        _use_timing_cache(config, cache)
    monitor = _monitor(trt, send)
    config.progress_monitor = monitor
    size = _write_plan(trt, builder, network, config, Path(request["plan"]))
    if cache is not None:
        _keep(cache, config.get_timing_cache())
    return {
        "bytes": size,
        "seconds": time.monotonic() - started,
        "peak_bytes": _peak_bytes(),
        "version": bindings.version,
        "operators": _operators(trt, network),
        "inputs": [_tensor(network.get_input(index)) for index in range(network.num_inputs)],
        "outputs": [_tensor(network.get_output(index)) for index in range(network.num_outputs)],
        "registered": registered,
    }


def _logger(trt: Any, send: Send) -> Any:
    """Hand on errors and warnings; one logger per process, TensorRT ignores every later one."""
    severity = trt.ILogger.Severity
    kinds = {severity.INTERNAL_ERROR: "error", severity.ERROR: "error", severity.WARNING: "warning"}

    class Sender(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            if severity in kinds:
                send(kinds[severity], text=" ".join(msg.split()))

    return Sender()


def _load_plugin(trt: Any, path: str) -> list[str]:
    """Load the operators and return what is registered in their namespace."""
    registry = trt.get_plugin_registry()
    if registry.load_library(path) is None:  # it does not raise
        raise RefusedError("plugin")
    creators = [creator for creator in registry.all_creators if creator.plugin_namespace == DOMAIN]
    return sorted(f"{one.plugin_namespace}::{one.name}::{one.plugin_version}" for one in creators)


def _parse(trt: Any, builder: Any, logger: Any, onnx: str, registered: list[str]) -> Any:
    flags = trt.NetworkDefinitionCreationFlag
    strongly_typed = getattr(flags, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if strongly_typed is None else 1 << int(strongly_typed))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(onnx) or network.num_layers == 0:
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        nodes = [f"{error.node_name()} ({error.node_operator()})" for error in errors if error.node_name()]
        reasons = [" ".join(error.desc().split()) for error in errors] or [NO_LAYERS]
        raise RefusedError("parse", nodes=nodes, reasons=reasons, registered=registered)
    return network


def _profile(builder: Any, inputs: list[dict[str, Any]]) -> Any:
    """The ranges of every changing input, read back: the setter takes anything and says nothing."""
    profile = builder.create_optimization_profile()
    asked = {
        tensor["name"]: [tuple(tensor[end]) for end in ("smallest", "best", "largest")]
        for tensor in inputs
        if tensor["smallest"] is not None
    }
    for name, ranges in asked.items():
        profile.set_shape(name, *ranges)
    for name, ranges in asked.items():
        kept = [tuple(sizes) for sizes in profile.get_shape(name)]
        if kept != ranges:
            raise RefusedError("profile", reasons=[f"the profile of {name} is {kept}, asked for {ranges}"])
    return profile


def _monitor(trt: Any, send: Send) -> Any:
    """Report the steps of the outermost phases; phases inside them come and go by the hundred."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if not parent_phase:
                self._steps[phase_name] = num_steps
                send("advance", done=0, total=num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in self._steps:
                send("advance", done=step + 1, total=self._steps[phase_name])
            return True

        def phase_finish(self, phase_name: str) -> None:
            total = self._steps.pop(phase_name, 0)
            if total:
                send("advance", done=total, total=total)

    return Monitor()


def _write_plan(trt: Any, builder: Any, network: Any, config: Any, path: Path) -> int:
    """Build straight into the file: the plan is never whole in memory."""
    with path.open("wb") as file:

        class Writer(trt.IStreamWriter):  # type: ignore[misc]
            def __init__(self) -> None:
                trt.IStreamWriter.__init__(self)

            def write(self, data: Any) -> int:
                return file.write(data)

        if not builder.build_serialized_network_to_stream(network, config, Writer()):
            raise RefusedError("build")
        return file.tell()


def _operators(trt: Any, network: Any) -> dict[str, str]:
    """Name of every plugin -> its operator and the fields that it serialises, in the words of its metadata."""
    found: dict[str, str] = {}
    kinds = trt.PluginCapabilityType
    for layer in (network.get_layer(index) for index in range(network.num_layers)):
        if layer.type != trt.LayerType.PLUGIN_V3:
            continue
        layer.__class__ = trt.IPluginV3Layer  # the bindings hand out the base class
        core, build = (layer.plugin.get_capability_interface(kind) for kind in (kinds.CORE, kinds.BUILD))
        found[layer.name] = " ".join((core.plugin_name, *sorted(build.metadata_string.split())))
    return found


def _tensor(tensor: Any) -> dict[str, object]:
    return {"name": tensor.name, "dtype": tensor.dtype.name, "shape": list(tensor.shape)}


def _peak_bytes() -> int:
    """Most memory of this program; getrusage would count what the parent held before the exec too."""
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.is_file() else ():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _use_timing_cache(config: Any, cache: Path) -> None:
    """Start from what earlier builds measured, or from nothing if that is damaged or another card's."""
    old = config.create_timing_cache(cache.read_bytes()) if cache.is_file() else None
    if old is None or not config.set_timing_cache(old, False):
        config.set_timing_cache(config.create_timing_cache(b""), False)


def _keep(cache: Path, measured: Any) -> None:
    """Replace the timing cache; builds at the same time each keep a whole one. The plan is there: nothing fails now."""
    if measured is None:
        return
    part = cache.with_suffix(f".{os.getpid()}.part")
    with suppress(OSError):  # a full or read-only cache only means to measure again
        cache.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(bytes(memoryview(measured.serialize())))
        part.replace(cache)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
