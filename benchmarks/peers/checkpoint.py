# SPDX-License-Identifier: Apache-2.0
"""shadowc's dummy weights as a checkpoint folder that every runtime can read.

In: a model that `shadowc compile --load-format dummy` takes. Out: config.json, model.safetensors in fp16 as OPT's
own checkpoints are, and a tokenizer whose token `t7` has the id 7, for converters that want one.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np

from shadowc.checkpoint.opt import OptFacts, config_dict, parameter_shapes
from shadowc.checkpoint.resolve import resolve
from shadowc.spec.program import TensorSource

_BYTES = 2
_ALIGNMENT = 8


def write_checkpoint(model: str, parent: Path) -> Path:
    """Write the dummy checkpoint of `model` into a folder of its name, unless it is there.

    Args:
        model: a short name or a folder with a config.json.
        parent: where the folder goes.

    Raises:
        ShadowcError: no such model, or one that is not handled.
    """
    checkpoint = resolve(model, load_format="dummy", offline=True)
    folder = parent / checkpoint.facts.name
    if not folder.is_dir():
        write_weights(checkpoint.facts, checkpoint.weights, folder)
    return folder


def write_weights(facts: OptFacts, weights: TensorSource, folder: Path) -> None:
    """Write a checkpoint of these weights, one tensor in memory at a time; `folder` is not there yet."""
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    _write_config(facts, unfinished)
    _write_tokenizer(facts, unfinished)
    _write_tensors(facts, weights, unfinished / "model.safetensors")
    unfinished.rename(folder)


def _write_config(facts: OptFacts, folder: Path) -> None:
    config = {
        "architectures": ["OPTForCausalLM"],
        "model_type": "opt",
        "dtype": "float16",
        "torch_dtype": "float16",  # what readers older than transformers 5 look for
        **config_dict(facts),
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")


def _write_tokenizer(facts: OptFacts, folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"t{token}": token for token in range(facts.vocab)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=f"t{facts.pad}"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"bos_token": facts.bos, "eos_token": facts.eos, "pad_token": facts.pad, "unk_token": facts.pad}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **{name: f"t{token}" for name, token in named.items()}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", "utf-8")


def _write_tensors(facts: OptFacts, weights: TensorSource, path: Path) -> None:
    """The tied head is left out."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in parameter_shapes(facts).items():
        start, end = end, end + _BYTES * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in parameter_shapes(facts):
            file.write(np.ascontiguousarray(weights.tensor(name), "<f2").tobytes())
