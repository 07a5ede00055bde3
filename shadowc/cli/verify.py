# SPDX-License-Identifier: Apache-2.0
"""`shadowc verify`: does the folder hold what its manifest says, and does it compute what torch computes?"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from shadowc.cli import flags, render

if TYPE_CHECKING:
    from shadowc.measure.against import AgainstReport


AGAINST = ("prompts", "tokens", "load_format", "offline", "seed")
"""Parameters of the comparison with a checkpoint."""


def verify(
    context: typer.Context,
    engine: flags.Engine,
    deep: Annotated[bool, typer.Option("--deep/--quick", help="Hash every file, or compare sizes only.")] = True,
    against: Annotated[
        str | None,
        typer.Option(
            "--against",
            help="The checkpoint: compare the numbers with torch too; an fp32 engine also generates beside it.",
            show_default=False,
        ),
    ] = None,
    prompts: Annotated[int, typer.Option("--prompts", help="Prompts that both continue freely.", min=1)] = 20,
    tokens: Annotated[int, typer.Option("--tokens", help="Tokens generated after each.", min=1)] = 64,
    load_format: flags.LoadFormatFlag = "auto",
    offline: flags.Offline = False,
    seed: flags.Seed = 0,
    json: flags.AsJson = False,
) -> None:
    """Check every file of an engine folder against its manifest, and on request its numbers against the checkpoint."""
    if against is None:
        flags.refuse_unused(context, AGAINST, "without --against")
    from shadowc.runtime.load import verify as run_verify

    compared: AgainstReport | None = None
    with render.progress() as progress:
        with progress.stage("verify"):
            report = run_verify(engine, deep=deep)
        if report.passed and against is not None:
            from shadowc.measure.against import verify_against

            compared = verify_against(
                engine,
                against,
                prompts=prompts,
                tokens=tokens,
                load_format=load_format,
                offline=offline,
                seed=seed,
                progress=progress,
            )
    if json:
        found = {} if compared is None else {"against": asdict(compared)}
        render.as_json({**asdict(report), "folder": str(report.folder), "passed": report.passed, **found})
    report.require()
    if not json:
        render.line(str(report))
        if compared is not None:
            _show(compared)
    if compared is not None:
        compared.require()


def _show(compared: AgainstReport) -> None:
    parity = compared.parity
    render.line(
        f"parity A, {parity.weights}, {parity.positions} positions: embedding {parity.embedding:.1e}, worst layer "
        f"{max(parity.layers):.1e} (tolerance {parity.layer_tolerance:.0e}), logits {parity.logits:.1e} "
        f"(tolerance {parity.logits_tolerance:.0e})"
    )
    if parity.selection is not None:
        render.line(f"selection: {parity.selection} wrong thresholds")
    if parity.scores is not None:
        render.line(f"scores: {parity.scores:.1e} of their spread (tolerance {parity.scores_tolerance:.0e})")
    if not compared.runs:
        render.line("parity B is for sparse fp32 engines")
        return
    render.table(
        ("parity B", "heads", "neurons", "tokens", "at threshold", "near-ties", "excused", "thereof after", "wrong"),
        [
            (
                run.scope,
                f"{run.density.heads:g}",
                f"{run.density.neurons:g}",
                str(run.tokens),
                str(run.near_units),
                str(run.near_ties),
                str(run.excused),
                str(run.masks_after),
                str(run.masks_wrong + run.tokens_wrong),
            )
            for run in compared.runs
        ],
    )
