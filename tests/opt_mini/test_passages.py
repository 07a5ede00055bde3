# SPDX-License-Identifier: Apache-2.0
"""The drawn texts: from their own part, never the same piece twice, the same again, and nothing is overwritten."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import corpus
import passages

BOOK = "\n\n".join(f"Chapter {i} of a long book tells of {i * i} things. " + "It goes on. " * 20 for i in range(400))


def drawn(folder: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> list[list[str]]:
    (folder / "books").mkdir(exist_ok=True)
    text = folder / "books" / "book.jsonl"
    text.write_text(json.dumps({"text": BOOK}) + "\n")
    out = folder / "out"
    arguments = ["passages.py", "--text", str(text), "--count", "5", "--tokens", "64", "--out", str(out), *more]
    monkeypatch.setattr(sys, "argv", arguments)
    passages.main()
    return [[json.loads(line)["text"] for line in (out / name).read_text().splitlines()] for name in passages.FILES]


def test_passages_come_from_their_own_part_and_are_all_different(tmp_path, monkeypatch):
    part = corpus.split(corpus.Document("books", BOOK))
    calibration, test = drawn(tmp_path, monkeypatch)
    assert all(passage in part.train for passage in calibration)
    assert all(passage in part.held_out for passage in test)
    assert len(set(calibration)) == len(set(test)) == 5


def test_a_seed_decides_what_is_drawn(tmp_path, monkeypatch):
    folders = [tmp_path / name for name in "abc"]
    for folder in folders:
        folder.mkdir()
    first, again = drawn(folders[0], monkeypatch), drawn(folders[1], monkeypatch)
    other = drawn(folders[2], monkeypatch, "--seed", "1")
    assert first == again
    assert first != other


def test_a_file_that_is_there_stays_as_it_is(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "test.jsonl").write_text("mine")
    with pytest.raises(SystemExit, match=r"test\.jsonl: already there"):
        drawn(tmp_path, monkeypatch)
    assert (tmp_path / "out" / "test.jsonl").read_text() == "mine"


def test_a_part_that_is_too_short_is_named_with_what_it_has(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match=r"books, held out: 500 passages of 64 tokens asked for, there are \d+"):
        drawn(tmp_path, monkeypatch, "--count", "500")
