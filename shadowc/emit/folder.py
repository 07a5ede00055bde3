# SPDX-License-Identifier: Apache-2.0
"""The engine folder: written beside its place, renamed when complete, described by engine.json."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from shadowc import output
from shadowc.emit.genai import genai_config
from shadowc.output import check_output
from shadowc.spec.manifest import MANIFEST_FILE, EngineManifest, FileEntry, ModelPart

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from shadowc.checkpoint.opt import OptFacts

GENAI_FILE = "genai_config.json"
CONTROLS_FILE = "controls.safetensors"
"""Static rankings of heads and neurons, for the controls of `shadowc eval`."""
ORDERS_FILE = "orders.safetensors"
"""Which neuron of the checkpoint became which record, for `shadowc verify --against`."""
MEANS_FILE = "means.safetensors"
"""What skipped heads leave, which biases hold: for `shadowc verify --against` and `bisect`."""


def check_replaceable(out: Path) -> None:
    """Refuse an output path that holds anything else than an engine; nothing is touched.

    Raises:
        InputError: it is a file, a folder that is no engine, or an engine with files of somebody else in it.
    """
    check_output(out, "an engine folder", MANIFEST_FILE, _listed)


def staged(out: Path, needed: int = 0) -> AbstractContextManager[Path]:
    """Give a temporary sibling of `out` to write an engine to; it takes `out`'s place when the block ends well.

    An engine that is already there stays usable until it is replaced. If the block raises, nothing is left.

    Args:
        out: the engine's place.
        needed: bytes that it takes at least; 0: unknown.

    Raises:
        InputError: `out` holds something else, or its parent cannot be written.
        SetupError: the disk has no room.
    """
    return output.staged(out, check_replaceable, "engine", needed)


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """JSON with sorted keys and a newline at the end: equal content is equal bytes."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def write_manifest(folder: Path, manifest: EngineManifest) -> None:
    """Write engine.json."""
    write_json(folder / MANIFEST_FILE, manifest.model_dump(mode="json"))


def hash_file(path: Path) -> FileEntry:
    """Size and SHA-256 of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return FileEntry(size=file.tell(), sha256=digest.hexdigest())


def file_entries(folder: Path, known: Mapping[str, FileEntry] | None = None) -> dict[str, FileEntry]:
    """An entry for every file of the folder except engine.json; those in `known` are not read again."""
    known = known or {}
    names = sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and path != folder / MANIFEST_FILE
    )
    return {name: known.get(name) or hash_file(folder / name) for name in names}


def model_part(facts: OptFacts, source: str) -> ModelPart:
    """The manifest's copy of the model facts; `source` identifies the checkpoint by content."""
    sizes = {name: getattr(facts, name) for name in ModelPart.model_fields if name != "source"}
    return ModelPart(source=source, **sizes)


def add_companions(folder: Path, model: ModelPart, tokenizer: Path | None) -> None:
    """Put beside the graphs what other hosts need: tokenizer, op library, genai_config.json.

    Args:
        folder: the staging folder.
        model: for genai_config.json.
        tokenizer: folder with tokenizer files; None: the model has none.

    Raises:
        InputError: the tokenizer is damaged.
        SetupError: the op library is not installed.
    """
    add_tokenizer(folder, tokenizer)
    library = copy_op_library(folder)
    write_json(folder / GENAI_FILE, genai_config(model, library.name))


def add_tokenizer(folder: Path, tokenizer: Path | None) -> None:
    """Put the tokenizer's files into the folder, if the model has one.

    Raises:
        InputError: the tokenizer is damaged.
    """
    from shadowc.checkpoint.tokenizer import write_tokenizer

    if tokenizer is not None:
        write_tokenizer(tokenizer, folder)


def copy_op_library(folder: Path) -> Path:
    """Put the op library, and what it needs beside it, into the folder for hosts other than Python."""
    files = op_library_files()
    for path in files:
        shutil.copyfile(path, folder / path.name)
    return folder / files[0].name


def op_library_files() -> tuple[Path, ...]:
    """The op library, and behind it what it needs."""
    from shadowc.runtime.library import library_path

    library = library_path()
    return (library, *sorted(library.parent.glob("libhwy*.so*")))


def write_controls(
    folder: Path, rankings: Mapping[str, tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]]
) -> None:
    """Write static rankings: method -> scores of heads [L, H] and of neuron units [L, N]."""
    from safetensors.numpy import save

    tensors: dict[str, npt.NDArray[np.float32]] = {}
    for method, (heads_LH, neurons_LN) in sorted(rankings.items()):
        tensors |= {f"{method}.heads": heads_LH, f"{method}.neurons": neurons_LN}
    (folder / CONTROLS_FILE).write_bytes(save(tensors))


def write_orders(folder: Path, orders: Mapping[str, npt.NDArray[np.int32]]) -> None:
    """Write neuron orders [F]: entry i is the checkpoint's neuron that became record i; names `order.{model layer}`."""
    from safetensors.numpy import save

    (folder / ORDERS_FILE).write_bytes(save(dict(sorted(orders.items()))))


def write_means(folder: Path, means: Mapping[int, npt.NDArray[np.float32]]) -> None:
    """Write what skipped heads leave in their place: model layer -> [H, D], named `mean.heads.{model layer}`."""
    from safetensors.numpy import save

    from shadowc.sparsity.means import named

    (folder / MEANS_FILE).write_bytes(save(named(means)))


def _listed(manifest: Mapping[str, object]) -> Collection[str] | None:
    """The files that an engine.json of any schema accounts for; None: this is no engine.json."""
    schema, key, files = (manifest.get(name) for name in ("schema_version", "build_key", "files"))
    if not isinstance(schema, int) or isinstance(schema, bool) or not isinstance(key, str):
        return None
    return set(files) if isinstance(files, Mapping) else ()
