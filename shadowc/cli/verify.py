# SPDX-License-Identifier: Apache-2.0
"""`shadowc verify`: does the folder hold what its manifest says, and can this machine run it?"""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from shadowc.cli import flags, render


def verify(
    engine: flags.Engine,
    deep: Annotated[bool, typer.Option("--deep/--quick", help="Hash every file, or compare sizes only.")] = True,
    json: flags.AsJson = False,
) -> None:
    """Check every file of an engine folder against its manifest, and the manifest against this installation."""
    from shadowc.runtime.load import verify as run_verify

    with render.progress() as progress, progress.stage("verify"):
        report = run_verify(engine, deep=deep)
    if json:
        render.as_json({**asdict(report), "folder": str(report.folder), "passed": report.passed})
    report.require()
    if not json:
        render.line(str(report))
