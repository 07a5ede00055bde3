# SPDX-License-Identifier: Apache-2.0
"""How the kernels are compiled for the host: once, or not at all and with a reason."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.emulation import build


def test_nothing_is_compiled_again_when_nothing_changed(kernels, monkeypatch):
    def run(*_: object, **__: object) -> None:
        raise AssertionError("a compiler was started")

    monkeypatch.setattr(subprocess, "run", run)
    assert build.build().is_file()


def test_a_changed_source_gives_another_library(kernels, monkeypatch, tmp_path):
    shutil.copytree(build.KERNELS, tmp_path / "cuda")
    started = []
    monkeypatch.setattr(build, "_made", lambda target, command: started.append(target) or target)
    same, objects = build.build(kernels=tmp_path / "cuda"), set(started)
    with (tmp_path / "cuda" / "error_text.cu").open("a", encoding="utf-8") as source:
        source.write("// changed\n")
    assert same == build.build()
    changed = build.build(kernels=tmp_path / "cuda")
    assert changed != same
    new = set(started) - objects
    assert sorted(path.name.split(".")[0] for path in new) == ["error_text", "libshadowc_emulation"]


@pytest.mark.parametrize("shim", ["a", "z"])
def test_the_library_is_the_same_wherever_the_folders_lie(kernels, monkeypatch, tmp_path, shim):
    shutil.copytree(build.KERNELS, tmp_path / "m")
    shutil.copytree(build.SHIM, tmp_path / shim)
    expected = build.build()
    monkeypatch.setattr(build, "SHIM", tmp_path / shim)
    monkeypatch.setattr(build, "_made", lambda target, command: target)
    assert build.build(kernels=tmp_path / "m") == expected


def test_a_machine_without_a_compiler_is_named_so(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(build.UnavailableError, match=r"no C\+\+ compiler"):
        build.build()


def test_a_machine_without_cuda_headers_is_told_what_to_set(monkeypatch):
    monkeypatch.setattr(Path, "is_file", lambda self: False)
    with pytest.raises(build.UnavailableError, match=r"no CUDA headers .*set CUDA_HOME"):
        build.build()


def test_an_error_of_the_compiler_is_shown(kernels, tmp_path):
    shutil.copytree(build.KERNELS, tmp_path / "cuda")
    (tmp_path / "cuda" / "error_text.cu").write_text("int broken(", encoding="utf-8")
    with pytest.raises(RuntimeError, match=r"error_text\.cu:1:"):
        build.build(kernels=tmp_path / "cuda")
