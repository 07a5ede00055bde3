# SPDX-License-Identifier: Apache-2.0
"""What ONNX Runtime's profiler wrote about a session: its runs, and the time of every node in them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

_RUN = "model_run"
_NODE_SUFFIX = "_kernel_time"


@dataclass(frozen=True, slots=True)
class NodeTime:
    """One node in one run."""

    name: str
    """As in the graph; what ONNX Runtime fused may have a name of its own, or its operator's."""
    operator: str
    microseconds: int


@dataclass(frozen=True, slots=True)
class Run:
    """One run of a graph; its times are those of a clock that all sessions of a process share."""

    start: int
    """Microseconds."""
    end: int
    """Microseconds."""
    nodes: tuple[NodeTime, ...]
    """One after the other; what is between them is not in their times."""


def read_recording(path: Path, origin_ns: int) -> tuple[Run, ...]:
    """The runs in a profile, in order.

    Args:
        path: what `InferenceSession.end_profiling` names.
        origin_ns: where the profile's clock starts, nanoseconds.
    """
    origin = origin_ns // 1000
    events = json.loads(path.read_text(encoding="utf-8"))
    nodes = sorted(
        (event for event in events if event.get("cat") == "Node" and event["name"].endswith(_NODE_SUFFIX)),
        key=lambda event: int(event["ts"]),
    )
    runs, at = [], 0
    for event in sorted((event for event in events if event["name"] == _RUN), key=lambda event: int(event["ts"])):
        start, end, inside = int(event["ts"]), int(event["ts"]) + int(event["dur"]), []
        while at < len(nodes) and int(nodes[at]["ts"]) <= end:
            node = nodes[at]
            inside.append(NodeTime(node["name"].removesuffix(_NODE_SUFFIX), node["args"]["op_name"], int(node["dur"])))
            at += 1
        runs.append(Run(origin + start, origin + end, tuple(inside)))
    return tuple(runs)
