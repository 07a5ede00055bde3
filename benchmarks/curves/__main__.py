# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks.curves`, from the repository root: ms per token against density and against model size.

Models one after the other: the engine is compiled with dummy weights, measured round by round, and removed. Every
round is kept in the JSON, so a run that was stopped goes on behind the last one; `--draw-only` draws what is there.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from benchmarks.curves import drawing
from benchmarks.curves.series import series, table
from benchmarks.decoding import DENSE, Setting
from benchmarks.rounds import Asked, Ledger, LedgerError, compile_dummy, measure, positive, say, threads_of
from shadowc.checkpoint.resolve import resolve
from shadowc.measure import plot
from shadowc.spec.errors import ShadowcError, UnsupportedError

MODELS = "opt-125m,opt-350m,opt-1.3b,opt-2.7b,opt-6.7b"
LADDER = "1/1,0.9/0.9,0.8/0.8,0.7/0.7,0.6/0.6,0.5/0.5,0.4/0.4,0.3/0.3,0.2/0.2,0.1/0.1,0.5/0.2"
PARAMETER_BYTES = {"fp32": 4.0, "bf16": 2.0, "int8": 1.1, "int4": 0.7}
"""Of an engine folder on disk, per parameter and rounded up: scales, and tables that stay wider, are in there."""
SPARE = 2 << 30
"""Bytes of the disk that an engine leaves free."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, draw, print the table; returns the exit status."""
    parser = _parser()
    given = parser.parse_args(arguments)
    models = [item for item in given.models.split(",") if item]
    try:
        plot.require()
        given.out.mkdir(parents=True, exist_ok=True)
        asked = Asked(given.weights, given.mask, _settings(given.densities), given.tokens, threads_of(given.threads))
        ledger = Ledger(given.out / "curves.json", asked)
        for model in () if given.draw_only else models:
            _measure(model, ledger, given)
        measured = [model for model in models if ledger.rounds(model)]
        if not measured:
            parser.error(f"nothing is measured in {ledger.path}")
        curves = [series(model, ledger) for model in measured]
        text = table(curves, ledger)
        drawing.against_density(curves, text.note, given.out / "density.png")
        drawing.against_size(curves, text.note, given.out / "size.png")
    except ShadowcError as error:
        parser.error(f"{error}: {error.hint}" if error.hint else str(error))
    except (LedgerError, ValueError) as error:
        parser.error(str(error))
    (given.out / "curves.md").write_text(text.markdown, "utf-8")
    sys.stdout.write(text.markdown)
    return 0


def _settings(densities: str) -> tuple[str, ...]:
    found = (DENSE, *dict.fromkeys(item for item in densities.split(",") if item))
    for text in found:
        Setting.parse(text)
    return found


def _measure(model: str, ledger: Ledger, given: argparse.Namespace) -> None:
    done = len(ledger.rounds(model))
    if done >= given.rounds:
        return
    try:
        ledger.require_same(given.launcher)
        with _engine(model, given) as folder:
            for turn in range(done, given.rounds):
                say(f"{model}: round {turn + 1} of {given.rounds}")
                ledger.add(model, measure(folder, ledger.asked, turn, given.launcher))
    except UnsupportedError as error:  # a folder may hold anything
        say(f"left out: {error}")
        ledger.note(model, left_out=str(error))


@contextmanager
def _engine(model: str, given: argparse.Namespace) -> Iterator[Path]:
    """A compiled engine that is removed again, unless it is to stay; compiled in a process that gives memory back."""
    folder = given.out / f"{model}-{given.weights}-{given.mask}.engine"
    parameters = resolve(model, load_format="dummy", offline=True).total_bytes / 4
    need, free = parameters * PARAMETER_BYTES[given.weights] + SPARE, shutil.disk_usage(given.out).free
    if not folder.is_dir() and free < need:
        raise LedgerError(f"{model}: {given.out} has {free / 1e9:.1f} GB free, expected {need / 1e9:.1f}: free some")
    try:
        compile_dummy(model, model, folder, "--weights", given.weights, "--mask", given.mask)
        yield folder
    finally:
        if not given.keep:
            shutil.rmtree(folder, ignore_errors=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.curves", description=__doc__)
    add = parser.add_argument
    add("--models", default=MODELS, help="short names, by commas (%(default)s)")
    add("--weights", default="int8", choices=sorted(PARAMETER_BYTES), help="(%(default)s)")
    add("--mask", default="token", choices=("token", "sequence"), help="what a mask holds for (%(default)s)")
    add("--densities", default=LADDER, help="HEADS/NEURONS kept, by commas (%(default)s)")
    add("--rounds", type=positive, default=5, help="(%(default)s)")
    add("--tokens", type=positive, default=16, help="timed per setting and round (%(default)s)")
    add("--threads", type=positive, help="of the operators; default: one per core")
    add("--launcher", default="", help="put in front of every measuring process, such as 'chrt -f 50'")
    add("--keep", action="store_true", help="leave the engines in OUT")
    add("--draw-only", action="store_true", help="measure nothing")
    add("--out", type=Path, default=Path("build/curves"), help="folder of JSON, table and plots (%(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
