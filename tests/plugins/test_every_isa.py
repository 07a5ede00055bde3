# SPDX-License-Identifier: Apache-2.0
"""Shapes, masks and thresholds at every SIMD level and weight type, against the ONNX functions and float64 numpy.

Levels of this machine's processor run in a Python of their own; those of 64-bit Arm under qemu.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from shadowc.spec.ops import NETWORK_TYPES
from tests.plugins import (
    elsewhere,
    kernels,
    test_matmul_rows,
    test_predict_units,
    test_select_threshold,
    test_sparse_attention,
    test_sparse_ffn,
)
from tests.plugins.levels import HERE
from tests.plugins.native import build, process

pytestmark = pytest.mark.timeout(1200)  # the first on Arm waits for the compiler

ON_ARM = {
    "neon_without_aes": "cortex-a72",
    "neon": "cortex-a72",
    "neon_bf16": "max",
    "sve": "a64fx",
    "sve2": "max,sve-default-vector-length=256",  # 2048 bits, the most there can be
    "sve_256": "neoverse-v1",
    "sve2_128": "neoverse-n2",
}
"""A processor of qemu's for every level; its own best one, or one that SHADOWC_ISA has to ask for."""


@contextlib.contextmanager
def run_on_arm(level: str) -> Iterator[elsewhere.Run]:
    with process.on_arm(ON_ARM[level], level) as started:
        assert started.isa == level
        yield started.run


@pytest.fixture(
    scope="module",
    autouse=True,
    params=[
        *(pytest.param((elsewhere.at_level, level), id=level) for level in HERE),
        *(pytest.param((run_on_arm, level), id=f"arm_{level}", marks=pytest.mark.slow) for level in ON_ARM),
    ],
)
def kernels_of_the_level(request: pytest.FixtureRequest) -> Iterator[None]:
    """Exchanges what the checks call."""
    start, level = request.param
    with contextlib.ExitStack() as stack:
        try:
            run = stack.enter_context(start(level))
        except (elsewhere.UnavailableError, build.UnavailableError) as reason:
            pytest.skip(str(reason))
        with elsewhere.kernels_run_by(run):
            yield


TIED = np.float32([-np.inf, -1.0, -0.0, 0.0, 1e-45, 0.5, 1.0, np.inf, np.nan])
SCORES = st.sampled_from(TIED.tolist())
"""Few values: ties, and scores that equal their threshold, are then common."""
SIZES = st.integers(1, 300) | st.sampled_from([16, 32, 64, 128, 256]).flatmap(lambda n: st.integers(n - 1, n + 1))
"""With and without a remainder at every vector length."""
SAMPLED = st.sampled_from([2047, 2048, 2049, 2500, 4099])
"""So many scores that a sample of them is read first."""
BATCHES = st.tuples(st.integers(1, 3), st.sampled_from([1, 1, 2, 9, 40]), st.floats(0, 1), st.booleans())
"""Rows B and S, the share of tokens with a mask, and whether all of the batch share it."""
SEEDS = st.integers(0, 2**32 - 1)


def with_masks(draw: Callable, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    masks = {n: draw(hnp.arrays(np.float32, arrays[n].shape, elements=SCORES)) for n in ("scores", "threshold")}
    return arrays | masks


@st.composite
def ffns(draw):
    (B, S, tail, shared), block = draw(BATCHES), draw(st.sampled_from([1, 3, 8, 16]))
    shape = {"B": B, "S": S, "Z": round(tail * S), "F": draw(st.integers(1, 70)), "E": draw(SIZES)}
    kind = {"block": block, "dtype": draw(st.sampled_from(test_sparse_ffn.WEIGHTS)), "shared": shared}
    kind["norm"] = draw(st.booleans())
    arrays = test_sparse_ffn.operands(np.random.default_rng(draw(SEEDS)), **shape, **kind)
    attributes = {"layer": draw(st.integers(0, 1)), "block": block, "skip_zeros": draw(st.integers(0, 1))}
    return with_masks(draw, arrays), attributes


@st.composite
def attentions(draw):
    B, S, tail, shared = draw(BATCHES)
    shape = {"B": B, "S": S, "Z": round(tail * S), "H": draw(st.integers(1, 4)), "T": S + draw(st.integers(0, 70))}
    kind = {"dtype": draw(st.sampled_from(test_sparse_attention.WEIGHTS)), "shared": shared}
    kind |= {"cache": draw(st.sampled_from(test_sparse_attention.CACHES)), "norm": draw(st.booleans())}
    D = draw(st.sampled_from([1, 3, 16, 20, 33, 64, 80]))
    arrays = test_sparse_attention.operands(np.random.default_rng(draw(SEEDS)), **shape, D=D, **kind)
    return with_masks(draw, arrays), {"layer": draw(st.integers(0, 1))}


@st.composite
def selections(draw):
    shape = (draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 4)), draw(SIZES | SAMPLED))
    rng = np.random.default_rng(draw(SEEDS))
    noise = rng.standard_normal(shape, dtype=np.float32)
    if shape[-1] < 2000:
        ties = draw(hnp.arrays(np.float32, shape, elements=SCORES, fill=SCORES))
    else:
        ties = rng.choice(TIED, shape)
    attributes = {
        "scope": draw(st.sampled_from(["local", "global"])),
        "exempt": draw(st.sampled_from([[-1], [0], [1], [0, 2]])),
        "min_active": draw(st.sampled_from([0, 1, 50])),
    }
    scores = np.where(noise < draw(st.sampled_from([-9, 0, 9])), ties, noise)
    return (
        scores,
        draw(st.lists(st.floats(-0.2, 1.2) | st.just(np.nan), min_size=shape[0], max_size=shape[0])),
        attributes,
    )


