# SPDX-License-Identifier: Apache-2.0
"""The schedule: which passes run for a target, in which order."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from shadowc.output import writing
from shadowc.spec.errors import InternalError, UnsupportedError
from shadowc.spec.options import WEIGHTS
from shadowc.spec.program import PassReport, Program

Activations = Literal["float32", "float16", "bfloat16"]
ACTIVATIONS: Mapping[str, Activations] = MappingProxyType(
    {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32", "int8": "float16"}
)
"""Weights of a TensorRT target -> its type of activations."""
REPORT_FILE = "passes.json"
_GRAPHS = "[0-9][0-9]-*.onnx"
_ELSEWHERE = "choose another folder with --dump-passes"


@dataclass(frozen=True, slots=True)
class Pass:
    """One step of a schedule."""

    name: str
    apply: Callable[[Program], PassReport]


def check_choice(target: str, weights: str) -> None:
    """Refuse a target that is not known, or a type of weights that it does not have.

    Raises:
        UnsupportedError: naming what there is.
    """
    if target not in WEIGHTS:
        raise UnsupportedError(f"unknown target {target!r}, expected one of {', '.join(WEIGHTS)}", hint="--target cpu")
    if weights not in WEIGHTS[target]:
        raise UnsupportedError(
            f"target {target} has no weights {weights!r}, expected one of {', '.join(WEIGHTS[target])}",
            hint=f"--weights {WEIGHTS[target][0]}",
        )


def schedule(
    *,
    target: str,
    weights: str,
    skip_zeros: bool,
    sparse: bool,
    prefill: bool = False,
    fixed: Literal["active", "all"] | None = None,
) -> tuple[Pass, ...]:
    """The passes that turn a trace into the graph that a target's emit takes.

    Args:
        target: where the engine runs.
        weights: element type of the weights.
        skip_zeros: kernels skip the fc2 half of neurons whose ReLU output is 0.
        sparse: with a predictor; False for a dense engine.
        prefill: the graph that reads prompts, of a target that has one of its own.
        fixed: for target cpu, the graph whose masks are inputs, and whose K/V it writes; None: the one that predicts.

    Raises:
        UnsupportedError: a target or weight type that is not known.
    """
    check_choice(target, weights)
    from shadowc.passes import (
        canonicalise,
        cluster_neurons,
        fill_heads,
        finalise,
        fix_mask,
        fold_norms,
        fuse_predictor,
        insert_predictor,
        narrow_cache,
        quantise,
        sparsify_attention,
        sparsify_ffn,
    )

    cpu = target == "cpu"
    narrow = weights in (quantise.WEIGHTS if cpu else ("int8",))
    steps: list[Pass | None] = [
        Pass(canonicalise.NAME, canonicalise.apply),
        Pass(insert_predictor.NAME, insert_predictor.apply) if sparse else None,
        Pass(sparsify_attention.NAME, sparsify_attention.apply),
        Pass(fill_heads.NAME, fill_heads.apply) if sparse else None,
        Pass(sparsify_ffn.NAME, partial(sparsify_ffn.apply, skip_zeros=skip_zeros)),
        Pass(cluster_neurons.NAME, cluster_neurons.apply) if sparse else None,
        Pass(fuse_predictor.NAME, fuse_predictor.apply) if sparse and cpu else None,
        Pass(quantise.NAME, partial(quantise.apply, weights=weights, products=cpu)) if narrow else None,
        Pass(fix_mask.NAME, partial(fix_mask.apply, kv=fixed)) if fixed is not None else None,
    ]
    if cpu:  # no keep_fp32_islands: activations are float32 everywhere
        steps.append(Pass(narrow_cache.NAME, narrow_cache.apply) if weights != "fp32" else None)
        steps.append(Pass(finalise.NAME, finalise.apply))
        steps.append(Pass(fold_norms.NAME, fold_norms.apply))  # behind it: names are found through the norms
    else:
        steps += _tensorrt(ACTIVATIONS[weights], prefill=prefill)
    return tuple(step for step in steps if step is not None)


def _tensorrt(activations: Activations, *, prefill: bool) -> list[Pass | None]:
    """From records to a graph that TensorRT parses."""
    from shadowc.passes import dense_prefill, finalise_tensorrt, keep_fp32_islands, split_records, steady_shapes

    dense = partial(dense_prefill.apply, fused=activations != "float32")
    shape = Pass(dense_prefill.NAME, dense) if prefill else Pass(steady_shapes.NAME, steady_shapes.apply)
    narrow = Pass(keep_fp32_islands.NAME, partial(keep_fp32_islands.apply, dtype=activations))
    return [
        Pass(split_records.NAME, split_records.apply),
        shape,
        Pass(finalise_tensorrt.NAME, finalise_tensorrt.apply),
        narrow if activations != "float32" else None,
    ]


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
        with writing(dump, hint=_ELSEWHERE):
            dump.mkdir(parents=True, exist_ok=True)
            for older in dump.glob(_GRAPHS):
                older.unlink()
            _write(program, dump, 0, "trace")
    reports: list[PassReport] = []
    for number, step in enumerate(passes, start=1):
        reports.append(step.apply(program))
        if dump is not None:
            with writing(dump, hint=_ELSEWHERE):
                _write(program, dump, number, step.name)
    if dump is not None:
        text = json.dumps([asdict(report) for report in reports], indent=2, sort_keys=True)
        with writing(dump, hint=_ELSEWHERE):
            (dump / REPORT_FILE).write_text(text + "\n", encoding="utf-8")
    return reports


def foreign_to_a_dump(folder: Path) -> list[str]:
    """Names of what lies in a folder, or one level below, and was not written there by `run_passes`."""
    files = sorted(entry for pattern in ("*", "*/*") for entry in folder.glob(pattern) if not entry.is_dir())
    return [
        file.relative_to(folder).as_posix() for file in files if file.name != REPORT_FILE and not file.match(_GRAPHS)
    ]


def _write(program: Program, folder: Path, number: int, name: str) -> None:
    from shadowc.trace.program_io import write_model

    write_model(program, folder / f"{number:02d}-{name}.onnx")
