# SPDX-License-Identifier: Apache-2.0
"""`shadowc train`: an importance trace becomes a predictor."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shadowc.cli import flags, render

if TYPE_CHECKING:
    from shadowc.checkpoint.resolve import Checkpoint
    from shadowc.sparsity.importance import ImportanceTrace
    from shadowc.spec.options import CollectOptions
    from shadowc.spec.progress import Progress


def train(
    trace: Annotated[
        Path | None, typer.Option("--trace", help="What `shadowc collect` recorded.", show_default=False)
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Without --trace: collect from this model first.", show_default=False),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Predictor folder; default: ./MODEL.predictor.", show_default=False),
    ] = None,
    neuron_block: flags.NeuronBlock = 16,
    width: flags.Width = 0,
    epochs: flags.Epochs = 60,
    data: flags.Data = "self",
    criterion: flags.Criterion = "plainact",
    positions: flags.Positions = 4096,
    load_format: flags.LoadFormatFlag = "auto",
    offline: flags.Offline = False,
    seed: flags.Seed = 0,
    json: flags.AsJson = False,
) -> None:
    """Train the predictor on a trace (or on a model, collecting first) and report what it finds."""
    from shadowc.spec.errors import InputError
    from shadowc.spec.options import CollectOptions, TrainOptions

    if trace is None and model is None:
        raise InputError("train needs a trace or a model", hint="shadowc train --model opt-mini")
    options = flags.checked(
        TrainOptions, {"neuron_block": neuron_block, "width": width, "epochs": epochs, "seed": seed}
    )
    collecting = flags.checked(
        CollectOptions, {"criterion": criterion, "data": data, "positions": positions, "seed": seed}
    )
    from shadowc.checkpoint.resolve import resolve
    from shadowc.sparsity.importance import ImportanceTrace
    from shadowc.sparsity.train import train as run_train

    recorded = None if trace is None else ImportanceTrace.load(trace)
    name = model or str(recorded.meta["model"]["name"] if recorded else "")
    with render.progress() as progress:
        with progress.stage("checkpoint"):
            checkpoint = resolve(name, load_format=load_format, offline=offline, seed=seed)
        if recorded is None:
            recorded = _collect(checkpoint, collecting, progress)
        folder = out or Path(f"{checkpoint.facts.name}.predictor")
        with progress.stage("train"):
            predictor = run_train(recorded, checkpoint.facts, options, folder, progress)
    if json:
        render.as_json({"folder": str(folder), "trace": str(recorded.folder), **predictor.meta})
    else:
        _show(folder, recorded.folder, predictor.meta)


def _collect(checkpoint: Checkpoint, options: CollectOptions, progress: Progress) -> ImportanceTrace:
    from shadowc.sparsity.collect import collect as run_collect

    with progress.stage("collect"):
        return run_collect(checkpoint, options, Path(f"{checkpoint.facts.name}.trace"), progress)


def _show(folder: Path, trace: Path, meta: dict[str, Any]) -> None:
    from shadowc.cli.recall import layer_table, summary_table

    report = meta["report"]
    positions = report["positions"]
    render.facts(
        {
            "model": str(meta["model"]["name"]),
            "trace": f"{trace}: {positions['taught']:,} positions taught, {positions['held_out']:,} held out",
            "width": f"{meta['width']}, {render.share(meta['parameters_share'])} of the model's parameters",
            "folder": str(folder),
        }
    )
    render.table(*summary_table(report), title="found among the important units of held-out text (global ranking)")
    render.table(*layer_table(report), title="recall per layer at density 0.5 (global ranking)")
    render.line(f"next: shadowc compile --model {meta['model']['name']} --predictor {folder}")
