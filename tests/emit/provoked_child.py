# SPDX-License-Identifier: Apache-2.0
"""The builder's process with one thing wrong, which PROVOKED names: everything that TensorRT then says is real."""

import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

from shadowc.emit.tensorrt import child

LITTLE_MEMORY = 16 << 20
"""More than loading the plugin takes, less than a build."""
MOST_SECONDS = 60
"""TensorRT may wait for ever for a thread that got no memory."""


def with_little_memory(build: Any) -> Any:
    def limited(*arguments: Any) -> Any:
        signal.alarm(MOST_SECONDS)
        used = int(Path("/proc/self/statm").read_text("ascii").split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + LITTLE_MEMORY,) * 2)
        return build(*arguments)

    return limited


def with_flag(write: Any, flag: str) -> Any:
    def flagged(trt: Any, builder: Any, network: Any, config: Any, path: Any) -> Any:
        config.set_flag(getattr(trt.BuilderFlag, flag))
        return write(trt, builder, network, config, path)

    return flagged


def with_plugin_that_takes_no_type(load: Any) -> Any:
    """Beside ours: `Choosy`, one input, one output like it, for which no type is good enough."""

    def loaded(trt: Any, path: str) -> Any:
        class Choosy(trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime):  # type: ignore[misc]
            def __init__(self) -> None:
                for base in (trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime):
                    base.__init__(self)
                self.plugin_name, self.plugin_version, self.plugin_namespace = "Choosy", "1", "shadowc"
                self.num_outputs = 1

            def get_capability_interface(self, kind: Any) -> Any:
                return self

            def clone(self) -> Any:
                return Choosy()

            def get_output_data_types(self, types: Any) -> Any:
                return [types[0]]

            def get_output_shapes(self, inputs: Any, shape_inputs: Any, builder: Any) -> Any:
                return [trt.DimsExprs(inputs[0])]

            def supports_format_combination(self, position: int, tensors: Any, inputs: int) -> bool:
                return False

            def configure_plugin(self, inputs: Any, outputs: Any) -> None: ...

            def get_fields_to_serialize(self) -> Any:
                return trt.PluginFieldCollection([])

        class Creator(trt.IPluginCreatorV3One):  # type: ignore[misc]
            def __init__(self) -> None:
                trt.IPluginCreatorV3One.__init__(self)
                self.name, self.plugin_version, self.plugin_namespace = "Choosy", "1", "shadowc"
                self.field_names = trt.PluginFieldCollection([])

            def create_plugin(self, name: str, fields: Any, phase: Any) -> Any:
                return Choosy()

        registered = load(trt, path)
        trt.get_plugin_registry().register_creator(creators.setdefault("Choosy", Creator()), "shadowc")
        return registered

    creators: dict[str, Any] = {}
    return loaded


what = os.environ["PROVOKED"]
if what == "memory":
    child._build = with_little_memory(child._build)
elif what == "types":
    child._load_plugin = with_plugin_that_takes_no_type(child._load_plugin)
else:
    child._write_plan = with_flag(child._write_plan, what)
sys.exit(child.main(sys.argv[1:]))
