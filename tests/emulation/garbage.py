# SPDX-License-Identifier: Apache-2.0
"""Runs the kernels on random bits, as TensorRT's autotuning does: positions, masks, densities, activations, weights.

Results mean nothing; what counts is that nothing outside the operands is read or written. Run as a program under
AddressSanitizer (see build.asan_environment): `python -m tests.emulation.garbage LIBRARY SEEDS`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from tests.emulation.library import CODES, Kernels

TYPES = [dtype for dtype in CODES if dtype != np.int8]
SPECIAL = np.array([0, 1, 2, 11, 12, 13, -1, 2**31 - 1, 2**31, -(2**31) - 1, 2**63 - 1, -(2**63)], np.int64)


def bits(rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype | type) -> np.ndarray:
    """Any bit pattern."""
    dtype = np.dtype(dtype)
    return np.frombuffer(rng.bytes(int(np.prod(shape)) * dtype.itemsize), dtype).reshape(shape)


def positions(rng: np.random.Generator, count: int) -> np.ndarray:
    """Random bits, or values at which something might turn over."""
    return np.where(rng.random(count) < 0.3, bits(rng, (count,), np.int64), rng.choice(SPECIAL, count))


def select(kernels: Kernels, rng: np.random.Generator) -> None:
    B, Z, L, N = (int(rng.integers(1, most)) for most in (4, 3, 5, 300))
    scores, density = bits(rng, (B, Z, L, N), np.float32), bits(rng, (int(rng.choice([1, B])),), np.float32)
    for scope in ("local", "global"):
        exempt = [int(i) for i in rng.choice([-1, 0, 2, 63, 64, 2**31 - 1, -(2**31)], 3)]
        kernels.select(scores, density, scope=scope, exempt=exempt, min_active=int(rng.integers(-3, 400)))


def ffn(kernels: Kernels, rng: np.random.Generator, act: np.dtype, weight: np.dtype) -> None:
    B, S = int(rng.integers(1, 5)), int(rng.integers(1, 20))
    E, F, block = int(rng.choice([7, 48, 160, 272])), int(rng.integers(1, 90)), int(rng.choice([1, 3, 16, 1000]))
    Z, MB, L = int(rng.integers(0, S + 1)), int(rng.choice([1, B])), 2
    kernels.ffn(
        bits(rng, (B, S, E), act), bits(rng, (MB, Z, L, -(-F // block)), np.float32), bits(rng, (MB, Z, L), np.float32),
        bits(rng, (F, E), weight), bits(rng, (F, E), weight), bits(rng, (F, 2), np.float32),
        bits(rng, (F,), np.float32), bits(rng, (E,), np.float32),
        layer=int(rng.integers(L)), block=block, skip_zeros=int(rng.integers(2)),
    )  # fmt: skip


def attention(kernels: Kernels, rng: np.random.Generator, act: np.dtype, weight: np.dtype) -> None:
    B, S, T = int(rng.integers(1, 4)), int(rng.integers(1, 20)), int(rng.choice([12, 30, 300]))
    H, D, L = int(rng.integers(1, 4)), int(rng.choice([5, 16, 64, 80, 128])), 2
    E, Z, MB = H * D, int(rng.integers(0, S + 1)), int(rng.choice([1, B]))
    kernels.attention(
        bits(rng, (B, S, E), act), bits(rng, (MB, Z, L, H), np.float32), bits(rng, (MB, Z, L), np.float32),
        *(bits(rng, (E, E), weight) for _ in range(4)), bits(rng, (H, 4, D), np.float32),
        bits(rng, (H, 3, D), np.float32), bits(rng, (E,), np.float32), bits(rng, (B, H, T, D), act),
        bits(rng, (B, H, T, D), act), positions(rng, B), positions(rng, B),
        layer=int(rng.integers(L)), kv=str(rng.choice(["all", "active"])), in_place=bool(rng.integers(2)),
    )  # fmt: skip


def run(kernels: Kernels, seeds: range) -> None:
    """Each operator in each type, once per seed."""
    for seed in seeds:
        rng = np.random.default_rng(seed)
        select(kernels, rng)
        for act in TYPES:
            for weight in (act, np.dtype(np.int8)):
                ffn(kernels, rng, act, weight)
                attention(kernels, rng, act, weight)


if __name__ == "__main__":
    run(Kernels(Path(sys.argv[1])), range(int(sys.argv[2])))
    print("nothing was touched that should not be")
