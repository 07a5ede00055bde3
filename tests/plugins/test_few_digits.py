# SPDX-License-Identifier: Apache-2.0
"""Prompts with int8 weights and rounded activations (`few_digits`): what is rounded, by how much, and what is not."""

from __future__ import annotations

import numpy as np
import pytest

from shadowc.runtime.library import OpLibrary
from shadowc.spec.ops import SPARSE_ATTENTION, SPARSE_FFN
from tests.plugins import kernels, numpy_reference
from tests.plugins.test_panels import attention_operands, ffn_operands, rounded

ROUNDS = OpLibrary.installed().isa in ("avx512_icelake", "avx512_zen4")
"""Elsewhere products take three digits, or floats."""
OF_ITS_ROUNDING = 1e-3
"""Hidden values that differ in their last bits round to neighbours: far less than one digit's own error of 1e-2."""

only_where_it_rounds = pytest.mark.skipif(not ROUNDS, reason="activations are rounded with VNNI and without AMX")


def ffn(arrays, **attributes):
    return kernels.run(SPARSE_FFN, arrays, few_digits=1, **attributes)["y"]


def as_defined(arrays, digits):
    """The FFN without masks, in float64, with activations in so many digits."""
    scales = arrays["scales"].astype(np.float64)
    fc1, fc2 = np.moveaxis(arrays["w"].astype(np.float64), 1, 0)
    hidden = rounded(arrays["x"].astype(np.float64), digits) @ (fc1 * scales[:, :1]).T + arrays["b1"]
    return rounded(np.maximum(hidden, 0) * scales[:, 1], digits) @ fc2 + arrays["b2"]


def distance(found, expected):
    return np.abs(found - expected).max() / np.abs(expected).max()


@only_where_it_rounds
@pytest.mark.parametrize(("F", "E"), [(600, 520), (1000, 129)])
@pytest.mark.parametrize("rows", [16, 33, 70])
def test_one_digit_is_what_the_ffn_of_a_prompt_computes_with(rows, F, E):
    arrays = ffn_operands(rows, S=rows, Z=0, F=F, E=E)
    found = ffn(arrays)
    kernels.assert_close(found, as_defined(arrays, 1), OF_ITS_ROUNDING)
    assert 2e-3 < distance(found, as_defined(arrays, 3)) < 2e-2


@only_where_it_rounds
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
    one_digit = np.abs(arrays["x"][0, 7] - rounded(arrays["x"][0, 7], 1)).max()
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
    assert 1e-4 < distance(found["y"], exact["y"]) < 3e-2
    new = slice(arrays["past"][0], arrays["past"][0] + 40)
    for name in ("present_key", "present_value"):
        assert 1e-4 < distance(found[name][0, :, new], exact[name][0, :, new]) < 2e-2


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
