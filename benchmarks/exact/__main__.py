# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks.exact`, from the repository root: the exact control as a table.

Engines of one shape at several shares of zeros, and opt-mini with its own; each dense, with zeros skipped, under
masks, and both. Engines are made once (`--cache`); every sample is kept in the JSON beside the table, so a run that
was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import shadowc
from benchmarks.decoding import DENSE, ZEROS, Setting
from benchmarks.exact.shifted import lower
from benchmarks.exact.table import markdown
from benchmarks.peers.checkpoint import write_weights
from benchmarks.rounds import Asked, Ledger, LedgerError, measure, positive, threads_of
from shadowc.checkpoint.resolve import OPT_MINI, resolve
from shadowc.runtime.load import read_manifest
from shadowc.sparsity.predictor import Predictor
from shadowc.spec.errors import ShadowcError
from shadowc.spec.options import TrainOptions


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the engines, measure, write the table; returns the exit status."""
    parser = _parser()
    given = parser.parse_args(arguments)
    try:
        settings = settings_of(given.densities)
        engines = dict(_engines(given))
        if given.prepare_only:
            return 0
        asked = Asked(given.weights, "token", settings, given.tokens, threads_of(given.threads))
        out = given.out or given.cache / f"{given.model}.md"
        ledger = Ledger(out.with_suffix(".json"), asked)
        ledger.require_same(given.launcher)
        for turn in range(given.rounds):
            for name, folder in engines.items():
                if len(ledger.rounds(name)) <= turn:
                    _say(f"round {turn + 1} of {given.rounds}: {name}")
                    ledger.add(name, measure(folder, asked, turn, given.launcher))
    except (LedgerError, ShadowcError, ValueError) as error:
        parser.error(str(error))
    manifests = [(name, read_manifest(folder)) for name, folder in engines.items()]
    out.write_text(markdown(manifests, ledger), "utf-8")
    sys.stdout.write(out.read_text("utf-8"))
    return 0


def settings_of(densities: str) -> tuple[str, ...]:
    """The dense twin and every density, each as it is and with zeros skipped.

    Raises:
        ValueError: a density is none.
    """
    kinds = (DENSE, *(item for item in densities.split(",") if item))
    found = tuple(f"{kind}{suffix}" for kind in kinds for suffix in ("", ZEROS))
    for text in found:
        Setting.parse(text)
    return found


def _engines(given: argparse.Namespace) -> Iterator[tuple[str, Path]]:
    """Name and folder of every engine, made where it is not there."""
    for share in [float(item) for item in given.zeros.split(",") if item]:
        name = f"{given.model}, {share:g} lowered"
        folder = given.cache / f"{given.model}-{given.weights}-{share:g}.engine"
        if not folder.is_dir():
            _say(f"making {folder}")
            make_lowered(given.model, share, given.weights, folder)
        yield name, folder
    if given.mini:
        folder = given.cache / f"{OPT_MINI}-{given.weights}.engine"
        shadowc.compile(shadowc.CompileOptions(model=OPT_MINI, weights=given.weights, out=folder))
        yield OPT_MINI, folder


def make_lowered(model: str, zeros: float, weights: str, folder: Path) -> None:
    """Compile the dummy weights of `model` with fc1 biases lowered to a share of zeros, under a random predictor.

    The checkpoint, in fp16, lies beside `folder` while it is compiled: 2 bytes a parameter.

    Raises:
        ShadowcError: no such model, or one that is not handled.
        ValueError: the share is not between 0 and 1.
    """
    dummy = resolve(model, load_format="dummy", offline=True)
    scratch = folder.with_name(f"{folder.name}.checkpoint")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        checkpoint, predictor = scratch / dummy.facts.name, scratch / "predictor"
        write_weights(dummy.facts, lower(dummy.facts, dummy.weights, zeros), checkpoint)
        Predictor.dummy(dummy.facts, TrainOptions().neuron_block).save(predictor)
        options = {"model": str(checkpoint), "predictor": str(predictor), "weights": weights, "out": folder}
        shadowc.compile(shadowc.CompileOptions.model_validate({**options, "offline": True}))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.exact", description=__doc__)
    add = parser.add_argument
    add("--model", default="opt-1.3b", help="short name whose shape the dummy weights have (%(default)s)")
    add("--weights", default="int8", help="(%(default)s)")
    add("--zeros", default="0.5,0.9,0.95", help="shares of ReLU outputs at zero, by commas (%(default)s)")
    add("--densities", default="0.5/0.5,0.5/0.2", help="HEADS/NEURONS kept by the masks (%(default)s)")
    add("--mini", action=argparse.BooleanOptionalAction, default=True, help=f"{OPT_MINI} as well (%(default)s)")
    add("--rounds", type=positive, default=5, help="(%(default)s)")
    add("--tokens", type=positive, default=24, help="timed per setting and round (%(default)s)")
    add("--threads", type=positive, help="of the operators; default: one per core")
    add("--launcher", default="", help="put in front of every measuring process, such as 'chrt -f 50'")
    add("--cache", type=Path, default=Path("build/exact"), help="engines (%(default)s)")
    add("--prepare-only", action="store_true", help="make the engines and stop")
    add("--out", type=Path, help="Markdown file; the JSON goes beside it. Default: CACHE/MODEL.md")
    return parser


if __name__ == "__main__":
    sys.exit(main())
