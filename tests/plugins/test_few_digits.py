# SPDX-License-Identifier: Apache-2.0
"""Prompts with int8 weights and rounded activations (`few_digits`): what is rounded, by how much, and what is not."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import pytest

from shadowc.runtime.library import OpLibrary
from shadowc.spec.ops import SPARSE_ATTENTION, SPARSE_FFN
from tests.plugins import elsewhere, kernels, numpy_reference, test_sparse_attention
from tests.plugins.test_panels import attention_operands, ffn_operands, rounded_to

MOST = {"avx2": 2047, "avx512_icelake": 127, "avx512_zen4": 127, "avx512_amx": 127}
"""What the largest value of a row becomes in one digit, by level. Elsewhere products take floats."""
FINELY = {2047: 2047, 127: 32600}
"""What it becomes where rounding has to be fine (`few_digits` 2): the same 12 bits, or two digits of 8."""
HERE = MOST.get(OpLibrary.installed().isa, 0)
OF_ITS_ROUNDING = 1e-3
"""Hidden values that differ in their last bits round to neighbours: far less than one digit's own error of 1e-2."""


@pytest.fixture(params=["here", "avx2"])
def most(request: pytest.FixtureRequest) -> Iterator[int]:
    """MOST of the level that a test runs at: this processor's own, and AVX2 where that is another."""
    level = request.param
    if level == "here":
        if not HERE:
            pytest.skip("activations are rounded with AVX2, VNNI or AMX")
        yield HERE
        return
    if MOST[level] == HERE:
        pytest.skip("this processor's own level has the same digits")
    with contextlib.ExitStack() as stack:
        try:
            run = stack.enter_context(elsewhere.at_level(level))
        except elsewhere.UnavailableError as reason:
            pytest.skip(str(reason))
        stack.enter_context(elsewhere.kernels_run_by(run))
        yield MOST[level]


def ffn(arrays, few_digits=1, **attributes):
    return kernels.run(SPARSE_FFN, arrays, few_digits=few_digits, **attributes)["y"]


def as_defined(arrays, most):
    """The FFN without masks, in float64, with activations as whole numbers up to `most`."""
    scales = arrays["scales"].astype(np.float64)
    fc1, fc2 = np.moveaxis(arrays["w"].astype(np.float64), 1, 0)
    hidden = rounded_to(arrays["x"].astype(np.float64), most) @ (fc1 * scales[:, :1]).T + arrays["b1"]
    return rounded_to(np.maximum(hidden, 0) * scales[:, 1], most) @ fc2 + arrays["b2"]


