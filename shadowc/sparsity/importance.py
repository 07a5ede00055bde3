# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: N815 - fields carry their shape letters
"""The importance trace on disk: what `collect` writes and `train` reads.

A folder with trace.safetensors and trace.json. It is written row by row into a hidden sibling `.NAME.partial`, which
gets its name when it is complete and is continued when a run was interrupted.

Letters: M recorded positions, N sequences, T tokens, L model layers (all of them), E hidden, H heads, F neurons.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shadowc.spec.errors import InputError

if TYPE_CHECKING:
    import numpy.typing as npt

    from shadowc.checkpoint.opt import OptFacts

SCHEMA = 1
TENSORS_FILE = "trace.safetensors"
META_FILE = "trace.json"
STATE_FILE = "state.json"
_TYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "I32": np.dtype("<i4")}
Layout = Mapping[str, tuple[str, tuple[int, ...]]]


@dataclass(frozen=True, slots=True)
class ImportanceTrace:
    """Importance of every head and neuron of every model layer at the recorded positions."""

    folder: Path
    meta: dict[str, Any]
    """criterion, model, text (fingerprint), source, seed, counts, and the dense model's mean token loss."""
    tokens_NT: npt.NDArray[np.int32]
    sequence_M: npt.NDArray[np.int32]
    position_M: npt.NDArray[np.int32]
    context_ME: npt.NDArray[np.float32]
    """Layer 0's attention context before out_proj, of the position itself."""
    heads_MLH: npt.NDArray[np.float32]

    @property
    def layers(self) -> int:
        """Model layers, the first one included."""
        return int(self.heads_MLH.shape[1])

    @property
    def neurons(self) -> int:
        """Neurons per layer."""
        return int(self.meta["shape"]["ffn"])

    def neurons_MF(self, layer: int) -> npt.NDArray[np.float32]:  # noqa: N802 - the name carries its shape
        """Return the neuron importance of one model layer; read from disk at each call."""
        with _opened(self.folder) as stored:
            relative_MF = stored.get_tensor(f"neurons.{layer}")
            scale_M = stored.get_tensor("neurons.scale")[:, layer]
        scaled: npt.NDArray[np.float32] = relative_MF.astype(np.float32) * scale_M[:, None]
        return scaled

    @property
    def neurons_MLF(self) -> npt.NDArray[np.float32]:  # noqa: N802
        """The neuron importance of all layers at once; gigabytes for a large model."""
        return np.stack([self.neurons_MF(layer) for layer in range(self.layers)], axis=1)

    @staticmethod
    def load(folder: Path) -> ImportanceTrace:
        """Read a trace (its neuron scores only when they are asked for).

        Raises:
            InputError: it is missing, damaged or of another schema.
        """
        meta_path = folder / META_FILE
        if not meta_path.is_file():
            raise InputError(f"{folder} is not an importance trace: it has no {META_FILE}", hint="shadowc collect")
        try:
            meta = json.loads(meta_path.read_text("utf-8"))
        except ValueError as error:
            raise InputError(f"{meta_path} is damaged: {error}", hint="collect it again: shadowc collect") from error
        if not isinstance(meta, dict) or meta.get("schema") != SCHEMA:
            raise InputError(f"{meta_path} does not have schema {SCHEMA}", hint="collect it again: shadowc collect")
        with _opened(folder) as stored:
            part = {name: stored.get_tensor(name) for name in ("tokens", "sequence", "position", "context", "heads")}
        return ImportanceTrace(
            folder, meta, part["tokens"], part["sequence"], part["position"], part["context"], part["heads"]
        )


def _opened(folder: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(folder / TENSORS_FILE, framework="np")
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{folder / TENSORS_FILE} is missing or damaged: {error}", hint="collect it again: shadowc collect"
        ) from error


def trace_layout(facts: OptFacts, positions: int, sequences: int, length: int) -> Layout:
    """Return name -> (type, shape) of all tensors of a trace.

    Neuron scores are stored relative to the largest of their position and layer, in float16: 11 bits of each value
    and, below 6e-5 of the largest, steps of 6e-8 of it. That halves the file, and no ranking that matters sees it.
    """
    rows = positions
    fixed: dict[str, tuple[str, tuple[int, ...]]] = {
        "tokens": ("I32", (sequences, length)),
        "sequence": ("I32", (rows,)),
        "position": ("I32", (rows,)),
        "context": ("F32", (rows, facts.hidden)),
        "heads": ("F32", (rows, facts.layers, facts.heads)),
        "neurons.scale": ("F32", (rows, facts.layers)),
    }
    return fixed | {f"neurons.{layer}": ("F16", (rows, facts.ffn)) for layer in range(facts.layers)}


