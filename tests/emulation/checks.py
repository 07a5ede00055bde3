# SPDX-License-Identifier: Apache-2.0
"""A few calls that go through every kernel, checked as the tests check: values, counts, guards, order of threads.

Run as a program on a library with a planted bug, which may crash: `python -m tests.emulation.checks LIBRARY`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from shadowc.spec.ops import SELECT_THRESHOLD, SPARSE_ATTENTION, SPARSE_FFN
from tests.emulation import operators
from tests.emulation.library import Kernels
from tests.plugins import kernels as cpu_kernels
from tests.plugins import numpy_reference, test_sparse_attention, test_sparse_ffn

TILE = 16
"""SHADOWC_TILE_ROWS of plugins/cuda/kernels.h."""


def check_all(kernels: Kernels) -> None:
    """Fails with an AssertionError or a KernelError if a kernel is not right."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(numpy_reference, "TILE", TILE)
        check_select(kernels)
        check_ffn(kernels)
        check_attention(kernels)


def check_select(kernels: Kernels) -> None:
    scores = np.random.default_rng(1).standard_normal((2, 1, 3, 1500), dtype=np.float32)
    density = np.float32([0.3, 0.9])
    for attributes in ({"scope": "local"}, {"scope": "global", "min_active": 700}):
        found = operators.run(
            kernels, SELECT_THRESHOLD, "float32", {"scores": scores, "density": density}, exempt=[1], **attributes
        )
        expected = numpy_reference.select_threshold(scores, density, exempt=[1], **attributes)
        np.testing.assert_array_equal(found["threshold"], expected[0])
        np.testing.assert_array_equal(found["active"], expected[1])


def check_ffn(kernels: Kernels) -> None:
    for B, dtype in ((1, "int8"), (3, "float32"), (40, "float32")):
        arrays = test_sparse_ffn.operands(np.random.default_rng(B), B=B, F=700, E=320, block=2, dtype=dtype)
        arrays["b1"] -= 3
        found = operators.run(kernels, SPARSE_FFN, "float32", arrays, layer=1, block=2, skip_zeros=1)
        y, read = numpy_reference.sparse_ffn(**arrays, layer=1, block=2, skip_zeros=1)
        cpu_kernels.assert_close(found["y"], y)
        assert tuple(found["read"]) == (read.records, read.bytes)


def check_attention(kernels: Kernels) -> None:
    for B, S, D, T, kv in ((1, 1, 64, 600, "all"), (2, 10, 80, 40, "all"), (2, 3, 32, 300, "active")):
        arrays = test_sparse_attention.operands(
            np.random.default_rng(D), B=B, S=S, Z=S, H=4, D=D, T=T, fixed_mask=kv == "active"
        )
        if T == 600:
            arrays["past"][:], arrays["start"][:] = 590, 3
            arrays |= {name: np.random.default_rng(4).standard_normal(arrays[name].shape, dtype=np.float32)
                       for name in ("past_key", "past_value")}  # fmt: skip
        found = operators.run(kernels, SPARSE_ATTENTION, "float32", arrays, layer=1, kv=kv)
        y, key, value, context, read = numpy_reference.sparse_attention(**arrays, layer=1, kv=kv)
        cpu_kernels.assert_close(found["y"], y)
        cpu_kernels.assert_close(found["context"], context)
        for name, expected in (("present_key", key), ("present_value", value)):
            cpu_kernels.assert_close(*(test_sparse_attention.live(cache, arrays) for cache in (found[name], expected)))
        assert tuple(found["read"]) == (read.records, read.bytes)


if __name__ == "__main__":
    check_all(Kernels(Path(sys.argv[1])))
