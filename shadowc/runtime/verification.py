# SPDX-License-Identifier: Apache-2.0
"""Does a folder hold what its engine.json says? Sizes always, hashes of what was not hashed before.

A large file that was hashed once is remembered by its identity (path, inode, size, times), so that loading stays
fast; `shadowc verify` hashes everything again.
"""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path, PurePosixPath

from pydantic import ValidationError

from shadowc.emit.folder import hash_file
from shadowc.spec.errors import IncompatibleEngineError, InputError, SetupError, VerificationError
from shadowc.spec.manifest import (
    MANIFEST_FILE,
    SCHEMA,
    EngineManifest,
    FileEntry,
    needed_files,
)
from shadowc.spec.ops import DOMAIN, VERSION
from shadowc.stage_cache import default_root

LARGE_BYTES = 1 << 26
"""From this size on a file's hash is remembered; smaller ones are hashed at every load."""
_SETTLED_SECONDS = 2.0
"""A file changed later than this before the hash is not remembered: its times could hide a further change."""
_PLANS = ("prefill", "decode")
UPGRADE = "upgrade shadowc: git pull and make setup in a checkout, or pip install the newer wheel file"
RECOMPILE = "compile the engine again: shadowc compile --model NAME --out FOLDER"


def read_manifest(folder: Path) -> EngineManifest:
    """Read and check engine.json.

    Raises:
        InputError: the folder does not exist or is no engine.
        IncompatibleEngineError: another version of shadowc wrote it.
        VerificationError: it is damaged.
    """
    path = folder / MANIFEST_FILE
    text = _read(path)
    try:
        content = json.loads(text)
        schema = content["schema_version"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise VerificationError(f"{path} is damaged: {error}", hint=RECOMPILE) from error
    if type(schema) is not int or schema < 1:  # a bool is an int to isinstance
        raise VerificationError(
            f"{path} is damaged: schema_version is {schema!r}, expected a whole number", hint=RECOMPILE
        )
    if schema > SCHEMA:
        raise IncompatibleEngineError(
            f"{folder} was written by a newer shadowc (schema {schema}, this one reads {SCHEMA})",
            hint=UPGRADE,
        )
    try:
        manifest = EngineManifest.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise VerificationError(f"{path} is damaged: {where}: {first['msg']}", hint=RECOMPILE) from error
    unsafe = sorted(name for name in manifest.files if not _is_plain(name))
    if unsafe:
        raise VerificationError(
            f"{path} is damaged: it lists {', '.join(map(repr, unsafe))}, which cannot lie inside the folder",
            hint=RECOMPILE,
        )
    lacking = _lacking_for_plans(manifest)
    if lacking:
        raise VerificationError(f"{path} is damaged: {'; '.join(lacking)}", hint=RECOMPILE, problems=lacking)
    needed = manifest.ops.get(DOMAIN, VERSION)
    if needed != VERSION:
        newer = needed > VERSION
        raise IncompatibleEngineError(
            f"{folder} needs version {needed} of the {DOMAIN} operators, this shadowc has version {VERSION}",
            hint=UPGRADE if newer else RECOMPILE,
        )
    return manifest


def _read(path: Path) -> bytes:
    """The bytes of engine.json, or why there are none."""
    from shadowc.checkpoint.resolve import refuse_llama

    folder = path.parent
    try:
        if not folder.is_dir():
            refuse_llama(str(folder))
            raise InputError(f"no engine folder at {folder}", hint=f"shadowc compile --model opt-mini --out {folder}")
        if not path.is_file():
            refuse_llama(str(folder))
            raise InputError(
                f"{folder} is not an engine folder: it has no {MANIFEST_FILE}", hint="shadowc compile writes one"
            )
        return path.read_bytes()
    except OSError as error:
        raise InputError(
            f"{path} cannot be read: {error.strerror or error}", hint="check permissions and the disk, or copy it again"
        ) from error


def _lacking_for_plans(manifest: EngineManifest) -> list[str]:
    """What everything that reads a TensorRT part takes for granted: both plans, and every file of it in the list."""
    if manifest.tensorrt is None:
        return []
    missing = [name for name in _PLANS if name not in manifest.tensorrt.plans]
    return [f"it has no {name} plan" for name in missing] + _unlisted(manifest)


def _unlisted(manifest: EngineManifest) -> list[str]:
    return [f"{name} is not listed in {MANIFEST_FILE}" for name in needed_files(manifest) if name not in manifest.files]


def _is_plain(name: str) -> bool:
    """Whether a name is a relative path in its shortest form that stays inside its folder, on every system."""
    path = PurePosixPath(name)
    if "\\" in name or ":" in name or "\0" in name or path.is_absolute() or ".." in path.parts:
        return False
    return bool(path.parts) and str(path) == name


def file_problems(folder: Path, manifest: EngineManifest, *, hashes: bool = True, remember: bool = True) -> list[str]:
    """One sentence for every file that is missing, unlisted or not what the manifest says.

    Without `hashes` only sizes are compared; `remember` trusts and keeps the hashes of large files.
    """
    problems = _unlisted(manifest)
    for name, entry in sorted(manifest.files.items()):
        try:
            problem = _problem(folder / name, entry, hashes=hashes, remember=remember)
        except OSError as error:  # permissions, a damaged disk, a server that is gone
            problem = f"cannot be read: {error.strerror or error}"
        if problem:
            problems.append(f"{name} {problem}")
    return problems


def _problem(path: Path, entry: FileEntry, *, hashes: bool, remember: bool) -> str:
    if not path.is_file():
        return "is missing"
    if (size := path.stat().st_size) != entry.size:
        return f"has {size} bytes, expected {entry.size}"
    if hashes and not _matches(path, entry, remember=remember):
        return f"has changed: its SHA-256 differs from the one in {MANIFEST_FILE}"
    return ""


def _matches(path: Path, entry: FileEntry, *, remember: bool) -> bool:
    if not remember or entry.size < LARGE_BYTES:
        return hash_file(path) == entry
    marker = _marker(path, entry)
    if marker is not None and marker.is_file():
        return True
    settled = time.time() - path.stat().st_ctime > _SETTLED_SECONDS
    if hash_file(path) != entry:
        return False
    if settled and marker is not None and marker == _marker(path, entry):
        _touch(marker)
    return True


def _marker(path: Path, entry: FileEntry) -> Path | None:
    """An empty file whose name is the identity of a file that was found to match; None: there is no place for it."""
    status = path.stat()
    parts = (path.resolve(), status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    identity = "\n".join(map(str, (*parts, entry.sha256)))
    try:
        return default_root() / "verified" / hashlib.sha256(identity.encode()).hexdigest()
    except SetupError:
        return None


def _touch(marker: Path) -> None:
    try:
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.touch()
    except OSError:
        return  # a cache that cannot be written costs time at the next load, nothing else
