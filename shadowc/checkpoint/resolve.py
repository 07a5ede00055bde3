# SPDX-License-Identifier: Apache-2.0
"""Resolves what the user wrote after --model into a checkpoint whose files have been checked.

In: a short name, a folder, or a hub id. Out: `Checkpoint`: facts, weights as a TensorSource, identity. The
network is used for a hub id (which the short names stand for) and for nothing else.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

from shadowc.checkpoint.digest import Stamp, digests, facts_key, fingerprint, identity, parts_of, stamp
from shadowc.checkpoint.dummy import SCHEME, DummyWeights
from shadowc.checkpoint.facts import ModelFacts, layout_of
from shadowc.checkpoint.files import INDEX_FILE, PICKLED_FILE, PICKLED_INDEX_FILE, SINGLE_FILE, find_weight_files
from shadowc.checkpoint.llama import MODEL_TYPE
from shadowc.checkpoint.opt import PUBLISHED_NAMES, OptFacts, llama_is_not_compiled, published_config
from shadowc.checkpoint.tokenizer import has_tokenizer, highest_token_id, tokenizer_files
from shadowc.checkpoint.weights import join, open_weights
from shadowc.spec.errors import InputError, SetupError
from shadowc.spec.manifest import MANIFEST_FILE
from shadowc.spec.program import TensorSource
from shadowc.stage_cache import StageCache

LoadFormat = Literal["auto", "dummy"]

OPT_MINI = "opt-mini"
SHORT_NAMES = (OPT_MINI, *PUBLISHED_NAMES)
CONFIG_FILE = "config.json"
GGUF_SUFFIX = ".gguf"
_OWNER = "facebook/"


@dataclass(frozen=True)
class ModelCheckpoint:
    """A model of any family that the torch side handles: collect, train, the masked model."""

    facts: ModelFacts
    weights: TensorSource
    """All parameters as float32 by canonical name, a tied head included."""
    identity: str
    """Equal for equal facts, weights and tokenizer, wherever they lie and whatever they are called."""
    folder: Path | None
    """None: dummy weights of a published shape."""
    tokenizer: Path | None
    """Folder with tokenizer files, if there are any."""
    dummy: bool
    total_bytes: int
    """Of all parameters in float32."""
    unused: tuple[str, ...] = ()
    """Tensors in the files that are not part of the language model, and so not of the engine."""
    parts: Mapping[str, str] = field(default_factory=dict)
    """Hashes of the parts of the identity, see `digest.PARTS`; empty where it has none."""

    stamps: Mapping[Path, Stamp] = field(default_factory=dict)
    """Of the files that the identity was made of, as they were then."""

    def require_unchanged(self) -> None:
        """Refuse files that are others now: what was made of them would be kept under the identity of the old ones.

        Raises:
            InputError: naming them.
        """
        changed = [str(path) for path, before in self.stamps.items() if not path.exists() or stamp(path) != before]
        if changed:
            raise InputError(f"changed while they were read: {join(changed)}", hint="run the same command again")

    @property
    def described(self) -> dict[str, str]:
        """What traces and predictors keep of it."""
        return {"name": self.facts.name, "identity": self.identity, **self.parts}


@dataclass(frozen=True)
class Checkpoint(ModelCheckpoint):
    """An OPT, which can be compiled."""

    facts: OptFacts


Found = TypeVar("Found", bound=ModelCheckpoint)


def resolve(
    model: str,
    *,
    load_format: LoadFormat = "auto",
    offline: bool = False,
    seed: int = 0,
    advance: Callable[[int, int], None] | None = None,
) -> Checkpoint:
    """Find a model and check its files.

    Args:
        model: a short name, an existing folder, or a hub id.
        load_format: "dummy": seeded random weights of the model's shape; its weight files are not looked at.
        offline: do not use the network (HF_HUB_OFFLINE says the same).
        seed: of dummy weights.
        advance: called with bytes and their total, of pickled weights as they are converted, then of hashing.

    Raises:
        InputError: no such model, or its files are missing or damaged; all findings at once.
        UnsupportedError: not an OPT that is handled, or another file format.
        SetupError: the hub cannot be reached, or this installation lacks opt-mini.
    """
    dummy = load_format == "dummy"
    short = model.removeprefix(_OWNER)
    if is_short_name(model) and model != OPT_MINI:
        refuse_two_meanings(model)
        facts = OptFacts.from_config(published_config(short), short)
        if dummy:
            return dummy_checkpoint(Checkpoint, facts, None, seed)
        folder = _download(_OWNER + short, offline, weights=True)
        return _from_folder(folder, short, advance)
    refuse_llama(model)
    folder, name = find_folder(model, offline, dummy)
    if dummy:
        return dummy_checkpoint(Checkpoint, OptFacts.from_config(read_config(folder), name), folder, seed)
    return _from_folder(folder, name, advance)


def is_short_name(model: str) -> bool:
    """Whether this names a published OPT, or opt-mini, and not a folder of that name below here."""
    short = model.removeprefix(_OWNER)
    return model == OPT_MINI or (short in PUBLISHED_NAMES and (short == model or not _is_folder(Path(model))))


def refuse_two_meanings(short: str) -> None:
    """Refuse the short name of a published model where a checkpoint lies in a folder of that name.

    Raises:
        InputError: says how to name the one and the other.
    """
    if short in PUBLISHED_NAMES and _is_file(Path(short) / CONFIG_FILE):
        raise InputError(
            f"{short} is the name of a published model, and of a folder here that holds a checkpoint",
            hint=f"--model ./{short} for the folder, --model {_OWNER}{short} for the published one",
        )


def gguf_file(model: str) -> Path | None:
    """The GGUF file that is named, or the one in a folder that holds no weights of another form.

    Raises:
        InputError: the folder holds several, or may not be read.
    """
    path = _expanded(model)
    if _is_file(path):
        return path if path.suffix == GGUF_SUFFIX else None
    if not model or not _is_folder(path):
        return None
    try:
        found = sorted(file for file in path.iterdir() if file.suffix == GGUF_SUFFIX)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}", hint="check its permissions") from error
    if not found or any((path / form).exists() for form in (SINGLE_FILE, INDEX_FILE, PICKLED_FILE, PICKLED_INDEX_FILE)):
        return None
    if len(found) > 1:
        raise InputError(
            f"{path} holds {len(found)} GGUF files, expected one: {', '.join(file.name for file in found)}",
            hint=f"name the file: --model {found[0]}",
        )
    return found[0]


def refuse_llama(model: str) -> None:
    """Refuse a Llama-type model where an engine, or what becomes one, is wanted.

    Raises:
        UnsupportedError: a GGUF file is named, or a folder with one, or with the config.json of such a model.
        InputError: a folder with several GGUF files.
    """
    file = gguf_file(model)
    if file is not None:
        raise llama_is_not_compiled(model, f"{file.name} is a GGUF file")
    config = _expanded(model) / CONFIG_FILE
    if _is_file(config) and read_config(config.parent).get("model_type") == MODEL_TYPE:
        raise llama_is_not_compiled(model, f"config.json says model_type {MODEL_TYPE!r}")


def bundled_opt_mini() -> Path:
    """The folder of the small OPT that shadowc carries: in the package when installed, else in the source checkout.

    Raises:
        SetupError: neither place has it.
    """
    package = Path(__file__).resolve().parents[1]
    places = (package / "data" / "opt_mini", package.parent / "examples" / "opt_mini")
    for place in places:
        if (place / CONFIG_FILE).is_file():
            return place
    raise SetupError(
        f"{OPT_MINI} is not part of this installation: no {CONFIG_FILE} in {places[0]} or {places[1]}",
        hint="install shadowc again, or run from a complete source checkout",
    )


def read_config(folder: Path) -> dict[str, object]:
    """The content of a checkpoint folder's config.json.

    Raises:
        InputError: it is missing or not a JSON object.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        if (folder / MANIFEST_FILE).is_file():
            raise InputError(f"{folder}: is a compiled engine, expected a checkpoint", hint=f"shadowc run {folder}")
        raise InputError(
            f"{folder}: has no {CONFIG_FILE}", hint="give the folder that holds config.json and the weights"
        )
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}", hint="check its permissions") from error
    except ValueError as error:
        raise InputError(f"{path}: is not valid JSON: {error}", hint="download the checkpoint again") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: is not a JSON object", hint="download the checkpoint again")
    return content


