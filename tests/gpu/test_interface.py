# SPDX-License-Identifier: Apache-2.0
"""The promises of the C interface, and random bits in every operand, on the GPU."""

from __future__ import annotations

import pytest

from tests.emulation.test_garbage import test_random_bits_write_nothing_outside_the_operands  # noqa: F401
from tests.emulation.test_interface import *  # noqa: F403
from tests.gpu.conftest import require_gpu

pytestmark = pytest.mark.gpu
require_gpu()
