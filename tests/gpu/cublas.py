# SPDX-License-Identifier: Apache-2.0
"""Dense fp16 products through cuBLAS: what the sparse kernels are held against."""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Iterator
from pathlib import Path

_P, _I = ctypes.c_void_p, ctypes.c_int
_HALF, _COMPUTE_32F, _DEFAULT, _TRANSPOSED, _PLAIN = 2, 68, -1, 1, 0
"""CUDA_R_16F, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT, CUBLAS_OP_T, CUBLAS_OP_N."""
WORKSPACE_BYTES = 1 << 25
"""Given once: cuBLAS must not allocate while a graph is captured."""


class Cublas:
    """A handle on one stream.

    Args:
        stream: of the products.
        workspace: device memory of WORKSPACE_BYTES.

    Raises:
        OSError: there is no cuBLAS.
    """

    def __init__(self, stream: int, workspace: int) -> None:
        self._library = _load()
        handle = _P()
        self._check(self._library.cublasCreate_v2(ctypes.byref(handle)))
        self._handle = handle
        self._check(self._library.cublasSetStream_v2(handle, _P(stream)))
        self._check(self._library.cublasSetWorkspace_v2(handle, _P(workspace), ctypes.c_size_t(WORKSPACE_BYTES)))

    def product(self, y: int, x: int, w: int, batch: int, rows: int, columns: int) -> None:
        """y [batch, rows] = x [batch, columns] times w [rows, columns] transposed; fp16, sums in float32."""
        one, zero = ctypes.c_float(1), ctypes.c_float(0)
        self._check(
            self._library.cublasGemmEx(
                self._handle, _TRANSPOSED, _PLAIN, rows, batch, columns, ctypes.byref(one), _P(w), _HALF, columns,
                _P(x), _HALF, columns, ctypes.byref(zero), _P(y), _HALF, rows, _COMPUTE_32F, _DEFAULT,
            )
        )  # fmt: skip

    def scores(self, y: int, q: int, keys: int, heads: int, filled: int, capacity: int, head_size: int) -> None:
        """y [heads, capacity] = keys [heads, capacity, head_size] times q [heads, head_size], of filled slots."""
        self._heads(_TRANSPOSED, (y, capacity), keys, (q, head_size), heads, filled, capacity, head_size)

    def context(self, y: int, p: int, values: int, heads: int, filled: int, capacity: int, head_size: int) -> None:
        """y [heads, head_size] = p [heads, capacity] times values [heads, capacity, head_size], of filled slots."""
        self._heads(_PLAIN, (y, head_size), values, (p, capacity), heads, filled, capacity, head_size)

    def _heads(self, transposed: int, y: tuple[int, int], cache: int, x: tuple[int, int], heads: int, filled: int,
               capacity: int, head_size: int) -> None:  # fmt: skip
        """One column per head; x and y with their strides. Padded strides keep 16-byte loads possible."""
        one, zero, wide = ctypes.c_float(1), ctypes.c_float(0), ctypes.c_longlong
        m, k = (filled, head_size) if transposed else (head_size, filled)
        self._check(
            self._library.cublasGemmStridedBatchedEx(
                self._handle, transposed, _PLAIN, m, 1, k, ctypes.byref(one), _P(cache), _HALF, head_size,
                wide(capacity * head_size), _P(x[0]), _HALF, x[1], wide(x[1]), ctypes.byref(zero), _P(y[0]), _HALF,
                y[1], wide(y[1]), heads, _COMPUTE_32F, _DEFAULT,
            )
        )  # fmt: skip

    @staticmethod
    def _check(status: int) -> None:
        if status:
            raise RuntimeError(f"cuBLAS status {status}")


def _load() -> ctypes.CDLL:
    failed = []
    for path in _candidates():
        try:
            return ctypes.CDLL(path)
        except OSError as error:
            failed.append(str(error))
    raise OSError(f"no cuBLAS: {'; '.join(failed)}")


def _candidates() -> Iterator[str]:
    spec = importlib.util.find_spec("nvidia")
    for root in spec.submodule_search_locations or () if spec is not None else ():
        for folder in ("cu13/lib", "cublas/lib"):
            yield from map(str, sorted((Path(root) / folder).glob("libcublas.so.*"), reverse=True))
    yield from ("libcublas.so.13", "libcublas.so.12", "/usr/local/cuda/lib64/libcublas.so")
