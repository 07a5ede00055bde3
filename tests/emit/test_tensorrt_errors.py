# SPDX-License-Identifier: Apache-2.0
"""Errors of TensorRT itself, provoked: each comes out of compile's builder as one sentence with the next command.

The builder's process is the real one, with one thing wrong (`provoked_child`), or it gets a request with one thing
wrong; what TensorRT says is its own. More of them are in test_tensorrt_build.py and in tests/tensorrt_plugin. What a
machine without a GPU and without enterprise TensorRT cannot provoke, and where its message is tested instead:

- All of loading a plan (another version or GPU, a plugin that is missing or another): loading fails for want of a
  driver before TensorRT looks at any of it. Our own checks come first: tests/runtime/test_tensorrt_machine.py; what
  TensorRT says after them is passed on: test_tensorrt_plans.py.
- A request outside the profile, a failing capture, memory of the device: the same; test_tensorrt_cuda.py,
  test_tensorrt_memory.py and test_tensorrt_generate.py, on a device that is emulated.
- A plugin for another major version: TensorRT for RTX takes both; tests/tensorrt_plugin/test_abi.py, with libraries
  that only tell a version.
- Weights inside the graph (over 2 GB, or their files missing or cut): weights are inputs of the plans, see
  test_weights_never_reach_the_builder. Aliased memory without its feature and version-compatible plans: compile always
  sets the one and never asks for the other.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import onnx
import pytest
from onnx import helper

from shadowc.emit.tensorrt import builder, emit
from shadowc.emit.tensorrt.builder import BuildRequest, build_plan
from shadowc.emit.tensorrt.readiness import readiness
from shadowc.spec.errors import SetupError
from shadowc.spec.options import CompileOptions
from shadowc.spec.progress import Event, EventProgress, NullProgress
from tests.emit import rtx
from tests.trace import deep

BUG = "report this: it is a bug"


@pytest.fixture(scope="module", autouse=True)
def needed() -> None:
    rtx.required()


@pytest.fixture
def request_(tmp_path: Path) -> BuildRequest:
    return rtx.request(tmp_path)


@pytest.fixture
def provoke(monkeypatch: pytest.MonkeyPatch):
    """provoke(what): the next builder's process does it, see provoked_child."""

    def choose(what: str) -> None:
        monkeypatch.setattr(builder, "_CHILD", "tests.emit.provoked_child")
        monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
        monkeypatch.setenv("PROVOKED", what)

    return choose


def refusal(request: BuildRequest) -> SetupError:
    with pytest.raises(SetupError, match=f"could not build {request.plan.file}: ") as caught:
        build_plan(request, NullProgress())
    return caught.value


def edited(request: BuildRequest, name: str, **ranges: tuple[int, ...] | None) -> BuildRequest:
    """The request with another profile of one input."""
    inputs = tuple(
        tensor.model_copy(update=ranges) if tensor.name == name else tensor for tensor in request.plan.inputs
    )
    return dataclasses.replace(request, plan=request.plan.model_copy(update={"inputs": inputs}))


# --- memory and drivers


