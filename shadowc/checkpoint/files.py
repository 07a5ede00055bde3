# SPDX-License-Identifier: Apache-2.0
"""Which files of a folder hold the weights, and which tensor lies where in them.

In: a checkpoint folder. Out: `WeightFiles`. Looked for in the order of transformers: model.safetensors, its index
with shards, pytorch_model.bin, its index with shards; the first that is there is taken. Findings are collected, so
that the faults of all files can be reported together.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from shadowc.checkpoint.converted import read_converted
from shadowc.checkpoint.opt import EMBEDDING, HEAD
from shadowc.checkpoint.pickled import container_problem
from shadowc.checkpoint.stored import Stored, read_header
from shadowc.spec.errors import InputError, ShadowcError, UnsupportedError
from shadowc.stage_cache import StageCache

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLED_FILE = "pytorch_model.bin"
PICKLED_INDEX_FILE = "pytorch_model.bin.index.json"
EXPECTED = f"{SINGLE_FILE}, {PICKLED_FILE}, or the index of one with its shards"

_OTHER_FORMATS = ("*.h5", "*.msgpack", "*.gguf", "*.onnx", "*.pt", "*.pth", "*.ckpt", "*.bin", "*.safetensors")
_NO_WEIGHTS = ("training_args.bin", "optimizer.*", "scheduler.*", "rng_state*", "scaler.*", "tokenizer.*")
"""Other files of a fine-tune's folder whose names look like weights."""
_ADAPTER = "adapter_model.*"
_SWITCHES = MappingProxyType({".h5": "from_tf", ".msgpack": "from_flax"})
_ALL = "*"

Advance = Callable[[int, int], None]
Reader = Callable[[Path], tuple[dict[str, Stored] | None, list[str]]]
"""Gives the entries of one file, and what is wrong with it; None: it was not opened."""


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """The weight files of a folder, opened as far as their headers."""

    files: tuple[Path, ...]
    """The user's own, also where a conversion is read instead."""
    stored: Mapping[str, Stored]
    """By canonical name."""
    damaged: tuple[str, ...]
    """What is wrong with the files themselves."""
    excused: frozenset[str]
    """Names whose shard could not be read: not reported again as missing."""

    def excuses(self, name: str) -> bool:
        """Whether it is already said why this tensor is not there."""
        return _ALL in self.excused or name in self.excused


def find_weight_files(folder: Path, *, convert: bool = True, advance: Advance | None = None) -> WeightFiles:
    """Read the headers of all weight files of a folder.

    Args:
        folder: the checkpoint.
        convert: False: pickled files are only looked for, not converted; their tensors are excused.
        advance: called with bytes done and their total while pickled files are converted.

    Raises:
        UnsupportedError: weights in another format only, or pickles that need more than weights_only.
        InputError: it holds no weights at all, an index that cannot be read, or a link that leads nowhere.
        SetupError: pickled files cannot be converted on this machine.
    """
    for single, index in ((SINGLE_FILE, INDEX_FILE), (PICKLED_FILE, PICKLED_INDEX_FILE)):
        for path in (folder / single, folder / index):
            if path.is_symlink() and not path.exists():
                raise InputError(
                    f"{path} is a link to {path.readlink()}, which is not there", hint="download the checkpoint again"
                )
        if (folder / single).exists():
            shards = _Shards({single: None})
        elif (folder / index).exists():
            shards = _read_index(folder, index)
        else:
            continue
        return _read(folder, index, shards, _readers(folder, shards, convert, advance, pickled=single == PICKLED_FILE))
    raise no_weights(str(folder), sorted(path.name for path in folder.iterdir()), str(folder))


def canonical(names: Collection[str]) -> dict[str, str]:
    """Given name -> canonical name: a bare OPTModel (`decoder.`) is renamed to an OPTForCausalLM."""
    return {name: f"model.{name}" if name.startswith("decoder.") else name for name in names}


def no_weights(where: str, names: Sequence[str], model: str) -> ShadowcError:
    """The error for a folder or repository without weights that shadowc reads.

    Args:
        where: the folder or repository, for the message.
        names: of its files.
        model: what names it to transformers, for the command that converts it.
    """
    likely = [name for name in names if not _matches(name, _NO_WEIGHTS)]
    adapters = [name for name in likely if _matches(name, (_ADAPTER,))]
    others = [name for pattern in _OTHER_FORMATS for name in likely if _matches(name, (pattern,))]
    if adapters:
        return UnsupportedError(
            f"{where}: holds {adapters[0]}, an adapter alone, expected the weights of the whole model: {EXPECTED}",
            hint="merge it into its base model with peft's merge_and_unload(), save_pretrained() that, and compile it",
        )
    if others:
        return UnsupportedError(
            f"{where}: holds weights as {others[0]}, expected {EXPECTED}", hint=_way_from(others[0], model)
        )
    return InputError(
        f"{where}: holds no weights, expected {EXPECTED}",
        hint="copy the weights there, or add --load-format dummy for random ones",
    )


