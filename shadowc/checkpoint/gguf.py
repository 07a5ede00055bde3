# SPDX-License-Identifier: Apache-2.0
"""A GGUF file of a Llama-type model as a folder with config.json, float32 safetensors and the tokenizer's files.

transformers unpacks the quantised blocks and renames the tensors; packages `gguf` and `accelerate` are needed for that.
"""

from __future__ import annotations

import importlib.util
import json
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path

from shadowc.checkpoint.files import SINGLE_FILE
from shadowc.checkpoint.llama import MODEL_TYPE, LlamaFacts, config_dict, parameter_shapes
from shadowc.checkpoint.tokenizer import FAST_FILE, SETTINGS_FILE, SPECIAL_FILE
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

    where = {"gguf_file": path.name, "local_files_only": True}
    try:
        with redirect_stderr(StringIO()):  # progress bars that cannot be turned off
            model = AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **where)
            tokenizer = AutoTokenizer.from_pretrained(path.parent, **where)
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
    _drop_tokens_from(folder, facts.vocab)


def _drop_tokens_from(folder: Path, vocab: int) -> None:
    """Take tokens out of the written tokenizer that the model does not have.

    transformers gives every byte-level tokenizer `<|endoftext|>`, those of models without such a token too.
    """
    path = folder / FAST_FILE
    content = json.loads(path.read_text("utf-8"))
    gone = {token["content"] for token in content["added_tokens"] if token["id"] >= vocab}
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] not in gone]
    path.write_text(json.dumps(content, ensure_ascii=False), "utf-8")
    for name in (SETTINGS_FILE, SPECIAL_FILE):
        path = folder / name
        if path.is_file():
            settings = json.loads(path.read_text("utf-8"))
            kept = {key: value for key, value in settings.items() if not isinstance(value, str) or value not in gone}
            path.write_text(json.dumps(kept, indent=1, sort_keys=True), "utf-8")


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