def test_memory_that_runs_out_is_told_with_the_estimate_that_came_first(
    provoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHADOWC_CACHE", str(tmp_path / "cache"))
    provoke("memory")
    events: list[Event] = []
    options = CompileOptions(model="opt-small", target="tensorrt-rtx", max_batch=4, predictor="none")
    programs = {name: rtx.program(name, sparsity=None) for name in ("decode", "prefill")}
    ending = r"decode\.plan: memory ran out \(.*std::bad_alloc\): a compile of this model needs"
    with pytest.raises(SetupError, match=ending) as caught:
        emit.emit_tensorrt(programs, deep.Tensors(), tmp_path, options=options, progress=EventProgress(events.append))
    assert caught.value.hint == "free memory, or compile with a smaller --max-batch and --max-context"
    (note,) = (event.text for event in events if event.kind == "note" and "needs about" in event.text)
    assert note.removeprefix("memory may run out: ")[:50] in caught.value.message
    kinds = [event.kind for event in events]
    assert kinds.index("note") < kinds.index("advance")


MORE = [pytest.param(flag, marks=pytest.mark.slow) for flag in ("STRIP_PLAN", "REFIT_IDENTICAL")]


@pytest.mark.parametrize("flag", ["REFIT", *MORE])
def test_step_that_needs_a_gpu_is_told(request_: BuildRequest, provoke, flag: str) -> None:
    if readiness("tensorrt-rtx").runs:
        pytest.skip("a GPU is here")
    provoke(flag)
    error = refusal(request_)
    assert "this step of the builder needs an NVIDIA GPU and its driver (" in error.message
    assert error.hint == "build on a machine with a GPU"


def test_types_that_no_kernel_takes_are_told(request_: BuildRequest, provoke) -> None:
    path = request_.folder / request_.plan.onnx
    model = onnx.load(path)
    at, node = next((at, node) for at, node in enumerate(model.graph.node) if node.name == "layers.0.middle")
    node.input[0] = "choosy"
    model.graph.node.insert(at, helper.make_node("Choosy", ["residual.0"], ["choosy"], "choosy", domain="shadowc"))
    onnx.save(model, path)
    provoke("types")
    assert "an operator has no kernel for the types of its inputs (" in refusal(request_).message


# --- profiles


def test_input_without_a_profile_is_told(request_: BuildRequest) -> None:
    error = refusal(edited(request_, "past", smallest=None, best=None, largest=None))
    assert "an input of changing size has no profile (" in error.message
    assert "tensor past is missing" in error.message
    assert error.hint == BUG


@pytest.mark.parametrize(
    "ranges",
    [{"smallest": (3, 5), "best": (3, 5)}, {"best": (1, 20), "largest": (4, 20)}],
    ids=["self-consistent", "invalid shape profile"],
)
def test_sizes_that_cannot_occur_together_are_told(tmp_path: Path, ranges: dict[str, tuple[int, ...]]) -> None:
    error = refusal(edited(rtx.request(tmp_path, "prefill"), "input_ids", **ranges))
    assert "the sizes that the profile allows cannot occur together (" in error.message
    assert error.hint == BUG


def test_limits_beyond_the_kernels_are_told_by_the_operator(request_: BuildRequest) -> None:
    inputs = tuple(
        tensor.model_copy(update={"largest": (70_000_000, *tensor.largest[1:])}) if tensor.largest else tensor
        for tensor in request_.plan.inputs
    )
    plan = request_.plan.model_copy(update={"inputs": inputs})
    message = refusal(dataclasses.replace(request_, plan=plan)).message
    assert "SparseAttention 'layers.0.attention': at the largest shapes of the profile (B = 70000000," in message


# --- files and plugins


@pytest.mark.parametrize(
    ("kept", "says"), [(0.5, "the file of the graph is damaged ("), (0.0, "the file of the graph is empty (")]
)
def test_graph_that_was_cut_is_told(request_: BuildRequest, kept: float, says: str) -> None:
    path = request_.folder / request_.plan.onnx
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    error = refusal(request_)
    assert f"could not build decode.plan: {says}" in error.message
    assert error.hint == "compile again"


def test_operator_that_does_not_fit_its_inputs_says_why(request_: BuildRequest) -> None:
    rtx.set_attribute(request_.folder / request_.plan.onnx, "layers.1.ffn", "block", 32)
    message = refusal(request_).message
    assert "SparseFFN 'layers.1.ffn': units of scores (N): expected ceil(F / block) = 7, found 13" in message


def test_twin_that_registers_itself_is_told(request_: BuildRequest) -> None:
    twin = request_.plugin.with_name(f"{request_.plugin.stem}_auto.so")
    assert twin.is_file()
    error = refusal(dataclasses.replace(request_, plugin=twin))
    assert f"{twin.name} registers itself and must not be given to the builder" in error.message
