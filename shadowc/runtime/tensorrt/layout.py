# SPDX-License-Identifier: Apache-2.0
"""Sizes, offsets and strides of every buffer, computed from engine.json: pure functions, no device.

Letters: B rows, S tokens, T slots of the cache, H heads, D head size, L layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod

from shadowc.runtime.tensorrt.device import Sizes
from shadowc.spec.errors import InputError, InternalError, VerificationError
from shadowc.spec.manifest import PlanPart, PlanTensor, TensorRtPart

ALIGNMENT = 256
"""TensorRT wants every address aligned to so many bytes."""
STEP_SLOTS = 256
"""The cache grows in steps of so many slots, so that few capacities, and few captured graphs, occur."""
ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1, "int32": 4, "int64": 8}
_TOKEN_AXIS, _SLOT_AXIS = 1, 2
_INPUT_KINDS = ("token", "state", "dial", "cache")
_WRITTEN = {
    "prefill": {"input_ids", "attention_mask"},
    "decode": {"input_ids", "past", "start", "density_heads", "density_neurons"},
}
"""What the host knows to write into a plan's inputs."""


@dataclass(frozen=True, slots=True)
class Run:
    """What one run of a plan is about: rows, new tokens, and slots of the cache that it is given or makes."""

    rows: int
    tokens: int
    slots: int


@dataclass(frozen=True, slots=True)
class Place:
    """One tensor inside a block of memory."""

    dtype: str
    sizes: Sizes
    offset: int

    @property
    def bytes(self) -> int:
        """What it takes."""
        return prod(self.sizes) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class RowCopy:
    """Fresh keys or values [B,H,S,D] into the first S slots of a cache [B,H,T,D]: one strided copy, in bytes."""

    to_pitch: int
    source_pitch: int
    width: int
    rows: int


def sizes_of(tensor: PlanTensor, run: Run) -> Sizes:
    """The shape of a tensor in a run.

    Raises:
        InputError: the request lies outside the profile of an input; says input, given and allowed.
    """
    if tensor.kind == "weight":
        return tensor.shape
    sizes = list(tensor.shape)
    asked = {0: run.rows}
    if len(sizes) > 1:
        axis, size = (_SLOT_AXIS, run.slots) if tensor.kind == "cache" else (_TOKEN_AXIS, run.tokens)
        asked[axis] = size
    for axis, size in asked.items():
        if sizes[axis] < 0 or tensor.kind in _INPUT_KINDS:  # what a plan fixes of its outputs no request decides
            sizes[axis] = size
    _check_profile(tensor, sizes)
    return tuple(sizes)


def _check_profile(tensor: PlanTensor, sizes: Sequence[int]) -> None:
    lowest, highest = tensor.smallest or tensor.shape, tensor.largest or tensor.shape
    for axis, (given, low, high) in enumerate(zip(sizes, lowest, highest, strict=True)):
        if (low >= 0 and given < low) or (high >= 0 and given > high):
            allowed = str(low) if low == high else f"{low} to {high}"
            what, flag = ("rows", "--max-batch") if axis == 0 else ("tokens", "--max-context")
            raise InputError(
                f"{given} {what} given, this engine takes {allowed} (axis {axis} of input {tensor.name})",
                hint=f"compile it again with {flag} {given}, or give fewer",
            )


def pack(tensors: Iterable[PlanTensor], run: Run) -> tuple[dict[str, Place], int]:
    """Lay tensors one behind the other, each aligned; returns the places and the bytes of the block."""
    places: dict[str, Place] = {}
    end = 0
    for tensor in tensors:
        place = Place(tensor.dtype, sizes_of(tensor, run), end)
        places[tensor.name] = place
        end = aligned(end + place.bytes)
    return places, end


