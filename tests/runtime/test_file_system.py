# SPDX-License-Identifier: Apache-2.0
"""Weights behind a network are told when they are loaded; so is a cache there."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from shadowc.cli.app import app
from shadowc.cli.doctor_checks import cache
from shadowc.runtime import file_system
from shadowc.runtime.file_system import FileSystem
from shadowc.runtime.load import load
from shadowc.spec.errors import SlowPlaceWarning

Copied = Callable[[str], Path]


@pytest.fixture
def mounted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Path], None]:
    """Say that a kind of file system is mounted at a place, over whatever was said before."""
    table = tmp_path / "mountinfo"
    table.write_text("22 1 0:2 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n")
    monkeypatch.setattr(file_system, "MOUNTS", table)

    def mount(kind: str, place: Path) -> None:
        escaped = str(place).replace(" ", "\\040")
        with table.open("a") as file:
            file.write(f"40 22 0:50 / {escaped} rw,relatime shared:2 master:1 - {kind} server:/export rw,vers=4.2\n")

    return mount


def test_the_deepest_and_latest_mount_has_a_path(mounted: Callable[[str, Path], None], tmp_path: Path) -> None:
    place = tmp_path / "two words"
    (place / "deep").mkdir(parents=True)
    mounted("xfs", place)
    mounted("nfs4", place)
    mounted("nfs", tmp_path / "two")
    assert file_system.file_system(place / "deep") == FileSystem("nfs4", place)
    assert file_system.file_system(tmp_path) == FileSystem("ext4", Path("/"))


def test_nothing_is_told_where_the_system_has_no_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_system, "MOUNTS", tmp_path / "missing")
    assert file_system.file_system(tmp_path) is None


@pytest.mark.parametrize("line", ["", "garbage", "1 2 3 / / - ", "1 2 0:1 / / rw ext4"])
def test_a_line_that_is_none_is_passed_over(line: str) -> None:
    assert file_system._parsed(line) is None


@pytest.mark.parametrize("kind", ["nfs4", "cifs", "fuse.sshfs"])
def test_load_warns_of_weights_behind_a_network(
    copied: Copied, mounted: Callable[[str, Path], None], kind: str
) -> None:
    folder = copied("fp32")
    mounted(kind, folder.parent)
    with pytest.warns(SlowPlaceWarning, match=rf"weights\.bin lies on a network file system \({kind} at .*private"):
        load(folder)


def test_load_says_nothing_of_a_local_disk_and_of_a_copy(copied: Copied, mounted: Callable[[str, Path], None]) -> None:
    folder = copied("fp32")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(folder)
        mounted("nfs", folder.parent)
        load(folder, memory="private")


def test_run_shows_the_warning_as_a_note(copied: Copied, mounted: Callable[[str, Path], None]) -> None:
    folder = copied("fp32")
    mounted("nfs", folder.parent)
    result = CliRunner().invoke(app, ["run", str(folder), "a record", "--max-new-tokens", "1"])
    assert result.exit_code == 0, result.output
    assert "note: " in result.stderr
    assert "lies on a network file system (nfs at" in result.stderr


def test_doctor_names_a_cache_behind_a_network(
    tmp_path: Path, mounted: Callable[[str, Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHADOWC_CACHE", str(tmp_path / "cache"))
    assert cache().state == "ok"
    mounted("nfs4", tmp_path)
    finding = cache()
    assert finding.state == "note"
    assert f"on a network file system (nfs4 at {tmp_path})" in finding.found
    assert "SHADOWC_CACHE" in finding.hint
