# SPDX-License-Identifier: Apache-2.0
"""Threads follow what the process may use, not what the machine has."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from shadowc.runtime import cores


@pytest.fixture
def quota(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stands for the control group's file; absent until a test writes it."""
    path = tmp_path / "cpu.max"
    monkeypatch.setattr(cores, "_V2", path)
    monkeypatch.setattr(cores, "_V1_QUOTA", tmp_path / "cpu.cfs_quota_us")
    monkeypatch.setattr(cores, "_V1_PERIOD", tmp_path / "cpu.cfs_period_us")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _process: set(range(8)), raising=False)
    return path


def test_usable_cores_follow_the_affinity_of_the_process(quota: Path) -> None:
    assert cores.usable_cores() == 8
    quota.write_text("max 100000\n")
    assert cores.usable_cores() == 8


@pytest.mark.parametrize(("granted", "expected"), [("200000", 2), ("250000", 2), ("50000", 1), ("1600000", 8)])
def test_usable_cores_follow_the_quota_of_a_container(quota: Path, granted: str, expected: int) -> None:
    quota.write_text(f"{granted} 100000\n")
    assert cores.usable_cores() == expected


def test_usable_cores_follow_the_quota_of_an_older_kernel(quota: Path) -> None:
    quota.with_name("cpu.cfs_quota_us").write_text("300000\n")
    quota.with_name("cpu.cfs_period_us").write_text("100000\n")
    assert cores.usable_cores() == 3
    quota.with_name("cpu.cfs_quota_us").write_text("-1\n")
    assert cores.usable_cores() == 8


def test_a_quota_that_cannot_be_read_is_no_quota(quota: Path) -> None:
    quota.write_text("what is this\n")
    assert cores.usable_cores() == 8