def aligned(size: int) -> int:
    """The next multiple of the alignment."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def exchanged(plan: PlanPart) -> tuple[list[PlanTensor], list[PlanTensor]]:
    """Inputs that the host writes before each run, and outputs that it reads behind it."""
    return (
        [tensor for tensor in plan.inputs if tensor.kind in ("token", "state", "dial")],
        [tensor for tensor in plan.outputs if tensor.kind in ("logits", "count")],
    )


def caches(plan: PlanPart) -> list[PlanTensor]:
    """Outputs that hold keys and values."""
    return [tensor for tensor in plan.outputs if tensor.kind == "cache"]


def capacity(part: TensorRtPart, slots: int) -> int:
    """Slots of a cache that must hold `slots`: a few sizes only, inside the decode plan's profile.

    Raises:
        InputError: more than the engine was built for.
    """
    if slots > part.max_context:
        raise InputError(
            f"{slots} tokens given, this engine takes 1 to {part.max_context}",
            hint=f"compile it again with --max-context {slots}, or give fewer",
        )
    inputs = {tensor.name: tensor for tensor in part.plans["decode"].inputs}
    first = next(inputs[tensor.alias_of] for tensor in caches(part.plans["decode"]))
    lowest = max(first.smallest[_SLOT_AXIS] if first.smallest else 1, 1)
    return min(max(-(-slots // STEP_SLOTS) * STEP_SLOTS, lowest), part.max_context)


def row_copy(dtype: str, fresh: Sizes, cache: Sizes) -> RowCopy:
    """How fresh keys or values get into the cache.

    Raises:
        InternalError: the two do not belong together, or the cache is too short.
    """
    B, H, S, D = fresh
    if cache[:2] != (B, H) or cache[3] != D or cache[2] < S:
        raise InternalError(f"keys {list(fresh)} do not fit into a cache {list(cache)}")
    row = D * ITEM_BYTES[dtype]
    return RowCopy(to_pitch=cache[2] * row, source_pitch=S * row, width=S * row, rows=B * H)


def contradictions(part: TensorRtPart, weights_bytes: int) -> list[str]:
    """What engine.json says that cannot be: weights outside their file, inputs without one, aliases of nothing."""
    found: list[str] = []
    weights = {weight.name: weight for weight in part.weights}
    for weight in part.weights:
        size = prod(weight.shape) * ITEM_BYTES[weight.dtype]
        if weight.bytes != size or weight.offset % ALIGNMENT or not 0 <= weight.offset <= weights_bytes - size:
            found.append(f"weight {weight.name} cannot lie at byte {weight.offset} of {weights_bytes}")
    for name, plan in part.plans.items():
        inputs = {tensor.name: tensor for tensor in plan.inputs}
        for tensor in plan.inputs:
            stored = weights.get(tensor.name)
            if tensor.kind == "weight" and (
                stored is None or (stored.dtype, stored.shape) != (tensor.dtype, tensor.shape)
            ):
                found.append(f"the {name} plan takes a weight {tensor.name} that the table does not have in this form")
        unknown = [tensor.name for tensor in exchanged(plan)[0] if tensor.name not in _WRITTEN[name]]
        found += [f"nobody knows what to write into input {tensor} of the {name} plan" for tensor in unknown]
        if "logits" not in {tensor.name for tensor in plan.outputs}:
            found.append(f"the {name} plan has no output logits")
        for tensor in plan.outputs:
            source = inputs.get(tensor.alias_of)
            if tensor.alias_of and (source is None or source.shape != tensor.shape or source.dtype != tensor.dtype):
                found.append(f"output {tensor.name} of the {name} plan shares the memory of no input like it")
    if not any(tensor.alias_of for tensor in caches(part.plans["decode"])):
        found.append("the decode plan does not update the cache in place")
    fresh, kept = (
        [(tensor.name, tensor.dtype) for tensor in caches(part.plans[name])] for name in ("prefill", "decode")
    )
    if fresh != kept:
        found.append("the two plans do not have the same caches")
    return found


def require_consistent(part: TensorRtPart, weights_bytes: int, where: str) -> None:
    """Refuse an engine.json that contradicts itself.

    Raises:
        VerificationError: with all contradictions.
    """
    found = contradictions(part, weights_bytes)
    if found:
        raise VerificationError(
            f"{where} contradicts itself: {found[0]}", hint="compile the engine again", problems=tuple(found)
        )
