# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: N815 - fields carry their shape letters
"""The importance trace on disk: what `collect` writes and `train` reads.

A folder with trace.safetensors and trace.json, whose bytes follow from the checkpoint's content and the options, and,
when a command made it, origin.json with the model as the user typed it. It is written row by row into a hidden sibling
`.NAME.partial`, which gets its name when it is complete and is continued when a run was interrupted.

Letters: M recorded positions, N sequences, T tokens, L model layers (all of them), E hidden, H heads, F neurons.
"""

from __future__ import annotations

import errno
import json
import os
import shlex
import shutil
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

import numpy as np

from shadowc.checkpoint.facts import ModelFacts, facts_of
from shadowc.output import check_output, label, replace_folder, writing
from shadowc.sparsity import means
from shadowc.spec.errors import InputError

if TYPE_CHECKING:
    import numpy.typing as npt

SCHEMA = 4
TENSORS_FILE = "trace.safetensors"
META_FILE = "trace.json"
ORIGIN_FILE = "origin.json"
STATE_FILE = "state.json"
_TYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "I32": np.dtype("<i4")}
Layout = Mapping[str, tuple[str, tuple[int, ...]]]
_TOLD = {"criterion": str, "model": dict, "text": dict, "source": str, "seed": int, "positions": int}
"""What every reader of a trace relies on."""
_NO_RESERVATION = frozenset({errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP})
_AGAIN = "collect it again: shadowc collect"
_BLANK = bytes(1 << 20)


@dataclass(frozen=True, slots=True)
class Origin:
    """The model as the user typed it: for the next command to type, not part of what a trace is."""

    model: str
    load_format: Literal["auto", "dummy"] = "auto"
    seed: int = 0
    """Of dummy weights."""

    @property
    def flags(self) -> str:
        """The flags that name this model to any command."""
        dummy = ["--load-format", "dummy", "--seed", str(self.seed)] if self.load_format == "dummy" else []
        return shlex.join(["--model", self.model, *dummy])


def check_out(out: Path) -> None:
    """Refuse an output folder that holds anything but an importance trace; nothing is touched.

    Raises:
        InputError: it does, or nothing can be written there.
    """
    check_output(out, "an importance trace", META_FILE, _listed)


def _listed(meta: Mapping[str, object]) -> Collection[str] | None:
    return (TENSORS_FILE, ORIGIN_FILE) if isinstance(meta.get("schema"), int) else None


