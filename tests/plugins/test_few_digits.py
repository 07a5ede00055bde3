# SPDX-License-Identifier: Apache-2.0
"""Prompts with int8 weights and rounded activations (`few_digits`): what is rounded, by how much, and what is not."""

from __future__ import annotations

import numpy as np
import pytest

from shadowc.runtime.library import OpLibrary
from shadowc.spec.ops import SPARSE_ATTENTION, SPARSE_FFN
from tests.plugins import kernels, numpy_reference
from tests.plugins.test_panels import attention_operands, ffn_operands, rounded_to

ISA = OpLibrary.installed().isa
MOST = {"avx2": 2047, "avx512": 2047, "avx512_icelake": 127, "avx512_zen4": 127}.get(ISA, 0)
"""What the largest value of a row becomes in one digit. Elsewhere products take three digits, or floats."""
COARSE = 127 / (MOST or 127)
"""A digit's error, of that of 8 bits."""
OF_ITS_ROUNDING = 1e-3 * COARSE
"""Hidden values that differ in their last bits round to neighbours: far less than one digit's own error of 1e-2."""

only_where_it_rounds = pytest.mark.skipif(not MOST, reason="activations are rounded with AVX2 or VNNI and without AMX")


def ffn(arrays, **attributes):
    return kernels.run(SPARSE_FFN, arrays, few_digits=1, **attributes)["y"]


def as_defined(arrays, most):
    """The FFN without masks, in float64, with activations as whole numbers up to `most`."""
    scales = arrays["scales"].astype(np.float64)
    fc1, fc2 = np.moveaxis(arrays["w"].astype(np.float64), 1, 0)
    hidden = rounded_to(arrays["x"].astype(np.float64), most) @ (fc1 * scales[:, :1]).T + arrays["b1"]
    return rounded_to(np.maximum(hidden, 0) * scales[:, 1], most) @ fc2 + arrays["b2"]


def distance(found, expected):
    return np.abs(found - expected).max() / np.abs(expected).max()


@only_where_it_rounds
@pytest.mark.parametrize(("F", "E"), [(600, 520), (1000, 129)])
@pytest.mark.parametrize("rows", [16, 33, 70])
def test_one_digit_is_what_the_ffn_of_a_prompt_computes_with(rows, F, E):
    arrays = ffn_operands(rows, S=rows, Z=0, F=F, E=E)
    found = ffn(arrays)
    kernels.assert_close(found, as_defined(arrays, MOST), OF_ITS_ROUNDING)
    assert 2e-3 * COARSE < distance(found, as_defined(arrays, 2.0**24)) < 2e-2 * COARSE


@pytest.mark.skipif(MOST != 127, reason="a digit of 12 bits is enough for any outlier")
def test_a_row_with_an_outlier_gets_two_digits_and_its_neighbours_keep_their_bits():
    """Keys are one product with x, so they show its digits alone."""

    def keys(arrays, **attributes):
        found = kernels.run(SPARSE_ATTENTION, arrays, **attributes)["present_key"]
        return found[0, :, arrays["past"][0] :][:, :40]

    arrays = attention_operands(1, S=40, Z=0, H=3, D=64, T=50)
    clean = keys(arrays, few_digits=1)
    arrays["x"][0, 7, 100] = 300
    found, exact = keys(arrays, few_digits=1), keys(arrays)
    others = np.arange(40) != 7
    np.testing.assert_array_equal(found[:, others], clean[:, others])
    assert 1e-5 < distance(found[:, 7], exact[:, 7]) < 1e-3
    one_digit = np.abs(arrays["x"][0, 7] - rounded_to(arrays["x"][0, 7], MOST)).max()
    assert one_digit > 1  # a row of ones and less would have been lost


@pytest.mark.parametrize("Z", [40, 1])
def test_tokens_that_are_all_masked_are_computed_exactly(Z):
    """A batch of steps, or tokens of a text that is measured: nothing there is a prompt."""
    arrays = ffn_operands(2, B=40 // Z, S=Z, Z=Z, F=600, E=200)
    np.testing.assert_array_equal(ffn(arrays), kernels.run(SPARSE_FFN, arrays)["y"])
    arrays = attention_operands(2, B=40 // Z, S=Z, Z=Z, H=3, D=64, T=50)
    found, exact = (kernels.run(SPARSE_ATTENTION, arrays, **choice) for choice in ({"few_digits": 1}, {}))
    np.testing.assert_array_equal(found["y"], exact["y"])


@only_where_it_rounds
def test_attention_of_a_prompt_rounds_within_a_digit():
    arrays = attention_operands(3, S=40, Z=0, H=3, D=64, T=50)
    found, exact = (kernels.run(SPARSE_ATTENTION, arrays, **choice) for choice in ({"few_digits": 1}, {}))
    assert 1e-4 * COARSE < distance(found["y"], exact["y"]) < 3e-2 * COARSE
    new = slice(arrays["past"][0], arrays["past"][0] + 40)
    for name in ("present_key", "present_value"):
        assert 1e-4 * COARSE < distance(found[name][0, :, new], exact[name][0, :, new]) < 2e-2 * COARSE


def test_rows_without_digits_are_what_floats_give():
    arrays = ffn_operands(4, S=20, Z=0, F=600, E=100)
    clean = ffn(arrays)
    arrays["x"][0, 7, 3] = np.nan
    arrays["x"][0, 9] = 0
    found = ffn(arrays)
    others = ~np.isin(np.arange(20), (7, 9))
    np.testing.assert_array_equal(found[0, others], clean[0, others])
    assert np.isnan(found[0, 7]).any()
    with np.errstate(invalid="ignore"):
        zero = numpy_reference.sparse_ffn(**arrays)[0][0, 9]
    assert distance(found[0, 9], zero) < 2e-2


@only_where_it_rounds
@pytest.mark.parametrize("rows", [16, 70])
def test_rounded_rows_repeat_their_bits_at_any_number_of_threads(rows):
    arrays = ffn_operands(5, S=rows, Z=0, F=2100, E=200)
    first = ffn(arrays, block=1)
    for threads in (2, 3):
        np.testing.assert_array_equal(ffn(arrays, threads=threads, block=1), first)
