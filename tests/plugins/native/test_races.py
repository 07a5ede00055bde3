# SPDX-License-Identifier: Apache-2.0
"""ThreadSanitizer sees a race in every operator if there is one: the pool then runs every index on two threads."""

from __future__ import annotations

import numpy as np
import pytest

from shadowc.spec.ops import MATMUL_ROWS, PREDICT_UNITS, SELECT_THRESHOLD, SPARSE_ATTENTION, SPARSE_FFN
from tests.plugins import test_matmul_rows, test_predict_units, test_sparse_attention, test_sparse_ffn
from tests.plugins.native import build, process

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def scores_of(rng: np.random.Generator) -> dict[str, np.ndarray]:
    shape = (2, 9, 3, 1500)
    return {"scores": rng.standard_normal(shape, dtype=np.float32), "density": np.array([0.5], np.float32)}


CASES = {
    "matmul_rows.cc": (MATMUL_ROWS, lambda rng: test_matmul_rows.operands(rng, E=512, N=3000)),
    "matmul_rows.cc, many rows": (MATMUL_ROWS, lambda rng: test_matmul_rows.operands(rng, B=2, S=40, E=512, N=3000)),
    "predict_units.cc": (PREDICT_UNITS, lambda rng: test_predict_units.operands(rng, E=512, P=128, N=3000)),
    "predict_units.cc, many rows": (
        PREDICT_UNITS,
        lambda rng: test_predict_units.operands(rng, B=2, S=40, Z=40, E=512, P=128, N=3000),
    ),
    "select_threshold.cc": (SELECT_THRESHOLD, scores_of),
    "sparse_ffn.cc": (SPARSE_FFN, lambda rng: test_sparse_ffn.operands(rng, F=4000, E=256)),
    "sparse_ffn.cc, many rows": (SPARSE_FFN, lambda rng: test_sparse_ffn.operands(rng, B=50, F=900, E=256)),
    "sparse_ffn.cc, with a norm": (SPARSE_FFN, lambda rng: test_sparse_ffn.operands(rng, F=4000, E=256, norm=True)),
    "sparse_attention.cc": (SPARSE_ATTENTION, lambda rng: test_sparse_attention.operands(rng, H=8, D=64)),
    "sparse_attention.cc, many rows": (
        SPARSE_ATTENTION,
        lambda rng: test_sparse_attention.operands(rng, B=2, S=40, Z=40, H=8, D=64, T=80),
    ),
}


@pytest.fixture
def driver():
    try:
        start = process.under_tsan()
    except build.UnavailableError as reason:
        pytest.skip(str(reason))
    with start as driver:
        yield driver


@pytest.mark.parametrize("case", CASES)
def test_a_planted_race_ends_the_run_and_is_reported_in_the_kernel(driver, case):
    spec, operands = CASES[case]
    arrays = operands(np.random.default_rng(40))
    assert driver.run(spec, arrays)  # nothing is reported without it
    with pytest.raises(process.DriverError, match="WARNING: ThreadSanitizer: data race") as raised:  # noqa: PT012
        for _ in range(20):  # an atomic of the kernel's may order the two threads of one run
            driver.run(spec, arrays, twice=1)
    assert f"plugins/cpu/{case.split(',')[0]}" in str(raised.value)


def test_a_planted_race_in_a_crew_is_reported_too(driver):
    arrays = test_sparse_ffn.operands(np.random.default_rng(40), F=4000, E=256)
    assert driver.run(SPARSE_FFN, arrays, crew=1)
    with pytest.raises(process.DriverError, match="WARNING: ThreadSanitizer: data race") as raised:  # noqa: PT012
        for _ in range(20):
            driver.run(SPARSE_FFN, arrays, crew=1, twice=1)
    assert "plugins/cpu/sparse_ffn.cc" in str(raised.value)


def test_what_a_section_of_a_crew_throws_is_thrown_by_the_call(driver):
    arrays = test_sparse_ffn.operands(np.random.default_rng(40), F=4000, E=256)
    with pytest.raises(process.DriverError, match="thrown in a section"):
        driver.run(SPARSE_FFN, arrays, crew=1, threads=3, throws=1)


@pytest.mark.parametrize(("threads", "likely"), [(1, 4), (2, 1), (2, 5), (3, 40)])
def test_a_crew_gives_the_same_bits_whatever_it_is_told_of_its_threads(driver, threads, likely):
    arrays = test_sparse_ffn.operands(np.random.default_rng(40), F=4000, E=256)
    wanted = driver.run(SPARSE_FFN, arrays)
    for _ in range(5):
        found = driver.run(SPARSE_FFN, arrays, crew=1, threads=threads, likely=likely)
        np.testing.assert_array_equal(found["y"], wanted["y"])
