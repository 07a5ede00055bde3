# SPDX-License-Identifier: Apache-2.0
"""`shadowc collect`: which heads and neurons mattered, position by position."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shadowc.cli import flags, render

if TYPE_CHECKING:
    from shadowc.sparsity.importance import ImportanceTrace


def collect(
    model: flags.AnyModel,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Trace folder; default: ./MODEL.trace.", show_default=False)
    ] = None,
    data: flags.Data = "self",
    criterion: flags.Criterion = "plainact",
    positions: flags.Positions = 4096,
    length: Annotated[int, typer.Option("--length", help="Tokens per calibration sequence.", min=8)] = 256,
    fill: flags.HeadFill = "zero",
    load_format: flags.LoadFormatFlag = "auto",
    offline: flags.Offline = False,
    seed: flags.Seed = 0,
    json: flags.AsJson = False,
) -> None:
    """Record the importance of every head and neuron over calibration text, for `shadowc train`."""
    from shadowc.spec.options import CollectOptions

    options = flags.checked(
        CollectOptions,
        {"criterion": criterion, "data": data, "positions": positions, "length": length, "fill": fill, "seed": seed},
        "collect",
    )
    from shadowc.sparsity.importance import Origin
    from shadowc.sparsity.workflow import record

    with render.progress() as progress:
        trace = record(Origin(model, load_format, seed), options, out, progress, offline=offline)
    if json:
        render.as_json({"folder": str(trace.folder), **trace.meta})
    else:
        _show(trace)


def _show(trace: ImportanceTrace) -> None:
    meta = trace.meta
    render.facts(
        {
            "model": str(meta["model"]["name"]),
            "criterion": str(meta["criterion"]),
            "text": f"{meta['source']}, {meta['sequences']:,} sequences of {meta['length']} tokens",
            "positions": f"{meta['positions']:,} of {trace.layers} layers",
            "fill": "a skipped head leaves " + ("its mean" if meta.get("fill") == "mean" else "zero"),
            "exact zeros": ", ".join(f"{render.share(share)} of {kind}" for kind, share in meta["zeros"].items()),
            "dense loss": "not run" if meta["loss"] is None else f"{meta['loss']:.3f} nats per token",
            "folder": str(trace.folder),
        }
        | ({"dropped": _dropped(meta["dropped"])} if meta["dropped"] else {})
    )
    if meta["per"] == "text":
        render.line("one ranking for the whole text: no predictor can learn it, one keeps it as a control")
        render.line(f"next: shadowc train {trace.origin.flags} {shlex.join(['--ranking', str(trace.folder)])}")
    else:
        render.line(f"next: {shlex.join(['shadowc', 'train', '--trace', str(trace.folder)])}")


def _dropped(dropped: list[dict[str, Any]]) -> str:
    first = dropped[0]
    return f"{len(dropped)} sequences with scores that are not finite; in sequence {first['sequence']} {first['place']}"
