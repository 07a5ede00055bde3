# SPDX-License-Identifier: Apache-2.0
"""SparseFFN as machine code, against the ONNX function and float64 numpy."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shadowc.spec.ops import SPARSE_FFN
from tests.plugins import kernels, numpy_reference

WEIGHTS = kernels.WEIGHTS


def operands(rng, *, B=1, S=1, Z=1, L=2, F=40, E=48, block=1, dtype="float32", shared=False, norm=False):
    """Random operands; `shared`: one mask row set for all of the batch. About half of the units are active."""
    N, W = -(-F // block), 1 if shared else B
    E = kernels.width_for(dtype, E)
    w, scales = kernels.weights(rng, (F, 2, E), dtype)
    return {
        "x": rng.standard_normal((B, S, E), dtype=np.float32),
        "scores": rng.standard_normal((W, Z, L, N), dtype=np.float32),
        "threshold": rng.standard_normal((W, Z, L), dtype=np.float32) * np.float32(0.5),
        "w": w,
        "scales": scales,
        "b1": rng.standard_normal(F, dtype=np.float32),
        "b2": rng.standard_normal(E, dtype=np.float32),
        **(kernels.norm(rng, E) if norm else {}),
    }


def ffn(arrays, **attributes):
    found = kernels.run(SPARSE_FFN, arrays, **attributes)
    return found["y"], numpy_reference.Read(*map(int, found["read"]))


def assert_as_defined(arrays, **attributes):
    y, read = ffn(arrays, **attributes)
    expected, expected_read = numpy_reference.sparse_ffn(**arrays, **attributes)
    kernels.assert_close(y, expected)
    kernels.assert_close(y, kernels.oracle_run(SPARSE_FFN, arrays, **attributes)["y"])
    assert read == expected_read


@settings(max_examples=80, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    B=st.integers(1, 4),
    S=st.integers(1, 12),
    tail=st.floats(0, 1),
    F=st.integers(1, 70),
    E=st.integers(1, 150),
    block=st.sampled_from([1, 3, 8, 16]),
    layer=st.integers(0, 2),
    dtype=st.sampled_from(WEIGHTS),
    shared=st.booleans(),
    skip_zeros=st.sampled_from([0, 1]),
    norm=st.booleans(),
)
def test_ffn_equals_its_definition(seed, B, S, tail, F, E, block, layer, dtype, shared, skip_zeros, norm):
    rng, kind = np.random.default_rng(seed), {"dtype": dtype, "shared": shared, "norm": norm}
    arrays = operands(rng, B=B, S=S, Z=round(tail * S), L=3, F=F, E=E, block=block, **kind)
    assert_as_defined(arrays, layer=layer, block=block, skip_zeros=skip_zeros)


@pytest.mark.parametrize("dtype", WEIGHTS)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("rows", [(1, 1), (1, 33), (3, 21), (64, 1), (1, 130)])
def test_ffn_equals_its_definition_when_work_is_cut_into_pieces_and_tiles(rows, norm, dtype):
    (B, S), kind = rows, {"dtype": dtype, "norm": norm}
    arrays = operands(np.random.default_rng(2), B=B, S=S, Z=S, F=1100, E=520, block=16, **kind)
    assert_as_defined(arrays, layer=1, block=16, skip_zeros=0)


@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize("E", [2048, 2304, 2320])
@pytest.mark.parametrize("F", [1, 4, 11, 300])
@pytest.mark.parametrize("block", [1, 16])
@pytest.mark.parametrize("skip_zeros", [0, 1])
def test_ffn_of_wide_rows_equals_its_definition_however_many_neurons_are_left_over(E, F, block, skip_zeros, dtype):
    arrays = operands(np.random.default_rng(14), F=F, E=E, block=block, dtype=dtype, norm=True)
    assert_as_defined(arrays, layer=1, block=block, skip_zeros=skip_zeros)
    other, _ = ffn(arrays, layer=1, block=block, skip_zeros=1 - skip_zeros, threads=1)
    np.testing.assert_array_equal(ffn(arrays, layer=1, block=block, skip_zeros=skip_zeros)[0], other)


@pytest.mark.parametrize("what", [np.nan, np.inf, 1e34, 1e-41])
@pytest.mark.parametrize("skip_zeros", [0, 1])
def test_a_wide_row_that_has_no_digits_is_summed_in_floats(what, skip_zeros):
    arrays = operands(np.random.default_rng(15), F=11, E=2048, dtype="int8")
    arrays["x"][0, 0, 5:] = 0.0
    arrays["x"][0, 0, 5] = what
    with np.errstate(all="ignore"):
        expected, read = numpy_reference.sparse_ffn(**arrays, layer=1, skip_zeros=skip_zeros)
    y, found = ffn(arrays, layer=1, skip_zeros=skip_zeros)
    assert found == read
    np.testing.assert_array_equal(np.isfinite(y), np.isfinite(expected))
    if np.isfinite(what):
        kernels.assert_close(y, expected)


@pytest.mark.parametrize("E", [1, 3, 15, 16, 17, 63, 64, 65, 127, 128, 129, 255, 257])
@pytest.mark.parametrize("dtype", WEIGHTS)
def test_ffn_reads_nothing_beyond_its_rows_when_width_leaves_a_remainder(E, dtype):
    """The neighbouring records are NaN (or extreme) and inactive: they must not leak in."""
    rng = np.random.default_rng(E)
    arrays = operands(rng, B=1, S=3, Z=3, F=9, E=E, dtype=dtype)
    arrays["threshold"][:] = 0
    arrays["scores"][:] = -1
    arrays["scores"][:, :, :, 4] = 1
    clean = {name: array.copy() for name, array in arrays.items()}
    others = [0, 1, 2, 3, 5, 6, 7, 8]
    arrays["scales" if dtype.startswith("int") else "w"][others] = np.nan
    y, _ = ffn(arrays, layer=0, block=1, skip_zeros=0)
    kernels.assert_close(y, numpy_reference.sparse_ffn(**clean)[0])


@pytest.mark.parametrize("S", [1, 2, 40])
@pytest.mark.parametrize("dtype", WEIGHTS)
def test_ffn_returns_exactly_the_bias_and_reads_nothing_when_nothing_is_active(S, dtype):
    arrays = operands(np.random.default_rng(3), S=S, Z=S, dtype=dtype)
    arrays["threshold"][:] = np.inf
    y, read = ffn(arrays)
    np.testing.assert_array_equal(y, np.broadcast_to(arrays["b2"], y.shape))
    assert read == numpy_reference.Read(0, 0)


def test_ffn_is_dense_when_the_mask_is_the_constant_of_a_dense_layer():
    arrays = operands(np.random.default_rng(4), B=3, S=5, L=1, shared=True)
    arrays["scores"][:], arrays["threshold"][:] = 0, -np.inf
    y, read = ffn(arrays)
    hidden = np.maximum(arrays["x"] @ (arrays["w"][:, 0] * arrays["scales"][:, :1]).T + arrays["b1"], 0)
    expected = hidden @ (arrays["w"][:, 1] * arrays["scales"][:, 1:]) + arrays["b2"]
    kernels.assert_close(y, expected)
    assert read.records == 40


@pytest.mark.parametrize("skip_zeros", [0, 1])
@pytest.mark.parametrize("S", [1, 4])
def test_ffn_lets_nan_through_and_never_skips_it(S, skip_zeros):
    arrays = operands(np.random.default_rng(5), S=S, Z=0)
    arrays["x"][0, S - 1, 7] = np.nan
    y, _ = ffn(arrays, skip_zeros=skip_zeros)
    assert np.isnan(y[0, S - 1]).all()
    assert np.isfinite(y[0, : S - 1]).all()


@pytest.mark.parametrize("dtype", WEIGHTS)
@pytest.mark.parametrize(("B", "S"), [(1, 1), (4, 1), (1, 70)])
def test_skip_zeros_changes_no_bit_and_reads_less(B, S, dtype):
    rng = np.random.default_rng(6)
    arrays = operands(rng, B=B, S=S, Z=S, F=900, E=300, dtype=dtype)
    arrays["b1"] -= 4  # few neurons fire
    plain, read = ffn(arrays, skip_zeros=0)
    skipped, less = ffn(arrays, skip_zeros=1)
    np.testing.assert_array_equal(plain, skipped)
    assert less.records == read.records
    assert less == numpy_reference.sparse_ffn(**arrays, skip_zeros=1)[1]
    assert less.bytes < read.bytes


def test_skip_zeros_reads_only_first_halves_when_no_neuron_fires():
    arrays = operands(np.random.default_rng(7), Z=0, dtype="int8")
    arrays["b1"] -= 1000
    y, read = ffn(arrays, skip_zeros=1)
    np.testing.assert_array_equal(y[0, 0], arrays["b2"])
    assert read == numpy_reference.Read(40, 40 * (48 + 4))


def test_ffn_ignores_what_inactive_rows_would_compute():
    """Row 0 computes no neuron: not even NaN in its x may reach y."""
    arrays = operands(np.random.default_rng(8), B=2)
    arrays["x"][0] = np.nan
    arrays["threshold"][:] = [[[np.inf, np.inf]], [[-np.inf, -np.inf]]]
    y, read = ffn(arrays)
    np.testing.assert_array_equal(y[0, 0], arrays["b2"])
    assert np.isfinite(y[1]).all()
    assert read.records == 40


def test_ffn_gives_a_row_the_same_bits_whatever_its_neighbours_leave_out():
    arrays = operands(np.random.default_rng(13), B=4, F=4096, E=512, dtype="int8")
    first = ffn(arrays)[0][3]
    arrays["threshold"][:3] = np.inf
    np.testing.assert_array_equal(ffn(arrays)[0][3], first)


def test_ffn_refuses_rows_of_no_width():
    arrays = operands(np.random.default_rng(14), F=8, E=4)
    arrays |= {"x": arrays["x"][..., :0], "w": arrays["w"][..., :0], "b2": arrays["b2"][:0]}
    with pytest.raises(Exception, match="at least 1"):
        ffn(arrays)


def test_ffn_gives_a_small_row_the_same_bits_whatever_its_neighbours_are():
    arrays = operands(np.random.default_rng(9), B=33, F=60, E=100, dtype="int8")
    alone = {name: arrays[name][32:] if name in ("x", "scores", "threshold") else arrays[name] for name in arrays}
    pair = {name: arrays[name][31:] if name in ("x", "scores", "threshold") else arrays[name] for name in arrays}
    together = ffn(arrays)[0][32]
    np.testing.assert_array_equal(ffn(pair)[0][1], together)
    kernels.assert_close(ffn(alone)[0][0], together)


@pytest.mark.parametrize("block", [4001, 1 << 32, 1 << 62])
def test_a_block_of_more_neurons_than_there_are_is_one_of_them_all(block):
    arrays = operands(np.random.default_rng(11), F=4000, E=256, block=4000, dtype="int8")
    y, read = ffn(arrays, block=4000)
    again, same = ffn(arrays, block=block)
    np.testing.assert_array_equal(again, y)
    np.testing.assert_array_equal(same, read)


@pytest.mark.parametrize("rows", [1, 50])
def test_ffn_repeats_its_bits_at_any_number_of_threads(rows):
    arrays = operands(np.random.default_rng(10), B=rows, F=4000, E=256, block=16, dtype="int8")
    first, read = ffn(arrays, threads=1, block=16)
    for threads in (1, 2, 2, 2, 3):
        y, again = ffn(arrays, threads=threads, block=16)
        np.testing.assert_array_equal(y, first)
        assert again == read


def test_ffn_keeps_concurrent_calls_of_one_session_apart():
    many = [operands(np.random.default_rng(seed), B=1 + seed % 2 * 4, F=900, E=512) for seed in range(6)]
    expected = [ffn(arrays)[0] for arrays in many]
    with ThreadPoolExecutor(6) as pool:
        for _ in range(5):
            for (y, _), once in zip(pool.map(ffn, many), expected, strict=True):
                np.testing.assert_array_equal(y, once)


def test_ffn_returns_nothing_when_there_are_no_tokens():
    arrays = operands(np.random.default_rng(11), S=0, Z=0)
    y, read = ffn(arrays)
    assert y.shape == (1, 0, 48)
    assert read == numpy_reference.Read(0, 0)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"w": np.zeros((40, 2, 47), np.float32)}, r"w must be \[F, 2, E\] = \[40, 2, 48\], found \[40, 2, 47\]"),
        ({"w": np.zeros((40, 3, 48), np.float32)}, r"w must be \[F, 2, E\] = \[40, 2, 48\], found \[40, 3, 48\]"),
        ({"scales": np.zeros((40, 1), np.float32)}, r"scales must be \[F, 2\] = \[40, 2\], found \[40, 1\]"),
        ({"b1": np.zeros(41, np.float32)}, r"b1 must be \[F\] = \[40\], found \[41\]"),
        ({"b2": np.zeros(40, np.float32)}, r"b2 must be \[E\] = \[48\], found \[40\]"),
        ({"x": np.zeros((1, 48), np.float32)}, r"x must be \[B, S, E\], found \[1, 48\]"),
        ({"scores": np.zeros((1, 1, 2, 39), np.float32)}, r"N \(axis 3 of scores\) must be 40 .*, found 39"),
        ({"scores": np.zeros((1, 2, 2, 40), np.float32)}, r"S' \(axis 1 of scores\) must be at most S = 1 .*found 2"),
        ({"scores": np.zeros((2, 1, 2, 40), np.float32)}, r"the batch of scores must be 1 or 1 .*found 2"),
        ({"threshold": np.zeros((1, 1, 3), np.float32)}, r"threshold must be .*\[1, 1, 2, 40\], found \[1, 1, 3\]"),
    ],
)
def test_ffn_says_what_it_expected_when_shapes_disagree(change, says):
    arrays = operands(np.random.default_rng(12)) | change
    with pytest.raises(Exception, match=f"SparseFFN node 'the_node': .*{says}"):
        ffn(arrays)


@pytest.mark.parametrize(
    ("width", "change", "says"),
    [
        (96, {}, r"E \(axis 2 of x\) must be a multiple of 64, the group of int4 weights, found 96"),
        (128, {"w": (40, 2, 128)}, r"w must be \[F, 2, E / 2\] = \[40, 2, 64\], found \[40, 2, 128\]"),
        (128, {"scales": (40, 2)}, r"scales must be \[F, 2, E / 64\] = \[40, 2, 2\], found \[40, 2\]"),
    ],
)
def test_ffn_says_what_it_expected_when_int4_operands_do_not_fit(width, change, says):
    arrays = operands(np.random.default_rng(15), E=width, dtype="bfloat16")
    arrays |= {"w": np.ones((40, 2, width // 2), np.uint8), "scales": np.ones((40, 2, width // 64), np.float32)}
    arrays |= {name: np.ones(shape, arrays[name].dtype) for name, shape in change.items()}
    with pytest.raises(Exception, match=says):
        ffn(arrays)


def test_ffn_reports_all_problems_at_once():
    arrays = operands(np.random.default_rng(12))
    arrays |= {"b1": np.zeros(1, np.float32), "b2": np.zeros(2, np.float32)}
    with pytest.raises(Exception, match=r"b1 must be .*; b2 must be .*"):
        ffn(arrays)


@pytest.mark.parametrize(
    ("attributes", "says"),
    [
        ({"layer": 2}, r"attribute layer must be in 0 \.\.\. 1 \(axis 2 of scores\), found 2"),
        ({"layer": -1}, r"attribute layer must be in 0 \.\.\. 1 \(axis 2 of scores\), found -1"),
        ({"block": 0}, "attribute block must be at least 1, found 0"),
    ],
)
def test_ffn_says_what_it_expected_when_attributes_are_out_of_range(attributes, says):
    with pytest.raises(Exception, match=says):
        ffn(operands(np.random.default_rng(13)), **attributes)


def test_ffn_names_the_types_it_takes_when_the_session_is_made():
    arrays = operands(np.random.default_rng(14))
    arrays["w"] = arrays["w"].astype(np.float16)
    with pytest.raises(
        Exception, match=r"the element type of w must be float32, bfloat16, int8, or uint8 .*, found float16"
    ):
        ffn(arrays)


@pytest.mark.parametrize("E", [64, 128, 192, 1088])
@pytest.mark.parametrize("F", [1, 4, 5, 8, 19, 33])
def test_int4_columns_are_summed_exactly_whatever_the_number_of_rows_and_groups(E, F):
    """Rows are added by up to sixteen, columns by pairs of groups, with a rest of each; a digit less would show."""
    arrays = operands(np.random.default_rng(E + F), F=F, E=E, Z=0, dtype="int4")
    arrays["b1"] += 3  # all fire
    kernels.assert_close(ffn(arrays)[0], numpy_reference.sparse_ffn(**arrays)[0], kernels.TOLERANCE / 10)


@pytest.mark.parametrize("B", [1, 3])
def test_int4_tokens_that_may_round_do_so_to_eight_bits(B):
    """The rest of what they promise is in test_int4_tokens.py; this is for builds that find bad accesses and races."""
    for seed, (F, E) in enumerate([(1, 64), (70, 192), (2000, 1088), (700, 2048)]):
        arrays = operands(np.random.default_rng(seed), B=B, F=F, E=E, dtype="int4", shared=True)
        found = [ffn(arrays, few_digits=1, skip_zeros=skip_zeros)[0] for skip_zeros in (0, 1)]
        kernels.assert_close(found[0], numpy_reference.sparse_ffn(**arrays)[0], 2e-2)
        np.testing.assert_array_equal(found[0], found[1])


@pytest.mark.parametrize("value", [1.0, -1.0])
@pytest.mark.parametrize("stored", [0x00, 0xFF, 0xF0, 0x0F])
def test_extreme_int4_weights_meet_extreme_bytes_without_saturating(stored, value):
    arrays = operands(np.random.default_rng(16), F=24, E=1088, Z=0, dtype="int4")
    arrays["x"][:] = value  # 127 of 127, as all factors are
    arrays["w"][:] = stored
    arrays["scales"][:] = 0.01
    arrays["b1"][:] = 30
    found, _ = ffn(arrays, few_digits=1)
    kernels.assert_close(found, numpy_reference.sparse_ffn(**arrays)[0])


@pytest.mark.parametrize("E", [192, 2304, 2560])
@pytest.mark.parametrize("few_digits", [0, 1])
def test_int4_groups_whose_factors_have_no_digits_leave_the_bits_of_others(E, few_digits):
    """Whatever groups of columns are split together: with and without zeros, of one token and of many."""
    arrays = operands(np.random.default_rng(17), F=24, E=E, Z=0, dtype="int4")
    changed = arrays | {"scales": arrays["scales"].copy()}
    changed["scales"][:, 1, 2] = 1e-36
    (found, other), (clean, _) = (
        [ffn(one, few_digits=few_digits, skip_zeros=skip_zeros)[0] for skip_zeros in (0, 1)]
        for one in (changed, arrays)
    )
    np.testing.assert_array_equal(found, other)
    np.testing.assert_array_equal(np.delete(found, np.s_[128:256], -1), np.delete(clean, np.s_[128:256], -1))


@pytest.mark.parametrize("value", [1.0, -1.0])
@pytest.mark.parametrize("stored", [0x00, 0xFF, 0xF0, 0x0F])
def test_extreme_int4_weights_meet_extreme_digits_without_saturating(stored, value):
    """Products of bytes are added up in 16 bits where there is no wider instruction."""
    arrays = operands(np.random.default_rng(16), F=24, E=1088, Z=0, dtype="int4")
    arrays["x"][:] = value
    arrays["x"][..., 1:] *= (126 * 65536 - 128 * 256 - 128) / 8355000  # digits of 126, -128, -128
    arrays["w"][:] = stored
    arrays["scales"][:] = 0.01
    arrays["b1"][:] = 30
    kernels.assert_close(ffn(arrays)[0], numpy_reference.sparse_ffn(**arrays)[0], kernels.TOLERANCE / 10)


@pytest.mark.parametrize("factor", [1e-34, 1e32, np.inf, np.nan])
def test_int4_factors_without_digits_are_added_as_floats(factor):
    arrays = operands(np.random.default_rng(15), F=12, E=192, Z=0, dtype="int4")
    arrays["b1"] += 3
    arrays["scales"][5, 1, 1] = factor  # of the second group of columns of one row
    with np.errstate(invalid="ignore", over="ignore"):
        expected = numpy_reference.sparse_ffn(**arrays)[0]
        found = ffn(arrays)[0]
    for columns in (slice(0, 64), slice(64, 128), slice(128, 192)):
        kernels.assert_close(found[..., columns], expected[..., columns].astype(np.float32))
