# SPDX-License-Identifier: Apache-2.0
"""Plans through TensorRT: plugin in, plan in, execution contexts out. TensorRT returns None where others raise."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shadowc.runtime.tensorrt.bindings import Bindings, messages_of
from shadowc.runtime.tensorrt.device import Address, Arena, Device, Sizes
from shadowc.spec.errors import IncompatibleEngineError, InternalError, SetupError, VerificationError
from shadowc.stage_cache import default_root

if TYPE_CHECKING:
    from shadowc.runtime.tensorrt.cuda import Cudart
    from shadowc.spec.manifest import PlanPart

REBUILD = "compile the engine again on this installation"


def load_plugin(bindings: Bindings, path: Path, operators: Sequence[str]) -> None:
    """Register the plugin library, once per process.

    Args:
        bindings: the library that takes it.
        path: the plugin; never the copy that registers itself.
        operators: what it must bring, each as namespace::name::version.

    Raises:
        IncompatibleEngineError: TensorRT refuses it, or an operator is missing afterwards.
    """
    _, messages = messages_of(bindings.module)
    registry = bindings.module.get_plugin_registry()
    if not _missing(registry, operators):
        return
    messages.clear()
    handle = registry.load_library(str(path.resolve()))  # a path without a slash would be searched for
    missing = _missing(registry, operators)
    if handle is None or missing:
        what = f"it lacks {', '.join(missing)}" if handle is not None else messages.first_error()
        raise IncompatibleEngineError(f"{bindings.title} does not take the plugin {path}: {what}", hint=REBUILD)


def open_plan(bindings: Bindings, cuda: Cudart, path: Path, part: PlanPart, scratch: Scratch) -> TrtPlan:
    """Deserialise a plan.

    Args:
        bindings: the library that the plan is for; its plugin is loaded.
        cuda: the device.
        path: the plan file, already checked.
        part: what engine.json says about it.
        scratch: activation memory, shared by all executions of an engine.

    Raises:
        IncompatibleEngineError: TensorRT refuses the plan.
        VerificationError: its inputs and outputs are not those of engine.json.
    """
    logger, messages = messages_of(bindings.module)
    content = path.read_bytes()
    messages.clear()
    runtime = bindings.module.Runtime(logger)
    engine = runtime.deserialize_cuda_engine(content)
    if engine is None:
        raise IncompatibleEngineError(f"{bindings.title} refuses {path}: {messages.first_error()}", hint=REBUILD)
    expected = {tensor.name for tensor in (*part.inputs, *part.outputs)}
    found = {engine.get_tensor_name(index) for index in range(engine.num_io_tensors)}
    if expected != found:
        name = sorted(expected ^ found)[0]
        where = "engine.json" if name in expected else "the plan"
        raise VerificationError(f"{path}: only {where} has a tensor {name}", hint=REBUILD)
    shared = getattr(engine, "get_aliased_input_tensor", lambda name: None)  # older versions cannot say
    for tensor in part.outputs:
        if tensor.alias_of and shared(tensor.name) not in (tensor.alias_of, None):
            raise VerificationError(f"{path}: output {tensor.name} is no alias of {tensor.alias_of}", hint=REBUILD)
    scratch.want(int(engine.device_memory_size_v2))
    return TrtPlan(bindings, cuda, runtime, engine, scratch, hashlib.sha256(content).hexdigest())


class Scratch:
    """Activation memory for executions that never run at the same time."""

    def __init__(self, device: Device) -> None:
        self._arena = Arena(device)
        self._size = 0
        self._address: Address | None = None

    def want(self, size: int) -> None:
        """Ask for at least so much, before the first `take`."""
        if self._address is not None:
            raise InternalError("scratch memory is in use already")
        self._size = max(self._size, size)

    def take(self) -> tuple[Address, int]:
        """The memory and its size."""
        if self._address is None:
            self._address = self._arena.allocate(self._size)
        return self._address, self._size

    def close(self) -> None:
        """Give the memory back."""
        self._address = None
        self._arena.close()


class TrtPlan:
    """A deserialised plan; `open_plan` makes it."""

    def __init__(
        self, bindings: Bindings, cuda: Cudart, runtime: Any, engine: Any, scratch: Scratch, sha256: str
    ) -> None:
        self._bindings, self._cuda, self._scratch = bindings, cuda, scratch
        self._runtime = runtime  # must outlive the engine
        self._engine = engine
        self._compiled = RuntimeCache(sha256, cuda) if bindings.family == "rtx1" else None

    def execution(self, *, steady: bool) -> TrtExecution:
        """A new execution context on the shared scratch memory; see device.Plan.

        Raises:
            SetupError: TensorRT cannot make one.
        """
        _, messages = messages_of(self._bindings.module)
        messages.clear()
        settings = self._bindings.module.ExecutionContextAllocationStrategy.USER_MANAGED
        if self._compiled is not None:
            settings = self._compiled.config(self._bindings.module, self._engine, settings, steady=steady)
        context = self._engine.create_execution_context(settings)
        if context is None:
            raise SetupError(
                f"{self._bindings.title} cannot prepare the plan: {messages.first_error()}",
                hint="free memory on the GPU and try again",
            )
        context.set_device_memory(*self._scratch.take())
        return TrtExecution(self._bindings, self._cuda, context, self._compiled)

    def keep(self) -> None:
        """Write down what was compiled until now, the kernels that came in the background included."""
        if self._compiled is not None:
            self._compiled.save()

    def close(self) -> None:
        """Forget the plan, which TensorRT frees with its last execution, and give the scratch memory back."""
        self._compiled = self._engine = self._runtime = None
        self._scratch.close()


class TrtExecution:
    """An execution context; see device.Execution."""

    def __init__(self, bindings: Bindings, cuda: Cudart, context: Any, compiled: RuntimeCache | None) -> None:
        self._bindings, self._cuda, self._context, self._compiled = bindings, cuda, context, compiled
        self._complete = self._kept = False

    def bind(self, name: str, address: Address, sizes: Sizes | None = None) -> None:
        """Set where a tensor lies, and the sizes of an input."""
        context, messages = self._context, messages_of(self._bindings.module)[1]
        messages.clear()
        self._complete = False
        if not context.set_tensor_address(name, address):
            raise InternalError(f"{self._bindings.title} refuses the address of {name}: {messages.first_error()}")
        is_input = context.engine.get_tensor_mode(name) == self._bindings.module.TensorIOMode.INPUT
        if sizes is not None and is_input and not context.set_input_shape(name, sizes):
            raise InternalError(
                f"{self._bindings.title} refuses the sizes {list(sizes)} of {name}: {messages.first_error()}"
            )

    def enqueue(self) -> None:
        """Put one run on the stream."""
        messages = messages_of(self._bindings.module)[1]
        messages.clear()
        if not self._complete:
            missing = self._context.infer_shapes()
            if missing:
                raise InternalError(f"{self._bindings.title} misses sizes or addresses of {', '.join(missing)}")
            self._complete = True
        if not self._context.execute_async_v3(self._cuda.stream):
            raise InternalError(f"{self._bindings.title} could not run the plan: {messages.first_error()}")

    def capturable(self) -> bool:
        """Whether the run may be recorded: TensorRT for RTX says so once its kernels are compiled."""
        return self._compiled is None or bool(self._context.is_stream_capturable(self._cuda.stream))

    def keep(self) -> None:
        """After the first run: write down what was compiled for it."""
        if self._compiled is not None and not self._kept:
            self._compiled.save()
        self._kept = True


class RuntimeCache:
    """Kernels that TensorRT for RTX compiled for this GPU, kept on disk: without them every start compiles again.

    Args:
        sha256: of the plan.
        cuda: the device.
    """

    def __init__(self, sha256: str, cuda: Cudart) -> None:
        gpu = hashlib.sha256(cuda.gpu.name.encode()).hexdigest()[:8]
        self._name = f"{sha256[:24]}-{gpu}.rtx"
        self._cache: Any = None
        self._saved = b""

    def config(self, module: Any, engine: Any, strategy: Any, *, steady: bool) -> Any:
        """Settings of a new execution context."""
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(strategy)
        when = module.DynamicShapesKernelSpecializationStrategy
        # Steady steps wait for kernels of their size, since a graph keeps those that it recorded. Prompts, each of
        # another size, start with general ones.
        config.dynamic_shapes_kernel_specialization_strategy = when.EAGER if steady else when.LAZY
        if self._cache is None:
            self._cache = config.create_runtime_cache()
            self._saved = self._read()
            if self._saved and not self._cache.deserialize(self._saved):
                self._saved = b""  # of another driver or version: compile again
        config.set_runtime_cache(self._cache)
        return config

    def save(self) -> None:
        """Write what is new; a disk that takes nothing costs time at the next start, nothing else."""
        blob = None if self._cache is None else self._cache.serialize()
        content = b"" if blob is None else bytes(memoryview(blob))
        if content in (b"", self._saved):
            return
        try:
            _replace(_folder() / self._name, content)
        except (OSError, SetupError):
            return
        self._saved = content

    def _read(self) -> bytes:
        try:
            return (_folder() / self._name).read_bytes()
        except (OSError, SetupError):
            return b""


def _folder() -> Path:
    return default_root() / "tensorrt"


def _replace(path: Path, content: bytes) -> None:
    """Write a file in one go; a temporary name of its own, since other processes may write the same file now."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=path.stem, suffix=".part", dir=path.parent)
    part = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _missing(registry: Any, operators: Sequence[str]) -> list[str]:
    missing = []
    for operator in operators:
        namespace, name, version = operator.split("::")
        if registry.get_creator(name, version, namespace) is None:
            missing.append(operator)
    return missing
