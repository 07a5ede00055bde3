# SPDX-License-Identifier: Apache-2.0
"""The schedule: which passes run for a target, in which order."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from shadowc.spec.errors import InternalError, UnsupportedError
from shadowc.spec.program import PassReport, Program

TARGETS = ("cpu",)
WEIGHTS = ("fp32", "int8")
REPORT_FILE = "passes.json"


@dataclass(frozen=True, slots=True)
class Pass:
    """One step of a schedule."""

    name: str
    apply: Callable[[Program], PassReport]


def schedule(*, target: str, weights: str, skip_zeros: bool, sparse: bool) -> tuple[Pass, ...]:
    """The passes that turn a trace into the graph that a target's emit takes.

    Args:
        target: where the engine runs.
        weights: element type of the weights.
        skip_zeros: kernels skip the fc2 half of neurons whose ReLU output is 0.
        sparse: with a predictor; False for a dense engine.

    Raises:
        UnsupportedError: a target or weight type that is not known.
    """
    if target not in TARGETS:
        raise UnsupportedError(f"unknown target {target!r}, expected one of {', '.join(TARGETS)}", hint="--target cpu")
    if weights not in WEIGHTS:
        raise UnsupportedError(
            f"unknown weights {weights!r}, expected one of {', '.join(WEIGHTS)}", hint="--weights int8"
        )
    from shadowc.passes import (
        canonicalise,
        cluster_neurons,
        finalise,
        insert_predictor,
        quantise,
        sparsify_attention,
        sparsify_ffn,
    )

    # No keep_fp32_islands on the CPU: activations are float32 everywhere.
    steps: list[Pass | None] = [
        Pass(canonicalise.NAME, canonicalise.apply),
        Pass(insert_predictor.NAME, insert_predictor.apply) if sparse else None,
        Pass(sparsify_attention.NAME, sparsify_attention.apply),
        Pass(sparsify_ffn.NAME, partial(sparsify_ffn.apply, skip_zeros=skip_zeros)),
        Pass(cluster_neurons.NAME, cluster_neurons.apply) if sparse else None,
        Pass(quantise.NAME, quantise.apply) if weights == "int8" else None,
        Pass(finalise.NAME, finalise.apply),
    ]
    return tuple(step for step in steps if step is not None)


def run_passes(program: Program, passes: Sequence[Pass], dump: Path | None = None) -> list[PassReport]:
    """Run the passes in order on the program, which they change.

    Args:
        program: as `load_program` returns it, with its plan.
        passes: as `schedule` returns them.
        dump: a folder for the graph before and after every pass (NN-name.onnx) and all reports (passes.json).

    Raises:
        InternalError: a pass met a graph that it is not written for, or broke its own promise.
    """
    if program.plan is None and any(step.name == "insert_predictor" for step in passes):
        raise InternalError("the schedule has a predictor, the program has no sparsity plan")
    if program.plan is not None and all(step.name != "insert_predictor" for step in passes):
        raise InternalError("the program has a sparsity plan, the schedule has no predictor")
    if dump is not None:
        dump.mkdir(parents=True, exist_ok=True)
        _write(program, dump, 0, "trace")
    reports: list[PassReport] = []
    for number, step in enumerate(passes, start=1):
        reports.append(step.apply(program))
        if dump is not None:
            _write(program, dump, number, step.name)
    if dump is not None:
        text = json.dumps([asdict(report) for report in reports], indent=2, sort_keys=True)
        (dump / REPORT_FILE).write_text(text + "\n", encoding="utf-8")
    return reports


def _write(program: Program, folder: Path, number: int, name: str) -> None:
    from shadowc.trace.program_io import write_model

    write_model(program, folder / f"{number:02d}-{name}.onnx")
