# SPDX-License-Identifier: Apache-2.0
"""A folder that changes, moves or goes away under an engine that is loaded."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from shadowc.runtime import verification, weights_memory
from shadowc.runtime.load import load, verify
from shadowc.runtime.weights_memory import Kind, WeightsMemory
from shadowc.spec.errors import InputError, SetupError, ShadowcError, VerificationError
from shadowc.spec.manifest import MANIFEST_FILE, WEIGHTS_FILE

Copied = Callable[[str], Path]
IDS = np.array([[2, 40, 50, 60]], np.int64)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def lengthen(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"x")


def write_to(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"x")
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 10**9))  # a clock of the file system may be coarse


@pytest.mark.parametrize(
    ("change", "says"), [(cut, "bytes, expected"), (lengthen, "bytes, expected"), (write_to, "was written to")]
)
def test_weights_that_were_cut_or_written_to_end_the_next_generation_with_an_error(
    copied: Copied, change: Callable[[Path], None], says: str
) -> None:
    folder = copied("fp32")
    engine = load(folder)
    engine.generate(IDS, max_new_tokens=2)
    change(folder / WEIGHTS_FILE)
    with pytest.raises(VerificationError, match=rf"weights\.bin .*{says}.* changed after it was loaded") as caught:
        engine.generate(IDS, max_new_tokens=2)
    assert "load it again" in caught.value.hint
    with pytest.raises(VerificationError):
        engine.logits(IDS)


def test_a_private_copy_does_not_mind(copied: Copied) -> None:
    folder = copied("fp32")
    engine = load(folder, memory="private")
    before = engine.generate(IDS, max_new_tokens=4)
    cut(folder / WEIGHTS_FILE)
    assert engine.generate(IDS, max_new_tokens=4).tolist() == before.tolist()


def test_an_engine_goes_on_when_its_folder_is_moved_replaced_or_removed(copied: Copied, tmp_path: Path) -> None:
    folder = copied("fp32")
    engine = load(folder)
    before = engine.generate(IDS, max_new_tokens=4).tolist()
    moved = folder.rename(tmp_path / "moved")
    assert engine.generate(IDS, max_new_tokens=4).tolist() == before
    shutil.copytree(moved, folder)
    (folder / WEIGHTS_FILE).write_bytes(b"another engine's")
    assert engine.generate(IDS, max_new_tokens=4).tolist() == before
    shutil.rmtree(moved)
    assert engine.generate(IDS, max_new_tokens=4).tolist() == before


def test_a_tokenizer_that_is_asked_for_after_the_move_is_missed_in_one_sentence(copied: Copied, tmp_path: Path) -> None:
    folder = copied("fp32")
    engine = load(folder)
    folder.rename(tmp_path / "moved")
    with pytest.raises(ShadowcError) as caught:
        engine.generate("a record", max_new_tokens=1)
    assert caught.value.hint


@pytest.mark.parametrize("name", [WEIGHTS_FILE, "model.onnx"])
@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES])
def test_a_file_that_cannot_be_read_is_named(
    copied: Copied, monkeypatch: pytest.MonkeyPatch, name: str, number: int
) -> None:
    """A damaged disk, a server that is gone, a file of somebody else."""
    folder, really = copied("fp32"), verification.hash_file

    def hash_file(path: Path) -> object:
        if path.name == name:
            raise OSError(number, os.strerror(number), str(path))
        return really(path)

    monkeypatch.setattr(verification, "hash_file", hash_file)
    said = f"{name} cannot be read: {os.strerror(number)}"
    with pytest.raises(VerificationError, match=said):
        load(folder)
    assert verify(folder).problems == (said,)


def test_a_manifest_that_cannot_be_read_is_named(copied: Copied, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, really = copied("fp32"), Path.read_bytes

    def read_bytes(path: Path) -> bytes:
        if path.name == MANIFEST_FILE:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
        return really(path)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    with pytest.raises(InputError, match=r"engine\.json cannot be read: Stale file handle"):
        load(folder)


@pytest.mark.parametrize(
    ("number", "kind", "memory"),
    [(errno.ENOMEM, SetupError, "private"), (errno.EIO, VerificationError, "shared")],
)
def test_weights_that_do_not_come_into_memory_are_told(
    copied: Copied, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[ShadowcError], memory: Kind
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(weights_memory, "_copied" if memory == "private" else "_mapped", refuse)
    with pytest.raises(kind, match=r"weights\.bin") as caught:
        load(copied("fp32"), memory=memory)
    assert caught.value.hint


def test_no_file_stays_open_when_an_engine_is_gone(copied: Copied) -> None:
    path = copied("fp32") / WEIGHTS_FILE

    def opened() -> int:
        return sum(entry.resolve() == path for entry in Path("/proc/self/fd").iterdir())

    if not Path("/proc/self/fd").is_dir():
        pytest.skip("the system does not list open files")
    memory = WeightsMemory.open(path)
    assert opened() == 2, "the mapping's file and the one that is looked at"
    del memory
    assert opened() == 0


def test_a_folder_whose_name_is_no_text_is_refused_in_one_sentence(copied: Copied, tmp_path: Path) -> None:
    folder = copied("fp32")
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    try:
        folder.rename(odd)
    except OSError:
        pytest.skip("this file system takes UTF-8 only")
    with pytest.raises(InputError, match="the name is not UTF-8") as caught:
        load(odd)
    assert str(caught.value).isprintable()
    assert "rename" in caught.value.hint
    odd.rename(folder)
