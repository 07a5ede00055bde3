# SPDX-License-Identifier: Apache-2.0
"""The texts that opt-mini is trained and judged on: reading, and the split between the two.

In: `.txt` files (documents between lines `<|endoftext|>`) and `.jsonl` files (field `text`), each plain or
`.xz`; Python's manual is added. Out: documents, each with a training part and a held-out part. `split` is the
only place that decides what is held out: tokenizer, training, the Kneser-Ney baseline and the report all ask it.
"""

from __future__ import annotations

import hashlib
import json
import lzma
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import heldout

STORY_END = "<|endoftext|>"
LONG = 60_000  # characters; a document of this length is a book: its last pages are held out
BOOK_SHARE = 0.03  # of a book's characters, whole paragraphs, ...
BOOK_CAP = 12_000  # ... but no more characters than this
ONE_IN = 50  # of the shorter documents is held out
PYDOC = "pydoc"  # name of the source that is Python's manual


@dataclass(frozen=True, slots=True)
class Document:
    """A document and the file it came from (`source` is the name of the file's folder)."""

    source: str
    text: str


@dataclass(frozen=True, slots=True)
class Split:
    """The two parts of a document; either can be empty."""

    source: str
    train: str
    held_out: str


def read_documents(paths: Iterable[Path]) -> Iterator[Document]:
    """Yield the documents of the files in their order."""
    for path in paths:
        kind = path.name.removesuffix(".xz").rpartition(".")[2]
        raw = path.read_bytes()
        whole = (lzma.decompress(raw) if path.suffix == ".xz" else raw).decode("utf-8")
        source = path.resolve().parent.name
        if kind == "jsonl":
            texts = [str(json.loads(line)["text"]) for line in whole.splitlines() if line.strip()]
        elif kind == "txt":
            texts = whole.split(STORY_END)
        else:
            raise SystemExit(f"{path}: expected .txt or .jsonl, either with .xz; found .{kind}")
        yield from (Document(source, text.strip()) for text in texts if text.strip())


def split(document: Document) -> Split:
    """Decide which part of a document is held out.

    A book gives its last paragraphs, about 3 % of it. A shorter document is wholly on one side, by a hash of
    its text: copies of a story fall on the same side.
    """
    text = document.text
    if len(text) >= LONG:
        return _split_book(document)
    digest = hashlib.sha256(text.encode()).digest()
    if int.from_bytes(digest[:8], "big") % ONE_IN == 0:
        return Split(document.source, "", text)
    return Split(document.source, text, "")


def _split_book(document: Document) -> Split:
    paragraphs = document.text.split("\n\n")
    room = min(BOOK_CAP, int(len(document.text) * BOOK_SHARE))
    cut = len(paragraphs)
    while cut > 1 and room - len(paragraphs[cut - 1]) >= 0:
        room -= len(paragraphs[cut - 1])
        cut -= 1
    return Split(document.source, "\n\n".join(paragraphs[:cut]).strip(), "\n\n".join(paragraphs[cut:]).strip())


def load(paths: Iterable[Path]) -> list[Split]:
    """Return all documents, split; Python's manual, which has its own split by topic, comes last."""
    parts = [split(document) for document in read_documents(paths)]
    parts += [Split(PYDOC, text, "") for _, text in heldout.pydoc_documents(held_out=False)]
    parts += [Split(PYDOC, "", text) for _, text in heldout.pydoc_documents(held_out=True)]
    return parts


def sources(parts: Iterable[Split]) -> list[str]:
    """Return the names of the sources in a fixed order."""
    return sorted({part.source for part in parts})
