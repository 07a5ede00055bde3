# SPDX-License-Identifier: Apache-2.0
"""MatMulRows as machine code: rows of x times all rows of an int8 matrix.

Letters: B batch, S tokens, E inner dimension, N rows of the matrix.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shadowc.spec.ops import MATMUL_ROWS
from tests.plugins import kernels


def operands(rng, *, B=1, S=1, E=64, N=100):
    w, scales = kernels.weights(rng, (N, E), "int8")
    return {"x": rng.standard_normal((B, S, E), dtype=np.float32), "w": w, "scales": scales}


def run(arrays, **more):
    return kernels.run(MATMUL_ROWS, arrays, **more)["y"]


def expected(arrays):
    """The products in float64."""
    return (arrays["x"].astype(np.float64) @ arrays["w"].T.astype(np.float64) * arrays["scales"]).astype(np.float32)


def assert_as_defined(arrays):
    kernels.assert_close(run(arrays), expected(arrays))


@settings(max_examples=60, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    B=st.integers(0, 3),
    S=st.sampled_from([0, 1, 1, 2, 5, 16, 40]),
    E=st.integers(1, 300),
    N=st.integers(0, 300),
)
def test_it_equals_its_definition(seed, B, S, E, N):
    assert_as_defined(operands(np.random.default_rng(seed), B=B, S=S, E=E, N=N))


@pytest.mark.parametrize(("B", "S"), [(1, 1), (3, 1), (2, 70)])
def test_it_equals_its_nodes_in_stock_onnx_runtime(B, S):
    arrays = operands(np.random.default_rng(3), B=B, S=S, E=96, N=200)
    kernels.assert_close(run(arrays), run(arrays, kernel=False))


@pytest.mark.parametrize(("B", "S"), [(1, 1), (4, 1), (2, 40), (1, 300)])
def test_it_equals_its_definition_when_threads_share_the_work(B, S):
    assert_as_defined(operands(np.random.default_rng(4), B=B, S=S, E=2048, N=3001))


@pytest.mark.parametrize("S", [2, 9, 31, 270])
def test_a_row_depends_neither_on_threads_nor_on_what_other_rows_hold(S):
    arrays = operands(np.random.default_rng(5), S=S, E=700, N=999)
    whole = run(arrays)
    np.testing.assert_array_equal(run(arrays, threads=1), whole)
    others = arrays | {"x": arrays["x"] * np.linspace(1, 9, S, dtype=np.float32)[None, :, None]}
    np.testing.assert_array_equal(run(others)[0, 0], whole[0, 0])


@pytest.mark.parametrize("E", [700, 2048])
def test_few_rows_have_the_bits_that_each_has_alone(E):
    arrays = operands(np.random.default_rng(5), B=3, E=E, N=999)
    whole = run(arrays)
    for b in range(3):
        np.testing.assert_array_equal(run(arrays | {"x": arrays["x"][b : b + 1]})[0], whole[b])


@pytest.mark.parametrize("S", [1, 3, 40])
@pytest.mark.parametrize("what", [np.nan, np.inf, 1e34, 1e-41])
def test_a_row_that_has_no_digits_is_summed_in_floats_alone(S, what):
    arrays = operands(np.random.default_rng(6), S=S, E=512, N=300)
    arrays["w"][arrays["w"] == 0] = 1  # infinity times 0 would be NaN
    broken = arrays | {"x": arrays["x"].copy()}
    broken["x"][0, S // 2] = 0.0
    broken["x"][0, S // 2, 7] = what
    found, others = run(broken)[0], np.arange(S) != S // 2
    np.testing.assert_array_equal(found[others], run(arrays)[0, others])
    with np.errstate(invalid="ignore"):
        np.testing.assert_allclose(found[S // 2], expected(broken)[0, S // 2], rtol=1e-5)


@pytest.mark.parametrize("E", [65536, 70000, 140000])
@pytest.mark.parametrize("weight", [-127, 127])
def test_no_sum_of_the_widest_rows_leaves_its_integers(E, weight):
    """All products alike and as large as they get; a sum that wrapped would have another sign."""
    for S in (1, 2, 40):
        w = np.full((20, E), weight, np.int8)
        arrays = {"x": np.ones((1, S, E), np.float32), "w": w, "scales": np.full(20, 0.5, np.float32)}
        np.testing.assert_allclose(run(arrays), np.full((1, S, 20), 0.5 * weight * E), rtol=1e-5)


def test_activations_keep_their_digits():
    """A product that rounded them to 8 bits would be off by its 254th part."""
    arrays = operands(np.random.default_rng(7), E=2048, N=500)
    found, wanted = run(arrays), expected(arrays)
    assert np.abs(found - wanted).max() < 1e-6 * np.abs(wanted).max()
    step = np.abs(arrays["x"]).max() / 127
    rounded = expected(arrays | {"x": (np.rint(arrays["x"] / step) * step).astype(np.float32)})
    assert np.abs(rounded - wanted).max() > 1e-3 * np.abs(wanted).max()
