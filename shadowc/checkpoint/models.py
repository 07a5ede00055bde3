# SPDX-License-Identifier: Apache-2.0
"""Resolves what the user wrote after --model into a checkpoint of any family that the torch side handles.

In: what `resolve` takes, and Llama-type models: a folder or hub id with their config.json, a GGUF file, or a folder
that holds one. Out: `ModelCheckpoint`. The compiler keeps to `resolve`, which knows OPT alone.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from shadowc.checkpoint import llama
from shadowc.checkpoint.converted import converted_gguf
from shadowc.checkpoint.llama import LlamaFacts
from shadowc.checkpoint.resolve import (
    LoadFormat,
    ModelCheckpoint,
    checkpoint_of,
    dummy_checkpoint,
    find_folder,
    gguf_file,
    is_short_name,
    read_config,
    resolve,
)
from shadowc.checkpoint.tokenizer import load_tokenizer
from shadowc.spec.errors import InputError
from shadowc.stage_cache import StageCache

Advance = Callable[[int, int], None]


def resolve_model(
    model: str,
    *,
    load_format: LoadFormat = "auto",
    offline: bool = False,
    seed: int = 0,
    advance: Advance | None = None,
) -> ModelCheckpoint:
    """Find a model and check its files.

    Args:
        model: a short name, an existing folder, a hub id, or a GGUF file of a Llama-type model.
        load_format: "dummy": seeded random weights of the model's shape; its weight files are not looked at.
        offline: do not use the network.
        seed: of dummy weights.
        advance: called with bytes and their total, as weights are hashed.

    Raises:
        InputError: no such model, or its files are missing or damaged; all findings at once.
        UnsupportedError: a family or variant that is not handled, or another file format.
        SetupError: the hub cannot be reached, or packages that read GGUF files are missing.
    """
    file = gguf_file(model)
    if file is not None:
        return _from_gguf(file, load_format, advance)
    if not is_short_name(model):
        folder, name = find_folder(model, offline, load_format == "dummy")
        config = read_config(folder)
        if config.get("model_type") == llama.MODEL_TYPE:
            facts = LlamaFacts.from_config(config, name)
            if load_format == "dummy":
                return dummy_checkpoint(ModelCheckpoint, facts, folder, seed)
            return checkpoint_of(ModelCheckpoint, facts, folder, advance)
    return resolve(model, load_format=load_format, offline=offline, seed=seed, advance=advance)


def tokenizer_of(checkpoint: ModelCheckpoint) -> Any:
    """Return the checkpoint's tokenizer: of an OPT ours, which fills gaps in old files; otherwise transformers' own.

    Raises:
        InputError: there is none, or its files are damaged.
    """
    folder = checkpoint.tokenizer
    if folder is None:
        raise InputError(
            f"the checkpoint {checkpoint.facts.name} has no tokenizer files",
            hint="put tokenizer.json (or vocab.json and merges.txt) beside the weights",
        )
    if isinstance(checkpoint.facts, LlamaFacts):
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # tokenizers raises nothing narrower for damaged content
            raise InputError(
                f"{folder}: the tokenizer cannot be read: {error}", hint="copy it from the original checkpoint"
            ) from error
    return load_tokenizer(folder)


def _from_gguf(file: Path, load_format: LoadFormat, advance: Advance | None) -> ModelCheckpoint:
    if load_format == "dummy":
        raise InputError(
            f"{file} is a GGUF file; dummy weights need a folder with a config.json",
            hint=f"drop --load-format dummy, or make the folder from it: AutoConfig.from_pretrained('{file.parent}', "
            f"gguf_file='{file.name}').save_pretrained('FOLDER')",
        )
    folder = converted_gguf(file, StageCache())
    facts = LlamaFacts.from_config(read_config(folder), file.stem)
    return checkpoint_of(ModelCheckpoint, facts, folder, advance, files=(file,))
