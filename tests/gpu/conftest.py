# SPDX-License-Identifier: Apache-2.0
"""The GPU of this machine, and the kernels compiled for it; tests are skipped with the reason where there is none."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import pytest

from shadowc.runtime.tensorrt.cuda import Cudart, open_cuda
from shadowc.spec.errors import SetupError
from tests.emulation.library import DeviceMemory, KernelError, Kernels
from tests.gpu import build

COLLECT_VARIABLE = "SHADOWC_COLLECT_GPU_TESTS"
"""Environment variable: collect the tests although there is no GPU."""


def require_gpu() -> None:
    """Skip the calling module, in one line, where there is no GPU."""
    if os.environ.get(COLLECT_VARIABLE):
        return
    try:
        open_cuda()
    except SetupError as error:
        pytest.skip(f"no GPU: {error.message}", allow_module_level=True)


class DeviceKernels(Kernels):
    """The library on the GPU: results are waited for, and what went wrong on the device is told."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.path = path

    def enqueue(self, arguments: ctypes.Structure, memory: DeviceMemory) -> None:
        super().enqueue(arguments, memory)
        status = self.library.shadowc_device_synchronize()
        if status:
            raise KernelError(status, self.text(status))


@pytest.fixture(scope="session")
def gpu() -> Cudart:
    try:
        return open_cuda()
    except SetupError as error:
        pytest.skip(f"no GPU: {error.message}")


@pytest.fixture(scope="session")
def kernels(gpu: Cudart) -> DeviceKernels:
    try:
        return DeviceKernels(build.build("sm_{}{}".format(*gpu.gpu.capability)))
    except build.UnavailableError as reason:
        pytest.skip(f"the kernels cannot be compiled for the GPU: {reason}")
