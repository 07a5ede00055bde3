# SPDX-License-Identifier: Apache-2.0
"""The table of commands. Nothing heavy is imported before a command runs."""

from __future__ import annotations

from typing import Annotated

import typer

from shadowc._version import __version__
from shadowc.cli import render
from shadowc.cli.bench import bench
from shadowc.cli.bisect import bisect
from shadowc.cli.collect import collect
from shadowc.cli.compile import compile_model
from shadowc.cli.criteria import criteria
from shadowc.cli.doctor import doctor
from shadowc.cli.evaluate import evaluate
from shadowc.cli.guard import guarded
from shadowc.cli.inspect import inspect
from shadowc.cli.run import run
from shadowc.cli.train import train
from shadowc.cli.verify import verify

app = typer.Typer(
    name="shadowc",
    help="Compile an OPT checkpoint into an inference engine that reads only the weights each token needs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

AGAIN = "type the same command again, it goes on from there"

COMMANDS = (
    ("compile", compile_model, "no engine is left half written, and finished stages stay in the cache"),
    ("collect", collect, "what was recorded is kept"),
    ("criteria", criteria, "nothing was changed"),
    ("train", train, "no predictor is left half written"),
    ("run", run, "the engine is unchanged"),
    ("eval", evaluate, "what a --sweep has computed is kept, and goes on with the same command"),
    ("bench", bench, "the engine is unchanged"),
    ("inspect", inspect, "the engine is unchanged"),
    ("verify", verify, "the engine is unchanged"),
    ("bisect", bisect, "the engine is unchanged"),
    ("doctor", doctor, "nothing was changed"),
)
"""Name, function, and what Ctrl-C leaves behind."""
RESUMED = ("compile", "collect")
"""Commands that go on where they were interrupted."""

for _name, _function, _kept in COMMANDS:
    app.command(_name)(guarded(_function, kept=_kept, again=AGAIN if _name in RESUMED else ""))


def _show_version(wanted: bool) -> None:
    if wanted:
        render.line(f"shadowc {__version__}")
        raise typer.Exit


@app.callback()
def top(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Compile an OPT checkpoint into an inference engine that reads only the weights each token needs."""


def main() -> None:
    """Entry point of the `shadowc` script."""
    app()