def distance(found, expected):
    return np.abs(found - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize(("F", "E"), [(600, 520), (1000, 129)])
@pytest.mark.parametrize("rows", [16, 33, 70])
def test_one_digit_is_what_the_ffn_of_a_prompt_computes_with(most, rows, F, E):
    arrays = ffn_operands(rows, S=rows, Z=0, F=F, E=E)
    found = ffn(arrays)
    error = 127 / most
    kernels.assert_close(found, as_defined(arrays, most), OF_ITS_ROUNDING * error)
    assert 2e-3 * error < distance(found, as_defined(arrays, 2.0**24)) < 2e-2 * error


@pytest.mark.parametrize("rows", [16, 70])
def test_what_is_finely_rounded_has_12_bits_or_more(most, rows):
    arrays = ffn_operands(rows, S=rows, Z=0, F=1000, E=129)
    found, error = ffn(arrays, few_digits=2), 127 / FINELY[most]
    expected = as_defined(arrays, FINELY[most])
    # Two digits have so many steps that in some rows a hidden value rounds to its neighbour, which is as much as all
    # of the row's rounding.
    of_rows = np.abs(found - expected).max(axis=-1) / np.abs(expected).max()
    assert np.median(of_rows) < OF_ITS_ROUNDING * error
    assert of_rows.max() < 2e-2 * error
    assert distance(found, as_defined(arrays, 2.0**24)) < 2e-2 * error
    assert (found != ffn(arrays, few_digits=0)).any()


def test_an_outlier_does_not_make_fine_rounding_coarse(most):
    """12 bits would lose 4 % of what the other values are, so the row is left to floats. Others keep their bits."""
    arrays = attention_operands(1, S=40, Z=0, H=3, D=64, T=50)
    clean = keys(arrays, few_digits=2)
    arrays["x"][0, 7, 100] = 300
    found, exact = keys(arrays, few_digits=2), keys(arrays)
    others = np.arange(40) != 7
    np.testing.assert_array_equal(found[:, others], clean[:, others])
    assert distance(found[:, 7], exact[:, 7]) < (1e-3 if most == 127 else 1e-6)
    assert distance(keys(arrays, few_digits=1)[:, 7], exact[:, 7]) > 1e-5


@pytest.mark.parametrize("rows", [20, 70, 300])
def test_rows_that_are_left_to_floats_are_what_floats_give_and_others_what_they_were(most, rows):
    arrays = ffn_operands(8, S=rows, Z=0, F=1000, E=129)
    clean = ffn(arrays, few_digits=2)
    arrays["x"][0, [7, rows - 1], 100] = 300
    found, exact = ffn(arrays, few_digits=2), ffn(arrays, few_digits=0)
    outliers = np.isin(np.arange(rows), (7, rows - 1))
    np.testing.assert_array_equal(found[0, ~outliers], clean[0, ~outliers])
    assert distance(found[0, outliers], exact[0, outliers]) < (3e-4 if most == 127 else kernels.TOLERANCE)


def keys(arrays, **attributes):
    """Of the new tokens, [H, S, D]."""
    found = kernels.run(SPARSE_ATTENTION, arrays, **attributes)["present_key"]
    return found[0, :, arrays["past"][0] :][:, :40]


def test_a_row_with_an_outlier_loses_nothing_else_and_its_neighbours_keep_their_bits(most):
    """Keys are one product with x, so they show its digits alone: two of 8 bits, or one of 12."""
    arrays = attention_operands(1, S=40, Z=0, H=3, D=64, T=50)
    clean = keys(arrays, few_digits=1)
    arrays["x"][0, 7, 100] = 300
    found, exact = keys(arrays, few_digits=1), keys(arrays)
    others = np.arange(40) != 7
    np.testing.assert_array_equal(found[:, others], clean[:, others])
    assert 1e-5 < distance(found[:, 7], exact[:, 7]) < (1e-3 if most == 127 else 5e-3)
    one_digit = np.abs(arrays["x"][0, 7] - rounded_to(arrays["x"][0, 7], 127)).max()
    assert one_digit > 1  # a row of ones and less would have been lost


@pytest.mark.parametrize("Z", [40, 1])
def test_tokens_that_are_all_masked_are_computed_exactly(Z):
    """A batch of steps, or tokens of a text that is measured: nothing there is a prompt."""
    arrays = ffn_operands(2, B=40 // Z, S=Z, Z=Z, F=600, E=200)
    np.testing.assert_array_equal(ffn(arrays), kernels.run(SPARSE_FFN, arrays)["y"])
    arrays = attention_operands(2, B=40 // Z, S=Z, Z=Z, H=3, D=64, T=50)
    found, exact = (kernels.run(SPARSE_ATTENTION, arrays, **choice) for choice in ({"few_digits": 1}, {}))
    np.testing.assert_array_equal(found["y"], exact["y"])


@pytest.mark.parametrize(("H", "D"), [(3, 64), (5, 37)])
@pytest.mark.parametrize("cache", test_sparse_attention.CACHES)
def test_attention_of_a_prompt_rounds_within_a_digit(most, H, D, cache):
    arrays = attention_operands(3, S=40, Z=0, H=H, D=D, T=50, cache=cache)
    found, exact = (kernels.run(SPARSE_ATTENTION, arrays, **choice) for choice in ({"few_digits": 1}, {}))
    error = 127 / most
    assert 1e-4 * error < distance(found["y"], exact["y"]) < 3e-2 * error
    new = slice(arrays["past"][0], arrays["past"][0] + 40)
    for name in ("present_key", "present_value"):
        assert 1e-4 * error < distance(found[name][0, :, new], exact[name][0, :, new]) < 2e-2 * error


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


@pytest.mark.parametrize("few_digits", [0, 1, 2])
def test_rows_have_their_bits_however_many_of_them_fill_the_last_block(most, few_digits):
    """Fewer than eight rows of a block are computed by loops of their own. One row is zero, one has no digits."""
    arrays = ffn_operands(8, S=32, Z=0, F=600, E=200)
    arrays["x"][0, 18], arrays["x"][0, 21, 5] = 0, np.nan
    expected = ffn(arrays, few_digits)
    for rows in range(17, 32):
        found = ffn({**arrays, "x": arrays["x"][:, :rows]}, few_digits)
        np.testing.assert_array_equal(found, expected[:, :rows])


def test_attention_has_its_bits_however_many_rows_fill_the_last_block(most):
    arrays = attention_operands(8, S=32, Z=0, H=3, D=64, T=40)
    names = ("y", "context", "present_key", "present_value")
    expected = kernels.run(SPARSE_ATTENTION, arrays, few_digits=1)
    new = arrays["past"][0]
    for rows in range(17, 32):
        found = kernels.run(SPARSE_ATTENTION, {**arrays, "x": arrays["x"][:, :rows]}, few_digits=1)
        for name in names[:2]:
            np.testing.assert_array_equal(found[name], expected[name][:, :rows])
        for name in names[2:]:
            np.testing.assert_array_equal(found[name][0, :, new : new + rows], expected[name][0, :, new : new + rows])


@pytest.mark.parametrize("rows", [16, 70])
def test_rounded_rows_repeat_their_bits_at_any_number_of_threads(most, rows):
    arrays = ffn_operands(5, S=rows, Z=0, F=2100, E=200)
    first = ffn(arrays, block=1)
    for threads in (2, 3):
        np.testing.assert_array_equal(ffn(arrays, threads=threads, block=1), first)


@pytest.mark.parametrize("value", [1, -1])
def test_the_largest_sums_of_a_prompt_do_not_overflow(most, value):
    """All values equal, all weights at the end of their range, in the longest rows that digits of 12 bits are for."""
    E, F = 8192, 24
    arrays = ffn_operands(6, S=16, Z=0, F=F, E=E)
    arrays["x"][:] = value
    arrays["w"][:, 0] = np.where(np.arange(F) % 2, 127, -128)[:, None]
    kernels.assert_close(ffn(arrays), as_defined(arrays, most), OF_ITS_ROUNDING)


def test_rows_too_long_for_digits_of_12_bits_are_computed_exactly(most):
    """Sums of so many products could overflow."""
    if most == 127:
        pytest.skip("no row is too long for digits of 8 bits")
    arrays = ffn_operands(7, S=16, Z=0, F=24, E=9216)
    np.testing.assert_array_equal(ffn(arrays), kernels.run(SPARSE_FFN, arrays)["y"])
