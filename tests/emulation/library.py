# SPDX-License-Identifier: Apache-2.0
"""The kernels' C interface (plugins/cuda/kernels.h) over numpy arrays, on emulated device memory.

Every array is copied into an allocation of exactly its size, so that what lies beside it is found out: by guard bytes
after each call, or by AddressSanitizer.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from pathlib import Path

import ml_dtypes
import numpy as np

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
CODES = {np.dtype(np.float32): 0, np.dtype(np.float16): 1, BFLOAT16: 2, np.dtype(np.int8): 3}
_P, _I = ctypes.c_void_p, ctypes.c_int


class Mask(ctypes.Structure):
    _fields_ = [("scores", _P), ("threshold", _P), ("batch", _I), ("tail", _I), ("layers", _I), ("units", _I),
                ("layer", _I)]  # fmt: skip


class Select(ctypes.Structure):
    _fields_ = [("batch", _I), ("tail", _I), ("layers", _I), ("units", _I), ("global_", _I), ("min_active", _I),
                ("density_batch", _I), ("exempt_count", _I), ("exempt", ctypes.POINTER(_I)), ("scores", _P),
                ("density", _P), ("threshold", _P), ("active", _P)]  # fmt: skip


class Ffn(ctypes.Structure):
    _fields_ = [("act", _I), ("weight", _I), ("batch", _I), ("tokens", _I), ("hidden", _I), ("neurons", _I),
                ("block", _I), ("skip_zeros", _I), ("mask", Mask), ("x", _P), ("w1", _P), ("w2t", _P), ("scales", _P),
                ("b1", _P), ("b2", _P), ("y", _P), ("read", _P)]  # fmt: skip


class Attention(ctypes.Structure):
    _fields_ = [("act", _I), ("weight", _I), ("batch", _I), ("tokens", _I), ("hidden", _I), ("heads", _I),
                ("head_size", _I), ("capacity", _I), ("kv_active", _I), ("mask", Mask), ("x", _P), ("wq", _P),
                ("wk", _P), ("wv", _P), ("wot", _P), ("scales", _P), ("bqkv", _P), ("bo", _P), ("past_key", _P),
                ("past_value", _P), ("present_key", _P), ("present_value", _P), ("start", _P), ("past", _P), ("y", _P),
                ("context", _P), ("read", _P)]  # fmt: skip


class KernelError(Exception):
    """A call was refused or went wrong."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class DeviceMemory:
    """Allocations of one call; leaving it checks that nothing around them was written."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._held: list[tuple[int, int]] = []

    def __enter__(self) -> DeviceMemory:
        return self

    def __exit__(self, failed: object, *_: object) -> None:
        whole = [self._library.shadowc_emulation_release(address, size) for address, size in self._held]
        assert failed or all(whole), "a kernel wrote beyond an allocation"

    def allocate(self, size: int) -> int:
        address = self._library.shadowc_emulation_allocate(size)
        self._held.append((address, size))
        return address

    def put(self, array: np.ndarray) -> int:
        """Address of a copy of the array."""
        address, dense = self.allocate(array.nbytes), np.ascontiguousarray(array)
        ctypes.memmove(address, dense.ctypes.data, dense.nbytes)
        return address

    def get(self, address: int, shape: Iterable[int], dtype: np.dtype) -> np.ndarray:
        array = np.empty(tuple(shape), dtype)
        ctypes.memmove(array.ctypes.data, address, array.nbytes)
        return array


class Kernels:
    """One built library."""

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        library.shadowc_emulation_allocate.restype = _P
        library.shadowc_emulation_allocate.argtypes = [ctypes.c_size_t]
        library.shadowc_emulation_release.argtypes = [_P, ctypes.c_size_t]
        library.shadowc_error_text.restype = ctypes.c_char_p
        for name in ("select", "ffn", "attention"):
            getattr(library, f"shadowc_{name}_workspace").restype = ctypes.c_size_t
            getattr(library, f"shadowc_{name}_enqueue").argtypes = [_P, _P, _P]
        self.library = library

    def order(self, seed: int) -> None:
        """0: threads run in their order; other seeds give other orders."""
        self.library.shadowc_emulation_order(ctypes.c_uint(seed))

    def layout(self) -> list[int]:
        sizes = (ctypes.c_size_t * 8)()
        self.library.shadowc_emulation_layout(sizes)
        return list(sizes)

    def check(self, arguments: ctypes.Structure) -> int:
        """The status of the check function for these sizes."""
        return getattr(self.library, f"shadowc_{_name(arguments)}_check")(ctypes.byref(arguments))

    def workspace(self, arguments: ctypes.Structure) -> int:
        return getattr(self.library, f"shadowc_{_name(arguments)}_workspace")(ctypes.byref(arguments))

    def text(self, status: int) -> str:
        return self.library.shadowc_error_text(status).decode()

    def enqueue(self, arguments: ctypes.Structure, memory: DeviceMemory) -> None:
        """Run, in a workspace of the size that was asked for.

        Raises:
            KernelError: with the status and its text.
        """
        workspace = memory.allocate(self.workspace(arguments))
        status = getattr(self.library, f"shadowc_{_name(arguments)}_enqueue")(
            ctypes.byref(arguments), ctypes.c_void_p(workspace), None
        )
        if status:
            raise KernelError(status, self.text(status))

    # ---- the operators, with the operands that they have for TensorRT (shadowc/spec/ops.py)

    def select(
        self,
        scores: np.ndarray,
        density: np.ndarray,
        *,
        scope: str = "local",
        exempt: Iterable[int] = (-1,),
        min_active: int = 0,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Threshold [B,Z,L] and active [B,Z,L]."""
        batch, tail, layers, units = scores.shape
        listed = list(exempt)
        with DeviceMemory(self.library) as memory:
            arguments = Select(
                batch, tail, layers, units, scope == "global", min_active, len(density), len(listed),
                (_I * len(listed))(*listed), memory.put(scores), memory.put(density),
                memory.allocate(batch * tail * layers * 4), memory.allocate(batch * tail * layers * 4),
            )  # fmt: skip
            self.enqueue(arguments, memory)
            shape = (batch, tail, layers)
            threshold = memory.get(arguments.threshold, shape, np.dtype(np.float32))
            return threshold, memory.get(arguments.active, shape, np.dtype(np.int32))

    def ffn(
        self, x, scores, threshold, w1, w2t, scales, b1, b2, *, layer=0, block=1, skip_zeros=0
    ) -> tuple[np.ndarray, tuple[int, int]]:
        """Y and read; `x` gives the activation type, `w1` [F,E] the weight type."""
        batch, tokens, hidden = x.shape
        with DeviceMemory(self.library) as memory:
            arguments = Ffn(
                CODES[x.dtype], CODES[w1.dtype], batch, tokens, hidden, len(w1), block, skip_zeros,
                _mask(memory, scores, threshold, layer), memory.put(x), memory.put(w1), memory.put(w2t),
                memory.put(scales), memory.put(b1), memory.put(b2), memory.allocate(x.nbytes), memory.allocate(16),
            )  # fmt: skip
            self.enqueue(arguments, memory)
            return memory.get(arguments.y, x.shape, x.dtype), _read(memory, arguments.read)

    def attention(
        self, x, scores, threshold, wq, wk, wv, wot, scales, bqkv, bo, past_key, past_value, start, past,
        *, layer=0, kv="all", in_place=False,
    ) -> tuple[dict[str, np.ndarray], tuple[int, int]]:  # fmt: skip
        """Outputs by name, and read; `x` gives the activation type, `wq` [H*D,E] the weight type."""
        batch, tokens, hidden = x.shape
        heads, _, head_size = scales.shape
        with DeviceMemory(self.library) as memory:
            cache = [memory.put(past_key), memory.put(past_value)]
            present = cache if in_place else [memory.allocate(past_key.nbytes) for _ in cache]
            arguments = Attention(
                CODES[x.dtype], CODES[wq.dtype], batch, tokens, hidden, heads, head_size, past_key.shape[2],
                kv == "active", _mask(memory, scores, threshold, layer), memory.put(x),
                *map(memory.put, (wq, wk, wv, wot)), memory.put(scales), memory.put(bqkv), memory.put(bo),
                *cache, *present, memory.put(start), memory.put(past), memory.allocate(x.nbytes),
                memory.allocate(x.nbytes), memory.allocate(16),
            )  # fmt: skip
            self.enqueue(arguments, memory)
            outputs = {name: memory.get(getattr(arguments, name), x.shape, x.dtype) for name in ("y", "context")}
            for name in ("present_key", "present_value"):
                outputs[name] = memory.get(getattr(arguments, name), past_key.shape, past_key.dtype)
            return outputs, _read(memory, arguments.read)


def _name(arguments: ctypes.Structure) -> str:
    return type(arguments).__name__.lower()


def _mask(memory: DeviceMemory, scores: np.ndarray, threshold: np.ndarray, layer: int) -> Mask:
    batch, tail, layers, units = scores.shape
    return Mask(memory.put(scores), memory.put(threshold), batch, tail, layers, units, layer)


def _read(memory: DeviceMemory, address: int) -> tuple[int, int]:
    records, size = memory.get(address, (2,), np.dtype(np.int64))
    return int(records), int(size)
