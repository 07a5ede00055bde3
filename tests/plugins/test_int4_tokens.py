# SPDX-License-Identifier: Apache-2.0
"""Tokens that meet int4 weights where results may be rounded freely (`few_digits` 1): rows and factors of 8 bits."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest

from shadowc.runtime.library import OpLibrary
from shadowc.spec.ops import INT4_GROUP, SPARSE_ATTENTION, SPARSE_FFN
from tests.plugins import elsewhere, kernels, numpy_reference, test_sparse_attention, test_sparse_ffn
from tests.plugins.test_few_digits import distance

TOGETHER = {"avx2": 8, "avx512": 8, "avx512_icelake": 16, "avx512_zen4": 8, "avx512_amx": 16}
"""Rows whose factors are rounded together, by level (kInt4Rows in plugins/cpu/int4_fetch-inl.h). Others take floats."""
ONE_DIGIT = 127
"""What the largest value of a digit becomes, of a group of a row or of the factors that are rounded together."""
EIGHT_BITS = 2e-2
"""What is lost, of the largest value of a result; a bit less loses twice as much as is lost here."""
NEARER = 0.5
"""Hidden values that differ in their last bits round to neighbours, now and then: less than the rounding itself."""


@pytest.fixture(params=["here", "avx2", "avx512_icelake"])
def level(request):
    """The level that a test runs at: this processor's own, and others that round in another way."""
    here = OpLibrary.installed().isa
    if request.param == "here":
        if here not in TOGETHER:
            pytest.skip("int4 weights meet floats at this level")
        yield here
        return
    if request.param == here:
        pytest.skip("this processor's own level")
    with contextlib.ExitStack() as stack:
        try:
            run = stack.enter_context(elsewhere.at_level(request.param))
        except elsewhere.UnavailableError as reason:
            pytest.skip(str(reason))
        stack.enter_context(elsewhere.kernels_run_by(run))
        yield request.param


def operands(seed, **shape):
    """Tokens that are all masked."""
    return test_sparse_ffn.operands(np.random.default_rng(seed), dtype="int4", **shape)


def ffn(arrays, few_digits=1, **attributes):
    return kernels.run(SPARSE_FFN, arrays, few_digits=few_digits, **attributes)["y"]


def attention(arrays, few_digits=1):
    return kernels.run(SPARSE_ATTENTION, arrays, few_digits=few_digits)


def to_whole(x, most, axis=None):
    """In steps of the largest value over `axis` / most."""
    step = np.abs(x).max(axis, keepdims=True) / most
    step[step == 0] = 1  # of zeros
    return np.round(x / step) * step


def rounded_rows(x, most):
    """What rows are multiplied as: every group of columns in steps of its own."""
    return to_whole(x.reshape(*x.shape[:-1], -1, INT4_GROUP), most, -1).reshape(x.shape)


def as_defined(arrays, at, most=ONE_DIGIT, row=ONE_DIGIT):
    """The FFN of tokens that compute every neuron, in float64; factors are rounded by as many neurons as are added.

    AVX-512 VNNI adds two groups of columns at a time, and a last one without a second in floats.
    """
    fc1, fc2 = np.moveaxis(numpy_reference.real(arrays["w"], arrays["scales"]), 1, 0)
    hidden = np.maximum(rounded_rows(arrays["x"].astype(np.float64), row) @ fc1.T + arrays["b1"], 0)
    factors = hidden[..., None] * arrays["scales"][:, 1].astype(np.float64)  # [B,S,F,groups]
    whole = factors.reshape(*hidden.shape[:2], -1, TOGETHER[at], factors.shape[-1])
    rounded = to_whole(whole, most, 3).reshape(factors.shape)
    if at.startswith("avx512_") and factors.shape[-1] % 2 == 1:
        rounded[..., -1] = factors[..., -1]
    values = (fc2.reshape(*arrays["scales"][:, 1].shape, INT4_GROUP) / arrays["scales"][:, 1, :, None]).round()
    return np.einsum("bsfg,fgj->bsgj", rounded, values).reshape(*hidden.shape[:2], -1) + arrays["b2"]


def dense_tokens(seed, **shape):
    arrays = operands(seed, **shape)
    arrays["threshold"][:] = -np.inf
    return arrays


