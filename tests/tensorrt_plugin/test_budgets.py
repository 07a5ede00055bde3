# SPDX-License-Identifier: Apache-2.0
"""What ptxas says about the kernels: registers, shared memory and spills stay within a budget per kernel.

A budget is a promise about occupancy: 64 registers let 1024 threads of an SM run, 128 let 512. Where a change exceeds
one, look at the kernel before the number.
"""

from __future__ import annotations

import pytest

from tests.tensorrt_plugin import checks, toolchain
from tests.tensorrt_plugin.checks import Budget

# Over all types and architectures. What has more than 128 registers takes tiles of 16 rows.
BUDGETS = {
    "attend_span": Budget(registers=80, shared=4160),
    "clear": Budget(registers=8),
    "clear_histograms": Budget(registers=8),
    "copy_prefix": Budget(registers=24),
    "count_layer": Budget(registers=40, shared=32968),
    "finish_global": Budget(registers=56, shared=32968),
    "finish_sum": Budget(registers=64),
    "hidden_of_listed": Budget(registers=168),
    "list_tile": Budget(registers=40, shared=320),
    "merge_spans": Budget(registers=48),
    "project": Budget(registers=184),
    "select_local": Budget(registers=64, shared=32968),
    "sum_members": Budget(registers=208, shared=16896),
}


def test_every_kernel_keeps_its_budget():
    reports = toolchain.ptxas_reports()
    if not reports:
        pytest.skip("no build folder here (an installed wheel): " + toolchain.NO_PLUGIN)
    assert checks.budget("".join(path.read_text() for path in reports), BUDGETS) == []


# --- planted defects ------------------------------------------------------------------------------------------------

CODE = """
__global__ void greedy(const float* x, float* y) {
  float a[64];
  for (int i = 0; i < 64; ++i) a[i] = x[threadIdx.x + i * blockDim.x];
  __syncthreads();
  for (int j = 0; j < 64; ++j) {
    float s = 0;
    for (int i = 0; i < 64; ++i) s += a[i] * a[(i * 7 + 3 * j) % 64];
    y[j] = s;
  }
}
__global__ void roomy(float* y) {
  __shared__ float s[2048];
  s[threadIdx.x] = y[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = s[(threadIdx.x * 7) % 2048];
}
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    nvcc = toolchain.nvcc_path()
    if nvcc is None:
        pytest.skip("needs nvcc")
    folder = tmp_path_factory.mktemp("planted")
    (folder / "planted.cu").write_text(CODE)
    launcher = toolchain.TOP / "cmake" / "nvcc_with_report.sh"
    toolchain.run(launcher, nvcc, "-arch=sm_80", "-maxrregcount=32", "-c", "planted.cu", "-o", "planted.o", cwd=folder)
    return (folder / "planted.o.ptxas").read_text()


def test_a_kernel_that_spills_is_noticed(report):
    found = checks.budget(report, {"greedy": Budget(255), "roomy": Budget(255, 8192)})
    assert len(found) == 1
    assert "greedy" in found[0]
    assert "bytes of stack and spills, budget 0" in found[0]


def test_too_many_registers_too_much_shared_memory_and_unknown_kernels_are_noticed(report):
    found = " ".join(checks.budget(report, {"roomy": Budget(4, 8191), "gone": Budget(1)}))
    assert "greedyPKfPf for sm_80: no budget for this kernel" in found
    assert "registers, budget 4" in found
    assert "8192 bytes of shared memory, budget 8191" in found
    assert "gone: a budget for no kernel" in found
