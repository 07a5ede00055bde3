# SPDX-License-Identifier: Apache-2.0
"""The checkpoint as the engine rounds it: the weights that the torch side of parity uses.

Written from the parameters' names, not from the packing code, so that a mistake in the packing
(two heads swapped, a wrong transpose) shows up as a difference.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    from shadowc.spec.program import TensorSource

INT8_LIMIT = 127.0
_PER_ROW = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "fc1.weight")
_PER_COLUMN = ("out_proj.weight", "fc2.weight")


def round_to_int8(matrix: npt.NDArray[np.float32], axis: int) -> npt.NDArray[np.float32]:
    """Symmetric int8 rounding and back, one scale max|w| / 127 per slice along `axis`; same shape, float32."""
    scale = np.abs(matrix).max(axis=axis, keepdims=True) / np.float32(INT8_LIMIT)
    scale[scale == 0] = 1
    steps = np.rint(matrix / scale)
    np.clip(steps, -INT8_LIMIT, INT8_LIMIT, out=steps)
    return np.asarray(steps * scale, dtype=np.float32)


@dataclass(frozen=True, slots=True)
class DequantisedSource:
    """A TensorSource whose matrices carry the rounding of int8 weights.

    Args:
        source: the checkpoint's tensors.
        head_block: quantisation block of the LM head along its input; 0: the head is not quantised.
    """

    source: TensorSource
    head_block: int

    def names(self) -> tuple[str, ...]:
        """The names of the checkpoint."""
        return self.source.names()

    def tensor(self, name: str) -> npt.NDArray[np.float32]:
        """One float32 tensor after rounding to int8 and back; tensors that stay float pass through."""
        value = self.source.tensor(name)
        if name.endswith(_PER_ROW):
            return round_to_int8(value, axis=1)
        if name.endswith(_PER_COLUMN):
            return round_to_int8(value, axis=0)
        if name == "lm_head.weight" and self.head_block:
            rows, width = value.shape
            blocks = value.reshape(rows, width // self.head_block, self.head_block)
            return round_to_int8(blocks, axis=2).reshape(rows, width)
        return value
