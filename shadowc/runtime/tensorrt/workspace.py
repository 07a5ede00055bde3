# SPDX-License-Identifier: Apache-2.0
"""The buffers of one batch size: cache, what is exchanged with the host, and the captured graph of a decode step.

Everything lies at fixed addresses, so one graph holds a whole step: the copy of the inputs, the plan, the copy of the
outputs. The host writes into pinned memory, launches, waits, and reads.

Letters: B rows, S tokens, T slots of the cache, H heads, D head size.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from shadowc.runtime.tensorrt.device import Address, Arena, Bytes, Device, Execution, Plan
from shadowc.runtime.tensorrt.layout import Place, Run, caches, exchanged, pack, row_copy, sizes_of
from shadowc.spec.errors import InternalError

if TYPE_CHECKING:
    from shadowc.spec.manifest import PlanPart, PlanTensor

GRAPHS_VARIABLE = "SHADOWC_CUDA_GRAPH"
"""Environment variable; "0" runs every step plainly, to find out whether a graph is at fault."""

Arrays = dict[str, npt.NDArray[Any]]


class Block:
    """Tensors that lie together, on the device and in pinned memory alike, and cross in one copy.

    Args:
        device: where.
        arena: owns both memories.
        tensors: in this order.
        run: gives the sizes.
    """

    def __init__(self, device: Device, arena: Arena, tensors: Sequence[PlanTensor], run: Run) -> None:
        self._device = device
        self.places, self._size = pack(tensors, run)
        self._address = arena.allocate(self._size)
        self._host, view = arena.pinned(self._size)
        self.arrays: Arrays = {name: _array(view, place) for name, place in self.places.items()}

    def bind(self, execution: Execution) -> None:
        """Bind every tensor to its place on the device."""
        for name, place in self.places.items():
            execution.bind(name, self._address + place.offset, place.sizes)

    def upload(self) -> None:
        """Put the copy to the device on the stream."""
        self._device.upload(self._address, self._host, self._size)

    def download(self) -> None:
        """Put the copy to the host on the stream."""
        self._device.download(self._host, self._address, self._size)


class Exchange:
    """One plan at one size: an execution, and the blocks that cross before and behind each run.

    Args:
        device: where.
        arena: owns the blocks.
        execution: bound to them from here on.
        part: the plan's tensors.
        weights: addresses by name.
        run: the size.
    """

    def __init__(
        self,
        device: Device,
        arena: Arena,
        execution: Execution,
        part: PlanPart,
        weights: Mapping[str, Address],
        run: Run,
    ) -> None:
        self.run = run
        self.execution = execution
        given, taken = exchanged(part)
        self._inputs = Block(device, arena, given, run)
        self._outputs = Block(device, arena, taken, run)
        for block in (self._inputs, self._outputs):
            block.bind(self.execution)
        for tensor in part.inputs:
            if tensor.kind == "weight":
                self.execution.bind(tensor.name, weights[tensor.name])

    @property
    def outputs(self) -> Arrays:
        """What the last run gave; overwritten by the next."""
        return self._outputs.arrays

    def write(self, values: Mapping[str, npt.NDArray[Any]]) -> None:
        """Set inputs by name; those that the plan does not have are left out."""
        for name, array in self._inputs.arrays.items():
            array[...] = values[name]

    def enqueue(self) -> None:
        """Put copy, plan and copy on the stream."""
        self._inputs.upload()
        self.execution.enqueue()
        self._outputs.download()


class Workspace:
    """Cache and decode steps of one batch size.

    Args:
        device: where.
        plan: the decode plan.
        part: its tensors.
        weights: addresses by name.
        rows: batch size.
        capacity: slots of the cache.
        graphs: record steps into a graph.
    """

    def __init__(
        self, device: Device, plan: Plan, part: PlanPart, weights: Mapping[str, Address], *,
        rows: int, capacity: int, graphs: bool = True,
    ) -> None:  # fmt: skip
        self.rows, self.capacity = rows, capacity
        self.turn = 0
        """Changes when another sequence begins here, and when the memory is given back."""
        self._device, self._plan, self._part, self._weights, self._graphs = device, plan, part, weights, graphs
        self._arena, self._chunk_arena = Arena(device), Arena(device)
        self._chunk: Exchange | None = None
        self._chunks: Execution | None = None
        self._graph: Address | None = None
        try:
            places, size = pack(caches(part), Run(rows, 1, capacity))
            base = self._arena.allocate(size)
            self.caches = {name: (base + place.offset, place) for name, place in places.items()}
            self._step = self._exchange(self._arena, plan.execution(steady=True), 1)
        except BaseException:  # its traceback holds this object, and so the memory
            self.close()
            raise

    @property
    def captured(self) -> bool:
        """Whether steps are replayed from a graph."""
        return self._graph is not None

    def begin(self) -> int:
        """Let a new sequence take the place of the one before; its turn."""
        self.turn += 1
        return self.turn

    def step(self, values: Mapping[str, npt.NDArray[Any]]) -> Arrays:
        """Run one token per row; the first step runs plainly and is recorded behind it, all later ones are replays."""
        self._step.write(values)
        if self._graph is not None:
            self._device.launch(self._graph)
            self._device.synchronize()
            return self._step.outputs
        self._step.enqueue()
        self._device.synchronize()
        self._step.execution.keep()
        if self._graphs and self._step.execution.capturable():
            self._graph = self._recorded()
        return self._step.outputs

    def feed(self, values: Mapping[str, npt.NDArray[Any]], tokens: int) -> Arrays:
        """Run several tokens per row."""
        if self._chunk is None or self._chunk.run.tokens != tokens:
            self._chunk = None
            self._chunk_arena.close()
            self._chunk_arena = Arena(self._device)
            self._chunks = self._chunks or self._plan.execution(steady=False)
            try:
                self._chunk = self._exchange(self._chunk_arena, self._chunks, tokens)
            except BaseException:
                self._chunk_arena.close()
                raise
        self._chunk.write(values)
        self._chunk.enqueue()
        self._device.synchronize()
        self._chunk.execution.keep()
        return self._chunk.outputs

    def close(self) -> None:
        """Give the memory back."""
        self.turn += 1
        with closing(self._arena):
            self._chunk_arena.close()

    def _recorded(self) -> Address | None:
        """The graph of a step; None, from here on, where it cannot be recorded: the steps themselves do run."""
        try:
            return self._record()
        except InternalError as error:
            self._graphs = False
            _warn(
                f"a decode step could not be recorded as a graph, steps run plainly and more slowly: {error.message}; "
                f"next: {GRAPHS_VARIABLE}=0 does not try"
            )
            return None

    def _record(self) -> Address:
        # An engine that is collected meanwhile would free memory, which no capture bears.
        collects = gc.isenabled()
        gc.disable()
        try:
            self._device.begin_capture()
            try:
                self._step.enqueue()
            except BaseException:
                with suppress(InternalError):  # the first error is the one that says something
                    self._device.release_graph(self._device.end_capture())
                raise
            return self._arena.graph(self._device.end_capture())
        finally:
            if collects:
                gc.enable()

    def _exchange(self, arena: Arena, execution: Execution, tokens: int) -> Exchange:
        run = Run(self.rows, tokens, self.capacity)
        made = Exchange(self._device, arena, execution, self._part, self._weights, run)
        for tensor in caches(self._part):
            address, place = self.caches[tensor.name]
            if not tensor.alias_of:
                raise InternalError(f"output {tensor.name} of the decode plan is no alias of its input")
            made.execution.bind(tensor.alias_of, address, place.sizes)
            made.execution.bind(tensor.name, address)
        return made


class Prefill:
    """The dense pass over a prompt; its buffers are kept for prompts of the same size.

    Args:
        device: where.
        plan: the prefill plan.
        part: its tensors.
        weights: addresses by name.
    """

    def __init__(self, device: Device, plan: Plan, part: PlanPart, weights: Mapping[str, Address]) -> None:
        self._device, self._plan, self._part, self._weights = device, plan, part, weights
        self._arena = Arena(device)
        self._exchange: Exchange | None = None
        self._execution: Execution | None = None
        self._fresh: dict[str, tuple[Address, Place]] = {}

    def run(self, values: Mapping[str, npt.NDArray[Any]], space: Workspace) -> npt.NDArray[np.float32]:
        """Fill the first S slots of a workspace's cache; returns the logits [B,V] after the last token."""
        exchange = self._sized(*values["input_ids"].shape)
        exchange.write(values)
        exchange.enqueue()
        for name, (source, fresh) in self._fresh.items():
            to, cache = space.caches[name]
            copy = row_copy(fresh.dtype, fresh.sizes, cache.sizes)
            self._device.copy_rows(to, copy.to_pitch, source, copy.source_pitch, copy.width, copy.rows)
        self._device.synchronize()
        exchange.execution.keep()
        return np.array(exchange.outputs["logits"][:, -1], np.float32)

    def close(self) -> None:
        """Give the memory and the execution back."""
        self._execution = None
        self._release()

    def _release(self) -> None:
        self._exchange = None
        self._arena.close()

    def _sized(self, rows: int, tokens: int) -> Exchange:
        run = Run(rows, tokens, tokens)
        if self._exchange is not None and self._exchange.run == run:
            return self._exchange
        self._release()
        self._arena = Arena(self._device)
        self._execution = self._execution or self._plan.execution(steady=False)
        try:
            made = Exchange(self._device, self._arena, self._execution, self._part, self._weights, run)
            places, size = pack(caches(self._part), run)
            base = self._arena.allocate(size)
        except BaseException:
            self._arena.close()
            raise
        self._fresh = {name: (base + place.offset, place) for name, place in places.items()}
        for name, (address, _) in self._fresh.items():
            made.execution.bind(name, address)
        self._exchange = made
        return made


def check_request(part: PlanPart, run: Run) -> None:
    """Refuse a run outside a plan's profile before anything is allocated.

    Raises:
        InputError: says input, given and allowed.
    """
    for tensor in part.inputs:
        sizes_of(tensor, run)


@cache
def _warn(text: str) -> None:
    """Say it once in a process: every batch size meets the same refusal."""
    logging.getLogger(__name__).warning(text)


def _array(view: Bytes, place: Place) -> npt.NDArray[Any]:
    return view[place.offset : place.offset + place.bytes].view(place.dtype).reshape(place.sizes)
