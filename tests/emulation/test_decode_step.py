# SPDX-License-Identifier: Apache-2.0
"""Whole models, op by op through the emulated kernels, generate the cpu engine's tokens.

The engine folder is what `shadowc compile --target tensorrt-rtx` writes, and the runtime that runs it is the one for
TensorRT, on a device in host memory (tests/runtime/host_device.py). Its decode plan is the compiled graph with the
shadowc operators as the CUDA kernels; its prefill plan runs in ONNX Runtime.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

import shadowc
from shadowc.runtime.engine import Engine
from shadowc.runtime.load import load, read_manifest
from shadowc.runtime.tensorrt.engine import TensorRtEngine
from shadowc.spec.density import Density
from shadowc.spec.oracle_tensorrt import attach_tensorrt
from tests.e2e.compiled import options
from tests.e2e.conftest import stage_cache  # noqa: F401
from tests.e2e.test_tensorrt_tokens import without_builder  # noqa: F401
from tests.emulation.library import Kernels
from tests.emulation.plan import EmulatedPlan
from tests.runtime.host_device import HostDevice, HostPlan

HALF = Density(0.5, 0.5)
PROMPT = "Once upon a time there was a little"
PROMPTS = (PROMPT, "The king of the country", "In the morning the two boys", "A cell is")
TOKENS = 16
TIE = 0.1
"""Two best logits closer than this may change places in half precision, which then also changes what follows."""


def emulated(folder: Path, kernels: Kernels) -> tuple[TensorRtEngine, EmulatedPlan]:
    """The engine, and its decode plan."""
    device, manifest = HostDevice(), read_manifest(folder)
    parts = manifest.tensorrt.plans
    graphs = {name: onnx.load(folder / part.onnx) for name, part in parts.items()}
    decode = EmulatedPlan(device, parts["decode"], graphs["decode"], kernels)
    prefill = HostPlan(device, parts["prefill"], attach_tensorrt(graphs["prefill"]), as_it_is=True)
    return TensorRtEngine(folder, manifest, device, {"decode": decode, "prefill": prefill}), decode


def assert_all_layers_ran(plan: EmulatedPlan, layers: int) -> None:
    """Heads and neurons are selected once per step, for all layers."""
    steps = plan.session.calls["select"] // 2
    assert steps >= TOKENS - 1
    assert plan.session.calls == {"select": 2 * steps, "ffn": layers * steps, "attention": layers * steps}


def test_a_tiny_model_generates_the_cpu_engines_tokens(
    tiny_checkpoint: Path,
    without_builder: None,  # noqa: F811
    kernels: Kernels,
    tmp_path: Path,
) -> None:
    made = [
        shadowc.compile(options(tiny_checkpoint, tmp_path / target, target=target, weights="fp32"))
        for target in ("cpu", "tensorrt-rtx")
    ]
    cpu, (gpu, plan) = load(made[0]), emulated(made[1], kernels)
    ids = np.random.default_rng(1).integers(4, 320, (2, 7), dtype=np.int64)
    ids[1, :3] = read_manifest(made[0]).model.pad
    found, expected = (one.generate(ids, max_new_tokens=TOKENS, density=HALF) for one in (gpu, cpu))
    np.testing.assert_array_equal(found, expected)
    assert gpu.last_stats.neurons_by_layer.tolist() == cpu.last_stats.neurons_by_layer.tolist()
    assert_all_layers_ran(plan, layers=4)


@pytest.fixture(scope="module")
def opt_mini_on_cpu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _opt_mini(tmp_path_factory.mktemp("cpu") / "opt-mini.engine", "cpu", "fp32")


def _opt_mini(out: Path, target: str, weights: str) -> Path:
    return shadowc.compile(options("opt-mini", out, target=target, weights=weights, offline=True))


@pytest.mark.slow
def test_opt_mini_generates_the_cpu_engines_tokens(
    opt_mini_on_cpu: Path,
    without_builder: None,  # noqa: F811
    kernels: Kernels,
    tmp_path: Path,
) -> None:
    cpu = load(opt_mini_on_cpu)
    gpu, plan = emulated(_opt_mini(tmp_path / "fp32", "tensorrt-rtx", "fp32"), kernels)
    found, expected = (one.generate([PROMPT], max_new_tokens=TOKENS, density=HALF) for one in (gpu, cpu))
    assert found == expected
    assert gpu.last_stats.neurons_by_layer.tolist() == cpu.last_stats.neurons_by_layer.tolist()
    assert_all_layers_ran(plan, layers=8)


@pytest.mark.slow
def test_opt_mini_in_fp16_generates_the_cpu_engines_tokens_up_to_a_tie(
    opt_mini_on_cpu: Path,
    without_builder: None,  # noqa: F811
    kernels: Kernels,
    tmp_path: Path,
) -> None:
    cpu = load(opt_mini_on_cpu)
    gpu, plan = emulated(_opt_mini(tmp_path / "fp16", "tensorrt-rtx", "fp16"), kernels)
    compared = sum(_tokens_equal_up_to_a_tie(gpu, cpu, prompt) for prompt in PROMPTS)
    assert compared >= 2 * TOKENS, "the prompts lead to ties too soon for this test to say something"
    assert_all_layers_ran(plan, layers=8)


def _tokens_equal_up_to_a_tie(gpu: TensorRtEngine, cpu: Engine, text: str) -> int:
    """Both generate from a text; returns how many new tokens had to be equal, and were."""
    prompt = np.array([cpu.tokenizer(text)["input_ids"]], np.int64)
    found, expected = (one.generate(prompt, max_new_tokens=TOKENS, density=HALF) for one in (gpu, cpu))
    start = prompt.shape[1]
    logits = cpu.logits(expected[:, :-1], HALF, prompt_tokens=start)[0, start - 1 :]
    best = np.sort(logits, axis=-1)[:, -2:]
    clear = int(np.append(best[:, 1] - best[:, 0] >= TIE, [False]).argmin())
    np.testing.assert_array_equal(found[:, : start + clear], expected[:, : start + clear])
    return clear
