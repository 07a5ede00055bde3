# SPDX-License-Identifier: Apache-2.0
"""SelectThreshold as machine code: equal, to the bit, to the ONNX function and to a sort in numpy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from shadowc.spec.ops import SELECT_THRESHOLD
from tests.plugins import kernels, numpy_reference

SCORES = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 1e-45, -1e-45, 3e38, -3e38, np.inf, -np.inf, np.nan])


def select(scores, density, **attributes):
    density = np.array(density, np.float32)
    found = kernels.run(SELECT_THRESHOLD, {"scores": scores, "density": density}, **attributes)
    return found["threshold"], found["active"]


def assert_selects_as_defined(scores, density, **attributes):
    threshold, active = select(scores, density, **attributes)
    arrays = {"scores": scores, "density": np.array(density, np.float32)}
    expected = kernels.oracle_run(SELECT_THRESHOLD, arrays, **attributes)
    np.testing.assert_array_equal(threshold, expected["threshold"])
    np.testing.assert_array_equal(active, expected["active"])
    again = numpy_reference.select_threshold(scores, arrays["density"], **attributes)
    np.testing.assert_array_equal(threshold, again[0])
    np.testing.assert_array_equal(active, again[1])


@settings(max_examples=120, derandomize=True)
@given(
    scores=st.tuples(st.integers(1, 3), st.integers(0, 2), st.integers(1, 4), st.integers(1, 12)).flatmap(
        lambda shape: hnp.arrays(np.float32, shape, elements=SCORES | st.floats(-2, 2, width=32))
    ),
    density=st.floats(-0.5, 1.5) | st.just(np.nan),
    scope=st.sampled_from(["local", "global"]),
    exempt=st.sampled_from([[-1], [0], [0, 2], [7]]),
    min_active=st.sampled_from([0, 1, 3, 50]),
)
def test_select_equals_the_onnx_function_and_numpy(scores, density, scope, exempt, min_active):
    assert_selects_as_defined(scores, [density], scope=scope, exempt=exempt, min_active=min_active)


@pytest.mark.parametrize("scope", ["local", "global"])
@pytest.mark.parametrize("shape", [(1, 1, 5, 9000), (2, 9, 3, 1500), (9, 1, 1, 4096), (1, 2, 60, 40)])
def test_select_equals_numpy_when_threads_share_the_work(scope, shape):
    rng = np.random.default_rng(1)
    scores = rng.standard_normal(shape, dtype=np.float32)
    for density in ([0.2], rng.random(shape[0], dtype=np.float32)):
        threshold, active = select(scores, density, scope=scope, exempt=[-1], min_active=0)
        expected = numpy_reference.select_threshold(scores, np.array(density, np.float32), scope)
        np.testing.assert_array_equal(threshold, expected[0])
        np.testing.assert_array_equal(active, expected[1])


def test_select_ranks_layers_together_of_which_some_are_in_no_sample():
    scores = np.random.default_rng(1).standard_normal((1, 2, 600, 4), dtype=np.float32)
    threshold, active = select(scores, [0.2], scope="global")
    expected = numpy_reference.select_threshold(scores, np.float32([0.2]), "global")
    np.testing.assert_array_equal(threshold, expected[0])
    np.testing.assert_array_equal(active, expected[1])


UNEVEN = {
    "one value": lambda rng, n: np.full(n, 0.25, np.float32),
    "two values": lambda rng, n: rng.choice(np.float32([0.0, 1.0]), n),
    "mostly zeros": lambda rng, n: np.maximum(rng.standard_normal(n) - 1.5, 0),
    "all magnitudes": lambda rng, n: rng.choice([-1, 1], n) * np.exp2(rng.uniform(-149, 127, n)),
    "one far away": lambda rng, n: np.where(np.arange(n) == n // 2, 3e38, rng.standard_normal(n)),
    "infinities and NaN": lambda rng, n: rng.choice([-np.inf, np.inf, np.nan, 0.0, -0.0, 1e-45], n),
    "ascending": lambda rng, n: np.arange(n),
    # Of many scores a sample is read first, of 8192 every 17th, of twice as many every 33rd: it must not decide.
    "others in a sample": lambda rng, n: rng.random(n) + (np.arange(n) % 17 == 0),
    "others in a larger sample": lambda rng, n: rng.random(n) - (np.arange(n) % 33 == 0),
}


@pytest.mark.parametrize("scope", ["local", "global"])
@pytest.mark.parametrize("kind", UNEVEN)
def test_select_finds_the_threshold_among_unevenly_spread_scores(kind, scope):
    rng = np.random.default_rng(2)
    for n in (49, 1000, 8191, 8192):
        scores = np.stack([UNEVEN[kind](rng, n).astype(np.float32) for _ in range(2)])[None, None]
        for density in (1 / n, 0.03, 0.5, 0.9, 1 - 1 / n):
            threshold, active = select(scores, [density], scope=scope, exempt=[-1], min_active=n // 3)
            expected = numpy_reference.select_threshold(scores, np.float32([density]), scope, min_active=n // 3)
            np.testing.assert_array_equal(threshold, expected[0])
            np.testing.assert_array_equal(active, expected[1])


def test_select_uses_each_rows_own_density():
    scores = np.tile(np.arange(10, dtype=np.float32), (3, 1, 1, 1))
    _, active = select(scores, [0.0, 0.3, 1.0])
    assert active.ravel().tolist() == [0, 3, 10]


def test_select_rounds_half_up_from_the_float32_density():
    scores = np.arange(10, dtype=np.float32).reshape(1, 1, 1, 10)
    wanted = [select(scores, [density])[1].item() for density in (0.05, 0.25, 0.15, 0.45)]
    # 0.15 and 0.45 are a little more, and a little less, than that in float32
    assert wanted == [1, 3, 2, 4]


def test_select_keeps_all_that_tie_with_the_threshold():
    scores = np.array([1, 2, 2, 2, 3], np.float32).reshape(1, 1, 1, 5)
    threshold, active = select(scores, [0.4])
    assert (threshold.item(), active.item()) == (2, 4)


def test_select_treats_both_zeros_as_one_score():
    scores = np.array([0.0, -0.0, -0.0, 0.0, -1.0], np.float32).reshape(1, 1, 1, 5)
    threshold, active = select(scores, [0.2])
    assert threshold.item() == 0
    assert active.item() == 4


def test_select_keeps_nan_even_when_nothing_else_is_wanted():
    scores = np.array([np.nan, 5, np.nan, 1], np.float32).reshape(1, 1, 1, 4)
    threshold, active = select(scores, [0.0])
    assert threshold.item() == np.inf
    assert active.item() == 2


def test_select_leaves_exempt_layers_dense_and_out_of_the_count():
    scores = np.arange(12, dtype=np.float32).reshape(1, 1, 3, 4)
    threshold, active = select(scores, [0.5], scope="global", exempt=[2])
    assert threshold.ravel().tolist() == [4, 4, -np.inf]
    assert active.ravel().tolist() == [0, 4, 4]


def test_select_lowers_the_threshold_of_starved_layers_only():
    scores = np.arange(12, dtype=np.float32).reshape(1, 1, 3, 4)
    threshold, active = select(scores, [4 / 12], scope="global", min_active=2)
    assert threshold.ravel().tolist() == [2, 6, 8]
    assert active.ravel().tolist() == [2, 2, 4]


@pytest.mark.parametrize(
    ("attributes", "says"),
    [
        ({"scope": "everywhere"}, "attribute scope must be 'local' or 'global', found 'everywhere'"),
        ({"min_active": -3}, "attribute min_active must be at least 0, found -3"),
    ],
)
def test_select_refuses_attributes_when_the_session_is_made(attributes, says):
    scores = np.zeros((1, 1, 1, 2), np.float32)
    with pytest.raises(Exception, match=says):
        select(scores, [0.5], **attributes)


def test_select_says_what_it_expected_when_density_has_another_batch():
    with pytest.raises(Exception, match=r"SelectThreshold node 'the_node': density must be .* = \[2\], found \[3\]"):
        select(np.zeros((2, 1, 1, 4), np.float32), [0.1, 0.2, 0.3])
