# SPDX-License-Identifier: Apache-2.0
"""engine.json of an engine for TensorRT: damage is told by whoever reads it first; a card that does not fit is none."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

from shadowc.cli.app import app
from shadowc.cli.inspect import inspect
from shadowc.compiler import _Compile
from shadowc.runtime.load import load, read_manifest, verify
from shadowc.runtime.tensorrt import machine
from shadowc.runtime.tensorrt.cuda import Gpu
from shadowc.runtime.tensorrt.machine import Machine
from shadowc.spec.errors import SetupError, VerificationError
from shadowc.spec.manifest import MANIFEST_FILE, WEIGHTS_FILE
from shadowc.spec.options import CompileOptions
from shadowc.spec.progress import NullProgress
from tests.runtime.tensorrt_folder import PLUGIN, write_folder

Edit = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def made(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only."""
    out = tmp_path_factory.mktemp("manifest") / "engine"
    write_folder(folders["fp32"], out)
    return out


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "engine"))


def edit(folder: Path, change: Edit) -> None:
    path = folder / MANIFEST_FILE
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def inspected(folder: Path) -> None:
    inspect(typer.Context(typer.main.get_command(app)), folder)


@pytest.mark.parametrize("read", [inspected, load, verify])
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda content: content["tensorrt"]["plans"].pop("decode"), "it has no decode plan"),
        (lambda content: content["tensorrt"]["plans"].pop("prefill"), "it has no prefill plan"),
        (lambda content: content["files"].pop("decode.plan"), "decode.plan is not listed in engine.json"),
        (lambda content: content["files"].pop(PLUGIN), f"{PLUGIN} is not listed in engine.json"),
        (lambda content: content["files"].pop(WEIGHTS_FILE), f"{WEIGHTS_FILE} is not listed in engine.json"),
    ],
)
def test_what_engine_json_lacks_is_told_by_every_command(
    folder: Path, read: Callable[[Path], object], change: Edit, says: str
) -> None:
    edit(folder, change)
    with pytest.raises(VerificationError, match=f"engine.json is damaged: {says}") as caught:
        read(folder)
    assert caught.value.hint


def test_all_that_engine_json_lacks_is_told_at_once(folder: Path) -> None:
    edit(folder, lambda content: (content["tensorrt"]["plans"].pop("prefill"), content["files"].pop("decode.plan")))
    with pytest.raises(VerificationError) as caught:
        read_manifest(folder)
    assert list(caught.value.problems) == ["it has no prefill plan", "decode.plan is not listed in engine.json"]


def compiling(folder: Path) -> _Compile:
    return _Compile(CompileOptions(model="opt-tiny", target="tensorrt-rtx", out=folder), NullProgress())


@pytest.fixture
def other_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that the engine was not built for, without TensorRT and plugin."""
    missing = SetupError("not installed")
    monkeypatch.setattr(machine, "here", lambda family: Machine(Gpu("card", (7, 0)), missing, missing))


@pytest.mark.usefixtures("other_card")
def test_an_engine_is_up_to_date_beside_a_card_that_does_not_fit(made: Path) -> None:
    manifest = read_manifest(made)
    assert verify(made).problems
    assert compiling(made)._finished(manifest.build_key) == manifest
    assert compiling(made)._finished("another key") is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "decode.plan").write_bytes(b"edocde"),
        lambda folder: (folder / "decode.plan").unlink(),
        lambda folder: edit(folder, lambda content: content["tensorrt"]["weights"][0].update(offset=1)),
        lambda folder: edit(folder, lambda content: content["files"].pop("decode.plan")),
        lambda folder: (folder / MANIFEST_FILE).write_text("{"),
    ],
    ids=["changed", "missing", "contradicting", "unlisted", "unreadable"],
)
def test_a_damaged_engine_is_not_up_to_date(folder: Path, damage: Callable[[Path], object]) -> None:
    key = read_manifest(folder).build_key
    damage(folder)
    assert compiling(folder)._finished(key) is None
