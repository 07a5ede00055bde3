# SPDX-License-Identifier: Apache-2.0
"""`shadowc bench`: decode speed at several densities beside the machine's bandwidth."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shadowc.cli import drawings, flags, render

if TYPE_CHECKING:
    from shadowc.spec.density import Density

SWEEP = "1,0.9,0.8,0.7,0.6,0.5,0.4,0.3,0.2,0.1"


def bench(
    context: typer.Context,
    engine: flags.Engine,
    densities: Annotated[
        str, typer.Option("--densities", help="Heads/neurons, separated by commas; one number means both.")
    ] = "1,0.5,0.2,0.5/0.2",
    sweep: Annotated[bool, typer.Option("--sweep", help="Densities 1, 0.9 … 0.1 in place of --densities.")] = False,
    rounds: Annotated[int, typer.Option("--rounds", help="How often the whole table is measured.", min=1)] = 5,
    tokens: Annotated[int, typer.Option("--tokens", help="Tokens timed of every setting in a round.", min=1)] = 24,
    prompt_tokens: Annotated[
        int, typer.Option("--prompt-tokens", help="Length of the prompt whose first token is timed.", min=1)
    ] = 33,
    context_tokens: Annotated[
        int, typer.Option("--context-tokens", help="Tokens in front of those that are timed.", min=1)
    ] = 16,
    batch: Annotated[
        int, typer.Option("--batch", help="Rows decoded at once, each with a prompt of its own.", min=1)
    ] = 1,
    skip_zeros: Annotated[
        bool | None,
        typer.Option(
            "--skip-zeros/--no-skip-zeros",
            help="Only with, or only without reading fc2 of neurons whose ReLU is 0. Default: both.",
            show_default=False,
        ),
    ] = None,
    threads: flags.Threads = None,
    memory: flags.Memory = None,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", help="Also draw ms per token against density: FILE.png.", show_default=False),
    ] = None,
    json: flags.AsJson = False,
) -> None:
    """Measure decoding beside the dense twin: time, its parts, bytes read, bandwidth, first token."""
    from shadowc.measure.bench import bench as run_bench
    from shadowc.runtime.load import read_manifest

    wanted = _densities(context, densities, sweep)
    if plot is not None:
        drawings.require_place(plot)
    sparse = read_manifest(engine).sparsity is not None
    if not sparse:
        flags.refuse_unused(context, ["densities", "sweep"], "on an engine without a predictor: it is dense")
    if plot is not None:
        from shadowc.measure.plot import check

        check(plot, wanted, sparse=sparse)
    with render.progress() as progress:
        report = run_bench(
            engine, densities=wanted, rounds=rounds, tokens=tokens, prompt_tokens=prompt_tokens,
            context_tokens=context_tokens, batch=batch, skip_zeros=skip_zeros, threads=threads, memory=memory,
            progress=progress,
        )  # fmt: skip
    if json:
        render.as_json(asdict(report))
    else:
        from shadowc.cli.bench_tables import show

        show(report)
    if plot is not None:
        from shadowc.measure.plot import against_density

        with drawings.told(plot):
            against_density(report, plot)
        render.say(f"plot: {plot}")


def _densities(context: typer.Context, text: str, sweep: bool) -> tuple[Density, ...]:
    if sweep:
        flags.refuse_unused(context, ["densities"], "beside --sweep")
    return flags.densities_of(SWEEP if sweep else text)
