# SPDX-License-Identifier: Apache-2.0
"""Prompts with int4, bf16 and fp32 weights in blocks (`few_digits`): what each type rounds, by how much, what stays."""

from __future__ import annotations

import contextlib

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shadowc.runtime.library import OpLibrary
from shadowc.spec.ops import INT4_GROUP, SPARSE_ATTENTION, SPARSE_FFN
from tests.plugins import elsewhere, kernels, numpy_reference, test_sparse_attention, test_sparse_ffn
from tests.plugins.test_few_digits import HERE, distance, most  # noqa: F401
from tests.plugins.test_panels import ENOUGH, rounded_to

TYPES = ("float32", "bfloat16", "int4")
ISA = OpLibrary.installed().isa
BF16_PRODUCTS = ISA in ("avx512_zen4", "avx512_amx")
BLOCKED = {"float32": HERE == 127, "bfloat16": BF16_PRODUCTS, "int4": HERE != 0}
"""Elsewhere prompts meet these weights row by row."""
LEAST_ROWS = {
    "float32": 128,
    "bfloat16": {"avx512_amx": 12}.get(ISA, 24),
    "int4": {"avx512_amx": 8, "avx2": 12}.get(ISA, 16),
}
"""From which prompts are blocked: below, single rows are faster (`least_rows` in plugins/cpu/panels_*.cc)."""
LARGEST = {"float32": kernels.TOLERANCE, "bfloat16": 2.0**-8, "int4": 3e-2}
"""What a prompt may lose, of the largest value of a result: float32 sums; bf16's own step; an 8-bit digit's 1e-2."""
IN_ATTENTION = {"float32": kernels.TOLERANCE, "bfloat16": 2.0**-6, "int4": 6e-2}
"""The same of what attention makes of rounded queries, keys and values."""
OF_ITS_ROUNDING = 1e-3
"""Hidden values that differ in their last bits round to neighbours: far less than the rounding itself."""

of_every_type = pytest.mark.parametrize("dtype", TYPES)


def ffn_operands(seed, dtype, **shape):
    arrays = test_sparse_ffn.operands(np.random.default_rng(seed), dtype=dtype, **shape)
    assert np.size(arrays["w"]) >= ENOUGH / 2
    return arrays


def attention_operands(seed, dtype, **shape):
    arrays = test_sparse_attention.operands(np.random.default_rng(seed), dtype=dtype, **shape)
    assert np.size(arrays["w"]) >= ENOUGH / 2
    return arrays


def ffn(arrays, **attributes):
    return kernels.run(SPARSE_FFN, arrays, few_digits=1, **attributes)["y"]


def in_one_scale(w, scales, largest=np.max):
    """int4 records as float64, each row as int8 with one scale for all of its groups."""
    steps = largest(scales.astype(np.float64), axis=-1, keepdims=True) * 7 / 127
    groups = numpy_reference.real(w, scales).reshape(*scales.shape, INT4_GROUP)
    return (np.round(groups / steps[..., None]) * steps[..., None]).reshape(*w.shape[:-1], -1)


def to_bf16(x):
    return x.astype(ml_dtypes.bfloat16).astype(np.float64)


def as_defined(arrays, weights, activations):
    """The FFN without masks in float64, with rounded weights and activations."""
    fc1, fc2 = np.moveaxis(weights, 1, 0)
    hidden = np.maximum(activations(arrays["x"].astype(np.float64)) @ fc1.T + arrays["b1"], 0)
    return hidden, fc2


def int4_as_defined(arrays, digit, largest=np.max):
    """One digit meets int8 weights; a hidden value is rounded with the scale of its record in it."""
    scales = arrays["scales"]
    weights = in_one_scale(arrays["w"], scales, largest)
    hidden, fc2 = as_defined(arrays, weights, lambda x: rounded_to(x, digit))
    of_record = scales[:, 1].max(-1).astype(np.float64)
    return rounded_to(hidden * of_record, digit) @ (fc2 / of_record[:, None]) + arrays["b2"]


def bf16_as_defined(arrays, to_bf16=to_bf16):
    hidden, fc2 = as_defined(arrays, arrays["w"].astype(np.float64), to_bf16)
    return to_bf16(hidden) @ fc2 + arrays["b2"]


def bf16_operands(seed, **shape):
    arrays = ffn_operands(seed, "bfloat16", **shape)
    arrays["scales"][:] = 1
    return arrays


