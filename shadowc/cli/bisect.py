# SPDX-License-Identifier: Apache-2.0
"""`shadowc bisect`: the first layer and tensor at which an engine parts from torch."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from shadowc.cli import flags, render

if TYPE_CHECKING:
    from shadowc.measure.bisect_report import BisectReport, Compared


def bisect(
    engine: flags.Engine,
    against: Annotated[
        str | None,
        typer.Option(
            "--against", help="The checkpoint; default: by the name it was compiled with.", show_default=False
        ),
    ] = None,
    reference: Annotated[
        bool, typer.Option("--reference", help="Look at reference.onnx: standard operators, no kernels of shadowc.")
    ] = False,
    offline: flags.Offline = False,
    threads: flags.Threads = None,
    json: flags.AsJson = False,
) -> None:
    """Compare an engine with the masked torch model tensor by tensor; names the first that deviates, and why."""
    from shadowc.measure.bisect import bisect as run_bisect

    with render.progress() as progress:
        report = run_bisect(engine, against, offline=offline, reference=reference, threads=threads, progress=progress)
    if json:
        first = None if report.first is None else asdict(report.first)
        render.as_json({**asdict(report), "first": first})
    else:
        _show(report)
    report.require()


def _show(report: BisectReport) -> None:
    """The layer of the first deviation, or how close the closest call was."""
    first = report.first
    if first is None:
        closest = max(report.compared, key=lambda one: one.difference / one.tolerance if one.tolerance else 0.0)
        render.line(
            f"{report.folder}: {len(report.compared)} tensors as in torch, {report.positions} positions; "
            f"closest to its tolerance: {closest.where}, {closest.difference:.1e} of {closest.tolerance:.0e}"
        )
        for problem in report.changed_files:
            render.line(f"and yet {problem}")
        return
    render.table(
        ("tensor", "made by", "difference", "tolerance", ""),
        [
            (
                one.where,
                one.made_by,
                f"{one.difference:.1e}",
                f"{one.tolerance:.0e}",
                "deviates" if one.deviates else "",
            )
            for one in report.compared
            if one is first or (one.graph == first.graph and one.layer == first.layer is not None)
        ],
    )
    later = [one for one in report.compared if one.deviates and one is not first]
    if later:
        render.line(f"{len(later)} more deviate from what torch makes of the tensors before them: {_places(later)}")


def _places(compared: list[Compared]) -> str:
    shown = [one.where for one in compared[:4]]
    return ", ".join(shown) + (", …" if len(compared) > len(shown) else "")
