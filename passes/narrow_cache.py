# SPDX-License-Identifier: Apache-2.0
"""Makes the cache of keys and values float16, for engines whose weights are not float32.

Only the operators read and write it, and they compute in float32 with whatever type it has.
"""

from __future__ import annotations

import numpy as np

from shadowc.passes.finalise import cache_names, require_operators
from shadowc.spec.errors import InternalError
from shadowc.spec.program import PassReport, Program

NAME = "narrow_cache"
_HALF = np.dtype(np.float16)


def apply(program: Program) -> PassReport:
    """Change the element type of all cache tensors, in place."""
    requires(program)
    tensors = program.graph.tensors()
    wide = [tensors[name] for name in _cache(program) if tensors[name].dtype != _HALF]
    for tensor in wide:
        tensor.dtype = _HALF
    ensures(program)
    return PassReport(NAME, {"tensors": len(wide)})


def requires(program: Program) -> None:
    """Both sparsify passes have run: standard operators would want one type everywhere."""
    require_operators(program, NAME)


def ensures(program: Program) -> None:
    """Past and present of every layer are float16."""
    tensors = program.graph.tensors()
    for name in _cache(program):
        if tensors[name].dtype != _HALF:
            raise InternalError(f"{NAME}: {name} is {tensors[name].dtype}")


def _cache(program: Program) -> list[str]:
    return [name for side in ("past_key_values", "present") for name in cache_names(program, side)]
