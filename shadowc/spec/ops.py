# SPDX-License-Identifier: Apache-2.0
"""The operators, specified once: names, operands, attributes, types and shapes.

The ONNX functions (oracle.py), the C++ registration, the docs table and the test cases derive from
this table or are checked against it.

Letters: B batch, S new tokens, Z sparse tail (the last Z of the S tokens are masked, Z <= S),
T cache capacity, E hidden, H heads, D head size, F neurons, N units of a kind per layer
(H, or ceil(F / block)) or rows of a matrix, L predicted layers, P predictor width, K columns of a table. A shape entry
"B|1" broadcasts over the batch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

DOMAIN = "shadowc"
VERSION = 1

Role = Literal["always", "kernel"]


@dataclass(frozen=True, slots=True)
class Operand:
    """One input or output: shape letters and ONNX element types (lower case)."""

    name: str
    shape: tuple[str, ...]
    types: tuple[str, ...]
    meaning: str
    role: Role = "always"
    """"kernel": only machine code produces it, the ONNX function does not."""
    packed: tuple[str, ...] = ()
    """Shape where weights are int4; empty: the same."""


@dataclass(frozen=True, slots=True)
class Attribute:
    """One node attribute with its default."""

    name: str
    kind: Literal["int", "ints", "float", "string"]
    default: int | tuple[int, ...] | float | str
    meaning: str
    choices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Extension:
    """What the machine code for the CPU may take besides, all of it or nothing.

    No function knows it: `oracle.attach` writes it in standard nodes around the operator.
    """

    promise: str
    inputs: tuple[Operand, ...]
    """Behind those of the operator."""
    attributes: tuple[Attribute, ...]


@dataclass(frozen=True, slots=True)
class OpSpec:
    """One operator of domain `shadowc`."""

    name: str
    promise: str
    inputs: tuple[Operand, ...]
    outputs: tuple[Operand, ...]
    attributes: tuple[Attribute, ...]
    norm: Extension | None = None
    """The layer norm in front of it and the residual around both."""
    rounding: Attribute | None = None
    """How the machine code for the CPU may compute prompts; `oracle.attach` leaves it out."""


_F32 = ("float32",)
_I32 = ("int32",)
_I64 = ("int64",)
_CACHE = ("float32", "float16")
WEIGHT_TYPES = ("float32", "bfloat16", "int8", "uint8")
"""Types of records on the CPU; uint8 holds pairs of int4."""
NETWORK_TYPES = ("float32", "int8")
"""Types of a predictor's weights where one operator computes it."""
INT4_GROUP = 64
"""Values of a row that share a scale. A value q in -7..7 is stored as q + 8; byte j of the 32 of a group holds value j
in its low half and value j + 32 in its high half."""

_SCORES = Operand(
    "scores", ("B|1", "Z", "L", "N"), _F32, "score of every unit of every predicted layer, for the last Z tokens"
)
_THRESHOLD = Operand("threshold", ("B|1", "Z", "L"), _F32, "a unit is active unless score < threshold")
_SCALES = "factor per record row, of int4 per group; ones for float weights"
_ROW_SCALES = "factor per row; ones for float weights"
_LAYER = Attribute("layer", "int", 0, "which of the L rows of scores and threshold belongs to this node")
_NORM = Extension(
    promise="`x` is then the residual stream, and `y` is `x` plus what the operator makes of LayerNorm(`x`).",
    inputs=(
        Operand("norm_scale", ("E",), _F32, "weight of the layer norm in front"),
        Operand("norm_bias", ("E",), _F32, "its bias"),
    ),
    attributes=(Attribute("epsilon", "float", 1e-5, "added to the variance, float32"),),
)
FEW_DIGITS = "few_digits"
_ROUNDING = Attribute(
    FEW_DIGITS,
    "int",
    0,
    "whether activations may be rounded: 0 not at all; 1 freely in calls with unmasked tokens, and to 8 bits, in steps "
    "of each group of int4, in any call that meets int4 row by row; 2 finely in calls with unmasked tokens; 3 freely "
    "in calls with unmasked tokens",
)
_READ = Operand(
    "read",
    ("2",),
    _I64,
    "records and bytes of w and scales really read; exact but where both few_digits and skip_zeros hold",
    role="kernel",
)

