# SPDX-License-Identifier: Apache-2.0
"""`shadowc train`: an importance trace becomes a predictor."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shadowc.cli import flags, render

if TYPE_CHECKING:
    from shadowc.sparsity.workflow import Learned


COLLECTING = ("data", "criterion", "positions", "fill", "load_format", "offline")


def train(
    context: typer.Context,
    trace: Annotated[
        Path | None, typer.Option("--trace", help="What `shadowc collect` recorded.", show_default=False)
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Instead of --trace: collect from this model first.", show_default=False),
    ] = None,
    ranking: Annotated[
        list[Path] | None,
        typer.Option(
            "--ranking",
            help="Trace of another criterion, kept as control static-CRITERION; may be repeated.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Predictor folder; default: ./MODEL.predictor.", show_default=False),
    ] = None,
    style: flags.PredictorStyle = "shadow",
    labels: flags.PredictorLabels = None,
    neuron_block: flags.NeuronBlock = None,
    width: flags.Width = 0,
    epochs: flags.Epochs = 60,
    data: flags.Data = "self",
    criterion: flags.Criterion = "plainact",
    positions: flags.Positions = 4096,
    fill: flags.HeadFill = "zero",
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
    if trace is not None and model is not None:
        raise InputError("train takes a trace or a model, not both", hint="drop --model: the trace knows its model")
    if trace is not None:
        flags.refuse_unused(context, COLLECTING, "with --trace: the trace is already collected")
    options = flags.checked(
        TrainOptions,
        {
            "style": style,
            "labels": labels,
            "neuron_block": neuron_block,
            "width": width,
            "epochs": epochs,
            "seed": seed,
        },
        "train",
    )
    collecting = flags.checked(
        CollectOptions,
        {"criterion": criterion, "data": data, "positions": positions, "fill": fill, "seed": seed},
        "train",
    )
    from shadowc.sparsity.importance import Origin
    from shadowc.sparsity.workflow import learn

    source = trace or Origin(model or "", load_format, seed)
    with render.progress() as progress:
        learned = learn(source, options, collecting, out, progress, offline=offline, rankings=ranking or ())
    if json:
        meta = learned.predictor.meta
        folders = {"folder": str(learned.folder), "trace": str(learned.trace.folder)}
        render.as_json({**folders, "style": learned.predictor.style, "fill": learned.predictor.fill, **meta})
    else:
        _show(learned)


def _show(learned: Learned) -> None:
    from shadowc.cli.recall import layer_tables, met_text, summary_table

    predictor, trace = learned.predictor, learned.trace
    meta, report = predictor.meta, predictor.report
    positions, scope = report["positions"], predictor.scope(None)
    render.facts(
        {
            "model": str(meta["model"]["name"]),
            "trace": f"{trace.folder}: {positions['taught']:,} positions taught, {positions['held_out']:,} held out",
            "style": f"{predictor.style}, labels {meta['labels']}",
            "width": f"{meta['width']}, {render.share(meta['parameters_share'])} of the model's parameters",
            "skipped heads": "leave their mean" if predictor.fill == "mean" else "leave zero",
            "thresholds met": met_text(report["met"], "global"),
            "folder": str(learned.folder),
        }
    )
    title = f"found among the important units of held-out text ({scope} ranking)"
    render.table(*summary_table(report, scope), title=title)
    for kind, table in layer_tables(report, scope).items():
        render.table(*table, title=f"recall per layer: {kind} ({scope} ranking)")
    # Engines are compiled from OPT models only.
    command = "compile" if trace.facts.family == "OPT" else "eval"
    render.line(f"next: shadowc {command} {trace.origin.flags} {shlex.join(['--predictor', str(learned.folder)])}")
