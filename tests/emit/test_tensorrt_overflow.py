# SPDX-License-Identifier: Apache-2.0
"""Activations beyond the target's type end a compile: layer, tensor, value, and the weights to choose instead."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from shadowc.compiler import compile_engine
from shadowc.emit.tensorrt import checks, emit
from shadowc.emit.tensorrt.builder import BuildRequest, BuildResult
from shadowc.measure.overflow import narrow_activations, require_range
from shadowc.runtime.tensorrt.bindings import Bindings
from shadowc.spec.density import Density
from shadowc.spec.errors import InputError
from shadowc.spec.options import CompileOptions
from shadowc.trace.program_io import to_model
from tests.conftest import TINY
from tests.passes import tensorrt
from tests.trace import deep

FAR = 70_000.0
"""Beyond float16, which ends at 65,504; nothing for bfloat16."""
GAIN = 100.0
"""Of fc2's rows: the sum over the neurons leaves float16's range, no weight does."""


LAYER = TINY["num_hidden_layers"] - 1
"""The last: float32 cannot add what layers after it give to numbers that large within the gate's tolerance."""


@pytest.fixture(scope="module")
def far(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose FFN reaches far in one layer and whose weights do not. Read only."""
    import torch
    from transformers import OPTConfig, OPTForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(11)
        config = OPTConfig(**{**TINY, "num_attention_heads": 2}, attn_implementation="eager")
        model = OPTForCausalLM(config).eval()
    layer = model.model.decoder.layers[LAYER]
    with torch.no_grad():
        layer.fc1.bias.fill_(10)
        layer.fc2.weight.copy_(GAIN * layer.fc2.weight.sign()[:, :1].expand_as(layer.fc2.weight))
    folder = tmp_path_factory.mktemp("far") / "opt-far"
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def no_builder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A stand-in for builder and plugin; graphs, weights and the gate are real."""
    plugin = tmp_path / "libshadowc_trt11.so"
    plugin.write_bytes(b"plugin")

    def build(request: BuildRequest, progress: object) -> BuildResult:
        (request.folder / request.plan.file).write_bytes(b"plan")
        return BuildResult(4, 0.1, 1 << 20, "1.7.1.116", ())

    monkeypatch.setattr(
        checks, "builder_of", lambda target: Bindings(SimpleNamespace(), "tensorrt_rtx", "rtx1", "1.7.1.116", None)
    )
    monkeypatch.setattr(checks, "plugin_of", lambda bindings: plugin)
    monkeypatch.setattr(emit, "build_plan", build)


def compiled(model: Path, out: Path, weights: str) -> dict[str, object]:
    """What the gate found."""
    options = {"target": "tensorrt-rtx", "weights": weights, "predictor": "none", "max_batch": 2}
    return compile_engine(CompileOptions.model_validate({"model": str(model), "out": out, **options})).manifest.parity


@pytest.mark.usefixtures("no_builder")
@pytest.mark.parametrize("weights", ["fp16", pytest.param("int8", marks=pytest.mark.slow)])
def test_activation_beyond_float16_ends_the_compile_with_layer_and_tensor(
    far: Path, tmp_path: Path, weights: str
) -> None:
    first = rf"beyond float16, which ends at 65504: layer {LAYER}: layers\.{LAYER}\.ffn\.y reaches \d{{6}}"
    with pytest.raises(InputError, match=first) as caught:
        compiled(far, tmp_path / "far.engine", weights)
    assert caught.value.hint == "--weights bf16 or --weights fp32"
    assert f"layer {LAYER}: residual.{LAYER + 1} reaches" in " ".join(caught.value.problems)
    assert not list(tmp_path.glob("far.engine*"))


@pytest.mark.slow
@pytest.mark.usefixtures("no_builder")
def test_types_that_hold_the_activation_are_compiled_and_tell_the_largest(far: Path, tmp_path: Path) -> None:
    largest = compiled(far, tmp_path / "bf16.engine", "bf16")["largest_activation"]
    assert isinstance(largest, float)
    assert FAR < largest < 1e6
    assert "largest_activation" not in compiled(far, tmp_path / "fp32.engine", "fp32")


@pytest.mark.parametrize("prefill", [False, True], ids=["decode", "prefill"])
def test_every_computed_tensor_of_16_bits_is_measured_and_no_weight(prefill: bool) -> None:
    program = tensorrt.compiled(deep.plan(), prefill=prefill)
    names = narrow_activations(to_model(program).graph, program.weights)
    assert {"residual.0", "layers.0.middle", "residual.11", "logits.narrow", "layers.10.ffn.x.float16"} <= set(names)
    assert not [name for name in names if name.endswith((".matrix", ".bias", ".float32"))]
    inner = (
        {"layers.3.ffn.fc1", "layers.3.attention.q"} if prefill else {"layers.3.ffn.y", "present.3.key", "context.3"}
    )
    assert inner <= set(names)


def test_runs_are_measured_together() -> None:
    runner = tensorrt.runner(tensorrt.compiled(deep.plan()))
    probe = tensorrt.probe(runner)
    assert not runner.largest
    seen = 0.0
    for token in (7, 8, 9):
        found = probe.step(np.array([[token]]), density=Density(), sparse_tail=-1)
        assert not [name for name in found if name.startswith("largest")]
        seen = max(seen, float(np.abs(found["residual.11"]).max()))
        assert runner.largest["residual.11"] == seen


@pytest.mark.parametrize(
    ("value", "dtype", "held"),
    [
        (65504.0, "float16", True),
        (65519.0, "float16", True),  # rounds to 65504
        (65520.0, "float16", False),
        (65520.0, "bfloat16", True),
        (math.inf, "bfloat16", False),
        (math.nan, "float16", False),
    ],
)
def test_what_rounds_to_infinity_is_beyond_a_type(value: float, dtype: str, held: bool) -> None:
    graph = to_model(tensorrt.compiled()).graph
    largest = {"residual.0": 1.5, "residual.1": value}
    if held:
        assert require_range(graph, largest, dtype) == value
        return
    with pytest.raises(InputError, match=rf"beyond {dtype}, .*: layer 0: residual\.1 reaches"):
        require_range(graph, largest, dtype)


def test_tensors_outside_the_layers_have_no_number() -> None:
    graph = to_model(tensorrt.compiled()).graph
    with pytest.raises(InputError, match=r": residual\.0 reaches 70000;") as caught:
        require_range(graph, {"residual.0": FAR, "logits.narrow": FAR}, "float16")
    assert caught.value.problems == ("residual.0 reaches 70000", "logits.narrow reaches 70000")


def test_many_tensors_are_counted() -> None:
    graph = to_model(tensorrt.compiled()).graph
    with pytest.raises(InputError) as caught:
        require_range(graph, {f"residual.{layer}": FAR for layer in range(12)}, "float16")
    assert caught.value.problems[-1] == "and 4 more tensors"
