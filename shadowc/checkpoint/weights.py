# SPDX-License-Identifier: Apache-2.0
"""Weights of a checkpoint folder: one safetensors file or shards, read lazily and one tensor at a time.

In: a folder and the facts from its config.json. Out: a TensorSource with canonical names and float32 values,
or one error that lists everything that is wrong with the files. Each tensor has its own short-lived mapping,
so reading a model does not leave it in memory.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from shadowc.checkpoint.opt import EMBEDDING, HEAD, OptFacts, parameter_shapes
from shadowc.checkpoint.stored import Stored, read_header
from shadowc.spec.errors import InputError, ShadowcError, UnsupportedError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
OTHER_FORMATS = ("*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.gguf", "*.onnx")

_NUMPY = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_BITS = {"F32": ("<u4", 0x7FFFFFFF, 0x7F800000), "F16": ("<u2", 0x7FFF, 0x7C00), "BF16": ("<u2", 0x7FFF, 0x7F80)}
_BLOCK = 1 << 20
_NAMED = 5
_ALL = frozenset({"*"})

T = TypeVar("T")


class SafetensorsWeights:
    """A TensorSource over safetensors files."""

    def __init__(self, stored: Mapping[str, Stored]) -> None:
        self._stored = dict(stored)
        self._stored[HEAD] = self._stored[EMBEDDING]

    def names(self) -> tuple[str, ...]:
        """All tensor names, sorted, with the tied head."""
        return tuple(sorted(self._stored))

    def tensor(self, name: str) -> npt.NDArray[np.float32]:
        """One tensor as a float32 array of its own; raises KeyError for a name that the model does not have."""
        return read_tensor(self._stored[name])

    def count_nonfinite(self, name: str) -> int:
        """How many NaN and infinities one tensor holds, without converting it."""
        stored = self._stored[name]
        kind, magnitude, infinity = _BITS[stored.dtype]
        flat = np.memmap(stored.path, kind, "r", stored.offset, (stored.length // np.dtype(kind).itemsize,))
        blocks = ((flat[at : at + _BLOCK] & magnitude) >= infinity for at in range(0, flat.size, _BLOCK))
        return sum(int(np.count_nonzero(block)) for block in blocks)


def read_tensor(stored: Stored) -> npt.NDArray[np.float32]:
    """Copy one stored tensor into memory as float32."""
    out = np.empty(stored.shape, np.float32)
    if not out.size:
        return out
    raw = np.memmap(stored.path, _NUMPY[stored.dtype], "r", stored.offset, stored.shape)
    if stored.dtype == "BF16":
        bits = out.view(np.uint32)
        bits[...] = raw
        bits <<= 16
    else:
        out[...] = raw
    return out


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """The weight files of a folder, opened as far as their headers."""

    files: tuple[Path, ...]
    stored: Mapping[str, Stored]
    """By canonical name."""
    damaged: tuple[str, ...]
    """What is wrong with the files themselves."""
    excused: frozenset[str]
    """Names whose shard could not be read: not reported again as missing."""


def find_weight_files(folder: Path) -> WeightFiles:
    """Read the headers of all weight files of a folder.

    Raises:
        UnsupportedError: the folder holds weights in another format only.
        InputError: it holds none at all, or an index that cannot be read.
    """
    if (folder / SINGLE_FILE).exists():
        entries, problems = read_header(folder / SINGLE_FILE)
        excused = _ALL if problems and not entries else frozenset()
        return WeightFiles((folder / SINGLE_FILE,), canonical(entries), tuple(problems), excused)
    if (folder / INDEX_FILE).exists():
        return _read_shards(folder)
    raise no_safetensors(str(folder), sorted(path.name for path in folder.iterdir()), str(folder))


def no_safetensors(where: str, names: Sequence[str], model: str) -> ShadowcError:
    """The error for a folder or repository without safetensors, given the names of its files."""
    others = [name for name in names if any(Path(name).match(pattern) for pattern in OTHER_FORMATS)]
    if others:
        target = f"{Path(model).name}-safetensors"
        save = f"M.from_pretrained('{model}').save_pretrained('{target}')"
        tokens = f"T.from_pretrained('{model}').save_pretrained('{target}')"
        return UnsupportedError(
            f"{where}: holds weights as {others[0]}, expected {SINGLE_FILE} or {INDEX_FILE} with its shards",
            hint=(
                'convert it: python -c "from transformers import AutoTokenizer as T, OPTForCausalLM as M; '
                f'{save}; {tokens}" and give --model ./{target}'
            ),
        )
    return InputError(
        f"{where}: holds no weights, expected {SINGLE_FILE} or {INDEX_FILE} with its shards",
        hint="copy the weights there, or add --load-format dummy for random ones",
    )


def _read_shards(folder: Path) -> WeightFiles:
    index = folder / INDEX_FILE
    try:
        placed = json.loads(index.read_bytes())["weight_map"]
    except (ValueError, KeyError, TypeError):
        placed = None
    if not isinstance(placed, dict) or not placed or not all(isinstance(shard, str) for shard in placed.values()):
        raise InputError(f"{index}: is not a safetensors index with a weight_map", hint="download the checkpoint again")
    entries: dict[str, Stored] = {}
    damaged: list[str] = []
    excused: set[str] = set()
    files: list[Path] = []
    for shard in sorted(set(placed.values())):
        wanted = sorted(name for name, where in placed.items() if where == shard)
        path = folder / shard
        if Path(shard).name != shard:
            damaged.append(f"{INDEX_FILE}: names {shard!r}, expected a file beside it")
            excused.update(wanted)
            continue
        if not path.exists():
            damaged.append(f"{shard}: is missing ({len(wanted)} tensors lie in it)")
            excused.update(wanted)
            continue
        found, problems = read_header(path)
        files.append(path)
        damaged += problems
        if problems and not found:
            excused.update(wanted)
            continue
        damaged += [f"{shard}: lacks {name}, which {INDEX_FILE} places there" for name in wanted if name not in found]
        excused.update(name for name in wanted if name not in found)
        entries |= {name: found[name] for name in wanted if name in found}
    return WeightFiles(tuple(files), canonical(entries), tuple(damaged), frozenset(canonical(dict.fromkeys(excused))))


def canonical(entries: Mapping[str, T]) -> dict[str, T]:
    """Rename the tensors of a bare OPTModel (`decoder.`) as OPTForCausalLM names them (`model.decoder.`)."""
    return {f"model.{name}" if name.startswith("decoder.") else name: value for name, value in entries.items()}


def open_weights(folder: Path, facts: OptFacts, *, tied: bool = True) -> tuple[SafetensorsWeights, tuple[Path, ...]]:
    """Open the weights of a checkpoint folder and check names, types and shapes of all tensors.

    Args:
        folder: holds model.safetensors, or the index and its shards.
        facts: decide which tensors are expected, and their shapes.
        tied: False: config.json says that the head has weights of its own, which must then equal the embedding.

    Returns:
        The weights, and the files they lie in.

    Raises:
        InputError: files or tensors are missing, truncated or of wrong shape; all findings at once.
        UnsupportedError: another file format, quantised tensors, or an untied head.
    """
    found = find_weight_files(folder)
    stored = dict(found.stored)
    if EMBEDDING not in stored and EMBEDDING not in found.excused and HEAD in stored:
        stored[EMBEDDING] = stored[HEAD]
    damaged = [*found.damaged, *_tensor_problems(stored, facts, found.excused)]
    if damaged:
        raise InputError(
            f"{folder}: the checkpoint is damaged or incomplete: {join(damaged)}",
            hint="download the checkpoint again, or correct its config.json if the sizes there are wrong",
            problems=damaged,
        )
    shapes = parameter_shapes(facts)
    foreign = [
        f"{entry.path.name}: {name} has type {entry.dtype}, expected F32, F16 or BF16"
        for name, entry in sorted(stored.items())
        if name in shapes and entry.dtype not in _NUMPY
    ]
    if foreign:
        raise UnsupportedError(
            f"{folder}: weights of this type are not handled: {join(foreign)}",
            hint="give the original checkpoint; shadowc quantises by itself with --weights int8",
            problems=foreign,
        )
    if not tied and HEAD in stored and not _equal(stored[HEAD], stored[EMBEDDING]):
        raise UnsupportedError(
            f"{folder}: {HEAD} differs from {EMBEDDING}; expected the tied head that all published OPT models have",
            hint="set tie_word_embeddings to true in config.json if the head is to be ignored",
        )
    return SafetensorsWeights({name: stored[name] for name in shapes}), found.files


def join(problems: Sequence[str]) -> str:
    """The first few findings in one line, and how many more there are."""
    more = f"; and {len(problems) - _NAMED} more" if len(problems) > _NAMED else ""
    return "; ".join(problems[:_NAMED]) + more


def _tensor_problems(stored: Mapping[str, Stored], facts: OptFacts, excused: frozenset[str]) -> list[str]:
    problems = []
    for name, shape in parameter_shapes(facts).items():
        if name not in stored:
            if excused is not _ALL and name not in excused:
                problems.append(f"{name} is missing")
        elif stored[name].shape != shape:
            problems.append(
                f"{stored[name].path.name}: {name} has shape {list(stored[name].shape)}, expected {list(shape)}"
            )
    return problems


def _equal(a: Stored, b: Stored) -> bool:
    if a.dtype not in _NUMPY or a.shape != b.shape:
        return False
    return bool(np.array_equal(read_tensor(a), read_tensor(b)))
