# SPDX-License-Identifier: Apache-2.0
"""AddressSanitizer sees a bad access in an operator if there is one: operands that the layer above would refuse."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from shadowc.spec.ops import SPARSE_ATTENTION, SPARSE_FFN, OpSpec
from tests.plugins import test_sparse_attention, test_sparse_ffn
from tests.plugins.native import build, process

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

Arrays = dict[str, np.ndarray]


@pytest.fixture
def driver() -> Iterator[process.Driver]:
    try:
        start = process.under_asan()
    except build.UnavailableError as reason:
        pytest.skip(str(reason))
    with start as driver:
        yield driver


def past_behind_the_cache(rng: np.random.Generator) -> Arrays:
    arrays = test_sparse_attention.operands(rng)
    return arrays | {"past": np.array([arrays["past_key"].shape[2]], np.int64)}


def last_bias_missing(rng: np.random.Generator) -> Arrays:
    arrays = test_sparse_ffn.operands(rng)
    return arrays | {"b1": arrays["b1"][:-8].copy(), "threshold": np.full_like(arrays["threshold"], -np.inf)}


@pytest.mark.parametrize(
    ("spec", "operands", "file"),
    [
        (SPARSE_ATTENTION, past_behind_the_cache, "attention"),
        (SPARSE_FFN, last_bias_missing, "ffn"),
    ],
)
def test_an_access_behind_an_operand_ends_the_run_and_is_reported_in_the_kernel(
    driver: process.Driver, spec: OpSpec, operands: Callable[[np.random.Generator], Arrays], file: str
) -> None:
    valid = test_sparse_attention if spec is SPARSE_ATTENTION else test_sparse_ffn
    assert driver.run(spec, valid.operands(np.random.default_rng(40)))  # nothing is reported without it
    with pytest.raises(process.DriverError, match="AddressSanitizer: heap-buffer-overflow") as raised:
        driver.run(spec, operands(np.random.default_rng(40)))
    assert re.search(rf"plugins/cpu/\w*{file}", str(raised.value))
    assert driver.run(spec, valid.operands(np.random.default_rng(40)))  # the next test is not its victim
