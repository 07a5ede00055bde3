# SPDX-License-Identifier: Apache-2.0
"""What can be known without a GPU about the tests that need one: they collect, compile, and measure what they say."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from shadowc.emit.tensorrt.checks import check_capabilities
from shadowc.runtime.tensorrt.cuda import open_cuda
from shadowc.spec.errors import SetupError
from tests.emulation.library import Kernels
from tests.gpu import build, goals, report, table
from tests.gpu.conftest import COLLECT_VARIABLE
from tests.gpu.targets import NoTargetError, engine_options, engine_target
from tests.gpu.timing import CAPACITY, FILLED, SHAPES, Bench, Shape, Timed
from tests.runtime.host_device import HostDevice

ROOT = Path(__file__).parents[2]
TINY = Shape("opt-tiny", 64, 256, 2, 3)


class TickingDevice(HostDevice):
    """Host memory whose clock goes on by one millisecond per event."""

    def __init__(self) -> None:
        super().__init__()
        self.ticks = 0

    def event(self) -> int:
        self.ticks += 1
        return self.ticks

    def milliseconds(self, first: int, second: int) -> float:
        return float(second - first)


class CountingCublas:
    def __init__(self) -> None:
        self.products: set[tuple[int, int, int]] = set()
        self.attends: set[tuple[str, int, int, int, int]] = set()

    def product(self, y: int, x: int, w: int, batch: int, rows: int, columns: int) -> None:
        self.products.add((batch, rows, columns))

    def scores(self, y: int, q: int, keys: int, heads: int, filled: int, capacity: int, head_size: int) -> None:
        self.attends.add(("scores", heads, filled, capacity, head_size))

    def context(self, y: int, p: int, values: int, heads: int, filled: int, capacity: int, head_size: int) -> None:
        self.attends.add(("context", heads, filled, capacity, head_size))


@pytest.fixture(scope="module")
def emulated() -> Kernels:
    from tests.emulation import build as emulation

    try:
        return Kernels(emulation.build())
    except emulation.UnavailableError as reason:
        pytest.skip(f"the CUDA kernels cannot be compiled for the host: {reason}")


@pytest.fixture
def bench(emulated: Kernels) -> Bench:
    return Bench(TickingDevice(), emulated.library, rounds=3, cache_bytes=1 << 17)


def has_gpu() -> bool:
    try:
        open_cuda()
    except SetupError:
        return False
    return True


def test_all_tests_for_the_gpu_are_collected() -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--collect-only",
        "-q",
        "tests/gpu",
        "-m",
        "gpu",
        "-p",
        "no:cacheprovider",
    ]
    environment = {**os.environ, COLLECT_VARIABLE: "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    for name in ("test_kernels.py", "test_interface.py", "test_graph.py", "test_sanitizer.py", "test_generate.py"):
        assert f"tests/gpu/{name}::" in result.stdout
    assert result.stdout.count("tests/gpu/test_kernels.py::") > 100


@pytest.mark.skipif(has_gpu(), reason="a GPU is here, so it would run")
def test_one_command_says_in_one_line_why_it_cannot_run() -> None:
    result = subprocess.run([sys.executable, "-m", "tests.gpu"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stdout.startswith("gpu-test cannot run here: ")
    assert len(result.stdout.splitlines()) == 1
    assert not result.stderr


def tools(*installed: str) -> Callable[[str], None]:
    def require(target: str) -> None:
        if target not in installed:
            raise SetupError(f"no {target} here", hint="")

    return require


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_engines_are_built_with_tensorrt_for_every_card_if_it_is_installed(capability: tuple[int, int]) -> None:
    target = engine_target(capability, tools("tensorrt", "tensorrt-rtx"))
    assert target == "tensorrt"
    assert not engine_options(target, capability, Path("mini"), "fp32").compute_capability


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (12, 0), (12, 1)])
def test_engines_are_built_with_tensorrt_for_rtx_for_the_cards_that_it_has(capability: tuple[int, int]) -> None:
    target = engine_target(capability, tools("tensorrt-rtx"))
    assert target == "tensorrt-rtx"
    for weights in ("fp32", "fp16", "bf16", "int8"):
        options = engine_options(target, capability, Path("mini"), weights)
        assert options.compute_capability == ("{}.{}".format(*capability),)
        check_capabilities(options)


@pytest.mark.parametrize(("capability", "reason"), [
    ((9, 0), "does not build for compute capability 9.0"), ((10, 0), "does not build for compute capability 10.0"),
    ((7, 5), "compute capability 7.5 has no float32 products"),
])  # fmt: skip
def test_engine_tests_are_skipped_with_the_reason_where_only_rtx_is_installed_and_lacks_the_card(
    capability: tuple[int, int], reason: str
) -> None:
    with pytest.raises(NoTargetError, match=reason) as raised:
        engine_target(capability, tools("tensorrt-rtx"))
    assert "no tensorrt here; " in str(raised.value)


def test_engine_tests_are_skipped_with_both_reasons_where_nothing_is_installed() -> None:
    with pytest.raises(NoTargetError, match="no tensorrt here; no tensorrt-rtx here"):
        engine_target((8, 6), tools())


@pytest.mark.slow
def test_the_library_for_the_gpu_compiles_and_exports_the_interface() -> None:
    try:
        path = build.build("sm_80")
    except build.UnavailableError as reason:
        pytest.skip(str(reason))
    library = ctypes.CDLL(str(path))
    for kernel in ("select", "ffn", "attention"):
        for part in ("check", "workspace", "enqueue"):
            assert getattr(library, f"shadowc_{kernel}_{part}")
    for name in ("shadowc_error_text", "shadowc_emulation_allocate", "shadowc_emulation_release",
                 "shadowc_emulation_order", "shadowc_emulation_layout", "shadowc_device_synchronize"):  # fmt: skip
        assert getattr(library, name)


@pytest.mark.parametrize("density", [1.0, 0.5, 0.25])
@pytest.mark.parametrize("int8", [False, True])
def test_the_timed_ffn_reads_the_wanted_share(bench: Bench, density: float, int8: bool) -> None:
    timed = bench.ffn(TINY, density, 1, int8=int8)
    row = TINY.hidden * (1 if int8 else 2) + 4
    assert timed.bytes == density * TINY.neurons * 2 * row


def test_the_timed_attention_reads_keys_of_all_heads_and_the_wanted_share_of_the_rest(bench: Bench) -> None:
    row, head = TINY.hidden * 2 + 4, TINY.head_size
    cache = 2 * (FILLED + 1) * head * 2
    assert bench.attention(TINY, 1.0, 1).bytes == 2 * 4 * head * row + 2 * cache
    assert bench.attention(TINY, 0.5, 1).bytes == (4 + 2) * head * row + cache
    assert bench.attention(TINY, 0.5, 1, kv_active=True).bytes == 4 * head * row + cache


def test_a_dense_layer_moves_its_weights_and_all_keys_and_values(bench: Bench) -> None:
    E, F, cublas = TINY.hidden, TINY.neurons, CountingCublas()
    assert bench.dense_ffn(TINY, 4, cublas).bytes == 2 * E * F * 2
    assert bench.dense_attention(TINY, 4, cublas).bytes == 4 * E * E * 2 + 4 * 2 * (FILLED + 1) * E * 2


@pytest.fixture(scope="module")
def page() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_kernels_page", ROOT / "scripts" / "gpu_kernels_page.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("kv", goals.KV)
@pytest.mark.parametrize(("int8", "density"), [(False, 0.5), (True, 0.5), (False, 1.0)])
def test_the_page_says_what_bytes_the_measurement_compares(
    bench: Bench, page: ModuleType, kv: str, int8: bool, density: float
) -> None:
    model = page.Model(TINY.model, TINY.layers, TINY.hidden, TINY.neurons, TINY.heads)
    attention = bench.attention(TINY, density, 1, int8=int8, kv_active=kv == "active")
    sparse = bench.ffn(TINY, density, 1, int8=int8).bytes + attention.bytes
    assert page.counted(model, 1 if int8 else 2, density, kv, page.GOAL_SLOTS) == sparse
    cublas = CountingCublas()
    dense = bench.dense_ffn(TINY, 1, cublas).bytes + bench.dense_attention(TINY, 1, cublas).bytes
    assert page.dense(model, page.GOAL_SLOTS) == dense


def test_the_page_has_the_goals_and_models_of_the_measurement(page: ModuleType) -> None:
    assert (page.GOAL_SLOTS, page.GOAL_SPEEDUP, page.GOAL_SHARE) == (FILLED + 1, goals.SPEEDUP, goals.SHARE)
    assert [tuple(model) for model in page.MODELS] == [
        (shape.model, shape.layers, shape.hidden, shape.neurons, shape.heads) for shape in SHAPES
    ]
    assert f"`Error {report.NOT_RUN}`" in page.page()
    assert f"`Error {report.MISSED}`" in page.page()


def test_the_clock_counts_one_launch(bench: Bench) -> None:
    copies = -(-(1 << 17) // (2 * TINY.neurons * TINY.hidden * 2))
    assert copies == 2
    assert bench.ffn(TINY, 0.5, 1).microseconds == pytest.approx(1000 / copies)
    assert bench.select(TINY, 16, 0.5, 2) == Timed(pytest.approx(1000 / 16), 2 * 2 * 16 * 4)


def test_copies_count_what_is_read_and_written(bench: Bench) -> None:
    assert bench.bandwidth(1 << 12) == pytest.approx(2 * (1 << 12) / (1e-3 / 4))


def test_dense_products_are_those_of_the_layer_with_all_keys_and_values(bench: Bench) -> None:
    cublas = CountingCublas()
    found = list(table.rows(bench, cublas, [TINY], [2], [0.5]))
    assert cublas.products == {(2, 256, 64), (2, 64, 256), (2, 192, 64), (2, 64, 64)}
    assert cublas.attends == {("scores", 2 * 2, FILLED + 1, CAPACITY, 32), ("context", 2 * 2, FILLED + 1, CAPACITY, 32)}
    assert [(row.kernel, row.weights) for row in found] == [
        (kernel, weights)
        for kernel in ("ffn", "attention, kv=all", "attention, kv=active")
        for weights in ("fp16", "int8")
    ] + [("select heads", "-"), ("select neurons", "-")]
    assert all(row.speedup for row in found if not row.kernel.startswith("select"))


def test_all_memory_is_given_back(bench: Bench) -> None:
    bench.ffn(TINY, 0.5, 1)
    bench.attention(TINY, 0.5, 2)
    bench.dense_ffn(TINY, 1, CountingCublas())
    bench.dense_attention(TINY, 2, CountingCublas())
    assert not bench.device.device
    assert not bench.device.pinned


def test_masks_have_the_wanted_share_in_every_row(bench: Bench) -> None:
    from shadowc.runtime.tensorrt.device import Arena, bytes_at

    arena = Arena(bench.device)
    mask = bench._mask(arena, 3, 16, 0.25)
    scores = bytes_at(mask.scores, 3 * 16 * 4).view(np.float32).reshape(3, 16)
    assert (scores >= 0.5).sum(axis=1).tolist() == [4, 4, 4]
    assert not (scores[0] == scores[1]).all()
