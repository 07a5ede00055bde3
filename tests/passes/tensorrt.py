# SPDX-License-Identifier: Apache-2.0
"""The deep model's graphs for TensorRT, and how to run them in stock ONNX Runtime."""

from __future__ import annotations

from functools import cache

import numpy as np

from shadowc.checkpoint.opt import OptFacts
from shadowc.emit.records import groups, materialise
from shadowc.measure.twin import DecodeProbe, GraphRunner, float32_twin
from shadowc.pipeline import Pass, run_passes, schedule
from shadowc.spec.oracle_tensorrt import attach_tensorrt
from shadowc.spec.program import Program, SparsityPlan
from shadowc.trace.program_io import to_model
from tests.trace import deep


def steps(weights: str = "fp16", *, prefill: bool = False, sparse: bool = True) -> tuple[Pass, ...]:
    return schedule(target="tensorrt-rtx", weights=weights, skip_zeros=True, sparse=sparse, prefill=prefill)


def compiled(
    plan: SparsityPlan | None = None,
    *,
    weights: str = "fp16",
    prefill: bool = False,
    until: str = "",
    facts: OptFacts = deep.FACTS,
) -> Program:
    """A fresh program after the whole schedule, or after the pass `until`."""
    program = deep.traced(plan, facts)
    passes = steps(weights, prefill=prefill, sparse=plan is not None)
    if not until:
        run_passes(program, passes)
        return program
    for step in passes:
        step.apply(program)
        if step.name == until:
            return program
    raise KeyError(until)


def weights_of(program: Program, source: object | None = None) -> dict[str, np.ndarray]:
    """Every weight as emit makes it."""
    made: dict[str, np.ndarray] = {}
    for names in groups(program.weights):
        made |= materialise(program.weights, source or deep.Tensors(), names)
    return made


def runner(program: Program, *, as_is: bool = False, source: object | None = None) -> GraphRunner:
    """The float32 twin, or the graph with its own types."""
    model = to_model(program)
    graph = attach_tensorrt(model) if as_is else float32_twin(model, program.weights)
    return GraphRunner(graph, weights_of(program, source), 1)


@cache
def shared_runner(weights: str, prefill: bool, as_is: bool) -> GraphRunner:
    """A runner of the sparse plan's graphs that only reads."""
    return runner(compiled(deep.plan(), weights=weights, prefill=prefill), as_is=as_is)


def probe(found: GraphRunner, dtype: str = "float32") -> DecodeProbe:
    return DecodeProbe(found, deep.FACTS, capacity=16, dtype=dtype)
