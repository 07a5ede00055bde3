# SPDX-License-Identifier: Apache-2.0
"""What `shadowc collect` and `shadowc train` do, from the model as it was typed to a folder on disk.

Everything that can be refused is refused before anything long begins: the data, the place of the result, the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from shadowc.sparsity import importance, predictor
from shadowc.sparsity.calibration import check_data
from shadowc.sparsity.criteria import find_criterion, require_trainable
from shadowc.sparsity.importance import ImportanceTrace, Origin
from shadowc.spec.errors import InputError
from shadowc.spec.progress import NullProgress
from shadowc.stage_cache import StageCache

if TYPE_CHECKING:
    from shadowc.checkpoint.resolve import ModelCheckpoint
    from shadowc.sparsity.predictor import Predictor
    from shadowc.spec.options import CollectOptions, TrainOptions
    from shadowc.spec.progress import Progress


@dataclass(frozen=True, slots=True)
class Learned:
    """A trained predictor, where it lies, and what it was trained on."""

    predictor: Predictor
    folder: Path
    trace: ImportanceTrace


def record(
    origin: Origin,
    options: CollectOptions,
    out: Path | None = None,
    progress: Progress | None = None,
    *,
    offline: bool = False,
) -> ImportanceTrace:
    """Record the importance trace of a model.

    Args:
        origin: the model as it was typed.
        options: what is recorded.
        out: folder of the trace; None: ./MODEL.trace.
        progress: told about stages.
        offline: do not use the network.

    Raises:
        InputError: the model, its weights, the calibration text or `out` cannot be used.
        UnsupportedError: the model is of a kind that is not handled.
        SetupError: the hub cannot be reached, or the disk has no room.
    """
    progress = progress or NullProgress()
    _check_options(options)
    if out is not None:
        importance.check_out(out)
    return _record(_checkpoint(origin, offline, progress), origin, options, out, progress)


def learn(
    source: Path | Origin,
    options: TrainOptions,
    collecting: CollectOptions,
    out: Path | None = None,
    progress: Progress | None = None,
    *,
    offline: bool = False,
    rankings: Sequence[Path] = (),
) -> Learned:
    """Train a predictor on a recorded trace, or on a model after recording one at ./MODEL.trace.

    Args:
        source: a trace's folder, which is all that is needed, or a model as it was typed.
        options: how it is trained.
        collecting: what is recorded from a model.
        out: folder of the predictor; None: ./MODEL.predictor.
        progress: told about stages.
        offline: do not use the network.
        rankings: folders of traces by other criteria, whose static rankings are kept as controls.

    Raises:
        InputError: the trace, a ranking, the model, an option or `out` cannot be used.
        UnsupportedError: the model is of a kind that is not handled.
        SetupError: the hub cannot be reached, or the disk has no room.
    """
    from shadowc.sparsity.train import train

    progress = progress or NullProgress()
    if out is not None:
        predictor.check_out(out)
    others = [ImportanceTrace.load(folder) for folder in rankings]
    if isinstance(source, Path):
        trace = ImportanceTrace.load(source)
        folder = _predictor_folder(out, trace.facts.name)
    else:
        _check_options(collecting)
        require_trainable(collecting.criterion, find_criterion(collecting.criterion).per)
        checkpoint = _checkpoint(source, offline, progress)
        folder = _predictor_folder(out, checkpoint.facts.name)
        trace = _record(checkpoint, source, collecting, None, progress)
    with progress.stage("train"):
        return Learned(train(trace, trace.facts, options, folder, progress, rankings=others), folder, trace)


def _check_options(options: CollectOptions) -> None:
    check_data(options.data)
    if find_criterion(options.criterion).per == "text" and options.fill == "mean":
        raise InputError(
            f"criterion {options.criterion} gives one ranking for a whole text, which is measured from zero; no "
            "predictor learns from it, so there is nothing for a skipped head to leave",
            hint="leave --fill out",
        )


def _predictor_folder(out: Path | None, name: str) -> Path:
    folder = out or Path(f"{name}.predictor")
    predictor.check_out(folder)
    return folder


def _checkpoint(origin: Origin, offline: bool, progress: Progress) -> ModelCheckpoint:
    from shadowc.checkpoint.models import resolve_model

    with progress.stage("checkpoint"):
        return resolve_model(
            origin.model,
            load_format=origin.load_format,
            offline=offline,
            seed=origin.seed,
            advance=lambda done, total: progress.advance(done >> 20, total >> 20, "MiB"),
        )


def _record(
    checkpoint: ModelCheckpoint, origin: Origin, options: CollectOptions, out: Path | None, progress: Progress
) -> ImportanceTrace:
    from shadowc.checkpoint.finite import check_finite
    from shadowc.sparsity.collect import collect, trace_key

    folder = out or Path(f"{checkpoint.facts.name}.trace")
    importance.check_out(folder)
    with progress.stage("weights"):
        check_finite(checkpoint, progress.advance)
    waited = False

    def tell_waiting() -> None:
        nonlocal waited
        waited = True
        progress.note(f"waits for another process that records {folder}")

    with progress.stage("collect"), StageCache().alone(f"trace {folder.resolve()}", tell_waiting):
        found = ImportanceTrace.finished(folder, trace_key(checkpoint, options)) if waited else None
        if found is not None:
            progress.note(f"{folder} is what the other process recorded")
            return found
        return collect(checkpoint, options, folder, progress, origin=origin)
