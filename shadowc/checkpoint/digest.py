# SPDX-License-Identifier: Apache-2.0
"""Identity of a checkpoint: SHA-256 over its facts and the content of its files.

The digest of a file is kept in the stage cache under its path, size and time of change, so that the second
run does not read 100 GB again only to learn that nothing has changed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from shadowc.checkpoint.opt import OptFacts
from shadowc.spec.errors import SetupError
from shadowc.stage_cache import StageCache

STAGE = "file-digest"
_DIGEST_FILE = "sha256"
_BLOCK = 1 << 22


def identity(
    facts: OptFacts, files: Sequence[Path], cache: StageCache, advance: Callable[[int, int], None] | None = None
) -> str:
    """Hash of everything that decides what the model computes; its name and place do not.

    Args:
        facts: the model's sizes.
        files: weight and tokenizer files.
        cache: where digests of files are kept; if it cannot be written to, files are simply hashed again.
        advance: called with bytes done and their total.
    """
    total = sum(path.stat().st_size for path in files)
    parts: dict[str, str] = {}
    done = 0
    for path in sorted(files, key=lambda path: path.name):
        parts[path.name] = _digest(path, cache)
        done += path.stat().st_size
        if advance is not None:
            advance(done, total)
    return fingerprint({"facts": facts_key(facts), "files": parts})


def facts_key(facts: OptFacts) -> dict[str, object]:
    """The facts without the name, which decides nothing."""
    return {field: value for field, value in asdict(facts).items() if field != "name"}


def fingerprint(value: object) -> str:
    """SHA-256 of a value's canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _digest(path: Path, cache: StageCache) -> str:
    whole = path.resolve()
    status = whole.stat()

    def make(folder: Path) -> None:
        (folder / _DIGEST_FILE).write_text(_hash(whole) + "\n", encoding="ascii")

    try:
        key = {"path": str(whole), "size": status.st_size, "changed": status.st_mtime_ns}
        folder, _ = cache.get_or_make(STAGE, key, make)
    except SetupError:
        return _hash(whole)
    return (folder / _DIGEST_FILE).read_text(encoding="ascii").strip()


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