def relative(neurons_MF: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.float16], npt.NDArray[np.float32]]:
    """Return scores relative to their row's largest in float16, and the largest (1 for a row of zeros)."""
    largest_M = neurons_MF.max(axis=1)
    scale_M = np.where(largest_M > 0, largest_M, np.float32(1)).astype(np.float32)
    return (neurons_MF / scale_M[:, None]).astype(np.float16), scale_M


class TraceWriter:
    """Fills a trace row by row, directly in its file; the memory used does not grow with the trace.

    Args:
        out: where the finished trace will lie; an older trace there is replaced at the end, nothing else is.
        key: what decides the content; an unfinished trace with the same key is continued.
    """

    def __init__(self, out: Path, key: str) -> None:
        if out.exists() and not (out / META_FILE).is_file() and (not out.is_dir() or any(out.iterdir())):
            raise InputError(f"{out} exists and is not an importance trace", hint="give another --out folder")
        self._out = out
        self._key = key
        self._partial = out.parent / f".{out.name}.partial"
        self._maps: dict[str, npt.NDArray[Any]] = {}
        self.rows = 0
        self.meta: dict[str, Any] = {}
        self._resume()

    @property
    def started(self) -> bool:
        """True: the tensors exist already (`begin` was called, now or in an interrupted run)."""
        return bool(self._maps)

    def begin(self, layout: Layout, meta: dict[str, Any]) -> None:
        """Lay the file out at its full size, with zeros, and remember `meta`."""
        shutil.rmtree(self._partial, ignore_errors=True)
        self._partial.mkdir(parents=True)
        header = _header(layout)
        with (self._partial / TENSORS_FILE).open("wb") as stream:
            stream.write(len(header).to_bytes(8, "little") + header)
            stream.truncate(8 + len(header) + sum(_size(*entry) for entry in layout.values()))
        self._map(layout)
        self.meta = meta
        self._layout = layout
        self._save_state()

    def put(self, name: str, values: npt.NDArray[Any], row: int = 0) -> None:
        """Write rows of one tensor, beginning at `row`."""
        self._maps[name][row : row + len(values)] = values

    def commit(self, rows: int, meta: dict[str, Any]) -> None:
        """Make everything written so far durable: `rows` positions are complete."""
        for values in self._maps.values():
            if isinstance(values, np.memmap):
                values.flush()
        self.rows, self.meta = rows, meta
        self._save_state()

    def read(self, name: str) -> npt.NDArray[Any]:
        """Return a copy of one tensor as it is now."""
        return np.array(self._maps[name])

    def finish(self) -> ImportanceTrace:
        """Give the trace its name and return it."""
        self._maps.clear()
        (self._partial / STATE_FILE).unlink()
        text = json.dumps({"schema": SCHEMA, **self.meta}, indent=1, sort_keys=True)
        (self._partial / META_FILE).write_text(text + "\n", "utf-8")
        if self._out.exists():
            shutil.rmtree(self._out)
        self._partial.rename(self._out)
        return ImportanceTrace.load(self._out)

    def _resume(self) -> None:
        path = self._partial / STATE_FILE
        if not path.is_file():
            return
        try:
            state = json.loads(path.read_text("utf-8"))
            if state["key"] != self._key:
                return
            self._layout = {name: (kind, tuple(shape)) for name, (kind, shape) in state["layout"].items()}
            self._map(self._layout)
            self.rows, self.meta = state["rows"], state["meta"]
        except (ValueError, KeyError, OSError):  # a torn state means a new start, nothing worse
            self._maps.clear()

    def _map(self, layout: Layout) -> None:
        offset = 8 + len(_header(layout))
        for name, (kind, shape) in layout.items():
            self._maps[name] = np.memmap(self._partial / TENSORS_FILE, _TYPES[kind], "r+", offset, shape)
            offset += _size(kind, shape)

    def _save_state(self) -> None:
        state = {"key": self._key, "rows": self.rows, "meta": self.meta, "layout": dict(self._layout)}
        new = self._partial / f"{STATE_FILE}.new"
        new.write_text(json.dumps(state), "utf-8")
        new.replace(self._partial / STATE_FILE)


def _size(kind: str, shape: tuple[int, ...]) -> int:
    return _TYPES[kind].itemsize * prod(shape)


def _header(layout: Layout) -> bytes:
    """Return the safetensors header; the tensors lie behind it without gaps, in the order of the layout."""
    entries, offset = {}, 0
    for name, (kind, shape) in layout.items():
        end = offset + _size(kind, shape)
        entries[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries).encode()
    return text + b" " * (-len(text) % 8)
