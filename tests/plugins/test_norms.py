# SPDX-License-Identifier: Apache-2.0
"""Operators that take the layer norm in front and the residual around them: x + operator(LayerNorm(x))."""

from __future__ import annotations

import numpy as np
import pytest

from shadowc.spec.ops import SPARSE_ATTENTION, SPARSE_FFN
from tests.plugins import kernels, numpy_reference, test_sparse_attention, test_sparse_ffn

WEIGHTS = kernels.WEIGHTS
NORM = ("norm_scale", "norm_bias")
ROWS = pytest.mark.parametrize(("B", "S"), [(1, 1), (3, 1), (1, 40), (2, 70)])


def ffn(seed=0, **sizes):
    sizes = {"F": 900, "E": 320, "norm": True} | sizes
    return SPARSE_FFN, test_sparse_ffn.operands(np.random.default_rng(seed), **sizes)


def attention(seed=0, **sizes):
    sizes = {"H": 4, "D": 64, "T": 100, "norm": True} | sizes
    return SPARSE_ATTENTION, test_sparse_attention.operands(np.random.default_rng(seed), **sizes)


OPERATORS = pytest.mark.parametrize("operands", [ffn, attention])


def run(spec, arrays, **attributes):
    return kernels.run(spec, arrays, **attributes)["y"]


def expected(spec, arrays, **attributes):
    reference = numpy_reference.sparse_ffn if spec is SPARSE_FFN else numpy_reference.sparse_attention
    return reference(**arrays, **attributes)[0]


def without_norm(arrays):
    return {name: array for name, array in arrays.items() if name not in NORM}


@OPERATORS
@ROWS
@pytest.mark.parametrize("dtype", WEIGHTS)
def test_norm_with_scale_0_is_its_bias_and_the_residual_is_added_to_the_last_bit(operands, dtype, B, S):
    spec, arrays = operands(B=B, S=S, Z=S, dtype=dtype)
    arrays["norm_scale"][:] = 0
    bias = np.broadcast_to(arrays["norm_bias"], arrays["x"].shape).copy()
    found = run(spec, arrays)
    np.testing.assert_array_equal(found, arrays["x"] + run(spec, without_norm(arrays) | {"x": bias}))


@OPERATORS
@pytest.mark.parametrize("S", [1, 3, 40])
def test_norm_of_rows_far_from_zero_keeps_their_differences(operands, S):
    spec, arrays = operands(S=S, Z=S)
    arrays["x"] = arrays["x"] + np.float32(1000)
    # float32 keeps 6e-5 of a value near 1000, and its mean less: a variance from squares would be off by 0.1
    found, exact = run(spec, arrays), expected(spec, arrays)
    kernels.assert_close(found - arrays["x"], exact - arrays["x"], 1e-3)


@OPERATORS
@pytest.mark.parametrize("S", [1, 3, 40])
@pytest.mark.parametrize("epsilon", [1e-5, 0.75])
def test_epsilon_is_the_one_of_the_node_and_equal_values_are_normalised_to_the_bias(operands, epsilon, S):
    spec, arrays = operands(S=S, Z=S)
    arrays["x"][:, -1] = 2.0
    kernels.assert_close(run(spec, arrays, epsilon=epsilon), expected(spec, arrays, epsilon=epsilon))


@OPERATORS
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])  # sums of int4 depend on who shares a tile
def test_a_row_has_the_same_bits_whatever_its_neighbours_are(operands, dtype):
    spec, arrays = operands(B=7, dtype=dtype)  # more would be panels with AMX
    rows = ("x", "scores", "threshold", "past_key", "past_value", "start", "past")
    together = run(spec, arrays)
    for first, same in ((5, np.testing.assert_array_equal), (6, kernels.assert_close)):
        some = {name: array[first:] if name in rows else array for name, array in arrays.items()}
        same(run(spec, some)[-1], together[-1])


@OPERATORS
@ROWS
def test_bits_are_the_same_at_any_number_of_threads(operands, B, S):
    spec, arrays = operands(B=B, S=S, Z=S, dtype="int8")
    first = run(spec, arrays, threads=1)
    for threads in (2, 2, 3):
        np.testing.assert_array_equal(run(spec, arrays, threads=threads), first)


@ROWS
@pytest.mark.parametrize("dtype", WEIGHTS)
def test_skip_zeros_changes_no_bit(B, S, dtype):
    spec, arrays = ffn(B=B, S=S, Z=S, dtype=dtype)
    arrays["b1"] -= 2
    np.testing.assert_array_equal(run(spec, arrays, skip_zeros=1), run(spec, arrays, skip_zeros=0))


@OPERATORS
def test_calls_after_each_other_do_not_keep_a_row(operands):
    """Threads keep what they made of the row of a call; the next call has another."""
    spec, arrays = operands()
    for seed in range(20):
        arrays["x"] = np.random.default_rng(seed).standard_normal(arrays["x"].shape, dtype=np.float32)
        kernels.assert_close(run(spec, arrays), expected(spec, arrays))


@OPERATORS
@pytest.mark.parametrize("S", [1, 4, 40])
def test_nan_stays_in_its_row(operands, S):
    spec, arrays = operands(S=S, Z=0)
    arrays["x"][0, S - 1, 7] = np.nan
    y = run(spec, arrays)
    assert np.isnan(y[0, S - 1]).all()
    assert np.isfinite(y[0, : S - 1]).all()


@OPERATORS
def test_with_nothing_active_the_result_is_residual_and_bias(operands):
    spec, arrays = operands()
    arrays["threshold"][:] = np.inf
    bias = arrays["b2" if spec is SPARSE_FFN else "bo"]
    np.testing.assert_array_equal(run(spec, arrays), arrays["x"] + bias)


@OPERATORS
def test_operator_refuses_a_norm_that_does_not_fit(operands):
    spec, arrays = operands()
    with pytest.raises(Exception, match=r"norm_scale must be \[E\] = .*, found"):
        run(spec, arrays | {"norm_scale": arrays["norm_scale"][:-1]})
    del arrays["norm_bias"]
    with pytest.raises(Exception, match="norm_bias must be given, as norm_scale is, found nothing"):
        run(spec, arrays)


def test_a_kernel_that_forgets_the_residual_would_be_found():
    spec, arrays = ffn()
    found = run(spec, arrays) - arrays["x"]
    with pytest.raises(AssertionError):
        kernels.assert_close(found, expected(spec, arrays))
