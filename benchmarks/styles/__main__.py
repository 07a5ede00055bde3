# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks.styles`, from the repository root: predictors of all styles, their bytes, time and quality.

Time: a model's shape with dummy weights is compiled once per predictor, and the engines are measured in turns, round by
round. Quality: a model that says something is compiled once per predictor, kind of labels and criterion. Everything is
kept in JSON as it is found: a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.decoding import DENSE, Setting
from benchmarks.quality import heldout
from benchmarks.rounds import Asked, Ledger, LedgerError, compile_dummy, measure, positive, say, threads_of
from benchmarks.styles import parts, quality, table
from benchmarks.styles.contestants import Contestant, contestants, timed
from shadowc.checkpoint.resolve import resolve
from shadowc.runtime.load import read_manifest
from shadowc.spec.errors import ShadowcError

DENSITIES = "0.5/0.5,0.5/0.2"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write the tables; returns the exit status."""
    parser = _parser()
    given = parser.parse_args(arguments)
    texts = []
    try:
        given.out.mkdir(parents=True, exist_ok=True)
        if given.only != "quality":
            texts.append(_speed(given))
        if given.only != "speed":
            texts.append(_quality(given))
    except ShadowcError as error:
        parser.error(f"{error}: {error.hint}" if error.hint else str(error))
    except (LedgerError, ValueError) as error:
        parser.error(str(error))
    text = "\n".join(texts)
    (given.out / "styles.md").write_text(text, "utf-8")
    sys.stdout.write(text)
    return 0


def _speed(given: argparse.Namespace) -> str:
    settings = (DENSE, *dict.fromkeys(given.densities.split(",")))
    for text in settings:
        Setting.parse(text)
    facts = resolve(given.model, load_format="dummy", offline=True).facts
    found = timed(facts, given.width)
    ledger = Ledger(
        given.out / f"{given.model}.json",
        Asked(given.weights, "token", settings, given.tokens, threads_of(given.threads)),
    )
    ledger.require_same(given.launcher)
    folders = {one.name: given.out / f"{given.model}-{given.weights}-{one.name}.engine" for one in found}
    try:
        for one in found:
            if not _complete(ledger, one.name, given.rounds):
                _compile(one, folders[one.name], ledger, given)
        for turn in range(given.rounds):
            for name, folder in folders.items():
                if len(ledger.rounds(name)) <= turn:
                    say(f"{name}: round {turn + 1} of {given.rounds}")
                    ledger.add(name, measure(folder, ledger.asked, turn, given.launcher))
        for name, folder in folders.items():
            if "parts" not in ledger.facts(name):
                say(f"{name}: parts of a token")
                shown = parts.in_process(folder, settings[1:], ledger.asked.threads, given.launcher)
                ledger.note(name, parts=shown)
    finally:
        if all(_complete(ledger, name, given.rounds) for name in folders) and not given.keep:
            for folder in folders.values():
                shutil.rmtree(folder, ignore_errors=True)
    return table.speed(list(folders), ledger, given.model)


def _complete(ledger: Ledger, name: str, rounds: int) -> bool:
    return len(ledger.rounds(name)) >= rounds and "parts" in ledger.facts(name)


def _compile(one: Contestant, folder: Path, ledger: Ledger, given: argparse.Namespace) -> None:
    """Compile where it is not up to date, and note what the manifest says."""
    flags = ("--weights", given.weights, "--scope", "local", "--style", one.style, "--width", str(one.width))
    compile_dummy(one.name, given.model, folder, *flags, "--neuron-block", str(one.block))
    part = read_manifest(folder).bytes_per_token
    ledger.note(one.name, predictor_bytes=part.predictor, dense_bytes=part.records + part.lm_head + part.other)


def _quality(given: argparse.Namespace) -> str:
    facts = resolve(given.mini, offline=True).facts
    found = contestants(facts, given.mini_width)
    text = heldout() if given.text is None else given.text.read_bytes().decode()
    return table.quality(quality.measure(given.mini, found, text, given.densities.split(","), given.out, say))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.styles", description=__doc__)
    add = parser.add_argument
    add("--only", choices=("speed", "quality"), help="one of both halves")
    add("--model", default="opt-1.3b", help="short name, of the shape that is timed (%(default)s)")
    add("--weights", default="int8", choices=("fp32", "bf16", "int8", "int4"), help="of that shape (%(default)s)")
    add("--width", type=int, default=1024, help="of styles shadow and dejavu there (%(default)s)")
    add("--densities", default=DENSITIES, help="HEADS/NEURONS kept, by commas (%(default)s)")
    add("--rounds", type=positive, default=5, help="(%(default)s)")
    add("--tokens", type=positive, default=16, help="timed per setting and round (%(default)s)")
    add("--threads", type=positive, help="of the operators; default: one per core")
    add("--launcher", default="", help="put in front of every measuring process, such as 'chrt -f 50'")
    add("--keep", action="store_true", help="leave the timed engines in OUT")
    add("--mini", default="opt-mini", help="model whose quality is measured (%(default)s)")
    add("--mini-width", type=int, default=256, help="of both styles there (%(default)s)")
    add("--text", type=Path, help="UTF-8 text; default: the held-out half of Python's manual")
    add("--out", type=Path, default=Path("build/styles"), help="engines, JSON, table (%(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
