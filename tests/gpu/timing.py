# SPDX-License-Identifier: Apache-2.0
"""Times of single kernels on the device: many launches over many copies of the weights, replayed as one graph.

One layer's weights would stay in the cache of the device from launch to launch, and the launches themselves cost more
on the host than a kernel takes. So the copies together exceed the cache, and a graph holds all launches.

Letters: B batch, S tokens (1), E hidden, F neurons, H heads, D head size, T cache capacity, L layers, N units.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import ceil
from statistics import median
from typing import Any, Protocol

import numpy as np

from shadowc.runtime.tensorrt.device import Address, Arena, Device
from tests.emulation.library import CODES, Attention, Ffn, Mask, Select

HALF = np.dtype(np.float16)
BLOCK = 16
"""Neurons per unit, as compile makes them by default."""
CACHE_BYTES = 1 << 28
"""Copies of the weights take at least so much together: above the cache of every card so far."""
MOST_COPIES = 64
FILLED = 512
"""Tokens in the cache when a decode step is timed."""
CAPACITY = 1024


@dataclass(frozen=True, slots=True)
class Shape:
    """One layer of a model."""

    model: str
    hidden: int
    neurons: int
    heads: int
    layers: int

    @property
    def head_size(self) -> int:
        return self.hidden // self.heads


SHAPES = (
    Shape("opt-1.3b", 2048, 8192, 32, 24),
    Shape("opt-6.7b", 4096, 16384, 32, 32),
    Shape("opt-13b", 5120, 20480, 40, 40),
)


@dataclass(frozen=True, slots=True)
class Timed:
    """One launch, on average."""

    microseconds: float
    bytes: float
    """Weights and scales as the kernel counted them, keys and values of active heads; of dense layers weights, keys and
    values."""

    @property
    def gigabytes_per_second(self) -> float:
        return self.bytes / self.microseconds / 1e3


class Clock(Protocol):
    """A device that also keeps time, as `Cudart` does."""

    def event(self) -> Address: ...
    def milliseconds(self, first: Address, second: Address) -> float: ...


class Bench:
    """Times kernels.

    Args:
        device: the GPU; `stream`, `event` and `milliseconds` as `Cudart` has them.
        library: kernels, as tests/gpu/build.py makes them.
        rounds: replays of a graph, at least 2; the first one does not count, of the others the median does.
        cache_bytes: see CACHE_BYTES.
    """

    def __init__(self, device: Any, library: ctypes.CDLL, *, rounds: int = 9, cache_bytes: int = CACHE_BYTES) -> None:
        self.device: Device = device
        self._clock: Clock = device
        self._stream: int | None = getattr(device, "stream", None)
        self._library, self._rounds, self._cache_bytes = library, rounds, cache_bytes
        self._rng = np.random.default_rng(0)
        for name in ("select", "ffn", "attention"):
            getattr(library, f"shadowc_{name}_workspace").restype = ctypes.c_size_t
            getattr(library, f"shadowc_{name}_enqueue").argtypes = [ctypes.c_void_p] * 3
        library.shadowc_error_text.restype = ctypes.c_char_p

    # ---- what is timed

    def bandwidth(self, size: int = 1 << 30) -> float:
        """Bytes per second of copies on the device: read and written bytes together."""
        arena = Arena(self.device)
        to, source = arena.allocate(size), arena.allocate(size)
        timed = self._timed([lambda: self.device.copy_rows(to, size, source, size, size, 1)] * 4, 2 * size)
        arena.close()
        return timed.bytes / timed.microseconds * 1e6

    def ffn(self, shape: Shape, density: float, batch: int, *, int8: bool = False) -> Timed:
        """One SparseFFN of one new token per row."""
        arena, E, F = Arena(self.device), shape.hidden, shape.neurons
        weight = np.dtype(np.int8) if int8 else HALF
        per_copy = 2 * F * E * weight.itemsize
        scales, b1, b2 = self._ones(arena, 2 * F), self._zeros(arena, F * 4), self._zeros(arena, E * 4)
        x, y = self._normal(arena, (batch, E)), self._zeros(arena, batch * E * 2)
        calls, reads = [], []
        for _ in range(self._copies(per_copy)):
            w1, w2t = (self._weights(arena, F * E, weight) for _ in range(2))
            reads.append(arena.allocate(16))
            mask = self._mask(arena, batch, ceil(F / BLOCK), density)
            calls.append(
                Ffn(
                    CODES[HALF], CODES[weight], batch, 1, E, F, BLOCK, 0, mask, x, w1, w2t, scales, b1, b2, y, reads[-1]
                )
            )
        return self._run(arena, calls, reads)

    def attention(
        self, shape: Shape, density: float, batch: int, *, int8: bool = False, kv_active: bool = False
    ) -> Timed:
        """One SparseAttention of one new token per row over a filled cache, updated in place.

        Args:
            kv_active: new keys and values of active heads only, as a fixed mask allows; else of all heads.
        """
        arena, E, H, D = Arena(self.device), shape.hidden, shape.heads, shape.head_size
        weight = np.dtype(np.int8) if int8 else HALF
        scales, bqkv, bo = self._ones(arena, 4 * E), self._zeros(arena, 3 * E * 4), self._zeros(arena, E * 4)
        x, y, context = (self._normal(arena, (batch, E)) for _ in range(3))
        start = self._put(arena, np.zeros(batch, np.int64))
        past = self._put(arena, np.full(batch, FILLED, np.int64))
        cache_size = batch * H * CAPACITY * D * 2
        calls, reads = [], []
        for _ in range(self._copies(4 * E * E * weight.itemsize + 2 * cache_size)):
            matrices = [self._weights(arena, E * E, weight) for _ in range(4)]
            key, value = (self._weights(arena, batch * H * CAPACITY * D, HALF) for _ in range(2))
            reads.append(arena.allocate(16))
            mask = self._mask(arena, batch, H, density)
            calls.append(
                Attention(
                    CODES[HALF], CODES[weight], batch, 1, E, H, D, CAPACITY, int(kv_active), mask, x, *matrices, scales,
                    bqkv, bo, key, value, key, value, start, past, y, context, reads[-1],
                )
            )  # fmt: skip
        timed = self._run(arena, calls, reads)
        active = _wanted(density, H)  # of each row; a kernel counts records only
        return Timed(timed.microseconds, timed.bytes + batch * active * 2 * (FILLED + 1) * D * 2)

    def select(self, shape: Shape, units: int, density: float, batch: int) -> Timed:
        """One SelectThreshold over all predicted layers, ranked globally."""
        arena, L = Arena(self.device), shape.layers - 1
        scores = self._put(arena, self._rng.random((batch, 1, L, units), np.float32))
        dial = self._put(arena, np.full(batch, density, np.float32))
        out = [self._zeros(arena, batch * L * 4) for _ in range(2)]
        call = Select(batch, 1, L, units, 1, 0, batch, 0, None, scores, dial, *out)
        timed = self._run(arena, [call] * 16, [])
        return Timed(timed.microseconds, float(batch * L * units * 4))

    def dense_ffn(self, shape: Shape, batch: int, cublas: Any) -> Timed:
        """The dense fp16 products of an FFN."""
        arena, E, F = Arena(self.device), shape.hidden, shape.neurons
        x, y, size = self._normal(arena, (batch, F)), self._zeros(arena, batch * F * 2), 2 * E * F * 2
        works: list[Callable[[], None]] = []
        copies = self._copies(size)
        for _ in range(copies):
            w1, w2 = (self._weights(arena, F * E, HALF) for _ in range(2))
            works.append(partial(cublas.product, y, x, w1, batch, F, E))
            works.append(partial(cublas.product, y, x, w2, batch, E, F))
        return self._dense(arena, works, copies, size)

    def dense_attention(self, shape: Shape, batch: int, cublas: Any) -> Timed:
        """The dense fp16 products of an attention over the filled cache: q, k and v, scores, context, output.

        Nothing is added and there is no softmax, which favours the dense layer; the new key and value are not stored.
        """
        arena, E, H, D = Arena(self.device), shape.hidden, shape.heads, shape.head_size
        heads, slots = batch * H, FILLED + 1
        x, qkv = self._normal(arena, (batch, E)), self._zeros(arena, batch * 3 * E * 2)
        scores, context, y = (self._zeros(arena, count * 2) for count in (heads * CAPACITY, batch * E, batch * E))
        works: list[Callable[[], None]] = []
        copies = self._copies(4 * E * E * 2 + 2 * heads * CAPACITY * D * 2)
        for _ in range(copies):
            wqkv, wo = self._weights(arena, 3 * E * E, HALF), self._weights(arena, E * E, HALF)
            key, value = (self._weights(arena, heads * CAPACITY * D, HALF) for _ in range(2))
            works.append(partial(cublas.product, qkv, x, wqkv, batch, 3 * E, E))
            works.append(partial(cublas.scores, scores, qkv, key, heads, slots, CAPACITY, D))
            works.append(partial(cublas.context, context, scores, value, heads, slots, CAPACITY, D))
            works.append(partial(cublas.product, y, context, wo, batch, E, E))
        return self._dense(arena, works, copies, 4 * E * E * 2 + 2 * heads * slots * D * 2)

    # ---- how

    def _run(self, arena: Arena, calls: list[ctypes.Structure], reads: list[Address]) -> Timed:
        name = type(calls[0]).__name__.lower()
        workspace = arena.allocate(getattr(self._library, f"shadowc_{name}_workspace")(ctypes.byref(calls[0])))
        enqueue = getattr(self._library, f"shadowc_{name}_enqueue")

        def work(call: ctypes.Structure) -> Callable[[], None]:
            return lambda: self._check(enqueue(ctypes.byref(call), workspace, self._stream))

        timed = self._timed([work(call) for call in calls], 0)
        counted = [int(self._get(arena, address, 16).view(np.int64)[1]) for address in reads]
        arena.close()
        if any(count < 0 for count in counted):
            raise RuntimeError(f"{name}: a kernel reports dropped keys")
        return Timed(timed.microseconds, float(np.mean(counted)) if counted else 0.0)

    def _dense(self, arena: Arena, works: list[Callable[[], None]], copies: int, size: int) -> Timed:
        timed = self._timed(works, size)
        arena.close()
        return Timed(timed.microseconds * len(works) / copies, float(size))

    def _timed(self, works: list[Callable[[], None]], size: int) -> Timed:
        """Median over the rounds of the time of one piece of work."""
        for work in works:  # once plainly: lazy loading of code is no part of it
            work()
        self.device.synchronize()
        self.device.begin_capture()
        try:
            for work in works:
                work()
        finally:
            graph = self.device.end_capture()
        times = []
        for _ in range(self._rounds):
            before = self._clock.event()
            self.device.launch(graph)
            times.append(self._clock.milliseconds(before, self._clock.event()))
        self.device.release_graph(graph)
        return Timed(median(times[1:]) * 1e3 / len(works), float(size))  # the first replay brings the graph over

    def _copies(self, size: int) -> int:
        return min(max(ceil(self._cache_bytes / size), 1), MOST_COPIES)

    def _mask(self, arena: Arena, batch: int, units: int, density: float) -> Mask:
        """Exactly the wanted share of units, other ones for each row."""
        wanted = _wanted(density, units)
        scores = np.zeros((batch, 1, 1, units), np.float32)
        for row in scores.reshape(batch, units):
            row[self._rng.permutation(units)[:wanted]] = 1
        threshold = np.full((batch, 1, 1), 0.5, np.float32)
        return Mask(self._put(arena, scores), self._put(arena, threshold), batch, 1, 1, units, 0)

    def _weights(self, arena: Arena, count: int, dtype: np.dtype[Any]) -> Address:
        """Small random values: a pattern repeated, since making gigabytes of noise takes minutes."""
        tile = self._rng.integers(-127, 128, 1 << 16, dtype=np.int8)
        values = tile if dtype == np.int8 else (tile / np.float16(1024)).astype(dtype)
        return self._put(arena, np.resize(values, count))

    def _normal(self, arena: Arena, shape: tuple[int, ...]) -> Address:
        return self._put(arena, self._rng.standard_normal(shape).astype(HALF))

    def _ones(self, arena: Arena, count: int) -> Address:
        return self._put(arena, np.ones(count, np.float32))

    def _zeros(self, arena: Arena, size: int) -> Address:
        return self._put(arena, np.zeros(size, np.uint8))

    def _put(self, arena: Arena, array: np.ndarray) -> Address:
        address = arena.allocate(array.nbytes)
        staging = Arena(self.device)
        host, view = staging.pinned(array.nbytes)
        view[:] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        self.device.upload(address, host, array.nbytes)
        self.device.synchronize()
        staging.close()
        return address

    def _get(self, arena: Arena, address: Address, size: int) -> np.ndarray:
        host, view = arena.pinned(size)
        self.device.download(host, address, size)
        self.device.synchronize()
        return view

    def _check(self, status: int) -> None:
        if status:
            raise RuntimeError(self._library.shadowc_error_text(status).decode())


def _wanted(density: float, units: int) -> int:
    return int(density * units + 0.5)
