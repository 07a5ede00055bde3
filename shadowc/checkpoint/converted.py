# SPDX-License-Identifier: Apache-2.0
"""Pickled weights and GGUF files as safetensors in shadowc's cache: converted once, found again by their content.

The user's folder is never written to. The cache makes an entry beside its place and renames it, under a lock, so a
killed conversion leaves nothing that would be found, and two at once make one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from shadowc.checkpoint.digest import file_digest, stamp
from shadowc.checkpoint.stored import Stored, read_header
from shadowc.spec.errors import InputError
from shadowc.stage_cache import StageCache

STAGE = "safetensors"
SCHEME = 1
"""Raise it when the same pickle gives another file than before."""

GGUF_STAGE = "gguf"
GGUF_SCHEME = 1
"""Raise it when the same GGUF file gives other weights, facts or tokens than before."""

_FILE = "weights.safetensors"


def converted(path: Path, cache: StageCache, advance: Callable[[int, int], None] | None = None) -> Path:
    """The safetensors file with the tensors of one torch.save file, made now if it is not in the cache.

    Args:
        path: the file that torch.save wrote.
        cache: where the conversion is kept.
        advance: called with bytes written and their total, if it is converted now.

    Raises:
        InputError: the file is damaged, or changed while it was read.
        UnsupportedError: it needs more than weights_only.
        SetupError: the cache cannot be written to, its disk is full, or torch is too old.
    """
    before = stamp(path)

    def make(folder: Path) -> None:
        from shadowc.checkpoint.pickled import convert

        convert(path, folder / _FILE, advance)
        if stamp(path) != before:  # or the new content would be kept under the hash of the old one
            raise InputError(f"{path}: changed while it was read", hint="run the same command again")

    folder, _ = cache.get_or_make(STAGE, {"sha256": file_digest(path, cache), "scheme": SCHEME}, make)
    return folder / _FILE


def read_converted(
    path: Path, cache: StageCache, advance: Callable[[int, int], None] | None = None
) -> tuple[dict[str, Stored], list[str]]:
    """Entries of one torch.save file by name, and what is wrong with it, as `read_header` gives for safetensors.

    Raises:
        UnsupportedError, SetupError: as `converted`.
    """
    try:
        file = converted(path, cache, advance)
    except InputError as error:
        return {}, [f"{path.name}: {error.message.removeprefix(f'{path}: ').removeprefix(f'{path.name}: ')}"]
    except OSError as error:
        return {}, [f"{path.name}: cannot be read: {error.strerror or error}"]
    entries, problems = read_header(file)
    return {name: replace(entry, given=path.name) for name, entry in entries.items()}, problems


def converted_gguf(path: Path, cache: StageCache) -> Path:
    """The folder with config.json, safetensors and tokenizer of one GGUF file, made now if it is not in the cache.

    Raises:
        InputError: the file is damaged, or changed while it was read.
        UnsupportedError: it holds a model of another architecture.
        SetupError: packages that read it are missing, or the cache cannot be written to.
    """
    before = stamp(path)

    def make(folder: Path) -> None:
        from shadowc.checkpoint.gguf import convert_gguf

        convert_gguf(path, folder)
        if stamp(path) != before:
            raise InputError(f"{path}: changed while it was read", hint="run the same command again")

    folder, _ = cache.get_or_make(GGUF_STAGE, {"sha256": file_digest(path, cache), "scheme": GGUF_SCHEME}, make)
    return folder
