# SPDX-License-Identifier: Apache-2.0
"""The engine folder appears complete or not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from shadowc import output
from shadowc.checkpoint.opt import OptFacts
from shadowc.emit import folder
from shadowc.emit.genai import genai_config
from shadowc.spec.errors import InputError, SetupError
from shadowc.spec.manifest import MANIFEST_FILE
from tests.conftest import TINY
from tests.emit import engines


def manifest(text: str, *files: str) -> str:
    """As little of an engine.json as makes a folder replaceable; `text` tells one from another."""
    return json.dumps({"schema_version": 1, "build_key": text, "files": {name: {} for name in files}})


def write(out: Path, text: str) -> None:
    with folder.staged(out) as staging:
        (staging / MANIFEST_FILE).write_text(manifest(text))


def key(out: Path) -> str:
    found: str = json.loads((out / MANIFEST_FILE).read_text())["build_key"]
    return found


def names(parent: Path) -> list[str]:
    return sorted(path.name for path in parent.iterdir())


def test_a_folder_appears_under_its_name_only_when_complete(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "mini.engine"
    with folder.staged(out) as staging:
        (staging / MANIFEST_FILE).write_text("{}")
        assert not out.exists()
        assert staging.parent == out.parent
    assert names(out.parent) == ["mini.engine"]
    assert (out / MANIFEST_FILE).read_text() == "{}"


def test_nothing_is_left_when_the_work_fails(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), folder.staged(tmp_path / "mini.engine") as staging:  # noqa: PT012
        (staging / "weights.bin").write_bytes(b"half")
        raise KeyboardInterrupt
    assert names(tmp_path) == []


def test_an_older_engine_survives_a_failing_compile(tmp_path: Path) -> None:
    out = tmp_path / "mini.engine"
    write(out, "old")
    with pytest.raises(RuntimeError), folder.staged(out):
        raise RuntimeError
    assert key(out) == "old"
    assert names(tmp_path) == ["mini.engine"]


@pytest.mark.parametrize("exchange", [True, False])
def test_an_older_engine_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool) -> None:
    if not exchange:
        monkeypatch.setattr(output, "_exchange", lambda *_: False)
    out = tmp_path / "mini.engine"
    write(out, "old")
    (out / "sub").mkdir()
    (out / "sub" / "only in the old one").touch()
    (out / MANIFEST_FILE).write_text(manifest("old", "sub/only in the old one", "missing"))
    write(out, "new")
    assert names(out) == [MANIFEST_FILE]
    assert key(out) == "new"
    assert names(tmp_path) == ["mini.engine"]


def test_a_folder_that_is_no_engine_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("precious")
    with pytest.raises(InputError, match="not an engine"):
        write(tmp_path / "thesis", "new")
    assert names(tmp_path / "thesis") == ["chapter1.tex"]
    assert names(tmp_path) == ["thesis"]


@pytest.mark.parametrize(
    "text", ["{}", "[]", "{", '{"schema_version": "1", "build_key": "a"}', '{"schema_version": 1}', "[" * 100_000]
)
def test_a_folder_whose_engine_json_is_of_something_else_is_not_touched(tmp_path: Path, text: str) -> None:
    out = tmp_path / "thesis"
    out.mkdir()
    (out / MANIFEST_FILE).write_text(text)
    (out / "thesis.txt").write_text("precious")
    with pytest.raises(InputError, match=r"not an engine folder \(its engine\.json is something else\)"):
        write(out, "new")
    assert names(out) == [MANIFEST_FILE, "thesis.txt"]
    assert (out / MANIFEST_FILE).read_text() == text
    assert names(tmp_path) == ["thesis"]


def test_an_engine_with_files_of_somebody_else_is_not_touched(engine_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "mini.engine"
    shutil.copytree(engine_folder, out)
    (out / "notes.txt").write_text("precious")
    (out / "deep").mkdir()
    (out / "deep" / "link").symlink_to(tmp_path)
    before = sorted(out.rglob("*"))
    with pytest.raises(InputError, match=r"deep/link, notes\.txt; nothing was written") as caught:
        write(out, "new")
    assert caught.value.hint
    assert sorted(out.rglob("*")) == before
    assert names(tmp_path) == ["mini.engine"]


def test_only_a_few_of_many_foreign_files_are_named(tmp_path: Path) -> None:
    out = tmp_path / "mini.engine"
    write(out, "old")
    for number in range(9):
        (out / f"{number}.txt").touch()
    with pytest.raises(InputError, match=r"4\.txt and 4 more") as caught:
        folder.check_replaceable(out)
    assert "5.txt" not in caught.value.message


def test_files_added_while_the_engine_was_made_are_not_lost(tmp_path: Path) -> None:
    out = tmp_path / "mini.engine"
    write(out, "old")
    with pytest.raises(InputError, match=r"notes\.txt"), folder.staged(out) as staging:  # noqa: PT012
        (staging / MANIFEST_FILE).write_text(manifest("new"))
        (out / "notes.txt").write_text("precious")
    assert names(out) == [MANIFEST_FILE, "notes.txt"]
    assert names(tmp_path) == ["mini.engine"]


def test_a_damaged_engine_may_be_replaced(engine_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "mini.engine"
    shutil.copytree(engine_folder, out)
    (out / "weights.bin").unlink()
    write(out, "new")
    assert key(out) == "new"


@pytest.mark.parametrize("name", ["x" * 300, "zero\0byte"])
def test_a_name_that_no_folder_can_have_is_refused_in_one_sentence(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="cannot be used"):
        folder.check_replaceable(tmp_path / name)


def test_a_name_that_is_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the name is not UTF-8") as caught:
        folder.check_replaceable(Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")))
    assert str(caught.value).isprintable()


def test_a_folder_that_cannot_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "mini.engine", "old")

    def refuse(*_: object, onerror: Callable[[OSError], None], **__: object) -> list[object]:
        onerror(PermissionError(errno.EACCES, "Permission denied"))
        return []

    monkeypatch.setattr(os, "walk", refuse)
    with pytest.raises(InputError, match="cannot be used: Permission denied"):
        folder.check_replaceable(tmp_path / "mini.engine")


def test_a_file_of_that_name_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "mini.engine").write_text("precious")
    with pytest.raises(InputError, match="not a folder"):
        write(tmp_path / "mini.engine", "new")
    assert (tmp_path / "mini.engine").read_text() == "precious"


def test_an_empty_folder_may_be_filled(tmp_path: Path) -> None:
    (tmp_path / "mini.engine").mkdir()
    write(tmp_path / "mini.engine", "new")
    assert key(tmp_path / "mini.engine") == "new"


def dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_leftovers_of_killed_compiles_are_cleared(tmp_path: Path) -> None:
    dead, alive = dead_process(), os.getppid()
    for name in (f".mini.engine.{dead}.00ff.tmp", f".mini.engine.{alive}.00ff.tmp", f".other.engine.{dead}.00ff.tmp"):
        (tmp_path / name).mkdir()
    write(tmp_path / "mini.engine", "new")
    assert names(tmp_path) == sorted(
        [f".mini.engine.{alive}.00ff.tmp", f".other.engine.{dead}.00ff.tmp", "mini.engine"]
    )


def test_a_folder_that_another_container_writes_is_no_leftover(tmp_path: Path) -> None:
    """Its number says nothing here: no process, or ours, has it."""
    names_there = [f".mini.engine.{number}.00ff.tmp" for number in (dead_process(), os.getpid())]
    held = []
    for name in names_there:
        (tmp_path / name).mkdir()
        held.append(output._lock(tmp_path / name))
    write(tmp_path / "mini.engine", "new")
    assert names(tmp_path) == sorted([*names_there, "mini.engine"])
    for number in held:
        assert number is not None
        os.close(number)
    output.clear_leftovers(tmp_path / "mini.engine")
    assert names(tmp_path) == ["mini.engine"]


def test_a_folder_is_held_while_it_is_written(tmp_path: Path) -> None:
    with folder.staged(tmp_path / "mini.engine") as staging:
        assert output._locked(staging)
        (staging / MANIFEST_FILE).write_text(manifest("new"))
    assert not output._locked(tmp_path / "mini.engine")


def test_leftovers_are_cleared_where_nothing_is_to_be_written(tmp_path: Path) -> None:
    write(tmp_path / "mini.engine", "new")
    (tmp_path / f".mini.engine.{dead_process()}.00ff.tmp").mkdir()
    output.clear_leftovers(tmp_path / "mini.engine")
    assert names(tmp_path) == ["mini.engine"]
    output.clear_leftovers(tmp_path / "no" / "such.engine")


def test_an_engine_caught_between_two_renames_comes_back(tmp_path: Path) -> None:
    aside = tmp_path / f".mini.engine.{dead_process()}.00ff.old"
    aside.mkdir()
    (aside / MANIFEST_FILE).write_text(manifest("old"))
    with pytest.raises(RuntimeError), folder.staged(tmp_path / "mini.engine"):
        raise RuntimeError
    assert key(tmp_path / "mini.engine") == "old"


def test_leftovers_of_a_process_that_had_our_number_are_cleared(tmp_path: Path) -> None:
    """In a container every run may be process 1."""
    (tmp_path / f".mini.engine.{os.getpid()}.00ff.tmp").mkdir()
    with folder.staged(tmp_path / "mini.engine") as ours:
        with folder.staged(tmp_path / "mini.engine") as inner:
            (inner / MANIFEST_FILE).write_text(manifest("inner"))
        assert ours.is_dir(), "a folder that this process is writing was taken for a leftover"
        (ours / MANIFEST_FILE).write_text(manifest("ours"))
    assert names(tmp_path) == ["mini.engine"]
    assert key(tmp_path / "mini.engine") == "ours"


@pytest.mark.parametrize("exchange", [True, False])
def test_another_process_that_was_faster_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    """The place was free when it was looked at, and is not when the folder is renamed to it."""
    if not exchange:
        monkeypatch.setattr(output, "_exchange", lambda *_: False)
    out, looked, really = tmp_path / "mini.engine", [], Path.exists

    def exists(path: Path) -> bool:
        if path == out and not looked:
            looked.append(path)
            out.mkdir()
            (out / MANIFEST_FILE).write_text(manifest("faster"))
            return False
        return really(path)

    monkeypatch.setattr(Path, "exists", exists)
    write(out, "slower")
    assert looked
    assert key(out) == "slower"
    assert names(tmp_path) == ["mini.engine"]


@pytest.mark.parametrize("name", ["x" * 255, "ü" * 127])
def test_a_folder_may_have_the_longest_name_that_there_is(tmp_path: Path, name: str) -> None:
    write(tmp_path / name, "new")
    assert names(tmp_path) == [name]


def test_more_bytes_than_are_free_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    figures = r"at least [\d,.]+ MB needed, [\d,.]+ MB free; no engine was written"
    with pytest.raises(SetupError, match=figures), folder.staged(tmp_path / "mini.engine", needed=2 * free):
        pytest.fail("something was begun")
    assert names(tmp_path) == []


def test_a_file_system_that_does_not_tell_its_size_is_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=0, used=0, free=0))
    with folder.staged(tmp_path / "mini.engine", needed=1000) as staging:
        (staging / MANIFEST_FILE).write_text(manifest("new"))
    assert key(tmp_path / "mini.engine") == "new"


def test_a_full_disk_is_told_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="no space left"), folder.staged(tmp_path / "mini.engine"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert names(tmp_path) == []


def test_a_parent_that_cannot_be_written_is_an_input_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="Not a directory"), folder.staged(tmp_path / "file" / "mini.engine"):
        pass


def test_json_has_one_form(tmp_path: Path) -> None:
    folder.write_json(tmp_path / "a", {"b": 1, "a": "ä"})
    folder.write_json(tmp_path / "b", {"a": "ä", "b": 1})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() == '{\n  "a": "ä",\n  "b": 1\n}\n'.encode()


def test_an_engine_folder_is_whole_and_every_file_is_listed(engine_folder: Path) -> None:
    listed = json.loads((engine_folder / MANIFEST_FILE).read_text())["files"]
    assert sorted(listed) == sorted(set(names(engine_folder)) - {MANIFEST_FILE})
    assert {"libshadowc_ort.so", "tokenizer.json", "genai_config.json", "controls.safetensors"} <= listed.keys()
    for name, entry in listed.items():
        assert folder.hash_file(engine_folder / name).model_dump() == entry


def test_genai_config_names_files_and_tensors_of_the_folder(engine_folder: Path) -> None:
    part = folder.model_part(engines.tiny_facts(), "tiny")
    config = json.loads((engine_folder / "genai_config.json").read_text())
    assert config == genai_config(part, "libshadowc_ort.so")
    decoder = config["model"]["decoder"]
    assert (engine_folder / decoder["filename"]).is_file()
    assert (engine_folder / decoder["session_options"]["custom_ops_library"]).is_file()
    assert decoder["inputs"]["past_key_names"] % 3 == "past_key_values.3.key"


@pytest.mark.parametrize("width", [32, 64])
def test_manifest_says_where_norms_are_and_how_wide_embeddings(width: int) -> None:
    config = {**TINY, "model_type": "opt", "word_embed_proj_dim": width, "do_layer_norm_before": False}
    part = folder.model_part(OptFacts.from_config(config, "opt-last"), "tiny")
    assert (part.norm_first, part.projected) == (False, 32 if width == 32 else 0)
