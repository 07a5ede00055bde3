# SPDX-License-Identifier: Apache-2.0
"""A GGUF file of a Llama-type model as a folder with config.json, float32 safetensors and the tokenizer's files.

transformers unpacks the quantised blocks and renames the tensors; packages `gguf` and `accelerate` are needed for that.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

from shadowc.checkpoint.files import SINGLE_FILE
from shadowc.checkpoint.llama import MODEL_TYPE, LlamaFacts, config_dict, parameter_shapes
from shadowc.spec.errors import InputError, SetupError, UnsupportedError

PACKAGES = ("gguf", "accelerate")
MAGIC = b"GGUF"
CONFIG_FILE = "config.json"
_ARCHITECTURE = "general.architecture"


def convert_gguf(path: Path, folder: Path) -> None:
    """Write the model and the tokenizer of a GGUF file into a folder.

    Raises:
        SetupError: the packages that read such files are not installed.
        InputError: the file is damaged.
        UnsupportedError: it holds a model of another architecture.
    """
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise SetupError(
            f"{path.name}: to read GGUF files {' and '.join(missing)} must be installed",
            hint="pip install 'shadowc[gguf]'",
        )
    found = _architecture(path)
    if found != MODEL_TYPE:
        raise UnsupportedError(
            f"{path}: holds a model of architecture {found!r}, expected {MODEL_TYPE!r}",
            hint="Llama 2 and 3, SmolLM and TinyLlama have that architecture",
        )
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    quiet_transformers()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32, local_files_only=True
        )
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    except Exception as error:  # its reader raises whatever the damaged place leads to
        raise InputError(
            f"{path}: cannot be read: {type(error).__name__}: {error}", hint="download the file again"
        ) from error
    config = {**model.config.to_dict(), "quantization_config": None}  # unpacked: it is not quantised any more
    facts = LlamaFacts.from_config(config, path.stem)
    content = {"model_type": MODEL_TYPE, **config_dict(facts)}
    (folder / CONFIG_FILE).write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", "utf-8")
    values = dict(model.named_parameters())
    save_file({name: values[name].detach() for name in parameter_shapes(facts)}, folder / SINGLE_FILE)
    tokenizer.save_pretrained(folder)


def quiet_transformers() -> None:
    """Turn transformers' own progress bars off; shadowc draws one."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def _architecture(path: Path) -> str:
    """Return what the file says; looked up before anything is unpacked."""
    with path.open("rb") as file:
        start = file.read(len(MAGIC))
    if start != MAGIC:
        raise InputError(f"{path}: is not a GGUF file: it begins with {start!r}", hint="download the file again")
    from gguf import GGUFReader

    try:
        field = GGUFReader(path).fields.get(_ARCHITECTURE)
        return "" if field is None else str(field.contents())
    except Exception as error:  # a damaged header leads it anywhere
        raise InputError(f"{path}: its header is damaged: {error}", hint="download the file again") from error
