# SPDX-License-Identifier: Apache-2.0
"""Small OPT checkpoints written byte by byte, so that every fault can be planted exactly."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from shadowc.checkpoint.opt import OptFacts, parameter_shapes

if TYPE_CHECKING:
    import torch

FACTS = OptFacts("small", layers=3, hidden=8, heads=2, head_size=4, ffn=12, vocab=20, positions=16, bos=2, eos=2, pad=1)
CONFIG: Mapping[str, object] = {
    "model_type": "opt",
    "vocab_size": 20,
    "hidden_size": 8,
    "num_hidden_layers": 3,
    "ffn_dim": 12,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
    "word_embed_proj_dim": 8,
    "activation_function": "relu",
    "do_layer_norm_before": True,
    "bos_token_id": 2,
    "eos_token_id": 2,
    "pad_token_id": 1,
}
KINDS = {np.dtype("<f4"): "F32", np.dtype("<f2"): "F16", np.dtype("<u2"): "BF16", np.dtype("i1"): "I8"}

Tensors = dict[str, npt.NDArray[np.generic]]


def some_tensors(facts: OptFacts = FACTS, seed: int = 0) -> Tensors:
    """Random float32 parameters under their canonical names."""
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype("<f4") for name, shape in parameter_shapes(facts).items()}


def pack(tensors: Mapping[str, npt.NDArray[np.generic]]) -> bytes:
    """The bytes of a safetensors file; uint16 arrays stand for bfloat16."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, array in tensors.items():
        span = [at, at + array.nbytes]
        header[name] = {"dtype": KINDS[array.dtype], "shape": list(array.shape), "data_offsets": span}
        at += array.nbytes
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + b"".join(array.tobytes() for array in tensors.values())


def write_single(folder: Path, tensors: Tensors, config: Mapping[str, object] = CONFIG) -> Path:
    """config.json and one model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(pack(tensors))
    return folder


def write_shards(folder: Path, tensors: Tensors, shards: int = 3, config: Mapping[str, object] = CONFIG) -> Path:
    """config.json, the index and its shards; the tensors are dealt out in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    placed = {name: f"model-{1 + i % shards:05}-of-{shards:05}.safetensors" for i, name in enumerate(tensors)}
    for shard in set(placed.values()):
        (folder / shard).write_bytes(pack({name: tensors[name] for name in tensors if placed[name] == shard}))
    index = {"metadata": {}, "weight_map": placed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def as_torch(array: npt.NDArray[np.generic]) -> torch.Tensor:
    """The same numbers as a tensor with memory of its own; uint16 arrays stand for bfloat16."""
    import torch

    if array.dtype == np.dtype("<u2"):
        return torch.from_numpy(array.view("<i2").copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def save(path: Path, content: object, **options: object) -> Path:
    """What torch.save writes."""
    import torch

    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path, **options)
    return path


def write_pickled(folder: Path, tensors: Tensors, config: Mapping[str, object] = CONFIG, **options: object) -> Path:
    """config.json and one pytorch_model.bin."""
    save(folder / "pytorch_model.bin", {name: as_torch(array) for name, array in tensors.items()}, **options)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_pickled_shards(
    folder: Path, tensors: Tensors, shards: int = 3, config: Mapping[str, object] = CONFIG
) -> Path:
    """config.json, pytorch_model.bin.index.json and its shards; the tensors are dealt out in turn."""
    placed = {name: f"pytorch_model-{1 + i % shards:05}-of-{shards:05}.bin" for i, name in enumerate(tensors)}
    for shard in set(placed.values()):
        save(folder / shard, {name: as_torch(tensors[name]) for name in tensors if placed[name] == shard})
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, to show that nothing was written."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
