# SPDX-License-Identifier: Apache-2.0
"""The key/value cache of one batch: fixed capacity, updated in place, enlarged in steps where nobody knows the end.

Letters: B batch, H heads, T capacity in slots, D head size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from shadowc.runtime.weights_memory import LARGE_PAGE, private_memory
from shadowc.spec.errors import InputError, InternalError

if TYPE_CHECKING:
    from shadowc.runtime.session import Binding

STEP_SLOTS = 256
FEW_SLOTS = 16
"""Room whose end is known is made in multiples of these."""
MOST_LARGE = 512 << 20
"""Bytes of keys and values up to which they lie in large pages."""
Floats = npt.NDArray[np.floating[Any]]


def paged_zeros(shape: tuple[int, ...], dtype: npt.DTypeLike = np.float32) -> Floats:
    """Zeros that take memory as they are written.

    Not in large pages: the first token, which writes a slot of every head, would commit nearly all of a cache.
    """
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return private_memory(size, large=False).view(dtype).reshape(shape)


def large_zeros(count: int, shape: tuple[int, ...], dtype: npt.DTypeLike) -> list[Floats]:
    """Buffers of zeros, one behind the other in large pages, all committed when their first slots are written.

    A token writes one slot of every head. In small pages these lie in a page each, 1,536 of OPT-1.3B, and each waits
    for its page's address, which comes from memory too and cannot be fetched ahead.
    """
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    apart = -(-size // 64) * 64
    memory = private_memory(count * apart)
    return [memory[at : at + size].view(dtype).reshape(shape) for at in range(0, count * apart, apart)]


class KvCache:
    """Keys and values of all layers, bound to a session as past and present.

    Args:
        layers: number of layers.
        shape: (B, H, D).
        limit: the largest capacity in slots.
        likely: slots that will be filled if nothing ends early. In place, room for them is made at once, for to grow is
            to copy; a graph of standard operators computes with all the room there is.
        dtype: float32 or float16, as the graph has it.
        in_place: one buffer is both past and present, which the kernels allow. False: two buffers take turns, for
            graphs of standard operators.
    """

    def __init__(
        self,
        layers: int,
        shape: tuple[int, int, int],
        limit: int,
        *,
        likely: int = 0,
        dtype: npt.DTypeLike = np.float32,
        in_place: bool = True,
    ) -> None:
        self.capacity = 0
        self.filled = 0
        self._names = [f"{layer}.{part}" for layer in range(layers) for part in ("key", "value")]
        self._shape = shape
        self._limit = limit
        self._likely = likely if in_place else 0
        self._dtype = np.dtype(dtype)
        self._in_place = in_place
        self._past: dict[str, Floats] = {}
        self._present: dict[str, Floats] = {}

    def reserve(self, slots: int) -> bool:
        """Make room for `slots` slots, keeping what is filled; True if the buffers changed and must be bound again.

        Raises:
            InternalError: more slots than the limit (callers check the context first).
            InputError: the system has no memory for them.
        """
        if slots <= self.capacity:
            return False
        if slots > self._limit:
            raise InternalError(f"cache of {slots} slots asked for, the context has {self._limit}")
        try:
            self._enlarge(slots)
        except OSError:  # the system refuses address space for what may never be filled
            self._likely = 0
            self._enlarge_or_refuse(slots)
        return True

    def _enlarge_or_refuse(self, slots: int) -> None:
        try:
            self._enlarge(slots)
        except OSError as error:
            B, H, D = self._shape
            buffers = len(self._names) * (1 if self._in_place else 2)
            size = buffers * B * H * self._capacity_of(slots) * D * self._dtype.itemsize
            raise InputError(
                f"keys and values of {slots:,} tokens, batch {B}, take {size / 1e6:,.1f} MB, and the system does not "
                "give so much",
                hint="give fewer prompts at once, or fewer tokens",
            ) from error

    def _enlarge(self, slots: int) -> None:
        capacity = self._capacity_of(slots)
        room = self._room(capacity)
        present = room if self._in_place else self._room(capacity)
        self._present = {}
        for name in list(self._past):  # one by one, so that not all are there twice
            room[name][:, :, : self.filled] = self._past.pop(name)[:, :, : self.filled]
        self._past, self._present, self.capacity = room, present, capacity

    def _room(self, capacity: int) -> dict[str, Floats]:
        B, H, D = self._shape
        shape = (B, H, capacity, D)
        size = len(self._names) * int(np.prod(shape)) * self._dtype.itemsize
        if self._in_place and LARGE_PAGE <= size <= MOST_LARGE:
            return dict(zip(self._names, large_zeros(len(self._names), shape, self._dtype), strict=True))
        return {name: paged_zeros(shape, self._dtype) for name in self._names}

    def _capacity_of(self, slots: int) -> int:
        least, step = (self._likely, FEW_SLOTS) if slots <= self._likely else (slots, STEP_SLOTS)
        return min(-(-least // step) * step, self._limit)

    def reorder(self, rows_B: npt.NDArray[np.integer[Any]]) -> None:
        """Let row b hold what row rows_B[b] holds now; the buffers stay where they are."""
        moved_B = np.flatnonzero(rows_B != np.arange(len(rows_B)))
        if moved_B.size:
            for past in self._past.values():
                past[moved_B, :, : self.filled] = past[rows_B[moved_B], :, : self.filled]

    def slots(self, start: int) -> dict[str, Floats]:
        """A copy of what is filled from slot `start` on, `{layer}.key` and `{layer}.value` [B,slots,H,D]."""
        return {name: past[:, :, start : self.filled].swapaxes(1, 2).copy() for name, past in self._past.items()}

    def bind(self, binding: Binding, layers: int | None = None) -> None:
        """Bind the buffers of the first `layers` layers (None: of all) as past inputs and present outputs."""
        for name in self._names[: None if layers is None else 2 * layers]:
            binding.give(f"past_key_values.{name}", self._past[name])
            binding.take(f"present.{name}", self._present[name])

    def advance(self, tokens: int) -> bool:
        """Count new tokens after a run; True if past and present changed places and must be bound again."""
        self.filled += tokens
        if self._in_place:
            return False
        self._past, self._present = self._present, self._past
        return True
