# SPDX-License-Identifier: Apache-2.0
"""What a compile holds in memory does not grow with the depth of the model."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from shadowc.checkpoint.opt import published_config
from tests.e2e import watched

PER_LAYER = 25e6
"""Bytes that a layer may add: graphs of trace, passes and ONNX Runtime hold 10 MB; its int8 weights are 200 MB."""
LIMIT = 4e9

pytestmark = [
    pytest.mark.slow,
    pytest.mark.long,
    pytest.mark.timeout(3000),
    pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="resident memory is read from /proc"),
]


def peak_of_compile(folder: Path, layers: int) -> int:
    """Bytes, mapped pages of the engine's file included."""
    model = folder / f"wide-{layers}"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({**published_config("opt-6.7b"), "num_hidden_layers": layers}))
    out = folder / f"{layers}.engine"
    command = ["compile", "--model", str(model), "--load-format", "dummy", "--weights", "int8", "--out", str(out)]
    _, peak = watched.run([sys.executable, "-c", "from shadowc.cli.app import main; main()", *command])
    return peak


def test_peak_of_a_compile_at_the_width_of_opt_6_7b_is_that_of_few_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHADOWC_CACHE", str(tmp_path / "cache"))
    few, more = peak_of_compile(tmp_path, 2), peak_of_compile(tmp_path, 6)
    assert more < few + 4 * PER_LAYER
    assert few + 30 * PER_LAYER < LIMIT