@st.composite
def networks(draw):
    B, S, tail, shared = draw(BATCHES)
    shape = {"B": B, "S": S, "Z": round(tail * S), "E": draw(SIZES), "P": draw(st.integers(1, 70)), "N": draw(SIZES)}
    kind = {"dtype": draw(st.sampled_from(NETWORK_TYPES)), "norm": draw(st.booleans()), "rows": 1 if shared else B}
    arrays = test_predict_units.operands(np.random.default_rng(draw(SEEDS)), **shape, **kind)
    attributes = {"relu": draw(st.integers(0, 1)), "column": draw(st.integers(0, 2))}
    return arrays, attributes | {"select": draw(st.sampled_from(["density", "threshold"]))}


@st.composite
def products(draw):
    shape = {"B": draw(st.integers(1, 3)), "S": draw(st.sampled_from([1, 2, 5, 40])), "E": draw(SIZES)}
    return test_matmul_rows.operands(np.random.default_rng(draw(SEEDS)), **shape, N=draw(SIZES))


def check_ffn(case):
    arrays, attributes = case
    test_sparse_ffn.assert_as_defined(arrays, **attributes)


def check_attention(case):
    arrays, attributes = case
    test_sparse_attention.assert_as_defined(arrays, **attributes)


def check_selection(case):
    scores, density, attributes = case
    test_select_threshold.assert_selects_as_defined(scores, density, **attributes)


def check_network(case):
    arrays, attributes = case
    test_predict_units.assert_as_defined(arrays, **attributes)


def check_product(arrays):
    test_matmul_rows.assert_as_defined(arrays)


FEW = settings(max_examples=12, derandomize=True)
MANY = settings(max_examples=150, derandomize=True)

test_ffn_equals_its_definition = FEW(given(ffns())(check_ffn))
test_attention_equals_its_definition = FEW(given(attentions())(check_attention))
test_selection_equals_its_definition = FEW(given(selections())(check_selection))
test_network_equals_its_definition = FEW(given(networks())(check_network))
test_product_equals_its_definition = FEW(given(products())(check_product))

test_ffn_equals_its_definition_often = pytest.mark.slow(MANY(given(ffns())(check_ffn)))
test_attention_equals_its_definition_often = pytest.mark.slow(MANY(given(attentions())(check_attention)))
test_selection_equals_its_definition_often = pytest.mark.slow(MANY(given(selections())(check_selection)))
test_network_equals_its_definition_often = pytest.mark.slow(MANY(given(networks())(check_network)))
test_product_equals_its_definition_often = pytest.mark.slow(MANY(given(products())(check_product)))


def test_one_wrong_value_of_the_level_is_found():
    level = kernels.run

    def spoiled(*arguments, **named):
        found = level(*arguments, **named)
        found["y"] = found["y"] + np.eye(1, 48, 3, dtype=np.float32) * 1e-3
        return found

    arrays = test_sparse_ffn.operands(np.random.default_rng(0))
    test_sparse_ffn.assert_as_defined(arrays)
    with elsewhere.kernels_run_by(spoiled), pytest.raises(AssertionError, match="Mismatched elements: 1 / 48"):
        test_sparse_ffn.assert_as_defined(arrays)
