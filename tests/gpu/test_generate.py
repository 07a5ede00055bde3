# SPDX-License-Identifier: Apache-2.0
"""Whole engines on the GPU: the cpu engine's tokens, steps replayed from a graph, densities that change per call."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

import shadowc
from shadowc.runtime.causal import CausalEngine
from shadowc.runtime.load import load, verify
from shadowc.runtime.tensorrt.cuda import Cudart
from shadowc.runtime.tensorrt.engine import TensorRtEngine
from shadowc.spec.options import CompileOptions
from tests.gpu.conftest import require_gpu
from tests.gpu.targets import NoTargetError, engine_options, engine_target

pytestmark = [pytest.mark.gpu, pytest.mark.slow]
require_gpu()
TEXTS = ["Once upon a time", "The little dog was very happy because", "One day"]
DENSITIES = (1.0, 0.5, 0.25)
AGREEMENT = 0.9
"""Share of tokens before the first difference that fp16 must reach on average: near-ties decide differently."""


@pytest.fixture(scope="module")
def target(gpu: Cudart) -> str:
    try:
        return engine_target(gpu.gpu.capability)
    except NoTargetError as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="module")
def cpu(gpu: Cudart, tmp_path_factory: pytest.TempPathFactory) -> CausalEngine:
    out = tmp_path_factory.mktemp("cpu") / "mini"
    return load(shadowc.compile(CompileOptions(model="opt-mini", out=out, weights="fp32", offline=True)))


def compiled(target: str, gpu: Cudart, out: Path, weights: str) -> TensorRtEngine:
    folder = shadowc.compile(engine_options(target, gpu.gpu.capability, out, weights))
    assert not verify(folder).problems
    engine = load(folder)
    assert isinstance(engine, TensorRtEngine)
    return engine


@pytest.fixture(scope="module")
def exact(target: str, gpu: Cudart, tmp_path_factory: pytest.TempPathFactory) -> TensorRtEngine:
    return compiled(target, gpu, tmp_path_factory.mktemp("fp32") / "mini", "fp32")


@pytest.mark.parametrize("density", DENSITIES)
def test_fp32_generates_the_cpu_engines_text(cpu: CausalEngine, exact: TensorRtEngine, density: float) -> None:
    found, expected = (one.generate(TEXTS, max_new_tokens=48, density=density) for one in (exact, cpu))
    assert found == expected
    assert exact.last_stats.heads == cpu.last_stats.heads
    assert exact.last_stats.neurons == cpu.last_stats.neurons


def test_teacher_forced_logits_are_the_cpu_engines(cpu: CausalEngine, exact: TensorRtEngine) -> None:
    ids = np.random.default_rng(0).integers(4, cpu.manifest.model.vocab, (2, 100), dtype=np.int64)
    found, expected = (one.logits(ids, 0.5, prompt_tokens=8) for one in (exact, cpu))
    spread = float(np.abs(expected).max())
    assert float(np.median(np.abs(found - expected).max(axis=-1))) < 1e-4 * spread


@pytest.mark.parametrize("weights", ["fp16", "bf16", "int8"])
def test_narrow_weights_agree_with_the_cpu_engine_for_most_of_the_text(
    cpu: CausalEngine, target: str, gpu: Cudart, tmp_path: Path, weights: str
) -> None:
    engine = compiled(target, gpu, tmp_path / "mini", weights)
    ids = np.array([cpu.tokenizer(TEXTS[0])["input_ids"]])
    expected = cpu.logits(cpu.generate(ids, max_new_tokens=48, density=1.0), 1.0, "dense")
    found = engine.logits(cpu.generate(ids, max_new_tokens=48, density=1.0), 1.0, "dense")
    assert float((found.argmax(-1) == expected.argmax(-1)).mean()) >= AGREEMENT


def test_steps_are_replayed_from_a_graph_and_give_what_plain_steps_give(
    exact: TensorRtEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    replayed = [exact.generate(TEXTS[:rows], max_new_tokens=24, density=0.5) for rows in (1, 2)]
    assert all(space.captured for space in exact._spaces.values())
    monkeypatch.setenv("SHADOWC_CUDA_GRAPH", "0")
    plain = load(exact.folder)
    assert isinstance(plain, TensorRtEngine)
    assert [plain.generate(TEXTS[:rows], max_new_tokens=24, density=0.5) for rows in (1, 2)] == replayed
    assert not any(space.captured for space in plain._spaces.values())


def test_every_run_gives_the_same_tokens(exact: TensorRtEngine) -> None:
    first = exact.generate(TEXTS, max_new_tokens=32, density=0.5)
    assert all(exact.generate(TEXTS, max_new_tokens=32, density=0.5) == first for _ in range(5))


def test_a_lower_density_reads_less(exact: TensorRtEngine) -> None:
    sizes = []
    for density in DENSITIES:
        exact.generate(TEXTS[0], max_new_tokens=24, min_new_tokens=24, density=density)
        sizes.append(exact.last_stats.bytes_read_kernels)
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < 0.6 * sizes[0]


def test_the_cpp_example_generates_the_same_ids(exact: TensorRtEngine, tmp_path: Path) -> None:
    import os
    import subprocess

    source = Path(__file__).parents[2] / "examples" / "tensorrt_cpp"
    library, include = os.environ.get("TENSORRT_LIBRARY"), os.environ.get("TENSORRT_INCLUDE_DIR")
    if not library or not include or shutil.which("cmake") is None:
        pytest.skip("set TENSORRT_LIBRARY and TENSORRT_INCLUDE_DIR (of the engine's version), and install cmake")
    settings = [f"-DTENSORRT_LIBRARY={library}", f"-DTENSORRT_INCLUDE_DIR={include}"]
    subprocess.run(["cmake", "-S", str(source), "-B", str(tmp_path), *settings], check=True, capture_output=True)
    subprocess.run(["cmake", "--build", str(tmp_path)], check=True, capture_output=True)
    ids = np.array([exact.tokenizer(TEXTS[0])["input_ids"]])
    command = [tmp_path / "generate", exact.folder, "--density", "0.5", "--tokens", "24", *map(str, ids[0].tolist())]
    found = subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True).stdout.split()
    new = exact.generate(ids, max_new_tokens=24, density=0.5)[0, ids.shape[1] :]
    assert list(map(int, found)) == new.tolist()