SELECT_THRESHOLD = OpSpec(
    name="SelectThreshold",
    promise="Turns scores and a density into one threshold per token and layer.",
    inputs=(
        Operand("scores", ("B", "Z", "L", "N"), _F32, "score of every unit; NaN ranks highest"),
        Operand("density", ("B|1",), _F32, "share of units to keep, clamped to 0..1; NaN means 1"),
    ),
    outputs=(
        Operand("threshold", ("B", "Z", "L"), _F32, "+inf keeps nothing, -inf keeps all"),
        Operand("active", ("B", "Z", "L"), _I32, "number of active units"),
    ),
    attributes=(
        Attribute(
            "scope",
            "string",
            "local",
            "rank within each layer, or over all layers that are not exempt",
            ("local", "global"),
        ),
        Attribute("exempt", "ints", (-1,), "layers (indices into L) that stay dense; -1 stands for none"),
        Attribute("min_active", "int", 0, "units that every layer keeps at least"),
    ),
)

SPARSE_ATTENTION = OpSpec(
    name="SparseAttention",
    promise="Self-attention with a fixed-capacity cache that computes the active heads only.",
    inputs=(
        Operand("x", ("B", "S", "E"), _F32, "normalised hidden states"),
        _SCORES,
        _THRESHOLD,
        Operand(
            "w",
            ("H", "4", "D", "E"),
            WEIGHT_TYPES,
            "head records: q, k, v rows, then out_proj columns transposed",
            packed=("H", "4", "D", "E/2"),
        ),
        Operand("scales", ("H", "4", "D"), _F32, _SCALES, packed=("H", "4", "D", f"E/{INT4_GROUP}")),
        Operand("bqkv", ("H", "3", "D"), _F32, "biases of q, k, v"),
        Operand("bo", ("E",), _F32, "bias of out_proj; stays even if no head is active"),
        Operand("past_key", ("B", "H", "T", "D"), _CACHE, "cache before this call"),
        Operand("past_value", ("B", "H", "T", "D"), _CACHE, "cache before this call"),
        Operand("start", ("B",), _I64, "first slot that holds a real token (left padding)"),
        Operand("past", ("B",), _I64, "slots filled before this call"),
    ),
    outputs=(
        Operand("y", ("B", "S", "E"), _F32, "block output, bias included"),
        Operand("present_key", ("B", "H", "T", "D"), _CACHE, "cache after this call; may share the memory of past_key"),
        Operand(
            "present_value", ("B", "H", "T", "D"), _CACHE, "cache after this call; may share the memory of past_value"
        ),
        Operand("context", ("B", "S", "E"), _F32, "attention context before out_proj; zero for inactive heads"),
        _READ,
    ),
    attributes=(
        _LAYER,
        Attribute(
            "kv",
            "string",
            "all",
            "write K/V of every head, or of active heads only (legal for a fixed mask)",
            ("all", "active"),
        ),
    ),
    norm=_NORM,
    rounding=_ROUNDING,
)

SPARSE_FFN = OpSpec(
    name="SparseFFN",
    promise="fc2(relu(fc1(x))) over the active blocks of neurons.",
    inputs=(
        Operand("x", ("B", "S", "E"), _F32, "normalised hidden states"),
        _SCORES,
        _THRESHOLD,
        Operand(
            "w", ("F", "2", "E"), WEIGHT_TYPES, "neuron records: fc1 row, then fc2 column", packed=("F", "2", "E/2")
        ),
        Operand("scales", ("F", "2"), _F32, _SCALES, packed=("F", "2", f"E/{INT4_GROUP}")),
        Operand("b1", ("F",), _F32, "bias of fc1"),
        Operand("b2", ("E",), _F32, "bias of fc2; with nothing active it is the result"),
    ),
    outputs=(Operand("y", ("B", "S", "E"), _F32, "block output, bias included"), _READ),
    attributes=(
        _LAYER,
        Attribute("block", "int", 1, "neurons per unit; the last block may be short"),
        Attribute("skip_zeros", "int", 0, "1: do not read the fc2 half of a neuron whose ReLU output is 0 (exact)"),
    ),
    norm=_NORM,
    rounding=_ROUNDING,
)

OPS = (SELECT_THRESHOLD, SPARSE_ATTENTION, SPARSE_FFN)
"""What an engine needs on every target."""

