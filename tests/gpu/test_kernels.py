# SPDX-License-Identifier: Apache-2.0
"""Every case that the emulated kernels are tested with, on the GPU: same functions, same oracles, same tolerances."""

from __future__ import annotations

import pytest

from tests.emulation.test_cases_of_cpu_kernels import *  # noqa: F403
from tests.gpu.conftest import require_gpu

pytestmark = pytest.mark.gpu
require_gpu()
