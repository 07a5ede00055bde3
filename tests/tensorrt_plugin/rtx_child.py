# SPDX-License-Identifier: Apache-2.0
"""Runs in a child process, whose LD_LIBRARY_PATH leads to TensorRT-RTX: loads the plugin and builds what it is told.

Reads one JSON request from stdin, writes one JSON answer to stdout; TensorRT's log goes into the answer, stderr stays
for what the plugin writes there.
"""

import base64
import ctypes
import json
import sys
from typing import Any

import tensorrt_rtx_bindings as trt


class Recorder(trt.ILogger):
    """Keeps every line of TensorRT's log."""

    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self.lines: list[tuple[str, str]] = []

    def log(self, severity: Any, message: str) -> None:
        """Called by TensorRT."""
        self.lines.append((str(severity).rsplit(".", 1)[-1], message))


def build(builder: trt.Builder, logger: Recorder, job: dict[str, Any]) -> dict[str, Any]:
    """Parses and builds one model: the outputs as the plugin typed and shaped them, and the plan's size and words."""
    start = len(logger.lines)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    parsed = parser.parse(base64.b64decode(job["model"]))
    errors = [parser.get_error(i).desc() for i in range(parser.num_errors)]
    plan, outputs = None, []
    if parsed:
        found = [network.get_output(i) for i in range(network.num_outputs)]
        outputs = [[t.name, str(t.dtype).rsplit(".", 1)[-1], list(t.shape)] for t in found]
        config = builder.create_builder_config()
        profile = builder.create_optimization_profile()
        for name, (low, usual, high) in job["profile"].items():
            profile.set_shape(name, low, usual, high)
        config.add_optimization_profile(profile)
        config.set_preview_feature(trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, job.get("aliasing", True))
        serialized = builder.build_serialized_network(network, config)
        if serialized is not None:
            raw = bytes(serialized)
            plan = {"bytes": len(raw), "words": [w for w in job.get("words", []) if w.encode() in raw]}
    return {"parsed": parsed, "errors": errors, "plan": plan, "outputs": outputs, "log": logger.lines[start:]}


def create(registry: Any, job: dict[str, Any]) -> dict[str, Any]:
    """Calls a creator with fields given as [name, type, values]."""
    creator = registry.get_creator(job["op"], "1", "shadowc")
    fields = []
    for name, kind, values in job["fields"]:
        data = values.encode() if kind == "CHAR" else (ctypes.c_float if kind == "FLOAT32" else ctypes.c_int)(*values)
        fields.append(trt.PluginField(name, data, getattr(trt.PluginFieldType, kind)))
    plugin = creator.create_plugin("direct", trt.PluginFieldCollection(fields), trt.TensorRTPhase.BUILD)
    return {"made": plugin is not None}


def main() -> None:
    """One request, one answer."""
    request = json.load(sys.stdin)
    logger = Recorder()
    builder = trt.Builder(logger)  # first, or errors of load_library are not logged
    registry = trt.get_plugin_registry()
    answer: dict[str, Any] = {"version": trt.__version__}
    if "load" in request:
        answer["loaded"] = registry.load_library(request["load"]) is not None
    if "dlopen" in request:
        ctypes.CDLL(request["dlopen"])
    answer["creators"] = [
        [c.name, c.plugin_version, c.plugin_namespace]
        for c in registry.all_creators
        if c.plugin_namespace == "shadowc" or c.name.startswith(("Select", "Sparse"))
    ]
    answer["fields"] = {
        c.name: [f.name for f in c.field_names] for c in registry.all_creators if c.plugin_namespace == "shadowc"
    }
    answer["creates"] = [create(registry, job) for job in request.get("creates", [])]
    answer["builds"] = [build(builder, logger, job) for job in request.get("builds", [])]
    answer["log"] = logger.lines
    json.dump(answer, sys.stdout)


main()