PREDICT_UNITS = OpSpec(
    name="PredictUnits",
    promise="Scores one layer's units by a network of its own, and selects them: standard nodes and SelectThreshold, "
    "in one call.",
    inputs=(
        Operand("x", ("B", "S", "E"), _F32, "what the network reads; S >= 1"),
        Operand("tail", ("1",), _I64, "Z, 0 to S"),
        Operand("density", ("B|1", "K"), _F32, "densities or thresholds, one of the K belongs to this layer"),
        Operand("w1", ("P", "E"), NETWORK_TYPES, "rows of the first product"),
        Operand("scales1", ("P",), _F32, _ROW_SCALES),
        Operand("b1", ("P",), _F32, "bias of the first product"),
        Operand(
            "w2",
            ("N", "P"),
            NETWORK_TYPES,
            "rows of the second product, of the type of w1; int8: four weights of 16 rows at a time, "
            "[N/16, P/4, 16, 4], N and P rounded up with zeros",
        ),
        Operand("scales2", ("N",), _F32, _ROW_SCALES),
        Operand("b2", ("N",), _F32, "bias of the second product"),
    ),
    outputs=(
        Operand("scores", ("B", "Z", "1", "N"), _F32, "score of every unit of the layer, for the last Z tokens"),
        Operand("threshold", ("B", "Z", "1"), _F32, "a unit is active unless score < threshold"),
        Operand("active", ("B", "Z", "1"), _I32, "number of active units"),
        Operand("last_scores", ("B", "1", "1", "N"), _F32, "scores of the last token, whatever Z is"),
    ),
    attributes=(
        Attribute("column", "int", 0, "which of the K belongs to this layer"),
        Attribute("select", "string", "density", "what `density` holds", ("density", "threshold")),
        Attribute("relu", "int", 0, "1: ReLU between the products"),
        Attribute("exempt", "int", 0, "1: the layer stays dense; with densities only"),
        Attribute("min_active", "int", 0, "units that are kept at least; with densities only"),
    ),
    norm=replace(_NORM, promise="the network then reads LayerNorm(`x`)."),
)

MATMUL_ROWS = OpSpec(
    name="MatMulRows",
    promise="x times all rows of an int8 matrix (LM head, predictor of all layers); activations are not rounded.",
    inputs=(
        Operand("x", ("B", "S", "E"), _F32, "what is multiplied"),
        Operand("w", ("N", "E"), ("int8",), "rows of the matrix"),
        Operand("scales", ("N",), _F32, "factor per row"),
    ),
    outputs=(Operand("y", ("B", "S", "N"), _F32, "x times the transposed matrix"),),
    attributes=(),
)

CPU_OPS = (*OPS, PREDICT_UNITS, MATMUL_ROWS)
"""What the compiled library for the CPU has."""

CHAIN = "Chain"
"""Several of them one behind the other, and operators of ONNX, which that library has besides; no stored graph has one,
see `runtime/chains.py`."""
NEXT_TOKEN = "NextToken"
"""A step that only chains have: the ids of the largest logits."""

ACTIVATION_TYPES = ("float32", "float16", "bfloat16")
"""Types of x, y, context and K/V on TensorRT; matrices have the same type, or int8."""
_SPLIT = {
    SPARSE_FFN.name: (
        Operand("w1", ("F", "E"), (*ACTIVATION_TYPES, "int8"), "rows of fc1"),
        Operand("w2t", ("F", "E"), (*ACTIVATION_TYPES, "int8"), "columns of fc2, as rows"),
    ),
    SPARSE_ATTENTION.name: tuple(
        Operand(name, ("H*D", "E"), (*ACTIVATION_TYPES, "int8"), meaning)
        for name, meaning in (
            ("wq", "rows of q_proj"),
            ("wk", "rows of k_proj"),
            ("wv", "rows of v_proj"),
            ("wot", "columns of out_proj, as rows"),
        )
    ),
}
_NARROW = ("x", "past_key", "past_value")


def tensorrt_inputs(spec: OpSpec) -> tuple[Operand, ...]:
    """The inputs of an operator's TensorRT plugin: the record tensor split into its matrices, 16-bit activations."""
    inputs: list[Operand] = []
    for operand in spec.inputs:
        if operand.name == "w":
            inputs += _SPLIT[spec.name]
        else:
            types = ACTIVATION_TYPES if operand.name in _NARROW else operand.types
            inputs.append(replace(operand, types=types, packed=()))
    return tuple(inputs)
