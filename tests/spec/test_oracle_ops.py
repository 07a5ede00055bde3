# SPDX-License-Identifier: Apache-2.0
"""Each operator's function in stock ONNX Runtime against plain numpy loops.

Letters as in shadowc/spec/ops.py.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.spec import numpy_ops
from tests.spec.sessions import run_op

FP32_TOLERANCE = 1e-5
EXAMPLES = settings(max_examples=60)
SCORES = ("normal", "ties", "some NaN", "all NaN", "infinite")

Array = npt.NDArray[np.float32]
Feeds = dict[str, npt.NDArray[np.generic]]


def normal(rng: np.random.Generator, *shape: int, scale: float = 1.0) -> Array:
    return (scale * rng.standard_normal(shape)).astype(np.float32)


def scores_of(kind: str, rng: np.random.Generator, *shape: int) -> Array:
    scores = normal(rng, *shape)
    if kind == "ties":
        return np.round(scores)
    if kind == "some NaN":
        scores[rng.random(shape) < 0.3] = np.nan
    if kind == "all NaN":
        scores[:] = np.nan
    if kind == "infinite":
        scores[rng.random(shape) < 0.3] = np.inf
        scores[rng.random(shape) < 0.3] = -np.inf
    return scores


# --- SelectThreshold ---------------------------------------------------------------------------------------


@EXAMPLES
@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.tuples(st.integers(1, 3), st.integers(0, 3), st.integers(1, 4), st.integers(1, 9)),
    kind=st.sampled_from(SCORES),
    one_density=st.booleans(),
    scope=st.sampled_from(["local", "global"]),
    exempt=st.sampled_from([(-1,), (0,), (0, 2), (0, 1, 2, 3)]),
    min_active=st.sampled_from([0, 2, 20]),
)
def test_select_threshold_equals_the_loops(seed, shape, kind, one_density, scope, exempt, min_active) -> None:
    rng = np.random.default_rng(seed)
    scores = scores_of(kind, rng, *shape)
    special = np.array([0.0, 1.0, 0.5, np.nan, -0.5, 1.5], np.float32)
    rows = 1 if one_density else shape[0]
    density = np.where(rng.random(rows) < 0.5, rng.choice(special, rows), rng.random(rows)).astype(np.float32)
    attributes = {"scope": scope, "exempt": exempt, "min_active": min_active}
    expected = numpy_ops.select_threshold(scores, density, **attributes)
    found = run_op("SelectThreshold", {"scores": scores, "density": density}, **attributes)
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_array_equal(found[1], expected[1])


def test_select_threshold_counts_in_double_precision() -> None:
    just_below_half = np.nextafter(np.float32(0.5), np.float32(0))  # in float32 it plus 0.5 is 1.0: one unit
    scores = np.zeros((1, 1, 1, 1), np.float32)
    _, active = run_op("SelectThreshold", {"scores": scores, "density": np.array([just_below_half])})
    assert active.item() == 0


def test_select_threshold_keeps_all_tied_units() -> None:
    scores = np.array([3, 1, 1, 1, 0], np.float32).reshape(1, 1, 1, 5)
    threshold, active = run_op("SelectThreshold", {"scores": scores, "density": np.array([0.4], np.float32)})
    assert threshold.item() == 1.0
    assert active.item() == 4


def test_select_threshold_global_gives_a_layer_what_it_deserves() -> None:
    scores = np.array([[9, 8, 7, 6], [1, 2, 3, 4]], np.float32).reshape(1, 1, 2, 4)
    feeds = {"scores": scores, "density": np.array([0.5], np.float32)}
    assert run_op("SelectThreshold", feeds, scope="global")[1].tolist() == [[[4, 0]]]
    assert run_op("SelectThreshold", feeds, scope="global", min_active=1)[1].tolist() == [[[4, 1]]]
    assert run_op("SelectThreshold", feeds, scope="local")[1].tolist() == [[[2, 2]]]


# --- SparseFFN ---------------------------------------------------------------------------------------------


def ffn_feeds(rng, *, batch, tokens, tail, layers, hidden, neurons, block, one_row=False, int8=False) -> Feeds:
    units, rows = -(-neurons // block), 1 if one_row else batch
    weights = normal(rng, neurons, 2, hidden, scale=0.3)
    scales = np.ones((neurons, 2), np.float32)
    if int8:
        weights = rng.integers(-127, 128, weights.shape).astype(np.int8)
        scales = np.abs(normal(rng, neurons, 2, scale=0.003))
    return {
        "x": normal(rng, batch, tokens, hidden),
        "scores": scores_of(rng.choice(SCORES), rng, rows, tail, layers, units),
        "threshold": np.where(rng.random((rows, tail, layers)) < 0.2, np.inf, normal(rng, rows, tail, layers)).astype(
            np.float32
        ),
        "w": weights,
        "scales": scales,
        "b1": normal(rng, neurons),
        "b2": normal(rng, hidden),
    }


@st.composite
def ffn_cases(draw: st.DrawFn) -> tuple[Feeds, dict[str, int]]:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    tokens, layers, block = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.sampled_from([1, 4, 8]))
    feeds = ffn_feeds(
        rng,
        batch=draw(st.integers(1, 3)),
        tokens=tokens,
        tail=draw(st.integers(0, tokens)),
        layers=layers,
        hidden=draw(st.integers(1, 9)),
        neurons=draw(st.integers(1, 21)),
        block=block,
        one_row=draw(st.booleans()),
        int8=draw(st.booleans()),
    )
    return feeds, {"layer": draw(st.integers(0, layers - 1)), "block": block}


@EXAMPLES
@given(case=ffn_cases())
def test_sparse_ffn_equals_the_loops(case: tuple[Feeds, dict[str, int]]) -> None:
    feeds, attributes = case
    (found,) = run_op("SparseFFN", feeds, **attributes)
    np.testing.assert_allclose(
        found, numpy_ops.sparse_ffn(**feeds, **attributes), rtol=FP32_TOLERANCE, atol=FP32_TOLERANCE
    )


def test_sparse_ffn_is_its_bias_when_nothing_is_active() -> None:
    feeds = ffn_feeds(np.random.default_rng(1), batch=2, tokens=3, tail=3, layers=1, hidden=8, neurons=20, block=4)
    feeds["scores"][:] = 0.0
    feeds["threshold"][:] = np.inf
    (y,) = run_op("SparseFFN", feeds, block=4)
    np.testing.assert_array_equal(y, np.broadcast_to(feeds["b2"], y.shape))


def test_sparse_ffn_ignores_skip_zeros() -> None:
    feeds = ffn_feeds(np.random.default_rng(2), batch=1, tokens=2, tail=1, layers=2, hidden=8, neurons=20, block=4)
    plain, skipping = (run_op("SparseFFN", feeds, block=4, layer=1, skip_zeros=flag)[0] for flag in (0, 1))
    np.testing.assert_array_equal(plain, skipping)


# --- SparseAttention ---------------------------------------------------------------------------------------


def attention_feeds(rng, *, batch, tokens, tail, layers, heads, size, spare, one_row=False, int8=False) -> Feeds:
    hidden, rows = heads * size, 1 if one_row else batch
    past = rng.integers(0, 5, batch)
    start = rng.integers(0, past + tokens + 1)  # up to "every token is a pad"
    capacity = int(past.max()) + tokens + spare
    weights = normal(rng, heads, 4, size, hidden, scale=0.4)
    scales = np.ones((heads, 4, size), np.float32)
    if int8:
        weights = rng.integers(-127, 128, weights.shape).astype(np.int8)
        scales = np.abs(normal(rng, heads, 4, size, scale=0.004))
    feeds: Feeds = {
        "x": normal(rng, batch, tokens, hidden),
        "scores": scores_of(rng.choice(SCORES), rng, rows, tail, layers, heads),
        "threshold": normal(rng, rows, tail, layers),
        "w": weights,
        "scales": scales,
        "bqkv": normal(rng, heads, 3, size),
        "bo": normal(rng, hidden),
        "past_key": normal(rng, batch, heads, capacity, size),
        "past_value": normal(rng, batch, heads, capacity, size),
        "start": start.astype(np.int64),
        "past": past.astype(np.int64),
    }
    for cache in (feeds["past_key"], feeds["past_value"]):
        for row in range(batch):
            cache[row, :, : start[row]] = np.nan
            cache[row, :, past[row] :] = np.inf if row % 2 else np.nan
    return feeds


@st.composite
def attention_cases(draw: st.DrawFn, *, fixed_mask: bool = False) -> tuple[Feeds, dict[str, int]]:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    tokens, layers = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    feeds = attention_feeds(
        rng,
        batch=draw(st.integers(1, 3)),
        tokens=tokens,
        tail=tokens if fixed_mask else draw(st.integers(0, tokens)),
        layers=layers,
        heads=draw(st.integers(1, 4)),
        size=draw(st.integers(1, 5)),
        spare=draw(st.integers(0, 2)),
        one_row=draw(st.booleans()),
        int8=draw(st.booleans()),
    )
    if fixed_mask:
        feeds["scores"][:] = feeds["scores"][:, :1]
        feeds["threshold"][:] = feeds["threshold"][:, :1]
    return feeds, {"layer": draw(st.integers(0, layers - 1))}


def assert_attention_equals_the_loops(feeds: Feeds, **attributes: int | str) -> None:
    found = run_op("SparseAttention", feeds, **attributes)
    for name, mine, expected in zip(
        ("y", "present_key", "present_value", "context"),
        found,
        numpy_ops.sparse_attention(**feeds, **attributes),
        strict=True,
    ):
        np.testing.assert_allclose(mine, expected, rtol=FP32_TOLERANCE, atol=FP32_TOLERANCE, err_msg=name)
    assert np.isfinite(found[0]).all(), "what lies in dead slots leaked"
    assert np.isfinite(found[3]).all(), "what lies in dead slots leaked"


@EXAMPLES
@given(case=attention_cases())
def test_sparse_attention_equals_the_loops(case: tuple[Feeds, dict[str, int]]) -> None:
    feeds, attributes = case
    assert_attention_equals_the_loops(feeds, **attributes)


@EXAMPLES
@given(case=attention_cases(fixed_mask=True))
def test_sparse_attention_writes_active_heads_only_when_kv_is_active(case: tuple[Feeds, dict[str, int]]) -> None:
    feeds, attributes = case
    assert_attention_equals_the_loops(feeds, kv="active", **attributes)


def test_sparse_attention_is_its_bias_when_no_head_is_active() -> None:
    feeds = attention_feeds(np.random.default_rng(3), batch=2, tokens=2, tail=2, layers=1, heads=3, size=4, spare=1)
    feeds["scores"][:] = 0.0
    feeds["threshold"][:] = np.inf
    y, _, _, context = run_op("SparseAttention", feeds)
    np.testing.assert_array_equal(y, np.broadcast_to(feeds["bo"], y.shape))
    assert not context.any()


def test_sparse_attention_keeps_keys_of_inactive_heads_for_later_tokens() -> None:
    feeds = attention_feeds(np.random.default_rng(4), batch=1, tokens=2, tail=2, layers=1, heads=3, size=4, spare=1)
    feeds["scores"][:] = 0.0
    all_active, none_active = np.full_like(feeds["threshold"], -np.inf), np.full_like(feeds["threshold"], np.inf)
    dense = run_op("SparseAttention", {**feeds, "threshold": all_active})
    sparse = run_op("SparseAttention", {**feeds, "threshold": none_active})
    np.testing.assert_array_equal(sparse[1], dense[1])
    np.testing.assert_array_equal(sparse[2], dense[2])


@pytest.mark.parametrize("op", ["SparseFFN", "SparseAttention"])
def test_one_row_of_scores_serves_the_whole_batch_when_layers_are_dense(op: str) -> None:
    rng = np.random.default_rng(5)
    sizes = {"batch": 3, "tokens": 2, "tail": 1, "layers": 1, "one_row": True}
    feeds = (
        ffn_feeds(rng, hidden=4, neurons=6, block=2, **sizes)
        if op == "SparseFFN"
        else attention_feeds(rng, heads=2, size=3, spare=0, **sizes)
    )
    feeds["scores"][:] = 0.0
    feeds["threshold"][:] = -np.inf
    attributes = {"block": 2} if op == "SparseFFN" else {}
    one = run_op(op, feeds, **attributes)
    spread = {name: np.repeat(feeds[name], 3, axis=0) for name in ("scores", "threshold")}
    for mine, theirs in zip(one, run_op(op, {**feeds, **spread}, **attributes), strict=True):
        np.testing.assert_array_equal(mine, theirs)