def _way_from(name: str, model: str) -> str:
    """What to do with weights of another format, or with shards alone."""
    suffix = Path(name).suffix
    if suffix in _SWITCHES:
        load = f"M.from_pretrained('{model}', {_SWITCHES[suffix]}=True)"
        command = (
            f"from transformers import OPTForCausalLM as M; {load}.save_pretrained('{Path(model).name}-converted')"
        )
        return f'convert it where transformers below 5 and that framework are installed: python -c "{command}"'
    if "-of-" in name:
        return "copy the index that belongs to the shards, or download the checkpoint again"
    if suffix in {".pt", ".pth", ".ckpt", ".bin", ".safetensors"}:
        known = SINGLE_FILE if suffix == ".safetensors" else PICKLED_FILE
        return f"if it is the state_dict() of a whole OPTForCausalLM, copy it as {known}"
    return "give the checkpoint that it was made from"


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(Path(name).match(pattern) for pattern in patterns)


@dataclass(frozen=True, slots=True)
class _Shards:
    """The files of one checkpoint and what its index says about them."""

    wanted: Mapping[str, Sequence[str] | None]
    """File name -> tensors that the index places there; None: there is no index, take all."""
    problems: Sequence[str] = ()
    lost: Sequence[str] = ()
    """Tensors of shards that are missing."""


def _read_index(folder: Path, name: str) -> _Shards:
    """The shards that an index names; those that cannot be there become findings, all missing ones in one."""
    index = folder / name
    try:
        placed = json.loads(index.read_bytes())["weight_map"]
    except OSError as error:
        raise InputError(f"{index}: cannot be read: {error.strerror}", hint="check its permissions") from error
    except (ValueError, KeyError, TypeError):
        placed = None
    if not isinstance(placed, dict) or not placed or not all(isinstance(shard, str) for shard in placed.values()):
        raise InputError(f"{index}: is not an index with a weight_map", hint="download the checkpoint again")
    wanted: dict[str, list[str]] = {}
    for tensor, shard in sorted(placed.items()):
        wanted.setdefault(shard, []).append(tensor)
    outside = [shard for shard in sorted(wanted) if Path(shard).name != shard]
    missing = [shard for shard in sorted(wanted) if shard not in outside and not (folder / shard).exists()]
    problems = [f"{name}: names {shard!r}, expected a file beside it" for shard in outside]
    if missing:
        count = sum(len(wanted[shard]) for shard in missing)
        verb, place = ("are", "them") if len(missing) > 1 else ("is", "it")
        problems.append(f"{', '.join(missing)}: {verb} missing ({count} tensors lie in {place})")
    gone = {*outside, *missing}
    return _Shards(
        {shard: names for shard, names in sorted(wanted.items()) if shard not in gone},
        problems,
        [tensor for shard in gone for tensor in wanted[shard]],
    )


def _readers(folder: Path, shards: _Shards, convert: bool, advance: Advance | None, *, pickled: bool) -> Reader:
    """The function that reads the header of one file.

    Pickled shards are converted only if all of them are there and look whole: it can take minutes.
    """
    if not pickled:
        return read_header
    found = {shard: container_problem(folder / shard) for shard in shards.wanted}
    if shards.problems or any(found.values()) or not convert:
        return lambda path: (None, [problem] if (problem := found[path.name]) else [])
    total = sum((folder / shard).stat().st_size for shard in shards.wanted)
    cache, before = StageCache(), 0

    def read(path: Path) -> tuple[dict[str, Stored] | None, list[str]]:
        nonlocal before
        start, size = before, path.stat().st_size
        before += size
        tell = None if advance is None else lambda done, of: advance(start + size * done // max(of, 1), total)
        return read_converted(path, cache, tell)

    return read


def _read(folder: Path, index: str, shards: _Shards, reader: Reader) -> WeightFiles:
    given: dict[str, Stored] = {}
    opened: dict[str, Mapping[str, Stored]] = {}
    damaged, excused = list(shards.problems), set(shards.lost)
    for shard, wanted in shards.wanted.items():
        entries, problems = reader(folder / shard)
        damaged += problems
        if entries is None or (problems and not entries):
            excused.update([_ALL] if wanted is None else wanted)
        else:
            opened[shard] = entries
    for shard, held in opened.items():
        placed = shards.wanted[shard]
        found = {name: _entry(name, shard, opened) for name in (held if placed is None else placed)}
        lost = [name for name, entry in found.items() if entry is None]
        damaged += [f"{shard}: lacks {name}, which {index} places there" for name in lost]
        excused.update(lost)
        given |= {name: entry for name, entry in found.items() if entry is not None}
    renamed = canonical(given)
    twice = [name for name in sorted(given) if renamed[name] != name and renamed[name] in given]
    damaged += [f"{given[name].file}: holds {name} and also {renamed[name]}, expected one of them" for name in twice]
    return WeightFiles(
        tuple(folder / shard for shard in shards.wanted),
        {renamed[name]: entry for name, entry in given.items()},
        tuple(damaged),
        frozenset(canonical(excused).values()),
    )


def _entry(name: str, shard: str, opened: Mapping[str, Mapping[str, Stored]]) -> Stored | None:
    """Where a tensor lies that the index places in a shard; None: nowhere in it.

    An index may list a tied head and its embedding both, and the shard hold them once: `pickled.convert` and most
    tools that write safetensors leave one of two names for the same memory out. The other one is it then. If another
    shard holds the tensor after all, the index is wrong, and that tensor may differ.
    """
    entries = opened[shard]
    if name in entries or any(name in others for others in opened.values()):
        return entries.get(name)
    embeddings = [EMBEDDING, EMBEDDING.removeprefix("model.")]
    twins = embeddings if name == HEAD else [HEAD] if name in embeddings else []
    held = [entries[twin] for twin in twins if twin in entries]
    return held[0] if len(held) == 1 else None
