# SPDX-License-Identifier: Apache-2.0
"""Digests of files are remembered, but never for a file that is another one by now."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from shadowc.checkpoint import digest
from shadowc.stage_cache import StageCache
from tests.checkpoint.handmade import FACTS

TICK = 0.05
"""Seconds in which every file system's clock has moved on."""


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files count as settled at once."""
    monkeypatch.setattr(digest, "SETTLED_SECONDS", 0.0)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"weights 1")
    return path


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were really read."""
    read, original = [], digest._hash

    def count(path: Path) -> str:
        read.append(path)
        return original(path)

    monkeypatch.setattr(digest, "_hash", count)
    return read


def identity(file: Path) -> str:
    return digest.identity(FACTS, digest.digests([file], StageCache()))


def rewrite_in_place(file: Path) -> None:
    file.write_bytes(b"weights 2")


def put_another_file_there(file: Path) -> None:
    other = file.with_name("other")
    other.write_bytes(b"weights 2")
    os.utime(other, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns))
    other.replace(file)


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("change", [rewrite_in_place, put_another_file_there])
def test_another_content_is_noticed_when_size_and_time_of_writing_are_the_same(
    file: Path, change: Callable[[Path], None]
) -> None:
    before, first = file.stat(), identity(file)
    time.sleep(TICK)
    change(file)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = file.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert identity(file) != first


@pytest.mark.usefixtures("settled")
def test_a_settled_file_is_read_once(file: Path, hashed: list[Path]) -> None:
    assert identity(file) == identity(file)
    assert len(hashed) == 1


def test_a_file_that_changed_a_moment_ago_is_not_remembered(file: Path, hashed: list[Path]) -> None:
    assert identity(file) == identity(file)
    assert len(hashed) == 2
    assert StageCache().root.joinpath(digest.STAGE).exists() is False


def test_the_part_that_differs_is_told_where_both_have_parts() -> None:
    one = {"identity": "1", "weights": "a" * 64, "tokenizer": "b" * 64}
    assert (
        digest.differing_part(one, one | {"tokenizer": "c" * 64})
        == f"what differs: tokenizer {'b' * 16} and {'c' * 16}"
    )
    assert digest.differing_part(one, one | {"weights": "0"}) == f"what differs: weights {'a' * 16} and 0"
    assert digest.differing_part(one, {"weights": "0", "tokenizer": "1"}).count(" and ") == 2
    assert digest.differing_part(one, one) == "what differs: config.json"  # asked for identities that differ


def test_what_was_written_before_there_were_parts_is_told_as_it_was() -> None:
    parts = {"weights": "0", "tokenizer": "1"}
    assert digest.differing_part({"identity": "1"}, parts) == "weights or tokenizer differ"
    assert digest.differing_part(parts, {"identity": "dummy-0"}) == "weights or tokenizer differ"
