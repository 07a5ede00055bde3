# SPDX-License-Identifier: Apache-2.0
"""engine.json: what an engine folder says about itself. Readers refuse a newer schema, writers write one form."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt

SCHEMA = 1
MANIFEST_FILE = "engine.json"
MODEL_FILE = "model.onnx"
REFERENCE_FILE = "reference.onnx"
FIXED_FILE = "decode_fixed.onnx"
"""Of engines whose mask holds for a sequence: the graph without predictor, whose scores are inputs."""
WEIGHTS_FILE = "weights.bin"

TargetName = Literal["cpu", "tensorrt", "tensorrt-rtx"]
WeightsName = Literal["fp32", "fp16", "bf16", "int8", "int4"]
TrtFamily = Literal["rtx1", "trt10", "trt11"]
"""Libraries that share an ABI and a plugin: TensorRT for RTX 1.x, TensorRT 10.x and 11.x."""


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
    layers: PositiveInt
    hidden: PositiveInt
    heads: PositiveInt
    head_size: PositiveInt
    ffn: PositiveInt
    vocab: PositiveInt
    positions: PositiveInt
    """Longest context in tokens."""
    bos: NonNegativeInt
    eos: NonNegativeInt
    pad: NonNegativeInt
    norm_first: bool = True
    """Whether each norm is in front of its block and one stands before the LM head; False: behind it, and none."""
    projected: NonNegativeInt = 0
    """Width of token embeddings that are projected to the hidden size and back; 0: they have it."""


class SparsityPart(_Part):
    """How masks are made, and what the predictor was worth when it was trained."""

    style: Literal["shadow", "dejavu", "shadow+"] = "shadow"
    """shadow: one predictor for all layers; dejavu and shadow+: one for each."""
    mask: Literal["token", "sequence"]
    refresh: NonNegativeInt = 0
    """Tokens for which a mask of "sequence" holds; 0: until the end."""
    scope: Literal["local", "global"]
    select: Literal["exact", "calibrated", "sensitivity"] = "exact"
    """exact: units are ranked for every token; otherwise a unit is active whose score reaches a threshold that was
    calibrated: of each layer or of all (`scope`), or of each layer for its share by measured importance."""
    head_density: float
    neuron_density: float
    neuron_block: PositiveInt
    fill: Literal["zero", "mean"] = "zero"
    """What a skipped head leaves in its place: nothing, or its mean context (in means.safetensors and the biases)."""
    exempt: tuple[NonNegativeInt, ...] = ()
    """Predicted layers (0 is layer 1 of the model) that stay dense."""
    min_active_heads: NonNegativeInt = 0
    """Heads that every masked layer keeps at least."""
    min_active_neurons: NonNegativeInt = 0
    """The same of units of neurons, which are blocks."""
    predictor: dict[str, object] = Field(default_factory=dict)
    """Origin, widths, criterion, data hash, validation recall beside the static ranking's."""


class BytesPart(_Part):
    """Bytes that every token reads outside the sparse operators, and what the dense operators would read."""

    lm_head: int
    predictor: int
    other: int
    """Norms, biases, one row of each embedding, the projections of narrower embeddings."""
    records: int
    """Weights and scales of all attention and FFN records: the dense cost per token."""
    cache: int = 0
    """Keys and values that every token adds to the cache, all layers together; 0: not recorded."""


class PlanTensor(_Part):
    """One input or output of a plan, bound by its name to device memory."""

    name: str
    kind: Literal["token", "state", "dial", "cache", "weight", "logits", "count"]
    """token: input_ids, attention_mask; state: past, start; dial: densities; cache: K/V; weight: a name of the table
    `weights`; count: active units and what the kernels read."""
    dtype: Literal["float32", "float16", "bfloat16", "int8", "int32", "int64"]
    shape: tuple[int, ...]
    """-1: known at run time."""
    smallest: tuple[int, ...] | None = None
    """Profile of an input with a -1 in its shape: the smallest, the best and the largest sizes."""
    best: tuple[int, ...] | None = None
    largest: tuple[int, ...] | None = None
    alias_of: str = ""
    """Of an output: the input that must be bound to the same address."""


class PlanPart(_Part):
    """One TensorRT plan of the folder."""

    file: str
    onnx: str
    """The graph that it was built from; its weights are inputs."""
    inputs: tuple[PlanTensor, ...]
    outputs: tuple[PlanTensor, ...]


class PluginPart(_Part):
    """A library of the folder that holds the operators of a plan; its size and hash are in `files`."""

    file: str
    registers_itself: bool
    """True: for plain dlopen (Triton); False: for TensorRT's load_library."""
    operators: tuple[str, ...]
    """Each as namespace::name::version."""


class WeightPart(_Part):
    """Where one weight lies in weights.bin: C order, no gaps, aligned to 256 bytes."""

    name: str
    dtype: Literal["float32", "float16", "bfloat16", "int8"]
    shape: tuple[int, ...]
    offset: int
    bytes: int


class TensorRtPart(_Part):
    """What only an engine for TensorRT says."""

    family: TrtFamily
    library_version: str
    """Version of the builder; enterprise plans run in exactly this one."""
    activations: Literal["float32", "float16", "bfloat16"]
    """Type of activations and of the cache."""
    max_batch: int
    max_context: int
    """Most slots of the cache, and most tokens of a prefill."""
    chunk: int
    """Most tokens that the decode plan takes at once."""
    compute_capabilities: tuple[str, ...]
    """Such as "8.6", sorted."""
    portable_above: str | None
    """Cards of this compute capability and newer ones run the plan too; None: only the listed ones."""
    plans: dict[Literal["prefill", "decode"], PlanPart]
    plugins: tuple[PluginPart, ...]
    weights: tuple[WeightPart, ...]


class PassPart(_Part):
    """What one graph pass did when the engine was compiled."""

    name: str
    counts: dict[str, int]
    refusals: tuple[str, ...] = ()
    """Why it left things alone."""


class EngineManifest(_Part):
    """The whole of engine.json."""

    schema_version: int = SCHEMA
    producer: dict[str, str]
    """Versions of shadowc and of the tools that made the folder."""
    target: TargetName
    weights: WeightsName
    ops: dict[str, int]
    """Operator domain -> version that the graph needs."""
    model: ModelPart
    sparsity: SparsityPart | None
    """None: a dense engine."""
    bytes_per_token: BytesPart
    exact_prompts: bool = False
    """Target cpu: the graphs compute prompts and int4 tokens with all digits (`shadowc compile --exact-prompts`)."""
    parity: dict[str, object]
    """How the numbers were checked; `on_device` is False where no engine ran, only its graph."""
    build_key: str
    """Hash of everything that decided the bytes; equal keys mean equal folders (plans excepted)."""
    files: dict[str, FileEntry]
    """Every file of the folder except engine.json."""
    tensorrt: TensorRtPart | None = None
    """None: target cpu."""
    passes: dict[str, tuple[PassPart, ...]] = Field(default_factory=dict)
    """Graph -> the passes that made it, in order; empty: not recorded."""


def needed_files(manifest: EngineManifest) -> tuple[str, ...]:
    """The files that an engine of this target cannot do without."""
    part = manifest.tensorrt
    if part is None:
        fixed = (FIXED_FILE,) if manifest.sparsity is not None and manifest.sparsity.mask == "sequence" else ()
        return MODEL_FILE, REFERENCE_FILE, WEIGHTS_FILE, *fixed
    plans = [name for plan in part.plans.values() for name in (plan.file, plan.onnx)]
    return WEIGHTS_FILE, *plans, *(plugin.file for plugin in part.plugins)
