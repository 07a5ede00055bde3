# SPDX-License-Identifier: Apache-2.0
"""A device in host memory: the TensorRT runtime runs on it unchanged, and every liberty it might take is caught.

Work on the stream waits in a queue until somebody synchronises, as on a GPU. Fresh memory is full of NaN and -1, freed
memory is gone, and no copy or binding may leave its allocation. What forbids a capture on a GPU forbids it here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

from shadowc.plugins import cpu_library
from shadowc.runtime.tensorrt.cuda import Gpu
from shadowc.runtime.tensorrt.layout import ALIGNMENT, ITEM_BYTES
from shadowc.spec import oracle
from shadowc.spec.manifest import PlanPart

Work = Callable[[], None]


class DeviceFaultError(AssertionError):
    """The runtime did something that a real device would not have forgiven."""


@dataclass
class HostDevice:
    """Implements `shadowc.runtime.tensorrt.device.Device`."""

    gpu: Gpu = field(default_factory=lambda: Gpu("host memory", (8, 6)))
    limit: int = 1 << 40
    """Bytes that allocations may take together."""
    device: dict[int, np.ndarray] = field(default_factory=dict)
    pinned: dict[int, np.ndarray] = field(default_factory=dict)
    graphs: dict[int, list[Work]] = field(default_factory=dict)
    queue: list[Work] = field(default_factory=list)
    recording: list[Work] | None = None
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("launch", "capture", "run", "allocate"), 0))

    def allocate(self, size: int) -> int:
        from shadowc.spec.errors import SetupError

        self._outside_capture("allocates")
        if sum(map(len, self.device.values())) + size > self.limit:
            raise SetupError(f"{size / 1e6:,.0f} MB more are needed", hint="fewer rows")
        self.counts["allocate"] += 1
        return self._new(self.device, size, 0xFF)

    def release(self, address: int) -> None:
        self._outside_capture("frees memory")
        self.synchronize()
        self.device.pop(address)[:] = 0xFF

    def allocate_pinned(self, size: int) -> int:
        self._outside_capture("allocates")
        return self._new(self.pinned, size, 0xFF)

    def release_pinned(self, address: int) -> None:
        self.pinned.pop(address)

    def upload(self, to: int, host: int, size: int) -> None:
        source, target = self.view(self.pinned, host, size), self.view(self.device, to, size)
        self.put(lambda: np.copyto(target, source))

    def download(self, host: int, source: int, size: int) -> None:
        given, target = self.view(self.device, source, size), self.view(self.pinned, host, size)
        self.put(lambda: np.copyto(target, given))

    def copy_rows(self, to: int, to_pitch: int, source: int, source_pitch: int, width: int, rows: int) -> None:
        if width > min(to_pitch, source_pitch):
            raise DeviceFaultError(f"rows of {width} bytes overlap at pitches {to_pitch} and {source_pitch}")
        targets = [self.view(self.device, to + row * to_pitch, width) for row in range(rows)]
        given = [self.view(self.device, source + row * source_pitch, width) for row in range(rows)]
        self.put(lambda: [np.copyto(*pair) for pair in zip(targets, given, strict=True)] and None)

    def synchronize(self) -> None:
        self._outside_capture("waits")
        while self.queue:
            self.queue.pop(0)()

    def begin_capture(self) -> None:
        self._outside_capture("begins to capture")
        self.recording = []

    def end_capture(self) -> int:
        if self.recording is None:
            raise DeviceFaultError("nothing is being captured")
        self.counts["capture"] += 1
        graph = 1 + self.counts["capture"]
        self.graphs[graph], self.recording = self.recording, None
        return graph

    def launch(self, graph: int) -> None:
        self.counts["launch"] += 1
        for work in self.graphs[graph]:
            self.put(work)

    def release_graph(self, graph: int) -> None:
        del self.graphs[graph]

    def put(self, work: Work) -> None:
        """Put work on the stream."""
        (self.queue if self.recording is None else self.recording).append(work)

    def view(self, memory: Mapping[int, np.ndarray], address: int, size: int) -> np.ndarray:
        """Bytes of one allocation."""
        for base, block in memory.items():
            if base <= address and address + size <= base + len(block):
                return block[address - base : address - base + size]
        raise DeviceFaultError(f"{size} bytes at {address:#x} lie in no allocation")

    def _new(self, memory: dict[int, np.ndarray], size: int, fill: int) -> int:
        raw = np.full(size + ALIGNMENT, fill, np.uint8)
        skip = -raw.ctypes.data % ALIGNMENT
        block = raw[skip : skip + size]
        memory[block.ctypes.data] = block
        return int(block.ctypes.data)

    def _outside_capture(self, what: str) -> None:
        if self.recording is not None:
            raise DeviceFaultError(f"a capture is under way, and somebody {what}")


class HostPlan:
    """A plan's graph in ONNX Runtime: by the functions that define the operators, or by the CPU kernels.

    Args:
        device: whose memory the addresses are.
        part: the plan's tensors.
        model: the graph, with shadowc operators in the form of `shadowc.spec.ops`.
        kernels: run the CPU kernels, which count what they read.
        as_it_is: the graph has the functions already.
    """

    def __init__(
        self, device: HostDevice, part: PlanPart, model: onnx.ModelProto, *,
        kernels: bool = False, as_it_is: bool = False,
    ) -> None:  # fmt: skip
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 2
        options.log_severity_level = 3
        if kernels:
            options.register_custom_ops_library(str(cpu_library()))
        elif not as_it_is:
            model = oracle.attach(model)
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        self.hold(device, part, session, [value.name for value in session.get_outputs()])

    def hold(self, device: HostDevice, part: PlanPart, session: Any, outputs: list[str]) -> None:
        """Run `session`, which has these outputs, as the plan."""
        self.device, self.part, self.session, self.outputs = device, part, session, outputs
        self.uncounted = 0
        self.kept: list[str] = []
        """Who asked for compiled kernels to be kept, in order."""
        self.closed = False

    def execution(self, *, steady: bool) -> HostExecution:
        return HostExecution(self)

    def keep(self) -> None:
        self.kept.append("plan")

    def close(self) -> None:
        self.closed = True


class HostExecution:
    """Implements `shadowc.runtime.tensorrt.device.Execution`."""

    def __init__(self, plan: HostPlan) -> None:
        self.plan = plan
        self.addresses: dict[str, int] = {}
        self.sizes: dict[str, tuple[int, ...]] = {}
        self.inputs = {tensor.name: tensor for tensor in plan.part.inputs}
        self.outs = {tensor.name: tensor for tensor in plan.part.outputs}

    def bind(self, name: str, address: int, sizes: tuple[int, ...] | None = None) -> None:
        if address % ALIGNMENT:
            raise DeviceFaultError(f"{name} is bound to {address:#x}, which is not aligned")
        self.addresses[name] = address
        if sizes is not None:
            self.sizes[name] = tuple(sizes)

    def capturable(self) -> bool:
        return True

    def keep(self) -> None:
        if self.plan.device.queue:
            raise DeviceFaultError("a run that has not ended is no proof that its kernels work")
        self.plan.kept.append("execution")

    def enqueue(self) -> None:
        missing = (self.inputs.keys() | self.outs.keys()) - self.addresses.keys()
        if missing:
            raise DeviceFaultError(f"not bound: {sorted(missing)}")
        for name, tensor in self.outs.items():
            if tensor.alias_of and self.addresses[name] != self.addresses[tensor.alias_of]:
                raise DeviceFaultError(f"{name} is not bound where {tensor.alias_of} is")
        addresses, sizes = dict(self.addresses), dict(self.sizes)  # what is bound now is what runs
        self.plan.device.put(lambda: self._run(addresses, sizes))

    def _run(self, addresses: Mapping[str, int], sizes: Mapping[str, tuple[int, ...]]) -> None:
        device = self.plan.device
        device.counts["run"] += 1
        feeds = {}
        for name, tensor in self.inputs.items():
            shape = sizes.get(name, tensor.shape)
            _require_profile(tensor, shape)
            feeds[name] = self._array(addresses[name], tensor.dtype, shape).copy()
        found = dict(zip(self.plan.outputs, self.plan.session.run(None, feeds), strict=True))
        for name, tensor in self.outs.items():
            if name in found:
                if str(found[name].dtype) != tensor.dtype:
                    raise DeviceFaultError(f"{name} is {found[name].dtype}, engine.json says {tensor.dtype}")
                self._array(addresses[name], tensor.dtype, found[name].shape)[...] = found[name]
            else:  # only kernels count what they read
                self._array(addresses[name], tensor.dtype, tensor.shape)[...] = self.plan.uncounted

    def _array(self, address: int, dtype: str, shape: tuple[int, ...]) -> Any:
        block = self.plan.device.view(self.plan.device.device, address, prod(shape) * ITEM_BYTES[dtype])
        return block.view(dtype).reshape(shape)


def _require_profile(tensor: Any, shape: tuple[int, ...]) -> None:
    lowest, highest = tensor.smallest or tensor.shape, tensor.largest or tensor.shape
    if not all(low <= size <= high for low, size, high in zip(lowest, shape, highest, strict=True)):
        raise DeviceFaultError(f"{tensor.name} {list(shape)} lies outside {list(lowest)} to {list(highest)}")


def load_model(folder: Path, name: str) -> onnx.ModelProto:
    return onnx.load(folder / name, load_external_data=False)