SHAPES = [(600, 520, 33), (1020, 128, 24), (1000, 129, 70), (130, 640, 40)]
"""Neurons in one block, whose hidden values of a row are rounded together; width; rows."""


@pytest.mark.parametrize(("F", "E", "rows"), SHAPES)
def test_int4_rows_are_int8_with_one_scale_and_activations_one_digit(most, F, E, rows):  # noqa: F811
    arrays = ffn_operands(rows, "int4", S=rows, Z=0, F=F, E=E)
    found = ffn(arrays)
    kernels.assert_close(found, int4_as_defined(arrays, most), OF_ITS_ROUNDING)
    assert 2e-3 < distance(found, numpy_reference.sparse_ffn(**arrays)[0]) < LARGEST["int4"]


def test_a_scale_that_is_not_the_rows_largest_would_be_noticed():
    """Rounding with the mean scale clips nothing here, and still is another rounding."""
    arrays = ffn_operands(0, "int4", S=33, Z=0, F=600, E=520)
    with pytest.raises(AssertionError):
        kernels.assert_close(int4_as_defined(arrays, 127, np.mean), int4_as_defined(arrays, 127), OF_ITS_ROUNDING)


@pytest.mark.skipif(not BF16_PRODUCTS, reason="this processor, or level, has no products of bf16")
@pytest.mark.parametrize(("F", "E", "rows"), SHAPES)
def test_bf16_weights_meet_activations_rounded_to_nearest(F, E, rows):
    arrays = bf16_operands(rows, S=rows, Z=0, F=F, E=E)
    found = ffn(arrays)
    kernels.assert_close(found, bf16_as_defined(arrays), OF_ITS_ROUNDING)
    assert 2e-4 < distance(found, numpy_reference.sparse_ffn(**arrays)[0]) < LARGEST["bfloat16"]


