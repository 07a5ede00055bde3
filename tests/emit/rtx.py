# SPDX-License-Identifier: Apache-2.0
"""What tests of real builds need: TensorRT for RTX, the plugin, and small graphs that the kernels could run."""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path

import onnx
import pytest
from onnx import helper

from shadowc.checkpoint.opt import OptFacts
from shadowc.emit.tensorrt.builder import BuildRequest, plugin_operators
from shadowc.emit.tensorrt.checks import builder_of, plugin_of
from shadowc.emit.tensorrt.interface import Plan, Sizes, describe
from shadowc.emit.tensorrt.readiness import readiness
from shadowc.pipeline import run_passes, schedule
from shadowc.spec.program import Program, SparsityPlan
from shadowc.trace.program_io import write_model
from tests.trace import deep

SMALL = OptFacts("small", 2, 64, 2, 32, ffn=200, vocab=96, positions=48, bos=2, eos=2, pad=1)
USUAL = deep.plan()
SIZES = Sizes(max_batch=4, max_context=48)


@cache
def why_not() -> str:
    """The reason why nothing can be built here; empty: it can."""
    found = readiness("tensorrt-rtx")
    return "" if found.builds else found.text


def required() -> None:
    """Skip the test, with the reason, where nothing can be built."""
    if why_not():
        pytest.skip(f"no plan can be built here: {why_not()}")


def program(
    plan: Plan = "decode", *, weights: str = "fp16", facts: OptFacts = SMALL, sparsity: SparsityPlan | None = USUAL
) -> Program:
    """The final graph of a small model; without a sparsity plan a dense one."""
    made = deep.traced(sparsity, facts=facts)
    sparse, prefill = sparsity is not None, plan == "prefill"
    steps = schedule(target="tensorrt-rtx", weights=weights, skip_zeros=True, sparse=sparse, prefill=prefill)
    run_passes(made, steps)
    return made


def request(folder: Path, plan: Plan = "decode", made: Program | None = None, **changes: object) -> BuildRequest:
    """A build of a small graph that was written to the folder."""
    made = made or program(plan)
    part = describe(made, plan, SIZES)
    write_model(made, folder / part.onnx)
    bindings = builder_of("tensorrt-rtx")
    whole = BuildRequest(bindings, plugin_of(bindings), folder, part, plugin_operators(made.graph.nodes), ("8.6",))
    return dataclasses.replace(whole, **changes)  # type: ignore[arg-type]


def set_attribute(path: Path, node: str, name: str, value: object) -> None:
    """Give a node of a written graph another value of an attribute."""
    model = onnx.load(path)
    attributes = next(one for one in model.graph.node if one.name == node).attribute
    kept = [one for one in attributes if one.name != name]
    del attributes[:]
    attributes.extend([*kept, helper.make_attribute(name, value)])
    onnx.save(model, path)
