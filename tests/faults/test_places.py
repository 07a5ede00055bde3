# SPDX-License-Identifier: Apache-2.0
"""Folders that cannot be written to, are not known, have unusual names, or are moved."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import shadowc
from tests.faults.process import Place

PROMPT = "The quick brown fox"
ODD = "Модель ü 模型 🙂 'it' \"s\" $HOME;*"


@pytest.fixture
def read_only(whole_tiny: Place, tmp_path: Path) -> Iterator[Place]:
    """All stages are cached, in a cache that nothing can be written to."""
    place = Place(tmp_path / "run", whole_tiny.model)
    place.cache.parent.mkdir()
    if os.geteuid():
        shutil.copytree(whole_tiny.cache, place.cache)
        folders = [place.cache, *(path for path in place.cache.rglob("*") if path.is_dir())]
        for folder in folders:
            folder.chmod(0o555)
        yield place
        for folder in folders:
            folder.chmod(0o755)
        return
    place.cache.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", place.cache], capture_output=True, check=False).returncode:
        pytest.skip("root may write anywhere, and cannot mount here")
    shutil.copytree(whole_tiny.cache, place.cache, dirs_exist_ok=True)
    subprocess.run(["mount", "-o", "remount,ro", place.cache], check=True)
    yield place
    subprocess.run(["umount", "--lazy", place.cache], check=True)


def test_cache_that_is_read_only_serves_what_it_holds(read_only: Place, whole_tiny: Place) -> None:
    read_only.run_here()
    assert read_only.left() == whole_tiny.left()


def test_cache_that_is_read_only_and_lacks_a_stage_is_named(read_only: Place) -> None:
    said = read_only.refused_here("--seed", "1")
    assert f"the cache folder {read_only.cache} cannot be written to" in said
    assert "next: set SHADOWC_CACHE to a folder that you may write to" in said
    assert not read_only.out.exists()


@pytest.mark.parametrize("nobody", [False, True], ids=["home does not exist", "user has no account"])
def test_user_without_a_home_is_told_to_name_a_cache(whole_tiny: Place, tmp_path: Path, nobody: bool) -> None:
    place = Place(tmp_path / "run", whole_tiny.model)
    home = {"PLANTED": "no account", "HOME": ""} if nobody else {"HOME": "/proc/nowhere"}
    ended = place.run(None, SHADOWC_CACHE="", XDG_CACHE_HOME="", **home)
    assert ended.code == 6, ended.errors
    assert (
        "no home folder is known" if nobody else "/proc/nowhere/.cache/shadowc cannot be written to"
    ) in ended.errors
    assert "next: set SHADOWC_CACHE to a folder that you may write to" in ended.errors
    assert "Traceback" not in ended.errors
    assert place.left() == {}


@pytest.mark.slow
def test_user_without_account_and_home_compiles_where_a_cache_is_named(whole_tiny: Place, tmp_path: Path) -> None:
    place = Place(tmp_path / "run", whole_tiny.model)
    ended = place.run(None, PLANTED="no account", HOME="")
    assert ended.code == 0, ended.errors
    assert place.left() == whole_tiny.left()


def generated(engine: Path) -> str:
    text = shadowc.load(engine).generate(PROMPT, max_new_tokens=4, min_new_tokens=4)
    assert isinstance(text, str)
    return text


def test_names_in_any_script_and_with_any_sign_are_used_as_they_are(whole_tiny: Place, tmp_path: Path) -> None:
    model = shutil.copytree(whole_tiny.model, tmp_path / ODD / "opt-tiny")
    place = Place(tmp_path / ODD / "run", str(model))
    shutil.copytree(whole_tiny.cache, place.cache)
    place.run_here()
    assert place.left() == whole_tiny.left()
    assert generated(place.out) == generated(whole_tiny.out)


def test_very_long_paths_are_used_as_they_are(whole_tiny: Place, tmp_path: Path) -> None:
    deep = tmp_path.joinpath(*(str(number % 10) * 250 for number in range(14)))
    place = Place(deep / "run", whole_tiny.model)
    assert len(str(place.out)) > 3500
    deep.mkdir(parents=True)
    shutil.copytree(whole_tiny.cache, place.cache)
    place.run_here()
    assert place.left() == whole_tiny.left()
    assert generated(place.out) == generated(whole_tiny.out)


def test_paths_longer_than_the_system_takes_are_refused(whole_tiny: Place, tmp_path: Path) -> None:
    room = os.pathconf("/", "PC_PATH_MAX") - len(str(tmp_path)) - len("/run/out/mini.engine") - 1
    parts = ["d" * 200] * (room // 201)
    deep = tmp_path.joinpath(*parts, "e" * (room - 201 * len(parts) - 2))
    place = Place(deep / "run", whole_tiny.model)
    deep.mkdir(parents=True)
    said = place.refused_here(cache=whole_tiny.cache)
    assert "too long" in said
    assert "next: choose another folder with --out" in said
    assert not place.out.exists()


def test_engine_that_was_moved_away_from_where_it_was_compiled_runs(whole_tiny: Place, tmp_path: Path) -> None:
    place = Place(tmp_path / "run", whole_tiny.model)
    shutil.copytree(whole_tiny.cache, place.cache)
    place.run_here()
    shutil.move(place.out, tmp_path / "elsewhere")
    shutil.rmtree(place.top)
    assert generated(tmp_path / "elsewhere") == generated(whole_tiny.out)
