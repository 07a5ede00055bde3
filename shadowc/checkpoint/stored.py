# SPDX-License-Identifier: Apache-2.0
"""Headers of safetensors files: which tensor lies where, checked against the size of the file.

In: the path of one file. Out: its entries and a list of findings; nothing is raised, so that a caller can
report the faults of all files together. Only the header is read.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TypeGuard

WIDTHS = MappingProxyType({"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1})
"""Bytes per value; the span of other types is taken as it is."""

_LONGEST_HEADER = 100_000_000
GIT_LFS = b"version "
"""The first bytes of a Git LFS pointer (`version https://git-lfs...`)."""
GIT_LFS_PROBLEM = "is a Git LFS pointer, not the weights; run git lfs pull in its folder"


@dataclass(frozen=True, slots=True)
class Stored:
    """Where one tensor lies: absolute offset and length in bytes."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    length: int
    given: str = ""
    """Name of the user's file, if `path` is a conversion of it."""

    @property
    def file(self) -> str:
        """What messages call the file."""
        return self.given or self.path.name


def read_header(path: Path) -> tuple[dict[str, Stored], list[str]]:
    """Entries of one safetensors file by name, and what is wrong with it (empty: nothing)."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            if start == GIT_LFS:
                return {}, [f"{path.name}: {GIT_LFS_PROBLEM}"]
            if len(start) < 8:
                return {}, [f"{path.name}: truncated: {size} bytes cannot hold a safetensors header"]
            length = struct.unpack("<Q", start)[0]
            if length > _LONGEST_HEADER:
                return {}, [f"{path.name}: is not a safetensors file (its header would have {length} bytes)"]
            if 8 + length > size:
                return {}, [f"{path.name}: truncated: the header needs {8 + length} bytes, the file has {size}"]
            header = json.loads(file.read(length))
    except OSError as error:
        return {}, [f"{path.name}: cannot be read: {error.strerror}"]
    except ValueError:
        return {}, [f"{path.name}: its safetensors header is not valid JSON"]
    if not isinstance(header, dict):
        return {}, [f"{path.name}: its safetensors header is not a JSON object"]
    return _entries(path, header, 8 + length, size)


def _entries(path: Path, header: dict[str, object], start: int, size: int) -> tuple[dict[str, Stored], list[str]]:
    entries: dict[str, Stored] = {}
    problems: list[str] = []
    end = start
    for name, value in sorted(header.items()):
        if name == "__metadata__":
            continue
        entry = _entry(path, value, start)
        if entry is None:
            problems.append(f"{path.name}: the header's entry of {name} is damaged")
            continue
        entries[name] = entry
        end = max(end, entry.offset + entry.length)
    if end > size:
        problems.append(f"{path.name}: truncated: its tensors need {end} bytes, the file has {size}")
    elif end < size and not problems:
        problems.append(
            f"{path.name}: {size - end} bytes lie behind its last tensor; header and content do not fit together"
        )
    return entries, problems


def _entry(path: Path, value: object, start: int) -> Stored | None:
    """One entry of the header; None if it contradicts itself."""
    if not isinstance(value, dict):
        return None
    dtype, shape, span = value.get("dtype"), value.get("shape"), value.get("data_offsets")
    if not (
        isinstance(dtype, str) and _is_naturals(shape) and _is_naturals(span) and len(span) == 2 and span[0] <= span[1]
    ):
        return None
    length = span[1] - span[0]
    if dtype in WIDTHS and length != math.prod(shape) * WIDTHS[dtype]:
        return None
    return Stored(path, dtype, tuple(shape), start + span[0], length)


def _is_naturals(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(
        isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in value
    )