@dataclass(frozen=True, slots=True)
class ImportanceTrace:
    """Importance of every head and neuron of every model layer at the recorded positions."""

    folder: Path
    meta: dict[str, Any]
    """key (of what decides all of it), criterion and what one of its scores is of (per), model, facts, text
    (fingerprint), source, seed, counts, the share of scores that are exactly zero, dropped sequences, and the dense
    model's mean token loss (None where no text was run)."""
    facts: ModelFacts
    """Of the model that was recorded."""
    tokens_NT: npt.NDArray[np.int32]
    sequence_M: npt.NDArray[np.int32]
    position_M: npt.NDArray[np.int32]
    context_ME: npt.NDArray[np.float32]
    """Layer 0's attention context before out_proj, of the position itself."""
    heads_MLH: npt.NDArray[np.float32]
    kept_M: npt.NDArray[np.bool_]
    """Of the positions in the file, those whose sequence was not dropped; the other fields hold these alone."""

    @property
    def layers(self) -> int:
        """Model layers, the first one included."""
        return int(self.heads_MLH.shape[1])

    @property
    def neurons(self) -> int:
        """Neurons per layer."""
        return self.facts.ffn

    @property
    def origin(self) -> Origin:
        """The model as it was typed, or its own name if no command made this trace."""
        try:
            return Origin(**json.loads((self.folder / ORIGIN_FILE).read_bytes()))
        except (OSError, ValueError, TypeError, RecursionError):
            return Origin(self.facts.name)

    def neurons_MF(self, layer: int) -> npt.NDArray[np.float32]:  # noqa: N802 - the name carries its shape
        """Return the neuron importance of one model layer; read from disk at each call."""
        with _opened(self.folder) as stored:
            relative_MF = stored.get_tensor(f"neurons.{layer}")
            scale_M = stored.get_tensor("neurons.scale")[:, layer]
        scaled: npt.NDArray[np.float32] = relative_MF.astype(np.float32) * scale_M[:, None]
        return scaled[self.kept_M]

    def means(self) -> dict[int, npt.NDArray[np.float32]]:
        """Return model layer -> mean contexts of its heads [H,D], where scores are measured from; empty: from zero."""
        with _opened(self.folder) as stored:
            names = [name for name in stored.keys() if name.startswith(means.PREFIX)]  # noqa: SIM118 - no mapping
            return {int(name.removeprefix(means.PREFIX)): stored.get_tensor(name) for name in names}

    def input_ME(self, layer: int) -> npt.NDArray[np.float32]:  # noqa: N802 - the name carries its shape
        """Return what the attention of a model layer from 1 on reads (its norm's output); read from disk each time."""
        with _opened(self.folder) as stored:
            input_ME: npt.NDArray[np.float32] = stored.get_tensor(f"input.{layer}").astype(np.float32)
        return input_ME[self.kept_M]

    def ffn_input_ME(self, layer: int) -> npt.NDArray[np.float32]:  # noqa: N802 - the name carries its shape
        """Return what the FFN of a model layer from 1 on reads; read from disk each time."""
        with _opened(self.folder) as stored:
            input_ME: npt.NDArray[np.float32] = stored.get_tensor(f"ffn_input.{layer}").astype(np.float32)
        return input_ME[self.kept_M]

    @staticmethod
    def load(folder: Path) -> ImportanceTrace:
        """Read a trace (its neuron scores only when they are asked for).

        Raises:
            InputError: it is missing, damaged or of another schema.
        """
        meta, facts = _described(folder)
        with _opened(folder) as stored:
            part = {name: stored.get_tensor(name) for name in ("tokens", "sequence", "position", "context", "heads")}
        sizes = (*part["heads"].shape[1:], *part["context"].shape[1:])
        if sizes != (facts.layers, facts.heads, facts.hidden):
            raise InputError(f"{folder}: {META_FILE} and {TENSORS_FILE} are of two models", hint=_AGAIN)
        kept_M = part["sequence"] >= 0
        tokens_NT = part.pop("tokens")
        sequence_M, position_M, context_ME, heads_MLH = (values[kept_M] for values in part.values())
        return ImportanceTrace(folder, meta, facts, tokens_NT, sequence_M, position_M, context_ME, heads_MLH, kept_M)

    @staticmethod
    def finished(folder: Path, key: str) -> ImportanceTrace | None:
        """Read a trace if it is whole and was recorded under this key, see `TraceWriter`; None otherwise."""
        try:
            trace = ImportanceTrace.load(folder)
        except InputError:
            return None
        return trace if trace.meta.get("key") == key else None


