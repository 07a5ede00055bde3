# SPDX-License-Identifier: Apache-2.0
"""Weights of a checkpoint folder, read lazily and one tensor at a time.

In: a folder and the facts from its config.json. Out: a TensorSource with canonical names and float32 values,
or one error that lists everything that is wrong with the files. Each tensor has its own short-lived mapping,
so reading a model does not leave it in memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from shadowc.checkpoint.facts import ModelFacts, WeightLayout, layout_of
from shadowc.checkpoint.files import Advance, WeightFiles, find_weight_files
from shadowc.checkpoint.opt import EMBEDDING, HEAD, MODEL_SCOPES
from shadowc.checkpoint.stored import Stored
from shadowc.spec.errors import InputError, UnsupportedError

_NUMPY = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_BITS = {"F32": ("<u4", 0x7FFFFFFF, 0x7F800000), "F16": ("<u2", 0x7FFF, 0x7C00), "BF16": ("<u2", 0x7FFF, 0x7F80)}
_BLOCK = 1 << 20
_NAMED = 5


class SafetensorsWeights:
    """A TensorSource over safetensors files.

    Args:
        stored: where each parameter lies.
        tied: a name for a tensor that has one already: (the other name, its own). None: it has no such tensor.
    """

    def __init__(self, stored: Mapping[str, Stored], tied: tuple[str, str] | None = (HEAD, EMBEDDING)) -> None:
        self._stored = dict(stored)
        self.parameters = tuple(sorted(stored))
        """Names of the tensors, each once."""
        if tied is not None:
            self._stored[tied[0]] = self._stored[tied[1]]

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
    return _values(stored, 0, math.prod(stored.shape)).reshape(stored.shape)


def _values(stored: Stored, start: int, stop: int) -> npt.NDArray[np.float32]:
    """The numbers from `start` to `stop` in the order of the file, as float32 in memory of their own."""
    out = np.empty(stop - start, np.float32)
    if not out.size:
        return out
    kind = np.dtype(_NUMPY[stored.dtype])
    raw = np.memmap(stored.path, kind, "r", stored.offset + start * kind.itemsize, out.shape)
    if stored.dtype == "BF16":
        bits = out.view(np.uint32)
        bits[...] = raw
        bits <<= 16
    else:
        out[...] = raw
    return out


@dataclass(frozen=True, slots=True)
class OpenedWeights:
    """The checked weights of a checkpoint folder."""

    source: SafetensorsWeights
    files: tuple[Path, ...]
    """The user's files that they come from."""
    unused: tuple[str, ...]
    """Tensors beside the language model (another head, say) that are not part of what is compiled."""


def open_weights(folder: Path, facts: ModelFacts, advance: Advance | None = None) -> OpenedWeights:
    """Open the weights of a checkpoint folder and check names, types and shapes of all tensors.

    Args:
        folder: holds safetensors or what torch.save writes, in one file or in shards with an index.
        facts: decide which tensors are expected, and their shapes.
        advance: called with bytes done and their total while pickled files are converted.

    Raises:
        InputError: files or tensors are missing, truncated or of wrong shape; all findings at once.
        UnsupportedError: another file format, a pickle that needs code, quantised tensors, or an untied head.
        SetupError: pickled files cannot be converted on this machine.
    """
    found = find_weight_files(folder, advance=advance)
    layout = layout_of(facts)
    stored = dict(found.stored)
    head, embedding = layout.head, layout.embedding
    if layout.tied and embedding not in stored and not found.excuses(embedding) and head in stored:
        stored[embedding] = stored[head]
    damaged = [*found.damaged, *_tensor_problems(stored, facts, layout, found)]
    if damaged:
        raise InputError(
            f"{folder}: the checkpoint is damaged or incomplete: {join(damaged)}",
            hint="download the checkpoint again, or correct its config.json if the sizes there are wrong",
            problems=damaged,
        )
    unused = _check_others(folder, stored, layout)
    shapes = layout.shapes
    foreign = [
        f"{entry.file}: {name} has type {entry.dtype}, expected F32, F16 or BF16"
        for name, entry in sorted(stored.items())
        if name in shapes and entry.dtype not in _NUMPY
    ]
    if foreign:
        raise UnsupportedError(
            f"{folder}: weights of this type are not handled: {join(foreign)}",
            hint="give the original checkpoint; shadowc quantises by itself with --weights int8",
            problems=foreign,
        )
    if layout.tied and head in stored and not _is_equal(stored[head], stored[embedding]):
        raise UnsupportedError(
            f"{folder}: {head} in {stored[head].file} differs from {embedding}; {_expected_tie(facts)}",
            hint=f"if the head is a leftover, remove {head} from {stored[head].file}; if it was trained, train it tied",
        )
    tied = (head, embedding) if layout.tied else None
    return OpenedWeights(SafetensorsWeights({name: stored[name] for name in shapes}, tied), found.files, unused)


def _expected_tie(facts: ModelFacts) -> str:
    if facts.family == "OPT":
        return "expected the tied head that all published OPT models have"
    return "config.json says that they are tied"


def join(problems: Sequence[str]) -> str:
    """The first few findings in one line, and how many more there are."""
    more = f"; and {len(problems) - _NAMED} more" if len(problems) > _NAMED else ""
    return "; ".join(problems[:_NAMED]) + more


def _tensor_problems(
    stored: Mapping[str, Stored], facts: ModelFacts, layout: WeightLayout, found: WeightFiles
) -> list[str]:
    problems = []
    for name, shape in layout.shapes.items():
        if name not in stored:
            if not found.excuses(name):
                problems.append(f"{name} is missing")
        elif stored[name].shape != shape:
            reason = f" (vocab_size is {facts.vocab})" if name == layout.embedding else ""
            problems.append(
                f"{stored[name].file}: {name} has shape {list(stored[name].shape)}, expected {list(shape)}{reason}"
            )
    others = _others(stored, layout)
    if others and any(problem.endswith(" is missing") for problem in problems):
        known = "OPT" if facts.family == "OPT" else "the family"
        problems.append(f"{len(others)} tensors have names that {known} does not know, such as {others[0]}")
    return problems


def _check_others(folder: Path, stored: Mapping[str, Stored], layout: WeightLayout) -> tuple[str, ...]:
    """Refuse tensors that are part of the model but not of what config.json describes; return those beside it."""
    others = _others(stored, layout)
    inside = [name for name in others if name.startswith(MODEL_SCOPES)]
    if inside:
        raise InputError(
            f"{folder}: its config.json does not account for {len(inside)} tensors of the model: "
            f"{join([f'{stored[name].file}: {name}' for name in inside])}",
            hint="correct config.json; compiled without them, the model would be another one",
            problems=inside,
        )
    return tuple(others)


def _others(stored: Mapping[str, Stored], layout: WeightLayout) -> list[str]:
    known = {*layout.shapes, layout.head}
    return [name for name in sorted(stored) if name not in known and not layout.is_buffer(name)]


def _is_equal(a: Stored, b: Stored) -> bool:
    """Whether two tensors hold the same numbers, compared block by block."""
    if a.shape != b.shape or not {a.dtype, b.dtype} <= _NUMPY.keys():
        return False
    size = math.prod(a.shape)
    return (a.path, a.offset) == (b.path, b.offset) or all(
        np.array_equal(_values(a, at, min(at + _BLOCK, size)), _values(b, at, min(at + _BLOCK, size)), equal_nan=True)
        for at in range(0, size, _BLOCK)
    )