def test_activations_cut_to_bf16_would_be_noticed():
    def cut(x):
        return (x.astype(np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32).astype(np.float64)

    arrays = bf16_operands(0, S=33, Z=0, F=600, E=520)
    with pytest.raises(AssertionError):
        kernels.assert_close(bf16_as_defined(arrays, cut), bf16_as_defined(arrays), OF_ITS_ROUNDING)
    exact = numpy_reference.sparse_ffn(**arrays)[0]
    with pytest.raises(AssertionError):
        kernels.assert_close(bf16_as_defined(arrays, cut), exact, LARGEST["bfloat16"])


@settings(max_examples=40, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.tuples(st.integers(1, 3), st.integers(0, 40)),
    F=st.integers(130, 300) | st.integers(1020, 1030),
    E=st.integers(256, 400),
    block=st.sampled_from([1, 3, 16]),
    dtype=st.sampled_from(TYPES),
    skip_zeros=st.sampled_from([0, 1]),
)
def test_ffn_of_a_prompt_is_its_definition_but_for_the_rounding_of_the_type(seed, rows, F, E, block, dtype, skip_zeros):
    S = LEAST_ROWS[dtype] // rows[0] + 1 + rows[1]
    arrays = ffn_operands(seed, dtype, B=rows[0], S=S, Z=0, F=F, E=E, block=block)
    found = kernels.run(SPARSE_FFN, arrays, few_digits=1, block=block, skip_zeros=skip_zeros)
    expected, read = numpy_reference.sparse_ffn(**arrays, block=block)
    kernels.assert_close(found["y"], expected, LARGEST[dtype])
    if not skip_zeros:
        assert numpy_reference.Read(*map(int, found["read"])) == read


@settings(max_examples=30, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.tuples(st.integers(1, 2), st.integers(0, 40)),
    shape=st.sampled_from([(4, 64), (4, 80), (3, 128), (5, 64), (7, 37)]),
    dtype=st.sampled_from(TYPES),
    cache=st.sampled_from(test_sparse_attention.CACHES),
)
def test_attention_of_a_prompt_is_its_definition_but_for_the_rounding_of_the_type(seed, rows, shape, dtype, cache):
    if dtype == "int4" and shape[0] * shape[1] % INT4_GROUP != 0:
        shape = (4, 64)
    H, D = shape
    S = LEAST_ROWS[dtype] // rows[0] + rows[1]
    arrays = attention_operands(seed, dtype, B=rows[0], S=S, Z=0, H=H, D=D, T=S + 5, cache=cache)
    found, exact = (kernels.run(SPARSE_ATTENTION, arrays, **choice) for choice in ({"few_digits": 1}, {}))
    for name in ("y", "context"):
        kernels.assert_close(found[name], exact[name], max(IN_ATTENTION[dtype], kernels.CACHE_TOLERANCE[cache]))
    for name in ("present_key", "present_value"):
        live, expected = (test_sparse_attention.live(results[name], arrays) for results in (found, exact))
        kernels.assert_close(live, expected, max(LARGEST[dtype], kernels.CACHE_TOLERANCE[cache]))
    np.testing.assert_array_equal(found["read"], exact["read"])


@of_every_type
def test_blocks_are_what_computes(dtype):
    """A prompt that fell back to single rows would pass every tolerance."""
    if not BLOCKED[dtype]:
        pytest.skip("this processor, or level, meets such weights row by row")
    rows = LEAST_ROWS[dtype]
    arrays = ffn_operands(1, dtype, S=rows, Z=0, F=600, E=200)
    assert (ffn(arrays) != kernels.run(SPARSE_FFN, arrays)["y"]).any()
    short = arrays | {"x": arrays["x"][:, 1:]}
    np.testing.assert_array_equal(*(kernels.run(SPARSE_FFN, short, few_digits=choice)["y"] for choice in (3, 0)))
    arrays = attention_operands(1, dtype, S=rows, Z=0, H=4, D=64, T=rows + 5)
    found, exact = (kernels.run(SPARSE_ATTENTION, arrays, **choice) for choice in ({"few_digits": 1}, {}))
    assert (found["y"] != exact["y"]).any()


@of_every_type
def test_a_prompt_is_the_same_where_tokens_may_round_and_where_they_may_not(dtype):
    rows = LEAST_ROWS[dtype]
    arrays = ffn_operands(1, dtype, S=rows, Z=0, F=600, E=200)
    np.testing.assert_array_equal(ffn(arrays), kernels.run(SPARSE_FFN, arrays, few_digits=3)["y"])


@of_every_type
def test_what_has_to_be_rounded_finely_meets_only_weights_that_stay_as_they_are(dtype):
    """bf16 would round activations to 8 bits, and int4 its own weights."""
    rows = LEAST_ROWS[dtype]
    arrays = ffn_operands(1, dtype, S=rows, Z=0, F=600, E=200)
    found, exact = (kernels.run(SPARSE_FFN, arrays, few_digits=choice)["y"] for choice in (2, 0))
    if dtype == "float32":
        assert (found != exact).any() == BLOCKED[dtype]
        kernels.assert_close(found, exact)
    else:
        np.testing.assert_array_equal(found, exact)


@of_every_type
def test_rows_have_their_bits_however_many_of_them_fill_the_last_block(dtype):
    """Fewer than eight rows of a block are computed by loops of their own."""
    least = LEAST_ROWS[dtype]
    whole = -(-least // 16) * 16 + 16
    arrays = ffn_operands(8, dtype, S=whole, Z=0, F=600, E=200)
    expected = ffn(arrays)
    for rows in range(whole - 15, whole):
        np.testing.assert_array_equal(ffn(arrays | {"x": arrays["x"][:, :rows]}), expected[:, :rows])


@of_every_type
@pytest.mark.parametrize("Z", [140, 1])
def test_tokens_that_are_all_masked_go_row_by_row(Z, dtype):
    arrays = ffn_operands(2, dtype, B=140 // Z, S=Z, Z=Z, F=600, E=200)
    np.testing.assert_array_equal(*(kernels.run(SPARSE_FFN, arrays, few_digits=choice)["y"] for choice in (3, 0)))
    arrays = attention_operands(2, dtype, B=140 // Z, S=Z, Z=Z, H=4, D=64, T=150)
    np.testing.assert_array_equal(*(kernels.run(SPARSE_ATTENTION, arrays, few_digits=choice)["y"] for choice in (3, 0)))


@of_every_type
def test_a_row_has_the_same_bits_whatever_its_neighbours_are_and_leave_out(dtype):
    B = LEAST_ROWS[dtype] // 2 + 11
    arrays = ffn_operands(6, dtype, B=B, S=2, Z=1, F=2100, E=200, block=4)
    first = ffn(arrays, block=4)[3]
    arrays["x"][4:] *= 50
    arrays["x"][5, 0, 0] = np.nan
    arrays["x"][6, 1, 7] = np.inf
    arrays["threshold"][:3] = np.inf
    np.testing.assert_array_equal(ffn(arrays, block=4)[3], first)
    arrays["threshold"][np.arange(B) != 3] = np.inf
    np.testing.assert_array_equal(ffn(arrays, block=4, skip_zeros=1)[3], first)
    fewer = {name: arrays[name][: B - 11] if name in ("x", "scores", "threshold") else arrays[name] for name in arrays}
    np.testing.assert_array_equal(ffn(fewer, block=4)[3], first)


@of_every_type
def test_keys_and_results_of_a_row_have_the_same_bits_in_any_batch(dtype):
    S = LEAST_ROWS[dtype] // 3 + 10
    arrays = attention_operands(7, dtype, B=3, S=S, Z=0, H=4, D=64, T=S + 10)
    first = kernels.run(SPARSE_ATTENTION, arrays, few_digits=1)
    arrays["x"][0] *= 30
    arrays["x"][2, 3, 1] = np.nan
    found = kernels.run(SPARSE_ATTENTION, arrays, few_digits=1)
    for name in ("y", "context"):
        np.testing.assert_array_equal(found[name][1], first[name][1])
    for name in ("present_key", "present_value"):
        live, expected = (test_sparse_attention.live(results[name], arrays)[1] for results in (found, first))
        np.testing.assert_array_equal(live, expected)


@of_every_type
@pytest.mark.parametrize("value", [np.nan, np.inf, 1e35, 1e-38])
def test_a_value_that_has_no_digits_spoils_its_own_row_alone(value, dtype):
    rows = LEAST_ROWS[dtype] + 4
    arrays = ffn_operands(3, dtype, S=rows, Z=0, F=600, E=128)
    clean = ffn(arrays)
    arrays["x"][0, 7] = 0
    arrays["x"][0, 7, 3] = value
    found, exact = ffn(arrays), kernels.run(SPARSE_FFN, arrays)["y"]
    others = np.arange(rows) != 7
    np.testing.assert_array_equal(found[0, others], clean[0, others])
    kernels.assert_close(found[0, 7], exact[0, 7], LARGEST[dtype])


@of_every_type
def test_nothing_beyond_the_rows_leaks_in(dtype):
    """A prompt's neurons are all computed, so it is the last one's neighbour in memory that is spoilt."""
    arrays = ffn_operands(4, dtype, S=LEAST_ROWS[dtype], Z=0, F=601, E=129)
    head = {name: arrays[name][:600] if name in ("w", "scales", "b1") else arrays[name] for name in arrays}
    head["scores"] = arrays["scores"][..., :600]
    clean = ffn(head)
    arrays["scales" if dtype == "int4" else "w"][600] = np.nan
    np.testing.assert_array_equal(ffn(head), clean)


@of_every_type
@pytest.mark.parametrize("more", [0, 54])
def test_prompts_repeat_their_bits_at_any_number_of_threads(more, dtype):
    arrays = ffn_operands(5, dtype, S=LEAST_ROWS[dtype] + more, Z=0, F=2100, E=200)
    first = ffn(arrays)
    for threads in (1, 3):
        np.testing.assert_array_equal(ffn(arrays, threads=threads), first)


@of_every_type
def test_groups_of_zeros_and_a_row_of_zeros_are_zeros(dtype):
    arrays = ffn_operands(8, dtype, S=LEAST_ROWS[dtype], Z=0, F=300, E=256)
    arrays["scales"][5] = 0
    if dtype == "int4":
        arrays["scales"][:, :, 1] = 0
    kernels.assert_close(ffn(arrays), numpy_reference.sparse_ffn(**arrays)[0], LARGEST[dtype])


@contextlib.contextmanager
def at(level):
    with contextlib.ExitStack() as stack:
        try:
            run = stack.enter_context(elsewhere.at_level(level))
        except elsewhere.UnavailableError as reason:
            pytest.skip(str(reason))
        with elsewhere.kernels_run_by(run):
            yield


def test_without_products_of_bf16_prompts_are_what_they_were():
    with at("avx512_icelake"):
        arrays = ffn_operands(2, "bfloat16", S=40, Z=0, F=600, E=200)
        np.testing.assert_array_equal(ffn(arrays), kernels.run(SPARSE_FFN, arrays)["y"])


@pytest.mark.parametrize(
    ("level", "dtype"), [*(("sse4", dtype) for dtype in TYPES), ("avx2", "float32"), ("avx2", "bfloat16")]
)
def test_prompts_of_levels_without_blocks_go_row_by_row(level, dtype):
    with at(level):
        arrays = ffn_operands(2, dtype, S=140, Z=0, F=600, E=200)
        np.testing.assert_array_equal(ffn(arrays), kernels.run(SPARSE_FFN, arrays)["y"])