def _described(folder: Path) -> tuple[dict[str, Any], ModelFacts]:
    """Return the content of trace.json, and the facts in it."""
    path = folder / META_FILE
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(
            f"{folder} is not an importance trace: it has no {META_FILE}", hint="shadowc collect"
        ) from None
    except (OSError, ValueError) as error:
        raise InputError(f"{folder} cannot be read: {error}", hint="give the folder of a trace") from error
    try:
        meta = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged: {error}", hint=_AGAIN) from error
    if not isinstance(meta, dict) or meta.get("schema") != SCHEMA:
        raise InputError(f"{path} does not have schema {SCHEMA}", hint=_AGAIN)
    lacking = [name for name, kind in _TOLD.items() if not isinstance(meta.get(name), kind)]
    if lacking:
        raise InputError(f"{path} is damaged: it does not tell {', '.join(lacking)}", hint=_AGAIN)
    try:
        return meta, facts_of(meta["facts"])
    except (KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged: it lacks facts of the model", hint=_AGAIN) from error


def _opened(folder: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(folder / TENSORS_FILE, framework="np")
    except (OSError, SafetensorError) as error:
        raise InputError(f"{folder / TENSORS_FILE} is missing or damaged: {error}", hint=_AGAIN) from error


def trace_layout(
    facts: ModelFacts, positions: int, sequences: int, length: int, *, exact: bool = False, filled: bool = False
) -> Layout:
    """Return name -> (type, shape) of all tensors of a trace.

    Neuron scores are stored relative to the largest of their position and layer, in float16: 11 bits of each value
    and, below 6e-5 of the largest, steps of 6e-8 of it. That halves the file, and no ranking that matters sees it.
    Inputs of layers are outputs of a norm, of moderate size: float16 as they are. With `exact` neuron scores are
    float32: the single row of a ranking of a whole text, in which units may differ little. With `filled` there are
    means of heads.
    """
    stored = "F32" if exact else "F16"
    rows = positions
    fixed: dict[str, tuple[str, tuple[int, ...]]] = {
        "tokens": ("I32", (sequences, length)),
        "sequence": ("I32", (rows,)),
        "position": ("I32", (rows,)),
        "context": ("F32", (rows, facts.hidden)),
        "heads": ("F32", (rows, facts.layers, facts.heads)),
        "neurons.scale": ("F32", (rows, facts.layers)),
    }
    inputs = [f"{what}.{layer}" for what in ("input", "ffn_input") for layer in range(1, facts.layers)]
    if filled:
        size = facts.heads, facts.head_size
        fixed |= {f"{means.PREFIX}{layer}": ("F32", size) for layer in range(1, facts.layers)}
    neurons = {f"neurons.{layer}": (stored, (rows, facts.ffn)) for layer in range(facts.layers)}
    return fixed | neurons | dict.fromkeys(inputs, ("F16", (rows, facts.hidden)))


def relative(neurons_MF: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.float16], npt.NDArray[np.float32]]:
    """Return scores relative to their row's largest size in float16, and that size (1 for a row of zeros)."""
    largest_M = np.abs(neurons_MF).max(axis=1)
    scale_M = np.where(largest_M > 0, largest_M, np.float32(1)).astype(np.float32)
    return (neurons_MF / scale_M[:, None]).astype(np.float16), scale_M


class TraceWriter:
    """Fills a trace row by row, directly in its file; the memory used does not grow with the trace.

    Args:
        out: where the finished trace will lie; an older trace there is replaced at the end, nothing else is.
        key: what decides the content; an unfinished trace with the same key is continued.
    """

    def __init__(self, out: Path, key: str) -> None:
        check_out(out)
        self._out = out
        self._key = key
        self._place = out.resolve()
        self._partial = self._place.parent / f".{label(self._place)}.partial"
        self._maps: dict[str, npt.NDArray[Any]] = {}
        self.rows = 0
        self.meta: dict[str, Any] = {}
        self._resume()

    @property
    def started(self) -> bool:
        """True: the tensors exist already (`begin` was called, or `commit` in an interrupted run)."""
        return bool(self._maps)

    def begin(self, layout: Layout, meta: dict[str, Any]) -> None:
        """Lay the file out at its full size, with zeros, and remember `meta`.

        An interrupted run goes on behind the last `commit`; without one it begins anew.

        Raises:
            SetupError: the disk has no room for the whole trace.
            InputError: the place cannot be written to.
        """
        self.discard()
        header = _header(layout)
        size = 8 + len(header) + sum(_size(*entry) for entry in layout.values())
        try:
            with writing(self._place.parent, size):
                self._partial.mkdir(parents=True)
                with (self._partial / TENSORS_FILE).open("wb") as stream:
                    stream.write(len(header).to_bytes(8, "little") + header)
                    _reserve(stream, size)
                self._map(layout)
                self.meta = meta
                self._layout = layout
        except BaseException:
            self.discard()
            raise

    def discard(self) -> None:
        """Remove the unfinished trace: the next run begins anew."""
        self._maps.clear()
        shutil.rmtree(self._partial, ignore_errors=True)

    def put(self, name: str, values: npt.NDArray[Any], row: int = 0) -> None:
        """Write rows of one tensor, beginning at `row`."""
        self._maps[name][row : row + len(values)] = values

    def commit(self, rows: int, meta: dict[str, Any]) -> None:
        """Make everything written so far durable: `rows` positions are complete."""
        with writing(self._place.parent):
            for values in self._maps.values():
                if isinstance(values, np.memmap):
                    values.flush()
            self.rows, self.meta = rows, meta
            self._save_state()

    def read(self, name: str) -> npt.NDArray[Any]:
        """Return a copy of one tensor as it is now."""
        return np.array(self._maps[name])

    def means(self) -> dict[int, npt.NDArray[np.float32]]:
        """Return model layer -> mean contexts of its heads [H,D]; empty where the layout has none."""
        names = [name for name in self._maps if name.startswith(means.PREFIX)]
        return {int(name.removeprefix(means.PREFIX)): self.read(name) for name in names}

    def finish(self, origin: Origin | None = None) -> ImportanceTrace:
        """Give the trace its name and return it."""
        self._maps.clear()
        with writing(self._place.parent):
            (self._partial / STATE_FILE).unlink()
            _write_json(self._partial / META_FILE, {"schema": SCHEMA, "key": self._key, **self.meta})
            if origin is not None:
                _write_json(self._partial / ORIGIN_FILE, asdict(origin))
            replace_folder(self._partial, self._place, check_out)
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


def _reserve(stream: BinaryIO, size: int) -> None:
    """Give a file its full size on the disk itself.

    Into a hole, the mapping could not write once the disk is full, and the system would end the process (SIGBUS).
    """
    stream.flush()
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(stream.fileno(), 0, size)
        except OSError as error:
            if error.errno not in _NO_RESERVATION:
                raise
        else:
            return
    for start in range(stream.tell(), size, len(_BLANK)):
        stream.write(_BLANK[: size - start])


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", "utf-8")


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