def nearer(found, defined, exact):
    """How far the kernel is from its definition, of how far that is from exact products (root mean squares)."""
    return np.sqrt(np.mean((found - defined) ** 2) / np.mean((defined - exact) ** 2))


@pytest.mark.parametrize(("B", "E"), [(5, 320), (5, 384), (1, 2048), (1, 2304)])
def test_rows_and_factors_of_tokens_are_rounded_as_defined(level, B, E):
    """Alone, tokens of wide rows are read in another order (int4_in_order-inl.h)."""
    arrays = dense_tokens(1, B=B, F=96, E=E)
    exact = numpy_reference.sparse_ffn(**arrays)[0]
    found, defined = ffn(arrays), as_defined(arrays, level)
    assert nearer(found, defined, exact) < NEARER
    assert 1e-3 < distance(found, exact) < EIGHT_BITS


@pytest.mark.parametrize("at", ["avx512_zen4", "avx2"])
@pytest.mark.parametrize("planted", [{"most": ONE_DIGIT / 8}, {"most": 63}, {"row": ONE_DIGIT / 8}, {"row": 63}])
def test_a_coarser_rounding_of_tokens_would_be_noticed(planted, at):
    """Three bits less and one bit less, of the factors and of the rows."""
    arrays = dense_tokens(1, B=5, F=96, E=320)
    exact = numpy_reference.sparse_ffn(**arrays)[0]
    assert nearer(as_defined(arrays, at, **planted), as_defined(arrays, at), exact) > 2 * NEARER


@pytest.mark.parametrize("skip_zeros", [0, 1])
def test_tokens_of_any_mask_are_rounded_to_eight_bits(level, skip_zeros):
    for seed, shape in enumerate([{"F": 70, "E": 64}, {"F": 41, "E": 192, "block": 3}, {"F": 1030, "E": 1088, "B": 3}]):
        arrays = operands(seed, norm=True, **shape)
        block = shape.get("block", 1)
        found = ffn(arrays, skip_zeros=skip_zeros, block=block)
        kernels.assert_close(found, numpy_reference.sparse_ffn(**arrays, block=block)[0], EIGHT_BITS)


@pytest.mark.parametrize("cache", test_sparse_attention.CACHES)
def test_attention_of_tokens_is_rounded_to_eight_bits(level, cache):
    for seed, shape in enumerate([{"H": 4, "D": 64}, {"H": 4, "D": 80}, {"H": 2, "D": 32, "B": 3}]):
        arrays = test_sparse_attention.operands(np.random.default_rng(seed), dtype="int4", cache=cache, **shape)
        found, exact = attention(arrays), attention(arrays, few_digits=0)
        tolerance = max(EIGHT_BITS, kernels.CACHE_TOLERANCE[cache])
        for name in ("y", "context"):
            kernels.assert_close(found[name], exact[name], tolerance)
        assert (found["y"] != exact["y"]).any()
        for name in ("present_key", "present_value"):
            live, expected = (test_sparse_attention.live(one[name], arrays) for one in (found, exact))
            kernels.assert_close(live, expected, tolerance)
        np.testing.assert_array_equal(found["read"], exact["read"])


@pytest.mark.parametrize("few_digits", [2, 3])
def test_where_rounding_has_to_be_fine_or_only_prompts_may_round_tokens_are_exact(level, few_digits):
    arrays = operands(2, B=3, F=70, E=192)
    np.testing.assert_array_equal(ffn(arrays, few_digits=few_digits), ffn(arrays, few_digits=0))
    arrays = test_sparse_attention.operands(np.random.default_rng(2), dtype="int4", B=2, H=4, D=64)
    found, exact = attention(arrays, few_digits=few_digits), attention(arrays, few_digits=0)
    np.testing.assert_array_equal(found["y"], exact["y"])


@pytest.mark.parametrize(("rows", "F", "E"), [(9, 6000, 192), (40, 6000, 192), (9, 1003, 2304)])
@pytest.mark.parametrize("skip_zeros", [0, 1])
def test_a_token_has_the_same_bits_alone_and_in_a_batch_of_one_mask(level, rows, F, E, skip_zeros):
    """How factors are rounded depends on the neurons that are added together, which rows of other masks decide too."""
    arrays = operands(3, B=rows, F=F, E=E, shared=True)
    arrays["x"][4:] *= 50
    together = ffn(arrays, skip_zeros=skip_zeros)
    for row in (0, 5, rows - 1):
        alone = arrays | {"x": arrays["x"][row : row + 1]}
        np.testing.assert_array_equal(ffn(alone, skip_zeros=0)[0], together[row])


