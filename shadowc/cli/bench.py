# SPDX-License-Identifier: Apache-2.0
"""`shadowc bench`: decode speed at several densities beside the machine's bandwidth."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from shadowc.cli import flags, render

if TYPE_CHECKING:
    from shadowc.measure.bench import BenchReport


FEW_LARGE_PAGES = 0.9


def bench(
    engine: flags.Engine,
    densities: Annotated[
        str, typer.Option("--densities", help="Heads/neurons, separated by commas; one number means both.")
    ] = "1,0.5,0.2,0.5/0.2",
    rounds: Annotated[int, typer.Option("--rounds", help="How often the whole table is measured.", min=1)] = 5,
    tokens: Annotated[int, typer.Option("--tokens", help="Tokens generated per measurement.", min=2)] = 24,
    threads: flags.Threads = None,
    memory: flags.Memory = None,
    json: flags.AsJson = False,
) -> None:
    """Measure batch-1 decoding beside the dense twin: time, bytes read and bandwidth, `skip_zeros` off and on."""
    wanted = flags.densities_of(densities)
    from shadowc.measure.bench import bench as run_bench

    with render.progress() as progress:
        report = run_bench(
            engine, densities=wanted, rounds=rounds, tokens=tokens, threads=threads, memory=memory, progress=progress
        )
    if json:
        render.as_json(asdict(report))
    else:
        _show(report)


def _show(report: BenchReport) -> None:
    where = f"{report.threads} threads, {report.isa}" if report.threads else report.isa
    stream = "a stream reads" if report.threads else "a copy reads and writes"
    render.line(
        f"{report.model}, {report.weights}, {where}; median of {report.rounds} rounds of {report.tokens} tokens; "
        f"{stream} {report.stream_gigabytes_per_second:.1f} GB/s here"
    )
    if report.large_pages is not None:
        render.line(f"weights: {report.memory} memory, {report.large_pages:.0%} of it in large pages")
        if report.memory == "shared" and report.large_pages < FEW_LARGE_PAGES:
            render.line("small pages cost bandwidth on many machines: compare with --memory private")
    render.table(
        ("density", "ms/token", "from", "to", "MB/token", "GB/s", "of stream", "speed-up"),
        [
            (
                row.label,
                f"{row.ms_per_token:.2f}",
                f"{row.ms_lowest:.2f}",
                f"{row.ms_highest:.2f}",
                f"{row.megabytes_per_token:.1f}",
                f"{row.gigabytes_per_second:.1f}",
                render.share(row.share_of_stream),
                f"{row.speedup:.2f}x",
            )
            for row in report.rows
        ],
    )
