# SPDX-License-Identifier: Apache-2.0
"""The arguments of cuBLAS mean the products that are compared: a stand-in computes by them, column by column."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.gpu import cublas as module
from tests.gpu.cublas import Cublas

HEADS, FILLED, CAPACITY, D = 3, 5, 8, 4


def matrix(address: Any, rows: int, columns: int, leading: int) -> np.ndarray:
    """A view of a matrix that lies column by column."""
    assert leading >= rows
    half = (ctypes.c_uint16 * (leading * (columns - 1) + rows)).from_address(address)
    return np.lib.stride_tricks.as_strided(
        np.ctypeslib.as_array(half).view(np.float16), (rows, columns), (2, 2 * leading)
    )


def strided_batched(handle, op_a, op_b, m, n, k, alpha, a, type_a, lda, stride_a, b, type_b, ldb, stride_b, beta, c,
                    type_c, ldc, stride_c, count, compute, algorithm):  # fmt: skip
    """cublasGemmStridedBatchedEx, as its documentation orders the arguments."""
    assert (type_a, type_b, type_c, op_b, compute, algorithm) == (2, 2, 2, 0, 68, -1)
    assert (alpha._obj.value, beta._obj.value) == (1.0, 0.0)
    for i in range(count):
        shape = (k, m) if op_a else (m, k)
        left = matrix(a.value + 2 * i * stride_a.value, *shape, lda)
        right = matrix(b.value + 2 * i * stride_b.value, k, n, ldb)
        matrix(c.value + 2 * i * stride_c.value, m, n, ldc)[:] = (left.T if op_a else left) @ right
    return 0


def single(handle, op_a, op_b, m, n, k, alpha, a, type_a, lda, b, type_b, ldb, beta, c, type_c, ldc, *how):
    """cublasGemmEx."""
    zero = ctypes.c_longlong(0)
    return strided_batched(
        handle, op_a, op_b, m, n, k, alpha, a, type_a, lda, zero, b, type_b, ldb, zero, beta, c, type_c, ldc, zero, 1,
        *how,
    )  # fmt: skip


@pytest.fixture
def cublas(monkeypatch: pytest.MonkeyPatch) -> Cublas:
    def accept(*_: Any) -> int:
        return 0

    library = SimpleNamespace(
        cublasCreate_v2=accept, cublasSetStream_v2=accept, cublasSetWorkspace_v2=accept, cublasGemmEx=single,
        cublasGemmStridedBatchedEx=strided_batched,
    )  # fmt: skip
    monkeypatch.setattr(module, "_load", lambda: library)
    return Cublas(0, 0)


def small(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(-3, 4, shape).astype(np.float16)


def test_a_product_is_x_times_w_transposed(cublas: Cublas) -> None:
    x, w, y = small(2, 6), small(4, 6), np.zeros((2, 4), np.float16)
    cublas.product(y.ctypes.data, x.ctypes.data, w.ctypes.data, 2, 4, 6)
    np.testing.assert_array_equal(y, x @ w.T)


def test_scores_are_those_of_filled_keys_with_each_heads_query(cublas: Cublas) -> None:
    q, keys, y = small(HEADS, D), small(HEADS, CAPACITY, D), np.full((HEADS, CAPACITY), 99, np.float16)
    cublas.scores(y.ctypes.data, q.ctypes.data, keys.ctypes.data, HEADS, FILLED, CAPACITY, D)
    np.testing.assert_array_equal(y[:, :FILLED], np.einsum("hpd,hd->hp", keys[:, :FILLED], q))
    assert (y[:, FILLED:] == 99).all()


def test_the_context_sums_filled_values_by_their_weights(cublas: Cublas) -> None:
    p, values, y = small(HEADS, CAPACITY), small(HEADS, CAPACITY, D), np.zeros((HEADS, D), np.float16)
    cublas.context(y.ctypes.data, p.ctypes.data, values.ctypes.data, HEADS, FILLED, CAPACITY, D)
    np.testing.assert_array_equal(y, np.einsum("hp,hpd->hd", p[:, :FILLED], values[:, :FILLED]))
