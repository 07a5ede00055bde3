# SPDX-License-Identifier: Apache-2.0
"""Loading checks first: each way to damage a folder gets one sentence and the next command."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from shadowc.runtime import library, verification
from shadowc.runtime.load import load, load_cpu, read_manifest, verify
from shadowc.spec.errors import IncompatibleEngineError, InputError, SetupError, VerificationError
from shadowc.spec.manifest import FIXED_FILE, MANIFEST_FILE, SCHEMA, WEIGHTS_FILE

Copied = Callable[[str], Path]


def flip_a_byte(path: Path, *, keep_times: bool = False) -> None:
    status = path.stat()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    if keep_times:
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def edit_manifest(folder: Path, **changes: Any) -> None:
    path = folder / MANIFEST_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_files(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    files = json.loads((folder / MANIFEST_FILE).read_text())["files"]
    change(files)
    edit_manifest(folder, files=files)


def test_an_undamaged_folder_loads_and_verifies(folders: dict[str, Path]) -> None:
    assert load(folders["fp32"]).manifest == read_manifest(folders["fp32"])
    report = verify(folders["fp32"])
    assert report.passed
    assert "all as compiled" in str(report)


def test_a_missing_folder_is_an_input_error_that_says_what_to_type(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no engine folder") as caught:
        load(tmp_path / "none")
    assert caught.value.hint.startswith("shadowc compile")


@pytest.mark.parametrize("call", [load, load_cpu, verify])
def test_a_folder_that_was_never_named_is_an_input_error(call: Callable[[Any], object]) -> None:
    with pytest.raises(InputError, match="an engine folder was expected, found None"):
        call(None)


def test_zeros_cannot_be_skipped_by_the_reference(folders: dict[str, Path]) -> None:
    with pytest.raises(InputError, match="skip_zeros has no effect with reference"):
        load(folders["fp32"], reference=True, skip_zeros=False)


def test_a_folder_without_manifest_is_not_an_engine(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not an engine folder"):
        load(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        pytest.param("[" * 100_000, id="deep"),
        '{"schema_version": "x"}',
        '{"schema_version": 1}',
        "\xff",
    ],
)
def test_a_damaged_manifest_is_a_verification_error(copied: Copied, text: str) -> None:
    folder = copied("fp32")
    (folder / MANIFEST_FILE).write_text(text)
    with pytest.raises(VerificationError, match="is damaged"):
        load(folder)


@pytest.mark.parametrize("schema", ["1", "2", True, 1.0, None, 0, -1, [1]])
def test_a_schema_version_that_is_no_whole_number_is_damage(copied: Copied, schema: object) -> None:
    folder = copied("fp32")
    edit_manifest(folder, schema_version=schema)
    with pytest.raises(VerificationError, match="is damaged: schema_version") as caught:
        load(folder)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("part", "field", "number"),
    [("model", "layers", 0), ("model", "heads", -1), ("model", "bos", -1), ("sparsity", "neuron_block", 0)],
)
def test_numbers_that_cannot_be_are_damage(copied: Copied, part: str, field: str, number: int) -> None:
    folder = copied("fp32")
    stored = json.loads((folder / MANIFEST_FILE).read_text())
    stored[part][field] = number
    (folder / MANIFEST_FILE).write_text(json.dumps(stored))
    with pytest.raises(VerificationError, match=f"is damaged: {part}.{field}"):
        load(folder)


def test_an_unknown_kind_of_mask_is_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(InputError, match="mask is 'bogus', expected token or sequence"):
        load(folders["fp32"], mask="bogus")


def test_a_prompt_that_is_no_unicode_text_is_refused(folders: dict[str, Path]) -> None:
    """As the shell hands over bytes that are not UTF-8."""
    with pytest.raises(InputError, match=r"prompt 2 of 2 is no Unicode text at 'hi\\udcff'"):
        load(folders["fp32"]).generate(["ok", "hi\udcff"])


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../b", "a\\b", "C:b", "", ".", "./a", "a//b", "a/"])
def test_file_names_that_leave_the_folder_are_damage(copied: Copied, name: str) -> None:
    folder = copied("fp32")
    edit_files(folder, lambda files: files.update({name: {"size": 1, "sha256": "0" * 64}}))
    with pytest.raises(VerificationError, match="cannot lie inside the folder") as caught:
        verify(folder)
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize("name", [WEIGHTS_FILE, "model.onnx", "reference.onnx"])
def test_a_file_that_runs_must_be_listed(copied: Copied, name: str) -> None:
    folder = copied("fp32")
    edit_files(folder, lambda files: files.pop(name))
    with pytest.raises(VerificationError, match=f"{name} is not listed"):
        load(folder)


def test_controls_and_orders_are_read_only_when_they_are_listed(copied: Copied) -> None:
    from safetensors.numpy import save_file

    folder = copied("fp32")
    save_file({"order.1": np.arange(256, dtype=np.int32)}, folder / "orders.safetensors")
    loaded = load(folder)
    assert loaded.neuron_orders() == {}
    assert loaded.controls("static")
    edit_files(folder, lambda files: files.pop("controls.safetensors"))
    with pytest.raises(InputError, match="it has: none") as caught:
        load(folder).controls("static")
    assert caught.value.hint
    edit_files(
        folder,
        lambda files: files.update(
            {"orders.safetensors": verification.hash_file(folder / "orders.safetensors").model_dump()}
        ),
    )
    assert list(load(folder).neuron_orders()) == [1]


def test_a_newer_schema_is_refused_before_anything_else_is_read(copied: Copied) -> None:
    folder = copied("fp32")
    edit_manifest(folder, schema_version=SCHEMA + 1, field_of_the_future=1)
    with pytest.raises(IncompatibleEngineError, match="newer shadowc") as caught:
        load(folder)
    assert "upgrade" in caught.value.hint


@pytest.mark.parametrize(("version", "hint"), [(2, "upgrade"), (0, "shadowc compile")])
def test_other_operator_versions_are_refused(copied: Copied, version: int, hint: str) -> None:
    folder = copied("fp32")
    edit_manifest(folder, ops={"shadowc": version})
    with pytest.raises(IncompatibleEngineError, match="operators") as caught:
        load(folder)
    assert hint in caught.value.hint


@pytest.mark.parametrize("kind", ["fp32", "sequence"])
def test_a_flipped_byte_is_caught_and_the_file_is_named(copied: Copied, kind: str) -> None:
    folder = copied(kind)
    load(folder)
    files = read_manifest(folder).files
    assert {WEIGHTS_FILE, "model.onnx", "reference.onnx", "tokenizer.json"} <= files.keys()
    assert (FIXED_FILE in files) == (kind == "sequence")
    for name in files:
        before = (folder / name).read_bytes()
        flip_a_byte(folder / name)
        with pytest.raises(VerificationError, match=f"{name} has changed"):
            load(folder)
        (folder / name).write_bytes(before)
    load(folder)


def test_all_problems_are_told_at_once(copied: Copied) -> None:
    folder = copied("int8")
    flip_a_byte(folder / WEIGHTS_FILE)
    (folder / "model.onnx").unlink()
    (folder / "reference.onnx").write_bytes(b"short")
    with pytest.raises(VerificationError) as caught:
        load(folder)
    assert len(caught.value.problems) == len(verify(folder).problems) == 3
    assert "model.onnx is missing" in caught.value.problems
    assert any("has 5 bytes, expected" in problem for problem in caught.value.problems)


def test_sizes_are_checked_even_without_hashes(copied: Copied) -> None:
    folder = copied("fp32")
    flip_a_byte(folder / WEIGHTS_FILE)
    assert load(folder, verify=False).manifest
    with (folder / WEIGHTS_FILE).open("ab") as file:
        file.write(b"x")
    with pytest.raises(VerificationError, match="expected"):
        load(folder, verify=False)


@pytest.mark.parametrize("reference", [False, True])
def test_a_graph_of_the_right_size_that_is_no_graph_is_named(copied: Copied, reference: bool) -> None:
    path = copied("sequence") / FIXED_FILE
    path.write_bytes(b"\xff" * path.stat().st_size)
    with pytest.raises(VerificationError, match=f"{FIXED_FILE} is damaged") as caught:
        load(path.parent, verify=False, reference=reference)
    assert caught.value.hint.startswith("compile the engine again")


def test_a_large_file_is_hashed_once_and_again_when_it_changes(copied: Copied, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []
    real = verification.hash_file
    monkeypatch.setattr(verification, "LARGE_BYTES", 100_000)
    monkeypatch.setattr(verification, "_SETTLED_SECONDS", -1.0)
    monkeypatch.setattr(verification, "hash_file", lambda path: (hashed.append(path.name), real(path))[1])
    folder = copied("fp32")
    load(folder)
    assert WEIGHTS_FILE in hashed
    hashed.clear()
    load(folder)
    assert WEIGHTS_FILE not in hashed
    assert "model.onnx" in hashed
    flip_a_byte(folder / WEIGHTS_FILE, keep_times=True)  # the time of change cannot be set back
    with pytest.raises(VerificationError, match=r"weights\.bin has changed"):
        load(folder)


def test_a_file_that_has_just_changed_is_not_remembered(copied: Copied, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "LARGE_BYTES", 100_000)
    monkeypatch.setattr(verification, "_SETTLED_SECONDS", 3600.0)
    touched: list[Path] = []
    monkeypatch.setattr(verification, "_touch", touched.append)
    load(copied("fp32"))
    assert not touched


def test_an_older_onnxruntime_is_a_setup_error(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "__version__", "1.22.9")
    with pytest.raises(SetupError, match=r"1\.22\.9 is installed, shadowc needs 1\.23") as caught:
        load(folders["fp32"])
    assert "pip install" in caught.value.hint


def test_a_missing_op_library_is_a_setup_error(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(library.VARIABLE, "/nowhere/lib.so")
    with pytest.raises(SetupError, match="no file"):
        load(folders["fp32"])
    report = verify(folders["fp32"])
    assert not report.passed
    assert "no file" in report.problems[0]


def test_an_op_library_that_is_none_is_a_setup_error(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "lib.so").write_bytes(b"not ELF")
    monkeypatch.setenv(library.VARIABLE, str(tmp_path / "lib.so"))
    with pytest.raises(SetupError, match="cannot be loaded"):
        load(folders["fp32"])


def test_no_hint_names_a_package_index(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    for hint in (library.REINSTALL, verification.UPGRADE):
        assert "make setup" in hint
        assert "shadowc" not in hint.split("pip install")[1]
    monkeypatch.setattr(library, "__version__", "9.9")
    with pytest.raises(IncompatibleEngineError) as caught:
        load(folders["fp32"])
    assert caught.value.hint == library.REINSTALL


def test_an_op_library_of_another_version_is_refused(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "__version__", "9.9")
    with pytest.raises(IncompatibleEngineError, match=r"shadowc of version 9\.9"):
        load(folders["fp32"])


def test_the_reference_needs_no_op_library(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(library.VARIABLE, "/nowhere/lib.so")
    assert load(folders["fp32"], reference=True).logits([[5, 6]]).shape == (1, 2, 320)


def test_the_folders_own_copy_of_the_op_library_is_not_used(copied: Copied) -> None:
    folder = copied("fp32")
    name = "libshadowc_ort.so"
    (folder / name).write_bytes(b"evil")
    files = json.loads((folder / MANIFEST_FILE).read_text())["files"]
    files[name] = verification.hash_file(folder / name).model_dump()
    edit_manifest(folder, files=files)
    assert load(folder).logits([[5, 6]]).shape == (1, 2, 320)


def test_a_graph_that_does_not_run_is_an_incompatible_engine(copied: Copied) -> None:
    folder = copied("fp32")
    graph = onnx.load(folder / "model.onnx", load_external_data=False)
    graph.ir_version = 999
    (folder / "model.onnx").write_bytes(graph.SerializeToString())
    edit_manifest(
        folder,
        files={
            **json.loads((folder / MANIFEST_FILE).read_text())["files"],
            "model.onnx": verification.hash_file(folder / "model.onnx").model_dump(),
        },
    )
    with pytest.raises(IncompatibleEngineError, match="cannot run") as caught:
        load(folder)
    assert "shadowc compile" in caught.value.hint


def test_an_engine_can_be_moved(copied: Copied, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copied("fp32").rename(tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    assert load("elsewhere").logits([[5, 6]]).shape == (1, 2, 320)


def test_numbers_that_are_not_whole_are_refused_together(folders: dict[str, Path]) -> None:
    with pytest.raises(InputError, match=r"threads is 1\.5 and refresh is '4', expected a whole number"):
        load(folders["fp32"], threads=1.5, refresh="4")


@pytest.mark.parametrize("threads", [-1, 0, 1025, 100_000])
def test_threads_are_1_to_1024(folders: dict[str, Path], threads: int) -> None:
    with pytest.raises(InputError, match=f"threads is {threads}, expected 1 to 1024"):
        load(folders["fp32"], threads=threads)


def test_the_op_library_tells_its_level_and_the_stream_bandwidth(folders: dict[str, Path]) -> None:
    loaded = load(folders["fp32"], threads=1)
    assert loaded.threads == 1
    assert loaded.op_library.isa
    assert loaded.op_library.stream_read(1 << 22, 1, 1) > 1e8
