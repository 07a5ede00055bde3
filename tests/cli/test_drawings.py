# SPDX-License-Identifier: Apache-2.0
"""Pictures: a place that cannot take one is refused before any work; nothing else is blamed where there is none."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

import shadowc as package
from shadowc.cli import drawings
from shadowc.spec.errors import InputError
from shadowc.spec.manifest import MANIFEST_FILE
from tests.cli.conftest import Shadowc

PROMPT = "The dog"
PLACES = ("", "none/map.png", "x" * 300 + ".png", "file/map.png")
"""In a folder that has a file named `file`: the folder itself, in no folder, too long a name, in a file."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "file").write_text("mine")
    return tmp_path


@pytest.mark.parametrize("name", PLACES, ids=["folder", "nowhere", "long", "in a file"])
def test_a_place_that_cannot_take_a_picture_is_refused_before_the_engine_is_looked_for(
    shadowc: Shadowc, folder: Path, name: str
) -> None:
    engine = folder / "no.engine"
    commands = ("run", engine, PROMPT, "--save-map"), ("inspect", engine, "--graph"), ("bench", engine, "--plot")
    for command in commands:
        result = shadowc(*command, folder / name)
        assert (result.exit_code, result.stdout) == (2, "")
        assert result.stderr.startswith(f"error: cannot write {folder / name}: "), result.stderr
        assert "next: name a " in result.stderr
    assert [path.name for path in folder.iterdir()] == ["file"]


@pytest.mark.parametrize("closed", ["", "file"], ids=["folder", "file"])
def test_a_place_without_permission_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch, closed: str) -> None:
    monkeypatch.setattr(os, "access", lambda path, _: Path(path) != folder / closed)
    with pytest.raises(InputError, match="Permission denied"):
        drawings.require_place(folder / (closed or "new.png"))
    drawings.require_place(folder / ("new.png" if closed else "file"))
    assert [path.name for path in folder.iterdir()] == ["file"]


def test_a_place_that_fails_later_is_told_as_well(folder: Path) -> None:
    with pytest.raises(InputError, match="cannot write"):
        drawings.write(folder, b"picture")


def test_a_map_that_is_not_to_be_a_png_is_refused_before_the_engine_is_looked_for(
    shadowc: Shadowc, tmp_path: Path
) -> None:
    result = shadowc("run", tmp_path / "none", PROMPT, "--save-map", tmp_path / "map.txt")
    assert (result.exit_code, result.stdout) == (2, "")
    assert f"next: --save-map {tmp_path / 'map.png'}" in result.stderr


def test_a_map_of_one_token_is_refused_before_the_engine_is_looked_for(shadowc: Shadowc, tmp_path: Path) -> None:
    one = shadowc("run", tmp_path / "none", PROMPT, "--max-new-tokens", "1", "--save-map", tmp_path / "map.png")
    assert (one.exit_code, one.stdout) == (2, "")
    assert one.stderr.startswith("error: there is no map of one token")
    assert "next: --max-new-tokens 2 or more" in one.stderr


def test_a_text_that_ends_with_its_first_token_is_what_is_told_where_there_is_no_map(
    shadowc: Shadowc, engine: Path, tmp_path: Path
) -> None:
    loaded = package.load(engine)
    first = loaded.generate(loaded.tokenizer([PROMPT])["input_ids"], max_new_tokens=1)[0, -1]
    ending = Path(shutil.copytree(engine, tmp_path / "ending"))
    content = json.loads((ending / MANIFEST_FILE).read_text())
    content["model"]["eos"] = int(first)
    (ending / MANIFEST_FILE).write_text(json.dumps(content))
    result = shadowc("run", ending, PROMPT, "--save-map", tmp_path / "map.png")
    assert result.exit_code == 2
    assert "the model ended the text after one token" in result.stderr
    assert "--max-new-tokens" not in result.stderr
    assert not (tmp_path / "map.png").exists()