def find_folder(model: str, offline: bool, dummy: bool) -> tuple[Path, str]:
    """The folder that is named or downloaded, and what the model is called.

    Raises:
        InputError, UnsupportedError, SetupError: as `resolve`.
    """
    if model == OPT_MINI:
        return bundled_opt_mini(), OPT_MINI
    path = _expanded(model)
    if model and _is_folder(path):
        return path, path.resolve().name
    if _is_file(path):
        raise InputError(f"{model} is a file, expected the checkpoint's folder", hint=f"give --model {path.parent}")
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", model):
        return _download(model, offline, weights=not dummy), model.split("/")[1]
    if "/" in model or model.startswith((".", "~")):
        raise InputError(f"there is no folder {model}", hint="check the path; a hub id has the form owner/name")
    near = difflib.get_close_matches(model.lower(), SHORT_NAMES, n=3, cutoff=0.4)
    raise InputError(
        f"unknown model {model!r}; expected a short name, a folder, or a hub id (owner/name)",
        hint=f"did you mean {' or '.join(near)}" if near else f"short names are {', '.join(SHORT_NAMES)}",
    )


def _expanded(model: str) -> Path:
    try:
        return Path(model).expanduser()
    except (RuntimeError, ValueError):  # ~name of a user who does not exist, or a zero byte
        return Path(model)


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):  # too long for a name, or with a zero byte: whatever it is, not a folder
        return False


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def _download(repository: str, offline: bool, *, weights: bool) -> Path:
    from shadowc.checkpoint.hub import download

    return download(repository, offline=offline, weights=weights)


