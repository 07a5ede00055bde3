# SPDX-License-Identifier: Apache-2.0
"""The cases of tests/plugins on kernels of another build: for 64-bit Arm under qemu, and under sanitizers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import numpy as np
import pytest

from shadowc.spec.ops import SPARSE_ATTENTION, OpSpec
from tests.plugins import (
    elsewhere,
    test_matmul_rows,
    test_norms,
    test_predict_units,
    test_select_threshold,
    test_sparse_attention,
    test_sparse_ffn,
)
from tests.plugins.native import build, process

OF_ONNX_RUNTIME = ("refuses", "says_what", "reports_all", "names_the_types", "concurrent", "bound_twice")
"""Parts of names: what the layer above the kernels checks, and how it calls them. The driver has its own ways for the
last two, see `checked`."""

MODULES = (
    test_matmul_rows,
    test_predict_units,
    test_select_threshold,
    test_sparse_ffn,
    test_sparse_attention,
    test_norms,
)

CASES = {
    name: value
    for module in MODULES
    for name, value in vars(module).items()
    if name.startswith("test_") and callable(value) and not any(part in name for part in OF_ONNX_RUNTIME)
}
globals().update(CASES)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

BUILDS: dict[str, Callable[[], AbstractContextManager[process.Driver]]] = {
    "arm_neon": lambda: process.on_arm("cortex-a72"),
    "arm_sve2": lambda: process.on_arm("max"),
    "tsan": process.under_tsan,
    "asan": process.under_asan,
}


@pytest.fixture(scope="module", params=BUILDS, autouse=True)
def kernels_of_the_build(request: pytest.FixtureRequest) -> Iterator[None]:
    """Exchanges what the tests call."""
    try:
        start = BUILDS[request.param]()
    except build.UnavailableError as reason:
        pytest.skip(str(reason))
    with start as driver, elsewhere.kernels_run_by(checked(driver, threads=request.param == "tsan")):
        yield


def checked(driver: process.Driver, *, threads: bool) -> elsewhere.Run:
    """Attention also with past and present in one memory; the same bits every time.

    Where `threads` are what it is about, also two calls at once, and threads that form a crew.
    """
    callers = 2 if threads else 1

    def run(spec: OpSpec, arrays: dict[str, np.ndarray], **attributes: object) -> dict[str, np.ndarray]:
        found = driver.run(spec, arrays, callers=callers, **attributes)
        if threads:
            for name, array in driver.run(spec, arrays, **(attributes | {"crew": 1, "threads": 3})).items():
                if not name.startswith("present_"):  # of which the rest is anything
                    np.testing.assert_array_equal(array, found[name])
        if spec is SPARSE_ATTENTION:
            again = driver.run(spec, arrays, callers=callers, in_place=1, **attributes)
            np.testing.assert_array_equal(again["y"], found["y"])
            for name in ("present_key", "present_value"):
                mine, its = (test_sparse_attention.live(outputs[name], arrays) for outputs in (again, found))
                np.testing.assert_array_equal(mine, its)
        return found

    return run


def test_the_cases_are_most_of_those_of_the_operators():
    names = [name for module in MODULES for name in vars(module) if name.startswith("test_")]
    assert len(CASES) >= 34
    assert len(names) > len(CASES)
