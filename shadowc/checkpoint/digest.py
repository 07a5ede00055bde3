# SPDX-License-Identifier: Apache-2.0
"""Identity of a checkpoint: SHA-256 over its facts and the content of its files.

The digest of a file is kept in the stage cache under its path, its place on the disk, its size and both times of
change, so that the second run does not read 100 GB again only to learn that nothing has changed. Its time of writing
alone would not do: cp -p and rsync -t set it. What changed a moment ago is not kept: it may change again within the
same tick of the file system's clock.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from shadowc.checkpoint.facts import ModelFacts
from shadowc.spec.errors import SetupError
from shadowc.stage_cache import StageCache

STAGE = "file-digest"
SETTLED_SECONDS = 2.0
"""A file that changed more recently is hashed every time."""
_DIGEST_FILE = "sha256"
_FIELDS = ("dev", "ino", "size", "mtime_ns", "ctime_ns")

PARTS = ("weights", "tokenizer")
"""What an identity is made of, beside the facts."""
Digests = Mapping[str, str]
"""File name -> SHA-256."""
Stamp = Mapping[str, int]
"""What changes when a file does: its place on the disk, size and both times."""


def identity(facts: ModelFacts, files: Digests) -> str:
    """Hash of everything that decides what the model computes; its name and place do not.

    Args:
        facts: the model's sizes.
        files: `digests` of its weight and tokenizer files.
    """
    return fingerprint({"facts": facts_key(facts), "files": files})


def digests(files: Sequence[Path], cache: StageCache, advance: Callable[[int, int], None] | None = None) -> Digests:
    """SHA-256 of each file, by its name.

    Args:
        files: whose names differ.
        cache: where digests of files are kept; if it cannot be written to, files are simply hashed again.
        advance: called with bytes done and their total.
    """
    total = sum(path.stat().st_size for path in files)
    found: dict[str, str] = {}
    done = 0
    for path in sorted(files, key=lambda path: path.name):
        found[path.name] = file_digest(path, cache)
        done += path.stat().st_size
        if advance is not None:
            advance(done, total)
    return found


def parts_of(files: Digests, tokens: Sequence[Path]) -> dict[str, str]:
    """One hash for the files of each of `PARTS`; `tokens` are those of the tokenizer, the others are weights."""
    names = {path.name for path in tokens}
    split = (
        {name: digest for name, digest in files.items() if name not in names},
        {name: digest for name, digest in files.items() if name in names},
    )
    return dict(zip(PARTS, map(fingerprint, split), strict=True))


def differing_part(one: Mapping[str, object], other: Mapping[str, object]) -> str:
    """Tell which part of two checkpoints differs, as the end of a sentence; both as `ModelCheckpoint.described`.

    What was written before there were parts, dummy weights and GGUF files have the identity alone.
    """
    if not all(part in told for part in PARTS for told in (one, other)):
        return "weights or tokenizer differ"
    hashes = [f"{part} {str(one[part])[:16]} and {str(other[part])[:16]}" for part in PARTS if one[part] != other[part]]
    return f"what differs: {', '.join(hashes) or 'config.json'}"


def facts_key(facts: ModelFacts) -> dict[str, object]:
    """The facts without the name, which decides nothing."""
    return {field: value for field, value in asdict(facts).items() if field != "name"}


def fingerprint(value: object) -> str:
    """SHA-256 of a value's canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def file_digest(path: Path, cache: StageCache) -> str:
    """SHA-256 of one file, from the cache if the file was hashed before and has not changed since."""
    whole = path.resolve()
    status = whole.stat()
    if time.time_ns() - status.st_ctime_ns < SETTLED_SECONDS * 1e9:
        return _hash(whole)

    def make(folder: Path) -> None:
        (folder / _DIGEST_FILE).write_text(_hash(whole) + "\n", encoding="ascii")

    key = {"path": str(whole), **_stamp(status)}
    try:
        folder, _ = cache.get_or_make(STAGE, key, make)
    except SetupError:
        return _hash(whole)
    return (folder / _DIGEST_FILE).read_text(encoding="ascii").strip()


def stamp(path: Path) -> Stamp:
    """The stamp of a file as it is now."""
    return _stamp(path.stat())


def _stamp(status: os.stat_result) -> Stamp:
    return {field: getattr(status, f"st_{field}") for field in _FIELDS}


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
