# SPDX-License-Identifier: Apache-2.0
"""The engine of targets tensorrt and tensorrt-rtx: what CausalEngine offers, on a device.

Letters: B rows, S tokens, V vocabulary.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal

from shadowc.runtime.causal import CausalEngine
from shadowc.runtime.tensorrt import layout
from shadowc.runtime.tensorrt.decoder import DeviceDecoder
from shadowc.runtime.tensorrt.device import Arena, Device, Plan, with_room
from shadowc.runtime.tensorrt.layout import Run
from shadowc.runtime.tensorrt.rebuild import skips_zeros
from shadowc.runtime.tensorrt.weights import load_weights
from shadowc.runtime.tensorrt.workspace import GRAPHS_VARIABLE, Prefill, Workspace, check_request
from shadowc.spec.errors import InputError, InternalError, UnsupportedError
from shadowc.spec.manifest import WEIGHTS_FILE
from shadowc.spec.tensors import COUNTED

if TYPE_CHECKING:
    import numpy.typing as npt

    from shadowc.runtime.causal import EvaluationProtocol, Floats
    from shadowc.runtime.decoder import ScoreSource
    from shadowc.runtime.generation import TokenDecoder
    from shadowc.runtime.prompts import Batch
    from shadowc.spec.density import Density
    from shadowc.spec.manifest import EngineManifest, ModelPart, TensorRtPart

PlanName = Literal["prefill", "decode"]
KEPT_SIZES = 2
"""Batch sizes whose cache and graph stay on the device."""
_COPIES = 8
"""Copies between two looks at the clock, so that launching them costs nothing beside."""


class TensorRtEngine(CausalEngine):
    """A loaded engine; `shadowc.load` makes it. One sequence at a time: all of them share a stream and buffers.

    Args:
        folder: the engine folder, already checked.
        manifest: its engine.json.
        device: where it runs.
        plans: both plans, ready on that device.
    """

    def __init__(self, folder: Path, manifest: EngineManifest, device: Device, plans: Mapping[PlanName, Plan]) -> None:
        super().__init__(folder, manifest)
        if manifest.tensorrt is None:
            raise InternalError(f"{folder} is of target {manifest.target}")
        self._part: TensorRtPart = manifest.tensorrt
        self._device = device
        self.plans = plans
        """What runs, by name."""
        self._graphs = os.environ.get(GRAPHS_VARIABLE, "1") != "0"
        self._arena = Arena(device)
        self._weights = load_weights(device, self._arena, folder / WEIGHTS_FILE, self._part.weights)
        self._prefill = Prefill(device, plans["prefill"], self._part.plans["prefill"], self._weights)
        self._spaces: OrderedDict[int, Workspace] = OrderedDict()
        self._closed = False

    @property
    def model(self) -> ModelPart:
        """The model's facts; its context is what the engine was built for."""
        positions = min(self.manifest.model.positions, self._part.max_context)
        return self.manifest.model.model_copy(update={"positions": positions})

    def logits(
        self,
        ids: npt.NDArray[Any],
        density: float | Density | None = None,
        protocol: EvaluationProtocol = "decode",
        prompt_tokens: int | None = None,
        attention_mask: object = None,
        scores: ScoreSource | None = None,
    ) -> Floats:
        """Teacher-forced logits [B,S,V], see CausalEngine.logits.

        Raises:
            InputError: an argument is out of range, or the ids are longer than the context.
            UnsupportedError: scores were given: a plan always asks its own predictor.
        """
        if scores is not None:
            raise UnsupportedError(
                f"an engine for {self.manifest.target} takes scores from its own predictor only, controls need others",
                hint="--methods predictor, or the same model compiled for --target cpu",
            )
        logits_BSV, _ = self._teacher_forced(
            lambda batch: self._decoder(batch, batch.slots),
            ("logits", *COUNTED),
            ids,
            self._density(density),
            protocol,
            prompt_tokens,
            attention_mask,
        )
        return logits_BSV

    @property
    def device_name(self) -> str:
        """The GPU."""
        return str(self._device.gpu)

    @cached_property
    def skip_zeros(self) -> bool:
        """Whether the plan leaves out the second half of neurons whose ReLU is 0."""
        return skips_zeros(self.folder / self._part.plans["decode"].onnx)

    def copy_bandwidth(self, size: int, repeats: int) -> float:
        """Best bytes per second, read and written together, of `repeats` copies of `size` bytes on the device."""
        self._require_open()
        arena = Arena(self._device)
        to, source = arena.allocate(size), arena.allocate(size)
        best = float("inf")
        for _ in range(repeats + 1):  # the first copy touches the memory
            self._device.synchronize()
            began = perf_counter()
            for _ in range(_COPIES):
                self._device.copy_rows(to, size, source, size, size, 1)
            self._device.synchronize()
            best = min(best, perf_counter() - began)
        arena.close()
        return 2 * size * _COPIES / best

    def close(self) -> None:
        """Give all device memory back; the engine cannot run any more. A second call does nothing."""
        self._closed = True
        with ExitStack() as stack:  # each is called whatever becomes of the others, the last one first
            for plan in self.plans.values():
                stack.callback(plan.close)
            stack.callback(self._arena.close)
            stack.callback(self._prefill.close)
            while self._spaces:
                stack.callback(self._spaces.popitem()[1].close)
            for plan in self.plans.values():
                stack.callback(plan.keep)

    def _decoder(self, batch: Batch, slots: int, *, masks: bool = False) -> TokenDecoder:
        self._require_open()
        if masks:
            raise UnsupportedError(
                f"masks are shown by engines of target cpu; this one is for {self.manifest.target}",
                hint="leave the map of masks out",
            )
        capacity = layout.capacity(self._part, slots)
        check_request(self._part.plans["prefill"], Run(batch.rows, batch.slots, batch.slots))
        check_request(self._part.plans["decode"], Run(batch.rows, 1, capacity))
        space = self._space(batch.rows, capacity)
        return DeviceDecoder(space, self._prefill, batch, self._part.chunk, lambda: self._make_room(batch.rows))

    def _require_open(self) -> None:
        if self._closed:
            raise InputError(
                f"the engine {self.folder} was closed, and its weights are no longer on the device",
                hint="load it again: shadowc.load(FOLDER)",
            )

    def _space(self, rows: int, capacity: int) -> Workspace:
        """The workspace of a batch size; it is made anew only to grow."""
        space = self._spaces.pop(rows, None)
        if space is not None and space.capacity < capacity:
            space.close()
            space = None
        while len(self._spaces) >= KEPT_SIZES:
            self._spaces.popitem(last=False)[1].close()
        if space is None:
            space = with_room(lambda: self._new_space(rows, capacity), lambda: self._make_room(rows))
        self._spaces[rows] = space
        return space

    def _make_room(self, rows: int) -> bool:
        """Give up the cache of another batch size, the one unused for longest; False: there is no other."""
        other = next((one for one in self._spaces if one != rows), None)
        if other is None:
            return False
        self._spaces.pop(other).close()
        return True

    def _new_space(self, rows: int, capacity: int) -> Workspace:
        return Workspace(
            self._device, self.plans["decode"], self._part.plans["decode"], self._weights,
            rows=rows, capacity=capacity, graphs=self._graphs,
        )  # fmt: skip
