# SPDX-License-Identifier: Apache-2.0
"""Builds one plan in a process of its own: a JSON request on standard input, one line of JSON on standard output."""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path
from typing import Any

from shadowc.runtime.tensorrt.bindings import find_bindings, messages_of


def main() -> int:
    """Build; the answer has `bytes`, `seconds` (of CPU) and `peak` (bytes of memory), or `error`."""
    request = json.load(sys.stdin)
    trt = find_bindings(request["family"]).module
    logger, heard = messages_of(trt)
    size = _build(trt, logger, request)
    status = Path("/proc/self/status").read_text()
    used = resource.getrusage(resource.RUSAGE_SELF)
    answer = {
        "bytes": size,
        "seconds": used.ru_utime + used.ru_stime,
        "peak": int(status.split("VmHWM:")[1].split()[0]) * 1024,
        "error": "" if size else heard.first_error(),
    }
    sys.stdout.write(json.dumps(answer) + "\n")
    return 0


def _build(trt: Any, logger: Any, request: dict[str, Any]) -> int:
    """Bytes of the plan; 0 if the builder refused."""
    builder = trt.Builder(logger)
    if trt.get_plugin_registry().load_library(request["plugin"]) is None:
        return 0
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    if not trt.OnnxParser(network, logger).parse_from_file(request["onnx"]):
        return 0
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)
    config.set_preview_feature(trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)
    for ranges in request["profiles"]:
        profile = builder.create_optimization_profile()
        for name, sizes in ranges.items():
            profile.set_shape(name, *map(tuple, sizes))
        if config.add_optimization_profile(profile) < 0:  # it does not raise
            return 0
    with Path(request["plan"]).open("wb") as file:

        class Writer(trt.IStreamWriter):  # type: ignore[misc]
            def __init__(self) -> None:
                trt.IStreamWriter.__init__(self)

            def write(self, data: Any) -> int:
                return file.write(data)

        built = builder.build_serialized_network_to_stream(network, config, Writer())
        return file.tell() if built else 0


if __name__ == "__main__":
    sys.exit(main())
