# SPDX-License-Identifier: Apache-2.0
"""weights.bin in memory: mapped or copied, lent to the sessions, in large pages where the system has them."""

from __future__ import annotations

import errno
import mmap
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import shadowc
from shadowc.runtime import load, weights_memory
from shadowc.runtime.engine import Engine
from shadowc.runtime.weights_memory import KINDS, LARGE_PAGE, WeightsMemory, renew_pages
from shadowc.spec.errors import InputError, VerificationError

IDS = np.arange(5, 21)[None]


def large_pages_are() -> str:
    """When the system gives large pages: "always", "madvise", "never" or "unknown"."""
    switch = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    found = re.search(r"\[(\w+)\]", switch.read_text(encoding="ascii")) if switch.is_file() else None
    return found[1] if found else "unknown"


@pytest.mark.parametrize("kind", KINDS)
def test_memory_holds_the_bytes_of_the_file(tmp_path, kind):
    content = np.random.default_rng(1).integers(0, 256, 3 * LARGE_PAGE + 77).astype(np.uint8)
    path = tmp_path / "weights.bin"
    path.write_bytes(content.tobytes())
    memory = WeightsMemory.open(path, kind)
    np.testing.assert_array_equal(memory.content, content)
    assert not memory.content.flags.writeable


def resident(memory: WeightsMemory, field: str = "Rss:") -> int:
    """Bytes of a mapping that are resident in this process, from the system's own table; "Pss:": its share of them."""
    first, inside, total = memory.content.ctypes.data, False, 0
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        if found := re.match(r"^([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= first < int(found[2], 16)
        elif inside and line.startswith(field):
            total += int(line.split()[1]) << 10
    return total


HOLDER = """
import sys
from pathlib import Path
from shadowc.runtime.weights_memory import WeightsMemory
memory = WeightsMemory.open(Path(sys.argv[1]), sys.argv[2])
print(int(memory.content.sum()), flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(not Path("/proc/self/smaps").is_file(), reason="the system does not tell what is resident")
@pytest.mark.parametrize(("kind", "share"), [("shared", 0.5), ("private", 1.0)])
def test_two_processes_have_one_page_cache_of_a_mapped_file_and_two_private_copies(tmp_path, kind, share):
    path, size = tmp_path / "weights.bin", 16 * LARGE_PAGE
    content = np.random.default_rng(3).integers(0, 256, size).astype(np.uint8)
    path.write_bytes(content.tobytes())
    memory = WeightsMemory.open(path, kind)
    total = int(memory.content.sum())
    command = [sys.executable, "-c", HOLDER, str(path), kind]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert int(other.stdout.readline()) == total
        assert resident(memory) >= size
        assert resident(memory, "Pss:") == pytest.approx(share * resident(memory), rel=0.05)
        other.communicate()


@pytest.mark.skipif(not Path("/proc/self/smaps").is_file(), reason="the system does not tell what is resident")
def test_pages_of_a_passing_file_do_not_stay_and_its_bytes_do_not_change(tmp_path):
    """The planted opposite: without `passing` all of the file is resident after it was read."""
    path, size = tmp_path / "weights.bin", 16 * LARGE_PAGE
    content = np.random.default_rng(2).integers(0, 256, size).astype(np.uint8)
    path.write_bytes(content.tobytes())
    memory = WeightsMemory.open(path, ahead=False)
    assert resident(memory) < size // 2
    np.testing.assert_array_equal(memory.content, content)
    assert resident(memory) == size
    with memory.passing():
        for _ in range(3):
            np.testing.assert_array_equal(memory.content, content)
        deadline = time.monotonic() + 30
        while resident(memory) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert resident(memory) == 0, "pages are given back while the block runs"
        np.testing.assert_array_equal(memory.content, content)
    assert resident(memory) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_file_is_no_error(tmp_path, kind):
    (tmp_path / "weights.bin").touch()
    memory = WeightsMemory.open(tmp_path / "weights.bin", kind)
    assert memory.content.size == 0
    assert memory.large_pages is None


def test_a_copy_starts_at_a_large_page_and_lies_in_large_pages(tmp_path):
    path = tmp_path / "weights.bin"
    path.write_bytes(bytes(8 * LARGE_PAGE))
    memory = WeightsMemory.open(path, "private")
    assert memory.content.ctypes.data % LARGE_PAGE == 0
    if large_pages_are() in ("never", "unknown"):
        pytest.skip("the system gives no large pages")
    assert memory.large_pages is not None
    assert memory.large_pages > 0


def test_a_written_file_keeps_its_bytes_when_its_pages_are_renewed(tmp_path):
    content = np.random.default_rng(3).integers(0, 256, 8 * LARGE_PAGE + 77).astype(np.uint8)
    path = tmp_path / "weights.bin"
    with path.open("wb", buffering=0) as file:
        for start in range(0, content.size, 4096):
            file.write(content[start : start + 4096].data)
    before = WeightsMemory.open(path).large_pages or 0.0
    renew_pages(path)
    memory = WeightsMemory.open(path)
    np.testing.assert_array_equal(memory.content, content)
    assert (memory.large_pages or 0.0) >= before


@pytest.mark.parametrize(
    ("large", "dropped"),
    [([1, 1], []), ([0, 0, 1, 1], [0, 1]), ([1, 0, 1], [1]), ([0, 0, 0], [0])],
    ids=["large", "small", "small in part", "never large here"],
)
def test_pages_are_renewed_where_they_are_small_and_while_it_helps(tmp_path, monkeypatch, large, dropped):
    """`large`: whether pages are, piece by piece, and again where a piece was dropped."""
    found, calls = iter(large), []
    monkeypatch.setattr(weights_memory, "_RENEWED", LARGE_PAGE)
    monkeypatch.setattr(weights_memory, "_is_large", lambda *_: next(found))
    monkeypatch.setattr(weights_memory.os, "posix_fadvise", lambda _, start, *__: calls.append(start // LARGE_PAGE))
    path = tmp_path / "weights.bin"
    path.write_bytes(bytes(2 * LARGE_PAGE + 5))
    renew_pages(path)
    assert (calls, list(found)) == (dropped, [])


@pytest.mark.parametrize("kind", ["no call", "refused", "read only", "not told"])
def test_pages_stay_as_they_are_where_the_system_cannot_renew_them(tmp_path, monkeypatch, kind):
    def refuse(*_):
        raise OSError(errno.EROFS if kind == "read only" else errno.ENOSYS, "no")

    path = tmp_path / "weights.bin"
    path.write_bytes(bytes(LARGE_PAGE))
    monkeypatch.setattr(weights_memory, "_large_share", lambda *_: None if kind == "not told" else 0.0)
    if kind == "no call":
        monkeypatch.delattr(weights_memory.os, "posix_fadvise", raising=False)
    else:
        monkeypatch.setattr(weights_memory.os, "fsync" if kind == "read only" else "posix_fadvise", refuse)
    renew_pages(path)


def test_what_cannot_be_brought_to_the_disk_is_an_error_and_keeps_its_pages(tmp_path, monkeypatch):
    """Planted: dropping pages all the same would lose what was written."""

    def fail(_):
        raise OSError(errno.EIO, "broken disk")

    path = tmp_path / "weights.bin"
    path.write_bytes(bytes(LARGE_PAGE))
    monkeypatch.setattr(weights_memory, "_is_large", lambda *_: False)
    monkeypatch.setattr(weights_memory.os, "fsync", fail)
    monkeypatch.setattr(weights_memory.os, "posix_fadvise", lambda *_: pytest.fail("dropped"))
    with pytest.raises(OSError, match="broken disk"):
        renew_pages(path)


def test_an_engine_is_renewed_before_its_files_are_checked(folders, monkeypatch):
    calls = []
    monkeypatch.setattr(load, "renew_pages", lambda path: calls.append(path.name))
    monkeypatch.setattr(load, "_require_files", lambda *_: calls.append("checked"))
    for kind in KINDS:
        load.load_cpu(folders["int8"], memory=kind)
    assert calls == ["checked", "weights.bin", "checked", "checked"]


def test_files_that_are_missing_are_told_as_ever(folders, tmp_path):
    folder = tmp_path / "engine"
    shutil.copytree(folders["int8"], folder)
    (folder / "weights.bin").unlink()
    with pytest.raises(VerificationError, match=r"weights\.bin"):
        shadowc.load(folder, memory="renewed")


def test_small_pages_are_told_as_such():
    if large_pages_are() != "madvise":
        pytest.skip("needs a system that gives large pages on request only")
    plain = np.frombuffer(mmap.mmap(-1, 4 * LARGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8)
    plain[:] = 1
    assert WeightsMemory(plain, "private").large_pages == 0.0


@pytest.mark.parametrize("name", ["fp32", "bf16", "int8", "int4"])
def test_engines_answer_alike_from_either_memory(folders, name):
    answers = [shadowc.load(folders[name], memory=kind).logits(IDS, protocol="dense") for kind in KINDS]
    for answer in answers[1:]:
        np.testing.assert_array_equal(answer, answers[0])


@pytest.mark.parametrize("name", ["fp32", "bf16", "int8", "int4"])
def test_sessions_read_the_memory_that_was_lent_and_not_the_file(folders, name):
    """The planted difference: zeros in place of the weights."""
    engine = shadowc.load(folders[name])
    zeros = WeightsMemory(np.zeros_like(engine._session.weights.content), "private")
    lent = Engine(engine.folder, engine.manifest, replace(engine._session, weights=zeros))
    assert not np.any(lent.logits(IDS, protocol="dense")), "without weights there is nothing to say"


def test_variants_of_an_engine_share_its_memory(folders):
    engine = shadowc.load(folders["fp32"])
    assert engine.dense_twin()._session.weights is engine._session.weights


def test_another_kind_of_memory_is_refused_with_those_that_there_are(folders):
    with pytest.raises(InputError, match="memory is 'huge', expected shared, renewed or private"):
        shadowc.load(folders["fp32"], memory="huge")
