# SPDX-License-Identifier: Apache-2.0
"""Seeded random weights of a model's true shape, for latency work without a download.

Every tensor depends on the seed, its name and its shape only: not on the order of reading, the number of
threads, or the machine. Values are uniform with standard deviation 0.02 (16 random bits each, which Philox
gives four at a time; cheaper than a normal distribution and as good for timing) and symmetric around zero,
so that ReLU leaves about half of the neurons at zero. Norm weights lie around 1.
"""

from __future__ import annotations

import hashlib
import math
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from shadowc.checkpoint.facts import ModelFacts, layout_of

STD = 0.02
SCHEME = 1
"""Raise it when the same seed gives other values than before."""

_BLOCK = 1 << 18
_LEVEL = STD * math.sqrt(12.0) / 65536.0
_THREADS = min(2, os.cpu_count() or 1)


def seeded_uniform(seed: int, name: str, shape: tuple[int, ...], centre: float = 0.0) -> npt.NDArray[np.float32]:
    """Uniform float32 numbers around `centre`, decided by seed, name and size alone."""
    flat = np.empty(math.prod(shape), np.float32)

    def fill(block: int) -> None:
        part = flat[block * _BLOCK : (block + 1) * _BLOCK]
        key = hashlib.sha256(f"{SCHEME}/{seed}/{name}/{block}".encode()).digest()[:16]
        # Philox's raw stream is fixed for all times, the methods of Generator are not.
        raw = np.random.Philox(key=int.from_bytes(key, "little")).random_raw(-(-part.size // 4))
        levels = raw.astype("<u8", copy=False).view("<i2")[: part.size]
        np.multiply(levels, np.float32(_LEVEL), out=part, dtype=np.float32, casting="unsafe")
        part += np.float32(centre + _LEVEL / 2)

    blocks = range(-(-flat.size // _BLOCK))
    if len(blocks) < 2:
        for block in blocks:
            fill(block)
    else:
        with ThreadPoolExecutor(_THREADS) as pool:
            list(pool.map(fill, blocks))
    return flat.reshape(shape)


class DummyWeights:
    """A TensorSource of seeded random weights, made when they are read."""

    def __init__(self, facts: ModelFacts, seed: int) -> None:
        self._layout = layout_of(facts)
        self._seed = seed

    def names(self) -> tuple[str, ...]:
        """All tensor names, sorted, with the tied head."""
        return tuple(sorted({*self._layout.shapes, self._layout.head}))

    def tensor(self, name: str) -> npt.NDArray[np.float32]:
        """One tensor; raises KeyError for a name that the model does not have."""
        name = self._layout.embedding if self._layout.tied and name == self._layout.head else name
        centre = 1.0 if name.endswith("norm.weight") else 0.0
        return seeded_uniform(self._seed, name, self._layout.shapes[name], centre)
