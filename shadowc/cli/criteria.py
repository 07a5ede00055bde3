# SPDX-License-Identifier: Apache-2.0
"""`shadowc criteria`: what criteria there are, and how well each agrees with what masking a unit really costs."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shadowc.cli import flags, render

if TYPE_CHECKING:
    from shadowc.measure.agreement import Agreed
    from shadowc.measure.criteria import CriteriaReport
    from shadowc.measure.rank_correlation import Interval

PER = {"token": "token", "sequence": "sequence", "text": "text: static ranking only"}
COLUMNS = {
    "token, size": "token size all",
    "heard": "token size heard",
    "token, change": "token change all",
    "text, size": "text size all",
    "text, change": "text change all",
    "static, size": "static size all",
    "static, change": "static change all",
}
"""Heading -> one of the correlations of `Agreed`."""


MEASURING = ("units", "sequences", "length", "tokens", "load_format", "offline", "seed")
"""Parameters of a measurement; the list has none of them."""


def criteria(
    context: typer.Context,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Measure on this model; without it, the list.", show_default=False),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option("--data", help="A .txt or .jsonl file that the model was not trained on.", show_default=False),
    ] = None,
    criterion: Annotated[
        str | None, typer.Option("--criterion", help="Names, separated by commas; default: all.", show_default=False)
    ] = None,
    units: Annotated[int, typer.Option("--units", help="Heads, and neurons, that are masked.", min=8)] = 112,
    sequences: Annotated[int, typer.Option("--sequences", help="Pieces of the text.", min=2)] = 16,
    length: Annotated[int, typer.Option("--length", help="Tokens of each piece.", min=8)] = 64,
    tokens: Annotated[
        int, typer.Option("--tokens", help="Tokens of each piece at which a unit is masked alone.", min=1)
    ] = 2,
    load_format: flags.LoadFormatFlag = "auto",
    offline: flags.Offline = False,
    seed: flags.Seed = 0,
    json: flags.AsJson = False,
) -> None:
    """List the criteria, or mask heads and neurons one by one and tell how well each criterion ranks them."""
    from shadowc.spec.errors import InputError

    names = None if criterion is None else [name.strip() for name in criterion.split(",")]
    if model is None:
        if data is not None:
            raise InputError(
                "--data needs a model to measure on", hint=f"shadowc criteria --model opt-mini --data {data}"
            )
        flags.refuse_unused(context, MEASURING, "without --model")
        _list(names, json)
        return
    if data is None:
        raise InputError(
            "criteria are measured on a text that the model was not trained on",
            hint=f"shadowc criteria --model {model} --data text.txt",
        )
    from shadowc.measure.criteria import measure_criteria
    from shadowc.sparsity.importance import Origin

    with render.progress() as progress:
        report = measure_criteria(
            Origin(model, load_format, seed),
            data,
            names,
            units=units,
            sequences=sequences,
            length=length,
            tokens=tokens,
            seed=seed,
            offline=offline,
            progress=progress,
        )
    if json:
        render.as_json(asdict(report))
    else:
        _show(report)


def _list(names: list[str] | None, json: bool) -> None:
    from shadowc.sparsity.criteria import criterion_names, find_criterion

    found = [find_criterion(name) for name in names or criterion_names()]
    if json:
        render.as_json(
            [
                {"name": one.name, "per": one.per, "needs": one.needs, "trains": one.trains, "formula": one.formula}
                for one in found
            ]
        )
        return
    for one in found:
        render.line(f"{one.name}: one score a {PER[one.per]}; reads {', '.join(one.needs) or 'nothing'}")
        render.line(f"  {one.formula.splitlines()[0]}")
    render.line(
        "next: shadowc criteria --model opt-mini --data text.txt measures how well each ranks heads and neurons"
    )


def _show(report: CriteriaReport) -> None:
    found = report.agreement
    render.line(
        f"{report.model} on {report.text}: {found.sequences} sequences of {found.length} tokens, dense loss "
        f"{found.loss:.3f} nats per token, {found.runs:,} masked runs"
    )
    for problem in found.dropped:
        render.line(f"left out: {problem}")
    for kind, units in found.units.items():
        truth = found.truth[kind]
        render.line("")
        render.line(
            f"{units} {kind}; without one at all tokens of a text the loss changes by "
            f"{truth['text median size']:.2g} nats (median), and falls in "
            f"{render.share(truth['text negative'])} of the cases; without it at one token by "
            f"{truth['token median size']:.2g}, and falls in {render.share(truth['token negative'])}"
        )
        rows = [row for row in found.rows if row.kind == kind]
        rows.sort(key=lambda row: -_sortable(row.ranks["text change all"]))
        render.table(("criterion", *COLUMNS, "zeros"), [_cells(row) for row in rows])
    render.line("")
    render.line("Spearman's correlations with the truth, 95 % intervals over texts; (!): constant scores, counted as 0")


def _sortable(interval: Interval) -> float:
    return -2.0 if math.isnan(interval.mean) else interval.mean


def _cells(row: Agreed) -> tuple[str, ...]:
    cells = [cell(row.ranks[name]) for name in COLUMNS.values()]
    return (row.criterion, *cells, "-" if math.isnan(row.zeros) else render.share(row.zeros))


def cell(interval: Interval) -> str:
    """Return mean and interval, `-` where there is no ranking, and a mark where scores were constant."""
    if math.isnan(interval.mean):
        return "-"
    mark = " (!)" if interval.constant else ""
    return f"{interval.mean:+.2f} [{interval.low:+.2f} {interval.high:+.2f}]{mark}"