def _from_folder(folder: Path, name: str, advance: Callable[[int, int], None] | None) -> Checkpoint:
    config = read_config(folder)
    try:
        facts = OptFacts.from_config(config, name)
    except InputError as error:
        raise _with_damage(error, folder) from error
    return checkpoint_of(Checkpoint, facts, folder, advance)


def checkpoint_of(
    kind: type[Found],
    facts: ModelFacts,
    folder: Path,
    advance: Callable[[int, int], None] | None,
    files: tuple[Path, ...] = (),
) -> Found:
    """Open the weights of a folder; `files` decide the identity in place of those in it.

    Raises:
        InputError: weights or tokenizer are missing or damaged.
    """
    tokenizer = _checked_tokenizer(facts, folder)
    opened = open_weights(folder, facts, advance)
    tokens = tokenizer_files(folder) if tokenizer else ()
    decisive = files or (*opened.files, *tokens)
    stamps = {path: stamp(path) for path in decisive}
    hashed = digests(decisive, StageCache(), advance)
    return kind(
        facts=facts,
        weights=opened.source,
        identity=identity(facts, hashed),
        folder=folder,
        tokenizer=tokenizer,
        dummy=False,
        total_bytes=total_bytes(facts),
        unused=opened.unused,
        parts={} if files else parts_of(hashed, tokens),
        stamps=stamps,
    )


def dummy_checkpoint(kind: type[Found], facts: ModelFacts, folder: Path | None, seed: int) -> Found:
    """Return seeded random weights in place of those of a folder; None: of a published shape.

    Raises:
        InputError: the folder's tokenizer does not fit the model.
    """
    tokenizer = None if folder is None else _checked_tokenizer(facts, folder)
    return kind(
        facts=facts,
        weights=DummyWeights(facts, seed),
        identity=f"dummy-{seed}-{fingerprint({'facts': facts_key(facts), 'scheme': SCHEME})}",
        folder=folder,
        tokenizer=tokenizer,
        dummy=True,
        total_bytes=total_bytes(facts),
    )


def _checked_tokenizer(facts: ModelFacts, folder: Path) -> Path | None:
    if not has_tokenizer(folder):
        return None
    check_vocabulary(facts, folder)
    return folder


def _with_damage(error: InputError, folder: Path) -> InputError:
    """The same error with what is wrong with the weight files, which would be the next thing to fail."""
    damaged = find_weight_files(folder, convert=False).damaged
    if not damaged:
        return error
    message = f"{error.message}; {join(damaged)}"
    return InputError(message, hint=error.hint, problems=(*error.problems, *damaged))


def check_vocabulary(facts: ModelFacts, folder: Path) -> None:
    """Refuse a tokenizer with ids that the model does not have.

    Raises:
        InputError: it has such ids, or its files are damaged.
    """
    highest = highest_token_id(folder)
    if highest >= facts.vocab:
        raise InputError(
            f"{folder}: the tokenizer has ids up to {highest}, the model a vocabulary of {facts.vocab}",
            hint="copy the tokenizer files of the original checkpoint; after tokens were added, "
            "call model.resize_token_embeddings(len(tokenizer)) and save the model again",
        )


def total_bytes(facts: ModelFacts) -> int:
    """Bytes of all parameters in float32."""
    return 4 * sum(math.prod(shape) for shape in layout_of(facts).shapes.values())
