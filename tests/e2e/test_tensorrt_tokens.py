# SPDX-License-Identifier: Apache-2.0
"""What `shadowc compile` writes for TensorRT generates the cpu engine's tokens, on a device in host memory.

Everything is real but two things: nobody builds plans (the graphs that they would be built from run in ONNX Runtime,
operators as the functions that define them), and the device is the host's memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest

import shadowc
from shadowc.emit.tensorrt import checks, emit
from shadowc.emit.tensorrt.builder import BuildRequest, BuildResult
from shadowc.runtime.load import load, read_manifest, verify
from shadowc.runtime.tensorrt.bindings import Bindings
from shadowc.runtime.tensorrt.engine import TensorRtEngine
from shadowc.spec.density import Density
from shadowc.spec.oracle_tensorrt import attach_tensorrt
from tests.e2e.compiled import options
from tests.runtime.host_device import HostDevice, HostPlan

NO_BUILDER = Bindings(None, "no builder", "rtx1", "1.7.1.116", None)
OPERATORS = ("shadowc::SelectThreshold::1", "shadowc::SparseAttention::1", "shadowc::SparseFFN::1")
DENSITIES = [1.0, 0.5, Density(0.5, 0.25)]


@pytest.fixture(scope="module")
def without_builder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """compile, with plans that are only named so, for heads of any size."""
    plugin = tmp_path_factory.mktemp("plugin") / "libshadowc_trt11.so"
    plugin.write_bytes(b"no plugin")

    def build(request: BuildRequest, progress: object) -> BuildResult:
        (request.folder / request.plan.file).write_bytes(b"no plan")
        return BuildResult(7, 0.0, 0, NO_BUILDER.version, OPERATORS)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checks, "builder_of", lambda target: NO_BUILDER)
        patch.setattr(checks, "plugin_of", lambda bindings: plugin)
        patch.setattr(checks, "HEAD_SIZES", (*checks.HEAD_SIZES, 16))
        patch.setattr(emit, "build_plan", build)
        yield


@pytest.fixture(scope="module")
def plan_engine(tiny_checkpoint: Path, without_builder: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint in fp32, with the predictor of `sparse_engine`. Read only."""
    return shadowc.compile(
        options(tiny_checkpoint, tmp_path_factory.mktemp("trt") / "tiny.trt", target="tensorrt-rtx", weights="fp32")
    )


def on_host(folder: Path, device: HostDevice | None = None) -> TensorRtEngine:
    device, manifest = device or HostDevice(), read_manifest(folder)
    plans = {
        name: HostPlan(device, part, attach_tensorrt(onnx.load(folder / part.onnx)), as_it_is=True)
        for name, part in manifest.tensorrt.plans.items()
    }
    return TensorRtEngine(folder, manifest, device, plans)


def prompts(folder: Path, rows: int, tokens: int, seed: int) -> np.ndarray:
    vocab = read_manifest(folder).model.vocab
    return np.random.default_rng(seed).integers(4, vocab, (rows, tokens), dtype=np.int64)


@pytest.mark.parametrize("density", DENSITIES)
def test_a_compiled_folder_generates_the_cpu_engines_tokens(
    sparse_engine: Path, plan_engine: Path, density: float | Density
) -> None:
    cpu, host = load(sparse_engine), on_host(plan_engine)
    ids = prompts(plan_engine, 3, 9, seed=1)
    ids[1, :4] = ids[2, :1] = read_manifest(plan_engine).model.pad
    found, expected = (one.generate(ids, max_new_tokens=16, density=density) for one in (host, cpu))
    np.testing.assert_array_equal(found, expected)
    assert host.last_stats.heads_by_layer.tolist() == cpu.last_stats.heads_by_layer.tolist()
    assert host.last_stats.neurons_by_layer.tolist() == cpu.last_stats.neurons_by_layer.tolist()


def test_teacher_forced_logits_of_a_compiled_folder_are_the_cpu_engines(sparse_engine: Path, plan_engine: Path) -> None:
    ids = prompts(plan_engine, 2, 21, seed=2)
    found, expected = (one.logits(ids, 0.5, prompt_tokens=4) for one in (on_host(plan_engine), load(sparse_engine)))
    np.testing.assert_allclose(found, expected, atol=5e-4)


def test_a_compiled_folder_verifies_and_has_a_sound_layout(plan_engine: Path) -> None:
    assert not [text for text in verify(plan_engine).problems if "engine.json" in text or "changed" in text]


def test_the_step_of_a_compiled_folder_is_captured_and_replayed(plan_engine: Path) -> None:
    device = HostDevice()
    on_host(plan_engine, device).generate(prompts(plan_engine, 1, 5, seed=3), max_new_tokens=8, min_new_tokens=8)
    assert (device.counts["capture"], device.counts["launch"]) == (1, 6)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_opt_mini_generates_the_cpu_engines_tokens(without_builder: None, tmp_path: Path) -> None:
    made = {
        target: shadowc.compile(options("opt-mini", tmp_path / target, target=target, weights="fp32", offline=True))
        for target in ("cpu", "tensorrt-rtx")
    }
    cpu, host = load(made["cpu"]), on_host(made["tensorrt-rtx"])
    texts = ["Once upon a time", "The little dog was very happy because"]
    for density in DENSITIES:
        assert host.generate(texts, max_new_tokens=24, density=density) == cpu.generate(
            texts, max_new_tokens=24, density=density
        )
        assert host.last_stats.neurons == cpu.last_stats.neurons