def test_a_token_among_tokens_of_other_masks_is_rounded_to_eight_bits(level):
    arrays = operands(7, B=40, F=600, E=192)
    kernels.assert_close(ffn(arrays), numpy_reference.sparse_ffn(**arrays)[0], EIGHT_BITS)


@pytest.mark.parametrize(("H", "D"), [(4, 64), (16, 128)])
def test_keys_and_results_of_a_token_have_the_same_bits_alone_and_in_a_batch(level, H, D):
    arrays = test_sparse_attention.operands(np.random.default_rng(3), dtype="int4", B=5, H=H, D=D, shared=True)
    together = attention(arrays)
    by_row = ("x", "start", "past", "past_key", "past_value")
    for row in range(5):
        alone = arrays | {name: arrays[name][row : row + 1] for name in by_row}
        np.testing.assert_array_equal(attention(alone)["y"][0], together["y"][row])


@pytest.mark.parametrize(("F", "E"), [(11000, 192), (1003, 2304)])
def test_tokens_repeat_their_bits_at_any_number_of_threads(level, F, E):
    arrays = operands(4, F=F, E=E)
    first = ffn(arrays)
    for threads in (1, 3):
        np.testing.assert_array_equal(ffn(arrays, threads=threads), first)


def keys(x, arrays):
    """Of one token each: products of rows with the weights of keys, [B,H,D]."""
    w = numpy_reference.real(arrays["w"], arrays["scales"])[:, 1]
    return np.einsum("be,hde->bhd", x[:, 0], w) + arrays["bqkv"][:, 1]


def new_keys(found, arrays):
    return np.stack([found["present_key"][row, :, at] for row, at in enumerate(arrays["past"])])


def spiked(**shape):
    """Rows with one large value, as those of trained models have, a group of zeros and one of tiny values."""
    arrays = test_sparse_attention.operands(np.random.default_rng(8), dtype="int4", **shape)
    arrays["x"][..., 70] = 300
    arrays["x"][..., 128:192] = 0
    arrays["x"][..., 192:256] *= 1e-32
    return arrays, arrays["x"].astype(np.float64)


@pytest.mark.parametrize(("H", "D"), [(4, 128), (16, 128)])
def test_a_large_value_makes_only_its_own_group_coarse(level, H, D):
    arrays, x = spiked(B=1, H=H, D=D)
    found, defined = new_keys(attention(arrays), arrays), keys(rounded_rows(x, ONE_DIGIT), arrays)
    assert nearer(found, defined, keys(x, arrays)) < NEARER


def test_steps_of_whole_rows_would_be_noticed():
    arrays, x = spiked(B=1, H=4, D=128)
    defined, planted = (keys(rows, arrays) for rows in (rounded_rows(x, ONE_DIGIT), to_whole(x, ONE_DIGIT, -1)))
    assert nearer(planted, defined, keys(x, arrays)) > 2 * NEARER


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e35, 1e-38])
def test_a_token_that_has_no_digits_is_summed_in_floats(level, value):
    arrays = operands(5, B=3, F=70, E=192)
    clean = ffn(arrays)
    arrays["x"][1] = 0
    arrays["x"][1, 0, 3] = value
    found, exact = ffn(arrays), ffn(arrays, few_digits=0)
    np.testing.assert_array_equal(found[[0, 2]], clean[[0, 2]])
    kernels.assert_close(found[1], exact[1], EIGHT_BITS)


def test_levels_that_meet_int4_with_floats_round_nothing():
    with contextlib.ExitStack() as stack:
        try:
            run = stack.enter_context(elsewhere.at_level("sse4"))
        except elsewhere.UnavailableError as reason:
            pytest.skip(str(reason))
        stack.enter_context(elsewhere.kernels_run_by(run))
        arrays = operands(6, B=3, F=70, E=192)
        np.testing.assert_array_equal(ffn(arrays), ffn(arrays, few_digits=0))
