# SPDX-License-Identifier: Apache-2.0
"""ONNX Runtime tells nobody about the models that shadowc runs, unless the user wants it to."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

LOADS = "import onnxruntime; onnxruntime.SessionOptions()"


def left_at_home(code: str, home: Path, **more: str) -> list[str]:
    """Files that a process leaves in a home folder of its own."""
    gone = ("ORT_DISABLE_TELEMETRY", "ORT_RUNNING_UNIT_TESTS", "CI", "GITHUB_ACTIONS", "TF_BUILD", "XDG_CACHE_HOME")
    environment = {name: value for name, value in os.environ.items() if name not in gone} | {"HOME": str(home)} | more
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, timeout=120)
    return sorted(path.name for path in home.rglob("*") if path.is_file())


def test_no_identifier_of_the_machine_is_made_for_telemetry(tmp_path: Path) -> None:
    assert left_at_home(f"import shadowc.runtime.session; {LOADS}", tmp_path) == []


def test_the_check_would_notice_telemetry(tmp_path: Path) -> None:
    if not left_at_home(LOADS, tmp_path):
        pytest.skip("this build of ONNX Runtime has no telemetry")
    assert "deviceid" in left_at_home(LOADS, tmp_path)


def test_a_choice_of_the_user_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import shadowc, os; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    for value in ("0", "1"):
        monkeypatch.setenv("ORT_DISABLE_TELEMETRY", value)
        done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
        assert done.stdout.strip() == value
