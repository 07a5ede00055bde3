# SPDX-License-Identifier: Apache-2.0
"""Inputs and outputs of a plan as engine.json lists them, with the profile that the options allow.

All ranges are made from three numbers, one range for each letter, so that they fit together by construction:
TensorRT refuses profiles whose sizes cannot occur at once.

Letters: B batch, S new tokens, T slots of the cache.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from shadowc.spec.errors import InternalError
from shadowc.spec.manifest import PlanPart, PlanTensor

if TYPE_CHECKING:
    from shadowc.spec.program import Program

Plan = Literal["prefill", "decode"]
Range = tuple[int, int, int]
"""Smallest, best and largest size."""

CHUNK = 64
"""Most tokens that a decode plan takes at once: what the kernels' scratch memory is made for."""
USUAL_PROMPT = 256
"""Tokens of the prompt that the prefill plan is tuned for."""
_KINDS = {
    "input_ids": "token", "attention_mask": "token", "past": "state", "start": "state", "density_heads": "dial",
    "density_neurons": "dial", "logits": "logits", "active.heads": "count", "active.neurons": "count", "read": "count",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Sizes:
    """What an engine must be able to take."""

    max_batch: int
    max_context: int

    @property
    def chunk(self) -> int:
        """Most tokens of one decode call."""
        return min(CHUNK, self.max_context)

    def ranges(self, plan: Plan) -> dict[str, Range]:
        """The range of every letter in a plan."""
        batch = (1, 1, self.max_batch)
        if plan == "prefill":
            return {"B": batch, "S": (1, min(USUAL_PROMPT, self.max_context), self.max_context)}
        slots = (min(USUAL_PROMPT, self.max_context), self.max_context, self.max_context)
        return {"B": batch, "S": (1, 1, self.chunk), "T": slots}


def describe(program: Program, plan: Plan, sizes: Sizes) -> PlanPart:
    """The table of a plan.

    Args:
        program: its final graph.
        plan: which of the two it is.
        sizes: limits of the profile.
    """
    ranges = sizes.ranges(plan)
    inputs = tuple(_tensor(value, program.weights, ranges, is_input=True) for value in program.graph.inputs)
    outputs = tuple(_tensor(value, program.weights, ranges, is_input=False) for value in program.graph.outputs)
    part = PlanPart(file=f"{plan}.plan", onnx=f"{plan}.onnx", inputs=inputs, outputs=outputs)
    check_profile(part)
    return part


def check_profile(part: PlanPart) -> None:
    """Refuse ranges that are upside down, incomplete, or that no call could satisfy at once.

    Raises:
        InternalError: naming the tensor.
    """
    given = {tensor.name: tensor for tensor in part.inputs}
    for tensor in part.inputs:
        ranges = (tensor.smallest, tensor.best, tensor.largest)
        if -1 not in tensor.shape:
            continue
        if any(sizes is None or len(sizes) != len(tensor.shape) for sizes in ranges):
            raise InternalError(f"{part.file}: {tensor.name} has no complete profile")
        for axis, size in enumerate(tensor.shape):
            low, best, high = (sizes[axis] for sizes in ranges if sizes is not None)
            if not 1 <= low <= best <= high or (size != -1 and not low == best == high == size):
                raise InternalError(f"{part.file}: {tensor.name} may have {low} to {high} at axis {axis}, best {best}")
    for tensor in part.outputs:
        if tensor.alias_of and given[tensor.alias_of].shape != tensor.shape:
            raise InternalError(f"{part.file}: {tensor.name} and {tensor.alias_of} share memory, not their shape")
    batches = {tensor.largest[0] for tensor in part.inputs if tensor.largest and tensor.shape[0] == -1}
    if len(batches) > 1:
        raise InternalError(f"{part.file}: the batch ends at {sorted(batches)}, depending on the input")


def _tensor(value: Any, weights: Iterable[str], ranges: Mapping[str, Range], *, is_input: bool) -> PlanTensor:
    letters = [size if isinstance(size, int) else str(size)[:1] for size in value.shape]
    shape = tuple(size if isinstance(size, int) else -1 for size in letters)
    kind: Any = "weight" if value.name in weights else _KINDS.get(value.name)
    if kind is None:
        if not value.name.startswith(("past_key_values.", "present.")):
            raise InternalError(f"{value.name} is of no known kind")
        kind = "cache"
    profile: dict[str, tuple[int, ...]] = {}
    dtype: Any = str(value.dtype)
    if is_input and -1 in shape:
        for position, name in enumerate(("smallest", "best", "largest")):
            profile[name] = tuple(size if isinstance(size, int) else ranges[size][position] for size in letters)
    aliased = not is_input and kind == "cache" and "T" in letters
    alias_of = value.name.replace("present.", "past_key_values.") if aliased else ""
    return PlanTensor(name=value.name, kind=kind, dtype=dtype, shape=shape, alias_of=alias_of, **profile)
