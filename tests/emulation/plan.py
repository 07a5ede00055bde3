# SPDX-License-Identifier: Apache-2.0
"""A decode plan's graph, op by op: standard operators in onnx.reference, the shadowc operators as emulated kernels."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from shadowc.spec.manifest import PlanPart
from shadowc.spec.ops import DOMAIN
from tests.emulation.library import Kernels
from tests.runtime.host_device import HostDevice, HostPlan


class EmulatedSession:
    """What HostPlan needs of a session."""

    def __init__(self, model: onnx.ModelProto, kernels: Kernels) -> None:
        self.calls: dict[str, int] = {}
        self._names = [value.name for value in model.graph.input]
        self.outputs = [value.name for value in model.graph.output]
        self._evaluator = ReferenceEvaluator(model, new_ops=_operators(kernels, self.calls))

    def run(self, outputs: None, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        assert outputs is None
        return self._evaluator.run(None, {name: feeds[name] for name in self._names})


class EmulatedPlan(HostPlan):
    """Implements `shadowc.runtime.tensorrt.device.Plan` for tests/runtime/host_device.py."""

    def __init__(self, device: HostDevice, part: PlanPart, model: onnx.ModelProto, kernels: Kernels) -> None:
        session = EmulatedSession(model, kernels)
        self.hold(device, part, session, session.outputs)


def _operators(kernels: Kernels, calls: dict[str, int]) -> list[type[OpRun]]:
    """The operators as classes for onnx.reference, which finds them by class name."""

    class SelectThreshold(OpRun):
        op_domain = DOMAIN

        def _run(self, scores, density, scope=None, exempt=None, min_active=None):
            calls["select"] = calls.get("select", 0) + 1
            return kernels.select(scores, density, scope=scope, exempt=exempt, min_active=min_active)

    class SparseFFN(OpRun):
        op_domain = DOMAIN

        def _run(self, *operands, layer=None, block=None, skip_zeros=None):
            calls["ffn"] = calls.get("ffn", 0) + 1
            y, read = kernels.ffn(*map(_plain, operands), layer=layer, block=block, skip_zeros=skip_zeros)
            return y, np.array(read, np.int64)

    class SparseAttention(OpRun):
        op_domain = DOMAIN

        def _run(self, *operands, layer=None, kv=None):
            calls["attention"] = calls.get("attention", 0) + 1
            outputs, read = kernels.attention(*map(_plain, operands), layer=layer, kv=kv)
            names = ("y", "present_key", "present_value", "context")
            return (*(outputs[name] for name in names), np.array(read, np.int64))

    return [SelectThreshold, SparseFFN, SparseAttention]


def _plain(array: np.ndarray) -> np.ndarray:
    """An operand with the dtypes that the bindings know."""
    return array.view(ml_dtypes.bfloat16) if array.dtype.itemsize == 2 and array.dtype.kind == "u" else array
