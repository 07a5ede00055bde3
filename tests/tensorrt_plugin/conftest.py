# SPDX-License-Identifier: Apache-2.0
"""Fixtures that skip, with the reason, what this machine cannot check."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.tensorrt_plugin import toolchain
from tests.tensorrt_plugin.nodes import Node

CHILD = Path(__file__).with_name("rtx_child.py")


@pytest.fixture(params=list(toolchain.libraries()) or ["none"])
def plugin(request: pytest.FixtureRequest) -> Path:
    """The plugin of each family that was built."""
    built = toolchain.libraries()
    if not built:
        pytest.skip(toolchain.NO_PLUGIN)
    return built[request.param]


@pytest.fixture(scope="session")
def rtx_plugin() -> Path:
    """The plugin that RTX gets."""
    built = toolchain.libraries()
    if not built:
        pytest.skip(toolchain.NO_PLUGIN)
    return next(built[family] for family in ("rtx1", "trt11", "trt10") if family in built)


@pytest.fixture(scope="session")
def rtx(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """rtx(load=..., dlopen=..., creates=..., builds=[Node, ...]): one child process with TensorRT-RTX; its answer."""
    if toolchain.rtx_folder() is None:
        pytest.skip("TensorRT-RTX is not installed: make rtx")
    environment = toolchain.link_rtx(tmp_path_factory.mktemp("rtx"))

    def ask(builds: list[Node] | None = None, aliasing: bool = True, **request: Any) -> dict[str, Any]:
        words = ["SelectThreshold", "SparseFFN", "SparseAttention", "shadowc"]
        request["builds"] = [
            {
                "model": base64.b64encode(n.model()).decode(),
                "profile": n.profile(),
                "words": words,
                "aliasing": aliasing,
            }
            for n in builds or []
        ]
        done = subprocess.run(
            [sys.executable, str(CHILD)],
            input=json.dumps(request, default=str), env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"exit {done.returncode}: {done.stderr}"
        answer: dict[str, Any] = json.loads(done.stdout)
        # RTX built from other headers has no logger for the plugin: its lines come on stderr.
        answer["sentences"] = [line.removeprefix("shadowc: error: ") for line in done.stderr.splitlines()] + [
            message.removeprefix("shadowc: ") for _, message in answer["log"] if message.startswith("shadowc: ")
        ]
        return answer

    return ask


@pytest.fixture(scope="session")
def headers() -> Path:
    """A folder of TensorRT headers."""
    sets = toolchain.header_sets()
    if not sets or toolchain.cuda_include() is None:
        pytest.skip("no TensorRT headers here: set TENSORRT_INCLUDE_DIR")
    return next(iter(sets.values()))
