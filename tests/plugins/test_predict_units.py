# SPDX-License-Identifier: Apache-2.0
"""PredictUnits as machine code: the scores of a small network, and the selection that SelectThreshold makes of them.

Letters: B batch, S new tokens, Z sparse tail, E hidden, P width of the network, N units, K columns.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shadowc.emit.records import in_quads
from shadowc.spec.ops import NETWORK_TYPES, PREDICT_UNITS
from tests.plugins import kernels, numpy_reference

TYPES = pytest.mark.parametrize("dtype", NETWORK_TYPES)


def operands(rng, *, B=1, S=1, Z=1, E=64, P=24, N=100, K=3, rows=1, dtype="float32", norm=False):
    """Random operands; `rows` of densities."""
    w1, scales1 = kernels.weights(rng, (P, E), dtype)
    w2, scales2 = kernels.weights(rng, (N, P), dtype)
    if dtype == "int8":
        w2 = in_quads(w2)
    arrays = {
        "x": rng.standard_normal((B, S, E), dtype=np.float32),
        "tail": np.array([Z], np.int64),
        "density": rng.random((rows, K), dtype=np.float32),
        "w1": w1,
        "scales1": scales1,
        "b1": rng.standard_normal(P, dtype=np.float32),
        "w2": w2,
        "scales2": scales2,
        "b2": rng.standard_normal(N, dtype=np.float32),
    }
    return arrays | (kernels.norm(rng, E) if norm else {})


def run(arrays, **attributes):
    return kernels.run(PREDICT_UNITS, arrays, **attributes)


def rows_of(arrays, n):
    """w1 [P,E], or w2 [N,P] taken out of its groups weight by weight."""
    w = arrays[f"w{n}"]
    if w.ndim == 2:
        return w
    N, P = len(arrays["b2"]), len(arrays["b1"])
    return np.array([[w[row // 16, column // 4, row % 16, column % 4] for column in range(P)] for row in range(N)])


def scores_of(arrays, relu=0):
    """Scores [B,S,1,N] of all tokens, in float64."""
    x = arrays["x"].astype(np.float64)
    if "norm_scale" in arrays:
        centred = x - x.mean(-1, keepdims=True)
        x = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * arrays["norm_scale"] + arrays["norm_bias"]
    rows = {n: rows_of(arrays, n).astype(np.float64) * arrays[f"scales{n}"][:, None] for n in (1, 2)}
    hidden = x @ rows[1].T + arrays["b1"]
    return ((np.maximum(hidden, 0) if relu else hidden) @ rows[2].T + arrays["b2"])[:, :, None]


def assert_as_defined(arrays, relu=0, column=0, select="density", exempt=0, min_active=0):
    """Scores are those of the network; what is selected follows, to the bit, from the scores that were found."""
    attributes = {"relu": relu, "column": column, "select": select, "exempt": exempt, "min_active": min_active}
    found = run(arrays, **attributes)
    Z, S = int(arrays["tail"][0]), arrays["x"].shape[1]
    expected = scores_of(arrays, relu).astype(np.float32)
    kernels.assert_close(found["scores"], expected[:, S - Z :])
    kernels.assert_close(found["last_scores"], expected[:, -1:])
    if Z:
        np.testing.assert_array_equal(found["last_scores"], found["scores"][:, -1:])
    given = arrays["density"][:, column]
    if select == "threshold":
        threshold = np.broadcast_to(given[:, None, None], found["scores"].shape[:3])
        active = (~(found["scores"] < threshold[..., None])).sum(-1)
    else:
        chosen = {"scope": "local", "exempt": [0] if exempt else [-1], "min_active": min_active}
        threshold, active = numpy_reference.select_threshold(found["scores"], given, **chosen)
    np.testing.assert_array_equal(found["threshold"], threshold)
    np.testing.assert_array_equal(found["active"], active)


@settings(max_examples=60, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    B=st.integers(1, 3),
    S=st.sampled_from([1, 1, 2, 5, 40]),
    share=st.floats(0, 1),
    E=st.integers(1, 200),
    P=st.integers(1, 70),
    N=st.integers(1, 300),
    dtype=st.sampled_from(NETWORK_TYPES),
    norm=st.booleans(),
    relu=st.integers(0, 1),
    how=st.sampled_from([("density", 0, 0), ("density", 1, 0), ("density", 0, 7), ("threshold", 0, 0)]),
    per_row=st.booleans(),
)
def test_it_equals_its_definition(seed, B, S, share, E, P, N, dtype, norm, relu, how, per_row):
    rng = np.random.default_rng(seed)
    sizes = {"B": B, "S": S, "Z": round(share * S), "E": E, "P": P, "N": N, "rows": B if per_row else 1}
    arrays = operands(rng, dtype=dtype, norm=norm, **sizes)
    select, exempt, min_active = how
    assert_as_defined(arrays, relu=relu, column=seed % 3, select=select, exempt=exempt, min_active=min_active)


@TYPES
@pytest.mark.parametrize(("B", "S", "Z"), [(1, 1, 1), (1, 1, 0), (3, 1, 1), (2, 70, 40), (1, 9, 0)])
@pytest.mark.parametrize("select", ["density", "threshold"])
def test_it_equals_its_nodes_in_stock_onnx_runtime(dtype, B, S, Z, select):
    """The nodes that `oracle.attach` writes, where nothing is selected by a hair."""
    arrays = operands(np.random.default_rng(3), B=B, S=S, Z=Z, E=96, P=32, N=200, dtype=dtype, norm=True, rows=B)
    mine, its = (
        kernels.run(PREDICT_UNITS, arrays, kernel=kernel, relu=1, column=1, select=select) for kernel in (True, False)
    )
    for name in ("scores", "last_scores", "threshold"):
        kernels.assert_close(mine[name], its[name])
    np.testing.assert_array_equal(mine["active"], its["active"])


@TYPES
def test_it_equals_its_definition_when_threads_share_the_work(dtype):
    sizes = {"E": 2048, "P": 128, "N": 4096}
    for B, S, Z in ((1, 1, 1), (2, 40, 33)):
        arrays = operands(np.random.default_rng(4), B=B, S=S, Z=Z, dtype=dtype, norm=True, **sizes)
        assert_as_defined(arrays, relu=1)


@TYPES
def test_scores_do_not_depend_on_threads_nor_on_what_is_scored_with_them(dtype):
    arrays = operands(np.random.default_rng(5), B=3, S=5, Z=5, E=700, P=40, N=2000, dtype=dtype, norm=True)
    whole = run(arrays)["scores"]
    np.testing.assert_array_equal(kernels.run(PREDICT_UNITS, arrays, threads=1)["scores"], whole)
    for b in range(3):
        for s in range(5):
            alone = arrays | {"x": arrays["x"][b : b + 1, s : s + 1], "tail": np.array([1], np.int64)}
            np.testing.assert_array_equal(run(alone)["scores"][0, 0], whole[b, s])


@pytest.mark.parametrize("P", [4096, 4100, 16384])
@pytest.mark.parametrize("weight", [-128, 127])
def test_no_sum_of_the_widest_networks_leaves_its_integers(P, weight):
    """All products alike and as large as they get, in both digits of the kernel for AVX2. Behind 4,096 and elsewhere it
    sums floats one by one, which costs their last digits and would hide nothing: a sum that wrapped has another sign.
    """
    most = 8355000  # the integer that the largest value becomes
    integers = np.full(P, 2039 * 4096 - 2048)
    integers[0] = most
    arrays = operands(np.random.default_rng(10), E=4, P=P, N=20, dtype="int8")
    arrays["w1"][:] = 0
    arrays["w2"][:] = weight
    arrays["b1"] = (integers / most).astype(np.float32)
    np.testing.assert_allclose(run(arrays)["scores"], scores_of(arrays), rtol=1e-3)


@TYPES
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_token_that_is_not_finite_spoils_its_own_scores_alone(dtype, value):
    arrays = operands(np.random.default_rng(6), S=4, Z=4, dtype=dtype)
    arrays["x"][0, 1, 7] = value
    found = run(arrays)
    assert not np.isfinite(found["scores"][0, 1]).any()
    assert np.isfinite(found["scores"][0, [0, 2, 3]]).all()


@TYPES
@pytest.mark.parametrize("S", [1, 4])
@pytest.mark.parametrize("relu", [0, 1])
def test_not_a_number_goes_through_and_keeps_every_unit(dtype, S, relu):
    arrays = operands(np.random.default_rng(6), S=S, Z=S, dtype=dtype)
    arrays["x"][0, 0, 7] = np.nan
    found = run(arrays, relu=relu, select="threshold")
    assert np.isnan(found["scores"][0, 0]).all()
    assert found["active"][0, 0, 0] == 100


def test_no_tokens_at_all_make_no_scores():
    found = run(operands(np.random.default_rng(7), B=1, S=3, Z=0) | {"x": np.zeros((0, 3, 64), np.float32)})
    assert found["scores"].shape == (0, 0, 1, 100)
    assert found["last_scores"].shape == (0, 1, 1, 100)


def broken(name, change):
    arrays = operands(np.random.default_rng(8), B=2, S=3, Z=2)
    arrays[name] = change(arrays[name])
    return arrays


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("x", lambda a: a[0], r"x must be \[B, S, E\]"),
        ("x", lambda a: a[..., 1:], r"w1 must be \[P, E\]"),
        ("x", lambda a: a[:, :0], r"S \(axis 1 of x\) must be at least 1"),
        ("tail", lambda a: a + 2, "tail must be 0 to S = 3, found 4"),
        ("tail", lambda a: a - 3, "tail must be 0 to S = 3, found -1"),
        ("tail", lambda a: np.repeat(a, 2), r"tail must be \[1\]"),
        ("density", lambda a: np.repeat(a, 3, 0), r"density must be \[1 or B = 2, K\]"),
        ("density", lambda a: a[:, :0], "attribute column must be below K = 0"),
        ("scales1", lambda a: a[1:], r"scales1 must be \[P\]"),
        ("b1", lambda a: a[1:], r"b1 must be \[P\]"),
        ("w2", lambda a: a[:, 1:], r"w2 must be \[N, P\]"),
        ("w2", lambda a: a.astype(np.int8), "w1 and w2 must be float32 or int8, both alike, found float32 and int8"),
        ("w2", lambda a: a[:, :, None, None], r"w2 must be \[N, P\]"),
        ("scales2", lambda a: a[1:], r"scales2 must be \[N\]"),
        ("b2", lambda a: a[1:], r"w2 must be \[N, P\]"),
        ("b2", lambda a: a[None], r"b2 must be \[N\]"),
        ("b2", lambda a: a[:0], r"N \(axis 0 of b2\) must be at least 1, found 0"),
    ],
)
def test_it_refuses_operands_that_do_not_fit(name, change, says):
    with pytest.raises(Exception, match=says):
        run(broken(name, change))


@pytest.mark.parametrize("change", [lambda a: a[1:], lambda a: a[:, 1:], lambda a: a[:, :, 1:], lambda a: a[0]])
def test_it_refuses_int8_rows_that_are_not_in_groups_of_16(change):
    arrays = operands(np.random.default_rng(8), dtype="int8")
    with pytest.raises(Exception, match=r"w2 must be \[ceil\(N / 16\), ceil\(P / 4\), 16, 4\]"):
        run(arrays | {"w2": change(arrays["w2"])})


@pytest.mark.parametrize(
    ("attributes", "says"),
    [
        ({"column": -1}, "attribute column must be at least 0, found -1"),
        ({"column": 3}, "attribute column must be below K = 3, found 3"),
        ({"min_active": -1}, "attribute min_active must be at least 0"),
        ({"select": "rank"}, "attribute select must be 'density' or 'threshold', found 'rank'"),
    ],
)
def test_it_refuses_attributes_that_it_does_not_know(attributes, says):
    with pytest.raises(Exception, match=says):
        run(operands(np.random.default_rng(9)), **attributes)
