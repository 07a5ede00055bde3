# SPDX-License-Identifier: Apache-2.0
"""engine.json: what an engine folder says about itself. Readers refuse a newer schema, writers write one form."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

SCHEMA = 1
MANIFEST_FILE = "engine.json"
MODEL_FILE = "model.onnx"
REFERENCE_FILE = "reference.onnx"
WEIGHTS_FILE = "weights.bin"


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class FileEntry(_Part):
    """Size in bytes and SHA-256 of one file of the folder."""

    size: int
    sha256: str


class ModelPart(_Part):
    """The facts of the compiled model that a runtime needs."""

    name: str
    source: str
    """Content hash of the checkpoint, or the seed and shape of dummy weights."""
    layers: int
    hidden: int
    heads: int
    head_size: int
    ffn: int
    vocab: int
    positions: int
    """Longest context in tokens."""
    bos: int
    eos: int
    pad: int


class SparsityPart(_Part):
    """How masks are made, and what the predictor was worth when it was trained."""

    mask: Literal["token", "sequence"]
    scope: Literal["local", "global"]
    head_density: float
    neuron_density: float
    neuron_block: int
    exempt: tuple[int, ...] = ()
    predictor: dict[str, object] = Field(default_factory=dict)
    """Origin, widths, criterion, data hash, validation recall beside the static ranking's."""


class BytesPart(_Part):
    """Bytes that every token reads outside the sparse operators, and what the dense operators would read."""

    lm_head: int
    predictor: int
    other: int
    """Norms, biases, one row of each embedding."""
    records: int
    """Weights and scales of all attention and FFN records: the dense cost per token."""


class EngineManifest(_Part):
    """The whole of engine.json."""

    schema_version: int = SCHEMA
    producer: dict[str, str]
    """Versions of shadowc and of the tools that made the folder."""
    target: Literal["cpu"]
    weights: Literal["fp32", "int8"]
    ops: dict[str, int]
    """Operator domain -> version that the graph needs."""
    model: ModelPart
    sparsity: SparsityPart | None
    """None: a dense engine."""
    bytes_per_token: BytesPart
    parity: dict[str, object]
    build_key: str
    """Hash of everything that decided the bytes; equal keys mean equal folders."""
    files: dict[str, FileEntry]
    """Every file of the folder except engine.json."""
