# SPDX-License-Identifier: Apache-2.0
"""Kernels in a CUDA graph: recorded once, they follow what changes in their operands, bit for bit."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from shadowc.runtime.tensorrt.cuda import Cudart
from shadowc.runtime.tensorrt.device import Arena
from tests.emulation.library import Select
from tests.gpu.conftest import DeviceKernels, require_gpu

pytestmark = pytest.mark.gpu
require_gpu()
SHAPE = B, Z, L, N = 4, 1, 7, 512


def test_a_recorded_selection_follows_scores_and_densities(gpu: Cudart, kernels: DeviceKernels) -> None:
    arena, rng = Arena(gpu), np.random.default_rng(0)
    sizes = [int(np.prod(SHAPE)) * 4, B * 4, B * Z * L * 4, B * Z * L * 4]
    scores, density, threshold, active = (arena.allocate(size) for size in sizes)
    staged = [arena.pinned(size) for size in sizes]
    call = Select(B, Z, L, N, 1, 0, B, 0, None, scores, density, threshold, active)
    workspace = arena.allocate(kernels.workspace(call))

    def work() -> None:
        gpu.upload(scores, staged[0][0], sizes[0])
        gpu.upload(density, staged[1][0], sizes[1])
        assert kernels.library.shadowc_select_enqueue(ctypes.byref(call), workspace, gpu.stream) == 0
        gpu.download(staged[2][0], threshold, sizes[2])
        gpu.download(staged[3][0], active, sizes[3])

    work()
    gpu.synchronize()
    gpu.begin_capture()
    work()
    graph = arena.graph(gpu.end_capture())
    for share in (1.0, 0.5, 0.1, 0.0):
        values = rng.standard_normal(SHAPE).astype(np.float32)
        dial = np.full(B, share, np.float32)
        staged[0][1][:] = values.reshape(-1).view(np.uint8)
        staged[1][1][:] = dial.view(np.uint8)
        gpu.launch(graph)
        gpu.synchronize()
        expected = kernels.select(values, dial, scope="global")
        for (_, view), wanted in zip(staged[2:], expected, strict=True):
            np.testing.assert_array_equal(view.view(wanted.dtype).reshape(wanted.shape), wanted)
    arena.close()
