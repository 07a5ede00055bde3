# SPDX-License-Identifier: Apache-2.0
"""SparseAttention as machine code, against the ONNX function and float64 numpy."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shadowc.spec.ops import SPARSE_ATTENTION
from tests.plugins import kernels, numpy_reference

WEIGHTS = kernels.WEIGHTS
CACHES = tuple(kernels.CACHE_TOLERANCE)


def operands(
    rng,
    *,
    B=1,
    S=1,
    Z=1,
    L=2,
    H=3,
    D=16,
    T=12,
    dtype="float32",
    cache="float32",
    shared=False,
    fixed_mask=False,
    norm=False,
):
    """Random operands; cache slots outside start .. past are NaN. `fixed_mask`: all tokens have the first one's.

    int4 heads are as large as the groups ask for.
    """
    D = D if kernels.width_for(dtype, H * D) == H * D else kernels.width_for(dtype, D)
    E, W = H * D, 1 if shared else B
    w, scales = kernels.weights(rng, (H, 4, D, E), dtype)
    past = rng.integers(0, T - S + 1, B)
    start = np.minimum(rng.integers(0, 4, B) * rng.integers(0, 2, B), past + S)
    key, value = (rng.standard_normal((B, H, T, D), dtype=np.float32).astype(cache) for _ in range(2))
    for b in range(B):
        for kept in (key, value):
            kept[b, :, : start[b]] = np.nan
            kept[b, :, past[b] :] = np.nan
    scores = rng.standard_normal((W, Z, L, H), dtype=np.float32)
    threshold = rng.standard_normal((W, Z, L), dtype=np.float32) * np.float32(0.5)
    if fixed_mask:
        scores[:], threshold[:] = scores[:, :1], threshold[:, :1]
    return {
        "x": rng.standard_normal((B, S, E), dtype=np.float32),
        "scores": scores,
        "threshold": threshold,
        "w": w,
        "scales": scales,
        "bqkv": rng.standard_normal((H, 3, D), dtype=np.float32),
        "bo": rng.standard_normal(E, dtype=np.float32),
        "past_key": key,
        "past_value": value,
        "start": start.astype(np.int64),
        "past": past.astype(np.int64),
        **(kernels.norm(rng, E) if norm else {}),
    }


def attend(arrays, **attributes):
    found = kernels.run(SPARSE_ATTENTION, arrays, **attributes)
    return found, numpy_reference.Read(*map(int, found.pop("read")))


def live(cache, arrays):
    """Slots start .. past + S - 1 of each row, flat: all that a kernel promises to fill or keep."""
    ends = arrays["past"] + arrays["x"].shape[1]
    return np.concatenate([cache[b, :, arrays["start"][b] : ends[b]].ravel() for b in range(len(cache))])


def assert_as_defined(arrays, **attributes):
    found, read = attend(arrays, **attributes)
    stored = found["present_key"], found["present_value"]
    y, key, value, context, expected_read = numpy_reference.sparse_attention(**arrays, **attributes, stored=stored)
    oracle = kernels.oracle_run(SPARSE_ATTENTION, arrays, **attributes)
    tolerance = kernels.CACHE_TOLERANCE[str(stored[0].dtype)]
    # The ONNX function's host attends to new keys and values before a narrow cache rounds them, and where logits are
    # large that moves the result without a limit: each is held to the definition with the keys that it attends to.
    unrounded = numpy_reference.sparse_attention(**arrays, **attributes)
    for name, place, expected in (("y", 0, y), ("context", 3, context)):
        kernels.assert_close(found[name], expected)
        kernels.assert_close(oracle[name], unrounded[place])
    for name, expected in (("present_key", key), ("present_value", value)):
        assert found[name].dtype == arrays["past_key"].dtype
        kernels.assert_close(live(found[name], arrays), live(expected, arrays), tolerance)
        kernels.assert_close(live(found[name], arrays), live(oracle[name], arrays), tolerance)
    assert read == expected_read


@settings(max_examples=80, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    B=st.integers(1, 3),
    S=st.integers(1, 9),
    tail=st.floats(0, 1),
    H=st.integers(1, 5),
    D=st.sampled_from([1, 3, 16, 20, 33, 64]),
    room=st.integers(0, 20),
    layer=st.integers(0, 2),
    dtype=st.sampled_from(WEIGHTS),
    cache=st.sampled_from(CACHES),
    shared=st.booleans(),
    norm=st.booleans(),
)
def test_attention_equals_its_definition(seed, B, S, tail, H, D, room, layer, dtype, cache, shared, norm):
    rng, sizes = np.random.default_rng(seed), {"L": 3, "H": H, "D": D, "T": S + room}
    kind = {"dtype": dtype, "cache": cache, "shared": shared, "norm": norm}
    arrays = operands(rng, B=B, S=S, Z=round(tail * S), **sizes, **kind)
    assert_as_defined(arrays, layer=layer)


@pytest.mark.parametrize(("dtype", "cache"), [*((dtype, "float32") for dtype in WEIGHTS), ("float32", "float16")])
@pytest.mark.parametrize(("B", "S"), [(1, 1), (2, 1), (1, 6), (3, 4)])
def test_attention_equals_its_definition_when_only_active_heads_keep_a_cache(B, S, dtype, cache):
    rng = np.random.default_rng(20)
    for _ in range(4):
        arrays = operands(rng, B=B, S=S, Z=S, H=4, dtype=dtype, cache=cache, fixed_mask=True)
        assert_as_defined(arrays, layer=1, kv="active")


@pytest.mark.parametrize(("dtype", "cache"), [*((dtype, "float32") for dtype in WEIGHTS), ("float32", "float16")])
@pytest.mark.parametrize(
    ("B", "S", "H", "D", "T"),
    [(1, 1, 12, 64, 300), (40, 1, 2, 32, 9), (1, 100, 2, 128, 128), (3, 45, 4, 80, 64), (1, 70, 3, 24, 200)],
)
@pytest.mark.parametrize("norm", [False, True])
def test_attention_equals_its_definition_when_work_is_cut_into_tiles(B, S, H, D, T, dtype, cache, norm):
    arrays = operands(np.random.default_rng(21), B=B, S=S, Z=S, H=H, D=D, T=T, dtype=dtype, cache=cache, norm=norm)
    assert_as_defined(arrays, layer=1)


@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize(("H", "D"), [(16, 128), (18, 128), (64, 36)])
def test_attention_of_wide_rows_equals_its_definition(H, D, dtype):
    arrays = operands(np.random.default_rng(22), H=H, D=D, T=9, dtype=dtype, norm=True)
    assert_as_defined(arrays, layer=1)


@pytest.mark.parametrize("D", [1, 3, 16, 33])
@pytest.mark.parametrize("S", [1, 3])
def test_attention_rounds_to_a_float16_cache_as_ieee_does_and_attends_to_what_it_stored(S, D):
    """Biases alone make the keys and values, so that float16 numpy gives the same bits: ties, subnormals, infinity."""
    arrays = operands(np.random.default_rng(34), S=S, Z=0, D=D, cache="float16")
    arrays["w"][:, 1:3] = 0
    special = np.array([1 + 2**-11, 1 + 3 * 2**-11, 6e-8, 2.0**-26, 65519, 65520, -0.1], np.float32)
    arrays["bqkv"][:, 1:] = np.resize(special, arrays["bqkv"][:, 1:].shape)
    found, _ = attend(arrays)
    at = arrays["past"][0]
    with np.errstate(over="ignore"):
        for row, name in enumerate(("present_key", "present_value"), start=1):
            expected = np.broadcast_to(arrays["bqkv"][:, row].astype(np.float16)[:, None], (3, S, D))
            np.testing.assert_array_equal(found[name][0, :, at : at + S], expected)


def test_a_kernel_that_attends_to_unrounded_keys_would_be_found():
    arrays = operands(np.random.default_rng(35), S=4, Z=0, H=4, D=64, cache="float16")
    arrays["past"][:] = arrays["start"][:] = 0
    rounded, _ = attend(arrays)
    float32 = {name: arrays[name].astype(np.float32) for name in ("past_key", "past_value")}
    with pytest.raises(AssertionError):
        kernels.assert_close(rounded["context"], attend(arrays | float32)[0]["context"])


def test_attention_refuses_a_cache_of_two_types():
    arrays = operands(np.random.default_rng(36))
    arrays["past_value"] = arrays["past_value"].astype(np.float16)
    with pytest.raises(Exception, match="SparseAttention"):
        attend(arrays)


def test_attention_continues_what_a_prefill_began():
    """Prefill of 6 tokens, then 3 single steps, give what one pass over 9 tokens gives."""
    arrays = operands(np.random.default_rng(22), B=2, S=9, Z=0, H=4, T=10)
    arrays["past"][:], arrays["start"][:] = 0, [0, 3]
    whole, _ = attend(arrays)
    step = dict(arrays, x=arrays["x"][:, :6])
    parts = [attend(step)[0]]
    for s in range(6, 9):
        step = step | {
            "x": arrays["x"][:, s : s + 1],
            "past": np.full(2, s, np.int64),
            "past_key": parts[-1]["present_key"],
            "past_value": parts[-1]["present_value"],
        }
        parts.append(attend(step)[0])
    kernels.assert_close(np.concatenate([part["y"] for part in parts], axis=1), whole["y"])


@pytest.mark.parametrize(("B", "S"), [(1, 1), (2, 7)])
@pytest.mark.parametrize("kv", ["all", "active"])
@pytest.mark.parametrize("cache", CACHES)
def test_attention_updates_the_cache_in_place_when_one_buffer_is_bound_twice(B, S, kv, cache):
    arrays = operands(np.random.default_rng(23), B=B, S=S, Z=S, H=4, cache=cache, fixed_mask=True)
    separate, _ = attend(arrays, kv=kv)
    types = {name: array.dtype for name, array in arrays.items()}
    ranks = {name: array.ndim for name, array in arrays.items()}
    session = kernels.session(kernels.model(SPARSE_ATTENTION, types, ranks, {"kv": kv}))
    binding = session.io_binding()
    caches = {}
    kept = {name: array.copy() for name, array in arrays.items()}  # in ORT 1.23 an OrtValue borrows its array
    for name, array in kept.items():
        value = onnxruntime.OrtValue.ortvalue_from_numpy(array)
        binding.bind_ortvalue_input(name, value)
        if name.startswith("past_"):
            caches[name.replace("past", "present")] = value
    for output in session.get_outputs():
        if output.name in caches:
            binding.bind_ortvalue_output(output.name, caches[output.name])
        else:
            binding.bind_output(output.name)
    session.run_with_iobinding(binding)
    y = binding.get_outputs()[0].numpy()
    np.testing.assert_array_equal(y, separate["y"])
    for name, value in caches.items():
        np.testing.assert_array_equal(live(value.numpy(), arrays), live(separate[name], arrays))
        untouched = value.numpy()[0, :, arrays["past"][0] + S :]
        np.testing.assert_array_equal(untouched, arrays[name.replace("present", "past")][0, :, arrays["past"][0] + S :])


@pytest.mark.parametrize("S", [1, 3])
def test_attention_returns_the_bias_and_still_writes_the_cache_when_no_head_is_active(S):
    arrays = operands(np.random.default_rng(24), S=S, Z=S, dtype="int8")
    arrays["threshold"][:] = np.inf
    found, read = attend(arrays)
    np.testing.assert_array_equal(found["y"], np.broadcast_to(arrays["bo"], found["y"].shape))
    assert not found["context"].any()
    assert np.isfinite(live(found["present_key"], arrays)).all()
    assert read == numpy_reference.Read(3, 3 * 2 * 16 * (48 + 4))


@pytest.mark.parametrize("S", [1, 3])
def test_attention_reads_nothing_when_no_head_is_active_and_only_active_ones_keep_a_cache(S):
    arrays = operands(np.random.default_rng(25), S=S, Z=S)
    arrays["threshold"][:] = np.inf
    found, read = attend(arrays, kv="active")
    np.testing.assert_array_equal(found["y"], np.broadcast_to(arrays["bo"], found["y"].shape))
    assert read == numpy_reference.Read(0, 0)


def test_attention_gives_context_zero_to_a_query_that_sees_no_slot():
    arrays = operands(np.random.default_rng(26), S=4, Z=0)
    arrays["past"][:], arrays["start"][:] = 2, 4
    found, _ = attend(arrays)
    assert not found["context"][0, :2].any()
    assert found["context"][0, 2:].all()
    np.testing.assert_array_equal(found["y"][0, 0], arrays["bo"])


def test_attention_keeps_later_tokens_from_earlier_ones_even_if_they_are_nan():
    arrays = operands(np.random.default_rng(27), S=6, Z=0)
    arrays["x"][0, 4] = np.nan
    found, _ = attend(arrays)
    assert np.isfinite(found["y"][0, :4]).all()
    assert np.isnan(found["y"][0, 4:]).all()


@pytest.mark.parametrize("filled", [4, 21, 41])
def test_attention_shows_a_nan_key_instead_of_masking_it(filled):
    arrays = operands(np.random.default_rng(11), H=1, D=16, T=48)
    arrays["threshold"][:] = -np.inf
    for name in ("past_key", "past_value"):
        arrays[name] = np.random.default_rng(12).standard_normal(arrays[name].shape, dtype=np.float32)
    arrays["start"][:], arrays["past"][:] = 0, filled
    arrays["past_key"][0, 0, 2, 5] = np.nan
    assert np.isnan(attend(arrays)[0]["context"]).all()


def test_attention_survives_logits_that_overflow_exp():
    arrays = operands(np.random.default_rng(28), S=3, Z=0)
    arrays["bqkv"] *= 60
    assert_as_defined(arrays)


@pytest.mark.parametrize(("B", "S"), [(1, 1), (2, 40)])
def test_attention_repeats_its_bits_at_any_number_of_threads(B, S):
    arrays = operands(np.random.default_rng(29), B=B, S=S, Z=S, H=8, D=64, T=80, dtype="int8")
    first, read = attend(arrays, threads=1)
    for threads in (1, 2, 2, 3):
        found, again = attend(arrays, threads=threads)
        np.testing.assert_array_equal(found["y"], first["y"])
        np.testing.assert_array_equal(live(found["present_value"], arrays), live(first["present_value"], arrays))
        assert again == read


@pytest.mark.parametrize("kv", ["all", "active"])
@pytest.mark.parametrize("active", [range(3), range(9, 11), [7], [0, 10], range(0, 11, 2), range(11), []], ids=str)
def test_attention_repeats_its_bits_wherever_the_active_heads_lie_whoever_shares_the_call(active, kv):
    H = 11
    one = operands(np.random.default_rng(31), H=H, D=32, T=90, L=1, dtype="int8")
    one["threshold"][:] = 0
    one["scores"][..., :] = np.isin(range(H), list(active)) - 0.5
    per_row = {"x", "scores", "threshold", "past_key", "past_value", "start", "past"}
    two = {name: np.concatenate([a, a]) if name in per_row else a for name, a in one.items()}
    assert_as_defined(one, layer=0, kv=kv)
    expected = attend(two, layer=0, kv=kv)[0]["y"]
    for threads in (1, 2, 3, 16):
        found, _ = attend(one, layer=0, kv=kv, threads=threads)
        np.testing.assert_array_equal(found["y"][0], expected[0])
        np.testing.assert_array_equal(found["y"][0], expected[1])


def test_attention_keeps_concurrent_calls_of_one_session_apart():
    many = [operands(np.random.default_rng(seed), S=1 + seed % 2 * 6, Z=1, H=6, D=32, T=40) for seed in range(6)]
    expected = [attend(arrays)[0]["y"] for arrays in many]
    with ThreadPoolExecutor(6) as pool:
        for _ in range(5):
            for (found, _), y in zip(pool.map(attend, many), expected, strict=True):
                np.testing.assert_array_equal(found["y"], y)


def test_attention_returns_the_cache_when_there_are_no_tokens():
    arrays = operands(np.random.default_rng(30), S=0, Z=0)
    found, read = attend(arrays)
    assert found["y"].shape == (1, 0, 48)
    np.testing.assert_array_equal(live(found["present_key"], arrays), live(arrays["past_key"], arrays))
    assert read == numpy_reference.Read(0, 0)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"past": [12]}, r"past\[0\] \+ S must be at most the cache capacity T = 12, found 12 \+ 1"),
        ({"past": [-1]}, r"past\[0\] must be at least 0, found -1"),
        ({"past": [2], "start": [4]}, r"start\[0\] must be in 0 \.\.\. past \+ S = 2 \+ 1, found 4"),
        ({"start": [-2]}, r"start\[0\] must be in 0 .*found -2"),
        ({"past": [2**63 - 1]}, r"past\[0\] \+ S must be at most the cache capacity T = 12"),
        ({"past": [1, 1]}, r"past must be \[B\] = \[1\], found \[2\]"),
    ],
)
def test_attention_refuses_positions_outside_the_cache(change, says):
    arrays = operands(np.random.default_rng(31))
    arrays |= {name: np.array(value, np.int64) for name, value in change.items()}
    with pytest.raises(Exception, match=f"SparseAttention node 'the_node': .*{says}"):
        attend(arrays)


@pytest.mark.parametrize(
    ("name", "shape", "says"),
    [
        ("w", (3, 4, 15, 48), r"H \* D .* must be E = 48, found 3 \* 15"),
        ("w", (3, 3, 16, 48), r"w must be \[H, 4, D, E\] = \[3, 4, 16, 48\], found \[3, 3, 16, 48\]"),
        ("scales", (3, 4), r"scales must be \[H, 4, D\] = \[3, 4, 16\], found \[3, 4\]"),
        ("bqkv", (3, 4, 16), r"bqkv must be \[H, 3, D\] = \[3, 3, 16\], found \[3, 4, 16\]"),
        ("bo", (47,), r"bo must be \[E\] = \[48\], found \[47\]"),
        ("past_value", (1, 3, 11, 16), r"past_value must be .* = \[1, 3, 12, 16\], found \[1, 3, 11, 16\]"),
        ("scores", (1, 1, 2, 4), r"N \(axis 3 of scores\) must be 3 \(H, axis 0 of w\), found 4"),
    ],
)
def test_attention_says_what_it_expected_when_shapes_disagree(name, shape, says):
    arrays = operands(np.random.default_rng(32)) | {name: np.zeros(shape, np.float32)}
    with pytest.raises(Exception, match=says):
        attend(arrays)


def test_attention_refuses_attributes_and_types_when_the_session_is_made():
    arrays = operands(np.random.default_rng(33))
    with pytest.raises(Exception, match="attribute kv must be 'all' or 'active', found 'some'"):
        attend(arrays, kv="some")
    with pytest.raises(Exception, match="attribute few_digits must be 0 to 3, found 4"):
        attend(arrays, few_digits=4)
    arrays["w"] = arrays["w"].astype(np.int32)
    with pytest.raises(
        Exception, match=r"the element type of w must be float32, bfloat16, int8, or uint8 .*, found int32"
    ):
        attend(arrays)


@pytest.mark.parametrize("B", [1, 3])
def test_int4_tokens_that_may_round_do_so_to_eight_bits_in_attention(B):
    arrays = operands(np.random.default_rng(B), B=B, H=6, D=64, dtype="int4", shared=True)
    found, exact = (kernels.run(SPARSE_ATTENTION, arrays, **choice) for choice in ({"few_digits": 1}, {}))
    for name in ("y", "context"):
        kernels.assert_close(found[name], exact[name], 2e-2)
