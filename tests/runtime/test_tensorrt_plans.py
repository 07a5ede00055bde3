# SPDX-License-Identifier: Apache-2.0
"""Plans through TensorRT's Python interface, against a module that answers as TensorRT does: mostly with None."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from shadowc.runtime.tensorrt import plans
from shadowc.runtime.tensorrt.bindings import Bindings, messages_of
from shadowc.runtime.tensorrt.cuda import Gpu
from shadowc.runtime.tensorrt.plans import Scratch, load_plugin, open_plan
from shadowc.spec.errors import IncompatibleEngineError, InternalError, SetupError, VerificationError
from shadowc.spec.manifest import PlanPart, PlanTensor
from tests.runtime.host_device import HostDevice

OPERATORS = ("shadowc::SparseAttention::1", "shadowc::SparseFFN::1")
PART = PlanPart(
    file="decode.plan",
    onnx="decode.onnx",
    inputs=(
        PlanTensor(name="ids", kind="token", dtype="int64", shape=(-1, -1)),
        PlanTensor(name="past", kind="cache", dtype="float16", shape=(-1, 2, -1, 8)),
    ),
    outputs=(PlanTensor(name="present", kind="cache", dtype="float16", shape=(-1, 2, -1, 8), alias_of="past"),),
)
NAMES = ("ids", "past", "present")


class FakeLogger:
    Severity = SimpleNamespace(INTERNAL_ERROR=0, ERROR=1, WARNING=2, INFO=3)


class FakeContext:
    def __init__(self, engine: FakeEngine, settings: Any) -> None:
        self.engine, self.settings = engine, settings
        self.addresses: dict[str, int] = {}
        self.sizes: dict[str, tuple[int, ...]] = {}
        self.memory: tuple[int, int] | None = None
        self.runs: list[int] = []

    def set_device_memory(self, address: int, size: int) -> None:
        self.memory = address, size

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return name not in self.engine.trt.refuses or self.engine.trt.complain(f"{name}: no such address")

    def set_input_shape(self, name: str, sizes: tuple[int, ...]) -> bool:
        assert name != "present", "an output was given a shape"
        self.sizes[name] = sizes
        return "sizes" not in self.engine.trt.refuses or self.engine.trt.complain("does not satisfy any profile")

    def infer_shapes(self) -> list[str]:
        return [name for name in ("ids", "past") if name not in self.sizes]

    def execute_async_v3(self, stream: int) -> bool:
        self.runs.append(stream)
        return "run" not in self.engine.trt.refuses or self.engine.trt.complain("launch failed")

    def is_stream_capturable(self, stream: int) -> bool:
        return "capture" not in self.engine.trt.refuses


class FakeRuntimeConfig:
    def __init__(self) -> None:
        self.strategy, self.cache, self.dynamic_shapes_kernel_specialization_strategy = None, None, None

    def set_execution_context_allocation_strategy(self, strategy: str) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> SimpleNamespace:
        self.given: list[bytes] = []
        return SimpleNamespace(deserialize=lambda blob: self.given.append(blob) or True, serialize=lambda: b"kernels")

    def set_runtime_cache(self, cache: Any) -> bool:
        self.cache = cache
        return True


class FakeEngine:
    device_memory_size_v2 = 1000

    def __init__(self, trt: FakeTrt) -> None:
        self.trt, self.num_io_tensors = trt, len(trt.names)
        self.contexts: list[FakeContext] = []

    def get_tensor_name(self, index: int) -> str:
        return self.trt.names[index]

    def get_tensor_mode(self, name: str) -> str:
        return "OUTPUT" if name == "present" else "INPUT"

    def get_aliased_input_tensor(self, name: str) -> str | None:
        return self.trt.alias

    def create_runtime_config(self) -> FakeRuntimeConfig:
        return FakeRuntimeConfig()

    def create_execution_context(self, settings: Any) -> FakeContext | None:
        if "context" in self.trt.refuses:
            self.trt.complain("out of memory")
            return None
        self.contexts.append(FakeContext(self, settings))
        return self.contexts[-1]


class FakeTrt:
    """The parts of the module that shadowc uses."""

    ILogger = FakeLogger
    ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="mine")
    DynamicShapesKernelSpecializationStrategy = SimpleNamespace(EAGER="eager", LAZY="lazy")
    TensorIOMode = SimpleNamespace(INPUT="INPUT", OUTPUT="OUTPUT")

    def __init__(self) -> None:
        self.refuses: set[str] = set()
        self.names: tuple[str, ...] = NAMES
        self.alias: str | None = "past"
        self.creators: set[str] = set()
        self.brings: tuple[str, ...] = OPERATORS
        self.loaded: list[str] = []

    def complain(self, text: str) -> bool:
        collector, _ = messages_of(self)
        collector.log(FakeLogger.Severity.ERROR, text)
        collector.log(FakeLogger.Severity.ERROR, "[checkMacros.cpp::catchCudaError] cudaError 35")
        return False

    def Runtime(self, logger: Any) -> SimpleNamespace:
        def deserialize(content: bytes) -> FakeEngine | None:
            if content != b"plan":
                self.complain("Version tag does not match")
                return None
            self.engine = FakeEngine(self)
            return self.engine

        return SimpleNamespace(deserialize_cuda_engine=deserialize)

    def get_plugin_registry(self) -> SimpleNamespace:
        def load(path: str) -> object | None:
            self.loaded.append(path)
            if "plugin" in self.refuses:
                self.complain("cannot open shared object file")
                return None
            self.creators |= set(self.brings)
            return object()

        def creator(name: str, version: str, namespace: str) -> object | None:
            return object() if f"{namespace}::{name}::{version}" in self.creators else None

        return SimpleNamespace(load_library=load, get_creator=creator)


@pytest.fixture
def trt() -> FakeTrt:
    return FakeTrt()


@pytest.fixture
def cuda() -> SimpleNamespace:
    return SimpleNamespace(stream=77, gpu=Gpu("card", (8, 6)))


@pytest.fixture(autouse=True)
def _cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SHADOWC_CACHE", str(tmp_path / "cache"))


def bindings(trt: FakeTrt, family: str = "trt10") -> Bindings:
    return Bindings(trt, "fake", family, "10.14", None)


def opened(trt: FakeTrt, cuda: SimpleNamespace, folder: Path, family: str = "trt10", content: bytes = b"plan") -> Any:
    (folder / "decode.plan").write_bytes(content)
    return open_plan(bindings(trt, family), cuda, folder / "decode.plan", PART, Scratch(HostDevice()))


def test_the_plugin_is_loaded_once_by_an_absolute_path(trt: FakeTrt) -> None:
    for _ in range(2):
        load_plugin(bindings(trt), Path("libshadowc_trt10.so"), OPERATORS)
    assert trt.loaded == [str(Path("libshadowc_trt10.so").resolve())]


def test_a_plugin_that_tensorrt_refuses_is_told_with_the_first_reason(trt: FakeTrt) -> None:
    trt.refuses.add("plugin")
    with pytest.raises(
        IncompatibleEngineError, match=r"TensorRT 10.14 does not take .*cannot open shared object file$"
    ):
        load_plugin(bindings(trt), Path("p.so"), OPERATORS)


def test_a_plugin_without_an_operator_is_told_by_its_name(trt: FakeTrt) -> None:
    trt.brings = OPERATORS[:1]
    with pytest.raises(IncompatibleEngineError, match=r"it lacks shadowc::SparseFFN::1$"):
        load_plugin(bindings(trt), Path("p.so"), OPERATORS)


def test_a_refused_plan_is_told_with_the_first_reason(trt: FakeTrt, cuda: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(IncompatibleEngineError, match=r"refuses .*decode.plan: Version tag does not match$") as caught:
        opened(trt, cuda, tmp_path, content=b"other")
    assert caught.value.hint


@pytest.mark.parametrize(
    ("names", "says"),
    [((*NAMES, "extra"), "only the plan has a tensor extra"), (NAMES[1:], "only engine.json has.* ids")],
)
def test_a_plan_of_other_tensors_is_refused(
    trt: FakeTrt, cuda: SimpleNamespace, tmp_path: Path, names: tuple[str, ...], says: str
) -> None:
    trt.names = names
    with pytest.raises(VerificationError, match=says):
        opened(trt, cuda, tmp_path)


def test_a_cache_that_is_not_shared_is_refused(trt: FakeTrt, cuda: SimpleNamespace, tmp_path: Path) -> None:
    trt.alias = "ids"
    with pytest.raises(VerificationError, match="output present is no alias of past"):
        opened(trt, cuda, tmp_path)


def test_a_version_that_does_not_tell_aliases_is_taken(
    trt: FakeTrt, cuda: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(FakeEngine, "get_aliased_input_tensor")
    assert opened(trt, cuda, tmp_path)


@pytest.mark.parametrize("family", ["trt10", "rtx1"])
def test_executions_share_scratch_memory_and_run_on_the_stream(
    trt: FakeTrt, cuda: SimpleNamespace, tmp_path: Path, family: str
) -> None:
    plan = opened(trt, cuda, tmp_path, family)
    steady, other = plan.execution(steady=True), plan.execution(steady=False)
    for execution in (steady, other):
        execution.bind("ids", 256, (1, 1))
        execution.bind("past", 512, (1, 2, 256, 8))
        execution.bind("present", 512, (1, 2, 256, 8))
        execution.enqueue()
    first, second = trt.engine.contexts
    assert first.memory == second.memory
    assert first.memory[1] == 1000
    assert first.runs == [77]
    assert first.addresses == {"ids": 256, "past": 512, "present": 512}
    if family == "trt10":
        assert first.settings == "mine"
        assert steady.capturable()
    else:
        assert first.settings.strategy == "mine"
        assert [one.settings.dynamic_shapes_kernel_specialization_strategy for one in (first, second)] == [
            "eager",
            "lazy",
        ]
        assert first.settings.cache is second.settings.cache


def test_kernels_compiled_for_this_gpu_are_kept_for_the_next_start(
    trt: FakeTrt, cuda: SimpleNamespace, tmp_path: Path
) -> None:
    opened(trt, cuda, tmp_path, "rtx1").execution(steady=False).keep()
    (kept,) = plans._folder().iterdir()
    assert kept.suffix == ".rtx"
    assert kept.read_bytes() == b"kernels"
    again = opened(trt, cuda, tmp_path, "rtx1").execution(steady=True)
    assert again._compiled._saved == b"kernels"


def test_asking_whether_a_run_may_be_recorded_writes_nothing(
    trt: FakeTrt, cuda: SimpleNamespace, tmp_path: Path
) -> None:
    execution = opened(trt, cuda, tmp_path, "rtx1").execution(steady=True)
    assert execution.capturable()
    trt.refuses.add("capture")
    assert not execution.capturable()
    assert not plans._folder().exists()


def test_an_execution_keeps_kernels_once_and_the_plan_again_at_the_end(
    trt: FakeTrt, cuda: SimpleNamespace, tmp_path: Path
) -> None:
    plan = opened(trt, cuda, tmp_path, "rtx1")
    plan.keep()  # nothing was compiled yet
    execution = plan.execution(steady=False)
    execution.keep()
    plan._compiled._cache.serialize = lambda: b"more kernels"
    execution.keep()
    (kept,) = plans._folder().iterdir()
    assert kept.read_bytes() == b"kernels"
    plan.keep()
    assert kept.read_bytes() == b"more kernels"


def test_a_cache_that_cannot_be_serialised_is_nothing_to_keep(
    trt: FakeTrt, cuda: SimpleNamespace, tmp_path: Path
) -> None:
    execution = opened(trt, cuda, tmp_path, "rtx1").execution(steady=True)
    execution._compiled._cache.serialize = lambda: None
    execution.keep()
    assert not plans._folder().exists()


def test_processes_that_keep_the_same_kernels_write_different_files(
    trt: FakeTrt, cuda: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts: list[Path] = []

    def full(self: Path, target: Path) -> None:
        parts.append(self)
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full)
        for _ in range(2):
            opened(trt, cuda, tmp_path, "rtx1").execution(steady=True).keep()
    assert len(set(parts)) == 2
    assert not list(plans._folder().iterdir())


def _bound(execution: Any) -> Any:
    execution.bind("ids", 256, (1, 1))
    execution.bind("past", 512, (1, 2, 256, 8))
    return execution


@pytest.mark.parametrize(
    ("refuses", "call", "says"),
    [
        ("ids", lambda one: one.bind("ids", 1), "refuses the address of ids: ids: no such address$"),
        ("sizes", lambda one: one.bind("ids", 1, (9, 9)), r"refuses the sizes \[9, 9\] of ids: does not satisfy"),
        ("run", lambda one: _bound(one).enqueue(), "could not run the plan: launch failed$"),
        ("nothing", lambda one: one.enqueue(), "misses sizes or addresses of ids, past"),
    ],
)
def test_what_tensorrt_answers_with_false_becomes_a_sentence(
    trt: FakeTrt, cuda: SimpleNamespace, tmp_path: Path, refuses: str, call: Callable[[Any], None], says: str
) -> None:
    execution = opened(trt, cuda, tmp_path).execution(steady=True)
    trt.refuses.add(refuses)
    with pytest.raises(InternalError, match=says):
        call(execution)


def test_no_context_is_told_with_the_first_reason(trt: FakeTrt, cuda: SimpleNamespace, tmp_path: Path) -> None:
    plan = opened(trt, cuda, tmp_path)
    trt.refuses.add("context")
    with pytest.raises(SetupError, match=r"cannot prepare the plan: out of memory$"):
        plan.execution(steady=True)
